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
from pipelines.yaml_files import dump_documents


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
        return head + dump_documents(self.spec, self.platform)

    def resources(self, namespace: str) -> str:
        """As resources of KFP's Kubernetes-native mode, for those who keep pipelines in git: a Pipeline and a version.

        The version's name is of its content, as `submit` names it.
        """
        name = str(self.spec["pipelineInfo"]["name"])
        labels = {"app.kubernetes.io/name": "rfdetr-pipeline"}
        group = {"apiVersion": "pipelines.kubeflow.org/v2beta1"}
        pipeline = {
            **group,
            "kind": "Pipeline",
            "metadata": {"name": name, "namespace": namespace, "labels": labels},
            "spec": {"displayName": self.spec["pipelineInfo"]["displayName"]},
        }
        version = {
            **group,
            "kind": "PipelineVersion",
            "metadata": {"name": f"{name}-{self.version}", "namespace": namespace, "labels": labels},
            "spec": {
                "pipelineName": name,
                "displayName": self.version,
                "pipelineSpec": self.spec,
                "platformSpec": self.platform,
            },
        }
        head = f"# RF-DETR retraining for the profile {self.profile.name}, by rfdetr-pipeline compile --resources.\n"
        return head + dump_documents(pipeline, version)

    @property
    def version(self) -> str:
        """Name of a version of the pipeline: equal content, equal name."""
        return f"{self.profile.name}-{self.digest[:12]}"

    @property
    def digest(self) -> str:
        """SHA-256 over its content, whichever release of kfp wrote it: equal pipelines have one version."""
        said = {name: value for name, value in self.spec.items() if name != "sdkVersion"}
        return hashlib.sha256(dump_documents(said, self.platform).encode()).hexdigest()

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
