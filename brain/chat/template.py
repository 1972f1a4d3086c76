"""A chat template as a few fixed texts, between which a conversation's own texts stand.

A conversation is never rendered again: what has been said stays in the memory as it was said, and
of each turn only the new texts are appended. So a template is rendered once, for conversations of
one, two and three turns whose texts are single characters that no template writes, and cut there.
Where it writes an earlier turn otherwise once there are later ones (Qwen3 drops thoughts), the
earlier form stays.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from brain.errors import Refused, one_line, warn
from brain.tokens import Tokenizer

SECONDS, MEMORY = 5, 512 << 20
"""What a template may take, with the start of the process that renders it."""
LARGEST = 1 << 20  # characters of a template; the longest known has 20 thousand
RENDERER = Path(__file__).with_name("render.py")
SYSTEM = "\ue0f0"
USER, REPLY = "\ue0f1\ue0f2\ue0f3", "\ue0f4\ue0f5\ue0f6"
"""Texts of three turns, a character each, of those that Unicode leaves to private use."""
THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
REMEDY = "use a model with another template, or chatml on purpose"


@dataclass(frozen=True, eq=False)
class ChatFormat:
    """How a model's makers write a conversation. The texts are the template's: control tokens
    written in them count, as they never do in what a person writes.
    """

    tokenizer: Tokenizer
    opening: str  # what stands before the first text of the user, where no system prompt is given
    system: tuple[str, str] | None  # before and after one; None: the template has no place for it
    to_reply: str  # from the user's text to the reply
    reply_end: str  # ends a reply: up to and including a control token; empty: only EOS does
    before_user: str  # from there to the user's next text
    thoughts: tuple[str, str] | None = (
        None  # what begins and ends a thought, if the template has it
    )

    @property
    def reply_end_id(self) -> int | None:
        """The control token that ``reply_end`` ends with, which a model says itself when its reply
        is complete. None: the template writes none.
        """
        found = _first_control(self.tokenizer, self.reply_end)
        return None if found is None else found[0]

    @property
    def reply_ends(self) -> frozenset[int]:
        """The ids that end a reply: EOS, and ``reply_end_id``."""
        return self.tokenizer.eos_ids | ({self.reply_end_id} - {None})  # type: ignore[operator]

    def first_turn(self, user: str, system: str | None = None) -> list[int]:
        """The ids that a conversation begins with, up to where the first reply does.

        Args:
            user: What the user says, as it is: unlike in many templates, nothing is trimmed.
            system: A system prompt. None: the template's own, if it has one.
        Raises:
            Refused: The template has no place for a system prompt, or a text cannot be encoded.
        """
        pieces = [*self._before(system), (user, False), (self.to_reply, True)]
        return self.tokenizer.with_bos(self.tokenizer.encode_pieces(pieces))

    def preamble(self, system: str | None = None) -> list[int]:
        """The ids before the user's first text: BOS, the system prompt, marks. ``first_turn``
        begins with them, but for the last where it merges with the user's text. Raises Refused.
        """
        return self.tokenizer.with_bos(self.tokenizer.encode_pieces(self._before(system)))

    def _before(self, system: str | None) -> list[tuple[str, bool]]:
        if system is None:
            return [(self.opening, True)]
        if self.system is None:
            raise Refused("this model's chat template has no place for a system prompt; give none")
        before, after = self.system
        return [(before, True), (system, False), (after, True)]

    def next_turn(self, user: str, *, closes: bool) -> list[int]:
        """The ids to append when the user speaks again, up to where the next reply begins.

        Args:
            user: What the user says, as it is.
            closes: Whether the end of the last reply is among them: yes, unless the model has said
                ``reply_end_id`` itself.
        Raises:
            Refused: The text cannot be encoded.
        """
        eos = self.tokenizer.named.get("eos_token", "")
        # What follows a token is split as such: some take white space, and none gets a space put
        # before it. So the ids begin with the end of a reply even where it has been said.
        before = self.reply_end or eos
        end = _first_control(self.tokenizer, before)
        pieces = [(before + self.before_user, True), (user, False), (self.to_reply, True)]
        ids = self.tokenizer.encode_pieces(pieces)
        if end is None or (closes and self.reply_end):
            return ids
        return ids[ids.index(end[0]) + 1 :]


def _first_control(tokenizer: Tokenizer, text: str) -> tuple[int, str] | None:
    """The first control token written in a template's text, and its text."""
    controls = tokenizer.vocabulary.controls
    ids = tokenizer.encode_pieces([(text, True)])
    return next(((index, controls[index].content) for index in ids if index in controls), None)


