"""Workloads by name: for each op a table of shapes, for each shape what its case file reads."""

from typing import Any

TOPK: dict[str, dict[str, Any]] = {
    # A service's database: many single queries, some batches.
    "service-1m": {"n": 1_000_000, "d": 512, "batches": (1, 8, 64, 256), "ks": (10, 100)},
    "service-1m-clustered": {
        "n": 1_000_000, "d": 512, "batches": (1, 8, 64), "ks": (10,), "kind": "clustered",
    },
    "service-1m-mean": {
        "n": 1_000_000, "d": 512, "batches": (1, 8), "ks": (10,), "kind": "mean",
    },
    # The worst case of a certified scan: nothing can be proved out.
    "service-1m-ties": {
        "n": 1_000_000, "d": 512, "batches": (1,), "ks": (10,), "kind": "ties",
    },
    "service-100k": {"n": 100_000, "d": 512, "batches": (1, 8, 64), "ks": (10,)},
    # The embedded database's size, and smaller: what a call costs at least.
    "stickers": {"n": 1_725, "d": 512, "batches": (1, 4), "ks": (10,)},
    "small-1k": {"n": 1_000, "d": 64, "batches": (1,), "ks": (10,)},
    # What a GPU is measured by: from latency to throughput.
    **{
        f"gpu-{name}-{d}": {"n": n, "d": d, "batches": (1, 16, 128, 1024), "ks": (10, 100)}
        for name, n in (("1m", 1_000_000), ("10m", 10_000_000))
        for d in (512, 768)
    },
    # One of eight shards of the paper's 69 million images (GPU).
    "coco-69m-shard": {"n": 8_625_000, "d": 512, "batches": (1, 16, 128, 1024), "ks": (10,)},
    "ci": {"n": 50_000, "d": 256, "batches": (1, 8), "ks": (10,)},
}  # fmt: skip

NEIGHBOUR_ATTENTION: dict[str, dict[str, Any]] = {
    # One layer of a 32x32-token sampler in 2x2 patches, the query and ten neighbours.
    "sampling-256": {"B": 4, "L": 256, "D": 512, "H": 8, "N": 11},
    # The published model's tokens at its width, on a GPU.
    **{f"gpu-{B}": {"B": B, "L": 1024, "D": 1024, "H": 16, "N": 11} for B in (1, 16, 64)},
    # Where folding stops paying: H N as a share of D.
    **{f"fold-{N}": {"B": 4, "L": 256, "D": 512, "H": 8, "N": N} for N in (11, 24, 33, 48, 64, 96)},
    "ci": {"B": 2, "L": 128, "D": 256, "H": 4, "N": 11},
}

# L tokens, K codes, D features before the head, T levels; a schedule and a number of steps.
SAMPLING = {"B": 1, "L": 1024, "K": 4096, "D": 512, "T": 100}
TRANSITION_STEP: dict[str, dict[str, Any]] = {
    "sampling-1024": {**SAMPLING, "schedule": "vq_diffusion", "steps": 100},
    "sampling-1024-25": {**SAMPLING, "schedule": "vq_diffusion", "steps": 25},
    "sampling-1024-mask-replace": {**SAMPLING, "schedule": "mask_replace", "steps": 100},
    "sampling-1024-mask-replace-25": {**SAMPLING, "schedule": "mask_replace", "steps": 25},
    "sampling-1024-mask": {**SAMPLING, "schedule": "mask", "steps": 100},
    **{
        f"gpu-{B}": {
            **SAMPLING,
            "B": B,
            "D": 1024,
            "schedule": "vq_diffusion",
            "steps": 100,
        }
        for B in (1, 16, 64)
    },
    "ci": {
        "B": 1,
        "L": 128,
        "K": 512,
        "D": 64,
        "T": 100,
        "schedule": "vq_diffusion",
        "steps": 25,
    },
}

TRANSITION_LOSS: dict[str, dict[str, Any]] = {
    "training-1024": {"B": 1, "L": 1024, "K": 4096, "T": 100},
    **{f"gpu-{B}": {"B": B, "L": 1024, "K": 4096, "T": 100} for B in (16, 64)},
    "ci": {"B": 1, "L": 128, "K": 512, "T": 100},
}

SAMPLE: dict[str, dict[str, Any]] = {
    "stickers-1": {"bundle": "stickers", "B": 1, "steps": 25},
    "stickers": {"bundle": "stickers", "B": 4, "steps": 25},
    # The published model's grid and codebook, random weights.
    "sampling-1024": {"K": 4096, "grid": (32, 32), "patch": 2, "depth": 6, "B": 1, "steps": 100},
    "ci": {"K": 512, "grid": (16, 16), "patch": 2, "depth": 4, "B": 1, "steps": 10},
}

END_TO_END: dict[str, dict[str, Any]] = {
    "stickers": {"bundle": "stickers", "k": 10, "steps": 25, "images": 4},
    "ci": {"bundle": "stickers", "k": 10, "steps": 5, "images": 1},
}

SHAPES = {
    "topk": TOPK,
    "neighbour_attention": NEIGHBOUR_ATTENTION,
    "fold_neighbours": {name: NEIGHBOUR_ATTENTION[name] for name in ("sampling-256", "ci")},
    "transition_step": TRANSITION_STEP,
    "sample_head": TRANSITION_STEP,
    "transition_loss": TRANSITION_LOSS,
    "sample": SAMPLE,
    "end_to_end": END_TO_END,
}
