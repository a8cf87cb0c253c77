"""Bad input of make images, make push and compile --pinned: one clear line each, with stand-ins for the tools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import docker
import pytest
import yaml

from components.images import image
from components.stages import CONTAINERS
from pipelines.containers.tool import parse_size
from tests.processes import output_of
from tests.test_architecture import ROOT

# A container tool that does what the environment says: TROUBLE of a command is printed and ends it.
STAND_IN = f"""#!{sys.executable}
import json, os, sys
words = sys.argv[1:]
with open(os.environ["SAID"], "a") as file:
    file.write(" ".join([os.path.basename(sys.argv[0]), *words]) + "\\n")
trouble = json.loads(os.environ.get("TROUBLE", "{{}}"))
if trouble.get(words[0]):
    sys.exit(trouble[words[0]])
if words[:2] == ["image", "inspect"]:
    if words[2] in trouble.get("absent", []):
        sys.exit("Error: no such image " + words[2])
    stage = words[2].split("/")[-1].split(":")[0]
    size = json.loads(os.environ.get("SIZES", "{{}}")).get(stage, 1000)
    digest = "sha256:" + "ab" * 32
    layers = ["base"] if stage == "base" else ["base", "torch"] if stage == "torch" else ["base", "torch", stage]
    print(json.dumps([{{"Id": digest, "Size": size, "RootFS": {{"Layers": layers}}}}]))
if words[0] == "run":
    print(json.dumps({{"python": [], "debian": [], "interpreter": "3.11"}}))
if words[0] == "push":
    with open(words[words.index("--digestfile") + 1], "w") as file:
        file.write("sha256:" + "cd" * 32)
