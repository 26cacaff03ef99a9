"""The draw and the truncations on their own, against enumeration."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.rl.types import SamplingParams
from posttrain.rollout import sampling

PROBABILITIES = [0.05, 0.4, 0.25, 0.2, 0.1]


def processed(dtype: torch.dtype = torch.float32, vocab_size: int = 5, **changes: float) -> torch.Tensor:
    logits = torch.tensor([PROBABILITIES], dtype=torch.float64).log().to(dtype) + 3.0
    return sampling.processed_logprobs(logits, SamplingParams(max_tokens=1, **changes), vocab_size)[0].exp()


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 2, 3]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.64}, [1, 2]),
        ({"top_p": 0.66}, [1, 2, 3]),
        ({"top_p": 1e-9}, [1]),
        ({"min_p": 0.49}, [1, 2, 3]),
        ({"min_p": 0.51}, [1, 2]),
        # Of the three that min-p leaves (.4 .25 .2 of .85) the best has .47: top-p .46 needs one, without min-p two.
        ({"min_p": 0.49, "top_p": 0.46}, [1]),
        ({"top_p": 0.46}, [1, 2]),
        # Of the two that top-k leaves the best has .615.
        ({"top_k": 2, "top_p": 0.6}, [1]),
    ],
    ids=str,
)
def test_kept_set_and_its_renormalised_probabilities(changes: dict[str, float], kept: list[int]) -> None:
    total = sum(PROBABILITIES[token] for token in kept)
    expected = [PROBABILITIES[token] / total if token in kept else 0.0 for token in range(5)]
    assert processed(**changes).tolist() == pytest.approx(expected, abs=1e-6)


def test_temperature_divides_the_logits() -> None:
    weights = [p ** (1 / 0.5) for p in PROBABILITIES]
    assert processed(temperature=0.5).tolist() == pytest.approx([w / sum(weights) for w in weights], abs=1e-6)


def test_padded_ids_get_no_probability_even_when_greedy() -> None:
    for temperature in (0.0, 1.0):
        result = processed(vocab_size=3, temperature=temperature)
        assert result[3:].tolist() == [0.0, 0.0]
        assert result.tolist()[:3] == pytest.approx([p / 0.7 for p in PROBABILITIES[:3]], abs=1e-6)


def test_logits_given_are_not_changed() -> None:
    logits = torch.tensor([PROBABILITIES]).log()
    before = logits.clone()
    params = SamplingParams(max_tokens=1, top_k=2, min_p=0.2, top_p=0.5, temperature=0.7)
    sampling.processed_logprobs(logits, params, 4)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("dtype", "result"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_float64_passes_through_and_half_types_are_lifted(dtype: torch.dtype, result: torch.dtype) -> None:
    assert processed(dtype).dtype == result
    if dtype == torch.float64:
        assert processed(dtype).tolist() == pytest.approx(PROBABILITIES, abs=1e-15)


def test_draw_inverts_the_cumulative_distribution() -> None:
    logprobs = torch.tensor([0.25, 0.0, 0.5, 0.25]).log()
    points = [0.0, 0.2499, 0.2501, 0.5, 0.7499, 0.7501, 1 - 2**-53]
    drawn = sampling.draw(logprobs.expand(len(points), 4), torch.tensor(points, dtype=torch.float64), greedy=False)
    assert drawn.tolist() == [0, 0, 2, 2, 2, 3, 3]


def test_draw_of_zero_gives_the_first_token_that_has_probability() -> None:
    logprobs = torch.tensor([[0.0, 0.0, 0.5, 0.5]]).log()
    assert sampling.draw(logprobs, torch.zeros(1, dtype=torch.float64), greedy=False).tolist() == [2]


def test_draw_never_leaves_the_kept_tokens_at_the_upper_end() -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs = (torch.randn(200, 33, generator=generator) * 3).log_softmax(-1)
    logprobs[:, 20:] = -math.inf
    drawn = sampling.draw(logprobs, torch.full((200,), 1 - 2**-53, dtype=torch.float64), greedy=False)
    assert drawn.tolist() == [19] * 200


def test_random_numbers_of_a_row_depend_on_its_seed_only() -> None:
    together = sampling.uniforms([1, 2, 2**62 + 1], 40)
    assert together.dtype == torch.float64
    assert torch.equal(together[2], sampling.uniforms([2**62 + 1], 40)[0])
    assert torch.equal(together[0, :7], sampling.uniforms([1], 7)[0])
    assert not torch.equal(together[0], together[1])
