"""Memory in large pages is memory like any other."""

import mmap

import pytest
import torch

from compiled import large_pages
from compiled.large_pages import PAGE
from toys import CPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, 3 * PAGE + 5])
def test_zeros(size: int, dtype: torch.dtype) -> None:
    tensor = large_pages.zeros((1, size), dtype, CPU)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((1, size), dtype, True)
    assert not tensor.any()
    tensor[0, -1] = 3
    assert int(tensor.sum()) == 3
    if tensor.nbytes >= PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        assert tensor.data_ptr() % PAGE == 0


def test_it_lives_as_long_as_the_tensor() -> None:
    view = large_pages.zeros((4, PAGE), torch.int8, CPU)[2]
    view.fill_(7)
    for _ in range(3):
        large_pages.zeros((4, PAGE), torch.int8, CPU).fill_(1)
    assert int(view.min()) == int(view.max()) == 7


def test_where_there_are_none_memory_is_ordinary(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", no_memory)
    assert not large_pages.zeros((2, PAGE), torch.float32, CPU).any()
    with pytest.raises(RuntimeError, match="allocate"):  # PyTorch's own words
        large_pages.zeros((1 << 50,), torch.float32, CPU)
