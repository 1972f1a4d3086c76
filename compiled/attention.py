"""Split attention over a read-only cache and the new tokens, with the attention mass.

Scores against the cache and against the new tokens are computed apart and normalised together by
one shared softmax, so the cache is never concatenated with anything.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled.linear import dot_rows, mix_rows, stored, streams_rows, sum_rows

SLAB = 144
"""Queries that attend at a time, of one key head, where no compiler fuses the steps on a CPU: their
scores stay in the cache between a step and the next.
"""


class Visibility(NamedTuple):
    """Who sees whom, and which new tokens count."""

    cached: Tensor  # [T, bucket] bool: new token i sees slot s
    new: Tensor  # [T, T] bool: new token i sees new token j
    live: Tensor  # [T] float32: 1 for a token that was asked for, 0 for padding


def visibility(valid: Tensor, position: Tensor, positions: Tensor, length: Tensor) -> Visibility:
    """The one causal rule.

    Slot s is visible to new token i iff ``valid[s] and position[s] < positions[i]``; new token j
    is visible to new token i iff ``positions[j] <= positions[i]``. Two refinements:

    * A new token *supersedes* the row cached at its own position: that row is hidden from every
      new token. Without this, re-reading two neighbouring cached tokens at once would show the
      first of them to the second twice.
    * Tokens from ``length`` on are padding: nobody sees them but themselves.

    Every new token sees itself, so no softmax is ever empty.

    ``valid`` [bucket] bool, ``position`` [bucket] int64, ``positions`` [T] int64,
    ``length`` [] int64.
    """
    num_tokens = positions.shape[0]
    index = torch.arange(num_tokens, device=positions.device)
    live = index < length  # [T]
    superseded = ((position[None] == positions[:, None]) & live[:, None]).any(0)  # [bucket]
    cached = (valid & ~superseded)[None] & (position[None] < positions[:, None])  # [T, bucket]
    earlier = live[None] & (positions[None] <= positions[:, None])  # [T, T]
    new = earlier | (index[None] == index[:, None])
    return Visibility(cached, new, live.to(torch.float32))


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    visible: Visibility,
    *,
    text: bool = False,
    each: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Grouped-query attention (Ainslie et al. 2023) of T new tokens.

    ``query`` [T, heads, head_dim]; ``keys``, ``values`` [kv_heads, bucket, head_dim];
    ``new_keys``, ``new_values`` [kv_heads, T, head_dim]. ``text`` says that the new tokens come
    in order, none that was asked for sees a later one, and that nobody asks for the mass: what is
    hidden anyway is not computed.

    Returns the attended values [T, heads * head_dim] in the query's dtype, and the attention mass
    in float32, summed over heads and live queries: of every slot, then of every new token
    [bucket + T]; with ``each``, of every query apart [T, bucket + T]; None for a text. It stays in
    one piece because a layer that is compiled once may not hand out two views of one tensor:
    refused as aliasing, and silently overwritten where a clone hides it.
    A hidden slot's probability is exactly zero, whatever finite bytes lie in it.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[0]
    group = num_heads // num_kv_heads
    if streams_rows(query, num_tokens):
        return _attend_streaming(query, keys, values, new_keys, new_values, visible)
    # Query heads that share a key head lie side by side, so no key is ever repeated.
    grouped = query.view(num_tokens, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    grouped = grouped / math.sqrt(head_dim)  # [kv_heads, group, T, head_dim]

    slabs, masses = [], []
    for queries in _slices(num_tokens, _queries_at_once(query)):
        seen = queries.stop if text else num_tokens  # none of a slab sees what is behind its last
        hidden = ~visible.cached[queries]
        barrier = torch.where(visible.new[queries, :seen], 0.0, -math.inf).to(query.dtype)
        barrier = barrier.repeat(group, 1)  # [group * slab, seen]
        attended = []
        for heads in _slices(num_kv_heads, _heads_at_once(query, num_kv_heads)):
            mixed, shares = _attend(
                grouped[heads, :, queries],
                (keys[heads], values[heads]),
                (new_keys[heads, :seen], new_values[heads, :seen]),
                hidden,
                barrier,
                query.dtype if text else torch.float32,
            )
            attended.append(mixed)
            if each:  # the other queries have no share in it
                others = (0, 0, queries.start, num_tokens - queries.stop)
                masses.append(F.pad(shares.sum((0, 1)), others))
            elif not text:
                masses.append(sum_rows(shares.flatten(0, 1), visible.live[queries]))
        slabs.append(_joined(attended, 0))
    together = _joined(slabs, 2).permute(2, 0, 1, 3)  # [T, kv_heads, group, head_dim]
    together = together.reshape(num_tokens, num_heads * head_dim).to(query.dtype)
    if text:
        return together, None
    return together, torch.stack(masses).sum(0) if len(masses) > 1 else masses[0]


def _alone(query: Tensor) -> bool:
    """Whether several queries attend on a CPU without a compiler to fuse the steps."""
    return query.device.type == "cpu" and query.shape[0] > 1 and not torch.compiler.is_compiling()


def _heads_at_once(query: Tensor, num_kv_heads: int) -> int:
    return 1 if _alone(query) else num_kv_heads


def _queries_at_once(query: Tensor) -> int:
    return SLAB if _alone(query) else query.shape[0]


def _slices(size: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, size)) for first in range(0, size, step)]


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def _attend(
    query: Tensor,
    cached: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    hidden: Tensor,
    barrier: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Attention of some queries with some key heads: ``query`` [K, group, T, head_dim], scaled.

    ``cached`` [K, bucket, head_dim], ``new`` [K, seen, head_dim]: keys and values. ``hidden``
    [T, bucket]: slots that are hidden from a query; ``barrier`` [group * T, seen]: minus infinity
    where a new token is hidden, else 0. Only a slot can hold bytes whose score is no number, so
    only there the score must be replaced; to new tokens' the barrier is added, which costs next to
    nothing.

    Returns the attended values [K, group, T, head_dim] float32, and the shares
    [K, group, T, bucket + seen] in ``dtype``.
    """
    num_kv_heads, group, num_tokens, head_dim = query.shape
    (keys, values), (new_keys, new_values) = cached, new
    bucket = keys.shape[1]
    queries = query.reshape(num_kv_heads, group * num_tokens, head_dim)
    by_query = (num_kv_heads, group, num_tokens, -1)
    scores = dot_rows(queries, new_keys, barrier).view(by_query)
    if bucket:
        remembered = dot_rows(queries, keys).view(by_query)
        # Scores are joined, the cache is not.
        scores = torch.cat([remembered.masked_fill(hidden, -math.inf), scores], dim=-1)
    shares = torch.softmax(scores, dim=-1, dtype=dtype)

    rows = shares.view(num_kv_heads, group * num_tokens, -1)
    attended = mix_rows(rows[..., bucket:], new_values)
    if bucket:
        attended = mix_rows(rows[..., :bucket], values) + attended
    return attended.view(by_query), shares


