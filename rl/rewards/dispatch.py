"""Which calling convention a reward function follows, chosen by its parameters; ``signature.py`` states the rules."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter

from posttrain.rl.errors import RewardError
from posttrain.rl.rewards.conventions import POSTTRAIN, VERIFIERS_PLURAL, form
from posttrain.rl.rewards.decorator import STYLES, Style
from posttrain.rl.rewards.turns import annotation_text

_COMPLETION = {"completion", "completion_ids", "messages", "finish_reason"}
"""Asking for one of these, a function of ours has something to score."""


def choose(
    name: str,
    named: Mapping[str, Parameter],
    takes_all: bool,
    returns: str,
    turns: Mapping[str, bool | None],
) -> Style:
    """The style; raises ``RewardError`` with the reason where it is open or where none fits.

    ``named``: parameters; ``takes_all``: it has ``**kwargs``; ``returns``: its return annotation as written;
    ``turns``: which of prompt and completion want messages.
    """
    returns_list = returns.startswith(("list", "List", "Sequence", "typing.List", "tuple"))
    clues = _clues(named, takes_all, returns_list, turns)
    if len(clues) > 1:
        told = " and ".join(f"{clue} ({style})" for style, clue in clues.items())
        raise RewardError(f"reward {name}: asks for {told}; keep one of them, or say @reward(style=…)")
    style = next(iter(clues)) if clues else _by_completion(name, named, takes_all, returns_list, returns, turns)
    if returns_list and not form(style, named).batched:
        asked = [key for key in named if key in form(style, named).makers] or ["single values"]
        raise RewardError(
            f"reward {name}: returns a list but asks for {' and '.join(asked)} ({style} style, once a sample); take "
            "completions (TRL) or return one number a sample"
        )
    return style


def _clues(
    named: Mapping[str, Parameter], takes_all: bool, returns_list: bool, turns: Mapping[str, bool | None]
) -> dict[Style, str]:
    """Styles that the names speak for, and the name that does: rule 2."""
    found: dict[Style, str] = {}
    asked = set(named)
    for key in ("solution_str", "solution_strs"):
        if key in asked:
            found["verl"] = key
    if "queries" in asked and not asked & {"completion", "completions"}:
        found["openrlhf"] = "queries"
    if "completions" in asked and "prompts" not in asked and _is_one_text(named, returns_list):
        found["areal"] = "completions (one text)"
    if turns.get("completion") is not False and (clue := _verifiers_clue(named, takes_all)):
        found["verifiers"] = clue
    if found and "completion" in asked and "verifiers" not in found:
        found["posttrain"] = "completion"
    return found


def _is_one_text(named: Mapping[str, Parameter], returns_list: bool) -> bool:
    """AReaL's ``completions``: annotated as a text, or beside ``prompt_ids``, which no other convention has."""
    annotation = annotation_text(named["completions"].annotation)
    return annotation == "str" or ("prompt_ids" in named and "ist" not in annotation and not returns_list)


def _verifiers_clue(named: Mapping[str, Parameter], takes_all: bool) -> str | None:
    asked = set(named)
    if (asked & {"trace", "traces"}) and not asked & {*_COMPLETION, "completions"}:
        return "trace" if "trace" in asked else "traces"
    plural = asked & (VERIFIERS_PLURAL - {"prompts", "completions"})
    if plural and not asked & {*POSTTRAIN.makers, "trainer_state"} and (asked & {"completions", "states"}):
        clear = not takes_all or ("states" in named and "State" in annotation_text(named["states"].annotation))
        return max(plural) if clear else None
    others = {"completions", *_COMPLETION} - {"completion"}
    return "state" if "state" in asked and _is_state(named["state"]) and not asked & others else None


def _is_state(parameter: Parameter) -> bool:
    """Not a column of that name: that would be annotated as what it holds."""
    annotation = annotation_text(parameter.annotation)
    return not annotation or "State" in annotation or "dict" in annotation.lower() or annotation == "Any"


def _by_completion(
    name: str,
    named: Mapping[str, Parameter],
    takes_all: bool,
    returns_list: bool,
    returns: str,
    turns: Mapping[str, bool | None],
) -> Style:
    """Rules 3 to 6: by ``completion`` or ``completions``, and what is left without either."""
    plural = [key for key in ("prompts", "completions") if key in named]
    singular = [key for key in ("prompt", "completion") if key in named]
    if plural and singular:
        meant = "all of a group in style group, one text in style areal" if plural == ["completions"] else "a batch"
        raise RewardError(
            f"reward {name}: asks for {plural[0]} (TRL, once a batch) and for {singular[0]} (once a sample); "
            f"keep one of them, or say @reward(style=…) ({plural[0]}: {meant})"
        )
    if plural:
        if takes_all and (open_ := sorted(set(named) & (VERIFIERS_PLURAL - {"prompts", "completions"}))):
            raise RewardError(
                f"reward {name}: {open_[0]} beside **kwargs is a column in TRL and the rollouts' own in verifiers; "
                'say @reward(style="trl") or style="verifiers"'
            )
        return "trl"
    if not singular:
        if returns_list and (takes_all or "completion_ids" in named):
            return "trl"
        if "completion_ids" in named and takes_all and not returns:
            return "trl"
        if takes_all and not set(named) & set(POSTTRAIN.makers):
            raise RewardError(
                f"reward {name}: only **kwargs and columns, so it is open whether it scores one sample or a batch; "
                f"name completion (one) or completions (a batch), or say @reward(style=…): {', '.join(STYLES)}"
            )
        if not named:
            raise RewardError(f"reward {name}: takes no arguments; ask for completion and for dataset columns by name")
    text = turns.get("completion") is False
    return "verifiers" if not text and (turns.get("completion") or "parser" in named) else "posttrain"
