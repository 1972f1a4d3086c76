"""RoPE against transformers, and against extended precision where float32 angles fail."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig as HfConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from compiled.rope import RopeScaling, inverse_frequencies, rotate, rotation

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def hf_config(head_dim: int, theta: float, scaling: RopeScaling | None) -> HfConfig:
    parameters: dict[str, object] = {"rope_type": "default", "rope_theta": theta}
    if scaling is not None:
        parameters |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            parameters |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
            }
    return HfConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters=parameters,
    )


@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("theta", [10_000.0, 100_000.0, 500_000.0])
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        RopeScaling("linear", 4.0),
        RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        RopeScaling("llama3", 32.0, 1.5, 3.0, 4096),
    ],
)
def test_frequencies_are_those_of_transformers(
    head_dim: int, theta: float, scaling: RopeScaling | None
) -> None:
    config = hf_config(head_dim, theta, scaling)
    if scaling is None:
        theirs: Tensor = LlamaRotaryEmbedding(config).inv_freq
    else:
        theirs, attention_factor = ROPE_INIT_FUNCTIONS[scaling.kind](config, CPU)
        assert attention_factor == 1.0
    ours = inverse_frequencies(head_dim, theta, scaling)
    assert ours.dtype == torch.float64
    # Theirs are computed in float32: a few units in the last place of 2^-24.
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=0)


def test_llama3_keeps_short_waves_stretches_long_ones_and_blends_between() -> None:
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    plain = inverse_frequencies(128, 500_000.0)
    scaled = inverse_frequencies(128, 500_000.0, scaling)
    wavelength = 2 * math.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    between = ~short & ~long
    assert short.any()
    assert long.any()
    assert between.any()
    assert torch.equal(scaled[short], plain[short])
    assert torch.equal(scaled[long], plain[long] / 8)
    assert (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / 8).all()


def test_other_scalings_are_refused() -> None:
    with pytest.raises(ValueError, match="yarn"):
        inverse_frequencies(64, 10_000.0, RopeScaling("yarn", 4.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_that_of_transformers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head_dim, positions = 64, torch.tensor([0, 1, 5, 100, 2047])
    embedding = LlamaRotaryEmbedding(hf_config(head_dim, 10_000.0, None))
    query, key = torch.randn(2, 5, 3, head_dim).to(dtype)
    cos, sin = embedding(query.float(), positions[None])
    theirs = apply_rotary_pos_emb(  # [1, heads, T, head_dim]
        query.float().transpose(0, 1)[None], key.float().transpose(0, 1)[None], cos, sin
    )
    cos, sin = rotation(positions, inverse_frequencies(head_dim, 10_000.0))
    # Their angles are float32: at 2047 off by 2047 * 2^-24 = 1.2e-4 rad. Bfloat16 rounds to 2^-8.
    tolerance = 1e-3 if dtype == torch.float32 else 2**-7
    for x, rotated_by_them in zip((query, key), theirs, strict=True):
        ours = rotate(x, cos, sin)
        assert ours.dtype == dtype
        torch.testing.assert_close(
            ours.float(), rotated_by_them[0].transpose(0, 1), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("position", [0, 1, 4097, 10**6, 10**6 + 1, 1 << 30, (1 << 30) + 1])
@pytest.mark.parametrize("theta", [10_000.0, 100_000.0])
def test_angles_stay_exact_at_far_positions(position: int, theta: float) -> None:
    head_dim = 64
    cos, sin = rotation(torch.tensor([position]), inverse_frequencies(head_dim, theta))
    exponent = np.arange(0, head_dim, 2).astype(np.longdouble) / head_dim
    angles = np.longdouble(position) * np.longdouble(theta) ** -exponent
    # A float64 frequency is off by 2^-53 of itself, pow by as much again; the result is rounded
    # to float32, by 2^-25 at most.
    tolerance = 4 * position * 2.0**-53 + 2.0**-24
    assert float(np.abs(cos[0].double().numpy() - np.cos(angles)).max()) < tolerance
    assert float(np.abs(sin[0].double().numpy() - np.sin(angles)).max()) < tolerance
    if position >= 10**6 and position % 2 == 1:  # the check can fail: float32 angles would
        single = np.float32(position) * (np.float32(theta) ** -exponent.astype(np.float32))
        assert float(np.abs(np.cos(single.astype(np.longdouble)) - np.cos(angles)).max()) > 1e-3


@given(
    st.integers(0, 1 << 30),
    st.integers(0, 1 << 30),
    st.integers(0, 1 << 30),
    st.integers(0, 2**31),
)
def test_only_distance_matters(query_at: int, key_at: int, shift: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 1, 1, 16, generator=generator)
    frequencies = inverse_frequencies(16, 10_000.0)

    def product(first: int, second: int) -> float:
        at = [rotation(torch.tensor([position]), frequencies) for position in (first, second)]
        return float((rotate(x, *at[0]).double() * rotate(y, *at[1]).double()).sum())

    # 16 products of float32 numbers, each rounded to 2^-24, plus the angles' own error above.
    scale = float(x.norm() * y.norm())
    there, here = product(query_at + shift, key_at + shift), product(query_at, key_at)
    assert there == pytest.approx(here, abs=scale * 5e-6)


def test_rotation_keeps_length_and_position_0_changes_nothing() -> None:
    x = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    cos, sin = rotation(torch.tensor([0, 77, 1 << 30]), inverse_frequencies(8, 10_000.0))
    turned = rotate(x, cos, sin)
    assert torch.equal(turned[0], x[0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
    assert not torch.allclose(turned[1], x[1])
