"""Imports point one way, boto3 stays in storage, and slim programs load neither torch nor kfp (DESIGN section 2)."""

from __future__ import annotations

import ast
import functools
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from components.stages import CONTAINERS

ROOT = Path(__file__).parent.parent
STAGES = tuple(CONTAINERS)

# What each package may import of ours; the first matching prefix of a module decides.
MAY_IMPORT = {
    "rfdetr_core.api": ("rfdetr_core",),
    "rfdetr_core.models": ("rfdetr_core.models", "rfdetr_core.config", "rfdetr_core.errors", "rfdetr_core.storage"),
    "rfdetr_core.data": (
        "rfdetr_core.data",
        "rfdetr_core.config",
        "rfdetr_core.storage",
        "rfdetr_core.errors",
        "rfdetr_core.html",
        "rfdetr_core.hardware",
    ),
    "rfdetr_core.evaluation": (
        "rfdetr_core.evaluation",
        "rfdetr_core.data",
        "rfdetr_core.models",
        "rfdetr_core.config",
        "rfdetr_core.errors",
        "rfdetr_core.hardware",
        "rfdetr_core.html",
    ),
    "rfdetr_core.config": ("rfdetr_core.config", "rfdetr_core.errors", "rfdetr_core.storage"),
    "rfdetr_core.storage": ("rfdetr_core.storage", "rfdetr_core.errors"),
    "rfdetr_core": ("rfdetr_core",),
    "components": ("components", "rfdetr_core"),
    "pipelines": ("pipelines", "components", "rfdetr_core"),
}


def modules() -> list[tuple[str, Path]]:
    """(dotted name, path) of every module of ours."""
    found = []
    for package in ("rfdetr_core", "components", "pipelines"):
        for path in sorted((ROOT / package).rglob("*.py")):
            found.append((".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path))
    return found


@functools.cache
def imports(path: Path) -> set[str]:
    """Dotted names that a module imports anywhere, in functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize(("name", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_point_one_way(name: str, path: Path) -> None:
    allowed = next(allowed for prefix, allowed in MAY_IMPORT.items() if f"{name}.".startswith(f"{prefix}."))
    own = {i for i in imports(path) if i.split(".")[0] in ("rfdetr_core", "components", "pipelines", "tests")}
    wrong = {i for i in own if not any(f"{i}.".startswith(f"{a}.") for a in allowed)} - {"rfdetr_core"}
    assert not wrong, f"{name} may import {allowed}, not {wrong}"


@pytest.mark.parametrize(("name", "path"), modules(), ids=[name for name, _ in modules()])
def test_boto3_is_imported_in_storage_only(name: str, path: Path) -> None:
    aws = {i for i in imports(path) if i.split(".")[0] in ("boto3", "botocore", "s3transfer")}
    assert not aws or name.startswith("rfdetr_core.storage")


def test_kfp_is_imported_by_pipelines_and_component_faces_only() -> None:
    users = {name for name, path in modules() if any(i.split(".")[0] == "kfp" for i in imports(path))}
    assert users == {
        "pipelines.retrain",
        "pipelines.worker",
        "pipelines.compiled",
        "pipelines.platform",
        "pipelines.kfp_api",
    } | {f"components.{stage}.component" for stage in STAGES}


def loaded_by(code: str) -> set[str]:
    """Top-level packages in sys.modules after running `code` in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return {name.split(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize("module", ["rfdetr_core", *(f"components.{stage}.stage" for stage in STAGES)])
def test_importing_loads_neither_torch_nor_kfp(module: str) -> None:
    assert not loaded_by(f"import {module}") & {"torch", "torchvision", "kfp", "boto3", "onnxruntime", "hotcoco"}


def test_the_slim_stages_never_load_torch_or_kfp() -> None:
    """All that validate_dataset, promote and notify may import, also inside functions."""
    beginnings = tuple(f"components.{facts.name}.s" for facts in CONTAINERS.values() if not facts.torch)
    assert len(beginnings) == 3
    slim = {name for name, _ in modules() if name.startswith(beginnings)}
    paths, heavy = dict(modules()), {"torch", "torchvision", "kfp", "lightning_fabric", "onnxruntime"}
    seen: set[str] = set()
    while slim:
        name = slim.pop()
        seen.add(name)
        found = imports(paths[name])
        assert not {i.split(".")[0] for i in found} & heavy, name
        slim |= {i for i in found if i in paths} - seen


@pytest.mark.parametrize(
    "arguments", [["-c", "import rfdetr_core"], ["-m", "components.validate_dataset.stage", "--help"]]
)
def test_returns_in_under_a_second(arguments: list[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)  # of the processor: whatever else the machine does
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
