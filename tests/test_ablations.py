"""Ablations on a generator one can reason about; the one-step schedule against its definition."""

import json
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from test_evaluate import Knowing, Pipe, Shelf, picture
from test_training import TINY

from knnfast.ablation_report import write_report
from knnfast.ablations import ABLATIONS, _Models, _one_step, one_step_schedule, run
from knnfast.cli import main
from knnfast.database import Database
from knnfast.diffusion.denoiser import Denoiser
from knnfast.diffusion.schedule import Schedule
from knnfast.ops.reference import transition_weights


class Rule(Pipe):
    """Draws the right picture for a name where `rule(options)` says so, else a wrong one."""

    def __init__(self, rule):
        super().__init__(None)
        self.rule = rule

    def __call__(self, prompts, **options):
        self.calls.append((tuple(prompts), options))
        right = self.rule(options)
        numbers = [(int(prompt.split()[1]) + (not right)) % 200 for prompt in prompts]
        return SimpleNamespace(images=[picture(n) for n in numbers])


def ablate(name, rule, out, **options):
    pipe = Rule(rule)
    (result,) = run([name], pipe, out, prompts=20, judge=Knowing(230, 2), batch=6, **options)
    return result, pipe


def found(result):
    return {c["claim"]: c["found"] for c in result["claims"]}


def test_neighbours(tmp_path):
    result, pipe = ablate("neighbours", lambda o: o["use_neighbours"], tmp_path)
    assert found(result) == {"neighbours help": "agrees"}
    score = {e["setting"]["label"]: e["metrics"]["judge r_precision@1"] for e in result["settings"]}
    assert score == {"query and neighbours": 1.0, "query only": 0.0}
    assert len(pipe.calls) == 2 * 4  # twenty names in batches of six
    for a, b in zip(pipe.calls[:4], pipe.calls[4:], strict=True):
        assert (a[0], a[1]["seed"]) == (b[0], b[1]["seed"])  # the same names with the same seeds
    assert json.loads((tmp_path / "neighbours.json").read_text()) == result


def test_own(tmp_path):
    """A generator that draws what it finds: without its own picture a name gets another."""
    result, pipe = ablate("own", lambda o: o["use_neighbours"] and o["where"] is None, tmp_path)
    assert found(result) == {
        "neighbours help without the own picture": "undecided",
        "the own picture helps": "agrees",
    }
    left_out = [(names, o) for names, o in pipe.calls if o["where"]]
    together = [(names, o) for names, o in pipe.calls if not o["where"]]
    assert [names for names, _ in left_out] == [(n,) for names, _ in together[:4] for n in names]
    for (name,), options in left_out:
        hidden = [item.name for item in pipe.databases["stickers"] if not options["where"](item)]
        assert hidden == [name]
        (seed,) = {o["seed"] for names, o in together if name in names}
        assert options["seed"] == seed  # the noise is that of the other settings
    assert result["own_picture"] == {"first": 1, "among": 1, "among_held_out": 1}
    assert result["batch"] == 6
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "100% find their own picture first, 100% (100% of the held-out) among the ten" in page
    assert "held out of the training, not of the database" in page


@pytest.mark.parametrize(
    ("rule", "ten_one", "ten_twenty"),
    [
        (lambda o: o["k"] >= 10, "agrees", "undecided"),
        (lambda o: o["k"] in (1, 20), "disagrees", "disagrees"),
    ],
)
def test_k(tmp_path, rule, ten_one, ten_twenty):
    result, pipe = ablate("k", rule, tmp_path)
    assert [e["setting"]["k"] for e in result["settings"]] == [1, 2, 5, 10, 20]
    assert list(found(result).values()) == [ten_one, ten_twenty]
    assert {o["k"] for _, o in pipe.calls} == {1, 2, 5, 10, 20}


def test_guidance_and_truncation_reach_the_generator(tmp_path):
    _, pipe = ablate("guidance", lambda o: o["guidance"] == 3, tmp_path)
    assert {o["guidance"] for _, o in pipe.calls} == {1, 2, 3, 5, 8}
    result, pipe = ablate("truncation", lambda o: o["truncation"] < 1, tmp_path)
    assert {o["truncation"] for _, o in pipe.calls} == {0.7, 0.86, 0.95, 1}
    assert found(result) == {"keeping 0.86 beats keeping all": "agrees"}


def test_a_missing_backbone_is_told(tmp_path):
    result, _ = ablate("backbone", lambda o: True, tmp_path)
    assert [e["available"] for e in result["settings"]] == [True, False]
    assert "| continuous | not available: no such model was given |" in (
        tmp_path / "README.md"
    ).read_text(encoding="utf-8")
    other = Rule(lambda o: False)
    result, _ = ablate("backbone", lambda o: True, tmp_path, continuous=other)
    assert [e["available"] for e in result["settings"]] == [True, True]
    assert len(other.calls) == 4
    assert result["settings"][1]["metrics"]["judge r_precision@1"] == 0


