"""The training loop: who draws what, processes, resumption after a kill, levels, logs, disks."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_training import QUICK, TINY, pairs, tokenizer

from knnfast import _files
from knnfast.diffusion import pairs as pairs_module
from knnfast.diffusion.distributed import Processes, processes
from knnfast.diffusion.levels import DECAY, HITS, Levels
from knnfast.diffusion.pairs import ConditionConfig, ConditionSampler, Pairs, nearest
from knnfast.diffusion.runlog import FIELDS, RunLog
from knnfast.diffusion.schedule import NAMES
from knnfast.diffusion.trainer import STATE_FILE, TrainConfig, Trainer, ahead, fit
from knnfast.diffusion.training import denoiser_trainer, train

TESTS = Path(__file__).parent


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def python(code: str, *launcher: str) -> subprocess.Popen:
    """Start Python, or `torchrun`, on `code` with the tests importable and one thread each."""
    file = ["-c", code] if not launcher else [*launcher, code]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    return subprocess.Popen(
        [sys.executable, *file], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


# ---- batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 8, 24])
def test_a_batch_does_not_depend_on_who_draws_it(parts: int) -> None:
    """However a step's images are shared out, image i is the same, with the same numbers."""
    trainer = denoiser_trainer(TINY, replace(QUICK, batch=24, group=5), pairs())
    whole = trainer.draw(7)
    size = 24 // parts
    shares = [trainer.draw(7, i * size, (i + 1) * size) for i in range(parts)]
    for name in ("x0", "u", "noise"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(s, name) for s in shares]))
    for i, wanted in enumerate(whole.inputs):
        assert torch.equal(wanted, torch.cat([s.inputs[i] for s in shares]))
    assert not torch.equal(whole.noise, trainer.draw(8).noise)
    assert torch.equal((whole.u * 24).long().sort().values, torch.arange(24))


@pytest.mark.parametrize("background", [False, True])
def test_ahead(background: bool) -> None:
    found = ahead(lambda n: n * n, 3, background)
    assert [next(found) for _ in range(5)] == [9, 16, 25, 36, 49]


