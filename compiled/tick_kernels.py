"""Triton kernels of a tick's choice and patch. ``tick_cuda.py`` starts them, in order.

They know pointers and sizes. What is found piece by piece, a program each, goes to scratch; the
next kernel puts it together. ``B`` is the size of a piece, ``N`` the number of pieces, padded to a
power of two. ``PDL`` is what it is in ``read_kernels.py``.

Only ``carry_out`` stores into the memory.
"""

import triton
import triton.language as tl

from compiled.read_kernels import _await, _begin

_LEAST = tl.constexpr(-(1 << 63))  # below every key
_MOST = tl.constexpr((1 << 63) - 1)  # above every position
_NOT_RANKED = tl.constexpr(1 << 40)  # above the rank of every number
_WORD = tl.constexpr(0xFFFFFFFF)


@triton.jit
def _rank(x):
    """int64 in the order of float32 numbers, both zeros being one."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


# The draw ----------------------------------------------------------------------------------------


@triton.jit
def mark(
    token_id,  # [capacity] int64
    valid,  # [capacity] uint8
    tokens,  # [1] int64: the one that was read
    marks,  # [V] uint8: 1 where a token is remembered or was read
    capacity,
    V: tl.constexpr,
    B: tl.constexpr,
    PDL: tl.constexpr,
):
    """Marks what the penalty is for."""
    _begin(PDL)
    i = tl.program_id(0) * B + tl.arange(0, B)
    inside = i < capacity
    _await(PDL)
    known = tl.load(valid + i, mask=inside, other=0) != 0
    ids = tl.load(token_id + i, mask=known, other=0)
    tl.store(marks + ids, 1, mask=known & (ids >= 0) & (ids < V))
    if tl.program_id(0) == 0:
        read = tl.load(tokens)
        tl.store(marks + read, 1, mask=(read >= 0) & (read < V))


@triton.jit
def score(
    logits,  # [V] float32
    marks,  # [V] uint8, cleared on the way
    penalty,  # [] float32
    temperature,
    best,  # [pieces, KP] int64: keys of the highest scores, descending; the lower token is higher
    tops,  # [pieces] float32: the greatest raw logit
    totals,  # [pieces] float32: sum of exp(raw logit - that)
    floors,  # [pieces] float32: the least raw logit; NaN if there is any
    V: tl.constexpr,
    GREEDY: tl.constexpr,
    KP: tl.constexpr,
    B: tl.constexpr,
    PDL: tl.constexpr,
):
    """One piece of the vocabulary."""
    _begin(PDL)
    piece = tl.program_id(0)
    i = piece * B + tl.arange(0, B)
    inside = i < V
    by = tl.load(penalty)
    _await(PDL)
    x = tl.load(logits + i, mask=inside, other=float("-inf"))
    marked = tl.load(marks + i, mask=inside, other=0) != 0
    tl.debug_barrier()  # a small piece is loaded by several warps, and cleared by one
    tl.store(marks + i, 0, mask=inside)
    lowered = tl.where(x > 0, tl.math.div_rn(x, tl.zeros_like(x) + by), x * by)
    y = tl.where(marked, lowered, x)
    if not GREEDY:
        y = tl.math.div_rn(y, tl.zeros_like(y) + tl.load(temperature))
    # The greatest number is NaN, as it is in PyTorch.
    keys = (tl.where(y == y, _rank(y), 0x7FFFFFFF) << 32) | (_WORD - i.to(tl.int64))
    keys = tl.where(inside, keys, _LEAST)
    if KP == 1:
        tl.store(best + piece, tl.max(keys, 0))
    else:
        tl.store(best + piece * KP + tl.arange(0, KP), tl.topk(keys, KP))
    number = x == x
    top = tl.max(tl.where(number, x, float("-inf")), 0)
    floor = tl.min(tl.where(inside & number, x, float("inf")), 0)
    any_nan = tl.max(tl.where(number, 0, 1), 0) != 0
    safe = tl.where(top == float("-inf"), 0.0, top)
    tl.store(tops + piece, top)
    tl.store(totals + piece, tl.sum(tl.exp(x - safe), 0))
    tl.store(floors + piece, tl.where(any_nan, float("nan"), floor))


@triton.jit
def _uniform(key, tick, lane):
    """``philox.uniform``: word by word in int64, which wraps."""
    c0 = tl.zeros_like(lane) + (tick & _WORD)
    c1 = tl.zeros_like(lane) + ((tick >> 32) & _WORD)
    c2 = lane
    c3 = tl.zeros_like(lane)
    k0 = tl.load(key)
    k1 = tl.load(key + 1)
    for _ in tl.static_range(10):
        product_0 = c0 * 0xD2511F53
        product_1 = c2 * 0xCD9E8D57
        c0 = ((product_1 >> 32) & _WORD) ^ c1 ^ k0
        c1 = product_1 & _WORD
        c2 = ((product_0 >> 32) & _WORD) ^ c3 ^ k1
        c3 = product_0 & _WORD
        k0 = (k0 + 0x9E3779B9) & _WORD
        k1 = (k1 + 0xBB67AE85) & _WORD
    bits = ((c0 << 20) ^ c1) & 0xFFFFFFFFFFFFF
    return (bits.to(tl.float64) + 0.5) * 2.220446049250313e-16  # 2^-52


@triton.jit
def pick(
    logits,  # [V] float32
    best,  # of every piece; see ``score``
    tops,
    totals,
    floors,
    tick,  # [] int64
    top_p,  # [] float32
    min_p,
    key,  # [2] int64
    forced,  # [1] int64
    token,  # [1] int64
    nats,  # [1] float32: its surprise
    extremes,  # [1, 2] float32
    PIECES: tl.constexpr,
    N: tl.constexpr,
    GREEDY: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    NUCLEUS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The pieces put together: the token, and what is told of the logits. One program."""
    _begin(PDL)
    asked = tl.load(forced)
    n = tl.arange(0, N)
    there = n < PIECES
    j = tl.arange(0, N * KP)
    _await(PDL)
    keys = tl.load(best + j, mask=j < PIECES * KP, other=_LEAST)
    if GREEDY:
        drawn = _WORD - (tl.max(keys, 0) & _WORD)
    else:
        k = tl.arange(0, KP)
        keys = tl.topk(keys, KP)  # descending
        ids = _WORD - (keys & _WORD)
        bits = (keys >> 32).to(tl.int32)
        scores = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        scores = tl.where(k < K, scores, float("-inf"))
        shares = tl.exp(scores - tl.max(scores, 0))
        p = shares / tl.sum(shares, 0)
        kept = p >= tl.load(min_p) * tl.max(p, 0)
        if NUCLEUS:
            kept = kept & (tl.cumsum(p, 0) - p < tl.load(top_p))
        noise = -tl.log(-tl.log(_uniform(key, tl.load(tick), ids)))
        told = tl.where(kept, scores, float("-inf")).to(tl.float64) + noise
        told = tl.where(k < K, told, float("-inf"))
        first = tl.min(tl.where(told == tl.max(told, 0), k, KP - 1), 0)
        drawn = tl.sum(tl.where(k == first, ids, 0), 0)
    spoken = tl.where(asked >= 0, asked, drawn)
    tl.store(token, spoken)
    top_of = tl.load(tops + n, mask=there, other=float("-inf"))
    total_of = tl.load(totals + n, mask=there, other=0)
    floor_of = tl.load(floors + n, mask=there, other=float("inf"))
    top = tl.max(top_of, 0)
    total = tl.sum(total_of * tl.exp(top_of - top), 0)
    tl.store(nats, tl.log(total) - (tl.load(logits + spoken) - top))
    number = floor_of == floor_of
    any_nan = tl.max(tl.where(number, 0, 1), 0) != 0
    floor = tl.min(tl.where(number, floor_of, float("inf")), 0)
    tl.store(extremes, tl.where(any_nan, float("nan"), floor))
    tl.store(extremes + 1, tl.where(any_nan, float("nan"), top))


