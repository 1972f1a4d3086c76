"""The operator that draws tokens on a CPU, built from ``draw_cpu.cpp``.

In PyTorch a draw is some three hundred small steps, each of which costs more to call than to do.
The operator means what its twins mean, ``draw`` and ``surprises`` in ``sample.py``: the same
filters in the same order, the same noise for the same seed, tick and token.

This module knows a built library and calls it. Where a library comes from is not its business.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled.cpu_library import defined, load
from compiled.sample import Sampling, SamplingMethod
from compiled.state import State

SOURCE = Path(__file__).with_name("draw_cpu.cpp")


class Drawn(NamedTuple):
    """What the operator makes of T rows of logits."""

    token: Tensor  # [T] int64
    surprise: Tensor  # [T] float32, nats, under the raw logits
    extremes: Tensor  # [T, 2] float32: the least and the greatest logit; NaN if there is any


Draw = Callable[..., Drawn]
"""The operator bound to one library; see :func:`operator`."""


class Arguments(ctypes.Structure):
    """``Draw`` of ``draw_cpu.cpp``, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "vocab", "capacity")),
        *((name, ctypes.c_int64) for name in ("greedy", "top_k", "nucleus")),
        *((name, ctypes.c_void_p) for name in ("logits", "token_id", "valid", "tokens", "tick")),
        *((name, ctypes.c_void_p) for name in ("temperature", "top_p", "min_p", "penalty", "key")),
        *((name, ctypes.c_void_p) for name in ("forced", "token", "surprise", "extremes")),
    )


@functools.cache
def operator(library: Path) -> Draw:
    """Binds the operator to a library.

    Args:
        library: ``draw_cpu.cpp`` as built for this processor.
    Returns:
        ``draw(logits, state, tokens, tick, forced, method, sampling)``, which a compiler may trace:
        row i of ``logits`` [T, vocab] float32 follows the first i + 1 of ``tokens`` [T] int64,
        which are read behind what the state remembers, in the i-th tick after ``tick`` [] int64.
        ``forced`` [T] int64 is taken instead of a draw where it is not negative.
    Raises:
        OSError: The library cannot be loaded, or takes other arguments than this module passes.
    """
    loaded = load(library, Arguments)
    call = defined(
        library,
        loaded,
        "(Tensor logits, Tensor[] read, Tensor[] sampling, Tensor forced, bool greedy, int top_k, "
        "bool nucleus) -> (Tensor, Tensor, Tensor)",
        _run,
        allocate_drawn,
    )

    def draw(
        logits: Tensor,
        state: State,
        tokens: Tensor,
        tick: Tensor,
        forced: Tensor,
        method: SamplingMethod,
        sampling: Sampling,
    ) -> Drawn:
        given = (
            logits,
            [state.token_id, state.valid, tokens, tick],
            list(sampling),
            forced,
            method.greedy,
            method.top_k,
            method.nucleus,
        )
        # Uncaptured, what PyTorch does around an operator takes as long as the draw.
        made = call(*given) if torch.compiler.is_compiling() else _run(loaded, *given)
        return Drawn(*made)

    return draw


def allocate_drawn(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what is made of logits [T, vocab], in the order of :class:`Drawn`."""
    rows = len(logits)
    return (
        logits.new_empty((rows,), dtype=torch.int64),
        logits.new_empty((rows,)),
        logits.new_empty((rows, 2)),
    )


def _run(
    library: ctypes.CDLL,
    logits: Tensor,
    read: Sequence[Tensor],
    sampling: Sequence[Tensor],
    forced: Tensor,
    greedy: bool,
    top_k: int,
    nucleus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    made = allocate_drawn(logits)
    pointed = [tensor.contiguous() for tensor in (logits, *read, *sampling, forced, *made)]
    rows, vocab = logits.shape
    passed = Arguments(
        *(rows, vocab, len(read[0]), greedy, top_k, nucleus), *map(Tensor.data_ptr, pointed)
    )
    library.draw(ctypes.byref(passed))
    return made
