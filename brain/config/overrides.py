"""Text as a Hydra override means it: character for character.

Hydra's override grammar gives commas, quotes, braces, parentheses and dollar signs a meaning of
their own. A prompt is not a program: what the shell hands over is what the brain is given.
"""

import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from brain.config.model_name import choices
from brain.errors import Refused, shown
from conf.schema import Source

TEXT_KEYS = (
    *("prompt", "prompt_file", "path", "model.path", "model.file", "model.wheel", "cache_dir"),
    *("task.path", "task.folder", "task.text", "task.actions"),
    *("talk.name", "talk.folder", "talk.system"),
)
"""Keys whose values are taken literally on the command line."""

FOLDER_KEYS = ("hydra.run.dir", "hydra.sweep.dir")
"""Keys whose values are taken literally, but for interpolations, unless they are in quotes."""

NAMED = Source.named.value

MULTIRUN = ("-m", "--multirun")
MULTIRUN_MODE = "hydra.mode=MULTIRUN"

SWEEPS = r"(choice|glob|range|interval|shuffle|sort|tag)\("
"""How a sweep of Hydra's begins, other than values between commas."""

SWEPT = re.compile(
    r"""\s*(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)'|((?:[^,\\]|\\.|\\\Z)*?))\s*(,|\Z)""",
    re.DOTALL,
)
"""One of several values with commas between them, in quotes or not."""


