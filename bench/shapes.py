"""Workloads by name."""

TOPK = {
    # name: rows, dim, batches, ks, data
    "1m-512-isotropic": (1_000_000, 512, (1, 8, 64, 256), (10, 100), "isotropic"),
    "1m-512-clustered": (1_000_000, 512, (1, 8, 64), (10,), "clustered"),
    "1m-512-mean": (1_000_000, 512, (1, 8), (10,), "mean"),
    "1m-512-ties": (1_000_000, 512, (1,), (10,), "ties"),
    "100k-512-isotropic": (100_000, 512, (1, 8), (10,), "isotropic"),
    "1k-64-isotropic": (1_000, 64, (1,), (10,), "isotropic"),
}
