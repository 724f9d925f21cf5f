"""The drop-in scheduler and attention processor against diffusers' own."""

import numpy as np
import pytest
import torch
from scipy import stats

diffusers = pytest.importorskip("diffusers")

from diffusers.models.attention_processor import Attention, AttnProcessor2_0  # noqa: E402

from knnfast.diffusion.schedule import Schedule  # noqa: E402
from knnfast.diffusion.scheduler import NeighbourAttnProcessor, VQDiffusionScheduler  # noqa: E402

# CPU machines carry a torchvision whose image extension does not load (requirements/clip-cpu.txt).
pytestmark = pytest.mark.filterwarnings("ignore:Failed to load image:UserWarning")


def test_same_configuration_and_interface():
    ours = VQDiffusionScheduler(num_vec_classes=9, num_train_timesteps=50)
    theirs = diffusers.VQDiffusionScheduler.from_config(ours.config)
    again = VQDiffusionScheduler.from_config(theirs.config)
    assert again.config["num_train_timesteps"] == 50
    assert again.mask_class == theirs.mask_class == 8
    assert torch.equal(again.timesteps, theirs.timesteps)
    x = torch.full((1, 4), 8)
    out = again.step(torch.zeros(1, 8, 4), 49, x)
    assert out.prev_sample.shape == (1, 4)
    assert again.step(torch.zeros(1, 8, 4), 49, x, return_dict=False)[0].dtype == torch.int64


def test_rounding_replaces_no_code():
    """Where alpha + gamma = 1 a decided code stays, whatever rounding leaves of the difference."""
    ours = VQDiffusionScheduler(
        9, 100, alpha_cum_start=0.99, alpha_cum_end=0.01, gamma_cum_start=0.01, gamma_cum_end=0.99
    )
    assert not ours._schedule.B.any()
    x = torch.randint(0, 8, (4, 64))
    for t in ours.timesteps:
        assert torch.equal(ours.step(torch.randn(4, 8, 64), t, x).prev_sample, x)


def test_one_step_draws_from_their_posterior(seed):
    K, L, t = 4, 400_000, 30
    ours, theirs = VQDiffusionScheduler(K + 1), diffusers.VQDiffusionScheduler(K + 1)
    logp = torch.log_softmax(torch.randn(1, K, 1) * 2, 1)
    for x_t in (K, 1):
        x = torch.full((1, 1), x_t)
        p = theirs.q_posterior(logp, x, torch.tensor(t)).exp()[0, :, 0].double().numpy()
        got = ours.step(
            logp.expand(1, K, L), t, x.expand(1, L).contiguous(),
            generator=torch.Generator().manual_seed(seed),
        ).prev_sample  # fmt: skip
        counts = np.bincount(got[0], minlength=K + 1)
        keep = p * L > 5
        chi = ((counts - p * L) ** 2 / np.maximum(p * L, 1e-9))[keep].sum()
        assert counts[~keep].sum() < 40
        if keep.sum() > 1:
            assert chi < stats.chi2.isf(1e-6, keep.sum() - 1) + 1e-3 * L * 3e-5


@pytest.mark.parametrize("n", [1, 4, 7, 25, 100])
def test_strided_steps_visit_the_whole_chain(n):
    """Half way down the list half of the tokens are unmasked; diffusers starts near the end."""
    K, L = 8, 20_000
    ours = VQDiffusionScheduler(K + 1)
    ours.set_timesteps(n)
    assert len(ours.timesteps) == n
    assert [*(ours.timesteps + 1).tolist(), 0] == Schedule("mask", 100, K).levels(n)
    x = torch.full((1, L), K)
    generator = torch.Generator().manual_seed(0)
    for i, t in enumerate(ours.timesteps):
        share = float((x == K).double().mean())
        assert share == pytest.approx((int(t) + 1) / 100, abs=0.03)
        assert i > 0 or share == 1.0
        x = ours.step(torch.zeros(1, K, L), t, x, generator=generator).prev_sample
    assert int(x.max()) < K
    with pytest.raises(ValueError, match="timestep"):
        ours.step(torch.zeros(1, K, L), 100, x)
    ours.set_timesteps(timesteps=[99, 10, 3])
    assert ours.timesteps.tolist() == [99, 10, 3]
    for wrong in ([3, 10], [], [100, 0], [3, -1]):
        with pytest.raises(ValueError, match="timesteps: must fall"):
            ours.set_timesteps(timesteps=wrong)
    assert ours.timesteps.tolist() == [99, 10, 3]
    for wrong in (0, 101, None):
        with pytest.raises(ValueError, match=r"num_inference_steps: must be in \[1, 100\], got"):
            ours.set_timesteps(wrong)


def unet():
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1,
        block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=24,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


def test_processor_equals_diffusers_in_a_unet():
    model = unet()
    x, cond = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 24)
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    with torch.no_grad():
        expected = [
            model(x, 5, cond).sample, model(x, 5, cond, encoder_attention_mask=mask).sample
        ]  # fmt: skip
        processors = {name: NeighbourAttnProcessor() for name in model.attn_processors}
        model.set_attn_processor(dict(processors))
        for _ in range(2):  # the second time from the kept folds
            torch.testing.assert_close(model(x, 5, cond).sample, expected[0], rtol=1e-4, atol=1e-5)
        kept = {name: p._kept.folded for name, p in processors.items() if p._kept is not None}
        assert kept
        model(x, 9, cond)
        assert all(processors[name]._kept.folded is folded for name, folded in kept.items())
        got = model(x, 5, cond, encoder_attention_mask=mask).sample
        torch.testing.assert_close(got, expected[1], rtol=1e-4, atol=1e-5)
        cond.mul_(2.0)  # a changed condition is folded anew
        assert not torch.allclose(model(x, 5, cond).sample, expected[0], atol=1e-3)


