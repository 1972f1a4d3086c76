"""Comparing what came of a script with what the reference expects.

In float32 every stored number is compared: logits within LOGIT_TOLERANCE, and the same greedy
token wherever the reference prefers one clearly. Below float32 the yardstick is the reference's own
noise: how far the reference implementation in the same dtype is from itself in float32.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from brain.measure.golden.script import Label, Observed

LOGIT_TOLERANCE = 2e-3
"""Float32, |ours - reference|: the numerical contract of this project.

Measured on 862 tokens of SmolLM2: 2.5e-4 at most, nearly all of it from the reference's float32
RoPE angles. Against a float64 run of the reference, ours is off by 9e-5, the reference by 2.5e-4.
"""

SURPRISE_TOLERANCE = 2 * LOGIT_TOLERANCE
"""A surprise is log-sum-exp minus a logit, either of which may be off by LOGIT_TOLERANCE."""

CLEAR_GAP = 1e-2
"""The reference's top-2 gap from which on the greedy token must be the same."""

NOISE_FACTOR = 1.5
"""Below float32: how many times the reference's own noise is allowed, on average."""

FEW = 12
"""Averages over fewer values than this scatter too much to be judged."""

TOP = 64


class Expected(NamedTuple):
    """What a golden keeps of the reference's float32 run."""

    top_ids: Tensor  # [rows, TOP] int32, likeliest first
    top_logits: Tensor  # [rows, TOP] float32
    logsumexp: Tensor  # [rows] float32
    full_rows: Tensor  # [full] int32: rows that are kept whole
    full_logits: Tensor  # [full, vocab] float32
    surprises: Tensor  # [tokens] float32


