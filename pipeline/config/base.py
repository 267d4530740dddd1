"""What every section of a recipe shares: it is strict, frozen, and refuses keys that it does not know."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$")]
"""A name that becomes a path: 1 to 128 of `A-Z a-z 0-9 . _ -`, not starting with a dot."""

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A part of a recipe. Wrong types, unknown keys, numbers that are none and later changes are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
    )
