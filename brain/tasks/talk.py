"""``task=talk``: a conversation in the terminal, or through a pipe.

On a terminal each line is said, or is a command (``/help``). Through a pipe all of standard input
is said at once, and the reply is all that is printed.
"""

import contextlib
import dataclasses
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from brain.auto import resolved
from brain.conversation import Conversation
from brain.errors import Refused, Unwritten, did_you_mean, one_line, printable, shown
from brain.files import data_folder, given_path
from brain.machine.graph_cache import kept_graphs
from brain.machine.memory import without_collection
from brain.machine.progress import progress_bar
from brain.machine.signals import asked_to_stop, endings_raise
from brain.opening import open_brain
from brain.prompt_file import text_of
from brain.record.heatmap import GAP, remembered
from brain.record.lock import sole_writer
from brain.record.run_record import as_recorded
from brain.terminal import capture_graphs, note
from conf.schema import Conf

HISTORY = "history"
SAFE = re.compile(r"[\w.@ +-]{1,100}")
MOST_SHOWN = 8  # rows that /why shows
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
QUOTES = '"""'


class _Command(NamedTuple):
    """What is done for a line that begins with a slash."""

    does: Callable[["_Talk", str], None]
    argument: str
    help: str


def run(conf: Conf, run_dir: Path) -> None:
    """Talks until standard input ends. Raises Refused. The conversation lies in a folder of its own
    (``talk.folder``, or by ``talk.name`` in the user's data folder), not in ``run_dir``.
    """
    if conf.talk.longest < 1:
        raise Refused(f"talk.longest must be at least 1, not {conf.talk.longest}")
    if conf.prompt_file is not None or conf.capture or conf.lookup.width:
        raise Refused("task=talk has no use for prompt_file, capture and lookup: leave them out")
    folder = _folder(conf)
    try:
        _talk(conf, folder)
    finally:
        with contextlib.suppress(OSError):  # something was said
            folder.rmdir()


def _talk(conf: Conf, folder: Path) -> None:
    with sole_writer(folder, "talk.name"):
        cache = None if conf.cache_dir is None else given_path(conf.cache_dir)
        note(f"loading {conf.model.name} …")
        # The text of a run is what a conversation's own file says.
        conf, reason = resolved(as_recorded(dataclasses.replace(conf, prompt="-"), folder))
        if reason is not None and _is_typed():
            note(reason)
        graphs = kept_graphs(cache) if conf.engine.captured else nullcontext(lambda: None)
        with graphs as record_graphs:
            with without_collection():
                brain = open_brain(conf)
                capture_graphs(brain.graphs, edits=False)
            record_graphs()
            talk = _Talk(Conversation(folder, brain, conf), folder)
            try:
                talk.run()
            finally:
                talk.conversation.close()


def _folder(conf: Conf) -> Path:
    if conf.talk.folder is not None:
        folder = given_path(conf.talk.folder)
    else:
        name = conf.talk.name
        if not SAFE.fullmatch(name) or name.strip(". ") != name:
            raise Refused(f"talk.name {shown(name)} is no name: use letters, digits, - and _")
        folder = data_folder() / "talk" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{folder} cannot be made ({one_line(error)})") from None
    return folder


def _is_typed() -> bool:
    """Whether a person types, rather than a pipe or nothing at all."""
    return sys.stdin is not None and sys.stdin.isatty()