def test_accumulation_is_the_same_step() -> None:
    losses = []
    for accumulate in (1, 4):
        trainer = denoiser_trainer(TINY, replace(QUICK, accumulate=accumulate), pairs())
        losses.append([float(trainer.advance()["loss"]) for _ in range(10)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", NAMES)
def test_cuda_takes_the_same_steps(schedule: str) -> None:
    """The draws are the host's: the losses of the first steps are the CPU's up to rounding."""
    losses = []
    for device in ("cpu", "cuda"):
        with processes(device) as these:
            trainer = denoiser_trainer(replace(TINY, schedule=schedule), QUICK, pairs(), these)
            losses.append([float(trainer.advance()["loss"]) for _ in range(3)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


def test_shares() -> None:
    assert [Processes(r, 4).share(12) for r in (0, 3)] == [(0, 3), (9, 12)]
    with pytest.raises(ValueError, match="12 images cannot be shared by 5 processes"):
        Processes(0, 5).share(12)
    with pytest.raises(ValueError, match="8 images of a process cannot be shared by 3 passes"):
        denoiser_trainer(TINY, replace(QUICK, accumulate=3), pairs())
    with processes() as these:
        assert (these.rank, these.count, these.main) == (0, 1, True)
        assert torch.equal(these.gather(torch.arange(3)), torch.arange(3))


TWO = """
import json, os, time
from test_trainer import LONG
from test_training import TINY, pairs
from knnfast.diffusion.distributed import processes
from knnfast.diffusion.training import denoiser_trainer
with processes(), processes() as these:  # as the command and `train` do
    trainer = denoiser_trainer(TINY, LONG, pairs(), these)
    losses = [float(trainer.advance()["loss"]) for _ in range(50)]
    if these.main:
        print("LOSSES", these.count, json.dumps(losses))
deadline = time.monotonic() + 30  # joined threads are listed for a moment longer
while len(os.listdir("/proc/self/task")) > 1:
    assert time.monotonic() < deadline, "the group's threads go on"
"""
LONG = replace(QUICK, steps=50, batch=16, accumulate=2, importance=True)


def test_two_processes_train_as_one(tmp_path: Path, one_thread: None) -> None:
    """Torchrun with two processes (gloo): the losses of one, over 50 steps; no thread is left."""
    file = tmp_path / "two.py"
    file.write_text(TWO)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    started = python(str(file), *launcher)
    trainer = denoiser_trainer(TINY, LONG, pairs())
    one = [float(trainer.advance()["loss"]) for _ in range(50)]
    output = started.communicate(timeout=120)[0]
    assert started.returncode == 0, output
    (line,) = [x for x in output.splitlines() if x.startswith("LOSSES 2 ")]
    two = json.loads(line.removeprefix("LOSSES 2 "))
    np.testing.assert_allclose(two, one, rtol=1e-5)
    assert len(set(one)) == 50


def test_the_callers_group_is_taken_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    left = []
    for name, value in (("is_initialized", True), ("get_world_size", 8), ("get_rank", 6)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: left.append(0))
    with processes() as these:
        assert (these.rank, these.count) == (6, 8)
        with processes() as same:
            assert same is these
    assert not left
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with processes("cuda") as these:
        assert these.device == torch.device("cuda", 2)


# ---- going on -----------------------------------------------------------------------------------

KILLED = """
import torch
import test_trainer as t
from knnfast.diffusion.training import train
torch.set_num_threads(1)
train(t.pairs(), {out!r}, t.tokenizer(), model=t.TINY, config=t.RUN, progress=False)
"""
RUN = replace(QUICK, steps=40, checkpoint_every=7, log_every=1, importance=True)


def test_resume_after_a_kill_is_bit_identical(tmp_path: Path, one_thread: None) -> None:
    """SIGKILL at a random step; the run that goes on ends with the bits of one never stopped."""
    step = random.SystemRandom().randint(8, 30)
    child = python(KILLED.format(out=str(tmp_path / "killed")))
    log = tmp_path / "killed" / "log.csv"
    deadline = time.monotonic() + 120
    while not log.exists() or len(log.read_text().splitlines()) <= step:
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline, f"step {step} was never reached"
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert child.returncode == -signal.SIGKILL, f"it was over before step {step}"
    child.stdout.close()
    for out in ("killed", "whole"):
        record = train(pairs(), tmp_path / out, tokenizer(), model=TINY, config=RUN, progress=False)
        assert record["steps"] == 40
    a, b = (load_file(tmp_path / o / STATE_FILE) for o in ("killed", "whole"))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name}, killed after step {step}"
    for file in ("denoiser/model.safetensors", "grids/000040.png"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    rows = [line.split(",") for line in log.read_text().splitlines()]
    assert [row[0] for row in rows] == ["step", *map(str, range(1, 41))]
    whole = [x.split(",") for x in (tmp_path / "whole" / "log.csv").read_text().splitlines()]
    assert [row[:4] for row in rows] == [row[:4] for row in whole]  # loss, gradient, rate


def test_a_run_goes_on_only_as_itself(tmp_path: Path) -> None:
    trainer = denoiser_trainer(TINY, QUICK, pairs())
    trainer.advance()
    trainer.save(tmp_path)

    def load(model=TINY, **changes) -> Trainer:
        other = denoiser_trainer(model, replace(QUICK, **changes), pairs())
        other.load(tmp_path)
        return other

    assert load(steps=9, checkpoint_every=1, accumulate=2).step == 1
    with pytest.raises(ValueError, match="was trained with batch = 8, now it is 16"):
        load(batch=16)
    with pytest.raises(ValueError, match="was trained with depth = 2, now it is 3"):
        load(replace(TINY, depth=3))
    other = denoiser_trainer(TINY, QUICK, pairs(1))
    with pytest.raises(ValueError, match="was trained with another data"):
        other.load(tmp_path)
    other = denoiser_trainer(TINY, QUICK, pairs())
    other.start_from(trainer.net)
    with pytest.raises(ValueError, match="was trained with another start"):
        other.load(tmp_path)
    file = tmp_path / STATE_FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        load()
    trainer.save(tmp_path)
    with safe_open(file, "pt") as f:
        meta = f.metadata()
    del meta["made_from"]  # as older versions wrote it
    save_file(load_file(file), file, meta)
    with pytest.raises(ValueError, match=r"not a complete checkpoint of this version .*made_from"):
        load()


def test_another_tokenizer_does_not_go_on(tmp_path: Path) -> None:
    run = lambda tok: train(pairs(), tmp_path, tok, model=TINY, config=QUICK, progress=False)  # noqa: E731
    run(tokenizer())
    other = tokenizer()
    other.quantize.embedding.weight[0] += 1
    with pytest.raises(ValueError, match="was trained with another tokenizer"):
        run(other)


def test_a_run_is_not_shortened(tmp_path: Path) -> None:
    trainer = denoiser_trainer(TINY, QUICK, pairs())
    trainer.advance()
    trainer.advance()
    trainer.save(tmp_path)
    shorter = denoiser_trainer(TINY, replace(QUICK, steps=1), pairs())
    with pytest.raises(ValueError, match=r"steps: .* has made 2 already, got 1"):
        fit(shorter, tmp_path, "denoiser", lambda _: Image.new("RGB", (1, 1)))


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, full_disk) -> None:
    trainer = denoiser_trainer(TINY, QUICK, pairs())
    trainer.save(tmp_path)
    before = (tmp_path / STATE_FILE).read_bytes()
    trainer.advance()
    with full_disk(10_000), pytest.raises(OSError, match=r"large|could not be written"):
        trainer.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [STATE_FILE]
    assert (tmp_path / STATE_FILE).read_bytes() == before


def test_a_lost_loss_stops_the_run(tmp_path: Path) -> None:
    config = replace(QUICK, lr=1e30, warmup=1, checkpoint_every=6)
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step 2"):
        train(pairs(), tmp_path, tokenizer(), model=TINY, config=config, progress=False)
    assert not (tmp_path / STATE_FILE).exists()


def test_a_lost_gradient_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch) -> None:
    trainer = denoiser_trainer(TINY, replace(QUICK, checkpoint_every=3), pairs())
    plain = trainer.objective.forward

    def forward(*batch):
        loss, losses = plain(*batch)
        if trainer.step == 5:  # the last step: 1/0 in the gradient alone
            loss = loss + (trainer.net.head.bias * 0).abs().sqrt().sum()
        return loss, losses

    monkeypatch.setattr(trainer.objective, "forward", forward)
    with pytest.raises(FloatingPointError, match="the gradient's norm is nan at step 6"):
        fit(trainer, tmp_path, "denoiser", lambda _: Image.new("RGB", (1, 1)), progress=False)
    again = denoiser_trainer(TINY, QUICK, pairs())
    again.load(tmp_path)
    assert again.step == 3


# ---- levels -------------------------------------------------------------------------------------


def test_uniform_levels() -> None:
    levels = Levels(10, importance=False)
    u = (torch.arange(40, dtype=torch.float64) + 0.5) / 40
    t, factor = levels.draw(u)
    assert torch.bincount(t, minlength=11).tolist() == [0] + [4] * 10
    assert torch.equal(factor, torch.ones(40))


def test_levels_by_importance() -> None:
    """p(t) follows the root mean square loss; divided by T p(t), the mean stays what it was."""
    levels = Levels(5, importance=True)
    loss = torch.tensor([9.0, 1.0, 2.0, 3.0, 4.0])
    for _ in range(HITS):
        levels.update(torch.arange(1, 6), loss)
        assert torch.equal(levels.probabilities(), torch.full((5,), 0.2, dtype=torch.float64))
    levels.update(torch.tensor([5, 5, 1, 2, 3, 4]), torch.tensor([0.0, 6.0, 9.0, 1.0, 2.0, 3.0]))
    last = (DECAY * 16 + (1 - DECAY) * 18) ** 0.5  # two images of one level: the mean of 0 and 36
    wanted = np.array([1.0, 1.0, 2.0, 3.0, last]) + 1e-4  # the first takes the second's
    np.testing.assert_allclose(levels.probabilities(), wanted / wanted.sum(), rtol=1e-6)
    u = torch.rand(200_000, dtype=torch.float64)
    t, factor = levels.draw(u)
    seen = torch.bincount(t - 1, minlength=5) / len(t)
    np.testing.assert_allclose(seen, wanted / wanted.sum(), atol=0.005)
    assert float((loss[t - 1] * factor).mean()) == pytest.approx(float(loss.mean()), rel=0.02)


# ---- conditions of large collections and of the baselines ---------------------------------------


def test_candidates_are_the_search() -> None:
    """With all of the database as candidates, a batch is what searching gives."""
    p = pairs()
    config = ConditionConfig(k=4, semantic=8, subset=0.5, exclude=0.5, confuse=0.3)
    found = nearest(p, 35)
    assert found.shape == (2, 30, 35)
    best = (p.embeddings[1].float() @ p.embeddings[1, 7].float())[5:].argmax() + 5
    assert found[1, 7, 0] == best
    for seed in range(20):
        searched, looked_up = (
            ConditionSampler(p, config, c).draw(16, torch.Generator().manual_seed(seed))
            for c in (None, found)
        )
        for a, b in zip(searched, looked_up, strict=True):
            assert torch.equal(a, b)


def test_candidates_are_made_once(tmp_path: Path) -> None:
    config = replace(QUICK, steps=2, candidates=20)
    run = lambda p: train(p, tmp_path, tokenizer(), model=TINY, config=config, progress=False)  # noqa: E731
    run(pairs())
    file = tmp_path / "neighbours.safetensors"
    made = file.stat().st_mtime_ns
    assert torch.equal(load_file(file)["ids"], nearest(pairs(), 20))
    run(pairs())
    assert file.stat().st_mtime_ns == made
    with pytest.raises(ValueError, match=r"neighbours\.json: was made with embeddings"):
        run(Pairs(pairs().codes, -pairs().embeddings, pairs().targets, pairs().database))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="damaged"):
        run(pairs())


@pytest.mark.parametrize("candidates", [0, 20])
def test_pictures_of_samples_index_nothing_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, candidates: int
) -> None:
    made = []
    index = pairs_module.Index
    monkeypatch.setattr(pairs_module, "Index", lambda *a, **kw: made.append(0) or index(*a, **kw))
    config = replace(QUICK, candidates=candidates, checkpoint_every=1)
    train(pairs(), tmp_path, tokenizer(), model=TINY, config=config, progress=False)
    assert len(list((tmp_path / "grids").glob("*.png"))) == 6
    assert len(made) == 2  # the two versions


