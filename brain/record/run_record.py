"""The record of a run, from which a killed run continues with the token that was to come next.

    RUN_FOLDER/transcript.txt     the text, RUN_FOLDER/tokens.txt its tokens
    RUN_FOLDER/saves/run.json     the settings of the run
    RUN_FOLDER/saves/N/           the brain (brain/saves.py) when it was saved for the Nth time
    RUN_FOLDER/saves/N.journal    what happened since: every token, every command

A draw depends on the seed and the number of its tick alone, and the journal holds every command
between the tokens that it came between. So the newest save and the journal behind it are enough.
The files of the run are cut back to what they were at that save, and the journal is replayed. The
newest two saves are kept, in case one is damaged. No number is used twice, so a name never means
two things, whenever the power goes.

A row that was redacted leaves the record too: a new save takes the place of all earlier saves and
journals, and its token and text leave the files.
"""

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from brain.brain import Brain
from brain.config.older import bring_up_to_date
from brain.errors import Refused, Unwritten, one_line, shown, warn
from brain.files import RECORD_BYTES, read_json, require_own
from brain.machine.integrity import to_disk
from brain.machine.progress import progress_bar
from brain.record.commands import ANSWERS, INBOX, Inbox, RedactedRow
from brain.record.heatmap import FILE
from brain.record.journal import Journal, read_journal
from brain.record.numbered_saves import NumberedSaves
from brain.record.run_files import ALL, DRAFT, REPAIRS, TOKENS, TRANSCRIPT, RunFiles
from brain.repair import Repair
from brain.saves import OtherModel, brief, plain
from brain.tick import Tick
from brain.tokens import StreamDecoder
from conf.schema import Conf, DType

FORMAT = 1
SAVES, SETTINGS = "saves", "run.json"
KEPT = 2  # saves that are kept
FREE = (
    *("task", "talk", "ticks", "stop_at_eos", "threads", "nvtx", "cache_dir", "prompt_file"),
    *("capture", "capture_top", "save_every"),
)
"""Settings that may change when a run goes on: none of them changes what it says."""
FAILED = "failed.txt"
COMPOSED = ".hydra"  # the configuration, as Hydra composed it
REPORTS = ("run.json", FILE, FAILED)  # what a run writes about itself when it ends


class Notes(NamedTuple):
    """What a save of a run holds besides the brain."""

    heard: int  # tokens of a text that does not fit, beyond its first rows
    spoken: int  # tokens
    last: int | None  # the last token
    inbox: int  # bytes of the inbox that have been executed
    sizes: dict[str, int]  # bytes of each growing file
    alone: bool  # earlier saves hold what was redacted: never go back to them


