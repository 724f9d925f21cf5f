"""README and docs/performance.md show what bench/results holds, and nothing else."""

import re

import pytest
import report
import sections
from regression import OPS
from targets import GPU_TARGETS, all_targets
from topk_cpu import PARTS


def test_pages_are_what_the_results_say():
    for path, text in report.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} differs: make report"


def test_the_contents_name_every_heading_once():
    page = report.performance(report.results())
    headings = re.findall(r"^##+ (.*)$", page, re.M)
    assert len(set(headings)) == len(headings)
    assert re.findall(r"^ *- \[(.*)\]\(#", page, re.M) == headings


def test_plots_are_of_the_results():
    plots = report.plots()
    for path, result in plots.items():
        assert report.drawn(path) == report.source(result["file"]), f"{path}: make report"
    assert set(report.DOCS.glob("*.png")) == set(plots)


def test_no_result_names_a_host_or_a_path_of_its_machine():
    for path in report.RESULTS.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert "/home/" not in text, path
        assert "/root/" not in text, path
        assert "/work/" not in text, path


def test_rows_we_lose_stay_and_stand_out():
    row = {"op": "topk", "shape": "small", "case": "batch 1", "backend": "auto", "p50_ms": 1.0,
           "p90_ms": 1.0, "p99_ms": 2.0, "exact": True,
           "peers": {"other": {"p50_ms": 0.5, "ratio": 0.5}}}  # fmt: skip
    machine = {"cpu": "a", "cores": 1, "memory_gib": 1, "isa": "b", "threads": 1, "date": "c",
               "commit": "d", "device": "cpu", "versions": {}}  # fmt: skip
    limits = {"read_gb_s": 1.0, "copy_gb_s": 1.0, "matmul_tflop_s": 1.0}
    result = {"kind": "ops", "file": "f.json", "machine": machine, "ceilings": limits,
              "command": "g", "rows": [row]}  # fmt: skip
    page = report.performance([result])
    assert page.count("**0.50x**") == 2
    assert sections.rival("other", {"p50_ms": 9.0, "ratio": 30.0, "ours_p50_ms": 0.3}, 1.0) == (
        "other 9 (30.0x; ours took 0.3 then)"
    )
    assert "Nothing on this page has run on a GPU" in page
    assert "failed" not in page
    result["failed"] = [{"op": "topk", "shape": "small", "failed": {"raised": "E: why"}}]
    page = report.performance([result])
    assert "- topk small: {'raised': 'E: why'}" in page
    assert "1 failed | no" in page


@pytest.fixture
def ops_result():
    """Makes a result of ops with one row of ours; `peers` maps names to figures."""

    def result(op, shape, backend, peers=(), device="cpu", case="it", **figures):
        machine = {"isa": "b", "device": device} | ({"gpu": "G"} if device != "cpu" else {})
        row = {"op": op, "shape": shape, "case": case, "backend": backend, "peers": dict(peers)}
        return {"kind": "ops", "machine": machine, "rows": [row | figures]}

    return result


def lines(found, text):
    """What the table of targets says of those whose text holds this."""
    rows = [line.strip("| ").split(" | ") for line in all_targets(found).splitlines()]
    return [row[1:] for row in rows if text in row[0]]


def test_a_cpu_target_is_met_missed_or_not_measured(ops_result):
    def loss(peers):
        return ops_result("transition_loss", "training-1024", "fused", peers, peak_mib=2.0)

    text = "at least 10 times as fast as VQ-Diffusion's"
    assert lines([], text) == [["", "not measured"]]
    for ratio, met in ((10.0, "yes"), (9.9, "no")):
        peers = {"torch-log-space": {"ratio": ratio, "peak_mib": 1.0}}
        assert lines([loss(peers)], text) == [[f"{ratio}", met]]
    for peers in ({}, {"torch-log-space": {"skipped": "ImportError: why"}}):
        assert lines([loss(peers)], text) == [["", "not measured"]]
    # every machine has a row of its own; one with a GPU is not asked
    both = [loss({"torch-log-space": {"ratio": r}}) for r in (20.0, 5.0)]
    assert lines(both, text) == [["20.0", "yes"], ["5.0", "no"]]
    both[0]["machine"]["device"] = "cuda"
    assert lines(both, text) == [["5.0", "no"]]


def test_the_memory_target_compares_peaks(ops_result):
    def loss(ours, theirs):
        peers = {"torch-log-space": {"ratio": 1.0, "peak_mib": theirs}}
        return [ops_result("transition_loss", "training-1024", "fused", peers, peak_mib=ours)]

    text = "at most 1/8 of that formulation's peak memory"
    assert lines(loss(10.0, 80.0), text) == [["8.0", "yes"]]
    assert lines(loss(10.0, 79.0), text) == [["7.9", "no"]]
    assert lines(loss(None, 80.0), text) == lines(loss(10.0, None), text) == [["", "not measured"]]


