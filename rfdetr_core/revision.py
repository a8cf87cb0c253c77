"""Which code this is, and which packages it computes with. The standard library alone: `make images` has no more."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import subprocess
from pathlib import Path

REVISION_FILE = "REVISION"
"""Written beside this package when an image is built, where there is no checkout to ask."""


PACKAGES = ("torch", "torchvision", "lightning-fabric", "numpy", "pillow", "hotcoco", "onnx", "onnxruntime", "boto3")
"""Whose versions may change a number."""


@functools.cache
def installed_versions() -> dict[str, str]:
    """Versions of the packages that compute, of those that are installed here; none is imported."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def code_revision() -> str | None:
    """The commit this program is of, with -dirty where files differ from it; None where nothing tells."""
    package = Path(__file__).parent
    written = package / REVISION_FILE
    if written.is_file():
        return written.read_text().strip() or None
    if not (package.parent / ".git").exists():  # another project's checkout around an installed package says nothing
        return None
    command = ["git", "-C", os.fspath(package.parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
