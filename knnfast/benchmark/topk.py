"""What the top-k benchmarks share: rows, the truth, and the peers."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from knnfast import _C
from knnfast._checks import hint
from knnfast.benchmark.machine import memory_bytes
from knnfast.benchmark.timing import Choice, thread_choices

KINDS = ("isotropic", "clustered", "mean", "ties", "orthogonal")


def make_rows(
    n: int, d: int, kind: str = "isotropic", queries: int = 256, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Rows [n, d] fp16 and queries [queries, d] fp32 of the same kind.

    isotropic: directions without structure; clustered: 1,000 centres with noise of half their
    size; mean: isotropic plus one vector three times as long; ties: one row n times; orthogonal:
    every row differs, and every score is 0.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((1000, d), dtype=np.float32)
    mean = rng.standard_normal(d, dtype=np.float32)

    def draw(rng: np.random.Generator, m: int, query: bool = False) -> np.ndarray:
        x = rng.standard_normal((m, d), dtype=np.float32)
        if kind == "ties":
            return np.repeat(centres[:1] / np.linalg.norm(centres[0]), m, 0)
        if kind == "clustered":
            x = centres[rng.integers(0, 1000, m)] + 0.5 * x
        if kind == "orthogonal":
            x[:, : d // 2] *= not query
            x[:, d // 2 :] *= query
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        return x + 3 * mean / np.linalg.norm(mean) if kind == "mean" else x

    rows = np.empty((n, d), np.float16)

    def fill(first: int) -> None:
        block = rows[first : first + 16384]
        # never [seed, 0]: that is the stream of `seed` alone, which the queries come from
        block[:] = draw(np.random.default_rng([seed, first + 1]), len(block))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, range(0, n, 16384)))
    if kind == "mean":
        return rows, rng.standard_normal((queries, d), dtype=np.float32)
    return rows, draw(rng, queries, query=True)


class Truth:
    """The k best scores of some queries in FP64, over all rows.

    Args:
        rows: [n, d] fp16.
        queries: [m, d] fp32; the first `check` of them are ranked, and as many more at distances
            that grow up to the last.
        k: as many as any answer that is judged.
        metric: ip, cosine or l2.
        device: where scores are computed.
    """

    def __init__(
        self,
        rows: np.ndarray,
        queries: np.ndarray,
        k: int,
        metric: str = "ip",
        check: int = 8,
        device: str = "cpu",
    ) -> None:
        self.rows, self.metric, self.device = rows, metric, device
        some = np.arange(min(check, len(queries)))
        if len(queries) > check:
            spread = np.geomspace(check, len(queries), check).round().astype(int) - 1
            some = np.unique([*some, *spread])
        self.checked = some
        self.queries = self._wide(queries[some])
        best = np.empty((len(some), 0))
        for first in range(0, len(rows), 8192):
            scores = self._scores(rows[first : first + 8192], self.queries)
            best = np.concatenate([best, scores], 1)
            if best.shape[1] > k:
                best = -np.partition(-best, k - 1, axis=1)[:, :k]
        self.best = -np.sort(-best, axis=1)

    def _wide(self, x: np.ndarray) -> Any:
        """In FP64 on the device: an array, or a tensor on a GPU."""
        if self.device == "cpu":
            return x.astype(np.float64)
        import torch

        return torch.from_numpy(x).to(self.device).double()

    def _scores(self, rows: np.ndarray, queries: Any) -> np.ndarray:
        """Larger is better: l2 counts negative."""
        x = self._wide(rows)
        if self.metric == "l2":
            scores = -((queries[:, None] - x) ** 2).sum(-1)
        else:
            scores = queries @ x.T
        if self.metric == "cosine":
            norms = (queries**2).sum(-1)[:, None] ** 0.5 * (x**2).sum(-1) ** 0.5
            scores = scores / (norms + (norms == 0))
        return scores if self.device == "cpu" else scores.cpu().numpy()

    def judge(self, ids: np.ndarray) -> dict[str, Any]:
        """How an answer compares with the truth.

        Args:
            ids: [m, k] int64, of the first m queries (the checked ones are looked at).
        Returns: `exact`: all k scores are the best there are, in FP64 up to its rounding;
            `recall`: share of the answer that scores at least the k-th best; `regret`: the
            largest amount by which a score falls short of the one that belongs in its place.
        """
        ids = np.asarray(ids)
        ids = ids[self.checked[self.checked < len(ids)]]
        k = ids.shape[1]
        queries, best = self.queries[: len(ids)], self.best[: len(ids), :k]
        if ((ids < 0) | (ids >= len(self.rows))).any():
            return {"exact": False, "recall": 0.0, "regret": float("inf")}
        got = np.stack(
            [self._scores(self.rows[i], q[None])[0] for i, q in zip(ids, queries, strict=True)]
        )
        slack = 1e-12 * np.maximum(1.0, np.abs(best[:, -1:]))
        unique = np.array([len(set(i)) for i in ids.tolist()])
        regret = max(0.0, float((best - -np.sort(-got, axis=1)).max()))
        return {
            "exact": bool(regret <= slack.min() and (unique == k).all()),
            "recall": float((got >= best[:, -1:] - slack).mean()),
            "regret": regret,
        }


class Peer(NamedTuple):
    """Another library over the same rows."""

    search: Callable[..., np.ndarray]  # (queries, k) -> ids [m, k] on the host
    call: Callable[..., Any]  # the same without bringing the ids home: what is timed
    # (threads, batch) -> the ways to run it, of which the fastest is measured; none: as it is
    choices: Callable[[int, int], list[Choice]] = lambda threads, batch: []
    capturable: bool = False  # as a CUDA graph: it works on torch's stream alone


@contextmanager
def threads_for_all(threads: int | None) -> Iterator[None]:
    """At most so many threads for us and torch (None: as they are); afterwards, and for FAISS's
    choice of BLAS, what was before."""
    import torch

    ours, torchs = _C.num_threads(), torch.get_num_threads()
    faiss = sys.modules.get("faiss")
    if faiss is not None:
        faisss = faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold
    try:
        if threads is not None:
            _C.set_num_threads(threads)
            torch.set_num_threads(threads)
        yield
    finally:
        _C.set_num_threads(ours)
        torch.set_num_threads(torchs)
        if faiss is not None:
            faiss.omp_set_num_threads(faisss[0])
            faiss.cvar.distance_compute_blas_threshold = faisss[1]


def faiss_module() -> Any:
    """The module `faiss`; ImportError that names the extra when it is missing."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            f"FAISS is not installed ({error}): {hint('faiss')}, or faiss-gpu"
        ) from None
    return faiss


