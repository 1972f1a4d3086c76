"""Policies to be compared: by name, with settings of their own where wanted.

``novelty`` is the policy as it comes, whatever ``cull`` says, but for ``cull.chunk``, by which all
of them read; ``novelty:novelty.share=0.5,recent=64`` is the same with keys under ``cull`` changed;
``full`` forgets nothing and is the ceiling.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

from brain.auto import plainest
from brain.brain import Brain
from brain.checkpoints import Checkpoint
from brain.config.compose import compose_conf
from brain.config.settings import roomy, settings_of
from brain.errors import Refused
from compiled.llama import LlamaConfig
from conf.schema import Conf, CullConf, Positions

FULL = "full"


@dataclass(frozen=True)
class Contestant:
    """A policy under test."""

    label: str

    def conf(self, conf: Conf, budget: int, length: int) -> Conf:
        """The configuration under which it reads ``length`` tokens in ``budget`` rows. Raises
        Refused, naming what is wrong.
        """
        name, _, settings = self.label.partition(":")
        changes = [f"cull.{setting}" for setting in settings.split(",") if setting]
        policy = "none" if name == FULL else name
        cull = _composed(f"cull={policy}", f"cull.chunk={conf.cull.chunk}", *changes)
        return dataclasses.replace(
            conf,
            cull=cull if name == FULL else dataclasses.replace(cull, target=budget),
            capacity=length if name == FULL else budget,
            positions=Positions.keep if name == FULL else conf.positions,
            # Chunks are read by no captured graph.
            engine=dataclasses.replace(conf.engine, captured=False),
            repair=dataclasses.replace(conf.repair, every=0),
            lookup=dataclasses.replace(conf.lookup, width=0),
        )

    def open(self, checkpoint: Checkpoint, conf: Conf, budget: int, length: int) -> Brain:
        """A brain that reads so many tokens in so many rows. Raises Refused where that is more
        than there is memory for.
        """
        asked = self.conf(conf, budget, length)
        if asked.cull.chunk > 1 and asked.capacity <= roomy(checkpoint.config):
            # A long text is renumbered between chunks in any case: there is nothing to warn of.
            asked = dataclasses.replace(asked, positions=Positions.rebase)
        settings = settings_of(asked)
        settings.check_against(checkpoint.config)
        return Brain(checkpoint, settings)

    def leaves_range(self, conf: Conf, budget: int, length: int, config: LlamaConfig) -> bool:
        """Whether it reads past the positions that the model was trained on."""
        asked = self.conf(conf, budget, length)
        if length <= config.max_position_embeddings:
            return False
        renumbers = asked.cull.chunk > 1 or asked.positions is Positions.rebase
        return not renumbers or asked.capacity > roomy(config)


@functools.cache
def _composed(*overrides: str) -> CullConf:
    """What forgets, for these overrides. To compose a configuration takes a fifth of a second."""
    return compose_conf(list(overrides)).cull


def contestants(
    labels: Sequence[str], budgets: Sequence[int], conf: Conf, *, full: bool
) -> list[Contestant]:
    """All of them, found good at every budget before anything is measured; with ``full``, that one
    first. Raises Refused.
    """
    if len(set(labels)) != len(labels):
        raise Refused("task.policies names a policy twice")
    for label in labels:
        changed = [setting.partition("=")[0] for setting in label.partition(":")[2].split(",")]
        if "target" in changed:
            raise Refused(f"{label}: task.budgets says how many rows a policy keeps")
    found = [Contestant(label) for label in labels]
    if full and FULL not in labels:
        found.insert(0, Contestant(FULL))
    for contestant in found:
        for budget in budgets:
            asked = settings_of(plainest(contestant.conf(conf, budget, budget)))
            if contestant.label != FULL and not asked.culling.target:
                raise Refused(f"{contestant.label} forgets nothing: here that is called {FULL}")
    return found