def test_shared_settings_are_generated_once_and_the_report_names_everything(tmp_path):
    pipe = Rule(lambda o: True)
    seen = []
    results = run(
        ["neighbours", "condition", "k"], pipe, tmp_path, prompts=20, judge=Knowing(230, 2),
        batch=20, progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert len(pipe.calls) == 3 + 4  # both, query, neighbours; k = 10 is known by then
    assert seen[-1] == (140, 140)
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    for result in results:
        assert f"## {result['name']}" in page
        assert result["denoiser_sha256"][:12] in page
        assert (tmp_path / f"{result['name']}.png").read_bytes().startswith(b"\x89PNG")
        for claim in result["claims"]:
            assert claim["claim"] in page
    assert "Not measured yet: own, index, steps, guidance, truncation, backbone." in page
    assert page.count("undecided |") + page.count("**undecided**") >= 5
    before = page
    write_report(tmp_path, {a.name: a.source for a in ABLATIONS.values()})
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == before


def test_a_model_with_one_database(tmp_path):
    pipe = Rule(lambda o: o["use_neighbours"])
    pipe.databases = {"training": Shelf(range(200), pipe.encoder)}
    (result,) = run(["neighbours"], pipe, tmp_path, prompts=20, judge=Knowing(230, 2))
    assert found(result) == {"neighbours help": "agrees"}
    assert (result["held_out"], result["names"]) == (0, 200)
    assert "cmmd" not in json.dumps(result["settings"])
    assert "| query only | " in (tmp_path / "README.md").read_text(encoding="utf-8")
    pipe.databases = {"training": Shelf(range(19), pipe.encoder)}
    with pytest.raises(ValueError, match="'training', which holds 19 images"):
        run(["k"], pipe, tmp_path, prompts=20, judge=Knowing(230, 2))


def test_every_claim_is_about_its_settings():
    for ablation in ABLATIONS.values():
        labels = [s.label for s in ablation.settings]
        assert len(set(labels)) == len(labels)
        for _, better, worse in ablation.claims:
            assert {better, worse} <= set(labels)
        if ablation.axis:
            assert len(ablation.axis[1]) == len(labels)


@pytest.mark.parametrize("steps", [5, 10, 50, 100])
def test_one_step_schedule(steps):
    """A jump t -> s leaves masked the share C_s / C_{s+1}; the last one leaves nothing."""
    schedule = Schedule("mask", 100, 16)
    one = one_step_schedule(schedule, steps)
    levels = schedule.levels(steps)
    assert one.levels(steps) == levels
    left = 1.0
    for t, s in pairwise(levels):
        _, mask_p, mask_u, *_ = transition_weights(one, t, s, 16).tolist()
        expected = 1.0 - s / (s + 1)  # C_s = s / 100
        assert mask_p == pytest.approx(expected, abs=1e-12)
        assert mask_u == 0
        left *= 1.0 - mask_p if s else 1.0
    if steps == 100:  # one-step posteriors are exact there
        np.testing.assert_allclose(one.C, schedule.C)
    if steps == 10:
        assert left == pytest.approx(np.prod([s / (s + 1) for s in range(10, 100, 10)]))
        assert left > 0.75  # of all codes are drawn at once, at the end
    with pytest.raises(ValueError, match="without replacement"):
        one_step_schedule(Schedule("mask_replace", 100, 16), 10)


def test_the_one_step_denoiser_is_the_same_network():
    """With a step for each level both samplers are one; with fewer they are not."""
    net = Denoiser(TINY).eval().requires_grad_(False)
    cond = F.normalize(torch.randn(2, 4, TINY.embed_dim), dim=-1)
    mask = torch.ones(2, 4, dtype=torch.bool)
    for steps, same in ((10, True), (3, False)):
        exact = net.sample(cond, mask, steps=steps)
        assert torch.equal(exact, _one_step(net).sample(cond, mask, steps=steps)) == same


def test_parts_of_a_database_are_nested():
    encoder = Knowing(40, 1)
    db = Database(encoder.card)
    pictures = [picture(i) for i in range(40)]
    names = [f"thing {i}" for i in range(40)]
    db.add(encoder.encode_images(pictures), pictures, names=names)
    models = _Models(SimpleNamespace(databases={"x": db}), None, "x")
    small, large = models.part(0.1), models.part(0.5)
    assert (len(small), len(large)) == (4, 20)
    assert models.part(1.0) is db
    assert {x.name for x in small} < {x.name for x in large}
    for item in small:
        number = int(item.name.split()[1])
        row = small.vectors([item.id])[0]
        np.testing.assert_allclose(row, encoder.rows[number], atol=2e-3)
        assert small.thumbnail(item.id).getpixel((0, 0)) == picture(number).getpixel((0, 0))


def test_rejects(tmp_path):
    with pytest.raises(ValueError, match="ablation must be one of neighbours, condition"):
        run(["depth"], Rule(None), tmp_path)
    with pytest.raises(ValueError, match="prompts: must be at least 4"):
        run(["k"], Rule(None), tmp_path, prompts=3)
    for arguments, message in (
        (["--ablation", "depth"], "--ablation: must be one of neighbours"),
        (["--ablation", "k", "--steps", "5"], "--steps: an ablation has its own settings"),
        (["--quick"], "--quick: goes with --ablation"),
        (["--ablation", "k", "--continuous", "stickers"], "k does not compare backbones"),
    ):
        result = CliRunner().invoke(main, ["evaluate", "stickers", *arguments])
        assert result.exit_code == 2
        assert message in result.stderr


def test_the_continuous_model_is_loaded_where_it_is_compared(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    given = []
    monkeypatch.setattr("knnfast.ablations.run", lambda *a, **o: given.append(o) or [])
    for name, code in (("k", 0), ("backbone", 2), ("all", 2)):
        words = ["evaluate", "stickers", "--ablation", name, "--out", str(tmp_path)]
        result = CliRunner().invoke(main, words)
        assert result.exit_code == code, result.output
        assert ("pip install '.[diffusion]'" in result.stderr) == bool(code)
    assert [options["continuous"] for options in given] == [None]


def test_without_matplotlib_nothing_is_generated(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[evaluate\]'"):
        run(["k"], None, tmp_path)
    monkeypatch.setattr("knnfast.pipeline.find_model", None)  # is not reached
    result = CliRunner().invoke(main, ["evaluate", "stickers", "--ablation", "k"])
    assert result.exit_code == 2
    assert "the plots need matplotlib" in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
