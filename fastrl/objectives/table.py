"""Tables of objectives x options, made from the code: `python -m fastrl.objectives.table` prints what README.md holds.

What an objective takes is found by giving it the option: a cell says no where the objective refuses it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .dpo import LOSS_TYPES as DPO_LOSS_TYPES
from .dpo import PreferenceObjective
from .estimators import ESTIMATORS
from .kto import KTO_LOSS_TYPES, KTOObjective
from .policy_objective import PolicyObjective
from .reference_free import CPO_LOSS_TYPES, TPO_LOSS_TYPES, CPOObjective, TPOObjective
from .surrogates import LOSSES, PRESETS

# Column -> an argument that no loss type has by default.
POLICY_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "epsilon": {"epsilon": 0.3},
    "epsilon_high": {"epsilon_high": 0.4},
    "delta": {"delta": 4.0},
    "clip_ratio_c": {"clip_ratio_c": 5.0},
    "sequence ratio": {"importance_sampling_level": "sequence"},
    "aggregation": {"aggregation": "token-sum"},
    "KL in the loss": {"beta": 0.1},
    "KL x ratio": {"beta": 0.1, "use_bias_correction_kl": True},
    "exact KL": {"beta": 0.1, "kl_estimator": "full"},
    "entropy bonus": {"entropy_coef": 0.1},
    "positive NLL": {"nll_coef": 0.1},
    "top entropy": {"top_entropy_quantile": 0.2},
    "off-policy mask": {"off_policy_mask_threshold": 0.5},
}
PREFERENCE_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "label_smoothing": {"label_smoothing": 0.2},
    "f_divergence_type": {"f_divergence_type": "forward_kl"},
    "ld_alpha": {"ld_alpha": 0.5},
    "use_weighting": {"use_weighting": True},
    "reference_free": {"reference_free": True},
    "rpo_alpha": {"rpo_alpha": 1.0},
    "dpop_lambda": {"dpop_lambda": 5.0},
    "openrlhf": {"preset": "openrlhf"},
}


def takes(kind: type, base: Mapping[str, Any], option: Mapping[str, Any]) -> bool:
    """Whether the objective can be made with an option; a warning that it has no effect counts as no."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kind(**{**base, **option})
    except (ValueError, UserWarning):
        return False
    return True


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    head = list(head)
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _cell(yes: bool) -> str:
    return "yes" if yes else ""


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def policy_tables() -> Iterator[str]:
    """What each loss type is, and what it takes."""
    presets = [name for name in PRESETS if name is not None]
    yield from _table(
        ("loss_type", "loss of a token", "aggregation", "passes", "paper", "same numbers as", "when"),
        (
            (
                _code(name),
                _code(entry.formula),
                entry.aggregation,
                "one" if PolicyObjective(loss_type=name).token_local else "two",
                entry.paper,
                entry.peer,
                entry.use,
            )
            for name, entry in LOSSES.items()
        ),
    )
    yield ""
    yield from _table(
        ("loss_type", *POLICY_OPTIONS, *(f"preset {p}" for p in presets), "its own"),
        (
            (
                _code(name),
                *(_cell(takes(PolicyObjective, {"loss_type": name}, option)) for option in POLICY_OPTIONS.values()),
                *(_cell(name in PRESETS[p].losses) for p in presets),
                ", ".join(_code(o) for o in entry.options if not any(o in given for given in POLICY_OPTIONS.values())),
            )
            for name, entry in LOSSES.items()
        ),
    )


def preference_table() -> Iterator[str]:
    """What each loss type of `PreferenceObjective` takes."""

    def base(name: str) -> dict[str, Any]:
        return {"loss_type": name, "label_smoothing": 0.1} if name == "exo_pair" else {"loss_type": name}

    yield from _table(
        ("loss_type", *PREFERENCE_OPTIONS),
        (
            (
                _code(name),
                *(_cell(takes(PreferenceObjective, base(name), option)) for option in PREFERENCE_OPTIONS.values()),
            )
            for name in DPO_LOSS_TYPES
        ),
    )
    yield ""
    for kind, names in ((CPOObjective, CPO_LOSS_TYPES), (TPOObjective, TPO_LOSS_TYPES), (KTOObjective, KTO_LOSS_TYPES)):
        yield f"- `{kind.__name__}`: {', '.join(_code(name) for name in names)}"
    yield "- `ORPOObjective`"


def advantage_table() -> Iterator[str]:
    """The names that `compute_advantages` takes, by preset."""
    for preset, estimators in ESTIMATORS.items():
        yield f"- preset {_code(preset)}: {', '.join(_code(name) for name in estimators)}"


SECTIONS = {"policy": policy_tables, "preference": preference_table, "advantages": advantage_table}


def tables() -> dict[str, str]:
    """Markdown of each section."""
    return {name: "\n".join(make()) for name, make in SECTIONS.items()}


def filled(page: str) -> str:
    """A Markdown page with what stands between `<!-- table: NAME -->` and `<!-- end -->` made anew."""
    for name, text in tables().items():
        start = f"<!-- table: {name} -->\n"
        before, found, rest = page.partition(start)
        if not found:
            raise ValueError(f"the page has no {start.strip()}")
        _, end, after = rest.partition("<!-- end -->")
        page = before + start + text + "\n" + end + after
    return page


def main() -> None:
    """Rewrite the tables of the README beside this file."""
    path = Path(__file__).with_name("README.md")
    path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()
