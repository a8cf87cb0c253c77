"""The compiled pipeline of every profile as it was reviewed: `python -m tests.pipelines.golden_ir` writes it anew."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

from components.images import built_images
from pipelines.compiled import CompiledPipeline, compile_for
from pipelines.platform import load_profile, profile_names

FOLDER = Path(__file__).parents[1] / "golden" / "ir"


def reviewable(pipeline: CompiledPipeline) -> dict[str, Any]:
    """Both documents, without what a release of kfp writes of itself and the programs of the components."""
    spec = copy.deepcopy(pipeline.spec)
    executors = spec["deploymentSpec"]["executors"]
    for executor in executors.values():
        *shell, program = executor["container"]["command"]
        executor["container"]["command"] = [
            *shell,
            "the function of component.py" if "components.launcher" in program else program,
        ]
    return {"spec": {**spec, "sdkVersion": "any"}, "platform": pipeline.platform}


def main() -> None:
    """Write all of them."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in FOLDER.glob("*.yaml"):
        path.unlink()
    for name in profile_names():
        (FOLDER / f"{name}.yaml").write_text(
            yaml.safe_dump(reviewable(compile_for(load_profile(name), built_images())), width=120)
        )


if __name__ == "__main__":
    main()
