"""Everything that takes another way on a CUDA device than on a CPU, taken once."""

import dataclasses
import json
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from large_cache import broken, measure

from brain import Append, Boost, Cull, Pin, Redact, Refused, Replace, app
from brain.config.compose import compose_conf
from brain.config.settings import device_of, settings_of
from brain.machine.memory import free_bytes
from brain.measure.bench.job import Job, result_of
from brain.measure.bench.memory_reader import read_memory
from brain.measure.golden.check import Brains, examine
from brain.measure.golden.files import load_golden
from compiled.graphs import Graphs
from compiled.llama import Weights
from compiled.philox import key_of
from compiled.sample import Sampling
from compiled.state import Cursor, State
from cuda_graphs import recordings
from fixture_types import OpenTiny
from toys import digest, toy_config, toy_cursor, toy_state, toy_weights

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("strict_cuda"),
]

IDS = [(37 * index + 11) % 300 for index in range(200)]
GOLDENS = Path(__file__).parent / "golden"
ENGINES = pytest.mark.parametrize("engine", ["eager", "compiled"])


# Numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eight_bits_are_the_same_captured_eager_and_on_a_cpu(
    dtype: str, open_tiny: OpenTiny
) -> None:
    options = {"weights": "int8", "dtype": dtype, "engine.widths": [1, 4]}
    brains = [
        open_tiny(device="cpu", **options),
        open_tiny(device=DEVICE, **options),
        open_tiny(device=DEVICE, engine="compiled", **options),
    ]
    for b in brains:
        b.prime(IDS[:20])
        b.feed(IDS[20:24])
    tolerance = 1e-4 if dtype == "float32" else 24 * 2**-8  # a dozen roundings of 2^-8 each
    for ids in (None, IDS[:1], IDS[:3]):
        expected, *ours = (b.read(ids).logits.cpu() for b in brains)
        for logits in ours:
            assert float((logits - expected).norm()) <= tolerance * float(expected.norm())
    assert len(list(brains[2].stream(ticks=12))) == 12


@ENGINES
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_toy_goldens_hold(engine: str, dtype: str) -> None:
    golden = load_golden(GOLDENS, "toy_bucket_edges")
    conf = compose_conf([f"device={DEVICE}", f"engine={engine}", f"dtype={dtype}"])
    verdict = examine(golden, Brains(conf).brain(golden, (1, 7)))
    assert verdict.failure is None


def test_looking_up_sampled_tokens_says_the_same(open_parrot: OpenTiny) -> None:
    options = {"device": DEVICE, "capacity": 120, "cull": "none", "cull.target": None, "seed": 3}
    options |= {"engine.widths": [1, 16], "engine.smallest_bucket": 120}
    options |= {"sampler.temperature": 0.3}
    quick = open_parrot(engine="compiled", lookup="ngram", **options, **{"lookup.width": 3})
    plain = open_parrot(**options)
    said = []
    for b in (quick, plain):
        b.prime([12, 13, 14, 10, 11, 7, 170, 34, 12, 13, 14])
        said.append([tick.token for tick in b.stream(60)])
    assert said[0] == said[1]
    assert quick.lookahead.counts.proposed > 0


# Edits, repair, re-basing -------------------------------------------------------------------------


@ENGINES
def test_a_repaired_tick_replaces_two_rows_by_one(engine: str, open_tiny: OpenTiny) -> None:
    always = {"repair": "pairs", "repair.every": 1, "repair.least_gain": -1000.0}
    b = open_tiny(device=DEVICE, engine=engine, **always)
    b.prime(IDS[:10])
    b.feed(IDS[10:34])
    for _ in range(8):
        before = b.mirror
        tick = b.tick()
        (repair,) = tick.repairs
        after = b.mirror
        assert after.token_id[after.index_of(repair.positions[0])] == repair.token
        assert repair.positions[1] not in after.position
        assert repair.positions[0] in before.position
        assert len(b) == tick.count == int(b.state.valid.sum())


@ENGINES
def test_rebasing_keeps_rows_and_order(engine: str, open_tiny: OpenTiny) -> None:
    b = open_tiny(device=DEVICE, engine=engine, positions="rebase")
    plain = open_tiny(device="cpu", positions="rebase")
    for each in (b, plain):
        for _ in each.warm_up():
            pass
        each.prime(IDS[:20])
        each.patch([Cull([5, 6, 11])])
        each.feed(IDS[20:26])
        each.memory.rebase()
        each.feed(IDS[26:30])
    for name in ("position", "token_id", "valid"):
        assert getattr(b.state, name).cpu().equal(getattr(plain.state, name)), name
    torch.testing.assert_close(b.state.keys.cpu(), plain.state.keys, rtol=1e-3, atol=1e-3)
    if DEVICE == "cuda":
        assert "rebase" not in b.graphs.captured
        assert "rebase" not in b.graphs.expected()


