"""The `knnfast` command."""

from __future__ import annotations

import warnings
from typing import Any, TextIO

import click

from knnfast._version import __version__
from knnfast.cli import bench, database, evaluate, generate, info, train

# What bad input raises: one line on stderr, exit code 2. Anything else is a bug and shows itself.
BAD_INPUT = (ValueError, TypeError, OSError, ImportError, FloatingPointError)

# Arguments of the calls behind the commands that an option gives under another name.
OPTIONS = {
    "num_images": "-n",
    "groups": "--group",
    "groups, where": "--group",
    "batch_size": "--batch-size",
    "image_weight": "--image-weight",
}


def _warn(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    file: TextIO | None = None, line: str | None = None,
) -> None:  # fmt: skip
    """A warning as one line, without the place in the source."""
    click.echo(f"warning: {message}", err=True)


class _Group(click.Group):
    """Turns errors of bad input into one clear line; `--debug` keeps the traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _warn
                return super().invoke(ctx)
        except BrokenPipeError:  # who reads has enough: click knows
            raise
        except BAD_INPUT as e:
            if ctx.params.get("debug"):
                raise

            name, colon, rest = " ".join(str(e).split()).partition(":")
            click.echo(f"error: {OPTIONS.get(name, name)}{colon}{rest}", err=True)
            ctx.exit(2)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Exact retrieval, and images generated from what it finds."""


for _command in (
    generate.generate, generate.edit, database.database, train.train, evaluate.evaluate,
    bench.bench, info.info,
):  # fmt: skip
    main.add_command(_command)
