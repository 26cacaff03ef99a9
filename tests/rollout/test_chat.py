"""The encoder on four tokenizer families, and every trap of end and start tokens on each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast, Qwen3Config

from posttrain.rl.config import DataConfig, ModelConfig, RolloutConfig
from posttrain.rl.errors import ConfigError, DataError
from posttrain.rl.types import Prompt
from posttrain.rollout.chat import ChatEncoder, load_encoder
from tests.rollout.tokenizer_families import (
    BOS,
    CHATML,
    END_OF_TURN,
    EOS,
    FAMILIES,
    byte_level,
    characters,
    llama3,
    metaspace,
    mistral,
    qwen,
)

EXPECTED_CHAT = {
    "qwen": "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] 2+2? [/INST]",
    "gemma": "<s><start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n",
}


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tokenizer(family: str) -> Any:
    return FAMILIES[family]()


def ids_of(tokenizer: Any, *tokens: str) -> list[int]:
    return [tokenizer.get_vocab()[token] for token in tokens]


def spelled(tokenizer: Any, ids: tuple[int, ...]) -> str:
    """Text of ids with special tokens written out; a leading blank of SentencePiece kept."""
    return "".join(
        tokenizer.convert_ids_to_tokens(list(ids)) if tokenizer.unk_token else [tokenizer.decode(list(ids))]
    ).replace("▁", " ")


def test_text_prompt_goes_through_the_chat_template(family: str, tokenizer: Any) -> None:
    prompt = ChatEncoder(tokenizer).encode(Prompt("0-0", "2+2?", {"answer": "4"}))
    assert spelled(tokenizer, prompt.prompt_ids) == EXPECTED_CHAT[family]
    assert prompt.source == "2+2?" and prompt.columns == {"answer": "4"} and prompt.id == "0-0"


def test_messages_give_the_same_ids_as_the_text_they_hold(tokenizer: Any) -> None:
    encoder = ChatEncoder(tokenizer)
    turns = [{"role": "user", "content": "2+2?"}]
    assert encoder.encode(Prompt("a", turns)).prompt_ids == encoder.encode(Prompt("b", "2+2?")).prompt_ids


def test_ids_equal_what_the_tokenizer_makes_of_messages_itself(tokenizer: Any) -> None:
    turns = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2?"},
    ]
    wanted = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert list(ChatEncoder(tokenizer).encode(Prompt("a", turns)).prompt_ids) == wanted


def test_plain_text_keeps_the_bos_the_tokenizer_adds_and_nothing_else(family: str, tokenizer: Any) -> None:
    ids = ChatEncoder(tokenizer, use_chat=False).encode(Prompt("0-0", "2+2?")).prompt_ids
    bos = BOS[family]
    body = ids[1:] if bos else ids
    assert ids[:1] == (tuple(ids_of(tokenizer, bos)) if bos else ids[:1])
    assert tokenizer.decode(list(body)).strip() == "2+2?"
    assert not set(ids[1:]) & set(tokenizer.all_special_ids)


def test_bos_is_never_doubled_by_template_and_tokenizer(family: str, tokenizer: Any) -> None:
    bos = BOS[family]
    if bos is None:
        assert tokenizer.bos_token_id is None
        bos = "<|endoftext|>"  # Qwen has none: nothing may invent one
    encoder = ChatEncoder(tokenizer)
    rendered = encoder.render([{"role": "user", "content": "2+2?"}])
    plain = ChatEncoder(tokenizer, use_chat=False)
    for prompt in (encoder.encode(Prompt("a", "2+2?")), plain.encode(Prompt("b", rendered))):
        assert prompt.prompt_ids.count(ids_of(tokenizer, bos)[0]) == (0 if family == "qwen" else 1)


def test_a_template_that_writes_bos_twice_gives_one() -> None:
    tokenizer = llama3()
    encoder = ChatEncoder(tokenizer, chat_template="{{ bos_token }}" + tokenizer.chat_template)
    assert encoder.encode(Prompt("a", "hi")).prompt_ids.count(tokenizer.bos_token_id) == 1


def test_every_declared_end_token_stops(family: str, tokenizer: Any) -> None:
    declared = ids_of(tokenizer, EOS[family], END_OF_TURN[family])
    encoder = ChatEncoder(tokenizer, generation_eos=[declared[0], 5], extra_stop_ids=[7])
    assert set(encoder.stop_token_ids) == {*declared, 5, 7}
    assert len(encoder.stop_token_ids) == len(set(encoder.stop_token_ids))


def test_an_end_of_turn_token_of_unknown_name_is_found_through_the_template() -> None:
    tokenizer = qwen()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<over>"]})
    tokenizer.eos_token = "<|endoftext|>"
    encoder = ChatEncoder(tokenizer, chat_template=CHATML.replace("<|im_end|>", "<over>"))
    assert ids_of(tokenizer, "<over>")[0] in encoder.stop_token_ids
    assert encoder.end_token_id == ids_of(tokenizer, "<over>")[0]


def test_pad_equal_to_eos_keeps_the_eos(family: str, tokenizer: Any) -> None:
    end = ids_of(tokenizer, END_OF_TURN[family])[0]
    tokenizer.pad_token = END_OF_TURN[family]
    encoder = ChatEncoder(tokenizer)
    assert encoder.pad_token_id == end
    assert end in encoder.stop_token_ids
    assert encoder.encode_completion("4")[-1] == end


def test_no_pad_token_is_replaced_by_a_real_id(family: str, tokenizer: Any) -> None:
    tokenizer.pad_token = None
    assert ChatEncoder(tokenizer).pad_token_id == ids_of(tokenizer, END_OF_TURN[family])[0]


def _bare(name: str) -> Any:
    """A base model's tokenizer that declares nothing but (for SentencePiece) its unknown token."""
    backend = {"byte-level": byte_level, "sentencepiece": lambda: metaspace("<s>"), "characters": characters}[name]()
    unknown = None if name == "byte-level" else "<unk>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=unknown)