def test_rebasing_takes_no_room_for_a_second_cache() -> None:
    config, device = toy_config(layers=40), torch.device(DEVICE)
    state = State(*(t.to(device) for t in toy_state(config, 20_000, {5: 9, 19_000: 4})))
    cursor = Cursor(*(tensor.to(device) for tensor in toy_cursor(20)))
    weights = Weights(*(tensor.to(device) for tensor in toy_weights(config).tensors()))
    number = torch.ones((), device=device)
    sampling = Sampling(number, number, number, number, key_of(0).to(device))
    settings = settings_of(compose_conf(["device=cpu", "engine=eager", "dtype=float32"]))
    spec = dataclasses.replace(settings.graphs, compiled=True, rebases=True)
    graphs = Graphs(spec, config, weights, state, cursor, sampling)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    graphs.rebase()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < state.keys.nbytes / 4
    assert state.position[[5, 19_000]].tolist() == [1, 0]


def test_a_read_first_captured_by_a_tick_is_recorded_for_all_tokens(open_tiny: OpenTiny) -> None:
    b = open_tiny(device=DEVICE, engine="compiled")
    b.prime(IDS[:20])
    for _ in range(4):
        b.tick()
    kept = [torch.zeros(number + 1, device=DEVICE) for number in range(7)]  # addresses differ
    for number in range(3):
        b.read([IDS[number]], [number])
    before = recordings()
    for number in range(8):
        kept.append(torch.zeros(3 * number + 1, device=DEVICE))
        b.read([IDS[number]], [number])
        b.tick()
    assert recordings() == before + 1


def test_nothing_is_recorded_after_warm_up_whatever_is_edited(open_tiny: OpenTiny) -> None:
    b = open_tiny(device=DEVICE, engine="compiled", cull="none", **{"cull.target": None})
    for _ in b.warm_up():
        pass
    before = recordings()
    b.prime(IDS[:20])
    b.feed(IDS[20:23])
    b.patch([Append(IDS[23:25], source="tool")])
    b.patch([Cull([4, 5]), Replace((7, 8), [77]), Redact([10]), Pin([2]), Boost([3], 9.0)])
    b.patch([Append(IDS[30:42])])
    list(b.stream(8))
    b.patch([Cull([11])])
    b.read()
    b.read(IDS[:3])
    b.prime(IDS[:12])
    list(b.stream(3))
    assert recordings() == before + 1


def test_a_tick_launches_little_beside_its_graphs(open_tiny: OpenTiny) -> None:
    """What a graph does not know where it is, is copied there first: the token that is read and the
    one that is forced, but no column of the memory."""
    b = open_tiny(device=DEVICE, engine="compiled")
    for _ in b.warm_up():
        pass
    b.prime(IDS[:30])
    for _ in range(5):
        b.tick()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(4):
            b.tick()
        torch.cuda.synchronize()
    names = [event.name() for event in profile.profiler.kineto_results.events()]
    calls = [n for n in names if n.startswith(("cudaLaunchKernel", "cuLaunch", "cudaMemcpyAsync"))]
    # Three copies to the host, one of what is read, two of what is forced.
    assert len(calls) <= 6 * 4, sorted(set(calls))


# Saves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("there", "here"), [(DEVICE, "cpu"), ("cpu", DEVICE)])
def test_a_save_of_one_device_is_loaded_on_another(
    there: str, here: str, open_tiny: OpenTiny, tmp_path: Path
) -> None:
    b, other = open_tiny(device=there, seed=4), open_tiny(device=here, seed=4)
    b.prime(IDS[:20])
    b.patch([Cull([3, 8])])
    list(b.stream(5))
    b.save(tmp_path / "save")
    other.restore(tmp_path / "save")
    assert digest(*b.cursor) == digest(*other.cursor)
    assert len(b) == len(other)
    for name in b.mirror.__dataclass_fields__:
        mine, theirs = getattr(b.mirror, name), getattr(other.mirror, name)
        if hasattr(mine, "tolist"):
            assert mine.tolist() == theirs.tolist(), name
    held = b.state.valid.nonzero()[:, 0].cpu()
    for keys, others in ((b.state.keys, other.state.keys), (b.state.values, other.state.values)):
        assert torch.equal(keys.cpu()[:, :, held], others.cpu()[:, :, held])
    ours, theirs = (each.read().logits.cpu() for each in (b, other))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


