"""Shared by all tests: seeds, the GPU gate, and Triton's interpreter where there is no GPU."""

import json
import os
import resource
import zlib
from contextlib import contextmanager

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
# cuBLAS warns otherwise where `poison` asks for deterministic algorithms; read at its first use.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if not HAS_GPU:  # read when @triton.jit runs, so before any kernel file is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def fault(request):
    """A kernel that faults fails its own test, and the tests after it get a process of their own:
    this one cannot use the device any more."""
    yield
    if HAS_GPU and ("gpu" in request.keywords or request.module.__name__ == "test_cuda_index"):
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(1)  # xdist names the test and starts another worker
            pytest.exit(f"the device is lost: {error}", 1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The CPU, and in a test of its own a GPU."""
    return request.param


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


@pytest.fixture
def full_disk():
    """A context in which no file may grow beyond `size` bytes: what a full disk does to a write."""

    @contextmanager
    def limited(size):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return limited


@pytest.fixture(scope="session")
def open_clip_folder(tmp_path_factory):
    """A tiny untrained open_clip model as a local folder, and the network."""
    from safetensors.torch import save_file

    from knnfast.encoders import openclip

    try:
        open_clip = openclip.import_open_clip()
    except ImportError as error:
        pytest.skip(str(error))

    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 1,
        },
    }
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    network = open_clip.CLIP(**config)
    save_file(network.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return folder, network.eval()
