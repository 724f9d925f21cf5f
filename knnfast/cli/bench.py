"""`knnfast bench`: search beside FAISS and other peers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from knnfast.cli._shared import device_option


@click.command()
@click.option("--n", default=1_000_000, show_default=True, help="Rows.")
@click.option("--d", default=512, show_default=True, help="Elements of a row.")
@click.option("--batch", default="1,16,64", show_default=True, help="Queries in one call.")
@click.option("--k", default=10, show_default=True, help="Neighbours.")
@click.option("--metric", default="ip", show_default=True, help="ip or l2.")
@device_option
@click.option("--threads", type=int, help="At most so many; the machine's by default.")
@click.option("--peers", help="Only these, separated by commas; all that are installed by default.")
@click.option("--seconds", default=85.0, show_default=True, help="About how long it may take.")
@click.option(
    "--plot", default="knnfast-bench.png", show_default=True, help="Picture to write, or none."
)
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def bench(batch: str, peers: str | None, plot: str, as_json: bool, **options: Any) -> None:
    """Your shape against FAISS and other peers on this machine: a table and a plot.

    Answers are judged against FP64 before they are timed; contenders take turns.
    """
    from knnfast.benchmark.faiss_reference import check_arguments, faiss_reference
    from knnfast.benchmark.plot import check_suffix

    try:
        options["batch"] = [int(b) for b in batch.split(",")]
    except ValueError:
        raise ValueError(f"--batch must be numbers separated by commas, got {batch!r}") from None
    options["peers"] = None if peers is None else peers.split(",")
    check_arguments(**options)
    if plot != "none":
        if not Path(plot).absolute().parent.is_dir():
            raise ValueError(f"--plot: {Path(plot).parent} is no folder")
        try:
            check_suffix("--plot", plot)
        except ImportError as e:
            raise ImportError(f"{e}; --plot none does without") from None
    report = faiss_reference(
        progress=lambda line: click.echo(line, err=True),
        **options,
    )
    click.echo(json.dumps(report.to_dict(), indent=1) if as_json else report.table())
    if plot != "none":
        report.save_plot(plot)
        click.echo(f"saved {plot}", err=True)
