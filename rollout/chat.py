"""Text and messages → the token ids a sampler is given, and back. The only place that calls a tokenizer.

A completion is never encoded again: training uses the sampler's ids. ``encode_completion`` is for demonstrations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from posttrain.rl.config import DataConfig, ModelConfig, RolloutConfig
from posttrain.rl.errors import ConfigError, DataError
from posttrain.rl.types import Message, Prompt

END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|return|>", "<|eot|>")
"""End tokens of chat turns that models do not always declare (Qwen, Llama 3, Gemma, Phi, gpt-oss, Llama 4)."""
_PROBE = "posttrain-probe"


class ChatEncoder:
    """A tokenizer, its chat template and its end tokens, as one thing."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str | None = None,
        use_chat: bool | None = None,
        extra_stop_ids: Sequence[int] = (),
        generation_eos: int | Sequence[int] | None = None,
    ) -> None:
        """``use_chat`` applies the template to text prompts too, by default whenever there is one. ``generation_eos``:
        what generation config and model config declare.

        Raises ``ConfigError`` where chat is asked for without a template, the template ends a prompt with an end token,
        or nothing declares an end token.
        """
        self.tokenizer = tokenizer
        self._template: str | None = chat_template if chat_template is not None else _own_template(tokenizer)
        if use_chat and self._template is None:
            raise ConfigError("data.chat = true, but the tokenizer has no chat template: set model.chat_template")
        self.use_chat: bool = self._template is not None if use_chat is None else use_chat
        self._opening, after_reply = self._around_reply() if self.use_chat else ("", [])
        self.stop_token_ids: tuple[int, ...] = self._collect_stops(after_reply, extra_stop_ids, generation_eos)
        """Every token that ends a completion."""
        self.end_token_id: int = self._end_token(after_reply)
        """What ends a demonstration."""
        self.pad_token_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_token_id
        """Fills batches; may equal an end token, so lengths and masks never come from comparing with it."""
        if self._template is not None:
            self._check_generation_prompt()

    def encode(self, prompt: Prompt) -> Prompt:
        """The prompt with ``prompt_ids``; ``source`` stays as the row held it.

        Raises ``ConfigError`` for messages without a template, ``DataError`` for a prompt without a single token.
        """
        source = prompt.source
        if isinstance(source, str) and not self.use_chat:
            ids = self._without_end(self._ids(source, add_special_tokens=True))
        else:
            turns = [{"role": "user", "content": source}] if isinstance(source, str) else source
            ids = self._ids(self.render(turns), add_special_tokens=False)
        if not ids:
            raise DataError(
                f"prompt {prompt.id} is empty: nothing to continue from; drop the row or add a system prompt"
            )
        return dataclasses.replace(prompt, prompt_ids=self._one_bos(ids))

    def render(self, turns: Sequence[Message]) -> str:
        """Messages as the text the model is given, up to where its reply starts; a last assistant turn is continued.

        Raises ``ConfigError`` without a template, ``DataError`` where the template refuses the turns.
        """
        if self._template is None:
            raise ConfigError(
                "the prompts are chat messages and the tokenizer has no chat template: set model.chat_template, "
                "or use plain text prompts without system_prompt and worked_turns"
            )
        continued = bool(turns) and turns[-1].get("role") == "assistant"
        return self._apply(turns, add_generation_prompt=not continued, continue_final_message=continued)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of sampled ids without special tokens: what rewards see."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def encode_completion(self, text: str) -> tuple[int, ...]:
        """Ids of a demonstration as they stand behind a prompt: no BOS, exactly one end token.

        The text is encoded behind a line break, since SentencePiece would put a blank in front of a text of its own;
        where the break melts into the first token (a text that starts with one), on its own after all.
        """
        text = self._opening + text
        context, together = (self._ids(part, add_special_tokens=False) for part in ("\n", "\n" + text))
        melted = together[: len(context)] != context
        ids = self._ids(text, add_special_tokens=False) if melted else together[len(context) :]
        while ids and ids[-1] in self.stop_token_ids:
            ids.pop()
        return (*ids, self.end_token_id)

    def _apply(self, turns: Sequence[Message], **keywords: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(turns), chat_template=self._template, tokenize=False, **keywords
                )
            )
        except Exception as error:  # Jinja's errors and whatever the template raises itself
            raise DataError(f"the chat template refuses {[turn.get('role') for turn in turns]}: {error}") from error

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def _around_reply(self) -> tuple[str, list[int]]:
        """What the template writes around a reply: blanks in front of it, and the ids behind it."""
        user = {"role": "user", "content": "1"}
        try:
            text = self._apply([user, {"role": "assistant", "content": _PROBE}], add_generation_prompt=False)
            prompt = self._apply([user], add_generation_prompt=True)
        except DataError:
            return "", []  # a template that renders prompts only, or wants a system turn first
        before, found, after = text.rpartition(_PROBE)
        opening = before.removeprefix(prompt) if before.startswith(prompt) else ""
        blanks = opening if not opening.strip() else ""  # an empty <think> block is not part of the reply
        return blanks, self._ids(after, add_special_tokens=False) if found else []

    def _collect_stops(
        self, after_reply: Sequence[int], extra: Sequence[int], generation_eos: int | Sequence[int] | None
    ) -> tuple[int, ...]:
        tokenizer = self.tokenizer
        declared = [generation_eos] if isinstance(generation_eos, int) else list(generation_eos or ())
        if tokenizer.eos_token_id is not None:
            declared.append(tokenizer.eos_token_id)
        vocabulary = tokenizer.get_vocab()
        declared += [vocabulary[token] for token in END_OF_TURN if token in vocabulary]
        special = set(tokenizer.all_special_ids) - {tokenizer.bos_token_id}
        declared += [token for token in after_reply[:1] if token in special]
        declared += list(extra)
        if bad := [token for token in declared if not 0 <= token < len(tokenizer)]:
            raise ConfigError(f"stop token {bad[0]} is not in the tokenizer's vocabulary of {len(tokenizer)}")
        if not declared:
            raise ConfigError(
                "neither tokenizer, generation config nor model config declares an end token, so nothing could end: "
                "set rollout.stop_token_ids to the ids that end one"
            )
        return tuple(dict.fromkeys(declared))

    def _end_token(self, after_reply: Sequence[int]) -> int:
        """In chat the token the template closes a reply with, else the tokenizer's EOS, else the first declared."""
        if self.use_chat:
            for token in after_reply:
                if token in self.stop_token_ids:
                    return token
        eos = self.tokenizer.eos_token_id
        return int(eos) if eos is not None else self.stop_token_ids[0]

    def _check_generation_prompt(self) -> None:
        """A prompt must not end with an end token: the model would be asked to write after its own end."""
        ids = self._ids(self.render([{"role": "user", "content": "1"}]).rstrip(), add_special_tokens=False)
        if ids and ids[-1] in self.stop_token_ids:
            token = self.tokenizer.convert_ids_to_tokens(ids[-1])
            raise ConfigError(
                f"the chat template ends the prompt with {token} and opens no reply: it ignores add_generation_prompt; "
                "set model.chat_template to one that opens the assistant's turn, or data.chat = false"
            )

    def _without_end(self, ids: list[int]) -> list[int]:
        """Drop the EOS that some tokenizers add after any text."""
        bare = ids and ids[-1] == self.tokenizer.eos_token_id
        return ids[:-1] if bare else ids

    def _one_bos(self, ids: list[int]) -> tuple[int, ...]:
        """Drop a second BOS (text that brings its own, or a template beside a tokenizer that both write one)."""
        bos = self.tokenizer.bos_token_id
        while bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
            ids = ids[1:]
        return tuple(ids)


