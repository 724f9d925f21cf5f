"""Profilers see the phases by name, with and without the package nvtx."""

import json
import sys

import pytest
import torch

from knnfast import KNNDiffusion, _phases


@pytest.fixture
def without_nvtx(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    _phases._nvtx.cache_clear()
    yield
    _phases._nvtx.cache_clear()


def test_torch_profiler_sees_every_phase(tmp_path, without_nvtx):
    pipe = KNNDiffusion.from_pretrained("stickers")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        out = pipe("a red heart", steps=2, seed=0)
    path = tmp_path / "trace.json"
    profiler.export_chrome_trace(str(path))
    names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
    for name in ("encode", "search", "denoise", "decode"):
        assert names.count(f"knnfast.{name}") == 1
        assert out.timings[name] > 0
    for name in ("sample.features", "sample.packed", "sample.head"):
        assert names.count(f"knnfast.{name}") == 2


def test_nvtx_gets_a_range_that_ends_even_on_an_error(monkeypatch):
    events = []

    class Recorder:
        @staticmethod
        def start_range(label, domain):
            events.append((label, domain))
            return 7

        @staticmethod
        def end_range(token):
            events.append(token)

    monkeypatch.setattr(_phases, "_nvtx", lambda: Recorder)
    with pytest.raises(KeyError), _phases.phase("search"):
        raise KeyError
    assert events == [("knnfast.search", "knnfast"), 7]
