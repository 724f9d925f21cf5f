"""Other frameworks' arrays: rows and queries as they come, answers in kind."""

from array import array

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
    assert type(again) is np.ndarray
    np.testing.assert_array_equal(again, ids.numpy())
    strided = torch.randn(12, 50).to(dtype).T
    np.testing.assert_array_equal(
        index.search(strided, 3)[1].numpy(), index.search(strided.contiguous(), 3)[1].numpy()
    )


def test_rows_of_the_other_byte_order():
    rows = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    native, bf16, _ = interop.as_rows(rows.astype(">f4"), "vectors")
    assert native.dtype == np.float32
    assert native.dtype.isnative
    assert not bf16
    np.testing.assert_array_equal(native, rows)


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


def test_a_bitset_may_come_as_bytes():
    index = Index(3)
    index.add(np.ones((20, 3), np.float32))
    bits = np.packbits(np.arange(20) % 7 == 5, bitorder="little")
    query = np.ones(3, np.float32)
    wanted = index.search(query, 4, allow=bits)[1]
    assert wanted.tolist() == [5, 12, 19, -1]
    for given in (bits.tobytes(), bytearray(bits), memoryview(bits), array("B", bits.tobytes())):
        np.testing.assert_array_equal(index.search(query, 4, allow=given)[1], wanted)
    ids = array("q", [3, 4])
    for given in (ids, memoryview(ids)):
        assert index.search(query, 2, allow=given)[1].tolist() == [3, 4]
    for name in ("allow", "deny"):
        with pytest.raises(ValueError, match=f"{name} must be flat: "):
            index.search(query, 2, **{name: [[1, 2], [3]]})
    with pytest.raises(TypeError, match="ids must hold integers, got bytearray"):
        index.remove(bytearray([3, 4]))
    assert len(index) == 20


def test_what_lies_under_a_mask_is_no_row():
    rows = np.ma.masked_array(np.ones((3, 4), np.float32), mask=np.eye(3, 4))
    index = Index(4)
    with pytest.raises(TypeError, match="vectors is a masked array: fill or compress it first"):
        index.add(rows)
    with pytest.raises(TypeError, match="ids is a masked array"):
        index.add(rows.filled(0), ids=np.ma.masked_array([1, 2, 3], mask=[0, 1, 0]))
    with pytest.raises(ValueError, match="out must not require gradients"):
        index.search(
            torch.ones(2, 4), 1,
            out=(torch.empty(2, 1, requires_grad=True), torch.empty(2, 1, dtype=torch.int64)),
        )  # fmt: skip
