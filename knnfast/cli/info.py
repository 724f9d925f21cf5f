"""`knnfast info`: what is installed."""

from __future__ import annotations

import json

import click

from knnfast._version import __version__


@click.command()
@click.option("--model", default="stickers", show_default=True, help="A bundle or a folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def info(model: str, as_json: bool) -> None:
    """Say what is installed and what a model holds."""
    import torch

    from knnfast import _C
    from knnfast.pipeline import KNNDiffusion

    pipe = KNNDiffusion.from_pretrained(model)
    report = {
        "knnfast": __version__,
        "cpu_kernels": _C.isa(),
        "threads": _C.num_threads(),
        "torch": torch.__version__,
        "cuda_built": _C.has_cuda,
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "model": model,
        "encoder": pipe.encoder.card.to_dict(),
        "databases": {name: len(db) for name, db in pipe.databases.items()},
        "parameters": sum(p.numel() for p in pipe.denoiser.parameters()),
    }
    if as_json:
        click.echo(json.dumps(report, indent=1))
        return
    for key, value in report.items():
        click.echo(f"{key:12} {value}")
