"""Training: the loss against its definition, neighbours, and images alone."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from knnfast.diffusion.augment import PHOTOS, STICKERS, AugmentConfig, augment
from knnfast.diffusion.denoiser import Denoiser, DenoiserConfig
from knnfast.diffusion.optim import Muon, orthogonalize
from knnfast.diffusion.pairs import ConditionConfig, ConditionSampler, Pairs
from knnfast.diffusion.schedule import NAMES, Schedule
from knnfast.diffusion.tokenizer import TokenizerConfig, VQTokenizer
from knnfast.diffusion.tokenizer_training import (
    _Codebook,
    fuse_norms,
    kmeans,
    redundant,
    train_tokenizer,
)
from knnfast.diffusion.trainer import TrainConfig
from knnfast.diffusion.training import corrupt, denoiser_trainer, masked_row_weight, train
from knnfast.encoders import EncoderCard
from knnfast.ops import reference

E, K, N = 12, 11, 40
TINY = DenoiserConfig(
    num_codes=K, grid=(4, 4), width=32, depth=2, heads=2, cross_heads=4, mlp_width=48,
    canvas_width=8, canvas_heads=2, canvas_layers=(0,), code_width=16, embed_dim=E, time_width=16,
    ranks=3, num_steps=10,
)  # fmt: skip
NOTHING = AugmentConfig(mirror=0, move=0, scale=0, turn=0, hue=0, light=0)
QUICK = TrainConfig(
    steps=6, batch=8, warmup=2, checkpoint_every=2, log_every=2, bf16=False, group=4,
    condition=ConditionConfig(k=3, semantic=8),
)  # fmt: skip


def pairs(versions: int = 2) -> Pairs:
    g = torch.Generator().manual_seed(0)
    return Pairs(
        torch.randint(K, (versions, N, 16), generator=g).short(),
        F.normalize(torch.randn(versions, N, E, generator=g), dim=-1).half(),
        torch.arange(0, 30),
        torch.arange(5, 40),
    )


# ---- the process --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_corrupt_follows_the_schedule(name: str) -> None:
    schedule = Schedule(name, 10, K)
    codes = torch.full((6000, 16), 4)
    t = torch.full((6000,), 7)
    noise = torch.rand(6000, 16, dtype=torch.float64)
    x_t = corrupt(codes, t, schedule, noise)
    seen = torch.bincount(x_t.flatten(), minlength=K + 1).double() / x_t.numel()
    expected = torch.full((K + 1,), float(schedule.B[7]))
    expected[4] += float(schedule.A[7])
    expected[K] = float(schedule.C[7])
    torch.testing.assert_close(seen, expected.double(), atol=0.006, rtol=0)


def test_masked_loss_is_the_definition() -> None:
    """Value and gradient equal FP64 autograd of the variational loss plus the auxiliary term.

    For B = 0 a real code is known, so the definition is taken over masked codes alone.
    """
    schedule = Schedule("mask", 10, K)
    x0 = torch.randint(K, (5, 16))
    t = torch.randint(1, 11, (5,))
    x_t = corrupt(x0, t, schedule, torch.rand(5, 16, dtype=torch.float64))
    rows = x_t == K
    logits = torch.randn(5, 16, K, dtype=torch.float64, requires_grad=True)

    nll = F.cross_entropy(logits[rows], x0[rows], reduction="none")
    weight = masked_row_weight(schedule, auxiliary=0.3).double()[t][:, None].expand(5, 16)[rows]
    ours = (weight * nll).sum() / x0.numel()
    (grad,) = torch.autograd.grad(ours, logits)

    certain = F.one_hot(x_t.clamp_max(K - 1), K).double().mul(2.0).sub(1.0).mul(1e9)
    known = torch.where(rows[..., None], logits, certain)  # a real code is predicted as itself
    want, _ = reference.transition_loss(known, x0, x_t, t, schedule, auxiliary=0.3)
    (want_grad,) = torch.autograd.grad(want, logits)
    torch.testing.assert_close(ours.float(), want.float(), atol=0, rtol=1e-6)
    torch.testing.assert_close(grad, want_grad, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_trainer_loss(name: str) -> None:
    """The trainer's loss is T times the definition, on what the network gives."""
    trainer = denoiser_trainer(replace(TINY, schedule=name), QUICK, pairs())
    batch = trainer.draw(3)
    x0, (cond, mask) = batch.x0, batch.inputs
    got, t, losses = trainer.loss(batch)
    x_t = corrupt(x0, t, Schedule(name, 10, K), batch.noise)
    logits = trainer.net(x_t, t, cond, mask).double()
    if name == "mask":
        certain = F.one_hot(x_t.clamp_max(K - 1), K).double().mul(2.0).sub(1.0).mul(1e9)
        logits = torch.where((x_t == K)[..., None], logits, certain)
    schedule = Schedule(name, 10, K)
    want, _ = reference.transition_loss(logits, x0, x_t, t, schedule, auxiliary=0.01)
    torch.testing.assert_close(got.double(), 10 * want.double(), atol=1e-4, rtol=1e-4)
    kl, _ = reference.transition_loss(logits, x0, x_t, t, schedule, auxiliary=0.0)
    torch.testing.assert_close(losses.mean().double(), 10 * kl.double(), atol=1e-4, rtol=1e-4)