# What to forget ----------------------------------------------------------------------------------


@triton.jit
def _lowest(ranks, places, slots):
    """The lowest rank, of equal ones the earliest place: rank, place and slot."""
    rank = tl.min(ranks, 0)
    place = tl.min(tl.where(ranks == rank, places, _MOST), 0)
    slot = tl.min(tl.where((ranks == rank) & (places == place), slots, 0x7FFFFFFF), 0)
    return rank, place, slot


@triton.jit
def rank_rows(
    valid,  # [capacity] uint8
    pinned,
    position,  # [capacity] int64
    at,  # [1] int64: position of the token that was read
    keep_scores,  # [capacity] float32
    ranks,  # [pieces, 2] int64: of the two lowest rows that may go
    places,  # [pieces, 2] int64: their positions
    slots,  # [pieces, 2] int32
    counts,  # [pieces] int32: valid rows
    capacity,
    SINKS: tl.constexpr,
    RECENT: tl.constexpr,
    B: tl.constexpr,
    PDL: tl.constexpr,
):
    """One piece of the memory."""
    _begin(PDL)
    piece = tl.program_id(0)
    i = piece * B + tl.arange(0, B)
    inside = i < capacity
    _await(PDL)
    known = tl.load(valid + i, mask=inside, other=0) != 0
    pin = tl.load(pinned + i, mask=inside, other=0) != 0
    where = tl.load(position + i, mask=inside, other=0)
    scores = tl.load(keep_scores + i, mask=inside, other=0)
    may_go = known & (pin == 0) & (where >= SINKS) & (where <= tl.load(at) - RECENT)
    scores = tl.where(scores == scores, scores, float("-inf"))
    rank = tl.where(may_go, _rank(scores), _NOT_RANKED)
    first, first_place, first_slot = _lowest(rank, where, i)
    rank = tl.where(i == first_slot, _NOT_RANKED, rank)
    second, second_place, second_slot = _lowest(rank, where, i)
    tl.store(ranks + 2 * piece, first)
    tl.store(ranks + 2 * piece + 1, second)
    tl.store(places + 2 * piece, first_place)
    tl.store(places + 2 * piece + 1, second_place)
    tl.store(slots + 2 * piece, first_slot)
    tl.store(slots + 2 * piece + 1, second_slot)
    tl.store(counts + piece, tl.sum(known.to(tl.int32), 0))


