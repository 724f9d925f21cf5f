"""`knnfast evaluate`: a model's quality, and ablations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from knnfast.cli._shared import Bar, check_folder, device_option


@click.command()
@click.argument("model")
@click.option("--judge", help="Second encoder, a folder; else the embedded judge of stickers.")
@click.option("--inception", type=click.Path(), help="Inception's weights, for the FID.")
@click.option("--ablation", help="An ablation by name (above), or all; see --out.")
@click.option("--quick", is_flag=True, help="Fewer names in an ablation: minutes, wide intervals.")
@click.option("--continuous", help="A model with the continuous backbone, if not MODEL.")
@click.option(
    "--out", default="out/results", show_default=True, type=click.Path(path_type=Path),
    help="Folder of the ablations' report: README.md, plots, JSON.",
)  # fmt: skip
@click.option("--prompts", type=int, help="Names: 300, in an ablation 100, 16 with --quick.")
@click.option("--other-prompts", default=40, show_default=True, help="Names of the unseen kind.")
@click.option("--other-samples", default=2, show_default=True, help="Images of each of these.")
@click.option("--k", type=int, help="Neighbours; 10, or as many as there are, when not given.")
@click.option("--steps", default=25, show_default=True, help="Denoising steps.")
@click.option("--guidance", default=3.0, show_default=True, help="Guidance weight; 1 is none.")
@click.option("--truncation", default=1.0, show_default=True, help="Keep this mass of the codes.")
@click.option("--seed", default=0, show_default=True)
@click.option("--backbone", help="discrete or continuous; the model's first when not given.")
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def evaluate(
    ctx: click.Context, model: str, judge: str | None, ablation: str | None, quick: bool,
    continuous: str | None, out: Path, prompts: int | None, seed: int, backbone: str | None,
    device: str, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Measure what MODEL (a bundle or a folder) generates, beside real and wrong pictures.

    The names of its database are the prompts; a second one holds what the model has never seen.

    With --ablation: neighbours, condition, own, k, index, steps, guidance, truncation, backbone or
    all.
    """
    from knnfast import ablations
    from knnfast import evaluate as measures
    from knnfast.ablation_report import require_plots
    from knnfast.pipeline import KNNDiffusion, backbones_of

    if ablation is None:
        for name in ("quick", "continuous", "out"):
            if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise ValueError(f"--{name}: goes with --ablation")
        pipe = KNNDiffusion.from_pretrained(model, device=device, backbone=backbone)
        for name in ("other_prompts", "other_samples"):
            given = ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
            if given and len(pipe.databases) < 2:
                raise ValueError(
                    f"--{name.replace('_', '-')}: needs a second database, {model} holds one"
                )
        with Bar("evaluating", hidden=as_json) as bar:
            result = measures.evaluate(
                pipe, judge, prompts=300 if prompts is None else prompts, seed=seed, progress=bar,
                **options,
            )  # fmt: skip
        click.echo(json.dumps(result, indent=1) if as_json else measures.report(result))
        return
    for name in (*options, "backbone"):
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise ValueError(f"--{name.replace('_', '-')}: an ablation has its own settings")
    names = list(ablations.ABLATIONS) if ablation == "all" else [ablation]
    if unknown := set(names) - set(ablations.ABLATIONS):
        allowed = ", ".join(ablations.ABLATIONS)
        raise ValueError(f"--ablation: must be one of {allowed} or all, got {unknown.pop()!r}")
    settings = [setting for name in names for setting in ablations.ABLATIONS[name].settings]
    compares = any(setting.backbone == "continuous" for setting in settings)
    if continuous is not None and not compares:
        raise ValueError(f"--continuous: the ablation {ablation} does not compare backbones")
    require_plots()
    check_folder("--out", out)
    if prompts is None:
        prompts = ablations.QUICK_PROMPTS if quick else ablations.PROMPTS
    pipe = KNNDiffusion.from_pretrained(model, device=device, backbone="discrete")
    if compares and continuous is None and "continuous" in backbones_of(model):
        continuous = model
    other = None
    if continuous is not None:
        other = KNNDiffusion.from_pretrained(continuous, device=device, backbone="continuous")
    with Bar("evaluating", hidden=as_json) as bar:
        results = ablations.run(
            names, pipe, out, prompts=prompts, seed=seed, judge=judge, continuous=other,
            progress=bar,
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps(results, indent=1))
        return
    for result in results:
        for claim in result["claims"]:
            click.echo(f"{result['name']}: {claim['claim']}: {claim['found']}")
    click.echo(out / "README.md")
