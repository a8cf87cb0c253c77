"""The compiled pipeline of every profile: stable, loadable, as reviewed, and with all that its profile says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp import components
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

from components.images import built_images
from components.stages import CONTAINERS, DAG, NOTIFY, STAGES, StageFacts
from pipelines.compiled import CompiledPipeline, compile_for
from pipelines.platform import Profile, load_profile, profile_names, quantity_bytes
from pipelines.pods import trainjob_environment
from tests.pipelines import golden_ir

AROUND_A_TRAINJOB = ("validate_dataset", "train", "notify")
ALL = [(profile, stage) for profile in profile_names() for stage in CONTAINERS]


def compiled_by_command(path: Path, hash_seed: str) -> bytes:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "compile", "--output", str(path)],
        env={"PYTHONHASHSEED": hash_seed, "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return path.read_bytes()


@pytest.fixture(scope="module")
def pipelines() -> dict[str, CompiledPipeline]:
    return {name: compile_for(load_profile(name), built_images()) for name in profile_names()}


@pytest.fixture(scope="module")
def pipeline(pipelines: dict[str, CompiledPipeline]) -> CompiledPipeline:
    return pipelines["single-gpu"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> CompiledPipeline:
    """A profile that uses every field, as a site would write it."""
    path = tmp_path_factory.mktemp("profile") / "ours.yaml"
    path.write_text("""
