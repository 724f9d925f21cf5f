"""The sampler: exact on a known posterior, bits fixed by seed and image index, bad input."""

import copy
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import pytest
import torch
from transition_helpers import NoHostReads

from knnfast._calls import Clock
from knnfast.diffusion import sampler as module
from knnfast.diffusion.denoiser import Denoiser, DenoiserConfig
from knnfast.diffusion.packed import PackedDenoiser
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


def purely(purity: float, schedule: Schedule, steps: int) -> torch.Tensor:
    """How often each code is drawn, [K]."""
    p = torch.tensor([[0.3, 0.25, 0.2, 0.15, 0.1]] * L, dtype=torch.float64)
    cond, mask = torch.zeros(10, 1, 3), torch.zeros(10, 1, dtype=torch.bool)
    net = Independent(p, schedule)
    codes = sample(net, schedule, cond, mask, steps, guidance=1.0, seed=3, purity=purity)
    assert codes.max() < K
    return torch.bincount(codes.flatten(), minlength=K).double() / codes.numel()


@pytest.mark.parametrize("name", ["mask", "vq_diffusion"])
def test_purity_sharpens(name: str) -> None:
    """From p^(1 + r max p): where all codes are equally pure, that is what is drawn."""
    schedule = Schedule(name, 20, K)
    p = torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1], dtype=torch.float64)
    for purity in (0.0, 4.0):
        sharp = p ** (1 + purity * 0.3)
        wanted = sharp / sharp.sum()
        for steps in (1, 4):
            seen = purely(purity, schedule, steps)
            statistic = (10 * L * (seen - wanted) ** 2 / wanted).sum()
            assert statistic < 18.5  # 4 degrees of freedom: 0.1 %


def test_purity_begins_where_the_network_is_sure(tiny: Denoiser) -> None:
    """Each level keeps its share of masks, and the purest codes are drawn first."""
    schedule = Schedule("mask", 10, K)
    sure = torch.full((L, K), 0.2, dtype=torch.float64)
    sure[:400] = torch.tensor([0.96, 0.01, 0.01, 0.01, 0.01], dtype=torch.float64)
    net = Independent(sure, schedule)
    seen = []
    features = net.features
    net.features = lambda x, t, c: seen.append(x.clone()) or features(x, t, c)
    cond, mask = torch.zeros(1, 1, 3), torch.zeros(1, 1, dtype=torch.bool)
    sample(net, schedule, cond, mask, 10, guidance=1.0, purity=1.0)
    assert [int((x == K).sum()) for x in seen] == [L * t // 10 for t in range(10, 0, -1)]
    drawn = seen[1][0] < K
    assert drawn[:400].float().mean() > 2 * drawn[400:].float().mean()
    cond, mask = condition(6)
    draw = lambda rows, **o: sample(  # noqa: E731
        tiny, tiny.schedule, cond[rows], mask[rows], 4, seed=9, purity=1.0, **o
    )
    part = torch.tensor([4, 1])
    assert torch.equal(draw(part, image_indices=part), draw(slice(None))[part])
    tiny.check(4, 3.0, purity=1.0)
    for purity in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="purity must be finite and at least 0"):
            tiny.check(4, 3.0, purity=purity)
    with pytest.raises(ValueError, match=r"purity: sets masked codes alone, .* mask_replace"):
        Sampler(tiny, Schedule("mask_replace", 10, 11), 4, purity=1.0)


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
@pytest.mark.parametrize("purity", [None, 1.0])
def test_the_loop_can_be_captured(
    tiny: Denoiser, guidance: float, purity: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole loop on tensors without values: nothing leaves their device, nothing is read."""
    sampler = Sampler(
        tiny, tiny.schedule, steps=3, guidance=guidance, truncation=0.9, top_k=5, purity=purity
    )
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


class FakeCuda:
    """What graphs use of torch.cuda, on the CPU: a capture runs, a replay does nothing."""

    def __init__(self) -> None:
        self.log: list[tuple] = []
        self.streams: list[FakeStream] = []
        self.default = FakeStream(self)
        self.captures = self.most = 0
        self.invalid = False
        self._local = threading.local()

    def Stream(self, device: torch.device) -> "FakeStream":
        self.streams.append(FakeStream(self))
        return self.streams[-1]

    def Event(self) -> "FakeEvent":
        return FakeEvent(self)

    def CUDAGraph(self) -> "FakeGraph":
        return FakeGraph(self)

    def device(self, device: torch.device) -> nullcontext:
        return nullcontext()

    def current_stream(self, device: torch.device | None = None) -> "FakeStream":
        return getattr(self._local, "stream", self.default)

    @contextmanager
    def stream(self, stream: "FakeStream") -> Iterator[None]:
        before = self.current_stream()
        self._local.stream = stream
        try:
            yield
        finally:
            self._local.stream = before

    @contextmanager
    def graph(self, graph: object, stream: "FakeStream", **options: str) -> Iterator[None]:
        """As torch's, which stays on its stream where a capture turns out to be invalid."""
        before = self.current_stream()
        self._local.stream = stream
        self.captures += 1
        self.most = max(self.most, self.captures)
        time.sleep(0.05)
        yield
        self.captures -= 1
        if self.invalid:
            raise RuntimeError("the capture was invalidated")
        self._local.stream = before


class FakeStream:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def wait_stream(self, stream: "FakeStream") -> None:
        pass

    def wait_event(self, event: "FakeEvent") -> None:
        self.cuda.log.append(("wait", self, event))


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def record(self, stream: FakeStream) -> None:
        self.cuda.log.append(("record", stream, self))


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def replay(self) -> None:
        self.cuda.log.append(("replay",))

    def reset(self) -> None:
        pass


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    fake = FakeCuda()
    for name in ("Stream", "Event", "CUDAGraph", "device", "current_stream", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(module, "_broken", [])
    module._shared.cache_clear()
    yield fake
    module._shared.cache_clear()


def recorded(tiny: Denoiser) -> SamplingGraph:
    """A graph of two images, past the check that they are on a GPU."""
    graph = SamplingGraph.__new__(SamplingGraph)
    graph.sampler = Sampler(tiny, tiny.schedule, 3)
    graph._record(2, 4, tiny.head.weight)
    return graph


def test_recordings_take_turns(tiny: Denoiser, cuda: FakeCuda) -> None:
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: recorded(tiny), range(3)))
    assert cuda.most == 1


