"""What folding costs once for a run and layer, beside making keys and values alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from case import Case, Rival, pick

from knnfast import ops, reference


def cases(shape: str, size: dict[str, Any], device: str) -> Iterator[Case]:
    B, D, H, N = (size[name] for name in "BDHN")
    cuda = device != "cpu"
    dtype = torch.float16 if cuda else torch.float32
    draw = torch.Generator().manual_seed(0)
    n = torch.randn(B, N, D, generator=draw).to(device, dtype)
    W = [(torch.randn(D, D, generator=draw) / D**0.5).to(device, dtype) for _ in range(4)]
    exact = reference.fold_neighbours(n.double(), *(w.double() for w in W), heads=H)

    def make(fold: bool) -> Any:
        with torch.inference_mode():
            return ops.fold_neighbours(n, *W, heads=H, fold=fold)

    def judge(made: Any) -> dict[str, Any]:
        if isinstance(made, ops.Unfolded):
            pairs = [(made.K, heads(n.double() @ W[1].double().T)),
                     (made.V, heads(n.double() @ W[2].double().T))]  # fmt: skip
        else:
            pairs = [(getattr(made, part), getattr(exact, part)) for part in ("A", "a", "C")]
        error = max(float((got.double() - want).abs().max()) for got, want in pairs)
        return {"error": error, "ok": error < (2e-2 if cuda else 1e-4)}

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(B, N, H, -1).transpose(1, 2)

    yield Case(
        "fold_neighbours", shape, f"B {B}, D {D}, H {H}, N {N}", str(dtype).removeprefix("torch."),
        {"fold": lambda: make(True)}, judge,
        lambda names: pick({"keys and values": lambda: Rival(lambda: make(False))}, names),
        cuda=cuda,
    )  # fmt: skip
