"""The FP64 definitions against independent brute force: everything else is measured by them."""

import itertools
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transition_helpers import SCHEDULES, brute_force, levels, random_logits

from knnfast import _C, ops, reference
from knnfast.diffusion.schedule import Schedule
from knnfast.ops import philox


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, -1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = philox.philox(*[torch.tensor(c) for c in counter], torch.tensor(key))
    assert [int(w) for w in words] == expected


def in_torch(w0, w1, n):
    w0, w1 = torch.tensor(w0), torch.tensor(w1)
    return float(philox.unit52(w0, w1)), int(philox.below(w0, w1, n))


def in_cpp(w0, w1, n):
    return _C.unit52(w0, w1), _C.below(w0, w1, n)


def in_triton(w0, w1, n):
    from noise_kernel import maps_kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    words = torch.tensor([w0, w1]).to(torch.uint32).to(device)
    uniform = torch.empty(1, dtype=torch.float64, device=device)
    whole = torch.empty(1, dtype=torch.int64, device=device)
    maps_kernel[(1,)](words, n, uniform, whole)
    return float(uniform), int(whole)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("maps", [in_torch, in_cpp, in_triton])
def test_random_maps_at_their_ends(maps):
    top = 0xFFFFFFFF
    assert maps(0, 0, 7) == (2.0**-53, 0)
    assert maps(top, top, 7) == (1.0 - 2.0**-53, 6)
    assert maps(top, top, 8192)[1] == 8191
    assert maps(0x80000000, 0, 2) == (0.5 + 2.0**-53, 1)
    assert maps(0x7FFFFFFF, top, 2) == (0.5 - 2.0**-53, 0)
    assert maps(0, top, 65536)[1] == 0
    assert maps(0x12345678, 0x9ABCDEF0, 1000003) == in_torch(0x12345678, 0x9ABCDEF0, 1000003)


def test_gumbel_at_its_ends():
    ends = philox.gumbel(torch.tensor([0, 0xFFFFFFFF]))
    assert torch.isfinite(ends).all()
    assert float(ends[0]) == pytest.approx(np.log(2.0**33), rel=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("K", [2, 5])
@pytest.mark.parametrize(
    ("t", "s"), [(1, 0), (2, 1), (25, 24), (25, 21), (50, 25), (100, 99), (100, 75), (100, 0)]
)
def test_mixture_equals_brute_force(name, K, t, s):
    schedule = levels(name, K)
    weights = reference.transition_weights(schedule, t, s, K)
    rng = np.random.default_rng(0)
    one_hot = np.eye(K)[1]
    for p in [rng.dirichlet(np.ones(K)), rng.dirichlet(np.full(K, 0.05)), one_hot]:
        for x_t in range(K + 1):
            if x_t < K and schedule.B[t] == 0:
                expected = np.eye(K + 1)[x_t]  # B = 0: a real token can only have been itself
            else:
                expected = brute_force(schedule, t, s, p, x_t)
            with np.errstate(divide="ignore"):
                logp = torch.from_numpy(np.log(p))
            got = reference.transition_distribution(logp, torch.tensor(x_t), weights)
            np.testing.assert_allclose(got.numpy(), expected, atol=2e-11)


@pytest.mark.parametrize("t", [2, 37, 100])
def test_equals_diffusers_posterior(t):
    diffusers = pytest.importorskip("diffusers")
    K, L = 11, 24
    theirs = diffusers.VQDiffusionScheduler(num_vec_classes=K + 1)
    logp = torch.log_softmax(random_logits((2, L, K)), -1)
    x_t = torch.randint(0, K + 1, (2, L))
    expected = theirs.q_posterior(logp.transpose(1, 2), x_t, torch.tensor(t - 1)).exp()
    weights = reference.transition_weights(levels("vq_diffusion", K), t, t - 1, K)
    got = reference.transition_distribution(logp.double(), x_t, weights)
    # theirs holds float32 logarithms of 1e-6 / K, which sets the tolerance
    torch.testing.assert_close(got, expected.transpose(1, 2).double(), atol=3e-5, rtol=0)


def test_truncation_keeps_the_top_mass():
    p = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7]], dtype=torch.float64)
    kept = reference.class_scores(p.log(), top_r=0.8 - 1e-9).exp()
    expected = [[0.625, 0.375, 0, 0], [1 / 8, 0, 0, 7 / 8]]
    torch.testing.assert_close(kept, torch.tensor(expected, dtype=torch.float64))
    kept = reference.class_scores(p.log(), top_k=3).exp()
    assert ((kept > 0).sum(-1) == 3).all()
    assert kept[0, 3] == 0  # a tie goes to the lower index
    assert (reference.class_scores(p.log(), top_r=1e-9) == 0).sum() == 2


