"""transition_loss: value and gradient against FP64 autograd of the definition."""

import math

import numpy as np
import pytest
import torch
from cases.transition_loss import closed_form_loss
from transition_helpers import SCHEDULES, Levels, levels, random_logits, within_twice

from knnfast import ops, reference
from knnfast.diffusion.schedule import Schedule
from knnfast.ops.transition_loss import _cached_table, _table

# Outputs hold NaN before a kernel writes them. torch's own CUDA ops warn when that mode finds them
# in another order than they promise.
pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning"),
]


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


def compare(logits, *args, weight=None, run=None):
    """Loss, KL and gradient: at most twice the error of the closed form in plain FP32 torch.

    Of lower types plain torch gets FP32 copies, and both gradients are rounded to the type.
    """
    x_0, x_t, t, schedule = args
    leaf, plain_leaf = (logits.detach().clone().requires_grad_() for _ in range(2))
    loss, kl = (run or ops.transition_loss)(leaf, *args, weight=weight)
    loss.backward()
    table, _ = _table(schedule, logits.device)
    plain_loss, plain_kl = closed_form_loss(
        plain_leaf, x_0, x_t, t, table, 5e-4, weight, replaces=bool(schedule.B[-1] > 0)
    )
    plain_loss.backward()
    exact, exact_kl, grad = truth(logits, *args, weight=weight)
    assert loss.dtype == kl.dtype == torch.float32
    within_twice(torch.cat([loss[None], kl]), torch.cat([plain_loss[None], plain_kl]),
                 torch.cat([exact[None], exact_kl]), torch.float32)  # fmt: skip
    within_twice(leaf.grad, plain_leaf.grad, grad, logits.dtype)


@pytest.mark.isa
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("K", [2, 3, 31, 64, 65, 1000])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_matches_reference(name, K, scale):
    compare(*make(name, K, scale=scale), weight=torch.tensor([1.0, 0.5, 2.0, 3.0]))


@pytest.mark.isa
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_types(name, dtype):
    compare(*make(name, 130, dtype=dtype))


@pytest.mark.isa
@pytest.mark.parametrize(("K", "L"), [(8192, 1), (7, 1024), (4097, 3)])
def test_ends_of_the_shapes(K, L):
    compare(*make("mask_replace", K, B=2, L=L))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strided_views(dtype):
    _, x_0, x_t, t, schedule = make("mask_replace", 33)
    views = [
        random_logits((4, 60, 40), dtype=dtype)[:, ::2, 7:],
        random_logits((4, 33, 30)).mT.to(dtype),
        random_logits((1, 30, 33), dtype=dtype).expand(4, -1, -1),
    ]  # fmt: skip
    for logits in views:

        def on_the_view(leaf, *args, logits=logits, weight=None):
            kept = torch.empty_strided((4, 60, 40), (2400, 40, 1), dtype=dtype)
            view = kept[:, ::2, 7:] if logits.stride(-1) == 1 else kept[:, :33, :30].mT
            view.copy_(leaf)  # a view with its gradient, as a slice of a network's output is
            return ops.transition_loss(view, *args, weight=weight)

        compare(logits, x_0, x_t, t, schedule, run=on_the_view)


@pytest.mark.isa
@pytest.mark.parametrize("name", SCHEDULES)
def test_gradcheck(name):
    logits, x_0, x_t, t, schedule = make(name, 5, L=4, dtype=torch.float64)
    logits.requires_grad_()
    torch.autograd.gradcheck(
        lambda l: ops.transition_loss(l, x_0, x_t, t, schedule, auxiliary=0.1)[0], logits
    )


