"""Neighbour attention beside projections + SDPA, eager and compiled, and xformers on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from case import Case, Rival, compiled, pick
from graph import with_graphs
from torch.nn import functional as F

from knnfast import ops, reference

Attend = Callable[[torch.Tensor], torch.Tensor]  # queries [B, L, H, D / H] to a like tensor


def cases(shape: str, size: dict[str, Any], device: str) -> Iterator[Case]:
    B, L, D, H, N = (size[name] for name in "BLDHN")
    cuda = device != "cpu"
    dtype = torch.float16 if cuda else torch.float32
    draw = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(device, dtype)

    x, n = randn(B, L, D), randn(B, N, D)
    W = [randn(D, D) / D**0.5 for _ in range(4)]
    b = [randn(D) for _ in range(3)]
    ada = {"scale": randn(B, D) * 0.5, "shift": randn(B, D)}
    wide = reference.fold_neighbours(
        n.double(), *(w.double() for w in W), *(v.double() for v in b), heads=H
    )
    exact = reference.neighbour_attention(
        x.double(), wide, **{name: v.double() for name, v in ada.items()}
    )

    def folded(fold: bool | None = None) -> Any:
        return ops.fold_neighbours(n, *W, *b, heads=H, fold=fold)

    def attend(condition: Any) -> torch.Tensor:
        with torch.inference_mode():
            return ops.neighbour_attention(x, condition, **ada)

    def judge(y: torch.Tensor) -> dict[str, Any]:
        error = float((y.double() - exact).abs().max())
        return {"error": error, "ok": error < (2e-2 if cuda else 1e-4)}

    A, C, chosen = folded(True), folded(False), folded()
    backends = {"fused": lambda: attend(chosen)}
    if type(chosen) is not type(A):  # the op's own rule takes the other path here
        backends["folded"] = lambda: attend(A)

    def in_torch(x: torch.Tensor, attend_to: Attend) -> torch.Tensor:
        """Projections around an attention to all N embeddings."""
        z = F.layer_norm(x, (D,)) * (1 + ada["scale"][:, None]) + ada["shift"][:, None]
        q = F.linear(z, W[0], b[0]).view(B, L, H, D // H)
        return x + F.linear(attend_to(q).reshape(B, L, D), W[3], b[2])

    def sdpa(q: torch.Tensor) -> torch.Tensor:
        """Without a mask: there is nothing to hide here, and it costs time."""
        return F.scaled_dot_product_attention(q.transpose(1, 2), C.K, C.V).transpose(1, 2)

    def peer(attend_to: Attend, form: Callable[..., torch.Tensor] = in_torch) -> Rival:
        def call() -> torch.Tensor:
            with torch.inference_mode():
                return form(x, attend_to)

        return Rival(call)

    def xformers() -> Rival:
        if not cuda:
            raise ValueError("runs on CUDA only")
        from xformers.ops import memory_efficient_attention

        K, V = (v.transpose(1, 2).contiguous() for v in (C.K, C.V))
        return peer(lambda q: memory_efficient_attention(q, K, V))

    yield Case(
        "neighbour_attention", shape, f"B {B}, L {L}, D {D}, H {H}, N {N}",
        str(dtype).removeprefix("torch."),
        with_graphs(backends, device),
        judge,
        lambda names: pick(
            {
                "torch-sdpa": lambda: peer(sdpa),
                "torch-compile-sdpa": lambda: peer(sdpa, compiled(in_torch)),
                "xformers": xformers,
            },
            names,
        ),
        # x in, y out, A and C of every head and sample once; two products with H N columns, fewer
        # than any kernel's tiles hold: a floor that none can go below.
        bytes=x.element_size() * 2.0 * B * D * (L + H * N), flops=4.0 * B * L * D * H * N,
        cuda=cuda, graphs=True,
    )  # fmt: skip
