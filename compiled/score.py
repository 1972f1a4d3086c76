"""Steps 2 and 3 as tensor functions: how bright every row is, and which rows to let go.

Both only return new values. The patch writes them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from compiled.finite import not_finite
from compiled.state import NOWHERE, Cursor, State

_LAST_POSITION = torch.iinfo(torch.int64).max
_LOG_OF_NOTHING = -105.0  # exp of less than -104 is 0 in float32


@dataclass(frozen=True)
class Brightness:
    """Constants of brightness. ``seeds`` is the brightness at birth, by source."""

    decay: float = 0.98
    gain: float = 1.0
    maximum: float = 255.0
    seeds: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class Novelty:
    """How surprise becomes novelty: ``decay`` per token of distance, before a row and after it."""

    decay: float = 0.9

    @property
    def own_share(self) -> float:
        """Share of a token's own surprise in the mean that it joins."""
        return 1.0 - self.decay

    @property
    def log_decay(self) -> float:
        """Natural logarithm of ``decay``."""
        return math.log(self.decay) if self.decay else -math.inf

    @property
    def reach(self) -> int:
        """Positions before a token from which on its echo is 0 in float32, whatever it was."""
        return max(1, math.ceil(_LOG_OF_NOTHING / self.log_decay))


@dataclass(frozen=True)
class Culling:
    """Constants of culling. Protected are the first ``sinks`` positions, the newest ``recent``
    positions and pinned rows. ``target`` 0 means that nothing is ever culled. ``at_once``: straight
    to the target, however far above it the count is; otherwise at most two rows a tick.
    """

    target: int = 0
    sinks: int = 4
    recent: int = 32
    at_once: bool = False


MOST_CULLED = 2
"""Rows culled in one tick, at most, unless they go at once."""


def cull_count(count: int, constants: Culling) -> int:
    """How many rows a tick culls: below the target none, at the target one, above it two; or as
    many as bring the count back to the target once the tick's own row is there.
    """
    above = count - constants.target + 1
    if constants.target == 0 or above < 1:
        return 0
    return above if constants.at_once else min(above, MOST_CULLED)


def brighten(
    state: State, tick: Tensor, mass: Tensor, constants: Brightness
) -> tuple[Tensor, Tensor]:
    """Brightness of every row after a read: decayed, plus the attention it received, scaled so that
    a row with average attention gains ``gain``.

    Args:
        state: The memory that was read.
        tick: [] int64, the tick being made.
        mass: [capacity] float32, the attention of one query.
        constants: Decay, gain and maximum.
    Returns:
        Brightness [capacity] float32, 0 without a row, and ``lit`` [capacity] int64, the tick in
        which each row last drew more attention than the average row.
    """
    scaled = mass * state.valid.sum()
    brighter = constants.decay * state.brightness + constants.gain * scaled
    bright = torch.where(state.valid, brighter.clamp(0.0, constants.maximum), 0.0)
    return bright, torch.where(state.valid & (scaled > 1.0), tick, state.lit)


Nats = TypeVar("Nats", Tensor, float)


def running_novelty(before: Nats, surprise: Nats, constants: Novelty) -> Nats:
    """Novelty of a token at birth: an exponential mean of surprise up to it.

    Args:
        before: Novelty of the token before it, nats, of the device's numbers or the host's.
        surprise: Its own surprise, nats.
        constants: The decay.
    """
    return constants.decay * before + constants.own_share * surprise


def echo(state: State, at: Tensor, strength: Tensor, constants: Novelty) -> Tensor:
    """Novelty of every row once a token has been said: the rows before it gain some.

    With ``running_novelty`` this makes novelty a mean of surprise over the passage around a row,
    what came after it included. A token's own surprise finds the first word of a fact and the mean
    up to it the last: the answer may be either, and stands out only in its passage. A row of some
    age gains no more, so it costs nothing that what came after it may be forgotten.

    Args:
        state: The memory.
        at: [] int64, the position of the token.
        strength: [] float32, nats gained by a row beside it; ``decay`` times that per position.
        constants: The decay.
    Returns:
        [capacity] float32, nats.
    """
    distance = (at - state.position).to(torch.float32)  # [capacity]
    share = torch.exp(distance.clamp(min=0.0) * constants.log_decay)
    gains = state.valid & (distance > 0)
    return state.novelty + torch.where(gains, share * strength, 0.0)


