"""The algorithms by name. ``ALGORITHMS`` is the whole table: a new formula is a new file and a new line here.

One of your own: subclass ``PolicyGradient`` (or ``ClippedPolicyGradient``, or ``Algorithm`` itself) and pass an
instance wherever a name is taken. Importing this imports no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from posttrain.rl.algorithms.base import AdvantageInputs, Algorithm, LossInputs, LossOutput
from posttrain.rl.algorithms.bnpo import BNPO
from posttrain.rl.algorithms.cispo import CISPO
from posttrain.rl.algorithms.corrections import Correction
from posttrain.rl.algorithms.cross_entropy import CrossEntropy
from posttrain.rl.algorithms.dapo import DAPO
from posttrain.rl.algorithms.dppo import DPPO
from posttrain.rl.algorithms.dr_grpo import DrGRPO
from posttrain.rl.algorithms.gdpo import GDPO
from posttrain.rl.algorithms.gmpo import GMPO
from posttrain.rl.algorithms.grpo import GRPO
from posttrain.rl.algorithms.gspo import GSPO
from posttrain.rl.algorithms.gspo_token import GSPOToken
from posttrain.rl.algorithms.luspo import LUSPO
from posttrain.rl.algorithms.maxrl import MaxRL
from posttrain.rl.algorithms.opo import OPO
from posttrain.rl.algorithms.ops import Tokens
from posttrain.rl.algorithms.policy import ClippedPolicyGradient, PolicyGradient, Surrogate
from posttrain.rl.algorithms.reinforce_pp import ReinforcePP
from posttrain.rl.algorithms.reinforce_pp_baseline import ReinforcePPBaseline
from posttrain.rl.algorithms.rloo import RLOO
from posttrain.rl.algorithms.sapo import SAPO
from posttrain.rl.algorithms.vespo import VESPO
from posttrain.rl.errors import ConfigError

ALGORITHMS: dict[str, type[Algorithm]] = {
    "grpo": GRPO,
    "dapo": DAPO,
    "dr_grpo": DrGRPO,
    "bnpo": BNPO,
    "gspo": GSPO,
    "gspo_token": GSPOToken,
    "cispo": CISPO,
    "sapo": SAPO,
    "gmpo": GMPO,
    "luspo": LUSPO,
    "vespo": VESPO,
    "dppo": DPPO,
    "rloo": RLOO,
    "reinforce_pp": ReinforcePP,
    "reinforce_pp_baseline": ReinforcePPBaseline,
    "opo": OPO,
    "maxrl": MaxRL,
    "gdpo": GDPO,
    "cross_entropy": CrossEntropy,
}


def parse(spec: str | Mapping[str, Any]) -> Algorithm:
    """An algorithm from its name, or from a mapping of ``name`` and its own fields.

    Raises ``ConfigError`` (a ``ValueError``), one line a problem, naming what is known where a name is not.
    """
    fields = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = fields.get("name")
    if name not in ALGORITHMS:
        raise ConfigError(f"unknown algorithm {name!r}; known: {', '.join(sorted(ALGORITHMS))}")
    kind = ALGORITHMS[name]
    try:
        return kind(**fields)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(kind, problem) for problem in error.errors())) from None


def _explain(kind: type[Algorithm], problem: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = sorted(kind.model_fields)
        near = difflib.get_close_matches(where, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


__all__ = [
    "ALGORITHMS",
    "BNPO",
    "CISPO",
    "DAPO",
    "DPPO",
    "GDPO",
    "GMPO",
    "GRPO",
    "GSPO",
    "LUSPO",
    "OPO",
    "RLOO",
    "SAPO",
    "VESPO",
    "AdvantageInputs",
    "Algorithm",
    "ClippedPolicyGradient",
    "Correction",
    "CrossEntropy",
    "DrGRPO",
    "GSPOToken",
    "LossInputs",
    "LossOutput",
    "MaxRL",
    "PolicyGradient",
    "ReinforcePP",
    "ReinforcePPBaseline",
    "Surrogate",
    "Tokens",
    "parse",
]
