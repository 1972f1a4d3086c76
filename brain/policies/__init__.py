"""Which rows are forgotten first: one file per policy, one function each.

A policy is a tensor function ``(state, look) → keep-scores [capacity]``, compiled into the graph
that chooses; ``compiled.choose.KeepScore`` says what it may and must do. The lowest scores go
first; protection is not its business.
"""

import math

from brain.errors import Refused, did_you_mean
from brain.policies import brightness, h2o, keydiff, novelty, random, sink_recent, surprise, tova
from brain.policies.custom import CustomPolicy, custom_policy
from compiled.choose import KeepScore
from compiled.score import Culling

PLAIN: dict[str, KeepScore] = {
    "none": sink_recent.keep_score,  # never asked: without a target nothing is culled
    "sink_recent": sink_recent.keep_score,
    "brightness": brightness.keep_score,
    "h2o": h2o.keep_score,
    "tova": tova.keep_score,
    "keydiff": keydiff.keep_score,
    "surprise": surprise.keep_score,
    "random": random.keep_score,
}
POLICIES = (*PLAIN, "novelty")

__all__ = ["POLICIES", "CustomPolicy", "custom_policy", "policy"]


def policy(name: str, culling: Culling, share: float, lifetime: float | None = None) -> KeepScore:
    """The keep-score function of one of POLICIES or ``package.module:function``. Raises Refused.
    ``share`` of the target is what ``novelty`` keeps for novel rows; ``lifetime``, in targets, is
    how long a row stays novel; None: forever.
    """
    if name == "novelty":
        ticks = math.inf if lifetime is None else lifetime * culling.target
        return novelty.Novelty(round(share * culling.target), culling.recent, ticks)
    if ":" in name:
        return custom_policy(name)
    if name not in PLAIN:
        raise Refused(
            f"cull.policy {name!r} is unknown: use one of {', '.join(POLICIES)}, or "
            f"package.module:function{did_you_mean(name, POLICIES)}"
        )
    return PLAIN[name]
