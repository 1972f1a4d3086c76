"""A conversation: a run that a person and the model take turns in, in a folder of its own.

The run is as any other (``brain/record/run_record.py``): the texts of the person are commands that
put tokens into the loop, the replies are ticks. So it outlives its process, in the middle of a
reply too. ``conversation.json`` holds what the record does not say: who said which text, and where
each turn begins. It is written before a turn is told, so that one that was cut off is told again.

The memory is never rendered again: each turn appends its own tokens (``brain/chat/template.py``).
What holds the conversation together is pinned: what stands before the first text (BOS, the system
prompt), and the marks around the texts of the newest turns.

This module knows no terminal.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from brain.brain import Brain
from brain.chat.template import ChatFormat
from brain.errors import Refused, one_line, shown
from brain.files import RECORD_BYTES, read_json, require_own
from brain.machine.integrity import to_disk
from brain.record.run_record import RunRecord
from conf.schema import Conf, Thoughts

FILE, FORMAT = "conversation.json", 1
MARKED = 2  # newest turns whose marks are pinned
GONE = "…"
"""Stands for a text that was forgotten on request."""


@dataclass
class Turn:
    """What was said to the model, and where its tokens and the reply's are. Ticks are numbered from
    1, as everywhere; a token is remembered in the tick after it was told or said.
    """

    user: str
    begins: int  # ticks before its first token
    told: int  # tokens
    reply: int  # ticks before the first token of the reply that counts
    complete: bool = False  # whether the reply has ended, or was stopped
    marks: list[int] = field(default_factory=list)  # ticks of birth of marks that are pinned


@dataclass
class Opening:
    """What a conversation begins with. Fixed when it begins."""

    system: str | None
    format: str  # auto, chatml
    today: str  # ISO


class Conversation:
    """A brain that is talked to. Every method raises Refused if something cannot be done.

    Attributes: ``brain``, ``record``, ``format``, ``turns``.
    """

    def __init__(self, folder: Path, brain: Brain, conf: Conf) -> None:
        """Opens the conversation in a folder, or begins one. The folder is this process's alone.

        Args:
            folder: Its folder, which exists.
            brain: Nothing has been told it.
            conf: What it was opened with.
        """
        self.brain, self._conf, self._path = brain, conf, folder / FILE
        require_own([self._path])
        self.opening, self.turns, self._begun = self._read()
        self.format: ChatFormat = brain.checkpoint.chat_format(
            self.opening.format, today=date.fromisoformat(self.opening.today)
        )
        self._preamble = self._checked_preamble(self.opening.system)
        self.record = RunRecord(folder, brain, conf)
        if self._begun:
            self._begin()
            self._go_on()

    def _checked_preamble(self, system: str | None) -> list[int]:
        """What stands before the first text, up to a control token, so that no text of the person's
        changes how it is split. Raises Refused if it cannot be pinned.
        """
        before, brain = self.format.preamble(system), self.brain
        controls = brain.tokenizer.vocabulary.controls
        count = max((i + 1 for i, token in enumerate(before) if token in controls), default=1)
        if not before:
            raise Refused(f"{brain.checkpoint.name}: its chat template begins with nothing to read")
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

    def _read(self) -> tuple[Opening, list[Turn], bool]:
        talk = self._conf.talk
        given = Opening(talk.system, talk.format, date.today().isoformat())
        try:
            told = read_json(self._path, RECORD_BYTES)
        except FileNotFoundError:
            return given, [], False
        except (OSError, ValueError) as error:
            raise Refused(f"{self._path} cannot be read ({one_line(error)})") from None
        try:
            if told["format"] != FORMAT:
                raise ValueError(f"format {shown(told['format'])}")
            opening, turns = Opening(**told["opening"]), [Turn(**turn) for turn in told["turns"]]
            date.fromisoformat(opening.today)
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
        return opening, turns, True

    def _write(self) -> None:
        told = {"format": FORMAT, "opening": asdict(self.opening)}
        told["turns"] = [asdict(turn) for turn in self.turns]
        draft = self._path.with_suffix(".draft")
        try:
            draft.write_text(json.dumps(told, ensure_ascii=False, indent=1), "utf-8")
            to_disk(draft)
            draft.replace(self._path)
        except OSError as error:
            raise Refused(f"{self._path} cannot be written ({one_line(error)})") from None

    # Beginning, and going on

    def _begin(self) -> None:
        """The record of the run, with what stands before the first text remembered and pinned."""
        self.record.begin(lambda: self.brain.prime(self._preamble, "system"))
        self._begun = True
        mirror = self.brain.mirror
        first = mirror.position[: len(self._preamble)][~mirror.pinned[: len(self._preamble)]]
        if self.brain.ticks == 0 and len(first):
            self._command({"do": "pin", "positions": first.tolist()})

    def _go_on(self) -> None:
        """Tells what was to be told when the process before this one ended."""
        if self.turns and self.brain.ticks == self.turns[-1].begins:
            self._tell(self.turns[-1])

    @property
    def is_replying(self) -> bool:
        """Whether the last reply has neither ended nor been stopped."""
        return bool(self.turns) and not self.turns[-1].complete

    # Turns

    def say(self, text: str) -> None:
        """Tells the model what the person says; :meth:`reply` is next. A long text is read with
        forgetting. Raises Refused, with nothing told, where it cannot be encoded or is empty.
        """
        if not text:
            raise Refused("nothing was said: give some text")
        ids = self._turn_ids(text)
        if not self._begun:
            self.turns, self._begun = [Turn(text, 0, len(ids), len(ids))], True
            self._write()
            self._begin()
        else:
            begins = self.brain.ticks
            self.turns.append(Turn(text, begins, len(ids), begins + len(ids)))
            self._write()
        self._tell(self.turns[-1])

    def _turn_ids(self, text: str) -> list[int]:
        """The tokens that a turn with this text appends."""
        if not self.turns:
            ids = self.format.first_turn(text, self.opening.system)
            return ids[len(self._preamble) :]
        return self.format.next_turn(text, closes=self.record.last != self.format.reply_end_id)

    def _tell(self, turn: Turn) -> None:
        earlier, self.turns = self.turns, [one for one in self.turns if one is not turn]
        ids, marks = self._turn_ids(turn.user), self._turn_ids("")
        self.turns = earlier
        self._command({"do": "inject", "ids": ids, "source": "user"})
        before = _alike(ids, marks)
        after = min(_alike(ids[::-1], marks[::-1]), len(marks) - before, len(ids) - before)
        self._pin_marks(turn, ids, {*range(before), *range(len(ids) - after, len(ids))})

    def _pin_marks(self, turn: Turn, ids: Sequence[int], places: set[int]) -> None:
        """Pins the marks of this turn, as far as they are remembered, and releases those of a turn
        that is not among the newest any more.
        """
        last, mirror = self.brain.memory.account.position, self.brain.mirror
        found = {int(position): index for index, position in enumerate(mirror.position)}
        rows = [
            found[at]
            for place in sorted(places)
            if (at := last - len(ids) + 1 + place) in found
            and mirror.token_id[found[at]] == ids[place]
        ]
        released = [mark for old in self.turns[:-MARKED] for mark in old.marks]
        free = mirror.position[np.isin(mirror.born, released) & mirror.pinned]
        if len(free):
            self._command({"do": "pin", "positions": free.tolist(), "pinned": False})
        room = self.brain.most_pinned - int(self.brain.mirror.pinned.sum())
        rows = rows[: max(room, 0)]
        if rows:
            self._command({"do": "pin", "positions": mirror.position[rows].tolist()})
        turn.marks = mirror.born[rows].tolist()
        for old in self.turns[:-MARKED]:
            old.marks = []
        self._write()

    def reply(self) -> Iterator[str]:
        """The reply, or what is left of one that was cut off, piece by piece as it is said. Ends
        when the model ends it or it has ``talk.longest`` tokens. Whoever stops asking calls
        :meth:`stop`, or goes on later.
        """
        turn = self.turns[-1]
        while not turn.complete:
            ticks = self.brain.speak(1)
            text = self.record.record_ticks(*ticks)
            ended = any(tick.token in self.format.reply_ends for tick in ticks)
            if not ended and text:
                yield text
            if ended or self.brain.ticks - turn.reply >= self._conf.talk.longest:
                self._end()
            self.record.inbox.poll()
            self.record.save_if_due()

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
        self._cull(_rows_at(spelled, first, start, end + len(closed)))

    def _cull(self, rows: Sequence[int]) -> None:
        positions = self.brain.mirror.position[list(rows)].tolist()
        if positions:
            self._command({"do": "cull", "positions": positions})

    def regenerate(self) -> None:
        """Forgets the last reply, so that :meth:`reply` draws another one. Raises Refused."""
        if not self.turns:
            raise Refused("there is no reply yet")
        turn, mirror = self.turns[-1], self.brain.mirror
        told = turn.begins + turn.told + 1  # the tick of birth of the last token that was told
        kept = mirror.position[mirror.born <= told]
        if not len(kept) or not (mirror.born == told).any():
            raise Refused("the end of what you said last is forgotten already: say it again")
        self._command({"do": "rewind", "position": int(kept[-1])})
        turn.reply, turn.complete = self.brain.ticks, False
        self._write()

    def clear(self) -> int:
        """Forgets everything but what the conversation begins with and what was pinned by hand;
        returns how many rows there are left. What is said next begins it anew.
        """
        if not self._begun:
            return 0
        self.stop()
        marks = [mark for turn in self.turns for mark in turn.marks]
        mirror = self.brain.mirror
        kept = mirror.pinned & ~np.isin(mirror.born, marks)
        gone = mirror.position[~kept].tolist()
        last = int(mirror.position[kept][-1])
        before = [position for position in gone if position < last]
        if before:
            self._command({"do": "cull", "positions": before})
        self._command({"do": "rewind", "position": last})
        self.turns = []
        self._write()
        return len(self.brain)

    # What is remembered

    def rows_with(self, text: str) -> list[int]:
        """The positions of all rows that hold a part of a text, wherever it is remembered."""
        mirror, wanted = self.brain.mirror, text.encode()
        spelled = [self.brain.tokenizer.token_bytes(token) for token in mirror.token_id]
        whole = b"".join(spelled)
        found: set[int] = set()
        at = whole.find(wanted) if wanted else -1
        while at >= 0:
            found.update(_rows_at(spelled, 0, at, at + len(wanted)))
            at = whole.find(wanted, at + 1)
        return [int(mirror.position[row]) for row in sorted(found)]

    def pin(self, text: str) -> int:
        """Pins the rows of a text; returns how many. Raises Refused."""
        return self._do_with(text, {"do": "pin"})

    def forget(self, text: str) -> int:
        """Redacts the rows of a text, and takes it out of what the person said; returns how many
        rows. Raises Refused.
        """
        count = self._do_with(text, {"do": "redact"})
        for turn in self.turns:
            turn.user = turn.user.replace(text, GONE)
        self._write()
        return count

    def _do_with(self, text: str, action: dict[str, Any]) -> int:
        positions = self.rows_with(text)
        if positions:
            self._command({**action, "positions": positions})
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

    def save(self) -> None:
        """Writes a save of the brain."""
        if self._begun:
            self.record.save()

    def close(self) -> None:
        """Saves and closes everything."""
        if self._begun:
            self.record.save()
            self.record.finish("")

    def _command(self, action: dict[str, Any]) -> None:
        """Carries an action out, as a command of the run. Raises Refused."""
        line = json.dumps([action]).encode() + b"\n"
        answer = self.record.inbox.execute(line)
        if "refused" in answer:
            raise Refused(answer["refused"])


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