extends: single-gpu
description: Ours
inputs: {root: s3://bucket/detector, config: s3://bucket/config.yaml}
s3: {endpoint_url: "https://minio.example:9000", region: eu-west-1, secret: s3, access_key_entry: user, ca_secret: ca}
gpu: {type: nvidia.com/mig-3g.20gb, types: [nvidia.com/gpu, nvidia.com/mig-3g.20gb]}
service_account: trainer
image_pull_secrets: [registry]
security: {run_as_user: 2000, run_as_group: 3000}
defaults: {labels: {team: vision}, annotations: {sidecar.istio.io/inject: "false"}, environment: {TZ: UTC}}
stages:
  train:
    node_selector: {nvidia.com/gpu.product: NVIDIA-A100-SXM4-40GB}
    affinity:
      - {weight: 5, match: [{key: zone, values: [a, b]}]}
      - {match: [{key: arch, operator: NotIn, values: [arm64]}, {key: gpu, operator: Exists}]}
    tolerations: [{key: spot, operator: Equal, value: "true", effect: NoExecute, seconds: 30}]
    secrets: [{secret: tracker, entries: {key: WANDB_API_KEY}, optional: true}]
  notify:
    secrets: [{secret: chat, entries: {url: HOOK}}]
""")
    return compile_for(load_profile(str(path)), built_images())


def dags(spec: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every group of tasks with the inputs that it has."""
    for component in (spec["root"], *spec["components"].values()):
        if "dag" in component:
            yield component["dag"]["tasks"], component.get("inputDefinitions", {}).get("parameters", {})


def tasks(spec: dict[str, Any]) -> dict[str, Any]:
    """All tasks by the name of their stage."""
    return {name.replace("-", "_"): task for found, _ in dags(spec) for name, task in found.items()}


def container(pipeline: CompiledPipeline, stage: str) -> Any:
    return pipeline.spec["deploymentSpec"]["executors"][f"exec-{CONTAINERS[stage].target}"]["container"]


def on_kubernetes(pipeline: CompiledPipeline, stage: str) -> Any:
    executors = pipeline.platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return executors[f"exec-{CONTAINERS[stage].target}"]


def test_compiling_twice_gives_the_same_bytes(pipeline: CompiledPipeline, tmp_path: Path) -> None:
    first = compiled_by_command(tmp_path / "first.yaml", hash_seed="0")
    assert first == compiled_by_command(tmp_path / "second.yaml", hash_seed="1")
    assert first == pipeline.text.encode()


@pytest.mark.parametrize("profile", profile_names())
def test_the_pipeline_is_the_one_that_was_reviewed(pipelines: dict[str, CompiledPipeline], profile: str) -> None:
    reviewed = yaml.safe_load((golden_ir.FOLDER / f"{profile}.yaml").read_text())
    found = golden_ir.reviewable(pipelines[profile])
    assert found == reviewed, "look at the difference, then: python -m tests.pipelines.golden_ir"


def test_every_profile_was_reviewed_and_no_other() -> None:
    assert sorted(path.stem for path in golden_ir.FOLDER.iterdir()) == profile_names()
    assert profile_names() == sorted(set(profile_names()) | {"cpu", "single-gpu", "multi-gpu", "spot-gpu"})


@pytest.mark.parametrize("profile", profile_names())
def test_the_format_knows_every_field(pipelines: dict[str, CompiledPipeline], profile: str, tmp_path: Path) -> None:
    json_format.ParseDict(pipelines[profile].spec, pipeline_spec_pb2.PipelineSpec())
    for executor in pipelines[profile].platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        json_format.ParseDict(executor, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
    (tmp_path / "p.yaml").write_text(pipelines[profile].text)
    loaded = components.load_component_from_file(str(tmp_path / "p.yaml"))
    assert loaded.name == "rfdetr-retrain"
    gpus = {"gpu_type", "gpu_count"} if load_profile(profile).gpu else set()
    assert set(loaded.component_spec.inputs) == {"root", "config", "overrides", "run_id"} | gpus


@pytest.mark.parametrize("profile", profile_names())
def test_whatever_a_task_reads_is_an_input_of_the_group_around_it(
    pipelines: dict[str, CompiledPipeline], profile: str
) -> None:
    """kfp leaves out channels that it finds in resources only; the API server would fail such a run at its start."""
    for found, inputs in dags(pipelines[profile].spec):
        for name, task in found.items():
            for said in task.get("inputs", {}).get("parameters", {}).values():
                assert said.get("componentInputParameter", next(iter(inputs))) in inputs, name


def test_every_stage_is_a_task_in_its_own_image_after_the_one_before(pipeline: CompiledPipeline) -> None:
    found = tasks(pipeline.spec)
    assert set(found) == {*STAGES, "notify", "exit_handler_1"}
    for position, facts in enumerate(DAG):
        before = [DAG[position - 1].target] if position else None
        assert found[facts.name].get("dependentTasks") == before
        assert container(pipeline, facts.name)["image"] == built_images()[facts.name]
        assert found[facts.name]["taskInfo"]["name"] == facts.title


def test_notify_runs_however_the_others_ended_and_hears_how(pipeline: CompiledPipeline) -> None:
    task = tasks(pipeline.spec)["notify"]
    assert task["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}
    assert task["inputs"]["parameters"]["status"] == {"taskFinalStatus": {"producerTask": "exit-handler-1"}}
    assert task["taskInfo"]["name"] == NOTIFY.title


def test_caching_is_off_and_nothing_is_installed_at_run_time(pipeline: CompiledPipeline) -> None:
    for name, task in tasks(pipeline.spec).items():
        assert name == "exit_handler_1" or not task["cachingOptions"].get("enableCache")
    assert "pip install" not in pipeline.text


def test_no_task_feeds_another_through_kfp(pipeline: CompiledPipeline) -> None:
    assert "taskOutputParameter" not in pipeline.text and "taskOutputArtifact" not in pipeline.text


def test_every_input_is_described_and_only_two_have_to_be_given(pipeline: CompiledPipeline) -> None:
    for name, parameter in pipeline.inputs.items():
        assert parameter.get("description"), name
        assert parameter.get("isOptional", False) == (name not in ("root", "config"))


@pytest.mark.parametrize(("profile", "stage"), ALL)
def test_every_task_carries_what_its_profile_says(
    pipelines: dict[str, CompiledPipeline], profile: str, stage: str
) -> None:
    pipeline, wanted = pipelines[profile], load_profile(profile).task(stage)
    resources, settings = container(pipeline, stage)["resources"], on_kubernetes(pipeline, stage)
    for kind in ("Request", "Limit"):
        assert resources[f"resourceCpu{kind}"] == wanted.cpu
        assert resources[f"resourceMemory{kind}"] == wanted.memory
    assert ("accelerator" in resources) == bool(wanted.gpus)
    mounts = {mount["mountPath"]: mount for mount in settings["emptyDirMounts"]}
    assert mounts["/dev/shm"] == {
        "mountPath": "/dev/shm",
        "medium": "Memory",
        "sizeLimit": wanted.shm,
        "volumeName": "shm",
    }
    assert mounts["/work"]["sizeLimit"] == wanted.scratch and "medium" not in mounts["/work"]
    assert settings["securityContext"] == {"runAsUser": "10001", "runAsGroup": "10001", "runAsNonRoot": True}
    assert settings["activeDeadlineSeconds"] == str(wanted.timeout_seconds)
    assert settings["podMetadata"]["labels"]["app.kubernetes.io/component"] == CONTAINERS[stage].target
    assert tasks(pipeline.spec)[stage]["retryPolicy"] == {
        "maxRetryCount": wanted.retry.limit,
        "backoffDuration": f"{wanted.retry.wait_seconds}s",
        "backoffFactor": wanted.retry.factor,
        "backoffMaxDuration": f"{wanted.retry.longest_wait_seconds}s",
    }
    assert [t["key"] for t in settings.get("tolerations", [])] == [t.key for t in wanted.tolerations]
    environment = {e["name"]: e["value"] for e in container(pipeline, stage)["env"]}
    assert environment.pop("RFDETR_IMAGE") == built_images()[stage]
    nodes = trainjob_environment(load_profile(profile), CONTAINERS[stage], built_images()[stage])
    assert environment == nodes and bool(nodes) == (profile == "multi-node" and stage in AROUND_A_TRAINJOB)


def gpu_stages(profile: Profile) -> list[StageFacts]:
    return [facts for facts in CONTAINERS.values() if profile.stage(facts.name).gpus]


@pytest.mark.parametrize("name", ["single-gpu", "multi-gpu", "spot-gpu"])
def test_gpu_type_and_count_are_inputs(pipelines: dict[str, CompiledPipeline], name: str) -> None:
    pipeline, profile = pipelines[name], load_profile(name)
    assert [facts.name for facts in gpu_stages(profile)] == ["probe_batch_size", "train", "evaluate"]
    for facts in gpu_stages(profile):
        accelerator = container(pipeline, facts.name)["resources"]["accelerator"]
        assert accelerator["resourceType"] == "{{$.inputs.parameters['pipelinechannel--gpu_type']}}"
        assert accelerator["resourceCount"] == (
            "{{$.inputs.parameters['pipelinechannel--gpu_count']}}" if facts.name == "train" else "1"
        )
        assert "pipelinechannel--gpu_type" in tasks(pipeline.spec)[facts.name]["inputs"]["parameters"]
    assert pipeline.inputs["gpu_type"]["defaultValue"] == "nvidia.com/gpu"
    # The driver reads resources from text only.
    assert pipeline.inputs["gpu_count"]["parameterType"] == "STRING"
    assert pipeline.inputs["gpu_count"]["defaultValue"] == str(profile.stage("train").gpus)
    # What is paid for is used: the first stage makes train.devices of it.
    said = tasks(pipeline.spec)["validate_dataset"]["inputs"]["parameters"]["gpu_count"]
    assert said == {"componentInputParameter": "pipelinechannel--gpu_count"}


def test_a_profile_without_gpus_has_no_inputs_for_them(pipelines: dict[str, CompiledPipeline]) -> None:
    assert "gpu" not in " ".join(pipelines["cpu"].inputs) and "accelerator" not in pipelines["cpu"].text


def test_choices_are_offered_where_the_api_server_knows_them(pipeline: CompiledPipeline) -> None:
    assert "literals" not in pipeline.text
    offered = compile_for(load_profile("multi-gpu"), built_images(), choices=True)
    assert offered.inputs["gpu_count"]["literals"] == ["2", "4", "8"]
    assert offered.inputs["gpu_type"]["literals"] == ["nvidia.com/gpu"]
    parsed = json_format.ParseDict(offered.spec, pipeline_spec_pb2.PipelineSpec())
    literals = parsed.root.input_definitions.parameters["gpu_count"].literals
    assert [literal.string_value for literal in literals] == ["2", "4", "8"]


def test_a_site_says_everything_in_a_profile_of_its_own(site: CompiledPipeline) -> None:
    train, notify = on_kubernetes(site, "train"), on_kubernetes(site, "notify")
    assert site.inputs["root"]["defaultValue"] == "s3://bucket/detector" and site.inputs["root"]["isOptional"]
    assert site.inputs["config"]["defaultValue"] == "s3://bucket/config.yaml"
    assert site.inputs["gpu_type"]["defaultValue"] == "nvidia.com/mig-3g.20gb"
    assert train["nodeSelector"] == {"labels": {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-40GB"}}
    assert train["tolerations"] == [
        {"key": "spot", "operator": "Equal", "value": "true", "effect": "NoExecute", "tolerationSeconds": "30"}
    ]
    preferred, required = train["nodeAffinity"]
    assert preferred == {"weight": 5, "matchExpressions": [{"key": "zone", "operator": "In", "values": ["a", "b"]}]}
    assert [row["operator"] for row in required["matchExpressions"]] == ["NotIn", "Exists"] and "weight" not in required
    assert train["podMetadata"]["labels"]["team"] == "vision"
    assert train["podMetadata"]["annotations"] == {"sidecar.istio.io/inject": "false"}
    assert train["securityContext"] == {"runAsUser": "2000", "runAsGroup": "3000", "runAsNonRoot": True}
    assert [secret["secretName"] for secret in train["imagePullSecret"]] == ["registry"]
    assert [(secret["secretName"], secret["mountPath"]) for secret in train["secretAsVolume"]] == [
        ("ca", "/etc/rfdetr/ca")
    ]
    store, tracker = train["secretAsEnv"]
    assert (store["secretName"], store["optional"]) == ("s3", False)
    assert {row["secretKey"]: row["envVar"] for row in store["keyToEnv"]} == {
        "user": "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY": "AWS_SECRET_ACCESS_KEY",
    }
    assert (tracker["secretName"], tracker["optional"]) == ("tracker", True)
    assert [secret["secretName"] for secret in notify["secretAsEnv"]] == ["s3", "chat"]
    environment = {e["name"]: e["value"] for e in container(site, "promote")["env"]}
    assert environment == {
        "RFDETR_IMAGE": built_images()["promote"],
        "AWS_ENDPOINT_URL": "https://minio.example:9000",
        "AWS_REGION": "eu-west-1",
        "AWS_CA_BUNDLE": "/etc/rfdetr/ca/ca.crt",
        "TZ": "UTC",
    }


def test_the_digest_is_of_the_content(pipelines: dict[str, CompiledPipeline]) -> None:
    digests = {pipeline.digest for pipeline in pipelines.values()}
    assert len(digests) == len(pipelines)
    again = compile_for(load_profile("cpu"), built_images())
    assert again.digest == pipelines["cpu"].digest
    other = CompiledPipeline(again.profile, {**again.spec, "sdkVersion": "kfp-9"}, again.platform)
    assert other.digest == again.digest
    images = {**built_images(), "promote": f"registry/promote@sha256:{'ab' * 32}"}
    assert compile_for(load_profile("cpu"), images).digest != again.digest


def test_sizes_of_memory() -> None:
    assert [quantity_bytes(text) for text in ("512Mi", "16Gi", "5G")] == [512 << 20, 16 << 30, 5 * 10**9]


def test_as_resources_for_git(pipeline: CompiledPipeline) -> None:
    """Of KFP's Kubernetes mode: both documents of the IR, which its API server reads out of them again."""
    found, version = yaml.safe_load_all(pipeline.resources("kubeflow"))
    assert (found["kind"], version["kind"]) == ("Pipeline", "PipelineVersion")
    assert version["spec"]["pipelineName"] == found["metadata"]["name"] == "rfdetr-retrain"
    assert version["metadata"]["name"] == f"rfdetr-retrain-{pipeline.profile.name}-{pipeline.digest[:12]}"
    assert (version["spec"]["pipelineSpec"], version["spec"]["platformSpec"]) == (pipeline.spec, pipeline.platform)
    assert {found["metadata"]["namespace"], version["metadata"]["namespace"]} == {"kubeflow"}
