"""Measuring: judges that see errors, tables that say what was measured, and the command."""

import functools
import json
import re
import shutil
import subprocess
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import knnfast
from knnfast import _C
from knnfast.benchmark.faiss_reference import faiss_reference
from knnfast.benchmark.machine import (
    KERNEL_SETTINGS,
    ceilings,
    commit,
    floors_ms,
    machine,
    share,
)
from knnfast.benchmark.timing import Choice, Local, best_choice, interleave, peak_mib, ratio
from knnfast.benchmark.topk import (
    CPU_PEERS,
    KINDS,
    Peer,
    Truth,
    build_peers,
    make_rows,
    threads_for_all,
)
from knnfast.cli import main


@pytest.fixture
def quickly(monkeypatch):
    """Short turns, and ceilings that are given: these tests are not about time."""
    limits = {"read_gb_s": 10.0, "copy_gb_s": 8.0, "matmul_tflop_s": 0.1}
    short = functools.partial(interleave, seconds=0.001, turns=2, least=2)
    monkeypatch.setattr("knnfast.benchmark.faiss_reference.ceilings", lambda device: limits)
    monkeypatch.setattr("knnfast.benchmark.faiss_reference.interleave", short)
    monkeypatch.setattr("knnfast.benchmark.timing.SETTLE", 0.0)


def test_ceilings():
    limits = ceilings(scale=16)
    assert set(limits) == {
        "read_gb_s", "copy_gb_s", "matmul_tflop_s", "torch_matmul_tflop_s"
    }  # fmt: skip
    assert limits["torch_matmul_tflop_s"] <= limits["matmul_tflop_s"]
    assert all(value > 0 for value in limits.values())


def test_truth_sees_every_kind_of_wrong_answer(device):
    rows, queries = make_rows(500, 16, queries=4)
    truth = Truth(rows, queries, 5, device=device)
    right = np.argsort(-(queries.astype(np.float64) @ rows.astype(np.float64).T), 1)[:, :5]
    assert truth.judge(right) == {"exact": True, "recall": 1.0, "regret": 0.0}
    assert truth.judge(right[:, ::-1])["exact"]  # a set of the best; order is the tests' affair
    worse = right.copy()
    worse[0, 4] = np.argsort(-(queries[0].astype(float) @ rows.astype(float).T))[5]
    assert truth.judge(worse)["recall"] == pytest.approx(19 / 20)
    assert truth.judge(worse)["regret"] > 0
    twice = right.copy()
    twice[1, 4] = twice[1, 0]
    missing = right.copy()
    missing[2, 0] = -1
    assert not any(truth.judge(ids)["exact"] for ids in (worse, twice, missing))


@pytest.mark.parametrize("m", [7, 8, 9, 64, 1024])
def test_truth_judges_the_first_the_last_and_some_between(m):
    rows, queries = make_rows(200, 8, queries=m)
    truth = Truth(rows, queries, 3)
    right = np.argsort(-(queries.astype(float) @ rows.astype(float).T), 1)[:, :3]
    assert truth.judge(right)["exact"]
    for place in {0, min(7, m - 1), m - 1}:
        wrong = right.copy()
        wrong[place] = right[place, 0]
        assert not truth.judge(wrong)["exact"]
        assert truth.judge(wrong[:place] if place else right)["exact"]  # a batch without it
    if m == 1024:
        assert truth.checked.tolist() == [*range(8), 15, 31, 63, 127, 255, 511, 1023]


@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
@pytest.mark.parametrize("kind", KINDS)
def test_ours_is_exact_by_the_benchmarks_own_judge(kind, metric):
    rows, queries = make_rows(3_000, 24, kind, queries=4)
    index = knnfast.Index(24, metric=metric)
    index.add(rows)
    assert Truth(rows, queries, 7, metric).judge(index.search(queries, 7)[1])["exact"]


@pytest.mark.parametrize("kind", ["isotropic", "clustered", "mean"])
def test_no_query_is_a_row(kind):
    rows, queries = make_rows(3_000, 64, kind, queries=8)
    assert (make_rows(3_000, 64, kind, queries=8)[0] == rows).all()
    x = rows.astype(np.float64)
    x -= x.mean(0)
    cosines = queries @ x.T / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(x, axis=1)
    assert np.abs(cosines).max() < (0.97 if kind == "clustered" else 0.7)


