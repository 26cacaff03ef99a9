"""Every case of every library."""

from __future__ import annotations

from tests.rl.rewards.conventions import (
    for_areal,
    for_openrlhf,
    for_trl,
    for_unsloth,
    for_verifiers_0_1,
    for_verifiers_0_4,
    for_verl,
)

LIBRARIES = {
    "trl": for_trl.CASES,
    "unsloth": for_unsloth.CASES,
    "verifiers 0.1": for_verifiers_0_1.CASES,
    "verifiers 0.4": for_verifiers_0_4.CASES,
    "verl": for_verl.CASES,
    "openrlhf": for_openrlhf.CASES,
    "areal": for_areal.CASES,
}
CASES = [case for cases in LIBRARIES.values() for case in cases]
