"""Every page's Python examples run, one after the other, and every page is linked."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from knnfast import _C, KNNDiffusion
from knnfast.diffusion.augment import AugmentConfig
from knnfast.diffusion.denoiser import DenoiserConfig
from knnfast.diffusion.pairs import ConditionConfig
from knnfast.diffusion.tokenizer import VQTokenizer
from knnfast.diffusion.tokenizer_training import train_tokenizer
from knnfast.diffusion.trainer import TrainConfig
from knnfast.images import read_image

ROOT = Path(__file__).resolve().parents[1]


def run(page: str) -> dict:
    """Run a page's Python blocks in one namespace."""
    text = (ROOT / page).read_text(encoding="utf-8")
    threads = _C.num_threads()
    here: dict = {}
    try:
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(compile(block, page, "exec"), here)
    finally:
        _C.set_num_threads(threads)
    return here


def test_no_example_is_left_out():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    with_code = {p.stem for p in pages if "```python" in p.read_text(encoding="utf-8")}
    assert with_code == {"README", "using-index", "queries", "editing", "ops", "training"}


def test_examples_of_using_index(tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.chdir(tmp_path)
    here = run("docs/using-index.md")
    assert here["again"].ids.tolist() == here["index"].ids.tolist()
    assert here["ids"][0] == 0
    for answers in (here["answers"], here["served"]):
        assert [ids[0] for _, ids in answers][5:] == [*range(5, 100)]


def test_examples_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = run("README.md")
    assert read_image("heart.png").size == (64, 64)
    assert len(here["out"].images) == 4
    assert list(here["out"].timings) == ["encode", "search", "denoise", "decode"]
    rows, scores, ids = here["rows"], here["scores"], here["ids"]
    exact = rows[:3].astype(float) @ rows.astype(np.float16).astype(float).T
    best = (-exact).argsort(axis=1, kind="stable")[:, :10]
    np.testing.assert_array_equal(ids, best)
    np.testing.assert_allclose(scores, np.take_along_axis(exact, best, 1), rtol=1e-6)


def test_examples_of_queries(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (80, 60), "blue").save("photo.png")
    calls = []
    real = KNNDiffusion.__call__

    def recorded(self, *args, **options):
        calls.append(real(self, *args, **{"steps": 1, **options}))
        return calls[-1]

    monkeypatch.setattr(KNNDiffusion, "__call__", recorded)
    here = run("docs/queries.md")
    assert len(calls) == 11
    animals = {item.name for item in here["animals"]}
    assert sum(n.item.name in animals for n in calls[1].neighbours[0]) == 7
    assert {n.item.group for n in calls[2].neighbours[0]} == {"Activities"}
    assert all("hat" in n.item.name for n in calls[3].neighbours[0])
    assert len(calls[8].images) == 5
    asked = [(prompt, seed) for seed in range(3) for prompt in ("a cat", "a fish", "a bird")]
    alone = [here["answer"](*each)[:2] for each in asked]
    with ThreadPoolExecutor(4) as pool:
        assert alone == [a[:2] for a in pool.map(lambda each: here["answer"](*each), asked)]
    assert len({image.tobytes() for image, _ in alone}) == len(asked)


def test_examples_of_the_ops():
    here = run("docs/ops.md")
    torch.testing.assert_close(here["y"], here["plain"], rtol=1e-4, atol=1e-4)
    assert here["tokens"].max() < 512  # the last step leaves no MASK
    ops, logits = here["ops"], here["logits"].detach()
    masked = torch.full_like(here["tokens"], 512)
    dense = ops.transition_step(logits, masked, here["step"], seed=0, top_r=0.9)
    sparse = ops.sample_head(here["y"], here["head"], None, masked, here["step"], seed=0, top_r=0.9)
    assert (dense == sparse).float().mean() > 0.98  # the logits differ by rounding
    assert here["logits"].grad.abs().sum() > 0
    assert here["kl"].shape == (2,)


def test_examples_of_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    for i in range(11):
        Image.new("RGB", (64, 48), (20 * i, 0, 200)).save(f"pictures/{i}.png")
    quick = {"steps": 1, "batch": 2, "bf16": False}
    monkeypatch.setattr(
        "knnfast.diffusion.trainer.TrainConfig",
        lambda **options: TrainConfig(**{**options, **quick}),
    )
    monkeypatch.setattr(
        "knnfast.diffusion.tokenizer_training.train_tokenizer",
        lambda *args, **_: train_tokenizer(*args, steps=2, batch=2, warmup=1, progress=False),
    )
    record = run("docs/training.md")["record"]
    assert VQTokenizer.from_folder("tokenizer").grid == (16, 16)
    assert (record["versions"], record["config"]["condition"]["noise"]) == (4, 0.0)
    made = KNNDiffusion.from_pretrained("run/model")
    assert len(made.databases["mine"]) == 11
    text = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    settings = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
    for name, kind in zip(
        ("model", "condition", "train", "augmentation"),
        (DenoiserConfig, ConditionConfig, TrainConfig, AugmentConfig),
        strict=True,
    ):
        assert kind.from_dict(settings.pop(name)) != kind()
    assert not settings


def test_examples_of_editing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = run("docs/editing.md")["out"]
    assert read_image("after.png").size == out.original.size == (64, 64)
    assert len(out.images) == 8


def test_readme_links_every_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\((docs/[^)#]+\.md)\)", readme))
    pages = {p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md")}
    assert linked == pages
