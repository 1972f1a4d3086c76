"""Steps 1 to 4 of a tick on a GPU, after its read: a handful of Triton kernels.

PyTorch's compiler makes some fifty kernels of a tick's choice and patch, each of which does next to
nothing. Here are the parts that cost most of them, as operators that mean what their twins mean:

    the draw            mark, score, pick           ``sample.py``, as ``draw_cpu.py``
    what to forget      rank_rows, choose_rows      ``score.decide_cull``
    what is not finite  find_broken, join_flags     ``finite.not_finite``
    the patch           find_free, carry_out        ``patch.py``

Of each pair or three, the first looks at one piece of the vocabulary or of the memory in every
program, and the last puts together what was found. What the kernels do not know is done by the
twin; the host tells from constants and shapes, so a compiler may trace either. Of draws that is for
whoever binds them: see :func:`knows`.

The operators of the choice write nothing but their results and scratch. That of the patch says
which of its arguments it writes, and the compiler, which copies none of them, lets it. What a plan
holds must be nothing that is written: it is read meanwhile.

The kernels are ``tick_kernels.py``; ``kernel_launch.py`` starts them.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from compiled import tick_kernels
from compiled.draw_cpu import Draw, Drawn, allocate_drawn
from compiled.finite import PARTS, not_finite
from compiled.kernel_launch import Bindings, Launch, Launcher, operator, power_of_two
from compiled.plan import Plan
from compiled.sample import Sampling, SamplingMethod
from compiled.score import IN_TENSORS, MOST_CULLED, Culling, Scoring, decide_cull
from compiled.state import NOWHERE, ROW_COLUMNS, Cursor, State
from compiled.tick_cpu import TickPatch

MOST_CANDIDATES = 64
"""Tokens among which the kernels draw, at most: what one program sorts of every piece."""

UPDATED = ("brightness", "lit", "novelty")
"""Columns that a tick changes for rows that are already there, in the order of ``carry_out``."""

_VOCABULARY_PIECE = 2048
_ROW_PIECE = 256
"""Numbers of a row's keys, and as many of its values, that one program writes."""
_MOST_FLAGS = 4096


def _piece(size: int) -> int:
    """Numbers of so many that a program looks at: more where there would be many pieces."""
    return 1024 if size <= 1 << 18 else 4096


