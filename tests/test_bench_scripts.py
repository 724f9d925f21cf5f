"""The scripts of bench/: they find what is slowed down, keep their limits, know their queues."""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import gpu
import load
import measure
import numpy as np
import pytest
import regression
import run
import topk_cpu
import torch
from answers import Expected
from case import Case, Rival, pick
from cases import cases, topk
from cases.plain import posterior
from gpu import PYTHON, Stage
from graph import Graph, eager
from loops import Joiner, closed_loop, open_loop
from nsight import commands
from queueing import poisson, queue, service_under_load
from regression import CLOCK, slowed

import knnfast
from knnfast import reference
from knnfast.benchmark.topk import Peer, threads_for_all
from knnfast.diffusion.schedule import Schedule

ROOT = Path(__file__).resolve().parents[1]


def test_queue_is_what_theory_says():
    """M/D/1: the mean wait is rho S / 2 (1 - rho) (Pollaczek and Khinchine)."""
    service, rho = 1e-3, 0.5
    latencies = queue(poisson(rho / service, 400, seed=0), service, 1)
    wait = latencies.mean() - service
    assert wait == pytest.approx(rho * service / (2 * (1 - rho)), rel=0.05)
    assert queue(np.array([0.0, 0.0, 0.0]), 2.0, 2).tolist() == [2.0, 2.0, 4.0]
    two = np.percentile(queue(poisson(1000.0, 100, seed=0), service, 2), 99)  # half of two servers
    assert service < two < np.percentile(latencies, 99)


def test_open_loop_counts_from_the_arrival():
    """A server that is late makes everybody who waits late, whatever it was busy with."""

    def search(q):
        time.sleep(0.05)

    latencies, spans, answers = open_loop(search, np.zeros((1, 1)), 1, np.zeros(4))
    assert answers == [(0, None)] * 4
    assert (np.diff(np.sort(latencies)) > 0.04).all()
    assert 0.18 < latencies.max() < 2
    assert ((spans[:, 1] - spans[:, 0]) < latencies).all()


def test_service_under_load_is_that_of_searches_that_did_not_wait():
    spans = np.array([[5.0, 6.0], [0.0, 1.0], [0.5, 2.0], [2.0, 3.2], [2.1, 9.0]])
    assert service_under_load(spans, 1) == pytest.approx(1.1)  # the second and the fourth
    assert service_under_load(spans, 2) == pytest.approx(1.2)  # all


def sleeper(**options):
    return load.Server("it", lambda q: time.sleep(0.001), lambda answers: True, 1, **options)


def test_open_row_is_the_round_in_the_middle(monkeypatch):
    # before and after each of two stretches of three rounds
    stolen = iter([0.0, 0.2, 0.2, 0.5, 1.0, 1.0, 1.0, 1.1, 2.0, 2.4, 2.4, 2.9])
    monkeypatch.setattr(load, "stolen_seconds", lambda: next(stolen))
    args = argparse.Namespace(clients=2, seconds=0.1, least=10, rounds=3, loads=[0.5], stretches=2)
    rows = list(load.measure(sleeper(), np.zeros((1, 1)), args, [200]))
    assert [row["loop"] for row in rows] == ["closed", "closed", "open"]
    row = rows[-1]
    assert row["of_queue"] == pytest.approx(200 / rows[0]["qps"])
    assert row["of_saturation"] == pytest.approx(200 / rows[1]["qps"])
    over = [each["p99_over_queue"] for each in row["rounds"]]
    assert row["p99_over_queue"] == sorted(over)[1] > 0
    assert row["stolen_share"] == row["rounds"][over.index(sorted(over)[1])]["stolen_share"] > 0
    assert row["p99_ms"] / row["queue"]["p99_ms"] == row["p99_over_queue"]


def test_rounds_without_a_queue_come_last():
    rounds = [{"p99_ms": p99} for p99 in (7, 3, 5)]
    assert load.middle(rounds) == {"p99_ms": 5}
    judged = {"p99_ms": 9, "p99_over_queue": 1.5}
    assert load.middle([rounds[1], judged]) == rounds[1]
    assert load.middle([rounds[1], judged, judged]) == judged


