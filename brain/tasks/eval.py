"""``task=eval``: how well each policy remembers, on any text.

Writes ``eval.json`` and a picture for each measure into the run folder; prints the tables.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from brain.auto import resolved
from brain.brain import Brain
from brain.config.settings import FEWEST_ROWS_TO_CULL, settings_of
from brain.errors import Refused, unknown
from brain.machine.environment import environment
from brain.measure.evaluation import retrieval
from brain.measure.evaluation.contestants import contestants
from brain.measure.evaluation.facts import KINDS, Kind
from brain.measure.evaluation.measures import (
    MEASURES,
    check_length,
    measure_endurance,
    measure_fluency,
    measure_repair,
    measure_retrieval,
    plant,
    warn_of_positions,
    write,
)
from brain.measure.evaluation.texts import read_text
from brain.opening import checkpoint_of, use_threads
from brain.terminal import capture_graphs, note
from conf.schema import Conf, EvalTask, Positions

MOST = 1 << 24
"""Of anything that is counted. A larger number is a mistake that would show only after hours."""


def run(conf: Conf, run_dir: Path) -> None:
    """Measures what ``task.measures`` names. Raises Refused before anything long begins."""
    task = cast(EvalTask, conf.task)
    _check(task, conf)
    use_threads(conf.threads)
    policies = contestants(task.policies, task.budgets)
    kinds = _kinds(task.kinds)
    text = read_text(Path(task.text)) if task.text is not None else None
    if text is None and set(task.measures) - {"endurance"}:
        raise Refused("task.text is missing: give a UTF-8 file or a folder of them to measure on")
    note(f"loading {conf.model.name} …")
    conf = resolved(conf).conf
    settings = settings_of(conf)
    checkpoint = checkpoint_of(conf, settings)
    brain: Brain | None = None
    if "endurance" in task.measures:
        brain = Brain(checkpoint, settings)
        capture_graphs(brain.graphs)
        brain.prime(conf.prompt, conf.source)
    here = environment(settings.device)
    report: dict[str, Any] = {
        "model": checkpoint.name,
        "model_sha256": checkpoint.sha256,
        "torch": here["torch"],
        "device": here["device"],
        "dtype": conf.dtype.value,
        "weights": conf.weights.value,
        "threads": here["threads"],
        "seed": conf.seed,
        "task": dataclasses.asdict(task),
        "cull": dataclasses.asdict(conf.cull),  # of repair and endurance
        "repair": dataclasses.asdict(conf.repair),
    }
    if text is not None:
        ids = checkpoint.tokenizer.encode(text, special=False)
        where = str(task.text)
        planting = plant(checkpoint, task, kinds, conf.seed)
        check_length(task, planting, len(ids), where)
        warn_of_positions(checkpoint, task, planting)
        if "fluency" in task.measures:
            report["fluency"] = measure_fluency(checkpoint, policies, task, ids, where, run_dir)
        if "retrieval" in task.measures:
            report["retrieval"] = measure_retrieval(
                checkpoint, policies, task, ids, where, planting, run_dir
            )
        if "repair" in task.measures:
            report["repair"] = measure_repair(checkpoint, conf, task, ids, where)
    if brain is not None:
        report["endurance"] = measure_endurance(brain, conf, task, run_dir)
    write(report, run_dir / "eval.json")
    note(f"results and pictures in {run_dir}")


def _check(task: EvalTask, conf: Conf) -> None:
    for measure in task.measures:
        if measure not in MEASURES:
            raise unknown("task.measures", measure, MEASURES)
    if not task.measures:
        raise Refused(f"task.measures is empty: use {', '.join(MEASURES)}")
    if not task.policies or not task.budgets:
        raise Refused("task.policies and task.budgets must not be empty")
    for name in ("streams", "tokens", "facts", "bucket", "pairs", "horizon"):
        if not 1 <= getattr(task, name) <= MOST:
            raise Refused(f"task.{name} must be 1 to {MOST}, not {getattr(task, name)}")
    if task.streams * max(task.budgets) > MOST:
        raise Refused(f"task.streams times task.budgets must be at most {MOST} rows")
    if min(task.budgets) < FEWEST_ROWS_TO_CULL:
        raise Refused(f"task.budgets must be {FEWEST_ROWS_TO_CULL} rows or more")
    if not task.distances or not all(0 < d < math.inf for d in task.distances):
        raise Refused("task.distances must be above 0, in budgets, like [0.5,1,2]")
    if retrieval.tokens_of(min(task.distances), min(task.budgets)) < 1:
        raise Refused(
            f"task.distances: {min(task.distances):g} of {min(task.budgets)} rows is not one token"
        )
    if not 0 < task.spacing < math.inf:
        raise Refused(f"task.spacing must be above 0, not {task.spacing}")
    if "endurance" in task.measures and conf.ticks < 1:
        raise Refused(f"ticks must be at least 1, not {conf.ticks}")
    if "endurance" in task.measures and conf.cull.policy == "none":
        raise Refused(
            "task.measures=endurance needs a memory that forgets: use another than cull=none"
        )
    side_by_side = {"fluency", "retrieval"} & set(task.measures)
    if side_by_side and conf.positions is Positions.rebase:
        raise Refused(
            f"positions=rebase does not apply to task.measures={min(side_by_side)}, whose texts "
            "keep their positions: leave positions=keep"
        )
    if "repair" in task.measures and conf.cull.policy in ("none", "tova"):
        raise Refused(
            "task.measures=repair needs keep-scores between two ticks, which "
            f"cull={conf.cull.policy} lacks: use another"
        )


def _kinds(names: Sequence[str]) -> list[Kind]:
    known = {kind.name: kind for kind in KINDS}
    for name in names:
        if name not in known:
            raise unknown("task.kinds", name, known)
    return [known[name] for name in names] or list(KINDS)
