"""Files of a repository on the Hugging Face hub: listed, and fetched into the hub's own cache.

The cache is laid out as the hub's client lays it out, so other programs find what is fetched here,
and the other way round: ``blobs/OID`` has the content, ``snapshots/COMMIT/NAME`` links to it, and
``refs/REVISION`` names the commit. The client cannot go on with a file that was interrupted, so
files are fetched here: a partial one stays beside the blobs until it is whole and has the hash that
the hub names.
"""

import hashlib
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from brain.errors import Refused, one_line, shown
from brain.machine.integrity import file_sha256
from brain.machine.lock import exclusive
from brain.machine.progress import progress_bar
from brain.machine.streams import Notes

ATTEMPTS = 5  # to get another byte of a file, before it is given up
PAUSE = 1.0  # seconds between them
CHUNK = 1 << 20
PARTIAL = ".brain.incomplete"
HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
ELSEWHERE = "or download it elsewhere and use model=FOLDER"


class Unreachable(Exception):
    """The hub does not answer, or not now: why, and what helps. What is in the cache may do."""


class HubFile(NamedTuple):
    """A file as the hub lists it."""

    name: str  # with its folder
    size: int  # bytes
    oid: str  # the SHA-256 of a large file's content; of another file what git calls it, SHA-1


class Listing(NamedTuple):
    """The files of a repository at one commit, by name."""

    repo: str
    commit: str
    files: Mapping[str, HubFile]


class Place:
    """Where a repository lies in the cache. ``cache_dir``: the cache; None: the hub's own."""

    def __init__(self, repo: str, revision: str | None, cache_dir: Path | None) -> None:
        from huggingface_hub import constants

        self.cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
        self.name = "models--" + repo.replace("/", "--")
        self.folder = self.cache / self.name
        self._revision = revision or constants.DEFAULT_REVISION

    def snapshot(self, commit: str) -> Path:
        """The folder of a commit."""
        return self.folder / "snapshots" / commit

    def known(self) -> Path | None:
        """The folder of the revision as far as the cache knows it, if it does."""
        commit = self._revision
        with suppress(OSError, ValueError):
            commit = self._ref().read_text("utf-8").strip()
        folder = self.snapshot(commit)
        return folder if HASH.fullmatch(commit) and folder.is_dir() else None

    def remember(self, commit: str) -> None:
        """Writes down which commit the revision is, for when the hub cannot be reached."""
        ref = self._ref()
        if commit == self._revision or self.folder / "refs" not in ref.parents:
            return
        with suppress(OSError):  # a cache that cannot be written to does as it is
            if not ref.exists() or ref.read_text("utf-8") != commit:
                ref.parent.mkdir(parents=True, exist_ok=True)
                ref.write_text(commit, "utf-8")

    def _ref(self) -> Path:
        return Path(os.path.normpath(self.folder / "refs" / self._revision))


def list_files(repo: str, revision: str | None) -> Listing:
    """What the hub has. Raises Unreachable where it does not answer, and Refused."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.hf_api import RepoFile

    api, patience = HfApi(), constants.HF_HUB_ETAG_TIMEOUT
    with _told(repo, revision):
        info = api.model_info(repo, revision=revision, timeout=patience, files_metadata=True)
        commit = str(info.sha)
        found = {
            s.rfilename: (s.size, s.lfs["sha256"] if s.lfs else s.blob_id)
            for s in info.siblings or ()
        }
        if not all(size is not None and oid for size, oid in found.values()):  # a mirror, perhaps
            tree = api.list_repo_tree(repo, revision=commit, recursive=True)
            listed = [file for file in tree if isinstance(file, RepoFile)]
            found = {f.path: (f.size, f.lfs["sha256"] if f.lfs else f.blob_id) for f in listed}
    files = {}
    for name, (size, oid) in found.items():
        if not HASH.fullmatch(commit) or not HASH.fullmatch(str(oid)) or not _is_within(name):
            told = f"{shown(name)} with hash {shown(oid)} at commit {shown(commit)}"
            raise Refused(f"{repo}: the hub lists {told}, which cannot be: check HF_ENDPOINT")
        files[name] = HubFile(name, int(size or 0), str(oid))
    return Listing(repo, commit, files)


def _is_within(name: str) -> bool:
    """Whether a file's name stays in its repository."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and not set(name) & set("\\\0")


