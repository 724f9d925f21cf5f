"""The continuous backbone: its equations, sampling, files, and the pipeline with it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy import stats
from test_training import tokenizer
from torch.utils._pytree import tree_leaves
from transition_helpers import NoHostReads

pytest.importorskip("diffusers")

from knnfast import KNNDiffusion, ops
from knnfast.diffusion.denoiser import Denoiser, DenoiserConfig
from knnfast.diffusion.pairs import ConditionConfig, Pairs
from knnfast.diffusion.trainer import STATE_FILE, TrainConfig
from knnfast.diffusion.training import train
from knnfast.diffusion.unet import UNetConfig, UNetDenoiser, initial_noise
from knnfast.diffusion.unet_training import VelocityObjective, begin, unet_trainer

# CPU machines carry a torchvision whose image extension does not load (requirements/clip-cpu.txt).
pytestmark = pytest.mark.filterwarnings("ignore:Failed to load image:UserWarning")

TINY = UNetConfig(
    num_codes=11, grid=(4, 4), code_dim=3, embed_dim=12, widths=(8, 16), groups=4, heads=2,
    cond_width=8, ranks=2, num_steps=50,
)  # fmt: skip


def made(config=TINY, seed=0):
    torch.manual_seed(seed)
    net = UNetDenoiser(config)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    net.set_codebook(torch.randn(config.num_codes, config.code_dim), torch.ones(config.num_codes))
    return net.eval().requires_grad_(False)


def condition(count=3, k=2):
    return F.normalize(torch.randn(count, k + 1, TINY.embed_dim), dim=-1), torch.ones(
        count, k + 1, dtype=torch.bool
    )


# ---- the network --------------------------------------------------------------------------------


def test_begins_as_the_optimal_v_of_a_gaussian():
    """With the U-Net at zero, v is E[alpha eps - sigma x_0 | x_t] for x_0 ~ N(m, s^2)."""
    net = made()
    for p in net.unet.parameters():
        p.zero_()
    cond, mask = condition(1, 0)  # one embedding: m is its painting
    t = torch.tensor([20])
    x_t = torch.randn(1, 3, 4, 4)
    alpha, sigma = float(net.alpha[20]), float(net.sigma[20])
    m = net.prepare(cond, mask).paintings[:, 0].double()
    s2 = float(net.log_spread.exp())
    # the joint normal of (x_0, x_t): regress each of eps and x_0 on x_t
    variance = alpha**2 * s2 + sigma**2
    x0 = m + alpha * s2 / variance * (x_t - alpha * m)
    eps = sigma / variance * (x_t - alpha * m)
    torch.testing.assert_close(
        net(x_t, t, cond, mask).double(), alpha * eps - sigma * x0, atol=1e-5, rtol=1e-5
    )
    nothing = net(x_t, t, cond, torch.zeros_like(mask))
    assert torch.equal(nothing, torch.zeros_like(nothing))


def test_the_mean_is_the_posterior_over_paintings():
    net = made()
    net.log_trust.fill_(5.0)
    cond, mask = condition(2, 2)
    mask[1, 2] = False
    prepared = net.prepare(cond, mask)
    guesses = prepared.paintings
    alpha, total = torch.tensor(0.9).view(1, 1, 1, 1), torch.full((2, 1, 1, 1), 0.3)
    painted = net._mix(0.9 * guesses[:, 1] + 0.01, alpha, total, prepared)
    torch.testing.assert_close(painted, prepared.paintings[:, 1], atol=1e-3, rtol=1e-3)
    away = net._mix(0.9 * guesses[:, 2], alpha, total, prepared)
    torch.testing.assert_close(away[0], prepared.paintings[0, 2], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(away[1], prepared.paintings[1, 2], atol=0.1)  # it is off


def test_pure_noise_is_given_to_the_neighbour_nearest_to_the_query():
    net = made()
    cond, mask = condition(3, 2)
    cond[:, 2] = F.normalize(cond[:, 0] + 0.1 * cond[:, 1], dim=-1)  # nearer than the first
    mask[1, 0] = False
    mask[2] = False
    prior = net.prepare(cond, mask).prior
    cosine = (cond[0] * cond[0, :1]).sum(-1) * TINY.affinity
    torch.testing.assert_close(prior[0], torch.stack([cosine[2], cosine[1], cosine[2]]))
    assert prior[1, 0] == 0  # off; the first neighbour stands for it
    assert float(prior[1, 1]) == pytest.approx(TINY.affinity, rel=1e-6)
    assert not prior[2].any()
    x_T, alpha, total = torch.randn(3, 3, 4, 4), torch.zeros(1, 1, 1, 1), torch.ones(3, 1, 1, 1)
    painted = net._mix(x_T, alpha, total, net.prepare(cond, mask))
    shares = prior[0].softmax(0)
    want = torch.einsum("k,kchw->chw", shares, net.prepare(cond, mask).paintings[0])
    torch.testing.assert_close(painted[0], want)
    assert shares[1] < shares[2]


def test_conditions_reach_the_output_and_masked_ones_do_not():
    net = made()
    x_t, t = torch.randn(3, 3, 4, 4), torch.tensor([3, 20, 45])
    cond, mask = condition()
    mask[:, 2] = False
    base = net(x_t, t, cond, mask)
    for place, reaches in ((0, True), (1, True), (2, False)):
        other = cond.clone()
        other[:, place] = F.normalize(torch.randn(3, TINY.embed_dim), dim=-1)
        assert torch.allclose(net(x_t, t, other, mask), base, atol=1e-6) != reaches
    off = torch.zeros_like(mask)
    a, b = (net(x_t, t, c, off) for c in (cond, torch.randn_like(cond)))
    torch.testing.assert_close(a, b)
    assert a.isfinite().all()


def test_code_vectors():
    net = made()
    codes = torch.randint(11, (5, 16))
    assert torch.equal(net.nearest(net.vectors(codes)), codes)
    counts = torch.tensor([5.0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2])
    net.set_codebook(torch.randn(11, 3) * 7 + 2, counts)
    used = net.codebook.repeat_interleave(counts.long(), 0)
    torch.testing.assert_close(used.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    assert used.square().mean() == pytest.approx(1.0, abs=1e-5)


# ---- sampling -----------------------------------------------------------------------------------


def test_noise_is_normal_and_belongs_to_the_image():
    x = initial_noise((3, 20, 20), 7, torch.arange(50))
    assert stats.kstest(x.flatten().numpy(), "norm").pvalue > 1e-3
    apart = initial_noise((3, 20, 20), 7, torch.tensor([49, 3]))
    assert torch.equal(apart, x[[49, 3]])
    assert not torch.equal(initial_noise((3, 20, 20), 8, torch.tensor([3]))[0], x[3])
    assert initial_noise((4,), 2**64 - 1, torch.arange(1)).isfinite().all()
    with pytest.raises(ValueError, match="seed"):
        initial_noise((4,), -1, torch.arange(1))


@pytest.mark.parametrize("solver", ["dpm", "ddim"])
def test_solvers_reach_the_data(solver):
    """The exact v of a single picture leads to that picture, whatever the solver and the steps."""
    net = made()
    codes = torch.randint(11, (1, 16))
    clean = net.vectors(codes)

    def exact(x_t, t, *_):
        alpha, sigma = (v[t].view(-1, 1, 1, 1) for v in (net.alpha, net.sigma))
        return (alpha * x_t - clean) / sigma

    net.forward = exact
    for steps in (1, 5, 50):
        assert torch.equal(net.sample(*condition(1), steps=steps, solver=solver), codes)


@pytest.mark.parametrize("solver", ["dpm", "ddim"])
def test_levels_of_any_number_of_steps(solver):
    net = made()
    told, seen = [], []

    def forward(x_t, t, *_):
        seen.append(int(t[0]))
        return torch.zeros_like(x_t)

    net.forward = forward
    for steps in range(1, 51):
        told.clear(), seen.clear()
        net.sample(*condition(1), steps=steps, solver=solver, callback=lambda *a: told.append(a))
        assert told == [(n, steps) for n in range(1, steps + 1)]
        assert seen == [round(50 * n / steps) - 1 for n in range(steps, 0, -1)]


def test_ddim_steps_to_the_next_level():
    net = made()
    noise = initial_noise((3, 4, 4), 5, torch.arange(1)).double()
    net.forward = lambda x_t, t, *_: 0.3 * x_t
    alpha, sigma = net.alpha.double(), net.sigma.double()
    levels, x = [49, 36, 24, 11], noise  # of 4 steps
    for t, after in zip(levels, [*levels[1:], None], strict=True):
        x0 = alpha[t] * x - sigma[t] * 0.3 * x
        eps = alpha[t] * 0.3 * x + sigma[t] * x
        x = x0 if after is None else alpha[after] * x0 + sigma[after] * eps
    (*_, got) = net._run(noise.float(), condition(1), 4, 1.0, "ddim")
    torch.testing.assert_close(got.double(), x, atol=1e-4, rtol=1e-4)


def test_an_image_does_not_depend_on_its_batch():
    net = made()
    cond, mask = condition(4)
    together = net.sample(cond, mask, steps=4, seed=5, image_indices=torch.tensor([0, 1, 2, 3]))
    apart = net.sample(cond[2:3], mask[2:3], steps=4, seed=5, image_indices=torch.tensor([2]))
    assert torch.equal(together[2:3], apart)
    assert not torch.equal(net.sample(cond, mask, steps=4, seed=6), together)
    assert together.dtype == torch.int64
    assert 0 <= together.min() <= together.max() < 11
    for where in ("cpu", "meta"):
        none = net.to(where).sample(cond[:0].to(where), mask[:0].to(where), steps=2)
        assert none.shape == (0, 16)
        assert none.device.type == where


class NoDeviceReads(NoHostReads):
    """The same for a device with a host beside it, which may read its own tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(torch.is_tensor(v) and v.device.type != "cpu" for v in tree_leaves((args, kwargs))):
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", ["dpm", "ddim"])
def test_nothing_waits_for_the_device(solver, monkeypatch):
    """A run on tensors without values: none is read, and each condition is folded once."""
    folds = []
    fold = ops.fold_neighbours
    monkeypatch.setattr(ops, "fold_neighbours", lambda *a, **kw: folds.append(0) or fold(*a, **kw))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # knows no meta
    net = made().to("meta")
    cond, mask = (v.to("meta") for v in condition(2))
    with NoDeviceReads({"meta", "cpu"}):
        codes = net.sample(cond, mask, steps=4, solver=solver)
    assert codes.shape == (2, 16)
    assert len(folds) == sum("attn2" in name for name in net.unet.attn_processors)


