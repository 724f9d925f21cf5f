"""The variational loss of discrete diffusion with its gradient, in one pass over the logits."""

from __future__ import annotations

import ctypes
import functools
import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from knnfast.ops import reference
from knnfast.ops._checks import (
    DTYPE_CODES,
    check_device,
    check_dtype,
    check_number,
    check_schedule,
    check_shape,
    library,
    pointer,
    probabilities,
    row_stride,
    rows,
)

_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def transition_loss(
    logits: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    schedule: reference.Schedule,
    *,
    weight: Tensor | None = None,
    auxiliary: float = 5e-4,
    adaptive: bool = True,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Variational loss and its gradient in logits.

    1 / (B L) sum_b weight_b sum_l [KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t))
                                    - auxiliary f(t) log p_theta(x_0)]       (Gu et al. 2022)

    Args:
        logits: of p_theta(x_0 | x_t), [B, L, K], fp16 | bf16 | fp32 (fp64 on the CPU); on CUDA
            K <= 65,536.
        x_0: clean tokens, [B, L] int64 in [0, K).
        x_t: noisy tokens, [B, L] int64 in [0, K].
        t: levels, [B] int64 in [1, T].
        schedule: cumulative A, B, C for levels 0..T.
        weight: [B] factors, e.g. of importance-sampled t; 1 when None.
        auxiliary: factor of -log p_theta(x_0).
        adaptive: f(t) = 2 - (t - 1) / T, else 1.
        inplace: write the gradient (in FP16 a multiple of it) over the logits: their values are
            lost, also where a row of them is then refused; only when the backward pass of whatever
            made them does not need them. The graph can then be passed back once.

    Returns:
        loss: scalar, fp32 (fp64 for fp64 logits); of no image 0.
        kl: [B], each image's mean KL, without gradient, for importance sampling.
    Raises: ValueError shape, device, and on the CPU a token or level out of range, NaN, +inf or no
        finite class in a row of logits, a weight that is not finite; TypeError dtype. On CUDA
        nothing synchronises: a level outside [1, T] makes the loss and its image's gradient NaN;
        tokens are not looked at.
    Numerics: FP32 per class, FP64 per row; an FP16 gradient is scaled in FP32.
    Backends: Triton on CUDA, C++ on the CPU; defined by `reference.transition_loss`.
    Memory: the gradient, and where the backward pass scales it (on CUDA always) another; with
        inplace neither.  Deterministic: yes.
    Differentiable: once, in logits.
    """
    check_dtype("logits", logits, _TYPES)
    check_shape("logits", logits, (None, None, None))
    B, L, K = logits.shape
    for name, x, shape in (("x_0", x_0, (B, L)), ("x_t", x_t, (B, L)), ("t", t, (B,))):
        check_dtype(name, x, (torch.int64,))
        check_shape(name, x, shape)
        check_device(name, x, logits.device)
    if inplace and torch.is_grad_enabled() and logits.requires_grad and logits.is_leaf:
        raise ValueError("inplace: logits is a leaf that requires grad, it cannot be overwritten")
    check_schedule(schedule, K)
    if L < 1:
        raise ValueError(f"logits: at least one position, got shape {list(logits.shape)}")
    check_number("auxiliary", auxiliary)
    table, levels = _table(schedule, logits.device)
    steps = table[torch.where((t >= 1) & (t <= levels), t, 0)]
    factor = auxiliary + 0.0 * steps[:, 0]  # NaN, too, where there is no such step
    if adaptive:
        factor = factor * (2 - (t.double() - 1) / levels)
    if weight is None:
        weight = torch.ones_like(factor)
    else:
        check_dtype("weight", weight, _TYPES)
        check_shape("weight", weight, (B,))
        check_device("weight", weight, logits.device)
        weight = weight.detach().double()
    if logits.requires_grad and torch.is_grad_enabled():
        return _TransitionLoss.apply(logits, x_0, x_t, steps, weight, factor, inplace)
    loss, kl, _ = torch.ops.knnfast.transition_loss(logits, x_0, x_t, steps, weight, factor)
    return loss, kl


class _TransitionLoss(torch.autograd.Function):
    """The forward pass has the gradient already; the backward pass scales it."""

    @staticmethod
    def forward(ctx, logits, x_0, x_t, steps, weight, factor, inplace):
        # Of the mean over thousands of tokens most of the gradient is below FP16's least number. So
        # in FP16 as large a multiple of it is kept as certainly fits (a class's share of a token's
        # is at most 1 + |factor|), and divided when GradScaler's factor, in d_loss, comes to it.
        multiple = weight.new_ones(())
        if logits.dtype == torch.float16 and x_0.numel():
            largest = (weight.abs() * (1 + factor.abs())).amax()
            multiple = x_0.numel() * torch.where(largest > 0, 32768 / largest, 1.0)
        args = x_0, x_t, steps, weight * multiple, factor
        if inplace:
            data = logits.detach()
            loss, kl = torch.ops.knnfast.transition_loss_(data, *args)
            grad = data
        else:
            loss, kl, grad = torch.ops.knnfast.transition_loss(logits.detach(), *args)
        ctx.save_for_backward(grad, multiple)
        ctx.inplace = inplace
        ctx.mark_non_differentiable(kl)
        return (loss / multiple).to(loss.dtype), kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss, _):
        grad, multiple = ctx.saved_tensors
        # `loss.backward()` hands in 1: the gradient itself then, not a copy of it.
        eager = grad.device.type == "cpu" and not torch.compiler.is_compiling()
        d_loss = (d_loss / multiple).to(d_loss.dtype)
        if not (eager and float(d_loss) == 1.0):
            # Three dimensions, so that an FP16 gradient is multiplied in FP32: GradScaler's 65,536
            # is no FP16 number, its product with the gradient may be one.
            out = grad if ctx.inplace else torch.empty_like(grad)
            grad = torch.mul(grad, d_loss.view(1, 1, 1), out=out)
        return grad, None, None, None, None, None, None


def _table(schedule: reference.Schedule, device: torch.device) -> tuple[Tensor, int]:
    """Each level's LossStep (csrc/ops/ops_kernels.h), [T + 1, 7] FP64 on the device, made once.

    Row 0, from which no step leads on, is NaN.
    """
    if torch.compiler.is_compiling():
        return _traced_table(id(schedule), device)
    A, B, C = probabilities(schedule)
    return _cached_table(A, B, C, str(device)), len(A) - 1


@torch.compiler.assume_constant_result
def _traced_table(address: int, device: torch.device) -> tuple[Tensor, int]:
    """The table of the object at that address.

    Dynamo before torch 2.12 takes no object here, but knows an object's id, and guards it.
    """
    A, B, C = probabilities(ctypes.cast(address, ctypes.py_object).value)
    return _cached_table(A, B, C, str(device)), len(A) - 1


@functools.lru_cache(maxsize=32)
def _cached_table(A: tuple, B: tuple, C: tuple, device: str) -> Tensor:
    out = [[math.nan] * 7]
    for t in range(1, len(A)):
        a, b, c = reference.stride(A, B, C, t, t - 1)
        A_s, B_s = A[t - 1], B[t - 1]
        mask_u = c * A_s / C[t] if C[t] > 0 else 0.0
        real_u = b * A_s / B[t] if B[t] > 0 else 0.0
        real_v = (a + b) * A_s / (A[t] + B[t]) if B[t] > 0 else 0.0
        out.append([A[t], B[t], A_s, B_s, mask_u, real_u, real_v])
    with _disable_current_modes():  # the first use may be in a trace, whose tensors are fake
        return torch.tensor(out, dtype=torch.float64, device=device)


# ---------------------------------------------------------------------------------------------
# Registration

_ARGS = "Tensor x_0, Tensor x_t, Tensor steps, Tensor weight, Tensor auxiliary"
library.define(f"transition_loss(Tensor logits, {_ARGS}) -> (Tensor, Tensor, Tensor)")
library.define(f"transition_loss_(Tensor(a!) logits, {_ARGS}) -> (Tensor, Tensor)")


def _run_cpu(logits, grad, x_0, x_t, steps, weight, auxiliary):
    from knnfast import _C

    B, L, K = logits.shape
    x_0, x_t, steps = x_0.contiguous(), x_t.contiguous(), steps.contiguous()
    weight, auxiliary = weight.contiguous(), auxiliary.contiguous()
    if x_0.numel() and not (int(x_0.min()) >= 0 and int(x_0.max()) < K):
        raise ValueError(f"x_0: must lie in [0, {K})")
    if x_t.numel() and not (int(x_t.min()) >= 0 and int(x_t.max()) <= K):
        raise ValueError(f"x_t: must lie in [0, {K}]")
    if bool(steps.isnan().any()):
        raise ValueError("t: must be a level from 1 to the schedule's last")
    if not bool(weight.isfinite().all()):
        raise ValueError("weight: must be finite")
    if grad is logits:
        _changed(logits)
    loss = torch.zeros((), dtype=torch.float64)
    kl = torch.empty(B, dtype=torch.float64)
    bad = _C.transition_loss(
        B, L, K, DTYPE_CODES[logits.dtype], pointer(logits), row_stride(logits), pointer(x_0),
        pointer(x_t), pointer(steps), pointer(weight), pointer(auxiliary), pointer(grad),
        row_stride(grad), pointer(loss), pointer(kl),
    )  # fmt: skip
    if bad:
        raise ValueError(f"logits: NaN, +inf or no finite class in {bad} rows")
    dtype = _loss_type(logits)
    return loss.to(dtype), kl.to(dtype)


def _loss_type(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _loss_cpu(logits, *args):
    logits = rows(logits)
    grad = torch.empty(logits.shape, dtype=logits.dtype)
    return *_run_cpu(logits, grad, *args), grad


def _changed(logits):
    """Tell autograd, so that a backward pass that needs the logits' values fails."""
    if not logits.is_inference():
        torch.autograd.graph.increment_version(logits)