def test_peers_agree():
    rows, queries = make_rows(2_000, 32, queries=4)
    truth = Truth(rows, queries, 5)
    names = []
    for name, peer in build_peers(None, rows, "ip"):
        assert not isinstance(peer, str), (name, peer)
        assert truth.judge(peer.search(queries, 5))["recall"] > 0.9
        names.append(name)
    assert names == ["faiss-flat", "faiss-sq-fp16", "usearch-exact", "torch-fp32"]
    with pytest.raises(ValueError, match="peers must be of"):
        next(build_peers(["annoy"], rows, "ip"))


def test_a_peer_that_fails_is_named_and_the_others_are_measured(monkeypatch):
    """When it is built, or when it searches."""

    def broken(rows, metric):
        raise RuntimeError("no kernel image")

    def searches(rows, metric):
        return Peer(lambda q, k: 1 / 0, lambda q, k: 1 / 0)

    monkeypatch.setitem(CPU_PEERS, "broken", broken)
    monkeypatch.setitem(CPU_PEERS, "searches", searches)
    found = knnfast.faiss_reference(
        500, 16, (2,), 3, peers=["broken", "searches", "faiss-flat"], seconds=60
    )
    assert found.skipped["broken"] == "RuntimeError: no kernel image"
    assert (
        found.skipped["searches"] == "from 5 rows, batch 2 on: ZeroDivisionError: division by zero"
    )
    assert {row["name"] for row in found.rows} == {"knnfast", "faiss-flat"}


def test_a_peer_runs_as_it_is_fastest():
    state = {}
    slow, fast = (
        Choice(lambda ms=ms: state.update(ms=ms), n, "path") for n, ms in ((1, 20), (2, 2))
    )
    for order in ((slow, fast), (fast, slow)):
        best = best_choice(order, lambda: time.sleep(state["ms"] / 1e3))
        assert best == {"threads": 2, "options": "path"}
        assert state == {"ms": 2}
    assert best_choice([], time.time) == {}


def test_faiss_may_use_blas_whatever_its_own_limit():
    import faiss

    rows, queries = make_rows(500, 16, queries=40)
    (_, peer), *_ = build_peers(["faiss-flat"], rows, "ip")
    before = faiss.cvar.distance_compute_blas_threshold
    with threads_for_all(None):
        ways = [(c.threads, c.options) for c in peer.choices(2, 1)]
        assert sorted(ways) == [
            (1, ""), (1, "BLAS"), (2, ""), (2, "2 shards"), (2, "2 shards BLAS"), (2, "BLAS"),
        ]  # fmt: skip
        for choice in peer.choices(2, 40):
            choice.set()
            assert faiss.cvar.distance_compute_blas_threshold == 0
            assert Truth(rows, queries, 5).judge(peer.search(queries, 5))["recall"] > 0.9
    assert faiss.cvar.distance_compute_blas_threshold == before


@pytest.mark.parametrize("name", CPU_PEERS)
def test_every_way_to_run_a_peer_finds_the_rows(name):
    rows, queries = make_rows(70_001, 24, queries=40)
    truth = Truth(rows, queries, 7)
    (_, peer), *_ = build_peers([name], rows, "ip")
    assert isinstance(peer, Peer), peer
    with threads_for_all(None):
        for batch in (1, 40):
            ways = [(c.threads, c.options) for c in peer.choices(2, batch)]
            assert len(set(ways)) == len(ways) >= 2
            for choice in peer.choices(2, batch):
                choice.set()
                assert truth.judge(peer.search(queries[:batch], 7))["regret"] < 1e-3, choice


def test_interleave_tells_twice_as_slow():
    """The slower one waits twice as long: sleeps are not disturbed by load as work is."""
    timings = interleave(
        {"one": Local(lambda: time.sleep(0.01)), "two": Local(lambda: time.sleep(0.02))},
        seconds=0.03,
        turns=3,
    )
    assert 1.4 < ratio(timings["two"], timings["one"]) < 2.8
    row = timings["one"].row()
    assert row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
    assert row["runs"] == len(timings["one"].calls) >= 3
    assert len(timings["one"].turns) == 3