def _threads(set_threads: Callable[[int], Any]) -> Callable[[int, int], list[Choice]]:
    return lambda threads, batch: thread_choices(set_threads, threads)


def _metric(faiss: Any, metric: str) -> int:
    if metric == "cosine":
        raise ValueError("FAISS has no cosine: normalise the rows and use ip")
    return faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(rows), 65536):
        yield rows[first : first + 65536].astype(np.float32)


def _faiss_cpu(
    rows: np.ndarray, metric: str, index: Callable[[Any, int, int], Any], blas: bool = False
) -> Peer:
    faiss = faiss_module()
    dim = rows.shape[1]

    def make(part: np.ndarray) -> Any:
        made = index(faiss, dim, _metric(faiss, metric))
        made.is_trained = True  # FP16 codes have nothing to learn
        for block in _blocks(part):
            made.add(block)
        return made

    whole = make(rows)
    current = [whole]
    shards: list[Any] = []  # and the index over them, which does not own them

    def search(q: np.ndarray, k: int, **options: Any) -> np.ndarray:
        return current[0].search(q, k, **options)[1]

    def choose(threads: int, batches_from: int, sharded: bool) -> None:
        current[0] = shards[0] if sharded else whole
        faiss.omp_set_num_threads(threads)
        faiss.cvar.distance_compute_blas_threshold = batches_from

    def choices(threads: int, batch: int) -> list[Choice]:
        paths = {"": 1 << 30}  # from so many queries on FAISS takes BLAS; 1.15 itself from 128,000
        if blas:
            # Of large batches its own loops are many times slower.
            paths = {"BLAS": 0} if batch > 32 else {"BLAS": 0, **paths}
        ways = [(n, name, False) for name in paths for n in sorted({1, threads})]
        fits = rows.size * 4 * 3 < memory_bytes()  # both, and ours
        if batch < threads <= len(rows) and fits:
            # Its loops share out queries: of fewer than threads each has a core of its own, unless
            # the rows lie in as many indexes, searched side by side.
            if not shards:
                shards.append(faiss.IndexShards(dim, True, True))
                for part in np.array_split(rows, threads):
                    shards.append(make(part))
                    shards[0].add_shard(shards[-1])
            ways += [(threads, name, True) for name in paths]
        return [
            Choice(
                partial(choose, n, paths[name], sharded),
                n,
                f"{threads} shards {name}".strip() if sharded else name,
            )
            for n, name, sharded in ways
        ]

    return Peer(search, search, choices)


