"""The harness: it finds what is slowed down, keeps its limits, and knows its queues."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def bench_on_the_path():
    sys.path.insert(0, str(ROOT / "bench"))
    yield
    sys.path.remove(str(ROOT / "bench"))


def test_queue_is_what_theory_says():
    """M/D/1: the mean wait is rho S / 2 (1 - rho) (Pollaczek and Khinchine)."""
    from load import poisson, predicted, queue

    service, rho = 1e-3, 0.5
    latencies = queue(poisson(rho / service, 400, seed=0), service, 1)
    wait = latencies.mean() - service
    assert wait == pytest.approx(rho * service / (2 * (1 - rho)), rel=0.05)
    assert queue(np.array([0.0, 0.0, 0.0]), 2.0, 2).tolist() == [2.0, 2.0, 4.0]
    two = predicted(1000.0, service, 2)  # half of two servers
    assert service * 1e3 < two["p99_ms"] < predicted(500.0, service, 1)["p99_ms"]


def test_open_loop_counts_from_the_arrival():
    """A server that is late makes everybody who waits late, whatever it was busy with."""
    from load import open_loop

    def search(q):
        time.sleep(0.05)

    latencies = open_loop(search, np.zeros((1, 1)), 1, np.zeros(4))
    assert (np.diff(np.sort(latencies)) > 0.04).all()
    assert 0.18 < latencies.max() < 2


def test_slowed_takes_as_much_longer_as_it_says():
    from regression import CLOCK, slowed

    def call():
        end = CLOCK() + 0.02
        while CLOCK() < end:
            pass
        return "result"

    start = CLOCK()
    assert slowed(call, 3.0)() == "result"
    assert 0.059 < CLOCK() - start < 0.09


def test_gate_gives_the_alarm_only_when_every_measurement_is_above(monkeypatch):
    import contextlib

    import regression

    def run(*values):
        todo = iter(values)
        monkeypatch.setattr(regression, "measure", lambda *_: (next(todo), None))
        return regression.gate("topk", None, contextlib.nullcontext, threshold=1.1)[0]

    assert run(1.05) == [1.05]
    assert run(1.2, 1.0) == [1.2, 1.0]
    assert run(1.2, 1.2, 1.2) == [1.2, 1.2, 1.2]


@pytest.mark.parametrize("op", ["topk", "neighbour_attention", "transition_step", "sample_head"])
def test_first_case_is_right_and_has_its_peers(op):
    from cases import cases

    case = next(iter(cases(op, "ci")))
    for name, call in case.ours.items():
        assert case.judge(call())["ok"], name
    with pytest.raises(ValueError, match="peers must be of"):
        list(case.peers(["no such peer"]))


def test_stages_are_skipped_with_a_reason_and_stopped_at_their_limit(tmp_path):
    from gpu import Stage

    skipped = Stage("a", ["true"], 5, (lambda: "there is none",)).run(tmp_path)
    assert skipped == {"stage": "a", "result": "skipped", "reason": "there is none"}
    assert Stage("b", ["sh", "-c", "echo out > {out}/made"], 5).run(tmp_path)["result"] == "passed"
    assert (tmp_path / "made").read_text() == "out\n"
    assert Stage("c", ["false"], 5).run(tmp_path)["code"] == 1
    start = time.perf_counter()
    stopped = Stage("d", ["sh", "-c", "sleep 60 & wait"], 0.5).run(tmp_path)
    assert stopped["result"] == "stopped"
    assert time.perf_counter() - start < 20


def test_gpu_script_ends_on_a_machine_without_a_gpu(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: `make gpu`")
    words = [sys.executable, "bench/gpu.py", "--out", str(tmp_path), "--train"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    stages = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert len(stages) >= 10
    assert all(stage["result"] == "skipped" and stage["reason"] for stage in stages)
