"""A tick on paper counts the tensors there are."""

import json
from pathlib import Path

import pytest
import roofline
import torch
from roofline_model import FORMATS, SMOLLM2, Format, row_bytes, tick, weight_bytes

from brain.measure.golden.seeded import TOY
from compiled.llama import Weights
from compiled.matrix import dequantize
from compiled.state import allocate_state
from toys import CPU, toy_config, toy_weights


def test_weights_are_all_of_them_but_of_the_embedding_one_row() -> None:
    config = toy_config()
    weights: Weights = toy_weights(config)
    read = sum(t.nbytes for t in weights.tensors()) - weights.inverse_frequencies.nbytes
    embedding = dequantize(weights.embedding)
    read -= embedding.nbytes - embedding[0].nbytes
    assert weight_bytes(config, FORMATS["float32"]) == read


def test_int8_weights_have_a_scale_for_every_row() -> None:
    layers = TOY.num_layers
    rows = layers * ((32 + 2 * 4) * 8 + 256 + 2 * 704 + 256) + 32000
    whole = weight_bytes(TOY, Format(1, 2))
    assert weight_bytes(TOY, Format(1, 2, scales=4)) == whole + 4 * rows


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_the_cache_is_the_keys_and_values_of_the_bucket(kind: str) -> None:
    state = allocate_state(TOY, 64, getattr(torch, kind), CPU)
    assert 64 * row_bytes(TOY, FORMATS[kind]) == state.keys.nbytes + state.values.nbytes
    assert tick(TOY, FORMATS[kind], 64).cache == 2 * tick(TOY, FORMATS[kind], 64, bucket=32).cache


def test_only_cache_scores_and_columns_grow_with_the_capacity() -> None:
    small, large = (tick(SMOLLM2, FORMATS["bfloat16"], capacity) for capacity in (1000, 4000))
    for name in ("weights", "logits"):
        assert getattr(large, name) == getattr(small, name)
    for name in ("cache", "scores", "columns"):
        assert getattr(large, name) == 4 * getattr(small, name)


def test_the_page_states_the_error_of_its_prediction() -> None:
    measured = roofline.measurements(roofline.REPORT)
    assert {m["format"] for m in measured} >= {"float32", "bfloat16"}
    page = roofline.page(30e9)
    for m in measured:
        told = tick(SMOLLM2, FORMATS[m["format"]], m["capacity"], bucket=m["rows"])
        assert f"{m['tick'] / (told.moved / m['bandwidth']) - 1:+.0%}" in page


def test_a_report_of_anything_else_is_no_measurement(tmp_path: Path) -> None:
    report = tmp_path / "bench.json"
    assert roofline.measurements(report) == []
    told = json.loads(roofline.REPORT.read_text("utf-8")) | {"model": "another"}
    report.write_text(json.dumps(told), "utf-8")
    assert roofline.measurements(report) == []
    report.write_text(json.dumps({"model": "smollm2", "limits": []}), "utf-8")
    assert roofline.measurements(report) == []
