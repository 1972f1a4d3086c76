"""Golden logits: our engine against the committed files, against the live reference, and the check
against damage of every kind.

Tolerances are those of ``brain/measure/golden/judge.py``, which says where they come from.
"""

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from brain import Brain, Refused
from brain.config.compose import compose_conf
from brain.errors import NotFinite
from brain.measure.golden import check
from brain.measure.golden.cases import CONTEXT, cases
from brain.measure.golden.check import Brains, examine
from brain.measure.golden.files import Golden, golden_names, load_golden, save_golden
from brain.measure.golden.judge import (
    CLEAR_GAP,
    FEW,
    LOGIT_TOLERANCE,
    NOISE_FACTOR,
    Distance,
    distance,
    expected_of,
    judge,
)
from brain.measure.golden.reference import reference_run
from brain.measure.golden.replay import replay
from brain.measure.golden.script import Cull, Feed, Label, Observed, Prime, Read, from_json, to_json
from brain.measure.golden.seeded import SEEDED
from brain.tasks import golden as task
from brain.tasks.golden import Mismatch
from compiled.matrix import dequantize
from conf.schema import Conf
from fixture_types import CommandLine

pytestmark = pytest.mark.usefixtures("all_threads")

FOLDER = Path(__file__).parents[2] / "golden"
NAMES = golden_names(FOLDER)
TOY = "toy_bucket_edges"
LARGEST = "tinyllama_dimensions"
FIRST = 256

RoomyBrain = Callable[[str, str, str], Brain]


@pytest.fixture(scope="module")
def brains(smollm2_folder: Path) -> Callable[[str], Brains]:
    """``brains(dtype)``: eager brains for goldens, shared by the tests of this module."""
    made = {
        dtype: Brains(compose_conf([f"dtype={dtype}", "engine=eager"]))
        for dtype in ("float32", "bfloat16")
    }
    return made.__getitem__


@pytest.fixture(scope="module")
def low_precision(brains: Callable[[str], Brains]) -> Observed:
    """What our engine makes of the longest context in bfloat16. Where a processor has no
    instructions for that, it takes a minute: two tests share it.
    """
    golden = load_golden(FOLDER, "full_context")
    (widths,) = golden.memory.widths
    return replay(brains("bfloat16").brain(golden, widths), golden.script)


@pytest.fixture(scope="module")
def undisturbed() -> Observed:
    """What our engine makes of the toy's script in float32."""
    brain, golden = toy_brain("float32")
    return replay(brain, golden.script)


@pytest.fixture(scope="module")
def passage(roomy_brain: RoomyBrain) -> list[int]:
    """The tokens of the passage."""
    return roomy_brain("smollm2", "float32", "eager").encode(
        (FOLDER / "passage.txt").read_text("utf-8")
    )


def configured(folder: Path, *overrides: str) -> Conf:
    return compose_conf(["task=golden", f"task.folder={folder}", *overrides])


def only_toy(folder: Path) -> Path:
    """A folder with a copy of the toy's golden."""
    save_golden(load_golden(FOLDER, TOY), folder)
    return folder


