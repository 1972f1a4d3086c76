"""Paths as people give them."""

from pathlib import Path

from brain.errors import Refused


def given_path(path: str | Path) -> Path:
    """The path, ``~`` being somebody's home. Raises Refused if nobody's home is known by it."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise Refused(f"{path}: no such home folder is known; give the path in full") from None
