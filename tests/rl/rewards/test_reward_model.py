"""Scores of tiny random classifiers, beside what transformers gives for one sequence at a time."""

from __future__ import annotations

import asyncio
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from posttrain.rl.errors import ConfigError
from posttrain.rl.rewards import Rubric, resolve
from posttrain.rl.rewards.reward_model import RewardModel
from posttrain.rl.types import Completion, Prompt, Rollout

WORDS = ["<pad>", "<eos>", "<user>", "<assistant>", "<cls>", "<sep>", *"abcdefghij"]
IDS = {word: index for index, word in enumerate(WORDS)}
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} <eos> {% endfor %}"
QWEN = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "eos_token_id": 1,
}
BERT = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}
COMPLETIONS = ["a b", "c", "d e f g h i j a b c", "b a", ""]


def tokenizer(folder: Path, *, chat: bool) -> None:
    backend = Tokenizer(models.WordLevel(IDS, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if not chat:
        backend.post_processor = TemplateProcessing(
            single="<cls> $A <sep>", pair="<cls> $A <sep> $B:1 <sep>:1", special_tokens=[("<cls>", 4), ("<sep>", 5)]
        )
    names = ["input_ids", "attention_mask"] if chat else ["input_ids", "token_type_ids", "attention_mask"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", model_input_names=names
    )
    if chat:
        fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def one_output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A decoder with one output and a chat template."""
    folder = tmp_path_factory.mktemp("one")
    torch.manual_seed(0)
    Qwen3ForSequenceClassification(Qwen3Config(**QWEN, num_labels=1, pad_token_id=0)).save_pretrained(folder)
    tokenizer(folder, chat=True)
    return str(folder)


@pytest.fixture(scope="module")
def three_labels(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An encoder with named labels and no chat template."""
    folder = tmp_path_factory.mktemp("three")
    torch.manual_seed(1)
    labels = {0: "bad", 1: "fair", 2: "good"}
    BertForSequenceClassification(BertConfig(**BERT, id2label=labels)).save_pretrained(folder)
    tokenizer(folder, chat=False)
    return str(folder)


def scored(function: Any, texts: Sequence[str] = COMPLETIONS, source: Any = "j i") -> list[Rollout]:
    rubric = Rubric([function])
    rubric.check([])
    group = (Prompt("p", source, {}), [Completion((), (), text, "stop", 0) for text in texts])
    return asyncio.run(rubric.score([group]))[0].rollouts


def logits(model: str, ids: Sequence[int], **inputs: Any) -> torch.Tensor:
    """Of one sequence, without padding."""
    classifier = AutoModelForSequenceClassification.from_pretrained(model).eval()
    with torch.no_grad():
        return classifier(torch.tensor([list(ids)]), **inputs).logits[0]


def ids_of(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_group_is_scored_as_chats_in_its_own_order(one_output: str, batch_size: int) -> None:
    settings = {"model": one_output, "device": "cpu", "batch_size": batch_size}
    rollouts = scored(resolve("reward_model", settings=settings))
    expected = [
        logits(one_output, ids_of(f"<user> j i <eos> <assistant> {text} <eos>"))[0].item() for text in COMPLETIONS
    ]
    assert [rollout.rewards["reward_model"] for rollout in rollouts] == pytest.approx(expected, abs=1e-4)
    assert len({round(score, 3) for score in expected}) == len(COMPLETIONS)  # so that order matters


def test_every_turn_of_a_chat_is_read(one_output: str) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    [rollout] = scored(RewardModel(one_output, device="cpu"), ["d"], turns)
    ids = ids_of("<user> a <eos> <assistant> b <eos> <user> c <eos> <assistant> d <eos>")
    assert rollout.reward == pytest.approx(logits(one_output, ids)[0].item(), abs=1e-4)


def test_a_long_text_loses_its_beginning(one_output: str) -> None:
    [rollout] = scored(RewardModel(one_output, device="cpu", max_length=4), ["a b c"])
    assert rollout.reward == pytest.approx(logits(one_output, ids_of("a b c <eos>"))[0].item(), abs=1e-4)
    [rollout] = scored(RewardModel(one_output, device="cpu"), ["a " * 100])  # 64 positions
    assert rollout.reward == pytest.approx(logits(one_output, [*ids_of("a " * 63), 1])[0].item(), abs=1e-4)


def test_one_output_as_a_probability(one_output: str) -> None:
    [rollout] = scored(RewardModel(one_output, device="cpu", output="probability"), ["a"])
    logit = logits(one_output, ids_of("<user> j i <eos> <assistant> a <eos>"))[0].item()
    assert rollout.reward == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-5)


@pytest.mark.parametrize("label", ["good", 2])
def test_a_named_label_of_several_counts_by_its_probability(three_labels: str, label: str | int) -> None:
    rollouts = scored(RewardModel(three_labels, device="cpu", label=label, batch_size=4))
    for rollout, text in zip(rollouts, COMPLETIONS, strict=True):
        ids = [4, *ids_of("j i"), 5, *ids_of(text), 5]
        kinds = torch.tensor([[0] * 4 + [1] * (len(ids) - 4)])  # prompt and completion as a pair
        row = logits(three_labels, ids, token_type_ids=kinds).tolist()
        assert rollout.reward == pytest.approx(math.exp(row[2]) / sum(map(math.exp, row)), abs=1e-5)


def test_the_completion_alone_and_its_logit(three_labels: str) -> None:
    judge = RewardModel(three_labels, device="cpu", label="fair", text="completion", output="logit")
    [rollout] = scored(judge, ["a b"])
    assert rollout.reward == pytest.approx(logits(three_labels, [4, *ids_of("a b"), 5])[1].item(), abs=1e-5)


def test_a_model_that_cannot_tell_padding_is_asked_one_by_one(tmp_path: Path) -> None:
    torch.manual_seed(2)
    Qwen3ForSequenceClassification(Qwen3Config(**QWEN, num_labels=1)).save_pretrained(tmp_path)
    tokenizer(tmp_path, chat=True)
    rollouts = scored(RewardModel(str(tmp_path), device="cpu"))
    for rollout, text in zip(rollouts, COMPLETIONS, strict=True):
        ids = ids_of(f"<user> j i <eos> <assistant> {text} <eos>")
        assert rollout.reward == pytest.approx(logits(str(tmp_path), ids)[0].item(), abs=1e-4)


def test_a_model_without_a_trained_head_is_refused(tmp_path: Path) -> None:
    Qwen3ForCausalLM(Qwen3Config(**QWEN, pad_token_id=0)).save_pretrained(tmp_path)
    tokenizer(tmp_path, chat=True)
    with pytest.raises(ConfigError, match=r"holds no score.weight, so its scores would be random"):
        scored(RewardModel(str(tmp_path), device="cpu"))


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded") as raised:
        scored(RewardModel(str(tmp_path / "none"), device="cpu"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({}, "outputs are bad, fair, good: set label"), ({"label": "best"}, "label 'best' is none of them")],
)
def test_several_outputs_need_a_label_that_exists(three_labels: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scored(RewardModel(three_labels, device="cpu", **settings))


def test_a_chat_without_a_template_is_refused(three_labels: str) -> None:
    with pytest.raises(ConfigError, match="has no chat template"):
        scored(RewardModel(three_labels, device="cpu", label="good", text="chat"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtype": "int4"}, "dtype is one of"),
        ({"text": "all"}, "text is one of"),
        ({"output": "rank"}, "output is one of"),
        ({"batch_size": 0}, "batch_size is a whole number"),
        ({"max_length": 1.5}, "max_length is a whole number"),
        ({"temperature": 1}, "unexpected keyword argument 'temperature'"),
    ],
)
def test_wrong_settings_are_refused_when_the_run_is_set_up(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve("reward_model", settings={"model": "m", **wrong})


def test_it_is_loaded_once_and_pickled_without_the_model(one_output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    load = AutoModelForSequenceClassification.from_pretrained
    monkeypatch.setattr(
        AutoModelForSequenceClassification, "from_pretrained", lambda *a, **k: loads.append(a) or load(*a, **k)
    )
    model = RewardModel(one_output, device="cpu")
    first = [scored(model)[0].reward for _ in range(2)]
    assert len(loads) == 1 and first[0] == first[1]
    data = pickle.dumps(model)
    assert len(data) < 2000
    assert scored(pickle.loads(data))[0].reward == first[0]
