"""`Index(device="cuda")` gives the bits of `knnfast.reference.topk`.

Tests without the gpu mark use host arrays only: they run wherever the extension sees a device,
which tests/test_cuda_emu_index.py arranges with an emulated one. The others need a GPU and torch
on it.
"""

import itertools
import sys
import threading
import types

import numpy as np
import pytest
import torch

import knnfast
from knnfast import _C, reference
from knnfast.search import cuda_index

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
@pytest.mark.parametrize(
    "kind",
    [pytest.param("ties", marks=pytest.mark.compute_sanitizer), "normal", "equal", "mean", "scales",
     "zeros"],
)  # fmt: skip
def test_matches_reference(metric, scan, kind, seed):
    g = torch.Generator().manual_seed(seed)
    n, dim, k = 300, 37, 12
    x, q = make(n, dim, kind, g).half(), make(3, dim, kind, g)
    index = knnfast.Index(dim, metric, device="cuda", scan=scan)
    for part in x.split(170):
        index.add(part.numpy())
    expect(index, x, q, k, metric)


@pytest.mark.compute_sanitizer
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("batch", [9, 130])
@pytest.mark.parametrize("n", [512, 700])
def test_batches(n, batch, scan, seed):
    """Small and large batches have kernels of their own; 512 rows fill their tiles."""
    g = torch.Generator().manual_seed(seed)
    x, q = torch.randn(n, 100, generator=g).half(), torch.randn(batch, 100, generator=g)
    index = knnfast.Index(100, "l2", device="cuda", scan=scan)
    index.add(x.numpy())
    expect(index, x, q, 10, "l2")


@pytest.mark.parametrize(("scan", "few", "many"), [*zip(SCANS, SCANS, SCANS, strict=True),
                                                  ("auto", "int8", "fp16")])  # fmt: skip
def test_auto_scans_what_is_cheaper(scan, few, many, seed):
    """FP16 rows for batches above 32 and many neighbours, unless it is told what to scan."""
    g = torch.Generator().manual_seed(seed)
    x, q = torch.randn(300, 20, generator=g).half(), torch.randn(33, 20, generator=g)
    index = knnfast.Index(20, device="cuda", scan=scan)
    index.add(x.numpy())
    assert [index.plan(batch, 5).scan for batch in (32, 33)] == [few, many]
    for batch in (32, 33):
        expect(index, x, q[:batch], 5, "ip")


@pytest.mark.compute_sanitizer
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


@pytest.mark.parametrize("own", [None, [3, 1, 7, 5]])
def test_a_copy_never_uses_an_id_twice(own, tmp_path):
    """Nor an index opened from one that a device has saved."""
    x = np.eye(4, dtype=np.float16)
    home = knnfast.Index(4)
    home.add(x, own)
    home.remove([3, 7])
    copy = home.to("cuda")
    next_id = 4 if own is None else 8
    assert copy.add(x[:2]).tolist() == [next_id, next_id + 1]
    np.testing.assert_array_equal(copy.vectors([next_id + 1, 1]), x[[1, 1]])
    copy.remove([next_id + 1])
    copy.compact()
    copy.save(tmp_path)
    for again in (copy.to("cpu"), knnfast.Index.open(tmp_path, device="cuda"), copy):
        assert again.add(x[:1]).tolist() == [next_id + 2]
        np.testing.assert_array_equal(again.ids[:-2], home.ids)


def test_copies_and_rows_while_another_thread_writes(seed):
    """Each is of one moment: the rows of whole adds and removals, and every id's own row."""
    rng = np.random.default_rng(seed)
    parts = rng.standard_normal((60, 40, 16)).astype(np.float16)
    for start in ("cpu", "cuda"):
        index = knnfast.Index(16, device=start)
        index.add(parts[0])

        def write(index=index):
            for n in range(1, len(parts)):
                index.add(parts[n])
                index.remove(np.arange(40 * n - 40, 40 * n))
                if n % 5 == 0:
                    index.compact()

        writer = threading.Thread(target=write)
        writer.start()
        while writer.is_alive():
            copy = index.to("cuda" if start == "cpu" else "cpu")
            ids = copy.ids
            assert len(ids) in (40, 80)
            np.testing.assert_array_equal(copy.vectors(ids), parts.reshape(-1, 16)[ids])
            assert copy.add(parts[0, 0]) == ids[-1] + 1
            try:
                rows = index.vectors(ids[-40:])
            except ValueError:  # removed since
                continue
            np.testing.assert_array_equal(rows, parts.reshape(-1, 16)[ids[-40:]])
        writer.join()
        assert len(index) == 40


