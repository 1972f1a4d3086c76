"""The four measures: each prints a table, draws a picture and writes down what it has so far."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brain.brain import Brain
from brain.checkpoints import Checkpoint
from brain.config.settings import settings_of
from brain.errors import Refused
from brain.machine.progress import progress_bar
from brain.measure.evaluation import endurance, fluency, mending, plots, retrieval
from brain.measure.evaluation.contestants import FULL, Contestant
from brain.measure.evaluation.facts import Fact, make_facts
from brain.measure.evaluation.fluency import Fluency
from brain.measure.evaluation.mending import Mended
from brain.measure.evaluation.parts import Key, Made, Parts
from brain.measure.evaluation.reading import Progress, numbers
from brain.measure.evaluation.request import FLUENCY, REPAIR, RETRIEVAL, Request
from brain.measure.evaluation.retrieval import Course, Lived, Recall
from brain.measure.evaluation.texts import excerpts
from brain.terminal import note
from compiled.score import MOST_CULLED
from conf.schema import Conf

MENDING_TICKS = 32
"""Ticks before a pair is looked at: what brightness needs to tell rows apart."""

Planting = tuple[list[list[Fact]], dict[int, Course]]
"""The facts of every stream, and the course of every budget."""


@dataclass(frozen=True)
class Subject:
    """What is measured on, and where results go."""

    checkpoint: Checkpoint
    conf: Conf  # with nothing left to choose
    request: Request
    policies: Sequence[Contestant]
    ids: Sequence[int]  # of the text
    planting: Planting
    parts: Parts
    folder: Path

    @property
    def text(self) -> str:
        """Where the text is from."""
        return str(self.request.text)

    def lengths(self) -> dict[str, int]:
        """Tokens of one text at most, by measure."""
        longest, request = self.request.budgets[-1], self.request
        lengths = {
            FLUENCY: longest + request.sizes.tokens + 1,
            RETRIEVAL: max(course.length for course in self.planting[1].values()),
            REPAIR: longest + request.horizon,
        }
        return {name: length for name, length in lengths.items() if name in request.measures}

    def check(self) -> None:
        """Raises Refused if the text is too short for any of the measures, or a memory too large;
        warns where texts leave the positions that the model was trained on.
        """
        trained = self.checkpoint.config.max_position_embeddings
        for measure, length in self.lengths().items():
            if len(self.ids) < length:
                raise Refused(
                    f"{self.text} has {len(self.ids)} tokens, but {measure} needs {length}: give a "
                    "longer text, or lower task.budgets, task.tokens or task.distances"
                )
            if measure == REPAIR:
                continue
            leaving = []
            for policy in self.policies:
                for budget in self.request.budgets:
                    asked = settings_of(policy.conf(self.conf, budget, length))
                    asked.check_against(self.checkpoint.config)
                    if policy.leaves_range(self.conf, budget, length, self.checkpoint.config):
                        leaving.append(policy.label)
            if leaving:
                note(
                    f"warning: {measure} reads {length} positions, but {self.checkpoint.name} was "
                    f"trained on {trained}: expect the nats of {', '.join(dict.fromkeys(leaving))} "
                    "to rise there"
                )

    def entries(self) -> list[tuple[Contestant, int]]:
        """Every policy at every budget."""
        return [(policy, budget) for budget in self.request.budgets for policy in self.policies]

    def streams(
        self,
        measure: str,
        lengths: dict[int, int],
        one: Callable[[Brain, int, int, Progress], Any],
        parse: Callable[[Any], Made],
    ) -> Iterator[tuple[Contestant, int, list[Made]]]:
        """What every policy makes of every text: all texts of one policy and budget at a time.

        Args:
            measure: What is measured.
            lengths: Tokens of a text, by budget.
            one: Measures with a brain, at a budget, the text of this number; as JSON has it.
            parse: From JSON to what is wanted.
        """
        count = self.request.sizes.streams
        total = sum(count * (lengths[budget] - 1) for _, budget in self.entries())
        with progress_bar(measure, total, "token") as bar:
            for policy, budget in self.entries():
                bar.set_postfix_str(f"{policy.label} {budget}")
                brain: Brain | None = None
                meant = digest_of(policy.conf(self.conf, budget, budget))
                keys = [(measure, policy.label, meant, budget, stream) for stream in range(count)]
                for stream, key in enumerate(keys):
                    if key in self.parts:
                        bar.total -= lengths[budget] - 1  # or the time left would be wrong
                        continue
                    if brain is None:
                        brain = policy.open(self.checkpoint, self.conf, budget, lengths[budget])
                    self.parts.keep(key, one(brain, budget, stream, bar.update))
                yield policy, budget, [self.parts.read(key, parse) for key in keys]


def digest_of(conf: Conf) -> str:
    """Of all that says how it forgets and repairs, the source of a policy included."""
    plain = {"cull": dataclasses.asdict(conf.cull), "repair": dataclasses.asdict(conf.repair)}
    source = settings_of(conf).policy_sha256
    return hashlib.sha256(json.dumps([plain, source]).encode()).hexdigest()[:16]


def plant(checkpoint: Checkpoint, request: Request, seed: int) -> Planting:
    """Chooses the facts of every stream, and where they go at every budget."""
    facts: list[list[Fact]] = []
    sizes, kinds = request.sizes, request.kinds
    for stream in range(sizes.streams):
        first = stream * sizes.facts % len(kinds)  # so that all kinds come equally often
        turned = [*kinds[first:], *kinds[:first]]
        facts.append(make_facts(checkpoint.tokenizer, sizes.facts, turned, f"{seed}/{stream}"))
    courses = {
        budget: retrieval.lay_course(facts, budget, sizes.distances, sizes.spacing)
        for budget in request.budgets
    }
    return facts, courses


def measure_fluency(subject: Subject) -> list[dict[str, Any]]:
    """Nats per token of every policy and budget, on one text. Returns the rows of the table."""
    sizes, against = subject.request.sizes, subject.request.against
    longest = subject.lengths()[FLUENCY]
    # Every budget scores the same tokens: the last ones of the same excerpts.
    texts = excerpts(subject.ids, sizes.streams, longest, subject.text).tolist()
    lengths = {budget: budget + sizes.tokens + 1 for budget in subject.request.budgets}

    def one(brain: Brain, budget: int, stream: int, progress: Progress) -> list[float]:
        return fluency.measure(brain, budget, texts[stream][-lengths[budget] :], progress)

    results = []
    for policy, budget, nats in subject.streams(FLUENCY, lengths, one, numbers):
        results.append(Fluency(policy.label, budget, nats))
        write(fluency.table(results, against), subject.folder / "fluency.json")
    rows = fluency.table(results, against)
    print(f"\nfluency: {sizes.streams * sizes.tokens} tokens read with a full memory")
    print(f"{'policy':<34} {'rows':>5} {'nats/token':>10} {f'against {against}':>25}")
    for row in rows:
        cell = plus_minus(row["difference"], row["standard_error"]) if "difference" in row else ""
        print(f"{row['policy']:<34} {_rows(row):>5} {row['nll']:>10.4f} {cell:>25}")
    _explain_full(rows)
    plots.plot_fluency(rows, against, subject.folder / "fluency.png")
    return rows


def measure_retrieval(subject: Subject) -> list[dict[str, Any]]:
    """Share of planted facts still answered, by distance. Returns the rows of the table."""
    (facts, courses), sizes = subject.planting, subject.request.sizes
    against = subject.request.against
    texts = excerpts(subject.ids, sizes.streams, subject.lengths()[RETRIEVAL], subject.text)
    planted = {
        budget: retrieval.planted(texts, facts, course).tolist()
        for budget, course in courses.items()
    }
    lengths = {budget: course.length - 1 for budget, course in courses.items()}

    def one(brain: Brain, budget: int, stream: int, progress: Progress) -> dict[str, Any]:
        text = planted[budget][stream]
        return retrieval.measure(brain, text, facts[stream], courses[budget], progress).plain()

    results = []
    for policy, budget, lived in subject.streams(RETRIEVAL, lengths, one, Lived.of):
        results.append(Recall(policy.label, budget, tuple(lived)))
        write(retrieval.table(results, against), subject.folder / "retrieval.json")
    rows = retrieval.table(results, against)
    trials = sizes.streams * sizes.facts
    print(f"\nretrieval: share of {trials} facts whose answer ranks first of ten, ± standard error")
    distances = "".join(f"{distance:>13g}×" for distance in sizes.distances)
    print(
        f"{'policy':<34} {'rows':>5} {distances} {'nats/token':>10}  against {against}: share, nats"
    )
    others = {result.budget: result for result in results if result.policy == against}
    for result in results:
        cells = [
            row for row in rows if (row["policy"], row["budget"]) == (result.policy, result.budget)
        ]
        by_distance = {cell["distance"]: cell for cell in cells}
        asked = [
            by_distance[retrieval.tokens_of(distance, result.budget)]
            for distance in sizes.distances
        ]
        shares = "".join(f"{_share(cell):>14}" for cell in asked)
        compared = ""
        if result.budget in others:
            share = plus_minus(*retrieval.over_distances(result, others[result.budget]), digits=3)
            nats = plus_minus(cells[0]["nll_difference"], cells[0]["nll_standard_error"])
            compared = f"{share}, {nats}"
        print(
            f"{result.policy:<34} {_rows(cells[0]):>5} {shares} {cells[0]['nll']:>10.4f}  "
            f"{compared}"
        )
    _explain_full(rows)
    plots.plot_recall(rows, subject.folder / "retrieval.png")
    return rows


def measure_repair(subject: Subject) -> list[dict[str, Any]]:
    """Nats per token after repairing a pair, against dropping. Returns the rows of the table."""
    rows = []
    request, count = subject.request, subject.request.sizes.pairs
    meant = digest_of(subject.conf)
    print(f"\nrepair: nats per token over the next {request.horizon}, repairing against dropping")
    print(f"{'rows':>5} {'pairs':>6} {'repaired':>9} {'difference':>20} {'better in':>10}")
    with progress_bar("repair", count * len(request.budgets), "pair") as bar:
        for budget in request.budgets:
            ticks = min(MENDING_TICKS, budget - 1)
            length = budget + request.horizon
            texts = excerpts(subject.ids, count, length, subject.text).tolist()
            brains: list[Brain] = []
            keys: list[Key] = [(REPAIR, meant, budget, number) for number in range(count)]
            for key, text in zip(keys, texts, strict=True):
                if key not in subject.parts:
                    brains = brains or _two_brains(subject, budget)
                    one = mending.compare(brains[0], brains[1], text, ticks, request.horizon)
                    subject.parts.keep(key, None if one is None else dataclasses.asdict(one))
                bar.update(1)
            pairs = [subject.parts.read(key, Mended.of) for key in keys]
            row = mending.table(pairs, request.horizon)
            rows.append({"budget": budget, **row})
            compared = ""
            if row["difference"] is not None:
                compared = plus_minus(row["difference"], row["standard_error"])
            better = "" if row["better"] is None else f"{row['better']:.0%}"
            counts = f"{budget:>5} {row['pairs']:>6} {row['repaired']:>9}"
            bar.write(f"{counts} {compared:>20} {better:>10}")
    return rows


def _two_brains(subject: Subject, budget: int) -> list[Brain]:
    """Two brains that forget and repair as ``cull`` and ``repair`` say."""
    conf = subject.conf
    cull = dataclasses.replace(conf.cull, target=budget, chunk=1)  # lived through tick by tick
    settings = settings_of(dataclasses.replace(conf, cull=cull, capacity=budget + MOST_CULLED))
    return [Brain(subject.checkpoint, settings) for _ in range(2)]


def measure_endurance(
    brain: Brain, conf: Conf, request: Request, run_dir: Path
) -> list[dict[str, Any]]:
    """Nats, variety, speed and memory over a long run. Returns the rows of the table."""
    rows = []
    print(f"\nendurance: {conf.ticks} ticks, cull={conf.cull.policy}, {brain.capacity} slots")
    print(f"{'ticks':>8} {'nats/token':>10} {'distinct':>9} {'ticks/s':>8} {'MB':>8} {'rows':>6}")
    with progress_bar("endurance", conf.ticks, "tick") as bar:
        for row in endurance.endure(brain, conf.ticks, request.bucket):
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


def plus_minus(value: float, error: float | None, digits: int = 4) -> str:
    """A difference and its standard error, which one stream alone does not have."""
    told = "n/a" if error is None else f"{error:.{digits}f}"
    return f"{value:+.{digits}f} ± {told}"


def _share(cell: dict[str, Any]) -> str:
    error = cell["standard_error"]
    return f"{cell['recall']:.2f} ± {'n/a' if error is None else f'{error:.2f}'}"


def _rows(row: dict[str, Any]) -> str:
    return "all" if row["policy"] == FULL else str(row["budget"])


def _explain_full(rows: Sequence[dict[str, Any]]) -> None:
    if any(row["policy"] == FULL for row in rows):
        print(f"{FULL}: a memory that holds the whole text and forgets nothing")
