"""Advantage estimators: rewards of one step's completions → one number each. Pure, in the type of the rewards.

A completion whose reward is NaN has none: it stays out of its group's statistics and gets advantage 0.
Equal rewards give exactly 0, and so does a group of one: both are decided by comparison, because the rounding error
of a mean divided by an epsilon is noise that would be trained on. Groups go by id and may be uneven.

Shape letters: B completions, K reward functions, S groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from posttrain.rl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from posttrain.rl.algorithms.base import AdvantageInputs

AdvantageName = Literal["group", "group_mean", "rloo", "reinforce_pp", "reinforce_pp_baseline", "opo", "maxrl", "gdpo"]


class _Groups:
    """Sums over the members of each group, laid out on its members; ``weights`` [B] leaves out or counts unevenly."""

    def __init__(self, group_ids: Tensor, weights: Tensor) -> None:
        _, self.index = group_ids.unique(return_inverse=True)
        self.size = int(self.index.max()) + 1 if self.index.numel() else 0
        self.weights = weights
        self.count = self.sum(weights.new_ones(weights.numel()))

    def sum(self, values: Tensor) -> Tensor:
        """[B] → [B], weighted sum over the group."""
        values = (values * self.weights).where(self.weights > 0, 0.0)
        return values.new_zeros(self.size).index_add(0, self.index, values)[self.index]

    def mean(self, values: Tensor) -> Tensor:
        """[B] → [B]; 0 for a group without members."""
        return self.sum(values) / self.count.where(self.count > 0, 1.0)

    def std(self, values: Tensor) -> Tensor:
        """[B] → [B], unbiased (ddof 1); 0 for one member."""
        squares = self.sum((values - self.mean(values)).square())
        return (squares / (self.count - 1).clamp(min=1)).sqrt()

    def equal(self, values: Tensor) -> Tensor:
        """bool [B]: fewer than two members, or all of them with the same value."""
        member = self.weights > 0
        blank = values.new_full((self.size,), float("inf"))
        low = blank.scatter_reduce(0, self.index, values.where(member, float("inf")), "amin")
        high = (-blank).scatter_reduce(0, self.index, values.where(member, float("-inf")), "amax")
        return (low >= high)[self.index]


def _by_group(inputs: AdvantageInputs) -> _Groups:
    return _Groups(inputs.group_ids, (~inputs.rewards.isnan()).to(inputs.rewards.dtype))


def _keep(values: Tensor, rewards: Tensor, groups: _Groups) -> Tensor:
    """``values`` where the group's rewards differ and the completion has one, else exactly 0."""
    return values.where(~groups.equal(rewards) & ~rewards.isnan(), 0.0)


def _standardise(values: Tensor, groups: _Groups, epsilon: float) -> Tensor:
    return _keep((values - groups.mean(values)) / (groups.std(values) + epsilon), values, groups)


def group(inputs: AdvantageInputs, epsilon: float) -> Tensor:
    """GRPO: (R − mean) / (std + ε) in the group (2402.03300, section 4.1.2)."""
    return _standardise(inputs.rewards, _by_group(inputs), epsilon)


def group_mean(inputs: AdvantageInputs, epsilon: float) -> Tensor:
    """Dr.GRPO: R − mean, no division (2503.20783, section 3.2)."""
    groups = _by_group(inputs)
    return _keep(inputs.rewards - groups.mean(inputs.rewards), inputs.rewards, groups)


def rloo(inputs: AdvantageInputs, epsilon: float) -> Tensor:
    """R less the mean of the others = G/(G − 1)·(R − mean) (2402.14740, eq. 6)."""
    count = _by_group(inputs).count
    return group_mean(inputs, epsilon) * count / (count - 1).clamp(min=1)


def reinforce_pp(inputs: AdvantageInputs, epsilon: float) -> Tensor:
    """R whitened over all tokens of the step, γ = 1 (2501.03262, eq. 9)."""
    return _whiten(inputs.rewards, inputs.lengths, epsilon)


def reinforce_pp_baseline(inputs: AdvantageInputs, epsilon: float) -> Tensor:
    """R − group mean, then whitened over all tokens of the step (2501.03262, section 3.2); 0 for a group of one."""
    groups = _by_group(inputs)
    scored = (groups.count > 1) & ~inputs.rewards.isnan()
    centred = group_mean(inputs, epsilon).where(scored, float("nan"))
    return _whiten(centred, inputs.lengths, epsilon)


def _whiten(values: Tensor, lengths: Tensor, epsilon: float) -> Tensor:
    tokens = lengths.to(values.dtype).where(~values.isnan(), 0.0)
    return _standardise(values, _Groups(lengths.new_zeros(lengths.numel()), tokens), epsilon)


def opo(inputs: AdvantageInputs, epsilon: float) -> Tensor:
    """R − Σ n_j R_j / Σ n_j: the length-weighted baseline of least variance (2505.23585, eq. 9)."""
    rewards = inputs.rewards
    tokens = inputs.lengths.to(rewards.dtype).where(~rewards.isnan(), 0.0)
    baseline = _Groups(inputs.group_ids, tokens).mean(rewards)
    return _keep(rewards - baseline, rewards, _by_group(inputs))


def maxrl(inputs: AdvantageInputs, epsilon: float) -> Tensor:
    """(R − mean) / (mean + ε): maximum likelihood of success (2602.02710); rewards must not be negative.

    Raises ``ConfigError`` for a group whose mean is below 0, where the formula would change sign.
    """
    mean = _by_group(inputs).mean(inputs.rewards)
    if bool((mean < 0).any()):
        raise ConfigError("maxrl divides by the group's mean reward, and one is negative: use rewards of at least 0")
    return group_mean(inputs, epsilon) / (mean + epsilon)


def gdpo(inputs: AdvantageInputs, epsilon: float) -> Tensor:
    """Each reward standardised in its group by itself, weighted and summed, then over the step (2601.05242, eq. 4–6).

    A component that is NaN does not apply: it is left out of its group's mean and std and adds 0.
    """
    components, weights = inputs.components, inputs.weights
    if components is None or weights is None:
        raise ValueError("gdpo standardises every reward by itself: AdvantageInputs needs components and weights")
    total = inputs.rewards.new_zeros(inputs.rewards.numel())
    for component, weight in zip(components.unbind(1), weights, strict=True):
        groups = _Groups(inputs.group_ids, (~component.isnan()).to(total.dtype))
        total = total + weight * _standardise(component.to(total.dtype), groups, epsilon)
    total = total.where(~components.isnan().all(1), float("nan"))
    step = _Groups(inputs.group_ids.new_zeros(total.numel()), (~total.isnan()).to(total.dtype))
    # each group's scores sum to 0, so the step's mean is 0 but for rounding: what is 0 stays exactly 0
    return _standardise(total, step, epsilon).where(total != 0, 0.0)


ADVANTAGES: dict[str, Callable[[AdvantageInputs, float], Tensor]] = {
    "group": group,
    "group_mean": group_mean,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "opo": opo,
    "maxrl": maxrl,
    "gdpo": gdpo,
}
