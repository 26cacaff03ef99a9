"""math-verify's opinion. Only for processes that can be stopped: see ``math_answer.py``."""

from __future__ import annotations

import logging

from math_verify import parse, verify

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns of every answer that does not parse
logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)


def verdict(given: str, wanted: str) -> bool:
    """Whether two expressions are equal as mathematics; ``False`` where either cannot be parsed."""
    try:
        gold = parse(f"${wanted}$", parsing_timeout=None)
        found = parse(f"${given}$", parsing_timeout=None)
        return bool(gold) and bool(found) and bool(verify(gold, found, timeout_seconds=None))
    except MemoryError:
        raise
    except Exception:  # a model's text can break any parser: it is then not the answer
        return False