def test_replays_take_turns(tiny: Denoiser, cuda: FakeCuda) -> None:
    """Two graphs share what cuBLAS keeps for a stream: one waits for the other's result."""
    a, b = recorded(tiny), recorded(tiny)
    assert len(cuda.streams) == 1
    assert a.drawn is b.drawn
    cuda.log.clear()
    with cuda.stream(first := FakeStream(cuda)):
        a.draw(*condition(2))
    with cuda.stream(second := FakeStream(cuda)):
        b(*condition(2))
    assert cuda.log == [
        ("wait", first, a.drawn), ("replay",), *2 * [("record", first, a.drawn)],
        ("wait", second, a.drawn), ("replay",), ("record", second, a.drawn),
    ]  # fmt: skip


def test_a_broken_capture_leaves_its_stream_and_its_graph(tiny: Denoiser, cuda: FakeCuda) -> None:
    """The allocator of torch goes on asking the graph: it must not be freed."""
    cuda.invalid = True
    with pytest.raises(RuntimeError, match="invalidated"):
        recorded(tiny)
    assert cuda.current_stream() is cuda.default
    assert len(module._broken) == 1
    cuda.invalid = False
    recorded(tiny)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"cond": torch.zeros(1, 4, 12)}, ValueError, r"cond_mask: shape must be \[1, 4\]"),
        (
            {"cond": torch.zeros(1, 4, 12), "cond_mask": torch.ones(1, 4, dtype=torch.bool)},
            ValueError,
            r"cond: shape must be \[2, 4, 12\]",
        ),
        ({"cond": torch.zeros(2, 4, 12).half()}, TypeError, "cond: dtype"),
        ({"cond": torch.zeros(2, 4, 12, device="meta")}, ValueError, "cond: must be on cpu"),
        ({"cond_mask": torch.ones(4, dtype=torch.bool)}, ValueError, "cond_mask: shape"),
        ({"cond_mask": torch.ones(2, 4)}, TypeError, "cond_mask: dtype"),
        ({"image_indices": torch.arange(1)}, ValueError, "image_indices: shape"),
        ({"image_indices": torch.arange(2.0)}, TypeError, "image_indices: dtype"),
        (
            {"image_indices": torch.arange(2, device="meta")},
            ValueError,
            "image_indices: must be on cpu",
        ),
        ({"seed": -1}, ValueError, "seed must be"),
    ],
)
def test_replays_refuse_what_the_loop_refuses(
    tiny: Denoiser,
    cuda: FakeCuda,
    change: dict,
    error: type[Exception],
    match: str,
) -> None:
    """`copy_` would spread, cast or fetch them."""
    cond, mask = condition(2)
    given = {"cond": cond, "cond_mask": mask} | change
    graph = recorded(tiny)
    cuda.log.clear()
    with pytest.raises(error, match=match):
        graph(**given)
    assert not cuda.log
    if given["cond"].shape[0] == 2:  # the loop takes any batch
        with pytest.raises(error, match=match):
            graph.sampler(**given)


