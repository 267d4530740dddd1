"""Where the keys of a recipe were written, so that a check that comes late can name file and line too."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

KeyPath: TypeAlias = tuple[str | int, ...]


def key_path(dotted: str) -> KeyPath:
    """`teachers[0].model` and `teachers.0.model` as `("teachers", 0, "model")`."""
    return tuple(int(part) if part.isdecimal() else part for part in re.findall(r"[^.\[\]]+", dotted))


def dotted(where: KeyPath) -> str:
    """`("teachers", 0, "model")` as `teachers[0].model`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where)
    return text.removeprefix(".")


@dataclass(frozen=True, slots=True)
class SourceLocations:
    """The recipe's file, the line of every key in it, and what was put on top. No part of what a recipe is."""

    file: str = field(default="", compare=False)
    lines: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)
    """By dotted key."""
    overrides: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """`key.path=value`, the last one wins."""

    def location(self, where: KeyPath) -> str:
        """Who is to blame for a value: `override capture.k=0`, or `recipe quickstart.yaml:14 capture.k`."""
        for override in reversed(self.overrides):
            path = key_path(override.partition("=")[0])
            if where == path:
                return f"override {override}"
            if where[: len(path)] == path or (path[: len(where)] == where and dotted(where) not in self.lines):
                return f"override {override} {dotted(where)}".rstrip()
        above = (dotted(where[:n]) for n in range(len(where), 0, -1))
        line = next((self.lines[key] for key in above if key in self.lines), None)
        return f"recipe {self.file}{'' if line is None else f':{line}'} {dotted(where)}".rstrip()

    def as_json(self) -> dict[str, Any]:
        """For a job's file."""
        return {"file": self.file, "lines": dict(self.lines), "overrides": list(self.overrides)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "SourceLocations":
        """Back from `as_json`."""
        return cls(values["file"], values["lines"], tuple(values["overrides"]))
