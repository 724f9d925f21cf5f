"""The transition loss with its gradient beside other ways to write it in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from case import Case, Rival, compiled, pick
from torch.nn.functional import one_hot

from knnfast import ops, reference
from knnfast.diffusion.schedule import Schedule
from knnfast.ops.transition_loss import _table


def cases(shape: str, size: dict[str, Any], device: str) -> Iterator[Case]:
    B, L, K, T = (size[name] for name in "BLKT")
    dtype = torch.float32 if device == "cpu" else torch.float16
    draw = torch.Generator().manual_seed(0)
    logits = (torch.randn(B, L, K, generator=draw) * 3).to(device, dtype)
    x_0 = torch.randint(0, K, (B, L), generator=draw).to(device)
    x_t = torch.where(torch.rand(B, L, generator=draw).to(device) < 0.5, K, x_0)
    t = torch.full((B,), T // 2, device=device)
    schedule = Schedule("vq_diffusion", T, K)
    wide = logits.double().requires_grad_()
    exact = reference.transition_loss(wide, x_0, x_t, t, schedule)[0]
    exact.backward()
    leaf = logits.clone().requires_grad_()

    def both(loss: Callable[[], torch.Tensor]) -> Callable[[], tuple[float, torch.Tensor]]:
        """Forward and backward pass; its gradient is no other call's, so that it is counted."""

        def call() -> tuple[Any, torch.Tensor]:
            value = loss()
            (grad,) = torch.autograd.grad(value, leaf)
            return value.detach(), grad

        return call

    def judge(result: tuple[Any, torch.Tensor]) -> dict[str, Any]:
        """Error of the loss over the loss, of the gradient over its largest element."""
        value, grad = result
        error = abs(float(value / exact.detach()) - 1)
        worst = float((grad.double() - wide.grad).abs().max() / wide.grad.abs().max())
        bound = 1e-4 if dtype == torch.float32 else 1e-2
        return {"error": error, "gradient_error": worst, "ok": max(error, worst) < bound}

    end = 5e-4, T

    def log_space() -> Rival:
        peer = LogSpace(schedule, K, device)
        return Rival(both(lambda: peer.loss(leaf, x_0, x_t, t, *end)))

    def closed(form: Callable[..., torch.Tensor]) -> Rival:
        table = _table(schedule, leaf.device)[0]
        return Rival(both(lambda: form(leaf, x_0, x_t, t, table, end[0])[0]))

    yield Case(
        "transition_loss", shape, f"B {B}, L {L}, K {K}, forward and backward",
        str(dtype).removeprefix("torch."),
        {"fused": both(lambda: ops.transition_loss(leaf, x_0, x_t, t, schedule)[0])}, judge,
        lambda names: pick(
            {
                "torch-log-space": log_space,
                "torch-closed-form": lambda: closed(closed_form_loss),
                "torch-compile-closed-form": lambda: closed(compiled(closed_form_loss)),
            },
            names,
        ),
        # Logits in, gradient out; about ten operations an element.
        bytes=2.0 * logits.nbytes, flops=10.0 * B * L * K, cuda=device != "cpu",
    )  # fmt: skip


def closed_form_loss(logits, x_0, x_t, t, table, auxiliary, weight=None, replaces=True):
    """The loss and each image's KL from p alone, in plain FP32 torch: the op's eager peer.

    table: knnfast.ops.transition_loss's, [T + 1, 7]; the derivation is in csrc/ops/loss_rows.h.
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


class LogSpace:
    """Posterior and loss in VQ-Diffusion's own formulation: one-hot, log space, [B, K + 1, L]."""

    def __init__(self, schedule, K, device):
        self.K = K
        A, B, C = (torch.from_numpy(v.copy()) for v in (schedule.A, schedule.B, schedule.C))
        a, c = A[1:] / A[:-1], 1 - (1 - C[1:]) / (1 - C[:-1])
        b = (B[1:] - a * B[:-1]) / (1 - C[:-1])
        pad = torch.zeros(1, dtype=torch.float64)

        def log(v):
            return v.clamp_min(1e-30).log().float().to(device)

        self.cumulative = [log(v) for v in (A, B, C)]
        self.one = [log(torch.cat([pad, v])) for v in (a, b, c)]
        self.not_C, self.not_c = log(1 - C), log(torch.cat([pad, 1 - c]))

    def log_one_hot(self, x):
        return one_hot(x, self.K + 1).permute(0, 2, 1).float().clamp_min(1e-30).log()

    def forward(self, log_x, t, tables, keep):
        la, lb, lc = (v[t][:, None, None] for v in tables)
        real = torch.logaddexp(log_x[:, :-1] + la, lb)
        mask = torch.logaddexp(log_x[:, -1:] + keep[t][:, None, None], lc)
        return torch.cat([real, mask], 1)

    def posterior(self, log_x0, log_xt, x_t, t):
        masked = (x_t == self.K)[:, None]
        zero = torch.full_like(log_xt[:, :1], -70.0)
        q_t = self.forward(log_xt, t, self.cumulative, self.not_C)[:, :-1]
        q_t = torch.where(masked, self.cumulative[2][t][:, None, None], q_t)
        q_1 = self.forward(log_xt, t, self.one, self.not_c)[:, :-1]
        q_1 = torch.cat([torch.where(masked, self.one[2][t][:, None, None], q_1), zero], 1)
        is_mask = torch.arange(self.K + 1, device=x_t.device)[:, None] == self.K
        q_1 = torch.where(masked & is_mask, 0.0, q_1)
        q = torch.cat([log_x0[:, :-1] - q_t, zero], 1)
        total = q.logsumexp(1, keepdim=True)
        back = self.forward(q - total, t - 1, self.cumulative, self.not_C)
        return (back + q_1 + total).clamp(-70, 0)

    def loss(self, logits, x_0, x_t, t, auxiliary, T):
        log_p = torch.log_softmax(logits.double(), -1).float().permute(0, 2, 1)
        log_p = torch.cat([log_p, torch.full_like(log_p[:, :1], -70.0)], 1).clamp(-70, 0)
        log_x0, log_xt = self.log_one_hot(x_0), self.log_one_hot(x_t)
        true = self.posterior(log_x0, log_xt, x_t, t)
        model = self.posterior(log_p, log_xt, x_t, t)
        kl = (true.exp() * (true - model)).sum(1)
        nll = -(log_x0.exp() * log_p).sum(1)
        aux = (log_x0[:, :-1].exp() * (log_x0[:, :-1] - log_p[:, :-1])).sum(1)
        kl = torch.where((t == 1)[:, None], nll, kl)
        return (kl + (auxiliary * (2 - (t - 1) / T))[:, None] * aux).mean()
