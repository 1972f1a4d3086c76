"""What PyTorch's compiler keeps for later starts, and proof that it is undamaged.

The compiler loads the libraries that it finds in its folder without checking them. One that was cut
short by a full disk ends the process, and one with a wrong byte changes the text. So the compiler
is given a folder of our own, whose files are recorded in a manifest and checked before use.
"""

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from brain.errors import Refused, one_line, warn
from brain.files import cache_folder
from brain.machine.integrity import MANIFEST, is_as_recorded, read_manifest, write_manifest
from brain.machine.lock import shared
from compiled import torch_private

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
NAME = "positronic-brain-graphs"
LOCK = ".lock"


@contextmanager
def kept_graphs(cache_dir: Path | None = None) -> Iterator[Callable[[], None]]:
    """Has the compiler keep its files in a folder of ours, within a ``with`` statement. Gives a
    function that records what is there now, which is also done at the end.

    All that the compiler finds there is whole. If a recorded file is damaged or lost, all are
    removed, with a warning. Files that a killed process left unrecorded are removed without one.
    Where there can be no such folder, the compiler keeps its files where it always does.
    ``cache_dir`` holds ours, unless ``TORCHINDUCTOR_CACHE_DIR`` names another; None: the user's.
    """
    named = os.environ.get(VARIABLE)
    root = Path(named) if named else cache_folder(cache_dir)
    folder = root if root.name == NAME else root / NAME  # our parent process may have named ours
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _require_private(folder)
            alone = stack.enter_context(shared(folder / LOCK))
            with alone() as nobody_else:
                if nobody_else:
                    _remove_unrecorded(folder)
        except OSError:
            yield lambda: None
            return

        def record() -> None:
            # What another process is making may be half a file: the last one records it.
            with contextlib.suppress(OSError), alone() as nobody_else:
                if nobody_else:
                    _record(folder)

        os.environ[VARIABLE] = str(folder)
        try:
            yield record
        finally:
            if named is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = named
            record()


def name_graph_folder() -> None:
    """Has the compiler find its folder, wherever that is, by a path that it can use: it quotes none
    when it calls the C++ compiler. Raises Refused if it cannot.
    """
    try:
        folder = Path(torch_private.graph_folder())
        if os.name == "nt" or not _needs_quotes(folder):
            return
        os.environ[VARIABLE] = str(_link_to(folder))
    except OSError as error:
        raise Refused(
            f"the graphs cannot be kept ({one_line(error)}): set {VARIABLE} to a folder of yours "
            "whose path has no space or quote, or use engine=eager"
        ) from None


def _needs_quotes(path: Path) -> bool:
    return any(character.isspace() or character in "'\"\\" for character in str(path))


def _link_to(folder: Path) -> Path:
    """A link to the folder, in one of the user's own for such links. Raises OSError."""
    places = [Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")]
    place = next(place for place in places if not _needs_quotes(place))
    links = place / f"positronic-brain-{os.getuid()}"
    links.mkdir(mode=0o700, exist_ok=True)
    _require_private(links)
    link = links / hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    if not link.is_symlink() or link.readlink() != folder:
        draft = link.with_suffix(f".{os.getpid()}")
        draft.symlink_to(folder, target_is_directory=True)
        draft.replace(link)  # in one step: another process may be doing the same
    return link


def _require_private(folder: Path) -> None:
    """Raises OSError unless only this user may write to the folder, whose files are run."""
    status = os.lstat(folder)
    private = stat.S_ISDIR(status.st_mode) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not private or (hasattr(os, "geteuid") and status.st_uid != os.geteuid()):
        raise PermissionError(f"{folder} is not a folder that only you can write to")


def _remove_unrecorded(folder: Path) -> None:
    """Removes what is not as it was recorded. No other process may be using the folder."""
    try:
        recorded = read_manifest(folder)
        damaged = not all(is_as_recorded(folder / name, recorded[name]) for name in recorded)
    except (OSError, ValueError):
        recorded, damaged = {}, (folder / MANIFEST).exists()
    if damaged:
        (folder / MANIFEST).unlink()
    kept = set() if damaged else set(recorded)
    for name in _files(folder) - kept:
        (folder / name).unlink(missing_ok=True)
    if damaged:
        warn(f"{folder}: the graphs kept there are damaged; they are compiled again")


def _record(folder: Path) -> None:
    """Records every file that is there now, if there is a new one. No other process may be using
    the folder. What cannot be recorded is compiled again next time.
    """
    names = _files(folder)
    with contextlib.suppress(OSError, ValueError):
        sizes = {name: entry.size for name, entry in read_manifest(folder).items()}
        if sizes == {name: (folder / name).stat().st_size for name in names}:
            return
    with contextlib.suppress(OSError):
        write_manifest(folder, names)


def _files(folder: Path) -> set[str]:
    """All files below the folder but our own."""
    found = set()
    for where, _, names in os.walk(folder):
        found |= {str((Path(where) / name).relative_to(folder)) for name in names}
    return {name for name in found if name != LOCK and not name.startswith(MANIFEST)}
