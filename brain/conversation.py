"""A conversation: a run that a person and the model take turns in, in a folder of its own.

The run is as any other (``brain/record/run_record.py``): the texts of the person are commands that
put tokens into the loop, the replies are ticks. So it outlives its process, in the middle of a
reply too. ``conversation.json`` holds what the record does not say: who said which text, and where
each turn begins. It is written before a turn is told, and held against the record when it is
opened: a turn that was told in part is told to its end, one that the record knows nothing of, after
a power cut, has not been.

The memory is never rendered again: each turn appends its own tokens (``brain/chat/template.py``).
What holds the conversation together is pinned: what stands before the first text (BOS, the system
prompt), and the marks around the texts of the newest turns.

This module knows no terminal.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from brain.brain import Brain
from brain.chat.template import ChatFormat
from brain.errors import Refused, one_line, shown, warn
from brain.files import RECORD_BYTES, read_json, require_own
from brain.machine.integrity import to_disk
from brain.machine.signals import asked_to_stop
from brain.record.heatmap import FILE as ROWS
from brain.record.heatmap import remembered, write_rows
from brain.record.run_record import SAVES, RunRecord
from conf.schema import Conf, Thoughts

FILE, FORMAT = "conversation.json", 1
MARKED = 2  # newest turns whose marks are pinned
AT_ONCE = 256  # tokens that are told between two looks at whether somebody wants to stop
PROBES = ("a", "\n", " b", "1", "é")
"""Beginnings of texts, which may change how what stands before them is split."""
GONE = "…"
"""Stands for a text that was forgotten on request."""


@dataclass
class Turn:
    """What was said to the model, and where its tokens and the reply's are. Tokens are counted in
    ticks of the brain: each that is told or said is one.
    """

    user: str
    begins: int  # ticks before its first token
    told: int  # tokens
    reply: int  # ticks before the first token of the reply that counts
    first: bool  # whether nothing but the opening stands before it
    closes: bool  # whether its tokens begin with the end of the reply before it
    complete: bool = False  # whether the reply has ended, or was stopped


@dataclass
class Opening:
    """What a conversation begins with. Fixed when it begins."""

    system: str | None
    format: str  # auto, chatml
    today: str  # ISO
    texts: list[str] | None = None  # of the chat format, once it is known


class Conversation:
    """A brain that is talked to. Every method raises Refused if something cannot be done.

    Attributes: ``brain``, ``record``, ``format``, ``turns``; ``broken``, whether something
    interrupted a token between the memory and the record: then nothing is saved any more, and the
    conversation goes on from its record when it is opened again; ``ending``, whether the program
    was asked to end while a command was carried out.
    """

    def __init__(self, folder: Path, brain: Brain, conf: Conf) -> None:
        """Opens the conversation in a folder, or begins one. The folder is this process's alone.

        Args:
            folder: Its folder, which exists.
            brain: Nothing has been told it.
            conf: What it was opened with.
        """
        self.brain, self._conf, self._folder = brain, conf, folder
        self.broken = self.ending = False
        self._path, self._draft = folder / FILE, folder / f"{FILE}.draft"
        if not brain.settings.culling.target:
            raise Refused("a conversation needs a memory that forgets: leave out cull=none")
        require_own([self._path, self._draft])
        self.opening, self.turns, self._clearing, self._begun = self._read()
        if not self._begun and (folder / SAVES).exists():
            raise Refused(f"{folder} has the record of a run that is no conversation: use another")
        self.format: ChatFormat = brain.checkpoint.chat_format(
            self.opening.format, today=date.fromisoformat(self.opening.today)
        )
        f = self.format
        texts = [f.opening, *(f.system or ()), f.to_reply, f.reply_end, f.before_user]
        if self.opening.texts not in (None, texts):
            raise Refused(
                f"{self._path} began with another chat template than {brain.checkpoint.name} has "
                "now: put the old one back, or give another talk.name"
            )
        self.opening.texts = texts
        self._preamble = self._checked_preamble(self.opening.system)
        self.record = RunRecord(folder, brain, conf)
        if self._begun:
            self._begin()
            self._reconcile()

    def _checked_preamble(self, system: str | None) -> list[int]:
        """What stands before the first text but for the mark that begins it, which comes with the
        text. No text of the person's changes how it is split. Raises Refused if it cannot be
        pinned.
        """
        before, brain = self.format.preamble(system), self.brain
        if not before:
            raise Refused(f"{brain.checkpoint.name}: its chat template begins with nothing to read")
        mark = brain.tokenizer.encode_pieces([(self.format.before_user, True)])
        count = len(before) - _alike(before[::-1], mark[::-1])
        for probe in PROBES:
            count = min(count, _alike(before, self.format.first_turn(probe, system)))
        count = max(count, 1)
        if count > brain.most_pinned:
            raise Refused(
                f"the system prompt has {count} tokens, and at most {brain.most_pinned} can be "
                f"pinned in a memory of {brain.capacity}: shorten it, or use a larger capacity"
            )
        return before[:count]

    def begin_with(self, system: str) -> None:
        """Sets the system prompt, before anything is said. Raises Refused."""
        if self._begun:
            raise Refused(
                "a conversation keeps the system prompt that it began with: begin another one, "
                'talk.name=NAME talk.system="…"'
            )
        self._preamble = self._checked_preamble(system)
        self.opening.system = system

    # Its file

    def _read(self) -> tuple[Opening, list[Turn], bool, bool]:
        talk = self._conf.talk
        given = Opening(talk.system, talk.format, date.today().isoformat())
        try:
            told = read_json(self._path, RECORD_BYTES)
        except FileNotFoundError:
            return given, [], False, False
        except (OSError, ValueError) as error:
            raise Refused(f"{self._path} cannot be read ({one_line(error)})") from None
        try:
            if told["format"] != FORMAT:
                raise ValueError(f"format {shown(told['format'])}")
            opening, turns = Opening(**told["opening"]), [Turn(**turn) for turn in told["turns"]]
            clearing = told["clearing"]
            date.fromisoformat(opening.today)
            _check(opening, turns, clearing)
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(f"{self._path} is damaged ({one_line(error)})") from None
        for key, was, now in (
            ("talk.system", opening.system, talk.system),
            ("talk.format", opening.format, talk.format),
        ):
            if now not in (was, None, "auto"):
                raise Refused(
                    f"{self._path.parent} has a conversation that began with {key}={shown(was)}: "
                    "leave it out to go on, or give another talk.name"
                )
        return opening, turns, clearing, True

    def _write(self) -> None:
        told = {"format": FORMAT, "clearing": self._clearing, "opening": asdict(self.opening)}
        told["turns"] = [asdict(turn) for turn in self.turns]
        try:
            self._draft.write_text(json.dumps(told, ensure_ascii=False, indent=1), "utf-8")
            to_disk(self._draft)
            self._draft.replace(self._path)
        except OSError as error:
            raise Refused(f"{self._path} cannot be written ({one_line(error)})") from None

    # Beginning, and going on

    def _begin(self) -> None:
        """The record of the run, with what stands before the first text remembered and pinned."""
        self.record.begin(lambda: self.brain.prime(self._preamble, "system"))
        mirror, count = self.brain.mirror, len(self._preamble)
        loose = mirror.position[:count][~mirror.pinned[:count]]
        if self.brain.ticks == 0 and len(loose):
            self._command({"do": "pin", "positions": loose.tolist()})

    def _reconcile(self) -> None:
        """Makes turns and memory agree, whatever the process before this one was doing."""
        ticks = self.brain.ticks
        if self._clearing:
            self._finish_clearing()
        lost = [turn for turn in self.turns if turn.begins > ticks]
        if lost:
            warn(f"{self._path}: {len(lost)} turns were lost with the power; say them again")
            self.turns = [turn for turn in self.turns if turn not in lost]
        if self.turns:
            last = self.turns[-1]
            if ticks < last.begins + last.told:
                self._tell(last)
            elif lost or ticks < last.reply:  # as much of it as there is
                last.reply = min(last.reply, ticks)
                last.complete = ticks > last.reply and self._last() in self.format.reply_ends
            elif ticks == last.reply > last.begins + last.told and not last.complete:
                self._rewind(last)
        self._pin_marks()
        self._write()

    @property
    def is_replying(self) -> bool:
        """Whether the last reply has neither ended nor been stopped."""
        return bool(self.turns) and not self.turns[-1].complete

    # Turns

    def say(self, text: str) -> None:
        """Tells the model what the person says; :meth:`reply` is next. A long text is read with
        forgetting. Raises Refused, with nothing told, where it cannot be encoded or is empty, and
        KeyboardInterrupt where it was stopped amid the text, as far as which it has been told.
        """
        if not text:
            raise Refused("nothing was said: give some text")
        self.stop()
        if self._begun:
            self.record.inbox.poll()  # what came meanwhile comes before the text
        turn = Turn(
            user=text,
            begins=self.brain.ticks,
            told=0,
            reply=0,
            first=not self.turns,
            closes=bool(self.turns) and self._last() != self.format.reply_end_id,
        )
        turn.told = len(self._turn_ids(turn, text))
        turn.reply = turn.begins + turn.told
        self.turns.append(turn)
        self._write()
        if not self._begun:
            try:
                self._begin()
            except Refused:
                self.turns.clear()
                if not (self._folder / SAVES).exists():
                    self._path.unlink(missing_ok=True)
                raise
            self._begun = True
        self._tell(turn)
        self._pin_marks()

    def _last(self) -> int:
        """The newest token of the text: the one that is read next."""
        return int(self.brain.cursor.token[0])

    def _turn_ids(self, turn: Turn, text: str) -> list[int]:
        """The tokens that a turn appends, with this text for what the person says."""
        if turn.first:
            return self.format.first_turn(text, self.opening.system)[len(self._preamble) :]
        return self.format.next_turn(text, closes=turn.closes)

    def _tell(self, turn: Turn) -> None:
        """Tells what has not been told of a turn, some tokens at a time."""
        ids = self._turn_ids(turn, turn.user)
        while (told := self.brain.ticks - turn.begins) < len(ids):
            some = ids[told : told + AT_ONCE]
            stopped = self._command({"do": "inject", "ids": some, "source": "user"})
            if stopped and self.brain.ticks - turn.begins < len(ids):
                turn.told = self.brain.ticks - turn.begins
                turn.reply, turn.complete = self.brain.ticks, True
                self._write()
                raise KeyboardInterrupt

    def _marks(self, turn: Turn) -> dict[int, int]:
        """The tokens of a turn that are not the person's text, by the tick in which each came to be
        remembered: one after the tick that told it.
        """
        bare, other = self._turn_ids(turn, ""), self._turn_ids(turn, PROBES[0])
        before = _alike(bare, other)
        after = min(_alike(bare[::-1], other[::-1]), len(bare) - before)
        born = turn.begins + 2
        marks = {born + place: bare[place] for place in range(before)}
        return marks | {born + turn.told - back: bare[-back] for back in range(1, after + 1)}

    def _pin_marks(self) -> None:
        """Pins the marks of the newest turns, as far as they are remembered and there is room, and
        releases those of the turns before them.
        """
        mirror = self.brain.mirror
        wanted = [self._marks(turn) for turn in self.turns[-MARKED:]]
        older = [born for turn in self.turns[:-MARKED] for born in self._marks(turn)]
        free = mirror.position[np.isin(mirror.born, older) & mirror.pinned]
        if len(free):
            self._command({"do": "pin", "positions": free.tolist(), "pinned": False})
            mirror = self.brain.mirror
        room = self.brain.most_pinned - int(mirror.pinned.sum())
        loose = [
            int(mirror.position[row])
            for row in np.flatnonzero(~mirror.pinned)
            if any(marks.get(int(mirror.born[row])) == mirror.token_id[row] for marks in wanted)
        ]
        if loose[: max(room, 0)]:
            self._command({"do": "pin", "positions": loose[:room]})

    def reply(self) -> Iterator[str]:
        """The reply, or what is left of one that was cut off, piece by piece as it is said. Ends
        when the model ends it or it has ``talk.longest`` tokens. Whoever stops asking calls
        :meth:`stop`, or goes on later.
        """
        turn = self.turns[-1]
        while not turn.complete:
            self.broken = True
            ticks = self.brain.speak(1)
            text = self.record.record_ticks(*ticks)
            self.broken = False
            ended = any(tick.token in self.format.reply_ends for tick in ticks)
            if ended or self.brain.ticks - turn.reply >= self._conf.talk.longest:
                self._end()
            self.record.save_if_due()
            if not ended and text:
                yield text

    def stop(self) -> None:
        """Ends the reply where it is."""
        if self.is_replying:
            self._end()

    def _end(self) -> None:
        turn = self.turns[-1]
        turn.complete = True
        self.brain.finish_text()
        self._write()
        if self._conf.talk.thoughts is Thoughts.forget:
            self._forget_thoughts(turn)

    def _forget_thoughts(self, turn: Turn) -> None:
        """Culls the rows of a thought of the last reply, marks and all."""
        if self.format.thoughts is None:
            return
        opened, closed = (mark.encode() for mark in self.format.thoughts)
        mirror = self.brain.mirror
        said = np.flatnonzero(mirror.born > turn.reply + 1)
        first = int(said[0]) if len(said) else len(mirror)
        spelled = [self.brain.tokenizer.token_bytes(token) for token in mirror.token_id]
        text = b"".join(spelled[first:])
        end = text.find(closed)
        if end < 0:
            return
        # The mark that opens a thought may be the template's, before the reply.
        start = max(text.find(opened), 0)
        rows = _rows_at(spelled, first, start, end + len(closed))
        if rows:
            self._command({"do": "cull", "positions": mirror.position[rows].tolist()})

    def regenerate(self) -> None:
        """Forgets the last reply, so that :meth:`reply` draws another one. Raises Refused."""
        if not self.turns:
            raise Refused("there is no reply yet")
        turn, mirror = self.turns[-1], self.brain.mirror
        self.stop()
        if self.brain.ticks > turn.reply:
            if not (mirror.born == turn.begins + turn.told + 1).any():
                raise Refused("the end of what you said last is forgotten already: say it again")
            turn.reply, turn.complete = self.brain.ticks, False
            self._write()
            self._rewind(turn)
        turn.complete = False
        self._write()

    def _rewind(self, turn: Turn) -> None:
        """Forgets all after what was told in a turn, whose last token was remembered in the tick
        after it.
        """
        mirror = self.brain.mirror
        kept = mirror.position[mirror.born <= turn.begins + turn.told + 1]
        self._command({"do": "rewind", "position": int(kept[-1])})

    def clear(self) -> int:
        """Forgets everything but what the conversation begins with and what was pinned by hand;
        returns how many rows there are left. What is said next begins it anew.
        """
        if not self._begun:
            return 0
        self.stop()
        self._clearing = True
        self._write()
        self._finish_clearing()
        return len(self.brain)

    def _finish_clearing(self) -> None:
        marks = [born for turn in self.turns for born in self._marks(turn)]
        mirror = self.brain.mirror
        kept = mirror.pinned & ~np.isin(mirror.born, marks)
        kept[: len(self._preamble)] = True
        last = int(mirror.position[kept][-1])
        before = [position for position in mirror.position[~kept].tolist() if position < last]
        cull = [{"do": "cull", "positions": before}] if before else []
        self._command(*cull, {"do": "rewind", "position": last})
        self.turns, self._clearing = [], False
        self._write()

    # What is remembered

    def rows_with(self, text: str) -> list[int]:
        """The positions of all rows that hold a part of a text, wherever it is remembered whole:
        not across gaps, and not in what the template writes. Raises Refused.
        """
        mirror = self.brain.mirror
        marks = [born for turn in self.turns for born in self._marks(turn)]
        written = np.isin(mirror.born, marks)
        written[: len(self._preamble)] = True
        ends = np.flatnonzero((np.diff(mirror.position) > 1) | (np.diff(written) != 0)) + 1
        found: list[int] = []
        for run in np.split(np.arange(len(mirror)), ends):
            if len(run) and not written[run[0]]:
                spelled = [self._spelled(mirror.token_id[row]) for row in run]
                found += mirror.position[run[_places(spelled, text)]].tolist()
        return found

    def _spelled(self, token: int) -> bytes:
        return self.brain.tokenizer.token_bytes(token)

    def pin(self, text: str) -> int:
        """Pins the rows of a text; returns how many. Raises Refused."""
        positions = self.rows_with(text)
        if positions:
            self._command({"do": "pin", "positions": positions})
        return len(positions)

    def forget(self, text: str) -> int:
        """Redacts the rows of a text, takes it out of what the person and the model have said, and
        makes a save that alone is kept; returns how many rows. Raises Refused.
        """
        if text and text in (self.opening.system or ""):
            raise Refused("the system prompt holds it: begin another conversation, talk.name=NAME")
        positions = self.rows_with(text)
        said = self.record.said() if self._begun else []
        spoken = _places([self._spelled(token) for _, token in said], text)
        for turn in self.turns:
            turn.user = turn.user.replace(text, GONE) if text else turn.user
        if self._begun:
            self._write()
        if spoken and said[spoken[-1]][0] == self.brain.ticks:
            # The last token may not be a row yet: it is not to become one.
            self._command({"do": "rewind", "position": int(self.brain.mirror.position[-1])})
        if positions:
            self._command({"do": "redact", "positions": positions})
        if spoken:
            self.record.redact([said[place] for place in spoken])
        return len(positions)

    def leans_on(self, most: int) -> list[tuple[float, str]]:
        """What the next word would lean on, were one said now: the rows that draw the most
        attention, those left out that draw it always (``cull.sinks``). A read, so nothing changes.
        Returns the share of each, and its text with its neighbours'.
        """
        if not self._begun:
            return []
        cursor, mirror = self.brain.cursor, self.brain.mirror
        reading = self.brain.read(cursor.token.tolist(), cursor.position.tolist())
        mass = reading.mass.cpu().numpy()[mirror.slot].copy()
        mass[: self._conf.cull.sinks] = 0
        around = [slice(max(row - 3, 0), row + 4) for row in np.argsort(-mass)[:most]]
        text = self.brain.tokenizer.decode
        return [
            (float(mass[some.stop - 4]), text(mirror.token_id[some].tolist(), at_start=False))
            for some in around
        ]

    def last_reply(self) -> str:
        """The text of the last reply, as far as it has been said."""
        if not self.turns:
            return ""
        ids = [token for tick, token in self.record.said() if tick > self.turns[-1].reply]
        return self.brain.tokenizer.decode([i for i in ids if i not in self.format.reply_ends])

    def save(self) -> bool:
        """Writes a save of the brain; returns False where there is nothing to save yet."""
        if self._begun and not self.broken:
            self.record.save()
        return self._begun

    def close(self) -> None:
        """Saves, writes what is remembered into ``memory.json``, and closes everything."""
        if not self._begun:
            return
        if self.broken:
            self.record.close()
            return
        self.record.save()
        write_rows(remembered(self.brain), self._folder / ROWS)
        self.record.finish("")

    def _command(self, *actions: dict[str, Any]) -> bool:
        """Carries actions out, as one command of the run; signals wait. Returns whether somebody
        asked to stop meanwhile. Raises Refused.
        """
        line = json.dumps(actions).encode() + b"\n"
        with asked_to_stop() as asked:
            self.broken = True
            answer = self.record.inbox.execute(line)
            self.broken = False
        self.ending = self.ending or asked.to_end
        if "refused" in answer:
            raise Refused(answer["refused"])
        return asked()


def _check(opening: Opening, turns: Sequence[Turn], clearing: Any) -> None:
    """Raises ValueError unless all fields are of their types, and turns follow one another."""
    texts = opening.texts
    sound = (
        isinstance(clearing, bool)
        and isinstance(opening.format, str)
        and (opening.system is None or isinstance(opening.system, str))
        and isinstance(texts, list)
        and all(isinstance(text, str) for text in texts)
    )
    ticks = 0
    for turn in turns:
        numbers = (turn.begins, turn.told, turn.reply)
        sound = sound and isinstance(turn.user, str) and all(type(n) is int for n in numbers)
        sound = sound and all(type(f) is bool for f in (turn.first, turn.closes, turn.complete))
        if not sound or not ticks <= turn.begins <= turn.reply or turn.told < 0:
            raise ValueError("a turn is not as turns are")
        ticks = turn.begins
    if not sound:
        raise ValueError("its opening is not as openings are")


def _places(spelled: Sequence[bytes], text: str) -> list[int]:
    """Which of some tokens hold a part of a text, wherever it stands whole. Raises Refused."""
    try:
        wanted = text.encode()
    except UnicodeEncodeError:
        raise Refused("that is no valid Unicode: give the text as it was said") from None
    whole, found = b"".join(spelled), set()
    at = whole.find(wanted) if wanted else -1
    while at >= 0:
        found.update(_rows_at(spelled, 0, at, at + len(wanted)))
        at = whole.find(wanted, at + 1)
    return sorted(found)


def _alike(some: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = zip(some, others, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(some), len(others)))


def _rows_at(spelled: Sequence[bytes], first: int, start: int, end: int) -> list[int]:
    """Rows, from ``first`` on, that hold any of the bytes from ``start`` to ``end`` of theirs."""
    rows, at = [], 0
    for row in range(first, len(spelled)):
        after = at + len(spelled[row])
        if at < end and after > start:
            rows.append(row)
        at = after
    return rows
