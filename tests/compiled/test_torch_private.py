"""What is used of PyTorch without being promised by it still does what it did."""

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._inductor.graph import GraphLowering
from torch.fx import GraphModule

from compiled import torch_private

CPU = torch.device("cpu")


def test_what_the_compiler_asks_once_is_remembered() -> None:
    from torch._inductor import codecache, cpu_vec_isa

    torch_private.probe_processor()
    found, key = cpu_vec_isa.valid_vec_isa_list(), codecache.torch_key()
    with mock.patch("subprocess.check_output", side_effect=AssertionError("asked again")):
        torch_private.probe_processor()
    assert cpu_vec_isa.valid_vec_isa_list() is found
    assert codecache.torch_key() is key
    assert len(key) >= 32


def test_what_the_probe_imports_is_named() -> None:
    """A thread that imports could meet the one that began it half-way in a circle of modules."""
    import subprocess
    import sys

    program = f"""
import importlib, sys
for name in {torch_private.PROBED_WITH!r}:
    importlib.import_module(name)
from compiled import torch_private
before = set(sys.modules)
torch_private.probe_processor()
print(sorted(name for name in set(sys.modules) - before if name.startswith("torch")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def compiled(
    function: Callable[..., Any], backend: Callable[[GraphModule, list[Tensor]], Any] | None = None
) -> Callable[..., Any]:
    return torch.compile(
        function, fullgraph=True, dynamic=False, backend=backend or torch_private.inductor(CPU)
    )


def sources(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """What a function returns, compiled, and the program that Inductor wrote for it."""
    written: list[str] = []
    with (
        mock.patch.object(GraphLowering, "save_output_code", written.append),
        torch._inductor.config.patch(fx_graph_cache=False),
    ):
        returned = compiled(function)(*arguments)
    return returned, "\n".join(written)


def test_inductor_compiles_as_a_backend() -> None:
    x = torch.randn(5)
    returned, source = sources(lambda x: x.sin() + 1, x)
    torch.testing.assert_close(returned, x.sin() + 1)
    assert "cpp_fused" in source


def test_what_is_materialised_is_computed_once() -> None:
    """Not again in the loop of every row that it is multiplied by."""

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return (x.sin() * weight).sum(-1)

    def materialised(x: Tensor, weight: Tensor) -> Tensor:
        return (torch_private.materialise(x.sin()) * weight).sum(-1)

    x, weight = torch.randn(64), torch.randn(48, 64)
    written = []
    for function in (product, materialised):
        returned, source = sources(function, x, weight)
        torch.testing.assert_close(returned, weight @ x.sin(), rtol=1e-5, atol=1e-5)
        assert "torch.ops._inductor_test" not in source  # no call of its own
        written.append(source.count("'float*'"))  # arguments that a loop nest writes to
    assert written == [1, 2]
    assert torch_private.materialise(x).equal(x)


def test_codes_of_a_function_are_listed_and_can_be_entered() -> None:
    def double(x: Tensor) -> Tensor:
        return x * 2

    assert torch_private.compiled_codes(double.__code__) == []
    calls = []

    def backend(module: GraphModule, inputs: list[Tensor]) -> Any:
        calls.append(module)
        return module.forward

    compiled(double, backend)(torch.ones(3))
    (code,) = torch_private.compiled_codes(double.__code__)
    entered = FunctionType(code, double.__globals__, "entered")
    assert entered(torch.full((3,), 4.0)).tolist() == [8.0] * 3
    assert len(calls) == 1


def test_a_kept_address_is_marked() -> None:
    tensor = torch.zeros(2)
    torch_private.keep_address(tensor)
    assert tensor._dynamo_static_input_type == "unguarded"  # type: ignore[attr-defined]


def test_no_collection_after_a_graph() -> None:
    def collections(context: Any) -> int:
        with context, mock.patch.object(gc, "collect", wraps=gc.collect) as collect:
            compiled(lambda x: x + 1, lambda module, inputs: module.forward)(torch.ones(2))
            return collect.call_count

    import contextlib

    assert collections(torch_private.compiling_without_collection()) == 0
    assert collections(contextlib.nullcontext()) > 0


def test_loop_nests_tell_the_profiler() -> None:
    x = torch.randn(5)
    with torch_private.with_kernel_profile():
        _, source = sources(lambda x: x.cos() * 3, x)
    assert "RecordFunction" in source or "RECORD_FUNCTION" in source
    assert "RecordFunction" not in sources(lambda x: x.cos() * 4, x)[1]


@pytest.mark.parametrize(
    ("operator", "computes"),
    [("aten::add", True), ("aten::add_", True), ("aten::view", False), ("aten::mm", True)],
)
def test_schemas_tell_what_computes(operator: str, computes: bool) -> None:
    assert torch_private.computes(operator) is computes


onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
    reason="this PyTorch has no oneDNN",
)


@onednn
@pytest.mark.parametrize("addend", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_onednn_multiplies(dtype: torch.dtype, addend: bool) -> None:
    if dtype == torch.bfloat16 and not torch_private.multiplies_in(dtype):
        pytest.skip("this processor has no bfloat16")
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 64, generator=generator).to(dtype) for n in (3, 48))
    added = torch.randn(3, 48, generator=generator).to(dtype) if addend else None
    expected = x.double() @ weight.double().T + (0 if added is None else added.double())
    product = torch_private.onednn_linear(x, weight, added)
    assert product.dtype == dtype
    # 64 terms of size 1, rounded to 2^-24 each; in bfloat16 the sums themselves, to 2^-9.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(product.double(), expected, rtol=tolerance, atol=tolerance)


def test_without_onednn_nothing_has_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not any(map(torch_private.multiplies_in, (torch.bfloat16, torch.float16)))


def test_onednn_knows_its_processor() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert torch_private.multiplies_in(dtype) in (True, False)


def test_eight_bits_are_multiplied() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 64, generator=generator).bfloat16()
    values = torch.randint(-127, 128, (48, 64), generator=generator).to(torch.int8)
    scale = torch.rand(48, generator=generator).bfloat16()
    product = torch_private.int8_linear(x, values, scale)
    expected = x.double() @ values.double().T * scale.double()
    assert product.dtype == torch.bfloat16
    # Sums of 64 terms of size 60, in bfloat16: rounded to 2^-9.
    torch.testing.assert_close(product.double(), expected, rtol=2**-7, atol=2**-1)


def test_what_fails_in_a_backend_is_the_compilers_error() -> None:
    def fail(module: GraphModule, inputs: list[Tensor]) -> Any:
        raise OSError(28, "No space left on device")

    def triple(x: Tensor) -> Tensor:
        return x * 3

    call: Callable[..., Any] = torch.compile(triple, backend=fail, fullgraph=True)
    with pytest.raises(torch_private.compiler_error()) as raised:
        call(torch.ones(3))
    assert isinstance(raised.value.inner_exception, OSError)  # type: ignore[attr-defined]


def test_the_folder_of_graphs_is_the_one_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "graphs"))
    assert torch_private.graph_folder() == str(tmp_path / "graphs")
    assert (tmp_path / "graphs").is_dir()


PROFILED = """
import torch
from compiled.torch_private import silence_profiler
silence_profiler()
with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
    torch.ones(3) + 1
"""


def test_the_profiler_is_silent() -> None:
    told = subprocess.run([sys.executable, "-c", PROFILED], capture_output=True, check=True)
    assert told.stderr == b""