def test_inference_mode(pipe, monkeypatch):
    """The same codes as without, each condition folded once; and a whole pipeline call."""
    folds = []
    fold = ops.fold_neighbours
    monkeypatch.setattr(ops, "fold_neighbours", lambda *a, **kw: folds.append(0) or fold(*a, **kw))
    net = made()
    cond, mask = condition(1)
    with torch.inference_mode():
        got = net.sample(cond * 1.0, mask & True, steps=4)
    assert len(folds) == sum("attn2" in name for name in net.unet.attn_processors)
    assert torch.equal(got, net.sample(cond, mask, steps=4))
    with torch.inference_mode():
        images = pipe("pizza", steps=2, seed=3).images
    wanted = pipe("pizza", steps=2, seed=3).images
    np.testing.assert_array_equal(np.asarray(images[0]), np.asarray(wanted[0]))


def test_a_changed_mask_is_folded_anew():
    net = made()
    cond, mask = condition(2)
    prepared = net.prepare(cond, mask)
    x_t, t = torch.randn(2, 3, 4, 4), torch.tensor([3, 20])
    before = net(x_t, t, prepared)
    mask[:, 1] = False
    changed = net(x_t, t, prepared)
    assert not torch.equal(changed, before)
    kinds = {name: type(p)() for name, p in net.unet.attn_processors.items()}
    net.unet.set_attn_processor(kinds)  # nothing kept
    assert torch.equal(net(x_t, t, prepared), changed)


