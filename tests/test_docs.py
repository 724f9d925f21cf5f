"""The examples of docs/using-index.md run, one after the other, and every page is linked."""

import re
from pathlib import Path

import pytest

from knnfast import _C

ROOT = Path(__file__).resolve().parents[1]


def test_examples_of_using_index(tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "using-index.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 8
    threads = _C.num_threads()
    here = {}
    try:
        for block in blocks:
            exec(compile(block, "docs/using-index.md", "exec"), here)
    finally:
        _C.set_num_threads(threads)
    assert here["again"].ids.tolist() == here["index"].ids.tolist()
    assert here["ids"][0] == 0
    assert [ids[0] for _, ids in here["answers"]][5:] == [*range(5, 100)]


def test_readme_links_every_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\((docs/[^)#]+\.md)\)", readme))
    pages = {p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md")}
    assert linked == pages
