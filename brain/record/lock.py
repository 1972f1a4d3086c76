"""One process at a time writes into a run folder."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from brain.errors import Refused, one_line
from brain.files import require_own
from brain.machine.lock import exclusive

LOCK = ".lock"
PATIENCE = 0.2  # seconds: another process may be checking whether the folder is taken


@contextmanager
def sole_writer(folder: Path, other: str = "hydra.run.dir") -> Iterator[None]:
    """Holds a run folder for this process, within a ``with`` statement; the lock goes with it where
    nothing was written. Raises Refused if another process has it; ``other`` is the setting that
    names another folder.
    """
    require_own([folder / LOCK])
    before = {*os.listdir(folder), LOCK} if not (folder / LOCK).exists() else set()
    with ExitStack() as held:
        try:
            held.enter_context(exclusive(folder / LOCK, PATIENCE))
        except TimeoutError:
            raise Refused(
                f"{folder} belongs to a brain that is running: wait for it, send it commands "
                f"(task=command), or choose another folder with {other}"
            ) from None
        except OSError as error:
            raise Refused(f"{folder} cannot be locked ({one_line(error)})") from None
        try:
            yield
        finally:
            with suppress(OSError):
                if before == set(os.listdir(folder)):
                    (folder / LOCK).unlink()


def is_taken(folder: Path) -> bool:
    """Whether a process holds the run folder now. Raises Refused if that cannot be told."""
    require_own([folder / LOCK])
    if not (folder / LOCK).exists():
        return False
    try:
        with exclusive(folder / LOCK, patience=0):
            return False
    except TimeoutError:
        return True
    except OSError as error:
        raise Refused(f"{folder} cannot be locked ({one_line(error)})") from None
