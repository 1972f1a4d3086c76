"""Invariants that only a CUDA device can break: graph capture, asynchrony, another arithmetic."""

import contextlib

import pytest
import torch

from brain import Append, Boost, Brain, Cull, Pin, Redact, Replace
from brain.loop import PATCH, STEP
from cuda_graphs import cudagraph_counts, recordings
from fixture_types import OpenTiny
from toys import digest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("strict_cuda"),
]

IDS = [(37 * index + 11) % 300 for index in range(200)]


@pytest.fixture(scope="module")
def eager_on_cuda(open_tiny: OpenTiny) -> Brain:
    return open_tiny(device="cuda")


@pytest.fixture(scope="module")
def warm_on_cuda(open_tiny: OpenTiny, strict_cuda: None) -> Brain:
    captured = open_tiny(device="cuda", engine="compiled")
    for _ in captured.warm_up():
        pass
    return captured


@pytest.fixture(scope="module")
def kernels_on_cuda(open_tiny: OpenTiny, strict_cuda: None) -> Brain:
    """Captured, with our own kernels in it."""
    captured = open_tiny(device="cuda", engine="compiled", **{"engine.kernels": True})
    for _ in captured.warm_up():
        pass
    return captured


@pytest.fixture(params=["warm", "kernels"])
def captured_on_cuda(request: pytest.FixtureRequest) -> Brain:
    chosen: Brain = request.getfixturevalue(f"{request.param}_on_cuda")
    return chosen


@pytest.fixture(params=["eager", "warm", "kernels"])
def b(request: pytest.FixtureRequest) -> Brain:
    chosen: Brain = request.getfixturevalue(f"{request.param}_on_cuda")
    return chosen


def live(b: Brain) -> None:
    """Prime, feed, edit and think: every kind of patch and every width of read."""
    b.prime(IDS[:30], source="system")
    b.feed(IDS[30:36])
    where = b.mirror.position.tolist()
    b.patch([Cull(where[6:8]), Replace(where[9:11], [77]), Pin(where[12:13])])
    b.patch([Append(IDS[40:47], source="tool"), Redact(where[14:16]), Boost(where[17:18], 9.0)])
    b.feed(IDS[50:60], source="model")


def test_I9_no_graph_is_skipped_or_recorded_again(captured_on_cuda: Brain) -> None:
    b = captured_on_cuda
    b.prime(IDS[:30])
    assert cudagraph_counts()["skips"] == 0
    for _ in range(5):  # iterations 1, 2 and 3 of a CUDA graph differ
        b.tick()
    counts, recorded = cudagraph_counts(), recordings()
    for _ in range(100):
        b.tick()
    assert cudagraph_counts() == counts
    assert counts["skips"] == counts["breaks"] == 0
    assert recordings() == recorded + 1  # asking for the number takes one itself


def test_I9_anything_compiles_nothing_after_warm_up(captured_on_cuda: Brain) -> None:
    before = cudagraph_counts()
    live(captured_on_cuda)
    assert cudagraph_counts() == before
    names = {name: c.compilations for name, c in captured_on_cuda.graphs.captured.items()}
    assert names == dict.fromkeys(captured_on_cuda.graphs.expected(), 1)


def test_I9_a_tick_launches_two_graphs(captured_on_cuda: Brain) -> None:
    """Its step, and its patch."""
    b = captured_on_cuda
    b.prime(IDS[:30])
    for _ in range(5):
        b.tick()
    torch.cuda.synchronize()
    b.graphs.ranges = torch.profiler.record_function
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    try:
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(4):
                b.tick()
            torch.cuda.synchronize()
    finally:
        b.graphs.ranges = contextlib.nullcontext
    events = profile.profiler.kineto_results.events()
    launches = [e.start_ns() for e in events if e.name().startswith("cudaGraphLaunch")]
    assert len(launches) == 2 * 4
    for name in (STEP, PATCH):
        ranges = [e for e in events if e.name() == name and "CPU" in str(e.device_type())]
        assert len(ranges) == 4
        for r in ranges:
            inside = [
                r.start_ns() <= launch < r.start_ns() + r.duration_ns() for launch in launches
            ]
            assert sum(inside) == 1, name


