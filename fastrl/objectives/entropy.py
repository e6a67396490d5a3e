"""Adaptive coefficient of the entropy bonus."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class AdaptiveEntropy:
    """Steps the entropy coefficient up while the policy's entropy is at or below a target, down while it is above.

    Use it where training collapses to few answers, or wanders, under any fixed coefficient. Semantics of TRL 1.16
    (`use_adaptive_entropy`), after Skywork-OR1 (He et al. 2025, section 4.3).

    Args:
        coef: initial coefficient; coef_min, coef_max: its bounds; delta: its step per optimizer step.
        target: entropy in nats per token.
    """

    coef: float = 0.0
    coef_min: float = 0.0
    coef_max: float = 1.0
    delta: float = 0.005
    target: float = 0.2
    last_entropy: float = field(default=math.inf)

    def apply_coef(self) -> float:
        """Coefficient for the coming optimizer step: 0 where the last step's entropy was above the target."""
        return self.coef if self.last_entropy <= self.target else 0.0

    def update(self, entropy_sum: float, count: float) -> None:
        """After an optimizer step: the sum of the entropies of its tokens, in nats, and their number."""
        self.last_entropy = entropy_sum / max(count, 1.0)
        if self.last_entropy <= self.target:
            self.coef = min(self.coef + self.delta, self.coef_max)
        else:
            self.coef = max(self.coef - self.delta, self.coef_min)

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef, "last_entropy": self.last_entropy}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef, self.last_entropy = float(state["coef"]), float(state["last_entropy"])