def load_encoder(
    model: str | Path, model_config: ModelConfig, data_config: DataConfig, rollout_config: RolloutConfig | None = None
) -> ChatEncoder:
    """Tokenizer, chat template and every end token of a model folder or hub name; ``rollout_config`` may add to them.

    Raises ``ConfigError`` where no tokenizer can be loaded.
    """
    from transformers import AutoTokenizer

    name = model_config.tokenizer or str(model)
    keywords: dict[str, Any] = {"trust_remote_code": model_config.trust_remote_code}
    if model_config.revision is not None and model_config.tokenizer is None:
        keywords["revision"] = model_config.revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **keywords)
    except Exception as error:  # network, missing files, a missing backend: transformers raises all kinds
        raise ConfigError(
            f"no tokenizer could be loaded from {name}: {_first_line(error)}; check model.name, or set model.tokenizer"
        ) from error
    return ChatEncoder(
        tokenizer,
        chat_template=_template_text(model_config.chat_template),
        use_chat=data_config.chat,
        extra_stop_ids=rollout_config.stop_token_ids if rollout_config is not None else (),
        generation_eos=declared_eos(model, model_config),
    )


def declared_eos(model: str | Path, config: ModelConfig) -> tuple[int, ...]:
    """End tokens of generation config and model config, without doubles; both may hold a list, neither must exist."""
    from transformers import AutoConfig, GenerationConfig

    keywords: dict[str, Any] = {"revision": config.revision} if config.revision is not None else {}
    found: list[int] = []
    try:
        generation = GenerationConfig.from_pretrained(str(model), **keywords)
        found += _as_ids(generation.eos_token_id)
    except OSError:
        pass  # most base models have no generation_config.json
    try:
        architecture = AutoConfig.from_pretrained(str(model), trust_remote_code=config.trust_remote_code, **keywords)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no model configuration could be loaded from {model}: {_first_line(error)}") from error
    found += _as_ids(getattr(architecture.get_text_config(), "eos_token_id", None))
    found += _as_ids(getattr(architecture, "eos_token_id", None))
    return tuple(dict.fromkeys(found))


def _as_ids(declared: int | Iterable[int] | None) -> list[int]:
    if declared is None:
        return []
    return [declared] if isinstance(declared, int) else list(declared)


def _own_template(tokenizer: Any) -> str | None:
    """The tokenizer's default template, where it has one."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template if template else None


def _template_text(value: str | None) -> str | None:
    """``model.chat_template``: Jinja text, or the path of a file of it."""
    if value is None or "{" in value:
        return value
    path = Path(value).expanduser()
    if not path.is_file():
        raise ConfigError(f"model.chat_template = {value!r} is neither a Jinja template nor a file")
    return path.read_text(encoding="utf-8")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
