"""For the tests of the fused ops: schedules, an independent posterior, plain torch, error rules."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Levels:
    """Cumulative coefficients for levels 0..T, written out without knnfast.diffusion."""

    A: np.ndarray
    B: np.ndarray
    C: np.ndarray


def levels(name, K, T=100):
    if name == "vq_diffusion":  # the published code: A and C linear, K B = 1e-6 at every level
        A = np.linspace(0.99999, 9e-6, T)
        C = np.linspace(9e-6, 0.99999, T)
    elif name == "mask_replace":  # 0.9 / 0.1 at T
        C = np.linspace(0.9 / T, 0.9, T)
        A = 1 - np.linspace(1 / T, 1.0, T) * (1 - 1e-6)
    elif name == "mask":
        C = np.arange(1, T + 1) / T
        A = 1 - C
    else:
        raise ValueError(name)
    A, C = np.r_[1.0, A], np.r_[0.0, C]
    B = np.zeros_like(A) if name == "mask" else np.r_[0.0, (1 - A[1:] - C[1:]) / K]
    return Levels(A, B, C)


SCHEDULES = ["vq_diffusion", "mask_replace", "mask"]


def matrix(a, b, c, K):
    """Q[i, j] = q(next = j | previous = i) over K codes and MASK."""
    Q = np.full((K + 1, K + 1), b)
    Q[np.arange(K), np.arange(K)] += a
    Q[:K, K] = c
    Q[K, :K] = 0.0
    Q[K, K] = 1.0
    return Q


def cumulative(schedule, t, K):
    return matrix(schedule.A[t], schedule.B[t], schedule.C[t], K)


def between(schedule, t, s, K):
    """q(x_t | x_s): the product of one-step matrices, so that no strided formula is used."""
    Q = np.eye(K + 1)
    for u in range(s + 1, t + 1):
        a = schedule.A[u] / schedule.A[u - 1]
        c = 1 - (1 - schedule.C[u]) / (1 - schedule.C[u - 1])
        Q = Q @ matrix(a, (1 - a - c) / K if schedule.B[u] > 0 else 0.0, c, K)
    return Q


def brute_force(schedule, t, s, p, x_t):
    """Sum over x_0 of q(x_s | x_t, x_0) p(x_0), by Bayes from full matrices; p [K] -> [K + 1]."""
    K = len(p)
    forward, to_s = between(schedule, t, s, K), cumulative(schedule, s, K)
    to_t = to_s @ forward  # q(x_t | x_0)
    out = np.zeros(K + 1)
    for x_0 in range(K):
        if p[x_0] > 0 and to_t[x_0, x_t] > 0:
            out += p[x_0] * forward[:, x_t] * to_s[x_0] / to_t[x_0, x_t]
    return out


def weights_of(name, K, t, s):
    from knnfast import reference

    return reference.transition_weights(levels(name, K), t, s, K)


def random_logits(shape, scale=3.0, dtype=torch.float32):
    return (torch.randn(shape) * scale).to(dtype)


def closed_form_loss(logits, x_0, x_t, t, table, auxiliary, weight=None, replaces=True):
    """The loss and each image's KL from p alone, in plain FP32 torch: the op's eager peer.

    table: knnfast.ops.transition_loss's, [T + 1, 7]; the derivation is in csrc/loss_rows.h.
    replaces: whether the schedule has B > 0.
    """
    K, T = logits.shape[-1], len(table) - 1
    A_t, B_t, A_s, B_s, mask_u, real_u, real_v = table[t].float().unbind(1)
    A_t, B_t, A_s, B_s = (v[:, None] for v in (A_t, B_t, A_s, B_s))
    mask_u, real_u, real_v = (v[:, None] for v in (mask_u, real_u, real_v))
    logp = torch.log_softmax(logits.float(), -1)
    p = logp.exp()
    real = x_t < K
    same = real & (x_t == x_0)
    lp_0 = logp.gather(-1, x_0[..., None])[..., 0]
    i = x_t.clamp(max=K - 1)
    p_i = p.gather(-1, i[..., None])[..., 0]
    if not replaces:  # masked tokens alone count
        kl = torch.where(real, 0.0, -mask_u * lp_0)
    else:
        ratio, G = torch.where(t[:, None] == 1, 1.0, B_s / A_s), (A_t + B_t) / B_t
        e0 = ratio * torch.where(same, 1 / G, 1.0)
        e = ratio * torch.where(real, (1 - p_i) + p_i / G, 1.0)
        u = torch.where(real, real_u, mask_u)
        logs = (p + e[..., None]).log()
        l_0 = logs.gather(-1, x_0[..., None])[..., 0]
        l_i = logs.gather(-1, i[..., None])[..., 0]
        moved = real & ~same
        others = logs.sum(-1) - l_0 - torch.where(moved, l_i, 0.0)
        kl = u * e0 * ((K - 1 - moved.float()) * e0.log() - others)
        kl = kl + torch.where(same, 0.0, u * (1 + e0) * (e0.log1p() - l_0))
        f0, log_qi = e0 * G, (p_i + e * G).log()
        at_i = torch.where(same, (1 + f0) * (f0.log1p() - log_qi), f0 * (f0.log() - log_qi))
        kl = kl + torch.where(real, real_v * at_i, 0.0)
        kl = torch.where(t[:, None] == 1, -lp_0, kl)  # B_s = 0 there: the data themselves
    per_token = kl - (auxiliary * (2 - (t - 1) / T))[:, None] * lp_0
    if weight is not None:
        per_token = per_token * weight[:, None]
    return per_token.mean(), kl.mean(1)


def within_twice(got, plain, exact, dtype, floor=None):
    """Maximum and RMS error at most twice plain torch's, plus one rounding of the largest value."""
    got, plain, exact = got.detach().double(), plain.detach().double(), exact.detach().double()
    floor = torch.finfo(dtype).eps * float(exact.abs().max()) if floor is None else floor
    ours, theirs = got - exact, plain - exact
    assert not torch.isnan(got).any()
    assert float(ours.abs().max()) <= 2 * float(theirs.abs().max()) + floor
    assert rms(ours) <= 2 * rms(theirs) + 0.1 * floor


def rms(v):
    return float(v.square().mean().sqrt())


class NoHostReads(TorchDispatchMode):
    """Fails on what a CUDA graph cannot hold: values read by the host, tensors on other devices."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __init__(self, devices):
        super().__init__()
        self.devices = devices

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.READS, func
        out = func(*args, **(kwargs or {}))
        seen = {v.device.type for v in tree_leaves((args, kwargs, out)) if torch.is_tensor(v)}
        assert seen <= self.devices, func
        return out