def _split_end(tokenizer: Tokenizer, between: str) -> tuple[str, str]:
    """What ends a reply, and what leads from there to the user's next text."""
    found = _first_control(tokenizer, between)
    if found is None:
        return "", between
    cut = between.index(found[1]) + len(found[1])
    return between[:cut], between[cut:]


def chatml(tokenizer: Tokenizer) -> ChatFormat:
    """The format ``<|im_start|>role … <|im_end|>``, whatever the model was trained with. One
    warning says so where the vocabulary lacks these tokens.
    """
    if tokenizer.vocabulary.id_of("<|im_end|>") is None:
        warn("chatml: the vocabulary has no token <|im_end|>; its marks are read as plain text")
    user, between = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>user\n"
    reply_end, before_user = _split_end(tokenizer, between)
    return ChatFormat(
        tokenizer=tokenizer,
        opening=user,
        system=("<|im_start|>system\n", f"<|im_end|>\n{user}"),
        to_reply="<|im_end|>\n<|im_start|>assistant\n",
        reply_end=reply_end,
        before_user=before_user,
    )


def chat_format(
    tokenizer: Tokenizer,
    *,
    today: date,
    variables: Mapping[str, Any] | None = None,
    where: str = "this model",
) -> ChatFormat:
    """The format that a tokenizer's chat template describes. The template is rendered in a process
    of its own, with limits of time, memory and length.

    Args:
        tokenizer: With a ``chat_template``.
        today: The date that the template is told, if it asks.
        variables: What else it is told, such as ``enable_thinking``; of JSON's types.
        where: Names the model in refusals.
    Raises:
        Refused: There is no template, it fails or exceeds a limit, or what it appends to a
            conversation depends on more than the new texts.
    """
    template = tokenizer.chat_template
    if template is None:
        raise Refused(f"{where} has no chat template; {REMEDY}")
    told = {**tokenizer.named, "tools": None, "documents": None, **(variables or {})}
    cases = [
        *(_case(turns) for turns in (1, 2, 3)),
        *(_case(turns, system=True) for turns in (1, 2, 3)),
        _case(1, prompt=False),
    ]
    *asked, bare = _render(template, told, cases, today, where)
    plain = [_cut(one, turns, where) for turns, one in enumerate(asked[:3], 1)]
    first, second, third = plain
    if (second.between, second.after) != (third.between, third.after) or (
        first.after != second.after
    ):
        raise Refused(f"{where}: its chat template does not write all turns alike; {REMEDY}")
    _require_reply_mark(first, second, bare, where)
    reply_end, before_user = _split_end(tokenizer, second.between)
    return ChatFormat(
        tokenizer=tokenizer,
        opening=first.before,
        system=_system(asked[3:], second, where),
        to_reply=first.after,
        reply_end=reply_end,
        before_user=before_user,
        thoughts=next((pair for pair in THOUGHTS if all(m in template for m in pair)), None),
    )


class _Case(NamedTuple):
    """What a template writes of a conversation, or why it does not."""

    text: str
    error: str


def _case(turns: int, *, system: bool = False, prompt: bool = True) -> dict[str, Any]:
    """A conversation of so many turns, of which the last is to be replied to."""
    messages = [{"role": "system", "content": SYSTEM}] if system else []
    for user, reply in zip(USER[:turns], REPLY, strict=False):
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": reply})
    return {"messages": messages[:-1], "add_generation_prompt": prompt}


