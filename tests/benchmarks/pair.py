"""An engine and a trainer around one copy of the weights: start, memory, sleep, agreement, publishing, fifty cycles.

Shape letters: L loss tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from remote import CudaContext, Remote, settled_mib, used_mib
from report import attempt, emit

from posttrain.rl.algorithms import parse
from posttrain.rl.batching import BatchSettings, plan
from posttrain.rl.config import LoraConfig, ModelConfig, RolloutConfig, TrainerConfig
from posttrain.rl.sharing import opened
from posttrain.rl.types import (
    Completion,
    OptimParams,
    Prompt,
    Rollout,
    RolloutGroup,
    SamplingParams,
    SharedWeights,
    TrainBatch,
)
from posttrain.rollout.vllm_engine import VllmEngine
from posttrain.trainer.trainer import Trainer

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 16
MIB = 2**20


class TrainerProbe(Trainer):
    """A trainer that can be told which adapter it has, and that can write into the weights it maps."""

    def randomize(self, seed: int, scale: float, only: str | None = None) -> None:
        """Random B everywhere, or beside the layers called ``only`` and zeros elsewhere; A stays as it is."""
        generator = torch.Generator(self.device).manual_seed(seed)
        with torch.no_grad():
            for name, weight in self._weights.items():
                if ".lora_B." in name:
                    chosen = only is None or f".{only}." in name
                    weight.normal_(0, scale, generator=generator) if chosen else weight.zero_()

    def adapter_bytes(self) -> int:
        """Of the trained weights."""
        return sum(weight.nbytes for weight in self._weights.values())

    def flip(self, shared: SharedWeights, name: str, part: str) -> None:
        """Invert one bit in the middle of a tensor of the engine's."""
        tensor = opened(shared[name].tensors[part])
        bits = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
        bits[len(bits) // 2] ^= 1
        if tensor.is_cuda:
            torch.cuda.synchronize()


@dataclass(slots=True, frozen=True)
class Settings:
    """What a session runs with."""

    source: Path
    base: str
    """``bf16``, ``nf4`` or ``fp8``."""
    kv_cache_bytes: int
    cycles: int
    eager: bool
    only: tuple[str, ...] = ()
    """Of the measurements after the start; all of them by default."""

    @property
    def model(self) -> ModelConfig:
        """Of engine and trainer; float32 where there is no GPU."""
        quantization: Any = "none" if self.base == "bf16" else self.base
        dtype: Any = "bfloat16" if torch.cuda.is_available() else "float32"
        return ModelConfig(name=str(self.source), dtype=dtype, quantization=quantization)


class Session:
    """One engine and one trainer, each in its process, and the measurements on them."""

    def __init__(self, settings: Settings) -> None:
        """Start the engine, then the trainer, and say what either took."""
        self.settings, self.case = settings, settings.base
        share = 0.5 if torch.cuda.is_available() else 0.0
        context = Remote(share)
        empty = settled_mib()
        context.build(CudaContext)
        self.context_mib = settled_mib() - empty
        context.close()
        self._start_engine(share, settled_mib())
        self._start_trainer(share)
        self.prompts = prompts_of(8, 128)

    def _start_engine(self, share: float, empty: float) -> None:
        settings = self.settings
        began = time.perf_counter()
        self.engine = Remote(share)
        process = time.perf_counter() - began
        rollout = RolloutConfig(max_model_len=1024, enforce_eager=settings.eager, lora_backend="dense")
        seconds = self.engine.build(
            partial(
                VllmEngine,
                settings.source,
                settings.model,
                rollout,
                lora_rank=RANK,
                lora_targets="all-linear",
                kv_cache_bytes=settings.kv_cache_bytes,
                sequences=64,
                in_process=True,
            )
        )
        emit("engine start", self.case, process_s=process, engine_s=seconds, used_mib=settled_mib() - empty)

    def _start_trainer(self, share: float) -> None:
        self.engine("generate", prompts_of(8, 128), 1, SamplingParams(max_tokens=8))  # what it takes at first use
        self.shared: SharedWeights = self.engine("export_weights")
        export_s = self.engine.last_seconds
        self.trainer = Remote(share)
        before = settled_mib()
        # vLLM's CPU build keeps its weights to itself
        config = TrainerConfig(
            lora=LoraConfig(rank=RANK, alpha=32), copy_repacked_weights=not torch.cuda.is_available()
        )
        seconds = self.trainer.build(
            partial(TrainerProbe, self.settings.source, self.settings.model, config, seed=0, shared=self.shared)
        )
        extra = settled_mib() - before
        report = self.trainer("storage_report")
        base = sum(held.bytes for held in report if held.shared) / MIB
        adapter = self.trainer("adapter_bytes") / MIB
        memory = self.trainer("memory")
        emit(
            "trainer memory",
            self.case,
            base_mib=base,
            extra_mib=extra,
            context_mib=self.context_mib,
            extra_less_context_mib=extra - self.context_mib,
            extra_less_context_pct=100 * (extra - self.context_mib) / base if base else None,
            adapter_mib=adapter,
            extra_less_context_and_adapter_pct=100 * (extra - self.context_mib - adapter) / base if base else None,
            allocated_mib=1024 * memory.get("allocated_gib", 0.0),
            reserved_mib=1024 * memory.get("reserved_gib", 0.0),
            export_s=export_s,
            trainer_start_s=seconds,
        )

    def storage(self) -> None:
        """Every tensor of the trainer's base is the engine's memory: addresses, checksums, one bit seen from there."""
        report = self.trainer("storage_report")
        own = [held for held in report if not held.shared]
        expected = sum(len(weight.tensors) for weight in self.shared.values())
        scheme: Any = {"bf16": "dense"}.get(self.settings.base, self.settings.base)
        name = next(name for name, weight in self.shared.items() if weight.tensors and weight.scheme == scheme)
        part = "absmax" if scheme == "nf4" else "weight"
        checksums = self._engine_checksums()
        self.trainer("flip", self.shared, name, part)
        flipped = self._engine_checksums()
        self.trainer("flip", self.shared, name, part)
        changed = [key for key in checksums if flipped[key] != checksums[key]]
        emit(
            "storage",
            self.case,
            tensors=expected,
            shared=len(report) - len(own),
            private=len(own),
            private_mib=sum(held.bytes for held in own) / MIB,
            private_names=", ".join(held.name for held in own[:3]),
            checksums_equal=checksums == {n: dict(weight.checksums) for n, weight in self.shared.items()},
            flip_seen=changed == [name],
            flip_undone=self._engine_checksums() == checksums,
        )

    def sleep(self) -> None:
        """How much of the KV cache comes back, and how fast the engine wakes."""
        awake, returned, sleeps, wakes = settled_mib(), [], [], []
        for _ in range(5):
            self.engine("sleep")
            sleeps.append(self.engine.last_seconds)
            returned.append(awake - settled_mib())
            self.engine("wake")
            wakes.append(self.engine.last_seconds)
        cache = self.settings.kv_cache_bytes / MIB
        emit(
            "sleep",
            self.case,
            kv_cache_mib=cache,
            returned_pct=100 * statistics.median(returned) / cache,
            sleep_s=statistics.median(sleeps),
            wake_s=statistics.median(wakes),
            wake_s_max=max(wakes),
            awake_again_mib=settled_mib() - awake,
        )

    def publish(self) -> None:
        """Ten publications of random adapters: the whole, from here, and its two parts, in their processes."""
        whole, parts = [], []
        for seed in range(11):
            self.trainer("randomize", seed, 0.02)
            began = time.perf_counter()
            self._publish()
            whole.append(1e3 * (time.perf_counter() - began))
            parts.append((1e3 * self.trainer.last_seconds, 1e3 * self.engine.last_seconds))
        whole, parts = whole[1:], parts[1:]
        emit(
            "publish",
            self.case,
            rank=RANK,
            median_ms=statistics.median(whole),
            max_ms=max(whole),
            trainer_ms=statistics.median(trainer for trainer, _ in parts),
            engine_ms=statistics.median(engine for _, engine in parts),
        )

    def agreement(self, when: str) -> None:
        """Sampler against trainer at the adapter of the moment, on prompts that the prefix cache has seen before."""
        self._publish()
        sampled, policy, base = self._logprobs(rounds=4)
        emit(
            "agreement",
            f"{self.case} {when}",
            tokens=len(sampled),
            mean_abs=(sampled - policy).abs().mean().item(),
            max_abs=(sampled - policy).abs().max().item(),
            k3=_k3(sampled, policy),
            adapter_effect=(policy - base).abs().mean().item(),
        )

    def projections(self) -> None:
        """An adapter beside one kind of layer at a time changes the sampled logprobs as the trainer predicts."""
        for number, name in enumerate(PROJECTIONS):
            self.trainer("randomize", 100 + number, 0.05, only=name)
            self._publish()
            sampled, policy, base = self._logprobs(rounds=1)
            effects = torch.stack([sampled - base, policy - base])
            emit(
                "projection",
                f"{self.case} {name}",
                mean_abs=(sampled - policy).abs().mean().item(),
                effect=effects[1].abs().mean().item(),
                correlation=torch.corrcoef(effects)[0, 1].item(),
            )

    def cycle(self) -> None:
        """Generate, sleep, train (at learning rate 0), publish, wake, again and again: memory and greedy output."""
        greedy = SamplingParams(max_tokens=32, temperature=0.0)
        self.trainer("randomize", 7, 0.02)
        self._publish()
        first = _ids(self.engine("generate", self.prompts, 1, greedy))
        batches, algorithm = self._batches(self._sample(seed=0)), parse("grpo")
        used, seconds, same = [], [], True
        for number in range(self.settings.cycles):
            began = time.perf_counter()
            self.engine("generate", self.prompts, 2, SamplingParams(max_tokens=32, seed=number))
            self.engine("sleep")
            self.trainer("forward_backward", batches, algorithm)
            self.trainer("optim_step", OptimParams(learning_rate=0.0))
            self.trainer("release_memory")
            self.engine("wake")
            self._publish()
            seconds.append(time.perf_counter() - began)
            used.append(used_mib())
            if number % 10 == 9 or number + 1 == self.settings.cycles:
                same = same and _ids(self.engine("generate", self.prompts, 1, greedy)) == first
        settled = used[min(5, len(used) - 1) :]
        emit(
            "cycles",
            self.case,
            cycles=len(used),
            drift_mib=settled[-1] - settled[0],
            spread_mib=max(settled) - min(settled),
            greedy_unchanged=same,
            cycle_s=statistics.median(seconds),
        )

    def close(self) -> None:
        """The trainer first: it holds the engine's weights."""
        self.trainer.close()
        self.engine.close()

    def _publish(self) -> None:
        publication = self.trainer("publish_adapter")
        held = self.engine("load_adapter", publication)
        if (sent := getattr(publication, "fingerprint", held)) != held:
            raise RuntimeError(f"the engine holds {held}, the trainer sent {sent}")

    def _engine_checksums(self) -> dict[str, dict[str, str]]:
        return {name: dict(weight.checksums) for name, weight in self.engine("export_weights").items()}

    def _sample(self, seed: int) -> list[RolloutGroup]:
        """Two completions of each prompt, one with a positive and one with a negative advantage."""
        params = SamplingParams(max_tokens=64, seed=seed)
        completions: list[list[Completion]] = self.engine("generate", self.prompts, 2, params)
        signs = (1.0, -1.0)
        return [
            RolloutGroup(prompt, [Rollout(one, {}, 0.0, sign) for one, sign in zip(group, signs, strict=True)])
            for prompt, group in zip(self.prompts, completions, strict=True)
        ]

    def _batches(self, groups: Sequence[RolloutGroup]) -> list[TrainBatch]:
        return plan(groups, parse("grpo"), BatchSettings(micro_batch_tokens=4096, updates=1, max_tokens=64))[0]

    def _logprobs(self, rounds: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of fresh samples, each [L]: the sampler's, the trainer's, and the trainer's without the adapter."""
        batches = self._batches([group for seed in range(rounds) for group in self._sample(seed)])
        policy, base = self.trainer("score", batches), self.trainer("score", batches, reference=True)
        sampled = [batch.rollout_logprobs for batch in batches]
        assert all(one is not None for one in sampled)
        chosen = [
            torch.cat([one[batch.loss_mask].double() for one, batch in zip(source, batches, strict=True)])
            for source in (sampled, [s.logprobs for s in policy], [s.logprobs for s in base])
        ]
        return chosen[0], chosen[1], chosen[2]


def prompts_of(count: int, length: int) -> list[Prompt]:
    """Random printable characters; ids 0 and 1 are padding and end."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 102, (count, length), generator=generator).tolist()
    return [Prompt(f"p{number}", "", {}, tuple(row)) for number, row in enumerate(ids)]


def run(settings: Settings) -> None:
    """Everything on one session; a measurement that fails leaves the others alone."""
    ray.init(include_dashboard=False, log_to_driver=True, configure_logging=False)
    try:
        session = Session(settings)
        case = session.case
        steps = [
            ("storage", session.storage),
            ("sleep", session.sleep),
            ("agreement", partial(session.agreement, "adapter B = 0")),
            ("publish", session.publish),
            ("agreement", partial(session.agreement, "after 10 publications")),
            ("projection", session.projections),
            ("cycles", session.cycle),
        ]
        for name, measure in steps:
            if settings.only and name not in settings.only:
                continue
            with attempt(name, case):
                began = time.perf_counter()
                measure()
                print(f"{case} {name}: {time.perf_counter() - began:.1f} s", flush=True)
        with attempt("close", case):
            session.close()
    finally:
        ray.shutdown()


def _k3(sampled: torch.Tensor, policy: torch.Tensor) -> float:
    log_ratio = policy - sampled
    return (log_ratio.exp() - 1 - log_ratio).mean().item()


def _ids(groups: list[list[Completion]]) -> list[tuple[int, ...]]:
    return [completion.completion_ids for group in groups for completion in group]
