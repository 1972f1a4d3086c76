"""A GGUF file of random blocks is a model of the dimensions that were asked for."""

from pathlib import Path

import gguf
import pytest
from random_blocks import reference
from seeded_folder import SHAPES
from seeded_gguf import MIXES, ROWS_AT_ONCE, tensor_types, write_seeded

import brain
from brain.checkpoints.gguf_file import gguf_format
from compiled.blocks import Blocks
from compiled.llama import LlamaConfig

TINY = LlamaConfig(ROWS_AT_ONCE + 300, 256, 512, 2, 4, 2, 64, 1e-5, 1e4, 128)


@pytest.mark.parametrize("mix", MIXES)
def test_it_is_opened_as_any_file(tmp_path: Path, mix: str) -> None:
    path = tmp_path / "x.gguf"
    write_seeded(path, TINY, mix)
    assert gguf_format(path) == mix.removesuffix("_M")
    b = brain.open(path, engine="native", dtype="float32", capacity=32)
    assert b.checkpoint.config == TINY
    head = b.checkpoint.weights.head
    if isinstance(head, Blocks):
        ((rows,),) = head.layers
        assert rows.kind == ("Q6_K" if mix == "Q4_K_M" else mix)
        numbers = reference(rows)
        assert float(numbers.std()) == pytest.approx(256**-0.5, rel=0.1)
        assert not numbers[0].equal(numbers[ROWS_AT_ONCE])  # the next piece has its own
    b.prime([5, 300, 7])
    assert b.tick().position == 3


def test_the_same_seed_makes_the_same_file(tmp_path: Path) -> None:
    made = []
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        write_seeded(tmp_path / name, TINY, "Q4_K_M", seed=seed)
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1] != made[2]


def test_q4_k_m_has_six_bits_where_llama_cpp_has_them() -> None:
    types = tensor_types(SHAPES["llama-8b"], "Q4_K_M")
    six = {name for (name, _), kind in types.items() if kind is gguf.GGMLQuantizationType.Q6_K}
    layers = (0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31)
    inner = ("self_attn.v_proj", "mlp.down_proj")
    assert six == {
        "lm_head.weight",
        *(f"model.layers.{layer}.{name}.weight" for layer in layers for name in inner),
    }
    narrow = {kind.name for (_, shape), kind in tensor_types(SHAPES["smollm2"], "Q4_K_M").items()}
    assert narrow == {"F32", "Q5_0", "Q8_0", "Q4_K", "Q6_K"}
