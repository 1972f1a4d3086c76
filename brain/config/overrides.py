"""Text as a Hydra override means it: character for character.

Hydra's override grammar gives commas, quotes, braces, parentheses and dollar signs a meaning of
their own. A prompt is not a program: what the shell hands over is what the brain is given.
"""

import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from brain.errors import Refused

TEXT_KEYS = (
    *("prompt", "path", "model.path", "model.wheel", "cache_dir"),
    *("task.path", "task.folder", "task.text", "task.actions"),
)
"""Keys whose values are taken literally on the command line."""

FOLDER_KEYS = ("hydra.run.dir", "hydra.sweep.dir")
"""Keys whose values are taken literally, but for interpolations, where Hydra cannot read them."""

MULTIRUN = ("-m", "--multirun")


def literal(value: Any) -> Any:
    """A value, or anything plain that holds some, without interpolations: ``${`` is text in it."""
    if isinstance(value, dict):
        return {key: literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [literal(inner) for inner in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    return value


def quoted(text: str) -> str:
    """The text as a quoted value: quotes, what precedes them, and interpolations escaped."""
    return _in_quotes(literal(text))


def _in_quotes(text: str) -> str:
    escaped = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ('\\"' if m[2] else ""), text)
    return f'"{escaped}"'


def override(key: str, value: Any) -> str:
    """``key=value`` for a Python value. A word may also choose from a config group."""
    if isinstance(value, str):
        word = re.fullmatch(r"[A-Za-z_][\w.-]*", value, re.ASCII)
        bare = word and value.lower() not in ("null", "true", "false", "nan", "inf")
        return f"{key}={value}" if bare else f"{key}={quoted(value)}"
    if isinstance(value, (list, tuple)):
        return f"{key}=[{','.join(override('', item)[1:] for item in value)}]"
    return f"{key}={json.dumps(value)}"


def literal_arguments(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments with the values of TEXT_KEYS, and FOLDER_KEYS, quoted, flags first:
    Hydra loses overrides that follow ``-m`` if others precede it. A value that is quoted already is
    left alone; so is, in a multirun, any value that Hydra can read, because commas separate the
    runs there. Raises Refused for what this locale cannot read.
    """
    for argument in (*arguments, os.getcwd()):
        if any("\udc80" <= character <= "\udcff" for character in argument):
            shown = argument.encode(errors="backslashreplace").decode()
            raise Refused(
                f"{shown} cannot be read in this locale ({sys.getfilesystemencoding()}): "
                "set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
            )
    multirun = any(argument in MULTIRUN for argument in arguments)
    result = ["--multirun"] if multirun else []
    for argument in arguments:
        if argument in MULTIRUN:
            continue
        key, equals, value = argument.partition("=")
        if equals and key in TEXT_KEYS and not _as_it_is(argument, value, multirun):
            argument = f"{key}={quoted(value)}"
        elif equals and key in FOLDER_KEYS and not _is_readable(argument):
            argument = f"{key}={_in_quotes(value)}"
        result.append(argument)
    return result


def _as_it_is(argument: str, value: str, multirun: bool) -> bool:
    wrapped = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
    return (multirun or wrapped) and _is_readable(argument)


def _is_readable(argument: str) -> bool:
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True
