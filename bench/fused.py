"""Fused ops on the CPU against their peers: `python bench/fused.py [--only NAME] --json FILE`.

A row is measured after its result has been checked in the same process. Every figure is a median
of repeated calls, peers included, at the thread count given; peak memory is what one call adds to
a fresh process. Rows that we lose stay in.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn.functional import one_hot

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from knnfast import ops, reference
from knnfast.diffusion.schedule import Schedule
from knnfast.ops.transition_loss import _table

LAYER = {"B": 4, "L": 256, "D": 512, "H": 8, "N": 11}
GRID = {"L": 1024, "K": 4096, "D": 512, "T": 100}


def median_ms(call, seconds=1.0, least=5):
    call()
    times = []
    start = time.perf_counter()
    while len(times) < least or (time.perf_counter() - start < seconds and len(times) < 200):
        t0 = time.perf_counter()
        call()
        times.append((time.perf_counter() - t0) * 1e3)
    times.sort()
    return times[len(times) // 2], times[len(times) // 5], times[len(times) * 4 // 5]


def row(op, shape, backend, call, ours=None, **more):
    p50, p20, p80 = median_ms(call)
    out = {"op": op, "shape": shape, "backend": backend, "ms_p50": p50, "ms_p20": p20,
           "ms_p80": p80, **more}  # fmt: skip
    if ours is not None:
        out["ours_is_faster"] = p50 / ours["ms_p50"]
    print(json.dumps(out), flush=True)
    return out


class LogSpace:
    """Posterior and loss in VQ-Diffusion's own formulation: one-hot, log space, [B, K + 1, L]."""

    def __init__(self, schedule, K):
        self.K = K
        A, B, C = (torch.from_numpy(v.copy()) for v in (schedule.A, schedule.B, schedule.C))
        a, c = A[1:] / A[:-1], 1 - (1 - C[1:]) / (1 - C[:-1])
        b = (B[1:] - a * B[:-1]) / (1 - C[:-1])
        pad = torch.zeros(1, dtype=torch.float64)

        def log(v):
            return v.clamp_min(1e-30).log().float()

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
        q_1 = torch.where(masked & (torch.arange(self.K + 1) == self.K)[None, :, None], 0.0, q_1)
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


def closed_form_loss(logits, x_0, x_t, t, schedule, table, auxiliary, T):
    """The KL in closed form (p only), in FP32 torch."""
    K = logits.shape[-1]
    A_t, B_t, A_s, B_s, mask_u, real_u, real_v = table[t].float().unbind(1)
    A_t, B_t, A_s, B_s = (v[:, None] for v in (A_t, B_t, A_s, B_s))
    mask_u, real_u, real_v = (v[:, None] for v in (mask_u, real_u, real_v))
    logp = torch.log_softmax(logits, -1)
    p = logp.exp()
    real = x_t < K
    same = real & (x_t == x_0)
    lp_0 = logp.gather(-1, x_0[..., None])[..., 0]
    i = x_t.clamp(max=K - 1)
    p_i = p.gather(-1, i[..., None])[..., 0]
    ratio, G = B_s / A_s, (A_t + B_t) / B_t
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
    return (kl - (auxiliary * (2 - (t - 1) / T))[:, None] * lp_0).mean()


def attention():
    """Against projections + SDPA; the step-invariant part (the fold) has its own rows."""
    B, L, D, H, N = LAYER.values()
    x, n = torch.randn(B, L, D), torch.randn(B, N, D)
    W = [torch.randn(D, D) / D**0.5 for _ in range(4)]
    b = [torch.randn(D) for _ in range(3)]
    ada = {"scale": torch.randn(B, D) * 0.5, "shift": torch.randn(B, D)}
    shape = f"attention {LAYER}"
    with torch.inference_mode():
        folded = ops.fold_neighbours(n, *W, *b, heads=H, fold=True)
        plain = ops.fold_neighbours(n, *W, *b, heads=H, fold=False)
        wide = reference.fold_neighbours(
            n.double(), *(w.double() for w in W), *(v.double() for v in b), heads=H
        )
        exact = reference.neighbour_attention(
            x.double(), wide, **{k: v.double() for k, v in ada.items()}
        )

        def ours():
            return ops.neighbour_attention(x, folded, **ada)

        def eager():
            return ops.neighbour_attention(x, plain, **ada)

        rows = []
        for name, call in (
            ("knnfast", ours), ("torch eager: projections + SDPA", eager),
            ("torch.compile: projections + SDPA", torch.compile(eager)),
        ):  # fmt: skip
            error = float((call().double() - exact).abs().max())
            assert error < 1e-4
            mine = rows[0] if rows else None
            rows.append(row("neighbour_attention", shape, name, call, mine, max_error=error))
        for name, how in (("knnfast, once a run and layer", True), ("keys and values", False)):
            rows.append(row("fold_neighbours", shape, name, lambda how=how: ops.fold_neighbours(
                n, *W, *b, heads=H, fold=how)))  # fmt: skip
    return rows