def _attend_streaming(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    visible: Visibility,
) -> tuple[Tensor, Tensor]:
    """``attend`` for one token, in the form that a compiler turns into one loop over the slots
    after another: nothing is joined; cached scores and the token's own share a maximum and a sum.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[0]
    grouped = query.float().view(num_kv_heads, -1, head_dim) / math.sqrt(head_dim)
    grouped = stored(grouped)  # [kv_heads, group, head_dim]
    scores = (grouped[:, :, None] * keys.float()[:, None]).sum(-1)  # [kv_heads, group, bucket]
    scores = scores.masked_fill(~visible.cached, -math.inf)
    own = (grouped * new_keys.float()).sum(-1, keepdim=True)  # [kv_heads, group, 1]
    most = torch.maximum(scores.amax(-1, keepdim=True), own)
    weights, own_weight = stored(torch.exp(scores - most)), torch.exp(own - most)
    total = weights.sum(-1, keepdim=True) + own_weight  # [kv_heads, group, 1]
    mixed = (weights[..., None] * values.float()[:, None]).sum(2) + own_weight * new_values.float()
    attended = (mixed / total).view(num_tokens, num_heads * head_dim)
    shares = visible.live / total
    mass = (weights * shares).sum((0, 1))  # [bucket]
    own_mass = (own_weight * shares).sum((0, 1))  # [1]
    return attended.to(query.dtype), torch.cat([mass, own_mass])
