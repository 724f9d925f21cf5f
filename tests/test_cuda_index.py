"""`Index(device="cuda")` gives the bits of `knnfast.reference.topk`.

Tests without the gpu mark use host arrays only: they run wherever the extension sees a device,
which tests/test_cuda_emu_index.py arranges with an emulated one. The others need a GPU and torch
on it.
"""

import itertools

import numpy as np
import pytest
import torch

import knnfast
from knnfast import _C, reference

pytestmark = pytest.mark.skipif(
    not getattr(_C, "has_cuda", False) or _C.cuda_device_count() == 0,
    reason="the extension sees no CUDA device",
)

METRICS = ["ip", "cosine", "l2"]
SCANS = ["fp16", "int8"]
gpu = pytest.mark.gpu


def make(n, dim, kind, generator):
    x = torch.randn(n, dim, generator=generator)
    if kind == "ties":
        x = x.sign() * (x.abs() > 1)
    elif kind == "equal":
        x = x[:1].expand(n, dim).clone() if n else x
    elif kind == "mean":
        x = 30 + x
    elif kind == "scales":
        x = x * 2.0 ** torch.randint(-20, 12, (n, 1), generator=generator)
    elif kind == "zeros":
        x[::3] = 0
    return x


def expect(index, x, q, k, metric, ids=None):
    """The index's answer for q against the definition; both as host arrays."""
    want = reference.topk(q, x, k, metric, ids)
    got = index.search(q.numpy(), k)
    np.testing.assert_array_equal(got[1], want[1].numpy())
    np.testing.assert_array_equal(got[0].view(np.int32), want[0].numpy().view(np.int32))


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "mean", "scales", "zeros"])
def test_matches_reference(metric, scan, kind, seed):
    g = torch.Generator().manual_seed(seed)
    n, dim, k = 300, 37, 12
    x, q = make(n, dim, kind, g).half(), make(3, dim, kind, g)
    index = knnfast.Index(dim, metric, device="cuda", scan=scan)
    for part in x.split(170):
        index.add(part.numpy())
    expect(index, x, q, k, metric)