def fetch(listing: Listing, names: Iterable[str], place: Place, *, quiet: bool = False) -> Path:
    """Fetches these files, in this order, as far as they are not there; returns the folder of the
    commit. Raises Refused. What is interrupted goes on from there the next time. One line says
    what is fetched, unless it is ``quiet``.
    """
    wanted = [listing.files[name] for name in dict.fromkeys(names)]
    folder = place.snapshot(listing.commit)
    if any(not _is_there(folder, file) for file in wanted):
        try:
            locks = place.cache / ".locks" / place.name
            locks.mkdir(parents=True, exist_ok=True)
            (place.folder / "blobs").mkdir(parents=True, exist_ok=True)
            with ExitStack() as stack:
                # A second process waits, and finds all there.
                with progress_bar(f"waiting for another process that fetches {listing.repo}"):
                    stack.enter_context(exclusive(locks / "brain.lock"))
                _fetch_missing(listing, wanted, place, quiet=quiet)
        except OSError as error:
            raise Refused(
                f"{place.folder}: cannot be written ({error.strerror or one_line(error)}); free "
                "some space there, or give cache_dir=FOLDER"
            ) from None
    return folder


def _fetch_missing(listing: Listing, wanted: list[HubFile], place: Place, *, quiet: bool) -> None:
    folder, blobs = place.snapshot(listing.commit), place.folder / "blobs"
    missing = [file for file in wanted if not _is_there(folder, file)]
    partial = {file: max(_size(blobs / (file.oid + PARTIAL)), 0) for file in missing}
    lacking = [file for file in missing if _size(blobs / file.oid) != file.size]
    whole = sum(file.size for file in wanted)
    left = sum(max(file.size - partial[file], 0) for file in lacking)
    free = shutil.disk_usage(blobs).free
    if left > free:
        raise Refused(
            f"{listing.repo}: {readable_size(left)} are to be fetched, and {place.folder} has "
            f"{readable_size(free)} free: free some space there, or give cache_dir=FOLDER"
        )
    if lacking and not quiet:
        there = f", {readable_size(whole - left)} of it there already" if whole > left else ""
        count = f"{len(wanted)} file" + "s" * (len(wanted) != 1)
        print(
            f"fetching {listing.repo} at {listing.commit[:12]}: {count}, {readable_size(whole)}"
            f"{there}, into {place.folder}",
            file=Notes(sys.stderr),
            flush=True,
        )
    options = {"unit_scale": True, "initial": whole - left, "leave": False, "disable": quiet}
    with progress_bar(f"fetching {listing.repo}", whole, "B", **options) as bar:
        for file in missing:
            blob = blobs / file.oid
            if file in lacking:
                _download(listing, file, blobs / (file.oid + PARTIAL), bar.update)
                os.replace(blobs / (file.oid + PARTIAL), blob)
            _link(folder / file.name, blob)


def _download(listing: Listing, file: HubFile, partial: Path, tell: Any) -> None:
    """Fetches what a file lacks, and verifies the whole. Raises Refused."""
    try:
        with _told(listing.repo, None), _Appended(partial) as out:
            if out.tell() > file.size or len(file.oid) == 40:  # small ones are not worth it
                out.begin_anew(tell)
            _receive_all(listing, file, out, tell)
    except Unreachable as error:
        raise Refused(
            f"{listing.repo}: {file.name} is not whole: {error}. The same command goes on where it "
            "stopped"
        ) from None
    found = _digests(partial, file)
    if _size(partial) != file.size or file.oid not in found:
        partial.unlink(missing_ok=True)
        raise Refused(
            f"{listing.repo}: {file.name} came with hash {found[0][:16]}…, the hub names "
            f"{file.oid[:16]}…; it is removed: run this again to fetch it again"
        )


def _receive_all(listing: Listing, file: HubFile, out: "_Appended", tell: Any) -> None:
    """Asks for the rest of a file until it is there, or nothing more comes."""
    attempts = ATTEMPTS
    while out.tell() < file.size and attempts:
        before = out.tell()
        try:
            _receive(listing, file, out, tell)
        except OSError:  # the disk's, or the hub's last word
            raise
        except Exception:  # of the client's HTTP library: the connection was lost
            if attempts == 1:
                raise
        attempts = ATTEMPTS if out.tell() > before else attempts - 1
        if out.tell() < file.size and attempts:
            time.sleep(PAUSE)


