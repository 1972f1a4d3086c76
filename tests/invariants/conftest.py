"""Fixtures that several invariants share."""

import pytest
import torch

from brain import Brain
from fixture_types import OpenTiny

LAYERED = ((1, 32), (1, 48), (4, 32), (16, 48))
"""Widths and buckets of reads: each of both, one and several tokens in either bucket."""


@pytest.fixture(scope="session")
def layered_brain(open_tiny: OpenTiny) -> Brain:
    """The tiny brain with its reads captured layer by layer, as on a GPU, without the operator."""
    b = open_tiny(engine="compiled", **{"engine.native": False})
    for width, bucket in LAYERED:
        zeros = torch.zeros(width, dtype=torch.int64)
        b.graphs.read(zeros, zeros + 0, torch.tensor(0), high_water=bucket)
        if width == 1:
            b.graphs.step(b._unforced, high_water=bucket)
    return b


@pytest.fixture(params=["operator", "layers"])
def reading_brain(request: pytest.FixtureRequest) -> Brain:
    """Captured reads of both kinds."""
    chosen: Brain = request.getfixturevalue(
        "warm_brain" if request.param == "operator" else "layered_brain"
    )
    return chosen


@pytest.fixture(scope="session", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def pair(dtype: str, open_tiny: OpenTiny) -> dict[str, Brain]:
    """An eager and a captured brain with one bucket, for reads alone: six graphs in all."""
    options = {"dtype": dtype, "engine.smallest_bucket": 48}
    return {engine: open_tiny(engine=engine, **options) for engine in ("eager", "compiled")}
