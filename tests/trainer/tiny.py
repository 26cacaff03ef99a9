"""Tiny random models of several families, and packed batches over them."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.rl.config import ModelConfig, TrainerConfig
from posttrain.rl.types import OptimParams, TrainBatch
from posttrain.trainer.trainer import Trainer

VOCABULARY = 48
_SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
FAMILIES = {
    "llama": {"tie_word_embeddings": False, "attention_bias": True},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 16},
    "mistral": {"sliding_window": 4},
    "phi3": {"sliding_window": 5},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    | {"query_pre_attn_scalar": 5},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3, "embedding_multiplier": 2.0}
    | {"residual_multiplier": 0.7},
    "cohere": {"logit_scale": 0.25},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 3, "sliding_window": 4}
    | {"layer_types": ["sliding_attention", "full_attention"], "num_experts_per_tok": 2},
}


def save_tiny(folder, family="qwen3", seed=0, **changes):
    """Write a random model of a family; returns the folder."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(_SHARED | FAMILIES.get(family, {}) | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:  # norms start at 1 and biases at 0: move them, so that leaving one out shows
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def trainer_of(folder, dtype="float64", seed=0, **settings):
    """A trainer, on a CPU unless told otherwise."""
    config = TrainerConfig(**{"device": "cpu", **settings})
    return Trainer(folder, ModelConfig(name=str(folder), dtype=dtype), config, seed=seed)


def wake_adapter(trainer, seed=5):
    """Give B something to say: a fresh adapter changes nothing and A has no gradient."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in trainer._weights.items():
            if "lora_B" in name:
                weight.copy_(0.05 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))


def keep_norms_exact(model):
    """transformers' RMS norms round to float32 whatever the type. Here they do not, so that what differs by the order
    of its additions alone differs by 1e-12 and not by 1e-6.
    """

    def exact(module, offset):
        def forward(x):
            eps = getattr(module, "variance_epsilon", None) or module.eps
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (offset + module.weight)

        return forward

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = exact(module, 1.0 if "Gemma" in type(module).__name__ else 0.0)


def sequences(lengths, seed=0):
    """(ids, loss mask, advantage) of each sequence: a prompt of one to three tokens, then the completion."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(VOCABULARY, (length,), generator=generator)
        prompt = int(torch.randint(1, min(4, length), (1,), generator=generator)) if length > 1 else 1
        made.append((ids, torch.arange(length) >= prompt, float(torch.randn((), generator=generator))))
    return made


def packed(members, whole=None, micro_batches=1, **fields):
    """One micro-batch of ``members`` out of the step ``whole`` (by default all of it)."""
    whole = members if whole is None else whole
    lengths = torch.tensor([0] + [len(ids) for ids, _, _ in members])
    mask = torch.cat([mask for _, mask, _ in members])
    advantages = torch.cat([mask.float() * advantage for _, mask, advantage in members])
    batch = TrainBatch(
        input_ids=torch.cat([ids for ids, _, _ in members]),
        position_ids=torch.cat([torch.arange(len(ids)) for ids, _, _ in members]),
        cu_seqlens=lengths.cumsum(0).to(torch.int32),
        loss_mask=mask,
        advantages=advantages,
        num_loss_tokens=sum(int(mask.sum()) for _, mask, _ in whole),
        num_sequences=sum(bool(mask.any()) for _, mask, _ in whole),
        num_micro_batches=micro_batches,
        max_tokens=16,
    )
    return replace(batch, **fields)


def gradients(trainer):
    """Gradient of every trained weight, which is then cleared."""
    found = {}
    for name, weight in trainer._weights.items():
        found[name] = None if weight.grad is None else weight.grad.clone()
        weight.grad = None
    return found


def step_params(learning_rate=1e-2, **changes):
    return OptimParams(learning_rate=learning_rate, **changes)
