"""The engines of this program. A step is a whole tick: read, choose, decide, patch."""

import dataclasses

import torch

from brain.config.compose import compose_conf
from brain.measure.bench.job import Job
from brain.opening import open_brain
from compiled.blocks import Blocks
from compiled.matrix import Matrix, flat


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
        read = set(weights._fields) - {"embedding", "inverse_frequencies"}
        fields = (getattr(weights, name) for name in read)
        self.weight_bytes = sum(_bytes(field) for field in fields if field is not None)
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


def _bytes(weights: Matrix) -> int:
    if isinstance(weights, Blocks):
        return sum(rows.bytes.nbytes for parts in weights.layers for rows in parts)
    return sum(tensor.nbytes for tensor in flat(weights))