def fold_rule():
    """Where folding stops paying: H N as a share of D."""
    rows = []
    B, L, D, H = 4, 256, 512, 8
    W = [torch.randn(D, D) / D**0.5 for _ in range(4)]
    x = torch.randn(B, L, D)
    with torch.inference_mode():
        for N in (11, 24, 33, 48, 64, 96):
            n = torch.randn(B, N, D)
            f, u = (ops.fold_neighbours(n, *W, heads=H, fold=v) for v in (True, False))
            shape = f"H N / D = {H * N / D:.2f}"
            mine = row("fold_rule", shape, "folded", lambda f=f: ops.neighbour_attention(x, f))
            rows += [mine, row("fold_rule", shape, "unfolded",
                               lambda u=u: ops.neighbour_attention(x, u), mine)]  # fmt: skip
    return rows


def step():
    """A whole run against diffusers' scheduler, its mean over five levels of the same run."""
    import diffusers

    L, K, D, T = GRID.values()
    features, weight = torch.randn(1, L, D), torch.randn(K, D) / D**0.5 * 3
    theirs = diffusers.VQDiffusionScheduler(num_vec_classes=K + 1)
    rows = []
    with torch.inference_mode():
        head = median_ms(lambda: features @ weight.T)[0]
        logits = features @ weight.T
        logp = torch.log_softmax(logits, -1).transpose(1, 2)
        peer = []
        for t in (95, 75, 50, 25, 5):
            x_t = torch.where(torch.rand(1, L) < t / 100, K, torch.randint(0, K, (1, L)))
            level = torch.tensor(t)
            peer.append(median_ms(lambda x=x_t, t=level: theirs.step(logp, t, x), 0.5, 3)[0])
        peer = sum(peer) / len(peer)
        for name, steps in (("vq_diffusion", 100), ("vq_diffusion", 25), ("mask_replace", 100),
                            ("mask_replace", 25), ("mask", 100)):  # fmt: skip
            schedule = Schedule(name, T, K)
            runs = []
            for repeat in range(3):
                x = ops.sample_prior(schedule, T, K, (1, L), seed=repeat)
                sparse = dense = 0.0
                wrong = 0
                for t, s in pairwise([T - i * T // steps for i in range(steps)] + [0]):
                    t0 = time.perf_counter()
                    w = ops.transition_weights(schedule, t, s, K)
                    after = ops.sample_head(features, weight, None, x, w, seed=repeat)
                    t1 = time.perf_counter()
                    other = ops.transition_step(logits, x, w, seed=repeat)
                    dense += time.perf_counter() - t1
                    sparse += t1 - t0
                    wrong += int((after != other).sum())
                    x = after
                runs.append((sparse / steps * 1e3, dense / steps * 1e3, wrong))
            sparse, dense, wrong = sorted(runs)[1]
            assert wrong <= steps * L * 1e-3
            out = {"op": "transition_step", "shape": f"{name}, {steps} steps, {GRID}",
                   "sparse_with_head_ms": sparse, "dense_ms": dense, "head_ms": head,
                   "diffusers_step_ms": peer, "sparse_is_faster": (peer + head) / sparse,
                   "dense_is_faster": peer / dense, "tokens": steps * L,
                   "dense_is_faster_with_head_on_both": (peer + head) / (dense + head),
                   "tokens_sparse_differs_from_dense": wrong}  # fmt: skip
            print(json.dumps(out), flush=True)
            rows.append(out)
    return rows


def loss_inputs():
    L, K, _, T = GRID.values()
    torch.manual_seed(0)
    logits, x_0 = torch.randn(1, L, K) * 3, torch.randint(0, K, (1, L))
    x_t = torch.where(torch.rand(1, L) < 0.5, K, x_0)
    return Schedule("vq_diffusion", T, K), logits, x_0, x_t, torch.tensor([50])


def loss_sides():
    schedule, leaf, *args = loss_inputs()
    leaf.requires_grad_()
    log_space = LogSpace(schedule, GRID["K"])
    table = _table(schedule, GRID["K"], leaf.device)[0]
    compiled = torch.compile(closed_form_loss)
    end = 5e-4, GRID["T"]

    def both(f):
        def call():
            leaf.grad = None
            out = f()
            out.backward()
            return out.detach()

        return call

    return {
        "knnfast": both(lambda: ops.transition_loss(leaf, *args, schedule)[0]),
        "torch eager: one-hot, log space": both(lambda: log_space.loss(leaf, *args, *end)),
        "torch eager: closed form": both(
            lambda: closed_form_loss(leaf, *args, schedule, table, *end)
        ),
        "torch.compile: closed form": both(lambda: compiled(leaf, *args, schedule, table, *end)),
    }


def peak_mib(side):
    """Memory that one forward and backward pass adds, in its own process."""
    code = (
        "import re, runpy\n"
        f"m = runpy.run_path({str(Path(__file__).resolve())!r}, run_name='sides')\n"
        f"f = m['loss_sides']()[{side!r}]\n"
        "def status(k):\n"
        "    return int(re.search(k + r':\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "base = status('VmRSS'); f(); print((status('VmHWM') - base) / 1024)\n"
    )
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], text=True,
                         capture_output=True, check=True)  # fmt: skip
    return float(out.stdout.split()[-1])


