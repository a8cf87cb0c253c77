"""Programs run as a user runs them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def output_of(
    command: Sequence[str], *, folder: Path | None = None, environment: Mapping[str, str] | None = None, timeout: float
) -> tuple[int, str]:
    """Exit code and all output, standard error included."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    return done.returncode, done.stdout


def without_settings() -> dict[str, str]:
    """The environment, without what would point our programs to a store."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RFDETR_"))}
