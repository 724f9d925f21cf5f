"""Training an editor: alignment, regions, manipulated pictures, windows, the copying gate."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from knnfast.diffusion.denoiser import Denoiser, DenoiserConfig
from knnfast.diffusion.edit_data import encode_edits
from knnfast.diffusion.editing import (
    EditConfig,
    EditObjective,
    EditPairs,
    EditSampler,
    align,
    editor_from,
    make_edit_pairs,
    nearest_others,
    regions,
    train_editor,
)
from knnfast.diffusion.tokenizer import TokenizerConfig, VQTokenizer
from knnfast.diffusion.trainer import TrainConfig
from knnfast.encoders import EncoderCard

SIZE, K, E = 32, 11, 12
PLAIN = DenoiserConfig(
    num_codes=K, grid=(16, 16), patch=4, width=32, depth=2, heads=2, cross_heads=4, mlp_width=48,
    canvas_width=8, canvas_heads=2, canvas_layers=(0,), code_width=16, embed_dim=E, time_width=16,
    ranks=3, num_steps=10,
)  # fmt: skip


class MeanColour:
    """An encoder: four quadrants' mean colours, as far as they are not white."""

    card = EncoderCard("mean", E, "ab" * 32, SIZE)

    def encode_images(self, images: list[Image.Image], batch_size: int = 64) -> SimpleNamespace:
        x = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images])
        rows = F.adaptive_avg_pool2d(x.float() - 255, 2).flatten(1)
        return SimpleNamespace(vectors=F.normalize(rows + 1e-3, dim=1).numpy())


def tokenizer() -> VQTokenizer:
    torch.manual_seed(0)
    cfg = TokenizerConfig(
        block_out_channels=(8, 8), latent_channels=4, vq_embed_dim=4, num_vq_embeddings=K,
        sample_size=SIZE, norm_num_groups=4, mid_block_add_attention=False,
    )  # fmt: skip
    return VQTokenizer(cfg).eval().requires_grad_(False)


def pictures(count: int = 12) -> torch.Tensor:
    """Coloured blobs on white, at different places."""
    g = torch.Generator().manual_seed(1)
    place = torch.arange(SIZE).float()
    out = torch.full((count, 3, SIZE, SIZE), 255.0)
    for i in range(count):
        y, x = (10 + 12 * torch.rand(2, generator=g)).tolist()
        inside = (place[:, None] - y) ** 2 + ((place[None] - x) * 1.3) ** 2 < 49
        out[i][:, inside] = (torch.rand(3, 1, generator=g) * 200).expand(3, int(inside.sum()))
    return out.byte()


@pytest.fixture(scope="module")
def made() -> tuple[EditPairs, VQTokenizer]:
    pytest.importorskip("cv2")
    tok = tokenizer()
    pairs, share = make_edit_pairs(pictures(), MeanColour(), tok, versions=2, neighbours=2)
    assert 0 < share <= 1
    return pairs, tok


def textured(shift: int) -> np.ndarray:
    y, x = np.mgrid[:64, :64].astype(np.float64)
    blob = np.exp(-(((y - 30) / 9) ** 2) - ((x - 30 - shift) / 14) ** 2)
    ring = np.exp(-((np.hypot(y - 36, x - 34 - shift) - 18) ** 2) / 6)
    return np.repeat((255 - 120 * blob - 90 * ring)[..., None], 3, 2).astype(np.uint8)


def test_align_undoes_a_shift() -> None:
    pytest.importorskip("cv2")
    fixed, moved = textured(0), textured(4)
    back, found = align(moved, fixed)
    assert found
    before, after = (np.abs(x.astype(int) - fixed).mean() for x in (moved, back))
    assert after < 0.15 * before


def test_align_keeps_what_cannot_be_aligned() -> None:
    pytest.importorskip("cv2")
    flat = np.full((64, 64, 3), 200, np.uint8)
    back, found = align(flat, textured(0))
    assert not found
    np.testing.assert_array_equal(back, flat)


