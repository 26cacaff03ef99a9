"""Hugging Face's ``kernels`` and our folder of that name do not disturb each other, here or in Ray."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import import_utils

ROOT = Path(__file__).resolve().parents[1]

absent = pytest.mark.skipif(
    any(importlib.metadata.distributions(name="kernels")), reason="Hugging Face's kernels is installed here"
)

THEIRS = '''"""Stands in for Hugging Face's package: every name transformers may ask for is there."""


class _Anything:
    def __init__(self, *arguments, **keywords):
        pass

    def __class_getitem__(cls, item):
        return cls


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    if name[0].isupper():
        return type(name, (_Anything,), {})
    return lambda *arguments, **keywords: (lambda wrapped: wrapped)
'''

LOOK = """
def look():
    import importlib.util
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.qwen3 import modeling_qwen3
    from transformers.utils.import_utils import is_kernels_available
    import posttrain.kernels.reference

    bare = importlib.util.find_spec("kernels")
    return {
        "available": is_kernels_available(),
        "bare": bare.origin if bare else None,
        "ours": posttrain.kernels.reference.__file__,
        "model": modeling_qwen3.Qwen3ForCausalLM.__name__,
    }
"""

HERE = LOOK + "import json; print(json.dumps(look()))"

IN_RAY = (
    LOOK
    + """
import json, os, sys
import ray
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
found = []
for path in sys.argv[1:]:
    environment = {"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}}
    found.append(ray.get(ray.remote(look).options(runtime_env=environment).remote()))
ray.shutdown()
print(json.dumps(found))
"""
)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    """A folder for ``PYTHONPATH`` with a distribution named kernels in it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text(THEIRS)
    wanted = import_utils.KERNELS_MIN_VERSION  # each transformers takes a narrow range only
    information = folder / f"kernels-{wanted}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {wanted}\n")
    return folder


def run_at_the_root(code: str, path: str, *arguments: str) -> object:
    """The last line that ``code`` prints, run in the repository root, which is first on ``sys.path``."""
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict, theirs: Path | None) -> None:
    assert found["model"] == "Qwen3ForCausalLM"
    assert Path(found["ours"]).resolve() == ROOT / "kernels" / "reference" / "__init__.py"
    if theirs is not None:
        assert found["available"] is True
        assert found["bare"] == str(theirs / "kernels" / "__init__.py"), "theirs wins over our folder"
    else:
        assert found["available"] is False, "our folder is not taken for theirs"


def test_our_folder_has_no_init_file() -> None:
    """With one, ``import kernels`` from the repository root would find ours and break ``import transformers``."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@absent
def test_transformers_from_the_repository_root_without_theirs() -> None:
    check(run_at_the_root(HERE, ""), None)


def test_transformers_from_the_repository_root_with_theirs(theirs: Path) -> None:
    check(run_at_the_root(HERE, str(theirs)), theirs)


@absent
def test_transformers_in_a_ray_worker_with_and_without_theirs(theirs: Path) -> None:
    without, beside = run_at_the_root(IN_RAY, "", str(ROOT), f"{ROOT}{os.pathsep}{theirs}")
    check(without, None)
    check(beside, theirs)
