"""The parts of a layer that are not attention, against transformers."""

import dataclasses
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from compiled.llama import LayerWeights, layer_weights, rms_norm, weight_shapes
from toys import EVERYTHING, toy_config, toy_weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_that_of_transformers(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(5, 24, generator=generator)
    x[1] *= 1e-4  # where the epsilon matters
    norm = LlamaRMSNorm(24, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(24, generator=generator))
        expected = norm(x)
    gain = norm.weight.detach().to(dtype)
    ours = rms_norm(x, gain, 1e-5)
    assert ours.dtype == dtype
    # The same formula: two roundings of the dtype, gain and result.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(ours.float(), expected, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("more", [{}, EVERYTHING], ids=["a Llama", "everything"])
def test_a_layer_is_a_view_of_the_stacked_weights(more: dict[str, Any]) -> None:
    config = dataclasses.replace(toy_config(), **more)
    weights = toy_weights(config)
    held = {name: tensor for name, tensor in weights._asdict().items() if tensor is not None}
    assert {name: tensor.shape for name, tensor in held.items()} == {
        name: torch.Size(shape) for name, shape in weight_shapes(config).items()
    }
    for layer in range(config.num_layers):
        one = layer_weights(weights, layer)
        for name in LayerWeights._fields if more else LayerWeights._fields[:6]:
            stacked = getattr(weights, name)
            assert getattr(one, name).data_ptr() == stacked[layer].data_ptr()
            assert torch.equal(getattr(one, name), stacked[layer])
        again = LayerWeights.from_tensors(
            one.tensors(), qkv_bias=config.qkv_bias, qk_norm=config.qk_norm
        )
        assert all(a is b for a, b in zip(again, one, strict=True))
