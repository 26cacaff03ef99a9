"""Functions by name: ``module:function`` and ``file.py:function``, there and back."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import sysconfig
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any

from posttrain.rl.errors import ConfigError


def import_function(spec: str, base: Path | None = None) -> Callable[..., Any]:
    """The function a spec names; a file's path is relative to ``base`` (by default the working directory).

    A file is executed once, as a module of its own. Raises ``ConfigError`` where anything on the way is missing.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise ConfigError(f"{spec}: write module:function or path/to/file.py:function")
    module = _file_module(spec, (base or Path.cwd()) / where) if _is_file(where) else _named_module(spec, where)
    try:
        found = reduce(getattr, name.split("."), module)
    except AttributeError:
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(
            f"{spec}: {where} has no {name}; it has {', '.join(sorted(names)) or 'no functions'}"
        ) from None
    if not callable(found):
        raise ConfigError(f"{spec}: {name} is {type(found).__name__}, not a function")
    return found


def reference(function: Callable[..., Any]) -> str:
    """The spec that ``import_function`` takes back, for a run that must be resumed by name.

    Functions of a script (``__main__``) and of single files outside the installed packages are named by absolute path.
    Raises ``ConfigError`` for lambdas and functions made inside others: nothing can find those again.
    """
    name, module = _home(function)
    path = getattr(module, "__file__", None)
    if module.__name__ != "__main__" and not _loose_file(module):
        return f"{module.__name__}:{name}"
    if path is None:
        raise ConfigError(f"{name} was typed into a console: put it in a file, so that the run can be resumed")
    return f"{Path(path).resolve()}:{name}"


def _home(function: Callable[..., Any]) -> tuple[str, ModuleType]:
    """Dotted name and module under which a function is found again."""
    if inspect.isfunction(function) or isinstance(function, type):
        qualname, module = function.__qualname__, sys.modules.get(function.__module__)
        if "<" not in qualname and module is not None:
            found: Any = module
            for part in qualname.split("."):
                found = getattr(found, part, None)
            if found is function:
                return qualname, module
    owners = [getattr(function, "__module__", None), type(function).__module__]
    owners.append(getattr(getattr(function, "func", None), "__module__", None))
    for owner in [*owners, "__main__"]:
        module = sys.modules.get(owner or "")
        for key, value in vars(module).items() if module else ():
            if value is function:
                assert module is not None
                return key, module
    raise ConfigError(
        f"{getattr(function, '__qualname__', function)!s} cannot be found by name when the run is resumed: "
        "make it a function (or a global variable) of a module, not a lambda, a bound method or a local one"
    )


def _loose_file(module: ModuleType) -> bool:
    """A top-level module that is a single file outside the installed packages: importable only from its folder."""
    path = getattr(module, "__file__", None)
    if path is None or "." in module.__name__ or hasattr(module, "__path__"):
        return False
    installed = {sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    return not any(Path(path).resolve().is_relative_to(Path(folder).resolve()) for folder in installed if folder)


def _is_file(where: str) -> bool:
    return where.endswith(".py") or "/" in where or "\\" in where


def _named_module(spec: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        missing = error.name or where
        if where == missing or where.startswith(f"{missing}."):
            raise ConfigError(f"{spec}: no module {missing}; is it installed, or did you mean {where}.py:…?") from None
        raise ConfigError(f"{spec}: {where} needs {missing}, which is not installed") from error
    except Exception as error:
        raise ConfigError(f"{spec}: importing {where} raised {type(error).__name__}: {error}") from error


def _file_module(spec: str, path: Path) -> ModuleType:
    """Execute a file once under a name made from its path; the running script is not executed again."""
    path = path.expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"{spec}: no file {path}")
    main = sys.modules.get("__main__")
    if main is not None and getattr(main, "__file__", None) and Path(str(main.__file__)).resolve() == path:
        return main
    digest = hashlib.blake2b(str(path).encode(), digest_size=6).hexdigest()
    name = f"posttrain_file_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    description = importlib.util.spec_from_file_location(name, path)
    if description is None or description.loader is None:
        raise ConfigError(f"{spec}: {path.name} is not a Python file")
    module = importlib.util.module_from_spec(description)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))  # its neighbours, as when it is run as a script
    try:
        description.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"{spec}: {path.name} raised {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module
