"""``task=eval``: how well each policy remembers, on any text.

Writes ``eval.json`` and a picture for each measure into the run folder; prints the tables.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from brain.brain import Brain
from brain.checkpoints import Checkpoint
from brain.config.settings import FEWEST_ROWS_TO_CULL, settings_of
from brain.errors import Refused
from brain.measure.evaluation import endurance, fluency, mending, plots, retrieval
from brain.measure.evaluation.contestants import FULL, Contestant, contestants
from brain.measure.evaluation.facts import KINDS, Fact, Kind, make_facts
from brain.measure.evaluation.texts import excerpts, read_text
from brain.opening import checkpoint_of, use_threads
from brain.terminal import capture_graphs, note
from compiled.score import MOST_CULLED
from conf.schema import Conf, EvalTask, Positions

MENDING_TICKS = 32
"""Ticks before a pair is looked at: what brightness needs to tell rows apart."""

MOST = 1 << 24
"""Of anything that is counted: larger numbers are mistakes that would take hours to show."""

MEASURES = ("fluency", "retrieval", "repair", "endurance")


Planting = tuple[list[list[Fact]], dict[int, retrieval.Course]]
"""The facts of every stream, and the course of every budget."""


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
    settings = settings_of(conf)
    note(f"loading {conf.model.name} …")
    checkpoint = checkpoint_of(conf, settings)
    brain: Brain | None = None
    if "endurance" in task.measures:
        brain = Brain(checkpoint, settings, conf)
        capture_graphs(brain.graphs)
        brain.prime(conf.prompt, conf.source)
    report: dict[str, Any] = {
        "model": checkpoint.name,
        "model_sha256": checkpoint.sha256,
        "torch": torch.__version__,
        "device": str(settings.device),
        "dtype": conf.dtype.value,
        "weights": conf.weights.value,
        "threads": torch.get_num_threads(),
        "seed": conf.seed,
        "task": dataclasses.asdict(task),
        "cull": dataclasses.asdict(conf.cull),  # of repair and endurance
        "repair": dataclasses.asdict(conf.repair),
    }
    if text is not None:
        ids = checkpoint.tokenizer.encode(text, special=False)
        where = str(task.text)
        planting = _planting(checkpoint, task, kinds, conf.seed)
        _check_length(task, planting, len(ids), where)
        _check_positions(checkpoint, task, planting)
        if "fluency" in task.measures:
            report["fluency"] = _fluency(checkpoint, policies, task, ids, where, run_dir)
        if "retrieval" in task.measures:
            report["retrieval"] = _retrieval(
                checkpoint, policies, task, ids, where, planting, run_dir
            )
        if "repair" in task.measures:
            report["repair"] = _repair(checkpoint, conf, task, ids, where)
    if brain is not None:
        report["endurance"] = _endurance(brain, conf, task, run_dir)
    _write(report, run_dir / "eval.json")
    note(f"results and pictures in {run_dir}")


def _write(report: Any, path: Path) -> None:
    """Also after every part of a measure: a long evaluation that is cut short keeps what it has."""
    path.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


def _check(task: EvalTask, conf: Conf) -> None:
    for measure in task.measures:
        if measure not in MEASURES:
            raise Refused(f"task.measures: {measure!r} is unknown; use {', '.join(MEASURES)}")
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
            raise Refused(f"task.kinds: {name!r} is unknown; use {', '.join(known)}")
    return [known[name] for name in names] or list(KINDS)


def _planting(checkpoint: Checkpoint, task: EvalTask, kinds: Sequence[Kind], seed: int) -> Planting:
    facts: list[list[Fact]] = []
    for stream in range(task.streams):
        first = stream * task.facts % len(kinds)  # so that all kinds come equally often
        turned = [*kinds[first:], *kinds[:first]]
        facts.append(make_facts(checkpoint.tokenizer, task.facts, turned, f"{seed}/{stream}"))
    courses = {
        budget: retrieval.lay_course(facts, budget, task.distances, task.spacing)
        for budget in sorted(set(task.budgets))
    }
    return facts, courses


def _check_length(task: EvalTask, planting: Planting, length: int, where: str) -> None:
    """Raises Refused if the text is too short for any of the measures."""
    longest = max(task.budgets)
    needed = {
        "fluency": longest + task.tokens + 1,
        "retrieval": max(course.length for course in planting[1].values()),
        "repair": longest + task.horizon,
    }
    for measure in task.measures:
        if length < needed.get(measure, 0):
            raise Refused(
                f"{where} has {length} tokens, but {measure} needs {needed[measure]}: give a "
                "longer text, or lower task.budgets, task.tokens or task.distances"
            )


def _check_positions(checkpoint: Checkpoint, task: EvalTask, planting: Planting) -> None:
    """Says so where texts are read past the positions that the model was trained on."""
    trained = checkpoint.config.max_position_embeddings
    lengths = {
        "fluency": max(task.budgets) + task.tokens,
        "retrieval": max(course.length for course in planting[1].values()),
    }
    for measure, length in lengths.items():
        if measure in task.measures and length > trained:
            note(
                f"warning: {measure} reads {length} positions, but {checkpoint.name} was trained "
                f"on {trained}: expect nats to rise there, whatever the policy"
            )


def _fluency(
    checkpoint: Checkpoint,
    policies: Sequence[Contestant],
    task: EvalTask,
    ids: Sequence[int],
    where: str,
    run_dir: Path,
) -> list[dict[str, Any]]:
    budgets = sorted(set(task.budgets))
    longest = budgets[-1] + task.tokens + 1
    # Every budget scores the same tokens: the last ones of the same excerpts.
    texts = excerpts(ids, task.streams, longest, where)
    entries = [(policy, budget) for budget in budgets for policy in _with_full(policies, task)]
    total = sum(task.streams * (budget + task.tokens) for _, budget in entries)
    results = []
    with tqdm(total=total, unit="token", desc="fluency") as bar:
        for policy, budget in entries:
            bar.set_postfix_str(f"{policy.label} {budget}")
            part = texts[:, longest - (budget + task.tokens + 1) :]
            results.append(fluency.measure(checkpoint, policy, budget, part, bar.update))
            _write(fluency.table(results), run_dir / "fluency.json")
    rows = fluency.table(results)
    print(f"\nfluency: {task.streams * task.tokens} tokens read with a full memory")
    print(f"{'policy':<34} {'rows':>5} {'nats/token':>10} {'against sinks and recent':>25}")
    for row in rows:
        against = (
            f"{row['difference']:+.4f} ± {row['standard_error']:.4f}" if "difference" in row else ""
        )
        print(f"{row['policy']:<34} {row['budget']:>5} {row['nll']:>10.4f} {against:>25}")
    plots.plot_fluency(rows, run_dir / "fluency.png")
    return rows


def _retrieval(
    checkpoint: Checkpoint,
    policies: Sequence[Contestant],
    task: EvalTask,
    ids: Sequence[int],
    where: str,
    planting: Planting,
    run_dir: Path,
) -> list[dict[str, Any]]:
    facts, courses = planting
    longest = max(course.length for course in courses.values())
    texts = excerpts(ids, task.streams, longest, where)
    entries = [(policy, budget) for budget in courses for policy in _with_full(policies, task)]
    total = sum(task.streams * (courses[budget].length - 2) for _, budget in entries)
    results = []
    with tqdm(total=total, unit="token", desc="retrieval") as bar:
        for policy, budget in entries:
            bar.set_postfix_str(f"{policy.label} {budget}")
            course = courses[budget]
            planted = retrieval.planted(texts, facts, course)
            results.append(
                retrieval.measure(checkpoint, policy, budget, planted, facts, course, bar.update)
            )
            _write(retrieval.table(results), run_dir / "retrieval.json")
    rows = retrieval.table(results)
    trials = task.streams * task.facts
    print(f"\nretrieval: share of {trials} facts whose answer ranks first of ten, ± standard error")
    distances = "".join(f"{distance:>13g}×" for distance in task.distances)
    print(f"{'policy':<34} {'rows':>5} {distances} {'nats/token':>11}")
    for policy, budget in entries:
        cells = [r for r in rows if (r["policy"], r["budget"]) == (policy.label, budget)]
        told = {cell["distance"]: cell for cell in cells}
        asked = [told[retrieval.tokens_of(distance, budget)] for distance in task.distances]
        shares = "".join(f"{c['recall']:>7.2f} ± {c['standard_error']:.2f}" for c in asked)
        print(f"{policy.label:<34} {budget:>5} {shares} {cells[0]['nll']:>11.4f}")
    plots.plot_recall(rows, run_dir / "retrieval.png")
    return rows


def _repair(
    checkpoint: Checkpoint, conf: Conf, task: EvalTask, ids: Sequence[int], where: str
) -> list[dict[str, Any]]:
    rows = []
    budgets = sorted(set(task.budgets))
    print(f"\nrepair: nats per token over the next {task.horizon}, repairing against dropping")
    print(f"{'rows':>5} {'pairs':>6} {'repaired':>9} {'difference':>20} {'better in':>10}")
    with tqdm(total=task.pairs * len(budgets), unit="pair", desc="repair") as bar:
        for budget in budgets:
            ticks = min(MENDING_TICKS, budget - 1)
            cull = dataclasses.replace(conf.cull, target=budget)
            capacity = budget + MOST_CULLED
            settings = settings_of(dataclasses.replace(conf, cull=cull, capacity=capacity))
            mended, dropped = (Brain(checkpoint, settings, conf) for _ in range(2))
            texts = excerpts(ids, task.pairs, budget + task.horizon, where)
            row = mending.measure(mended, dropped, texts, ticks, task.horizon, bar.update)
            rows.append({"budget": budget, **row})
            told = "" if row["difference"] is None else f"{row['difference']:+.4f}"
            error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.4f}"
            better = "" if row["better"] is None else f"{row['better']:.0%}"
            counts = f"{budget:>5} {row['pairs']:>6} {row['repaired']:>9}"
            tqdm.write(f"{counts} {told + error:>20} {better:>10}")
    return rows


def _endurance(brain: Brain, conf: Conf, task: EvalTask, run_dir: Path) -> list[dict[str, Any]]:
    rows = []
    print(f"\nendurance: {conf.ticks} ticks, cull={conf.cull.policy}, {brain.capacity} slots")
    print(f"{'ticks':>8} {'nats/token':>10} {'distinct':>9} {'ticks/s':>8} {'MB':>8} {'rows':>6}")
    with tqdm(total=conf.ticks, unit="tick", desc="endurance") as bar:
        for row in endurance.endure(brain, conf.ticks, task.bucket):
            bar.update(row["ticks"] - bar.n)
            rows.append(row)
            _write(rows, run_dir / "endurance.json")
            tqdm.write(
                f"{row['ticks']:>8} {row['nll']:>10.4f} {row['distinct']:>9.3f} "
                f"{row['ticks_per_second']:>8.1f} {row['resident_mb']:>8.1f} {row['rows']:>6}"
            )
    plots.plot_endurance(rows, run_dir / "endurance.png")
    return rows


def _with_full(policies: Sequence[Contestant], task: EvalTask) -> list[Contestant]:
    full = Contestant(FULL)
    return [*([full] if task.full and full not in policies else []), *policies]