def log_ratio(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) of each row of logits, in nats."""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


# The committed files ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        *(("float32", name) for name in NAMES),
        *(("bfloat16", name) for name in ("full_context", "culled_context", LARGEST)),
    ],
)
def test_eager_engine_agrees(
    name: str,
    dtype: str,
    brains: Callable[[str], Brains],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    golden = load_golden(FOLDER, name)
    if (dtype, name) == ("bfloat16", "full_context"):
        observed = request.getfixturevalue("low_precision")
        monkeypatch.setattr(check, "replay", lambda brain, script: observed)
    for widths in golden.memory.widths:
        verdict = examine(golden, brains(dtype).brain(golden, widths))
        assert verdict.failure is None, (widths, verdict.failure)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["chunked_prefill", "culled_context", "many_at_once", "old_position", "token_by_token"]
)
def test_compiled_engine_agrees(name: str, dtype: str, roomy_brain: RoomyBrain) -> None:
    brain = roomy_brain("smollm2", dtype, "compiled")
    verdict = examine(load_golden(FOLDER, name), brain)
    assert verdict.failure is None
    assert {graph.compilations for graph in brain.graphs.captured.values()} == {1}


@pytest.mark.slow
def test_compiled_engine_agrees_at_the_edges_of_two_buckets() -> None:
    asked = ["engine=compiled", "engine.widths=[1,8]", "engine.chunk=null", "dtype=float32"]
    conf = compose_conf(asked)
    golden = load_golden(FOLDER, TOY)
    brain = Brains(conf).brain(golden, (1, 8))
    verdict = examine(golden, brain)
    assert verdict.failure is None
    reads = {name for name in brain.graphs.captured if name.startswith("read")}
    # What the memory begins with is read uncaptured: nothing of eight tokens is in the small one.
    assert reads == {"read T=1 bucket=32", "read T=1 bucket=64", "read T=8 bucket=64"}


def test_goldens_are_what_the_cases_say(passage: list[int]) -> None:
    """Tokenizing the passage still gives the ids, and no case was changed without its golden."""
    made = {case.name: case for case in cases(passage)}
    assert set(made) == set(NAMES)
    for name, case in made.items():
        golden = load_golden(FOLDER, name)
        assert golden.script == case.script
        assert golden.memory == case.memory
        assert golden.description == case.description
        assert len(golden.expected.top_ids) >= FEW
        assert set(golden.noise) == {"bfloat16", "float16"}
        assert {"transformers", "torch", "dtype", "device", "platform", "command"} <= set(
            golden.provenance
        )
        assert len(golden.model_sha256) == 64


def test_golden_files_stay_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 6 << 20


# The live reference ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference_logits(
    reference_model: Callable[[str, str], Any], passage: list[int]
) -> Callable[[str, int], Tensor]:
    """``reference_logits(dtype, length)``: of the plain model at the first positions."""

    @functools.cache
    def of(dtype: str, length: int) -> Tensor:
        with torch.no_grad():
            output = reference_model("smollm2", dtype)(torch.tensor([passage[:length]]))
        logits: Tensor = output.logits[0].float()
        return logits

    return of


@pytest.mark.slow
def test_every_logit_of_862_tokens_is_the_reference_s(
    roomy_brain: RoomyBrain, passage: list[int], reference_logits: Callable[[str, int], Tensor]
) -> None:
    brain = roomy_brain("smollm2", "float32", "eager")
    brain.prime(passage[:1])
    ours = brain.read(tokens=passage[:CONTEXT], positions=range(CONTEXT)).logits
    theirs = reference_logits("float32", CONTEXT)
    assert ours.shape == theirs.shape == (CONTEXT, 49152)
    assert float((ours - theirs).abs().max()) <= LOGIT_TOLERANCE
    first, second = theirs.topk(2).values.unbind(-1)
    clear = first - second > CLEAR_GAP
    assert int(clear.sum()) > 0.9 * CONTEXT
    assert torch.equal(ours.argmax(-1)[clear], theirs.argmax(-1)[clear])


@pytest.mark.slow
def test_bfloat16_is_no_noisier_than_the_reference_s(
    low_precision: Observed, passage: list[int], reference_logits: Callable[[str, int], Tensor]
) -> None:
    """All of the context is held against the reference's noise of then, in its golden; the first
    tokens of it against that of now, which would take a minute for all of them.
    """
    assert [row.token for row in low_precision.rows] == passage[:CONTEXT]
    exact = reference_logits("float32", CONTEXT)[:FIRST]
    noise = log_ratio(exact, reference_logits("bfloat16", FIRST)).mean()
    assert log_ratio(exact, low_precision.logits[:FIRST]).mean() <= NOISE_FACTOR * noise


@pytest.mark.slow
def test_the_masked_pass_is_a_cache_with_rows_taken_out(
    reference_model: Callable[[str, str], Any], passage: list[int]
) -> None:
    """The reference's reference: a context is culled by removing rows from transformers' own
    cache, and what is read next agrees with the masked pass that goldens are made with."""
    from transformers import DynamicCache

    model = reference_model("smollm2", "float32")
    length, gone = 64, [1, 7, 8, 9, 30, 62]
    kept = [position for position in range(length) if position not in gone]
    later = passage[length : length + 5]
    cache: Any = DynamicCache()
    with torch.no_grad():
        model(torch.tensor([passage[:length]]), past_key_values=cache)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
        positions = torch.arange(length, length + 5)[None]
        theirs = model(torch.tensor([later]), past_key_values=cache, position_ids=positions)
    script = (
        Prime(tuple(passage[:length])),
        Cull(tuple(gone)),
        Read(tuple(later), tuple(range(length, length + 5))),
    )
    masked = reference_run(model, script)
    assert masked.logits.shape == (5, 49152)
    # Two ways to the same float32 numbers: 1e-4 is rounding, a wrong row would be off by 0.1.
    assert float((masked.logits - theirs.logits[0]).abs().max()) <= 1e-4


def test_writing_again_gives_the_same_golden(tmp_path: Path) -> None:
    (tmp_path / "passage.txt").write_text((FOLDER / "passage.txt").read_text("utf-8"), "utf-8")
    task.run(configured(tmp_path, "task.write=true", f"task.cases=[{TOY}]"), tmp_path)
    old, new = load_golden(FOLDER, TOY), load_golden(tmp_path, TOY)
    assert (new.script, new.model_sha256, new.memory) == (old.script, old.model_sha256, old.memory)
    # Another machine may add in another order; logits of this toy are of order 1.
    torch.testing.assert_close(new.expected.full_logits, old.expected.full_logits)
    torch.testing.assert_close(new.expected.surprises, old.expected.surprises)
    assert new.provenance["command"].startswith("brain task=golden task.write=true")


# The check finds what is wrong -----------------------------------------------------------------


def test_a_check_reports_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task.run(configured(only_toy(tmp_path)), tmp_path)
    report = json.loads((tmp_path / "golden.json").read_text("utf-8"))
    assert (report["engine"], report["dtype"]) == ("native", "float32")
    (outcome,) = report["goldens"]
    assert (outcome["name"], outcome["rows"], outcome["failure"]) == (TOY, 16, None)
    assert 0 < outcome["distance"]["logit"] <= LOGIT_TOLERANCE
    told = capsys.readouterr()
    assert told.out == ""
    assert f"{TOY} T=1,7" in told.err


@pytest.mark.parametrize(
    ("tensor", "index", "position", "token"),
    [
        # Row 2 is the read after 17 tokens: the last of them, at position 16.
        ("top_logits", (2, 5), 16, 16 * 7919 % 32000),
        ("logsumexp", (2,), 16, 16 * 7919 % 32000),
        ("full_logits", (0, 31999), 89, 95 * 7919 % 32000),
        # Surprises 15 and 16 are those of tokens 0 and 1 of the second prompt, of 16.
        ("surprises", (16,), 1, 7919),
    ],
)
def test_one_wrong_number_is_found_and_named(
    tmp_path: Path,
    tensor: str,
    index: tuple[int, ...],
    position: int,
    token: int,
    undisturbed: Observed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The number is one of the file's: what our engine makes is the same for all of them."""
    monkeypatch.setattr(check, "replay", lambda brain, script: undisturbed)
    path = only_toy(tmp_path) / f"{TOY}.safetensors"
    tensors = load_file(path)
    tensors[tensor][index] += 0.01
    save_file(tensors, path)
    with pytest.raises(Mismatch, match=rf"^1 of 1 golden runs differ: {TOY} T=1,7: ") as caught:
        task.run(configured(tmp_path), tmp_path)
    message = str(caught.value)
    assert f"position {position}, token {token} '<id {token}>': " in message
    assert "max|Δ|" in message
    assert "KL" in message
    report = json.loads((tmp_path / "golden.json").read_text("utf-8"))
    assert report["goldens"][0]["failure"] in message