def loss():
    schedule, logits, *args = loss_inputs()
    exact = float(reference.transition_loss(logits.double(), *args, schedule)[0])
    rows = []
    for name, call in loss_sides().items():
        error = abs(float(call()) - exact)
        assert error < 1e-2 * exact, (name, error, exact)
        memory = {} if "compile" in name else {"peak_mib": peak_mib(name)}
        mine = rows[0] if rows else None
        rows.append(row("transition_loss", f"{GRID}", name, call, mine, error=error, **memory))
    return rows


def end_to_end():
    """The sampler with the fused ops against the same network and loop in plain torch."""
    from knnfast.diffusion.denoiser import Denoiser, DenoiserConfig
    from knnfast.diffusion.sampler import sample

    def plain(denoiser, schedule, cond, mask, steps, guidance):
        """Dense head, K + 1 wide posterior, the condition read anew at each step."""
        K, B, T = schedule.num_codes, len(cond), schedule.num_steps
        x = ops.sample_prior(schedule, T, K, (B, denoiser.config.length), seed=0)
        cond = torch.cat([cond, torch.zeros_like(cond)])
        mask = torch.cat([mask, torch.zeros_like(mask)])
        for t, s in pairwise([T - i * T // steps for i in range(steps)] + [0]):
            logits = denoiser(x.repeat(2, 1), torch.full((2 * B,), t), cond, mask)
            logp = torch.log_softmax(logits[B:] + guidance * (logits[:B] - logits[B:]), -1)
            w = reference.transition_weights(schedule, t, s, K).float()
            p = reference.transition_distribution(logp, x, w).float()
            noise = -torch.log(-torch.log(torch.rand_like(p).clamp(1e-30, 1 - 1e-7)))
            x = (p.clamp_min(1e-30).log() + noise).argmax(-1)
        return x

    rows = []
    folder = Path(__file__).resolve().parent.parent / "knnfast/bundles/stickers/denoiser"
    big = DenoiserConfig(num_codes=4096, grid=(32, 32), patch=2, depth=6, schedule="vq_diffusion")
    for name, denoiser, steps, B in (
        ("sticker bundle, 4 images, 25 steps", Denoiser.from_folder(folder), 25, 4),
        ("K=4096 L=1024, 1 image, 100 steps, random weights", Denoiser(big).eval(), 100, 1),
    ):
        cond = torch.nn.functional.normalize(torch.randn(B, 11, denoiser.config.embed_dim), dim=-1)
        mask = torch.ones(B, 11, dtype=torch.bool)
        schedule = denoiser.schedule
        times = {"knnfast": [], "plain torch": []}
        with torch.inference_mode():
            for _ in range(3):
                t0 = time.perf_counter()
                sample(denoiser, schedule, cond, mask, steps=steps, guidance=3.0, seed=0)
                t1 = time.perf_counter()
                plain(denoiser, schedule, cond, mask, steps, 3.0)
                times["knnfast"].append(t1 - t0)
                times["plain torch"].append(time.perf_counter() - t1)
        out = {"op": "sample", "shape": name, **{f"{k} s": sorted(v)[1] for k, v in times.items()}}
        out["ours_is_faster"] = out["plain torch s"] / out["knnfast s"]
        print(json.dumps(out), flush=True)
        rows.append(out)
    return rows


PARTS = {"attention": attention, "fold_rule": fold_rule, "step": step, "loss": loss,
         "end_to_end": end_to_end}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    from knnfast import _C

    def git(*words):
        return subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.machine()
    result = {
        "machine": cpu, "threads": args.threads, "isa": _C.ops_isa(), "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"), "commit": git("rev-parse", "--short", "HEAD"),
        "command": " ".join(["python bench/fused.py", *(f"--only {o}" for o in args.only or [])]),
        "rows": [r for name in args.only or PARTS for r in PARTS[name]()],
    }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
