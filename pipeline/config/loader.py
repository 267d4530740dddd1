"""Loads recipes from YAML files and job files. A mistake becomes one RecipeError line with file, line and key."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config.explain import explain
from pipeline.config.recipe import Recipe
from pipeline.config.source_locations import KeyPath, SourceLocations, dotted, key_path
from pipeline.errors import RecipeError

RECIPES = Path(__file__).parent.parent / "recipes"
MAX_RECIPE_BYTES = 1 << 20


class _RecipeYaml(yaml.SafeLoader):
    """Safe YAML loader with YAML 1.2's numbers and booleans (`1e-4` is a float, `no` is text) and without aliases."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(problem="aliases are not allowed", problem_mark=mark)
        return super().compose_node(parent, index)


_RecipeYaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":int", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeYaml.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
_RecipeYaml.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_RecipeYaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe by path, or by the name of one that ships, and apply `key.path=value` overrides to it.

    Raises RecipeError, with file, line and key, where the recipe is missing, malformed or invalid.
    """
    path = _find(name_or_path)
    text = _read(path)
    values, lines = _parse(text, path)
    for override in overrides:
        _override(values, override)
    return _validate(values, SourceLocations(path.name, lines, overrides))


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """Rebuild a recipe from `Recipe.to_dict()`. Raises RecipeError."""
    return _validate(values, _name_only(values))


def recipe_from_job_dict(job: Mapping[str, Any]) -> Recipe:
    """Rebuild a recipe from a job file, which contains the keys of `Recipe.to_job_dict()`. Raises RecipeError."""
    locations = SourceLocations(**job["origins"]) if "origins" in job else _name_only(job["recipe"])
    return _validate(job["recipe"], locations)


def _name_only(values: Mapping[str, Any]) -> SourceLocations:
    """Locations of a recipe without a file: messages contain its name instead."""
    return SourceLocations(str(values.get("name", "recipe.json")))


def shipped_recipes() -> dict[str, str]:
    """The recipes that ship: name and the comment at the top of the file."""
    texts = {path.stem: path.read_text() for path in sorted(RECIPES.glob("*.yaml"))}
    comments = {
        name: itertools.takewhile(lambda line: line.startswith("#"), texts[name].splitlines()) for name in texts
    }
    return {name: " ".join(line.lstrip("# ") for line in lines) for name, lines in comments.items()}


def _find(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = RECIPES / f"{name_or_path}.yaml"
    if re.fullmatch(r"[A-Za-z0-9._-]+", name_or_path) and shipped.is_file():
        return shipped
    names = ", ".join(shipped_recipes())
    raise RecipeError(f"recipe {name_or_path}: expected a file, or the name of a shipped recipe ({names})")


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"recipe {path}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_RECIPE_BYTES:
        raise RecipeError(f"recipe {path}: expected at most {MAX_RECIPE_BYTES} bytes, got {len(data)}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecipeError(f"recipe {path.name}:{line}: expected UTF-8, got byte 0x{data[error.start]:02x}") from error


def _parse(text: str, path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the values, and the line of every key by its dotted name."""
    lines: dict[str, int] = {}
    try:
        loader = _RecipeYaml(text)
        node = loader.get_single_node()
        if node is not None:
            _record_lines(node, (), lines, path.name)
        values = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise RecipeError(f"recipe {path.name}:{line}: not valid YAML: {_one_line(error.problem)}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"recipe {path.name}: not valid YAML: {_one_line(error)}") from error
    if not isinstance(values, dict):
        got = "nothing" if values is None else type(values).__name__
        raise RecipeError(f"recipe {path.name}: expected keys and values, got {got}")
    return values, lines


def _record_lines(node: yaml.Node, path: KeyPath, lines: dict[str, int], file: str) -> None:
    """Record the line of every key. Raises RecipeError for a duplicate key, of which PyYAML would take the last."""
    lines.setdefault(dotted(path), node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            key_dotted = dotted((*path, name))
            if name in seen:
                raise RecipeError(f"recipe {file}:{line} {key_dotted}: duplicate key, first in line {seen[name]}")
            seen[name] = lines[key_dotted] = line
            _record_lines(value, (*path, name), lines, file)
    elif isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            _record_lines(item, (*path, position), lines, file)


def _override(values: dict[str, Any], override: str) -> None:
    """Set `key.path=value` in the values; list items are addressed as `teachers[0].model` or `teachers.0.model`."""
    name, equals, text = override.partition("=")
    keys = key_path(name)
    if not equals or not keys:
        raise RecipeError(f"override {override!r}: expected key.path=value, as in training.workers=2")
    target: Any = values
    try:
        value = yaml.load(text, _RecipeYaml)
        for key, following in itertools.pairwise(keys):
            if isinstance(target, list):
                target = target[int(key)]
            else:
                target = target.setdefault(str(key), [] if isinstance(following, int) else {})
        if isinstance(target, list):
            target[int(keys[-1])] = value
        else:
            target[str(keys[-1])] = value
    except (yaml.YAMLError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise RecipeError(f"override {override!r}: the recipe has no such key: {_one_line(error)}") from error


def _validate(values: Mapping[str, Any], locations: SourceLocations) -> Recipe:
    try:
        return Recipe.model_validate(values).set_locations(locations)
    except ValidationError as error:
        raise RecipeError(explain(error, locations)) from None


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