def _pieces(size: int, piece: int) -> int:
    return -(-size // piece)


class Scratch(NamedTuple):
    """Room for what kernels hand on to each other, at fixed addresses. Nothing in it outlives an
    operator.
    """

    # [vocab] uint8; zero between draws, but after one that failed: the next takes and clears them.
    marks: Tensor
    best: Tensor  # [pieces of the vocabulary * MOST_CANDIDATES] int64
    tops: Tensor  # [pieces of the vocabulary] float32
    totals: Tensor  # [pieces of the vocabulary] float32
    floors: Tensor  # [pieces of the vocabulary] float32
    ranks: Tensor  # [pieces of the capacity * 2] int64
    places: Tensor  # [pieces of the capacity * 2] int64
    slots: Tensor  # [pieces of the capacity * 2] int32
    counts: Tensor  # [pieces of the capacity] int32
    flags: Tensor  # [_MOST_FLAGS] int32
    free: Tensor  # [pieces of the capacity] int32


def allocate_scratch(vocab_size: int, capacity: int, device: torch.device) -> Scratch:
    """Scratch for ticks in a memory of ``capacity`` slots."""
    words, rows = _pieces(vocab_size, _VOCABULARY_PIECE), _pieces(capacity, _piece(capacity))

    def room(size: int, of: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=of, device=device)

    return Scratch(
        marks=room(vocab_size, torch.uint8),
        best=room(words * MOST_CANDIDATES, torch.int64),
        tops=room(words, torch.float32),
        totals=room(words, torch.float32),
        floors=room(words, torch.float32),
        ranks=room(rows * MOST_CULLED, torch.int64),
        places=room(rows * MOST_CULLED, torch.int64),
        slots=room(rows * MOST_CULLED, torch.int32),
        counts=room(rows, torch.int32),
        flags=room(_MOST_FLAGS, torch.int32),
        free=room(rows, torch.int32),
    )


# Launches ----------------------------------------------------------------------------------------


class Method(NamedTuple):
    """What shapes the kernels of a draw."""

    greedy: bool
    top_k: int
    nucleus: bool

    @property
    def width(self) -> int:
        """Candidates of each piece."""
        return 1 if self.greedy else power_of_two(self.top_k)


def draw_launches(
    scratch: Scratch,
    logits: Tensor,
    read: Sequence[Tensor],
    sampling: Sampling,
    forced: Tensor,
    results: Drawn,
    method: Method,
) -> list[Launch]:
    """Logits [1, vocab]; ``read``: ids and validity of the memory, the token read, the tick."""
    token_id, valid, tokens, tick = read
    vocab, capacity = logits.shape[1], len(valid)
    block, piece = min(_VOCABULARY_PIECE, power_of_two(vocab)), _piece(capacity)
    pieces = _pieces(vocab, block)
    shape = {"GREEDY": method.greedy, "KP": method.width}
    found = (scratch.best, scratch.tops, scratch.totals, scratch.floors)
    return [
        Launch(
            tick_kernels.mark,
            (_pieces(capacity, piece),),
            (token_id, valid, tokens, scratch.marks, capacity),
            {"V": vocab, "B": piece},
            4,
        ),
        Launch(
            tick_kernels.score,
            (pieces,),
            (
                *(logits, scratch.marks, sampling.repetition_penalty, sampling.temperature),
                *found,
            ),
            {"V": vocab, "B": block, **shape},
            8,
        ),
        Launch(
            tick_kernels.pick,
            (1,),
            (
                *(logits, *found, tick, sampling.top_p, sampling.min_p, sampling.key, forced),
                *results,
            ),
            {
                **{"PIECES": pieces, "N": power_of_two(pieces), "K": method.top_k},
                **{"NUCLEUS": method.nucleus, **shape},
            },
            8,
        ),
    ]


def cull_launches(
    scratch: Scratch,
    columns: Sequence[Tensor],
    at: Tensor,
    keep_scores: Tensor,
    results: tuple[Tensor, Tensor],
    constants: Culling,
) -> list[Launch]:
    """``columns``: which rows are valid and which pinned, and their positions."""
    capacity = len(keep_scores)
    piece = _piece(capacity)
    pieces = _pieces(capacity, piece)
    found = (scratch.ranks, scratch.places, scratch.slots, scratch.counts)
    return [
        Launch(
            tick_kernels.rank_rows,
            (pieces,),
            (*columns, at, keep_scores, *found, capacity),
            {"SINKS": constants.sinks, "RECENT": constants.recent, "B": piece},
            8,
        ),
        Launch(
            tick_kernels.choose_rows,
            (pieces,),
            (*found, *results, capacity),
            {
                **{"PIECES": pieces, "N": power_of_two(pieces), "TARGET": constants.target},
                **{"NOWHERE": NOWHERE, "B": piece},
            },
            8,
        ),
    ]


def finite_launches(scratch: Scratch, parts: Sequence[Tensor], result: Tensor) -> list[Launch]:
    """At most as many parts as have names; those that are missing are empty."""
    missing = len(PARTS) - len(parts)
    sizes = [part.numel() for part in parts] + [0] * missing
    piece = _piece(max(sizes))
    pieces = sum(_pieces(size, piece) for size in sizes)
    return [
        Launch(
            tick_kernels.find_broken,
            (pieces,),
            (*parts, *[parts[0]] * missing, scratch.flags, *sizes),
            {"B": piece},
            8,
        ),
        Launch(
            tick_kernels.join_flags,
            (1,),
            (scratch.flags, result, pieces),
            {"N": power_of_two(pieces)},
            4,
        ),
    ]


def patch_launches(
    scratch: Scratch, state: State, cursor: Cursor, plan: Sequence[Tensor]
) -> list[Launch]:
    """``plan``: as :func:`_listed`."""
    layers, kv_heads, capacity, head_dim = state.keys.shape
    piece, planes = _piece(capacity), layers * kv_heads
    pieces = _pieces(capacity, piece)
    return [
        Launch(
            tick_kernels.find_free,
            (pieces,),
            (state.valid, plan[_CULL], scratch.free, capacity),
            {"B": piece},
            4,
        ),
        Launch(
            tick_kernels.carry_out,
            (pieces + _pieces(planes * head_dim, _ROW_PIECE),),
            (*state, *cursor, *plan, scratch.free, capacity),
            {
                **{"PIECES": pieces, "N": power_of_two(pieces), "PLANES": planes, "D": head_dim},
                **{"B": piece, "BR": _ROW_PIECE},
            },
            8,
        ),
    ]


_CULL = 2 + len(ROW_COLUMNS)
"""Where a plan's rows to forget are in its list."""


def _listed(plan: Plan) -> list[Tensor]:
    """A plan in the order of the arguments of ``carry_out``."""
    rows = [plan.rows[name] for name in ROW_COLUMNS]
    updates = [plan.updates[name] for name in UPDATED]
    new = [plan.keys, plan.values, *rows]
    return [*new, plan.cull, *updates, *plan.cursor, plan.length, plan.not_finite]


# The operators -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Room:
    """What the operators of one memory have."""

    scratch: Scratch
    launcher: Launcher


_rooms: Bindings[_Room] = Bindings()


class _Bound:
    """A memory's number, for as long as anything of it can be called."""

    def __init__(self, room: _Room) -> None:
        self.number = _rooms.bind(room)
        _rooms.keep_for(self, self.number)


class Steps(NamedTuple):
    """What the operators stand for."""

    draw: Draw  # of one token, by a method that the kernels know
    scoring: Scoring
    patch: TickPatch


def steps(vocab_size: int, state: State, patch: TickPatch) -> Steps:
    """Binds the operators to a memory, and allocates their scratch.

    Args:
        vocab_size: Of the model.
        state: The memory, on the device that ticks.
        patch: The writer, for plans of several ticks.
    Returns:
        Functions that take, return and mean what their twins do, for this memory alone.
    """
    device = state.valid.device
    scratch = allocate_scratch(vocab_size, state.capacity, device)
    bound, operators = _Bound(_Room(scratch, Launcher(device))), _registered()
    called = functools.partial
    scoring = IN_TENSORS._replace(
        decide_cull=called(_decide_cull, operators, bound),
        not_finite=called(_not_finite, operators, bound),
    )
    return Steps(called(_draw, operators, bound), scoring, called(_patch, operators, bound, patch))


class _Operators(NamedTuple):
    draw: OpOverload[..., tuple[Tensor, Tensor, Tensor]]
    cull: OpOverload[..., tuple[Tensor, Tensor]]
    not_finite: OpOverload[..., Tensor]
    patch: OpOverload[..., None]


def knows(method: SamplingMethod, vocab_size: int) -> bool:
    """Whether the kernels draw so: the likeliest token, or one of few."""
    return _method_of(method, vocab_size) is not None


def _method_of(method: SamplingMethod, vocab_size: int) -> Method | None:
    """What the kernels make of a method, if anything."""
    if method.greedy or method.top_k == 1:  # of one candidate no filter leaves less
        return Method(greedy=True, top_k=1, nucleus=False)
    if not 0 < method.top_k <= MOST_CANDIDATES or method.top_k >= vocab_size:
        return None
    return Method(greedy=False, top_k=method.top_k, nucleus=method.nucleus)


def _draw(
    operators: _Operators,
    bound: _Bound,
    logits: Tensor,
    state: State,
    tokens: Tensor,
    tick: Tensor,
    forced: Tensor,
    method: SamplingMethod,
    sampling: Sampling,
) -> Drawn:
    known = _method_of(method, logits.shape[1])
    assert known is not None
    read = [state.token_id, state.valid, tokens, tick]
    return Drawn(*operators.draw(logits, read, [*sampling], forced, *known, bound.number))


def _decide_cull(
    operators: _Operators,
    bound: _Bound,
    state: State,
    cursor: Cursor,
    keep_scores: Tensor,
    constants: Culling,
) -> tuple[Tensor, Tensor]:
    c = constants
    if c.target == 0 or c.at_once:  # nothing, or rare: it sorts
        return decide_cull(state, cursor, keep_scores, c)
    columns = [state.valid, state.pinned, state.position]
    return operators.cull(
        columns, cursor.position, keep_scores, c.target, c.sinks, c.recent, bound.number
    )


def _not_finite(operators: _Operators, bound: _Bound, *parts: Tensor) -> Tensor:
    sizes = [part.numel() for part in parts]
    programs = sum(_pieces(size, _piece(max(sizes))) for size in sizes)
    if programs > _MOST_FLAGS:
        return not_finite(*parts)
    return operators.not_finite([*parts], bound.number)


def _patch(
    operators: _Operators,
    bound: _Bound,
    twin: TickPatch,
    state: State,
    cursor: Cursor,
    plan: Plan,
) -> None:
    if plan.keys.shape[2] != 1:
        twin(state, cursor, plan)
        return
    operators.patch([*state], [*cursor], _listed(plan), bound.number)


def _run_draw(
    logits: Tensor,
    read: Sequence[Tensor],
    sampling: Sequence[Tensor],
    forced: Tensor,
    greedy: bool,
    top_k: int,
    nucleus: bool,
    number: int,
) -> tuple[Tensor, Tensor, Tensor]:
    made, room = allocate_drawn(logits), _rooms[number]
    held, settings = [part.contiguous() for part in read], Sampling(*sampling)
    method = Method(greedy, top_k, nucleus)
    given = (logits.contiguous(), held, settings, forced, Drawn(*made), method)
    room.launcher.start_all(draw_launches(room.scratch, *given))
    return made


def _allocated_cull(columns: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(columns[0]),
        columns[2].new_empty((MOST_CULLED,)),
    )


def _run_cull(
    columns: Sequence[Tensor],
    at: Tensor,
    keep_scores: Tensor,
    target: int,
    sinks: int,
    recent: int,
    number: int,
) -> tuple[Tensor, Tensor]:
    made, room = _allocated_cull(columns), _rooms[number]
    given = (columns, at, keep_scores.contiguous(), made, Culling(target, sinks, recent))
    room.launcher.start_all(cull_launches(room.scratch, *given))
    return made


def _allocated_flag(parts: Sequence[Tensor], number: int) -> Tensor:
    return parts[0].new_empty((), dtype=torch.int64)


def _run_not_finite(parts: Sequence[Tensor], number: int) -> Tensor:
    made, room = _allocated_flag(parts, number), _rooms[number]
    room.launcher.start_all(
        finite_launches(room.scratch, [part.contiguous() for part in parts], made)
    )
    return made


def _run_patch(
    state: Sequence[Tensor], cursor: Sequence[Tensor], plan: Sequence[Tensor], number: int
) -> None:
    room, held = _rooms[number], [part.contiguous() for part in plan]
    room.launcher.start_all(patch_launches(room.scratch, State(*state), Cursor(*cursor), held))


def _writes_elsewhere(*_: Any) -> None:
    """The patch has no results."""


def _registered() -> _Operators:
    """The operators as PyTorch knows them."""
    return _Operators(
        operator(
            "draw_cuda",
            "(Tensor logits, Tensor[] read, Tensor[] sampling, Tensor forced, bool greedy, "
            "int top_k, bool nucleus, int number) -> (Tensor, Tensor, Tensor)",
            _run_draw,
            allocate_drawn,
        ),
        operator(
            "cull_cuda",
            "(Tensor[] columns, Tensor at, Tensor keep_scores, int target, int sinks, int recent, "
            "int number) -> (Tensor, Tensor)",
            _run_cull,
            _allocated_cull,
        ),
        operator(
            "not_finite_cuda",
            "(Tensor[] parts, int number) -> Tensor",
            _run_not_finite,
            _allocated_flag,
        ),
        operator(
            "patch_cuda",
            "(Tensor(a!)[] state, Tensor(b!)[] cursor, Tensor[] plan, int number) -> ()",
            _run_patch,
            _writes_elsewhere,
        ),
    )