"""

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """`command("build", tools=("podman",), trouble={...})`: exit code and what it printed."""

    def run(*arguments: str, tools: tuple[str, ...] = ("podman",), **environment: object) -> tuple[int, str]:
        programs = tmp_path / "bin"
        programs.mkdir(exist_ok=True)
        for name in tools:
            (programs / name).write_text(STAND_IN)
            (programs / name).chmod(0o755)
        out = ("--out", str(tmp_path / "out")) if arguments[0] == "build" else ()
        return output_of(
            [sys.executable, "-m", "pipelines.containers", *arguments, *out],
            folder=ROOT,
            environment={
                "PATH": str(programs),
                "SAID": str(tmp_path / "said"),
                **{k: v if isinstance(v, str) else json.dumps(v) for k, v in environment.items()},
            },
            timeout=60,
        )

    return run


def said(tmp_path: Path) -> list[str]:
    return (tmp_path / "said").read_text().splitlines()


def test_no_tool_is_installed(command: Command) -> None:
    code, output = command("build", tools=())
    assert code == 2
    assert output == (
        "error: no container tool: docker is not installed; podman is not installed; buildah is not installed"
        " (install one of docker, podman, buildah)\n"
    )


def test_a_tool_that_does_not_work_says_why(command: Command) -> None:
    trouble = {"info": "Cannot connect to the Docker daemon at unix:///var/run/docker.sock."}
    code, output = command("build", tools=("docker",), TROUBLE=trouble)
    assert code == 2
    assert "docker does not work: Cannot connect to the Docker daemon" in output and output.count("\n") == 1


def test_another_tool_than_the_three(command: Command) -> None:
    code, output = command("build", CONTAINER_TOOL="nerdctl")
    assert code == 2
    assert output == "error: CONTAINER_TOOL: 'nerdctl' cannot be used here (one of docker, podman, buildah)\n"


def test_a_base_image_that_is_not_there(command: Command) -> None:
    code, output = command("build", "--base", "localhost/mine:1", TROUBLE={"absent": ["localhost/mine:1"]})
    assert code == 2
    assert output == (
        "error: no base image localhost/mine:1: it is not on this machine (name another with BASE_IMAGE=..., or make"
        " one from Debian's packages: images/bootstrap-base.sh)\n"
    )


def test_a_base_image_that_cannot_be_pulled(command: Command) -> None:
    trouble = {"absent": ["example.com/base:1"], "pull": "Error: dial tcp: lookup example.com: no such host"}
    code, output = command("build", "--base", "example.com/base:1", TROUBLE=trouble)
    assert code == 2
    assert output.startswith("error: no base image example.com/base:1: its registry could not be reached: Error: dial")
    assert "images/bootstrap-base.sh" in output and output.count("\n") == 1


def test_a_full_disk_while_building(command: Command) -> None:
    trouble = {"build": "writing blob: copying layer: write /var/x: no space left on device"}
    code, output = command("build", TROUBLE=trouble)
    assert code == 2
    assert output.startswith("error: the disk is full: validate-dataset could not be built (all images take")
    assert output.count("\n") == 1 and "validate-dataset.log" in output


def test_a_step_that_fails_names_target_reason_and_log(command: Command) -> None:
    trouble = {"build": "STEP 6\nERROR: No matching distribution found for torch\nlast words"}
    code, output = command("build", "--stage", "train", TROUBLE=trouble)
    assert code == 2
    assert output.startswith("error: torch could not be built: podman: ERROR: No matching distribution")
    assert output.count("\n") == 1 and "torch.log" in output


def test_sizes_are_printed_and_held(command: Command, tmp_path: Path) -> None:
    sizes = {"base": 100_000_000, "torch": 6_000_000_000, "train": 6_300_000_000, "promote": 449_000_000}
    arguments = ("build", "--base", "localhost/base:1", "--stage", "train", "--stage", "promote")
    code, output = command(*arguments, SIZES=sizes)
    assert code == 0, output
    assert "localhost/rfdetr-pipeline/train:0.1.0: " in output and "300 MB over torch (300 at most)" in output
    assert "349 MB over the base (350 at most)" in output
    code, output = command(*arguments, SIZES={**sizes, "train": 6_301_000_000})
    assert code == 2
    assert output.splitlines()[-1].startswith("error: images over their size: train is 301 MB, 300 at most (")
    built = [line for line in said(tmp_path) if " build " in line]
    assert all("--build-arg BASE_IMAGE=localhost/base:1" in line for line in built)
    targets = [line.split("--target ")[1].split()[0] for line in built]
    assert targets[:3] == ["torch", "train", "promote"]


def test_a_registry_that_refuses(command: Command) -> None:
    trouble = {"push": "Error: writing manifest: unauthorized: authentication required"}
    code, output = command("push", "registry.example.com/team", TROUBLE=trouble)
    assert code == 2
    assert output == (
        "error: registry.example.com/team refused: Error: writing manifest: unauthorized: authentication required"
        " (log in with the container tool, and check the name)\n"
    )
    assert not (ROOT / "images" / "digests.json").exists()


def test_a_registry_that_does_not_answer_is_worth_another_try(command: Command) -> None:
    code, output = command("push", "registry.example.com", TROUBLE={"push": "Error: dial tcp: i/o timeout"})
    assert code == 75
    assert output.startswith("error: registry.example.com could not be reached: Error: dial tcp: i/o timeout (")


def test_pushing_images_that_were_not_built(command: Command) -> None:
    code, output = command(
        "push", "registry.example.com", TROUBLE={"absent": ["localhost/rfdetr-pipeline/train:0.1.0"]}
    )
    assert code == 2
    assert output == "error: no image of train on this machine (make images builds them)\n"


def test_pushing_nowhere(command: Command) -> None:
    code, output = command("push", "")
    assert code == 2
    assert output == "error: no registry to push to (make push REGISTRY=registry.example.com/team)\n"


def compiled(output: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "compile", "--output", str(output), *arguments],
        env={k: v for k, v in os.environ.items() if not k.startswith("RFDETR_")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_pinned_pipeline_names_every_image_by_its_digest(command: Command, tmp_path: Path) -> None:
    digests = tmp_path / "digests.json"
    code, output = command("push", "registry.example.com/team", "--digests", str(digests))
    assert code == 0, output
    code, output = compiled(tmp_path / "pinned.yaml", "--pinned", "--digests", str(digests))
    assert code == 0, output
    executors = next(yaml.safe_load_all((tmp_path / "pinned.yaml").read_text()))["deploymentSpec"]["executors"]
    assert {executor["container"]["image"] for executor in executors.values()} == {
        f"registry.example.com/team/rfdetr-pipeline/{stage.replace('_', '-')}@sha256:{'cd' * 32}"
        for stage in CONTAINERS
    }


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        ("{", "cannot be read: Expecting property name"),
        ('{"train": "registry/train:latest"}', "has no digest of validate_dataset, probe_batch_size, train, evaluate"),
    ],
)
def test_a_pinned_pipeline_without_digests(content: str | None, reason: str, tmp_path: Path) -> None:
    digests = tmp_path / "digests.json"
    if content is not None:
        digests.write_text(content)
    code, output = compiled(tmp_path / "pinned.yaml", "--pinned", "--digests", str(digests))
    assert code == 2
    assert output.startswith(f"error: {digests}: {reason}") and "(make push REGISTRY=... writes it)" in output
    assert output.count("\n") == 1 and not (tmp_path / "pinned.yaml").exists()


def test_sizes_as_buildah_prints_them() -> None:
    assert [parse_size(text) for text in ("319 MB", "6.42 GB", "512 B")] == [319_000_000, 6_420_000_000, 512]


def run(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    (folder / "data").mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("name: shapes\ndataset: {uri: data}\nmodel: {variant: pico}\n")
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "run", "--config", "config.yaml", *arguments],
        cwd=folder,
        env={"PATH": str(folder / "bin"), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout


def test_running_in_containers_without_an_engine(tmp_path: Path) -> None:
    code, output = run(tmp_path, "--in-containers")
    assert code == 2
    assert output == (
        "error: no container tool: docker is not installed; podman is not installed (install one of docker, podman)\n"
    )


def test_running_in_containers_that_were_not_built(command: Command, tmp_path: Path) -> None:
    command("push", "", tools=("docker",))  # makes the stand-in
    trouble = {"absent": [f"rfdetr-pipeline/{stage.replace('_', '-')}:0.1.0" for stage in CONTAINERS]}
    code, output = run(tmp_path, "--in-containers", SAID=str(tmp_path / "said"), TROUBLE=json.dumps(trouble))
    assert code == 2
    assert (
        output
        == "error: no image rfdetr-pipeline/validate-dataset:0.1.0 on this machine (make images builds them all)\n"
    )


def test_containers_share_no_folder(tmp_path: Path) -> None:
    code, output = run(tmp_path, "--in-containers", "--root", "store")
    assert code == 2
    assert output == (
        "error: --root: store is a folder, which containers do not share (give an s3:// prefix, or no --root)\n"
    )


def test_a_dataset_to_mount_that_does_not_exist(tmp_path: Path) -> None:
    code, output = run(tmp_path, "--in-containers", "--set", "dataset.uri=nowhere")
    assert code == 2
    assert output == f"error: dataset.uri: {tmp_path / 'nowhere'}: no such file or folder (check the path)\n"


@pytest.mark.parametrize(("stage", "told"), [("notify", {"HOOK": "https://hooks.example/secret"}), ("train", {})])
def test_only_notify_is_told_the_webhooks_address(
    stage: str, told: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.containers.engine import Containers, stage_settings
    from pipelines.containers.runner import ContainerRunner

    monkeypatch.setenv("HOOK", "https://hooks.example/secret")
    settings = stage_settings(Containers(webhook="HOOK"), {stage: f"localhost/{image(stage)}"}, {}, "attempt")
    assert "hooks.example" not in json.dumps(settings)  # ps shows it
    started: list[dict[str, Any]] = []

    class Engine:
        info = staticmethod(dict)
        images = SimpleNamespace(get=lambda name: SimpleNamespace(id="sha256:ab"))
        containers = SimpleNamespace(create=lambda **options: started.append(options) or stop())

    def stop() -> None:
        raise docker.errors.DockerException("only looked at")

    runner = ContainerRunner(settings, tmp_path / "exits")
    assert runner(Engine(), image(stage), ["true"], {}) == 125
    assert {name: value for name, value in started[0]["environment"].items() if name == "HOOK"} == told


def test_limits_are_for_containers(tmp_path: Path) -> None:
    code, output = run(tmp_path, "--memory", "8g")
    assert code == 2
    assert output == "error: --cpus, --memory and --gpus are for containers (give --in-containers as well)\n"