def test_a_wrong_text_is_found_and_named(
    tmp_path: Path, roomy_brain: RoomyBrain, passage: list[int]
) -> None:
    """With a real vocabulary the report says which words."""
    brain = roomy_brain("smollm2", "float32", "eager")
    script = (Prime(tuple(passage[:8])), Read())
    observed = replay(brain, script)
    expected = expected_of(observed, full=1)
    logits = observed.logits.clone()
    greedy = int(logits[0].argmax())
    logits[0, passage[3]] = logits[0].max() + 1
    verdict = judge(expected, observed._replace(logits=logits), None, brain.decode)
    assert verdict.failure is not None
    assert f"position 7, token {passage[7]} {brain.decode([passage[7]])!r}" in verdict.failure
    assert f"logit of token {passage[3]} {brain.decode([passage[3]])!r}" in verdict.failure
    assert f"not {greedy} {brain.decode([greedy])!r}" in verdict.failure
    assert verdict.agreeing < verdict.clear


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("field", ["qkv", "down", "head", "attention_norm", "inverse_frequencies"])
def test_a_disturbed_weight_is_found(field: str, dtype: str) -> None:
    brain, golden = toy_brain(dtype)
    weight = getattr(brain.checkpoint.weights, field)
    part = weight[0] if weight.dim() == 3 else weight
    part.mul_(1.5)
    verdict = examine(golden, brain)
    assert verdict.failure is not None
    assert "position" in verdict.failure
    assert "token" in verdict.failure


