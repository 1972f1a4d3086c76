"""The record of a run, and how it goes on after it was killed, with the token it would have said.

    RUN_FOLDER/transcript.txt       the text, RUN_FOLDER/tokens.txt its tokens
    RUN_FOLDER/saves/run.json       what was asked for
    RUN_FOLDER/saves/TICKS/         the brain after so many ticks (brain/saves.py)
    RUN_FOLDER/saves/TICKS.journal  what happened since: every token, every command

A draw depends on the seed and the number of the tick alone, and a command is written down with the
tick it came after. So the newest save and the journal behind it tell everything: the files of the
run are cut back to what they were when the save was made, and what the journal tells happens once
more. Of the saves the newest two are kept, so that one may be damaged.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from brain.brain import Brain
from brain.commands import ANSWERS, Inbox, Lost
from brain.errors import Refused, one_line
from brain.journal import Journal, read_journal
from brain.repair import Repair
from brain.saves import OtherWeights, plain, restore, save
from brain.terminal import note
from brain.tick import Tick
from brain.tokens import StreamDecoder
from conf.schema import Conf

FORMAT = 1
TRANSCRIPT, TOKENS, REPAIRS = "transcript.txt", "tokens.txt", "repairs.jsonl"
SAVES, RUN, LOCK = "saves", "run.json", ".lock"
KEPT = 2
"""Saves that are kept."""
FREE = (
    *("task", "ticks", "stop_at_eos", "threads", "nvtx", "cache_dir"),
    *("capture", "capture_top", "save_every"),
)
"""Settings that may change when a run goes on: none of them decides what is said."""

_REWRITTEN = ".rewritten"


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Holds a run folder for one process. Raises Refused if another one has it.

    The lock is the operating system's: it ends with the process, however that ends.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise Refused(
            f"{folder} belongs to a brain that is running: wait for it, send it commands "
            "(task=command), or choose another folder with hydra.run.dir"
        ) from None
    except OSError as error:
        raise Refused(f"{folder} cannot be locked ({one_line(error)})") from None
    try:
        yield
    finally:
        lock.release()


class Chronicle:
    """Writes down a run as it happens.

    Attributes: ``inbox``, the commands it takes; ``spoken``, how many tokens it has said.
    """

    def __init__(self, folder: Path, brain: Brain, conf: Conf) -> None:
        self._folder, self._brain = folder, brain
        self._saves = folder / SAVES
        self._every = conf.save_every
        self._files: dict[str, IO[str]] = {}
        self._journal: Journal | None = None
        self._saved_at = 0
        self._unsaved = True
        self.spoken = 0
        self.inbox = Inbox(folder, brain)
        brain.on_repair = self._repaired

    def begin(self, prime: Callable[[], None], conf: Conf) -> bool:
        """Starts the record, or takes it up where it ended; returns whether there was one.

        ``prime`` gives the brain its prompt. Raises Refused if the folder has the record of
        another run, or a damaged one, before anything is changed.
        """
        found = self._found(conf)
        if found:
            self._go_on(prime)
        else:
            self._start(conf)
            prime()
        self.inbox.heard = self._heard
        return found

    def said(self, tick: Tick) -> str:
        """Writes down a token that was spoken; returns its text."""
        self._write_journal({"said": tick.token})
        self._write_token(tick)
        return tick.text

    def rest(self) -> None:
        """Saves, if it is time to."""
        if self._every and self._brain.ticks - self._saved_at >= self._every:
            self.save()

    def save(self) -> None:
        """Saves the brain, if anything has happened since the last save, and begins a new journal.

        Raises Refused if the disk is full, with the record as it was: it is then still whole.
        """
        if self._unsaved:
            self._save()

    def _save(self) -> None:
        ticks = self._brain.ticks
        target = self._saves / str(ticks)
        notes = {
            "spoken": self.spoken,
            "inbox": self.inbox.read,
            "sizes": {name: self._size(name) for name in (*self._files, ANSWERS)},
        }
        save(self._brain, target, notes)
        self._saved_at, self._unsaved = ticks, False
        self._switch_journal(ticks)
        for old in self._saved()[KEPT:]:
            self._drop(old)
        if len(self._saved()) == KEPT:
            self._drop(0)  # the beginning: it is two saves behind

    def finish(self, rest: str) -> None:
        """Writes what the text still owed, behind the last save."""
        self._write(TRANSCRIPT, rest)
        self.close()

    def close(self) -> None:
        """Gives all files back."""
        for file in self._files.values():
            file.close()
        if self._journal is not None:
            self._journal.close()

    def tokens(self) -> list[int]:
        """Every token that was spoken and has not been redacted, in order."""
        text = (self._folder / TOKENS).read_text("utf-8")
        return [int(line.split()[1]) for line in text.splitlines()]

    # Starting and going on

    def _start(self, conf: Conf) -> None:
        shutil.rmtree(self._saves, ignore_errors=True)
        self._saves.mkdir(parents=True)
        for name in (TRANSCRIPT, TOKENS, REPAIRS):
            self._open(name, "w")
        (self._folder / ANSWERS).unlink(missing_ok=True)
        self._switch_journal(0)
        asked = {"format": FORMAT, "conf": _lasting(conf)}
        (self._saves / RUN).write_text(json.dumps(asked, indent=2, ensure_ascii=False), "utf-8")

    def _found(self, conf: Conf) -> bool:
        """Whether there is a record, of this very run. Raises Refused if it is of another."""
        path = self._saves / RUN
        try:
            asked = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return False
        except (OSError, ValueError, RecursionError) as error:
            raise Refused(f"{path} cannot be read ({one_line(error)})") from None
        if not isinstance(asked, dict) or asked.get("format") != FORMAT:
            raise Refused(f"{path} is not of format {FORMAT}: choose another folder")
        before, now = asked.get("conf"), _lasting(conf)
        for key, value in now.items():
            was = before.get(key) if isinstance(before, dict) else None
            if was != value:
                told = key if isinstance(value, dict) else f"{key}={was!r}, not {value!r}"
                raise Refused(
                    f"{self._folder} has the record of a run with another {told}: "
                    "give the same settings to go on with it, or choose another folder"
                )
        return True

    def _go_on(self, prime: Callable[[], None]) -> None:
        notes: Any = None
        since = 0
        for since in self._saved():
            try:
                notes = restore(self._brain, self._saves / str(since))
                break
            except OtherWeights:
                raise
            except Refused as refusal:
                note(f"warning: {refusal}; going back to the save before it")
        else:
            since = 0
            if not self._journal_path(0).exists():
                raise Refused(f"{self._saves} has no save that is whole: choose another folder")
            prime()
        sizes, self.spoken, self.inbox.read = _checked(notes, self._saves / str(since))
        journals = sorted(n for n in self._numbers(".journal") if n >= since)
        records: list[Any] = []
        for number in journals:
            told, size = read_journal(self._journal_path(number))
            if number == journals[-1]:
                os.truncate(self._journal_path(number), size)
            records += told
        self._cut_back(sizes)
        self._saved_at, self._unsaved = since, bool(records) or since == 0
        for record in tqdm(records, desc="going on", unit="tick", leave=False):
            self._again(record)
        self._journal = Journal(self._journal_path(journals[-1] if journals else since))

    def _again(self, record: Any) -> None:
        """Lets happen what a journal tells."""
        match record:
            case {"said": int(token)}:
                self._write_token(self._brain.tick(token))
            case {"heard": str(line), "inbox": int(read)}:
                self.inbox.obey(line.encode("utf-8", "surrogateescape"))
                self.inbox.read = read
            case _:
                raise Refused(f"{self._saves}: a journal tells what is not known here: {record!r}")

    def _cut_back(self, sizes: dict[str, int]) -> None:
        """Makes the files of the run what they were when the save was made."""
        for name in (TRANSCRIPT, TOKENS, REPAIRS, ANSWERS):
            path, size = self._folder / name, sizes.get(name, 0)
            rewritten = path.with_name(path.name + _REWRITTEN)
            if rewritten.exists() and rewritten.stat().st_size == size:
                rewritten.replace(path)
            rewritten.unlink(missing_ok=True)
            if path.exists():
                if path.stat().st_size < size:
                    raise Refused(f"{path} is shorter than the record of it: choose another folder")
                os.truncate(path, size)
            elif size:
                raise Refused(f"{path} is missing: choose another folder")
            if name != ANSWERS:
                self._open(name, "a")

    # Writing

    def _write_token(self, tick: Tick) -> None:
        self.spoken += 1
        self._write(TOKENS, f"{tick.number} {tick.token}\n")
        self._write(TRANSCRIPT, tick.text)

    def _heard(self, line: bytes, lost: Sequence[Lost]) -> None:
        told = line.decode("utf-8", "surrogateescape")
        self._write_journal({"heard": told, "inbox": self.inbox.read})
        if lost:
            self._redact(lost)

    def _repaired(self, repair: Repair) -> None:
        self._write(REPAIRS, json.dumps(repair.to_json()) + "\n")

    def _redact(self, lost: Sequence[Lost]) -> None:
        """Takes what was redacted out of the record too: out of the tokens and the text, and with
        all earlier saves and journals, of which a new save takes the place.
        """
        gone = {(tick, row.token) for row in lost for tick in (row.born - 1, row.born)}
        lines = (self._folder / TOKENS).read_text("utf-8").splitlines()
        told = [(int(tick), int(token)) for tick, token in map(str.split, lines)]
        kept = [line for line in told if line not in gone]
        if len(kept) < len(told):
            decoder = StreamDecoder(self._brain.tokenizer, at_start=False)
            text = "".join(decoder.push(token) for _, token in kept)
            self._rewrite(TOKENS, "".join(f"{tick} {token}\n" for tick, token in kept))
            self._rewrite(TRANSCRIPT, text)
        self._save()
        for name in (TOKENS, TRANSCRIPT):
            path = self._folder / name
            rewritten = path.with_name(path.name + _REWRITTEN)
            if rewritten.exists():
                self._files[name].close()
                rewritten.replace(path)
                self._open(name, "a")
        for old in self._numbers("") + self._numbers(".journal"):
            if old != self._saved_at:
                self._drop(old)

    def _rewrite(self, name: str, text: str) -> None:
        path = self._folder / (name + _REWRITTEN)
        path.write_text(text, "utf-8", newline="")

    def _write(self, name: str, text: str) -> None:
        try:
            self._files[name].write(text)
            self._files[name].flush()
        except OSError as error:
            raise Refused(f"{self._folder / name} cannot be written ({one_line(error)})") from None

    def _write_journal(self, record: Any) -> None:
        assert self._journal is not None
        self._journal.add(record)
        self._unsaved = True

    def _open(self, name: str, mode: str) -> None:
        self._files[name] = (self._folder / name).open(mode, encoding="utf-8", newline="")

    def _size(self, name: str) -> int:
        """Bytes of a file, or of what is about to take its place."""
        for path in (self._folder / (name + _REWRITTEN), self._folder / name):
            if path.exists():
                return path.stat().st_size
        return 0

    def _switch_journal(self, number: int) -> None:
        if self._journal is not None:
            self._journal.close()
        path = self._journal_path(number)
        path.write_bytes(b"")
        self._journal = Journal(path)

    def _journal_path(self, number: int) -> Path:
        return self._saves / f"{number}.journal"

    def _saved(self) -> list[int]:
        """Numbers of the saves, newest first."""
        return sorted(self._numbers(""), reverse=True)

    def _numbers(self, suffix: str) -> list[int]:
        names = (path.name for path in self._saves.iterdir())
        stems = (name.removesuffix(suffix) for name in names if name.endswith(suffix))
        return [int(stem) for stem in stems if stem.isdecimal() and len(stem) < 19]

    def _drop(self, number: int) -> None:
        """Forgets a save and the journal behind it."""
        shutil.rmtree(self._saves / str(number), ignore_errors=True)
        self._journal_path(number).unlink(missing_ok=True)


def _lasting(conf: Conf) -> dict[str, Any]:
    """The settings that decide what a run says, as JSON knows them."""
    told = plain(dataclasses.asdict(conf))
    lasting: dict[str, Any] = json.loads(json.dumps(told))
    return {key: value for key, value in lasting.items() if key not in FREE}


def _checked(notes: Any, where: Path) -> tuple[dict[str, int], int, int]:
    """Sizes of files, tokens spoken and bytes of the inbox, as a save notes them."""
    match notes:
        case None:
            return {}, 0, 0
        case {"sizes": dict(sizes), "spoken": int(spoken), "inbox": int(inbox)}:
            if all(type(n) is int and n >= 0 for n in (*sizes.values(), spoken, inbox)):
                return sizes, spoken, inbox
    raise Refused(f"{where}: the notes of the run are damaged")