def test_a_joiner_gives_everybody_their_own_answer():
    batches = []

    def search(q):
        batches.append(len(q))
        time.sleep(0.005)
        return [2 * x for x in q]

    joiner = Joiner(search)
    queries = np.arange(24.0)[:, None]
    _, _, answers = closed_loop(joiner.search, queries, 8, 0.2)
    assert len(answers) == sum(batches)
    assert sum(batches) > 3 * len(batches)  # of 8 clients
    assert all((found == 2 * queries[i]).all() for i, found in answers)


def test_loads_beyond_what_the_queue_can_serve_have_none(monkeypatch):
    args = argparse.Namespace(clients=16, seconds=0.1, least=10, rounds=1, loads=[0.2], stretches=2)
    rows = list(load.measure(sleeper(), np.zeros((1, 1)), args, []))
    alone, _, fifth, beyond = rows
    assert fifth["offered_qps"] == pytest.approx(alone["qps"] / 5)  # then of 16 callers at once
    assert fifth["of_queue"] == pytest.approx(0.2)
    assert fifth["p99_over_queue"] > 0
    assert beyond["of_saturation"] == pytest.approx(0.2)
    assert beyond["of_queue"] > 1
    assert beyond["p99_ms"] > 0
    assert "queue" not in beyond


def test_a_peer_is_offered_shares_of_its_own_saturation_too():
    args = argparse.Namespace(clients=1, seconds=0.1, peer_least=10, loads=[0.5], stretches=2)
    server = sleeper(peer=True)
    server.judge = lambda answers: len(answers) < 11  # as if an answer of the closed loop differed
    closed, low, half = load.measure(server, np.zeros((1, 1)), args, [100, 1e6])
    assert low["offered_qps"] == 100
    assert half["offered_qps"] == pytest.approx(closed["qps"] / 2)
    assert "queue" not in half
    assert not closed["exact"]
    assert low["exact"]


def test_answers_under_load_are_those_of_a_search_alone():
    rows = np.eye(8, dtype=np.float16)[:, :6] * np.arange(1, 9, dtype=np.float16)[:, None]
    queries = np.random.default_rng(0).random((4, 6), dtype=np.float32) + 0.1
    index = knnfast.Index(6)
    index.add(rows)
    allowed = np.arange(8) != 2
    bits = np.packbits(allowed, bitorder="little")
    for among, search in (
        (None, lambda q: index.search(q, 3)), (allowed, lambda q: index.search(q, 3, allow=bits)),
    ):  # fmt: skip
        right = Expected(search, rows, queries, 3, among)
        scores, ids = search(queries[1])
        assert right.same([(1, (scores, ids))])
        for wrong in ((scores, ids[::-1]), (np.nextafter(scores, 9), ids)):
            with pytest.raises(SystemExit, match="a wrong answer under load, query 1: rows"):
                right.same([(1, (scores, ids)), (1, wrong)])
        assert right.best([(1, ids[None, ::-1])])
        assert not right.best([(1, ids[None]), (1, np.array([[*ids[:2], 6]]))])
        assert not right.best([(1, np.array([[*ids[:2], -1]]))])
    with pytest.raises(SystemExit, match="a search alone is not exact"):
        Expected(lambda q: index.search(-q, 3), rows, queries, 3)


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (load, ["--clients", "0"], "--clients must be at least 1, got 0"),
        (load, ["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (load, ["--peer-least", "0"], "--peer-least must be at least 1, got 0"),
        (load, ["--seconds", "nan"], "--seconds must be above 0, got nan"),
        (load, ["--loads", "0.5", "1.5"], "--loads must be above 0 and at most 1, got 1.5"),
        (load, ["--n", "50", "--k", "51"], "--k must be at most the "),
        (load, ["--json", "/dev/null/x.json"], "--json must be a file in a folder that can be"),
        (regression, ["--runs", "0"], "--runs must be at least 1, got 0"),
        (regression, ["--threshold", "1"], "--threshold must be above 1, got 1"),
        (regression, ["--json", "/dev/null/x.json"], "--json must be a file in a folder that can"),
    ],
)
def test_scripts_name_a_wrong_option(script, words, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [script.__name__, *words])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_load_measures_every_server(monkeypatch, tmp_path, capsys):
    out = tmp_path / "new" / "folder" / "load.json"
    monkeypatch.setattr("sys.argv", [
        "load.py", "--n", "2000", "--d", "32", "--clients", "2", "--seconds", "0.05", "--rounds",
        "1", "--least", "20", "--peer-least", "20", "--stretches", "2", "--loads", "0.3",
        "--json", str(out),
    ])  # fmt: skip
    load.main()
    rows = json.loads(out.read_text())["rows"]
    for name in ("faiss-flat", "faiss-sq-fp16"):
        assert any(row["server"] == name and "offered_qps" in row for row in rows)
    measured = [row for row in rows if "p50_ms" in row]
    assert all(row["exact"] for row in measured if not row["server"].startswith("faiss"))


