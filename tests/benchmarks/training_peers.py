"""One training step as others do it: peft + transformers as TRL drives them, with Liger's kernels, and Unsloth."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from training_task import ALPHA, DEVICE, LEARNING_RATE, RANK, TARGETS, Task, adapter_of, draw_adapter, gradients

Score = Callable[[Any, Tensor, int], Tensor]
"""Model, ids [B, L] and completion length C to logprobs [B, C]."""


class Peer:
    """A peft model with a way to score completions; GRPO's loss and AdamW around it."""

    def __init__(self, model: Any, task: Task, score: Score) -> None:
        self.model, self.task, self.score = model, task, score
        self.weights = adapter_of(model)
        self.ids = task.ids(model.config.get_text_config().vocab_size).to(DEVICE)
        self.advantages = task.advantages().to(DEVICE)
        self.optimizer = torch.optim.AdamW(
            list(self.weights.values()), lr=LEARNING_RATE, weight_decay=0.0, fused=DEVICE.type == "cuda"
        )

    def backward(self) -> None:
        """Adds to the gradients."""
        with self.precision():
            logprobs = self.score(self.model, self.ids, self.task.completion).float()
        ratio = torch.exp(logprobs - logprobs.detach())
        clipped = ratio.clamp(0.8, 1.2)
        advantages = self.advantages.unsqueeze(1)
        loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
        loss.backward()

    def precision(self) -> AbstractContextManager[Any]:
        """bfloat16 products beside float32 adapters, as trainers set it."""
        half = next(p for name, p in self.model.named_parameters() if ".lora_" not in name).dtype != torch.float32
        return torch.autocast("cuda", torch.bfloat16) if half and DEVICE.type == "cuda" else nullcontext()

    def step(self) -> None:
        """Forward, backward, clipping, AdamW."""
        self.backward()
        torch.nn.utils.clip_grad_norm_(list(self.weights.values()), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def gradient(self) -> dict[str, Tensor]:
        """Of one step from the adapter that everyone has."""
        draw_adapter(self.weights)
        self.backward()
        return gradients(self.weights)


def peft(source: Path, task: Task, base: str, checkpointing: bool = False, dtype: torch.dtype | None = None) -> Peer:
    """transformers with flash attention where it is installed, else torch's, over a full batch without padding."""
    return Peer(_peft_model(source, base, checkpointing, dtype), task, selective_log_softmax)


def liger(source: Path, task: Task, base: str, checkpointing: bool = False) -> Peer:
    """The same with Liger's norms, rotary embedding, MLP and fused linear loss."""
    from transformers import AutoConfig

    kind = AutoConfig.from_pretrained(source).model_type
    patches = importlib.import_module("liger_kernel.transformers")
    getattr(patches, f"apply_liger_kernel_to_{kind}")(fused_linear_cross_entropy=False, cross_entropy=False)
    fused = importlib.import_module("liger_kernel.ops").LigerFusedLinearCrossEntropyFunction

    def score(model: Any, ids: Tensor, completion: int) -> Tensor:
        causal_lm = model.get_base_model()
        hidden = causal_lm.model(input_ids=ids, use_cache=False).last_hidden_state[:, -completion - 1 : -1]
        rows, weight = hidden.reshape(-1, hidden.shape[-1]), causal_lm.lm_head.weight
        targets = ids[:, -completion:].reshape(-1)
        loss = fused.apply(rows.to(weight.dtype), weight, targets, None, None, -100, 0.0, 0.0, "none")[0]
        return -loss.view(ids.shape[0], completion)

    return Peer(_peft_model(source, base, checkpointing, None), task, score)


def unsloth(source: Path, task: Task, base: str) -> Peer:
    """As its GRPO trainer runs: its own model, checkpointing and chunked log-probabilities from hidden states."""
    os.environ |= {"UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1", "UNSLOTH_RETURN_HIDDEN_STATES": "1"}
    fast = importlib.import_module("unsloth").FastLanguageModel
    chunked = importlib.import_module("unsloth_zoo.rl_replacements").grpo_chunked_hidden_states_logprobs
    model, _ = fast.from_pretrained(
        str(source),
        max_seq_length=task.prompt + task.completion,
        dtype=torch.bfloat16 if DEVICE.type == "cuda" else torch.float32,
        load_in_4bit=base == "nf4",
        **({"load_in_fp8": True} if base == "fp8" else {}),
        use_gradient_checkpointing="unsloth",
        fix_tokenizer=False,
    )
    model = fast.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        bias="none",
        target_modules=TARGETS,
        use_gradient_checkpointing="unsloth",
        random_state=0,
    )
    fast.for_training(model)

    def score(model: Any, ids: Tensor, completion: int) -> Tensor:
        hidden = model(input_ids=ids, logits_to_keep=completion + 1).logits[:, :-1]
        head = model.get_output_embeddings().weight
        assert hidden.shape[-1] == head.shape[1], "logits instead of hidden states"
        return chunked(hidden, head, ids[:, -completion:])

    return Peer(model, task, score)


def selective_log_softmax(model: Any, ids: Tensor, completion: int) -> Tensor:
    """As TRL: logits of the completions alone, then one sequence at a time."""
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=completion + 1).logits[:, :-1]
    targets = ids[:, -completion:].unsqueeze(-1)
    rows = [F.log_softmax(row, dim=-1).gather(-1, target).squeeze(-1) for row, target in zip(logits, targets)]
    return torch.stack(rows)


def _peft_model(source: Path, base: str, checkpointing: bool, dtype: torch.dtype | None) -> Any:
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if dtype is None:
        dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    options: dict[str, Any] = {}
    if base == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    elif base == "fp8":
        raise ValueError("peft and transformers train no adapter over float8 weights")
    flash = importlib.util.find_spec("flash_attn") is not None and dtype != torch.float32
    attention = "flash_attention_2" if flash else "sdpa"
    placement = {"device_map": {"": 0}} if DEVICE.type == "cuda" else {}
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, attn_implementation=attention, **placement, **options
    )
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, bias="none", target_modules=TARGETS
    )
    return peft.get_peft_model(model, settings).train()