def test_guidance():
    net = made()
    cond, mask = condition(2)
    one, null = (
        net.sample(cond, m, steps=3, guidance=1.0, seed=1) for m in (mask, torch.zeros_like(mask))
    )
    assert torch.equal(net.sample(cond, mask, steps=3, guidance=0.0, seed=1), null)
    assert not torch.equal(one, null)
    assert not torch.equal(net.sample(cond, mask, steps=3, guidance=4.0, seed=1), one)
    seen = []
    net.sample(cond, mask, steps=3, callback=lambda *a: seen.append(a))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"steps must be in \[1, 50\]"),
        ({"steps": 51}, r"steps must be in \[1, 50\]"),
        ({"guidance": float("nan")}, "guidance must be finite, got nan"),
        ({"solver": "euler"}, "solver: must be one of dpm, ddim"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_sample_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        made().sample(*condition(1), **options)
    if "seed" not in options:
        with pytest.raises(ValueError, match=message):
            made().check(**{"steps": 25, "guidance": 3.0, **options})


def test_steps_are_any_whole_number():
    for steps in ([40, 0], 2.0, True):
        with pytest.raises(TypeError, match="the continuous backbone takes a number"):
            made().check(steps, 3.0)
    net, seen = made(), condition(1)
    drawn = [net.sample(*seen, steps=n, guidance=1.0) for n in (3, np.int64(3))]
    assert torch.equal(*drawn)


def test_embeddings_need_their_mask():
    x, t = torch.zeros(1, TINY.code_dim, *TINY.grid), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="cond_mask: embeddings need one, got None"):
        made()(x, t, condition(1)[0])