def test_presets() -> None:
    p = pairs(1)
    base = ConditionConfig(k=3, semantic=8, confuse=0.5, null=0.2)
    draw = lambda name: ConditionSampler(p, base.preset(name)).draw(  # noqa: E731
        400, torch.Generator().manual_seed(0)
    )
    _, cond, mask = draw("paper")
    assert torch.equal(mask, mask[:, :1].expand(-1, 4))  # all of it, or nothing
    assert mask[:, 0].float().mean() == pytest.approx(0.8, abs=0.06)
    codes, cond = draw("paper")[0][mask[:, 0]], cond[mask[:, 0]]
    rows = torch.stack([(p.codes[0] == c).all(1).nonzero()[0, 0] for c in codes])
    own = p.embeddings[0].float()
    torch.testing.assert_close(cond[:, 0], own[rows], atol=1e-3, rtol=0)
    scores = own[rows] @ own[p.database].T
    scores[p.database == rows[:, None]] = -2
    nearest_three = own[p.database[scores.topk(3).indices]]
    torch.testing.assert_close(cond[:, 1:], nearest_three, atol=1e-3, rtol=0)
    for name in ("lafite", "no_neighbours"):
        codes, cond, mask = draw(name)
        assert not mask[:, 1:].any()
        assert mask[:, 0].float().mean() == pytest.approx(0.8, abs=0.06)
        rows = torch.stack([(p.codes[0] == c).all(1).nonzero()[0, 0] for c in codes])
        cosine = (cond[:, 0] * p.embeddings[0, rows].float()).sum(1)[mask[:, 0]]
        if name == "no_neighbours":
            torch.testing.assert_close(cosine, torch.ones_like(cosine), atol=1e-3, rtol=0)
        else:  # a fixed length in any direction: never nearer than asin 0.75 allows, never the same
            assert cosine.min() >= (1 - 0.75**2) ** 0.5 - 1e-3
            assert cosine.max() < 0.999
    assert base.preset("robust") is base
    assert base.preset("robust", 0.25) == replace(base, noise=0.25)
    assert base.preset("lafite", 0.25).least_noise == 0.25
    with pytest.raises(ValueError, match="condition must be one of robust, paper, lafite, no_nei"):
        base.preset("none")
    for name in ("paper", "no_neighbours"):
        with pytest.raises(ValueError, match=f"noise: {name} adds none, got 0.5"):
            base.preset(name, 0.5)
    with pytest.raises(ValueError, match=r"null must be in \[0, 1\], got 2"):
        ConditionConfig(null=2)
    with pytest.raises(ValueError, match="add up to more than 1"):
        ConditionConfig(null=0.5, no_query=0.6)


