"""File and line of each key of a recipe, so that checks after loading can name them too."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

KeyPath: TypeAlias = tuple[str | int, ...]


def key_path(dotted_key: str) -> KeyPath:
    """Split `teachers[0].model` or `teachers.0.model` into `("teachers", 0, "model")`."""
    return tuple(int(part) if part.isdecimal() else part for part in re.findall(r"[^.\[\]]+", dotted_key))


def dotted(path: KeyPath) -> str:
    """Join `("teachers", 0, "model")` into `teachers[0].model`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


@dataclass(frozen=True, slots=True)
class SourceLocations:
    """The recipe's file, the line of every key in it, and the overrides. Ignored when two recipes are compared."""

    file: str = field(default="", compare=False)
    lines: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)
    """Line numbers by dotted key."""
    overrides: Sequence[str] = field(default=(), compare=False, repr=False)
    """`key.path=value` from the command line, in the order in which they were applied."""

    def location(self, path: KeyPath) -> str:
        """Return where a key's value was set: `override capture.k=0` or `recipe quickstart.yaml:14 capture.k`.

        A key that is in neither gets the line of its nearest parent.
        """
        for override in reversed(self.overrides):
            overridden = key_path(override.partition("=")[0])
            if path == overridden:
                return f"override {override}"
            is_child = path[: len(overridden)] == overridden
            is_parent = overridden[: len(path)] == path
            if is_child or (is_parent and dotted(path) not in self.lines):
                return f"override {override} {dotted(path)}".rstrip()
        parents = (dotted(path[:n]) for n in range(len(path), 0, -1))
        line = next((self.lines[key] for key in parents if key in self.lines), None)
        return f"recipe {self.file}{'' if line is None else f':{line}'} {dotted(path)}".rstrip()
