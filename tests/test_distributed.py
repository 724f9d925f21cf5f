"""ShardedIndex: two processes' rows give one index's answer, bit for bit."""

import subprocess
import sys

PROCESS = """
import sys, datetime
import numpy as np, torch, torch.distributed as dist
from knnfast.search import Index
from knnfast.search.distributed import ShardedIndex

rank, store = int(sys.argv[1]), sys.argv[2]
try:
    ShardedIndex(Index(4))
    raise SystemExit("a ShardedIndex without process group was made")
except RuntimeError as error:
    assert "init_process_group" in str(error)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=120))
rng = np.random.default_rng(0)
for metric in ("ip", "cosine", "l2"):
    x = rng.standard_normal((400, 24)).astype(np.float16)
    x[200:] = x[:200]  # ties across the processes ...
    x[7] = x[9]
    x[7, 0] += np.float16(2**-9)  # ... and scores that differ in FP64 ...
    q = rng.standard_normal((5, 24)).astype(np.float32)
    q[0], q[0, 0] = 1e4, 1e-6  # ... but not in FP32
    ids = rng.permutation(4000)[:400]
    mine = np.arange(400) % 3 == 0 if rank == 0 else np.arange(400) % 3 != 0
    whole, part = Index(24, metric), Index(24, metric)
    whole.add(x, ids)
    part.add(x[mine], ids[mine])
    shards = ShardedIndex(part)
    assert len(shards) == 400
    for k, options in ((10, {}), (170, {}), (500, {}), (9, {"deny": ids[::2]})):
        for a, b in zip(whole.search(q, k, **options), shards.search(q, k, **options)):
            np.testing.assert_array_equal(a, b)
    scores, found = shards.search(torch.from_numpy(q[0]), 3)
    assert torch.equal(found, whole.search(torch.from_numpy(q[0]), 3)[1])
if rank == 0:
    part.add(x[:1], ids[mine.argmin()][None])  # the other process's
try:
    shards.search(q, 400)
    raise SystemExit("an id of two processes passed")
except ValueError as error:
    assert "more than one process" in str(error)
try:
    ShardedIndex(Index(4 + rank))
    raise SystemExit("two widths passed")
except ValueError as error:
    assert "one dim and metric" in str(error)
dist.destroy_process_group()
"""


def test_two_processes(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", PROCESS]
    store = str(tmp_path / "store")
    children = [
        subprocess.Popen(
            [*command, str(r), store], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for r in range(2)
    ]
    for child in children:
        _, errors = child.communicate(timeout=240)
        assert child.returncode == 0, errors
