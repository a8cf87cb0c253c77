"""The small sections of a run: one per stage of the pipeline."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from rfdetr_core.config.base import Bool, Config, Float, Int, Text, Uri
from rfdetr_core.config.problems import broken_rule


def _environment_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
        raise broken_rule("environment", "must be the name of an environment variable, never the secret itself")
    return value


class DatasetConfig(Config):
    """Where the images and annotations are, how they are taken in, and what is tolerated in them."""

    uri: Uri
    """The dataset: a path, file:///path or s3://bucket/prefix; a folder, or a .zip, .tar or .tar.gz archive."""
    format: Literal["auto", "coco", "yolo", "voc"] = "auto"
    """Layout of the annotations; auto tells COCO (of Roboflow exports, or standard), YOLO and Pascal VOC apart."""
    reduce: Bool = True
    """Store training images no larger than training can use; valid and test images stay as they are."""
    missing_test: Literal["hash", "valid"] = "hash"
    """What an absent test split is: taken from train by a hash of the file name, or the valid split once more."""
    strict: Bool = False
    """Make an error of every box that would be clipped, dropped or otherwise mended."""
    tolerate: dict[str, Annotated[Int, Field(ge=0)]] = Field(default_factory=dict)
    """Code of a check → most rows of it that do not stop the stage; of errors, such rows are left out and reported."""
    max_image_pixels: Int = Field(default=89_478_485, ge=1, le=178_956_970)
    """Images of more pixels are an error; the most is where Pillow itself refuses to decode."""
    max_annotation_mb: Int = Field(default=2048, ge=1)
    """Largest file of annotations, in megabytes; parsed, it takes some seven times as much memory."""
    max_unpacked_gb: Float = Field(default=200.0, gt=0)
    """Most gigabytes that an archive may unpack to."""
    max_class_ratio: Float = Field(default=100.0, ge=1)
    """A class is remarked as rare when the most frequent one has more than so many times its boxes."""
    min_box_patches: Float = Field(default=0.125, ge=0)
    """A box is remarked as absurdly small when a side, at the model's resolution, is less than this of a patch."""


class ProbeConfig(Config):
    """The search for the batch size; what it aims at stands in train.auto_batch_*."""

    price_per_hour: Float | None = Field(default=None, ge=0)
    """Price of an hour of the device, in any currency, for an estimate of the run's cost."""


class EvaluateConfig(Config):
    """The evaluation of the trained model and of the champion."""

    split: Literal["test", "valid"] = "test"
    """Split on which candidate and champion are compared."""
    sample_images: Int = Field(default=12, ge=0)
    """Images with their detections shown in the report."""
    batch_size: Int | None = Field(default=None, ge=1)
    """Images per batch; null: 8."""


class ExportConfig(Config):
    """The ONNX model and the proof that it equals the trained one."""

    opset: Int = Field(default=17, ge=16, le=23)
    """ONNX operator set; 16 is the first with GridSample, 23 the last that PyTorch writes."""
    dynamic_batch: Bool = True
    """Leave the batch size open; false fixes it to 1."""
    tolerance: Float = Field(default=1e-3, gt=0)
    """Largest absolute difference of logits and boxes between PyTorch and ONNX Runtime."""
    parity_images: Int = Field(default=4, ge=1)
    """Images that both run on to prove it."""


class PromoteConfig(Config):
    """The gate: when a trained model becomes the champion."""

    metric: Literal["map", "map50", "map75", "mar", "f1"] = "map"
    """What is compared: mAP 50:95, at one IoU, recall at train.eval_max_dets, or the best macro F1."""
    min_value: Float = Field(default=0.0, ge=0, le=1)
    """The candidate's metric must reach this, champion or not."""
    min_improvement: Float = Field(default=0.0, ge=-1, le=1)
    """What the candidate must have over the champion on the same test split; negative tolerates a loss."""
    allow_unguarded_store: Bool = False
    """Promote also on a store that ignores conditional writes, where two runs may overwrite each other."""


class NotifyConfig(Config):
    """Who is told when a run ends."""

    webhook_secret_env: Annotated[Text, AfterValidator(_environment_name)] | None = None
    """Name of the environment variable that holds the webhook's URL."""
