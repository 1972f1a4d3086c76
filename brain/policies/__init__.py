"""Which rows are forgotten first: one file per policy, one function each.

A policy is a tensor function ``(state, brightness, mass) → keep-scores [capacity]``, compiled into
the graph that chooses. The lowest scores go first; protection is not its business.
"""

from brain.errors import Refused
from brain.policies import brightness, sink_recent
from compiled.choose import KeepScore

POLICIES: dict[str, KeepScore] = {
    "none": sink_recent.keep_score,  # never asked: without a target nothing is culled
    "sink_recent": sink_recent.keep_score,
    "brightness": brightness.keep_score,
}


def policy(name: str) -> KeepScore:
    """The keep-score function of a policy. Raises Refused for an unknown name."""
    if name not in POLICIES:
        raise Refused(f"cull.policy {name!r} is unknown: use one of {', '.join(POLICIES)}")
    return POLICIES[name]