def faiss_flat(rows: np.ndarray, metric: str) -> Peer:
    """FAISS IndexFlat: FP32 rows, with BLAS or without, one or as many shards as threads."""
    return _faiss_cpu(rows, metric, lambda faiss, d, m: faiss.IndexFlat(d, m), blas=True)


def faiss_sq_fp16(rows: np.ndarray, metric: str) -> Peer:
    """FAISS IndexScalarQuantizer fp16: the same bytes as ours."""
    return _faiss_cpu(
        rows,
        metric,
        lambda faiss, d, m: faiss.IndexScalarQuantizer(d, faiss.ScalarQuantizer.QT_fp16, m),
    )


def usearch_exact(rows: np.ndarray, metric: str) -> Peer:
    """USearch's exact search over the FP16 rows."""
    from usearch.index import MetricKind
    from usearch.index import search as scan

    kind = {"ip": MetricKind.IP, "cosine": MetricKind.Cos, "l2": MetricKind.L2sq}[metric]
    threads = [1]

    def search(q: np.ndarray, k: int) -> np.ndarray:
        found = scan(rows, q.astype(np.float16), k, kind, exact=True, threads=threads[0])
        return found.keys.reshape(len(q), -1).astype(np.int64)

    return Peer(search, search, _threads(lambda n: threads.__setitem__(0, n)))


def torch_topk(rows: np.ndarray, metric: str) -> Peer:
    """Torch on the CPU: FP32 matmul, then topk, of all rows at once or by blocks of 65,536."""
    import torch

    if metric != "ip":
        raise ValueError("written for ip")
    x = torch.from_numpy(rows).float()
    block = [len(rows)]

    def search(q: np.ndarray, k: int) -> np.ndarray:
        return _by_blocks(torch.from_numpy(q), x, block[0], k).numpy()

    def choose(threads: int, size: int) -> None:
        torch.set_num_threads(threads)
        block[0] = size

    def choices(threads: int, batch: int) -> list[Choice]:
        return [
            Choice(partial(choose, n, size), n, name)
            for name, size in {"": len(rows), "by blocks": 1 << 16}.items()
            if size <= len(rows)  # a larger block is all of them
            for n in sorted({1, threads})
        ]

    return Peer(search, search, choices)


def _by_blocks(q: Any, x: Any, block: int, k: int) -> Any:
    """Ids of the k best rows of x by matmul and topk of `block` rows at a time, merged."""
    import torch

    scores, ids = [], []
    for i, part in enumerate(x.split(block)):
        best, at = (q @ part.T).topk(min(k, len(part)))
        scores.append(best)
        ids.append(at + i * block)
    if len(scores) == 1:
        return ids[0]
    return torch.cat(ids, 1).gather(1, torch.cat(scores, 1).topk(k)[1])


def _on_gpu(call: Callable[[Any, int], Any], capturable: bool = False) -> Peer:
    def search(q: Any, k: int) -> np.ndarray:
        return call(q, k).cpu().numpy().astype(np.int64)

    return Peer(search, call, capturable=capturable)


def torch_gpu(rows: np.ndarray, metric: str) -> Peer:
    """Torch on the GPU: FP16 matmul and topk by blocks of 2^20 rows, merged."""
    import torch

    if metric != "ip":
        raise ValueError("written for ip")
    x = torch.from_numpy(rows).cuda()

    return _on_gpu(lambda q, k: _by_blocks(q.half(), x, 1 << 20, k), capturable=True)


