"""RF-DETR from Python, without any pipeline.

    from rfdetr_core import RFDETRPico

    model = RFDETRPico()
    model.train(dataset_dir="data", output_dir="output", epochs=20)
    model.predict("photo.jpg", threshold=0.5)
    model.export()

The classes are imported from `rfdetr_core`; their parameters are those of the configuration (ModelConfig for the
constructor, TrainConfig for `train`, ExportConfig for `export`), with the same rules and messages.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from PIL import Image

from rfdetr_core.config import ExportConfig, ModelConfig, ModelSection, TrainConfig, refuse_unbuilt
from rfdetr_core.config.train import MOVED_TO_MODEL
from rfdetr_core.data.sample import draw_image
from rfdetr_core.errors import CheckpointError, ConfigError
from rfdetr_core.export.onnx import export_onnx
from rfdetr_core.export.parity import check_parity
from rfdetr_core.models.weights import TrainedModel
from rfdetr_core.prediction import Picture, Prediction, predict_pictures
from rfdetr_core.training import checkpoint
from rfdetr_core.training.engine import fabric_accelerator
from rfdetr_core.training.folder import job_in_folder
from rfdetr_core.training.loop import TrainingResult
from rfdetr_core.training.loop import train as train_detector


class Detector:
    """A detector of one variant: train it, or load it with `from_checkpoint`; then predict and export."""

    variant: ClassVar[str]

    def __init__(self, **architecture: Any) -> None:
        """Choose the architecture: keyword arguments are the fields of ModelConfig.

        `num_classes` is the dataset's unless given. Weights are drawn when training begins.

        Raises:
            ConfigError: an unknown field, a value that is not legal, or what is not built yet.
        """
        if "variant" in architecture:
            raise ConfigError(f"{type(self).__name__} is the variant {self.variant}", hint="choose another class")
        self._given = architecture
        self.config = self._architecture(architecture)
        self._trained: TrainedModel | None = None

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str]) -> Self:
        """The detector of a checkpoint_best_*.pth file.

        Raises:
            CheckpointError: the file cannot be read, is a checkpoint for resuming, or of another variant.
        """
        trained = checkpoint.load_trained(Path(path))
        if trained.config.variant != cls.variant:
            names = [kind.__name__ for kind in VARIANTS if kind.variant == trained.config.variant]
            raise CheckpointError(
                f"{path}: is of the variant {trained.config.variant}",
                hint=f"use {names[0]}" if names else "no class stands for it",
            )
        model = cls()
        model._use(trained)
        return model

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by label; empty before training."""
        return self._trained.class_names if self._trained is not None else ()

    def train(
        self, *, dataset_dir: str | os.PathLike[str], output_dir: str | os.PathLike[str] = "output", **settings: Any
    ) -> TrainingResult:
        """Train from random weights; afterwards the model holds the best ones. Keyword arguments: TrainConfig's.

        The same call continues an interrupted training, and returns at once when it is finished. A COCO folder is
        validated (report.html) and prepared below `output_dir`, once; a prepared dataset is used as it is.

        Raises:
            ConfigError: an unknown field or illegal value; weights are loaded already; or `output_dir` holds
                another training.
            DatasetError: the dataset cannot be trained on.
            TrainingError: a loss that is not finite, or out of memory.
            CheckpointError, StorageAccessError: a checkpoint cannot be read, or written.
        """
        if self._trained is not None:
            raise ConfigError(
                f"this {type(self).__name__} holds trained weights, and training from them is not built yet",
                hint=f"train a new {type(self).__name__}()",
            )
        train = self._training({"dataset_dir": dataset_dir, "output_dir": output_dir, **settings})
        moved = {name: getattr(train, name) for name in (*MOVED_TO_MODEL, "resolution")}
        architecture = self._merged({name: value for name, value in moved.items() if value is not None})
        job = job_in_folder(self._architecture(architecture), train)
        result = train_detector(job)
        self._given = architecture
        self._use(checkpoint.load_trained(job.checkpoints / checkpoint.BEST_TOTAL), accelerator=train.accelerator)
        return result

    def predict(self, images: Picture | Sequence[Picture], threshold: float = 0.5) -> list[Prediction]:
        """Detections with a score above `threshold`, one Prediction per image.

        An image is a Pillow image or a path; its EXIF orientation is applied.

        Raises:
            ConfigError: no weights yet, or a threshold outside 0 to 1.
            DatasetError: an image cannot be read.
        """
        several = [images] if isinstance(images, (Image.Image, str, os.PathLike)) else images
        return predict_pictures(self._weights(), several, threshold)

    def export(self, output_dir: str | os.PathLike[str] = "output", **settings: Any) -> Path:
        """Write rfdetr-<variant>.onnx, proven to compute what this model computes. Keyword arguments: ExportConfig's.

        Raises:
            ConfigError: no weights yet, an unknown field or an illegal value.
            ExportError: it cannot be written, or computes something else; then there is no file.
        """
        trained, config = self._weights(), ExportConfig.parse(settings, source="export()")
        output = Path(output_dir).expanduser()
        output.mkdir(parents=True, exist_ok=True)
        path = output / f"rfdetr-{self.variant}.onnx"
        side = trained.config.resolution
        images = [draw_image(np.random.default_rng(seed), side, 6)[0] for seed in range(config.parity_images)]
        with tempfile.TemporaryDirectory(dir=output, prefix=".export-") as scratch:
            draft = Path(scratch) / path.name
            export_onnx(trained, draft, opset=config.opset, dynamic_batch=config.dynamic_batch)
            check_parity(trained, draft, images, dynamic_batch=config.dynamic_batch, tolerance=config.tolerance)
            draft.replace(path)
        return path

    def _architecture(self, values: dict[str, Any]) -> ModelSection:
        section = ModelSection.parse({**values, "variant": self.variant}, source=f"{type(self).__name__}()")
        refuse_unbuilt(section, "model")
        return section

    def _training(self, values: dict[str, Any]) -> TrainConfig:
        for name in values.keys() - TrainConfig.model_fields.keys():
            if name in ModelConfig.model_fields:
                raise ConfigError(
                    f"train(): {name} belongs to the architecture", hint=f"{type(self).__name__}({name}=…)"
                )
        train = TrainConfig.parse(values, source="train()")
        refuse_unbuilt(train, "train")
        return train

    def _merged(self, moved: dict[str, Any]) -> dict[str, Any]:
        """The architecture as given, and what the train call says of it (the seed's deprecated fields, resolution)."""
        for name, value in moved.items():
            if self._given.get(name, value) != value:
                raise ConfigError(
                    f"train(): {name}: {value} contradicts {type(self).__name__}({name}={self._given[name]})",
                    hint="give one of them",
                )
        return {**self._given, **moved}

    def _weights(self) -> TrainedModel:
        if self._trained is None:
            name = type(self).__name__
            raise ConfigError(f"this {name} has no weights yet", hint=f"train it, or use {name}.from_checkpoint(path)")
        return self._trained

    def _use(self, trained: TrainedModel, *, accelerator: str = "auto") -> None:
        trained.module.to(fabric_accelerator(accelerator))
        self._trained, self.config = trained, trained.config


class RFDETRPico(Detector):
    """128 px, ours: demos and tests on a CPU."""

    variant = "pico"


class RFDETRNano(Detector):
    """384 px, two decoder layers."""

    variant = "nano"


class RFDETRSmall(Detector):
    """512 px, three decoder layers."""

    variant = "small"


class RFDETRMedium(Detector):
    """576 px, four decoder layers."""

    variant = "medium"


class RFDETRBase(Detector):
    """560 px, three decoder layers: the first release's."""

    variant = "base"


class RFDETRLarge(Detector):
    """704 px, four decoder layers."""

    variant = "large"


VARIANTS: tuple[type[Detector], ...] = (RFDETRPico, RFDETRNano, RFDETRSmall, RFDETRMedium, RFDETRBase, RFDETRLarge)