def test_the_target_of_fp16_search_on_a_gpu_is_about_large_databases(ops_result):
    def search(shape, case, share):
        return ops_result("topk", shape, "graph fp16", case=case, device="cuda",
                          ceiling_share=share)  # fmt: skip

    small = [
        search("stickers", "batch 1, k 10", 0.1),
        search("gpu-1m-512", "batch 128, k", 0.1),
    ]
    text = "GPU: FP16 search"
    assert lines(small, text) == [["", "not measured"]]
    large = [
        search("gpu-10m-768", "batch 16, k 10", 0.9),
        search("gpu-1m-512", "batch 1, k", 0.8),
    ]
    assert lines([*small, large[0]], text) == [["90%", "not all measured"]]
    assert lines([*small, *large], text) == [["80%", "no"]]
    fp16 = next(target for target in GPU_TARGETS if target.op == "topk")
    every = [search(shape, f"{case} k 10", 0.9) for shape in fp16.shapes for case in fp16.cases]
    assert lines(every[1:], text) == [["90%", "not all measured"]]
    assert lines(every, text) == [["90%", "yes"]]


def test_one_reading_of_the_queue_is_judged():
    row = {"server": "Index.search", "loop": "open", "of_saturation": 0.5, "clients": 16,
           "offered_qps": 400, "p99_ms": 6, "p99_over_queue": 1.2, "p99_over_loaded_queue": 1.4,
           "loaded_queue": {}}  # fmt: skip
    result = {"kind": "load", "machine": {"isa": "b"}, "rows": [row], "shape": {"clients": 16}}
    said = "1.20 (p99 is 6.0 ms; 1.40 with the service under that load"
    before = "; before searches that wait were joined)"
    assert lines([result], "p99 of search") == [[said + before, "yes"]]
    row |= {"of_queue": 0.5, "of_saturation": 0.1}
    beyond = {"server": "Index.search", "loop": "open", "of_saturation": 0.5, "of_queue": 2.5,
              "offered_qps": 2000, "clients": 16, "p99_ms": 7.25}  # fmt: skip
    result["rows"] = [beyond, row]
    more = ("; at half of what 16 clients get, 2,000/s, more than such a queue can serve, p99 is "
            "7.2 ms)")  # fmt: skip
    assert lines([result], "p99 of search") == [[said + more, "yes"]]
    row["p99_over_queue"] = 1.31
    assert lines([result], "p99 of search")[0][1] == "no"
    assert lines([], "p99 of search") == [["", "not measured"]]


def test_batcher_is_judged_by_as_many_callers_of_search():
    def closed(server, clients, qps):
        return {"server": server, "loop": "closed", "clients": clients, "qps": qps}

    rows = [closed("Index.search", 1, 100), closed("Index.search", 16, 500)]
    rows.append(closed("Index.search, one at a time", 16, 100))
    result = {"kind": "load", "machine": {"isa": "b"}, "rows": rows, "shape": {"clients": 16}}
    assert lines([result], "Batcher") == []
    rows.append(closed("Batcher", 16, 300))
    said = ("0.60x (300/s and 500/s): search answers those that wait together by itself, and on a "
            "large CPU index the Batcher hands on to it")  # fmt: skip
    alone = "x; Index.search without a Batcher "
    assert lines([result], "Batcher") == [[said, "no"], [f"3.00{alone}5.00x", "yes"]]
    rows[2]["qps"] = 200
    assert lines([result], "Batcher") == [[said, "no"], [f"1.50{alone}2.50x", "no"]]
    rows[1]["qps"] = 150
    assert lines([result], "Batcher")[0][1] == "yes"


def test_what_was_not_measured_is_no_target_met():
    machine = {"isa": "b", "device": "cpu"}
    parts = {name: {"targets": [{"met": True}]} for name in PARTS}
    result = {"kind": "search_targets", "machine": machine, "parts": parts}
    text = "every target of the search engine"
    assert lines([result], text) == [[f"{len(PARTS)} of {len(PARTS)}", "yes"]]
    del parts["filters"]
    said = f"{len(PARTS) - 1} of {len(PARTS) - 1}; not measured: filters"
    assert lines([result], text) == [[said, "not all measured"]]
    parts["small"]["targets"][0]["met"] = False
    assert lines([result], text)[0][1] == "no"

    slowed = {op: [1.2] for op in OPS}
    gate = {"kind": "gate", "machine": machine, "threshold": 1.1, "slowdown": 1.2,
            "unchanged": [{op: [1.0] for op in OPS}] * 20, "slowed": [slowed]}  # fmt: skip
    assert lines([gate], "an alarm") == [[f"{len(OPS)} of {len(OPS)}", "yes"]]
    del slowed[OPS[0]]
    assert lines([gate], "an alarm") == [[f"{len(OPS) - 1} of {len(OPS)}", "no"]]


def test_other_ways_of_serving_are_judged_at_half_of_their_queue():
    rows = [
        {"server": "Index.search with a filter", "loop": "open", "of_saturation": share,
         "offered_qps": 600 * share, "p99_ms": 9.0, "p99_over_queue": over}
        for share, over in ((0.2, 9.0), (0.45, 1.4), (0.61, 1.0))
    ]  # fmt: skip
    result = {"kind": "load", "machine": {"isa": "b"}, "rows": rows, "shape": {"clients": 16}}
    result["rows"].append({"server": "Index.search", "loop": "open", "of_saturation": 0.5,
                           "offered_qps": 400, "clients": 16, "p99_ms": 6.0,
                           "p99_over_queue": 1.2})  # fmt: skip
    assert lines([result], "with a filter, 270/s: 45% of") == [["1.40 (p99 is 9.0 ms)", "no"]]
