"""The engines of this program. A step is a whole tick: read, choose, decide, patch."""

import dataclasses

import torch
from torch import Tensor

from brain.config.compose import compose_conf
from brain.measure.bench.job import Job
from brain.opening import open_brain


class Ours:
    """A brain, as the configuration of the job has it."""

    def __init__(self, job: Job) -> None:
        conf = compose_conf(job.overrides)
        engine = conf.engine
        if job.smallest_bucket is not None:
            engine = dataclasses.replace(engine, smallest_bucket=job.smallest_bucket)
        self.brain = open_brain(
            dataclasses.replace(conf, engine=engine, capacity=job.capacity, threads=job.threads)
        )
        self._capture_all = job.capture_all
        self.vocab_size = self.brain.checkpoint.config.vocab_size
        weights, state = self.brain.checkpoint.weights, self.brain.state
        # Of the embedding one row is read; where it is the head too, it is counted as that.
        read = [field for field in weights._fields if field != "embedding"]
        self.weight_bytes = sum(_bytes(getattr(weights, field)) for field in read)
        self.row_bytes = (state.keys.nbytes + state.values.nbytes) // state.capacity

    def capture(self) -> None:
        """Captures the graphs of ticks, where all are wanted; on a GPU those of edits too, which
        are recorded with them.
        """
        edits = self.brain.device.type == "cuda"
        for _ in self.brain.graphs.warm_up(edits=edits) if self._capture_all else ():
            pass

    def prime(self, ids: list[int]) -> None:
        """Replaces the context."""
        self.brain.prime(ids)
        if self.brain.device.type == "cuda":
            torch.cuda.synchronize()

    def step(self) -> int:
        """One tick."""
        return self.brain.tick().token


def _bytes(weights: object) -> int:
    """Of a tensor, or of everything in a tuple or dataclass of them; None has none. Raises
    TypeError.
    """
    if weights is None:
        return 0
    if isinstance(weights, Tensor):
        return weights.nbytes
    if isinstance(weights, tuple):
        return sum(map(_bytes, weights))
    return sum(map(_bytes, vars(weights).values()))
