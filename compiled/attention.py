"""Split attention over a read-only cache and the new tokens, with the attention mass.

Scores against the cache and against the new tokens are computed apart and normalised together by
one shared softmax, so the cache is never concatenated with anything.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from compiled.products import dot_rows, heads_at_once, mix_rows, streams_rows, sum_rows


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
) -> tuple[Tensor, Tensor]:
    """Grouped-query attention (Ainslie et al. 2023) of T new tokens.

    ``query`` [T, heads, head_dim]; ``keys``, ``values`` [kv_heads, bucket, head_dim];
    ``new_keys``, ``new_values`` [kv_heads, T, head_dim].

    Returns the attended values [T, heads * head_dim] in the query's dtype, and the attention mass
    in float32, summed over heads and live queries: of every slot, then of every new token
    [bucket + T]. It stays in one piece because a layer that is compiled once may not hand out two
    views of one tensor: refused as aliasing, and silently overwritten where a clone hides it.
    A hidden slot's probability is exactly zero, whatever finite bytes lie in it.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[0]
    group = num_heads // num_kv_heads
    # Query heads that share a key head lie side by side, so no key is ever repeated.
    grouped = query.view(num_tokens, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    grouped = grouped / math.sqrt(head_dim)  # [kv_heads, group, T, head_dim]
    hidden = ~torch.cat([visible.cached, visible.new], dim=-1)  # [T, bucket + T]

    step = heads_at_once(query, num_kv_heads)
    attended, masses = [], []
    for first in range(0, num_kv_heads, step):
        heads = slice(first, first + step)
        cached, new = (keys[heads], values[heads]), (new_keys[heads], new_values[heads])
        mixed, mass = _attend(grouped[heads], cached, new, hidden, visible.live)
        attended.append(mixed)
        masses.append(mass)
    together = torch.cat(attended) if len(attended) > 1 else attended[0]
    together = together.permute(2, 0, 1, 3).reshape(num_tokens, num_heads * head_dim)
    mass = torch.stack(masses).sum(0) if len(masses) > 1 else masses[0]
    return together.to(query.dtype), mass


def _attend(
    query: Tensor,
    cached: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    hidden: Tensor,
    live: Tensor,
) -> tuple[Tensor, Tensor]:
    """Attention of some key heads: ``query`` [K, group, T, head_dim], scaled.

    Returns the attended values [K, group, T, head_dim] float32, and the mass [bucket + T].
    """
    num_kv_heads, group, num_tokens, head_dim = query.shape
    (keys, values), (new_keys, new_values) = cached, new
    bucket = keys.shape[1]
    streaming = streams_rows(query, num_tokens)
    queries = query.reshape(num_kv_heads, group * num_tokens, head_dim)
    scores = torch.cat(
        [dot_rows(queries, keys, streaming), dot_rows(queries, new_keys, streaming)], dim=-1
    )  # [K, group * T, bucket + T]: scores are joined, the cache is not
    by_query = (num_kv_heads, group, num_tokens, -1)
    scores = torch.where(hidden, -math.inf, scores.view(by_query))
    shares = torch.softmax(scores, dim=-1, dtype=torch.float32)

    rows = shares.view(num_kv_heads, group * num_tokens, -1)
    attended = mix_rows(rows[..., :bucket], values, streaming)
    attended = attended + mix_rows(rows[..., bucket:], new_values, streaming)
    mass = sum_rows(shares.view(num_kv_heads * group, num_tokens, -1), live, streaming)
    return attended.view(by_query), mass
