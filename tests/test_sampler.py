"""The sampler: exact on a known posterior, bits fixed by seed and image index, bad input."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transition_helpers import NoHostReads

from knnfast.diffusion.denoiser import Denoiser, DenoiserConfig
from knnfast.diffusion.sampler import Sampler, SamplingGraph, SamplingGraphs, sample, signed
from knnfast.diffusion.schedule import NAMES, Schedule

K, L = 5, 1600


class Independent(torch.nn.Module):
    """A stand-in denoiser whose codes are independent with known probabilities.

    The exact p(x_0 | x_t) of that data is known in closed form, so the sampler must reproduce the
    data's distribution for every schedule and every list of steps.
    """

    def __init__(self, p: torch.Tensor, schedule: Schedule) -> None:
        super().__init__()
        self.p, self.schedule = p, schedule
        self.config = DenoiserConfig(num_codes=K, grid=(40, 40), code_width=K, embed_dim=3)
        self.head = torch.nn.Linear(K, K)
        self.head.weight.data.copy_(torch.eye(K))
        self.head.bias.data.zero_()

    def prepare(self, cond, mask, fold, source=None):
        return cond

    def features(self, x_t, t, cond):
        level = int(t[0])
        a, b = self.schedule.A[level], self.schedule.B[level]
        joint = self.p.expand(len(x_t), L, K).clone()
        real = x_t < K
        likelihood = torch.full((len(x_t), L, K), float(b), dtype=torch.float64)
        likelihood.scatter_add_(
            2, x_t.clamp_max(K - 1)[..., None], torch.full((len(x_t), L, 1), float(a)).double()
        )
        joint = torch.where(real[..., None], joint * likelihood, joint)
        return (joint / joint.sum(-1, keepdim=True)).clamp_min(1e-30).log().float()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 4, [20, 13, 2]], ids=str)
def test_distribution(name: str, steps: int | list[int]) -> None:
    """Chi-square of the drawn codes against the data's distribution."""
    schedule = Schedule(name, 20, K)
    p = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]] * L, dtype=torch.float64)
    count = 10
    net = Independent(p, schedule)
    cond, mask = torch.zeros(count, 1, 3), torch.zeros(count, 1, dtype=torch.bool)
    codes = sample(net, schedule, cond, mask, steps=steps, guidance=1.0, seed=3)
    assert codes.shape == (count, L)
    assert codes.max() < K
    seen = torch.bincount(codes.flatten(), minlength=K).double()
    expected = p[0] * count * L
    statistic = ((seen - expected) ** 2 / expected).sum()
    assert statistic < 18.5  # 4 degrees of freedom: 0.1 %


@pytest.fixture
def tiny() -> Denoiser:
    config = DenoiserConfig(
        num_codes=11, grid=(4, 4), width=32, depth=2, heads=2, cross_heads=4, mlp_width=48,
        canvas_width=8, canvas_heads=2, canvas_layers=(0,), code_width=16, embed_dim=12,
        time_width=16, ranks=3, num_steps=10,
    )  # fmt: skip
    return Denoiser(config).eval().requires_grad_(False)


