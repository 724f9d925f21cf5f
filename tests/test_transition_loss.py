"""transition_loss: value and gradient against FP64 autograd of the definition."""

import pytest
import torch
from transition_helpers import SCHEDULES, levels, random_logits

from knnfast import ops, reference
from knnfast.ops.transition_loss import _table


def make(name, K, B=4, L=30, dtype=torch.float32, scale=3.0):
    logits = random_logits((B, L, K), scale, dtype)
    x_0 = torch.randint(0, K, (B, L))
    x_t = torch.where(torch.rand(B, L) < 0.5, K, x_0)
    if name != "mask":  # replaced tokens exist only where B > 0
        x_t[:, ::5] = (x_0[:, ::5] + 1) % K
    t = torch.tensor([1, 2, 60, 100])[:B]
    return logits, x_0, x_t, t, levels(name, K)


def truth(logits, *args, **kw):
    leaf = logits.detach().double().clone().requires_grad_()
    loss, kl = reference.transition_loss(leaf, *args, **kw)
    loss.backward()
    return loss.detach(), kl, leaf.grad


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("K", [2, 3, 31, 64, 65, 1000])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_matches_reference(name, K, scale):
    args = make(name, K, scale=scale)
    weight = torch.tensor([1.0, 0.5, 2.0, 3.0])
    leaf = args[0].clone().requires_grad_()
    loss, kl = ops.transition_loss(leaf, *args[1:], weight=weight)
    loss.backward()
    exact, exact_kl, grad = truth(*args, weight=weight)
    # FP32 log_softmax of these logits is off by some 2^-24 of the largest logit; the loss sums it
    eps = 2.0**-23
    size = float(args[0].abs().max()) + 5
    assert abs(float(loss.detach()) - float(exact)) < eps * (size * 7 + abs(float(exact)))
    assert float((kl - exact_kl).abs().max()) < eps * size * 4
    error, bound = (leaf.grad - grad).abs(), 4 * eps * size * float(grad.abs().max())
    assert float(error.max()) < bound
    assert not torch.isnan(leaf.grad).any()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_types(name, dtype):
    args = make(name, 130, dtype=dtype)
    leaf = args[0].clone().requires_grad_()
    loss, _ = ops.transition_loss(leaf, *args[1:])
    loss.backward()
    exact, _, grad = truth(*args)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(exact), rel=1e-5)
    # the gradient is rounded once to its type (and FP16's subnormals end at 6e-8)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(leaf.grad.double(), grad, rtol=eps, atol=1e-7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_gradcheck(name):
    logits, x_0, x_t, t, schedule = make(name, 5, L=4, dtype=torch.float64)
    logits.requires_grad_()
    torch.autograd.gradcheck(
        lambda l: ops.transition_loss(l, x_0, x_t, t, schedule, auxiliary=0.1)[0], logits
    )


def test_inplace_writes_the_gradient_over_the_logits():
    logits, *rest = make("mask_replace", 64)
    leaf = logits.clone().requires_grad_()
    expected, _ = ops.transition_loss(leaf, *rest)
    expected.backward()
    leaf2 = logits.clone().requires_grad_()
    work = leaf2 * 1.0  # not a leaf, and its maker does not need its values
    loss, _ = ops.transition_loss(work, *rest, inplace=True)
    loss.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(leaf2.grad, leaf.grad)
    assert work.data_ptr() != logits.data_ptr()
    with pytest.raises(ValueError, match="inplace"):
        ops.transition_loss(leaf, *rest, inplace=True)