def test_one_disturbed_number_of_a_weight_is_found() -> None:
    brain, golden = toy_brain("float32")
    dequantize(brain.checkpoint.weights.qkv)[2, 5, 7] += 1.0
    assert examine(golden, brain).failure is not None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_is_found(dtype: str) -> None:
    brain, golden = toy_brain(dtype)
    brain.checkpoint.weights.final_norm[0] = float("nan")
    with pytest.raises(NotFinite, match=r"model\.norm\.weight"):
        examine(golden, brain)


def toy_brain(dtype: str) -> tuple[Brain, Golden]:
    golden = load_golden(FOLDER, TOY)
    conf = compose_conf([f"dtype={dtype}", "engine=native"])
    brain = Brains(conf).brain(golden, golden.memory.widths[0])
    return brain, golden


def test_low_precision_is_judged_by_averages_of_enough_values() -> None:
    def verdict(rows: int, off: float) -> str | None:
        torch.manual_seed(0)
        logits = torch.randn(rows, 100)
        labels = [Label(0, 1, row) for row in range(rows)]
        exact = Observed(labels, logits, [], torch.empty(0))
        noisy = exact._replace(logits=logits + torch.randn(rows, 100) * 0.01)
        found = exact._replace(logits=logits + torch.randn(rows, 100) * 0.01 * off)
        expected = expected_of(exact, full=rows)
        return judge(expected, found, distance(expected, noisy), str).failure

    assert verdict(FEW, 1.0) is None
    assert "is more than 1.5 times" in str(verdict(FEW, 2.0))  # four times the KL
    assert verdict(FEW - 1, 2.0) is None


def test_all_statistics_of_equal_runs_are_zero() -> None:
    logits = torch.randn(20, 300)
    labels = [Label(0, 1, row) for row in range(20)]
    observed = Observed(labels, logits, labels, torch.rand(20))
    found = distance(expected_of(observed, full=4), observed)
    # KL is summed in float64 from logits and log-sum-exps stored in float32.
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found == Distance(0.0, 0.0, found.kl, 0.0, 0.0)


# Seeded models ---------------------------------------------------------------------------------


def test_seeded_weights_are_the_same_in_every_dtype() -> None:
    model = SEEDED["seeded-toy"]
    exact = model.checkpoint(torch.float32, torch.device("cpu")).weights
    low = model.checkpoint(torch.bfloat16, torch.device("cpu")).weights
    for one, other in zip(exact.tensors(), low.tensors(), strict=True):
        assert torch.equal(one, other.to(one.dtype))
    rows = {row.numpy().tobytes() for row in dequantize(exact.head)}
    assert len(rows) == model.config.vocab_size  # no two tokens are the same
    assert float((exact.attention_norm - 1).std()) == pytest.approx(0.1, rel=0.1)


