"""Files of rows: what is written comes back; what is no such file is refused."""

import numpy as np
import pytest

from knnfast.search import DamagedFile, Index
from knnfast.search.row_files import read_rows, write_rows


@pytest.mark.parametrize("suffix", [".npy", ".fbin", ".f16bin"])
def test_row_files(tmp_path, suffix):
    x = np.random.default_rng(0).standard_normal((20, 6)).astype(np.float16)
    path = tmp_path / f"rows{suffix}"
    write_rows(path, x)
    np.testing.assert_array_equal(read_rows(path).astype(np.float16), x)
    Index(6).add(read_rows(path))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedFile, match="rows"):
        read_rows(path)


@pytest.mark.parametrize("mmap", [False, True])
def test_npy_files_of_another_kind(tmp_path, mmap):
    """An archive that is none, and a header that promises more than there is."""
    path = tmp_path / "rows.npy"
    path.write_bytes(b"PK\x03\x04garbage")
    with pytest.raises(DamagedFile, match=r"rows\.npy"):
        read_rows(path, mmap)
    for shape in ((10**15, 8), (2**62, 2**62), (-1, 8)):
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}"
        header = header.ljust(117) + "\n"
        path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
                         + header.encode() + bytes(64))  # fmt: skip
        with pytest.raises(DamagedFile, match=r"rows\.npy"):
            read_rows(path, mmap)


@pytest.mark.parametrize("suffix", [".npy", ".fbin", ".f16bin"])
def test_row_files_hold_what_was_given_or_are_not_written(tmp_path, full_disk, suffix):
    path = tmp_path / f"rows{suffix}"
    write_rows(path, np.eye(3, dtype=np.float32))
    for bad, error in (
        (np.eye(3), TypeError),
        (np.eye(3, dtype=np.int64), TypeError),
        ([[1.0]], TypeError),
        (np.ones(3, np.float32), ValueError),
    ):
        with pytest.raises(error, match="rows must be"):
            write_rows(path, bad)
    with pytest.raises(ValueError, match="suffix"):
        write_rows(tmp_path / "rows.bin", np.eye(3, dtype=np.float32))
    large = np.full((1000, 64), 65519, np.float32)  # rounds to 65504
    with full_disk(1000), pytest.raises(OSError, match=r"requested|large"):
        write_rows(path, large)
    np.testing.assert_array_equal(read_rows(path), np.eye(3))
    write_rows(path, large)
    assert read_rows(path).max() == (65504 if suffix == ".f16bin" else 65519)
    large[999, 63] = 65520
    if suffix == ".f16bin":
        with pytest.raises(ValueError, match="65504"):
            write_rows(path, large)
        assert read_rows(path).max() == 65504
    write_rows(path, np.empty((0, 4), np.float16))
    assert read_rows(path).shape == (0, 4)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
