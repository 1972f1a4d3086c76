"""Checking goldens against an engine: which brain each of them needs, and the table of outcomes."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from brain.brain import Brain
from brain.checkpoints import Checkpoint, open_checkpoint
from brain.config.settings import settings_of
from brain.errors import Refused
from brain.machine.progress import progress_bar
from brain.measure.golden.files import Golden, load_golden
from brain.measure.golden.judge import Verdict, judge
from brain.measure.golden.replay import replay
from brain.measure.golden.seeded import SEEDED
from conf.schema import Conf


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One golden, run once."""

    name: str
    widths: tuple[int, ...]
    verdict: Verdict

    @property
    def title(self) -> str:
        """Name and widths of reads."""
        return f"{self.name} T={','.join(map(str, self.widths))}"

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {"name": self.name, "widths": list(self.widths)} | self.verdict.to_json()


def check(conf: Conf, folder: Path, names: Sequence[str]) -> Iterator[Outcome]:
    """Runs every golden: in eager mode once for each of its widths, compiled with the configured
    ones. A bar on standard error shows which.
    """
    brains = Brains(conf)
    runs = [
        (golden, widths)
        for golden in [load_golden(folder, name) for name in names]
        for widths in (
            [tuple(conf.engine.widths)] if conf.engine.captured else golden.memory.widths
        )
    ]
    with progress_bar("checking goldens", len(runs), "run", leave=False) as bar:
        for golden, widths in runs:
            bar.set_postfix_str(golden.name)
            yield Outcome(golden.name, widths, examine(golden, brains.brain(golden, widths)))
            bar.update()


def examine(golden: Golden, brain: Brain) -> Verdict:
    """Runs a golden's script with a brain and judges what came of it."""
    dtype = brain.state.keys.dtype
    name = str(dtype).removeprefix("torch.")
    noise = None if dtype == torch.float32 else golden.noise.get(name)
    if noise is None and dtype != torch.float32:
        raise Refused(f"{golden.name}: the reference's noise in {name} is missing; write it again")
    if golden.expected.full_logits.shape[1] != brain.checkpoint.config.vocab_size:
        raise Refused(f"{golden.name}: its vocabulary is not that of {brain.checkpoint.name}")
    observed, expected = replay(brain, golden.script), golden.expected
    made, kept = (
        (len(observed.rows), len(observed.tokens)),
        (len(expected.top_ids), len(expected.surprises)),
    )
    if made != kept:
        raise Refused(
            f"{golden.name}: its script gives {made[0]} rows and {made[1]} surprises, but "
            f"{kept[0]} and {kept[1]} are stored; write it again"
        )
    return judge(expected, observed, noise, brain.decode)


class Brains:
    """Brains for goldens, made when first needed; goldens that can share one do."""

    def __init__(self, conf: Conf) -> None:
        self.conf = conf
        self._settings = settings_of(conf)
        self._checkpoints: dict[str, Checkpoint] = {}
        self._brains: dict[tuple[Any, ...], Brain] = {}

    def brain(self, golden: Golden, widths: tuple[int, ...]) -> Brain:
        """A brain of the golden's model with the memory that its script needs.

        Raises Refused if the golden was made with another model.
        """
        memory = golden.memory
        checkpoint = self._checkpoint(golden)
        key = (checkpoint.name, memory.capacity, memory.smallest_bucket, widths)
        if key not in self._brains:
            conf = dataclasses.replace(
                self.conf,
                engine=dataclasses.replace(
                    self.conf.engine,
                    widths=list(widths),
                    smallest_bucket=memory.smallest_bucket,
                    chunk=self.conf.engine.chunk if self.conf.engine.captured else None,
                ),
                capacity=memory.capacity,
                cull=dataclasses.replace(self.conf.cull, policy="none", target=None),
            )
            self._brains[key] = Brain(checkpoint, settings_of(conf))
        return self._brains[key]

    def _checkpoint(self, golden: Golden) -> Checkpoint:
        seeded = golden.model in SEEDED
        name = golden.model if seeded else ""
        if name not in self._checkpoints:
            self._checkpoints[name] = self._open(name)
        found = self._checkpoints[name]
        if found.sha256 != golden.model_sha256:
            raise Refused(
                f"{golden.name}: made with {golden.model} (SHA-256 {golden.model_sha256[:12]}…), "
                f"but this is {found.name} ({found.sha256[:12]}…): "
                + ("write it again" if seeded else "choose that model, or write it again")
            )
        return found

    def _open(self, seeded: str) -> Checkpoint:
        device, dtype = self._settings.device, self._settings.dtype
        if seeded:
            # The largest takes gigabytes: none of the others is kept beside it.
            for other in [name for name in self._checkpoints if name]:
                del self._checkpoints[other]
                self._brains = {k: v for k, v in self._brains.items() if k[0] != other}
            return SEEDED[seeded].checkpoint(dtype, device)
        return open_checkpoint(self.conf.model, self.conf.cache_dir, dtype, device)


def table(outcomes: Sequence[Outcome]) -> str:
    """One line for each outcome; below float32 the reference's own noise beside the KL."""
    width = max(len(outcome.title) for outcome in outcomes)
    lines = [
        f"{'golden':<{width}} {'rows':>5} {'tokens':>6} {'max|Δ|':>8} {'max|Δnll|':>9} "
        f"{'KL':>8} {'ref. KL':>8} {'greedy':>9}"
    ]
    for outcome in outcomes:
        v = outcome.verdict
        noise = f"{v.noise.kl:.1e}" if v.noise else "-"
        greedy = "-" if v.noise else f"{v.agreeing}/{v.clear}"
        lines.append(
            f"{outcome.title:<{width}} {v.rows:>5} {v.tokens:>6} {v.distance.logit:8.1e} "
            f"{v.distance.surprise:9.1e} {v.distance.kl:8.1e} {noise:>8} {greedy:>9} "
            f"{'FAILED' if v.failure else 'ok'}"
        )
    return "\n".join(lines)
