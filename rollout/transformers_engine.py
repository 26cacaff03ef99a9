"""The embedded engine: any transformers causal LM, sampled in this process; needs no GPU and no server."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posttrain.rl.errors import EngineError
from posttrain.rl.fingerprint import fingerprint
from posttrain.rl.machine import dtype_name
from posttrain.rl.types import Adapter, Completion, Prompt, Publication, SamplingParams, SharedAdapter
from posttrain.rollout.decoding import Request, Sample, decode
from posttrain.rollout.engine import request_seed

if TYPE_CHECKING:
    from torch import Tensor, nn

    from posttrain.rl.config import ModelConfig, RolloutConfig

_ADAPTER = "default"
_PEFT_PREFIX = "base_model.model."


class TransformersEngine:
    """``Engine`` over a transformers model. Its LoRA tensors are its own; the base may be the trainer's."""

    def __init__(
        self,
        source: str | Path,
        model: ModelConfig,
        rollout: RolloutConfig,
        *,
        base_weights: Mapping[str, Tensor | nn.Module] | None = None,
        device: str = "auto",
    ) -> None:
        """Load ``source`` (hub name or folder), or build it around ``base_weights`` without a copy.

        ``base_weights`` maps parameter names to tensors, and names of quantized layers to the layers themselves; device
        and type are theirs, and ``device`` is not looked at.
        """
        from transformers import AutoTokenizer

        self._source, self._config, self._rollout = str(source), model, rollout
        tokenizer_source = model.tokenizer or self._source
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer_source, **self._hub(tokenizer_source))
        self._shared = base_weights is not None
        self._model = self._load(device) if base_weights is None else self._wrap(base_weights)
        self._model.requires_grad_(False).eval()
        self._vocab_size = min(self._model.config.vocab_size, vocabulary_size(self._tokenizer))
        self._adapter_config: dict[str, Any] | None = None
        self._policy_version = 0
        self._asleep = False

    @property
    def model(self) -> nn.Module:
        """The module that is sampled from."""
        return self._model

    def generate(self, prompts: Sequence[Prompt], n: int, params: SamplingParams) -> list[list[Completion]]:
        """See ``Engine.generate``."""
        drawn = dict(self.stream(prompts, n, params))
        return [drawn[index] for index in range(len(prompts))]

    def stream(
        self, prompts: Sequence[Prompt], n: int, params: SamplingParams
    ) -> Iterator[tuple[int, list[Completion]]]:
        """See ``Engine.stream``. Rows are decoded ``rollout.max_sequences`` at a time, longest prompts first."""
        if self._asleep:
            raise EngineError("the engine is asleep: call wake() before generate()")
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index].prompt_ids))
        rows = [(prompt, sample) for prompt in order for sample in range(n)]
        requests = [self._request(prompts[prompt], sample, params) for prompt, sample in rows]
        drawn: dict[int, list[Completion]] = {prompt: [] for prompt in order}
        for start in range(0, len(rows), self._rollout.max_sequences):
            chunk = slice(start, start + self._rollout.max_sequences)
            with torch.inference_mode():  # not around a yield: it would reach into the caller
                samples = decode(self._model, requests[chunk], params, self._vocab_size)
            for (prompt, _), sample in zip(rows[chunk], samples, strict=True):
                drawn[prompt].append(self._completion(sample))
                if len(drawn[prompt]) == n:
                    yield prompt, drawn.pop(prompt)

    def load_adapter(self, adapter: Publication) -> str:
        """See ``Engine.load_adapter``. ``full`` overwrites the weights in place: refused where they are shared."""
        if isinstance(adapter, SharedAdapter):
            raise EngineError("the transformers engine takes adapters through host memory only")
        if adapter.kind == "full":
            held = self._load_full(adapter)
        else:
            held = self._load_lora(adapter)
        self._policy_version = adapter.policy_version
        return fingerprint(held)

    def sleep(self) -> None:
        """Hand cached memory back to the device; no cache outlives ``generate`` anyway."""
        self._asleep = True
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Undo ``sleep``."""
        self._asleep = False

    def close(self) -> None:
        """Drop the model; safe to call twice."""
        self._asleep = True
        if hasattr(self, "_model"):
            del self._model
            _release()

    # -- building -----------------------------------------------------------------------------------------------------

    def _hub(self, source: str) -> dict[str, Any]:
        """Arguments of every ``from_pretrained``; the revision is the model's, not another tokenizer's."""
        revision = self._config.revision if source == self._source else None
        return {"trust_remote_code": self._config.trust_remote_code, **({"revision": revision} if revision else {})}

    def _load(self, device: str) -> Any:
        from transformers import AutoModelForCausalLM

        if self._config.quantization != "none":
            raise EngineError(
                f"the transformers engine samples from an {self._config.quantization} base only where it shares the "
                'trainer\'s: use placement = "embedded"'
            )
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        capability = torch.cuda.get_device_capability(device) if device.startswith("cuda") else None
        dtype = getattr(torch, dtype_name(self._config.dtype, capability))
        options = {**self._hub(self._source), **self._attention()}
        return AutoModelForCausalLM.from_pretrained(self._source, dtype=dtype, **options).to(device)

    def _attention(self) -> dict[str, str]:
        """Eager where scores are capped: transformers' fused attention leaves the cap out in some releases."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self._source, **self._hub(self._source)).get_text_config()
        return {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}

    def _wrap(self, base_weights: Mapping[str, Tensor | nn.Module]) -> Any:
        """A model whose parameters and layers are ``base_weights`` themselves; only its buffers are built anew."""
        from accelerate import init_empty_weights  # type: ignore[import-untyped]
        from transformers import AutoConfig, AutoModelForCausalLM

        # detach: load_state_dict would otherwise put the trainer's own Parameter objects into this model.
        weights = {name: held.detach() for name, held in base_weights.items() if isinstance(held, torch.Tensor)}
        first = next(iter(weights.values()))
        config = AutoConfig.from_pretrained(self._source, **self._hub(self._source))
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, dtype=first.dtype, trust_remote_code=self._config.trust_remote_code, **self._attention()
            )
        for name, held in base_weights.items():
            if isinstance(held, torch.nn.Module):
                model.set_submodule(name, held)
        try:
            unexpected = model.load_state_dict(weights, strict=False, assign=True).unexpected_keys
        except RuntimeError as error:
            raise EngineError(f"the shared weights do not fit {self._source}: {error}") from None
        model.tie_weights()
        missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        missing += [name for name, _ in model.named_buffers() if name in model.state_dict() and name not in weights]
        if missing or unexpected:
            raise EngineError(
                f"the shared weights do not fit {self._source}: "
                f"missing {_some(missing)}, unexpected {_some(unexpected)}"
            )
        return model.to(first.device)  # moves the buffers; the parameters are there already

    # -- sampling -----------------------------------------------------------------------------------------------------

    def _request(self, prompt: Prompt, sample: int, params: SamplingParams) -> Request:
        length = len(prompt.prompt_ids)
        limits = (self._rollout.max_model_len, getattr(self._model.config, "max_position_embeddings", None))
        limit = min((limit for limit in limits if limit), default=length + params.max_tokens)
        if not 0 < length < limit:
            raise EngineError(
                f"prompt {prompt.id} has {length} tokens, the engine takes 1 to {limit - 1}: "
                "lower data.max_prompt_tokens or raise rollout.max_model_len"
            )
        seed = request_seed(params.seed, prompt.id, sample)
        return Request(prompt.prompt_ids, seed, min(params.max_tokens, limit - length))

    def _completion(self, drawn: Sample) -> Completion:
        visible = drawn.ids[:-1] if drawn.stopped else drawn.ids
        return Completion(
            completion_ids=tuple(drawn.ids),
            rollout_logprobs=tuple(drawn.logprobs),
            text=self._tokenizer.decode(visible, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            finish_reason="stop" if drawn.stopped else "length",
            policy_version=self._policy_version,
        )

    # -- weights ------------------------------------------------------------------------------------------------------

    def _load_full(self, adapter: Adapter) -> Mapping[str, Tensor]:
        if self._shared:
            raise EngineError(
                "full weights cannot be loaded over shared base weights: build the engine without base_weights"
            )
        if self._adapter_config is not None:
            raise EngineError("a LoRA adapter is loaded: full weights need an engine of their own")
        held = dict(self._model.named_parameters())
        _copy(adapter.tensors, held)
        return held

    def _load_lora(self, adapter: Adapter) -> Mapping[str, Tensor]:
        if self._adapter_config is None:
            self._inject(adapter)
        elif self._adapter_config != dict(adapter.config):
            raise EngineError("the adapter's configuration changed between two versions: start a new engine for it")
        held = self._lora_parameters()
        _copy(adapter.tensors, held)
        return held

    def _inject(self, adapter: Adapter) -> None:
        """Put empty LoRA layers where the configuration says, each tensor in the type it arrives in."""
        from peft import LoraConfig, inject_adapter_in_model

        # Initial values are overwritten: methods that start from the base (PiSSA, …) would change it.
        config = LoraConfig.from_peft_type(**{**adapter.config, "init_lora_weights": True, "inference_mode": True})
        if config.modules_to_save or config.use_dora or config.bias != "none":
            raise EngineError("adapters with modules_to_save, DoRA or trained biases are not supported: use plain LoRA")
        targets = {name.removeprefix(_PEFT_PREFIX).rsplit(".lora_", 1)[0] for name in adapter.tensors}
        absent = sorted(targets - {name for name, _ in self._model.named_modules()})
        if absent:
            raise EngineError(f"the adapter does not fit {self._source}: no module {_some(absent)}")
        try:
            inject_adapter_in_model(config, self._model, _ADAPTER, low_cpu_mem_usage=True)
        except ValueError as error:
            raise EngineError(f"the adapter does not fit {self._source}: {error}") from None
        self._adapter_config = dict(adapter.config)
        device = next(parameter for parameter in self._model.parameters() if not parameter.is_meta).device
        for name, parameter in self._lora_parameters().items():
            dtype = adapter.tensors[name].dtype if name in adapter.tensors else parameter.dtype
            module, _, leaf = _module_name(name).rpartition(".")
            empty = torch.zeros(parameter.shape, dtype=dtype, device=device)
            setattr(self._model.get_submodule(module), leaf, torch.nn.Parameter(empty, requires_grad=False))

    def _lora_parameters(self) -> dict[str, Tensor]:
        """The LoRA tensors inside the model under PEFT's names."""
        parameters = self._model.named_parameters()
        mark = f".{_ADAPTER}."
        return {_PEFT_PREFIX + name.replace(mark, "."): tensor for name, tensor in parameters if ".lora_" in name}


def _module_name(peft_name: str) -> str:
    """``base_model.model.x.lora_A.weight`` → ``x.lora_A.default.weight``."""
    module, _, leaf = peft_name.removeprefix(_PEFT_PREFIX).rpartition(".")
    return f"{module}.{_ADAPTER}.{leaf}"


def _copy(tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Overwrite in place; every name, shape and type must match, and nothing is written unless all do."""
    missing, unexpected = sorted(into.keys() - tensors.keys()), sorted(tensors.keys() - into.keys())
    if missing or unexpected:
        raise EngineError(f"the adapter does not fit: missing {_some(missing)}, unexpected {_some(unexpected)}")
    for name, target in into.items():
        given = tensors[name]
        if given.shape != target.shape or given.dtype != target.dtype:
            raise EngineError(
                f"the adapter does not fit: {name} is {tuple(given.shape)} {given.dtype}, "
                f"the engine holds {tuple(target.shape)} {target.dtype}"
            )
    with torch.no_grad():
        for name, target in into.items():
            target.copy_(tensors[name])


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}" if names else "none"


def vocabulary_size(tokenizer: Any) -> int:
    """One past the largest token id the tokenizer knows."""
    return max(tokenizer.get_vocab().values()) + 1


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
