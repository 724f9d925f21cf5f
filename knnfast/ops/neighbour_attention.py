"""Attention over the k + 1 retrieved embeddings, with their projections folded into the layer."""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import Tensor

from knnfast.ops._checks import (
    DTYPE_CODES,
    check_device,
    check_dtype,
    check_number,
    check_shape,
    check_tensor,
    check_whole,
    library,
    pointer,
)
from knnfast.ops.reference import Folded

_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Folding turns 4 L D^2 operations a layer into 4 L D H (k + 1): it pays up to this share of D.
# Measured (bench/results, shapes fold-24 ... fold-96: L = 256, D = 512, H = 8): 1.3 times faster
# than projections + SDPA at H N = 0.75 D, even at 1.0, 0.7 times at 1.5.
FOLD_LIMIT = 0.9
# On a GPU, where it is not measured, H and N count as the next powers of two, which its tiles hold
# at most. And a row of A may have so many bytes: all that the smallest shared memory holds.
FOLD_BYTES = 2048


class Unfolded(NamedTuple):
    """The condition left as keys and values: cheaper where H (k + 1) is near D or above."""

    K: Tensor  # [B, H, N, D_h]
    V: Tensor  # [B, H, N, D_h]
    w_q: Tensor  # [D_in, D]
    b_q: Tensor | None
    w_o: Tensor  # [D, D_in]
    bias: Tensor  # [D]
    mask: Tensor  # [B, N] bool


def fold_neighbours(
    n: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_o: Tensor,
    b_q: Tensor | None = None,
    b_v: Tensor | None = None,
    b_o: Tensor | None = None,
    *,
    heads: int,
    mask: Tensor | None = None,
    fold: bool | None = None,
) -> Folded | Unfolded:
    """Prepare one layer's condition for `neighbour_attention`, once for a sampling run.

    A_h = W_q,h K_h^T / sqrt(d_h),  a_h = b_q,h K_h^T / sqrt(d_h),  C_h = V_h W_o,h

    Args:
        n: the query's and its neighbours' embeddings, [B, N, E], N = k + 1.
        w_q: [D_in, D]; w_k, w_v: [D_in, E]; w_o: [D, D_in], as in nn.Linear.
        b_q, b_v: [D_in] or None; b_o: [D] or None. A key bias cancels in the softmax.
        heads: H, divides D_in.
        mask: [B, N] bool, the embeddings that are on; all when None.
        fold: True folds, False keeps keys and values; None folds when H N <= 0.9 D, on a GPU with
            both rounded up to powers of two and H N at most 512 (fp32) or 1024.

    Returns:
        Folded, or Unfolded where folding does not pay; both serve `neighbour_attention`.
    Raises: ValueError shape, range or device; TypeError dtype, or heads that are no integer.
    Differentiable: in everything.
    """
    check_dtype("n", n, _TYPES)
    check_shape("n", n, (None, None, None))
    B, N, E = n.shape
    check_shape("w_q", w_q, (None, None))
    width, D = w_q.shape
    check_shape("w_k", w_k, (width, E))
    check_shape("w_v", w_v, (width, E))
    check_shape("w_o", w_o, (D, width))
    for name, v, size in (("b_q", b_q, width), ("b_v", b_v, width), ("b_o", b_o, D)):
        if v is not None:
            check_shape(name, v, (size,))
    parts = {"w_q": w_q, "w_k": w_k, "w_v": w_v, "w_o": w_o, "b_q": b_q, "b_v": b_v, "b_o": b_o}
    _check_like(n, "", parts)
    if N < 1:
        raise ValueError("n: at least one embedding")
    check_whole("heads", heads)
    heads = operator.index(heads)
    if heads < 1 or width % heads:
        raise ValueError(f"heads: must divide {width}, got {heads}")
    if mask is None:
        mask = torch.ones(B, N, dtype=torch.bool, device=n.device)
    check_dtype("mask", mask, (torch.bool,))
    check_shape("mask", mask, (B, N))
    check_device("mask", mask, n.device)
    d_h = width // heads
    K = torch.nn.functional.linear(n, w_k).view(B, N, heads, d_h)
    V = torch.nn.functional.linear(n, w_v, b_v).view(B, N, heads, d_h)
    bias = n.new_zeros(D) if b_o is None else b_o
    if fold is None:
        columns = heads * N
        if n.is_cuda:
            columns = 1 << (heads - 1).bit_length() + (N - 1).bit_length()
        small = not n.is_cuda or columns * n.element_size() <= FOLD_BYTES
        fold = small and columns <= FOLD_LIMIT * D
    if not fold:
        return Unfolded(K.transpose(1, 2), V.transpose(1, 2), w_q, b_q, w_o, bias, mask)
    scale = d_h**-0.5
    # per head: [D, d_h] x [d_h, B N], then the order that the kernels read
    keys = K.permute(2, 3, 0, 1).reshape(heads, d_h, B * N) * scale
    A = torch.bmm(w_q.view(heads, d_h, D).transpose(1, 2), keys)
    A = A.view(heads, D, B, N).permute(2, 1, 3, 0).contiguous()
    if b_q is None:
        a = n.new_zeros(B, N, heads)
    else:
        a = (K * b_q.view(heads, d_h)).sum(-1) * scale
    values = V.permute(2, 0, 1, 3).reshape(heads, B * N, d_h)
    C = torch.bmm(values, w_o.view(D, heads, d_h).permute(1, 2, 0))
    C = C.view(heads, B, N, D).permute(1, 2, 0, 3).contiguous()
    return Folded(A, a.contiguous(), C, bias, mask)