def test_slowed_takes_as_much_longer_as_it_says():
    def call():
        end = CLOCK() + 0.02
        while CLOCK() < end:
            pass
        return "result"

    slow = slowed(call, 3.0)
    start = CLOCK()
    assert slow() == "result"
    assert 0.059 < CLOCK() - start < 0.09


def test_gate_gives_the_alarm_when_most_measurements_are_above(monkeypatch):
    def run(*values):
        todo = iter(values)
        monkeypatch.setattr(regression, "measure", lambda *_: (next(todo), None))
        return regression.gate("topk", None, contextlib.nullcontext, threshold=1.1)[0]

    def outcome(*values):
        """How many measurements are taken, and whether there is an alarm."""
        ratios = run(*values)
        return len(ratios), regression.slower(ratios, 1.1)

    assert outcome(1.05) == (1, False)  # well below: settled
    assert outcome(1.06, 1.0, 1.0, 1.0) == (4, False)
    assert outcome(1.2, 1.2, 1.2, 1.2) == (4, True)
    assert outcome(1.2, 1.2, 1.2, 1.0, 1.0, 1.0, 1.2) == (7, True)
    assert outcome(1.2, 1.2, 1.2, 1.0, 1.0, 1.0, 1.1) == (7, False)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("op", ["topk", "neighbour_attention", "fold_neighbours",
                                "transition_step", "sample_head", "transition_loss", "sample",
                                "end_to_end"])  # fmt: skip
def test_first_case_is_right_and_has_its_peers(op):
    case = next(iter(cases(op, "ci")))
    for name, call in case.ours.items():
        assert case.judge(call())["ok"], name
    right = []
    case.facts()
    with pytest.raises(ValueError, match="peers must be of"):
        list(case.peers(["no such peer"]))
    compared = 0
    for name, rival in case.peers(None):
        if not isinstance(rival, str) and not name.startswith("torch-compile"):  # minutes
            if case.judge((rival.result or rival.call)())["ok"]:
                right.append(name)
            compared += 1
    assert compared
    assert op != "neighbour_attention" or right == ["torch-sdpa"]