class RunRecord:
    """Writes down a run as it happens. Every method raises Refused if a file cannot be written.

    ``inbox``: the commands it takes. ``heard``: how many tokens of a text that does not fit it has
    read, beyond the first rows; ``spoken``: how many it has said; ``last``: the last.
    """

    def __init__(self, folder: Path, brain: Brain, conf: Conf) -> None:
        self._folder, self._brain, self._conf = folder, brain, conf
        self._saves = NumberedSaves(folder / SAVES)
        self._files = RunFiles(folder)
        self._journal: Journal | None = None
        self._saved_at = 0  # ticks
        self._unsaved = True
        self._broken = False  # the files lack what the journal has
        self._text: Sequence[int] = ()
        self.heard = self.spoken = 0
        self.last: int | None = None
        self.inbox = Inbox(folder, brain)
        brain.loop.repairs.on_repair = self._record_repair

    def begin(self, prime: Callable[[], None], text: Sequence[int] = ()) -> bool:
        """Starts the record, or goes on where it ended; returns whether there was one. ``prime``
        gives the brain its prompt, or the first rows of one that does not fit; ``text`` is the
        rest, to be heard. Raises Refused, with nothing changed, if the folder has the record of
        another run or a damaged one.
        """
        self._text = text
        with self._on_disk():
            self._require_own()
            found = self._has_record()
            if found:
                self._saves.clear_away()
                self._go_on(prime)
            else:
                prime()
                self._start()
        self.inbox.on_command, self.inbox.on_redaction = self._record_command, self._redact
        return found

    def hear(self) -> Iterator[int]:
        """Reads what is left of the text; yields how many tokens each chunk has, once it is written
        down. Stop asking, and the record goes on from there.
        """
        left = self._text[self.heard :]
        for part in self._brain.feed_in_chunks(left, self._conf.source) if left else ():
            self._write_journal({"read": len(part)})
            self.heard += len(part)
            self.save_if_due()
            yield len(part)

    def record_ticks(self, *ticks: Tick) -> str:
        """Writes down the ticks of one pass of the loop; returns their text. A pass that read
        several tokens is one line of the journal and is replayed as a whole: read one by one, its
        numbers would round differently.
        """
        ids = [tick.token for tick in ticks]
        self._write_journal({"said": ids[0] if ticks[0].width == 1 else ids})
        for tick in ticks:
            self._write_token(tick)
        return "".join(tick.text for tick in ticks)

    @property
    def is_save_due(self) -> bool:
        """Whether ``save_every`` ticks have passed since the last save."""
        every = self._conf.save_every
        return bool(every) and self._brain.ticks - self._saved_at >= every

    def save_if_due(self) -> None:
        """Saves, if it is time for it. What the brain has said must have been written down."""
        if self.is_save_due:
            self.save()

    def save(self) -> None:
        """Saves the brain, if anything has happened since the last save, and begins a new journal.
        If it fails, the record is as it was. After a failed write it does nothing: the journal has
        what the files lack.
        """
        if self._unsaved and not self._broken:
            with self._on_disk():
                self._save(self._saves.unused())

    def finish(self, remainder: str) -> None:
        """Appends what the text still lacks, after the last save, and closes all files."""
        self._append(TRANSCRIPT, remainder)
        self.close()

    def close(self) -> None:
        """Closes all files."""
        self._files.close()
        if self._journal is not None:
            self._journal.close()

    def tokens(self) -> list[int]:
        """Every token that was spoken and has not been redacted, in order."""
        return [token for _, token in self._files.tokens()]

    def redact(self, said: Sequence[tuple[int, int]]) -> None:
        """Takes what was said in these ticks, [(tick, token)], out of tokens and transcript,
        remembered or not, and drops all earlier saves and journals.
        """
        self._redact([RedactedRow(tick + 1, token, spoken=True) for tick, token in said])

    def said(self) -> list[tuple[int, int]]:
        """The same with the tick of each, [(tick, token)]."""
        return self._files.tokens()

    def _require_own(self) -> None:
        """Raises Refused if anything in the folder leads out of it."""
        require_own(self._folder / name for name in (*ALL, INBOX, SAVES, COMPOSED, *REPORTS))
        require_own(self._folder.glob(f"*{DRAFT}"))
        for folder in (self._saves.folder, self._folder / COMPOSED):
            if folder.is_dir():
                require_own(folder.iterdir())

    def _has_record(self) -> bool:
        """Whether there is a record of this very run. Raises Refused if it is of another."""
        path = self._saves.folder / SETTINGS
        try:
            record = read_json(path, RECORD_BYTES)
        except FileNotFoundError:
            return False
        except (OSError, ValueError) as error:
            raise Refused(f"{path} cannot be read ({one_line(error)})") from None
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise Refused(f"{path} is not of format {FORMAT}: choose another folder")
        conf = record.get("conf")
        recorded = conf if isinstance(conf, dict) else {}
        bring_up_to_date(recorded)
        conf, settings = self._conf, self._brain.settings
        for key, given in _lasting(conf).items():
            difference = _difference(key, recorded.get(key), given)
            if difference is not None:
                raise Refused(
                    f"{self._folder} has the record of another run ({difference}): give the same "
                    "settings to go on with it, or choose another folder"
                )
        was, now = record.get("policy_sha256"), settings.policy_sha256
        if was != now:
            raise Refused(
                f"{self._folder} has the record of a run whose policy {conf.cull.policy} had "
                f"another source (SHA-256 {brief(was)} in the record, {brief(now)} given): give "
                "the same one, or choose another folder"
            )
        was = record.get("vocabulary_sha256")
        if was is not None and was != (now := self._brain.checkpoint.vocabulary_sha256):
            raise Refused(
                f"{self._folder} has the record of a run with another tokenizer (SHA-256 of the "
                f"vocabulary {brief(was)} in the record, {brief(now)} given): put the old one back "
                "to go on with it, or choose another folder"
            )
        self.inbox.read = _count(record.get("inbox"), "inbox", path)
        return True

    def _start(self) -> None:
        shutil.rmtree(self._saves.folder, ignore_errors=True)
        self._saves.folder.mkdir(parents=True, exist_ok=True)
        for name in (ANSWERS, TRANSCRIPT, *REPORTS):
            (self._folder / name).unlink(missing_ok=True)
        self._files.remove_drafts()
        for name in (TOKENS, REPAIRS):
            self._files.open(name, "w")
        self._switch_journal(0)
        # Commands that an earlier run in this folder was given are not for this one.
        record = {"format": FORMAT, "conf": _lasting(self._conf), "inbox": self.inbox.read}
        record["vocabulary_sha256"] = self._brain.checkpoint.vocabulary_sha256
        if (policy_sha256 := self._brain.settings.policy_sha256) is not None:
            record["policy_sha256"] = policy_sha256
        draft = self._saves.folder / (SETTINGS + DRAFT)
        draft.write_text(json.dumps(record, indent=2), "utf-8")
        to_disk(draft)
        draft.replace(self._saves.folder / SETTINGS)  # from here on there is a record
        to_disk(self._saves.folder)
        self._files.open(TRANSCRIPT, "w")  # from here on it takes commands

    def _go_on(self, prime: Callable[[], None]) -> None:
        number, notes, damaged = self._restore_newest()
        if notes is None:
            prime()
            notes = Notes(0, 0, None, self.inbox.read, {}, alone=False)
        self.heard, self.spoken, self.last, self.inbox.read = notes[:4]
        if notes.alone:
            self._saves.drop_before(number)
        self._saved_at = self._brain.ticks
        journals = [later for later in self._saves.journals() if later >= number]
        entries = self._entries(journals)
        self._files.cut_back(number, notes.sizes)
        for name in REPORTS:  # of an earlier end; they may hold what is redacted by now
            (self._folder / name).unlink(missing_ok=True)
        redacted: list[RedactedRow] = []
        self.inbox.on_redaction = redacted.extend
        self._unsaved = bool(entries) or number == 0
        if entries:
            with progress_bar("going on", len(entries), "tick", leave=False) as bar:
                for path, line, entry in entries:
                    self._replay(path, line, entry)
                    bar.update()
        self._journal = Journal(self._saves.journal(journals[-1] if journals else number))
        if redacted:
            self._redact(redacted)
        elif damaged:
            self._save(self._saves.unused())
            self._saves.drop(*damaged)

    def _restore_newest(self) -> tuple[int, Notes | None, list[int]]:
        """Restores the newest undamaged save. Returns its number and notes, 0 and None where there
        is none, and the numbers of the damaged ones.
        """
        damaged: list[int] = []
        for number in self._saves.saves():
            path = self._saves.save(number)
            try:
                return number, _checked(self._brain.restore(path), path), damaged
            except OtherModel:
                raise
            except Refused as refusal:
                warn(f"{refusal}; going back to the save before it")
                damaged.append(number)
        if not self._saves.journal(0).exists():
            raise Refused(f"{self._saves.folder} has no undamaged save: choose another folder")
        return 0, None, damaged

    def _entries(self, journals: Sequence[int]) -> list[tuple[Path, int, Any]]:
        """Every entry of these journals, in order, with its file and line. Cuts off what is torn at
        the end of the last.
        """
        entries: list[tuple[Path, int, Any]] = []
        for number in journals:
            path = self._saves.journal(number)
            found, size = read_journal(path)
            if number == journals[-1]:
                os.truncate(path, size)
            elif size != path.stat().st_size:
                raise Refused(f"{path} is damaged at its end")
            entries += [(path, line, entry) for line, entry in enumerate(found, 1)]
        return entries

    def _replay(self, path: Path, line: int, entry: Any) -> None:
        """Repeats what a line of a journal says."""
        match entry:
            case {"said": int(token)}:
                self._write_token(self._brain.tick(token))
            case {"said": list(ids)}:
                for tick in self._brain.replay(ids):
                    self._write_token(tick)
            case {"read": int(number)} if 0 < number <= len(self._text) - self.heard:
                # As much as the chunk may have been: it decides when rows are renumbered.
                most = max(number, self._conf.cull.chunk)
                part = self._text[self.heard : self.heard + most]
                if len(next(self._brain.feed_in_chunks(part, self._conf.source))) != number:
                    raise Refused(f"{path} is damaged: line {line} is not a chunk of the text")
                self.heard += number
            case {"heard": str(text), "inbox": int(read)} if read >= 0:
                try:
                    command = text.encode("utf-8", "surrogateescape")
                except UnicodeEncodeError:
                    raise Refused(f"{path}: line {line} holds a command that is not text") from None
                self.inbox.execute(command)
                self.inbox.read = read
            case _:
                raise Refused(f"{path} has an unknown entry at line {line}: {shown(entry)}")

    def _save(self, number: int, *, alone: bool = False) -> None:
        """Saves the brain as this number. ``alone``: earlier saves must not be gone back to."""
        sizes = self._files.sizes(number)
        notes = Notes(self.heard, self.spoken, self.last, self.inbox.read, sizes, alone)
        self._files.to_disk(number)
        self._brain.save(self._saves.save(number), notes._asdict())
        self._saved_at, self._unsaved = self._brain.ticks, False
        self._switch_journal(number)
        kept = self._saves.saves()[: 1 if alone else KEPT]
        if alone or len(kept) == KEPT:
            self._saves.drop_before(kept[-1])

    def _redact(self, rows: Sequence[RedactedRow]) -> None:
        """Takes redacted rows out of the tokens, the text, the saves and the journals."""
        with self._on_disk():
            number = self._saves.unused()
            tokens = _without(self._files.tokens(), rows)
            decoder = StreamDecoder(self._brain.tokenizer, at_start=False)
            text = "".join(decoder.push(token) for _, token in tokens)
            self._brain.resume_text(decoder.unfinished)
            lines = "".join(f"{tick} {token}\n" for tick, token in tokens)
            for name, content in ((TOKENS, lines), (TRANSCRIPT, text)):
                self._files.draft(name, number).write_text(content, "utf-8", newline="")
            self._save(number, alone=True)
            for name in (TOKENS, TRANSCRIPT):
                self._files.replace(name, number)
            self._saves.clear_away()

    def _write_token(self, tick: Tick) -> None:
        self.spoken += 1
        self.last = tick.token
        self._append(TOKENS, f"{tick.number} {tick.token}\n")
        self._append(TRANSCRIPT, tick.text)

    def _record_command(self, line: bytes) -> None:
        text = line.decode("utf-8", "surrogateescape")
        self._write_journal({"heard": text, "inbox": self.inbox.read})

    def _record_repair(self, repair: Repair) -> None:
        self._append(REPAIRS, json.dumps(repair.to_json()) + "\n")

    def _append(self, name: str, text: str) -> None:
        try:
            self._files.append(name, text)
        except OSError as error:
            self._broken = True
            path = self._folder / name
            raise Unwritten(f"{path} cannot be written ({one_line(error)})") from None

    def _write_journal(self, entry: Any) -> None:
        assert self._journal is not None
        try:
            self._journal.add(entry)
        except Unwritten:
            self._broken = True
            raise
        self._unsaved = True

    def _switch_journal(self, number: int) -> None:
        if self._journal is not None:
            self._journal.close()
        self._journal = Journal(self._saves.journal(number))

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise Refused(f"{self._folder} cannot be used ({one_line(error)})") from None


