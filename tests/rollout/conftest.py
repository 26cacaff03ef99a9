"""A tiny Qwen3-shaped model with random weights and a character tokenizer, saved as a transformers folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from posttrain.rl.types import Adapter, Completion, Prompt

CHARACTERS = "0123456789abcdefghijklmnopqrst+= "
VOCABULARY = len(CHARACTERS) + 2
PADDED_VOCABULARY = 48
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": LINEAR_LAYERS, "bias": "none"}


def save_tiny_model(folder: Path, *, tied: bool = True, seed: int = 0) -> Path:
    """Two layers, width 64, heads of 32, weights large enough that the distribution is far from uniform."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=PADDED_VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        initializer_range=0.15,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config).float()
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tied model."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def adapter_tensors(folder: Path, *, seed: int, scale: float, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """LoRA tensors for every linear layer of a saved model, under PEFT's names; ``scale`` 0 leaves B at zero."""
    generator = torch.Generator().manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(**LORA))
    return {
        name: (torch.randn(tensor.shape, generator=generator) * (scale if ".lora_B." in name else 0.2)).to(dtype)
        for name, tensor in get_peft_model_state_dict(model).items()
    }


def make_adapter(folder: Path, version: int, *, seed: int = 1, scale: float = 0.3) -> Adapter:
    """A LoRA adapter with random tensors."""
    return Adapter(version, "lora", adapter_tensors(folder, seed=seed, scale=scale), LORA)


def reference_model(folder: Path, adapter: Adapter | None = None) -> torch.nn.Module:
    """Plain transformers, and peft's own loading of the adapter."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if adapter is None:
        return model
    model = get_peft_model(model, LoraConfig(**LORA)).eval()
    set_peft_model_state_dict(model, dict(adapter.tensors))
    return model


@torch.no_grad()
def reference_logits(model: torch.nn.Module, prompt: Prompt, completion: Completion) -> Tensor:
    """float64 [completion, vocabulary of the tokenizer]: one forward pass without cache or padding."""
    ids = torch.tensor([[*prompt.prompt_ids, *completion.completion_ids]])
    logits = model(input_ids=ids).logits[0, len(prompt.prompt_ids) - 1 : -1, :VOCABULARY]
    return logits.double()