# ---- logs ---------------------------------------------------------------------------------------


def test_the_log_forgets_what_a_resumed_run_repeats(tmp_path: Path, full_disk) -> None:
    def row(step: int) -> dict[str, float]:
        return {"step": step, **dict.fromkeys(FIELDS[1:], 0.5)}

    log = RunLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.row(row(step))
    log.picture("samples", Image.new("RGB", (4, 4)), 3)
    log.close()
    with (tmp_path / "log.csv").open("a") as f:
        f.write("4,0.1")  # cut by a kill
    whole = (tmp_path / "log.csv").read_text()
    with full_disk(20), pytest.raises(OSError, match="large"):
        RunLog(tmp_path, 2)
    assert (tmp_path / "log.csv").read_text() == whole
    RunLog(tmp_path, 2).close()
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines == [",".join(FIELDS), "1" + ",0.5" * 5, "2" + ",0.5" * 5]
    pytest.importorskip("tensorboard")
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_atomic_tensors(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    _files.save_tensors(file, {"x": torch.arange(6).reshape(2, 3).T}, {"a": "b"})
    assert torch.equal(load_file(file)["x"], torch.arange(6).reshape(2, 3).T)
    with pytest.raises(OSError, match="nowhere"):
        _files.save_tensors(tmp_path / "nowhere" / "x.safetensors", {"x": torch.ones(1)})


def test_new_files_have_the_rights_of_the_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is the whole process's: it is not touched, even for a moment."""
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.delattr("os.umask")
            _files.write_atomic(tmp_path / "x.json", b"{}")
            _files.save_tensors(tmp_path / "x.safetensors", {"x": torch.ones(1)})
            with _files.new_folder(tmp_path / "folder"):
                pass
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.iterdir()}
    assert modes == {"x.json": 0o640, "x.safetensors": 0o640, "folder": 0o750}


