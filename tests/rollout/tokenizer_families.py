"""Small tokenizers of four families, built when asked for, with the chat templates and habits of the real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def _finish(backend: Tokenizer, special: list[str], template: str, **names: str) -> Any:
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template
    return tokenizer


def byte_level() -> Tokenizer:
    """GPT-2's kind: every byte a token, so any text goes in and comes out again."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def qwen() -> Any:
    """Byte-level BPE, no BOS, pad = <|endoftext|>, chat turns end with <|im_end|>, which is EOS."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return _finish(byte_level(), special, CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def llama3() -> Any:
    """Byte-level BPE whose post-processor adds BOS, while the template writes it too; turns end with <|eot_id|>."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend = byte_level()
    tokenizer = _finish(backend, special, LLAMA3, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A $B", special_tokens=[("<|begin_of_text|>", bos)]
    )
    tokenizer.pad_token = tokenizer.eos_token  # what users do, and what must not cost the EOS
    return tokenizer


def metaspace(bos: str) -> Tokenizer:
    """SentencePiece Unigram over single characters: a blank becomes ▁, one is put in front of any text."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -3.0)]
    pieces += [(chr(code), -4.0) for code in range(33, 127)] + [("\n", -4.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, 1)]
    )
    return backend


def characters() -> Tokenizer:
    """A token a character of a small alphabet, as toy models have."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "4": 1, "+": 2, "=": 3, "2": 4}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return backend


def mistral() -> Any:
    """SentencePiece with BOS and EOS, the turn ends with EOS itself, the template has no generation prompt."""
    return _finish(metaspace("<s>"), ["<s>", "</s>"], MISTRAL, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def gemma() -> Any:
    """SentencePiece whose EOS is not what ends a chat turn."""
    special = ["<s>", "</s>", "<start_of_turn>", "<end_of_turn>"]
    return _finish(metaspace("<s>"), special, GEMMA, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


FAMILIES: dict[str, Callable[[], Any]] = {"qwen": qwen, "llama3": llama3, "mistral": mistral, "gemma": gemma}
END_OF_TURN = {"qwen": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>"}
EOS = {"qwen": "<|im_end|>", "llama3": "<|end_of_text|>", "mistral": "</s>", "gemma": "</s>"}
BOS = {"qwen": None, "llama3": "<|begin_of_text|>", "mistral": "<s>", "gemma": "<s>"}
