"""README and docs/performance.md show what bench/results holds, and nothing else."""

import sys
from pathlib import Path

import pytest
from PIL import Image

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture(scope="module")
def report():
    sys.path.insert(0, str(BENCH))
    try:
        import report as module

        yield module
    finally:
        sys.path.remove(str(BENCH))


def test_pages_are_what_the_results_say(report):
    for path, text in report.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} differs: make report"


def test_plots_are_of_the_results(report):
    for path, result in report.plots().items():
        with Image.open(path) as image:
            assert image.text["Source"] == report.source(result["file"]), f"{path}: make report"


def test_no_result_names_a_host_or_a_path_of_its_machine(report):
    for path in report.RESULTS.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert "/home/" not in text, path
        assert "/root/" not in text, path
        assert "/work/" not in text, path


def test_rows_we_lose_stay_and_stand_out(report):
    import sections

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