@pytest.mark.parametrize("name", ["byte-level", "sentencepiece", "characters"])
def test_no_end_token_anywhere_is_an_error_that_says_what_to_set(name: str) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.stop_token_ids"):
        ChatEncoder(_bare(name))
    encoder = ChatEncoder(_bare(name), extra_stop_ids=[3])
    assert encoder.stop_token_ids == (3,) and encoder.pad_token_id == 3
    ids = encoder.encode_completion("4+4")
    assert ids[-1] == 3 and encoder.decode(ids[:-1]) == "4+4"


def test_eos_added_behind_text_by_the_tokenizer_is_not_in_the_prompt(family: str, tokenizer: Any) -> None:
    eos, bos = EOS[family], BOS[family]
    parts = [part for part in (bos, "$A", eos) if part]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(parts), special_tokens=[(part, ids_of(tokenizer, part)[0]) for part in parts if part != "$A"]
    )
    assert tokenizer("2+2?")["input_ids"][-1] == ids_of(tokenizer, eos)[0]
    ids = ChatEncoder(tokenizer, use_chat=False).encode(Prompt("a", "2+2?")).prompt_ids
    assert tokenizer.convert_ids_to_tokens(ids[-1]) == "?"


def test_template_that_closes_the_prompt_without_opening_a_reply_is_refused() -> None:
    closed = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    with pytest.raises(ConfigError, match="add_generation_prompt"):
        ChatEncoder(qwen(), chat_template=closed)


def test_template_without_generation_prompt_that_leaves_the_turn_open_is_fine() -> None:
    assert ChatEncoder(mistral()).encode(Prompt("a", "hi")).prompt_ids[-1] == ids_of(mistral(), "]")[0]


@pytest.mark.parametrize("text", ["4", " 4", "\n4", "4\n", "a  b\n\n c", "", "  "])
def test_demonstration_is_the_text_and_one_end_token(family: str, tokenizer: Any, text: str) -> None:
    encoder = ChatEncoder(tokenizer)
    ids = encoder.encode_completion(text)
    assert ids[-1] == ids_of(tokenizer, END_OF_TURN[family])[0]
    assert not set(ids[:-1]) & set(tokenizer.all_special_ids)
    opening = " " if family == "mistral" else ""  # its template puts a blank in front of a reply
    assert spelled(tokenizer, ids[:-1]) == opening + text


