"""transition_step on every backend against its FP64 definition, in distribution, and at its ends.

Statistical tests draw with fixed seeds. Each compares a chi-square statistic with its 1 - 1e-6
quantile, so that a correct implementation fails one of the about 110 with probability 1e-4.
"""

import itertools
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from transition_helpers import SCHEDULES, levels, random_logits, weights_of

from knnfast import ops, reference
from knnfast.ops import philox
from knnfast.ops._checks import pointer
from knnfast.ops.transition import _step_cuda

# Outputs hold NaN before a kernel writes them. torch's own CUDA ops warn when that mode finds them
# in another order than they promise.
pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning"),
]

FALSE_ALARM = 1e-6
RULES = {
    "plain": {},
    "guided": {"guidance": 3.0, "null": True},
    "temperature": {"temperature": 0.7},
    "top_r": {"top_r": 0.8},
    "top_k": {"top_k": 3},
    "all": {"guidance": 2.0, "null": True, "temperature": 1.3, "top_r": 0.9, "top_k": 5},
    "purity": {"purity": 1.0},
}


def interpreted(logits, x_t, weights, *, seed, image_indices=None, null_logits=None, **rule):
    """Call the Triton kernel on CPU tensors through the interpreter."""
    if image_indices is None:
        image_indices = torch.arange(len(x_t))
    rule = {"guidance": 1.0, "temperature": 1.0, "top_r": 1.0, "top_k": 0, "purity": None} | rule
    seed = torch.tensor([seed])
    return _step_cuda(logits, null_logits, x_t, weights, image_indices, seed, *rule.values())


ON_THE_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled in this process")
BOTH = pytest.mark.parametrize(
    "run",
    [ops.transition_step, pytest.param(interpreted, marks=ON_THE_CPU)],
    ids=["cpu", "triton"],
)


def make(K, B, L, rule, dtype=torch.float32, masked=0.5):
    rule = dict(rule)
    logits = random_logits((B, L, K), dtype=dtype)
    if rule.pop("null", False):
        rule["null_logits"] = random_logits((B, L, K), dtype=dtype)
    x_t = torch.where(torch.rand(B, L) < masked, K, torch.randint(0, K, (B, L)))
    return logits, x_t, rule


