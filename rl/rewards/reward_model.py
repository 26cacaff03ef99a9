"""A sequence classifier as the reward: reward models with one output, or classifiers with a label to aim for.

rewards = [{name = "reward_model", settings = {model = "Skywork/Skywork-Reward-V2-Qwen3-0.6B"}}]
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from posttrain.rl.errors import ConfigError
from posttrain.rl.rewards.decorator import factory, reward
from posttrain.rl.rewards.sample import turn_text

if TYPE_CHECKING:
    import torch

Text = Literal["auto", "chat", "pair", "completion"]
Output = Literal["auto", "logit", "probability"]


@factory
@dataclass(eq=False)
class RewardModel:
    """A score from a transformers sequence classifier, for all completions of a prompt at once.

    Loaded at the first call and kept; its memory is not part of what a run plans for its GPU. Raises ``ValueError``
    for settings out of range.
    """

    model: str
    """Name on the hub, or folder."""
    device: str = "auto"
    """``auto``: the GPU where there is one; else as torch writes it, such as ``cpu`` or ``cuda:1``."""
    dtype: str = "auto"
    """``auto``: as saved; or ``bfloat16``, ``float16``, ``float32``."""
    max_length: int | None = None
    """Tokens of prompt and completion; the beginning of longer ones is left out. None: what the model can take."""
    batch_size: int = 8
    """Sequences of one forward pass."""
    text: Text = "auto"
    """What is classified: a ``chat`` by its template, prompt and completion as a ``pair``, the ``completion`` alone.
    ``auto``: ``chat`` where there is a template, else ``pair``."""
    label: str | int | None = None
    """The output that counts, by name or number; needed where there are several."""
    output: Output = "auto"
    """``auto``: the ``logit`` of a model with one output, else the label's ``probability``."""
    name: str = "reward_model"

    def __post_init__(self) -> None:
        for setting, allowed in (("text", get_args(Text)), ("output", get_args(Output)), ("dtype", _DTYPES)):
            if getattr(self, setting) not in allowed:
                raise ValueError(f"{setting} is one of {', '.join(allowed)}, not {getattr(self, setting)!r}")
        for setting in ("batch_size", "max_length"):
            value = getattr(self, setting)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{setting} is a whole number above 0, not {value!r}")
        self._loaded: _Classifier | None = None
        self._loading = threading.Lock()
        reward(name=self.name, style="trl")(self)

    def __call__(self, prompts: list[list[dict[str, Any]]], completions: list[str]) -> list[float]:
        """One score a completion; prompts are messages."""
        with self._loading:
            if self._loaded is None:
                self._loaded = _Classifier(self)
        return self._loaded.scores(prompts, completions)

    def __getstate__(self) -> dict[str, Any]:
        """Without the loaded model: it is loaded again where it arrives."""
        return {key: value for key, value in vars(self).items() if key not in ("_loaded", "_loading")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _loaded=None, _loading=threading.Lock())


_DTYPES = ("auto", "bfloat16", "float16", "float32")


class _Classifier:
    """Model and tokenizer, ready to score."""

    def __init__(self, settings: RewardModel) -> None:
        """Raises ``ConfigError`` for a model that cannot be had, has no trained head, or leaves the label open."""
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._name = settings.name
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(settings.model, truncation_side="left")
            self._model, report = AutoModelForSequenceClassification.from_pretrained(
                settings.model, dtype=settings.dtype, output_loading_info=True
            )
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"reward {self._name}: the classifier {settings.model} cannot be loaded: {reason}"
            ) from error
        if missing := sorted(report["missing_keys"]):
            raise ConfigError(
                f"reward {self._name}: {settings.model} holds no {', '.join(missing[:3])}, so its scores would be "
                "random: name a model that was saved as a sequence classifier"
            )
        self._label = self._chosen(settings.label)
        several = self._model.config.num_labels > 1
        self._probability = settings.output == "probability" or (settings.output == "auto" and several)
        self._kind = settings.text
        if self._kind == "auto":
            self._kind = "chat" if self._tokenizer.chat_template else "pair"
        elif self._kind == "chat" and not self._tokenizer.chat_template:
            raise ConfigError(f"reward {self._name}: {settings.model} has no chat template; text = 'pair' does without")
        self._max_length = settings.max_length or self._longest()
        self._batch_size = settings.batch_size
        padding = self._model.config.pad_token_id
        if padding is None:
            self._batch_size = 1  # the model could not tell padding from text
        else:
            self._tokenizer.pad_token_id = padding
        self._tokenizer.padding_side = "right"
        device = "cuda" if settings.device == "auto" and torch.cuda.is_available() else settings.device
        self._model.to("cpu" if device == "auto" else device).eval()

    def scores(self, prompts: list[list[dict[str, Any]]], completions: list[str]) -> list[float]:
        """In batches of similar length."""
        import torch

        encoded = [self._encoded(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]["input_ids"]))
        found: dict[int, float] = {}
        for start in range(0, len(order), self._batch_size):
            part = order[start : start + self._batch_size]
            batch = self._tokenizer.pad([encoded[index] for index in part], return_tensors="pt").to(self._model.device)
            with torch.inference_mode():
                logits = self._model(**batch).logits.float()
            found.update(zip(part, self._read(logits).tolist(), strict=True))
        return [found[index] for index in range(len(encoded))]

    def _encoded(self, prompt: list[dict[str, Any]], completion: str) -> dict[str, list[int]]:
        limit: dict[str, Any] = {"truncation": True, "max_length": self._max_length}
        completion = completion.encode("utf-8", "replace").decode()  # tokenizers refuse lone surrogates
        if self._kind == "chat":
            turns = [*prompt, {"role": "assistant", "content": completion}]
            text = self._tokenizer.apply_chat_template(turns, tokenize=False)
            return dict(self._tokenizer(text, add_special_tokens=False, **limit))
        if self._kind == "completion":
            return dict(self._tokenizer(completion, **limit))
        asked = "\n\n".join(turn_text(turn) for turn in prompt)
        pairs = self._tokenizer([asked], [completion], **limit)  # as lists: an empty completion is still one of a pair
        return {name: rows[0] for name, rows in pairs.items()}

    def _read(self, logits_BL: torch.Tensor) -> torch.Tensor:
        """One number a row; a single output is a probability by the logistic function."""
        if not self._probability:
            return logits_BL[:, self._label]
        several = self._model.config.num_labels > 1 and self._model.config.problem_type != "multi_label_classification"
        return (logits_BL.softmax(-1) if several else logits_BL.sigmoid())[:, self._label]

    def _chosen(self, label: str | int | None) -> int:
        """Index of the output that counts."""
        names = {int(index): str(name) for index, name in self._model.config.id2label.items()}
        if label is None and len(names) == 1:
            return 0
        found = [index for index, name in names.items() if label in (index, name)]
        if len(found) != 1:
            known = ", ".join(list(names.values())[:20])
            told = "set label" if label is None else f"label {label!r} is none of them"
            raise ConfigError(f"reward {self._name}: the model's outputs are {known}: {told}")
        return found[0]

    def _longest(self) -> int:
        """What positions and tokenizer allow."""
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        return min(int(limit) for limit in (positions, self._tokenizer.model_max_length) if limit)