def neighbour_attention(
    x: Tensor,
    folded: Folded | Unfolded,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    norm: bool = True,
    eps: float = 1e-5,
    residual: bool = True,
) -> Tensor:
    """Attend from tokens to the condition, with normalisation and residual.

    y = x + [sum_h softmax(z A_h + a_h) C_h + b_o],  z = LN(x) (1 + scale) + shift

    Args:
        x: tokens, [B, L, D], fp16 | bf16 | fp32 (fp64 on the CPU), last stride 1.
        folded: what `fold_neighbours` returned, in the type of x.
        scale, shift: AdaLN's, [B, D] or [D]; None for 0.
        norm: False takes z = x (1 + scale) + shift.
        eps: of the layer norm.
        residual: False leaves x + out.

    Returns:
        y: like x, contiguous. An image whose mask is all off keeps y = x (0 without residual).
    Raises: ValueError shape or device; TypeError dtype.
    Numerics: accumulates in FP32, variance about a mean. Under autocast the folded weights, scale,
        shift and x (less its mean where there is a norm) are rounded to its type, FP64 is not.
    Backends: Triton on CUDA, C++ on the CPU; defined by `reference.neighbour_attention`.
    Memory: y, and on the CPU the packed weights.  Deterministic: yes.
    Differentiable: in x, the folded weights, scale and shift.
    """
    check_dtype("x", x, _TYPES)
    check_shape("x", x, (None, None, None))
    B, _L, D = x.shape
    for name, v in (("scale", scale), ("shift", shift)):
        if v is not None:
            check_tensor(name, v)
            check_shape(name, v, (B, D) if v.dim() == 2 else (D,))
            check_device(name, v, x.device)
    scale = None if scale is None else scale.to(x.dtype)
    shift = None if shift is None else shift.to(x.dtype)
    check_number("eps", eps)
    if not isinstance(folded, (Folded, Unfolded)):
        raise TypeError(f"folded: must come from fold_neighbours, got {type(folded).__name__}")
    check_dtype("folded.mask", folded.mask, (torch.bool,))
    check_device("folded.mask", folded.mask, x.device)
    if isinstance(folded, Unfolded):
        return _unfolded(x, folded, scale, shift, norm, eps, residual)
    A, a, C, bias, mask = folded
    check_shape("folded.A", A, (B, D, None, None))
    _, _, N, H = A.shape
    check_shape("folded.a", a, (B, N, H))
    check_shape("folded.C", C, (B, N, H, D))
    check_shape("folded.bias", bias, (D,))
    check_shape("folded.mask", mask, (B, N))
    _check_like(x, "folded.", {"A": A, "a": a, "C": C, "bias": bias})
    if _autocast(x):
        # The products in autocast's type, the residual stream in its own. The norm takes the mean
        # off: rounded with it, numbers far from 0 would lose the digits that are left.
        low = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            z = x - x.mean(-1, keepdim=True) if norm and x.dtype != low else x
            out = neighbour_attention(
                z.to(low), Folded(A.to(low), a.to(low), C.to(low), bias.to(low), mask),
                scale=scale, shift=shift, norm=norm, eps=eps, residual=False,
            )  # fmt: skip
        return x + out if residual else out
    args = x, A, a, C, bias, mask, scale, shift, norm, eps, residual
    if torch.is_grad_enabled() and any(
        v is not None and v.requires_grad for v in (x, A, a, C, bias, scale, shift)
    ):
        return _NeighbourAttention.apply(*args)
    return torch.ops.knnfast.neighbour_attention(*args)