def expected_of(observed: Observed, full: int) -> Expected:
    """What to keep of a run, with ``full`` rows kept whole, evenly spread and the last among them.

    Of the values, not views: nothing else of the run stays in memory.
    """
    rows = len(observed.rows)
    top = observed.logits.topk(min(TOP, observed.logits.shape[1]), sorted=True)
    count = min(full, rows)
    kept = torch.tensor([(index + 1) * rows // count - 1 for index in range(count)]).int()
    return Expected(
        top.indices.int(),
        top.values,
        observed.logits.logsumexp(-1),
        kept,
        observed.logits[kept.long()],
        observed.surprises,
    )


@dataclass(frozen=True)
class Distance:
    """How far a run is from the expected one. Averages of nothing are 0."""

    logit: float  # max |Δ| over all stored logits and log-sum-exps
    surprise: float  # max |Δ|
    kl: float  # mean over rows; a row's TOP tokens, and all others taken as one
    kl_full: float  # mean over the rows that are kept whole
    surprise_mean: float  # mean |Δ|

    def to_json(self) -> dict[str, float]:
        """As JSON."""
        return asdict(self)


class _Differences(NamedTuple):
    logit: Tensor  # [rows]
    surprise: Tensor  # [tokens]
    kl: Tensor  # [rows]
    kl_full: Tensor  # [full]

    def distance(self) -> Distance:
        return Distance(
            _worst(self.logit),
            _worst(self.surprise),
            _mean(self.kl),
            _mean(self.kl_full),
            _mean(self.surprise),
        )


def _worst(values: Tensor) -> float:
    return float(values.max()) if len(values) else 0.0  # NaN wins


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0


def _differences(expected: Expected, observed: Observed) -> _Differences:
    ids, full = expected.top_ids.long(), expected.full_rows.long()
    ours = observed.logits.gather(1, ids)
    ours_total = observed.logits.logsumexp(-1)
    logit = (ours - expected.top_logits).abs().amax(1)
    logit = torch.maximum(logit, (ours_total - expected.logsumexp).abs())
    full_delta = (observed.logits[full] - expected.full_logits).abs().amax(1)
    logit = logit.index_copy(0, full, torch.maximum(logit[full], full_delta))

    wanted = expected.top_logits.double() - expected.logsumexp.double()[:, None]
    found = ours.double() - ours_total.double()[:, None]
    kl = (wanted.exp() * (wanted - found)).sum(-1)
    wanted_rest = (1 - wanted.exp().sum(-1)).clamp(min=1e-12)
    found_rest = (1 - found.exp().sum(-1)).clamp(min=1e-12)
    kl = kl + wanted_rest * (wanted_rest / found_rest).log()

    p = expected.full_logits.double().log_softmax(-1)
    q = observed.logits[full].double().log_softmax(-1)
    return _Differences(
        logit,
        (observed.surprises - expected.surprises).abs(),
        kl,
        (p.exp() * (p - q)).sum(-1),
    )


def distance(expected: Expected, observed: Observed) -> Distance:
    """How far the run is from the expected one."""
    return _differences(expected, observed).distance()


@dataclass(frozen=True)
class Verdict:
    """The outcome of one comparison. ``failure`` is None, or one line that says what and where."""

    distance: Distance
    noise: Distance | None  # the reference's own, below float32
    rows: int
    tokens: int
    clear: int  # rows where the reference prefers a token clearly, float32 only
    agreeing: int  # of these, rows with the same greedy token
    failure: str | None

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {**vars(self), "distance": self.distance.to_json()} | {
            "noise": self.noise.to_json() if self.noise else None
        }


Decode = Callable[[list[int]], str]


def judge(
    expected: Expected, observed: Observed, noise: Distance | None, decode: Decode
) -> Verdict:
    """Compares a run with the golden: in float32 (``noise`` None), or in a dtype in which the
    reference implementation has this noise.
    """
    rows, tokens = len(expected.top_ids), len(expected.surprises)
    differences = _differences(expected, observed)
    found = differences.distance()
    clear = agreeing = 0
    if noise is None:
        is_clear = expected.top_logits[:, 0] - expected.top_logits[:, 1] > CLEAR_GAP
        agrees = observed.logits.argmax(1) == expected.top_ids[:, 0]
        clear, agreeing = int(is_clear.sum()), int((is_clear & agrees).sum())
        wrong_row = ~(differences.logit <= LOGIT_TOLERANCE) | (is_clear & ~agrees)
        wrong_token = ~(differences.surprise <= SURPRISE_TOLERANCE)
        failure = _first_wrong(expected, observed, wrong_row, wrong_token, decode)
    else:
        failure = _too_noisy(expected, observed, differences, noise, decode)
    if failure is not None:
        failure += f"; max|Δ| {found.logit:.3g}, KL {found.kl:.3g}"
    return Verdict(found, noise, rows, tokens, clear, agreeing, failure)


def _first_wrong(
    expected: Expected, observed: Observed, rows: Tensor, tokens: Tensor, decode: Decode
) -> str | None:
    """The first number, in the order of the script, that is not the reference's."""
    wrong: list[tuple[Label, str]] = []
    if rows.any():
        row = int(rows.int().argmax())
        wrong.append((observed.rows[row], _row_difference(expected, observed, row, decode)))
    if tokens.any():
        index = int(tokens.int().argmax())
        ours, theirs = float(observed.surprises[index]), float(expected.surprises[index])
        label = observed.tokens[index]
        wrong.append((label, f"its surprise is {ours:.4f}, the reference's {theirs:.4f}"))
    if not wrong:
        return None
    label, text = min(wrong, key=lambda pair: (pair[0].step, pair[0].position))
    return f"{_where(label, decode)}: {text}"


def _too_noisy(
    expected: Expected,
    observed: Observed,
    differences: _Differences,
    noise: Distance,
    decode: Decode,
) -> str | None:
    """Which average exceeds the reference's own noise, and where it is worst."""
    found = differences.distance()
    judged = [
        ("KL", found.kl, noise.kl, differences.kl),
        ("KL of whole rows", found.kl_full, noise.kl_full, differences.kl_full),
        ("mean |Δ surprise|", found.surprise_mean, noise.surprise_mean, differences.surprise),
    ]
    for name, ours, theirs, values in judged:
        if len(values) < FEW or ours <= NOISE_FACTOR * theirs:
            continue
        worst = int(values.nan_to_num(math.inf).argmax())
        if values is differences.surprise:
            text = _where(observed.tokens[worst], decode)
        else:
            row = int(expected.full_rows[worst]) if values is differences.kl_full else worst
            difference = _row_difference(expected, observed, row, decode)
            text = f"{_where(observed.rows[row], decode)}: {difference}"
        return (
            f"{name} {ours:.3g} is more than {NOISE_FACTOR} times the reference's {theirs:.3g}, "
            f"worst at {text}"
        )
    return None


def _row_difference(expected: Expected, observed: Observed, row: int, decode: Decode) -> str:
    """The stored logit of a row that differs most."""
    ids, theirs = expected.top_ids[row].long(), expected.top_logits[row]
    whole = (expected.full_rows == row).nonzero()
    if len(whole):
        theirs = expected.full_logits[whole[0, 0]]
        ids = torch.arange(len(theirs))
    ours = observed.logits[row, ids]
    worst = int((ours - theirs).abs().nan_to_num(math.inf).argmax())
    greedy, wanted = int(observed.logits[row].argmax()), int(expected.top_ids[row, 0])
    text = (
        f"logit of token {int(ids[worst])} {decode([int(ids[worst])])!r} is "
        f"{float(ours[worst]):.4f}, the reference's {float(theirs[worst]):.4f}"
    )
    if greedy != wanted:
        text += f"; greedy token {greedy} {decode([greedy])!r}, not {wanted} {decode([wanted])!r}"
    return text


def _where(label: Label, decode: Decode) -> str:
    return f"position {label.position}, token {label.token} {decode([label.token])!r}"