def test_a_stop_while_samples_are_drawn_loses_nothing(tmp_path: Path, monkeypatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    def run() -> dict:
        return train(pairs(), tmp_path, tokenizer(), model=TINY, config=QUICK, progress=False)

    for step in (2, 4, 6):
        with monkeypatch.context() as patched:
            patched.setattr("knnfast.diffusion.training.draw_grid", stopped)
            with pytest.raises(KeyboardInterrupt):
                run()
        with safe_open(tmp_path / STATE_FILE, "pt") as f:
            assert json.loads(f.metadata()["step"]) == step
    assert run()["steps"] == 6
    assert (tmp_path / "denoiser" / "model.safetensors").is_file()


def test_the_rate_that_none_stands_for() -> None:
    assert denoiser_trainer(TINY, replace(QUICK, lr=None), pairs()).config.lr == 3e-3
    assert denoiser_trainer(TINY, replace(QUICK, lr=0.5), pairs()).config.lr == 0.5
    trainer = denoiser_trainer(TINY, QUICK, pairs())
    with pytest.raises(ValueError, match=r"config\.lr: must be a number"):
        Trainer(trainer.objective, TrainConfig(), trainer.sampler)


def test_rejects() -> None:
    for name in ("steps", "batch", "accumulate", "group", "log_every"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            TrainConfig(**{name: 0})
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=r"seed must be in \[0, 2\^64\), got"):
            TrainConfig(seed=seed)
    for name, message, values in (
        ("clip", "above 0", (-1.0, 0.0, math.nan)),
        ("decay", r"in \[0, 1\]", (-0.1, 1.5, math.nan)),
        ("auxiliary", "finite and at least 0", (-0.1, math.inf, math.nan)),
    ):
        for value in values:
            with pytest.raises(ValueError, match=f"{name} must be {message}, got {value}"):
                TrainConfig(**{name: value})
    TrainConfig(clip=math.inf, decay=0, auxiliary=0)
    for ema in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"ema must be in \[0, 1\), got"):
            TrainConfig(ema=ema)
    for lr in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="lr must be a finite number above 0, got"):
            TrainConfig(lr=lr)
    with pytest.raises(ValueError, match=r"candidates must be 0 or at least 11 \(k = 10\), got 10"):
        TrainConfig(candidates=10)
    TrainConfig(candidates=10, condition=ConditionConfig(exclude=0.0))