def faiss_gpu(rows: np.ndarray, metric: str) -> Peer:
    """FAISS GpuIndexFlat with FP16 rows."""
    faiss = faiss_module()
    if not hasattr(faiss, "StandardGpuResources"):
        raise ImportError("this FAISS is built for CPUs: pip install faiss-gpu")
    import faiss.contrib.torch_utils
    import torch

    config = faiss.GpuIndexFlatConfig()
    config.useFloat16 = True
    resources = faiss.StandardGpuResources()
    built = faiss.GpuIndexFlat(resources, rows.shape[1], _metric(faiss, metric), config)
    for block in torch.from_numpy(rows).split(1 << 20):
        built.add(block.cuda().float())
    return _on_gpu(lambda q, k: built.search(q, k)[1])


def cuvs_brute_force(rows: np.ndarray, metric: str) -> Peer:
    """NVIDIA cuVS brute force over the FP16 rows: into buffers that are there, without waiting for
    the device, and with scratch memory from a pool."""
    import rmm
    import torch
    from cuvs.common import Resources
    from cuvs.neighbors import brute_force

    if not isinstance(rmm.mr.get_current_device_resource(), rmm.mr.CudaAsyncMemoryResource):
        rmm.mr.set_current_device_resource(rmm.mr.CudaAsyncMemoryResource())
    kind = {"ip": "inner_product", "cosine": "cosine", "l2": "sqeuclidean"}[metric]
    x = torch.from_numpy(rows).cuda()
    # torch's stream, as ours; 0 would mean none, 1 is CUDA's name for the default one
    resources = Resources(stream=torch.cuda.current_stream().cuda_stream or 1)
    built = brute_force.build(x, metric=kind, resources=resources)
    buffers: dict[tuple[int, int], tuple[Any, Any]] = {}

    def call(q: Any, k: int, _rows: Any = x) -> Any:  # what is built holds but a view of them
        shape = len(q), k
        if shape not in buffers:
            buffers[shape] = q.new_empty(shape), q.new_empty(shape, dtype=torch.int64)
        scores, ids = buffers[shape]
        brute_force.search(built, q.half(), k, ids, scores, resources=resources)
        return ids

    return _on_gpu(call)


def flashlib_knn(rows: np.ndarray, metric: str) -> Peer:
    """FlashLib's Flash-KNN over the FP16 rows. It ranks by l2 alone: for ip, see its recall."""
    import torch
    from flashlib import flash_knn

    x = torch.from_numpy(rows).cuda()
    return _on_gpu(lambda q, k: flash_knn(q.half(), x, k, return_distances=False), capturable=True)


CPU_PEERS: dict[str, Callable[[np.ndarray, str], Peer]] = {
    "faiss-flat": faiss_flat,
    "faiss-sq-fp16": faiss_sq_fp16,
    "usearch-exact": usearch_exact,
    "torch-fp32": torch_topk,
}
GPU_PEERS: dict[str, Callable[[np.ndarray, str], Peer]] = {
    "faiss-gpu-fp16": faiss_gpu,
    "cuvs-brute-force": cuvs_brute_force,
    "flashlib": flashlib_knn,
    "torch-fp16": torch_gpu,
}


def build_peers(
    names: Sequence[str] | None, rows: np.ndarray, metric: str, device: str = "cpu"
) -> Iterator[tuple[str, Peer | str]]:
    """The named peers (None: all), one at a time so that only one is in memory.

    Yields: (name, peer), or (name, why not) for one that is missing, does not take the metric or
        cannot be built on this machine.
    """
    known = CPU_PEERS if device == "cpu" else GPU_PEERS
    for name in known if names is None else names:
        if name not in known:
            raise ValueError(f"peers must be of {tuple(known)}, got {name!r}")
        try:
            peer: Peer | str = known[name](rows, metric)
        except Exception as error:  # a library may raise anything; the others are measured
            peer = f"{type(error).__name__}: {error}"
        yield name, peer
        del peer  # before the next one is built: only one is in memory
