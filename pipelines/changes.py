"""Whether a run would make anything new: its dataset and config, beside those of the champion.

The dataset's digest is what the first stage says, by that very stage, run here in a run of its own that is removed
afterwards: no second way to compute it that could differ. What it publishes, the prepared dataset, is found there by
the run that follows.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rfdetr_core.config import load_run_config
from rfdetr_core.errors import ExitError, RFDETRError, TransientError, UserError
from rfdetr_core.publication import read_manifest
from rfdetr_core.registry import Registry
from rfdetr_core.storage import Location

_STDERR = 2  # the answer alone goes to standard output
NOT_OF_THE_MODEL = ("notify",)  # sections that change nothing of a result


@dataclass(frozen=True)
class Change:
    """What was found: `run_id` is made of dataset and config, so that equal ones have one run."""

    run_id: str
    needed: bool
    reason: str


def look_for_changes(root: Location, name: str, config: str, overrides: Mapping[str, Any]) -> Change:
    """Compare with the champion, and with a run of the same dataset and config that was decided already.

    Raises:
        ExitError: the first stage fails, with its own exit code; it has said why.
    """
    place = root / "runs" / f"check-{name[:40]}-{secrets.token_hex(4)}"
    try:
        _validate(place, config, overrides)
        digest = str((place / "dataset" / "dataset.json").read_json()["digest"])
        settings = _of_the_model(load_run_config((place / "config.yaml").uri).as_dict())
    finally:
        place.delete_tree()
    identity = hashlib.sha256(json.dumps([digest, settings], sort_keys=True).encode()).hexdigest()[:12]
    run_id = f"{name[:50]}-{identity}"
    registry = Registry(root, name)
    champion = registry.champion()
    if champion is not None:
        made = (registry.version(champion.version) / "provenance.json").read_json()
        same_data, same_config = made["dataset"]["digest"] == digest, _of_the_model(made["config"]) == settings
        if same_data and same_config:
            return Change(run_id, False, f"dataset and config are those of the champion {champion.version}")
        what = " and ".join([*(() if same_data else ("dataset",)), *(() if same_config else ("config",))])
        reason = f"{what} changed since the champion {champion.version}"
    else:
        reason = f"there is no champion of {name} yet"
    if read_manifest(root / "runs" / run_id / "promote") is not None:
        decision = (root / "runs" / run_id / "promote" / "decision.json").read_json()
        told = f"{decision['outcome']}: {decision['reason']}"
        return Change(run_id, False, f"the run {run_id} was made of the same dataset and config ({told})")
    return Change(run_id, True, reason)


def _validate(place: Location, config: str, overrides: Mapping[str, Any]) -> None:
    command = [sys.executable, "-m", "components.validate_dataset.stage", "--run-uri", place.uri, "--config", config]
    done = subprocess.run([*command, "--overrides", json.dumps(dict(overrides))], stdout=_STDERR, check=False)
    if done.returncode != 0:
        kinds: dict[int, type[ExitError]] = {UserError.exit_code: UserError, TransientError.exit_code: TransientError}
        kind = kinds.get(done.returncode, RFDETRError)
        raise kind("validate_dataset failed, so nothing was submitted", hint="its error stands above")


def _of_the_model(config: Mapping[str, Any]) -> dict[str, Any]:
    return {section: value for section, value in config.items() if section not in NOT_OF_THE_MODEL}