def test_a_peer_that_fails_is_a_row_of_the_table():
    lost = []

    def fails():
        raise RuntimeError("no room")

    def loses():
        lost.append(True)
        fails()

    def ours():
        return 1 if not lost else fails()

    def judge(result):
        return {"ok": result == 1, "exact": result == 1}

    peers = {"fails": Rival(fails), "differs": Rival(lambda: 2), "agrees": Rival(lambda: 1),
             "loses": Rival(loses)}  # fmt: skip
    case = Case("op", "shape", "label", "fp32", {"ours": ours}, judge,
                lambda names: (pair for pair in peers.items()))  # fmt: skip
    args = argparse.Namespace(
        backend=None, seconds=0.001, turns=2, clock="wall", threads=1, peers=None
    )
    (row,) = run.measure(case, args, {}, None)
    assert row["peers"]["fails"] == {"skipped": "RuntimeError: no room"}
    assert row["peers"]["differs"]["answers"] == "differ"
    assert "answers" not in row["peers"]["agrees"]
    assert row["peers"]["agrees"]["ours_p50_ms"] > 0
    assert row["peers"]["loses"] == {"skipped": "RuntimeError: no room"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--json", "/dev/null/x.json"], "--json must be a file in a folder that can be made, got"),
        (["--json", "."], "--json must be a file, got the folder ."),
        (["--turns", "0"], "--turns must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--device", "tpu"], "--device: must be cpu, cuda or cuda:N, got 'tpu'"),
        (["--backend", "none"], "--backend must be of ['auto', 'fp16'], got ['none']"),
        (["--peers", "annoy"], "--peers must be of ('faiss-flat', "),
    ],
)
def test_run_names_a_wrong_option(words, message, monkeypatch, capsys):
    limits = {"read_gb_s": 1.0, "copy_gb_s": 1.0, "matmul_tflop_s": 1.0}
    monkeypatch.setattr(run, "ceilings", lambda device: limits)
    monkeypatch.setattr("sys.argv", ["run.py", "--op", "topk", "--shape", "ci", *words])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_run_measures_what_its_options_name(monkeypatch, tmp_path):
    """One backend and one peer, one thread, by CPU time; then beside an earlier commit."""
    limits = {"read_gb_s": 1.0, "copy_gb_s": 1.0, "matmul_tflop_s": 1.0}
    monkeypatch.setattr(run, "ceilings", lambda device: limits)

    def rows(*words):
        out = tmp_path / "run.json"
        monkeypatch.setattr("sys.argv", [
            "run.py", "--op", "topk", "--shape", "ci", "--backend", "fp16", "--threads", "1",
            "--seconds", "0.001", "--turns", "2", "--json", str(out), *words,
        ])  # fmt: skip
        with threads_for_all(None):
            assert run.main() == 0
        report = json.loads(out.read_text())
        assert report["machine"]["threads"] == 1
        assert [row["backend"] for row in report["rows"]] == ["fp16", "fp16"]
        assert all(row["exact"] for row in report["rows"])
        return report["rows"]

    for row in rows("--peers", "torch-fp32", "--clock", "cpu"):
        assert list(row["peers"]) == ["torch-fp32"]
        assert row["peers"]["torch-fp32"]["threads"] == 1
        assert row["case"].endswith(", CPU time of one thread")
        assert "ceiling_share" not in row
    monkeypatch.setattr(run, "build", lambda ref: ROOT)
    for row in rows("--peers", "none", "--base", "HEAD"):
        assert list(row["peers"]) == [f"base {ROOT.name}"]
        assert row["peers"][f"base {ROOT.name}"]["ratio"] > 0


def test_a_shape_without_room_is_refused(monkeypatch):
    monkeypatch.setattr(topk, "memory_bytes", lambda: 11 << 30)
    topk.check_memory("it", 1 << 30, "cpu")
    with pytest.raises(ValueError, match="it needs 22 GiB of memory"):
        topk.check_memory("it", 2 << 30, "cpu")


def test_peers_on_a_gpu_are_built_once_a_shape(monkeypatch):
    """On torch's `cpu:0`, which is not called `cpu` and so passes for a GPU."""
    built = []

    def right(rows, metric):
        built.append("right")
        x = torch.from_numpy(rows).double()

        def call(q, k):
            return (q.double() @ x.T).topk(k)[1]

        return Peer(lambda q, k: call(q, k).numpy(), call)

    def broken(rows, metric):
        built.append("broken")
        raise RuntimeError("no room")

    peers = {"right": right, "broken": broken}
    monkeypatch.setattr(topk, "GPU_PEERS", peers)
    monkeypatch.setattr("knnfast.benchmark.topk.GPU_PEERS", peers)
    monkeypatch.setattr(topk, "Index", lambda d, device, scan: knnfast.Index(d, scan=scan))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 40))
    for case in cases("topk", "ci", "cpu:0"):
        found = dict(case.peers(None))
        assert found["broken"] == "RuntimeError: no room"
        assert case.judge(found["right"].result())["ok"]
        assert case.judge(case.ours["fp16"]())["ok"]
        assert list(dict(case.peers(["right"]))) == ["right"]
    assert built == ["right", "broken"]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 20, 1 << 40))
    with pytest.raises(ValueError, match=r"ci needs 0\.107 GiB of GPU memory"):
        next(cases("topk", "ci", "cpu:0"))


