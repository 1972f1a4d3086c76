"""Command lines: the program itself, called in this process with arguments of every kind."""

import contextlib
import io
import json
import logging
import os
import sys
import warnings
from random import Random

from hydra.core.global_hydra import GlobalHydra

from brain import app
from brain.errors import Refused
from fuzzing.blind import damaged
from fuzzing.jsons import NUMBERS, TEXTS
from fuzzing.lines import damaged_line
from fuzzing.targets import Case

KEYS = (
    *("ticks", "seed", "capacity", "threads", "save_every", "capture_top", "prompt", "source"),
    *(
        "positions",
        "dtype",
        "device",
        "stop_at_eos",
        "special",
        "capture",
        "model",
        "engine",
        "sampler",
        "cull",
    ),
    *("repair", "task", "sampler.temperature", "sampler.top_k", "sampler.top_p"),
    *(
        "sampler.min_p",
        "sampler.repetition_penalty",
        "cull.target",
        "cull.sinks",
        "cull.recent",
        "cull.recent_share",
    ),
    *("cull.policy", "cull.brightness.decay", "cull.brightness.gain", "cull.brightness.maximum"),
    *("cull.brightness.seeds", "cull.novelty.decay", "cull.novelty.share", "cull.at_once"),
    *("engine.widths", "engine.smallest_bucket", "engine.chunk", "repair.every"),
    *("repair.candidates", "repair.least_gain", "model.path", "model.source", "model.name"),
    *(
        "cache_dir",
        "task.path",
        "task.tick",
        "task.top",
        "task.text",
        "task.folder",
        "task.actions",
    ),
    *("task.cases", "task.budgets", "task.measures", "task.policies", "hydra.run.dir", "nvtx"),
)
CHOICES = (
    *("greedy", "none", "brightness", "h2o", "tova", "keydiff", "surprise", "random", "pairs"),
    *(
        "rebase",
        "bfloat16",
        "float16",
        "cpu",
        "cuda",
        "cuda:99",
        "auto",
        "folder",
        "default",
        "meta",
    ),
    *(
        "run",
        "inspect",
        "command",
        "graphs",
        "golden",
        "eval",
        "system",
        "tool",
        "[]",
        "[1]",
        "[1,4]",
    ),
    *("[4,1]", "[1,-2]", "[1,99999999999]", "{}", "{a:1}", "{user:nan}", "[", "{", "'", '"', "a,b"),
    *(
        "range(3)",
        "choice(1,2)",
        "sort(3,1)",
        "int(x)",
        "${oc.env:HOME}",
        "${seed}",
        "???",
        "1e999",
    ),
)
SHAPES = ("{0}", "{0}", "{0}", "+{0}", "++{0}", "~{0}", "{0}={0}", "={0}", "--{0}", "{0}@x")
FLAGS = (
    *(
        "-m",
        "--multirun",
        "--help",
        "--cfg",
        "--cfg=job",
        "--info",
        "--resolve",
        "--package=x",
        "-h",
    ),
    *(
        "--config-dir=/dev/zero",
        "--config-name=../x",
        "--config-path=/etc",
        "--hydra-help",
        "-c",
        "--",
    ),
    *(
        "--shell-completion",
        "--version",
        "-x",
        "",
        "=",
        "@",
        "\t",
        "a=b=c",
        "~task",
        "+task.name=x",
    ),
)
PATHS = ("task.path", "task.folder", "task.text", "model.path", "cache_dir", "hydra.run.dir")
LARGEST = 1 << 19
"""Rows of a memory that this machine would rather not make for every case."""


def command_line(case: Case) -> None:
    """One call of the program. Whatever is given, it leaves with 0 or with 2 and one line."""
    rng = case.rng
    given = [
        "model=folder",
        f"model.path={case.specimens.single}",
        f"hydra.run.dir={case.folder}/out",
        "device=cpu",
        "ticks=1",
        "capacity=24",
        "cull.recent=4",
        "prompt=he said",
        "threads=1",
    ]
    given += [_argument(case, rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    if any(part in argument for argument in given for part in ("--multirun", "-m", "sweep")):
        given = [*given, f"hydra.sweep.dir={case.folder}/out"]
    told = run(given)
    if told is not None:
        refused = [line for line in told.splitlines() if line.startswith("refused:")]
        argparse = "usage: brain" in told or "error:" in told
        assert len(refused) == 1 or argparse, f"not one line: {told[-300:]!r}"
        assert "Traceback" not in told, told[-300:]
        raise Refused(refused[0] if refused else "usage")


def run(arguments: list[str]) -> str | None:
    """Standard error of a refused call, None of one that was not. Raises whatever else came."""
    out, err = (
        io.TextIOWrapper(io.BytesIO(), "utf-8"),
        io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace"),
    )
    held = (sys.argv, warnings.showwarning, dict(os.environ), os.getcwd())
    GlobalHydra.instance().clear()
    os.environ["HF_HUB_OFFLINE"] = "1"  # a name may be that of a repository
    try:
        sys.argv = ["brain", *arguments]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            app.main()
    except SystemExit as leaving:
        err.flush()
        told = err.buffer.getvalue().decode()
        if leaving.code == app.REFUSED:
            return str(told)
        if leaving.code not in (None, app.DONE):
            raise AssertionError(f"left with {leaving.code}: {told[-300:]!r}") from None
    finally:
        logging.getLogger().handlers.clear()
        sys.argv, warnings.showwarning = held[0], held[1]
        os.environ.clear()
        os.environ.update(held[2])
        os.chdir(held[3])
    return None


def _argument(case: Case, rng: Random) -> str:
    if rng.random() < 0.1:
        return rng.choice(FLAGS)
    key = rng.choice(KEYS)
    kinds = (NUMBERS, TEXTS, CHOICES, CHOICES, ("PATH",))
    value = rng.choice(rng.choice(kinds))
    match key:
        case "task.actions" if rng.random() < 0.7:
            value = damaged_line(rng).decode("utf-8", "surrogateescape")
        case (
            "task.path" | "task.folder" | "task.text" | "model.path" | "cache_dir" | "hydra.run.dir"
        ):
            value = _path(case, rng)
        case "capacity" if isinstance(value, (int, float)) and LARGEST < value < 2**31:
            value = LARGEST
        case "ticks" if value in NUMBERS and isinstance(value, (int, float)) and value > 3:
            value = 3  # they would be done, one after the other
        case "model" if rng.random() < 0.5:
            value = rng.choice((_path(case, rng), str(rng.choice(case.specimens.ggufs))))
        case "model" if value in ("smollm2", "tinyllama"):
            value = "folder"
    told = json.dumps(value) if isinstance(value, (int, float)) else str(value)
    argument = rng.choice(SHAPES if rng.random() < 0.1 else ("{0}",)).format(key) + "=" + told
    if rng.random() < 0.1:
        damaged_one = damaged(argument.encode("utf-8", "surrogatepass"), rng)
        argument = os.fsdecode(damaged_one)
    return argument.replace("\0", "")  # which no system passes on


def _path(case: Case, rng: Random) -> str:
    specimens = case.specimens
    fifo = case.folder / "fifo"
    if not fifo.exists():
        os.mkfifo(fifo)
    inner = (specimens.run, specimens.save, specimens.golden, specimens.single, specimens.record)
    known = (
        *map(str, inner),
        str(fifo),
        "/dev/null",
        "/dev/zero",
        "/dev/null/x",
        "/proc",
        "/",
        "~",
    )
    copied = case.folder / "copied"
    if not copied.exists():
        case.specimens.copy(specimens.record, copied)
    return rng.choice((*known, str(copied), str(copied), *TEXTS))
