"""The definition of each op: the public names and signatures in plain torch, FP64 inside.

Slow and readable; tests and benchmarks measure every backend against these functions. What only
says how an op works is left out: `fold_neighbours` always folds, `sample_head` takes no callable
(nor its `num_codes`), `transition_loss` has no `inplace`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from knnfast.ops import philox
from knnfast.ops._checks import (
    check_dtype,
    check_schedule,
    check_seed,
    check_shape,
    check_whole,
    probabilities,
)

# ---------------------------------------------------------------------------------------------
# Neighbour attention


class Folded(NamedTuple):
    """One layer's condition, folded into the layer's weights: constant over a sampling run."""

    A: Tensor  # [B, D, N, H]  W_q,h K_h^T / sqrt(d_h): from a normalised token to its scores
    a: Tensor  # [B, N, H]     b_q,h K_h^T / sqrt(d_h)
    C: Tensor  # [B, N, H, D]  V_h W_o,h: from probabilities to the output
    bias: Tensor  # [D]        b_o
    mask: Tensor  # [B, N]     bool, which of the N = k + 1 embeddings are on


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
) -> Folded:
    """Fold the embeddings n [B, N, E] into query and output weights (b_k cancels in the softmax).

    Weights are as in nn.Linear: w_q [D_in, D], w_k and w_v [D_in, E], w_o [D, D_in].
    """
    dtype = n.dtype
    n, w_q, w_k, w_v, w_o = (x.double() for x in (n, w_q, w_k, w_v, w_o))
    B, N, _ = n.shape
    width = w_q.shape[0]
    d_h = width // heads
    K = (n @ w_k.T).view(B, N, heads, d_h)
    V = n @ w_v.T
    V = (V if b_v is None else V + b_v.double()).view(B, N, heads, d_h)
    scale = d_h**-0.5
    A = torch.einsum("hed,bnhe->bdnh", w_q.view(heads, d_h, -1), K) * scale
    b_q = n.new_zeros(width) if b_q is None else b_q.double()
    a = torch.einsum("he,bnhe->bnh", b_q.view(heads, d_h), K) * scale
    C = torch.einsum("bnhe,dhe->bnhd", V, w_o.view(-1, heads, d_h))
    bias = n.new_zeros(w_o.shape[0]) if b_o is None else b_o
    if mask is None:
        mask = torch.ones(B, N, dtype=torch.bool, device=n.device)
    return Folded(A.to(dtype), a.to(dtype), C.to(dtype), bias.to(dtype), mask)


def neighbour_attention(
    x: Tensor,
    folded: Folded,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    norm: bool = True,
    eps: float = 1e-5,
    residual: bool = True,
) -> Tensor:
    """Compute y = x + [sum_h softmax(z A_h + a_h) C_h + b_o], z = LN(x)(1 + scale) + shift.

    x [B, L, D]; scale and shift [B, D] or [D]. An image whose mask is all off keeps y = x.
    """
    A, a, C, bias = (w.double() for w in folded[:4])
    x64 = x.double()
    z = torch.nn.functional.layer_norm(x64, x.shape[-1:], eps=eps) if norm else x64
    if scale is not None:
        z = z * (1 + _rows(scale))
    if shift is not None:
        z = z + _rows(shift)
    scores = torch.einsum("bld,bdnh->blnh", z, A) + a[:, None]
    scores = scores.masked_fill(~folded.mask[:, None, :, None], float("-inf"))
    on = folded.mask.any(-1)[:, None, None]
    p = torch.softmax(torch.where(on[..., None], scores, 0.0), 2)
    out = torch.einsum("blnh,bnhd->bld", p, C) + bias
    out = torch.where(on, out, 0.0)
    return (x64 + out if residual else out).to(x.dtype)


def _rows(v: Tensor) -> Tensor:
    return v.double()[:, None, :] if v.dim() == 2 else v.double()


# ---------------------------------------------------------------------------------------------
# Transition step


class Schedule(Protocol):
    """Cumulative coefficients for levels 0..T: A + K B + C = 1, (A, B, C)[0] = (1, 0, 0)."""

    @property
    def A(self) -> Any: ...  # noqa: D102
    @property
    def B(self) -> Any: ...  # noqa: D102
    @property
    def C(self) -> Any: ...  # noqa: D102


# Columns of a step's weights, FP64. The first is the level t, for the random counters.
MASK_P, MASK_U, REAL_P, REAL_U0, REAL_U1, KEEP = range(1, 7)
WEIGHTS = 7


def transition_weights(
    schedule: Schedule, t: int, s: int, num_codes: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The step t -> s (t > s) as seven FP64 numbers: t, then the mixture's weights.

    p(x_s | x_t = MASK) = MASK_P p + MASK_U uniform + rest at MASK
    p(x_s | x_t = i)    = REAL_P p + (REAL_U0 (1 - p_i) + REAL_U1 p_i) uniform + rest at i
    KEEP = C_s is the share of positions that purity sampling leaves masked. (Gu et al. 2022; for
    any stride, and as a mixture: derived, docs/ops.md.)

    Args:
        schedule: A, B, C for levels 0..T.
        t, s: levels, 0 <= s < t <= T.
        num_codes: K.
        device: of the result.
    Returns: [7] float64.
    Raises: ValueError levels or schedule out of range; TypeError no whole number, no schedule.
    """
    check_schedule(schedule, num_codes)
    for name, value in (("t", t), ("s", s)):
        check_whole(name, value)
    A, B, C = probabilities(schedule)
    if not 0 <= s < t < len(A):
        raise ValueError(f"levels must satisfy 0 <= s < t <= {len(A) - 1}, got t={t}, s={s}")
    K = num_codes
    _, b, c = stride(A, B, C, t, s)
    mask_p = c * A[s] / C[t] if C[t] > 0 else 0.0
    mask_u = c * K * B[s] / C[t] if C[t] > 0 else 0.0
    if B[t] > 0:
        real_p = b * A[s] / B[t]
        real_u0 = b * K * B[s] / B[t]
        real_u1 = b * K * B[s] / (A[t] + B[t])
    else:
        real_p = real_u0 = real_u1 = 0.0
    if s == 0:  # everything is decided at the data: no rounding may leave a MASK behind
        mask_p, real_p = 1.0, 1.0 if B[t] > 0 else 0.0
    row = [float(t), mask_p, mask_u, real_p, real_u0, real_u1, C[s]]
    return torch.tensor(row, dtype=torch.float64, device=device)