def _loss_inplace_cpu(logits, *args):
    if rows(logits).data_ptr() != logits.data_ptr() or row_stride(logits) < logits.shape[-1]:
        raise ValueError("inplace: logits must have last stride 1 and evenly spaced rows")
    return _run_cpu(logits, logits, *args)


def _loss_cuda(logits, *args):
    from knnfast.kernels.transition_loss import launch_transition_loss

    with torch.cuda.device_of(logits):
        return launch_transition_loss(logits, None, *args)


def _loss_inplace_cuda(logits, *args):
    from knnfast.kernels.transition_loss import launch_transition_loss

    _changed(logits)
    with torch.cuda.device_of(logits):
        return launch_transition_loss(logits, logits, *args)[:2]


library.impl("transition_loss", _loss_cpu, "CPU")
library.impl("transition_loss", _loss_cuda, "CUDA")
library.impl("transition_loss_", _loss_inplace_cpu, "CPU")
library.impl("transition_loss_", _loss_inplace_cuda, "CUDA")


@torch.library.register_fake("knnfast::transition_loss", lib=library)
def _(logits, *_):
    dtype = _loss_type(logits)
    kl = logits.new_empty((logits.shape[0],), dtype=dtype)
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return logits.new_empty((), dtype=dtype), kl, grad


@torch.library.register_fake("knnfast::transition_loss_", lib=library)
def _(logits, *_):
    dtype = _loss_type(logits)
    return logits.new_empty((), dtype=dtype), logits.new_empty((logits.shape[0],), dtype=dtype)