@triton.jit
def choose_rows(
    ranks,  # see ``rank_rows``
    places,
    slots,
    counts,
    cull,  # [capacity] bool
    culled,  # [2] int64: positions, or NOWHERE
    capacity,
    PIECES: tl.constexpr,
    N: tl.constexpr,
    TARGET: tl.constexpr,
    NOWHERE: tl.constexpr,
    B: tl.constexpr,
    PDL: tl.constexpr,
):
    """Every program puts the pieces together, and writes one of the mask."""
    _begin(PDL)
    i = tl.program_id(0) * B + tl.arange(0, B)
    n = tl.arange(0, N)
    j = tl.arange(0, 2 * N)
    there = j < 2 * PIECES
    _await(PDL)
    count = tl.sum(tl.load(counts + n, mask=n < PIECES, other=0), 0)
    rank = tl.load(ranks + j, mask=there, other=_NOT_RANKED)
    place = tl.load(places + j, mask=there, other=_MOST)
    slot = tl.load(slots + j, mask=there, other=0x7FFFFFFF)
    first, first_place, first_slot = _lowest(rank, place, slot)
    rank = tl.where(slot == first_slot, _NOT_RANKED, rank)
    second, second_place, second_slot = _lowest(rank, place, slot)
    one = (first < _NOT_RANKED) & (count >= TARGET)
    two = (second < _NOT_RANKED) & (count > TARGET)
    goes = ((i == first_slot) & one) | ((i == second_slot) & two)
    tl.store(cull + i, goes, mask=i < capacity)
    if tl.program_id(0) == 0:
        tl.store(culled, tl.where(one, first_place, NOWHERE))
        tl.store(culled + 1, tl.where(two, second_place, NOWHERE))


# What is not finite ------------------------------------------------------------------------------


@triton.jit
def _broken(part, size, piece, B: tl.constexpr):
    """Whether a piece of some numbers, if there is such a piece, holds NaN or an infinity."""
    i = piece.to(tl.int64) * B + tl.arange(0, B)
    x = tl.load(part + i, mask=(i >= 0) & (i < size), other=0).to(tl.float32)
    return tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), 0)


@triton.jit
def find_broken(
    first,  # five parts, of any float type
    second,
    third,
    fourth,
    fifth,
    flags,  # [pieces of all of them] int32
    first_size,
    second_size,
    third_size,
    fourth_size,
    fifth_size,
    B: tl.constexpr,
    PDL: tl.constexpr,
):
    """One piece of one of the parts."""
    _begin(PDL)
    piece = tl.program_id(0)
    _await(PDL)
    found = _broken(first, first_size, piece, B)
    piece -= tl.cdiv(first_size, B)
    found |= _broken(second, second_size, piece, B) << 1
    piece -= tl.cdiv(second_size, B)
    found |= _broken(third, third_size, piece, B) << 2
    piece -= tl.cdiv(third_size, B)
    found |= _broken(fourth, fourth_size, piece, B) << 3
    piece -= tl.cdiv(fourth_size, B)
    found |= _broken(fifth, fifth_size, piece, B) << 4
    tl.store(flags + tl.program_id(0), found)


@triton.jit
def join_flags(
    flags,  # see ``find_broken``
    not_finite,  # [] int64
    pieces,
    N: tl.constexpr,
    PDL: tl.constexpr,
):
    """All bits that any of the pieces has. One program."""
    _begin(PDL)
    n = tl.arange(0, N)
    _await(PDL)
    found = tl.load(flags + n, mask=n < pieces, other=0)
    joined = tl.max(found & 1, 0)
    for bit in tl.static_range(1, 5):
        joined |= tl.max(found & (1 << bit), 0)
    tl.store(not_finite, joined.to(tl.int64))