# ---- files --------------------------------------------------------------------------------------


def test_files(tmp_path):
    net = made()
    net.save(tmp_path, torch.float32)
    again = UNetDenoiser.from_folder(tmp_path)
    cond, mask = condition()
    assert torch.equal(again.sample(cond, mask, steps=3), net.sample(cond, mask, steps=3))
    assert again.config == net.config
    half = made()
    half.save(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 2.2 * sum(
        v.numel() for v in net.state_dict().values()
    ) + 2e4


def test_files_of_another_architecture(tmp_path):
    made().save(tmp_path / "unet")
    discrete = DenoiserConfig(
        num_codes=11, grid=(4, 4), width=16, depth=1, heads=2, cross_heads=2, mlp_width=16,
        canvas_width=4, canvas_heads=2, canvas_layers=(), code_width=8, embed_dim=12,
    )  # fmt: skip
    Denoiser(discrete).save(tmp_path / "denoiser")
    for kind, folder, found in (
        (Denoiser, "unet", "continuous"), (UNetDenoiser, "denoiser", "discrete")
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{folder}.*holds a {found} backbone"):
            kind.from_folder(tmp_path / folder)
    config = tmp_path / "unet" / "config.json"
    raw = json.loads(config.read_text())
    for change, message in [
        ({"widths": [16, 16]}, "another architecture .*, and .* more"),
        ({"ranks": 3}, r"cond_mark is \[3, 8\], expected \[4, 8\]\)"),
        ({"blocks": 2}, "is missing, and"),
        ({"colour": 3}, r"config\.json: unknown settings \['colour'\]; UNetConfig has num_codes"),
        ({"widths": [16]}, "at least two resolutions"),
        ({"widths": [10, 16]}, "multiples"),
        ({"widths": []}, r"config\.json: widths must not be empty"),
        ({"widths": [0, 16]}, r"config\.json: widths must be at least 1, got \(0, 16\)"),
        ({"groups": 0}, r"config\.json: groups must be at least 1, got 0"),
        ({"heads": 0}, r"config\.json: heads must be at least 1, got 0"),
        ({"cond_width": 2**20, "embed_dim": 2**20}, "another architecture"),
        ({"grid": [2**20, 2**20], "embed_dim": 2**20}, r"unet/config\.json: .*overflow"),
        ({"num_steps": 10**10}, r"config\.json: num_steps must be at most 1,048,576, got 1"),
        ({"blocks": 10**9}, r"config\.json: blocks must be at most 1,000, got 1"),
        ({"ranks": -3}, r"config\.json: ranks must be at least 1, got -3"),
        ({"beta_schedule": "cosine"}, "beta_schedule must be one of linear, scaled_linear, squ"),
        ({"grid": 4}, r"config\.json: grid must be tuple\[int, int\], got 4"),
    ]:
        config.write_text(json.dumps({**raw, **change}))
        with pytest.raises(ValueError, match=message):
            UNetDenoiser.from_folder(tmp_path / "unet")


# ---- training -----------------------------------------------------------------------------------

QUICK = TrainConfig(
    steps=4, batch=8, group=8, warmup=2, lr=3e-3, checkpoint_every=2, log_every=2, bf16=False,
    condition=ConditionConfig(k=2),
)  # fmt: skip


def pairs(versions=2, count=40):
    """Pictures that their embeddings describe: codes by the signs of an embedding's numbers."""
    g = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(versions, count, 12, generator=g), dim=-1)
    bits = (rows[..., :3] > 0).long() @ torch.tensor([1, 2, 4])
    codes = (bits[..., None] + torch.arange(16) // 8) % 11
    return Pairs(codes.short(), rows.half(), torch.arange(30), torch.arange(5, 40))


def test_loss_is_the_error_of_v():
    net = made()
    objective = VelocityObjective(net)
    codes, t = torch.randint(11, (5, 16)), torch.tensor([1, 7, 20, 33, 50])
    noise = objective.noise(codes, torch.Generator().manual_seed(1))
    assert noise.shape == (5, 3, 4, 4)
    cond, mask = condition(5)
    factor = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
    loss, each = objective(codes, t, factor, noise, cond, mask)
    signal = torch.cos((torch.arange(51) / 50 + 0.008) / 1.008 * torch.pi / 2) ** 2
    alpha = (signal[t] / signal[0]).sqrt().view(-1, 1, 1, 1)  # Nichol and Dhariwal 2021, Eq. 17
    alpha[-1] = net.alpha[-1]  # diffusers stops short of pure noise
    sigma = (1 - alpha**2).sqrt()
    x0 = net.vectors(codes)
    v = net(alpha * x0 + sigma * noise, t - 1, cond, mask)
    want = (v - (alpha * noise - sigma * x0)).square().flatten(1).mean(1)
    torch.testing.assert_close(each, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss, (factor * want).mean(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch", [4096, 7])
def test_begins_with_the_regression_of_pictures_on_embeddings(batch):
    net = made()
    data = pairs()
    begin(net, torch.randn(11, 3), data, ridge=1e-9, batch=batch)
    rows = data.embeddings[:, data.targets].double().reshape(-1, 12) * 12**0.5
    x = torch.cat([torch.ones(len(rows), 1), rows], 1)
    y = net.vectors(data.codes[:, data.targets].long().reshape(-1, 16)).flatten(1).double()
    best = torch.linalg.lstsq(x, y).solution
    cond, mask = data.embeddings[0, :30, None].float(), torch.ones(30, 1, dtype=torch.bool)
    got = net.prepare(cond, mask).paintings.flatten(1)
    torch.testing.assert_close(got.double(), (x @ best)[:30], atol=1e-3, rtol=1e-3)
    left = (y - x @ best).square().mean()
    assert float(net.log_spread.exp()) == pytest.approx(float(left), rel=1e-3)


def test_loss_falls():
    config = TrainConfig(
        steps=40, batch=16, group=16, warmup=5, lr=5e-3, bf16=False,
        condition=ConditionConfig(k=2, null=0.0),
    )  # fmt: skip
    data = pairs()
    few = Pairs(data.codes, data.embeddings, torch.arange(6, 9), data.database)
    trainer = unet_trainer(TINY, config, few, torch.randn(11, 3))
    losses = [float(trainer.advance()["loss"]) for _ in range(40)]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_resumes_bit_for_bit(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    book = torch.randn(11, 3)
    try:
        whole, first, second = (
            unet_trainer(TINY, QUICK, pairs(), b)
            for b in (book, book, book.square())  # the last one's vectors come from the file
        )
        for trainer, steps in ((whole, 4), (first, 2)):
            for _ in range(steps):
                trainer.advance()
        first.save(tmp_path)
        second.load(tmp_path)
        for _ in range(2):
            second.advance()
    finally:
        torch.set_num_threads(before)
    states = []
    for trainer in (whole, second):
        trainer.save(tmp_path)
        states.append(load_file(tmp_path / STATE_FILE))
    a, b = states
    assert a.keys() == b.keys()
    assert "net.codebook" in a
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_start_brings_its_vectors_of_the_same_codes(tmp_path):
    tok = tokenizer()
    torch.nn.init.normal_(tok.quantize.embedding.weight)
    start = made(replace(TINY, code_dim=4))

    def run(out):
        return train(
            pairs(), tmp_path / out, tok, model=start.config, config=QUICK, start=start,
            progress=False,
        )  # fmt: skip

    with pytest.raises(ValueError, match="start: its code vectors are those of another tokenizer"):
        run("other")
    counts = torch.arange(11.0)  # of other pictures
    start.set_codebook(tok.quantize.embedding.weight, counts)
    start.save(tmp_path / "start")
    start = UNetDenoiser.from_folder(tmp_path / "start")
    run("same")
    trained = load_file(tmp_path / "same" / STATE_FILE)
    assert torch.equal(trained["net.codebook"], start.codebook)


def test_the_rate_that_none_stands_for():
    trainer = unet_trainer(TINY, replace(QUICK, lr=None), pairs(), torch.randn(11, 3))
    assert trainer.config.lr == 1e-3


def test_another_architecture_does_not_resume(tmp_path):
    trainer = unet_trainer(TINY, QUICK, pairs(), torch.randn(11, 3))
    trainer.save(tmp_path)
    wider = replace(TINY, widths=(16, 16))
    with pytest.raises(ValueError, match=r"state.safetensors: was trained with widths = \[8, 16\]"):
        unet_trainer(wider, QUICK, pairs(), torch.randn(11, 3)).load(tmp_path)
    with pytest.raises(ValueError, match="compile"):
        unet_trainer(TINY, replace(QUICK, compile=True), pairs(), torch.randn(11, 3))


# ---- the pipeline -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    """The sticker model's parts around an untrained U-Net."""
    discrete = KNNDiffusion.from_pretrained("stickers", backbone="discrete")
    config = UNetConfig(widths=(16, 16), groups=4, heads=2, cond_width=16)
    torch.manual_seed(0)
    net = UNetDenoiser(config)
    net.set_codebook(discrete.tokenizer.quantize.embedding.weight, torch.ones(512))
    return KNNDiffusion(
        discrete.encoder, discrete.tokenizer, net.eval().requires_grad_(False), discrete.databases
    )


def test_the_pipeline_takes_either_backbone(pipe, tmp_path):
    def pixels(p, **options):
        out = p("pizza", steps=2, num_images=2, seed=3, **options)
        return np.stack([np.asarray(i) for i in out.images])

    pipe.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "denoiser").exists()
    again = KNNDiffusion.from_pretrained(tmp_path / "model")
    assert again.denoiser.backbone == "continuous"
    np.testing.assert_array_equal(pixels(pipe), pixels(again))
    np.testing.assert_array_equal(pixels(pipe), pixels(pipe, batch_size=1))
    assert pixels(pipe, solver="ddim").shape == (2, 64, 64, 3)
    with pytest.raises(ValueError, match="holds continuous, not 'discrete'"):
        KNNDiffusion.from_pretrained(tmp_path / "model", backbone="discrete")
    with pytest.raises(ValueError, match="truncation"):
        pixels(pipe, truncation=0.9)
    with pytest.raises(ValueError, match="purity: the continuous backbone draws no codes"):
        pixels(pipe, purity=1.0)
    discrete = KNNDiffusion.from_pretrained("stickers", backbone="discrete")
    with pytest.raises(ValueError, match="solver"):
        pixels(discrete, solver="ddim")