def test_a_seeded_model_knows_no_text() -> None:
    tokenizer = SEEDED["seeded-toy"].checkpoint(torch.float32, torch.device("cpu")).tokenizer
    assert tokenizer.decode([7]) == "<id 7>"
    with pytest.raises(Refused, match="vocabulary cannot spell"):
        tokenizer.encode("text")


# Refusals: one line, nothing started -----------------------------------------------------------


def refusal(conf: Conf, run_dir: Path) -> str:
    with pytest.raises(Refused) as caught:
        task.run(conf, run_dir)
    message = str(caught.value)
    assert "\n" not in message
    assert not isinstance(caught.value, Mismatch)
    return message


def test_the_engine_that_is_asked_for_is_the_one_that_is_checked() -> None:
    """With ``engine.native=false`` no operator reads in its stead."""
    golden = load_golden(FOLDER, "toy_bucket_edges")
    for native in (True, False):
        asked = [
            "engine=compiled",
            f"engine.native={str(native).lower()}",
            "device=cpu",
            "dtype=float32",
        ]
        made = Brains(compose_conf(asked)).brain(golden, (1, 16))
        assert (made.graphs.decode is not None) is native


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    message = refusal(configured(tmp_path / "nowhere"), tmp_path)
    assert message == f"{tmp_path / 'nowhere'}: no such folder; set task.folder to the one " + (
        "with golden files (a clone of the repository has them in tests/golden)"
    )


def test_the_default_folder_is_below_the_current_one(
    tmp_path: Path, undisturbed: Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "replay", lambda brain, script: undisturbed)
    monkeypatch.chdir(tmp_path)
    assert refusal(compose_conf(["task=golden"]), tmp_path).startswith("tests/golden: no such")
    (tmp_path / "tests" / "golden").mkdir(parents=True)
    only_toy(tmp_path / "tests" / "golden")
    task.run(compose_conf(["task=golden"]), tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert "no golden files; task.write=true makes them" in refusal(configured(tmp_path), tmp_path)


def test_an_unknown_case_is_refused(tmp_path: Path) -> None:
    message = refusal(configured(FOLDER, "task.cases=[full_contxt]"), tmp_path)
    assert "no golden 'full_contxt'; there are bucket_edges, " in message


def test_another_model_s_golden_is_refused(tmp_path: Path, smollm2_folder: Path) -> None:
    golden = load_golden(FOLDER, "token_by_token")
    save_golden(dataclasses.replace(golden, model_sha256="0" * 64), tmp_path)
    message = refusal(configured(tmp_path), tmp_path)
    assert "made with SmolLM2-135M-Instruct (SHA-256 000000000000…)" in message
    assert "choose that model" in message


def test_another_seed_s_golden_is_refused(tmp_path: Path) -> None:
    golden = load_golden(FOLDER, TOY)
    save_golden(dataclasses.replace(golden, model_sha256="0" * 64), tmp_path)
    assert "write it again" in refusal(configured(tmp_path), tmp_path)


def test_a_dtype_without_noise_is_refused(tmp_path: Path) -> None:
    save_golden(dataclasses.replace(load_golden(FOLDER, TOY), noise={}), tmp_path)
    message = refusal(configured(tmp_path, "dtype=bfloat16"), tmp_path)
    assert "noise in bfloat16 is missing" in message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 2}, "format 2, this program reads 1"),
        ({"model": None}, "not a golden file"),
        ({"memory": {"capacity": 64}}, "not a golden file"),
        ({"noise": {"bfloat16": {"wrong": 1}}}, "not a golden file"),
        ({"script": []}, "not a list of steps"),
        ({"script": [{"do": "think"}]}, "step 0 does not say prime, feed, cull or read"),
        ({"script": [{"do": "prime"}]}, "other keys than ids"),
        ({"script": [{"do": "prime", "ids": [1.5]}]}, "something else than a list of integers"),
    ],
)
def test_a_malformed_description_is_refused(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    path = only_toy(tmp_path) / f"{TOY}.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change), "utf-8")
    assert reason in refusal(configured(tmp_path), tmp_path)


def test_a_missing_description_is_refused(tmp_path: Path) -> None:
    (only_toy(tmp_path) / f"{TOY}.json").unlink()
    assert "not a golden file" in refusal(configured(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop("surprises"), "not a golden file"),
        (lambda t: t.update(more=torch.zeros(1)), "not a golden file"),
        (lambda t: t.update(logsumexp=torch.zeros(3)), "logsumexp is torch.float32 [3], expected"),
        (lambda t: t.update(top_ids=t["top_ids"].long()), "top_ids is torch.int64"),
    ],
)
def test_malformed_numbers_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], reason: str
) -> None:
    path = only_toy(tmp_path) / f"{TOY}.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    assert reason in refusal(configured(tmp_path), tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = only_toy(tmp_path) / f"{TOY}.safetensors"
    os.truncate(path, 1000)
    assert "not a golden file" in refusal(configured(tmp_path), tmp_path)


