"""Signatures of verl: ``compute_score`` of ``custom_reward_function``, and the batch reward manager's."""

from __future__ import annotations

import re

from posttrain.rl.rewards import reward
from tests.rl.rewards.conventions.case import CHAT, Case


@reward
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """The documented form; ``extra_info`` is a dict whatever the row holds."""
    assert data_source == "openai/gsm8k" and extra_info.get("split") == "train"
    return 1.0 if solution_str.split("####")[-1].strip() == ground_truth else 0.0


@reward
def compute_score_in_parts(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> dict:
    """A dict: ``score`` counts."""
    assert not kwargs
    right = ground_truth in solution_str
    return {"score": 1.0 if right else -1.0, "acc": right, "pred": solution_str[-4:]}


@reward
def compute_score_plain(solution_str, ground_truth, method="strict", format_score=0.0, score=1.0):
    """As bundled for GSM8K; its settings keep their defaults though a column has the name of one."""
    found = re.search(r"#### (\d+)", solution_str)
    assert method == "strict"
    return score if found and found[1] == ground_truth else format_score


@reward
async def compute_score_async(data_source, solution_str, ground_truth, extra_info):
    """Awaited by the reward loop."""
    return float(solution_str.count(ground_truth))


@reward
def compute_score_batched(data_sources, solution_strs, ground_truths, extra_infos):
    """Once a batch."""
    assert data_sources == ["openai/gsm8k"] * len(extra_infos)
    return [{"score": float(truth in solution)} for solution, truth in zip(solution_strs, ground_truths, strict=True)]


ROW = {
    "data_source": "openai/gsm8k",
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "42"},
    "extra_info": {"split": "train", "index": 7},
}
THREE = ("6 · 7 = 42 #### 42", "#### 43", "42")
CASES = [
    Case(compute_score, "verl", THREE, [1.0, 0.0, 1.0], ROW, CHAT),
    Case(compute_score_in_parts, "verl", THREE, [1.0, -1.0, 1.0], ROW, CHAT),
    Case(compute_score_plain, "verl", THREE, [1.0, 0.0, 0.0], ROW | {"score": 9.0, "method": "flexible"}),
    Case(compute_score_plain, "verl", THREE, [1.0, 0.0, 0.0], {"ground_truth": "42"}),
    Case(compute_score_plain, "verl", THREE, [1.0, 0.0, 0.0], {"answer": "42"}),
    Case(compute_score_async, "verl", THREE, [2.0, 0.0, 1.0], ROW),
    Case(compute_score_batched, "verl", THREE, [1.0, 0.0, 1.0], ROW),
]