def test_peak_memory_counts_what_a_call_adds():
    def call():
        return float(np.ones(32 << 17).sum())  # 32 MiB

    assert 30 < peak_mib(call) < 40


def test_share_and_floor():
    limits = {"read_gb_s": 10.0, "copy_gb_s": 8.0, "matmul_tflop_s": 1.0}
    reading = share(1e9, 1e9, 200.0, limits)
    assert reading["bound"] == "read"
    assert reading["gb_s"] == pytest.approx(5.0)
    assert reading["ceiling_share"] == pytest.approx(0.5)
    working = share(1e6, 1e11, 200.0, limits)
    assert working["bound"] == "matmul"
    assert working["tflop_s"] == pytest.approx(0.5)
    assert floors_ms(1e9, 1e9, limits) == pytest.approx((100.0, 1.0))
    assert floors_ms(1e9, 1e12, limits) == pytest.approx((100.0, 1_000.0))


def test_the_machine_is_described_without_its_name():
    import platform

    about = machine()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", about["date"])
    assert about["versions"]["knnfast"] == knnfast.__version__
    assert platform.node() not in json.dumps(about)


def test_what_holds_a_library_back_is_told(monkeypatch, quickly):
    for name in KERNEL_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    assert machine()["settings"] == {}
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")
    assert machine()["settings"] == {"OPENBLAS_CORETYPE": "Prescott"}
    table = faiss_reference(300, 8, (1,), 2, peers=["faiss-flat"]).table()
    assert "OPENBLAS_CORETYPE=Prescott is set" in table


def test_bench_command_writes_table_and_plot(tmp_path, quickly):
    plot = tmp_path / "bench.png"
    shape = ["--n", "2000", "--d", "32", "--batch", "1,4", "--k", "5"]
    arguments = ["bench", *shape, "--seconds", "60", "--plot"]
    result = CliRunner().invoke(main, [*arguments, str(plot)])
    assert result.exit_code == 0, result.output
    for name in ("faiss-flat", "faiss-sq-fp16", "usearch-exact", "torch-fp32"):
        assert re.search(rf"^{name} +2,000 +4 .*(exact|recall)", result.stdout, re.M), result.output
    ours = re.findall(r"^knnfast +(20|200|2,000) +(1|4) .* exact ", result.stdout, re.M)
    assert ours == [("20", "1"), ("200", "1"), ("2,000", "1"), ("2,000", "4")], result.output
    assert "measured ceilings: read" in result.stdout
    with Image.open(plot) as image:
        assert image.format == "PNG"
        assert image.width > 1000


def test_bench_command_measures_what_its_options_name(quickly):
    words = ["--n", "300", "--d", "8", "--batch", "2", "--k", "3", "--metric", "l2", "--peers",
             "faiss-sq-fp16,faiss-flat", "--threads", "1", "--plot", "none", "--json"]  # fmt: skip
    before = _C.num_threads()
    result = CliRunner().invoke(main, ["bench", *words])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["shape"] == {"n": 300, "d": 8, "batch": [2], "k": 3, "metric": "l2"}
    assert {row["name"] for row in report["rows"]} == {"knnfast", "faiss-sq-fp16", "faiss-flat"}
    assert {row["threads"] for row in report["rows"]} == {1}
    assert all(row["exact"] for row in report["rows"] if row["name"] == "knnfast")
    assert _C.num_threads() == before


