"""RF-DETR from Python, without any pipeline.

    from rfdetr_core import RFDETRNano

    model = RFDETRNano(pretrain_weights="rf-detr-nano.pth")
    model.train(dataset_dir="data", output_dir="output", epochs=20)
    model.predict("photo.jpg", threshold=0.5)
    model.evaluate(dataset_dir="data", split="test")
    model.export()

The classes are imported from `rfdetr_core`; their parameters are those of the configuration (ModelConfig for the
constructor, TrainConfig for `train`, ExportConfig for `export`), with the same rules and messages.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rfdetr_core.config import (
    EvaluateConfig,
    ExportConfig,
    ModelConfig,
    ModelSection,
    ProbeConfig,
    TrainConfig,
    refuse_unbuilt,
)
from rfdetr_core.config.device import MOVED_TO_TRAIN, amp_dtype, contradiction, is_device, train_settings
from rfdetr_core.config.train import MOVED_TO_MODEL
from rfdetr_core.config.unbuilt import refuse_other_channels
from rfdetr_core.data.loading import LoaderSettings
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.data.sample import draw_image
from rfdetr_core.detector_files import as_weight_file, begin_from, read_detector, write_detector
from rfdetr_core.errors import CheckpointError, ConfigError, StorageAccessError
from rfdetr_core.evaluation.evaluate import evaluate_model
from rfdetr_core.evaluation.metrics import CocoMetrics
from rfdetr_core.export.onnx import export_onnx
from rfdetr_core.export.parity import Sample, check_parity
from rfdetr_core.hardware import keep_freed_memory
from rfdetr_core.models.linear import vouch_for
from rfdetr_core.models.weight_file import read_weight_file
from rfdetr_core.models.weights import TrainedModel
from rfdetr_core.prediction import Picture, Prediction, predict_pictures
from rfdetr_core.pretrained import fetch_weights
from rfdetr_core.storage.local import local_errors
from rfdetr_core.training import checkpoint
from rfdetr_core.training.batch_size import ProbeResult
from rfdetr_core.training.engine import first_device
from rfdetr_core.training.folder import Start, dataset_in_folder, job_in_folder, probe_in_folder
from rfdetr_core.training.loop import TrainingResult
from rfdetr_core.training.loop import train as train_detector

log = logging.getLogger(__name__)


class RFDETR:
    """A detector of one variant: train it, or begin with weights; then predict, evaluate, export and save."""

    variant: ClassVar[str] = ""

    def __init__(self, *, pretrain_weights: str | os.PathLike[str] | None = None, **architecture: Any) -> None:
        """Choose the architecture: keyword arguments are the fields of ModelConfig.

        `pretrain_weights` is a path, the name of a published file such as "rf-detr-nano.pth", an s3:// or an https://
        URI. With it the model predicts at once, and training begins from it; without it, from random weights.
        `num_classes` is the file's, and in training the dataset's, unless given; then the head is cut, or grown by
        repeating its rows (model spec 7.3). `device`, "cpu", "cuda", "cuda:1" or "mps", is where it predicts, evaluates
        and trains; without it, on the best that there is.

        Raises:
            ConfigError: an unknown field, a value that is not legal, or what is not built yet.
            CheckpointError: the weights cannot be read, or do not fit.
            StorageAccessError, StorageUnavailableError: they cannot be fetched.
        """
        if not self.variant:
            raise ConfigError("RFDETR itself is no variant", hint=f"use {', '.join(k.__name__ for k in VARIANTS)}")
        if "variant" in architecture:
            raise ConfigError(f"{type(self).__name__} is the variant {self.variant}", hint="choose another class")
        self._known: dict[str, Any] = {}  # from a file, or from earlier calls of train
        self._trained: TrainedModel | None = None
        section = self._architecture({**architecture, "device": _named(architecture.get("device"))})
        self._given = {name: value for name, value in architecture.items() if name not in MOVED_TO_TRAIN}
        self._device, self._amp = section.device, section.amp
        self.config = section
        if pretrain_weights is not None:
            if not isinstance(pretrain_weights, (str, os.PathLike)):
                kind = type(pretrain_weights).__name__
                raise ConfigError(f"pretrain_weights: {kind} is no source of weights", hint="give a path, name or URI")
            self._use(begin_from(read_weight_file(fetch_weights(pretrain_weights)), section))

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], *, device: str | None = None) -> Self:
        """The detector of a checkpoint_best_*.pth file of ours, or of a file of the published package.

        `path` may be an s3:// or https:// address. Architecture and class names are the file's.
        `RFDETR.from_checkpoint` chooses the class by itself. `device` as in the constructor.

        Raises:
            ConfigError: `path` is no path.
            CheckpointError: the file cannot be read, is a checkpoint for resuming, or of another variant.
            StorageAccessError, StorageUnavailableError: it cannot be fetched.
        """
        file = _path(path, "path")
        trained = read_detector(fetch_weights(path) if "://" in os.fspath(path) else file)
        kind = next(kind for kind in VARIANTS if kind.variant == trained.config.variant)
        if not issubclass(kind, cls):
            raise CheckpointError(f"{path}: is of the variant {kind.variant}", hint=f"use {kind.__name__}")
        model = kind(device=device)
        model._known = trained.config.model_dump(exclude={"variant", "num_classes", "pretrain_weights"})
        model._use(trained)
        return model

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class id; empty without weights. Of weights trained on COCO, "" is an id that COCO does not use."""
        return self._trained.class_names if self._trained is not None else ()

    def train(
        self, *, dataset_dir: str | os.PathLike[str], output_dir: str | os.PathLike[str] = "output", **settings: Any
    ) -> TrainingResult:
        """Train from the weights at hand, or from random ones; afterwards the model holds the best ones.

        Keyword arguments are TrainConfig's, and `device` as in the constructor. The same call continues an interrupted
        training, and returns at once when it is finished. A COCO folder is validated (report.html) and prepared below
        `output_dir`, once; a prepared dataset is used as it is.

        Raises:
            ConfigError: an unknown field or illegal value; or `output_dir` holds another training.
            DatasetError: the dataset cannot be trained on.
            TrainingError: a loss that is not finite, or out of memory.
            CheckpointError, StorageAccessError: a checkpoint cannot be read, or written.
        """
        train, architecture, section = self._training_of(dataset_dir, output_dir, settings)
        job = job_in_folder(section, train, self._start())
        _tell_lost_channel(section, job.dataset)
        result = train_detector(job)
        self._known = architecture
        self._use(checkpoint.load_trained(job.checkpoints / checkpoint.BEST_TOTAL), first_device(train))
        return result

    def probe(
        self,
        *,
        dataset_dir: str | os.PathLike[str],
        output_dir: str | os.PathLike[str] = "output",
        price_per_hour: float | None = None,
        **settings: Any,
    ) -> ProbeResult:
        """Try the training step on its worst case, without training: which batch fits, and what `train` will cost.

        Arguments as of `train`, which a COCO folder is prepared for as well; `batch_size="auto"` searches the largest
        batch, a number is proven. `price_per_hour` is that of one device, in any currency.

        Raises:
            ConfigError: an unknown field or illegal value.
            DatasetError: the dataset cannot be trained on.
            DeviceMemoryError: the batch does not fit; the message names the largest that does.
        """
        price = ProbeConfig.parse({"price_per_hour": price_per_hour}, source="probe()").price_per_hour
        train, _, section = self._training_of(dataset_dir, output_dir, settings)
        return probe_in_folder(section, train, price_per_hour=price)

    @overload
    def predict(self, images: Picture, threshold: float = ...) -> Prediction: ...  # type: ignore[overload-overlap]

    @overload
    def predict(self, images: Iterable[Picture], threshold: float = ...) -> list[Prediction]: ...

    def predict(self, images: Any, threshold: float = 0.5) -> Prediction | list[Prediction]:
        """Detections with a score above `threshold`: one Prediction of one image, a list of those of several.

        An image is a path, a Pillow image, an array (H, W, C) of uint8, RGB, or a tensor (C, H, W) in [0, 1]. The EXIF
        orientation of the first two is applied, and they become grey or RGBA for a model of one or four channels. All
        are resampled as in training's evaluation.

        Raises:
            ConfigError: no weights yet, a threshold outside 0 to 1, or something that is no image.
            DatasetError: an image cannot be read, has no pixels, or values outside [0, 1].
        """
        trained = self._weights()
        if isinstance(images, (Image.Image, str, os.PathLike, np.ndarray, Tensor)):
            return predict_pictures(trained, [images], threshold)[0]
        if isinstance(images, (bytes, bytearray, memoryview)) or not isinstance(images, Iterable):
            kind = type(images).__name__
            raise ConfigError(f"images: {kind} is no picture", hint="give a path, a Pillow image, or a list of them")
        return predict_pictures(trained, list(images), threshold)

    def evaluate(
        self,
        *,
        dataset_dir: str | os.PathLike[str],
        split: str = "test",
        batch_size: int = 8,
        eval_max_dets: int = 500,
        num_workers: int = 2,
    ) -> CocoMetrics:
        """COCO metrics on a split, "valid" or "test", of a COCO folder or a prepared dataset: those of the pipeline.

        Classes are matched by name; those that only the model or only the dataset has are told in a warning.

        Raises:
            ConfigError: no weights yet, or a value that is not legal.
            DatasetError: the dataset cannot be used, or has no such split.
        """
        trained, source = self._weights(), _path(dataset_dir, "dataset_dir")
        options = EvaluateConfig.parse({"split": split, "batch_size": batch_size}, source="evaluate()")
        loader = TrainConfig.parse({"eval_max_dets": eval_max_dets, "num_workers": num_workers}, source="evaluate()")
        refuse_other_channels(trained.config, "evaluation")
        with tempfile.TemporaryDirectory(prefix="rfdetr-evaluate-") as scratch:
            dataset = dataset_in_folder(source, Path(scratch), options.split)
            _tell_unmatched(trained.class_names, dataset.class_map.names)
            metrics, _ = evaluate_model(
                trained,
                dataset.split(options.split),
                dataset.class_map,
                batch_size=options.batch_size or batch_size,
                max_dets=loader.eval_max_dets,
                device=next(trained.module.parameters()).device,
                loading=LoaderSettings(loader.num_workers, None, None, None),
            )
        return metrics

    def export(self, output_dir: str | os.PathLike[str] = "output", **settings: Any) -> Path:
        """Write rfdetr-<variant>.onnx, proven to compute what this model computes. Keyword arguments: ExportConfig's.

        Raises:
            ConfigError: no weights yet, an unknown field or an illegal value.
            ExportError: it computes something else; then there is no file.
            StorageAccessError: the folder cannot be made, or not written.
        """
        trained, config = self._weights(), ExportConfig.parse(settings, source="export()")
        output = _path(output_dir, "output_dir")
        with local_errors("write", output):
            output.mkdir(parents=True, exist_ok=True)
        path = output / f"rfdetr-{self.variant}.onnx"
        with local_errors("write", output), tempfile.TemporaryDirectory(dir=output, prefix=".export-") as scratch:
            draft = Path(scratch) / path.name
            export_onnx(trained, draft, config)
            check_parity(trained, draft, _drawn_samples(trained.config, config.parity_images), config)
            draft.replace(path)
        return path

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the weights into a file that `from_checkpoint` and the published package load; returns its path.

        Raises:
            ConfigError: no weights yet, or `path` is no path.
            StorageAccessError: there is no such folder, or the file cannot be written.
        """
        trained, target = self._weights(), _path(path, "path")
        if not target.parent.is_dir():
            raise StorageAccessError(f"{target}: cannot be written: no such folder", hint=f"make {target.parent}")
        if target.is_dir():
            raise StorageAccessError(f"{target}: cannot be written: is a folder", hint="give the name of a file in it")
        write_detector(trained, target)
        return target

    def _architecture(self, values: dict[str, Any]) -> ModelSection:
        section = ModelSection.parse({**values, "variant": self.variant}, source=f"{type(self).__name__}()")
        refuse_unbuilt(section, "model")
        return section

    def _training_of(
        self, dataset_dir: Any, output_dir: Any, settings: dict[str, Any]
    ) -> tuple[TrainConfig, dict[str, Any], ModelSection]:
        """Settings, architecture as given, and architecture, of a call of `train` or `probe`."""
        train = self._training({"dataset_dir": dataset_dir, "output_dir": output_dir, **settings})
        moved = {name: getattr(train, name) for name in (*MOVED_TO_MODEL, "resolution")}
        architecture = self._merged({name: value for name, value in moved.items() if value is not None})
        section = self._architecture(architecture)
        refuse_other_channels(section, "training")
        return train, architecture, section

    def _training(self, values: dict[str, Any]) -> TrainConfig:
        device = values.pop("device", None)
        for name in values.keys() - TrainConfig.model_fields.keys():
            if name in ModelConfig.model_fields:
                raise ConfigError(
                    f"train(): {name} belongs to the architecture", hint=f"{type(self).__name__}({name}=…)"
                )
        values["amp_dtype"] = amp_dtype(self._amp, values.get("amp_dtype", "auto"))
        train = TrainConfig.parse(values, source="train()")
        for wanted in (device, self._device):
            train = _on_device(train, wanted)
        refuse_unbuilt(train, "train")
        return train

    def _merged(self, moved: dict[str, Any]) -> dict[str, Any]:
        """The architecture as known and given, and what the train call says of it (deprecated fields, resolution)."""
        for name, value in moved.items():
            if self._given.get(name, value) != value:
                raise ConfigError(
                    f"train(): {name}: {value} contradicts {type(self).__name__}({name}={self._given[name]})",
                    hint="give one of them",
                )
        known = dict(self._known)
        if "resolution" in moved and known.get("resolution") != moved["resolution"]:
            known.pop("requested_resolution", None)
            if known.get("positional_encoding_size") == known.get("resolution", 0) // known.get("patch_size", 1):
                known.pop("positional_encoding_size", None)  # it follows the resolution
        return {**known, **self._given, **moved}

    def _start(self) -> Start | None:
        """What training begins with."""
        if self._trained is None:
            log.warning(
                "training starts from random weights, which takes many epochs; "
                '%s(pretrain_weights="rf-detr-….pth") starts from pretrained ones',
                type(self).__name__,
            )
            return None
        return Start(partial(as_weight_file, self._trained), self._trained.sha256)

    def _weights(self) -> TrainedModel:
        if self._trained is None:
            name = type(self).__name__
            raise ConfigError(f"this {name} has no weights yet", hint=f"train it, or use {name}.from_checkpoint(path)")
        return self._trained

    def _use(self, trained: TrainedModel, device: torch.device | None = None) -> None:
        if device is None:
            device = first_device(_on_device(TrainConfig(), self._device))
        if device.type == "cpu":
            keep_freed_memory()  # as training does; it is of use to every forward pass
        vouch_for(trained.module.to(device))  # it is ours alone, and training makes another one
        self._trained, self.config = trained, trained.config


def _on_device(train: TrainConfig, device: Any) -> TrainConfig:
    """The same settings on a device, if one is given.

    Raises:
        ConfigError: it is none, or the settings name another one.
    """
    device = _named(device)
    if device is None:
        return train
    if not is_device(device):
        ModelSection.parse({"device": device}, source="train()")  # says what is legal
    if other := contradiction(device, train.model_dump(include={"accelerator", "devices"})):
        raise ConfigError(f"device: {device} is not allowed: {other}", hint="give one of them")
    return train.model_copy(update=train_settings(device))


def _named(device: Any) -> Any:
    return str(device) if isinstance(device, torch.device) else device


def _drawn_samples(model: ModelConfig, count: int) -> list[Sample]:
    """Pictures to compare on where there is no dataset; the channels of a drawing repeat."""
    samples = []
    for seed in range(count):
        pixels = np.asarray(draw_image(np.random.default_rng(seed), model.resolution, 6)[0])
        pixels = pixels[..., np.arange(model.num_channels) % 3]
        samples.append(Sample(f"drawing {seed}", pixels, pixels))
    return samples


def _path(value: Any, name: str) -> Path:
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise ConfigError(f"{name}: {type(value).__name__} is no path", hint="give a str or a pathlib.Path")
    return Path(value).expanduser()


def _tell_lost_channel(model: ModelSection, dataset: PreparedDataset) -> None:
    limit = dataset.document["options"]["train_short_side"]
    if model.num_channels > 3 and limit is not None:
        log.warning(
            "%s was prepared for RGB: its images larger than %d px have lost their fourth channel",
            dataset.folder,
            limit,
        )


def _tell_unmatched(model: tuple[str, ...], dataset: tuple[str, ...]) -> None:
    for whose, names in (
        ("the dataset lacks, dropping their detections", set(model) - set(dataset) - {""}),
        ("the model lacks, so that it cannot find them", set(dataset) - set(model)),
    ):
        if names:
            listed = ", ".join(sorted(names)[:8]) + (", …" if len(names) > 8 else "")
            log.warning("%d classes that %s: %s", len(names), whose, listed)


class RFDETRPico(RFDETR):
    """128 px, ours: demos and tests on a CPU."""

    variant = "pico"


class RFDETRNano(RFDETR):
    """384 px, two decoder layers."""

    variant = "nano"


class RFDETRSmall(RFDETR):
    """512 px, three decoder layers."""

    variant = "small"


class RFDETRMedium(RFDETR):
    """576 px, four decoder layers."""

    variant = "medium"


class RFDETRBase(RFDETR):
    """560 px, three decoder layers: the first release's."""

    variant = "base"


class RFDETRLarge(RFDETR):
    """704 px, four decoder layers."""

    variant = "large"


class RFDETRLargeDeprecated(RFDETR):
    """560 px, three decoder layers, a wider encoder: the first release's large one."""

    variant = "large-deprecated"


VARIANTS: tuple[type[RFDETR], ...] = (
    RFDETRPico,
    RFDETRNano,
    RFDETRSmall,
    RFDETRMedium,
    RFDETRBase,
    RFDETRLarge,
    RFDETRLargeDeprecated,
)