def _without(
    tokens: Sequence[tuple[int, int]], rows: Sequence[RedactedRow]
) -> list[tuple[int, int]]:
    """Ticks and ids of what was spoken, less redacted rows."""
    kept = list(tokens)
    for row in rows:
        if not row.spoken:
            continue  # put there, never said
        # A token gets its row in the tick after it was spoken, unless an append was faster.
        candidates = ((row.born - 1, row.token), (row.born, row.token))
        found = next((candidate for candidate in candidates if candidate in kept), None)
        if found is not None:
            kept.remove(found)
    return kept


def as_recorded(conf: Conf, folder: Path) -> Conf:
    """The configuration with what the record in a folder says, if there is one, in place of
    ``auto``, of a rule for special tokens that nothing says, and of chunks, if it knows none.
    Whether the record is whole, and of this run, is seen later.
    """
    try:
        recorded = read_json(folder / SAVES / SETTINGS, RECORD_BYTES)["conf"]
        has_no_chunks = "chunk" not in recorded["cull"]
        bring_up_to_date(recorded)
        captured, native = recorded["engine"]["captured"], recorded["engine"]["native"]
        dtype, special = DType[recorded["dtype"]], recorded["special"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return conf
    engine = conf.engine
    if engine.captured is None and isinstance(captured, bool):
        engine = dataclasses.replace(engine, captured=captured)
    if engine.native is None and isinstance(native, bool):
        engine = dataclasses.replace(engine, native=native)
    if conf.special is None and isinstance(special, bool):
        conf = dataclasses.replace(conf, special=special)
    if has_no_chunks:
        conf = dataclasses.replace(conf, cull=dataclasses.replace(conf.cull, chunk=1))
    return dataclasses.replace(
        conf, engine=engine, dtype=dtype if conf.dtype is DType.auto else conf.dtype
    )


def _lasting(conf: Conf) -> dict[str, Any]:
    """The settings that decide what a run says, as JSON holds them."""
    settings: dict[str, Any] = json.loads(json.dumps(plain(conf)))
    return {key: value for key, value in settings.items() if key not in FREE}


def _difference(name: str, recorded: Any, given: Any) -> str | None:
    """The first setting in which two values differ, with what it is in both; None if none does."""
    if recorded == given:
        return None
    if isinstance(recorded, dict) and isinstance(given, dict):
        for key in dict.fromkeys((*given, *recorded)):
            found = _difference(f"{name}.{key}", recorded.get(key), given.get(key))
            if found is not None:
                return found
    if isinstance(recorded, str) and isinstance(given, str):  # long texts, from where they differ
        pairs = zip(recorded, given, strict=False)
        start = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)) - 20
        if start > 0:
            recorded, given = f"…{recorded[start:]}", f"…{given[start:]}"
    return f"{name}: {shown(recorded)} in the record, {shown(given)} given"


def _checked(notes: Any, path: Path) -> Notes:
    """The notes of a save. Raises Refused if they are anything else."""
    match notes:
        case {
            "sizes": dict(sizes),
            "spoken": int(spoken),
            "last": int(last) | (None as last),
            "inbox": int(inbox),
            "alone": bool(alone),
        }:
            heard = _count(notes.get("heard", 0), "heard", path)  # older ones know of none
            _count(spoken, "spoken", path)
            _count(inbox, "inbox", path)
            for name, size in sizes.items():
                _count(size, f"sizes.{name}", path)
            return Notes(heard, spoken, last, inbox, sizes, alone)
    raise Refused(f"{path}: the notes of the run are damaged")


def _count(number: Any, name: str, path: Path) -> int:
    if type(number) is not int or number < 0:
        raise Refused(f"{path} is damaged: {name} is {shown(number)}, expected an integer from 0")
    return number