# ---- conditions ---------------------------------------------------------------------------------


def drawn(config: ConditionConfig, count: int = 200, seed: int = 0, versions: int = 2):
    p = pairs(versions)
    g = torch.Generator().manual_seed(seed)
    sampler = ConditionSampler(p, config)
    parts = [sampler.draw(count // 4, g) for _ in range(4)]
    return p, *(torch.cat(columns) for columns in zip(*parts, strict=True))


def version_and_ids(p: Pairs, rows: torch.Tensor) -> torch.Tensor:
    """(version, id) of each embedding row [n, E]."""
    flat = p.embeddings.reshape(-1, E).float()
    at = torch.cdist(rows, flat).argmin(1)
    return torch.stack([at // N, at % N], 1)


def test_neighbours_are_the_nearest_of_the_same_version() -> None:
    plain = ConditionConfig(
        k=4, vary_k=0, text_like=0, noise=0, exclude=1, near=2.0, subset=0, original=0.5,
        no_query=0, no_neighbours=0, null=0,
    )  # fmt: skip
    p, codes, cond, mask = drawn(plain)
    assert mask.all()
    flat = p.codes.reshape(-1, 16).long()
    target = torch.tensor([int((flat == c).all(1).nonzero()[0, 0]) for c in codes])
    version, ids = target // N, target % N
    assert set(ids.tolist()) <= set(p.targets.tolist())
    assert {0, 1} == set(version.tolist())
    for i in range(len(codes)):
        rows = p.embeddings[version[i]].float()
        torch.testing.assert_close(cond[i, 0], F.normalize(rows[ids[i]], dim=0))
        scores = rows @ rows[ids[i]]
        scores[ids[i]] = -2.0  # itself is excluded
        scores[:5] = -2.0  # not in the database
        nearest = scores.topk(4).indices
        torch.testing.assert_close(cond[i, 1:], rows[nearest], atol=1e-6, rtol=0)


def test_exclude() -> None:
    """exclude=1 never shows the target or a near-duplicate; exclude=0 shows it first."""
    always = ConditionConfig(
        k=3, text_like=0, noise=0, subset=0, no_query=0, no_neighbours=0, null=0, vary_k=0
    )
    p = pairs()
    twin = p.embeddings.clone()
    twin[:, 7] = twin[:, 6]  # a near-duplicate of image 6
    p = Pairs(p.codes, twin, torch.tensor([6]), p.database)
    for exclude, expected in ((1.0, False), (0.0, True)):
        config = ConditionConfig(**{**always.to_dict(), "exclude": exclude})
        g = torch.Generator().manual_seed(0)
        _, cond, mask = ConditionSampler(p, config).draw(50, g)
        same = (cond[:, 1:] * cond[:, :1]).sum(-1) > 0.99
        assert same.any() == expected
        assert mask.all()


def test_a_crowd_of_near_duplicates_leaves_neighbours() -> None:
    rows = F.normalize(torch.randn(400, E, generator=torch.Generator().manual_seed(0)), dim=1)
    rows[:300] = F.normalize(rows[0] + 0.01 * rows[:300], dim=1)
    codes, everything = torch.zeros(1, 400, 16, dtype=torch.int16), torch.arange(400)
    p = Pairs(codes, rows[None].half(), torch.tensor([3, 399]), everything)
    config = ConditionConfig(
        k=4, text_like=0, noise=0, subset=0, no_query=0, no_neighbours=0, null=0, vary_k=0
    )
    _, cond, mask = ConditionSampler(p, config).draw(20, torch.Generator().manual_seed(0))
    assert mask.all()
    scores = cond[:, 0] @ p.embeddings[0].float().T
    scores[scores >= config.near] = -2.0
    shown = (cond[:, 1:] * cond[:, :1]).sum(-1)
    torch.testing.assert_close(shown, scores.topk(4).values)


def test_switches_and_query() -> None:
    config = ConditionConfig(
        k=3, semantic=8, text_like=0.5, noise=1.0, confuse=0.5, no_query=0.2, no_neighbours=0.2,
        null=0.1,
    )  # fmt: skip
    _, _, cond, mask = drawn(config, count=4000)
    query, neighbours = mask[:, 0], mask[:, 1:].any(1)
    for state, share in (
        (~query & ~neighbours, 0.1), (~query & neighbours, 0.2),
        (query & ~neighbours, 0.2), (query & neighbours, 0.5),
    ):  # fmt: skip
        assert state.float().mean() == pytest.approx(share, abs=0.04)
    assert not cond[~mask].any()
    torch.testing.assert_close(cond[query, 0].norm(dim=1), torch.ones(int(query.sum())))
    text_like = (cond[query, 0, 8:] == 0).all(1)
    assert text_like.float().mean() == pytest.approx(0.5, abs=0.05)
    assert set(mask[query & neighbours, 1:].sum(1).tolist()) == {1, 2, 3}


def test_small_database_pads() -> None:
    p = pairs()
    p = Pairs(p.codes, p.embeddings, torch.arange(10, 13), torch.arange(10, 13))
    config = ConditionConfig(k=3, exclude=1.0, no_query=0, no_neighbours=0, null=0, vary_k=0)
    _, cond, mask = ConditionSampler(p, config).draw(50, torch.Generator().manual_seed(0))
    assert (mask.sum(1) <= 3).all()  # the query and at most two others
    assert not cond[~mask].any()
    with pytest.raises(ValueError, match=r"k must be in \[1, 3\]"):
        ConditionSampler(p, ConditionConfig(k=4))


def test_augment_stays_in_range_and_changes_each_image() -> None:
    images = torch.rand(1, 3, 16, 16).expand(6, 3, 16, 16)
    out = augment(images, torch.Generator().manual_seed(0))
    assert out.shape == images.shape
    assert 0 <= out.min() <= out.max() <= 1
    assert len({float(x.sum()) for x in out}) == 6
    same = augment(images, torch.Generator().manual_seed(0))
    assert torch.equal(out, same)
    for kind in (PHOTOS, STICKERS):
        white = augment(torch.ones(4, 3, 16, 16), torch.Generator().manual_seed(0), kind)
        torch.testing.assert_close(white, torch.ones_like(white), atol=1e-3, rtol=0)


def test_photos_keep_their_hue_and_get_no_white() -> None:
    """What comes into view is the picture's own edge; a sticker may be of any hue, on white."""
    blue = torch.tensor([0.1, 0.2, 0.7]).view(1, 3, 1, 1).expand(200, 3, 16, 16)
    photos = augment(blue, torch.Generator().manual_seed(0))
    assert (photos.argmax(1) == 2).all()
    torch.testing.assert_close(photos, blue, atol=0.15, rtol=0)
    stickers = augment(blue, torch.Generator().manual_seed(0), STICKERS)
    assert {0, 1, 2} == set(stickers[:, :, 8, 8].argmax(1).tolist())
    assert (stickers > 0.99).all(1).any((1, 2)).float().mean() > 0.5
    same = augment(blue, torch.Generator(), NOTHING)
    torch.testing.assert_close(same, blue, atol=0.07, rtol=0)  # the hue turns by up to 5 degrees
    left = torch.zeros(50, 3, 16, 16)
    left[..., :8] = 1.0
    for mirror, share in ((0.0, 0), (1.0, 50)):
        out = augment(left, torch.Generator(), replace(NOTHING, mirror=mirror))
        assert int((out[:, 0, 8, 15] > 0.5).sum()) == share
    for name, value in (("mirror", 1.5), ("scale", float("nan")), ("turn", -1), ("fill", "black")):
        with pytest.raises(ValueError, match=f"{name} must be"):
            AugmentConfig(**{name: value})


def test_settings_of_json() -> None:
    config = replace(TINY, canvas_layers=(0, 1))
    assert DenoiserConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert TrainConfig(lr=1).updated({"steps": 7}) == TrainConfig(lr=1, steps=7)
    assert ConditionConfig.from_dict({"semantic": None, "noise": 1}).noise == 1
    for raw, message in (
        ({"condition": {}}, r"unknown settings \['condition'\]; TrainConfig has steps, batch"),
        ({"steps": "7"}, "steps must be int, got '7'"),
        ({"steps": True}, "steps must be int, got True"),
        ({"bf16": 0}, "bf16 must be bool, got 0"),
        ({"ema": None}, "ema must be float, got None"),
        ({"lr": "1"}, r"lr must be float \| None, got '1'"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainConfig.from_dict(raw)
    for given, message in (
        ({"lr": "x"}, r"lr must be float \| None, got 'x'"),
        ({"steps": 1.5}, "steps must be int, got 1.5"),
        ({"compile": 1}, "compile must be bool, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**given)
    with pytest.raises(ValueError, match=r"grid must be tuple\[int, int\], got 4"):
        replace(TINY, grid=4)
    for noise in (float("nan"), -1.0):
        with pytest.raises(ValueError, match="noise must be at least 0"):
            ConditionConfig(noise=noise)


# ---- the loop -----------------------------------------------------------------------------------


def test_orthogonalize() -> None:
    for shape in ((2, 32, 32), (2, 64, 32), (2, 32, 64)):
        s = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert s.min() > 0.3
        assert s.max() < 1.3


def test_optimiser_learns_and_splits_stacked_matrices() -> None:
    model = Denoiser(TINY)
    optimizer = Muon(model, lr=0.01)
    assert (96, 32) in optimizer.matrices
    names = {n for ps in optimizer.matrices.values() for n, _ in ps} | {
        n for n, _ in optimizer.others
    }
    assert names == {n for n, _ in model.named_parameters()}
    assert not any(n.startswith(("head", "code_embedding")) for n in optimizer.buffers)


def test_loss_falls() -> None:
    config = TrainConfig(
        steps=80, batch=32, warmup=5, lr=0.02, bf16=False,
        condition=ConditionConfig(k=3, semantic=8, null=0.0),
    )  # fmt: skip
    p = pairs()
    few = Pairs(p.codes, p.embeddings, torch.arange(6, 9), p.database)
    trainer = denoiser_trainer(TINY, config, few)
    losses = [float(trainer.advance()["loss"]) for _ in range(80)]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


def tokenizer() -> VQTokenizer:
    torch.manual_seed(0)
    config = TokenizerConfig(
        block_out_channels=(8, 8), latent_channels=4, num_vq_embeddings=K, sample_size=8,
        norm_num_groups=4, mid_block_add_attention=False,
    )  # fmt: skip
    return VQTokenizer(config).eval().requires_grad_(False)


class Colours:
    """An encoder of images alone: the picture itself, tiny. It has no text tower."""

    card = EncoderCard("colours", 12, "c" * 64, 8)

    def encode_images(self, images, batch_size=64):
        small = [np.asarray(x.resize((2, 2)), dtype=np.float32).ravel() / 255 for x in images]
        rows = np.stack(small) + 0.01
        return SimpleNamespace(vectors=rows / np.linalg.norm(rows, axis=1, keepdims=True))


def test_trains_on_a_folder_of_images_alone(tmp_path: Path) -> None:
    """A folder with pictures and nothing else, an encoder without text: enough to train on."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(9):
        Image.fromarray(rng.integers(0, 255, (10, 12, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "damaged.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"skipped .*damaged\.png"):
        record = train(
            folder,
            tmp_path / "out",
            tokenizer(),
            Colours(),
            TINY,
            QUICK,
            versions=2,
            progress=False,
        )
    assert (record["targets"], record["versions"]) == (9, 2)
    assert record["model"]["embed_dim"] == 12
    assert record == json.loads((tmp_path / "out" / "training.json").read_text())
    model = Denoiser.from_folder(tmp_path / "out" / "denoiser")
    assert model.config.grid == (4, 4)
    assert not any("text" in n or "caption" in n for n in model.state_dict())


def test_a_start_gives_its_sizes(tmp_path: Path) -> None:
    start = Denoiser(replace(TINY, depth=3, schedule="mask_replace"))
    run = lambda **options: train(  # noqa: E731
        pairs(), tmp_path, tokenizer(), config=QUICK, start=start, progress=False, **options
    )
    with pytest.raises(ValueError, match=r"start: its sizes .* are not"):
        run(model=TINY)
    assert run()["model"] == start.config.to_dict()


def test_rejects(tmp_path: Path) -> None:
    few = replace(QUICK, condition=ConditionConfig(k=36))
    with pytest.raises(ValueError, match=r"k must be in \[1, 35\], as many .*, got 36"):
        train(pairs(), tmp_path / "a", tokenizer(), None, TINY, few)
    editor = Denoiser(replace(TINY, source=True))
    for given in ({"model": editor.config}, {"start": editor}):
        with pytest.raises(ValueError, match="model: an editor"):
            train(pairs(), tmp_path / "a", tokenizer(), config=QUICK, **given)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="at least two readable images"):
        train(tmp_path / "empty", tmp_path / "a", tokenizer(), Colours(), TINY, QUICK)
    with pytest.raises(ValueError, match="encoder: needed"):
        train(tmp_path / "empty", tmp_path / "a", tokenizer(), None, TINY, QUICK)
    with pytest.raises(ValueError, match="the network's are"):
        denoiser_trainer(DenoiserConfig(), QUICK, pairs())


# ---- the tokenizer's training -------------------------------------------------------------------


def test_fused_norm_is_group_norm() -> None:
    """The training form of GroupNorm + SiLU: value and gradients against FP64."""
    model = VQTokenizer(tokenizer().config)
    norm = model.decoder.conv_norm_out
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x64, w64, b64 = (v.detach().double().requires_grad_() for v in (x, norm.weight, norm.bias))
    want = F.silu(F.group_norm(x64, 4, w64, b64, norm.eps))
    dy = torch.randn_like(x)
    grads = torch.autograd.grad(want, (x64, w64, b64), dy.double())
    fuse_norms(model, True)
    x.requires_grad_()
    got = norm(x)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(got, (x, norm.weight, norm.bias), dy), grads, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-4)
    fuse_norms(model, False)
    torch.testing.assert_close(norm(x).double(), want, atol=1e-5, rtol=1e-5)


def test_kmeans_and_redundant_codes() -> None:
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    rows = centres.repeat(50, 1) + 0.1 * torch.randn(150, 2)
    found = kmeans(rows, 3, 20, torch.Generator().manual_seed(3))
    assert torch.cdist(centres, found).amin(1).max() < 0.2
    book = torch.tensor([[0.0, 0.0], [0.1, 0.0], [5.0, 0.0]])
    assert redundant(book, torch.tensor([1.0, 9.0, 1.0]), 0.5).tolist() == [True, False, False]


def test_more_unused_codes_than_latents() -> None:
    codebook = _Codebook(torch.zeros(9, 2), decay=0.0)
    rows, g = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]), torch.Generator().manual_seed(0)
    nearest = torch.full((3,), 8)
    codebook.follow(rows, nearest, g, thorough=False, revive=True)
    assert {tuple(row) for row in codebook.codes[:3].tolist()} == {(1, 0), (0, 2), (3, 3)}
    assert not codebook.codes[3:8].any()  # their turn comes


def test_tokenizer_goes_on_after_a_kill(tmp_path: Path) -> None:
    """SIGKILL after the second checkpoint, in the middle of a step: the bits of a whole run."""
    code = f"""
import os, signal, torch
import test_training as t
from knnfast.diffusion import tokenizer_training as tt
torch.set_num_threads(1)
save = tt._State.save
def save_then_die(self, step, history):
    save(self, step, history)
    if step == 8:
        tt.augment = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
tt._State.save = save_then_die
t.few_steps({str(tmp_path / "killed")!r})
"""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path}
    died = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    with pytest.raises(ValueError, match=r"was made with lr = 0\.002, now it is 0\.001"):
        few_steps(tmp_path / "killed", lr=1e-3)
    with pytest.raises(ValueError, match="was made with images = '"):
        few_steps(tmp_path / "killed", image_seed=1)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    records = [few_steps(tmp_path / out) for out in ("killed", "whole")]
    torch.set_num_threads(before)
    for a, b in zip(*(r["history"] for r in records), strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    files = [sorted(p.name for p in (tmp_path / o).iterdir()) for o in ("killed", "whole")]
    assert files[0] == files[1]
    assert "state.safetensors" not in files[0]
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_lost_tokenizer_stops(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"the loss is nan .* at step [23]; try a lower"):
        few_steps(tmp_path, lr=1e30)
    assert not (tmp_path / "state.safetensors").exists()


@pytest.mark.parametrize("name", ["steps", "batch", "eval_every"])
def test_tokenizer_rejects(tmp_path: Path, name: str) -> None:
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        train_tokenizer(images, images, tmp_path / "out", tokenizer().config, **{name: 0})
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\^64\), got 18446744073709551616"):
        train_tokenizer(images, images, tmp_path / "out", tokenizer().config, seed=2**64)
    for bad in (images.float() / 255, images[..., :4], images[:0]):
        for pair, which in (((bad, images), "images"), ((images, bad), "held_out")):
            with pytest.raises(ValueError, match=rf"{which}: must be uint8 \[N, 3, 8, 8\], N > 0"):
                train_tokenizer(*pair, tmp_path / "out", tokenizer().config)
    assert not (tmp_path / "out").exists()


def few_steps(out: str | Path, lr: float = 2e-3, image_seed: int = 0, device: str = "cpu") -> dict:
    g = torch.Generator().manual_seed(image_seed)
    images = (torch.rand(8, 3, 8, 8, generator=g) * 255).byte()
    return train_tokenizer(
        images, images, out, tokenizer().config, steps=14, batch=8, warmup=6, lr=lr, eval_every=4,
        device=device, progress=False,
    )  # fmt: skip


@pytest.mark.gpu
def test_cuda_trains_the_tokenizer(tmp_path: Path) -> None:
    """The draws are the host's: before the first code is chosen the losses are the CPU's."""
    cpu, cuda = (few_steps(tmp_path / d, device=d)["history"] for d in ("cpu", "cuda"))
    assert cuda[0]["loss"] == pytest.approx(cpu[0]["loss"], rel=0.05)
    assert np.isfinite([row["psnr_held_out"] for row in cuda]).all()
    VQTokenizer.from_folder(tmp_path / "cuda")


def test_tokenizer_learns(tmp_path: Path) -> None:
    base = torch.rand(8, 3, 1, 1).expand(8, 3, 8, 8)
    images = (base * 255).byte()
    record = train_tokenizer(
        images, images, tmp_path, tokenizer().config, steps=60, batch=16, warmup=15, lr=5e-3,
        augmented=0.0, eval_every=30, progress=False,
    )  # fmt: skip
    history = [row["psnr_held_out"] for row in record["history"]]
    assert history[-1] > history[0] + 1.0
    again = VQTokenizer.from_folder(tmp_path)
    assert again.encode(images.float() / 255).shape == (8, 16)
