"""What images are built from: pinned and hashed, the versions that are tested, and all that a stage imports."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.test_architecture import ROOT, STAGES, imports, modules

REQUIREMENTS = ROOT / "images" / "requirements"
FILES = sorted(REQUIREMENTS.glob("*.txt"))
IMAGES = {
    "validate_dataset": "base",
    "promote": "base",
    "notify": "base",
    "probe_batch_size": "torch",
    "evaluate": "torch",
    "train": "train",
    "export_onnx": "export-onnx",
}
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}  # imported under another name
FOR_TYPES_ONLY = {"mypy_boto3_s3"}


def pins(path: Path) -> dict[str, set[str]]:
    """Name -> versions; a package may have one for each version of Python."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([a-z0-9.-]+)==([^ \\;]+)", path.read_text(), re.MULTILINE):
        found.setdefault(name, set()).add(version)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_package_is_pinned_with_hashes_and_no_index_is_named(path: Path) -> None:
    blocks = re.split(r"\n(?=[a-z0-9])", path.read_text())
    for block in blocks:
        assert re.match(r"[a-z0-9.-]+==\S+", block), block[:80]
        assert "--hash=sha256:" in block, block[:80]
    assert "://" not in path.read_text() and "--index" not in path.read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_versions_are_those_the_tests_run_with(path: Path) -> None:
    tested = pins(ROOT / "requirements-dev.txt")
    assert {name: tested.get(name) for name in pins(path)} == pins(path)


@pytest.mark.parametrize("stage", STAGES)
def test_an_image_holds_whatever_its_stage_imports(stage: str) -> None:
    """Also inside functions; a module that is imported may want more than the stage uses."""
    paths = dict(modules())
    frontier = {name for name in paths if name.startswith(f"components.{stage}.") and not name.endswith("component")}
    seen, wanted = set(), set()
    while frontier:
        name = frontier.pop()
        seen.add(name)
        found = imports(paths[name])
        wanted |= {i.split(".")[0] for i in found}
        frontier |= {i for i in found if i in paths} - seen
    foreign = wanted - set(sys.stdlib_module_names) - {"rfdetr_core", "components"} - FOR_TYPES_ONLY
    names = {DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in foreign}
    assert "pydantic" in names
    assert names - set(pins(REQUIREMENTS / f"{IMAGES[stage]}.txt")) == set()


def test_slim_images_have_no_torch_and_the_containerfile_installs_every_file() -> None:
    assert "torch" in pins(REQUIREMENTS / "torch.txt")
    assert not {"torch", "scipy", "kfp"} & set(pins(REQUIREMENTS / "base.txt"))
    containerfile = (ROOT / "images" / "Containerfile").read_text()
    assert {f"-r /opt/requirements/{path.name}" in containerfile for path in FILES} == {True}
    for stage, file in IMAGES.items():
        wanted = file if file in ("base", "torch") else "torch"
        assert f"FROM {wanted} AS {stage.replace('_', '-')}\n" in containerfile


def test_the_image_that_submits_holds_whatever_submit_imports() -> None:
    """Of the modules that it loads: those of Argo and of local containers come only when their commands are used."""
    unused = ("pipelines.argo_submit", "pipelines.argo", "pipelines.containers", "pipelines.s3_server")
    wanted: set[str] = set()
    for name, path in modules():
        if name.startswith("pipelines") and not name.startswith(unused):
            wanted |= {i.split(".")[0] for i in imports(path)}
    foreign = wanted - set(sys.stdlib_module_names) - {"rfdetr_core", "components", "pipelines"}
    names = {DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in foreign}
    assert {"kfp", "kubernetes", "typer"} <= names
    assert names - set(pins(REQUIREMENTS / "submit.txt")) == set()
    containerfile = (ROOT / "images" / "Containerfile").read_text()
    assert "FROM base AS submit\nENV PYTHONPATH=/app\n" in containerfile  # else kfp without kfp.kubernetes
