"""The DAG as KFP IR YAML: the same bytes every time, named by its content."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.platform import Profile


@dataclass(frozen=True)
class CompiledPipeline:
    """One compilation of the DAG for one profile."""

    profile: Profile
    spec: dict[str, Any]
    """Pipeline spec: the first document."""
    platform: dict[str, Any]
    """Platform spec: the second one, which Kubernetes is set up by."""

    @property
    def text(self) -> str:
        """Both documents."""
        head = f"# RF-DETR retraining for the profile {self.profile.name}, by rfdetr-pipeline compile.\n"
        return head + yaml.safe_dump_all([self.spec, self.platform], sort_keys=True, allow_unicode=True, width=120)

    @property
    def digest(self) -> str:
        """SHA-256 over its content, whichever release of kfp wrote it: equal pipelines have one version."""
        said = {name: value for name, value in self.spec.items() if name != "sdkVersion"}
        return hashlib.sha256(yaml.safe_dump_all([said, self.platform], sort_keys=True).encode()).hexdigest()

    @property
    def inputs(self) -> dict[str, dict[str, Any]]:
        """The pipeline's inputs by name, with their types, defaults and descriptions."""
        found: dict[str, dict[str, Any]] = self.spec["root"]["inputDefinitions"]["parameters"]
        return found


def compile_for(profile: Profile, images: Mapping[str, str], *, choices: bool = False) -> CompiledPipeline:
    """Compile.

    Args:
        images: stage → image.
        choices: offer what gpu_type and gpu_count may be as choices. Only an API server of KFP 2.16 or later knows
            them, an older one may refuse the file.
    """
    from kfp import compiler

    from pipelines.retrain import pipeline

    with tempfile.TemporaryDirectory(prefix="rfdetr-compile-") as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline(profile, images), str(path))
        spec, platform = yaml.safe_load_all(path.read_text())
    compiled = CompiledPipeline(profile, spec, platform)
    for name, default in (("root", profile.inputs.root), ("config", profile.inputs.config)):
        if default is not None:
            compiled.inputs[name] |= {"defaultValue": default, "isOptional": True}
    if choices and profile.gpu is not None:  # kfp's SDK cannot say it, the format can
        compiled.inputs["gpu_type"]["literals"] = list(profile.gpu.types)
        compiled.inputs["gpu_count"]["literals"] = [str(count) for count in profile.gpu.counts]
    return compiled
