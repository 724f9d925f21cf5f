"""Transition loss and its gradient, one program a token, one read and one write of the logits.

KL(q(x_s | x_t, x_0) || p_theta(x_s | x_t)) - lambda log p_theta(x_0)   (reference.transition_loss)

With Q_j = u (delta_j + e0), P_j = u (p_j + e) away from x_t = i and Q_i = v (delta_i + f0),
P_i = v (p_i + f), all classes but x_0 and i share their constants. Bytes: 2 B L K itemsize. About
80 instructions a class (a logarithm, an exponential, a reciprocal) and 1,300 a warp for the row,
400 of them FP64: at FP16 and K = 4096 their issue takes an H100 3 times as long as its memory, so
each thread holds 32 classes. FP32 per class, FP64 per row; sums over rows in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from knnfast.kernels.tiles import row_block

# (largest BLOCK_K, warps): a row stays in registers, above 8,192 classes it spills.
CONFIGS = ((1024, 1), (2048, 2), (4096, 4), (8192, 8), (65536, 16))


@triton.jit
def transition_loss_kernel(
    logits_ptr, x_0_ptr, x_t_ptr, steps_ptr, weight_ptr, auxiliary_ptr, grad_ptr, kl_ptr, nll_ptr,
    L, K,
    stride_row, stride_grad,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One token's KL, -log p(x_0) and gradient; csrc/ops/loss_rows.h derives the same in C++."""
    row = tl.program_id(0).to(tl.int64)
    b = row // L
    x_0 = tl.load(x_0_ptr + row)
    x_t = tl.load(x_t_ptr + row)
    step = steps_ptr + b * 7
    A_t, B_t = tl.load(step), tl.load(step + 1)
    A_s, B_s = tl.load(step + 2), tl.load(step + 3)
    real = x_t < K
    same = real & (x_0 == x_t)
    u = tl.where(real, tl.load(step + 5), tl.load(step + 4))
    v = tl.where(real, tl.load(step + 6), 0.0)
    weight = tl.load(weight_ptr + b)
    auxiliary = tl.load(auxiliary_ptr + b)

    col = tl.arange(0, BLOCK_K)
    inside = col < K
    l_ptr = logits_ptr + row * stride_row
    l = tl.load(l_ptr + col, mask=inside, other=float("-inf")).to(tl.float32)  # [BLOCK_K]
    has_0, has_i = (x_0 >= 0) & (x_0 < K), (x_t >= 0) & real
    l_0 = tl.load(l_ptr + x_0, mask=has_0, other=0.0).to(tl.float32)
    l_i = tl.load(l_ptr + x_t, mask=has_i, other=0.0).to(tl.float32)
    top = tl.max(l, 0)
    ex = tl.exp(l - top)
    total = tl.sum(ex, 0)
    inverse = 1.0 / total
    at_0 = col == tl.where(has_0, x_0, -1).to(tl.int32)
    at_i = col == tl.where(has_i, x_t, -1).to(tl.int32)
    p = tl.where(at_0 | at_i, 0.0, ex * inverse)  # of the classes that share their constants
    p_0 = tl.where(has_0, tl.exp(l_0 - top) * inverse, 0.0).to(tl.float64)
    p_i = tl.where(has_i, tl.exp(l_i - top) * inverse, 0.0).to(tl.float64)
    l_0 = tl.where(has_0, l_0 - top, 0.0).to(tl.float64)
    log_total = tl.log(total.to(tl.float64))
    nll = log_total - l_0
    # 1 - p_i without cancellation: when i holds nearly everything, sum the others.
    rest = tl.sum(p, 0).to(tl.float64) + tl.where(same, 0.0, p_0)
    rest = tl.where(rest < 0.5, rest, 1.0 - p_i)

    ratio = B_s / A_s
    spread = ratio > 0.0  # any class may be that of the level before
    full = spread & (u > 0.0)  # and the shared classes count in the loss
    safe_B = tl.where(B_t > 0.0, B_t, 1.0)
    G = tl.where(B_t > 0.0, (A_t + B_t) / safe_B, 1.0)
    S_p = tl.where(real, rest + p_i / G, 1.0)
    S_0 = tl.where(same, 1.0 / G, 1.0)
    e0, e = ratio * S_0, ratio * S_p
    f0, f = e0 * G, e * G
    # FP32 holds neither an e of nearly 0 nor its inverse; beside p it is nothing. Where B_s = 0 the
    # shared terms vanish: any positive constant keeps the logarithms finite.
    e = tl.maximum(e, 1e-33)
    e_safe = tl.where(spread, e, 1.0)
    es = e_safe.to(tl.float32)
    q = p + es
    r = 1.0 / q
    # As differences from p = 0, so that empty classes, and padding, add exactly nothing.
    logs = tl.sum(tl.log(q) - tl.log(es), 0).to(tl.float64)
    inverses = tl.sum(r - 1.0 / es, 0).to(tl.float64)
    shares = tl.sum(p * r, 0).to(tl.float64)
    count = (K - tl.where(real & (x_0 != x_t), 2, 1)).to(tl.float64)
    inverses += count / e_safe
    one = e_safe * 0.0 + 1.0  # 1 in FP64

    # The loss: shared classes, x_0, then i.
    log_ratio = tl.log(tl.where(full, e0 / e_safe, one))
    kl = tl.where(full, u * e0 * (count * log_ratio - logs), 0.0)
    q_0 = tl.where(spread, p_0 + e, one)
    log_q0 = tl.where(spread, tl.log(q_0), -nll)
    kl += tl.where(same, 0.0, u * (1.0 + e0) * (tl.log(one + e0) - log_q0))
    kept = real & (v > 0.0)
    drop = rest * (1.0 - ratio * (G - 1.0))
    log_qi_same = tl.where(spread, tl.log(one - drop / (1.0 + f0)), -nll - tl.log(one + f0))
    kl += tl.where(kept & same, -v * (1.0 + f0) * log_qi_same, 0.0)
    q_i = tl.where(spread, p_i + f, one)
    moved = kept & spread & (x_0 != x_t)
    kl += tl.where(moved, v * f0 * (tl.log(tl.where(moved, f0, one)) - tl.log(q_i)), 0.0)

    # The gradient in p, through the softmax.
    rho_0 = tl.where(same, 0.0, (1.0 + e0) / q_0)
    share_0 = tl.where(same, 0.0, tl.where(spread, rho_0 * p_0, 1.0))
    rho_i = tl.where(kept, tl.where(same, 1.0 + f0, f0) / q_i, 0.0)
    share_i = tl.where(spread, rho_i * p_i, tl.where(kept & same, 1.0, 0.0))
    slope = ratio * A_t
    through = p_i * slope * (u * (e0 * inverses + rho_0) / (A_t + B_t) + v * rho_i / safe_B)
    through = tl.where(kept & spread, through, 0.0)
    shared = tl.where(full, e0 * shares, 0.0)
    G_p = -u * (shared + share_0) - v * share_i + through
    alpha = weight * (auxiliary - G_p)
    beta = tl.where(full, weight * u * e0, 0.0)
    g_0 = weight * (-u * share_0 - auxiliary) + alpha * p_0
    g_i = weight * (through - v * share_i - tl.where(same, auxiliary, 0.0)) + alpha * p_i
    g = p * (alpha.to(tl.float32) - beta.to(tl.float32) * r)
    g = tl.where(at_0, g_0.to(tl.float32), g)
    g = tl.where(at_i, g_i.to(tl.float32), g)

    tl.store(grad_ptr + row * stride_grad + col, g.to(grad_ptr.dtype.element_ty), mask=inside)
    tl.store(kl_ptr + row, kl)
    tl.store(nll_ptr + row, nll)