@pytest.mark.isa
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy runs both sides of tl.where
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(
    "B", [[0.0, 0.0625, 0.03125], [0.0, 1e-20, 2e-20], [0.0, 1e-25, 1e-19]], ids=str
)
def test_levels_between_which_next_to_nothing_is_replaced(monkeypatch, backend, B):
    """Where b = 0 < B a real token was the same one level before, whatever the logits say. And
    where FP32 does not hold B, or its square where p_i = 1."""
    if backend == "triton":
        if torch.cuda.is_available():
            pytest.skip("compiled in this process; the gpu tests cover it")
        from knnfast.kernels.transition_loss import launch_transition_loss

        monkeypatch.setattr(
            torch.ops.knnfast, "transition_loss", lambda l, *v: launch_transition_loss(l, None, *v)
        )
    A = [1.0, 0.5, 0.25]
    C = [1 - a - 4 * b for a, b in zip(A, B, strict=True)]
    assert (reference.stride(A, B, C, 2, 1)[1] == 0) == (B[1] > 1e-3)
    x_0 = torch.tensor([[1, 0, 2, 3], [1, 0, 2, 3]])
    x_t = torch.tensor([[0, 0, 4, 3], [0, 0, 4, 3]])
    args = x_0, x_t, torch.tensor([1, 2]), Levels(np.array(A), np.array(B), np.array(C))
    peaked = -60 * (torch.arange(4) > 0).float().expand(2, 4, -1)
    for logits in (torch.zeros(2, 4, 4), random_logits((2, 4, 4)), peaked.clone()):
        exact, exact_kl, grad = truth(logits, *args, auxiliary=0.0)
        leaf = logits.requires_grad_()
        loss, kl = ops.transition_loss(leaf, *args, auxiliary=0.0)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(float(exact), rel=1e-5)
        torch.testing.assert_close(kl.double(), exact_kl, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(leaf.grad.double(), grad, rtol=1e-4, atol=1e-7)


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


def test_inplace_is_told_to_what_needs_the_logits():
    """A maker whose backward pass reads the values that are lost fails, as with torch's own ops."""
    logits, *rest = make("mask_replace", 64)
    work = logits.clone().requires_grad_().tanh()
    version = work._version
    loss, _ = ops.transition_loss(work, *rest, inplace=True)
    assert work._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():  # whose tensors have no version
        ops.transition_loss(logits.clone(), *rest, inplace=True)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_scaled_gradient_is_in_place_where_the_logits_were(inplace, dtype):
    logits, *rest = make("mask_replace", 64, dtype=dtype)
    leaf = logits.clone().requires_grad_()
    work, seen = leaf * 1.0, []
    work.register_hook(lambda grad: seen.append(grad.data_ptr()))
    loss, _ = ops.transition_loss(work, *rest, inplace=inplace)
    (3 * loss).backward(retain_graph=True)
    assert (seen == [work.data_ptr()]) == inplace
    wide = logits.float().requires_grad_()
    (3 * ops.transition_loss(wide, *rest)[0]).backward()
    torch.testing.assert_close(leaf.grad.float(), wide.grad, rtol=2e-3, atol=1e-7)
    if inplace:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    else:
        loss.backward()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's
@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_scale_beyond_fp16(device, compiled):
    """GradScaler begins with 65,536, which FP16 does not hold; the scaled gradient fits, and what
    the scale lifts over FP16's least number was kept for it."""
    *args, schedule = make("mask_replace", 1024, dtype=torch.float16)
    logits, *rest = (a.to(device) for a in args)

    def loss(logits):
        return ops.transition_loss(logits * 1.0, *rest, schedule)[0]

    call = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    wide, scaled = logits.float().requires_grad_(), logits.clone().requires_grad_()
    expected = loss(wide)
    expected.backward()
    found = call(scaled)
    (65536 * found).backward()
    assert float(scaled.grad.abs().max()) > 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(scaled.grad.float(), 65536 * wide.grad, rtol=2e-3, atol=2**-24)


def test_mask_schedule_is_weighted_cross_entropy():
    logits, x_0, x_t, t, schedule = make("mask", 50)
    loss, kl = ops.transition_loss(logits, x_0, x_t, t, schedule, auxiliary=0.0)
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), x_0, reduction="none")
    C = torch.from_numpy(schedule.C)
    factor = (C[t] - C[t - 1]) / C[t]  # c A_s / C_t = (C_t - C_s) / C_t when B = 0
    expected = (factor[:, None] * nll * (x_t == 50)).mean(1)
    torch.testing.assert_close(kl.double(), expected.double(), rtol=1e-5, atol=1e-7)
    assert float(loss.detach()) == pytest.approx(float(expected.mean()), rel=1e-5)


