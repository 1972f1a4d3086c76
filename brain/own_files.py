"""A run folder may have come from somebody else: what is written there must stay there."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from brain.errors import Refused


def require_own(paths: Iterable[Path]) -> None:
    """Raises Refused for the first of these that is there and is neither a plain file nor a folder.

    Through a link, a file elsewhere would be written or cut off; a pipe would wait for ever.
    """
    for path in paths:
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            kind = "a link" if stat.S_ISLNK(mode) else "not a plain file"
            raise Refused(f"{path} is {kind}: remove it, or choose another folder")
