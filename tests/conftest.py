"""Shared by all tests: seeds, the GPU gate, and Triton's interpreter where there is no GPU."""

import os
import zlib

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:  # read when @triton.jit runs, so before any kernel file is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def poison():
    """Every tensor that torch leaves uninitialised holds NaN, or its integers' largest value."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed(request):
    """A fixed seed per test, derived from its name; returned for tests that want generators."""
    value = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(value)
    return value
