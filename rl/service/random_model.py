"""A random-weight model and, where asked for, a one-token-a-character tokenizer, written as an ordinary checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.rl.durable import PARTIAL
from posttrain.rl.errors import ConfigError

if TYPE_CHECKING:
    from posttrain.rl.config import ModelConfig, RandomModel

END, PAD = "<end>", "<pad>"


def materialize(model: ModelConfig, folder: Path) -> str:
    """Name or folder to load the model from: ``model.name``, or ``folder`` after the random model was written there.

    The folder appears in one rename, so a process killed while writing leaves none that a resumed run would load.
    """
    if model.random is None:
        assert model.name is not None
        return model.name
    if not (folder / "config.json").exists():
        partial = folder.with_name(f"{PARTIAL}{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        _write(model.random, model.tokenizer, partial)
        partial.rename(folder)
    return str(folder)


def _write(random: RandomModel, tokenizer_name: str | None, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if random.characters is not None:
        tokenizer: Any = character_tokenizer(random.characters)
    elif tokenizer_name:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    else:
        raise ConfigError("model.random needs model.random.characters or model.tokenizer")
    fields = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    fields |= {"pad_token_id": tokenizer.pad_token_id, **random.config}
    try:
        config = AutoConfig.for_model(**fields)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.random.config: {error}") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random.seed)
        network = AutoModelForCausalLM.from_config(config)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def character_tokenizer(characters: str) -> Any:
    """A fast tokenizer with a token a character of ``characters``, an end token and a padding token; no BOS."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = [PAD, END, *dict.fromkeys(characters)]
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(alphabet)}, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=PAD, unk_token=PAD)