def test_guidance_is_linear_in_log_space_and_excludes():
    cond, null = random_logits((3, 7)).double(), random_logits((3, 7)).double()
    cond[0, 2] = null[1, 4] = float("-inf")
    got = reference.class_scores(cond, null, guidance=3.0)
    assert torch.isneginf(got[0, 2])
    assert torch.isneginf(got[1, 4])
    log_ratio = torch.log_softmax(cond[2], -1) - torch.log_softmax(null[2], -1)
    expected = torch.log_softmax(torch.log_softmax(null[2], -1) + 3.0 * log_ratio, -1)
    torch.testing.assert_close(got[2], expected)
    torch.testing.assert_close(
        reference.class_scores(cond[2], null[2], guidance=1.0), torch.log_softmax(cond[2], -1)
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_prior_and_last_step(name):
    K = 5
    schedule = levels(name, K)
    x = reference.sample_prior(schedule, 100, K, (40, 500), seed=3)
    share = float((x == K).double().mean())
    expected = schedule.C[100] / (schedule.C[100] + K * schedule.B[100])
    assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / x.numel()) + 1e-12
    for t in (1, 25, 100):  # nothing is masked at level 0
        weights = reference.transition_weights(schedule, t, 0, K)
        out = reference.transition_step(random_logits((40, 500, K)), x, weights, seed=1)
        assert int(out.max()) < K


@pytest.mark.parametrize("steps", [[100, 75, 50, 25, 0], [100, 1, 0], list(range(100, -1, -1))])
def test_purity_unmasks_the_expected_number(steps):
    K, L = 7, 64
    schedule = levels("mask", K)
    x = torch.full((2, L), K)
    for t, s in itertools.pairwise(steps):
        weights = reference.transition_weights(schedule, t, s, K)
        before = x
        x = reference.transition_step(random_logits((2, L, K)), x, weights, seed=5, purity=1.0)
        assert ((x == K).sum(-1) == round(L * s / 100)).all()
        assert (x[before < K] == before[before < K]).all()


def test_loss_equals_brute_force():
    K, L = 4, 6
    for name in SCHEDULES:
        schedule = levels(name, K)
        x_0 = torch.randint(0, K, (3, L))
        t = torch.tensor([1, 40, 100])
        logits = random_logits((3, L, K)).double()
        p = torch.softmax(logits, -1).numpy()
        x_t = torch.where(torch.rand(3, L) < 0.5, K, x_0)
        if name != "mask":
            x_t[:, 0] = (x_0[:, 0] + 1) % K
        loss, kl = reference.transition_loss(
            logits, x_0, x_t, t, schedule, auxiliary=0.1, weight=torch.tensor([1.0, 2.0, 0.5])
        )
        total, expected = 0.0, np.zeros(3)
        for b, level in enumerate(t.tolist()):
            for j in range(L):
                truth = np.eye(K)[x_0[b, j]]
                real = int(x_t[b, j]) < K
                if real and name == "mask":
                    term = 0.0
                else:
                    q = brute_force(schedule, level, level - 1, truth, int(x_t[b, j]))
                    m = brute_force(schedule, level, level - 1, p[b, j], int(x_t[b, j]))
                    on = q > 0
                    term = float((q[on] * np.log(q[on] / m[on])).sum())
                expected[b] += term / L
                aux = -np.log(p[b, j, x_0[b, j]]) * 0.1 * (2 - (level - 1) / 100)
                total += (term + aux) * [1.0, 2.0, 0.5][b] / (3 * L)
        np.testing.assert_allclose(kl.numpy(), expected, rtol=1e-7, atol=1e-10)
        assert float(loss) == pytest.approx(total, rel=1e-7)
        if name == "vq_diffusion":  # at t = 1 the KL is -log p(x_0)
            nll = -np.log(p[0, np.arange(L), x_0[0].numpy()]).mean()
            assert float(kl[0]) == pytest.approx(nll, rel=1e-6)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"schedule": None}, TypeError, "schedule: must have A, B and C, got None"),
        ({"num_codes": 5}, ValueError, "schedule: is of 4 codes, not of 5"),
        ({"t": 0}, ValueError, r"t: must be in \[1, 100\], got 0"),
        ({"t": -1}, ValueError, r"t: must be in \[1, 100\], got -1"),
        ({"t": 101}, ValueError, r"t: must be in \[1, 100\], got 101"),
        ({"t": 2.0}, TypeError, "t: must be an integer, got 2.0"),
        ({"seed": 2**63}, ValueError, "seed: must be in"),
        ({"seed": 1.5}, TypeError, "seed: must be an integer, got 1.5"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, "seed: must have one element"),
        ({"t": torch.tensor(4)}, TypeError, "t: must be an integer, got tensor"),
        ({"shape": (2,)}, ValueError, r"shape: must be \(B, L\), got \(2,\)"),
        ({"shape": (-1, 3)}, ValueError, "shape: must not be negative"),
        ({"image_indices": torch.zeros(3, dtype=torch.int64)}, ValueError, "image_indices: shape"),
        ({"image_indices": torch.tensor([0, -1])}, ValueError, r"must be in \[0, 2\^32\)"),
        ({"image_indices": torch.tensor([2**32, 0])}, ValueError, r"must be in \[0, 2\^32\)"),
    ],
)
def test_prior_rejects(changed, error, message):
    given = {"schedule": Schedule("vq_diffusion", 100, 4), "t": 100, "num_codes": 4, "seed": 0}
    given |= {"shape": (2, 3), **changed}
    with pytest.raises(error, match=message):
        reference.sample_prior(**given)