def test_demonstration_that_brings_its_end_token_gets_no_second_one(family: str, tokenizer: Any) -> None:
    encoder = ChatEncoder(tokenizer)
    assert encoder.encode_completion("4" + END_OF_TURN[family]) == encoder.encode_completion("4")


def test_demonstration_continues_the_prompt_as_the_template_would(family: str, tokenizer: Any) -> None:
    encoder = ChatEncoder(tokenizer)
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4 of them"}]
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    ours = [*encoder.encode(Prompt("a", turns[:1])).prompt_ids, *encoder.encode_completion("4 of them")]
    assert ours == whole[: len(ours)], f"{family} drifts from its own template"
    assert spelled(tokenizer, tuple(whole[len(ours) :])).strip() == ""


def test_decode_drops_special_tokens_and_keeps_blanks(family: str, tokenizer: Any) -> None:
    encoder = ChatEncoder(tokenizer)
    assert encoder.decode(encoder.encode_completion("is it , a . b ?")) == "is it , a . b ?"


def test_a_last_assistant_turn_is_continued_not_closed(tokenizer: Any) -> None:
    encoder = ChatEncoder(tokenizer)
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "The sum is"}]
    text = encoder.render(turns)
    assert text.endswith("The sum is")


def test_messages_without_a_template_are_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    encoder = ChatEncoder(tokenizer)
    assert not encoder.use_chat
    with pytest.raises(ConfigError, match=r"model\.chat_template"):
        encoder.encode(Prompt("a", [{"role": "user", "content": "hi"}]))
    with pytest.raises(ConfigError, match=r"data\.chat"):
        ChatEncoder(tokenizer, use_chat=True)


def test_turns_the_template_refuses_are_named() -> None:
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    with pytest.raises(DataError, match=r"'system', 'user'.*only user and assistant"):
        ChatEncoder(mistral()).encode(Prompt("a", turns))


def test_prompt_without_a_token_is_refused() -> None:
    with pytest.raises(DataError, match="prompt 0-3 is empty"):
        ChatEncoder(qwen(), use_chat=False).encode(Prompt("0-3", ""))


def test_stop_id_outside_the_vocabulary_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="stop token 999999"):
        ChatEncoder(tokenizer, extra_stop_ids=[999999])


def _checkpoint(folder: Path, tokenizer: Any, **fields: Any) -> Path:
    tokenizer.save_pretrained(folder)
    Qwen3Config(vocab_size=len(tokenizer), **fields).save_pretrained(folder)
    return folder


def test_load_encoder_gathers_end_tokens_of_all_three_files(tmp_path: Path) -> None:
    tokenizer = llama3()
    folder = _checkpoint(tmp_path, tokenizer, eos_token_id=[11, 12])
    (folder / "generation_config.json").write_text('{"eos_token_id": [12, 13]}', encoding="utf-8")
    encoder = load_encoder(folder, ModelConfig(name=str(folder)), DataConfig(), RolloutConfig(stop_token_ids=[14]))
    tokens = ids_of(tokenizer, "<|end_of_text|>", "<|eot_id|>")
    assert set(encoder.stop_token_ids) == {11, 12, 13, 14, *tokens}
    assert encoder.use_chat and encoder.end_token_id == tokens[1]


def test_load_encoder_takes_template_file_and_chat_switch_from_the_configuration(tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path, qwen(), eos_token_id=None)
    (tmp_path / "t.jinja").write_text("Q: {{ messages[-1]['content'] }}\nA:", encoding="utf-8")
    config = ModelConfig(name=str(folder), chat_template=str(tmp_path / "t.jinja"))
    encoder = load_encoder(folder, config, DataConfig())
    assert encoder.decode(encoder.encode(Prompt("a", "hi")).prompt_ids) == "Q: hi\nA:"
    assert not load_encoder(folder, config, DataConfig(chat=False)).use_chat


def test_load_encoder_says_when_there_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer could be loaded.*model\.tokenizer"):
        load_encoder(tmp_path, ModelConfig(name=str(tmp_path)), DataConfig())
