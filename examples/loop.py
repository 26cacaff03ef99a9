"""The loop of ``basic.py`` spelled out: the verbs behind ``rl.train``, for when you want the loop to be yours.

``python examples/loop.py`` takes about 20 seconds on two cores and needs no network.
"""

import asyncio
import tempfile
from pathlib import Path

from basic import TINY, close, correct
from quickstart_task import count_on, demonstrations

from posttrain.rl import metrics
from posttrain.rl.algorithms import parse
from posttrain.rl.batching import BatchSettings, assign_advantages, plan, plan_supervised
from posttrain.rl.config import DataConfig, ModelConfig, RandomModel, RolloutConfig, TrainerConfig
from posttrain.rl.data import PromptSource
from posttrain.rl.rewards import Rubric
from posttrain.rl.service.random_model import materialize
from posttrain.rl.types import OptimParams, Prompt, SamplingParams
from posttrain.rollout.chat import load_encoder
from posttrain.rollout.transformers_engine import TransformersEngine
from posttrain.trainer.trainer import Trainer

STEPS, PROMPTS, GROUP, MAX_TOKENS = 40, 10, 16, 8


async def main() -> float:
    """Train, and return the mean reward of the last step."""
    model, data = ModelConfig(random=RandomModel(config=TINY, characters="0123456789>")), DataConfig()
    source = materialize(model, Path(tempfile.mkdtemp()))
    encoder = load_encoder(source, model, data)

    # The trainer owns the LoRA adapter; the engine samples around the very same base weights.
    trainer = Trainer(source, model, TrainerConfig())
    engine = TransformersEngine(
        source, model, RolloutConfig(max_sequences=PROMPTS * GROUP), base_weights=trainer.base_weights()
    )

    # Supervised warm start.
    cross_entropy = parse("cross_entropy")
    examples = [
        (encoder.encode(Prompt(str(i), row["prompt"])).prompt_ids, encoder.encode_completion(row["completion"]))
        for i, row in enumerate(demonstrations())
    ]
    for step in range(150):
        start = step * 32 % len(examples)
        batches = plan_supervised(examples[start : start + 32], micro_batch_tokens=4096, max_tokens=MAX_TOKENS)
        trainer.forward_backward(batches, cross_entropy)
        trainer.optim_step(OptimParams(learning_rate=5e-3))
    trainer.reset_optimizer()

    # Reinforcement learning.
    rows = [{"prompt": f"{digit}>", "answer": count_on(digit)} for digit in range(10)]
    prompts = PromptSource(rows, data, seed=0, encode=encoder.encode)
    rubric, algorithm = Rubric([correct, close]), parse("gspo")
    settings = BatchSettings(micro_batch_tokens=4096, updates=1, max_tokens=MAX_TOKENS)
    params = SamplingParams(max_tokens=MAX_TOKENS, stop_token_ids=encoder.stop_token_ids)
    figures: dict[str, float] = {}
    for step in range(1, STEPS + 1):
        engine.load_adapter(trainer.export_adapter())
        taken = prompts.take(PROMPTS)
        completions = engine.generate(taken, GROUP, params)
        groups = await rubric.score(list(zip(taken, completions, strict=True)), step=step)
        assign_advantages(groups, algorithm, MAX_TOKENS)
        for update in plan(groups, algorithm, settings):
            learned = trainer.forward_backward(update, algorithm)
            trainer.optim_step(OptimParams(learning_rate=2e-3))
        figures = metrics.values({**rubric.metrics(groups), **learned})
        if step % 5 == 0:
            print(f"step {step}  correct {figures['reward/correct/mean']:.2f}  loss {figures['loss/total']:+.4f}")
    return figures["reward/correct/mean"]


if __name__ == "__main__":
    print(f"reward of the last step: {asyncio.run(main()):.2f}")
