"""Steps 2 and 3 as tensor functions: how bright every row is, and which rows to let go.

Both only return new values. The patch writes them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compiled.state import NOWHERE, Cursor, State

_LAST_POSITION = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Brightness:
    """Constants of brightness. ``seeds`` is the brightness at birth, by source."""

    decay: float = 0.98
    gain: float = 1.0
    maximum: float = 255.0
    seeds: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class Forgetting:
    """Constants of culling. Protected are the first ``sinks`` positions, the newest ``recent``
    positions and pinned rows. ``target`` 0 means that nothing is ever culled.
    """

    target: int = 0
    sinks: int = 4
    recent: int = 32


MOST_CULLED = 2
"""Rows culled in one tick, at most."""


def cull_count(count: int, target: int) -> int:
    """How many rows a tick culls: below the target none, at the target one, above it two."""
    if target == 0 or count < target:
        return 0
    return 1 if count == target else MOST_CULLED


def brighten(state: State, mass: Tensor, constants: Brightness) -> Tensor:
    """Brightness of every row after a reading: decayed, plus the attention it received.

    ``mass`` [capacity] float32 of one query is scaled by the number of valid rows, so that a row
    with average attention gains ``gain``. Returns [capacity] float32; forgotten rows are dark.
    """
    scaled = mass * state.valid.sum()
    brighter = constants.decay * state.brightness + constants.gain * scaled
    return torch.where(state.valid, brighter.clamp(0.0, constants.maximum), 0.0)


def seed_brightness(source: Tensor, constants: Brightness) -> Tensor:
    """Brightness at birth: ``source`` [W] uint8 → [W] float32."""
    seed = torch.zeros(source.shape, dtype=torch.float32, device=source.device)
    for number, brightness in enumerate(constants.seeds):
        seed = torch.where(source == number, brightness, seed)
    return seed


def decide_cull(
    state: State, cursor: Cursor, keep_scores: Tensor, constants: Forgetting
) -> tuple[Tensor, Tensor]:
    """Which rows to forget, 0, 1 or 2 of them by the rule of ``cull_count``.

    The lowest keep-scores go; of equal scores, the earliest position. Slot order plays no part.
    Returns the rows [capacity] bool, and their positions [MOST_CULLED] int64 filled up with
    NOWHERE.
    """
    cull = torch.zeros_like(state.valid)
    positions = torch.full((MOST_CULLED,), NOWHERE, dtype=torch.int64, device=cull.device)
    if constants.target == 0:
        return cull, positions
    count = state.valid.sum()
    eligible = (
        state.valid
        & ~state.pinned
        & (state.position >= constants.sinks)
        & (state.position <= cursor.position - constants.recent)
    )
    # What is no number counts as lowest: the host relies on the count, whatever the scores.
    keep_scores = torch.where(keep_scores.isnan(), -math.inf, keep_scores)
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
