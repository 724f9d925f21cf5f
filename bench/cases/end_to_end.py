"""From a prompt to images, beside the same model with FAISS and the plain sampler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from case import Case, Rival, pick
from PIL import Image

from cases import plain
from knnfast import reference
from knnfast.benchmark.topk import faiss_module
from knnfast.pipeline import KNNDiffusion

PROMPT, GUIDANCE = "a red heart", 3.0


def cases(shape: str, size: dict[str, Any], device: str) -> Iterator[Case]:
    k, steps, images = size["k"], size["steps"], size["images"]
    pipe = KNNDiffusion.from_pretrained(size["bundle"], device=device)
    database = pipe.database
    ids = database.ids
    rows = database.vectors(ids)
    query = pipe.encoder.encode_text([PROMPT]).vectors
    best = ids[reference.topk(torch.from_numpy(query), torch.from_numpy(rows), k)[1][0].numpy()]
    timings: dict[str, float] = {}

    def ours() -> tuple[list[Image.Image], list[int]]:
        out = pipe(PROMPT, k=k, steps=steps, guidance=GUIDANCE, num_images=images, seed=0)
        timings.update(out.timings)
        return out.images, [n.item.id for n in out.neighbours[0]]

    before = ours()[0]

    def judge(result: tuple[list[Image.Image], list[int]]) -> dict[str, Any]:
        """Ids are the reference's, pictures those of a call before; `sample` judges the codes."""
        pictures, found = result
        exact = list(found) == best.tolist()
        again = [x.tobytes() for x in pictures] == [x.tobytes() for x in before]
        return {"exact": exact, "ok": exact and again}

    def with_faiss() -> Rival:
        faiss = faiss_module()
        flat = faiss.IndexFlatIP(rows.shape[1])
        flat.add(rows.astype(np.float32))
        sampler = plain.PlainSampler(pipe.denoiser, images, steps, GUIDANCE)

        def call() -> tuple[list[Image.Image], list[int]]:
            vector = pipe.encoder.encode_text([PROMPT]).vectors
            found = flat.search(vector, k)[1][0]
            cond = torch.from_numpy(np.concatenate([vector, rows[found].astype(np.float32)]))
            cond = cond.expand(images, -1, -1).to(device)
            mask = torch.ones(images, k + 1, dtype=torch.bool, device=device)
            codes = sampler(cond, mask)
            with torch.inference_mode():
                pixels = pipe.tokenizer.decode(codes)
            array = (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            return [Image.fromarray(a) for a in array], ids[found].tolist()

        return Rival(call)

    yield Case(
        "end_to_end", shape, f"{images} images, k {k}, {steps} steps, {len(rows)} rows", "float32",
        {"knnfast": ours}, judge,
        lambda names: pick({"faiss + torch-plain": with_faiss}, names),
        facts=lambda: {f"{phase}_ms": s * 1e3 for phase, s in timings.items()},
    )  # fmt: skip
