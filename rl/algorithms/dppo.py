"""DPPO-TV (2602.04879): a trust region on the probability of the sampled token, not on its ratio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveFloat

from posttrain.rl.algorithms.policy import SamplerAnchored, Surrogate

if TYPE_CHECKING:
    from posttrain.rl.algorithms.ops import Tokens


class DPPO(SamplerAnchored):
    """Divergence proximal policy optimization, binary total variation."""

    name: Literal["dppo"] = "dppo"
    delta: PositiveFloat = 0.2
    """How far the sampled token's probability may move before the token stops counting."""
    cap: PositiveFloat = 20.0
    """Upper bound of the importance weight."""

    def surrogate(self, tokens: Tokens) -> Surrogate:
        """``−sg[min(ratio, cap)]·A·logprobs`` where p − q is inside the region on the side the advantage pushes to."""
        ratio = tokens.behavior_log_ratio.detach().exp()
        moved = tokens.logprobs.detach().exp() - tokens.behavior_logprobs.exp()
        positive = tokens.advantages > 0
        high = positive & (moved > self.delta)
        low = ~positive & (moved < -self.delta)
        loss = -ratio.clamp(max=self.cap) * tokens.advantages * tokens.logprobs
        return Surrogate(loss.where(~(low | high), 0.0), ratio, low, high)