def test_parts_of_topk_cpu_add_up_in_one_file(monkeypatch, tmp_path, capsys):
    for part, met in (("small", True), ("memory", False)):
        target = {"target": f"{part} is fast", "value": 1, "limit": "<= 2", "met": met}
        monkeypatch.setitem(topk_cpu.PARTS, part, lambda t=target: {"times": {}, "targets": [t]})
        words = ["topk_cpu.py", "--part", part, "--json", str(tmp_path / "topk.json")]
        monkeypatch.setattr("sys.argv", words)
        topk_cpu.main()
    saved = json.loads((tmp_path / "topk.json").read_text())
    assert list(saved) == ["small", "memory"]
    assert saved["memory"]["command"] == "python bench/topk_cpu.py --part memory"
    assert "1 targets are missed\n  memory is fast" in capsys.readouterr().out


def test_topk_cpu_times_right_answers_alone(monkeypatch):
    def against(calls):
        contenders = {name: topk_cpu.Local(call) for name, call in calls.items()}
        timings = topk_cpu.interleave(contenders, seconds=0, turns=1)
        return timings, lambda a, b: topk_cpu.ratio(timings[a], timings[b])

    monkeypatch.setattr(topk_cpu, "against", against)
    monkeypatch.setattr(topk_cpu, "N", 3_000)
    monkeypatch.setattr(topk_cpu, "D", 32)
    assert len(topk_cpu.shapes_of_data()["targets"]) == 9

    class Reversed:
        def __init__(self, index):
            self.index = index

        def search(self, q, k):
            scores, ids = self.index.search(q, k)
            return scores, ids[:, ::-1]

    filled = topk_cpu.filled
    monkeypatch.setattr(topk_cpu, "filled", lambda *rows, **how: Reversed(filled(*rows, **how)))
    with pytest.raises(AssertionError, match="ties"):
        topk_cpu.shapes_of_data()


def test_what_fails_of_ours_is_told_and_the_rest_is_measured(monkeypatch, tmp_path):
    def fails():
        raise RuntimeError("no kernel image")

    def judge(result):
        return {"ok": result == 1, "error": 0.0 if result == 1 else float("inf")}

    def cases(op, shape, device):
        ours = {"raises": fails, "wrong": lambda: 2, "right": lambda: 1}
        rivals = {"broken": fails, "peer": lambda: Rival(lambda: 1)}
        yield Case(op, shape, "first", "fp16", ours, judge, lambda names: pick(rivals, names))
        fails()

    out = tmp_path / "run.json"
    monkeypatch.setattr(run, "cases", cases)
    monkeypatch.setattr(run, "ceilings", lambda device: {})
    monkeypatch.setattr("sys.argv", ["run.py", "--op", "topk", "--shape", "ci", "--shape",
                                     "service-1m", "--turns", "2", "--json", str(out)])  # fmt: skip
    assert run.main() == 1
    report = json.loads(out.read_text())
    assert [(r["shape"], r["backend"]) for r in report["rows"]] == [
        ("ci", "right"), ("service-1m", "right"),
    ]  # fmt: skip
    assert report["rows"][0]["peers"]["broken"] == {"skipped": "RuntimeError: no kernel image"}
    assert report["rows"][0]["peers"]["peer"]["p50_ms"] > 0
    raised = {"raised": "RuntimeError: no kernel image"}
    assert [r["failed"] for r in report["failed"]] == [raised, {"error": "inf"}, raised] * 2
    assert report["failed"][2] == {"op": "topk", "shape": "ci", "failed": raised}


def test_a_peer_that_cannot_be_captured_is_timed_as_it_is(monkeypatch):
    def fails(call):
        raise RuntimeError("called a synchronizing CUDA operation\nmore")

    case = Case("op", "shape", "label", "fp16", {}, lambda result: {}, cuda=True, graphs=True)
    rival = Rival(lambda: 1)
    monkeypatch.setattr(run, "Graph", fails)
    call, note = run.recorded(case, rival)
    assert call is rival.call
    why = "RuntimeError: called a synchronizing CUDA operation"
    assert note == {"timed": f"eager: no graph ({why})"}
    monkeypatch.setattr(run, "Graph", lambda call: SimpleNamespace(record=lambda: "graph"))
    assert run.recorded(case, rival) == ("graph", {"timed": "graph"})
    rival.capturable = False
    call, note = run.recorded(case, rival)
    assert (call, list(note)) == (rival.call, ["timed"])
    case.graphs = False
    assert run.recorded(case, rival) == (rival.call, {})


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_a_graph_gives_what_the_call_gives():
    x = torch.arange(8.0, device="cuda")

    def call():
        return x * 2

    graph = Graph(call).record()
    x += 1
    assert torch.equal(graph(), call())
    assert eager(graph) is eager(call) is call
    with pytest.raises(RuntimeError, match="synchroniz"):
        Graph(lambda: float(x.sum()))()
    assert torch.randn(4, device="cuda").isfinite().all()  # as before


