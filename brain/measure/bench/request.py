"""What a benchmark is asked to time, and whether it can be timed."""

from collections.abc import Sequence

from brain.auto import plainest
from brain.config.settings import settings_of
from brain.errors import Refused, unknown
from brain.measure.bench.contestants import DEFAULT, ENGINE_KEYS, ENGINES, INT8, PRECISIONS
from brain.measure.bench.job import WARM_UP_TOKENS
from brain.opening import MOST_THREADS
from brain.terminal import note
from conf.schema import BenchTask, Conf, DType, WeightFormat

DECODE, SCALING = "decode", "scaling"
MEASURES = (DECODE, SCALING)


def precisions_of(task: BenchTask, conf: Conf, keys: set[str]) -> list[str]:
    """The precisions to time: ``task.precisions``, or else what ``dtype`` or ``weights`` ask for.

    Args:
        task: the benchmark's settings.
        conf: all settings.
        keys: those that were given on the command line.
    Raises:
        Refused: they cannot be timed together.
    """
    given = [key for key in ("dtype", "weights") if key in keys]
    if task.precisions and given:
        note(f"task.precisions decides what is timed: {given[0]} is ignored")
    if task.precisions:
        return list(task.precisions)
    if conf.weights is WeightFormat.int8:
        if "dtype" in given and conf.dtype is not DType.bfloat16:
            raise Refused(
                f"weights=int8 is timed with dtype=bfloat16 here, not {conf.dtype.value}: leave "
                "out dtype"
            )
        return [INT8]
    if "dtype" in given:
        return [conf.dtype.value]
    return ["float32", "bfloat16", *([] if given else [INT8])]


def check(task: BenchTask, conf: Conf, precisions: Sequence[str], keys: set[str]) -> None:
    """Raises Refused for what cannot be timed, and says what is asked for and ignored."""
    known = {
        "measures": (task.measures, MEASURES),
        "engines": (task.engines, (DEFAULT, *ENGINES)),
        "scaling_engines": (task.scaling_engines, ENGINES),
        "precisions": (precisions, PRECISIONS),
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
