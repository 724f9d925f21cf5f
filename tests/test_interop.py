"""Other frameworks' arrays: rows and queries as they come, answers in kind."""

import numpy as np
import pytest
import torch

from knnfast.search import Index, interop


class Foreign:
    """Only DLPack, as a framework we have never heard of."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **kwargs):
        return self.tensor.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_frameworks(dtype):
    x = torch.randn(50, 12).to(dtype)
    index = Index(12)
    index.add(Foreign(x))
    scores, ids = index.search(x, 3)
    assert isinstance(scores, torch.Tensor)
    again = index.search(Foreign(x), 3)[1]
    np.testing.assert_array_equal(np.asarray(again), ids.numpy())
    strided = torch.randn(12, 50).to(dtype).T
    np.testing.assert_array_equal(
        index.search(strided, 3)[1].numpy(), index.search(strided.contiguous(), 3)[1].numpy()
    )


def test_rows_of_the_other_byte_order():
    rows = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    array, bf16, _ = interop.as_rows(rows.astype(">f4"), "vectors")
    assert array.dtype == np.float32
    assert array.dtype.isnative
    assert not bf16
    np.testing.assert_array_equal(array, rows)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_without_rows_in_memory():
    index = Index(4)
    with pytest.raises(TypeError, match="vectors must be a dense tensor, got a meta tensor"):
        index.add(torch.ones(3, 4, device="meta"))
    with pytest.raises(TypeError, match="vectors must be a dense tensor, got a nested tensor"):
        index.add(torch.nested.nested_tensor([torch.ones(3, 4)]))
    for dtype in (torch.int64, torch.uint8):
        with pytest.raises(TypeError, match="allow must be a dense tensor, got a meta tensor"):
            index.search(torch.ones(3, 4), 1, allow=torch.ones(3, dtype=dtype, device="meta"))
    with pytest.raises(TypeError, match="queries must be a dense tensor, got torch"):
        index.search(torch.ones(3, 4).to_sparse(), 1)


def test_lazily_negated_tensors():
    """Their memory holds the values before the sign was changed."""
    x = torch.complex(torch.zeros(3, 4), torch.arange(12.0).reshape(3, 4)).conj().imag
    index = Index(4)
    index.add(x)
    assert np.array_equal(index.vectors([0, 1, 2]), -np.arange(12).reshape(3, 4))