def test_stages_are_skipped_with_a_reason_and_stopped_at_their_limit(tmp_path):
    skipped = Stage("a", ["true"], 5, (lambda: "there is none",)).run(tmp_path)
    assert skipped == {"stage": "a", "result": "skipped", "reason": "there is none"}
    assert Stage("b", ["sh", "-c", "echo out > {out}/made"], 5).run(tmp_path)["result"] == "passed"
    assert (tmp_path / "made").read_text() == "out\n"
    assert Stage("c", ["false"], 5).run(tmp_path)["code"] == 1
    late = Stage("c", ["sh", "-c", "echo it is not supported; exit 77"], 5).run(tmp_path)
    assert (late["result"], late["reason"]) == ("skipped", "it is not supported")
    start = time.perf_counter()
    stopped = Stage("d", ["sh", "-c", "sleep 60 & wait"], 0.5).run(tmp_path)
    assert stopped["result"] == "stopped"
    assert time.perf_counter() - start < 20


def test_a_stage_gets_no_more_than_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 1)
    monkeypatch.setattr(gpu, "LEAST", 0.5)
    stopped = gpu.Stage("a", ["sleep", "60"], 60).run(tmp_path, left=1.6)
    assert stopped["result"] == "stopped"
    assert 0.5 < stopped["seconds"] < 10
    skipped = gpu.Stage("b", ["true"], 60).run(tmp_path, left=1.4)
    assert skipped == {"stage": "b", "result": "skipped", "reason": "1 s of the budget are left"}
    assert gpu.Stage("c", ["true"], 0.3).run(tmp_path, left=1.4)["result"] == "passed"


@pytest.mark.slow
def test_a_stopped_pytest_reports_its_failures(tmp_path):
    """On several workers, one of which hangs."""
    (tmp_path / "test_it.py").write_text(
        "import time\ndef test_a(): assert 0, 'planted'\ndef test_b(): time.sleep(60)\n"
    )
    words = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "{out}/test_it.py"]
    assert Stage("a", words, 25).run(tmp_path)["result"] == "stopped"
    log = (tmp_path / "a.log").read_text()
    assert "AssertionError: planted" in log, log


def test_a_stage_finds_the_callers_path_and_the_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "of the caller"))
    Stage("a", [PYTHON, "-c", "import os; print(os.environ['PYTHONPATH'])"], 30).run(tmp_path)
    assert (tmp_path / "a.log").read_text() == f"{ROOT}:{tmp_path / 'of the caller'}\n"


