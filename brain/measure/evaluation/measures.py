"""The four measures: each prints a table, draws a picture and writes down what it has so far."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from brain.brain import Brain
from brain.checkpoints import Checkpoint
from brain.config.settings import settings_of
from brain.errors import Refused
from brain.machine.progress import progress_bar
from brain.measure.evaluation import endurance, fluency, mending, plots, retrieval
from brain.measure.evaluation.contestants import FULL, Contestant
from brain.measure.evaluation.facts import Fact, Kind, make_facts
from brain.measure.evaluation.texts import excerpts
from brain.terminal import note
from compiled.score import MOST_CULLED
from conf.schema import Conf, EvalTask

MENDING_TICKS = 32
"""Ticks before a pair is looked at: what brightness needs to tell rows apart."""

MEASURES = ("fluency", "retrieval", "repair", "endurance")

Planting = tuple[list[list[Fact]], dict[int, retrieval.Course]]
"""The facts of every stream, and the course of every budget."""


def plant(checkpoint: Checkpoint, task: EvalTask, kinds: Sequence[Kind], seed: int) -> Planting:
    """Chooses the facts of every stream, and where they go at every budget."""
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


def check_length(task: EvalTask, planting: Planting, length: int, where: str) -> None:
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


def warn_of_positions(checkpoint: Checkpoint, task: EvalTask, planting: Planting) -> None:
    """Warns where texts are longer than the positions that the model was trained on."""
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


def measure_fluency(
    checkpoint: Checkpoint,
    policies: Sequence[Contestant],
    task: EvalTask,
    ids: Sequence[int],
    where: str,
    run_dir: Path,
) -> list[dict[str, Any]]:
    """Nats per token of every policy and budget, on one text. Returns the rows of the table."""
    budgets = sorted(set(task.budgets))
    longest = budgets[-1] + task.tokens + 1
    # Every budget scores the same tokens: the last ones of the same excerpts.
    texts = excerpts(ids, task.streams, longest, where)
    entries = [(policy, budget) for budget in budgets for policy in _with_full(policies, task)]
    total = sum(task.streams * (budget + task.tokens) for _, budget in entries)
    results = []
    with progress_bar("fluency", total, "token") as bar:
        for policy, budget in entries:
            bar.set_postfix_str(f"{policy.label} {budget}")
            part = texts[:, longest - (budget + task.tokens + 1) :]
            results.append(fluency.measure(checkpoint, policy, budget, part, bar.update))
            write(fluency.table(results), run_dir / "fluency.json")
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


def measure_retrieval(
    checkpoint: Checkpoint,
    policies: Sequence[Contestant],
    task: EvalTask,
    ids: Sequence[int],
    where: str,
    planting: Planting,
    run_dir: Path,
) -> list[dict[str, Any]]:
    """Share of planted facts still answered, by distance. Returns the rows of the table."""
    facts, courses = planting
    longest = max(course.length for course in courses.values())
    texts = excerpts(ids, task.streams, longest, where)
    entries = [(policy, budget) for budget in courses for policy in _with_full(policies, task)]
    total = sum(task.streams * (courses[budget].length - 2) for _, budget in entries)
    results = []
    with progress_bar("retrieval", total, "token") as bar:
        for policy, budget in entries:
            bar.set_postfix_str(f"{policy.label} {budget}")
            course = courses[budget]
            planted = retrieval.planted(texts, facts, course)
            results.append(
                retrieval.measure(checkpoint, policy, budget, planted, facts, course, bar.update)
            )
            write(retrieval.table(results), run_dir / "retrieval.json")
    rows = retrieval.table(results)
    trials = task.streams * task.facts
    print(f"\nretrieval: share of {trials} facts whose answer ranks first of ten, ± standard error")
    distances = "".join(f"{distance:>13g}×" for distance in task.distances)
    print(f"{'policy':<34} {'rows':>5} {distances} {'nats/token':>11}")
    for policy, budget in entries:
        cells = [r for r in rows if (r["policy"], r["budget"]) == (policy.label, budget)]
        by_distance = {cell["distance"]: cell for cell in cells}
        asked = [by_distance[retrieval.tokens_of(distance, budget)] for distance in task.distances]
        shares = "".join(f"{c['recall']:>7.2f} ± {c['standard_error']:.2f}" for c in asked)
        print(f"{policy.label:<34} {budget:>5} {shares} {cells[0]['nll']:>11.4f}")
    plots.plot_recall(rows, run_dir / "retrieval.png")
    return rows


def measure_repair(
    checkpoint: Checkpoint, conf: Conf, task: EvalTask, ids: Sequence[int], where: str
) -> list[dict[str, Any]]:
    """Nats per token after repairing a pair, against dropping. Returns the rows of the table."""
    rows = []
    budgets = sorted(set(task.budgets))
    print(f"\nrepair: nats per token over the next {task.horizon}, repairing against dropping")
    print(f"{'rows':>5} {'pairs':>6} {'repaired':>9} {'difference':>20} {'better in':>10}")
    with progress_bar("repair", task.pairs * len(budgets), "pair") as bar:
        for budget in budgets:
            ticks = min(MENDING_TICKS, budget - 1)
            cull = dataclasses.replace(conf.cull, target=budget)
            capacity = budget + MOST_CULLED
            settings = settings_of(dataclasses.replace(conf, cull=cull, capacity=capacity))
            mended, dropped = (Brain(checkpoint, settings) for _ in range(2))
            texts = excerpts(ids, task.pairs, budget + task.horizon, where)
            row = mending.measure(mended, dropped, texts, ticks, task.horizon, bar.update)
            rows.append({"budget": budget, **row})
            difference = "" if row["difference"] is None else f"{row['difference']:+.4f}"
            error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.4f}"
            better = "" if row["better"] is None else f"{row['better']:.0%}"
            counts = f"{budget:>5} {row['pairs']:>6} {row['repaired']:>9}"
            bar.write(f"{counts} {difference + error:>20} {better:>10}")
    return rows


def measure_endurance(
    brain: Brain, conf: Conf, task: EvalTask, run_dir: Path
) -> list[dict[str, Any]]:
    """Nats, variety, speed and memory over a long run. Returns the rows of the table."""
    rows = []
    print(f"\nendurance: {conf.ticks} ticks, cull={conf.cull.policy}, {brain.capacity} slots")
    print(f"{'ticks':>8} {'nats/token':>10} {'distinct':>9} {'ticks/s':>8} {'MB':>8} {'rows':>6}")
    with progress_bar("endurance", conf.ticks, "tick") as bar:
        for row in endurance.endure(brain, conf.ticks, task.bucket):
            bar.update(row["ticks"] - bar.n)
            rows.append(row)
            write(rows, run_dir / "endurance.json")
            bar.write(
                f"{row['ticks']:>8} {row['nll']:>10.4f} {row['distinct']:>9.3f} "
                f"{row['ticks_per_second']:>8.1f} {row['resident_mb']:>8.1f} {row['rows']:>6}"
            )
    plots.plot_endurance(rows, run_dir / "endurance.png")
    return rows


def write(results: Any, path: Path) -> None:
    """Writes JSON. After every part of a measure, so that a run that is cut short keeps them."""
    path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


def _with_full(policies: Sequence[Contestant], task: EvalTask) -> list[Contestant]:
    full = Contestant(FULL)
    return [*([full] if task.full and full not in policies else []), *policies]
