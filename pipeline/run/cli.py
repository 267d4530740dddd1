"""The command line. Imports little at its top: `--help` and the reports must answer at once."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from pipeline.errors import ExitCode, StillhouseError

Verb = Callable[[argparse.Namespace], ExitCode]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; print what the user can act on; answer with the exit code."""
    options = _parsed(arguments)
    try:
        return int(options.verb(options))
    except StillhouseError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe has left; keep Python from saying so again when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(options: argparse.Namespace) -> ExitCode:
    from pipeline.config import load_recipe
    from pipeline.run.stages import run

    return run(load_recipe(options.recipe, options.override), options.stages)


def _plan(options: argparse.Namespace) -> ExitCode:
    from pipeline.config import load_recipe
    from pipeline.planning.plan import plan

    recipe = load_recipe(options.recipe, options.override)
    outcome = plan(recipe, tokens_per_s=options.tokens_per_s, probe=options.probe)
    return _report(options, outcome.as_json(), str(outcome))


def _status(options: argparse.Namespace) -> ExitCode:
    from pipeline.config import load_recipe
    from pipeline.run.status import status

    outcome = status(load_recipe(options.recipe, options.override))
    _report(options, outcome.as_json(), str(outcome))
    return outcome.exit_code


def _verify(options: argparse.Namespace) -> ExitCode:
    from pipeline.cache.verify.verify_cache import verify_cache

    with _bar("verify", "shard") as progress:
        outcome = verify_cache(options.cache, audit=options.audit, progress=progress)
    _report(options, outcome.as_json(), str(outcome))
    return outcome.exit_code


def _inspect(options: argparse.Namespace) -> ExitCode:
    from pipeline.cache.export.inspect import inspect_cache

    outcome = inspect_cache(options.cache, options.sequence, rows=options.rows, entries=options.entries)
    return _report(options, outcome.as_json(), str(outcome))


def _gc(options: argparse.Namespace) -> ExitCode:
    from pipeline.cache.gc import collect_garbage

    outcome = collect_garbage(options.cache, grace_s=options.grace_s, dry_run=options.dry_run)
    return _report(options, outcome.as_json(), str(outcome))


def _export(options: argparse.Namespace) -> ExitCode:
    from pipeline.cache.export.open_layout import export_cache

    outcome = export_cache(options.cache, options.folder)
    return _report(options, outcome.as_json(), str(outcome))


@contextmanager
def _bar(title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """What is called with how much is done and how much there is: a bar on a terminal, otherwise nothing."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from tqdm import tqdm

    with tqdm(desc=title, unit=unit, dynamic_ncols=True, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def _report(options: argparse.Namespace, as_json: Any, text: str) -> ExitCode:
    print(json.dumps(as_json, indent=2) if options.json else text)
    return ExitCode.DONE


class _OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error is said."""

    def error(self, message: str) -> NoReturn:
        self.exit(ExitCode.USAGE, f"error: {' '.join(message.split())}; see: {self.prog} --help\n")


def _positive(text: str) -> float:
    value = float(text)
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _OneLineParser(
        prog="stillhouse",
        description="Distil small language models from large teachers that are never in the student's memory.",
        epilog="Exit codes: 0 done, 1 failed or damaged, 2 usage or recipe, 3 incomplete.",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for name, stages, words in (
        ("run", None, "all stages: capture, train, evaluate, export"),
        ("capture", ("capture",), "let the teachers read the corpus and fill their caches"),
        ("train", ("train",), "train the students, and their controls, from the caches"),
        ("evaluate", ("evaluate",), "measure the students against teachers and controls"),
    ):
        verb = _recipe_verb(verbs, name, _run, words)
        verb.set_defaults(stages=stages)
    verb = _recipe_verb(verbs, "plan", _plan, "tokens, bytes, memory and hours, before anything starts")
    pace = verb.add_mutually_exclusive_group()
    pace.add_argument("--tokens-per-s", type=_positive, help="the pace of one replica of a teacher, for the hours")
    pace.add_argument("--probe", action="store_true", help="let each teacher score a few units, to measure its pace")
    verb.add_argument("--json", action="store_true", help="for programs")
    verb = _recipe_verb(verbs, "status", _status, "what is done and what is missing, from storage alone")
    verb.add_argument("--json", action="store_true", help="for programs")
    _add_cache_verbs(verbs)
    return parser


def _add_cache_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    verb = _cache_verb(verbs, "verify", _verify, "look for damage, disagreement and gaps in a cache")
    verb.add_argument("--audit", action="store_true", help="measure what the kept entries lose")
    verb = _cache_verb(verbs, "inspect", _inspect, "what a teacher said, readable")
    verb.add_argument("--sequence", metavar="ID", help="one sequence, position by position")
    verb.add_argument("--rows", type=int, default=32, help="positions that are shown (default: 32)")
    verb.add_argument("--entries", type=int, default=5, help="entries of a position that are shown (default: 5)")
    verb = _cache_verb(verbs, "gc", _gc, "remove files that no commit names")
    verb.add_argument("--grace-s", type=float, default=86_400.0, help="leave what is younger (default: a day)")
    verb.add_argument("--dry-run", action="store_true", help="only say what would go")
    verb = _cache_verb(
        verbs, "export", _export, "write a cache in an open layout for pandas, DuckDB, Polars or datasets"
    )
    verb.add_argument("folder", metavar="FOLDER", help="where the open files go")


def _recipe_verb(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, verb: Verb, words: str
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=words, description=words)
    parser.add_argument("recipe", metavar="RECIPE", help="a path, or the name of a recipe that ships")
    parser.add_argument("override", nargs="*", metavar="key.path=value", help="put on top of the recipe")
    parser.set_defaults(verb=verb)
    return parser


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; values to put on top of a recipe may stand behind options too, which argparse alone refuses."""
    parser = _parser()
    options, behind = parser.parse_known_args(arguments)
    strange = [word for word in behind if word.startswith("-") or "=" not in word or "override" not in options]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if behind:
        options.override += behind
    return options


def _cache_verb(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, verb: Verb, words: str
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=words, description=words)
    parser.add_argument("cache", metavar="CACHE", help="a cache's folder or URI, as in runs/quickstart/caches/smollm2")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(verb=verb)
    return parser


if __name__ == "__main__":
    sys.exit(main())
