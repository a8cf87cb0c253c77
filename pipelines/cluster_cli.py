"""Commands around a cluster: compile the pipeline for one, submit it, schedule it, watch it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from components.images import DIGESTS, built_images, pinned_images
from pipelines.platform import load_profile

console = Console(highlight=False)

PROFILE = typer.Option("--profile", help="cpu, single-gpu, multi-gpu, spot-gpu, or the path of a YAML file.")
PINNED = typer.Option("--pinned", help="Name images by the digests that make push wrote.")
DIGESTS_FILE = typer.Option("--digests", help="The file that it wrote.")
CHOICES = typer.Option("--choices", help="Offer GPU types and counts as choices in the UI (KFP 2.16 or later).")


def register(app: typer.Typer) -> None:
    """Add the commands to rfdetr-pipeline."""
    app.command("compile")(compile_pipeline)


def compile_pipeline(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write it.")] = Path("retrain.yaml"),
    profile: Annotated[str, PROFILE] = "single-gpu",
    pinned: Annotated[bool, PINNED] = False,
    digests: Annotated[Path, DIGESTS_FILE] = DIGESTS,
    choices: Annotated[bool, CHOICES] = False,
) -> None:
    """Write the DAG as KFP IR YAML, for a cluster; the same bytes every time."""
    wanted, images = load_profile(profile), pinned_images(digests) if pinned else built_images()
    from pipelines.compiled import compile_for  # kfp takes a second

    compiled = compile_for(wanted, images, choices=choices)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(compiled.text)
    console.print(f"wrote {output}")
