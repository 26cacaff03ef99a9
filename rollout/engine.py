"""What a rollout engine is: prompts in, completions exactly as sampled out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Protocol

from posttrain.rl.types import Completion, Prompt, Publication, SamplingParams


class Engine(Protocol):
    """Draws completions from the base model with the newest adapter loaded. One thread at a time."""

    def generate(self, prompts: Sequence[Prompt], n: int, params: SamplingParams) -> list[list[Completion]]:
        """``n`` completions of each prompt, in the prompts' order.

        The same prompts, parameters and adapter give the same completions; ``rollout_logprobs`` are those of the
        distribution that was drawn from, after temperature and truncation, renormalised.
        """
        ...

    def stream(
        self, prompts: Sequence[Prompt], n: int, params: SamplingParams
    ) -> Iterator[tuple[int, list[Completion]]]:
        """The same completions as ``generate``, each prompt's as soon as all of them are there: index, completions."""
        ...

    def load_adapter(self, adapter: Publication) -> str:
        """Sample from ``adapter`` from now on; returns the fingerprint of the tensors now in the engine."""
        ...

    def sleep(self) -> None:
        """Give back what is only needed while sampling."""
        ...

    def wake(self) -> None:
        """Undo ``sleep``."""
        ...

    def close(self) -> None:
        """Release everything; safe to call twice."""
        ...


def request_seed(seed: int, prompt_id: str, index: int) -> int:
    """Seed of sample ``index`` of a prompt: 63 bits, independent of what else is in the batch."""
    digest = hashlib.blake2b(f"{seed}/{prompt_id}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
