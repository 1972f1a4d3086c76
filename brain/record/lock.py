"""One process at a time writes into a run folder."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from brain.errors import Refused, one_line
from brain.files import require_own
from brain.machine.lock import exclusive

LOCK = ".lock"
PATIENCE = 0.2  # seconds: another process may be checking whether the folder is taken


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Holds a run folder for this process. Raises Refused if another one has it."""
    require_own([folder / LOCK])
    with ExitStack() as held:
        try:
            held.enter_context(exclusive(folder / LOCK, PATIENCE))
        except TimeoutError:
            raise Refused(
                f"{folder} belongs to a brain that is running: wait for it, send it commands "
                "(task=command), or choose another folder with hydra.run.dir"
            ) from None
        except OSError as error:
            raise Refused(f"{folder} cannot be locked ({one_line(error)})") from None
        yield


def is_taken(folder: Path) -> bool:
    """Whether a process holds the run folder now. Raises Refused."""
    require_own([folder / LOCK])
    try:
        with exclusive(folder / LOCK, patience=0):
            return False
    except TimeoutError:
        return True
    except OSError as error:
        raise Refused(f"{folder} cannot be locked ({one_line(error)})") from None