def condition(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    cond = torch.nn.functional.normalize(torch.randn(batch, 4, 12, generator=g), dim=-1)
    return cond, torch.ones(batch, 4, dtype=torch.bool)


def test_every_seed_of_64_bits(tiny: Denoiser) -> None:
    cond, mask = condition(2)
    sampler = Sampler(tiny, tiny.schedule, 3)
    for seed in (2**63, 2**64 - 1):
        codes = sampler(cond, mask, seed)
        assert torch.equal(codes, sampler(cond, mask, torch.tensor([signed(seed)])))
        assert torch.equal(codes, sample(tiny, tiny.schedule, cond, mask, steps=3, seed=seed))


def test_same_seed_same_bits(tiny: Denoiser) -> None:
    cond, mask = condition(6)
    draw = lambda seed: sample(tiny, tiny.schedule, cond, mask, steps=5, seed=seed)  # noqa: E731
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("name", NAMES)
def test_batch_does_not_matter(tiny: Denoiser, name: str) -> None:
    """An image depends on its own index and condition: drawn with others it is the same image."""
    cond, mask = condition(30)
    schedule = Schedule(name, 10, 11)
    whole = sample(tiny, schedule, cond, mask, steps=4, seed=9)
    for part in torch.arange(30).split(7):
        alone = sample(tiny, schedule, cond[part], mask[part], steps=4, seed=9, image_indices=part)
        assert torch.equal(alone, whole[part])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_loop_can_be_captured(
    tiny: Denoiser, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole loop on tensors without values: nothing leaves their device, nothing is read."""
    sampler = Sampler(tiny, tiny.schedule, steps=3, guidance=guidance, truncation=0.9, top_k=5)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # knows no meta
    sampler.denoiser = copy.deepcopy(tiny).to("meta")
    sampler.weights = sampler.weights.to("meta")
    inputs = (
        torch.empty(2, 4, 12, device="meta"),
        torch.empty(2, 4, dtype=torch.bool, device="meta"),
        torch.empty(1, dtype=torch.int64, device="meta"),
        torch.empty(2, dtype=torch.int64, device="meta"),
    )
    with NoHostReads({"meta"}):
        codes = sampler(*inputs)
    assert codes.shape == (2, 16)


def test_a_graph_needs_a_device(tiny: Denoiser) -> None:
    with pytest.raises(ValueError, match="CUDA device"):
        SamplingGraph(Sampler(tiny, tiny.schedule, steps=3), batch=1, tokens=4)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_cuda_graph_equals_the_loop(tiny: Denoiser, name: str, guidance: float) -> None:
    """Replays with new conditions and seeds give the tokens of the loop run op by op."""
    sampler = Sampler(tiny.cuda(), Schedule(name, 10, 11), steps=4, guidance=guidance)
    graph = SamplingGraph(sampler, batch=5, tokens=4)
    cond, mask = (v.cuda() for v in condition(5))
    index = torch.tensor([7, 1, 2, 30, 4], device="cuda")
    for seed, places in ((3, None), (2**64 - 1, index)):
        try:
            torch.cuda.set_sync_debug_mode("error")
            got = graph(cond, mask, seed, places).clone()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(got, sampler(cond, mask, seed, places))
        cond = cond.flip(0)


class Drawn:
    """In a graph's place: draws with the loop, and counts."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler, self.replays, self.waited = sampler, 0, 0
        self.drawn = self

    def synchronize(self) -> None:
        self.waited += 1

    def draw(self, *inputs: torch.Tensor) -> torch.Tensor:
        self.replays += 1
        return self.sampler(*inputs)


def test_graphs_serve_what_comes_again(tiny: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call of a kind is the loop, the second records, the last kinds used are kept."""
    made: list[Drawn] = []

    def recorded(self, denoiser, cond, levels, guidance, truncation):
        made.append(Drawn(Sampler(denoiser, denoiser.schedule, levels, guidance, truncation)))
        return made[-1]

    monkeypatch.setattr(SamplingGraphs, "_recorded", recorded)
    graphs = SamplingGraphs(size=2)
    cond, mask = condition(3)

    def draw(steps: int, seed: int = 1, batch: int = 3) -> None:
        inputs = cond[:batch], mask[:batch], steps, 3.0, seed, torch.arange(batch)
        assert torch.equal(graphs(tiny, *inputs), tiny.sample(*inputs))

    draw(4)
    assert not made
    for seed in (1, 2, 3):
        draw(4, seed)
    assert [graph.replays for graph in made] == [3]
    draw(4, batch=2)
    draw(5)  # the third kind: the first one goes
    assert [graph.waited for graph in made] == [1]
    draw(4)
    assert len(made) == 1
    draw(4)
    assert len(made) == 2
    tiny.head.weight.data = tiny.head.weight.data.clone()  # elsewhere: another kind
    draw(4)
    assert [graph.replays for graph in made] == [3, 1]
    with pytest.raises(ValueError, match="steps must"):
        draw(0)


def test_graphs_serve_plain_denoisers_on_cuda(tiny: Denoiser) -> None:
    assert not SamplingGraphs.serves(tiny)


@pytest.mark.gpu
def test_cuda_graphs_equal_the_loop(tiny: Denoiser) -> None:
    tiny.cuda()
    assert SamplingGraphs.serves(tiny)
    graphs = SamplingGraphs()
    cond, mask = (v.cuda() for v in condition(5))
    index = torch.tensor([7, 1, 2, 30, 4], device="cuda")
    expected = {
        (seed, steps): tiny.sample(cond, mask, steps, 3.0, seed, index)
        for seed in range(4)
        for steps in (3, 4)
    }

    def draw(case: tuple[int, int]) -> bool:
        seed, steps = case
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            got = graphs(tiny, cond, mask, steps, 3.0, seed, index)
            return torch.equal(got, expected[case])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(draw, 4 * list(expected)))
    assert all(graphs._kept.values())
    with torch.inference_mode():
        for _ in range(2):
            got = graphs(tiny, cond[:2], mask[:2], 3, 3.0, 0, index[:2])
    assert torch.equal(graphs(tiny, cond[:2], mask[:2], 3, 3.0, 0, index[:2]), got)
    handle = tiny.register_forward_hook(lambda *a: None)
    assert not SamplingGraphs.serves(tiny)
    handle.remove()


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_cuda_matches_the_cpu(tiny: Denoiser, name: str) -> None:
    """The same random bits on both: images differ only where rounding turns a token."""
    cond, mask = condition(40)
    schedule = Schedule(name, 10, 11)
    expected = sample(tiny, schedule, cond, mask, steps=4, seed=9)
    got = sample(tiny.cuda(), schedule, cond.cuda(), mask.cuda(), steps=4, seed=9)
    assert got.is_cuda
    assert (got.cpu() != expected).double().mean() < 0.01


def test_guidance_one_is_no_guidance(tiny: Denoiser) -> None:
    """With w = 1 the null condition drops out; with no condition at all guidance does nothing."""
    cond, mask = condition(3)
    a = sample(tiny, tiny.schedule, cond, mask, steps=5, guidance=1.0)
    assert not torch.equal(a, sample(tiny, tiny.schedule, cond, mask, steps=5, guidance=6.0))
    off = torch.zeros_like(mask)
    b = sample(tiny, tiny.schedule, cond, off, steps=5, guidance=1.0)
    assert torch.equal(b, sample(tiny, tiny.schedule, cond, off, steps=5, guidance=6.0))


def test_truncation_to_the_best_class(tiny: Denoiser) -> None:
    """One step with one class left is the argmax, whatever the seed."""
    cond, mask = condition(3)
    for kept in ({"top_k": 1}, {"truncation": 1e-6}):
        draws = [
            sample(tiny, tiny.schedule, cond, mask, steps=1, guidance=1.0, seed=s, **kept)
            for s in (0, 1)
        ]
        assert torch.equal(*draws)
        start = torch.full((3, 16), 11)
        logits = tiny(start, torch.full((3,), 10), cond, mask)
        assert torch.equal(draws[0], logits.argmax(-1))


def test_callback_and_levels(tiny: Denoiser) -> None:
    cond, mask = condition(1)
    seen: list[tuple[int, int]] = []
    sample(tiny, tiny.schedule, cond, mask, steps=[10, 6, 1], callback=lambda *a: seen.append(a))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_rejects(tiny: Denoiser) -> None:
    cond, mask = condition(2)
    with pytest.raises(ValueError, match="steps must"):
        sample(tiny, tiny.schedule, cond, mask, steps=0)
    with pytest.raises(ValueError, match="steps must"):
        sample(tiny, tiny.schedule, cond, mask, steps=[9, 0])
    with pytest.raises(ValueError, match="truncation"):
        sample(tiny, tiny.schedule, cond, mask, truncation=0.0)
    with pytest.raises(ValueError, match="temperature"):
        sample(tiny, tiny.schedule, cond, mask, temperature=0.0)
    with pytest.raises(ValueError, match="num_codes"):
        sample(tiny, Schedule("mask", 10, 12), cond, mask)
    with pytest.raises(ValueError, match="top_k must be >= 0, got -1"):
        sample(tiny, tiny.schedule, cond, mask, top_k=-1, steps=3)
    with pytest.raises(ValueError, match="guidance must be finite, got nan"):
        sample(tiny, tiny.schedule, cond, mask, guidance=float("nan"), steps=3)
    with pytest.raises(TypeError, match="cond: dtype must be one of float32"):
        sample(tiny, tiny.schedule, cond.double(), mask, steps=3)
    with pytest.raises(TypeError, match="cond_mask: dtype must be one of bool"):
        sample(tiny, tiny.schedule, cond, mask.float(), steps=3)
    with pytest.raises(ValueError, match=r"cond: shape must be \[\*, \*, 12\], got \[2, 4, 7\]"):
        sample(tiny, tiny.schedule, cond[..., :7], mask, steps=3)
    for wrong in (mask[:1], torch.cat([mask, mask])):
        with pytest.raises(ValueError, match=r"cond_mask: shape must be \[2, 4\]"):
            sample(tiny, tiny.schedule, cond, wrong, steps=3)
    with pytest.raises(ValueError, match=r"image_indices: shape must be \[2\]"):
        sample(tiny, tiny.schedule, cond, mask, image_indices=torch.arange(3), steps=3)
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=r"seed must be in \[0, 2\^64\)"):
            Sampler(tiny, tiny.schedule, 3)(cond, mask, seed)
    for code in (-1, 12):
        start = torch.full((2, 16), code)
        with pytest.raises(ValueError, match=r"start: codes must be in \[0, 11\]"):
            sample(tiny, tiny.schedule, cond, mask, steps=3, start=(start, 10))


def test_other_types(tiny: Denoiser) -> None:
    cond, mask = condition(3)
    with pytest.raises(TypeError, match="denoiser: dtype must be one of float32, float16, bfloat"):
        sample(copy.deepcopy(tiny).double(), tiny.schedule, cond.double(), mask, steps=3)
    codes = sample(tiny.bfloat16(), tiny.schedule, cond.bfloat16(), mask, steps=3)
    assert codes.shape == (3, 16)
    assert 0 <= codes.min() <= codes.max() < 11
