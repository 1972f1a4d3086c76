"""Commands to a running brain: lines of a file, each a batch of actions.

A run reads ``RUN_FOLDER/commands.jsonl`` between ticks. Every complete line that has been added is
a JSON list of actions, applied wholly or refused wholly; ``answers.jsonl`` beside it gets one line
for each. A line may be written by hand, by another program, or by ``brain task=command``:

    [{"do": "pin", "positions": [3, 4]}, {"do": "inject", "text": " It rained.", "source": "tool"}]

=========  =======================================================================================
pin        positions; ``"pinned": false`` releases them
boost      positions, amount
cull       positions
redact     positions
rewind     position: forgets all after it, and what has been said and is not remembered yet
replace    positions (neighbours), and the text or ids to put there; source (default repair)
inject     text or ids to add after the last token; source (default user). They are fed
           to the loop, so that a full memory makes room for them
=========  =======================================================================================

A text may have ``"special": true`` or ``false`` beside it: whether special tokens written out in it
become control tokens. Without it the setting ``special`` of the run decides; as that comes, a text
with the source ``tool`` stays text.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from brain.actions import Action, Append, Boost, Cull, Pin, Redact, Replace, Rewind
from brain.brain import Brain
from brain.errors import Refused, Unwritten, did_you_mean, one_line, shown, unknown
from brain.files import open_plain, parse_json, require_own

INBOX, ANSWERS = "commands.jsonl", "answers.jsonl"
LONGEST_LINE = 1 << 20  # characters of one batch
MOST_AT_ONCE = 8 * LONGEST_LINE  # bytes that are read at a time
Encode = Callable[..., Sequence[int]]
"""``(text, source, special=…) → ids``, as :meth:`brain.Brain.encode`."""


def parse_batch(line: str, encode: Encode) -> list[Action]:
    """The actions of one line of ``commands.jsonl``: JSON, a list of them or a single one. Raises
    Refused, naming the action that is wrong. ``encode`` turns text into ids.
    """
    if len(line) > LONGEST_LINE:
        raise Refused(f"command of {len(line)} characters: at most {LONGEST_LINE} in one line")
    try:
        batch = parse_json(line)
    except ValueError as error:
        raise Refused(f"command is not JSON ({one_line(error)})") from None
    if isinstance(batch, dict):
        batch = [batch]
    if not isinstance(batch, list) or not batch:
        raise Refused('command must be a list of actions, like [{"do": "pin", "positions": [3]}]')
    return [_action(given, number, encode) for number, given in enumerate(batch)]


def _action(given: Any, number: int, encode: Encode) -> Action:
    if not isinstance(given, dict) or not isinstance(given.get("do"), str):
        raise Refused(f'action {number} must be an object with a "do"')
    fields = dict(given)
    do = fields.pop("do")
    if do not in _READERS:
        raise unknown(f"action {number}", do, _READERS)
    found = _Fields(fields, f"action {number} ({do})", encode)
    action = _READERS[do](found)
    found.require_all_taken()
    return action


class _Fields:
    """The fields of one action. Each is taken once, and none may be left over."""

    def __init__(self, given: dict[str, Any], where: str, encode: Encode) -> None:
        self._given, self._where, self._encode = given, where, encode
        self._known: set[str] = set()

    def take(self, name: str, *kinds: type, default: Any = None) -> Any:
        """Takes a field of one of these types. Raises Refused if it is missing without default."""
        self._known.add(name)
        if name not in self._given:
            if default is None:
                raise Refused(f"{self._where}: {name} is missing")
            return default
        value = self._given.pop(name)
        if type(value) not in kinds:
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise Refused(f"{self._where}: {name} is {shown(value)}, expected {expected}")
        return value

    def text(self, default: str) -> tuple[Sequence[int], str]:
        """Takes text or ids, exactly one of them, as ids, and their source."""
        if ("text" in self._given) == ("ids" in self._given):
            raise Refused(f"{self._where}: give either text or ids")
        source = self.take("source", str, default=default)
        if "ids" in self._given:
            return self.take("ids", list), source
        special = self.take("special", bool) if "special" in self._given else None
        return self._encode(self.take("text", str), source, special=special), source

    def positions(self) -> list[int]:
        return self.take("positions", list)  # type: ignore[no-any-return]

    def require_all_taken(self) -> None:
        if self._given:
            name = min(self._given)
            hint = did_you_mean(name, self._known - self._given.keys())
            raise Refused(f"{self._where}: {shown(name)} is not a field of it{hint}")


_READERS: dict[str, Callable[[_Fields], Action]] = {
    "pin": lambda f: Pin(f.positions(), f.take("pinned", bool, default=True)),
    "boost": lambda f: Boost(f.positions(), f.take("amount", int, float)),
    "cull": lambda f: Cull(f.positions()),
    "redact": lambda f: Redact(f.positions()),
    "rewind": lambda f: Rewind(f.take("position", int)),
    "replace": lambda f: Replace(f.positions(), *f.text("repair")),
    "inject": lambda f: Append(*f.text("user")),
}


class RedactedRow(NamedTuple):
    """A row that was redacted: its tick of birth, its token, and whether the model spoke it."""

    born: int
    token: int
    spoken: bool


class Inbox:
    """The commands of one run. Polling costs one call to the file system.

    ``read``: bytes of the inbox that have been executed. ``on_command`` is called with each line
    after it was applied or refused and before it is answered, ``on_redaction`` after that with the
    rows it redacted, if any.
    """

    def __init__(self, folder: Path, brain: Brain) -> None:
        self._inbox, self._answers = folder / INBOX, folder / ANSWERS
        self._brain = brain
        # Commands that an earlier run in this folder was given are not for this one.
        self.read = self._inbox.stat().st_size if self._inbox.exists() else 0
        self.on_command: Callable[[bytes], None] | None = None
        self.on_redaction: Callable[[Sequence[RedactedRow]], None] | None = None

    @property
    def has_news(self) -> bool:
        """Whether the inbox holds what has not been executed, or a line that is being written."""
        try:
            return self._inbox.stat().st_size != self.read
        except OSError:
            return False  # there is no inbox yet

    def poll(self) -> int:
        """Executes the lines that have come since the last call; returns how many were applied."""
        try:
            size = self._inbox.stat().st_size
            if size < self.read:
                self.read = 0  # replaced by a new file
            if size == self.read:
                return 0
            with open_plain(self._inbox) as file:
                file.seek(self.read)
                added = file.read(MOST_AT_ONCE)
        except OSError:
            return 0  # there is no inbox yet
        applied = 0
        whole = added[: added.rfind(b"\n") + 1]
        if not whole and len(added) == MOST_AT_ONCE:
            whole = added  # longer than any command may be: refused in parts
        for line in whole.splitlines(keepends=True):
            self.read += len(line)  # a line without a break is still being written
            if line.strip():
                applied += "applied" in self.execute(line)
        return applied

    def execute(self, line: bytes) -> dict[str, Any]:
        """Applies or refuses one line and answers it; returns the answer, which has either
        ``applied`` or ``refused``. Raises Unwritten if it cannot be written.
        """
        answer: dict[str, Any] = {"tick": self._brain.ticks}
        redacted: list[RedactedRow] = []
        try:
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise Refused(f"command is not UTF-8 (byte {error.start})") from None
            actions = parse_batch(text, self._brain.encode)
            redacted = self._rows_to_redact(actions)
            self._brain.apply(actions)
            answer |= {"applied": len(actions), "rows": len(self._brain)}
        except Unwritten:
            raise
        except Refused as refused:
            redacted = []
            answer["refused"] = str(refused)
        if self.on_command is not None:
            self.on_command(line)
        try:
            with self._answers.open("a", encoding="utf-8") as file:
                file.write(json.dumps(answer, ensure_ascii=False) + "\n")
        except OSError as error:
            raise Unwritten(f"{self._answers} cannot be written ({one_line(error)})") from None
        if redacted and self.on_redaction is not None:
            self.on_redaction(redacted)
        return answer

    def _rows_to_redact(self, actions: Sequence[Action]) -> list[RedactedRow]:
        """The rows that these actions redact."""
        redactions = [action.positions for action in actions if isinstance(action, Redact)]
        positions = {p for given in redactions for p in given if isinstance(p, int)}
        if not positions:
            return []
        mirror, sources = self._brain.mirror, self._brain.mirror.sources()
        return [
            RedactedRow(int(mirror.born[i]), int(mirror.token_id[i]), spoken=sources[i] == "model")
            for i, position in enumerate(mirror.position.tolist())
            if position in positions
        ]


def send(folder: Path, line: str) -> None:
    """Adds one line to the inbox of the run in a folder. Raises Refused if there is no such run."""
    if "\n" in line.strip():
        raise Refused("a command is one line")
    if not (folder / "transcript.txt").is_file():
        raise Refused(f"{folder} is not the folder of a run")
    require_own([folder / INBOX])
    try:
        with (folder / INBOX).open("a", encoding="utf-8") as file:
            file.write(line.strip() + "\n")
    except OSError as error:
        raise Refused(f"{folder / INBOX} cannot be written ({one_line(error)})") from None
