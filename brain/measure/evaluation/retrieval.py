"""Retrieval: is a fact still known after so many other tokens?

Facts are planted in a text at even distances, and each is asked for at every distance: asking is a
read, so one stream serves all of them and no question changes what is remembered.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from brain.brain import Brain
from brain.measure.evaluation.facts import DISTRACTORS, Fact
from brain.measure.evaluation.paired import difference, standard_error
from brain.measure.evaluation.reading import Progress, begin, feed, logits_behind, numbers

CHANCE = 1 / (DISTRACTORS + 1)


@dataclass(frozen=True)
class Course:
    """When facts are planted and asked for: the same for every stream. In tokens.

    A fact occupies the ``room`` tokens from its start on, with text behind it where it is shorter;
    distances count from the end of that room.
    """

    starts: tuple[int, ...]
    room: int
    distances: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of a stream."""
        return self.starts[-1] + self.room + self.distances[-1] + 1

    def questions(self) -> list[tuple[int, int, int]]:
        """Index of the token after which to ask, number of the fact, distance: in order."""
        return sorted(
            (start + self.room + distance - 1, number, distance)
            for number, start in enumerate(self.starts)
            for distance in self.distances
        )


def lay_course(
    facts: Sequence[Sequence[Fact]], budget: int, distances: Sequence[float], spacing: float
) -> Course:
    """The first fact comes when the memory is full; others follow every ``spacing`` budgets."""
    room = max(len(fact.statement) for stream in facts for fact in stream)
    every = max(room + 1, round(spacing * budget))
    starts = tuple(budget + number * every for number in range(len(facts[0])))
    tokens = sorted({tokens_of(distance, budget) for distance in distances})
    return Course(starts, room, tuple(tokens))


def tokens_of(distance: float, budget: int) -> int:
    """A distance, told in budgets, in tokens."""
    return round(distance * budget)


def planted(texts: Tensor, facts: Sequence[Sequence[Fact]], course: Course) -> Tensor:
    """The texts with their facts in place: [streams, course.length] int64."""
    rows = []
    for text, stream_facts in zip(texts.tolist(), facts, strict=True):
        row: list[int] = []
        unused = iter(text)
        for start, fact in zip(course.starts, stream_facts, strict=True):
            row += itertools.islice(unused, start - len(row))
            row += fact.statement
        row += itertools.islice(unused, course.length - len(row))
        rows.append(row)
    return torch.tensor(rows)


@dataclass(frozen=True)
class Answer:
    """What became of one fact at one distance."""

    kind: str
    number: int  # of the fact in its stream
    distance: int
    rank: int  # of the right answer among all options, 0 is best
    log_likelihood: float  # of the right answer, nats
    margin: float  # to the best distractor, nats


@dataclass(frozen=True)
class Lived:
    """What one stream came to."""

    answers: tuple[Answer, ...]
    nats: tuple[float, ...]  # of each token from the first fact on

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"answers": [asdict(answer) for answer in self.answers], "nats": list(self.nats)}

    @staticmethod
    def of(plain: dict[str, Any]) -> "Lived":
        """From what ``plain`` has made. Raises LookupError, TypeError or ValueError for something
        else.
        """
        answers = [
            Answer(
                str(one["kind"]),
                *(int(one[name]) for name in ("number", "distance", "rank")),
                *(float(one[name]) for name in ("log_likelihood", "margin")),
            )
            for one in plain["answers"]
        ]
        return Lived(tuple(answers), tuple(numbers(plain["nats"])))


@dataclass(frozen=True)
class Recall:
    """One policy at one budget."""

    policy: str
    budget: int
    streams: tuple[Lived, ...]

    def answers(self, distance: int) -> list[list[Answer]]:
        """Those at a distance, stream by stream."""
        return [[a for a in lived.answers if a.distance == distance] for lived in self.streams]


def measure(
    brain: Brain, text: Sequence[int], facts: Sequence[Fact], course: Course, progress: Progress
) -> Lived:
    """Reads a text with its facts in place, and asks as the course says."""
    begin(brain, text)
    feed(brain, text[1 : course.starts[0]], progress)
    at, nats, answers = course.starts[0], list[float](), list[Answer]()
    for index, number, distance in course.questions():
        nats += feed(brain, text[at : index + 1], progress)
        at = index + 1
        fact = facts[number]
        logits = logits_behind(brain, fact.question)[-1]
        answers.append(_answer(fact, torch.log_softmax(logits, -1).cpu(), number, distance))
    return Lived(tuple(answers), tuple(nats))


def _answer(fact: Fact, log_probabilities: Tensor, number: int, distance: int) -> Answer:
    scores = log_probabilities[list(fact.options)]
    right, wrong = float(scores[0]), scores[1:]
    rank = int((wrong >= right).sum())
    return Answer(fact.kind, number, distance, rank, right, right - float(wrong.max()))


def table(results: Sequence[Recall], against: str) -> list[dict[str, Any]]:
    """A row for each policy, budget and distance, over all kinds and for each of them."""
    others = {result.budget: result for result in results if result.policy == against}
    rows = []
    for result in results:
        nats = [lived.nats for lived in result.streams]
        other = others.get(result.budget)
        compared: dict[str, Any] = {}
        if other is not None:
            apart = difference(nats, [lived.nats for lived in other.streams])
            compared = {"nll_difference": apart.mean, "nll_standard_error": apart.error}
        for distance in sorted({a.distance for lived in result.streams for a in lived.answers}):
            found = result.answers(distance)
            answers = [answer for stream in found for answer in stream]
            kinds = {answer.kind for answer in answers}
            row: dict[str, Any] = {
                "policy": result.policy,
                "budget": result.budget,
                "distance": distance,
                "trials": len(answers),
                "recall": hit_rate(answers),
                "standard_error": _share_error(answers) if len(found) > 1 else None,
                "log_likelihood": fmean(answer.log_likelihood for answer in answers),
                "margin": fmean(answer.margin for answer in answers),
                "nll": fmean(one for stream in nats for one in stream),
                "recall_by_kind": {
                    kind: hit_rate([a for a in answers if a.kind == kind]) for kind in sorted(kinds)
                },
            }
            if other is not None:
                theirs = [answer for stream in other.answers(distance) for answer in stream]
                hits = [
                    float(a.rank == 0) - float(b.rank == 0)
                    for a, b in zip(answers, theirs, strict=True)
                ]
                row["difference"] = fmean(hits)
                row["difference_error"] = standard_error(hits) if len(found) > 1 else None
            rows.append(row | compared)
    return rows


def over_distances(ours: Recall, theirs: Recall) -> tuple[float, float | None]:
    """Difference in the share of facts found, over all distances, and its standard error: of one
    fact the answers at several distances are alike.
    """
    apart = [
        fmean(a - b for a, b in zip(one, other, strict=True))
        for one, other in zip(_hits_by_fact(ours), _hits_by_fact(theirs), strict=True)
    ]
    return fmean(apart), standard_error(apart) if len(ours.streams) > 1 else None


def _hits_by_fact(recall: Recall) -> list[list[float]]:
    return [
        [float(a.rank == 0) for a in lived.answers if a.number == number]
        for lived in recall.streams
        for number in sorted({answer.number for answer in lived.answers})
    ]


def hit_rate(answers: Sequence[Answer]) -> float:
    """Share of answers that rank first."""
    return fmean(float(answer.rank == 0) for answer in answers)


def _share_error(answers: Sequence[Answer]) -> float:
    """Standard error of a share: that of a binomial."""
    share = hit_rate(answers)
    return float((share * (1 - share) / len(answers)) ** 0.5)
