"""Attention of new tokens over a read-only cache and among themselves, with the attention mass.

``definition`` says what attention is. Everything below it computes the same in the order that is
fastest: scores against the cache and against the new tokens are computed apart and normalised
together by one softmax, so the cache is never concatenated with anything.

This module knows which rows a token sees, not where they come from: see ``read.py``.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled import torch_private
from compiled.linear import (
    dot_rows,
    streams_rows,
    summed_probabilities,
    weighted_rows,
)

TILE = 144
"""Queries that attend at a time, of one key head, where no compiler fuses the steps on a CPU: their
scores stay in the processor's cache between one step and the next.
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


def definition(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    visible: Visibility,
    divisor: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Grouped-query attention (Ainslie et al. 2023) in plain terms; for arguments see ``attend``.

    Nothing calls it: it is what ``attend`` means, and what tests compare it with.
    """
    group = query.shape[1] // keys.shape[0]  # query heads that share a key head
    all_keys = torch.cat([keys, new_keys], 1).repeat_interleave(group, 0)  # [heads, N, head_dim]
    all_values = torch.cat([values, new_values], 1).repeat_interleave(group, 0)
    seen = torch.cat([visible.cached, visible.new], 1)  # [T, N], where N is bucket + T
    scores = torch.einsum("thd,hnd->htn", query, all_keys) / (divisor or math.sqrt(query.shape[2]))
    probabilities = scores.masked_fill(~seen, -math.inf).softmax(-1)  # [heads, T, N]
    attended = torch.einsum("htn,hnd->thd", probabilities, all_values)
    mass = torch.einsum("htn,t->n", probabilities, visible.live)
    return attended.flatten(1), mass


Attention = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Visibility, float | None],
    tuple[Tensor, Tensor | None],
]
"""``attend``, or one of the two functions that differ from it in the mass."""


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    visible: Visibility,
    divisor: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Lets T new tokens attend to the cache and to each other.

    A masked row's probability is exactly zero, whatever finite bytes lie in it.

    Args:
        query: [T, heads, head_dim] in the model's dtype.
        keys: [kv_heads, bucket, head_dim], cached.
        values: Of the same shape.
        new_keys: [kv_heads, T, head_dim].
        new_values: Of the same shape.
        visible: Who sees whom.
        divisor: What scores are divided by; None: sqrt(head_dim).
    Returns:
        The attended values [T, heads * head_dim] in the query's dtype, and the attention mass
        [bucket + T] float32: probabilities summed over heads and live queries, of every slot and
        then of every new token. It stays in one piece because a layer that is compiled once may not
        return two views of one tensor: refused as aliasing, and silently overwritten where a clone
        hides it.
    """
    if streams_rows(query, query.shape[0]):
        return _attend_streaming(query, keys, values, new_keys, new_values, visible, divisor)

    def mass(probabilities: Tensor, queries: slice) -> Tensor:
        return summed_probabilities(probabilities.flatten(0, 1), visible.live[queries])

    attended, masses = _attend_in_tiles(
        query, keys, values, new_keys, new_values, visible, mass, divisor
    )
    return attended, _added(masses)


def attend_per_query(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    visible: Visibility,
    divisor: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``attend`` with the mass that each query gave, summed over heads: [T, bucket + T] float32."""
    num_tokens = query.shape[0]

    def mass(probabilities: Tensor, queries: slice) -> Tensor:
        other_queries = (0, 0, queries.start, num_tokens - queries.stop)
        return F.pad(probabilities.sum((0, 1)), other_queries)

    attended, masses = _attend_in_tiles(
        query, keys, values, new_keys, new_values, visible, mass, divisor
    )
    return attended, _added(masses)


def attend_causally(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    visible: Visibility,
    divisor: float | None = None,
) -> tuple[Tensor, None]:
    """``attend`` without a mass, for new tokens that come in text order: no live token sees a later
    one, so what a tile of queries cannot see is not computed.
    """
    attended, _ = _attend_in_tiles(
        query, keys, values, new_keys, new_values, visible, None, divisor
    )
    return attended, None


def _added(masses: list[Tensor]) -> Tensor:
    return torch.stack(masses).sum(0) if len(masses) > 1 else masses[0]


def _attend_in_tiles(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    visible: Visibility,
    mass: Callable[[Tensor, slice], Tensor] | None,
    divisor: float | None,
) -> tuple[Tensor, list[Tensor]]:
    """``attend``, tile by tile: the attended values [T, heads * head_dim], and for every tile what
    ``mass`` makes of its probabilities [kv_heads, group, tile, bucket + T] and its queries. Without
    ``mass`` the new tokens come in text order.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[0]
    group = num_heads // num_kv_heads
    # Query heads that share a key head lie side by side, so no key is ever repeated.
    grouped = query.view(num_tokens, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    grouped = grouped / (divisor or math.sqrt(head_dim))  # [kv_heads, group, T, head_dim]

    tiles, masses = [], []
    for queries in _slices(num_tokens, _queries_at_once(query)):
        seen = queries.stop if mass is None else num_tokens
        masked = ~visible.cached[queries]
        mask_bias = torch.where(visible.new[queries, :seen], 0.0, -math.inf).to(query.dtype)
        mask_bias = mask_bias.repeat(group, 1)  # [group * tile, seen]
        attended = []
        for heads in _slices(num_kv_heads, _heads_at_once(query, num_kv_heads)):
            weighted_values, probabilities = _attend_tile(
                grouped[heads, :, queries],
                (keys[heads], values[heads]),
                (new_keys[heads, :seen], new_values[heads, :seen]),
                masked,
                mask_bias,
                None if mass is None else torch.float32,
            )
            attended.append(weighted_values)
            if mass is not None:
                masses.append(mass(probabilities, queries))
        tiles.append(_joined(attended, 0))
    together = _joined(tiles, 2).permute(2, 0, 1, 3)  # [T, kv_heads, group, head_dim]
    together = together.reshape(num_tokens, num_heads * head_dim).to(query.dtype)
    return together, masses


def _uses_tiles(query: Tensor) -> bool:
    """Whether several queries attend on a CPU without a compiler to fuse the steps."""
    return query.device.type == "cpu" and query.shape[0] > 1 and not torch.compiler.is_compiling()


def _heads_at_once(query: Tensor, num_kv_heads: int) -> int:
    return 1 if _uses_tiles(query) else num_kv_heads


def _queries_at_once(query: Tensor) -> int:
    return TILE if _uses_tiles(query) else query.shape[0]


def _slices(size: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, size)) for first in range(0, size, step)]


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def _attend_tile(
    query: Tensor,
    cached: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    masked: Tensor,
    mask_bias: Tensor,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Attends with some queries to some key heads.

    Only a slot can hold bytes whose score is NaN or infinite, so only there a masked score must be
    replaced. To new tokens' scores the bias is added, which costs next to nothing.

    Args:
        query: [K, group, T, head_dim], scaled.
        cached: Keys and values, each [K, bucket, head_dim].
        new: Keys and values, each [K, seen, head_dim].
        masked: [T, bucket] bool: slots that a query does not see.
        mask_bias: [group * T, seen]: minus infinity for a new token that a query does not see,
            otherwise 0.
        dtype: Of the probabilities; None for that of the scores.
    Returns:
        The weighted values [K, group, T, head_dim] float32, and the probabilities
        [K, group, T, bucket + seen].
    """
    num_kv_heads, group, num_tokens, head_dim = query.shape
    (keys, values), (new_keys, new_values) = cached, new
    bucket = keys.shape[1]
    queries = query.reshape(num_kv_heads, group * num_tokens, head_dim)
    by_query = (num_kv_heads, group, num_tokens, -1)
    scores = dot_rows(queries, new_keys, mask_bias).view(by_query)
    if bucket:
        cached_scores = dot_rows(queries, keys).view(by_query)
        # Scores are joined, the cache is not.
        scores = torch.cat([cached_scores.masked_fill(masked, -math.inf), scores], dim=-1)
    probabilities = torch.softmax(scores, dim=-1, dtype=dtype)

    rows = probabilities.view(num_kv_heads, group * num_tokens, -1)
    attended = weighted_rows(rows[..., bucket:], new_values)
    if bucket:
        attended = weighted_rows(rows[..., :bucket], values) + attended
    return attended.view(by_query), probabilities


def _attend_streaming(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    visible: Visibility,
    divisor: float | None,
) -> tuple[Tensor, Tensor]:
    """``attend`` for one token, in the form that a compiler turns into one loop over the slots
    after another: nothing is joined; cached scores and the token's own share a maximum and a sum.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[0]
    grouped = query.float().view(num_kv_heads, -1, head_dim) / (divisor or math.sqrt(head_dim))
    grouped = torch_private.materialise(grouped)  # [kv_heads, group, head_dim]
    scores = (grouped[:, :, None] * keys.float()[:, None]).sum(-1)  # [kv_heads, group, bucket]
    scores = scores.masked_fill(~visible.cached, -math.inf)
    own = (grouped * new_keys.float()).sum(-1, keepdim=True)  # [kv_heads, group, 1]
    most = torch.maximum(scores.amax(-1, keepdim=True), own)
    weights, own_weight = torch_private.materialise(torch.exp(scores - most)), torch.exp(own - most)
    total = weights.sum(-1, keepdim=True) + own_weight  # [kv_heads, group, 1]
    weighted_values = (weights[..., None] * values.float()[:, None]).sum(2)
    weighted_values = weighted_values + own_weight * new_values.float()
    attended = (weighted_values / total).view(num_tokens, num_heads * head_dim)
    scale = visible.live / total
    mass = (weights * scale).sum((0, 1))  # [bucket]
    own_mass = (own_weight * scale).sum((0, 1))  # [1]
    return attended.to(query.dtype), torch.cat([mass, own_mass])