@pytest.mark.parametrize(("capability", "archs"), [((9, 0), "90a-real"), ((8, 6), "86-real")])
def test_the_build_is_for_the_gpu_that_is_there(capability, archs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.delenv("CUDAARCHS", raising=False)
    build, *others = gpu.stages(train=False, scale=1)
    assert build.environment() == {"KNNFAST_CUDA": "ON", "CUDAARCHS": archs}
    assert [stage.name for stage in others][:5] == [
        "tests-compile", "bench-kernels", "tests-index", "tests", "bench-topk",
    ]  # fmt: skip
    monkeypatch.setenv("CUDAARCHS", "80-real")
    assert "CUDAARCHS" not in gpu.stages(train=False, scale=1)[0].environment()


def test_shapes_of_a_gpus_size_come_first():
    for op, first in (("topk", "gpu-1m-512"), ("transition_step", "gpu-1"),
                      ("transition_loss", "gpu-16"), ("sample", "stickers-1")):  # fmt: skip
        names = gpu.shapes(op)
        assert names[0] == first
        assert set(names) == set(gpu.SHAPES[op]) - {"ci"}
    words = next(s for s in gpu.stages(False, 1) if s.name == "bench-topk").command
    assert words[words.index("--shape") + 1] == "gpu-1m-512"


def test_kernels_are_told_apart_in_a_profile():
    from types import SimpleNamespace

    from kernels import by_kernel

    events = [
        SimpleNamespace(key=key, self_device_time_total=us)
        for key, us in (
            ("void knnfast::cuda::(anonymous namespace)::topk_open_kernel<knnfast::cuda::CodeScan>"
             "(knnfast::cuda::(anonymous namespace)::OpenArgs)", 3000.0),
            ("void knnfast::cuda::(anonymous namespace)::sm90_topk_kernel<knnfast::cuda::HalfScan, "
             "(knnfast::cuda::Metric)0, true>(knnfast::cuda::ScanArgs, int, int)", 8000.0),
            ("void at::native::elementwise_kernel<128, 4>(int)", 9.0),
            ("Memset (Device)", 9.0),
        )
    ]  # fmt: skip
    assert by_kernel(events, 2) == {"open": 1.5, "scan": 4.0}


def test_sigterm_ends_the_running_stage_and_leaves_a_summary(tmp_path):
    out, pid = tmp_path / "gpu", tmp_path / "pid"
    script = f"""
import sys, gpu
gpu.stages = lambda train, scale: [
    gpu.Stage("quick", ["true"], 60),
    gpu.Stage("slow", ["sh", "-c", "timeout 600 sh -c 'echo $$ > {pid}; sleep 600' & wait"], 60),
    gpu.Stage("never", ["true"], 60),
]
sys.argv = ["gpu.py", "--out", {str(out)!r}]
sys.exit(gpu.main())
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT / "bench")
    end = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 1
    with tarfile.open(tmp_path / "gpu.tar.gz") as archive:
        summary = json.load(archive.extractfile("gpu/summary.json"))
    quick, slow = summary["stages"]
    assert quick["result"] == "passed"
    assert slow == {"stage": "slow", "result": "stopped", "reason": "interrupted"}
    status = Path(f"/proc/{pid.read_text().strip()}/stat")
    while status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z":
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_summary_is_there_before_anything_is_asked(tmp_path):
    script = f"""
import os, signal, sys, gpu
gpu.device = lambda: os.kill(os.getpid(), signal.SIGKILL)
sys.argv = ["gpu.py", "--out", {str(tmp_path / "gpu")!r}]
gpu.main()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT / "bench", check=False)
    assert done.returncode == -signal.SIGKILL
    with tarfile.open(tmp_path / "gpu.tar.gz") as archive:
        summary = json.load(archive.extractfile("gpu/summary.json"))
    assert summary == {"device": {}, "stages": []}


def test_ncu_sees_every_search_kernel():
    words = commands(Path("out"), "cuda")["ncu, top-k kernels"]
    pattern = words[words.index("--kernel-name") + 1].removeprefix("regex:")
    found = {
        name
        for path in (ROOT / "csrc/cuda").glob("*.cu")
        for name in re.findall(r"__global__[^{;]*?(\w+_kernel)\(", path.read_text())
    }
    assert {"sm90_topk_kernel", "topk_tiled_kernel", "topk_merge_kernel"} <= found
    assert all(re.search(pattern, name) for name in found)