def test_rows_at_any_distance():
    """One position an image: the stride along positions says nothing of where a row is."""
    K = 33
    _, x_0, x_t, t, schedule = make("mask_replace", K, B=3, L=1)
    turned = random_logits((3, 3, K)).transpose(0, 1)[:, :1]  # contiguous, its stride(1) is 3 K
    assert turned.is_contiguous()
    assert turned.stride(1) != K
    for logits in (turned, random_logits((3, 1, 2 * K))[..., :K], turned[:1].expand(3, -1, -1)):
        exact, exact_kl, _ = truth(logits, x_0, x_t, t, schedule)
        loss, kl = ops.transition_loss(logits, x_0, x_t, t, schedule)
        torch.testing.assert_close(loss.double(), exact.double(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(kl.double(), exact_kl.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy runs both sides of tl.where
@pytest.mark.parametrize("inplace", [False, True])
def test_triton_finds_the_rows_of_one_position(inplace):
    if torch.cuda.is_available():
        pytest.skip("compiled in this process; the gpu tests cover it")
    from knnfast.kernels.transition_loss import launch_transition_loss

    K = 33
    _, x_0, x_t, t, schedule = make("mask_replace", K, B=3, L=1)
    logits = random_logits((3, 3, K)).transpose(0, 1)[:, :1]
    assert logits.is_contiguous()
    assert logits.stride(1) != K
    exact, _, exact_grad = truth(logits, x_0, x_t, t, schedule)
    table, T = _table(schedule, logits.device)
    factor = 5e-4 * (2 - (t.double() - 1) / T)
    out = logits if inplace else None
    args = x_0, x_t, table[t], torch.ones(3).double(), factor
    loss, _, grad = launch_transition_loss(logits, out, *args)
    assert float(loss) == pytest.approx(float(exact), rel=2e-6)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy runs both sides of tl.where
@pytest.mark.parametrize("name", SCHEDULES)
def test_triton_matches_reference(name):
    if torch.cuda.is_available():
        pytest.skip("compiled in this process; the gpu tests cover it")
    from knnfast.kernels.transition_loss import launch_transition_loss

    logits, x_0, x_t, t, schedule = make(name, 21, L=6)
    table, T = _table(schedule, logits.device)
    factor = 5e-4 * (2 - (t.double() - 1) / T)
    weight = torch.tensor([1.0, 0.5, 2.0, 3.0]).double()
    loss, kl, grad = launch_transition_loss(logits, None, x_0, x_t, table[t], weight, factor)
    exact, exact_kl, exact_grad = truth(logits, x_0, x_t, t, schedule, weight=weight)
    assert float(loss.detach()) == pytest.approx(float(exact), rel=2e-6)
    torch.testing.assert_close(kl.double(), exact_kl, rtol=1e-4, atol=1e-6)
    assert float((grad - exact_grad).abs().max()) < 1e-6 * float(exact_grad.abs().max())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy runs both sides of tl.where
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_triton_within_twice(monkeypatch, name, scale):
    if torch.cuda.is_available():
        pytest.skip("compiled in this process; the gpu tests cover it")
    from knnfast.kernels.transition_loss import launch_transition_loss

    monkeypatch.setattr(
        torch.ops.knnfast, "transition_loss", lambda l, *v: launch_transition_loss(l, None, *v)
    )
    compare(*make(name, 65, L=6, scale=scale), weight=torch.tensor([1.0, 0.5, 2.0, 3.0]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy runs both sides of tl.where
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_excluded_classes(monkeypatch, name, backend):
    """Classes at -inf that are neither x_0 nor x_t: no share of the loss, no gradient."""
    if backend == "triton":
        if torch.cuda.is_available():
            pytest.skip("compiled in this process; the gpu tests cover it")
        from knnfast.kernels.transition_loss import launch_transition_loss

        monkeypatch.setattr(
            torch.ops.knnfast, "transition_loss", lambda l, *v: launch_transition_loss(l, None, *v)
        )
    K = 21
    logits, x_0, x_t, t, schedule = make(name, K, L=6)
    out = torch.rand(logits.shape) < 0.5
    for kept in (x_0, x_t.clamp(max=K - 1)):
        out.scatter_(-1, kept[..., None], False)
    logits = logits.masked_fill(out, float("-inf"))
    compare(logits, x_0, x_t, t, schedule)
    leaf = logits.requires_grad_()
    ops.transition_loss(leaf, x_0, x_t, t, schedule)[0].backward()
    assert not leaf.grad[out].any()
    assert leaf.grad[~out].any()


@pytest.mark.parametrize("name", SCHEDULES)
def test_auxiliary_that_does_not_fall(name):
    """adaptive=False: the same factor of -log p(x_0) at every level."""
    logits, *rest = make(name, 40)
    losses = []
    for adaptive in (False, True):
        leaf = logits.clone().requires_grad_()
        rule = {"auxiliary": 0.3, "adaptive": adaptive}
        loss, kl = ops.transition_loss(leaf, *rest, **rule)
        loss.backward()
        exact, exact_kl, grad = truth(logits, *rest, **rule)
        assert float(loss.detach()) == pytest.approx(float(exact), rel=1e-5)
        torch.testing.assert_close(kl.double(), exact_kl, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(leaf.grad.double(), grad, rtol=1e-4, atol=1e-7)
        losses.append(float(loss.detach()))
    assert losses[1] > 1.05 * losses[0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy runs both sides of tl.where
def test_levels_out_of_range_give_nan_in_the_kernel(monkeypatch):
    """Where nothing may synchronise: NaN in the loss and in that image's gradient alone."""
    if torch.cuda.is_available():
        pytest.skip("compiled in this process; the gpu tests cover it")
    from knnfast.kernels.transition_loss import launch_transition_loss

    given = []
    op = torch.ops.knnfast.transition_loss
    monkeypatch.setattr(torch.ops.knnfast, "transition_loss", lambda *a: given.append(a) or op(*a))
    logits, x_0, x_t, _, schedule = make("mask_replace", 21, L=6)
    x_t[1] = x_0[1]
    with pytest.raises(ValueError, match="t: must be a level"):
        ops.transition_loss(logits, x_0, x_t, torch.tensor([1, 0, 60, 100]), schedule)
    logits, *rest = given[0]
    loss, _, grad = launch_transition_loss(logits, None, *rest)
    assert loss.isnan()
    assert grad[1].isnan().all()
    assert grad[[0, 2, 3]].isfinite().all()


def test_too_many_classes_for_a_kernel():
    from knnfast.kernels.transition_loss import launch_transition_loss

    with pytest.raises(ValueError, match="K must be at most 65536 on CUDA, got 65537"):
        launch_transition_loss(torch.zeros(1, 1, 65537), *[None] * 6)


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


@pytest.mark.isa
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
    with pytest.raises(TypeError, match="weight: must be a tensor, got float"):
        ops.transition_loss(logits, x_0, x_t, t, schedule, weight=1.0)
    with pytest.raises(ValueError, match="weight: must be finite"):
        ops.transition_loss(logits, x_0, x_t, t, schedule, weight=torch.full((4,), math.nan))
    with pytest.raises(TypeError, match="auxiliary: must be a number, got None"):
        ops.transition_loss(logits, x_0, x_t, t, schedule, auxiliary=None)
    for level in (0, -1, 101, -101):
        with pytest.raises(ValueError, match="t: must be a level from 1"):
            ops.transition_loss(logits, x_0, x_t, torch.tensor([1, level, 60, 100]), schedule)
    for value, where in ((math.nan, 3), (math.inf, 3), (-math.inf, slice(None))):
        bad = logits.clone()
        bad[1, 2, where] = value
        with pytest.raises(ValueError, match=r"NaN, \+inf or no finite class in 1 rows"):
            ops.transition_loss(bad, x_0, x_t, t, schedule)
    with pytest.raises(ValueError, match="schedule: is of 9 codes, not of 8"):
        ops.transition_loss(logits, x_0, x_t, t, Schedule("mask", 100, 9))
    with pytest.raises(ValueError, match=r"at least one position, got shape \[4, 0, 8\]"):
        ops.transition_loss(logits[:, :0], x_0[:, :0], x_t[:, :0], t, schedule)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's
def test_no_image(device):
    """The loss of nothing is 0."""
    from knnfast.kernels.transition_loss import launch_transition_loss

    *made, schedule = make("mask", 8)
    logits, *rest = (v[:0].to(device) for v in made)
    leaf = logits.requires_grad_()
    loss, kl = ops.transition_loss(leaf, *rest, schedule)
    loss.backward()
    assert float(loss.detach()) == 0
    assert kl.shape == (0,)
    assert leaf.grad.shape == leaf.shape
    none = torch.zeros(0, dtype=torch.float64, device=device)
    args = *rest[:2], none.view(0, 7), none, none
    assert float(launch_transition_loss(logits.detach(), None, *args)[0]) == 0


def test_inplace_rejects_before_it_writes():
    """A refused argument leaves the logits and their version; a bad row does not."""
    logits, x_0, x_t, t, schedule = make("mask", 8)
    logits = logits.requires_grad_() * 1.0
    version = logits._version
    for bad in ((x_0 + 8, x_t, t), (x_0, x_t - 9, t), (x_0, x_t, t - 1)):
        with pytest.raises(ValueError, match=r"x_0|x_t|t: must"):
            ops.transition_loss(logits, *bad, schedule, inplace=True)
        assert logits._version == version
    logits = logits.masked_fill(torch.arange(8) == 3, math.nan)
    version = logits._version
    with pytest.raises(ValueError, match="in 120 rows"):
        ops.transition_loss(logits, x_0, x_t, t, schedule, inplace=True)
    assert logits._version > version


@pytest.mark.isa
def test_subnormal_numbers_count():
    """Whatever the caller's mode, with which the threads of the pool do not compute."""
    made = make("mask_replace", 64, scale=30.0)
    weight = torch.full((4,), 1e-36)
    results = []
    for flush in (False, True):
        leaf = made[0].clone().requires_grad_()
        torch.set_flush_denormal(flush)
        try:
            ops.transition_loss(leaf, *made[1:], weight=weight)[0].backward()
        finally:
            torch.set_flush_denormal(False)
        results.append(leaf.grad)
    assert torch.equal(*results)
    assert ((results[0] != 0) & (results[0].abs() < torch.finfo(torch.float32).tiny)).any()


def test_inplace_rejects_rows_that_are_not_evenly_spaced():
    *_, x_0, x_t, t, schedule = make("mask", 8)
    for shape, view in (
        ((4, 60, 8), lambda v: v[:, :30]),
        ((4, 8, 30), lambda v: v.mT),
        ((1, 30, 8), lambda v: v.expand(4, -1, -1)),
    ):
        work = torch.zeros(shape, requires_grad=True) * 1.0
        with pytest.raises(ValueError, match=r"inplace: .*evenly spaced rows"):
            ops.transition_loss(view(work), x_0, x_t, t, schedule, inplace=True)
    one = torch.zeros(1, 1, 8, requires_grad=True) * 1.0
    for B, L in ((4, 1), (1, 30)):  # all rows at one address
        with pytest.raises(ValueError, match=r"inplace: .*evenly spaced rows"):
            ops.transition_loss(
                one.expand(B, L, -1), x_0[:B, :L], x_t[:B, :L], t[:B], schedule, inplace=True
            )


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's
def test_deterministic_and_registered(device):
    *made, schedule = make("vq_diffusion", 33)
    logits, x_0, x_t, t = (v.to(device) for v in made)
    table, _ = _table(schedule, logits.device)
    factors = torch.tensor([[1.0], [1e-3]], dtype=torch.float64).expand(2, 4).to(device)
    args = x_0, x_t, table[t], factors[0].contiguous(), factors[1].contiguous()
    torch.library.opcheck(torch.ops.knnfast.transition_loss.default, (logits, *args))
    torch.library.opcheck(torch.ops.knnfast.transition_loss_.default, (logits.clone(), *args))
    one = ops.transition_loss(logits, x_0, x_t, t, schedule)
    two = ops.transition_loss(logits, x_0, x_t, t, schedule)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])

    def call(l, x_0, x_t, t):
        return ops.transition_loss(l * 2.0, x_0, x_t, t, schedule)[0]

    class Loss(torch.nn.Module):
        def forward(self, l, x_0, x_t, t):
            return call(l, x_0, x_t, t)

    exported = torch.export.export(Loss(), (logits, x_0, x_t, t)).module()
    assert torch.equal(exported(logits, x_0, x_t, t), call(logits, x_0, x_t, t))
    layer = torch.nn.Linear(33, 33, device=device)
    with torch.autocast(device, torch.bfloat16):
        low = layer(logits)
        loss, _ = ops.transition_loss(low, x_0, x_t, t, schedule)
    assert low.dtype == torch.bfloat16
    assert loss.dtype == torch.float32  # of the rounded logits, itself not rounded
    assert torch.equal(loss, ops.transition_loss(low, x_0, x_t, t, schedule)[0])
    loss.backward()
    assert torch.isfinite(layer.weight.grad).all()

    leaf, leaf2 = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    compiled(leaf, x_0, x_t, t).backward()
    if device == "cpu":  # elsewhere looking would synchronise
        with pytest.raises(ValueError, match="t: must be a level"):
            compiled(logits, x_0, x_t, t - 1)
    call(leaf2, x_0, x_t, t).backward()
    torch.testing.assert_close(leaf.grad, leaf2.grad)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's
@pytest.mark.parametrize("how", ["export", "export-strict", "compile"])
def test_a_schedule_used_first_in_a_trace(how):
    """No tensor of the trace is kept for later calls."""
    logits, x_0, x_t, t, schedule = make("mask_replace", 33)

    class Loss(torch.nn.Module):
        def forward(self, logits, x_0, x_t, t):
            return ops.transition_loss(logits * 1.0, x_0, x_t, t, schedule)

    args = logits, x_0, x_t, t
    expected = Loss()(*args)
    _cached_table.cache_clear()
    if how == "compile":
        traced = torch.compile(Loss(), fullgraph=True, backend="aot_eager")
    else:
        traced = torch.export.export(Loss(), args, strict="strict" in how).module()
    for call in (traced, Loss(), traced):
        for got, value in zip(call(*args), expected, strict=True):
            assert torch.equal(got, value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's and Inductor's
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiles_with_inductor(dtype, inplace):
    logits, x_0, x_t, t, schedule = make("mask_replace", 33, dtype=dtype)

    def call(leaf, x_0, x_t, t):
        loss, kl = ops.transition_loss(leaf * 2.0, x_0, x_t, t, schedule, inplace=inplace)
        return 3.0 * loss, kl

    results = []
    for run in (call, torch.compile(call, fullgraph=True)):
        leaf = logits.clone().requires_grad_()
        loss, kl = run(leaf, x_0, x_t, t)
        loss.backward()
        results.append([loss.detach(), kl, leaf.grad])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)
