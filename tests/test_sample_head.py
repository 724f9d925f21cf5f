"""sample_head: the dense step's tokens from the rows that need logits alone."""

import pytest
import torch
from transition_helpers import SCHEDULES, levels, weights_of

from knnfast import ops, reference


def make(K, B=2, L=40, D=24, dtype=torch.float32):
    features = torch.randn(B, L, D).to(dtype)
    null = torch.randn(B, L, D).to(dtype)
    weight, bias = (torch.randn(K, D) * 0.5).to(dtype), torch.randn(K).to(dtype)
    x_t = torch.where(torch.rand(B, L) < 0.5, K, torch.randint(0, K, (B, L)))
    return features, null, weight, bias, x_t


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("rule", [{}, {"guidance": 2.5}, {"top_r": 0.8, "top_k": 9}])
@pytest.mark.parametrize("K", [2, 100, 512])
def test_matches_reference_and_dense(name, rule, K):
    features, null, weight, bias, x_t = make(K)
    if "guidance" in rule:
        rule = rule | {"null_features": null}
    for t, s in [(100, 96), (50, 49), (7, 0)]:
        weights = weights_of(name, K, t, s)
        got = ops.sample_head(features, weight, bias, x_t, weights, seed=9, **rule)
        expected = reference.sample_head(features, weight, bias, x_t, weights, seed=9, **rule)
        assert (got != expected).double().mean() < 2e-2
        dense = {k: v for k, v in rule.items() if k != "null_features"}
        if "null_features" in rule:
            dense["null_logits"] = torch.nn.functional.linear(null, weight, bias)
        logits = torch.nn.functional.linear(features, weight, bias)
        assert (got != ops.transition_step(logits, x_t, weights, seed=9, **dense)).sum() <= 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_equals_dense_on_identical_logits(name):
    """A one-hot head makes both forms see the same bits: every token equal."""
    K = 65
    logits = torch.randn(4, 200, K) * 4
    x_t = torch.where(torch.rand(4, 200) < 0.5, K, torch.randint(0, K, (4, 200)))
    for t, s in [(100, 60), (30, 29), (1, 0)]:
        weights = weights_of(name, K, t, s)
        for rule in ({}, {"top_r": 0.7, "temperature": 0.8}):
            dense = ops.transition_step(logits, x_t, weights, seed=2, **rule)
            sparse = ops.sample_head(
                logits, lambda rows: rows.clone(), None, x_t, weights, seed=2, num_codes=K, **rule
            )
            assert torch.equal(dense, sparse)


def test_rows_are_the_share_that_the_mathematics_says():
    """vq_diffusion, 100 steps: 2.9 % of rows on average; mask: 1 %."""
    K, L = 64, 4096
    for name, low, high in [
        ("vq_diffusion", 0.026, 0.032), ("mask_replace", 0.06, 0.08), ("mask", 0.009, 0.011)
    ]:  # fmt: skip
        schedule = levels(name, K)
        x = reference.sample_prior(schedule, 100, K, (1, L), seed=0)
        rows = 0

        def head(features):
            nonlocal rows
            rows += len(features)
            return torch.zeros(len(features), K)

        for t in range(100, 0, -1):
            weights = reference.transition_weights(schedule, t, t - 1, K)
            x = ops.sample_head(torch.zeros(1, L, 1), head, None, x, weights, seed=0, num_codes=K)
        assert low < rows / (100 * L) < high


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy runs both sides of tl.where
def test_triton_matches_reference():
    if torch.cuda.is_available():
        pytest.skip("compiled in this process; the gpu tests cover it")
    from knnfast.kernels.sample_head import launch_sample_head

    features, null, weight, bias, x_t = make(21, B=1, L=19)
    weights = weights_of("mask_replace", 21, 100, 60)
    index, key = torch.tensor([5]), torch.tensor([8])
    got = launch_sample_head(
        features, null, weight, bias, x_t, weights, index, key, 2.0, 1.0, 1.0, 0
    )
    expected = reference.sample_head(
        features, weight, bias, x_t, weights, seed=8, image_indices=index, null_features=null,
        guidance=2.0,
    )  # fmt: skip
    assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cuda_equals_cuda_dense(dtype):
    features, _, weight, bias, x_t = (v.cuda() for v in make(513, L=256, dtype=dtype))
    weights = weights_of("mask_replace", 513, 100, 60).cuda()
    got = ops.sample_head(features, weight, bias, x_t, weights, seed=8)
    logits = torch.nn.functional.linear(features.float(), weight.float(), bias.float())
    dense = ops.transition_step(logits, x_t, weights, seed=8)
    assert (got != dense).sum() <= 2


def test_rejects():
    features, null, weight, bias, x_t = make(8)
    weights = weights_of("mask", 8, 50, 25)
    with pytest.raises(ValueError, match="weight"):
        ops.sample_head(features, weight[:, :-1], bias, x_t, weights, seed=0)
    with pytest.raises(ValueError, match="bias"):
        ops.sample_head(features, weight, bias[:-1], x_t, weights, seed=0)
    with pytest.raises(ValueError, match="null_features"):
        ops.sample_head(features, weight, bias, x_t, weights, seed=0, null_features=null[:1])
    with pytest.raises(ValueError, match="num_codes"):
        ops.sample_head(features, lambda r: r, None, x_t, weights, seed=0)
    with pytest.raises(TypeError, match="features"):
        ops.sample_head(features.double(), weight, bias, x_t, weights, seed=0)