def _render(
    template: str,
    variables: Mapping[str, Any],
    cases: Sequence[Mapping[str, Any]],
    today: date,
    where: str,
) -> list[_Case]:
    """What the template writes of each case. Raises Refused where it exceeds a limit."""
    if len(template) > LARGEST:
        told = f"has {len(template)} characters, more than {LARGEST}"
        raise Refused(f"{where}: its chat template {told}; {REMEDY}")
    asked = {
        "template": template,
        "variables": variables,
        "cases": cases,
        "now": today.isoformat(),
        "seconds": SECONDS + 1,  # for when this process ends first
        "memory": MEMORY,
    }
    # Without the environment, which may hold secrets, and without what runs at Python's start.
    environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    if "SYSTEMROOT" in os.environ:  # Windows starts no Python without it
        environment["SYSTEMROOT"] = os.environ["SYSTEMROOT"]
    try:
        done = subprocess.run(
            [sys.executable, "-S", "-P", "-X", "utf8", str(RENDERER)],
            input=json.dumps(asked).encode(),
            capture_output=True,
            env=environment,
            timeout=SECONDS,
            check=False,
        )
        results = [
            _Case(one.get("text", ""), one.get("error", "")) for one in json.loads(done.stdout)
        ]
    except subprocess.TimeoutExpired:
        took = f"takes more than {SECONDS} seconds"
        raise Refused(f"{where}: its chat template {took}; {REMEDY}") from None
    except OSError as error:
        why = f"cannot be rendered, as no process can be started ({one_line(error)})"
        raise Refused(f"{where}: its chat template {why}; try again") from None
    except (ValueError, TypeError, AttributeError):  # it died, or a template broke out
        lines = done.stderr.decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no reason was given")
        raise Refused(
            f"{where}: its chat template ended the process that renders it "
            f"(exit code {done.returncode}: {last.strip()[:200]}); {REMEDY}"
        ) from None
    return results


class _Cut(NamedTuple):
    """The parts of a conversation that belong to its last turn, and the way there."""

    before: str  # the user's first text
    between: str  # the last reply but one and the user's last text; empty: there is one turn
    after: str  # the user's last text
    earlier: str  # between the user's first text and the first reply


def _cut(case: _Case, turns: int, where: str) -> _Cut:
    """Cuts a conversation at its texts. Raises Refused where they are not there as given."""
    if case.error:
        raise Refused(f"{where}: its chat template fails ({case.error}); {REMEDY}")
    text = case.text
    marks = [mark for pair in zip(USER[:turns], REPLY, strict=False) for mark in pair][:-1]
    places = [text.find(mark) for mark in marks]
    if [text.count(mark) for mark in marks] != [1] * len(marks) or places != sorted(places):
        told = "does not write each text of a conversation once and in order"
        raise Refused(f"{where}: its chat template {told}; {REMEDY}")
    return _Cut(
        before=text[: places[0]],
        between=text[places[-2] + 1 : places[-1]] if turns > 1 else "",
        after=text[places[-1] + 1 :],
        earlier=text[places[0] + 1 : places[1]] if turns > 1 else "",
    )


def _require_reply_mark(first: _Cut, second: _Cut, bare: _Case, where: str) -> None:
    """Refuses a template that ignores ``add_generation_prompt`` although there is more before a
    reply than it writes then.
    """
    ignored = bare.text == first.before + USER[0] + first.after
    if ignored and second.earlier.rstrip() != first.after.rstrip():
        told = "does not write what begins a reply (it has no add_generation_prompt)"
        raise Refused(f"{where}: its chat template {told}; {REMEDY}")


def _system(cases: Sequence[_Case], plain: _Cut, where: str) -> tuple[str, str] | None:
    """What a system prompt stands between, before the user's first text. None: it has no place, or
    the template refuses it. Raises Refused where later turns would be written otherwise with it.
    """
    if any(case.error for case in cases) or not any(SYSTEM in case.text for case in cases):
        return None
    first, *later = (_cut(case, turns, where) for turns, case in enumerate(cases, 1))
    before, mark, after = first.before.partition(SYSTEM)
    # Mistral moves it to the user's last text: it stays where it was said.
    moved = plain.between + SYSTEM + after
    alike = all(cut.between in (plain.between, moved) for cut in later)
    once = all(case.text.count(SYSTEM) == 1 for case in cases)
    if not (mark and alike and once and {cut.after for cut in (first, *later)} == {plain.after}):
        told = "does not write a system prompt once, before the user's texts"
        raise Refused(f"{where}: its chat template {told}; {REMEDY}")
    return before, after
