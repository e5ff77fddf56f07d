"""What all sections of a recipe have in common, and what is said of one that is wrong."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from .errors import shown


class Section(BaseModel):
    """Keys and values: unknown keys are refused, numbers are finite, and true is none."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        takes_bool = section_of(annotation) is not None or any(name in str(annotation) for name in ("bool", "Any"))
        if not takes_bool and any(isinstance(part, bool) for part in _parts_of(value)):
            raise ValueError(f"true and false are no values here; there was {shown(value)}")
        return value


def _parts_of(value: Any) -> list[Any]:
    """What a list or a mapping holds, or the value itself."""
    if isinstance(value, list | tuple):
        return [part for inner in value for part in _parts_of(inner)]
    return list(value.values()) if isinstance(value, dict) else [value]


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field of this annotation holds, if it holds one."""
    options = [annotation, *getattr(annotation, "__args__", ())]
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


#: Tags of the forms that a value may have, where there are several.
_FORMS = ("a share", "shares", "an order", "a forecast")


def explain(error: ValidationError, whole: type[BaseModel], where: str) -> str:
    """The first of some errors as one line: the dotted key, what is wrong with it, what there was or what is near."""
    first = error.errors()[0]
    unknown = first["type"] == "extra_forbidden"
    # Which of the forms that a value may have was tried is no part of its key. An unknown key may be named like one.
    path = [part for part in first["loc"][:-1] if part not in _FORMS]
    location = [str(part) for part in (*path, *first["loc"][-1:]) if unknown or part not in _FORMS]
    key = ".".join(location)
    if unknown:
        known = _fields(whole, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        return f"{where}: unknown key {shown(key)}; {hint}"
    if first["type"] == "value_error":
        return f"{where}: {f'{key}: ' if key else ''}{first['ctx']['error']}"
    return f"{where}: key {shown(key)}: {first['msg'].lower()}; there was {shown(first['input'])}"


def _fields(section: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        annotation: Any = section.model_fields[part].annotation if part in section.model_fields else None
        section = section_of(annotation) or section
    return list(section.model_fields)