class _Talk:
    """What a person sees of a conversation."""

    def __init__(self, conversation: Conversation, folder: Path) -> None:
        self.conversation, self.folder = conversation, folder

    def run(self) -> None:
        """Until the person leaves."""
        conversation = self.conversation
        if not _is_typed():
            text = text_of("-", "task=talk").strip()
            if not text:
                raise Refused("standard input holds white space alone: say something")
            self.say(text)
            return
        note(f"/help tells what can be done; {self.folder}")
        if conversation.turns:
            note(f"going on after {len(conversation.turns)} turns")
        # Imported here: a pipe does without, and it takes a while.
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory

        session: PromptSession[str] = PromptSession(history=FileHistory(self.folder / HISTORY))
        try:
            with endings_raise(Ended):
                if conversation.is_replying:
                    turn = conversation.turns[-1]
                    print(_safe(f"> {turn.user}\n{conversation.last_reply()}"), end="", flush=True)
                    self.reply()
                while not conversation.ending:
                    try:
                        self._do(self._typed(session))
                    except KeyboardInterrupt:
                        if conversation.broken:
                            raise
                        note("Ctrl-D or /exit leaves")
                    except Unwritten:
                        raise
                    except Refused as refusal:
                        note(str(refusal))
                raise Ended
        except Ended:
            raise KeyboardInterrupt from None
        except (Leaving, EOFError):
            return

    def _typed(self, session: Any) -> str:
        """What the person types: a line, or several in three quotes. Raises EOFError where their
        input ends, KeyboardInterrupt for Ctrl-C.
        """
        text: str = session.prompt("> ")
        if not text.lstrip().startswith(QUOTES):
            return text
        while len(text.strip()) < 2 * len(QUOTES) or not text.rstrip().endswith(QUOTES):
            text += "\n" + session.prompt("... ")
        inner = text.strip()[len(QUOTES) : -len(QUOTES)].strip("\n")
        return f" {inner}" if inner.startswith("/") else inner

    def _do(self, text: str) -> None:
        """Carries out what was typed."""
        if text.startswith("/"):
            self._command(text)
        elif text.strip():
            self.say(text)

    def say(self, text: str) -> None:
        """Says something, and prints the reply."""
        with progress_bar("reading", leave=False) if len(text) > 4000 else nullcontext():
            self.conversation.say(text)
        self.reply()

    def reply(self) -> None:
        """Prints the reply as it comes. Ctrl-C stops it."""
        with asked_to_stop() as asked:
            try:
                for text in self.conversation.reply():
                    print(_safe(text), end="", flush=True)
                    if asked():
                        self.conversation.stop()
                        break
            finally:
                print(flush=True)
            if asked.to_end:
                raise Ended

    def _command(self, line: str) -> None:
        name, _, argument = line[1:].partition(" ")
        command = COMMANDS.get(name)
        if command is None:
            hint = did_you_mean(name, COMMANDS)
            raise Refused(f"/{printable(name)} is not a command{hint}; /help lists them")
        argument = argument.strip()
        if command.argument and not argument and not command.argument.startswith("["):
            raise Refused(f"/{name} needs {command.argument}")
        command.does(self, argument)

    def help(self, _: str) -> None:
        """Lists the commands."""
        for name, command in COMMANDS.items():
            note(f"  {f'/{name} {command.argument}'.strip():16} {command.help}")
        note(f"  {QUOTES:16} begins and ends a text of several lines")
        note(f"  {'Ctrl-C':16} stops a reply")

    def leave(self, _: str) -> None:
        """Ends the program."""
        raise Leaving

    def system(self, text: str) -> None:
        """Says, or before the first turn sets, the system prompt."""
        conversation = self.conversation
        if not text:
            told = conversation.opening.system
            note("the model's own, if it has one" if told is None else told)
        else:
            conversation.begin_with(text)
            note("the conversation begins with it")

    def regenerate(self, _: str) -> None:
        """Forgets the last reply and draws another."""
        self.conversation.regenerate()
        self.reply()

    def clear(self, _: str) -> None:
        """Forgets what is not pinned."""
        note(f"forgotten; {self.conversation.clear()} rows are left")

    def save(self, _: str) -> None:
        """Saves."""
        saved = self.conversation.save()
        note(f"saved in {self.folder}" if saved else "nothing has been said yet")

    def read(self, name: str) -> None:
        """Says what is in a file."""
        self.say(text_of(name, "/read"))

    def memory(self, _: str) -> None:
        """Shows what is remembered."""
        brain = self.conversation.brain
        rows, sources = remembered(brain), brain.mirror.sources()
        told = ", ".join(f"{sources.count(name)} {name}" for name in dict.fromkeys(sources))
        pinned = sum(row.pinned for row in rows)
        note(f"{len(rows)} of {brain.capacity} rows: {told or 'none'}; {pinned} pinned")
        if rows:
            note(_safe(brain.mirror.text(GAP)))

    def pin(self, text: str) -> None:
        """Keeps the rows of a text."""
        self._told("pinned", self.conversation.pin(text))

    def forget(self, text: str) -> None:
        """Erases the rows of a text."""
        count = self.conversation.forget(text)
        _without(self.folder / HISTORY, text)
        self._told("erased", count)

    def _told(self, what: str, count: int) -> None:
        note(f"{count} rows {what}" if count else "no remembered row holds that")

    def why(self, _: str) -> None:
        """Shows which rows the end of the last reply leans on."""
        for share, text in self.conversation.leans_on(MOST_SHOWN):
            note(f"  {share:6.1%}  {printable(text)}")


class Leaving(Exception):
    """The person leaves."""


class Ended(SystemExit):
    """The program is asked to end, or its terminal has gone. Event loops let this kind pass."""


COMMANDS = {
    "help": _Command(_Talk.help, "", "this list"),
    "exit": _Command(_Talk.leave, "", "leaves; so does Ctrl-D. The same command goes on"),
    "system": _Command(
        _Talk.system, "[TEXT]", "says the system prompt; before the first turn sets it"
    ),
    "regen": _Command(_Talk.regenerate, "", "forgets the last reply and draws another"),
    "clear": _Command(_Talk.clear, "", "forgets all but the system prompt and what was pinned"),
    "save": _Command(_Talk.save, "", "saves now, and says where"),
    "read": _Command(_Talk.read, "FILE", "says what is in a text file"),
    "memory": _Command(_Talk.memory, "", "shows what is remembered, with gaps"),
    "pin": _Command(_Talk.pin, "TEXT", "never forgets the rows of this text"),
    "forget": _Command(_Talk.forget, "TEXT", "erases the rows of this text, everywhere"),
    "why": _Command(_Talk.why, "", "shows which rows the end of the last reply leans on"),
}


def _without(history: Path, text: str) -> None:
    """Takes lines with a text out of the history of what was typed."""
    with contextlib.suppress(OSError, UnicodeError):
        lines = history.read_text("utf-8").splitlines(keepends=True)
        history.write_text("".join(line for line in lines if text not in line), "utf-8")


def _safe(text: str) -> str:
    """A text without what would control the terminal, or turn the direction of others."""
    return CONTROLS.sub(lambda found: printable(found[0]), text)
