"""What an evaluation is asked to measure, with every size chosen, and whether it makes sense."""

from dataclasses import dataclass

from brain.config.settings import FEWEST_ROWS_TO_CULL
from brain.errors import Refused, unknown
from brain.measure.evaluation.facts import KINDS, Kind
from brain.measure.evaluation.retrieval import tokens_of
from conf.schema import Conf, EvalTask

FLUENCY, RETRIEVAL, REPAIR, ENDURANCE = "fluency", "retrieval", "repair", "endurance"
MEASURES = (FLUENCY, RETRIEVAL, REPAIR, ENDURANCE)

MOST = 1 << 24
"""Of anything that is counted. A larger number is a mistake that would show only after hours."""


@dataclass(frozen=True)
class Sizes:
    """What decides how long an evaluation takes. The keys of ``task`` that may be null."""

    policies: tuple[str, ...]
    streams: int
    tokens: int
    distances: tuple[float, ...]  # budgets
    spacing: float  # budgets
    facts: int
    pairs: int


THOROUGH = Sizes(
    policies=(
        *("sink_recent", "novelty", "brightness", "surprise"),
        *("h2o", "tova", "keydiff", "random"),
    ),
    streams=16,
    tokens=512,
    distances=(0.5, 1.0, 2.0, 4.0, 8.0),
    spacing=4.0,
    facts=2,
    pairs=48,
)
QUICK = Sizes(
    policies=("sink_recent", "novelty"),
    streams=3,
    tokens=128,
    distances=(1.0, 3.0),
    spacing=1.0,
    facts=3,
    pairs=12,
)
"""Two minutes on two cores for what ``task.measures`` is by default, on SmolLM2-135M."""


@dataclass(frozen=True)
class Request:
    """``conf.schema.EvalTask`` in which nothing is left to choose."""

    text: str | None
    measures: tuple[str, ...]
    budgets: tuple[int, ...]  # rows, ascending
    full: bool
    against: str
    kinds: tuple[Kind, ...]
    bucket: int  # ticks
    horizon: int  # tokens
    sizes: Sizes


def request_of(task: EvalTask, conf: Conf) -> Request:
    """Chooses the sizes that are null, and checks everything that needs no model. Raises Refused,
    naming the key.
    """
    usual = QUICK if task.quick else THOROUGH
    sizes = Sizes(
        policies=usual.policies if task.policies is None else tuple(task.policies),
        streams=_or(task.streams, usual.streams),
        tokens=_or(task.tokens, usual.tokens),
        distances=usual.distances if task.distances is None else tuple(task.distances),
        spacing=usual.spacing if task.spacing is None else task.spacing,
        facts=_or(task.facts, usual.facts),
        pairs=_or(task.pairs, usual.pairs),
    )
    request = Request(
        text=task.text,
        measures=tuple(measure for measure in MEASURES if measure in task.measures),
        budgets=tuple(sorted(set(task.budgets))),
        full=task.full,
        against=task.against,
        kinds=_kinds(task.kinds),
        bucket=task.bucket,
        horizon=task.horizon,
        sizes=sizes,
    )
    for measure in task.measures:
        if measure not in MEASURES:
            raise unknown("task.measures", measure, MEASURES)
    _check(request)
    _check_beside(request, conf)
    return request


def _or(given: int | None, usual: int) -> int:
    return usual if given is None else given


def _kinds(names: list[str]) -> tuple[Kind, ...]:
    known = {kind.name: kind for kind in KINDS}
    for name in names:
        if name not in known:
            raise unknown("task.kinds", name, known)
    return tuple(known[name] for name in names) or KINDS


def _check(request: Request) -> None:
    sizes, budgets = request.sizes, request.budgets
    if not request.measures:
        raise Refused(f"task.measures is empty: use {', '.join(MEASURES)}")
    if not sizes.policies or not budgets:
        raise Refused("task.policies and task.budgets must not be empty")
    counts = {
        "streams": sizes.streams,
        "tokens": sizes.tokens,
        "facts": sizes.facts,
        "pairs": sizes.pairs,
        "bucket": request.bucket,
        "horizon": request.horizon,
    }
    for name, count in counts.items():
        if not 1 <= count <= MOST:
            raise Refused(f"task.{name} must be 1 to {MOST}, not {count}")
    if sizes.streams * budgets[-1] > MOST:
        raise Refused(f"task.streams times task.budgets must be at most {MOST} rows")
    if budgets[0] < FEWEST_ROWS_TO_CULL:
        raise Refused(f"task.budgets must be {FEWEST_ROWS_TO_CULL} rows or more")
    if not sizes.distances or not all(0 < d <= MOST for d in sizes.distances):
        raise Refused(f"task.distances must be above 0 to {MOST}, in budgets, like [0.5,1,2]")
    if tokens_of(min(sizes.distances), budgets[0]) < 1:
        raise Refused(
            f"task.distances: {min(sizes.distances):g} of {budgets[0]} rows is not one token"
        )
    if not 0 < sizes.spacing <= MOST:
        raise Refused(f"task.spacing must be above 0 to {MOST}, not {sizes.spacing}")


def _check_beside(request: Request, conf: Conf) -> None:
    """What other settings say to it."""
    policy = conf.cull.policy
    if ENDURANCE in request.measures and conf.ticks < 1:
        raise Refused(f"ticks must be at least 1, not {conf.ticks}")
    if ENDURANCE in request.measures and policy == "none":
        raise Refused(
            "task.measures=endurance needs a memory that forgets: use another than cull=none"
        )
    if REPAIR in request.measures and policy in ("none", "tova"):
        raise Refused(
            "task.measures=repair needs keep-scores between two ticks, which "
            f"cull={policy} lacks: use another"
        )
