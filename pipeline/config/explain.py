"""What is wrong with a recipe, in one line and in its reader's words: pydantic's are for programmers."""

import difflib
import json
import re
from collections.abc import Callable
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.config.source_locations import KeyPath, SourceLocations, key_path
from pipeline.config.recipe import Recipe

_WORDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "too_short": lambda c: f"expected at least {c['min_length']} of them, got {c['actual_length'] or 'none'}",
    "too_long": lambda c: f"expected at most {c['max_length']} of them, got {c['actual_length']}",
    "string_too_short": lambda c: f"expected at least {c['min_length']} character(s), got none",
    "missing": lambda _: "expected a value, got none",
}
"""Kinds of mistakes whose message needs no value."""
_WANTED = {
    **dict.fromkeys(("model_type", "dict_type", "model_attributes_type"), "keys with values"),
    **dict.fromkeys(("tuple_type", "list_type"), "a list"),
    "bool_type": "true or false",
    "string_type": "text",
    "string_pattern_mismatch": "1 to 128 of A-Z a-z 0-9 . _ -",
}
"""What was expected, where pydantic's message does not say it well."""


def explain(error: ValidationError, origins: SourceLocations) -> str:
    """The first thing wrong: `recipe FILE:LINE key: expected ..., got ...`, an unknown key before all else."""
    first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    where, words = _without_branches(first["loc"]), _words(first)
    if first["type"] == "value_error":
        key, words = _key_and_words(words)
        where += key
    return f"{origins.location(where)}: {words}"


def _words(mistake: ErrorDetails) -> str:
    kind = mistake["type"]
    if kind == "extra_forbidden":
        return f"unknown key{_nearest(_without_branches(mistake['loc']))}"
    if kind == "value_error":
        return mistake["msg"].removeprefix("Value error, ")
    if kind in _WORDS:
        return _WORDS[kind](mistake.get("ctx", {}))
    wanted = _WANTED.get(kind) or (
        mistake["msg"]
        .replace("Input should be ", "")
        .replace("a valid integer", "an integer")
        .replace("a valid ", "a ")
        .replace("'", "")
    )
    return f"expected {wanted}, got {shown(mistake['input'])}"


def _key_and_words(message: str) -> tuple[KeyPath, str]:
    """Our own checks of a whole section begin with the key that they are about, if there is one."""
    key, colon, words = message.partition(": ")
    return (key_path(key), words) if colon and " " not in key else ((), message)


def _nearest(where: KeyPath) -> str:
    known = _known_keys(where[:-1])
    close = difflib.get_close_matches(str(where[-1]), known, n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else f", expected one of: {', '.join(sorted(known))}"


def _known_keys(where: KeyPath) -> list[str]:
    model: type[BaseModel] = Recipe
    for key in where:
        if isinstance(key, int):
            continue
        found = _model_in(model.model_fields[key].annotation) if key in model.model_fields else None
        if found is None:
            return []
        model = found
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _model_in(inner)) is not None), None)


def _without_branches(loc: tuple[int | str, ...]) -> KeyPath:
    """pydantic names the branch of a union in the path (`losses.kd.Schedule.kind`); a reader does not."""
    branch = re.compile(r"float|int|str|bool|Schedule|tuple\[.*|literal\[.*|[a-z-]+\[.*")
    return tuple(part for part in loc if isinstance(part, int) or not branch.fullmatch(part))


def shown(value: Any) -> str:
    """A value as the recipe could hold it, cut short."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
