"""The memory of one brain: its tensors, the graphs bound to them, and the host's account.

The host never asks the device how many rows there are or where the next read stands: it knows,
because it knows every patch. Text, policy and people are not this module's business.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from brain.checkpoints import Checkpoint
from brain.config.settings import Settings
from brain.machine.compiler import capturing
from brain.machine.cpu_operator import native_libraries
from brain.machine.signals import Uninterrupted
from compiled.graphs import Graphs
from compiled.philox import key_of
from compiled.read_cpu import formats
from compiled.sample import Sampling
from compiled.state import NOWHERE, Cursor, State, allocate_cursor, allocate_state


@dataclass(frozen=True)
class Account:
    """What the host knows of the device without asking. Replaced as a whole, together with every
    patch, so that the two never disagree.

    ``count`` of valid rows; ``high_water``, one more than the highest slot that has been occupied
    since the memory was last empty; ``tick``, ticks since the last prime; ``position`` of the token
    that the next tick reads (NOWHERE before the first prime); ``uncommitted``, whether that token
    has no row yet.
    """

    count: int = 0
    high_water: int = 0
    tick: int = 0
    position: int = NOWHERE
    uncommitted: bool = False

    def after_edit(self, count: int, position: int, *, uncommitted: bool) -> "Account":
        """That of a patch between two ticks."""
        return Account(count, self._reaching(count), self.tick, position, uncommitted)

    def after_ticks(self, ticks: int, count: int) -> "Account":
        """That of the patch of so many ticks."""
        position = self.position + ticks
        return Account(count, self._reaching(count), self.tick + ticks, position, True)

    def _reaching(self, count: int) -> int:
        # Exact: appending takes the lowest free slots, so no slot above the largest count is used.
        return max(self.high_water, count) if count else 0


EMPTY = Account()


class Memory:
    """State, cursor and graphs, made once and never replaced; ``account``, replaced with every
    patch.
    """

    def __init__(self, checkpoint: Checkpoint, settings: Settings) -> None:
        self.checkpoint = checkpoint
        weights, conf = checkpoint.weights, settings.conf
        self.device = weights.device
        self.state: State = allocate_state(
            checkpoint.config, conf.capacity, weights.dtype, self.device
        )
        self.cursor: Cursor = allocate_cursor(self.device)
        matrices = type(weights.head)
        known = formats(weights.dtype, weights.device, matrices) if settings.native else None
        sampler = conf.sampler
        self.graphs = Graphs(
            settings.graphs,
            checkpoint.config,
            weights,
            self.state,
            self.cursor,
            Sampling(
                temperature=self.float32(sampler.temperature),
                top_p=self.float32(sampler.top_p),
                min_p=self.float32(sampler.min_p),
                repetition_penalty=self.float32(sampler.repetition_penalty),
                key=key_of(conf.seed).to(self.device),
            ),
            libraries=None if known is None else native_libraries(known, settings.cache),
            kernels=conf.engine.kernels,
            ends=checkpoint.tokenizer.eos_ids,
            capturing=capturing,
        )
        self.account = EMPTY

    def int64(self, values: int | list[int]) -> Tensor:
        """Integers on the memory's device."""
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def float32(self, value: float) -> Tensor:
        """A number on the memory's device."""
        return torch.tensor(value, dtype=torch.float32, device=self.device)

    def logits_after(self, token: int, position: int) -> Tensor:
        """Logits of what follows one token read as of a position: [1, vocab] float32."""
        self.graphs.begin_step()
        return self.graphs.read(
            self.int64([token]),
            self.int64([position]),
            self.graphs.one,
            high_water=self.account.high_water,
        ).logits

    def forget_everything(self) -> None:
        """Back to an empty memory; the bytes stay until the slots are reused."""
        plan = self.graphs.empty_edit()._replace(
            cull=torch.nonzero(self.state.valid)[:, 0], cursor=allocate_cursor(self.device)
        )
        self.graphs.begin_step()
        with Uninterrupted():
            self.graphs.uncaptured.patch(plan)
            self.account = EMPTY

    def rebase(self) -> None:
        """Renumbers positions densely, in text order."""
        position = self.account.count - 1 + int(self.account.uncommitted)
        self.graphs.begin_step()
        with Uninterrupted():
            try:
                self.graphs.rebase()
            except BaseException:
                position = int(self.cursor.position[0])  # it may be done for all that
                raise
            finally:
                self.account = replace(self.account, position=position)
