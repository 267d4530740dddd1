"""Translates pydantic's validation errors into one line in the words of a recipe."""

import difflib
import json
import re
from collections.abc import Callable
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.config.recipe import Recipe
from pipeline.config.source_locations import KeyPath, SourceLocations, key_path

RENAMED_KEYS = {"training.feature.bridge": "training.feature.layer_gap_least_squares"}
"""Keys of earlier releases with their present names, dotted and without list positions."""

_MESSAGES: dict[str, Callable[[dict[str, Any]], str]] = {
    "too_short": lambda c: f"expected at least {c['min_length']} of them, got {c['actual_length'] or 'none'}",
    "too_long": lambda c: f"expected at most {c['max_length']} of them, got {c['actual_length']}",
    "string_too_short": lambda c: f"expected at least {c['min_length']} character(s), got none",
    "missing": lambda _: "expected a value, got none",
}
"""Complete messages by pydantic's error type, made from the error's context."""
_EXPECTED = {
    **dict.fromkeys(("model_type", "dict_type", "model_attributes_type"), "keys with values"),
    **dict.fromkeys(("tuple_type", "list_type"), "a list"),
    "bool_type": "true or false",
    "string_type": "text",
    "string_pattern_mismatch": "1 to 128 of A-Z a-z 0-9 . _ -",
}
"""What was expected, by pydantic's error type, where its own message suits programmers only."""


def explain(error: ValidationError, locations: SourceLocations) -> str:
    """Return the first mistake as `recipe FILE:LINE key: expected ..., got ...`; unknown keys come first."""
    first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    path, message = _without_branches(first["loc"]), _message(first)
    if first["type"] == "value_error":
        key, message = _split_key(message)
        path += key
    return f"{locations.location(path)}: {message}"


def _message(error: ErrorDetails) -> str:
    kind = error["type"]
    if kind == "extra_forbidden":
        return _unknown_key(_without_branches(error["loc"]))
    if kind == "value_error":
        return error["msg"].removeprefix("Value error, ")
    if kind in _MESSAGES:
        return _MESSAGES[kind](error.get("ctx", {}))
    expected = _EXPECTED.get(kind) or (
        error["msg"]
        .replace("Input should be ", "")
        .replace("a valid integer", "an integer")
        .replace("a valid ", "a ")
        .replace("'", "")
    )
    return f"expected {expected}, got {format_value(error['input'])}"


def _split_key(message: str) -> tuple[KeyPath, str]:
    """Split `key: text` of our validators into (key, text); a message without a key gives ((), message)."""
    key, colon, rest = message.partition(": ")
    return (key_path(key), rest) if colon and " " not in key else ((), message)


def _unknown_key(path: KeyPath) -> str:
    if new := RENAMED_KEYS.get(".".join(part for part in path if isinstance(part, str))):
        return f"this key is now called {new}"
    known = _known_keys(path[:-1])
    close = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"expected one of: {', '.join(sorted(known))}"
    return f"unknown key, {hint}"


def _known_keys(path: KeyPath) -> list[str]:
    model: type[BaseModel] | None = Recipe
    for key in path:
        if isinstance(key, str) and model is not None:
            model = _model_in(model.model_fields[key].annotation) if key in model.model_fields else None
    return [] if model is None else list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for inner in get_args(annotation) if (model := _model_in(inner)) is not None), None)


def _without_branches(loc: tuple[int | str, ...]) -> KeyPath:
    """Remove the names that pydantic gives to a union's branches (`losses.kd.Schedule.kind`)."""
    branch = re.compile(r"float|int|str|bool|Schedule|tuple\[.*|literal\[.*|[a-z-]+\[.*")
    return tuple(part for part in loc if isinstance(part, int) or not branch.fullmatch(part))


def format_value(value: Any) -> str:
    """Return a value as JSON, cut to 60 characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