@pytest.mark.parametrize("scan", SCANS)
def test_ids_filters_removal_and_copies(scan, seed):
    g = torch.Generator().manual_seed(seed)
    x, q = torch.randn(400, 20, generator=g).half(), torch.randn(2, 20, generator=g)
    ids = torch.randperm(4000, generator=g)[:400]
    index = knnfast.Index(20, "l2", device="cuda", scan=scan)
    assert (index.add(x.numpy(), ids.numpy()) == ids.numpy()).all()
    expect(index, x, q, 9, "l2", ids)

    allowed = index.search(q.numpy(), 9, allow=ids[::2].numpy())
    want = reference.topk(q, x[::2], 9, "l2", ids[::2])
    np.testing.assert_array_equal(allowed[1], want[1].numpy())
    bits = np.zeros(500, np.uint8)
    for i in ids[1::2].tolist():
        bits[i // 8] |= 1 << i % 8
    denied = index.search(q.numpy(), 9, deny=bits)
    np.testing.assert_array_equal(denied[1], want[1].numpy())

    assert index.remove(ids[1::2].numpy()) == 200
    assert len(index) == 200
    expect(index, x[::2], q, 9, "l2", ids[::2])
    index.compact()
    expect(index, x[::2], q, 9, "l2", ids[::2])
    home = index.to("cpu")
    assert home.device == "cpu"
    for a, b in zip(home.search(q.numpy(), 9), index.search(q.numpy(), 9), strict=True):
        np.testing.assert_array_equal(a, b)
    back = home.to("cuda")
    np.testing.assert_array_equal(back.ids, index.ids)
    np.testing.assert_array_equal(back.vectors(ids[:3:2].numpy()), x[:3:2].numpy())


@pytest.mark.parametrize("metric", METRICS)
def test_range_search(metric, seed):
    """The CPU's bits, with and without a filter; more hits than the first guess has room for."""
    g = torch.Generator().manual_seed(seed)
    x = make(700, 20, "ties", g).half().numpy()
    q = torch.randn(150, 20, generator=g).numpy()
    ids = torch.randperm(7000, generator=g)[:700].numpy()
    device, host = knnfast.Index(20, metric, device="cuda"), knnfast.Index(20, metric)
    for index in (device, host):
        index.add(x, ids)
        index.remove(ids[5:50])
    worst = {"ip": -1e30, "cosine": -1e30, "l2": 1e30}[metric]
    middle = float(host.search(q[:1], 20)[0][0, -1])
    for radius, queries, options in (
        (worst, q, {}), (middle, q[:7], {"allow": ids[::3]}), (-worst, q[:2], {}),
    ):  # fmt: skip
        got = device.range_search(queries, radius, **options)
        want = host.range_search(queries, radius, **options)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
    assert len(device.range_search(q, worst)[1]) == 150 * 655 > 1 << 16


def test_k_beyond_the_rows_and_empty():
    index = knnfast.Index(5, device="cuda")
    scores, ids = index.search(np.ones(5, np.float32), 3)
    assert ids.tolist() == [-1, -1, -1]
    assert (scores == -np.inf).all()
    index.add(np.ones((2, 5), np.float32))
    scores, ids = index.search(np.ones((1, 5), np.float32), 3)
    assert ids.tolist() == [[0, 1, -1]]
    assert scores.tolist() == [[5.0, 5.0, -np.inf]]


def test_rejects():
    index = knnfast.Index(4, device="cuda")
    index.add(np.eye(4, dtype=np.float32))
    with pytest.raises(ValueError, match="65504"):
        index.add(np.full((1, 4), 1e6, np.float32))
    with pytest.raises(ValueError, match="shape"):
        index.search(np.ones((2, 5), np.float32), 1)
    with pytest.raises(ValueError, match="k must be"):
        index.search(np.ones((2, 4), np.float32), 100_000)
    with pytest.raises(ValueError, match="finite"):
        index.search(np.full((1, 4), np.nan, np.float32), 1)
    with pytest.raises(ValueError, match="taken"):
        index.add(np.eye(4, dtype=np.float32)[:1], ids=[2])
    with pytest.raises(RuntimeError, match="CUDA devices found"):
        knnfast.Index(4, device="cuda:99")
    with pytest.raises(ValueError, match="radius"):
        index.range_search(np.ones((1, 4), np.float32), float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        index.range_search(np.full((1, 4), np.inf, np.float32), 0.5)
    assert len(index) == 4


# --- on a GPU


@gpu
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize(
    ("n", "dim", "batch", "k"),
    [
        (1000, 1, 1, 10), (999, 3, 7, 999), (5000, 31, 17, 100), (20_000, 64, 64, 10),
        (20_000, 100, 65, 1), (50_000, 384, 128, 100), (100_000, 512, 257, 10),
        (100_000, 768, 1, 1000), (30_000, 1000, 130, 10), (3000, 2048, 33, 5),
    ],
)  # fmt: skip
def test_device_shapes(scan, n, dim, batch, k, seed):
    for metric, kind in zip(METRICS, ["normal", "mean", "scales"], strict=True):
        g = torch.Generator().manual_seed(seed)
        x, q = make(n, dim, kind, g).half(), make(batch, dim, kind, g)
        index = knnfast.Index(dim, metric, device="cuda", scan=scan)
        index.add(x.cuda())
        got = index.search(q.cuda(), k)
        want = reference.topk(q, x, k, metric)
        assert torch.equal(got[1].cpu(), want[1])
        assert torch.equal(got[0].cpu(), want[0])


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_device_tensors_streams_and_out(dtype, seed):
    g = torch.Generator().manual_seed(seed)
    x, q = torch.randn(3000, 96, generator=g).half(), torch.randn(9, 96, generator=g).to(dtype)
    index = knnfast.Index(96, device="cuda")
    index.add(x.cuda())
    want = reference.topk(q.float(), x, 10)
    wide = torch.zeros(9, 128, dtype=dtype, device="cuda")
    wide[:, :96] = q.cuda()
    out = torch.empty(9, 10, device="cuda"), torch.empty(9, 10, dtype=torch.int64, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        index.search(wide[:, :96], 10, out=out)
    torch.cuda.synchronize()
    assert torch.equal(out[1].cpu(), want[1])
    assert torch.equal(out[0].cpu(), want[0])


@gpu
def test_bad_queries_are_marked():
    index = knnfast.Index(8, device="cuda")
    index.add(torch.randn(100, 8).cuda())
    q = torch.randn(3, 8)
    q[1, 2] = float("nan")
    scores, ids = index.search(q.cuda(), 4)
    assert (ids[1] == -1).all()
    assert scores[1].isnan().all()
    assert (ids[0] >= 0).all()


@gpu
@pytest.mark.parametrize(("batch", "scan"), list(itertools.product([1, 16, 128, 300], SCANS)))
def test_plan_in_a_graph(batch, scan, seed):
    g = torch.Generator().manual_seed(seed)
    x, q = torch.randn(9000, 256, generator=g).half(), torch.randn(batch, 256, generator=g)
    index = knnfast.Index(256, device="cuda", scan=scan)
    index.add(x.cuda())
    plan = index.plan(batch, 20)
    queries = torch.zeros(batch, 256, device="cuda")
    plan(queries)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    before = torch.cuda.memory_allocated()
    with torch.cuda.graph(graph):
        scores, ids = plan(queries)
    queries.copy_(q)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before
    want = reference.topk(q, x, 20)
    assert torch.equal(ids.cpu(), want[1])
    assert torch.equal(scores.cpu(), want[0])


@gpu
def test_plan_follows_the_index():
    index = knnfast.Index(4, device="cuda")
    plan = index.plan(1, 2)
    q = torch.ones(1, 4, device="cuda")
    assert plan(q)[1].tolist() == [[-1, -1]]
    index.add(torch.ones(1, 4))
    assert plan(q)[1].tolist() == [[0, -1]]
