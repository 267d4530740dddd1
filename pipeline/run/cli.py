"""The command line. Imports little at its top, so that `--help` and the reports answer at once."""

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pipeline.errors import ExitCode, StillhouseError
from pipeline.run.logs import FORMATS, configure_logging, set_log_options

if TYPE_CHECKING:
    from pipeline.config import Recipe

logger = logging.getLogger(__name__)
Command = TypeVar("Command", bound=Callable[..., Any])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code. An expected error becomes one line."""
    try:
        configure_logging()
        with cli.make_context("stillhouse", list(sys.argv[1:] if arguments is None else arguments)) as context:
            return int(cli.invoke(context) or ExitCode.DONE)
    except click.exceptions.Exit as ended:  # --help and --version
        return ended.exit_code
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "stillhouse"
        logger.error("%s; see: %s --help", " ".join(error.format_message().rstrip(".").split()), command)
        return int(ExitCode.USAGE)
    except StillhouseError as error:
        logger.error("%s", error)
        return int(error.exit_code)
    except KeyboardInterrupt:
        logger.info("interrupted: the same command continues from here")
        return 130
    except BrokenPipeError:
        # The reader of the pipe has ended; keep Python from reporting that again when it flushes at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


class _InOrderOfDefinition(click.Group):
    """Lists the verbs in the order of a run, not of the alphabet."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=_InOrderOfDefinition,
    epilog="Exit codes: 0 done, 1 failed or damaged, 2 usage or recipe, 3 incomplete.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    no_args_is_help=False,
)
@click.version_option(package_name="stillhouse", message="stillhouse %(version)s")
def cli() -> None:
    """Distil small language models from large teachers that are never in the student's memory."""