def perturbed(logits, x_t, weights, seed, image_indices=None, purity=None, **rule):
    """The log-probabilities and perturbed scores [B, L, K] in FP64, and the choice's words."""
    K = logits.shape[-1]
    logp = reference.class_scores(logits, **rule)
    t, position, image, key = reference._coordinates(x_t, weights, image_indices, seed)

    def words(block, stream):
        place = position[..., None], image[..., None], philox.counter(t, stream)[..., None]
        return torch.stack(philox.philox(block, *place, key), -1).flatten(-2)

    noise = philox.gumbel(words(torch.arange((K + 3) // 4), philox.GUMBEL)[..., :K])
    sharp = 1.0 if purity is None else 1 + purity * logp.max(-1, keepdim=True)[0].exp()
    choice = words(torch.zeros(1, dtype=torch.int64), philox.CHOICE)
    return logp, sharp * logp + noise, choice


def margins(got, expected, logits, x_t, weights, seed, image_indices=None, purity=None, **rule):
    """How near FP64 came to each token of `got` [B, L].

    Where a class was drawn: the difference of the two perturbed scores. Elsewhere: of the choice's
    uniform and the weight that decides between replaced and kept; purity sampling has none.
    """
    K = logits.shape[-1]
    logp, score, choice = perturbed(logits, x_t, weights, seed, image_indices, purity, **rule)
    best, given = (score.gather(-1, v.clamp(0, K - 1)[..., None])[..., 0] for v in (expected, got))
    u = philox.unit52(choice[..., 0], choice[..., 1])
    p_i = logp.gather(-1, x_t.clamp(max=K - 1)[..., None])[..., 0].exp()
    w_p, w_u = reference._branches(p_i, x_t == K, weights)
    if purity is None:
        return torch.where(u < w_p, best - given, (u - w_p - w_u).abs())
    return torch.where((expected < K) & (got < K), best - given, float("inf"))


def agree(got, logits, x_t, weights, **rule):
    """Equal tokens; where they differ the FP64 scores must be within 1e-5 of each other."""
    expected = reference.transition_step(logits, x_t, weights, **rule)
    wrong = got != expected
    assert wrong.double().mean() < 1e-3, f"{int(wrong.sum())} of {wrong.numel()} tokens differ"
    if wrong.any():
        assert float(margins(got, expected, logits, x_t, weights, **rule)[wrong].max()) < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_agree_tells_near_ties_from_errors(temperature):
    """The runner-up in a winner's place passes 5e-6 behind it, and not 5e-5 behind."""
    K, rule = 8, {"seed": 3, "temperature": temperature}
    logits, x_t, _ = make(K, 1, 2000, {}, torch.float64, masked=1.0)
    weights = weights_of("mask", K, 100, 0)
    expected = reference.transition_step(logits, x_t, weights, **rule)
    behind = torch.stack([
        margins(torch.full_like(x_t, c), expected, logits, x_t, weights, **rule)[0, 7]
        for c in range(K)
    ])  # fmt: skip
    second = int(behind.argsort()[1])
    got = expected.clone()
    got[0, 7] = second
    for gap in (5e-6, 5e-5):
        lifted = logits.clone()
        lifted[0, 7, second] += (behind[second] - gap) * temperature
        if gap < 1e-5:
            agree(got, lifted, x_t, weights, **rule)
        else:
            with pytest.raises(AssertionError):
                agree(got, lifted, x_t, weights, **rule)


def test_agree_wants_the_choice_near_its_weight():
    logits, x_t, _ = make(8, 1, 2000, {}, torch.float64, masked=0.0)
    weights = weights_of("mask_replace", 8, 100, 40)
    got = reference.transition_step(logits, x_t, weights, seed=3)
    kept = int((got == x_t).nonzero()[0, 1])
    got[0, kept] = (got[0, kept] + 1) % 8
    with pytest.raises(AssertionError):
        agree(got, logits, x_t, weights, seed=3)


@pytest.mark.isa
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("K", [2, 3, 63, 64, 257, 8192])
def test_matches_reference(name, K, rule):
    B, L = (3, 37) if K < 8192 else (1, 8)
    logits, x_t, kw = make(K, B, L, RULES[rule])
    for t, s in [(1, 0), (50, 49), (100, 60)]:
        weights = weights_of(name, K, t, s)
        got = ops.transition_step(logits, x_t, weights, seed=7, **kw)
        agree(got, logits, x_t, weights, seed=7, **kw)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_types(dtype):
    logits, x_t, kw = make(130, 2, 64, RULES["guided"], dtype)
    weights = weights_of("mask_replace", 130, 60, 30)
    got = ops.transition_step(logits, x_t, weights, seed=1, **kw)
    agree(got, logits, x_t, weights, seed=1, **kw)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy runs both sides of tl.where
@pytest.mark.parametrize(("rule", "L"), [("plain", 9), ("plain", 200), ("all", 9), ("purity", 9)])
@pytest.mark.parametrize("name", ["mask_replace", "mask"])
def test_triton_matches_reference(name, rule, L):
    """L = 200: two blocks of choices, more rows than programs."""
    if torch.cuda.is_available():
        pytest.skip("compiled in this process; the gpu tests cover it")
    logits, x_t, kw = make(13, 2, L, RULES[rule])
    weights = weights_of(name, 13, 100, 40)
    got = interpreted(logits, x_t, weights, seed=11, **kw)
    agree(got, logits, x_t, weights, seed=11, **kw)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy runs both sides of tl.where
@BOTH
@pytest.mark.parametrize("rule", RULES)
def test_logits_far_from_zero(run, rule):
    """Roundings are of differences: where two classes nearly tie the better one is drawn."""
    K, L = 64, 20_000
    logits, x_t, kw = make(K, 1, L, RULES[rule])
    logits += 1e4
    if "null_logits" in kw:
        kw["null_logits"] -= 2e4
    weights = weights_of("mask", K, 100, 0)
    kw["seed"] = 7
    best = perturbed(logits, x_t, weights, **kw)[1].topk(2)[0]
    gap = best[0, :, 0] - best[0, :, 1]
    gap[gap < 1e-5] = float("inf")
    x_t[:] = 0  # stays
    x_t[0, gap.argsort()[:12]] = K
    got = run(logits, x_t, weights, **kw)
    assert torch.equal(got, reference.transition_step(logits, x_t, weights, **kw))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("K", "L"), [(2, 65), (257, 65), (257, 5000), (4096, 65), (8192, 65)])
def test_cuda_matches_reference(K, L, rule, dtype):
    """L = 5000: more rows than programs."""
    logits, x_t, kw = make(K, 2, L, RULES[rule], dtype)
    weights = weights_of("mask_replace", K, 100, 40)
    device = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in kw.items()}
    got = ops.transition_step(logits.cuda(), x_t.cuda(), weights.cuda(), seed=3, **device)
    agree(got.cpu(), logits, x_t, weights, seed=3, **kw)


@pytest.mark.gpu
def test_cuda_graph_replays_with_a_new_seed():
    logits, x_t, _ = make(512, 2, 64, {})
    logits, x_t, seed = logits.cuda(), x_t.cuda(), torch.tensor([1], device="cuda")
    weights = weights_of("mask_replace", 512, 100, 40).cuda()
    feature, head = torch.randn(2, 64, 32).cuda(), torch.randn(512, 32).cuda()
    for _ in range(2):
        ops.transition_step(logits, x_t, weights, seed=seed)
        ops.sample_head(feature, head, None, x_t, weights, seed=seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dense = ops.transition_step(logits, x_t, weights, seed=seed)
        sparse = ops.sample_head(feature, head, None, x_t, weights, seed=seed)
    for value in (5, 6):
        seed.fill_(value)
        graph.replay()
        expected = ops.transition_step(logits, x_t, weights, seed=value)
        assert torch.equal(dense, expected)
        expected = ops.sample_head(feature, head, None, x_t, weights, seed=value)
        assert torch.equal(sparse, expected)


@pytest.mark.gpu
def test_cuda_bad_rows_are_minus_one():
    logits, x_t, _ = make(16, 1, 4, {}, masked=1.0)
    logits[0, 0, 3], logits[0, 1, 3], logits[0, 2] = float("nan"), float("inf"), float("-inf")
    weights = weights_of("mask", 16, 100, 0).cuda()
    got = ops.transition_step(logits.cuda(), x_t.cuda(), weights, seed=0)[0]
    assert got[:3].tolist() == [-1, -1, -1]
    assert 0 <= int(got[3]) < 16


@pytest.mark.isa
def test_strided_views_and_per_image_steps():
    K = 64
    wide = random_logits((2, 18, 2 * K))
    logits, x_t = wide[:, ::2, :K], torch.full((2, 9), K)
    per_image = torch.stack([weights_of("mask_replace", K, 90, 80), weights_of("mask", K, 5, 0)])
    got = ops.transition_step(logits, x_t, per_image, seed=4)
    for b in range(2):
        one = ops.transition_step(
            logits[b : b + 1], x_t[b : b + 1], per_image[b], seed=4,
            image_indices=torch.tensor([b]),
        )  # fmt: skip
        assert torch.equal(got[b : b + 1], one)
    agree(got, logits, x_t, per_image, seed=4)


def test_result_does_not_depend_on_the_batch():
    logits, x_t, _ = make(100, 6, 20, {})
    weights = weights_of("mask_replace", 100, 70, 30)
    index = torch.tensor([4, 9, 2, 11, 0, 7])
    whole = ops.transition_step(logits, x_t, weights, seed=5, image_indices=index)
    for part in (slice(0, 2), slice(2, 3), slice(3, 6)):
        got = ops.transition_step(
            logits[part], x_t[part], weights, seed=5, image_indices=index[part]
        )
        assert torch.equal(got, whole[part])
    again = ops.transition_step(logits, x_t, weights, seed=5, image_indices=index)
    assert torch.equal(again, whole)
    other = ops.transition_step(logits, x_t, weights, seed=6, image_indices=index)
    assert not torch.equal(other, whole)


def chi_square(counts, expected):
    """Pool cells below 5 expected, and compare with the 1 - FALSE_ALARM quantile."""
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    assert (counts[expected == 0] == 0).all(), "an impossible token was drawn"
    keep = expected >= 5
    pooled = np.r_[counts[keep], counts[~keep].sum()], np.r_[expected[keep], expected[~keep].sum()]
    if pooled[1][-1] < 5:
        # a Poisson bound for what is left, at the same rate
        assert stats.poisson.sf(pooled[0][-1] - 1, max(pooled[1][-1], 1e-30)) > FALSE_ALARM
        pooled = pooled[0][:-1], pooled[1][:-1]
    if len(pooled[0]) < 2:
        return
    statistic = ((pooled[0] - pooled[1]) ** 2 / pooled[1]).sum()
    assert statistic < stats.chi2.isf(FALSE_ALARM, len(pooled[0]) - 1)


@pytest.mark.parametrize("rule", ["plain", "guided", "top_r", "top_k", "all"])
@pytest.mark.parametrize("stride", [1, 4, 25])
@pytest.mark.parametrize("name", SCHEDULES)
def test_distribution(name, stride, rule, seed):
    """10^6 draws for MASK and 10^6 for a real token against the mixture written out."""
    K, n = 6, 1_000_000
    t = 50
    row, _, kw = make(K, 1, 1, RULES[rule])
    weights = weights_of(name, K, t, t - stride)
    options = {k: v for k, v in kw.items() if k != "null_logits"}
    logp = reference.class_scores(row[0, 0], kw.get("null_logits", row)[0, 0], **options)
    wide = {"null_logits": kw["null_logits"].expand(1, n, K)} if "null_logits" in kw else {}
    for x_t in (K, 2):
        x = torch.full((1, n), x_t)
        got = ops.transition_step(row.expand(1, n, K), x, weights, seed=seed, **(kw | wide))
        p = reference.transition_distribution(logp, torch.tensor(x_t), weights)
        chi_square(np.bincount(got[0], minlength=K + 1), p.numpy() * n)


def cpu_gumbel(words):
    from knnfast import _C

    words, out = words.to(torch.uint32), torch.empty(len(words))
    _C.gumbel(pointer(words), len(words), pointer(out))
    return out


def triton_gumbel(words):
    from noise_kernel import noise_kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    words, out = words.to(device), torch.empty(len(words), device=device)
    noise_kernel[(1,)](words, out, len(words), BLOCK=256)
    return out.cpu()


@pytest.mark.isa
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy runs both sides of tl.where
@pytest.mark.parametrize(
    "backend",
    [
        cpu_gumbel,
        pytest.param(triton_gumbel, marks=pytest.mark.gpu if torch.cuda.is_available() else ()),
    ],
)
def test_noise_at_its_ends(backend):
    """From 32 bits to Gumbel noise: finite, falling and within 1e-6 of FP64, ends and middle."""
    top = 2**32 - 1
    ends = [0, 1, 2, 3, 255, 256, 2**23, 2**24 - 1, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**31 + 1]
    words = sorted({w for e in ends for w in (e, top - e)} | set(range(0, top, top // 99)))
    words = torch.tensor(words)
    got, exact = backend(words).double(), philox.gumbel(words)
    assert torch.isfinite(got).all()
    assert (got.diff() <= 0).all()
    assert float(((got - exact).abs() / exact.abs().clamp_min(1.0)).max()) < 1e-6
    assert float(exact[0]) > 22.87  # v = 2^-33
    assert float(exact[-1]) < -3.129  # 1 - v = 2^-33


def test_rare_events_appear_at_their_rate(seed):
    """A class of probability 2^-20, drawn 2^24 times: 16 expected."""
    n, times = 1 << 20, 16
    row = torch.tensor([0.0, -float(np.log(2.0**20 - 1))])
    weights = weights_of("mask", 2, 1, 0)
    x = torch.full((1, n), 2)
    hits = 0
    for i in range(times):
        image = torch.tensor([i])
        got = ops.transition_step(row.expand(1, n, 2), x, weights, seed=seed, image_indices=image)
        hits += int((got == 1).sum())
    low, high = stats.poisson.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], 16.0)
    assert low <= hits <= high


@pytest.mark.isa
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy runs both sides of tl.where
@pytest.mark.parametrize(
    ("run", "dtype"),
    [
        (ops.transition_step, torch.float32),
        (ops.transition_step, torch.float16),
        pytest.param(interpreted, torch.float16, marks=ON_THE_CPU),
    ],
    ids=["cpu-float32", "cpu-float16", "triton-float16"],
)
def test_tails_never_give_a_masked_class(run, dtype):
    ninf, n = float("-inf"), 8 if run is interpreted else 50_000
    for row, allowed in [
        ([ninf, 1e4, -1e4], {1}), ([ninf, ninf, -1e4], {2}), ([ninf, 0.0, 0.0], {1, 2}),
        ([1e4, 1e4, ninf], {0, 1}), ([-1e4, -1e4, -1e4], {0, 1, 2}), ([0.0, ninf], {0}),
        ([-1e4, 1e4], {1}), ([1e4, 1e4], {0, 1}), ([ninf] * 20 + [-1e4], {20}),
    ]:  # fmt: skip
        K = len(row)
        x, weights = torch.full((1, n), K), weights_of("mask", K, 100, 0)
        logits = torch.tensor(row, dtype=dtype).expand(1, n, K)
        for rule in (
            {}, {"purity": 1.0},
            {"null_logits": logits, "guidance": 7.5, "top_r": 0.99, "temperature": 0.1},
        ):  # fmt: skip
            got = set(run(logits, x, weights, seed=0, **rule).unique().tolist())
            assert got <= allowed
            assert got == allowed or n == 8
    # excluded in the null pass alone counts too
    x, weights = torch.full((1, n), 3), weights_of("mask", 3, 100, 0)
    null = torch.tensor([0.0, ninf, 0.0], dtype=dtype).expand(1, n, 3)
    cond = torch.zeros(1, n, 3, dtype=dtype)
    got = run(cond, x, weights, seed=0, null_logits=null, guidance=2.0)
    assert set(got.unique().tolist()) == {0, 2}


@pytest.mark.isa
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's of NaN
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_bad_rows(run, dtype, bad):
    """On the CPU they raise; where nothing may synchronise their tokens are -1."""
    logits, x_t, _ = make(8, 1, 4, {}, dtype, masked=1.0)
    fine = torch.zeros_like(logits)
    if bad is None:
        logits[0, 2] = float("-inf")
    else:
        logits[0, 2, 5] = bad
    for pair, rule in (
        ((logits, None), {}), ((logits, None), {"purity": 1.0}), ((logits, None), {"top_r": 0.9}),
        ((logits, fine), {"guidance": 2.0}), ((fine, logits), {"guidance": 2.0}),
    ):  # fmt: skip
        step = pair[0], x_t, weights_of("mask", 8, 100, 0)
        rule = {"null_logits": pair[1], "seed": 0} | rule
        if run is interpreted:
            got = run(*step, **rule)[0]
            assert int(got[2]) == -1
            assert ((got >= 0) & (got < 8)).sum() == 3
        else:
            with pytest.raises(ValueError, match="NaN, \\+inf or no finite class in 1 of"):
                run(*step, **rule)


@pytest.mark.parametrize("cond", [float("nan"), float("inf")])
def test_the_definition_refuses_the_same_rows(cond):
    logits, null = torch.zeros(1, 40, 4), torch.zeros(1, 40, 4)
    logits[..., 1], null[..., 1] = cond, float("-inf")  # also where the other pass excludes
    masked, real = torch.full((1, 40), 4), torch.full((1, 40), 2)
    # t, MASK_P, MASK_U, REAL_P, REAL_U0, REAL_U1, KEEP: without P a row is read only between the Us
    read, unread = (torch.tensor([50, 0, 0.5, 0, 0.2, u1, 0]).double() for u1 in (0.7, 0.2))
    rule = {"seed": 3, "null_logits": null, "guidance": 2.0}
    for step in (reference.transition_step, ops.transition_step):
        with pytest.raises(ValueError, match="NaN, \\+inf or no finite class"):
            step(logits, real, read, **rule)
    for x_t, weights in ((masked, read), (real, unread)):
        got = ops.transition_step(logits, x_t, weights, **rule)
        assert torch.equal(got, reference.transition_step(logits, x_t, weights, **rule))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy runs both sides of tl.where
@BOTH
def test_rows_at_any_distance(run):
    """One position an image: the stride along positions says nothing of where a row is."""
    K = 33
    x_t, weights = torch.full((3, 1), K), weights_of("mask", K, 100, 0)
    turned, null = (random_logits((3, 3, K)).transpose(0, 1)[:, :1] for _ in range(2))
    assert turned.is_contiguous()
    assert turned.stride(1) != K
    wide = random_logits((3, 1, 2 * K))[..., :K]
    shared = random_logits((1, 1, K)).expand(3, -1, -1)
    for logits in (turned, wide, shared):
        for rule in ({}, {"null_logits": null, "guidance": 2.0}):
            got = run(logits, x_t, weights, seed=5, **rule)
            agree(got, logits, x_t, weights, seed=5, **rule)


@pytest.mark.isa
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [[100, 0], [100, 50, 0], list(range(100, -1, -5))])
def test_strided_sampling_with_an_ideal_denoiser(name, steps, seed):
    """Single and independent tokens keep their distribution for any list of steps."""
    K, n = 4, 200_000
    schedule = levels(name, K)
    truth = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    x = reference.sample_prior(schedule, 100, K, (n, 2), seed=seed)
    for t, s in itertools.pairwise(steps):
        # p(x_0 | x_t) by Bayes from this token alone: ideal, as tokens are independent
        A, B, C = (float(getattr(schedule, c)[t]) for c in "ABC")
        likelihood = torch.full((K + 1, K), B, dtype=torch.float64)
        likelihood[range(K), range(K)] += A
        likelihood[K] = C
        ideal = truth[:, None, :] * likelihood[None]  # [2, x_t, x_0]
        ideal = ideal / ideal.sum(-1, keepdim=True)
        logits = ideal.log().float()[torch.arange(2)[None], x]
        weights = reference.transition_weights(schedule, t, s, K)
        x = ops.transition_step(logits, x, weights, seed=seed)
    joint = np.bincount((x[:, 0] * K + x[:, 1]).numpy(), minlength=K * K)
    expected = (truth[0][:, None] * truth[1][None]).reshape(-1).numpy() * n
    if name == "vq_diffusion":  # starts from x_T, of which 1e-5 differs from the forward process
        assert np.abs(joint / n - expected / n).max() < 6 * np.sqrt(0.25 / n) + 2e-5
    else:
        chi_square(joint, expected)


def test_one_step_posterior_at_a_stride_fails():
    """VQ-Diffusion's fast mode at stride 5 leaves 36 % masked before its last draw; exact: 0.

    Its steps start at the (0-based) times 99, 94, ..., 4 and 0, and each but the last draws from
    the posterior of one single step: 95 -> 94 for the jump 99 -> 94, 4 -> 3 for the jump 4 -> 0. In
    levels, one higher: 96 -> 95, ..., 6 -> 5, then 5 -> 4. A MASK stays in t -> s with probability
    C_s / C_t, so 19 jumps leave prod (5 j - 1) / (5 j) = 0.4747 and the twentieth 3 / 4 of that.
    """
    K, stride = 4, 5
    schedule = levels("vq_diffusion", K)
    p = torch.full((K,), 0.25, dtype=torch.float64)

    def stays(t, s):
        weights = reference.transition_weights(schedule, t, s, K)
        return float(reference.transition_distribution(p.log(), torch.tensor(K), weights)[K])

    times = [*range(99, -1, -stride), 0]
    wrong = right = 1.0
    for now, after in itertools.pairwise(times):
        if now == 4:
            assert wrong == pytest.approx(0.4747, abs=1e-4)
        single = now - (stride - 1) if now > stride - 1 else now
        wrong *= stays(single + 1, single)
        right *= stays(now + 1, after + 1)
    assert wrong == pytest.approx(0.3560, abs=1e-4)
    # level 1 holds 9e-6 of MASK: what the exact jumps leave, and what the last draw resolves
    assert right == pytest.approx(float(schedule.C[1] / schedule.C[100]), rel=1e-6)
    assert right < 1e-5


@pytest.mark.parametrize("n", [2, 5, 20])
def test_correlated_tokens_mismatch_is_one_over_2n(n, seed):
    """Two equal tokens, unmasked in the same step of n, are drawn apart: 1/n of 1/2 (K = 2)."""
    images = 100_000
    schedule = levels("mask", 2)
    x = torch.full((images, 2), 2)
    steps = [round(100 * (n - i) / n) for i in range(n + 1)]
    for t, s in itertools.pairwise(steps):
        other = x.flip(1)
        logits = torch.zeros(images, 2, 2)
        known = other < 2
        logits[known] = torch.where(
            torch.nn.functional.one_hot(other[known], 2).bool(), 0.0, float("-inf")
        )
        weights = reference.transition_weights(schedule, t, s, 2)
        x = ops.transition_step(logits, x, weights, seed=seed)
    mismatch = float((x[:, 0] != x[:, 1]).double().mean())
    sigma = np.sqrt(0.5 / n / images)
    assert abs(mismatch - 1 / (2 * n)) < stats.norm.isf(FALSE_ALARM / 2) * sigma


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"logits": torch.zeros(2, 3)}, ValueError, "logits"),
        ({"logits": torch.zeros(2, 3, 4, dtype=torch.float64)}, TypeError, "logits"),
        ({"x_t": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, "x_t"),
        ({"x_t": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "x_t"),
        ({"weights": torch.zeros(6, dtype=torch.float64)}, ValueError, "weights"),
        ({"weights": torch.zeros(7)}, TypeError, "weights"),
        ({"null_logits": torch.zeros(2, 3, 5)}, ValueError, "null_logits"),
        ({"logits": torch.zeros(2, 3, 1)}, ValueError, "logits: at least 2 classes, got 1"),
        ({"logits": None}, TypeError, "logits: must be a tensor, got NoneType"),
        ({"weights": [0.0] * 7}, TypeError, "weights: must be a tensor, got list"),
        ({"guidance": float("nan")}, ValueError, "guidance: must be finite, got nan"),
        ({"guidance": "3"}, TypeError, "guidance: must be a number, got '3'"),
        ({"guidance": 3.0}, ValueError, "guidance: must be 1 without null_logits, got 3.0"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": "warm"}, TypeError, "temperature: must be a number, got 'warm'"),
        ({"temperature": float("inf")}, ValueError, "temperature: must be finite"),
        ({"top_r": None}, TypeError, "top_r: must be a number, got None"),
        ({"top_k": 2.5}, TypeError, "top_k: must be an integer, got 2.5"),
        ({"top_r": 0.0}, ValueError, "top_r"),
        ({"top_k": -1}, ValueError, "top_k"),
        ({"purity": -1.0}, ValueError, "purity"),
        ({"purity": "much"}, TypeError, "purity: must be a number"),
        ({"image_indices": torch.zeros(3, dtype=torch.int64)}, ValueError, "image_indices"),
        ({"image_indices": torch.tensor([0, 1 << 32])}, ValueError, r"must be in \[0, 2\^32\)"),
        ({"image_indices": torch.tensor([-1, 0])}, ValueError, r"must be in \[0, 2\^32\)"),
        (
            {"weights": torch.full((7,), float("nan")).double()},
            ValueError,
            "weights: must be finite",
        ),
        ({"seed": 1.5}, TypeError, r"seed: must be an integer, got 1\.5"),
        ({"seed": 1 << 63}, ValueError, r"seed: must be in \[-2\^63, 2\^63\)"),
        ({"seed": torch.tensor([1, 2])}, ValueError, "seed: must have one element, got 2"),
        ({"seed": torch.tensor(1.9)}, TypeError, "seed"),
    ],
)
def test_rejects(change, error, match):
    call = {
        "logits": torch.zeros(2, 3, 4), "x_t": torch.zeros(2, 3, dtype=torch.int64),
        "weights": weights_of("mask", 4, 50, 25), "seed": 0,
    } | change  # fmt: skip
    logits, x_t, weights = call.pop("logits"), call.pop("x_t"), call.pop("weights")
    with pytest.raises(error, match=match):
        ops.transition_step(logits, x_t, weights, **call)


@pytest.mark.isa
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy runs both sides of tl.where
@BOTH
@pytest.mark.parametrize(
    ("strange", "usual"),
    [
        ({"temperature": 1e-40}, {"temperature": 2.0**-100}),
        ({"temperature": 1e39}, {"temperature": 2.0**100}),
        ({"purity": 1e39}, {"purity": 2.0**100}),
        ({"top_k": sys.maxsize}, {}),
        ({"top_k": 2**80, "top_r": 0.8}, {"top_r": 0.8}),
    ],
)
def test_settings_beyond_the_kernels_types(monkeypatch, run, strange, usual):
    """As the definition has it: the best class, any class, all classes."""
    if run is interpreted:
        monkeypatch.setattr(torch.ops.knnfast, "transition_step", _step_cuda)
    logits, x_t, _ = make(13, 2, 40, {}, masked=1.0)
    logits[..., 3] = float("-inf")
    weights = weights_of("mask", 13, 50, 0)
    got = ops.transition_step(logits, x_t, weights, seed=3, **strange)
    assert torch.equal(got, ops.transition_step(logits, x_t, weights, seed=3, **usual))
    if strange.get("temperature", 1) < 1 or "purity" in strange:
        assert torch.equal(got, logits.argmax(-1))
    assert not (got == 3).any()


@pytest.mark.isa
@pytest.mark.parametrize("share", [-4.0, 1e300, 7.0])
def test_purity_keeps_none_or_all_where_the_share_is_none(share):
    """A share of positions to keep that is no share: as 0 below it, as 1 above."""
    logits, x_t, _ = make(4, 2, 9, {})
    weights = weights_of("mask_replace", 4, 50, 25)
    weights[6], clamped = share, weights.clone()
    clamped[6] = min(max(share, 0.0), 1.0)
    x_s, expected = (
        ops.transition_step(logits, x_t, w, seed=3, purity=1.0) for w in (weights, clamped)
    )
    assert torch.equal(x_s, expected)
    assert torch.equal(x_s == 4, (x_t == 4) & (share > 0))


@pytest.mark.parametrize("rule", [{}, {"null": True, "guidance": 2.0}, {"purity": 1.0}])
@pytest.mark.parametrize("token", [-1, 5, 1 << 40, -(1 << 62)])
def test_rejects_tokens_out_of_range(token, rule):
    logits, x_t, kw = make(4, 2, 9, rule)
    weights = weights_of("mask_replace", 4, 50, 25)
    x_t[1, 3] = token
    with pytest.raises(ValueError, match=r"x_t: tokens must be in \[0, 4\], 4 is MASK"):
        ops.transition_step(logits, x_t, weights, seed=0, **kw)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy runs both sides of tl.where
def test_triton_takes_tokens_out_of_range_for_codes_of_probability_0():
    if torch.cuda.is_available():
        pytest.skip("compiled in this process")
    logits, x_t, _ = make(13, 2, 9, {})
    weights = weights_of("mask_replace", 13, 100, 40)
    logits[..., 0] = float("-inf")
    expected = interpreted(logits, torch.zeros_like(x_t), weights, seed=11)
    for token in (-1, 14, 1 << 40):
        got = interpreted(logits, torch.full_like(x_t, token), weights, seed=11)
        assert torch.equal(got, torch.where((expected == 0) & (got == token), token, expected))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy runs both sides of tl.where
@pytest.mark.parametrize("triton", [False, pytest.param(True, marks=ON_THE_CPU)])
def test_rows_of_tokens_that_lie_transposed(triton):
    """The compact form completes an x_s of any strides."""
    from knnfast.ops.transition import _rows_cpu, _rows_cuda

    logits, x_t, _ = make(13, 3, 5, {})
    weights = weights_of("mask_replace", 13, 100, 40)
    step = x_t, weights, torch.arange(3), torch.tensor([2])
    x_s, drawn = torch.ops.knnfast.transition_choose(*step, 13)
    rows, turned = logits.view(-1, 13)[drawn], x_s.T.contiguous().T
    run = _rows_cuda if triton else _rows_cpu
    got = run(rows, None, drawn, x_t, turned, *step[1:], 1.0, 1.0, 1.0, 0)
    assert not turned.is_contiguous()
    assert torch.equal(got, ops.transition_step(logits, *step[:2], seed=2))


def test_too_many_classes_for_a_kernel():
    logits, x_t, _ = make(65537, 1, 1, {})
    with pytest.raises(ValueError, match="K must be at most 65536 on CUDA, got 65537"):
        interpreted(logits, x_t, weights_of("mask", 65537, 50, 25), seed=0)


def test_empty():
    for shape in [(0, 3, 4), (2, 0, 4)]:
        x_t = torch.zeros(shape[:2], dtype=torch.int64)
        got = ops.transition_step(torch.zeros(shape), x_t, weights_of("mask", 4, 50, 25), seed=0)
        assert got.shape == shape[:2]


def test_opcheck_and_compile(device):
    logits, x_t, _ = make(16, 2, 5, {})
    weights = weights_of("mask_replace", 16, 50, 25)
    logits, x_t, weights, index, key = (
        v.to(device) for v in (logits, x_t, weights, torch.arange(2), torch.tensor([3]))
    )
    torch.library.opcheck(
        torch.ops.knnfast.transition_step.default,
        (logits, logits, x_t, weights, index, key, 2.0, 1.0, 1.0, 0, None),
    )
    choices = torch.ops.knnfast.transition_choose.default
    torch.library.opcheck(choices, (x_t, weights, index, key, 16))
    x_s, drawn = choices(x_t, weights, index, key, 16)
    assert len(drawn) > 0
    torch.library.opcheck(
        torch.ops.knnfast.transition_rows.default,
        (logits.view(-1, 16)[drawn], None, drawn, x_t, x_s, weights, index, key, 1.0, 1.0, 0.9, 4),
    )

    def call(logits, x_t, weights, seed):
        return ops.transition_step(logits.float() * 1.0, x_t, weights, seed=seed) + 0

    eager = call(logits, x_t, weights, key)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, x_t, weights, key), eager)
    if device == "cpu":  # elsewhere looking would synchronise
        with pytest.raises(ValueError, match="x_t: tokens must be"):
            compiled(logits, x_t - 17, weights, key)

    class Step(torch.nn.Module):
        def forward(self, logits, x_t, weights, seed):
            return call(logits, x_t, weights, seed)

    exported = torch.export.export(Step(), (logits, x_t, weights, key))
    assert torch.equal(exported.module()(logits, x_t, weights, key), eager)
    with torch.autocast(device, torch.bfloat16):  # tokens have no lower type to fall to
        assert torch.equal(call(logits, x_t, weights, key), eager)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's and Inductor's
def test_compiles_with_inductor():
    logits, x_t, _ = make(16, 2, 5, {})
    weights, key = weights_of("mask_replace", 16, 50, 25), torch.tensor([3])

    def call(logits, null, x_t, weights, seed):
        return 2 * ops.transition_step(
            logits * 2.0, x_t, weights, seed=seed, null_logits=null, guidance=2.0
        )

    args = logits, logits.flip(0), x_t, weights, key
    assert torch.equal(torch.compile(call, fullgraph=True)(*args), call(*args))
