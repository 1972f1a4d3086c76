"""Retrieval: is a fact still known after so many other tokens?

Facts are planted in a text at even distances, and each is asked for at every distance: asking is a
read, so one stream serves all of them and no question changes what is remembered.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from brain.checkpoints import Checkpoint
from brain.measure.evaluation.contestants import Contestant
from brain.measure.evaluation.facts import DISTRACTORS, Fact
from brain.measure.evaluation.streams import Progress, Streams

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
    distance: int
    rank: int  # of the right answer among all options, 0 is best
    log_likelihood: float  # of the right answer, nats
    margin: float  # to the best distractor, nats


@dataclass(frozen=True)
class Recall:
    """One policy at one budget."""

    policy: str
    budget: int
    answers: tuple[Answer, ...]
    nll: float  # per token of the streams, from the first fact on


def measure(
    checkpoint: Checkpoint,
    contestant: Contestant,
    budget: int,
    texts: Tensor,
    facts: Sequence[Sequence[Fact]],
    course: Course,
    progress: Progress,
) -> Recall:
    """Feeds the planted ``texts`` [streams, course.length] and asks as the course says."""
    streams = Streams(checkpoint, contestant.eviction(budget), texts)
    answers = []
    streams.feed_until(course.starts[0] - 1, progress)
    nats = []
    for index, number, distance in course.questions():
        nats.append(streams.feed_until(index, progress))
        asked = [stream[number] for stream in facts]
        told = streams.ask([fact.question for fact in asked])
        answers += [_answer(fact, row, distance) for fact, row in zip(asked, told, strict=True)]
    nll = float(torch.cat(nats, 1).double().mean())
    return Recall(contestant.label, budget, tuple(answers), nll)


def _answer(fact: Fact, log_probabilities: Tensor, distance: int) -> Answer:
    scores = log_probabilities[list(fact.options)]
    right, wrong = float(scores[0]), scores[1:]
    return Answer(
        fact.kind, distance, int((wrong >= right).sum()), right, right - float(wrong.max())
    )


def table(results: Sequence[Recall]) -> list[dict[str, Any]]:
    """A row for each policy, budget and distance, over all kinds and for each of them."""
    rows = []
    for result in results:
        for distance in sorted({answer.distance for answer in result.answers}):
            answers = [answer for answer in result.answers if answer.distance == distance]
            share, error = hit_rate(answers)
            kinds = {answer.kind for answer in answers}
            rows.append(
                {
                    "policy": result.policy,
                    "budget": result.budget,
                    "distance": distance,
                    "trials": len(answers),
                    "recall": share,
                    "standard_error": error,
                    "log_likelihood": _mean([answer.log_likelihood for answer in answers]),
                    "margin": _mean([answer.margin for answer in answers]),
                    "nll": result.nll,
                    "recall_by_kind": {
                        kind: hit_rate([a for a in answers if a.kind == kind])[0]
                        for kind in sorted(kinds)
                    },
                }
            )
    return rows


def hit_rate(answers: Sequence[Answer]) -> tuple[float, float]:
    """Share of facts whose right answer ranks first, and its standard error."""
    share = _mean([float(answer.rank == 0) for answer in answers])
    return share, math.sqrt(max(share * (1 - share), 0.0) / len(answers))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
