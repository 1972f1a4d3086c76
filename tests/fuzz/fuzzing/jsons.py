"""Damage to JSON: wrong types, absurd numbers, strange text, endless nesting, doubled keys."""

import copy
import json
from random import Random
from typing import Any

from fuzzing.blind import damaged

DEEP = "@DEEP@"
"""Stands for a nesting so deep that ``json.dumps`` could not write it."""

NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 7, 255, 2**16, 2**24, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63),
    *(2**64, -(2**63), -(2**64), 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308, -1e308),
    *(float("nan"), float("inf"), float("-inf")),
)
TEXTS = (
    *(
        "",
        " ",
        "0",
        "1",
        "-1",
        "1e9",
        "null",
        "nan",
        "true",
        "\0",
        "\n",
        "a\nb",
        "\ud800",
        "\udcff",
    ),
    *(
        "\x1b[31mred\x1b[2J",
        "\u2028",
        "\u202e",
        "é",
        "日本",
        "😀",
        "\u0301",
        "a" * 70_000,
        "/",
        ".",
    ),
    *(
        "..",
        "../x",
        "../../outside/kept.txt",
        "/etc/passwd",
        "C:\\x",
        "x" * 300,
        "%s%n",
        "{0}",
        "${x}",
    ),
    *("${oc.env:HOME}", "???", "${seed}", "<0x41>", "<0xZZ>", "▁", "Ġ", "(a+)+$", "F64", "F8_E4M3"),
)
OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    [],
    {},
    [None],
    [[]],
    [{}],
    {"": None},
    {"a": {}},
    DEEP,
)


def odd(rng: Random) -> Any:
    """Some value that is probably not the right one."""
    value = rng.choice(rng.choice((NUMBERS, TEXTS, OTHERS)))
    if rng.random() < 0.15:
        value = [value] * rng.choice((1, 2, 50))
    return copy.deepcopy(value)


def damaged_value(value: Any, rng: Random, times: int | None = None) -> Any:
    """A copy in which one to four places are not what they were."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4)) if times is None else times):
        places = list(_places(value))
        if not places or rng.random() < 0.02:
            value = odd(rng)
            continue
        holder, key = rng.choice(places)
        _strike(holder, key, rng)
    return value


def _places(value: Any) -> Any:
    """Every (container, key) within a value, the outer ones first and of long lists only some."""
    if isinstance(value, dict):
        keys: list[Any] = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    else:
        return
    if len(keys) > 60:
        keys = keys[:30] + keys[-30:]
    for key in keys:
        yield value, key
    for key in keys:
        yield from _places(value[key])


def _strike(holder: Any, key: Any, rng: Random) -> None:
    match rng.randrange(10):
        case 0:
            del holder[key]
        case 1:
            holder[key] = [holder[key]]
        case 2 if isinstance(holder[key], (int, float)):
            holder[key] = str(holder[key])
        case 3 if isinstance(holder[key], (int, float)):
            holder[key] += rng.choice((-1, 1, 2**32, -(2**32)))
        case 4 if isinstance(holder, list):
            holder.insert(key, odd(rng))
        case 5 if isinstance(holder, list):
            holder[:] = holder * rng.choice((2, 40))
        case 6 if isinstance(holder, dict):
            holder[rng.choice(TEXTS)] = odd(rng)
        case 7:
            other = rng.choice(list(_places(holder)))
            holder[key] = copy.deepcopy(other[0][other[1]])
        case _:
            holder[key] = odd(rng)


def text_of(value: Any, rng: Random, *, blows: float = 0.1) -> bytes:
    """The value as JSON, deep nestings written out; sometimes a key twice, sometimes damaged."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.7)
    if DEEP in text:
        depth = rng.choice((60, 500, 900, 960, 990, 1100, 100_000))
        opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
        text = text.replace(f'"{DEEP}"', opening * depth + "0" * (opening != "[") + closing * depth)
    if isinstance(value, dict) and value and rng.random() < 0.08:
        twice = json.dumps({rng.choice(list(value)): odd(rng)})[1:-1]
        text = text[:-1] + ", " + twice.replace(DEEP, "") + "}"
    content = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.02:
        content = rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"  " * 9)) + content
    return damaged(content, rng) if rng.random() < blows else content


def damaged_json(content: bytes, rng: Random) -> bytes:
    """A JSON file with its values damaged, or its bytes."""
    if rng.random() < 0.2:
        return damaged(content, rng)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):  # damaged before
        return damaged(content, rng)
    return text_of(damaged_value(value, rng), rng)
