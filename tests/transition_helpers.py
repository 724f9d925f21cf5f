"""For the tests of the fused ops: schedules, an independent posterior, error rules."""

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