# The patch ---------------------------------------------------------------------------------------


@triton.jit
def find_free(
    valid,  # [capacity] uint8
    cull,  # [capacity] uint8
    free,  # [pieces] int32: the lowest slot that is free after culling; the capacity if none is
    capacity,
    B: tl.constexpr,
    PDL: tl.constexpr,
):
    """One piece of the memory."""
    _begin(PDL)
    i = tl.program_id(0) * B + tl.arange(0, B)
    inside = i < capacity
    _await(PDL)
    held = tl.load(valid + i, mask=inside, other=1) != 0
    goes = tl.load(cull + i, mask=inside, other=0) != 0
    tl.store(free + tl.program_id(0), tl.min(tl.where(inside & (goes | (held == 0)), i, capacity)))


@triton.jit
def carry_out(
    keys,  # [planes, capacity, D]: the memory
    values,
    token_id,  # [capacity] each
    position,
    brightness,
    surprise,
    novelty,
    source,
    born,
    lit,
    valid,
    pinned,
    cursor_token,  # one number each
    cursor_position,
    cursor_surprise,
    cursor_novelty,
    cursor_source,
    cursor_uncommitted,
    cursor_tick,
    new_keys,  # [planes, D]: the plan
    new_values,
    new_token_id,  # one number each
    new_position,
    new_brightness,
    new_surprise,
    new_novelty,
    new_source,
    new_born,
    new_lit,
    new_pinned,
    cull,  # [capacity] uint8
    updated_brightness,  # [capacity] each
    updated_lit,
    updated_novelty,
    next_token,
    next_position,
    next_surprise,
    next_novelty,
    next_source,
    next_uncommitted,
    next_tick,
    length,  # [] int64
    not_finite,  # [] int64
    free,  # see ``find_free``
    capacity,
    PIECES: tl.constexpr,
    N: tl.constexpr,
    PLANES: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    BR: tl.constexpr,
    PDL: tl.constexpr,
):
    """The first PIECES programs write columns, a piece each, and the first of them the row's own
    and the cursor; the others write keys and values of the row.
    """
    _begin(PDL)
    program = tl.program_id(0)
    n = tl.arange(0, N)
    wanted = tl.load(not_finite) == 0
    live = wanted & (tl.load(length) > 0)
    _await(PDL)
    slot = tl.min(tl.load(free + n, mask=n < PIECES, other=0x7FFFFFFF), 0)
    slot = tl.where(slot < capacity, slot, 0)
    if program < PIECES:
        i = program * B + tl.arange(0, B)
        written = (i < capacity) & wanted
        here = (i == slot) & live
        bright = tl.load(updated_brightness + i, mask=written, other=0)
        last = tl.load(updated_lit + i, mask=written, other=0)
        novel = tl.load(updated_novelty + i, mask=written, other=0)
        held = tl.load(valid + i, mask=written, other=0) != 0
        goes = tl.load(cull + i, mask=written, other=0) != 0
        tl.store(brightness + i, tl.where(here, tl.load(new_brightness), bright), mask=written)
        tl.store(lit + i, tl.where(here, tl.load(new_lit), last), mask=written)
        tl.store(novelty + i, tl.where(here, tl.load(new_novelty), novel), mask=written)
        tl.store(valid + i, here | (held & (goes == 0)), mask=written)
        if program == 0:
            tl.store(token_id + slot, tl.load(new_token_id), mask=live)
            tl.store(position + slot, tl.load(new_position), mask=live)
            tl.store(surprise + slot, tl.load(new_surprise), mask=live)
            tl.store(source + slot, tl.load(new_source), mask=live)
            tl.store(born + slot, tl.load(new_born), mask=live)
            tl.store(pinned + slot, tl.load(new_pinned), mask=live)
            tl.store(cursor_token, tl.load(next_token), mask=wanted)
            tl.store(cursor_position, tl.load(next_position), mask=wanted)
            tl.store(cursor_surprise, tl.load(next_surprise), mask=wanted)
            tl.store(cursor_novelty, tl.load(next_novelty), mask=wanted)
            tl.store(cursor_source, tl.load(next_source), mask=wanted)
            tl.store(cursor_uncommitted, tl.load(next_uncommitted), mask=wanted)
            tl.store(cursor_tick, tl.load(next_tick), mask=wanted)
    else:
        e = (program - PIECES) * BR + tl.arange(0, BR)
        real = (e < PLANES * D) & live
        to = ((e // D).to(tl.int64) * capacity + slot) * D + e % D
        tl.store(keys + to, tl.load(new_keys + e, mask=real, other=0), mask=real)
        tl.store(values + to, tl.load(new_values + e, mask=real, other=0), mask=real)