def literal(value: Any) -> Any:
    """A value, or anything plain that holds some, as text: ``${`` is no interpolation in it, and
    ``???``, which OmegaConf takes for a missing value, gets a backslash until ``as_given``.
    """
    if isinstance(value, dict):
        return {key: literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [literal(inner) for inner in value]
    if isinstance(value, str):
        marked = f"\\{value}" if re.fullmatch(r"\\*\?\?\?", value) else value
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", marked)
    return value


def as_given(value: Any) -> Any:
    """A value, or dataclasses that hold some, without the backslash that ``literal`` put there."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for name, inner in vars(value).items():
            setattr(value, name, as_given(inner))
    elif isinstance(value, list):
        return [as_given(inner) for inner in value]
    elif isinstance(value, str) and re.fullmatch(r"\\+\?\?\?", value):
        return value[1:]
    return value


def quoted(text: str) -> str:
    """The text as a quoted value: quotes, what precedes them, and interpolations escaped."""
    return _in_quotes(literal(text))


def _in_quotes(text: str) -> str:
    escaped = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ('\\"' if m[2] else ""), text)
    return f'"{escaped}"'


def override(key: str, value: Any) -> str:
    """``key=value`` for a Python value. A word may also choose from a config group. Raises Refused
    for a value that no key can have.
    """
    value = _plain(key, value)
    if isinstance(value, str):
        return f"{key}={value}" if _is_bare(value) else f"{key}={quoted(value)}"
    if isinstance(value, list):
        return f"{key}=[{','.join(override('', item)[1:] for item in value)}]"
    if isinstance(value, dict):
        pairs = (override(name, inner).replace("=", ":", 1) for name, inner in value.items())
        return f"{key}={{{','.join(pairs)}}}"
    return f"{key}={json.dumps(value)}"


def _is_bare(text: str) -> bool:
    """Whether Hydra reads a text as it is: it is a word, and no other value."""
    word = re.fullmatch(r"[A-Za-z_][\w.-]*", text, re.ASCII)
    return bool(word) and text.lower() not in ("null", "true", "false", "nan", "inf")


def model_overrides(model: Any, *, multirun: bool = False) -> list[str]:
    """``model=…`` as Hydra takes it: a choice of the group as it is, anything else by its name. In
    a multirun the names between commas are swept over; one with a comma needs quotes there. A path
    of Python's is a path, even if it is called like a choice. Raises Refused for anything else.
    """
    if isinstance(model, PurePath):
        model = os.path.join(os.curdir, model) if str(model) in choices() else str(model)
    if not isinstance(model, str):
        raise Refused(f"model cannot be {shown(model)}: give a name or a path")
    names = _swept(model) if multirun else [model]
    if choices().issuperset(names) or (multirun and re.match(SWEEPS, model)):
        return [f"model={model}"]
    return [f"model={NAMED}", f"model.name={','.join(map(quoted, names))}"]


def _swept_texts(key: str, value: str) -> str:
    """A text of a multirun, or several with commas between them. One that Hydra cannot read as
    several is one, whatever commas it has; a sweep of Hydra's, like ``choice(…)``, stays, and so
    does ``null``, which is no text, where a key may have it.
    """
    if not _is_readable(f"{key}={value}"):
        return quoted(value)
    if re.match(SWEEPS, value):
        return value
    unsaid = () if key.lstrip("+") == "prompt" else ("null",)
    return ",".join(t if t in unsaid or _is_bare(t) else quoted(t) for t in _swept(value))


def _swept(text: str) -> list[str]:
    """The values between commas, without their quotes."""
    values, at, comma = [], 0, ","
    while comma:
        found = SWEPT.match(text, at)
        assert found  # the last of its choices takes anything
        *parts, comma = found.groups()
        (value,) = (part for part in parts if part is not None)
        values.append(re.sub(r"""\\([,"'])""", r"\1", value))
        at = found.end()
    return values


def _plain(key: str, value: Any) -> Any:
    """A value as JSON has it: text for a path, a dtype, a device or an enumeration's member."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, PurePath):
        return str(value)
    # Where PyTorch has not been imported, nothing is of its types.
    if (torch := sys.modules.get("torch")) and isinstance(value, torch.device | torch.dtype):
        return str(value).removeprefix("torch.")
    if hasattr(value, "tolist"):  # numbers and arrays of NumPy and PyTorch
        value = value.tolist()
    if isinstance(value, dict):
        return {str(_plain(key, name)): _plain(key, inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(key, inner) for inner in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise Refused(f"{key} cannot be {shown(value)}: give a text, a number or a list of them")


def literal_arguments(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments with the values of TEXT_KEYS, and FOLDER_KEYS, quoted, and the model
    by its name, flags first: Hydra loses overrides that follow ``-m`` if others precede it. In a
    multirun commas separate the texts of several runs. Raises Refused for what this locale cannot
    read.
    """
    try:
        here = os.getcwd()
    except FileNotFoundError:
        raise Refused("the current folder has been removed: change to one that exists") from None
    for argument in (*arguments, here):
        if any("\udc80" <= character <= "\udcff" for character in argument):
            shown = argument.encode(errors="backslashreplace").decode()
            raise Refused(
                f"{shown} cannot be read in this locale ({sys.getfilesystemencoding()}): "
                "set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
            )
    keys = {argument.partition("=")[0] for argument in arguments}
    if {"prompt", "prompt_file"} <= keys:
        raise Refused("give prompt or prompt_file, not both")
    multirun = any(argument in (*MULTIRUN, MULTIRUN_MODE) for argument in arguments)
    result = ["--multirun"] if multirun else []
    models = [argument for argument in arguments if argument.startswith("model=")]
    for argument in arguments:
        if argument in MULTIRUN:
            continue
        key, equals, value = argument.partition("=")
        if equals and key == "model":
            models.pop(0)
            if not models:  # the last one counts; an earlier one would leave its name
                result += _model_arguments(value, keys, arguments, multirun=multirun)
            continue
        if equals and key.lstrip("+") in TEXT_KEYS:
            argument = f"{key}={_swept_texts(key, value) if multirun else quoted(value)}"
        elif equals and key in FOLDER_KEYS and not _is_in_quotes(argument, value):
            argument = f"{key}={_in_quotes(value)}"
        result.append(argument)
    return result


def _model_arguments(
    value: str, keys: set[str], arguments: Sequence[str], *, multirun: bool
) -> list[str]:
    """``model=…`` of a command line. Raises Refused where ``model.name`` would take its place."""
    if value == NAMED and "model.name" in keys:
        return [f"model={value}"]  # as a multirun, and a benchmark, have it
    if set(_swept(value) if multirun else [value]) & _own_choices(arguments):
        return [f"model={value}"]
    found = model_overrides(value, multirun=multirun)
    if len(found) > 1 and "model.name" in keys:
        raise Refused(f"model.name does not apply to model={value}: leave it out")
    return found


def _own_choices(arguments: Sequence[str]) -> set[str]:
    """The choices of the group ``model`` in the folder that ``--config-dir`` names."""
    following = zip(arguments, (*arguments[1:], ""), strict=True)
    for argument, after in following:
        flag, equals, folder = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            return {path.stem for path in Path(folder if equals else after).glob("model/*.yaml")}
    return set()


def _is_in_quotes(argument: str, value: str) -> bool:
    """Whether a value is in quotes that Hydra takes off."""
    return value[:1] in ("'", '"') and value[:1] == value[-1:] and _is_readable(argument)


def _is_readable(argument: str) -> bool:
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True
