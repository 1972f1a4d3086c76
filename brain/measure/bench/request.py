"""What a benchmark is asked to time, and whether it can be timed."""

from pathlib import Path

from brain.auto import PRECISE, plainest
from brain.checkpoints import has_blocks, stored_format
from brain.config.settings import device_of, settings_of
from brain.errors import Refused, unknown
from brain.files import given_path
from brain.measure.bench.contestants import (
    DEFAULT,
    ENGINE_KEYS,
    ENGINES,
    INT8,
    PRECISIONS,
    Precision,
)
from brain.measure.bench.job import WARM_UP_TOKENS
from brain.opening import MOST_THREADS
from brain.terminal import note
from conf.schema import BenchTask, Conf, DType, Source, WeightFormat

DECODE, SCALING = "decode", "scaling"
MEASURES = (DECODE, SCALING)


def precisions_of(task: BenchTask, conf: Conf, keys: set[str]) -> dict[str, Precision]:
    """The precisions to time: ``task.precisions``, or else what ``dtype`` or ``weights`` ask for.
    A GGUF file has the one in which it lies, activations and cache being in ``dtype``.

    Args:
        task: the benchmark's settings.
        conf: all settings.
        keys: those that were given on the command line.
    Raises:
        Refused: they cannot be timed together.
    """
    if conf.model.source is Source.gguf and conf.model.path is not None:
        return _of_file(task, conf, given_path(conf.model.path), keys)
    return {name: PRECISIONS[name] for name in _names(task, conf, keys)}


def _names(task: BenchTask, conf: Conf, keys: set[str]) -> list[str]:
    given = [key for key in ("dtype", "weights") if key in keys]
    if task.precisions and given:
        note(f"task.precisions decides what is timed: {given[0]} is ignored")
    if task.precisions:
        for name in task.precisions:
            if name not in PRECISIONS:
                raise unknown("task.precisions", name, PRECISIONS)
        return list(task.precisions)
    has_dtype = "dtype" in given and conf.dtype is not DType.auto
    if conf.weights is not WeightFormat.model:
        name = conf.weights.value
        if has_dtype and conf.dtype.value != PRECISIONS[name].dtype:
            raise Refused(
                f"weights={name} is timed with dtype={PRECISIONS[name].dtype} here, not "
                f"{conf.dtype.value}: leave out dtype"
            )
        return [name]
    if has_dtype:
        return [conf.dtype.value]
    return ["float32", "bfloat16", *([] if given else [INT8])]


def _of_file(task: BenchTask, conf: Conf, file: Path, keys: set[str]) -> dict[str, Precision]:
    """That of a GGUF file: by default as ``dtype=auto`` has it where bfloat16 is fast."""
    stored = stored_format(conf.model, None)
    if task.precisions or conf.weights is not WeightFormat.model:
        key = "task.precisions" if task.precisions else "weights"
        raise Refused(f"{file} is timed as it lies, in {stored}: leave out {key}")
    dtype = conf.dtype
    if "dtype" not in keys or dtype is DType.auto:
        multiplied = has_blocks(conf.model, conf.cache_dir) and device_of(conf.device).type == "cpu"
        dtype = DType.float32 if multiplied or stored in PRECISE else DType.bfloat16
    formats = Precision((f"dtype={dtype.value}",), dtype.value, 0, stored, file=file)
    return {stored: formats}


def check(task: BenchTask, conf: Conf, keys: set[str]) -> None:
    """Raises Refused for what cannot be timed, and says what is asked for and ignored."""
    known = {
        "measures": (task.measures, MEASURES),
        "engines": (task.engines, (DEFAULT, *ENGINES)),
        "scaling_engines": (task.scaling_engines, ENGINES),
    }
    for key, (chosen, possible) in known.items():
        for name in chosen:
            if name not in possible:
                raise unknown(f"task.{key}", name, possible)
        if not chosen:
            raise Refused(f"task.{key} is empty: use {', '.join(possible)}")
    for name in ("context", "prefill", "tokens", "command_tokens", "repeats", "rows"):
        if getattr(task, name) < 1:
            raise Refused(f"task.{name} must be at least 1, not {getattr(task, name)}")
    if conf.threads is not None and not 1 <= conf.threads <= MOST_THREADS:
        raise Refused(f"threads must be 1 to {MOST_THREADS}, not {conf.threads}")
    _check_rows(task, conf)
    settings_of(plainest(conf))
    _check_ignored(conf, keys)


def _check_rows(task: BenchTask, conf: Conf) -> None:
    """Raises Refused where rows would not fit, or would be forgotten during the measurement."""
    decoded = task.tokens + WARM_UP_TOKENS
    needed = max(task.prefill, task.context + decoded)
    if DECODE in task.measures and needed > conf.capacity:
        raise Refused(f"this benchmark needs capacity={needed} or more, not {conf.capacity}")
    if SCALING in task.measures:
        if not task.capacities or not task.counts or min(task.counts) < 1:
            raise Refused("task.capacities and task.counts must hold numbers of at least 1")
        if min(task.capacities) < task.rows + decoded:
            raise Refused(f"task.capacities must be {task.rows + decoded} or more for task.rows")
        if max(task.counts) + decoded > max(task.capacities):
            most = max(task.capacities) - decoded
            raise Refused(f"task.counts must be {most} or less in a capacity of that size")
    if conf.cull.policy != "none" and conf.cull.target is not None:
        _check_target(task, conf.cull.target)


def _check_target(task: BenchTask, target: int) -> None:
    """Raises Refused where the target exceeds a capacity, or is below the rows to be timed."""
    scales = SCALING in task.measures
    if scales and target > min(task.capacities):
        raise Refused(
            f"cull.target={target} is more than the smallest of task.capacities, "
            f"{min(task.capacities)}: leave it out, for it to be the capacity"
        )
    decode = [task.context] if DECODE in task.measures else []
    held = max([*decode, *([task.rows, *task.counts] if scales else [])])
    needed = held + task.tokens + WARM_UP_TOKENS
    if target < needed:
        raise Refused(
            f"this benchmark needs cull.target={needed} or more, not {target}, so that none of "
            f"{held} rows is forgotten; or leave it out, for it to be the capacity"
        )


def _check_ignored(conf: Conf, keys: set[str]) -> None:
    """Says what is asked for and ignored; raises Refused where that would mislead."""
    if keys.intersection(ENGINE_KEYS):
        note("task=bench times the engines of task.engines: engine is ignored")
    if conf.lookup.width:
        raise Refused("a token of task=bench is a plain tick: use lookup=none")