def test_a_schedules_rounding_noise_is_none():
    """What 1 - A - C leaves below 0 or above 1 counts as 0 and 1."""
    clean = SimpleNamespace(A=[1.0, 0.5, 0.0], B=[0.0, 0.0, 0.0], C=[0.0, 0.5, 1.0])
    noisy = SimpleNamespace(A=[1 + 1e-16, 0.5, -1e-17], B=[-1e-17] * 3, C=[0.0, 0.5, 1 + 1e-10])
    weights = [reference.transition_weights(s, 2, 1, 4) for s in (clean, noisy)]
    assert torch.equal(*weights)
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    args = torch.zeros(1, 3, 4), tokens, tokens + 4, torch.tensor([2])
    losses = [ops.transition_loss(*args, s)[0] for s in (clean, noisy)]
    assert torch.equal(*losses)


def test_prior_of_no_token():
    schedule = Schedule("mask", 10, 4)
    for shape in ((0, 5), (3, 0)):
        assert reference.sample_prior(schedule, 10, 4, shape, seed=0).shape == shape


def test_a_schedule_has_as_many_of_each():
    broken = SimpleNamespace(A=[1.0, 0.5], B=[0.0, 0.0], C=[0.0])
    with pytest.raises(ValueError, match=r"A, B and C must be of levels .* got \[2, 2, 1\]"):
        reference.transition_weights(broken, 1, 0, 4)


@pytest.mark.parametrize("bad", [math.nan, -1e-6, 1 + 1e-6, 1.5, math.inf])
def test_a_schedule_holds_probabilities(bad):
    given = SimpleNamespace(A=[1.0, 0.5], B=[0.0, bad], C=[0.0, 0.5])
    message = re.escape(f"schedule: B must be in [0, 1] at all levels, got {bad}")
    with pytest.raises(ValueError, match=message):
        reference.transition_weights(given, 1, 0, 4)
    with pytest.raises(ValueError, match=message):
        reference.sample_prior(given, 1, 4, (2, 3), seed=0)
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        ops.transition_loss(torch.zeros(2, 3, 4), tokens, tokens, torch.tensor([1, 1]), given)


def test_attention_equals_projections_and_sdpa():
    B, L, D, H, N, E = 3, 5, 16, 4, 6, 10
    x, n = torch.randn(B, L, D).double(), torch.randn(B, N, E).double()
    mask = torch.rand(B, N) < 0.6
    mask[0] = True
    mask[2] = False
    q, k, v = (torch.nn.Linear(i, D).double() for i in (D, E, E))
    out = torch.nn.Linear(D, D).double()
    shift, scale = torch.randn(B, D).double(), torch.randn(B, D).double()
    folded = reference.fold_neighbours(
        n, q.weight, k.weight, v.weight, out.weight, q.bias, v.bias, out.bias, heads=H, mask=mask
    )
    got = reference.neighbour_attention(x, folded, scale=scale, shift=shift)
    z = torch.nn.functional.layer_norm(x, (D,)) * (1 + scale[:, None]) + shift[:, None]

    def split(y):
        return y.view(B, -1, H, D // H).transpose(1, 2)

    attended = torch.nn.functional.scaled_dot_product_attention(
        split(q(z)), split(k(n)), split(v(n)), attn_mask=mask[:, None, None, :].expand(B, 1, L, N)
    )
    expected = x + out(attended.transpose(1, 2).reshape(B, L, D))
    torch.testing.assert_close(got[:2], expected[:2])
    assert torch.equal(got[2], x[2])  # every token off: attention adds exactly nothing