def launch_transition_loss(logits, out, x_0, x_t, steps, weight, auxiliary):
    """Return (loss, kl [B], gradient); out = logits writes the gradient in place."""
    if logits.dtype == torch.float64:
        raise TypeError("logits: fp64 runs on the CPU only")
    B, L, K = logits.shape
    if out is None:
        logits = logits.contiguous()
        out = torch.empty_like(logits)
    elif not logits.is_contiguous():
        raise ValueError("inplace: logits must be contiguous")
    kl = torch.empty((B, L), dtype=torch.float64, device=logits.device)
    nll = torch.empty_like(kl)
    block_k, warps = row_block(K, CONFIGS)
    if B * L:
        transition_loss_kernel[(B * L,)](
            logits_ptr=logits, x_0_ptr=x_0.contiguous(), x_t_ptr=x_t.contiguous(),
            steps_ptr=steps.contiguous(), weight_ptr=(weight / (B * L)).contiguous(),
            auxiliary_ptr=auxiliary.contiguous(), grad_ptr=out, kl_ptr=kl, nll_ptr=nll,
            L=L, K=K,
            # Not stride(-2), which may be anything where L = 1, of contiguous logits too.
            stride_row=K, stride_grad=K, BLOCK_K=block_k, num_warps=warps,
        )  # fmt: skip
    loss = (weight * (kl + auxiliary[:, None] * nll).mean(-1)).sum() / max(B, 1)
    return loss.float(), kl.mean(-1).float(), out
