"""What blocks lose is told right, on a tiny file and a few tokens."""

import importlib.util
import json
import math
from pathlib import Path

import blocks_quality
import pytest
import torch
from blocks_quality import AT_ONCE, LLAMA_CPP, REFERENCE, Tally, main, opened, read_by_ours
from seeded_gguf import write_seeded

from compiled.llama import LlamaConfig

TINY = LlamaConfig(600, 256, 512, 2, 4, 2, 64, 1e-5, 1e4, 128)


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    write_seeded(tmp_path / "tiny.gguf", TINY, "Q4_K_M")
    return tmp_path / "tiny.gguf"


def test_the_measures_are_those_of_two_tokens() -> None:
    tally = Tally()
    half, most = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.2, 0.8]).log()
    tally.add(torch.stack([most, half]), torch.stack([half, half + 3]), [0, 1])
    found = tally.report()
    divergence = 0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8)
    assert found["kl_mean"] == pytest.approx(divergence / 2)
    assert found["kl_largest"] == pytest.approx(divergence)
    assert found["perplexity"] == pytest.approx(1 / 0.8)
    assert found["same_likeliest"] == 0.5
    assert found["logit_largest"] == pytest.approx(3)


def test_the_width_of_a_read_changes_nothing_but_rounding(gguf_file: Path) -> None:
    b = opened(gguf_file, REFERENCE)
    ids = [5, 300, 7, 9, 12, 44, 2]
    whole = read_by_ours(b, ids, AT_ONCE)
    assert whole.shape == (7, 600)
    for width in (1, 3):
        assert (read_by_ours(b, ids, width) - whole).abs().max() < 1e-4


def test_the_table_and_the_file_have_every_model(
    gguf_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(blocks_quality, "WINDOW", 40)
    out = tmp_path / "found.json"
    main([str(gguf_file), "--tokens", "81", "--all", "--out", str(out)])
    report = json.loads(out.read_text("utf-8"))
    assert (report["format"], report["tokens"]) == ("Q4_K", 80)  # one alone says nothing
    found = report["subjects"]
    names = ["dequantized", "blocks, token by token", f"blocks, {AT_ONCE} at a time"]
    names += ["weights=int8", "weights=int4"]
    has_llama_cpp = importlib.util.find_spec("llama_cpp") is not None
    assert list(found) == [*names, *([LLAMA_CPP] if has_llama_cpp else [])]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(found)
    assert len({len(line) for line in lines[1:]}) == 1
    assert found[names[0]]["kl_largest"] == 0
    assert found[names[0]]["same_likeliest"] == 1
    for name in names[1:3]:
        assert abs(found[name]["kl_mean"]) < 1e-6
        assert 0 < found[name]["logit_largest"] < 0.01
    assert 1e-5 < found["weights=int8"]["kl_mean"] < found["weights=int4"]["kl_mean"]
    assert report["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("mix", "arguments", "told"),
    [
        ("F16", [], "is in F16, which is not multiplied in blocks"),
        ("Q8_0", ["--tokens", "1"], "at least 2 tokens"),
        ("Q8_0", ["--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, mix: str, arguments: list[str], told: str
) -> None:
    path = tmp_path / "x.gguf"
    write_seeded(path, TINY, mix)
    with pytest.raises(SystemExit, match=told):
        main([str(path), "--out", str(tmp_path / "out.json"), *arguments])
    assert not (tmp_path / "out.json").exists()