def _log_options(command: Command) -> Command:
    options = (
        click.option(
            "-v", "--verbose", count=True, expose_value=False,
            callback=lambda *given: set_log_options(verbosity=given[2]),
            help="Show the logs of Ray and vLLM too; -vv: at debug level.",
        ),
        click.option(
            "--log-format", type=click.Choice(FORMATS), expose_value=False,
            callback=lambda *given: set_log_options(log_format=given[2]),
            help="Log readable lines or JSON lines (on stderr).",
        ),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _recipe_options(command: Command) -> Command:
    command = _log_options(command)
    command = click.argument("overrides", metavar="[key.path=value]...", nargs=-1, callback=_check_overrides)(command)
    return click.argument("recipe", metavar="RECIPE")(command)


def _check_overrides(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    for word in value:
        if "=" not in word:
            raise click.UsageError(f"expected key.path=value behind the recipe, got {word!r}", context)
    return value


def _cache_options(command: Command) -> Command:
    return click.argument("cache", metavar="CACHE")(_json_option(_log_options(command)))


def _json_option(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def _positive(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not 0.0 < value < float("inf"):
        raise click.BadParameter(f"expected a number above 0, got {value:g}", context, parameter)
    return value


def _load(recipe: str, overrides: Sequence[str]) -> "Recipe":
    from pipeline.config import load_recipe

    return load_recipe(recipe, overrides)


def _run_verb(name: str, stages: tuple[str, ...], help_text: str) -> None:
    @cli.command(name, help=help_text)
    @_recipe_options
    def verb(recipe: str, overrides: tuple[str, ...]) -> ExitCode:
        from pipeline.run.stages import run

        return run(_load(recipe, overrides), stages)


_run_verb("run", ("capture", "train", "evaluate", "export"), "Run all stages: capture, train, evaluate, export.")
_run_verb("capture", ("capture",), "Let the teachers score the corpus into their caches.")
_run_verb("train", ("train",), "Train the students and their controls from the caches.")
_run_verb("evaluate", ("evaluate",), "Measure the students against their teachers and controls.")


@cli.command()
@_recipe_options
@click.option("--tokens-per-s", type=float, callback=_positive, help="Throughput of one replica, for the hours.")
@click.option("--probe", is_flag=True, help="Measure each teacher's throughput on a few units.")
@_json_option
def plan(recipe: str, overrides: tuple[str, ...], tokens_per_s: float | None, probe: bool, as_json: bool) -> None:
    """Show tokens, bytes, memory and hours before anything starts."""
    from pipeline.planning.plan import plan as make_plan

    if probe and tokens_per_s is not None:
        raise click.UsageError("--probe and --tokens-per-s exclude each other")
    _print(make_plan(_load(recipe, overrides), tokens_per_s=tokens_per_s, probe=probe), as_json)


@cli.command()
@_recipe_options
@_json_option
def status(recipe: str, overrides: tuple[str, ...], as_json: bool) -> ExitCode:
    """Show what is done and what is missing, from the storage alone."""
    from pipeline.run.status import status as read_status

    outcome = read_status(_load(recipe, overrides))
    _print(outcome, as_json)
    return outcome.exit_code


@cli.command()
@_recipe_options
@_json_option
def validate(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check a recipe; --json prints it with all defaults."""
    checked = _load(recipe, overrides)
    if as_json:
        click.echo(json.dumps(checked.to_dict(), indent=2))
    else:
        teachers, students = len(checked.teachers), len(checked.all_students)
        click.echo(f"recipe {checked.name}: valid (teachers: {teachers}, students: {students})")


@cli.command()
@_json_option
def recipes(as_json: bool) -> None:
    """List the recipes that ship."""
    from pipeline.config.loader import shipped_recipes

    shipped = shipped_recipes()
    click.echo(
        json.dumps(shipped, indent=2) if as_json else "\n".join(f"{name}: {text}" for name, text in shipped.items())
    )


@cli.command()
@_cache_options
@click.option("--audit", is_flag=True, help="Measure what the kept entries lose.")
def verify(cache: str, as_json: bool, audit: bool) -> ExitCode:
    """Look for damage, disagreement and gaps in a cache."""
    from pipeline.cache.verify.verify_cache import verify_cache
    from pipeline.run.progress import Progress

    with closing(Progress("verify", unit="shard")) as progress:

        def show(done: int, total: int) -> None:
            progress.update(done, total)
            progress.beat()

        outcome = verify_cache(cache, audit=audit, progress=show)
    _print(outcome, as_json)
    return outcome.exit_code


@cli.command()
@_cache_options
@click.option("--sequence", metavar="ID", help="Show one sequence, position by position.")
@click.option("--rows", default=32, show_default=True, help="Positions to show.")
@click.option("--entries", default=5, show_default=True, help="Entries of a position to show.")
def inspect(cache: str, as_json: bool, sequence: str | None, rows: int, entries: int) -> None:
    """Show a cache's signals in readable form."""
    from pipeline.cache.export.inspect import inspect_cache

    _print(inspect_cache(cache, sequence, rows=rows, entries=entries), as_json)


@cli.command()
@_cache_options
@click.option("--grace-s", default=86_400.0, show_default=True, help="Keep files that are younger, in seconds.")
@click.option("--dry-run", is_flag=True, help="Only list what would be removed.")
def gc(cache: str, as_json: bool, grace_s: float, dry_run: bool) -> None:
    """Remove files that no commit names."""
    from pipeline.cache.gc import collect_garbage

    _print(collect_garbage(cache, grace_s=grace_s, dry_run=dry_run), as_json)


@cli.command()
@_cache_options
@click.argument("folder", metavar="FOLDER")
def export(cache: str, as_json: bool, folder: str) -> None:
    """Write a cache as plain Parquet for other tools."""
    from pipeline.cache.export.open_layout import export_cache

    _print(export_cache(cache, folder), as_json)


def _print(outcome: Any, as_json: bool) -> None:
    """Print a report; as JSON its fields, or what its `as_json` returns if it has one."""
    if as_json:
        values = outcome.as_json() if hasattr(outcome, "as_json") else asdict(outcome)
        click.echo(json.dumps(values, indent=2))
    else:
        click.echo(outcome)


if __name__ == "__main__":
    sys.exit(main())