def _autocast(x: Tensor) -> bool:
    """Whether autocast lowers x; torch's leaves FP64."""
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def _check_like(like: Tensor, prefix: str, parts: dict[str, Tensor | None]) -> None:
    """Raise unless all lie where `like` does, in its type; under autocast in any that it takes."""
    types = _TYPES if _autocast(like) else (like.dtype,)
    for name, v in parts.items():
        if v is not None:
            check_dtype(prefix + name, v, types)
            check_device(prefix + name, v, like.device)


def _modulated(x, scale, shift, norm, eps):
    """The normalised tokens before and after scale and shift, and the deviation's inverse."""
    if norm:
        centred = x - x.mean(-1, keepdim=True)
        centred = centred - centred.mean(-1, keepdim=True)  # what the mean's own rounding left
        rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
        hat = centred * rstd
    else:
        hat, rstd = x, None
    z = hat if scale is None else hat * (1 + _rows(scale))
    return hat, rstd, z if shift is None else z + _rows(shift)


def _rows(v: Tensor) -> Tensor:
    return v[:, None, :] if v.dim() == 2 else v


class _NeighbourAttention(torch.autograd.Function):
    """The op forward; backward in plain matmuls on the folded form, FP32 (FP64 for FP64)."""

    @staticmethod
    def forward(ctx, x, A, a, C, bias, mask, scale, shift, norm, eps, residual):
        ctx.save_for_backward(x, A, a, C, mask, scale, shift)
        ctx.norm, ctx.eps, ctx.residual = norm, eps, residual
        ctx.bias_type = bias.dtype
        return torch.ops.knnfast.neighbour_attention(
            x.detach(), A.detach(), a.detach(), C.detach(), bias.detach(), mask,
            None if scale is None else scale.detach(),
            None if shift is None else shift.detach(), norm, eps, residual,
        )  # fmt: skip

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        with torch.autocast(dy.device.type, enabled=False):  # wherever the pass is called
            return _NeighbourAttention._gradients(ctx, dy)

    @staticmethod
    def _gradients(ctx, dy):
        x, A, a, C, mask, scale, shift = ctx.saved_tensors
        types = x.dtype, A.dtype
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        B, L, D = x.shape
        _, _, N, H = A.shape
        x, A, a, C, dy = (v.to(wide) for v in (x, A, a, C, dy))
        s, h = (None if v is None else v.to(wide) for v in (scale, shift))
        hat, rstd, z = _modulated(x, s, h, ctx.norm, ctx.eps)
        on = mask.any(-1)
        off = ~mask[:, None, :, None] & on[:, None, None, None]
        A, C = A.reshape(B, D, N * H), C.reshape(B, N * H, D)
        score = (z @ A).view(B, L, N, H) + a[:, None]
        p = torch.softmax(score.masked_fill(off, float("-inf")), 2)
        p = p * on[:, None, None, None]
        d_out = dy * on[:, None, None]
        dp = (d_out @ C.mT).view_as(p)
        dC = (p.flatten(2).mT @ d_out).view(B, N, H, D)
        ds = p * (dp - (p * dp).sum(2, keepdim=True))
        ds = ds.flatten(2)
        dA = (z.mT @ ds).view(B, D, N, H)
        da = ds.sum(1).view(B, N, H)
        dz = ds @ A.mT
        d_scale = d_shift = None
        if shift is not None:
            d_shift = dz.sum(1) if shift.dim() == 2 else dz.sum((0, 1))
        d_hat = dz
        if s is not None:
            d_scale = (dz * hat).sum(1) if s.dim() == 2 else (dz * hat).sum((0, 1))
            d_hat = dz * (1 + _rows(s))
        if ctx.norm:
            mean = d_hat.mean(-1, keepdim=True)
            d_hat = rstd * (d_hat - mean - hat * (d_hat * hat).mean(-1, keepdim=True))
        dx = d_hat + dy if ctx.residual else d_hat
        d_bias = d_out.sum((0, 1))

        def lower(v, dtype):
            return None if v is None else v.to(dtype)

        return (
            dx.to(types[0]), dA.to(types[1]), da.to(types[1]), dC.to(types[1]),
            d_bias.to(ctx.bias_type), None, lower(d_scale, types[0]), lower(d_shift, types[0]),
            None, None, None,
        )  # fmt: skip