def stride(
    A: Sequence[float], B: Sequence[float], C: Sequence[float], t: int, s: int
) -> tuple[float, float, float]:
    """q(x_t | x_s) as (a, b, c): keep, each replacement, mask."""
    a = A[t] / A[s]
    c = 1 - (1 - C[t]) / (1 - C[s])
    b = (B[t] - a * B[s]) / (1 - C[s])
    return a, max(b, 0.0), c


def class_scores(
    logits: Tensor,
    null_logits: Tensor | None = None,
    *,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_r: float = 1.0,
    top_k: int = 0,
) -> Tensor:
    """Compute log p after guidance, temperature, truncation and renormalisation, FP64 [..., K].

    l = l_null + guidance (l_cond - l_null); a class at -inf in either pass is excluded. top_r
    keeps a class while the classes above it hold less than top_r (ties by index); top_k keeps the
    best top_k.
    """
    cond = logits.double()
    if null_logits is not None:
        null = null_logits.double()
        inf = float("inf")
        excluded, bad = (cond == -inf) | (null == -inf), ~((cond < inf) & (null < inf))
        cond = null + guidance * (cond - null)
        cond = cond.masked_fill(excluded, -inf).masked_fill(bad, float("nan"))
    logp = torch.log_softmax(cond / temperature, -1)
    if top_r < 1.0 or top_k:
        ordered, order = logp.sort(dim=-1, descending=True, stable=True)
        p = ordered.exp()
        above = p.cumsum(-1) - p
        drop = above >= top_r if top_r < 1.0 else torch.zeros_like(p, dtype=torch.bool)
        if top_k:
            drop[..., top_k:] = True
        drop[..., 0] = False
        drop = torch.zeros_like(drop).scatter(-1, order, drop)
        logp = torch.log_softmax(logp.masked_fill(drop, float("-inf")), -1)
    return logp