@pytest.mark.compute_sanitizer
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
    for name in ("cuda:99", "cuda:1000000000000"):
        for call in (
            lambda name=name: knnfast.Index(4, device=name),
            lambda name=name: index.to(name),
        ):
            with pytest.raises(
                ValueError, match=f"device: must be cpu or cuda:N below .* got '{name}'"
            ):
                call()
    with pytest.raises(ValueError, match="ids must be 0 to"):
        index.add(np.eye(4, dtype=np.float32)[:1], ids=[2**63 - 1])
    with pytest.raises(ValueError, match="radius"):
        index.range_search(np.ones((1, 4), np.float32), float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        index.range_search(np.full((1, 4), np.inf, np.float32), 0.5)
    assert len(index) == 4


def test_out():
    """Into arrays of the result's own type and shape; another one is refused, as on the CPU."""
    rows, q = np.eye(4, dtype=np.float16), np.ones((2, 4), np.float32)
    for index in (knnfast.Index(4, device="cuda"), knnfast.Index(4)):
        index.add(rows)
        out = np.empty((2, 3), np.float32), torch.empty(2, 3, dtype=torch.int64)
        scores, ids = index.search(q, 3, out=out)
        assert scores is out[0]
        assert ids is out[1]
        assert ids.tolist() == [[0, 1, 2], [0, 1, 2]]
        half = np.empty((2, 4), np.float16)
        index.vectors([3, 1], out=half)
        np.testing.assert_array_equal(half, rows[[3, 1]])
        right = {"scores": np.empty((2, 3), np.float32), "ids": np.empty((2, 3), np.int64)}
        for bad in (
            {"scores": np.empty((2, 3))},
            {"scores": np.empty((2, 3), np.float16)},
            {"scores": np.empty((1, 2, 3), np.float32)},
            {"scores": np.empty((3, 2), np.float32).T},
            {"ids": np.empty((2, 3), np.uint64)},
            {"ids": np.empty((2, 3), np.int32)},
            {"ids": None},
        ):
            with pytest.raises(ValueError, match="out must be"):
                index.search(q, 3, out=tuple((right | bad).values()))
        frozen = np.empty((2, 4), np.float16)
        frozen.flags.writeable = False
        for bad in (
            torch.empty(2, 4, dtype=torch.bfloat16),
            np.empty((2, 4), np.int16),
            np.empty((4, 2), np.float16),
            frozen,
            5,
        ):
            with pytest.raises(ValueError, match="out must be"):
                index.vectors([3, 1], out=bad)


def test_segments_of_a_given_size(seed):
    """For callers who know how many rows there will be; answers are the same."""
    g = torch.Generator().manual_seed(seed)
    x, q = torch.randn(700, 20, generator=g).half(), torch.randn(2, 20, generator=g)
    index = cuda_index.CudaIndex(20, "ip", "cuda", "fp16", segment_rows=300)
    index.add(x.numpy())
    expect(index, x, q, 9, "ip")
    assert index.nbytes < 1 << 20  # 256 MiB where none is given


class OnDevice:
    """A foreign array: it says where it lies by its address only."""

    def __init__(self, host, number):
        self.host, self.number = host, number
        self.__cuda_array_interface__ = {"data": (host.ctypes.data, False)}


def fake_cupy():
    """As much of cupy as an index uses, on devices of host memory, of which 1 is current."""
    entered = [1]

    class Device:
        def __init__(self, number):
            self.id = number

        def __enter__(self):
            entered.append(self.id)

        def __exit__(self, *_):
            entered.pop()

    class ndarray:  # noqa: N801
        __cuda_array_interface__ = property(lambda self: self.host.__array_interface__)

        def __init__(self, host, number=None):
            self.host, self.device = host, Device(entered[-1] if number is None else number)
            self.data = types.SimpleNamespace(ptr=host.ctypes.data)

        def __getattr__(self, name):
            return getattr(self.host, name)

        def copy(self):
            return ndarray(self.host.copy())

    def asarray(given):
        here = getattr(given, "number", None) == entered[-1]
        host = given.host if isinstance(given, OnDevice) else given
        return ndarray(host if here else host.copy())

    cupy = types.ModuleType("cupy")
    cupy.ndarray, cupy.asarray = ndarray, asarray
    cupy.empty = lambda shape, dtype: ndarray(np.empty(shape, dtype))
    cupy.cuda = types.SimpleNamespace(
        Device=Device, get_current_stream=lambda: types.SimpleNamespace(ptr=100 + entered[-1])
    )
    return cupy


def test_cupy_while_another_device_is_current(monkeypatch):
    """Streams, copies and results are of the device that the queries are on."""
    cupy = fake_cupy()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    index = knnfast.Index(4, device="cuda")
    wide = cupy.ndarray(np.zeros((3, 8), np.float32)[:, ::2], 0)
    rows = index._rows(wide, "queries")
    assert rows.stream == 100
    assert rows.hold.flags.c_contiguous
    made = (
        rows.hold,
        *cuda_index._empty(rows.hold, (3, 2)),
        *cuda_index._moved((np.zeros(2),), rows.hold),
    )
    assert [array.device.id for array in made] == [0] * 4


@pytest.mark.parametrize("framework", ["torch", "cupy"])
def test_a_foreign_array_is_never_a_copy(framework, monkeypatch):
    """Frameworks copy what lies on another device, silently; an index refuses it."""
    if framework == "cupy":
        monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
        monkeypatch.delitem(sys.modules, "torch")
    else:
        monkeypatch.setattr(torch, "as_tensor", lambda given, device: torch.from_numpy(
            given.host if device in ("cuda", f"cuda:{given.number}") else given.host.copy()
        ))  # fmt: skip
    host = np.zeros((3, 2), np.float32)
    seen = cuda_index._array(OnDevice(host, 0), "out", 0)
    assert cuda_index._address(seen) == host.ctypes.data
    with pytest.raises(ValueError, match="out is not on cuda:0"):
        cuda_index._array(OnDevice(host, 1), "out", 0)


# --- on a GPU


@gpu
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["normal", "scales", "zeros"])
def test_reference_on_a_device(metric, kind, seed):
    """The definition's own bits are the CPU's there; the large shapes below rely on it."""
    g = torch.Generator().manual_seed(seed)
    for dim in (1, 37, 384):
        x, q = make(5000, dim, kind, g).half(), make(5, dim, kind, g)
        want = reference.canonical_scores(q, x, metric)
        got = reference.canonical_scores(q.cuda(), x.cuda(), metric)
        assert torch.equal(got.cpu(), want)
        for a, b in zip(
            reference.topk(q.cuda(), x.cuda(), 99, metric),
            reference.topk(q, x, 99, metric),
            strict=True,
        ):
            assert torch.equal(a.cpu(), b)


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
        x, q = make(n, dim, kind, g).half().cuda(), make(batch, dim, kind, g).cuda()
        index = knnfast.Index(dim, metric, device="cuda", scan=scan)
        index.add(x)
        got = index.search(q, k)
        want = reference.topk(q, x, k, metric)
        assert torch.equal(got[1], want[1])
        assert torch.equal(got[0], want[0])


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
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        index.search(wide[:, :96], 10, out=out)
    torch.cuda.synchronize()
    assert torch.equal(out[1].cpu(), want[1])
    assert torch.equal(out[0].cpu(), want[0])


