"""Qwen3-1.7B-Base on GSM8K by GSPO or GRPO: LoRA on one GPU, vLLM and the trainer around one copy of the weights.

    python examples/gsm8k.py [--algorithm grpo] [--quantization nf4] [--model Qwen/Qwen3-4B-Base] [--steps 200]
    python examples/gsm8k.py --model /path/to/model --data /path/to/gsm8k      # offline

gsm8k.toml is the same run as a file, and says where its figures come from. ``--data`` takes a hub name or a folder with
train.jsonl and test.jsonl (question, answer). The held-out figure is greedy accuracy on the test split.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from posttrain import rl

SYSTEM = "Solve the problem step by step and put the final answer into \\boxed{}."


@rl.reward(weight=0.1)
def boxed(completion: str) -> float:
    r"""1 when the reply holds exactly one \boxed{…}, and it is closed."""
    return float(completion.count("\\boxed{") == 1 and "}" in completion.partition("\\boxed{")[2])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-1.7B-Base", help="hub name or local folder")
    parser.add_argument("--data", default="openai/gsm8k", help="hub name or local folder")
    parser.add_argument("--algorithm", default="gspo", help="gspo, grpo or any other")
    parser.add_argument("--quantization", default="none", choices=["none", "nf4", "fp8"], help="of the frozen base")
    parser.add_argument("--engine", default="vllm", choices=["vllm", "transformers"])
    parser.add_argument("--steps", type=int, default=200)
    return parser.parse_args(arguments)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What ``rl.train`` is called with."""
    return {
        "model": {"name": options.model, "quantization": options.quantization},
        "dataset": options.data,
        "data": {
            "answer_after": "####",
            "system_prompt": SYSTEM,
            "eval_split": "test",
            "max_prompt_tokens": 512,
        },
        "rewards": ["math_answer", boxed],
        "algorithm": options.algorithm,
        "steps": options.steps,
        "rollout": {"engine": options.engine, "prompts_per_step": 32, "group_size": 8, "max_tokens": 512},
        "trainer": {
            "learning_rate": 1e-5,
            "warmup_steps": 10,
            "micro_batch_tokens": 8192,
            "activation_checkpointing": True,
            "lora": {"rank": 16, "alpha": 32},
        },
        "evaluation": {"every": 50, "samples": 1, "temperature": 0.0, "max_prompts": 1319},
        "checkpoint": {"every": 50},
    }


if __name__ == "__main__":
    result = rl.train(**settings(parse()))
    accuracy = [row["eval/pass@1"] for row in result.metrics if "eval/pass@1" in row]
    print(f"greedy accuracy on the test split: {accuracy[0]:.3f} before, {accuracy[-1]:.3f} after")
    print(f"adapter, as peft loads it: {result.checkpoint}")
