"""What the sections of a recipe have in common: strict fields, and the types that several of them use."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def one_folder(name: str) -> str:
    """Return a name that can be that of one folder, and of no folder above.

    Raises:
        ValueError: it cannot.
    """
    if not name.strip() or name in (".", "..") or len(name) > 200 or any(c in "/\\" or ord(c) < 32 for c in name):
        raise ValueError("a name of one folder, without / and \\ (run.root says where it is)")
    return name


FolderName = Annotated[str, AfterValidator(one_folder)]
Place = Annotated[str, Field(min_length=1)]
"""A file, a folder or a name; empty text, as of a shell variable that is not set, would be the working folder."""


class Section(BaseModel):
    """A section of a recipe: strict types, finite numbers, unknown keys forbidden."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True, allow_inf_nan=False)
