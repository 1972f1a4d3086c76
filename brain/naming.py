"""The names under which a profiler shows what a brain does.

A range for every tick; in it one for each step, in that one for each graph the step runs. Warming
up is a range too, with one for each graph that is captured. Whoever sets ``Graphs.naming`` decides
who is told: Nsight Systems (``nvtx=true``) or PyTorch's profiler (``task=profile``).
"""

from compiled.graphs import Naming

WHOLE_TICK, WARM_UP = "tick", "warm-up"
READ, CHOOSE, PATCH = "1 read", "1 sample, 2 score, 3 decide", "4 patch"


def nvtx_ranges() -> Naming:
    """Ranges that Nsight Systems records."""
    import nvtx

    naming: Naming = nvtx.annotate
    return naming
