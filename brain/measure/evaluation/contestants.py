"""Policies to be compared: by name, with settings of their own where wanted.

``novelty`` is the policy as it comes, whatever ``cull`` says;
``novelty:novelty.share=0.5,recent=64`` is the same with keys under ``cull`` changed; ``full``
forgets nothing and is the ceiling.
"""

from dataclasses import dataclass

from brain.config.compose import compose_conf
from brain.config.settings import eviction_of
from brain.errors import Refused
from compiled.choose import Eviction

FULL = "full"
FLOOR = "sink_recent"
"""What every policy is compared with."""


@dataclass(frozen=True)
class Contestant:
    """A policy under test."""

    label: str

    def eviction(self, budget: int) -> Eviction:
        """Constants and keep-score at a budget of rows. Raises Refused, naming what is wrong."""
        if self.label == FULL:
            return eviction_of(compose_conf(["cull=none"]).cull, budget)
        name, _, settings = self.label.partition(":")
        changes = [f"cull.{setting}" for setting in settings.split(",") if setting]
        conf = compose_conf([f"cull={name}", f"cull.target={budget}", *changes])
        return eviction_of(conf.cull, budget)


def contestants(labels: list[str], budgets: list[int]) -> list[Contestant]:
    """All of them, found good at every budget before anything is measured. Raises Refused."""
    if len(set(labels)) != len(labels):
        raise Refused("task.policies names a policy twice")
    found = [Contestant(label) for label in labels]
    for contestant in found:
        for budget in budgets:
            contestant.eviction(budget)
    return found