def test_a_copy_without_history_is_told_its_commit(monkeypatch, tmp_path):
    monkeypatch.setattr("knnfast.benchmark.machine.__file__", str(tmp_path / "a" / "b" / "c.py"))
    monkeypatch.delenv("KNNFAST_COMMIT", raising=False)
    assert commit() is None
    monkeypatch.setenv("KNNFAST_COMMIT", "1234abc")
    assert commit() == "1234abc"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_results_leave_a_commit_clean(tmp_path, monkeypatch):
    """What a measurement writes is no change of the code that is measured."""
    from knnfast.benchmark import machine as module

    for name in ("CMakeLists.txt", "README.md", "bench/results/a.json", "bench/run.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    who = ("-c", "user.name=a", "-c", "user.email=b")
    for words in (("init", "-q"), ("add", "."), (*who, "commit", "-qm", "one")):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    monkeypatch.setattr(module, "__file__", str(tmp_path / "knnfast" / "benchmark" / "machine.py"))
    monkeypatch.delenv("KNNFAST_COMMIT", raising=False)
    clean = commit()
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    for name in ("README.md", "bench/results/a.json", "bench/results/b.json"):
        (tmp_path / name).write_text("after")
    assert commit() == clean
    (tmp_path / "bench/run.py").write_text("after")
    assert commit() == clean + "-dirty"


def test_faiss_reference_takes_own_rows_and_skips_what_does_not_fit(quickly):
    rows, queries = make_rows(1_000, 16, queries=2)
    report = faiss_reference(batch=(2,), k=3, rows=rows, queries=queries, metric="l2", seconds=1e-9)
    assert [row["name"] for row in report.rows] == ["knnfast"] * 3
    assert all(row["exact"] for row in report.rows)
    assert "faiss-flat" in report.skipped
    assert "not measured: faiss-flat" in report.table()


def test_threads_are_as_they_were_afterwards(quickly):
    before = _C.num_threads(), torch.get_num_threads()
    report = faiss_reference(n=200, d=8, batch=(1,), k=3, threads=1)
    assert report.rows[0]["threads"] == 1
    assert (_C.num_threads(), torch.get_num_threads()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, r"k must lie in \[1, n = 50\], got 0"),
        ({"k": 51}, r"k must lie in \[1, n = 50\], got 51"),
        ({"batch": ()}, r"batch must hold numbers of at least 1, got \[\]"),
        ({"metric": "cosine"}, "metric must be ip or l2, got 'cosine'"),
        ({"peers": ["annoy"]}, "peers must be of"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        *(
            ({"seconds": s}, f"seconds must be a finite number above 0, got {s}")
            for s in (0, -1.0, float("nan"), float("inf"))
        ),
        ({"rows": np.zeros((3, 4)), "queries": np.zeros((1, 5))}, "queries must have shape"),
    ],
)
def test_faiss_reference_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        faiss_reference(**{"n": 50, "d": 4, "batch": (1,), "k": 3, **arguments})


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seconds", "nan", "seconds must be a finite number above 0, got nan"),
        ("--seconds", "0", "seconds must be a finite number above 0, got 0.0"),
        ("--batch", "x", "--batch must be numbers separated by commas, got 'x'"),
        ("--metric", "foo", "metric must be ip or l2, got 'foo'"),
        ("--peers", "foo", "peers must be of "),
        ("--plot", "x.foo", "--plot: must end in one of "),
        ("--plot", "x", "--plot: must end in one of "),
        ("--device", "cuda:99", "--device: must be cpu"),
        ("--device", "tpu", "--device: must be cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_bench_command_checks_before_it_measures(option, value, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("knnfast.benchmark.faiss_reference._measure", None)  # is not reached
    result = CliRunner().invoke(main, ["bench", "--n", "50", option, value])
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("missing", ["faiss", "matplotlib.figure"])
def test_a_missing_library_is_named_with_its_extra(missing, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    result = CliRunner().invoke(main, ["bench", "--n", "50", "--plot", str(tmp_path / "b.png")])
    assert result.exit_code == 2
    assert "pip install '.[" in result.stderr
    assert ("--plot none" in result.stderr) == (missing == "matplotlib.figure")
    assert result.stderr.count("\n") == 1


def test_bench_command_checks_its_arguments_before_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    for option, value in (("--n", "-5"), ("--batch", "x"), ("--metric", "foo"), ("--peers", "foo")):
        result = CliRunner().invoke(main, ["bench", option, value])
        assert result.exit_code == 2
        assert f"{option[2:]} " in result.stderr
        assert "matplotlib" not in result.stderr
