"""What a checkpoint is on the disk: a directory with a manifest that lists every file, its size and its checksum, and
says of which run it is. It is renamed into place once it is whole."""

import contextlib
import errno
import json
import os
import re
import shutil
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

logger = logging.get_logger(__name__)

MANIFEST = "fastrl_manifest.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REPLACED = ".replaced-"  # a checkpoint of the same step, moved aside until its successor is in place


class CheckpointError(ValueError):
    """A directory that a run can't be continued from."""


class IncompleteCheckpointError(CheckpointError):
    """A directory that is not a whole checkpoint of fastrl."""


class ForeignCheckpointError(CheckpointError):
    """A checkpoint of another run: of another trainer, another model, other data."""


class CheckpointWriteError(OSError):
    """A checkpoint or a model could not be written; the checkpoints that were there before are as they were."""


def check_complete(checkpoint: str | os.PathLike[str], *, checksums: bool = True) -> dict[str, Any]:
    """The manifest of a checkpoint of which every file is there as it was written.

    Args:
        checkpoint: its directory.
        checksums: read all of it; False: only the sizes are compared.

    Raises:
        IncompleteCheckpointError: a file is missing, was cut or has changed, or there is no manifest.
    """
    directory = Path(checkpoint)

    def refuse(reason: str) -> IncompleteCheckpointError:
        return IncompleteCheckpointError(f"{directory} is not a complete checkpoint: {reason}")

    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text())
        files = {name: (facts["bytes"], facts["crc32"]) for name, facts in manifest["files"].items()}
    except FileNotFoundError:
        raise refuse(f"it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise refuse(f"{MANIFEST} can't be read ({type(error).__name__}: {error})") from error
    for name, (size, checksum) in files.items():
        path = directory / name
        if not path.is_file():
            raise refuse(f"{name} is missing")
        if path.stat().st_size != size:
            raise refuse(f"{name} has {path.stat().st_size} bytes instead of {size}")
        if checksums and _checksum(path) != checksum:
            raise refuse(f"{name} has changed since it was written")
    return manifest


def check_run(
    checkpoint: str | os.PathLike[str], run: Mapping[str, Any], data: Mapping[str, Any], *, checksums: bool = True
) -> None:
    """Raises `CheckpointError` unless a checkpoint is complete and its manifest has all that is in `run` and `data`;
    `checksums` as for `check_complete`."""
    manifest = check_complete(checkpoint, checksums=checksums)
    refuse_differences(checkpoint, manifest["run"], run, "only its own run can continue from it")
    way = "set these as they were; or ignore_data_skip=True, to go on with other data from their beginning"
    refuse_differences(checkpoint, manifest["data"], data, way)


def newest_complete(output_dir: str | os.PathLike[str], check: Callable[[Path], Any] = check_complete) -> str | None:
    """The checkpoint of the highest step, or None; those that `check` refuses are passed over with a warning."""
    root = Path(output_dir)
    if not root.is_dir():
        return None
    for aside in root.glob(f"{_REPLACED}{PREFIX_CHECKPOINT_DIR}-*"):  # killed between the two renames of `install`
        place = root / aside.name.removeprefix(_REPLACED)
        if not place.exists():
            os.rename(aside, place)
    found = []
    for path in root.iterdir():
        step = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if step and path.is_dir():
            found.append((int(step[1]), path))
    for _, path in sorted(found, reverse=True):
        try:
            check(path)
        except CheckpointError as error:
            logger.warning(f"Passed over: {error}")
            continue
        return str(path)
    return None


@contextlib.contextmanager
def one_write_error(what: str, kept: str, way: str) -> Iterator[None]:
    """Makes one error of the many that torch, safetensors and Python have for what the disk does not take.

    Args:
        what: can't be written then.
        kept: what was not lost.
        way: how to go on, once the disk takes it.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save has several messages for it, whose only common sign is where they come from.
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        other = isinstance(error, RuntimeError) and raised_in != Path(torch.serialization.__file__)
        if other or (isinstance(error, OSError) and error.errno is None):  # a push to the hub that failed, say
            raise
        reason = " ".join(str(error).split())
        cure = "make room (save_total_limit keeps fewer checkpoints)" if _is_full(error) else "mend that"
        raise CheckpointWriteError(f"{what} could not be written: {reason}. {kept}: {cure}, then {way}") from error


def _is_full(error: Exception) -> bool:
    if any(os.strerror(code) in str(error) for code in _FULL):
        return True
    return isinstance(error, RuntimeError) and "strerror" not in str(error)  # torch tells it only of files to open


def refuse_differences(
    checkpoint: str | os.PathLike[str], there: Mapping[str, Any], here: Mapping[str, Any], way: str
) -> None:
    """Raises `ForeignCheckpointError`, which says the way out, unless `there` has all that is `here`."""
    different = [
        f"{name}: {there.get(name)} there, {here[name]} here" for name in here if there.get(name) != here[name]
    ]
    if different:
        raise ForeignCheckpointError(f"{checkpoint} is of another run ({'; '.join(different)}): {way}")


def write_manifest(directory: Path, identity: Mapping[str, Any]) -> None:
    """The last file of a checkpoint, after all others have reached the disk; `identity` says of which run it is."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    files = {str(p.relative_to(directory)): {"bytes": p.stat().st_size, "crc32": _checksum(p)} for p in paths}
    for name in files:
        _sync(directory / name)
    manifest = directory / MANIFEST
    manifest.write_text(json.dumps({"torch": torch.__version__, **identity, "files": files}, indent=1))
    _sync(manifest)
    _sync(directory)


def install(source: Path, place: Path) -> None:
    """Renames a whole checkpoint into its place. One that is there is kept until then."""
    aside = place.with_name(_REPLACED + place.name)
    if aside.exists():
        shutil.rmtree(aside)
    if place.exists():  # the run was started anew in the directory of an older one
        os.rename(place, aside)
    os.rename(source, place)
    _sync(place.parent)
    if aside.exists():
        shutil.rmtree(aside)


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
