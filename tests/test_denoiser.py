"""The denoiser: shapes, switches, its files, and bad input."""

import json
from pathlib import Path

import pytest
import torch

from knnfast.diffusion.denoiser import Denoiser, DenoiserConfig
from knnfast.ops import reference

TINY = DenoiserConfig(
    num_codes=11, grid=(4, 6), width=32, depth=2, heads=2, cross_heads=4, mlp_width=48,
    canvas_width=8, canvas_heads=2, canvas_layers=(1,), code_width=16, embed_dim=12, time_width=16,
    ranks=3, num_steps=10,
)  # fmt: skip


def inputs(batch: int = 3, k: int = 5) -> tuple[torch.Tensor, ...]:
    x_t = torch.randint(12, (batch, 24))
    t = torch.randint(1, 11, (batch,))
    cond = torch.nn.functional.normalize(torch.randn(batch, k + 1, 12), dim=-1)
    mask = torch.rand(batch, k + 1) < 0.7
    mask[:, 0] = True
    return x_t, t, cond, mask


def made() -> Denoiser:
    return Denoiser(TINY).eval().requires_grad_(False)


def test_trunk_and_head() -> None:
    model = made()
    args = inputs()
    rows = model.features(*args)
    assert rows.shape == (3, 24, 16)
    assert torch.equal(model.head(rows), model(*args))
    picked = torch.tensor([[0, 3], [2, 20]])
    some = model.head(rows[picked[:, 0], picked[:, 1]])
    torch.testing.assert_close(some, model(*args)[picked[:, 0], picked[:, 1]])


