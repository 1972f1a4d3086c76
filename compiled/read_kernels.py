"""Triton kernels that take a few tokens through a layer. ``read_cuda.py`` starts them, in order.

They know pointers and sizes. All of these but the number of slots are constants. How the slots are
cut into splits follows, on the device, from the last one that any token sees. ``T`` is the number
of tokens, ``TP`` the power of two that it is padded to. Activations and sums are float32; queries,
keys, values and the weights of attention have the model's dtype.

``PDL``: a kernel may start while the one before it still runs (programmatic dependent launch, from
compute capability 9.0 on). What nobody writes during a read, weights, cache and where it ends, may
be loaded before the wait; what an earlier kernel wrote, after it.
"""

import triton
import triton.language as tl


@triton.jit
def _begin(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _await(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _dot(a, b, WIDE: tl.constexpr):
    """``a @ b``, summed in float32. The interpreter takes the bits of a bfloat16 for an integer, so
    there both are widened first.
    """
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _product(
    weight,
    scale,
    rows,  # [BN], of the weight
    inside,  # [BN], whether there is such a row
    x,  # [T, K] float32
    gain,  # [K] of the norm, if NORM
    T: tl.constexpr,
    TP: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    INT8: tl.constexpr,
    PDL: tl.constexpr,
):
    """``norm(x) @ weight[rows].T``: [TP, BN] float32. Waits once the first weights are on their
    way.
    """
    k = tl.arange(0, BK)
    t = tl.arange(0, TP)
    live = (t < T)[:, None]
    at = rows.to(tl.int64)[:, None] * K
    w = tl.load(weight + at + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0)
    _await(PDL)
    v = tl.load(x + t[:, None] * K + k[None, :], mask=live & (k < K)[None, :], other=0)
    squares = v * v
    if NORM:
        v *= tl.load(gain + k, mask=k < K, other=0).to(tl.float32)[None, :]
    sums = w.to(tl.float32)[None, :, :] * v[:, None, :]
    for first in range(BK, K, BK):
        i = first + k
        w = tl.load(weight + at + i[None, :], mask=inside[:, None] & (i < K)[None, :], other=0)
        v = tl.load(x + t[:, None] * K + i[None, :], mask=live & (i < K)[None, :], other=0)
        squares += v * v
        if NORM:
            v *= tl.load(gain + i, mask=i < K, other=0).to(tl.float32)[None, :]
        sums += w.to(tl.float32)[None, :, :] * v[:, None, :]
    y = tl.sum(sums, 2)
    if NORM:
        y *= tl.rsqrt(tl.sum(squares, 1) / K + EPS)[:, None]
    if INT8:
        y *= tl.load(scale + rows, mask=inside, other=0)[None, :]
    return y


@triton.jit
def project(
    hidden,  # [T, H] float32
    gain,  # [H]
    weight,  # [(HEADS + 2 * KV) * D, H]
    scale,
    cos,  # [T, D / 2] float32
    sin,
    queries,  # [T, HEADS, D] model dtype
    new_keys,  # [KV, T, D] model dtype
    new_values,
    bias,  # [(HEADS + 2 * KV) * D], if BIAS
    T: tl.constexpr,
    TP: tl.constexpr,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    EPS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    INT8: tl.constexpr,
    BIAS: tl.constexpr,
    TURNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Norm, projection, and rotation if it TURNS. A program has BN / 2 pairs of one head, partners
    side by side.
    """
    _begin(PDL)
    HALF: tl.constexpr = D // 2
    PAIRS: tl.constexpr = BN // 2
    PER_HEAD: tl.constexpr = (HALF + PAIRS - 1) // PAIRS
    head = tl.program_id(0) // PER_HEAD
    first = (tl.program_id(0) % PER_HEAD) * PAIRS
    n = tl.arange(0, BN)
    of_rows = first + n // 2
    rows = head * D + of_rows + (n % 2) * HALF
    y = _product(
        weight, scale, rows, of_rows < HALF, hidden, gain, T, TP, H, BK, True, EPS, INT8, PDL
    )
    if BIAS:
        y += tl.load(bias + rows, mask=of_rows < HALF, other=0).to(tl.float32)[None, :]
    low, high = tl.split(tl.reshape(y, [TP, PAIRS, 2]))
    t = tl.arange(0, TP)
    pair = first + tl.arange(0, PAIRS)
    real = (t < T)[:, None] & (pair < HALF)[None, :]
    angle = t[:, None] * HALF + pair[None, :]
    turned = real & (head < (HEADS + KV if TURNS else 0))
    c = tl.load(cos + angle, mask=turned, other=1)
    s = tl.load(sin + angle, mask=turned, other=0)
    a = low * c - high * s
    b = high * c + low * s
    if head < HEADS:
        to = queries + (t[:, None] * HEADS + head) * D + pair[None, :]
    elif head < HEADS + KV:
        to = new_keys + ((head - HEADS) * T + t[:, None]) * D + pair[None, :]
    else:
        to = new_values + ((head - HEADS - KV) * T + t[:, None]) * D + pair[None, :]
    tl.store(to, a.to(queries.dtype.element_ty), mask=real)
    tl.store(to + HALF, b.to(queries.dtype.element_ty), mask=real)


@triton.jit
def turn(
    cos,  # [T, D / 2] float32
    sin,
    gain,  # [2, D], of queries and of keys
    queries,  # [T, HEADS, D], in place
    new_keys,  # [KV, T, D], in place
    T: tl.constexpr,
    HEADS: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    EPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Norm of a query or key, rotation. A program has one, of one token."""
    _begin(PDL)
    HALF: tl.constexpr = D // 2
    token = tl.program_id(0) // (HEADS + KV)
    head = tl.program_id(0) % (HEADS + KV)
    pair = tl.arange(0, DP)
    real = pair < HALF
    c = tl.load(cos + token * HALF + pair, mask=real, other=1)
    s = tl.load(sin + token * HALF + pair, mask=real, other=0)
    of = gain + pair + tl.where(head < HEADS, 0, D)
    low_gain = tl.load(of, mask=real, other=0).to(tl.float32)
    high_gain = tl.load(of + HALF, mask=real, other=0).to(tl.float32)
    if head < HEADS:
        at = queries + (token * HEADS + head) * D + pair
    else:
        at = new_keys + ((head - HEADS) * T + token) * D + pair
    _await(PDL)
    low = tl.load(at, mask=real, other=0).to(tl.float32)
    high = tl.load(at + HALF, mask=real, other=0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(low * low + high * high, 0) / D + EPS)
    low *= factor * low_gain
    high *= factor * high_gain
    tl.store(at, (low * c - high * s).to(queries.dtype.element_ty), mask=real)
    tl.store(at + HALF, (high * c + low * s).to(queries.dtype.element_ty), mask=real)


@triton.jit
def attend(
    queries,  # [T, HEADS, D]
    keys,  # [KV, capacity, D]
    values,
    seen,  # [T, bucket] uint8: who sees which slot
    weights,  # [T * HEADS, bucket] model dtype: exp(score - maximum so far)
    crests,  # [T * HEADS, blocks of the bucket] float32: that maximum, block by block
    parts,  # [T * HEADS, SPLITS, D] float32
    tops,  # [T * HEADS, SPLITS] float32
    totals,
    end,  # [1] int64, one past the last slot that any token sees
    capacity,
    bucket,
    T: tl.constexpr,
    HEADS: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    RP: tl.constexpr,
    BS: tl.constexpr,
    MOST: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALE: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One split of the slots, for all tokens and all query heads of one key head: their rows. A
    split has as many blocks as the slots before the end need in MOST splits.
    """
    _begin(PDL)
    GROUP: tl.constexpr = HEADS // KV
    kv = tl.program_id(0)
    split = tl.program_id(1)
    d = tl.arange(0, DP)
    r = tl.arange(0, RP)
    token = r // GROUP
    head = kv * GROUP + r % GROUP
    row = token * HEADS + head  # of all queries
    real = r < T * GROUP
    base = kv.to(tl.int64) * capacity
    last = tl.load(end).to(tl.int32)
    per_split = tl.cdiv(last, BS * MOST)
    first = split * per_split
    crest = crests + row * tl.cdiv(bucket, BS)
    _await(PDL)
    q = tl.load(
        queries + row[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0
    )
    best = tl.full([RP], float("-inf"), tl.float32)
    total = tl.zeros([RP], tl.float32)
    out = tl.zeros([RP, DP], tl.float32)
    for block in range(first, tl.minimum(first + per_split, tl.cdiv(last, BS))):
        slot = block * BS + tl.arange(0, BS)
        wide_slot = slot.to(tl.int64)
        there = real[:, None] & (slot < last)[None, :]
        sees = (
            tl.load(
                seen + token.to(tl.int64)[:, None] * bucket + wide_slot[None, :],
                mask=there,
                other=0,
            )
            != 0
        )
        anyone = tl.max(sees.to(tl.int32), 0) != 0
        at = (base + wide_slot)[:, None] * D + d[None, :]
        known = anyone[:, None] & (d < D)[None, :]
        k = tl.load(keys + at, mask=known, other=0)
        v = tl.load(values + at, mask=known, other=0)
        scores = tl.where(sees, _dot(q, tl.trans(k), WIDE) * SCALE, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp(scores - safe[:, None])
        tl.store(
            weights + row.to(tl.int64)[:, None] * bucket + wide_slot[None, :],
            p.to(weights.dtype.element_ty),
            mask=there,
        )
        tl.store(crest + block, higher, mask=real)
        shrink = tl.exp(best - safe)
        total = total * shrink + tl.sum(p, 1)
        out = out * shrink[:, None] + _dot(p.to(v.dtype), v, WIDE)
        best = higher
    to = row * SPLITS + split
    tl.store(tops + to, best, mask=real)
    tl.store(totals + to, total, mask=real)
    tl.store(parts + to[:, None] * D + d[None, :], out, mask=real[:, None] & (d < D)[None, :])


@triton.jit
def combine(
    queries,  # [T, HEADS, D]
    new_keys,  # [KV, T, D]
    new_values,
    seen_new,  # [T, T] uint8: who sees which new token
    parts,
    tops,
    totals,
    attended,  # [T, HEADS * D] float32
    summary,  # [2, T * HEADS] float32: maximum, sum
    own,  # [T * HEADS, T] float32: shares of the new tokens
    end,
    T: tl.constexpr,
    TP: tl.constexpr,
    HEADS: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BS: tl.constexpr,
    MOST: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One query of one head: its splits, and the new tokens that it sees."""
    _begin(PDL)
    row = tl.program_id(0)
    token = row // HEADS
    kv = (row % HEADS) // (HEADS // KV)
    d = tl.arange(0, DP)
    j = tl.arange(0, TP)
    split = tl.arange(0, MOST)
    inside = d < D
    blocks = tl.cdiv(tl.load(end).to(tl.int32), BS)
    _await(PDL)
    top = tl.load(tops + row * SPLITS + split, mask=split < SPLITS, other=float("-inf"))
    total = tl.load(totals + row * SPLITS + split, mask=split < SPLITS, other=0)
    q = tl.load(queries + row * D + d, mask=inside, other=0).to(tl.float32)
    at = (kv * T + j)[:, None] * D + d[None, :]
    new = (j < T)[:, None] & inside[None, :]
    k = tl.load(new_keys + at, mask=new, other=0).to(tl.float32)
    v = tl.load(new_values + at, mask=new, other=0).to(tl.float32)
    sees = tl.load(seen_new + token * T + j, mask=j < T, other=0) != 0
    scores = tl.where(sees, tl.sum(k * q[None, :], 1) * SCALE, float("-inf"))
    best = tl.maximum(tl.max(top, 0), tl.max(scores, 0))
    mine = tl.exp(scores - best)
    share = tl.exp(top - best)
    whole = tl.sum(total * share, 0) + tl.sum(mine, 0)
    out = tl.sum(mine[:, None] * v, 0)
    for first in range(0, tl.minimum(blocks, SPLITS), 16):  # a split has one block, or more
        i = first + tl.arange(0, 16)
        factor = tl.exp(
            tl.load(tops + row * SPLITS + i, mask=i < SPLITS, other=float("-inf")) - best
        )
        p = tl.load(
            parts + (row * SPLITS + i)[:, None] * D + d[None, :],
            mask=(i < SPLITS)[:, None] & inside[None, :],
            other=0,
        )
        out += tl.sum(p * factor[:, None], 0)
    tl.store(attended + row * D + d, out / whole, mask=inside)
    tl.store(summary + row, best)
    tl.store(summary + T * HEADS + row, whole)
    tl.store(own + row * T + j, mine / whole, mask=j < T)


@triton.jit
def add_out(
    attended,  # [T, HEADS * D] float32
    weight,  # [H, HEADS * D]
    scale,
    before,  # [T, H] float32
    hidden,  # [T, H] float32
    weights,  # of the slots; see ``attend``
    crests,
    summary,
    own,
    live,  # [T] float32
    mass,  # [T or 1, bucket + T] float32
    end,
    bucket,
    PRODUCTS,
    SHARES,
    T: tl.constexpr,
    TP: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    HEADS: tl.constexpr,
    HP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    BS: tl.constexpr,
    PER_QUERY: tl.constexpr,
    FIRST: tl.constexpr,
    INT8: tl.constexpr,
    PDL: tl.constexpr,
):
    """``hidden = before + attended @ weight.T``, by the first PRODUCTS programs. The next SHARES
    add the layer's attention to the mass of the slots, and the last one to that of the new tokens.
    """
    _begin(PDL)
    program = tl.program_id(0)
    head = tl.arange(0, HP)
    t = tl.arange(0, TP)
    if program < PRODUCTS:
        n = program * BN + tl.arange(0, BN)
        y = _product(
            weight, scale, n, n < H, attended, attended, T, TP, K, BK, False, 0.0, INT8, PDL
        )
        real = (t < T)[:, None] & (n < H)[None, :]
        at = t[:, None] * H + n[None, :]
        tl.store(hidden + at, tl.load(before + at, mask=real, other=0) + y, mask=real)
    elif program < PRODUCTS + SHARES:
        last = tl.load(end)
        _await(PDL)
        slot = (program - PRODUCTS) * BM + tl.arange(0, BM)
        wide_slot = slot.to(tl.int64)
        inside = slot < bucket
        reached = slot < last
        share = tl.zeros([BM], tl.float32)
        for token in tl.static_range(T):
            row = token * HEADS + head
            best = tl.load(summary + row, mask=head < HEADS, other=0)
            whole = tl.load(summary + T * HEADS + row, mask=head < HEADS, other=1)
            there = (head < HEADS)[:, None] & reached[None, :]
            p = tl.load(
                weights + row.to(tl.int64)[:, None] * bucket + wide_slot[None, :],
                mask=there,
                other=0,
            ).to(tl.float32)
            crest = tl.load(
                crests + row[:, None] * tl.cdiv(bucket, BS) + (slot // BS)[None, :],
                mask=there,
                other=float("-inf"),
            )
            given = tl.sum(p * (tl.exp(crest - best[:, None]) / whole[:, None]), 0)
            if PER_QUERY:
                to = mass + token * (bucket + T) + wide_slot
                if not FIRST:
                    given += tl.load(to, mask=inside, other=0)
                tl.store(to, given, mask=inside)
            else:
                # Of padding nothing is asked, and it may be anything.
                share += tl.where(tl.load(live + token) != 0, given, 0.0)
        if not PER_QUERY:
            to = mass + wide_slot
            if not FIRST:
                share += tl.load(to, mask=inside, other=0)
            tl.store(to, share, mask=inside)
    else:
        _await(PDL)
        new = tl.arange(0, TP)
        own_share = tl.zeros([TP], tl.float32)
        for token in tl.static_range(T):
            own_row = token * HEADS + head
            known = (head < HEADS)[:, None] & (new < T)[None, :]
            own_given = tl.sum(
                tl.load(own + own_row[:, None] * T + new[None, :], mask=known, other=0), 0
            )
            if PER_QUERY:
                own_to = mass + token * (bucket + T) + bucket + new
                if not FIRST:
                    own_given += tl.load(own_to, mask=new < T, other=0)
                tl.store(own_to, own_given, mask=new < T)
            else:
                own_share += tl.where(tl.load(live + token) != 0, own_given, 0.0)
        if not PER_QUERY:
            own_at = mass + bucket + new
            if not FIRST:
                own_share += tl.load(own_at, mask=new < T, other=0)
            tl.store(own_at, own_share, mask=new < T)


@triton.jit
def gate_up(
    hidden,  # [T, H] float32
    gain,
    weight,  # [2 * INNER, H]: gates, then ups
    scale,
    inner,  # [T, INNER] float32
    T: tl.constexpr,
    TP: tl.constexpr,
    H: tl.constexpr,
    INNER: tl.constexpr,
    EPS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    INT8: tl.constexpr,
    PDL: tl.constexpr,
):
    """Norm, gate and up, SwiGLU (Shazeer 2020). A program has BN / 2 of each, side by side."""
    _begin(PDL)
    HALF: tl.constexpr = BN // 2
    n = tl.arange(0, BN)
    of_rows = tl.program_id(0) * HALF + n // 2
    rows = of_rows + (n % 2) * INNER
    y = _product(
        weight, scale, rows, of_rows < INNER, hidden, gain, T, TP, H, BK, True, EPS, INT8, PDL
    )
    gate, up = tl.split(tl.reshape(y, [TP, HALF, 2]))
    t = tl.arange(0, TP)
    m = tl.program_id(0) * HALF + tl.arange(0, HALF)
    real = (t < T)[:, None] & (m < INNER)[None, :]
    tl.store(inner + t[:, None] * INNER + m[None, :], gate / (1 + tl.exp(-gate)) * up, mask=real)


@triton.jit
def add_down(
    inner,  # [T, K] float32
    weight,  # [H, K]
    scale,
    hidden,  # [T, H] float32, in place
    T: tl.constexpr,
    TP: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    INT8: tl.constexpr,
    PDL: tl.constexpr,
):
    """``hidden += inner @ weight.T``."""
    _begin(PDL)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    y = _product(weight, scale, n, n < H, inner, inner, T, TP, K, BK, False, 0.0, INT8, PDL)
    t = tl.arange(0, TP)
    real = (t < T)[:, None] & (n < H)[None, :]
    at = t[:, None] * H + n[None, :]
    tl.store(hidden + at, tl.load(hidden + at, mask=real, other=0) + y, mask=real)


@triton.jit
def head(
    hidden,  # [T, H] float32
    gain,
    weight,  # [V, H]
    scale,
    logits,  # [T, V] float32
    T: tl.constexpr,
    TP: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    EPS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    INT8: tl.constexpr,
    DIVISOR: tl.constexpr,
    PDL: tl.constexpr,
):
    """Norm and head, whose products are divided by DIVISOR."""
    _begin(PDL)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    y = _product(weight, scale, n, n < V, hidden, gain, T, TP, H, BK, True, EPS, INT8, PDL)
    if DIVISOR != 1:
        y /= DIVISOR
    t = tl.arange(0, TP)
    real = (t < T)[:, None] & (n < V)[None, :]
    tl.store(logits + t[:, None] * V + n[None, :], y, mask=real)