def test_I9_a_tick_never_waits_for_the_device(b: Brain) -> None:
    b.prime(IDS[:30])
    for _ in range(5):
        b.tick()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ticks = [b.tick() for _ in range(6)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len({tick.position for tick in ticks}) == 6
    assert all(0 <= tick.token < 300 for tick in ticks)


def test_I9_nothing_a_graph_reads_ever_moves(b: Brain) -> None:
    held = (*b.state, *b.cursor, *b.checkpoint.weights.tensors(), *b.graphs.sampling)
    where = [tensor.data_ptr() for tensor in held]
    live(b)
    again = (*b.state, *b.cursor, *b.checkpoint.weights.tensors(), *b.graphs.sampling)
    assert [tensor.data_ptr() for tensor in again] == where


def test_I1_a_read_leaves_every_byte_and_address(b: Brain) -> None:
    live(b)
    held = (*b.state, *b.cursor, *b.checkpoint.weights.tensors())
    before, where = digest(*held), [tensor.data_ptr() for tensor in held]
    for count in (1, 2, 4, 16, 40):
        b.read(IDS[:count])
        b.read(IDS[:count], list(range(3, 3 + count)))
    b.read()
    assert digest(*held) == before
    assert [tensor.data_ptr() for tensor in (*b.state, *b.cursor)] == where[
        : len(b.state) + len(b.cursor)
    ]


def test_outputs_of_a_read_survive_the_next_one(b: Brain) -> None:
    b.prime(IDS[:20])
    first = b.read(IDS[20:24])
    kept = [tensor.clone() for tensor in first]
    b.read(IDS[30:34])
    b.tick()
    b.read(IDS[40:44])
    for tensor, copied in zip(first, kept, strict=True):
        assert torch.equal(tensor, copied)


def test_I3_captured_and_eager_brains_hold_the_same(
    eager_on_cuda: Brain, warm_on_cuda: Brain, kernels_on_cuda: Brain, eager_brain: Brain
) -> None:
    """On both devices: the same slots, ids and positions; floats but for rounding. Of the rows that
    are remembered: what lies in other slots is of texts that were there before.
    """
    on_cuda = (eager_on_cuda, warm_on_cuda, kernels_on_cuda)
    for brain in (*on_cuda, eager_brain):
        live(brain)
        assert len(brain) == int(brain.state.valid.sum())
    for other in on_cuda:
        taken = eager_brain.state.valid
        assert other.state.valid.cpu().equal(taken)
        for name, column in eager_brain.state._asdict().items():
            cache = name in ("keys", "values")
            ours = getattr(other.state, name).cpu()
            ours, expected = (t[:, :, taken] if cache else t[taken] for t in (ours, column))
            if expected.is_floating_point():
                # Float32 sums in another order, through two layers.
                torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3, msg=name)
            else:
                assert ours.equal(expected), name


def test_I11_same_seed_same_tokens_across_save_and_load(
    b: Brain, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import brain

    live(b)
    list(b.stream(ticks=9))
    folder = tmp_path_factory.mktemp("save") / "brain"
    b.save(folder)
    expected = [(tick.token, tick.surprise, tick.culled) for tick in b.stream(ticks=20)]
    loaded = brain.load(folder)
    assert loaded.device.type == "cuda"
    assert [(t.token, t.surprise, t.culled) for t in loaded.stream(ticks=20)] == expected


def test_I12_ticks_take_no_more_device_memory(b: Brain) -> None:
    b.prime(IDS[:20])
    for _ in range(20):
        b.tick()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(300):
        b.tick()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_whole_path_works_below_float32(dtype: str, open_tiny: OpenTiny) -> None:
    b = open_tiny(device="cuda", dtype=dtype)
    live(b)
    assert all(0 <= tick.token < 300 for tick in b.stream(ticks=30))
    assert len(b) == int(b.state.valid.sum()) == 24


def test_I9_looking_up_is_captured_and_says_the_same(open_parrot: OpenTiny) -> None:
    """Plain passes, wide ones and the search on its own, in whatever order they come."""
    options = {"device": "cuda", "capacity": 120, "cull": "none", "cull.target": None}
    options |= {"engine.widths": [1, 16], "engine.smallest_bucket": 120}
    quick = open_parrot(engine="compiled", **options, **{"lookup": "ngram", "lookup.width": 3})
    for _ in quick.warm_up():
        pass
    plain = open_parrot(**options)
    said: list[list[int]] = []
    for b in (quick, plain):
        b.prime([12, 13, 14, 10, 11, 7, 170, 34, 12, 13, 14])
        said.append([tick.token for tick in b.stream(50)])
    assert said[0] == said[1]
    assert quick.lookahead.counts.accepted > 5
    counts, recorded = cudagraph_counts(), recordings()
    widths = {tick.width for tick in quick.stream(40)}
    assert widths == {1, 4} or widths == {4}
    assert cudagraph_counts() == counts
    assert counts["skips"] == counts["breaks"] == 0
    assert recordings() == recorded + 1  # asking for the number takes one itself