def test_a_golden_with_fewer_rows_than_its_script_is_refused(tmp_path: Path) -> None:
    path = only_toy(tmp_path) / f"{TOY}.json"
    described = json.loads(path.read_text("utf-8"))
    described["script"] = described["script"][:4]
    path.write_text(json.dumps(described), "utf-8")
    assert "script gives 2 rows" in refusal(configured(tmp_path), tmp_path)


def test_writing_without_the_reference_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = refusal(configured(tmp_path, "task.write=true"), tmp_path)
    assert message.endswith("pip install 'positronic-brain[reference]'")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "passage.txt: cannot be read (No such file or directory)"),
        ("Too short.", "tokens, but 878 are read; use a longer text"),
    ],
)
def test_writing_without_a_passage_is_refused(
    tmp_path: Path, smollm2_folder: Path, text: str | None, reason: str
) -> None:
    if text is not None:
        (tmp_path / "passage.txt").write_text(text, "utf-8")
    assert reason in refusal(configured(tmp_path, "task.write=true"), tmp_path)


def test_the_command_line_refuses_in_one_line(command_line: CommandLine) -> None:
    status, out, err = command_line("task=golden", "task.folder=nowhere", "hydra.run.dir=run")
    assert status == 2
    assert out == ""
    assert err == (
        "refused: nowhere: no such folder; set task.folder to the one with golden files "
        "(a clone of the repository has them in tests/golden)\n"
    )


# Scripts ---------------------------------------------------------------------------------------


def test_scripts_survive_json() -> None:
    script = (Prime((1, 2, 3)), Feed((4,)), Cull((0,)), Read(), Read((5, 6), (9, 8)))
    assert from_json(json.loads(json.dumps(to_json(script))), "here") == script


def test_both_implementations_label_alike(reference_model: Callable[[str, str], Any]) -> None:
    """Also where the last row, or the pending token's neighbour, is forgotten."""
    brain, _ = toy_brain("float32")
    script = (
        Read((3, 4), (1, 0)),
        Prime((1, 5, 6, 7)),
        Cull((3,)),
        Read(),
        Feed((8, 9)),
        Cull((2,)),
        Read(),
        Feed((10,)),
        Read((11, 12), (1, 30)),
    )
    ours = replay(brain, script)
    theirs = reference_run(reference_model("seeded-toy", "float32"), script)
    assert ours.rows == theirs.rows
    assert ours.tokens == theirs.tokens
    assert ours.rows[:2] == [Label(0, 3, 1), Label(0, 4, 0)]
    assert ours.rows[2] == Label(3, 6, 2)
    assert float((ours.logits - theirs.logits).abs().max()) <= LOGIT_TOLERANCE
    torch.testing.assert_close(ours.surprises, theirs.surprises)