def _receive(listing: Listing, file: HubFile, out: "_Appended", tell: Any) -> None:
    """Asks for the rest of a file, once."""
    from huggingface_hub import constants, get_session, get_token, hf_hub_url, hf_raise_for_status

    url = hf_hub_url(listing.repo, file.name, revision=listing.commit)
    headers = {"Accept-Encoding": "identity"}
    if not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN and (token := get_token()):
        headers["Authorization"] = f"Bearer {token}"  # not passed on to another host
    if start := out.tell():
        headers["Range"] = f"bytes={start}-"
    patience = constants.HF_HUB_DOWNLOAD_TIMEOUT  # seconds without a byte
    with get_session().stream(
        "GET", url, headers=headers, timeout=patience, follow_redirects=True
    ) as response:
        hf_raise_for_status(response)
        if start and response.status_code != 206:  # all of it comes
            out.begin_anew(tell)
        for block in response.iter_bytes():  # as it comes: nothing waits in a buffer
            left = memoryview(block)
            while left:  # a disk that is almost full takes a part
                left = left[out.write(left) :]
            tell(len(block))
            if out.tell() > file.size:
                return


class _Appended(FileIO):
    """A partial file, at its end."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "ab")

    def begin_anew(self, tell: Any) -> None:
        """Drops what is there."""
        tell(-self.tell())
        self.truncate(0)
        self.seek(0)


def _digests(path: Path, file: HubFile) -> list[str]:
    """The hashes that would prove a file's content: SHA-256, or git's; some mirrors name plain
    SHA-1.
    """
    if len(file.oid) == 64:
        return [file_sha256(path, progress=True)]
    git, plain = hashlib.sha1(b"blob %d\0" % file.size), hashlib.sha1()
    with path.open("rb") as content:
        while block := content.read(CHUNK):
            git.update(block)
            plain.update(block)
    return [git.hexdigest(), plain.hexdigest()]


def _link(pointer: Path, blob: Path) -> None:
    """Makes a file's name stand for its content. Where there are no links, the content moves."""
    pointer.parent.mkdir(parents=True, exist_ok=True)
    pointer.unlink(missing_ok=True)
    try:
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    except OSError:
        os.replace(blob, pointer)


def _is_there(folder: Path, file: HubFile) -> bool:
    return _size(folder / file.name) == file.size and (folder / file.name).is_file()


def _size(path: Path) -> int:
    """Bytes; −1 without such a file."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def readable_size(count: int) -> str:
    """A size, for people."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


@contextmanager
def _told(repo: str, revision: str | None) -> Iterator[None]:
    """Makes one line of what the hub's client raises: Unreachable, which may pass, or Refused."""
    from huggingface_hub import errors
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity

    named = f"{repo}@{revision}" if revision else repo
    page = f"https://huggingface.co/{repo}"
    loud = get_verbosity()
    set_verbosity(logging.ERROR)  # what is wrong is told here
    try:
        yield
        return
    except (Refused, Unreachable):
        raise
    except errors.GatedRepoError:
        reason = f"access must be granted: ask for it at {page}, then log in with 'hf auth login'"
    except errors.RepositoryNotFoundError:
        reason = (
            "no such path here, and no such repository on the hub, or it is private: check the "
            "name, or log in with 'hf auth login'"
        )
    except errors.RevisionNotFoundError:
        reason = "no such revision on the hub; check model.revision"
    except errors.HFValidationError:
        reason = "not a hub repository; give owner/name"
    except errors.OfflineModeIsEnabled:
        raise Unreachable(f"HF_HUB_OFFLINE is set: unset it, {ELSEWHERE}") from None
    except errors.HfHubHTTPError as error:
        reason = _status(error)
        if error.response.status_code == 429 or error.response.status_code >= 500:
            raise Unreachable(reason) from None
    except OSError:
        raise
    except Exception as error:  # of the client's HTTP library
        reason = f"the hub cannot be reached ({one_line(error)}): connect to the network"
        raise Unreachable(f"{reason}, {ELSEWHERE}") from None
    finally:
        set_verbosity(loud)
    raise Refused(f"{named}: {reason}")


def _status(error: Any) -> str:
    """What an answer of the hub means, and what helps."""
    response = error.response
    code = response.status_code
    if code == 429:
        wait = response.headers.get("Retry-After", "")
        when = f"in {wait} seconds" if wait.isdecimal() else "later"
        return f"the hub has had too many requests (429): try again {when}, {ELSEWHERE}"
    if code >= 500:
        return f"the hub has a fault ({code}): try again later, {ELSEWHERE}"
    if code == 401:
        return "the hub does not know your token (401): log in again with 'hf auth login'"
    if code == 403:
        return f"the hub denies access (403): check the rights of your token, {ELSEWHERE}"
    return f"could not be downloaded ({one_line(error)}); try again, {ELSEWHERE}"
