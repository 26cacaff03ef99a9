"""vLLM behind the ``Engine`` protocol; vllm is imported when the engine is built, never before."""

from __future__ import annotations

import gc
import itertools
import logging
import math
import os
import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posttrain.rl.errors import EngineError, OutOfMemory, PosttrainError
from posttrain.rl.fingerprint import checksum, fingerprint
from posttrain.rl.types import (
    Adapter,
    Completion,
    Prompt,
    Publication,
    SamplingParams,
    SharedAdapter,
    SharedTensor,
    SharedWeights,
)
from posttrain.rollout.engine import request_seed
from posttrain.rollout.transformers_engine import vocabulary_size
from posttrain.rollout.vllm_api import Vllm, memory_errors
from posttrain.rollout.vllm_arguments import Architecture, Start, allowed_rank

if TYPE_CHECKING:
    from posttrain.rl.config import ModelConfig, RolloutConfig

_log = logging.getLogger(__name__)
_FINISH_REASONS = {"stop": "stop", "length": "length", "abort": "abort"}


class VllmEngine:
    """``Engine`` over vLLM. Start it before the trainer takes GPU memory."""

    def __init__(  # noqa: PLR0913 - the last ones are by name and optional
        self,
        source: str | Path,
        model: ModelConfig,
        rollout: RolloutConfig,
        *,
        lora_rank: int | None = None,
        lora_targets: str | Sequence[str] = "all-linear",
        kv_cache_bytes: int | None = None,
        sequences: int | None = None,
        in_process: bool = False,
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        """Start the engine on ``source`` (hub name or folder). Without ``lora_rank`` it takes no adapter.

        ``lora_targets``: as ``trainer.lora.target_modules``. ``kv_cache_bytes``: memory of the KV cache; without it
        vLLM takes what its own default leaves. ``sequences``: how many a step samples; no more are decoded at once.
        ``in_process``: run vLLM's engine core in this process instead of one of its own. ``engine_args`` are handed to
        ``vllm.EngineArgs`` as they are and win over ours.
        """
        from transformers import AutoTokenizer

        begin = time.perf_counter()
        # vLLM reads it in several places; its own argument reaches only one of them.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if in_process else "1"
        # A forked engine hangs in its first parallel loop where this process has run one: OpenMP survives no fork.
        os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
        self._vllm = Vllm()
        imported = time.perf_counter()
        self._source, self._in_process = str(source), in_process
        tokenizer_source = model.tokenizer or self._source
        self._tokenizer = AutoTokenizer.from_pretrained(
            tokenizer_source,
            trust_remote_code=model.trust_remote_code,
            **({"revision": model.revision} if model.revision and tokenizer_source == self._source else {}),
        )
        architecture = Architecture.of(self._source, model)
        self._shapes = architecture.shapes
        self._start = Start(
            self._source,
            model,
            rollout,
            self._vllm.dtype(model),
            self._vllm.on_gpu,
            architecture,
            lora_rank,
            architecture.targets(lora_targets) if lora_rank is not None else {},
            kv_cache_bytes,
            sequences,
        )
        self._policy_version = 0
        self._serial = itertools.count()
        self._asleep = False
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="detokenize")
        ready = time.perf_counter()
        args = self._start.arguments()
        self._lora_request = None
        if self._start.lora_backend == "slots" and lora_rank is not None:
            args["max_lora_rank"] = allowed_rank(lora_rank, self._vllm.slot_ranks())
            self._lora_request = self._vllm.slot_request()
        try:
            with memory_errors():
                self._engine: Any = self._vllm.engine({**args, **(engine_args or {})}, multiprocess=not in_process)
                phases = self._rpc("posttrain_start", vocabulary_size(self._tokenizer))
        except PosttrainError:
            raise
        except (ValueError, RuntimeError) as error:
            raise EngineError(f"vLLM did not start on {self._source}: {error}") from error
        phases = {"import": imported - begin, "tokenizer and shapes": ready - imported, **phases}
        total = time.perf_counter() - begin
        _log.info("vLLM started in %.1f s: %s", total, ", ".join(f"{name} {s:.1f}" for name, s in phases.items()))

    # -- sampling -----------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Prompt], n: int, params: SamplingParams) -> list[list[Completion]]:
        """See ``Engine.generate``. All requests are handed to vLLM at once; it batches and queues them."""
        drawn = dict(self.stream(prompts, n, params))
        return [drawn[index] for index in range(len(prompts))]

    def stream(
        self, prompts: Sequence[Prompt], n: int, params: SamplingParams
    ) -> Iterator[tuple[int, list[Completion]]]:
        """See ``Engine.stream``. Leaving it early, for whatever reason, ends the samples that are not drawn yet."""
        if self._asleep:
            raise EngineError("the engine is asleep: call wake() before generate()")
        limit = self._engine.model_config.max_model_len
        for prompt in prompts:
            if not 0 < len(prompt.prompt_ids) < limit:
                raise EngineError(
                    f"prompt {prompt.id} has {len(prompt.prompt_ids)} tokens, the engine takes 1 to {limit - 1}: "
                    "lower data.max_prompt_tokens or raise rollout.max_model_len"
                )
        pending: dict[str, tuple[int, int]] = {}
        drawn: dict[int, dict[int, Any]] = {index: {} for index in range(len(prompts))}
        decoding: list[tuple[int, Future[list[Completion]]]] = []
        try:
            with memory_errors():
                for index, prompt in enumerate(prompts):
                    for sample in range(n):
                        pending[self._add(prompt, params, request_seed(params.seed, prompt.id, sample))] = index, sample
            while pending:
                with memory_errors():
                    outputs = [output for output in self._engine.step() if output.finished]
                for output in outputs:
                    index, sample = pending.pop(output.request_id)
                    drawn[index][sample] = output.outputs[0]
                    if len(drawn[index]) == n:
                        done = drawn.pop(index)
                        group = [done[sample] for sample in range(n)]
                        decoding.append((index, self._decoder.submit(self._completions, group)))
                while decoding and (decoding[0][1].done() or not pending):
                    index, group_of = decoding.pop(0)
                    yield index, group_of.result()
        finally:
            if pending:
                self._engine.abort_request(list(pending))
            self._drain()

    def _add(self, prompt: Prompt, params: SamplingParams, seed: int) -> str:
        """Queue one sample; the name it has in vLLM's answers."""
        name = str(next(self._serial))
        self._engine.add_request(
            name,
            self._vllm.tokens_input(list(prompt.prompt_ids)),
            self._params(params, seed),
            lora_request=self._lora_request,
        )
        return name

    def _params(self, params: SamplingParams, seed: int) -> Any:
        """``ignore_eos``: only ``stop_token_ids`` stop a row, as in every engine of ours."""
        try:
            return self._vllm.SamplingParams(
                max_tokens=params.max_tokens,
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=params.top_k,
                min_p=params.min_p,
                stop_token_ids=list(params.stop_token_ids),
                ignore_eos=True,
                seed=seed,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=self._vllm.FINAL_ONLY,
            )
        except ValueError as error:
            raise EngineError(f"vLLM refuses the sampling parameters: {error}") from None

    def _completions(self, outputs: Sequence[Any]) -> list[Completion]:
        """One prompt's samples; runs beside vLLM's next step."""
        return [self._completion(output) for output in outputs]

    def _completion(self, output: Any) -> Completion:
        ids = tuple(output.token_ids)
        reason = _FINISH_REASONS.get(output.finish_reason)
        if reason is None:
            raise EngineError(f"vLLM ended a completion with {output.finish_reason!r}: see its log")
        logprobs = tuple(map(float, output.logprobs.logprobs))
        assert tuple(output.logprobs.token_ids) == ids, "vLLM reports logprobs of other tokens than it drew"
        if not all(map(math.isfinite, logprobs)):
            raise EngineError("the model gave logits that are not finite: the weights or the adapter are broken")
        visible = ids[:-1] if reason == "stop" else ids
        return Completion(
            completion_ids=ids,
            rollout_logprobs=logprobs,
            text=self._tokenizer.decode(visible, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            finish_reason=reason,  # type: ignore[arg-type]
            policy_version=self._policy_version,
        )

    # -- weights ------------------------------------------------------------------------------------------------------

    def export_weights(self) -> SharedWeights:
        """Handles to the frozen weights for a trainer on the same GPU, in another process; nothing is copied."""
        shapes = {name: list(shape) for name, shape in self._shapes.items()}
        return pickle.loads(self._rpc("posttrain_export_weights", shapes))

    def load_adapter(self, adapter: Publication) -> str:
        """See ``Engine.load_adapter``. It is written over the last one, read back from the worker and compared."""
        if self._start.lora_rank is None or (isinstance(adapter, Adapter) and adapter.kind != "lora"):
            raise EngineError(
                "this vLLM engine takes LoRA adapters only, and only when started with their rank: "
                'use trainer.method = "lora" or rollout.engine = "transformers"'
            )
        sent = adapter if isinstance(adapter, SharedAdapter) else self._packed(adapter)
        held = self._rpc("posttrain_load_adapter", pickle.dumps(sent))
        # Blocks computed under the last adapter; they are dropped even where something went wrong half-way.
        if not self._engine.reset_prefix_cache():
            raise EngineError(
                "vLLM did not clear its prefix cache: load an adapter only while nothing is being sampled"
            )
        if held != sent.fingerprint:
            raise EngineError(
                f"vLLM holds another adapter than it was given (version {adapter.policy_version}: given "
                f"{sent.fingerprint}, held {held})"
            )
        self._policy_version = adapter.policy_version
        return held if isinstance(adapter, SharedAdapter) else fingerprint(adapter.tensors)

    def _packed(self, adapter: Adapter) -> SharedAdapter:
        """As the engine is to hold it: end to end, in its type, alpha/rank folded into B by one rounding."""
        config = adapter.config
        odd = [key for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "use_dora") if config.get(key)]
        if odd:
            raise EngineError(f"vLLM cannot hold an adapter with {', '.join(odd)}: use plain LoRA")
        rank = int(config["r"])
        scaling = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        layout, flat, start = [], [], 0
        for name, tensor in adapter.tensors.items():
            layout.append((name, start, tuple(tensor.shape)))
            flat.append(
                (tensor.float() * (scaling if ".lora_B." in name else 1.0)).to("cpu", self._start.dtype).view(-1)
            )
            start += tensor.numel()
        buffer = torch.cat(flat)
        return SharedAdapter(adapter.policy_version, config, SharedTensor(buffer), tuple(layout), checksum(buffer))

    # -- life ---------------------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Give back the KV cache's GPU memory; a CPU build has nothing to give back."""
        if self._start.on_gpu and not self._asleep:
            self._drain()
            self._engine.sleep(level=1)
        self._asleep = True

    def wake(self) -> None:
        """Undo ``sleep``; raises ``OutOfMemory`` where the KV cache does not fit now, and can then be tried again."""
        if self._start.on_gpu and self._asleep:
            with memory_errors():
                self._engine.wake_up()
        self._asleep = False

    def close(self) -> None:
        """Stop vLLM and give back all its memory; safe to call twice."""
        engine = self.__dict__.pop("_engine", None)
        if engine is None:
            return
        self._decoder.shutdown(cancel_futures=True)
        if self._asleep and self._in_process and self._start.on_gpu:
            # vLLM's allocator frees only what is mapped; without room for that the end of the process frees it.
            with suppress(OutOfMemory), memory_errors():
                engine.wake_up()
        engine.engine_core.shutdown()
        del engine
        if self._in_process:
            for _ in range(2):  # the first lets go of what vLLM's own finalizer holds, the model
                gc.collect()
            if self._start.on_gpu:
                torch.cuda.empty_cache()

    # -- internals ----------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Take in the step that vLLM still has in flight; a core in a process of its own does so by itself."""
        core = getattr(self._engine.engine_core, "engine_core", None)
        with memory_errors():
            while core is not None and core.batch_queue:
                self._engine.step()

    def _rpc(self, method: str, *args: Any) -> Any:
        """Call our worker; what it raises comes as it is, or as vLLM wraps it on the way between processes."""
        with memory_errors():
            try:
                return self._engine.collective_rpc(method, args=args)[0]
            except PosttrainError:
                raise
            except Exception as error:
                raise EngineError(str(error)) from error
