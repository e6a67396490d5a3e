"""Samples on disk: JSON lines, the settings first, then one line per prompt with all of its samples.

What is written stays written: lines are added as they come and flushed to the disk; a line that a kill or a full disk
cut off is dropped when the file is opened again, and sampling continues with the prompts that are missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict


class Sample(TypedDict):
    """One completion. `finished`: it ended by itself; `rewards`: by the function's name, None where it gave none."""

    completion: Any
    tokens: int
    finished: bool
    rewards: dict[str, float | None]


class PromptSamples(TypedDict):
    """A line: the row of the dataset, its prompt, the greedy completion (or None) and the sampled ones."""

    row: int
    prompt: Any
    greedy: Sample | None
    samples: list[Sample]


class SampleFileError(ValueError):
    """The file was made with other settings, is damaged, or is no such file; the message says what to do."""


class WriteError(RuntimeError):
    """A file can't be written; the message says what is kept and what to do."""


class SampleFile:
    """Opens or creates the file.

    Args:
        path: the file; its folder is made.
        settings: what the samples depend on, as JSON holds it; an existing file must have the same.

    Raises:
        SampleFileError, WriteError: see there.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.prompts: dict[int, PromptSamples] = {}
        self._size = 0  # of the whole lines
        settings = json.loads(json.dumps(settings))
        if self.path.exists():
            self._read(settings)
        if not self._size:
            with _writing(self.path, "nothing was sampled yet"):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write([{"settings": settings}])

    def add(self, prompts: Sequence[PromptSamples]) -> None:
        """Adds lines; a prompt that is there already is left as it is.

        Raises:
            WriteError: the disk is full, say.
        """
        new = [prompt for prompt in prompts if prompt["row"] not in self.prompts]
        self._write(new)
        self.prompts.update((prompt["row"], prompt) for prompt in new)

    def _read(self, settings: Mapping[str, Any]) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                if number == 1:
                    self._check(entry["settings"], settings)
                else:
                    self.prompts[entry["row"]] = entry
            except (ValueError, KeyError, TypeError) as error:
                if isinstance(error, SampleFileError):
                    raise
                what = "is not a file of samples" if number == 1 else "is damaged: delete that line to sample it again"
                raise SampleFileError(f"{self.path}, line {number}: {what}, or choose another file") from error
        if not whole and content and not b'{"settings"'.startswith(content[:11]):
            raise SampleFileError(f"{self.path} is not a file of samples: choose another one")
        self._size = len(whole)
        if len(content) > len(whole):
            with _writing(self.path, self._kept):
                os.truncate(self.path, len(whole))

    def _check(self, found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        different = [key for key in {**found, **settings} if found.get(key) != settings.get(key)]
        if different:
            key = different[0]
            raise SampleFileError(
                f"{self.path} holds samples made with other settings: {', '.join(different)} ({key} was "
                f"{json.dumps(found.get(key))}, now it is {json.dumps(settings.get(key))}). --fresh starts over and "
                "keeps them under another name"
            )

    def _write(self, entries: Sequence[Mapping[str, Any]]) -> None:
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode()
        with _writing(self.path, self._kept):
            try:
                with self.path.open("ab") as file:
                    file.write(lines)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, self._size)
                raise
        self._size += len(lines)

    @property
    def _kept(self) -> str:
        return f"the samples of {len(self.prompts)} prompts are kept"


def write_file(path: Path, content: bytes, kept: str) -> Path:
    """Writes a file whole or not at all, over an earlier one.

    Args:
        path: the file; its folder is made.
        content: its bytes.
        kept: what is not lost if that fails.

    Raises:
        WriteError: see there.
    """
    with _writing(path, kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes it private
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
    return path


@contextlib.contextmanager
def _writing(path: Path, kept: str) -> Any:
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"{path} can't be written: {error.strerror or error}; {kept}. Once there is room and permission, the same "
            "command continues"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