# Room and settings --------------------------------------------------------------------------------


def test_a_memory_larger_than_the_device_is_refused(open_tiny: OpenTiny) -> None:
    with pytest.raises(Refused, match=r"GB are free on cuda"):
        open_tiny(device=DEVICE, capacity=1 << 34)


def test_what_pytorch_keeps_counts_as_free() -> None:
    device = torch.device(DEVICE)
    before = free_bytes(device)
    torch.empty(1 << 28, dtype=torch.uint8, device=device)  # given back at once, to PyTorch
    after = free_bytes(device)
    assert before is not None
    assert after is not None
    assert after > before - (1 << 26)


def test_a_device_that_is_full_is_told_in_one_line(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("brain.config.settings.free_bytes", lambda device: None)
    monkeypatch.chdir(tmp_path)
    model = ["model=folder", f"model.path={tiny_folder}", f"device={DEVICE}"]
    monkeypatch.setattr(sys, "argv", ["brain", *model, f"capacity={1 << 34}"])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(SystemExit) as left:
        app.main()
    assert left.value.code == 2
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("refused: CUDA out of memory")
    assert "Traceback" not in "".join(told)


def test_devices_are_found_or_refused() -> None:
    assert device_of("auto").type == "cuda"
    assert device_of("cuda:0") == torch.device("cuda:0")
    with pytest.raises(Refused, match="PyTorch sees"):
        device_of("cuda:99")


# Measuring ----------------------------------------------------------------------------------------


def test_memory_is_read_at_some_speed() -> None:
    seconds, operation = read_memory(1 << 28, torch.device(DEVICE))
    assert operation
    assert len(seconds) == 10
    assert all(0 < second < 1 for second in seconds)


@ENGINES
def test_a_process_times_an_engine(engine: str, tiny_folder: Path) -> None:
    job = Job(
        engine=engine,
        precision="bfloat16",
        folder=str(tiny_folder),
        device=DEVICE,
        threads=1,
        capacity=64,
        counts=[16],
        tokens=3,
        prefill=20,
        overrides=[
            "model=folder",
            f"model.path={tiny_folder}",
            f"device={DEVICE}",
            "dtype=bfloat16",
            f"engine={engine}",
            "engine.widths=[1,4]",
        ],
        smallest_bucket=64,
        capture_all=False,
    )
    result = result_of(job, lambda: None)
    assert len(result["token_seconds"]["16"]) == 3
    assert result["peak_mb"] > 0
    assert result_of(dataclasses.replace(job, engine="memory", bytes=1 << 20), lambda: None)[
        "read_seconds"
    ]


@pytest.mark.parametrize("watcher", ["torch", "nvtx"])
def test_a_profile_has_the_device_time_of_every_step(
    watcher: str,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["model=folder", f"model.path={tiny_folder}", "hydra.run.dir=out", "task=profile"]
    arguments += [f"device={DEVICE}", "engine=compiled", "engine.widths=[1,4]", "capacity=64"]
    arguments += ["task.ticks=3", "prompt=abc", f"nvtx={str(watcher == 'nvtx').lower()}"]
    monkeypatch.setattr(sys, "argv", ["brain", *arguments])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    app.main()
    if watcher == "nvtx":
        assert "a tick without names" in capsys.readouterr().err
        return
    report = json.loads((tmp_path / "out" / "profile.json").read_text("utf-8"))
    steps = [row for row in report["tick"] if row["depth"] == 1 and row["name"][0].isdigit()]
    assert len(steps) == 2
    for row in steps:
        assert row["kernels"] > 0
        assert row["device_microseconds"] > 0
    whole = next(row for row in report["tick"] if row["depth"] == 0)
    assert whole["kernels"] == pytest.approx(sum(row["kernels"] for row in steps), abs=8)


def test_a_large_cache_keeps_the_rule() -> None:
    report = measure(4096, 4, torch.device(DEVICE))
    assert broken(report) == []
    assert report["attention"]["share_of_limit"] > 0


def test_a_long_text_is_appended_and_taken_back_when_it_is_refused(open_tiny: OpenTiny) -> None:
    """Edits of several widths, captured by need and not before."""
    b = open_tiny(device=DEVICE, engine="compiled")
    b.prime(IDS[:10])
    for first, last in pairwise((10, 11, 14, 20)):
        b.patch([Append(IDS[first:last], source="tool")])
    assert len(b) == 20
    assert b.mirror.token_id.tolist() == IDS[:20]
    before = digest(*b.state, *b.cursor)
    with pytest.raises(Refused):
        b.patch([Append(IDS[:60])])
    assert digest(*b.state, *b.cursor) == before