def test_sanitizer_goes_on_after_a_tool_that_fails(tmp_path):
    """With a stand-in for compute-sanitizer."""
    stand_in = tmp_path / "compute-sanitizer"
    stand_in.write_text(
        "#!/bin/sh\necho $2 >> $0.tools\n"
        "case $2 in initcheck) sleep 60;; racecheck|synccheck) exit 1;; esac\n"
    )
    stand_in.chmod(0o755)
    done = subprocess.run(
        ["sh", "tests/cuda_sanitize.sh"], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SANITIZE_SECONDS": "2"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "initcheck: not done after 2 s\n" in done.stdout
    assert done.stdout.endswith("failed: synccheck initcheck racecheck\n")
    tools = (tmp_path / "compute-sanitizer.tools").read_text().split()
    assert tools == ["memcheck", "memcheck", "synccheck", "initcheck", "racecheck"]  # a probe
    stand_in.write_text(
        "#!/bin/sh\necho ==== COMPUTE-SANITIZER\necho ==== Error: Device not supported\n"
        "echo ==== ERROR SUMMARY: 1 error\nexit 1\n"
    )
    done = subprocess.run(
        ["sh", "tests/cuda_sanitize.sh"], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (77, "==== Error: Device not supported\n")


def test_measure_puts_a_result_in_the_place_of_the_older(monkeypatch, tmp_path, capfd):
    result = {"kind": "load", "machine": {"isa": "avx2", "date": "2026-01-02"}}
    (tmp_path / "write.py").write_text(
        f"import json, sys; open(sys.argv[1], 'w').write(json.dumps({result!r}))"
    )
    (tmp_path / "print.py").write_text(f"import json; print(json.dumps({{'part': {result!r}}}))")
    (tmp_path / "fail.py").write_text("import sys; open(sys.argv[1], 'w').close(); sys.exit(3)")
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "report.py").write_text("open('page', 'w').close()")
    (tmp_path / "results").mkdir()
    (tmp_path / "docs").mkdir()
    for name in ("load-avx2-2026-01-01", "load-avx512-2026-01-01", "bad-avx2-2026-01-01"):
        (tmp_path / "results" / f"{name}.json").write_text("{}")
        (tmp_path / "docs" / f"{name}.png").write_text("")
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(measure, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(measure, "MEASUREMENTS", {
        "load": "write.py {json}", "bad": "fail.py {json}", "topk-cpu": "print.py",
    })  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["measure.py"])
    assert measure.main() == 1
    assert "failed: bad" in capfd.readouterr().out
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "bad-avx2-2026-01-01.json", "load-avx2-2026-01-02.json", "load-avx512-2026-01-01.json",
        "topk-cpu-avx2-2026-01-02.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "results" / "load-avx2-2026-01-02.json").read_text()) == result
    assert not (tmp_path / "docs" / "load-avx2-2026-01-01.png").exists()
    assert (tmp_path / "page").exists()
    monkeypatch.setattr(sys, "argv", ["measure.py", "--only", "load,nothing"])
    with pytest.raises(SystemExit):
        measure.main()
    assert "--only must be of load, bad, topk-cpu, got nothing" in capfd.readouterr().err


def test_gpu_script_leaves_other_folders_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    words = [sys.executable, "bench/gpu.py", "--out", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--out must be a new folder or an earlier run's" in done.stderr
    words[-1] = str(tmp_path / "letter.txt" / "gpu")
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--out must be a folder that can be made" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_gpu_script_ends_on_a_machine_without_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: `make gpu`")
    words = [sys.executable, "bench/gpu.py", "--out", str(tmp_path / "gpu"), "--train"]

    def run(*more):
        done = subprocess.run(
            [*words, *more], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        stages = json.loads((tmp_path / "gpu" / "summary.json").read_text())["stages"]
        assert all(stage["result"] == "skipped" and stage["reason"] for stage in stages)
        return [stage["stage"] for stage in stages]

    assert len(run("--budget", "100")) >= 10
    with tarfile.open(tmp_path / "gpu.tar.gz") as archive:
        assert archive.getnames() == ["gpu", "gpu/summary.json"]
    assert run("--only", "tests,bench-topk") == ["tests", "bench-topk"]


@pytest.mark.parametrize("name", ["mask", "mask_replace", "vq_diffusion"])
def test_the_plain_posterior_is_the_references(name):
    K, schedule = 7, Schedule(name, 20, 7)
    draw = torch.Generator().manual_seed(0)
    logp = torch.randn(3, 40, K, generator=draw).log_softmax(-1)
    x = torch.randint(K + 1, (3, 40), generator=draw)
    weights = reference.transition_weights(schedule, 12, 9, K)
    exact = reference.transition_distribution(logp.double(), x, weights)
    made = posterior(logp, x, weights)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.double(), exact, rtol=1e-5, atol=1e-6)


def test_steps_that_a_second_cache_feeds_have_no_share_of_memory(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=60 << 20)
    )
    case = Case("op", "shape", "", "fp16", {}, lambda _: {}, bytes=60 << 20, per=9, cuda=True)
    assert run.warm(case)
    for changed in ({"bytes": 61 << 20}, {"per": 1}, {"cuda": False}):
        assert not run.warm(dataclasses.replace(case, **changed))