def test_patches_keep_their_place() -> None:
    """Changing one code changes the input of its own transformer token alone."""
    model = made()
    x_t = torch.zeros(1, 24, dtype=torch.int64)
    base = model.tokens(x_t)
    for row in range(4):
        for col in range(6):
            other = x_t.clone()
            other[0, row * 6 + col] = 5
            moved = (model.tokens(other) - base).abs().amax(-1)[0].nonzero()[:, 0]
            assert moved.tolist() == [(row // 2) * 3 + col // 2]


def test_switched_off_tokens_do_not_matter() -> None:
    model = made()
    x_t, t, cond, mask = inputs()
    garbage = torch.where(mask[..., None], cond, 7.0 * torch.randn_like(cond))
    torch.testing.assert_close(model(x_t, t, cond, mask), model(x_t, t, garbage, mask))


def test_null_condition_is_finite_and_ignores_the_condition() -> None:
    model = made()
    x_t, t, cond, mask = inputs()
    off = torch.zeros_like(mask)
    out = model(x_t, t, cond, off)
    assert out.isfinite().all()
    torch.testing.assert_close(out, model(x_t, t, -cond, off))
    assert (model(x_t, t, cond, mask) - out).abs().max() > 1e-3
    for layer in model.layers:
        x = torch.randn(3, 6, 32)
        nothing = torch.zeros(3, 1, 1)
        tokens = model.read_condition(cond)
        bias = torch.zeros(3, 1, 1, 6)
        assert not layer.cross_attention(x, tokens, bias, nothing).any()


def test_query_and_neighbours_are_told_apart() -> None:
    model = made()
    x_t, t, cond, mask = inputs()
    mask[:] = True
    base = model(x_t, t, cond, mask)
    swapped = cond[:, [1, 0, 2, 3, 4, 5]]
    assert (model(x_t, t, swapped, mask) - base).abs().max() > 1e-3
    late = cond[:, [0, 1, 2, 3, 5, 4]]  # ranks beyond the last known one are a set
    torch.testing.assert_close(model(x_t, t, late, mask), base)


def test_cross_attention_folds() -> None:
    """Its parameters give the folded form of knnfast.ops the same function."""
    model = made().double()
    _, _, cond, mask = inputs()
    mask[0] = False
    layer = model.layers[0]
    x = torch.randn(3, 6, 32, dtype=torch.float64)
    scale, shift = torch.randn(2, 3, 32, dtype=torch.float64)
    tokens = model.read_condition(cond.double())
    some = mask.any(1)
    off = ~(mask | ~some[:, None])
    bias = torch.zeros(3, 6, dtype=torch.float64).masked_fill(off, float("-inf"))
    z = torch.nn.functional.layer_norm(x, (32,)) * (1 + scale[:, None]) + shift[:, None]
    a = layer.cross_attention
    want = x + a(z, tokens, bias[:, None, None], some[:, None, None])
    folded = reference.fold_neighbours(
        tokens, a.to_q.weight, a.to_k.weight, a.to_v.weight, a.to_out.weight,
        a.to_q.bias, a.to_v.bias, a.to_out.bias, heads=4, mask=mask,
    )  # fmt: skip
    got = reference.neighbour_attention(x, folded, scale=scale, shift=shift)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)  # softmax is FP32 in the layer


def test_folded_trunk_is_the_trunk() -> None:
    model = made()
    x_t, t, cond, mask = inputs()
    mask[0] = False
    condition = model.prepare(cond, mask, fold=True)
    torch.testing.assert_close(
        model.features(x_t, t, condition), model.features(x_t, t, cond, mask), atol=2e-5, rtol=2e-5
    )


def test_embeddings_need_their_mask() -> None:
    with pytest.raises(ValueError, match="cond_mask: embeddings need one, got None"):
        made().features(*inputs()[:3])


def test_file_round_trip(tmp_path: Path) -> None:
    model = made()
    model.save(tmp_path, torch.float32)
    again = Denoiser.from_folder(tmp_path)
    assert again.config == TINY
    args = inputs()
    assert torch.equal(again(*args), model(*args))
    model.save(tmp_path)
    half = Denoiser.from_folder(tmp_path)
    torch.testing.assert_close(half(*args), model(*args), atol=0.02, rtol=0.02)


def test_default_fits_the_bundle() -> None:
    parameters = sum(p.numel() for p in Denoiser(DenoiserConfig()).parameters())
    assert parameters <= 7_500_000


def test_rejects(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a multiple of heads"):
        DenoiserConfig(width=30)
    with pytest.raises(ValueError, match="not a multiple of patch"):
        DenoiserConfig(grid=(5, 4))
    with pytest.raises(ValueError, match="canvas_layers"):
        DenoiserConfig(canvas_layers=(9,))
    made().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for bad, message in [
        (
            {**config, "colour": 1},
            r"config\.json: unknown settings \['colour'\]; DenoiserConfig has num_codes",
        ),
        ({**config, "num_codes": 12}, "another architecture"),
        ({**config, "width": 2**20, "mlp_width": 2**20}, "another architecture"),
        ({**config, "depth": 10**9}, r"config\.json: depth must be at most 1,000, got 1"),
        ({**config, "num_steps": 10**10}, r"config\.json: num_steps must be at most 1,048,576"),
        (3, "expected a JSON object"),
        *(
            ({**config, name: bad}, rf"config\.json: {name} must be (at least 1|int), got {bad}")
            for name in ("heads", "cross_heads", "patch", "num_codes", "embed_dim", "num_steps")
            for bad in (0, None)
        ),
        ({**config, "grid": [4]}, r"config\.json: grid must be rows and columns, got \(4,\)"),
        ({**config, "schedule": "linear"}, r"config\.json: schedule must be one of"),
        ({**config, "source": 1}, r"config\.json: source must be bool, got 1"),
        ({**config, "depth": True}, r"config\.json: depth must be int, got True"),
        ({**config, "time_width": 15}, r"config\.json: time_width must be even, got 15"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=message):
            Denoiser.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ValueError, match="safetensors"):
        Denoiser.from_folder(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="no such file"):
        Denoiser.from_folder(tmp_path)
