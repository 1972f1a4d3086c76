"""Text to measure on: any UTF-8 file, or every such file of a folder."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from brain.errors import Refused, one_line
from brain.files import given_path, read_bytes

MOST_BYTES = 1 << 30
"""Of a file to measure on."""


def read_text(path: Path) -> str:
    """The text of a file, or of all files below a folder in the order of their names.

    Raises Refused for nothing at all, and for what is not UTF-8 text, naming the file.
    """
    path = given_path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        if not files:
            raise Refused(f"{path} has no files to evaluate on")
    else:
        files = [path]
    text = "\n".join(_read_file(file) for file in files)
    if not text.strip():
        raise Refused(f"{path} is empty: give a text to evaluate on")
    return text


def _read_file(file: Path) -> str:
    try:
        raw = read_bytes(file, MOST_BYTES)
        text = raw.decode()
    except OSError as error:
        raise Refused(f"{file} cannot be read ({one_line(error)})") from None
    except UnicodeDecodeError as error:
        raise Refused(f"{file} is not UTF-8 text (byte {error.start})") from None
    if "\0" in text:
        raise Refused(f"{file} is binary, not text (byte {text.index(chr(0))} is zero)")
    return text


def excerpts(ids: Sequence[int], streams: int, length: int, where: str) -> Tensor:
    """Excerpts of a text at even distances, overlapping only where the text is too short for that:
    [streams, length] int64. Raises Refused if the text is shorter than one excerpt.
    """
    spare = len(ids) - length
    if spare < 0:
        raise Refused(
            f"{where} has {len(ids)} tokens, but {length} are needed: give a longer text, or lower "
            "task.tokens or the budgets"
        )
    starts = [round(spare * stream / max(1, streams - 1)) for stream in range(streams)]
    return torch.stack([torch.tensor(ids[start : start + length]) for start in starts])
