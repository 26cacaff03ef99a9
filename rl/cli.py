"""The command line, ``posttrain train | eval | doctor | rewards``: nothing heavy is imported before it is needed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from posttrain import __version__
from posttrain.rl.errors import CheckpointError, ConfigError, PosttrainError

if TYPE_CHECKING:
    from posttrain.rl.config import Config

app = typer.Typer(
    help="Reinforcement-learning post-training of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key, e.g. --set trainer.learning_rate=1e-5. Repeatable."
    ),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"posttrain {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Reinforcement-learning post-training of language models."""


@app.command()
def train(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.toml", help="The configuration of a new run.")
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with this run; without CONFIG.toml, as it was configured.")
    ] = None,
) -> None:
    """Train from a configuration, or go on with a run that was stopped."""
    with _reporting():
        loaded, base = _training_config(config, overrides or [], resume)
        from posttrain.rl.service import run

        run.train(loaded, resume=resume, base=base)


@app.command(name="eval")
def evaluate(
    target: Annotated[
        Path,
        typer.Argument(metavar="CONFIG_OR_RUN", help="A run, one of its checkpoints, or CONFIG.toml (base model)."),
    ],
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Evaluate the newest checkpoint of a run, one given checkpoint, or an untrained model, on the held-out rows."""
    with _reporting():
        loaded, checkpoint, base = _evaluation_target(target, overrides or [])
        from posttrain.rl.service import run

        figures = run.evaluate(loaded, checkpoint=checkpoint, base=base)
        if as_json:
            typer.echo(json.dumps(figures))
        else:
            for key, value in figures.items():
                typer.echo(f"{key}  {value:.4f}")


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.toml", help="Also estimate the memory this configuration needs.")
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what is installed, what this machine can do, and what to install next."""
    with _reporting():
        loaded = _load(config, overrides or []) if config is not None else None
        from posttrain.rl import doctor as examination

        report = examination.examine()
        if as_json:
            typer.echo(json.dumps(examination.as_tree(report)))
        else:
            examination.show(report)
        if loaded is not None:
            typer.echo(examination.fit(loaded), err=as_json)


rewards_app = typer.Typer(help="Reward functions: what there is, and what one makes of a completion.")
app.add_typer(rewards_app, name="rewards", no_args_is_help=True)


@rewards_app.command("list")
def rewards_list() -> None:
    """Every reward that has a name: what it asks for, what it does, where it comes from."""
    with _reporting():
        from rich.console import Console
        from rich.table import Table

        from posttrain.rl import rewards_cli

        table = Table("name", "asks for", "does", "from", box=None)
        for row in rewards_cli.listing():
            table.add_row(*row)
        Console().print(table)


@rewards_app.command("try")
def rewards_try(
    name: Annotated[str, typer.Argument(help="A reward's name, module:function or file.py:function.")],
    completion: Annotated[str, typer.Option(help="What the model wrote; - reads standard input.")],
    answer: Annotated[str | None, typer.Option(help="The column answer.")] = None,
    column: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Another column. Repeatable.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A setting of the reward, JSON or text. Repeatable.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="The prompt's text.")] = "",
) -> None:
    """Score one completion: score, time and, where the reward gives one, an explanation."""
    with _reporting():
        from posttrain.rl import rewards_cli

        text = sys.stdin.read() if completion == "-" else completion
        columns = {**_pairs("--column", column), **({} if answer is None else {"answer": answer})}
        trial = rewards_cli.attempt(name, text, columns, _pairs("--setting", setting), prompt)
        typer.echo(f"score  {'does not apply' if trial.score is None else f'{trial.score:g}'}")
        typer.echo(f"time   {trial.milliseconds:.2f} ms")
        if trial.failure is not None:
            typer.echo(f"failed  {trial.failure}")
        if trial.explanation is not None:
            typer.echo(f"because  {trial.explanation}")


def _pairs(option: str, given: list[str] | None) -> dict[str, object]:
    """``NAME=VALUE`` as a mapping; a value that is JSON is taken as such."""
    found: dict[str, object] = {}
    for pair in given or []:
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise ConfigError(f"{option} {pair}: write NAME=VALUE")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def main() -> None:
    """Entry point of the ``posttrain`` command."""
    app()


@contextmanager
def _reporting() -> Iterator[None]:
    """What the user can put right becomes ``error: …`` and exit code 2; Ctrl-C is 130, the run has saved itself."""
    try:
        yield
    except PosttrainError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _training_config(path: Path | None, overrides: list[str], resume: Path | None) -> tuple[Config, Path]:
    """The configuration to train with, and the folder its relative paths start from."""
    if resume is None:
        if path is None:
            raise ConfigError("nothing to train: give a configuration, or --resume RUN")
        if path.is_dir():
            raise ConfigError(f"{path} is a folder: give a TOML file, or go on with a run by --resume {path}")
        return _load(path, overrides), path.resolve().parent
    from posttrain.rl.run_dir import RunDir

    run = RunDir.open(resume)
    if path is not None:
        return _load(path, overrides), path.resolve().parent
    return _load(run.config_file, overrides), run.base()


def _evaluation_target(target: Path, overrides: list[str]) -> tuple[Config, Path | None, Path]:
    """Configuration, checkpoint folder (``None``: the base model) and the folder relative paths start from."""
    if target.suffix == ".toml" or target.is_file():
        return _load(target, overrides), None, target.resolve().parent
    from posttrain.rl.run_dir import RunDir

    run, checkpoint = RunDir.find(target)
    if checkpoint is None:
        newest = run.latest_checkpoint()
        if newest is None:
            raise CheckpointError(f"{run.path} has no checkpoint yet; evaluate its base model by {run.config_file}")
        checkpoint = newest[1]
    return _load(run.config_file, overrides), checkpoint, run.base()


def _load(path: Path, overrides: list[str]) -> Config:
    from posttrain.rl import config as configuration

    return configuration.load(path, overrides)
