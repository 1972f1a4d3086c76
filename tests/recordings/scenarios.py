"""What is played: some thirty short runs of the command line and of the Python API."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from session import THREADS, Session, Settings, arguments

PROMPT = (
    "The lighthouse keeper had not spoken to anyone for eleven years. Every morning he climbed the "
    "two hundred and nine steps, trimmed the wick, polished the brass and wrote the weather into a "
    "book that nobody read. The supply boat came on the first of the month, left flour, oil and "
    "letters for a man who had died before he came, and went away again. One evening in October, "
    "when the fog lay so thick that the lamp lit nothing but itself, he heard a knock at the door. "
    "He put down his pen and listened. It came again, slowly,"
)
"""Some 120 tokens, nearly as many as fit."""
VERSES = "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily. " * 3
SHORT = "The sea was calm"
ENDING = "<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\n"
"""A prompt whose answer is short."""

SPEAKING: Settings = {"threads": THREADS, "capacity": 128, "prompt": PROMPT, "ticks": 40}
COMPILED: Settings = {"engine": "compiled", "dtype": "bfloat16"}
LOOKUP: Settings = {
    "lookup": "ngram",
    "sampler": "greedy",
    "prompt": VERSES,
    "capacity": 256,
    "ticks": 100,
}
TOY: Settings = {
    "model": "folder",
    "path": "toy",
    "prompt": "The sea was calm, and nobody had seen a sail since Easter.",
    "ticks": 100,
}
REBASING: Settings = {**TOY, "positions": "rebase", "ticks": 250}

REFUSED: Mapping[str, Sequence[str]] = {
    "no_rows": ["capacity=0"],
    "no_ticks": ["ticks=0"],
    "no_prompt": ["prompt="],
    "unknown_key": ["capaciti=128"],
    "unknown_choice": ["cull=nothing_like_it"],
    "word_for_number": ["ticks=many"],
    "long_prompt": ["capacity=8"],
    "cold": ["sampler.temperature=0"],
    "no_folder": ["model=folder", "path=nowhere"],
    "unknown_device": ["device=abacus"],
    "too_wide": ["lookup=ngram", "lookup.width=99"],
    "large_target": ["capacity=64", "cull.target=65"],
    "nobody_there": ["task=command", "task.path=nowhere", 'task.actions=[{"do":"pin"}]'],
    "nothing_to_inspect": ["task=inspect", "task.path=nowhere"],
}
"""Command lines that end with exit code 2."""


@dataclass(frozen=True)
class Scenario:
    """Something that is played, and how its folder is continued, if it is.

    ``seconds`` is about how long it takes, to say how much time is left.
    """

    name: str
    seconds: float
    play: Callable[[Session], None]
    go_on: Callable[[Session], None] | None = None


def _one_run(name: str, seconds: float, *settings: Settings, more: int = 0) -> Scenario:
    """A single run, which is continued with so many ``more`` ticks."""
    together: dict[str, object] = dict(SPEAKING)
    for given in settings:
        together |= given
    longer = together | {"ticks": int(str(together["ticks"])) + more}
    return Scenario(
        name,
        seconds + (6 if more else 0),
        lambda session: session.brain(together),
        (lambda session: session.brain(longer)) if more else None,
    )


def _api(name: str, seconds: float, model: str, engine: str) -> Scenario:
    """Every call of the Python API, and what goes on from the saves that it made."""
    return Scenario(
        name,
        seconds,
        lambda session: session.api("edits", model, engine),
        lambda session: session.api("reopened", engine),
    )


def _longer(session: Session) -> None:
    """A run that has ended and is given more ticks, twice; the last time there is nothing to do."""
    for ticks in (10, 25, 25):
        session.brain({**SPEAKING, "ticks": ticks})


def _killed(session: Session) -> None:
    """A run that is killed and goes on, beside one that was left alone."""
    settings = {**SPEAKING, "ticks": 48, "save_every": 20}
    session.brain(settings, "whole")
    session.killed(settings, "killed", tokens=27)
    session.brain(settings, "killed", heard=False)
    differing = []
    for name in ("transcript.txt", "tokens.txt", "memory.json", "repairs.jsonl"):
        both = [session.out / session.folder / run / name for run in ("whole", "killed")]
        if both[0].read_bytes() != both[1].read_bytes():
            differing.append(name)
    session.note("killed_or_not", f"differing: {', '.join(differing) or 'nothing'}")


def _commands(session: Session) -> None:
    """A run that ends, is told something, and goes on: three times. What has been told is obeyed
    before the next token, so the tick is certain.
    """
    settings = {**SPEAKING, "save_every": 16}
    session.brain({**settings, "ticks": 10})
    session.tell('[{"do":"pin","positions":[5,6]},{"do":"boost","positions":[20],"amount":12.5}]')
    session.append('[{"do": "cull", "positions": [30, 31]}]')
    session.append('[{"do": "pin", "positions": [99999]}]')
    session.append("this is no JSON")
    session.brain({**settings, "ticks": 22})
    session.tell('[{"do":"inject","text":" It was raining — hard.","source":"tool"}]')
    session.append('{"do": "replace", "positions": [100, 101], "text": " fox"}')
    session.append('[{"do": "pin", "positions": [5], "pinned": false}]')
    session.brain({**settings, "ticks": 34})
    session.append('[{"do": "redact", "positions": [104, 128]}]')
    session.brain({**settings, "ticks": 44})


def _commands_further(session: Session) -> None:
    session.append('[{"do": "inject", "ids": [28, 260], "source": "user"}]')
    session.brain({**SPEAKING, "save_every": 16, "ticks": 56})


def _captures(session: Session) -> None:
    """What every step received and returned, and how it is shown."""
    settings = {**SPEAKING, "prompt": SHORT, "ticks": 4, "capture": "true"}
    session.brain(settings, "some")
    session.brain({**settings, "ticks": 2, "capture_top": 0, **COMPILED}, "all")
    looking = {"task": "inspect", "task.path": f"{session.folder}/some"}
    session.brain({**looking, "task.tick": 3, "task.top": 5}, "inspected_tick")
    session.brain(looking, "inspected_end")


def _many(session: Session) -> None:
    """A multirun."""
    folder = f"{session.folder}/sweep"
    settings = {**SPEAKING, "prompt": SHORT, "ticks": 12, "seed": "1,2"}
    session.command("-m", *arguments(settings), f"hydra.sweep.dir={folder}")


def _manual(session: Session) -> None:
    """What the program says about itself, and the whole configuration with its defaults."""
    session.command("--help")
    session.command("--cfg", "job")


def _measured(session: Session) -> None:
    """Every measure of the evaluation, on a text of our own. What endurance prints, with its times,
    is not kept.
    """
    told: Settings = {
        "task": "eval",
        "model": "folder",
        "path": "toy",
        "threads": THREADS,
        "capacity": 32,
        "prompt": SHORT,
        "ticks": 60,
        "task.text": "toy/text.txt",
        "task.policies": "[novelty,h2o]",
        "task.budgets": "[32]",
        "task.streams": 2,
        "task.tokens": 32,
        "task.distances": "[0.5,1]",
        "task.bucket": 20,
        "task.pairs": 4,
        "task.horizon": 8,
    }
    session.brain({**told, "task.measures": "[fluency,retrieval,repair]"})
    session.brain({**told, "task.measures": "[endurance]"}, "endurance", heard=False)


def _graphs(session: Session) -> None:
    """The account of the graphs, those of ``api_compiled``."""
    told = {"task": "graphs", "engine": "compiled", "model": "folder", "path": "toy"}
    session.brain({**told, "threads": THREADS, "capacity": 128, "positions": "rebase"})


def _refusals(session: Session) -> None:
    for bad in REFUSED.values():
        session.refused(bad)


def scenarios() -> list[Scenario]:
    """Everything that is played, in order. Those that compile alike stand together."""
    policies = ("brightness", "surprise", "sink_recent", "h2o", "tova", "keydiff", "random")
    int8 = {"weights": "int8"}
    return [
        _one_run("eager_float32", 12, more=12),
        _one_run("eager_bfloat16", 12, {"dtype": "bfloat16"}, more=12),
        _one_run("eager_int8", 12, int8),
        *(_one_run(f"cull_{policy}", 9, {"cull": policy}) for policy in policies),
        _one_run("cull_none", 7, {"cull": "none"}),
        _one_run("cull_at_once", 7, {"cull.at_once": "true", "cull.target": 90, "ticks": 20}),
        _one_run("lookup", 14, LOOKUP, more=12),
        _one_run("repair", 14, {"repair": "pairs", "repair.every": 12}, more=26),
        _one_run("chunked", 7, {"engine.chunk": 16, "ticks": 16}),
        _one_run("ends", 6, {"prompt": ENDING, "sampler": "greedy", "stop_at_eos": "true"}),
        Scenario("longer", 20, _longer),
        Scenario("killed", 24, _killed),
        Scenario("commands", 40, _commands, _commands_further),
        Scenario("many", 10, _many),
        _one_run("rebase", 5, REBASING, more=80),
        _api("api", 30, "smollm2", "eager"),
        _one_run("compiled_bfloat16", 30, COMPILED, more=12),
        _one_run("compiled_float32", 20, {"engine": "compiled"}, more=12),
        _one_run("compiled_int8", 20, COMPILED, int8),
        _one_run("compiled_not_native", 20, COMPILED, TOY, {"engine.native": "false"}),
        Scenario("captures", 25, _captures),
        _one_run("compiled_lookup", 60, COMPILED, LOOKUP, more=12),
        _one_run("compiled_rebase", 30, REBASING, {"engine": "compiled"}, more=80),
        _api("api_compiled", 60, "toy", "compiled"),
        Scenario("api_policies", 40, lambda s: s.api("policies", "toy", "compiled")),
        Scenario("graphs", 20, _graphs),
        Scenario("evaluation", 20, _measured),
        Scenario("manual", 6, _manual),
        Scenario("refusals", 45, _refusals),
    ]