@pytest.mark.parametrize("size", [12, 24, 40, 64, 72])
def test_regions_lie_where_pictures_differ(size: int) -> None:
    g = torch.Generator().manual_seed(0)
    difference = torch.zeros(300, size, size)
    rows, columns = slice(size // 8, size // 4), slice(5 * size // 8, 3 * size // 4)
    difference[:, rows, columns] = 1.0
    m = regions(difference, 0.1, 0.3, g)
    assert m.shape == (300, 1, size, size)
    assert ((m >= 0) & (m <= 1)).all()
    assert (m[:, 0, rows, columns].amax((1, 2)) > 0.8).float().mean() > 0.95
    area = m.mean((1, 2, 3))
    assert float(area.min()) > 0.01
    assert float(area.max()) < 0.4


def test_aligned_neighbours_share_their_pictures_changes(made) -> None:
    """In every version an image and its neighbours are augmented in one way."""
    pairs, _ = made
    alone = pictures()
    pairs_again, _ = make_edit_pairs(alone, MeanColour(), tokenizer(), versions=2, neighbours=2)
    for name in ("images", "aligned", "codes"):
        assert torch.equal(getattr(pairs, name), getattr(pairs_again, name))
    white = (pairs.images[1] == 255).all(1).float().mean((1, 2))
    lent = (pairs.aligned[1, 0] == 255).all(1).float().mean((1, 2))
    assert (white > 0.2).all()
    assert (lent > 0.2).all()


def test_only_codes_around_the_region_are_manipulated(made) -> None:
    pairs, tok = made
    base = {
        "k": 3, "original": 1.0, "whole": 0.0, "same": 0.0, "hidden": 0.0, "blank": 0.0,
        "local": 1.0, "most": 0.15, "least": 0.1,
    }  # fmt: skip

    def drawn(**changes):
        sampler = EditSampler(pairs, EditConfig(**{**base, **changes}), MeanColour(), tok)
        return sampler.draw(64, torch.Generator().manual_seed(3))

    codes, cond, mask, source, window = drawn()
    assert (cond.shape, mask.shape) == ((64, 4, E), (64, 4))
    differ = source != codes
    assert differ.any()
    assert not (differ & ~window).any()
    assert not window.all(1).any()
    codes, *_, source, window = drawn(same=1.0, local=0.0)
    assert torch.equal(source, codes)
    assert window.all()
    *_, source, window = drawn(hidden=1.0)
    assert (source == K).any(1).all()
    assert not ((source == K) & ~window).any()
    assert (drawn(blank=1.0)[3] == K).all()
    codes, *_, source, window = drawn(whole=1.0)
    assert window.all()
    flat = pairs.aligned[0].flatten(0, 1).float() / 255
    lent = {tuple(row) for row in tok.encode(flat).tolist()}
    assert all(tuple(row) in lent for row in source.tolist())


def test_the_loss_sees_the_window_alone(made) -> None:
    net = Denoiser(replace(PLAIN, source=True))
    objective = EditObjective(net, 0.0)
    x0 = torch.randint(K, (4, 256))
    window = torch.zeros(4, 256, dtype=torch.bool)
    window[:, :64] = True
    noise = objective.noise(x0, torch.Generator().manual_seed(0))
    cond, mask = torch.zeros(4, 4, E), torch.zeros(4, 4, dtype=torch.bool)
    t = torch.tensor([10, 10, 4, 1])
    x_t, level, read = objective.corrupted(x0, t, noise, (cond, mask, x0, window))
    assert len(read) == 3
    assert torch.equal(x_t[:, 64:], x0[:, 64:])
    assert (x_t[:2, :64] == K).all()  # level T masks all of the window
    assert level.tolist() == [3, 3, 1, 1]  # a quarter of the picture


def test_a_new_editor_is_its_denoiser() -> None:
    torch.manual_seed(0)
    plain = Denoiser(PLAIN).eval()
    editor = editor_from(plain, gate=0.0).eval()
    x_t, t = torch.randint(K + 1, (2, 256)), torch.tensor([3, 9])
    cond, mask = torch.randn(2, 4, E), torch.ones(2, 4, dtype=torch.bool)
    source = torch.randint(K + 1, (2, 256))
    with torch.no_grad():
        torch.testing.assert_close(editor(x_t, t, cond, mask, source), plain(x_t, t, cond, mask))
        favoured = editor_from(plain, gate=6.0)(x_t, t, cond, mask, source)
        gain = favoured - plain(x_t, t, cond, mask)
    known = source < K
    own = gain.gather(2, source.clamp_max(K - 1)[..., None])[..., 0]
    torch.testing.assert_close(own[known], torch.full_like(own[known], 6.0), atol=1e-4, rtol=0)
    assert not gain[~known].any()
    with pytest.raises(ValueError, match="no editor"):
        plain.prepare(cond, mask, source=source)
    with pytest.raises(ValueError, match="needs"):
        editor.prepare(cond, mask)


def test_training_learns_resumes_and_saves(made, tmp_path: Path) -> None:
    pairs, tok = made
    config = TrainConfig(
        steps=4, batch=8, group=8, warmup=1, checkpoint_every=2, log_every=2, bf16=False, lr=1e-3,
        condition=EditConfig(k=3, semantic=6),
    )  # fmt: skip
    start = editor_from(Denoiser(replace(PLAIN, num_steps=2)))

    def run(folder: str, steps: int) -> Denoiser:
        settings = TrainConfig(**{**vars(config), "steps": steps, "decay": 0.0})
        train_editor(pairs, tmp_path / folder, start, MeanColour(), tok, settings, progress=False)
        return Denoiser.from_folder(tmp_path / folder / "denoiser")

    whole = run("whole", 4)
    run("parts", 2)
    parts = run("parts", 4)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    assert whole.config.source
    assert whole.source_in.weight.any()
    with Image.open(tmp_path / "whole" / "grids" / "000004.png") as picture:
        assert picture.size == (8 * SIZE, 4 * SIZE)
    with pytest.raises(TypeError, match="EditConfig"):
        train_editor(pairs, tmp_path / "x", start, MeanColour(), tok, TrainConfig())
    replacing = Denoiser(replace(start.config, schedule="mask_replace"))
    with pytest.raises(ValueError, match="an editor needs 'mask'"):
        train_editor(pairs, tmp_path / "x", replacing, MeanColour(), tok, config)
    with pytest.raises(ValueError, match="an editor needs 'mask'"):
        editor_from(Denoiser(replace(PLAIN, schedule="vq_diffusion")))


def test_near_duplicates_are_no_neighbours() -> None:
    """However many there are: what is taken from them changes nothing."""
    g = np.random.default_rng(0)
    rows = g.normal(size=(60, E)).astype(np.float32)
    rows[:50] = rows[0] + 0.05 * rows[:50]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    near = nearest_others(rows, 3)
    assert (nearest_others(rows, 3, near=2.0)[:, 0] == np.arange(60)).all()
    scores = rows @ rows.T
    scores[scores >= 0.95] = -2
    np.testing.assert_array_equal(near, np.argsort(-scores, axis=1, kind="stable")[:, :3])
    with pytest.raises(ValueError, match="picture 0 has fewer than 11 that are no near-dup"):
        nearest_others(rows, 11)


def test_originals_are_embedded_as_in_a_database(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    (tmp_path / "wide").mkdir()
    large = F.interpolate(pictures().float(), (2 * SIZE, 3 * SIZE)).byte()
    originals = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in large]
    for i, image in enumerate(originals):
        image.save(tmp_path / "wide" / f"{i:02d}.png")
    made = encode_edits(tmp_path / "wide", tmp_path / "out", MeanColour(), tokenizer(), 2, 0)
    wanted = MeanColour().encode_images(originals).vectors
    np.testing.assert_allclose(made.embeddings[0], wanted, atol=1e-3)


def test_without_opencv_nothing_is_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    for call in (
        lambda: encode_edits(tmp_path / "none", tmp_path / "out", MeanColour(), tokenizer(), 2, 0),
        lambda: make_edit_pairs(pictures(), MeanColour(), tokenizer()),
    ):
        with pytest.raises(ImportError, match=r"needs OpenCV .* pip install '\.\[edit\]'"):
            call()
    assert not (tmp_path / "out").exists()


def test_make_edit_pairs_rejects() -> None:
    with pytest.raises(ValueError, match="neighbours"):
        make_edit_pairs(pictures(3), MeanColour(), tokenizer(), neighbours=3)