def seed_brightness(source: Tensor, constants: Brightness) -> Tensor:
    """Brightness at birth: ``source`` [W] uint8 → [W] float32."""
    seed = torch.zeros(source.shape, dtype=torch.float32, device=source.device)
    for number, brightness in enumerate(constants.seeds):
        seed = torch.where(source == number, brightness, seed)
    return seed


def decide_cull(
    state: State, cursor: Cursor, keep_scores: Tensor, constants: Culling
) -> tuple[Tensor, Tensor]:
    """Which rows to forget, as many as ``cull_count`` says: those with the lowest keep-scores; of
    equal scores, the earliest position. Slot order plays no part.

    Args:
        state: The memory.
        cursor: The token being read.
        keep_scores: [capacity] float32; NaN counts as lowest.
        constants: How many rows are wanted, and which are protected.
    Returns:
        The rows [capacity] bool, and their positions [MOST_CULLED] int64 (``at_once``: [capacity])
        filled up with NOWHERE.
    """
    cull = torch.zeros_like(state.valid)
    if constants.target == 0:
        most = state.capacity if constants.at_once else MOST_CULLED
        return cull, torch.full((most,), NOWHERE, dtype=torch.int64, device=cull.device)
    count = state.valid.sum()
    eligible = may_go(state, cursor, constants)
    keep_scores = _ordered(keep_scores)
    if constants.at_once:
        above = (count - constants.target + 1).clamp(min=0)
        cull = cull_lowest(state, cursor, keep_scores, above, constants)
        return cull, torch.where(cull, state.position, NOWHERE)
    chosen = []
    for number in range(MOST_CULLED):
        wanted = count >= constants.target if number == 0 else count > constants.target
        scores = torch.where(eligible, keep_scores, math.inf)
        lowest = eligible & (scores == scores.amin())
        earliest = torch.where(lowest, state.position, _LAST_POSITION).amin()
        victim = lowest & (state.position == earliest) & wanted
        chosen.append(torch.where(victim.any(), earliest, NOWHERE))
        cull = cull | victim
        eligible = eligible & ~victim
    return cull, torch.stack(chosen)


def may_go(state: State, cursor: Cursor, constants: Culling) -> Tensor:
    """Rows that are not protected: [capacity] bool."""
    return (
        state.valid
        & ~state.pinned
        & (state.position >= constants.sinks)
        & (state.position <= cursor.position - constants.recent)
    )


def _ordered(keep_scores: Tensor) -> Tensor:
    """NaN counts as lowest: the host relies on how many go, whatever the scores."""
    return torch.where(keep_scores.isnan(), -math.inf, keep_scores)


def cull_lowest(
    state: State, cursor: Cursor, keep_scores: Tensor, number: Tensor, constants: Culling
) -> Tensor:
    """The ``number`` [] int64 rows with the lowest keep-scores that are not protected; of equal
    scores, the earliest positions. Arguments as for ``decide_cull``: [capacity] bool.
    """
    eligible, scores = may_go(state, cursor, constants), _ordered(keep_scores)
    by_position = torch.argsort(torch.where(eligible, state.position, _LAST_POSITION))
    by_score = torch.argsort(torch.where(eligible, scores, math.inf)[by_position], stable=True)
    order = by_position[by_score]  # ineligible rows of infinite score may precede eligible ones
    rank = torch.cumsum(eligible[order], 0)
    going = eligible[order] & (rank <= number)
    return torch.zeros_like(eligible).scatter(0, order, going)


class Scoring(NamedTuple):
    """What steps 2 and 3 of a tick are made of: the functions of this module, or their twins."""

    brighten: Callable[[State, Tensor, Tensor, Brightness], tuple[Tensor, Tensor]]
    echo: Callable[[State, Tensor, Tensor, Novelty], Tensor]
    seed_brightness: Callable[[Tensor, Brightness], Tensor]
    decide_cull: Callable[[State, Cursor, Tensor, Culling], tuple[Tensor, Tensor]]
    not_finite: Callable[..., Tensor]


IN_TENSORS = Scoring(brighten, echo, seed_brightness, decide_cull, not_finite)
"""As the compiler traces them and every device runs them."""
