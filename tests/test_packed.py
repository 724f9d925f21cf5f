"""The packed denoiser against the network in FP64; its bits by batch and threads."""

from dataclasses import replace

import pytest
import torch

from knnfast import _C
from knnfast.diffusion.denoiser import Denoiser, DenoiserConfig
from knnfast.diffusion.packed import PackedDenoiser
from knnfast.diffusion.sampler import Sampler, sample

TINY = DenoiserConfig(
    num_codes=11, grid=(4, 4), width=32, depth=2, heads=2, cross_heads=4, mlp_width=48,
    canvas_width=8, canvas_heads=2, canvas_layers=(0,), code_width=16, embed_dim=12,
    time_width=16, ranks=3, num_steps=10,
)  # fmt: skip
CONFIGS = {
    "tiny": TINY,
    "odd": replace(TINY, grid=(3, 5), patch=1, width=60, heads=3, cross_heads=5, mlp_width=77,
                   canvas_width=12, canvas_heads=3, canvas_layers=(1,), code_width=19),
    "no-canvas": replace(TINY, canvas_layers=(), depth=3, grid=(6, 2), num_codes=2),
    "wide": replace(TINY, grid=(16, 16), width=256, heads=4, cross_heads=8, mlp_width=1024,
                    canvas_width=32, canvas_heads=4, code_width=128, num_codes=512, embed_dim=512),
    "editor": replace(TINY, source=True),
    "editor-odd": replace(TINY, grid=(6, 9), patch=3, width=40, heads=1, cross_heads=2,
                          canvas_layers=(0, 1), code_width=7, source=True),
}  # fmt: skip
LEVELS = [10, 7, 3, 0]


def made(config, seed=0):
    """A denoiser whose every weight matters, those that start at zero too."""
    torch.manual_seed(seed)
    denoiser = Denoiser(config).eval().requires_grad_(False)
    for weight in denoiser.parameters():
        weight.add_(torch.randn_like(weight) * 0.05)
    return denoiser


def condition(config, batch, embeddings=4, seed=5):
    g = torch.Generator().manual_seed(seed)
    cond = torch.randn(batch, embeddings, config.embed_dim, generator=g)
    cond = torch.nn.functional.normalize(cond, dim=-1)
    mask = torch.rand(batch, embeddings, generator=g) < 0.7
    mask[0] = False
    codes = torch.randint(0, config.num_codes + 1, (batch, config.length), generator=g)
    source = torch.randint(0, config.num_codes + 1, (batch, config.length), generator=g)
    return cond, mask, codes, source if config.source else None


def features(denoiser, cond, mask, codes, source, level=7, guided=True):
    packed = PackedDenoiser(denoiser, LEVELS)
    one = [slice(i, i + 1) for i in range(len(cond))]
    images = [packed.prepare(cond[i], mask[i], None if source is None else source[i]) for i in one]
    return packed.features(codes, level, images, guided)


def through_the_network(denoiser, cond, mask, codes, source, level=7, dtype=torch.float64):
    """The same in plain modules, with the condition and then without."""
    net = Denoiser(denoiser.config).to(dtype).requires_grad_(False)
    net.load_state_dict(denoiser.state_dict())
    modulation = denoiser.time_modulation  # its angles are FP32 by design
    net.time_modulation = lambda t: modulation(t).to(dtype)
    t = torch.full((len(codes),), level)
    cond = cond.to(dtype)
    on = net.features(codes, t, cond, mask, source)
    off = net.features(codes, t, 0 * cond, torch.zeros_like(mask), source)
    return torch.stack([on, off])


@pytest.mark.isa
@pytest.mark.parametrize("embeddings", [1, 4, 33, 100])
@pytest.mark.parametrize("name", CONFIGS)
def test_error_is_that_of_torch(name, embeddings):
    denoiser = made(CONFIGS[name])
    inputs = condition(denoiser.config, 3, embeddings)
    exact = through_the_network(denoiser, *inputs)
    error = features(denoiser, *inputs).double() - exact
    theirs = through_the_network(denoiser, *inputs, dtype=torch.float32).double() - exact
    floor = 1e-7 * exact.abs().max()
    assert error.abs().max() <= 2 * theirs.abs().max() + floor
    assert error.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt() + floor


@pytest.mark.isa
@pytest.mark.parametrize("name", ["odd", "wide", "editor"])
def test_bits_do_not_depend_on_batch_or_threads(name):
    denoiser = made(CONFIGS[name])
    cond, mask, codes, source = condition(denoiser.config, 5)
    before = _C.num_threads(), torch.get_num_threads()
    try:
        _C.set_num_threads(1)
        torch.set_num_threads(1)
        want = features(denoiser, cond, mask, codes, source)
        for threads in (2, 3):
            _C.set_num_threads(threads)
            torch.set_num_threads(threads)
            assert torch.equal(features(denoiser, cond, mask, codes, source), want)
        for i in range(5):
            one = slice(i, i + 1)
            alone = features(
                denoiser, cond[one], mask[one], codes[one], None if source is None else source[one]
            )
            assert torch.equal(alone[:, 0], want[:, i])
        unguided = features(denoiser, cond, mask, codes, source, guided=False)
        assert torch.equal(unguided[0], want[0])
    finally:
        _C.set_num_threads(before[0])
        torch.set_num_threads(before[1])


