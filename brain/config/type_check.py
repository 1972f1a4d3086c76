"""Whether a configuration has the types of its schema, all the way down."""

import dataclasses
import types
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints

from brain.errors import Refused, did_you_mean, shown


def check_types(value: Any, kind: Any, name: str = "") -> None:
    """Raises Refused, naming the key, where a value is not of the kind that its schema says: a
    dataclass, an Enum, str, bool, int, float, None, a list or dict of them, or any of several.
    """
    if dataclasses.is_dataclass(kind) and isinstance(value, kind):  # type: ignore[arg-type]
        kinds = get_type_hints(kind)
        if added := vars(value).keys() - kinds:  # with a plus
            within = f"{name}." if name else ""
            hint = did_you_mean(min(added), kinds, within)
            raise Refused(f"{within}{min(added)} is not a key{hint}")
        for field in dataclasses.fields(kind):
            key = f"{name}.{field.name}" if name else field.name
            check_types(getattr(value, field.name), kinds[field.name], key)
    elif not _is_of(value, kind):
        wanted = getattr(kind, "__name__", str(kind))
        wanted = "a group of keys" if dataclasses.is_dataclass(kind) else f"of type {wanted}"
        raise Refused(f"{name} must be {wanted}, not {shown(value)}")


def _is_of(value: Any, kind: Any) -> bool:
    inner = get_args(kind)
    if kind is Any:
        return True
    if get_origin(kind) in (Union, types.UnionType):
        return any(_is_of(value, one) for one in inner)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of(each, inner[0]) for each in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(
            _is_of(key, inner[0]) and _is_of(each, inner[1]) for key, each in value.items()
        )
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    assert (
        kind in (str, bool, type(None)) or issubclass(kind, Enum) or dataclasses.is_dataclass(kind)
    )
    return isinstance(value, kind)