def attention():
    """A cross-attention of diffusers, tokens for it, and a condition."""
    layer = unet().down_blocks[0].attentions[0].transformer_blocks[0].attn2
    layer.set_processor(NeighbourAttnProcessor())
    return layer.requires_grad_(False), torch.randn(2, 5, 32), torch.randn(2, 3, 24)


def anew(layer, x, cond, mask=None):
    """What a processor gives that has kept nothing."""
    return NeighbourAttnProcessor()(layer, x, cond, mask)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True},
        {"norm_num_groups": 4},
        {"cross_attention_norm": "layer_norm"},
        {"cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 3},
        {"residual_connection": True},
        {"rescale_output_factor": 2.5},
        {
            "bias": True, "norm_num_groups": 8, "cross_attention_norm": "layer_norm",
            "residual_connection": True, "rescale_output_factor": 0.5,
        },
    ],
    ids=lambda options: "-".join(options) or "plain",
)  # fmt: skip
@pytest.mark.parametrize("shape", [(2, 15, 32), (2, 32, 3, 5)])
def test_processor_equals_diffusers(shape, options):
    layer = Attention(32, cross_attention_dim=24, heads=4, dim_head=8, **options).eval()
    for p in layer.parameters():
        p.copy_(torch.randn_like(p) * 0.3)
    x, cond = torch.randn(shape), torch.randn(2, 3, 24)
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    bias = torch.where(mask, 0.0, -10000.0)[:, None]
    theirs = AttnProcessor2_0()
    layer.set_processor(NeighbourAttnProcessor())
    for given, ours in (
        (None, {}), (bias, {"attention_mask": bias}), (bias, {"neighbour_mask": mask}),
    ):  # fmt: skip
        expected = theirs(layer, x, cond, given)
        for _ in range(2):  # the second time from the kept fold
            torch.testing.assert_close(layer(x, cond, **ours), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_processor_rejects():
    layer, x, cond = attention()
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="neighbour_mask: is the mask of the condition"):
        layer(x, cond, attention_mask=torch.zeros(2, 1, 3), neighbour_mask=mask)
    with pytest.raises(ValueError, match="mask: shape"):
        layer(x, cond, neighbour_mask=mask[:, 1:])
    for name in ("spatial_norm", "norm_q", "norm_k"):
        before = getattr(layer, name)
        setattr(layer, name, torch.nn.Identity())
        with pytest.raises(ValueError, match=f"attn: {name} is not supported"):
            layer(x, cond)
        setattr(layer, name, before)
    layer(x, cond)


@torch.no_grad()
def test_processor_folds_anew_under_another_autocast():
    layer, x, cond = attention()
    for dtype in (None, torch.bfloat16, torch.float16, None):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            kept = layer(x, cond)
            assert torch.equal(kept, anew(layer, x, cond))
            assert kept.dtype == (dtype or torch.float32)


@torch.no_grad()
def test_processor_sees_changes_in_place():
    layer, x, cond = attention()
    bias = torch.tensor([[[0.0, 0.0, -10000.0]], [[0.0, -10000.0, 0.0]]])
    first = layer(x, cond, attention_mask=bias)
    old = bias.clone()
    bias[:, :, 1:] = bias[:, :, 1:].flip(-1)
    # a new mask of the values that the kept one has now, then the changed one itself
    for mask in (bias.clone(), bias):
        assert torch.equal(layer(x, cond, attention_mask=mask), anew(layer, x, cond, bias))
        assert torch.equal(layer(x, cond, attention_mask=old), first)
    changed = layer(x, cond, attention_mask=bias)
    bias.copy_(old)
    assert torch.equal(layer(x, cond, attention_mask=bias), first)
    assert not torch.equal(changed, first)
    layer.to_v.weight.data.mul_(2.0)  # as an EMA's copy_to: nothing tells
    layer.processor.reset()
    assert torch.equal(layer(x, cond, attention_mask=bias), anew(layer, x, cond, bias))


def test_processor_in_inference_mode():
    layer, x, cond = attention()
    with torch.inference_mode():
        assert torch.equal(layer(x, cond), anew(layer, x, cond))
        assert layer.processor._kept is not None  # the condition is a usual tensor
        cond = cond * 2
        for factor in (1.0, 3.0):
            cond.mul_(factor)
            assert torch.equal(layer(x, cond), anew(layer, x, cond))


@torch.no_grad()
def test_threads_share_a_processor(monkeypatch):
    layer, x, cond = attention()
    bias, equal = torch.zeros(2, 1, 3), torch.equal
    expected = layer(x, cond, attention_mask=bias)

    def between(a, b):
        monkeypatch.undo()
        layer(x, -cond)  # another thread's call, while this one compares masks
        return equal(a, b)

    monkeypatch.setattr(torch, "equal", between)
    got = layer(x, cond, attention_mask=bias.clone())
    assert torch.equal is equal
    assert equal(got, expected)


def test_processor_trains():
    results = []
    for ours in (False, True):
        torch.manual_seed(0)
        model = unet()
        if ours:
            model.set_attn_processor({n: NeighbourAttnProcessor() for n in model.attn_processors})
        model(torch.ones(1, 3, 8, 8), 5, torch.ones(1, 3, 24)).sample.square().mean().backward()
        results.append({n: p.grad for n, p in model.named_parameters() if "attn2" in n})
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad, rtol=1e-3, atol=1e-6)
