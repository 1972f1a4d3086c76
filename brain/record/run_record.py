"""The record of a run, and how it goes on after it was killed, with the token it would have said.

    RUN_FOLDER/transcript.txt     the text, RUN_FOLDER/tokens.txt its tokens
    RUN_FOLDER/saves/run.json     what was asked for
    RUN_FOLDER/saves/N/           the brain (brain/saves.py) when it was saved for the Nth time
    RUN_FOLDER/saves/N.journal    what happened since: every token, every command

A draw depends on the seed and the number of the tick alone, and a command is written down between
the tokens it came between. So the newest save and the journal behind it tell everything: the files
of the run are cut back to what they were when the save was made, and what the journal tells happens
once more. Of the saves the newest two are kept, so that one may be damaged. No number is used
twice, so a name never means two things, whenever the power goes.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from brain.brain import Brain
from brain.config.older import add_unsaid
from brain.errors import Refused, Unwritten, one_line, shown
from brain.files import RECORD_BYTES, read_bytes, read_json, require_own
from brain.machine.integrity import to_disk
from brain.record.commands import ANSWERS, INBOX, Inbox, Lost
from brain.record.heatmap import FILE
from brain.record.journal import Journal, read_journal
from brain.record.numbered_saves import NumberedSaves
from brain.repair import Repair
from brain.saves import OtherWeights, plain
from brain.terminal import note
from brain.tick import Tick
from brain.tokens import StreamDecoder
from conf.schema import Conf

FORMAT = 1
TRANSCRIPT, TOKENS, REPAIRS = "transcript.txt", "tokens.txt", "repairs.jsonl"
SAVES, RUN = "saves", "run.json"
KEPT = 2
"""Saves that are kept."""
FREE = (
    *("task", "ticks", "stop_at_eos", "threads", "nvtx", "cache_dir"),
    *("capture", "capture_top", "save_every"),
)
"""Settings that may change when a run goes on: none of them decides what is said."""

REPORTS = ("run.json", FILE)
"""What a run writes about itself when it ends."""
_REWRITTEN = ".rewritten"
MOST_TOKENS_TOLD = 1 << 32
"""Bytes of ``tokens.txt``: some hundred million tokens."""


class Chronicle:
    """Writes down a run as it happens.

    Attributes: ``inbox``, the commands it takes; ``spoken``, how many tokens it has said;
    ``last``, the last of them.
    Everything here raises Refused if the disk is full or a file cannot be written or read.
    """

    def __init__(self, folder: Path, brain: Brain, conf: Conf) -> None:
        self._folder, self._brain, self._conf = folder, brain, conf
        self._saves = NumberedSaves(folder / SAVES)
        self._files: dict[str, IO[str]] = {}
        self._journal: Journal | None = None
        self._saved_at = 0  # ticks
        self._unsaved = True
        self._broken = False  # memory and files disagree: only the journal knows
        self.spoken = 0
        self.last: int | None = None
        self.inbox = Inbox(folder, brain)
        brain.on_repair = self._repaired

    def begin(self, prime: Callable[[], None]) -> bool:
        """Starts the record, or takes it up where it ended; returns whether there was one.

        ``prime`` gives the brain its prompt. Raises Refused if the folder has the record of
        another run, or a damaged one, before anything is changed.
        """
        with self._on_disk():
            self._require_own()
            found = self._found()
            if found:
                self._saves.clear_away()
                self._go_on(prime)
            else:
                prime()
                self._start()
        self.inbox.heard, self.inbox.redacted = self._heard, self._redact
        return found

    def said(self, *ticks: Tick) -> str:
        """Writes down what was spoken in one pass of the loop; returns its text.

        A pass that read several tokens is one line of the journal, a list, so that it happens again
        as a whole: read one by one, its numbers would round otherwise.
        """
        ids = [tick.token for tick in ticks]
        self._write_journal({"said": ids[0] if ticks[0].width == 1 else ids})
        for tick in ticks:
            self._write_token(tick)
        return "".join(tick.text for tick in ticks)

    def rest(self) -> None:
        """Saves, if it is time to."""
        every = self._conf.save_every
        if every and self._brain.ticks - self._saved_at >= every:
            self.save()

    def save(self) -> None:
        """Saves the brain, if anything has happened since the last save, and begins a new journal.

        Where it cannot, the record is as it was: whole. After a write that failed nothing is saved:
        the journal knows what to do again.
        """
        if self._unsaved and not self._broken:
            with self._on_disk():
                self._save(self._saves.unused())

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
        return [token for _, token in self._told()]

    # Starting and going on

    def _start(self) -> None:
        shutil.rmtree(self._saves.folder, ignore_errors=True)
        self._saves.folder.mkdir(parents=True, exist_ok=True)
        for old in (ANSWERS, TRANSCRIPT):
            (self._folder / old).unlink(missing_ok=True)
        for left in self._folder.glob(f"*{_REWRITTEN}"):
            left.unlink()
        for name in (TOKENS, REPAIRS):
            self._open(name, "w")
        self._switch_journal(0)
        # What an earlier run in this folder was told is not said to this one.
        asked = {"format": FORMAT, "conf": _lasting(self._conf), "inbox": self.inbox.read}
        draft = self._saves.folder / (RUN + _REWRITTEN)
        draft.write_text(json.dumps(asked, indent=2), "utf-8")
        to_disk(draft)
        draft.replace(self._saves.folder / RUN)  # from here on there is a record
        to_disk(self._saves.folder)
        self._open(TRANSCRIPT, "w")  # from here on it takes commands

    def _require_own(self) -> None:
        """Raises Refused if anything in the folder leads out of it."""
        names = (TRANSCRIPT, TOKENS, REPAIRS, ANSWERS, INBOX, SAVES, *REPORTS)
        require_own(self._folder / name for name in names)
        require_own(self._folder.glob(f"*{_REWRITTEN}"))
        if self._saves.folder.is_dir():
            require_own(self._saves.folder.iterdir())

    def _found(self) -> bool:
        """Whether there is a record, of this very run. Raises Refused if it is of another."""
        path = self._saves.folder / RUN
        try:
            asked = read_json(path, RECORD_BYTES)
        except FileNotFoundError:
            return False
        except (OSError, ValueError) as error:
            raise Refused(f"{path} cannot be read ({one_line(error)})") from None
        if not isinstance(asked, dict) or asked.get("format") != FORMAT:
            raise Refused(f"{path} is not of format {FORMAT}: choose another folder")
        conf = asked.get("conf")
        before = conf if isinstance(conf, dict) else {}
        add_unsaid(before)
        for key, value in _lasting(self._conf).items():
            was = before.get(key)
            if was != value:
                told = key if isinstance(value, dict) else f"{key}={shown(was)}, not {value!r}"
                raise Refused(
                    f"{self._folder} has the record of a run with another {told}: "
                    "give the same settings to go on with it, or choose another folder"
                )
        self.inbox.read = _count(asked.get("inbox"), path)
        return True

    def _go_on(self, prime: Callable[[], None]) -> None:
        sizes: dict[str, int] = {}
        since, refused = 0, []
        for number in self._saves.saves():
            where = self._saves.save(number)
            try:
                notes = self._brain.restore(where)
                sizes, self.spoken, self.last, self.inbox.read, alone = _checked(notes, where)
            except OtherWeights:
                raise
            except Refused as refusal:
                note(f"warning: {refusal}; going back to the save before it")
                refused.append(number)
                continue
            since = number
            if alone:  # what came before it was redacted
                self._saves.drop_before(since)
            break
        else:
            if not self._saves.journal(0).exists():
                raise Refused(
                    f"{self._saves.folder} has no save that is whole: choose another folder"
                )
            prime()
        self._saved_at = self._brain.ticks
        journals = [number for number in self._saves.journals() if number >= since]
        records = self._records(journals)
        self._cut_back(since, sizes)
        for name in REPORTS:  # of the end that this was; it may hold what is redacted now
            (self._folder / name).unlink(missing_ok=True)
        lost: list[Lost] = []
        self.inbox.redacted = lost.extend
        self._unsaved = bool(records) or since == 0
        for record in tqdm(records, desc="going on", unit="tick", leave=False):
            self._again(record)
        self._journal = Journal(self._saves.journal(journals[-1] if journals else since))
        if lost:
            self._redact(lost)
        elif refused:
            self._save(self._saves.unused())
            self._saves.drop(*refused)

    def _records(self, journals: Sequence[int]) -> list[Any]:
        """What these journals tell, one after the other. Cuts off what is torn at the end."""
        records: list[Any] = []
        for number in journals:
            path = self._saves.journal(number)
            told, size = read_journal(path)
            if number == journals[-1]:
                os.truncate(path, size)
            elif size != path.stat().st_size:
                raise Refused(f"{path} is damaged at its end")
            records += told
        return records

    def _again(self, record: Any) -> None:
        """Lets happen what a journal tells."""
        match record:
            case {"said": int(token)}:
                self._write_token(self._brain.tick(token))
            case {"said": list(ids)}:
                for tick in self._brain.retell(ids):
                    self._write_token(tick)
            case {"heard": str(told), "inbox": int(read)} if read >= 0:
                try:
                    line = told.encode("utf-8", "surrogateescape")
                except UnicodeEncodeError:
                    raise Refused(
                        f"{self._saves.folder}: a journal tells no line of bytes"
                    ) from None
                self.inbox.obey(line)
                self.inbox.read = read
            case _:
                raise Refused(
                    f"{self._saves.folder}: a journal tells what is not known here: {shown(record)}"
                )

    def _cut_back(self, since: int, sizes: dict[str, int]) -> None:
        """Makes the files of the run what they were when the save was made."""
        for name in (TRANSCRIPT, TOKENS, REPAIRS, ANSWERS):
            path, size = self._folder / name, sizes.get(name, 0)
            rewritten = self._rewritten(name, since)
            if rewritten.exists():
                rewritten.replace(path)
            if path.exists():
                if path.stat().st_size < size:
                    raise Refused(f"{path} is shorter than the record of it: choose another folder")
                os.truncate(path, size)
            elif size:
                raise Refused(f"{path} is missing: choose another folder")
            if name != ANSWERS:
                self._open(name, "a")
        for left in self._folder.glob(f"*{_REWRITTEN}"):
            left.unlink()

    # Writing

    def _save(self, number: int, *, alone: bool = False) -> None:
        """``alone``: what came before this save must not be gone back to."""
        notes = {
            "spoken": self.spoken,
            "last": self.last,
            "inbox": self.inbox.read,
            "sizes": {name: self._size(name, number) for name in (*self._files, ANSWERS)},
            "alone": alone,
        }
        for name in (*self._files, ANSWERS):
            for path in (self._folder / name, self._rewritten(name, number)):
                if path.exists():
                    to_disk(path)
        to_disk(self._folder)
        self._brain.save(self._saves.save(number), notes)
        self._saved_at, self._unsaved = self._brain.ticks, False
        self._switch_journal(number)
        kept = self._saves.saves()[: 1 if alone else KEPT]
        if alone or len(kept) == KEPT:
            self._saves.drop_before(kept[-1])

    def _write_token(self, tick: Tick) -> None:
        self.spoken += 1
        self.last = tick.token
        self._write(TOKENS, f"{tick.number} {tick.token}\n")
        self._write(TRANSCRIPT, tick.text)

    def _heard(self, line: bytes) -> None:
        told = line.decode("utf-8", "surrogateescape")
        self._write_journal({"heard": told, "inbox": self.inbox.read})

    def _repaired(self, repair: Repair) -> None:
        self._write(REPAIRS, json.dumps(repair.to_json()) + "\n")

    def _redact(self, lost: Sequence[Lost]) -> None:
        """Takes what was redacted out of the record too: out of the tokens and the text, and with
        all earlier saves and journals, of which a new save takes the place.
        """
        with self._on_disk():
            number = self._saves.unused()
            kept = self._told()
            for row in lost:
                if not row.spoken:
                    continue  # put there, never said
                # A token gets its row in the tick after it was spoken, unless an append was faster.
                lines = ((row.born - 1, row.token), (row.born, row.token))
                line = next((line for line in lines if line in kept), None)
                if line is not None:
                    kept.remove(line)
            decoder = StreamDecoder(self._brain.tokenizer, at_start=False)
            text = "".join(decoder.push(token) for _, token in kept)
            self._brain.speak_on(decoder.unfinished)
            told = "".join(f"{tick} {token}\n" for tick, token in kept)
            for name, content in ((TOKENS, told), (TRANSCRIPT, text)):
                self._rewritten(name, number).write_text(content, "utf-8", newline="")
            self._save(number, alone=True)
            for name in (TOKENS, TRANSCRIPT):
                self._files[name].close()
                self._rewritten(name, number).replace(self._folder / name)
                self._open(name, "a")
            self._saves.clear_away()

    def _told(self) -> list[tuple[int, int]]:
        """Tick and id of every token in ``tokens.txt``."""
        path = self._folder / TOKENS
        try:
            pairs = [line.split() for line in read_bytes(path, MOST_TOKENS_TOLD).splitlines()]
            return [(int(tick), int(token)) for tick, token in pairs]
        except (OSError, ValueError) as error:
            raise Refused(f"{path} is damaged ({one_line(error)})") from None

    def _write(self, name: str, text: str) -> None:
        try:
            self._files[name].write(text)
            self._files[name].flush()
        except OSError as error:
            self._broken = True
            raise Unwritten(
                f"{self._folder / name} cannot be written ({one_line(error)})"
            ) from None

    def _write_journal(self, record: Any) -> None:
        assert self._journal is not None
        try:
            self._journal.add(record)
        except Unwritten:
            self._broken = True
            raise
        self._unsaved = True

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise Refused(f"{self._folder} cannot be used ({one_line(error)})") from None

    def _open(self, name: str, mode: str) -> None:
        self._files[name] = (self._folder / name).open(mode, encoding="utf-8", newline="")

    def _rewritten(self, name: str, number: int) -> Path:
        """What takes the place of a file when the save of this number is made."""
        return self._folder / f"{name}.{number}{_REWRITTEN}"

    def _size(self, name: str, number: int) -> int:
        """Bytes of a file, or of what is about to take its place."""
        for path in (self._rewritten(name, number), self._folder / name):
            if path.exists():
                return path.stat().st_size
        return 0

    def _switch_journal(self, number: int) -> None:
        if self._journal is not None:
            self._journal.close()
        self._journal = Journal(self._saves.journal(number))


def _lasting(conf: Conf) -> dict[str, Any]:
    """The settings that decide what a run says, as JSON knows them."""
    told = plain(conf)
    lasting: dict[str, Any] = json.loads(json.dumps(told))
    if not conf.engine.compiled:
        lasting["engine"]["native"] = False  # it decides nothing there
    return {key: value for key, value in lasting.items() if key not in FREE}


def _checked(notes: Any, where: Path) -> tuple[dict[str, int], int, int | None, int, bool]:
    """Sizes of files, tokens spoken and the last of them, bytes of the inbox, and whether the save
    stands alone.
    """
    match notes:
        case {
            "sizes": dict(sizes),
            "spoken": int(spoken),
            "last": int(last) | (None as last),
            "inbox": int(inbox),
            "alone": bool(alone),
        }:
            checked = {str(name): _count(size, where) for name, size in sizes.items()}
            return checked, _count(spoken, where), last, _count(inbox, where), alone
    raise Refused(f"{where}: the notes of the run are damaged")


def _count(number: Any, where: Path) -> int:
    if type(number) is not int or number < 0:
        raise Refused(f"{where} is damaged: {shown(number)} is no count")
    return number