def test_images_of_other_numbers_of_embeddings_share_a_step():
    denoiser = made(TINY)
    packed = PackedDenoiser(denoiser, LEVELS)
    few, many = condition(TINY, 2, 2), condition(TINY, 2, 9)
    images = [packed.prepare(c[0][1:], c[1][1:], None) for c in (few, many)]
    both = packed.features(torch.stack([few[2][1], many[2][1]]), 7, images, False)
    for i, c in enumerate((few, many)):
        assert torch.equal(both[:, i], features(denoiser, *c, guided=False)[:, 1])


def test_the_weights_are_copied():
    denoiser = made(TINY)
    inputs = condition(TINY, 2)
    want = features(denoiser, *inputs)
    packed = PackedDenoiser(denoiser, LEVELS)
    images = [packed.prepare(inputs[0][i : i + 1], inputs[1][i : i + 1], None) for i in range(2)]
    for weight in denoiser.parameters():
        weight.fill_(float("nan"))
    assert torch.equal(packed.features(inputs[2], 7, images, True), want)


@pytest.mark.parametrize("name", ["tiny", "editor"])
def test_the_sampler_draws_the_same_codes_without_it(name, monkeypatch):
    denoiser = made(CONFIGS[name])
    cond, mask, _, _ = condition(denoiser.config, 40)
    codes = sample(denoiser, denoiser.schedule, cond, mask, steps=5, seed=1)
    monkeypatch.setattr(PackedDenoiser, "serves", staticmethod(lambda denoiser, cond: False))
    plain = sample(denoiser, denoiser.schedule, cond, mask, steps=5, seed=1)
    assert (codes != plain).float().mean() <= 2e-3  # a near tie may fall the other way


class Halved(Denoiser):
    def features(self, *args, **options):
        return super().features(*args, **options) / 2


class Named(Denoiser):
    name = "the same network"


def test_where_it_serves():
    cond = condition(TINY, 1)[0]
    assert PackedDenoiser.serves(made(TINY), cond)
    assert PackedDenoiser.serves(Named(TINY), cond)
    assert not PackedDenoiser.serves(made(TINY), cond.double())
    assert not PackedDenoiser.serves(made(TINY).double(), cond.double())
    assert not PackedDenoiser.serves(torch.nn.Linear(1, 1), cond)
    assert not PackedDenoiser.serves(Halved(TINY), cond)
    partly, hooked, wrapped, patched = made(TINY), made(TINY), made(TINY), made(TINY)
    patched.features = lambda *args: torch.zeros(1)
    partly.patch_in.bfloat16()
    hooked.layers[0].mlp_in.register_forward_hook(lambda *_: None)
    wrapped.layers[1].mlp_out = torch.nn.Sequential(wrapped.layers[1].mlp_out)
    for other in (partly, hooked, wrapped, patched):
        assert not PackedDenoiser.serves(other, cond)
    with torch.autocast("cpu", torch.bfloat16):
        assert not PackedDenoiser.serves(made(TINY), cond)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(dtype):
    denoiser = made(TINY)
    inputs = condition(TINY, 2)
    want = features(denoiser, *inputs)
    try:
        torch.set_default_dtype(dtype)
        got = features(denoiser, *inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)


def test_nan_is_not_hidden():
    denoiser = made(TINY)
    cond, mask, _, _ = condition(TINY, 2)
    denoiser.layers[0].mlp_in.bias[3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        sample(denoiser, denoiser.schedule, cond, mask, steps=3)


def test_rejects():
    denoiser = made(TINY)
    cond, mask, codes, _ = condition(TINY, 2)
    packed = PackedDenoiser(denoiser, LEVELS)
    images = [packed.prepare(cond[:1], mask[:1], None)] * 2
    for bad in (-1, TINY.num_codes + 1):
        with pytest.raises(ValueError, match=r"codes must be in \[0, 11\]"):
            packed.features(torch.full_like(codes, bad), 7, images, True)
    with pytest.raises(TypeError, match="x: dtype must be one of int64"):
        packed.features(codes.int(), 7, images, True)
    for shape in ((1, TINY.length), (2, TINY.length - 1), (3, TINY.length)):
        start = torch.zeros(shape, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"x: shape must be \[2, 16\]"):
            packed.features(start, 7, images, True)
        with pytest.raises(ValueError, match=r"start: shape must be \[2, 16\]"):
            Sampler(denoiser, denoiser.schedule, 3)(cond, mask, start=start)
    with pytest.raises(ValueError, match=r"cond: shape must be \[1, \*, 12\]"):
        packed.prepare(cond, mask, None)
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        replace(TINY, depth=0, canvas_layers=())
    with pytest.raises(ValueError, match="ranks must be at least 1, got -3"):
        replace(TINY, ranks=-3)


def test_no_image():
    denoiser = made(TINY)
    none = torch.zeros(0, 4, TINY.embed_dim), torch.zeros(0, 4, dtype=torch.bool)
    assert Sampler(denoiser, denoiser.schedule, 3)(*none).shape == (0, TINY.length)
