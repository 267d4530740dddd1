"""Base class and shared types of the recipe's sections."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$")]
"""A name that becomes part of a path: 1 to 128 of `A-Z a-z 0-9 . _ -`, not starting with a dot."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A section of a recipe: immutable; wrong types, unknown keys, NaN and infinity are validation errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        """YAML and JSON have lists only; a strict tuple field accepts none."""
        return tuple(value) if isinstance(value, list) else value
