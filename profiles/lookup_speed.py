"""What lookup gains on text that repeats, and costs on text that does not.

    python profiles/lookup_speed.py TEXT [KEY=VALUE …]

Opens the model twice on the same weights, with ``lookup=none`` and ``lookup=ngram``, and lets both
go on with the same prompts in alternation, so that a drift of the machine meets both: code, a list
and a passage that is read aloud again (made here; the likeliest tokens), and prose, for which the
UTF-8 file TEXT gives the prompt (drawn as the configuration says). Both say the same tokens; where
rounding makes them part, the share up to there is told. Prints a table and one JSON line. KEY=VALUE
are overrides as on the command line, ``engine=compiled dtype=bfloat16`` for one.
"""

import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from brain.auto import resolved
from brain.brain import Brain
from brain.checkpoints import Checkpoint
from brain.config.compose import compose_conf
from brain.config.settings import settings_of
from brain.opening import checkpoint_of, use_threads

ROUNDS, TICKS = 3, 160
PROSE_TOKENS = 400

LETTERS = ("alpha", "beta", "gamma", "delta", "epsilon")
CODE = "".join(
    f"def test_{name}() -> None:\n"
    f'    result = call("{name}", timeout=10)\n'
    "    assert result.status == 200\n"
    f'    assert result.body == "{name}"\n'
    '    assert result.headers["content-type"] == "text/plain"\n\n\n'
    for name in LETTERS
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday")
LIST = "".join(f"{day}: open at nine in the morning, close at five.\n" for day in DAYS)
PASSAGE = (
    "The ferry left the harbour before dawn, with eleven passengers and a crate of lemons. Nobody "
    "spoke until the island was in sight. Then the oldest of them stood up, took off his hat, and "
    "counted the chimneys aloud, as he had promised his sister he would."
)
QUOTED = (
    f'The passage is: "{PASSAGE}"\n\nOnce more, word for word: "{PASSAGE}"\n\n'
    'Once more, word for word: "The ferry left'
)
GREEDY = ("sampler=greedy",)


class Subject(NamedTuple):
    """What both go on with."""

    name: str
    prompt: str
    overrides: tuple[str, ...]


def brain_of(checkpoint: Checkpoint | None, overrides: list[str]) -> Brain:
    """A brain with every graph captured, on weights that are open already if there are any."""
    conf = resolved(compose_conf(overrides)).conf
    settings = settings_of(conf)
    use_threads(conf.threads)
    if checkpoint is None:
        checkpoint = checkpoint_of(conf, settings)
    brain = Brain(checkpoint, settings)
    for name in brain.warm_up():
        print(f"capturing {name}", file=sys.stderr, flush=True)
    return brain


def timed(brain: Brain, prompt: list[int]) -> tuple[float, list[int]]:
    """Seconds for so many ticks after a prompt, and the tokens."""
    brain.prime(prompt)
    brain.tick()
    start = time.perf_counter()
    tokens = [tick.token for tick in brain.stream(TICKS)]
    return time.perf_counter() - start, tokens


def compare(subject: Subject, plain: Brain, quick: Brain) -> dict[str, Any]:
    """Both in alternation, on one subject."""
    prompt = plain.encode(subject.prompt)[:PROSE_TOKENS]
    seconds: dict[Brain, list[float]] = {plain: [], quick: []}
    said: dict[Brain, list[int]] = {}
    account = quick.lookahead.counts
    before = (account.passes, account.tokens, account.proposed, account.accepted)
    for number in range(ROUNDS):
        for brain in (plain, quick) if number % 2 == 0 else (quick, plain):
            took, said[brain] = timed(brain, prompt)
            seconds[brain].append(took)
    after = (account.passes, account.tokens, account.proposed, account.accepted)
    passes, tokens, proposed, accepted = (b - a for a, b in zip(before, after, strict=True))
    same = next(
        (n for n, (a, b) in enumerate(zip(said[plain], said[quick], strict=True)) if a != b), TICKS
    )
    slow, fast = (statistics.median(seconds[brain]) for brain in (plain, quick))
    return {
        "text": subject.name,
        "plain_tokens_per_second": TICKS / slow,
        "lookup_tokens_per_second": TICKS / fast,
        "ratio": slow / fast,
        "tokens_per_read": tokens / passes,
        "proposed": proposed,
        "accepted": accepted,
        "same_tokens": same / TICKS,
    }


def main() -> None:
    """Compares on every subject and prints the results."""
    if len(sys.argv) < 2 or "=" in sys.argv[1]:
        sys.exit("usage: python profiles/lookup_speed.py TEXT [KEY=VALUE …]")
    prose, overrides = Path(sys.argv[1]).read_text("utf-8"), sys.argv[2:]
    subjects = [
        Subject("code", CODE, GREEDY),
        Subject("list", LIST, GREEDY),
        Subject("quoted", QUOTED, GREEDY),
        Subject("prose", prose, ()),
    ]
    rows: list[dict[str, Any]] = []
    checkpoint: Checkpoint | None = None
    for sampler in (GREEDY, ()):
        plain = brain_of(checkpoint, [*overrides, *sampler, "lookup=none"])
        checkpoint = plain.checkpoint
        quick = brain_of(checkpoint, [*overrides, *sampler, "lookup=ngram"])
        for subject in tqdm([s for s in subjects if s.overrides == sampler], unit="text"):
            rows.append(compare(subject, plain, quick))
    print(f"{'text':<8} {'plain':>7} {'lookup':>7} {'ratio':>6} {'per read':>9} {'accepted':>12}")
    for row in rows:
        print(
            f"{row['text']:<8} {row['plain_tokens_per_second']:>7.1f} "
            f"{row['lookup_tokens_per_second']:>7.1f} {row['ratio']:>6.2f} "
            f"{row['tokens_per_read']:>9.2f} {row['accepted']:>5} of {row['proposed']}"
        )
    report = {"torch": torch.__version__, "platform": platform.platform(), "overrides": overrides}
    print(json.dumps({**report, "ticks": TICKS, "rounds": ROUNDS, "texts": rows}))


if __name__ == "__main__":
    main()
