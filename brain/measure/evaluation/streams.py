"""Many texts fed at once, each to a memory of its own, all under one policy."""

import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from brain.checkpoints import Checkpoint
from brain.diagnosis import not_finite_error
from brain.mirror import SOURCES
from compiled.batched import Memories, advance, allocate_memories, last_logits, weights_for_many
from compiled.choose import Eviction

Progress = Callable[[int], object]
"""Told how much has been done since it was last told."""

_USER = SOURCES.index("user")


class Streams:
    """Feeds [streams, length] tokens tick by tick, as ``Brain.feed`` would feed each of them.

    Attributes: ``at``, index of the token that has been fed last (and is pending); ``memories``.
    """

    def __init__(self, checkpoint: Checkpoint, eviction: Eviction, texts: Tensor) -> None:
        self._checkpoint = checkpoint
        self._config, self._weights = checkpoint.config, weights_for_many(checkpoint.weights)
        self._eviction = eviction
        weights = checkpoint.weights
        self._texts = texts.to(weights.device)
        streams, length = texts.shape
        target = eviction.culling.target
        # A tick forgets before it remembers: one row above the target is never needed.
        capacity = min(target, length) if target else length
        self.memories: Memories = allocate_memories(
            streams, self._config, capacity, weights.dtype, weights.device
        )
        cursor = self.memories.cursor
        # The first token is pending, as if it had been fed into nothing.
        self.memories = self.memories._replace(
            cursor=cursor._replace(
                token=self._texts[:, :1].clone(),
                position=torch.zeros_like(cursor.position),
                source=torch.full_like(cursor.source, _USER),
                uncommitted=torch.ones_like(cursor.uncommitted),
            )
        )
        self.at = 0

    @property
    def bucket(self) -> int:
        """Slots that may be occupied."""
        return max(1, min(self.at + 1, self.memories.state.valid.shape[1]))

    def feed_until(self, index: int, progress: Progress) -> Tensor:
        """Feeds the tokens up to ``index``; their negative log-likelihoods in nats:
        [streams, index - at] float32 on the host. Raises NotFinite.
        """
        surprises = list(self._feed(index, progress))
        if not surprises:
            return torch.zeros(self._texts.shape[0], 0)
        nats = torch.stack(surprises, 1).cpu()
        if not nats.isfinite().all():
            raise not_finite_error(1, f"feeding texts up to token {index}", self._checkpoint)
        return nats

    def _feed(self, index: int, progress: Progress) -> Iterator[Tensor]:
        with warnings.catch_warnings():
            # An operation that vmap runs stream by stream: slower, not wrong.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            while self.at < index:
                tokens = self._texts[:, self.at + 1]
                yield advance(
                    self._config,
                    self._weights,
                    self.memories,
                    tokens,
                    self._eviction,
                    _USER,
                    bucket=self.bucket,
                )
                self.at += 1
                progress(self._texts.shape[0])

    def ask(self, questions: Sequence[Sequence[int]]) -> Tensor:
        """Log-probabilities of the token after each stream's question, asked here and forgotten:
        [streams, vocab] float32 on the host. A read: the memories stay as they are.
        """
        cursor = self.memories.cursor
        width = 1 + max(map(len, questions))
        device = cursor.token.device
        padded = [[*question, *[0] * (width - 1 - len(question))] for question in questions]
        tokens = torch.cat([cursor.token, torch.tensor(padded, device=device)], 1)
        positions = cursor.position + torch.arange(width, device=device)
        lengths = torch.tensor([1 + len(question) for question in questions], device=device)
        logits = last_logits(
            self._config,
            self._weights,
            self.memories.state,
            tokens,
            positions,
            lengths,
            bucket=self.bucket,
        )
        return torch.log_softmax(logits, -1).cpu()