def test_a_clock_waits_for_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """To wait for the device would break a recording of another thread."""
    waited = []

    class Stream:
        def synchronize(self) -> None:
            waited.append(self)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    timings: dict[str, float] = {}
    with Clock(timings, torch.device("cuda"))("denoise"):
        pass
    assert len(waited) == 1
    assert timings["denoise"] > 0


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

    def recorded(self, denoiser, cond, *rule, **options):
        made.append(Drawn(Sampler(denoiser, denoiser.schedule, *rule, **options)))
        return made[-1]

    monkeypatch.setattr(SamplingGraphs, "_recorded", recorded)
    graphs = SamplingGraphs(size=2)
    cond, mask = condition(3)

    def draw(steps: int, seed: int = 1, batch: int = 3, **options: float) -> None:
        inputs = cond[:batch], mask[:batch], steps, 3.0, seed, torch.arange(batch)
        assert torch.equal(graphs(tiny, *inputs, **options), tiny.sample(*inputs, **options))

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
    for _ in range(3):
        draw(4, purity=1.0)
    assert [graph.replays for graph in made] == [3, 1, 2]
    with pytest.raises(ValueError, match="steps must"):
        draw(0)


def test_a_refused_call_is_not_the_first_of_its_kind(
    tiny: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SamplingGraphs, "_recorded", lambda *_: pytest.fail("recorded"))
    graphs = SamplingGraphs()
    cond, mask = condition(3)
    with pytest.raises(TypeError, match="cond_mask"):
        graphs(tiny, cond, mask.float(), 4)
    graphs(tiny, cond, mask, 4)


def test_no_image_is_not_recorded(tiny: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SamplingGraphs, "_recorded", lambda *_: pytest.fail("recorded"))
    graphs = SamplingGraphs()
    cond, mask = condition(3)
    for _ in range(2):
        assert graphs(tiny, cond[:0], mask[:0], 4).shape == (0, 16)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_no_image(
    tiny: Denoiser, where: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packed network's and the plain one's; the codes are where the embeddings are."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # knows no meta
    cond, mask = (v[:0].to(where) for v in condition(3))
    codes = sample(tiny.to(where, dtype), tiny.schedule, cond.to(dtype), mask, steps=3)
    assert codes.shape == (0, 16)
    assert codes.dtype == torch.int64
    assert codes.device.type == where


def test_the_token_of_a_bad_row_reaches_no_embedding(
    tiny: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA it is -1, and stays for the decoder to refuse; an embedding would lose the device."""
    head = module.sample_head

    def as_on_cuda(features, weight, bias, x_t, *args, **options):
        x_s = head(features, weight, bias, x_t.clamp_min(0), *args, **options)
        x_s[:, 3] = -1
        return x_s

    monkeypatch.setattr(module, "sample_head", as_on_cuda)
    monkeypatch.setattr(PackedDenoiser, "serves", staticmethod(lambda *_: False))
    codes = sample(tiny, tiny.schedule, *condition(2), steps=3)
    assert (codes[:, 3] == -1).all()
    assert (codes != -1).sum() == 2 * 15


@pytest.mark.gpu
def test_cuda_keeps_the_device_where_rows_are_bad(tiny: Denoiser) -> None:
    tiny.cuda()
    cond, mask = (v.cuda() for v in condition(2))
    cond[0] = float("nan")
    codes = sample(tiny, tiny.schedule, cond, mask, steps=4)
    assert (codes[0] == -1).all()
    assert ((codes[1] >= 0) & (codes[1] < 11)).all()


def test_other_types(tiny: Denoiser) -> None:
    cond, mask = condition(3)
    with pytest.raises(TypeError, match="denoiser: dtype must be one of float32, float16, bfloat"):
        sample(copy.deepcopy(tiny).double(), tiny.schedule, cond.double(), mask, steps=3)
    codes = sample(tiny.bfloat16(), tiny.schedule, cond.bfloat16(), mask, steps=3)
    assert codes.shape == (3, 16)
    assert 0 <= codes.min() <= codes.max() < 11
