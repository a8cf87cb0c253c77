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
    """Where the images and annotations are, and how they are taken in."""

    uri: Uri
    """The dataset: a path, file:///path or s3://bucket/prefix."""
    format: Literal["auto", "coco", "yolo", "voc"] = "auto"
    """Layout of the annotations; auto tells COCO (of Roboflow exports, or standard) and YOLO apart by itself."""
    reduce: Bool = True
    """Store training images no larger than training can use; valid and test images stay as they are."""


class ProbeConfig(Config):
    """The search for the batch size; what it aims at stands in train.auto_batch_*."""

    price_per_hour: Float | None = Field(default=None, ge=0)
    """Price of an hour of the device, in any currency, for an estimate of the run's cost."""


class EvaluateConfig(Config):
    """The evaluation of the trained model and of the champion."""

    split: Literal["test", "valid"] = "test"
    """Split on which candidate and champion are compared; valid where no image of test has a box."""
    sample_images: Int = Field(default=24, ge=0)
    """Images of the worst results shown in the report, and as many of the best."""
    bootstrap_samples: Int = Field(default=1000, ge=0)
    """Draws of the images that say how much of a difference to the champion is luck; 0: not asked."""
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
    """Name of the environment variable that holds the webhook's URL; null: the summary is stored and nobody told."""
    format: Literal["auto", "json", "slack"] = "auto"
    """What is posted: the whole summary, or a message as Slack and its like take it; auto tells by Slack's host."""