def _unfolded(x, u: Unfolded, scale, shift, norm, eps, residual) -> Tensor:
    B, L, D = x.shape
    check_shape("folded.K", u.K, (B, None, None, None))
    _, H, N, d_h = u.K.shape
    check_shape("folded.V", u.V, (B, H, N, d_h))
    check_shape("folded.w_q", u.w_q, (H * d_h, D))
    check_shape("folded.w_o", u.w_o, (D, H * d_h))
    if u.b_q is not None:
        check_shape("folded.b_q", u.b_q, (H * d_h,))
    check_shape("folded.bias", u.bias, (D,))
    check_shape("folded.mask", u.mask, (B, N))
    parts = {"K": u.K, "V": u.V, "w_q": u.w_q, "b_q": u.b_q, "w_o": u.w_o, "bias": u.bias}
    _check_like(x, "folded.", parts)
    z = torch.nn.functional.layer_norm(x, (D,), eps=eps) if norm else x
    if scale is not None:
        z = z * (1 + _rows(scale))
    if shift is not None:
        z = z + _rows(shift)
    q = torch.nn.functional.linear(z, u.w_q, u.b_q).view(B, L, H, d_h).transpose(1, 2)
    on = u.mask.any(-1)
    # an image with everything off attends to all, and its output is dropped: never NaN
    keep = (u.mask | ~on[:, None])[:, None, None, :].expand(B, 1, L, -1)
    out = torch.nn.functional.scaled_dot_product_attention(q, u.K, u.V, attn_mask=keep)
    out = torch.nn.functional.linear(out.transpose(1, 2).reshape(B, L, H * d_h), u.w_o, u.bias)
    out = torch.where(on[:, None, None], out, 0.0)
    return x + out if residual else out


# ---------------------------------------------------------------------------------------------
# Registration

library.define(
    "neighbour_attention(Tensor x, Tensor A, Tensor a, Tensor C, Tensor bias, Tensor mask, "
    "Tensor? scale, Tensor? shift, bool norm, float eps, bool residual) -> Tensor"
)


def _attention_cpu(x, A, a, C, bias, mask, scale, shift, norm, eps, residual):
    from knnfast import _C

    if x.stride(-1) != 1:
        x = x.contiguous()
    A, a, C, bias, mask = (v.contiguous() for v in (A, a, C, bias, mask))
    scale, shift = (None if v is None else v.contiguous() for v in (scale, shift))
    B, L, D = x.shape
    _, _, N, H = A.shape
    y = torch.empty((B, L, D), dtype=x.dtype)

    def image_stride(v):
        return 0 if v is None or v.dim() == 1 else D

    if y.numel():
        _C.neighbour_attention(
            B, L, D, N, H, DTYPE_CODES[x.dtype], eps, norm, residual,
            pointer(x), x.stride(0), x.stride(1), pointer(A), pointer(a), pointer(C),
            pointer(bias), pointer(mask), pointer(scale), image_stride(scale), pointer(shift),
            image_stride(shift), pointer(y),
        )  # fmt: skip
    return y


def _attention_cuda(*args):
    from knnfast.kernels.neighbour_attention import launch_neighbour_attention

    with torch.cuda.device_of(args[0]):
        return launch_neighbour_attention(*args)


library.impl("neighbour_attention", _attention_cpu, "CPU")
library.impl("neighbour_attention", _attention_cuda, "CUDA")


@torch.library.register_fake("knnfast::neighbour_attention", lib=library)
def _(x, *_):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