def test_mask_schedule_is_weighted_cross_entropy():
    logits, x_0, x_t, t, schedule = make("mask", 50)
    loss, kl = ops.transition_loss(logits, x_0, x_t, t, schedule, auxiliary=0.0)
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), x_0, reduction="none")
    C = torch.from_numpy(schedule.C)
    factor = (C[t] - C[t - 1]) / C[t]  # c A_s / C_t = (C_t - C_s) / C_t when B = 0
    expected = (factor[:, None] * nll * (x_t == 50)).mean(1)
    torch.testing.assert_close(kl.double(), expected.double(), rtol=1e-5, atol=1e-7)
    assert float(loss.detach()) == pytest.approx(float(expected.mean()), rel=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy runs both sides of tl.where
@pytest.mark.parametrize("name", SCHEDULES)
def test_triton_matches_reference(name):
    if torch.cuda.is_available():
        pytest.skip("compiled in this process; the gpu tests cover it")
    from knnfast.kernels.transition_loss import launch_transition_loss

    logits, x_0, x_t, t, schedule = make(name, 21, L=6)
    table, T = _table(schedule, 21, logits.device)
    factor = 5e-4 * (2 - (t.double() - 1) / T)
    weight = torch.tensor([1.0, 0.5, 2.0, 3.0]).double()
    loss, kl, grad = launch_transition_loss(logits, None, x_0, x_t, table[t], weight, factor)
    exact, exact_kl, exact_grad = truth(logits, x_0, x_t, t, schedule, weight=weight)
    assert float(loss.detach()) == pytest.approx(float(exact), rel=2e-6)
    torch.testing.assert_close(kl.double(), exact_kl, rtol=1e-4, atol=1e-6)
    assert float((grad - exact_grad).abs().max()) < 1e-6 * float(exact_grad.abs().max())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("inplace", [False, True])
def test_cuda_matches_reference(name, dtype, inplace):
    args = make(name, 1000, dtype=dtype)
    exact, _, grad = truth(*args)
    leaf = args[0].cuda().requires_grad_()
    device = [a.cuda() if isinstance(a, torch.Tensor) else a for a in args[1:]]
    loss, _ = ops.transition_loss(leaf * 1.0, *device, inplace=inplace)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(exact), rel=1e-5)
    eps = torch.finfo(dtype).eps
    bound = 4 * eps if dtype == torch.float32 else eps
    torch.testing.assert_close(
        leaf.grad.double().cpu(), grad, rtol=bound, atol=max(1e-7, 1e-6 * float(grad.abs().max()))
    )


def test_extreme_logits():
    K = 7
    schedule = levels("mask_replace", K)
    logits = torch.full((1, 3, K), -1e4)
    logits[..., 2] = 1e4
    x_0 = torch.tensor([[2, 2, 2]])
    x_t = torch.tensor([[K, 2, 5]])
    leaf = logits.requires_grad_()
    loss, _ = ops.transition_loss(leaf, x_0, x_t, torch.tensor([50]), schedule)
    loss.backward()
    assert 0 <= float(loss.detach()) < 1e-6
    assert torch.isfinite(leaf.grad).all()


def test_rejects():
    logits, x_0, x_t, t, schedule = make("mask", 8)
    with pytest.raises(ValueError, match="x_0"):
        ops.transition_loss(logits, x_0 + 8, x_t, t, schedule)
    with pytest.raises(ValueError, match="x_t"):
        ops.transition_loss(logits, x_0, x_t[:, 1:], t, schedule)
    with pytest.raises(TypeError, match="t:"):
        ops.transition_loss(logits, x_0, x_t, t.float(), schedule)
    with pytest.raises(ValueError, match="weight"):
        ops.transition_loss(logits, x_0, x_t, t, schedule, weight=torch.ones(3))
    bad = logits.clone()
    bad[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        ops.transition_loss(bad, x_0, x_t, t, schedule)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's
def test_deterministic_and_registered():
    logits, x_0, x_t, t, schedule = make("vq_diffusion", 33)
    table, _ = _table(schedule, 33, logits.device)
    args = x_0, x_t, table[t], torch.ones(4).double(), torch.full((4,), 1e-3).double()
    torch.library.opcheck(torch.ops.knnfast.transition_loss.default, (logits, *args))
    torch.library.opcheck(torch.ops.knnfast.transition_loss_.default, (logits.clone(), *args))
    one = ops.transition_loss(logits, x_0, x_t, t, schedule)
    two = ops.transition_loss(logits, x_0, x_t, t, schedule)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])

    def call(l, x_0, x_t, t):
        return ops.transition_loss(l * 2.0, x_0, x_t, t, schedule)[0]

    leaf, leaf2 = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    compiled(leaf, x_0, x_t, t).backward()
    call(leaf2, x_0, x_t, t).backward()
    torch.testing.assert_close(leaf.grad, leaf2.grad)
