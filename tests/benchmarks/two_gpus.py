"""Two GPUs of one host against one of them, on random weights in the shape of Qwen3-4B.

    python tests/benchmarks/two_gpus.py                   # both: about four minutes
    python tests/benchmarks/two_gpus.py --only gradients  # the same sequences on one trainer and on two
    python tests/benchmarks/two_gpus.py --only samples    # the same run with gpus = 1 and gpus = 2

Each part is a process of its own with a time limit; a figure is printed as a JSON line the moment it is there, and
everything again as Markdown tables at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import processes
from random_checkpoint import SHAPES, default_folder, write_in_child
from report import Record, emit, records, short, tables

HERE = Path(__file__).resolve().parent
PARTS = ("gradients", "samples")
TARGETS = {
    "gradients.difference": "no more than a few times that of one trainer run twice",
    "two GPUs.samples_per_second": "≥ 1.8",
}
"""Beside the figures' names in the tables."""


def gradients(options: argparse.Namespace) -> None:
    """The gradient of one optimizer step from one trainer, from the same one again, and from two."""
    asyncio.run(_gradients(options))


async def _gradients(options: argparse.Namespace) -> None:
    import torch
    from probes import GradientProbe, step_batches

    from posttrain.rl.algorithms import parse as algorithm_of
    from posttrain.rl.config import ModelConfig, TrainerConfig
    from posttrain.rl.repack import deal, repack
    from posttrain.rl.service.actors import Actors
    from posttrain.rl.service.groups import LearnerGroup
    from posttrain.rl.service.handles import LearnerHandle
    from posttrain.rl.types import OptimParams
    from posttrain.trainer.distributed import Rendezvous

    algorithm = algorithm_of("grpo")
    batches = step_batches(options.sequences, SHAPES[options.shape]["vocab_size"], options.micro_batch_tokens)
    shares = deal(batches, 2, options.micro_batch_tokens).shares
    config = TrainerConfig(device="cuda" if torch.cuda.is_available() else "cpu")
    make = partial(GradientProbe, options.model, ModelConfig(name=str(options.model)), config)
    with Actors(2, gpu=torch.cuda.is_available(), cpu_threads=1).reserved() as actors:
        meeting = Rendezvous(2, actors.address)
        hosts = [actors.spawn(name, pair, ()) for name, pair in (("one", 0), ("first", 0), ("second", 1))]
        ranks = [None, *meeting.ranks]
        await asyncio.gather(*(host.make(partial(make, ranks=r)) for host, r in zip(hosts, ranks, strict=True)))
        await asyncio.gather(*(host("randomize", 1, 0.01) for host in hosts))
        one, *two = (LearnerHandle(host) for host in hosts)
        group = LearnerGroup(two)

        async def timed(learner: Any, given: Any) -> float:
            began = time.perf_counter()
            await learner.forward_backward(given, algorithm)
            return time.perf_counter() - began

        async def of_two() -> torch.Tensor:
            first, second = await asyncio.gather(*(host("gradient") for host in hosts[1:]))
            assert torch.equal(first, second), "the sum differs between the two"
            return first

        both = [batch for share in shares for batch in share]
        await asyncio.gather(timed(one, both), timed(group, batches))  # what is compiled and loaded at first use
        await asyncio.gather(hosts[0]("gradient"), of_two())
        one_s = await timed(one, both)
        reference = await hosts[0]("gradient")
        await timed(one, both)
        emit("gradients", "one trainer, again", difference=_difference(await hosts[0]("gradient"), reference))
        await timed(one, repack(batches, options.micro_batch_tokens // 2))
        emit(
            "gradients", "one trainer, packed otherwise", difference=_difference(await hosts[0]("gradient"), reference)
        )
        two_s = await timed(group, batches)
        emit("gradients", "two trainers", difference=_difference(await of_two(), reference))
        await asyncio.gather(timed(one, both), timed(group, batches))
        norms = [await learner.optim_step(OptimParams(learning_rate=1e-4)) for learner in (one, group)]
        adapters = [(await learner.export_adapter()).tensors for learner in (one, *two)]
        equal = all(torch.equal(adapters[1][name], adapters[2][name]) for name in adapters[0])
        emit(
            "one optimizer step",
            options.shape,
            norm_of_one=norms[0].grad_norm,
            norm_of_two=norms[1].grad_norm,
            the_two_are_equal=equal,
            forward_backward_s_of_one=one_s,
            forward_backward_s_of_two=two_s,
            speedup=one_s / two_s,
            sum_s=max(await asyncio.gather(*(host("sum_seconds") for host in hosts[1:]))),
        )
        await asyncio.gather(*(host.close() for host in hosts))


def _difference(gradient: Any, reference: Any) -> float:
    return float((gradient - reference).norm() / reference.norm())


def samples(options: argparse.Namespace) -> None:
    """One run with ``options.gpus``: samples a second of every step, the first one apart."""
    from step import letters, rows

    from posttrain import rl
    from posttrain.rl.plot import write_timeline_plot
    from posttrain.rl.run_dir import RunDir

    result = rl.train(
        model={"name": str(options.model)},
        dataset=rows(4 * options.prompts),
        data={"chat": False, "max_prompt_tokens": 128},
        rewards=[letters],
        algorithm="grpo",
        steps=options.steps,
        gpus=options.gpus,
        placement="ray",
        rollout={
            "engine": options.engine,
            "prompts_per_step": options.prompts,
            "group_size": 8,
            "max_tokens": options.max_tokens,
            "enforce_eager": options.eager,
        },
        trainer={"learning_rate": 1e-6, "micro_batch_tokens": options.micro_batch_tokens},
        checkpoint={"every": 0},
        logging={"console": "plain", "plot": False, "rollouts_every": 0},
        output_dir=tempfile.mkdtemp(prefix="two-"),
    )
    steps = [row for row in result.metrics if "perf/samples_per_second" in row]
    for row in steps:
        phases = {key.partition("/")[2]: value for key, value in row.items() if key.startswith("time/")}
        rate, tokens = row["perf/samples_per_second"], row["rollout/completion_tokens"]
        case = f"{options.gpus} GPU{'s' * (options.gpus > 1)}, step {row['step']}"
        emit("steps", case, gpus=options.gpus, samples_per_second=rate, completion_tokens=tokens, **phases)
    last = steps[-1]["step"]
    options.out.mkdir(parents=True, exist_ok=True)
    write_timeline_plot(RunDir.open(result.run_dir), last, options.out / f"timeline_{options.gpus}.png")
    shutil.rmtree(result.run_dir)


def compared(found: Sequence[Record]) -> Record | None:
    """The ratio of the medians of two GPUs and one, over all steps but the first; ``None`` where one is missing."""
    rates: dict[int, dict[str, list[float]]] = {1: {}, 2: {}}
    for record in found:
        if record["measurement"] == "steps" and not record["case"].endswith(" step 1"):
            for key in ("samples_per_second", "rollout_s", "train_s"):
                rates[record["gpus"]].setdefault(key, []).append(record[key])
    if not rates[1] or not rates[2]:
        return None
    one, two = ({key: statistics.median(values) for key, values in rates[gpus].items()} for gpus in (1, 2))
    speedups = {key: one[key] / two[key] if key.endswith("_s") else two[key] / one[key] for key in one}
    return {"measurement": "two GPUs", "case": "times one GPU", **speedups}


def measure(options: argparse.Namespace) -> list[Record]:
    """Every part, one after the other."""
    cases = [("gradients", 2)] * ("gradients" in options.only)
    cases += [("samples", gpus) for gpus in (1, 2)] * ("samples" in options.only)
    found: list[Record] = []
    for part, gpus in cases:
        name = f"{part} {gpus}"
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--child", part, "--gpus", str(gpus)]
        path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        log = options.out / f"{name.replace(' ', '_')}.log"
        job = processes.start(name, command, log, {"PYTHONPATH": path, "RAY_DEDUP_LOGS": "0"})
        status = processes.run(job, options.seconds)
        mine = records(job.log.read_text(errors="replace"))
        for record in mine:
            print(record, flush=True)
        if status != 0:
            ending = f"cut after {options.seconds:.0f} s" if status is None else f"exit status {status}"
            print(f"{name}: {ending}; the end of its log:\n{job.tail(40)}", flush=True)
            mine.append({"measurement": "not finished", "case": name, "ending": ending})
        print(f"{name}: {job.seconds():.0f} s", flush=True)
        found += mine
    return found + [record for record in [compared(found)] if record]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--shape", default="qwen3-4b", choices=list(SHAPES))
    parser.add_argument("--model", type=Path, help="folder of the checkpoint; written there if it is not there yet")
    parser.add_argument("--out", type=Path, default=Path("two_gpus"), help="folder for logs and figures")
    parser.add_argument("--sequences", type=int, default=128, help="of the gradient, 64 to 512 tokens each")
    parser.add_argument("--prompts", type=int, default=128, help="a step, with 8 samples each")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--engine", default="vllm", choices=["vllm", "transformers"])
    parser.add_argument("--eager", action="store_true", help="vLLM without CUDA graphs")
    parser.add_argument("--seconds", type=float, default=240.0, help="limit of a part")
    inner = parser.add_argument_group("one part, in this process")
    inner.add_argument("--child", choices=PARTS)
    inner.add_argument("--gpus", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.model is None:
        options.model = default_folder(options.shape)
    options.model, options.out = options.model.resolve(), options.out.resolve()
    return options


def main() -> None:
    options = parse()
    if options.child:
        try:
            {"gradients": gradients, "samples": samples}[options.child](options)
        except Exception as error:
            emit(options.child, f"{options.gpus} GPUs", error=short(error))
            raise
        return
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    write_in_child(options.model, options.shape)
    print(f"checkpoint: {time.monotonic() - began:.0f} s", flush=True)
    written = tables(measure(options), TARGETS)
    (options.out / "tables.md").write_text(written + "\n")
    print(written, flush=True)
    print(f"all: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
