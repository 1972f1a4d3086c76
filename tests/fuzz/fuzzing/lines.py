"""Damage to lines: commands for a running brain, and journals whose checksums are right again."""

import json
import zlib
from random import Random
from typing import Any

from fuzzing.blind import damaged
from fuzzing.jsons import NUMBERS, TEXTS, damaged_value, odd, text_of

DONE = ("pin", "boost", "cull", "redact", "replace", "inject")


def damaged_line(rng: Random) -> bytes:
    """A batch of actions, of which something is wrong, or nothing."""
    batch: Any = [_action(rng) for _ in range(rng.choice((1, 1, 2, 5)))]
    if rng.random() < 0.7:
        batch = damaged_value(batch, rng)
    return text_of(batch, rng).replace(b"\n", b" ")


def _action(rng: Random) -> dict[str, Any]:
    positions = [rng.randrange(24) for _ in range(rng.choice((1, 2, 2, 5)))]
    if rng.random() < 0.4:
        positions = list(range(positions[0], positions[0] + rng.randrange(1, 5)))
    action: dict[str, Any] = {"do": rng.choice(DONE), "positions": positions}
    match action["do"]:
        case "boost":
            action["amount"] = rng.choice((*NUMBERS, 3.0, 3.0))
        case "pin":
            action["pinned"] = rng.choice((True, False))
        case "replace" | "inject":
            if rng.random() < 0.5:
                action["text"] = rng.choice((" a", "he", *TEXTS))[:300]
            else:
                action["ids"] = [rng.choice((1, 2, 3, *NUMBERS[:12])) for _ in range(2)]
            action["source"] = rng.choice(("tool", "user", "model", *TEXTS))
    if action["do"] == "inject":
        del action["positions"]
    return action


def resealed_journal(content: bytes, rng: Random) -> bytes:
    """A journal with records damaged, dropped, doubled or added, each with its checksum."""
    if rng.random() < 0.3:
        return damaged(content, rng)
    try:
        records = [json.loads(line[9:]) for line in content.splitlines()]
    except (ValueError, RecursionError):  # damaged before
        return damaged(content, rng)
    for _ in range(rng.choice((1, 1, 3))):
        if not records:
            break
        at = rng.randrange(len(records))
        match rng.randrange(5):
            case 0:
                del records[at]
            case 1:
                records[at:at] = [records[at]] * rng.choice((1, 30))
            case 2:
                told = damaged_line(rng).decode("utf-8", "surrogateescape")
                records.insert(at, {"heard": told, "inbox": rng.choice(NUMBERS)})
            case 3:
                records.insert(at, odd(rng))
            case _:
                records[at] = damaged_value(records[at], rng)
    lines = b""
    for record in records:
        text = text_of(record, rng, blows=0.01).replace(b"\n", b" ")
        lines += b"%08x %s\n" % (zlib.crc32(text), text)
    return damaged(lines, rng, 1) if rng.random() < 0.1 else lines
