"""The table of algorithms and how a name or mapping becomes one."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from posttrain.rl.algorithms import ALGORITHMS, parse
from posttrain.rl.errors import ConfigError


def test_the_table_holds_every_algorithm_under_its_own_name() -> None:
    assert list(ALGORITHMS) == [
        "grpo", "dapo", "dr_grpo", "bnpo", "gspo", "gspo_token", "cispo", "sapo", "gmpo", "luspo", "vespo", "dppo",
        "rloo", "reinforce_pp", "reinforce_pp_baseline", "opo", "maxrl", "gdpo", "cross_entropy",
    ]  # fmt: skip
    for name, kind in ALGORITHMS.items():
        assert kind().name == name


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_dump_without_unset_fields_parses_back_to_the_same(name: str) -> None:
    fields = {} if name == "cross_entropy" else {"correction": {"name": "opsm", "delta": 0.3}, "top_entropy": 0.2}
    algorithm = parse({"name": name, **fields})
    assert parse(algorithm.model_dump(mode="json", exclude_none=True)) == algorithm


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpro", "unknown algorithm 'gpro'; known: bnpo, cispo"),
        ({"name": "grpo", "kl_coeff": 0.1}, "kl_coeff: unknown key; did you mean kl_coef?"),
        ({"name": "grpo", "kl_coef": -1}, "kl_coef: Input should be greater than or equal to 0"),
        ({"name": "grpo", "advantage": "gae"}, "advantage: Input should be 'group', 'group_mean'"),
        ({"name": "grpo", "top_entropy": 0}, "top_entropy: Input should be greater than 0"),
        ({"name": "grpo", "dual_clip": 0.5}, "dual_clip: Input should be greater than 1"),
        ({"name": "cispo", "clip_low": 0.2}, "clip_low: unknown key"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(spec: object, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(spec)  # type: ignore[arg-type]
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_fields_are_frozen() -> None:
    with pytest.raises(ValidationError):
        parse("grpo").name = "dapo"


def test_importing_the_algorithms_imports_no_torch() -> None:
    code = "import sys, posttrain.rl.algorithms as a; a.parse('dapo'); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


DEFAULTS = {
    "grpo": {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.0, "std_epsilon": 1e-6},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "kl_coef": 0.0, "dynamic_sampling": True, "overlong_buffer": 0.2},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4},
    "gspo_token": {"clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"cap": 5.0},
    "sapo": {"tau_pos": 1.0, "tau_neg": 1.05},
    "gmpo": {"clip_low": 0.4, "clip_high": 0.4},
    "luspo": {"clip_low": 2e-3, "clip_high": 2.5e-3},
    "vespo": {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0},
    "dppo": {"delta": 0.2, "cap": 20.0},
}


@pytest.mark.parametrize(("name", "fields"), DEFAULTS.items())
def test_defaults_are_the_papers(name: str, fields: dict[str, object]) -> None:
    algorithm = parse(name)
    assert {key: getattr(algorithm, key) for key in fields} == fields
