"""rfdetr-pipeline argo against a stub of the Kubernetes API: what is created, and what is said before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from components.stages import CONTAINERS
from pipelines.argo import EXECUTOR, account
from pipelines.cli import app
from rfdetr_core.errors import ExitError, TransientError, UserError
from rfdetr_core.storage import location
from tests.kubernetes_stub import KubernetesStub, kubernetes_stub
from tests.s3_server import *  # noqa: F403

ACCOUNTS = (EXECUTOR, *map(account, CONTAINERS.values()))