@gpu
def test_out_on_the_device():
    index = knnfast.Index(8, device="cuda")
    index.add(torch.randn(100, 8).half().cuda())
    q = torch.randn(3, 8, device="cuda")
    scores = torch.empty(3, 4, device="cuda")
    for ids in (
        torch.empty(3, 4, dtype=torch.uint64, device="cuda"),
        torch.empty(4, 3, dtype=torch.int64, device="cuda"),
        torch.empty(3, 4, dtype=torch.int64),
    ):
        with pytest.raises(ValueError, match="out must be"):
            index.search(q, 4, out=(scores, ids))
    with pytest.raises(ValueError, match="out must be"):
        index.search(q.cpu(), 4, out=(scores, torch.empty(3, 4, dtype=torch.int64)))
    rows = torch.empty(2, 8, dtype=torch.float16, device="cuda")
    assert index.vectors([5, 7], out=rows) is rows
    np.testing.assert_array_equal(rows.cpu().numpy(), index.vectors([5, 7]))
    with pytest.raises(ValueError, match="out must be float16"):
        index.vectors([5, 7], out=rows.bfloat16())


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
    with torch.cuda.graph(graph):
        before = torch.cuda.memory_allocated()  # with what every capture takes
        scores, ids = plan(queries)
    queries.copy_(q)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before
    want = reference.topk(q, x, 20)
    assert torch.equal(ids.cpu(), want[1])
    assert torch.equal(scores.cpu(), want[0])


@gpu
def test_a_graph_captures_no_search():
    index = knnfast.Index(4, device="cuda")
    index.add(torch.ones(3, 4))
    q = torch.ones(1, 4, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        twice = q * 2  # of an empty graph torch would warn
        with pytest.raises(ValueError, match=r"capture index\.plan\(\)"):
            index.search(twice, 2)
    assert index.search(q, 2)[1].tolist() == [[0, 1]]


@gpu
def test_plan_follows_the_index():
    index = knnfast.Index(4, device="cuda")
    plan = index.plan(1, 2)
    q = torch.ones(1, 4, device="cuda")
    assert plan(q)[1].tolist() == [[-1, -1]]
    index.add(torch.ones(1, 4))
    assert plan(q)[1].tolist() == [[0, -1]]
