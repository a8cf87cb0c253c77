"""From a checkpoint of ours to a detector that is ready to use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rfdetr_core.config import ModelConfig
from rfdetr_core.errors import CheckpointError, ConfigError
from rfdetr_core.models.detector import RFDETR


@dataclass(frozen=True)
class TrainedModel:
    """A detector in eval mode, and what its file says about it."""

    module: RFDETR
    config: ModelConfig
    class_names: tuple[str, ...]
    source: str  # "ema" or "regular"
    epoch: int
    sha256: str  # of the file


def build_trained(content: dict[str, Any], path: Path, *, sha256: str) -> TrainedModel:
    """Build the detector of a file of weights; `content` is what the file holds, `path` serves messages.

    Raises:
        CheckpointError: its weights do not fit the architecture that it names.
    """
    try:
        config = ModelConfig.parse(content["model_config"])
        module = RFDETR(config)
        module.load_state_dict(content["model"])
        names = tuple(str(row["name"]) for row in content["classes"])
        trained = TrainedModel(module.eval(), config, names, str(content["source"]), int(content["epoch"]), sha256)
    except KeyError as error:
        raise CheckpointError(f"{path}: not the weights of a detector: no {error}", hint="train again") from error
    except (RuntimeError, TypeError, ValueError, ConfigError) as error:
        reason = " ".join(str(error).split())[:200]  # torch lists every key that does not fit
        raise CheckpointError(f"{path}: not the weights of a detector: {reason}", hint="train again") from error
    return trained
