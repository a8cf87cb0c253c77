"""Which commit a program is of: from the checkout, from the file in an image, or unknown."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rfdetr_core import revision

PACKAGE = Path(revision.__file__).parent


def told(folder: Path) -> str:
    """What a copy of the module says of itself there, on a bare interpreter."""
    (folder / "rfdetr_core").mkdir(parents=True, exist_ok=True)
    (folder / "rfdetr_core" / "__init__.py").touch()
    shutil.copy(PACKAGE / "revision.py", folder / "rfdetr_core")
    program = "from rfdetr_core.revision import *; print(code_revision())"
    command = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(folder)!r}); {program}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_of_a_checkout(tmp_path: Path) -> None:
    assert told(tmp_path / "around") == "None"
    git(tmp_path, "init")
    assert told(tmp_path / "around") == "None"  # a checkout around an installed package is another project's
    told(tmp_path)
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    assert re.fullmatch("[0-9a-f]{40}", told(tmp_path))
    (tmp_path / "rfdetr_core" / "__init__.py").write_text("changed = True")
    assert re.fullmatch("[0-9a-f]{40}-dirty", told(tmp_path))


def test_of_an_image(tmp_path: Path) -> None:
    told(tmp_path)
    (tmp_path / "rfdetr_core" / revision.REVISION_FILE).write_text("abc-dirty")
    assert told(tmp_path) == "abc-dirty"
    (tmp_path / "rfdetr_core" / revision.REVISION_FILE).write_text("")
    assert told(tmp_path) == "None"


def test_versions_of_what_computes() -> None:
    found = revision.installed_versions()
    assert {"torch", "numpy", "onnxruntime"} <= set(found) <= set(revision.PACKAGES)
