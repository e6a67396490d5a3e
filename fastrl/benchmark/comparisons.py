"""One objective, ours beside the peers' own code on the same inputs, as a workload."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .objective_peers import Absent, Form
from .workload import Call, Entry, Workload

OP = "objectives"


class _Inside(dict[str, Tensor]):
    """Results of which only the tokens of a mask count: projects differ in what they leave at the others."""

    def __init__(self, results: Mapping[str, Tensor], mask: Tensor) -> None:
        super().__init__(results)
        self.mask = mask

    def __getitem__(self, name: str) -> Tensor:
        x = super().__getitem__(name)
        return torch.where(self.mask != 0, x, 0.0) if x.shape == self.mask.shape else x


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One objective: its inputs, our form of it, and what makes each peer's form (or raises `Absent`).

    With `leaves` a form gives a loss, which is differentiated in those inputs; without, results per token. The truth is
    `exact` in fp64 where it is given: plain PyTorch, a row of its own. Otherwise it is the first peer's code in fp64.
    """

    group: str
    title: str
    sizes: Mapping[str, int]
    inputs: Mapping[str, Tensor]
    ours: Form
    peers: Mapping[str, Callable[[], Form]]
    leaves: tuple[str, ...] = ("logps",)
    exact: Form | None = None
    floor: Entry | None = None  # None: the inputs are read and the gradients written
    flops: Mapping[str, tuple[str, float]] = field(default_factory=dict)  # by entry, where memory is not the limit

    def call(self, form: Form, *, double: bool = False) -> Call:
        """A call of one form: loss and gradients of the leaves, or its results."""

        def run() -> Mapping[str, Tensor]:
            inputs = {n: x.double() if double and x.is_floating_point() else x for n, x in self.inputs.items()}
            leaves = {name: inputs[name].detach().requires_grad_() for name in self.leaves}
            result = form(**{**inputs, **leaves})
            if isinstance(result, Tensor):
                grads = torch.autograd.grad(result, list(leaves.values()))
                result = {"loss": result.detach(), **{f"d {name}": g for name, g in zip(leaves, grads, strict=True)}}
            return _Inside(result, inputs["mask"]) if "mask" in inputs else result

        return run

    @property
    def gradient_bytes(self) -> int:
        return sum(self.inputs[name].nbytes for name in self.leaves)

    @property
    def traffic(self) -> float:
        """Bytes of the inputs and of the gradients."""
        return float(sum(x.nbytes for x in self.inputs.values()) + self.gradient_bytes)

    def read_and_write(self) -> Mapping[str, Tensor]:
        """The floor where memory is the limit."""
        for name, x in self.inputs.items():
            if name in self.leaves:
                x.clone()
            else:
                x.sum()
        return {}


def objective_workload(comparison: Comparison) -> Workload:
    """Ours and those peers that can run here; the others are listed with the reason.

    Raises:
        Absent: none of them can.
    """
    forms: dict[str, Form] = {}
    not_run: dict[str, str] = {}
    for name, make in comparison.peers.items():
        try:
            forms[name] = make()
        except Absent as reason:
            not_run[name] = str(reason)
    if not forms:
        raise Absent("; ".join(dict.fromkeys(not_run.values())))
    first = next(iter(forms.values()))

    def entry(name: str, form: Form, *, ours: bool = False, judge: bool = False) -> Entry:
        formula, cost = comparison.flops.get(name, ("inputs + gradients", comparison.traffic))
        return Entry(name, comparison.call(form), formula, cost, ours=ours, judge=judge)

    entries = [entry("fastrl", comparison.ours, ours=True)]
    if comparison.exact is not None:
        entries.append(entry("eager PyTorch", comparison.exact, judge=True))
    entries += [entry(name, form, judge=comparison.exact is None and form is first) for name, form in forms.items()]
    floor = comparison.floor or Entry(
        "read and write", comparison.read_and_write, "inputs + gradients", comparison.traffic
    )
    return Workload(
        OP, comparison.title, comparison.group, dict(comparison.sizes), "float32", floor, entries,
        comparison.call(comparison.exact or first, double=True), output_bytes=comparison.gradient_bytes,
        cost_unit="FLOP" if comparison.flops else "byte", not_run=not_run,
    )  # fmt: skip