def transition_distribution(logp: Tensor, x_t: Tensor, weights: Tensor) -> Tensor:
    """Write p(x_s | x_t) out over K + 1 classes, from log p [..., K] and x_t [...]."""
    p = logp.exp()
    K = p.shape[-1]
    masked = x_t == K
    i = x_t.clamp(max=K - 1)[..., None]
    w_p, w_u = _branches(p.gather(-1, i)[..., 0], masked, weights)
    real = w_p[..., None] * p + w_u[..., None] / K
    out = torch.cat([real, torch.zeros_like(real[..., :1])], -1)
    stay = (1 - w_p - w_u)[..., None]
    return out.scatter_add(-1, x_t[..., None], stay)


def _branches(p_i: Tensor, masked: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    w = [weights[..., j, None] if weights.dim() > 1 else weights[j] for j in range(WEIGHTS)]
    w_p = torch.where(masked, w[MASK_P], w[REAL_P])
    w_u = torch.where(masked, w[MASK_U], w[REAL_U0] * (1 - p_i) + w[REAL_U1] * p_i)
    return w_p.double(), w_u.double()


def transition_step(
    logits: Tensor,
    x_t: Tensor,
    weights: Tensor,
    *,
    seed: int | Tensor,
    image_indices: Tensor | None = None,
    null_logits: Tensor | None = None,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_r: float = 1.0,
    top_k: int = 0,
    purity: float | None = None,
) -> Tensor:
    """Draw x_s ~ p(x_s | x_t) [B, L] from logits [B, L, K]; weights [7] or [B, 7] of the step.

    One uniform decides the branch: [0, w_p) draws from p, [w_p, w_p + w_u) uniformly, else x_t
    stays. purity=r instead sets the masked positions of highest max p (see `purity_positions`).
    """
    K = logits.shape[-1]
    logp = class_scores(
        logits, null_logits, guidance=guidance, temperature=temperature, top_r=top_r, top_k=top_k
    )
    t, position, image, seed = _coordinates(x_t, weights, image_indices, seed)
    masked = x_t == K
    w = philox.philox(
        torch.zeros_like(position), position, image, philox.counter(t, philox.CHOICE), seed
    )
    u = philox.unit52(w[0], w[1])
    p_i = logp.gather(-1, x_t.clamp(max=K - 1)[..., None])[..., 0].exp()
    w_p, w_u = _branches(p_i, masked, weights)
    _, at_0 = _branches(torch.zeros_like(u), masked, weights)
    _, at_1 = _branches(torch.ones_like(u), masked, weights)
    from_p = u < w_p
    certain = u < w_p + torch.minimum(at_0, at_1)  # whatever p_i is
    replaced = ~from_p & (certain | (u < w_p + w_u))
    read = from_p | (~certain & (u < w_p + torch.maximum(at_0, at_1)))
    if purity is not None:
        read = masked
        from_p = purity_positions(logp, masked, weights, position, image, t, seed)
        replaced = torch.zeros_like(from_p)
        logp = torch.log_softmax((1 + purity * logp.max(-1, keepdim=True)[0].exp()) * logp, -1)
    if bool((logp.isnan().any(-1) & read).any()):
        raise ValueError("logits: NaN, +inf or no finite class in a row that is drawn")
    block = torch.arange((K + 3) // 4, device=logits.device)
    words = philox.philox(
        block, position[..., None], image[..., None],
        philox.counter(t, philox.GUMBEL)[..., None], seed,
    )  # fmt: skip
    noise = philox.gumbel(torch.stack(words, -1).flatten(-2)[..., :K])
    drawn = (logp + noise).argmax(-1)
    x_s = torch.where(replaced, philox.below(w[2], w[3], K), x_t)
    return torch.where(from_p, drawn, x_s)


def purity_positions(
    logp: Tensor,
    masked: Tensor,
    weights: Tensor,
    position: Tensor,
    image: Tensor,
    t: Tensor,
    seed: Tensor,
) -> Tensor:
    """Which masked positions purity sampling sets: n of them, without replacement, by max p.

    n = masked - round(L C_s), so that level s holds its expected number of MASKs whatever list of
    steps led there. The draw is the n largest of log max p + Gumbel (ties by position).
    """
    L = masked.shape[-1]
    keep = torch.round(L * weights[..., KEEP]).expand(masked.shape[0])
    n = (masked.sum(-1) - keep).clamp(min=0)
    zero = torch.zeros_like(position)
    word = philox.philox(zero, position, image, philox.counter(t, philox.PURITY), seed)[0]
    score = logp.max(-1)[0] + philox.gumbel(word)
    score = score.masked_fill(~masked, float("-inf"))
    order = score.sort(dim=-1, descending=True, stable=True)[1]
    rank = torch.empty_like(order).scatter_(-1, order, position.expand_as(order))
    return masked & (rank < n[:, None])


def sample_head(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_t: Tensor,
    weights: Tensor,
    *,
    seed: int | Tensor,
    image_indices: Tensor | None = None,
    null_features: Tensor | None = None,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_r: float = 1.0,
    top_k: int = 0,
) -> Tensor:
    """`transition_step` on logits = features @ weight.T + bias, features [B, L, D]."""
    b = 0.0 if bias is None else bias.double()
    null = None if null_features is None else null_features.double() @ weight.double().T + b
    return transition_step(
        features.double() @ weight.double().T + b, x_t, weights, seed=seed,
        image_indices=image_indices, null_logits=null, guidance=guidance,
        temperature=temperature, top_r=top_r, top_k=top_k,
    )  # fmt: skip


def sample_prior(
    schedule: Schedule,
    t: int,
    num_codes: int,
    shape: tuple[int, int],
    *,
    seed: int | Tensor,
    image_indices: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw x_t [B, L] from the schedule's own prior: MASK with C / (C + K B), else uniform.

    Args:
        schedule: cumulative A, B, C for levels 0..T.
        t: the level, in [1, T].
        num_codes: K.
        shape: (B, L), each at least 0.
        seed: the Philox key, in [-2^63, 2^63), or an int64 tensor of one element.
        image_indices: [B] int64 in [0, 2^32), each image's place in the random counters; 0..B-1
            when None.
        device: of the tokens.
    Raises: ValueError range, of image indices on the CPU alone (elsewhere their low 32 bits count);
        TypeError type.
    """
    check_schedule(schedule, num_codes)
    check_whole("t", t)
    if not 1 <= t < len(schedule.A):
        raise ValueError(f"t: must be in [1, {len(schedule.A) - 1}], got {t}")
    if len(shape) != 2:
        raise ValueError(f"shape: must be (B, L), got {shape}")
    for size in shape:
        check_whole("shape", size)
        if size < 0:
            raise ValueError(f"shape: must not be negative, got {shape}")
    check_seed(seed, seed.device if isinstance(seed, Tensor) else torch.device(device))
    if image_indices is not None:
        check_dtype("image_indices", image_indices, (torch.int64,))
        check_shape("image_indices", image_indices, shape[:1])
        # Elsewhere looking would synchronise.
        if image_indices.device.type == "cpu" and (image_indices >> 32).any():
            raise ValueError("image_indices: must be in [0, 2^32)")
    _, B, C = (of_level[t] for of_level in probabilities(schedule))
    x = torch.full(shape, num_codes, dtype=torch.int64, device=device)
    if not x.numel():
        return x
    level = torch.full((1,), float(t), dtype=torch.float64, device=device)
    t_, position, image, seed = _coordinates(x, level, image_indices, seed)
    w = philox.philox(
        torch.zeros_like(position), position, image, philox.counter(t_, philox.PRIOR), seed
    )
    masked = philox.unit52(w[0], w[1]) < C / (C + num_codes * B)
    return torch.where(masked, x, philox.below(w[2], w[3], num_codes))


def _coordinates(
    x_t: Tensor, weights: Tensor, image_indices: Tensor | None, seed: int | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, L = x_t.shape
    position = torch.arange(L, device=x_t.device)[None]
    if image_indices is None:
        image_indices = torch.arange(B, device=x_t.device)
    if not isinstance(seed, Tensor):
        seed = torch.full((), seed, dtype=torch.int64, device=x_t.device)
    return weights[..., :1].long(), position, image_indices[:, None] & 0xFFFFFFFF, seed


# ---------------------------------------------------------------------------------------------
# Transition loss


def transition_loss(
    logits: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    schedule: Schedule,
    *,
    weight: Tensor | None = None,
    auxiliary: float = 5e-4,
    adaptive: bool = True,
) -> tuple[Tensor, Tensor]:
    """Variational loss of p_theta(x_0 | x_t) = softmax(logits), by the definition.

    loss = 1 / (B L) sum_b weight_b sum_l [KL(q(x_s | x_t, x_0) || p_theta(x_s | x_t))
                                           - auxiliary f(t) log p_theta(x_0)],  s = t - 1
    f(t) = 2 - (t - 1) / T when adaptive, else 1. Returns (loss, KL per image [B], mean over L).
    """
    K = logits.shape[-1]
    levels = len(schedule.A) - 1
    logp = torch.log_softmax(logits.double(), -1)
    rows = torch.stack([transition_weights(schedule, int(v), int(v) - 1, K) for v in t])
    rows = rows.to(logits.device)
    nll = -logp.gather(-1, x_0[..., None])[..., 0]
    one_hot = torch.full_like(logp, float("-inf")).scatter(-1, x_0[..., None], 0.0)
    q = transition_distribution(one_hot, x_t, rows)
    p = transition_distribution(logp, x_t, rows)
    on = q > 0
    kl = torch.where(on, q * (torch.where(on, q, 1.0).log() - torch.where(on, p, 1.0).log()), 0.0)
    kl = kl.sum(-1)
    factor = auxiliary * (
        2 - (t.double() - 1) / levels if adaptive else torch.ones_like(t).double()
    )
    per_token = kl + factor[:, None] * nll
    scale = torch.ones_like(factor) if weight is None else weight.double()
    loss = (scale[:, None] * per_token).mean()
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return loss.to(dtype), kl.mean(-1).detach().to(dtype)


# ---------------------------------------------------------------------------------------------
# Top-k


def canonical_sum(terms: Tensor) -> Tensor:
    """Sum over the last axis in the order that fixes the bits: 32 lanes, then a tree.

    Lane l adds terms l, l + 32, ... in order; lanes combine by the strides 16, 8, 4, 2, 1.
    """
    d = terms.shape[-1]
    terms = torch.nn.functional.pad(terms, (0, -d % 32)).unflatten(-1, (-1, 32))
    lanes = torch.zeros_like(terms[..., 0, :])
    for step in terms.unbind(-2):
        lanes = lanes + step
    for stride in (16, 8, 4, 2, 1):
        lanes = lanes[..., :stride] + lanes[..., stride : 2 * stride]
    return lanes[..., 0]


def exact_sqrt(x: Tensor) -> Tensor:
    """The square root that IEEE 754 asks for; torch's on a CPU may be a vector library's."""
    return torch.as_tensor(np.sqrt(x.numpy())) if x.device.type == "cpu" else x.sqrt()


def canonical_scores(q: Tensor, x: Tensor, metric: str = "ip") -> Tensor:
    """The FP64 scores of queries q [M, D] against rows x [N, D], in the fixed order: [M, N]."""
    q = q.float().double()
    x = x.half().double()
    rows = []
    for query in q:
        if metric == "l2":
            t = query - x
            rows.append(canonical_sum(t * t))
            continue
        dot = canonical_sum(x * query)
        if metric == "cosine":
            norms = exact_sqrt(canonical_sum(x * x)) * exact_sqrt(canonical_sum(query * query))
            dot = torch.where(norms > 0, dot / norms, 0.0)
        rows.append(dot)
    return torch.stack(rows) if rows else q.new_zeros(0, len(x))


def topk(
    q: Tensor, x: Tensor, k: int, metric: str = "ip", ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k best rows of x [N, D] (kept as FP16) for every query of q [M, D] (taken as FP32).

    Order is decided on the FP64 canonical score, ties go to the lower id, and rounding to FP32
    comes last; missing results are id -1 with -inf (l2: +inf).

    Returns:
        scores: [M, k] fp32, best first: ip and cosine descend, l2 (squared) ascends.
        ids: [M, k] int64, from `ids` [N] or the row numbers.
    """
    ids = torch.arange(len(x), device=x.device) if ids is None else ids
    by_id = ids.argsort()
    score = canonical_scores(q, x, metric)[:, by_id]
    order = score.argsort(dim=1, descending=metric != "l2", stable=True)[:, :k]
    missing = float("inf") if metric == "l2" else -float("inf")
    pad = (0, k - order.shape[1])
    scores = torch.nn.functional.pad(score.gather(1, order).float(), pad, value=missing)
    return scores, torch.nn.functional.pad(ids[by_id][order], pad, value=-1)
