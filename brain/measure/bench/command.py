"""The default command, and llama.cpp's, as somebody at a terminal meets them: timed from the start
of the process to the first character on its standard output, and from there to the last.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brain.config.overrides import TEXT_KEYS
from brain.measure.bench.contestants import key_of, without_engine
from brain.measure.bench.job import Failed, Waiting, check_status, started
from conf.schema import Conf, WeightFormat

LLAMA_CPP_SCRIPT = Path(__file__).with_name("llama_cpp_command.py")


@dataclass(frozen=True)
class Command:
    """A process that speaks."""

    arguments: Sequence[str]
    tokens: int  # that it says
    is_ours: bool  # it writes a run folder, which tells the engine and the number formats


def default_command(conf: Conf, asked: Sequence[str], tokens: int) -> Command:
    """``brain`` with what was asked for, but for engine and number formats: it chooses those."""
    texts = {
        "prompt": conf.prompt,
        "path": conf.model.path,
        "model.path": conf.model.path,
        "model.wheel": conf.model.wheel,
        "cache_dir": conf.cache_dir,
    }
    arguments = []
    for override in without_engine(asked):
        key = key_of(override)  # a text comes quoted here, and is quoted once more there
        arguments.append(f"{key}={texts[key]}" if key in TEXT_KEYS else override)
    return Command(
        [sys.executable, "-m", "brain.app", *arguments, f"ticks={tokens}"], tokens, is_ours=True
    )


def llama_cpp_command(conf: Conf, gguf: Path, tokens: int, threads: int) -> Command:
    """llama.cpp on this file, with the same prompt and as many rows and threads."""
    sizes = [str(number) for number in (tokens, conf.capacity, threads)]
    # -P: the modules beside the script are none of its own.
    arguments = [sys.executable, "-P", str(LLAMA_CPP_SCRIPT), str(gguf), conf.prompt, *sizes]
    return Command(arguments, tokens, is_ours=False)


def time_command(command: Command, waiting: Waiting) -> dict[str, Any]:
    """Seconds to the first character, and tokens per second from then on; for our own command also
    ``engine`` and ``precision``, as its run folder tells them. Raises Failed.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors:
        arguments = [*command.arguments]
        if command.is_ours:
            arguments.append(f"hydra.run.dir={folder}/run")
        moments = []
        start = time.perf_counter()
        with started(arguments, errors.fileno()) as process:
            assert process.stdout is not None
            while os.read(process.stdout.fileno(), 1 << 16):
                moments.append(time.perf_counter())
                waiting()
        errors.seek(0)
        check_status(process.returncode, errors.read())
        if len(moments) < 2:
            raise Failed("it said too little to be timed")
        chosen = _chosen(Path(folder) / "run" / "run.json") if command.is_ours else {}
    return {
        "first_character_seconds": moments[0] - start,
        "tokens_per_second": (command.tokens - 1) / (moments[-1] - moments[0]),
        **chosen,
    }


def _chosen(report: Path) -> dict[str, str]:
    """What a run took: its engine, and the precision that its number formats are."""
    try:
        told = json.loads(report.read_text("utf-8"))
        rounded = told["weights"] != WeightFormat.model.value
        return {"engine": told["engine"], "precision": told["weights" if rounded else "dtype"]}
    except (OSError, ValueError, KeyError):
        raise Failed("it left no report") from None
