"""vLLM behind the ``Engine`` protocol; vllm is imported when the engine is built, never before."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from posttrain.rl.errors import EngineError
from posttrain.rl.fingerprint import fingerprint
from posttrain.rl.machine import dtype_name
from posttrain.rl.types import Adapter, Completion, Prompt, Publication, SamplingParams, SharedAdapter
from posttrain.rollout.engine import request_seed
from posttrain.rollout.transformers_engine import vocabulary_size

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.rl.config import ModelConfig, RolloutConfig

_WORKER_EXTENSION = "posttrain.rollout.vllm_worker.WorkerExtension"
_FINISH_REASONS = {"stop": "stop", "length": "length", "abort": "abort"}


class VllmEngine:
    """``Engine`` over ``vllm.LLM``. Start it before the trainer takes GPU memory: vLLM measures what is free."""

    def __init__(
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
        ``in_process``: run vLLM's engine core in this process instead of one of its own.
        ``engine_args`` are handed to ``vllm.LLM`` as they are and win over ours (``worker_cls``, ``quantization``, …).
        """
        # Read when the engine is built, not when vLLM is imported.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if in_process else "1"
        try:
            import vllm
            from vllm.lora.request import LoRARequest
            from vllm.platforms import current_platform
        except ImportError as error:
            raise EngineError(
                f"rollout.engine = 'vllm' cannot import vLLM ({error}): pip install 'posttrain[vllm]'"
            ) from None
        from transformers import AutoTokenizer

        self._sampling_params, self._lora_request = vllm.SamplingParams, LoRARequest
        self._on_gpu = not current_platform.is_cpu()
        self._source, self._lora_rank = str(source), lora_rank
        self._kv_cache_bytes, self._sequences = kv_cache_bytes, sequences
        tokenizer_source = model.tokenizer or self._source
        revision = model.revision if tokenizer_source == self._source else None
        self._tokenizer = AutoTokenizer.from_pretrained(
            tokenizer_source,
            trust_remote_code=model.trust_remote_code,
            **({"revision": revision} if revision else {}),
        )
        # vLLM's own question to the driver: torch would open a CUDA context in this process.
        capability = current_platform.get_device_capability() if self._on_gpu else None
        self._dtype = getattr(torch, dtype_name(model.dtype, tuple(capability) if capability else None))
        if self._dtype == torch.float64:
            raise EngineError('vLLM has no float64: use model.dtype = "float32" or rollout.engine = "transformers"')
        self._request: Any = None
        self._lora_id = 0
        self._policy_version = 0
        self._sleeping: set[str] = set()
        # A forked engine hangs in its first parallel loop where this process has run one: OpenMP survives no fork.
        os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
        try:
            self._llm: Any = vllm.LLM(**{**self._default_args(model, rollout), **(engine_args or {})})
        except (ValueError, RuntimeError) as error:
            raise EngineError(f"vLLM did not start on {self._source}: {error}") from error
        self._rpc("posttrain_die_with_parent")
        self._rpc("posttrain_bound_vocabulary", vocabulary_size(self._tokenizer))

    def generate(self, prompts: Sequence[Prompt], n: int, params: SamplingParams) -> list[list[Completion]]:
        """See ``Engine.generate``. All requests are handed to vLLM at once; it batches and queues them."""
        if self._sleeping:
            raise EngineError("the engine is asleep: call wake() before generate()")
        limit = self._llm.model_config.max_model_len
        for prompt in prompts:
            if not 0 < len(prompt.prompt_ids) < limit:
                raise EngineError(
                    f"prompt {prompt.id} has {len(prompt.prompt_ids)} tokens, the engine takes 1 to {limit - 1}: "
                    "lower data.max_prompt_tokens or raise rollout.max_model_len"
                )
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt.prompt_ids)} for prompt in prompts for _ in range(n)],
            [self._params(params, request_seed(params.seed, prompt.id, i)) for prompt in prompts for i in range(n)],
            lora_request=self._request,
            use_tqdm=False,
        )
        completions = [self._completion(output.outputs[0]) for output in outputs]
        return [completions[start : start + n] for start in range(0, len(completions), n)]

    def stream(
        self, prompts: Sequence[Prompt], n: int, params: SamplingParams
    ) -> Iterator[tuple[int, list[Completion]]]:
        """See ``Engine.stream``."""
        yield from enumerate(self.generate(prompts, n, params))

    def load_adapter(self, adapter: Publication) -> str:
        """See ``Engine.load_adapter``. Each tensor is read back from the worker and compared; the old version goes."""
        if isinstance(adapter, SharedAdapter) or adapter.kind != "lora" or self._lora_rank is None:
            raise EngineError(
                "this vLLM engine takes LoRA adapters only, and only when started with their rank: "
                'use trainer.method = "lora" or rollout.engine = "transformers"'
            )
        if "weights" in self._sleeping:  # the adapter's slots sleep with the weights
            self._llm.wake_up(tags=["weights"])
            self._sleeping.discard("weights")
        rank, tensors = self._scaled(adapter)
        # A new id and a new name each time: under the same name vLLM serves stale prefix-cache blocks (vllm#42125).
        self._lora_id += 1
        previous = self._request
        with tempfile.TemporaryDirectory(prefix="posttrain-adapter-", dir=_memory_folder()) as folder:
            _write_peft(Path(folder), adapter, rank, tensors)
            request = self._lora_request(f"policy-{self._lora_id}", self._lora_id, folder)
            try:
                self._llm.llm_engine.add_lora(request)
                self._check_held(rank, tensors)
            except Exception as error:
                self._llm.llm_engine.remove_lora(self._lora_id)
                if isinstance(error, EngineError):
                    raise
                raise EngineError(f"vLLM does not take the adapter: {error}") from error
        if previous is not None:
            self._llm.llm_engine.remove_lora(previous.lora_int_id)
        if not self._llm.reset_prefix_cache():
            raise EngineError(
                "vLLM did not clear its prefix cache: load an adapter only while nothing is being sampled"
            )
        self._request, self._policy_version = request, adapter.policy_version
        return fingerprint(adapter.tensors)

    def sleep(self) -> None:
        """Give back the GPU memory of cache and weights (kept in host memory); a CPU build has nothing to give back."""
        if self._on_gpu and not self._sleeping:
            self._llm.sleep(level=1)
        self._sleeping = {"weights", "kv_cache"}

    def wake(self) -> None:
        """Undo ``sleep``."""
        if self._on_gpu and self._sleeping:
            self._llm.wake_up(tags=sorted(self._sleeping))
        self._sleeping = set()

    def close(self) -> None:
        """Stop the engine's process; safe to call twice."""
        if (llm := getattr(self, "_llm", None)) is not None:
            self._llm = None
            llm.llm_engine.engine_core.shutdown()

    # -- internals ----------------------------------------------------------------------------------------------------

    def _default_args(self, model: ModelConfig, rollout: RolloutConfig) -> dict[str, Any]:
        """Arguments of ``vllm.LLM``."""
        from transformers import AutoConfig

        args: dict[str, Any] = {
            "model": self._source,
            "revision": model.revision,
            "trust_remote_code": model.trust_remote_code,
            "dtype": str(self._dtype).removeprefix("torch."),
            "skip_tokenizer_init": True,
            "logprobs_mode": "processed_logprobs",
            "enforce_eager": rollout.enforce_eager,
            "worker_extension_cls": _WORKER_EXTENSION,
        }
        options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
        architecture = AutoConfig.from_pretrained(self._source, **options)
        if rollout.max_model_len is not None:
            longest = getattr(architecture.get_text_config(), "max_position_embeddings", None)
            args["max_model_len"] = min(rollout.max_model_len, longest or rollout.max_model_len)
        if self._on_gpu:
            args["enable_sleep_mode"] = True
        if self._kv_cache_bytes is not None:
            args["kv_cache_memory_bytes"] = self._kv_cache_bytes
        if self._sequences is not None:
            args["max_num_seqs"] = self._sequences
        if self._lora_rank is not None:
            # Two in host memory, one in use: the version in use survives until the next one has been checked.
            args |= {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 2, "max_lora_rank": self._allowed_rank()}
            # Left to itself vLLM gives the head a slot too: vocabulary times rank for nothing, and 0.26 cannot start
            # with it where the vocabulary is no multiple of 64.
            args["lora_target_modules"] = _linear_layers(architecture, model.trust_remote_code)
        return args

    def _allowed_rank(self) -> int:
        """Smallest rank on vLLM's list that holds the adapter's."""
        from vllm.config.lora import MaxLoRARanks

        assert self._lora_rank is not None
        allowed = sorted(get_args(MaxLoRARanks))
        for rank in allowed:
            if rank >= self._lora_rank:
                return int(rank)
        raise EngineError(f"trainer.lora.rank = {self._lora_rank} is above vLLM's largest, {allowed[-1]}")

    def _params(self, params: SamplingParams, seed: int) -> Any:
        """``ignore_eos``: only ``stop_token_ids`` stop a row, as in every engine of ours."""
        try:
            return self._sampling_params(
                max_tokens=params.max_tokens,
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=params.top_k,
                min_p=params.min_p,
                stop_token_ids=list(params.stop_token_ids),
                ignore_eos=True,
                seed=seed,
                logprobs=0,
                detokenize=False,
            )
        except ValueError as error:
            raise EngineError(f"vLLM refuses the sampling parameters: {error}") from None

    def _completion(self, output: Any) -> Completion:
        ids = tuple(output.token_ids)
        reason = _FINISH_REASONS.get(output.finish_reason)
        if reason is None:
            raise EngineError(f"vLLM ended a completion with {output.finish_reason!r}: see its log")
        logprobs = tuple(float(step[token].logprob) for step, token in zip(output.logprobs, ids, strict=True))
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

    def _scaled(self, adapter: Adapter) -> tuple[int, dict[str, Tensor]]:
        """Rank, and the tensors as vLLM is to hold them: in its type, alpha/rank folded into B by one rounding."""
        config = adapter.config
        odd = [key for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "use_dora") if config.get(key)]
        if odd:
            raise EngineError(f"vLLM cannot hold an adapter with {', '.join(odd)}: use plain LoRA")
        rank = int(config["r"])
        assert self._lora_rank is not None
        if rank > self._allowed_rank():
            raise EngineError(f"the adapter has rank {rank}, the engine was started for {self._lora_rank}")
        scaling = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        return rank, {
            name: (tensor.float() * (scaling if ".lora_B." in name else 1.0)).to("cpu", self._dtype).contiguous()
            for name, tensor in adapter.tensors.items()
        }

    def _check_held(self, rank: int, tensors: Mapping[str, Tensor]) -> None:
        """Compare what the worker holds, tensor by tensor: vLLM drops modules it cannot match without a word."""
        held = self._rpc("posttrain_lora_fingerprints", self._lora_id, rank, sorted(tensors))
        wrong = [name for name in sorted(tensors) if held.get(name) != fingerprint({name: tensors[name]})]
        modules = {name.rpartition(".lora_")[0].removeprefix("base_model.model.") for name in tensors}
        endings = {module.rpartition(".")[2] for module in modules}
        pairs = {f"base_model.model.{module}.lora_{side}.weight" for module in modules for side in "AB"}
        available = {name for name in self._rpc("posttrain_lora_modules") if name.rpartition(".")[2] in endings}
        wrong += sorted(pairs - tensors.keys())
        if not wrong and len(modules) < len(available):
            wrong = sorted(available - modules)
        if wrong:
            raise EngineError(
                f"vLLM does not hold the adapter as given: {', '.join(wrong[:3])}"
                f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''} missing or different"
            )

    def _rpc(self, method: str, *args: Any) -> Any:
        return self._llm.collective_rpc(method, args=args)[0]


def _linear_layers(architecture: Any, trust_remote_code: bool) -> list[str]:
    """Names (last part) of every linear layer but the head, from a model without storage."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(architecture, trust_remote_code=trust_remote_code)
    head = network.get_output_embeddings()
    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)]
    return sorted({name.rpartition(".")[2] for name, layer in layers if layer is not head})


def _write_peft(folder: Path, adapter: Adapter, rank: int, tensors: Mapping[str, Tensor]) -> None:
    """A PEFT folder whose scaling is 1: it is in B already."""
    from safetensors.torch import save_file

    targets = adapter.config["target_modules"]
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(dict(tensors), folder / "adapter_model.safetensors")


def _memory_folder() -> str | None:
    """Where a temporary adapter costs no disk write, if the machine has such a place."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() else None
