"""The small sections of a run: one per stage of the pipeline."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from rfdetr_core.config.base import Bool, Config, Float, Int, Text, Uri
from rfdetr_core.config.problems import Problem, as_config_error, broken_rule, not_allowed, refusal


def _environment_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
        raise broken_rule("environment", "must be the name of an environment variable, never the secret itself")
    return value


Unit = Annotated[Float, Field(ge=0, le=1)]


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
    precision: Literal["fp32", "fp16"] = "fp32"
    """Of weights and arithmetic in the file; inputs and outputs are float32 in both."""
    dynamic_batch: Bool = True
    """Leave the batch size open; false fixes it to fixed_batch."""
    fixed_batch: Int = Field(default=1, ge=1)
    """The batch size of a file without dynamic_batch."""
    shape: tuple[Int, Int] | None = None
    """Height and width of the input; null: model.resolution, square. Both a multiple of patch_size x num_windows."""
    post_processing: Bool = False
    """Put the selection of detections into the graph: boxes in pixels, scores and labels instead of raw outputs."""
    parity_images: Int = Field(default=32, ge=1)
    """Test images that both run on to be compared detection by detection; AP is compared on the whole split."""
    logits_tolerance: Float | None = Field(default=None, gt=0)
    """Largest absolute difference of a detection's logit, PyTorch against ONNX Runtime; null: 1e-3, fp16 0.1."""
    boxes_tolerance: Float | None = Field(default=None, gt=0)
    """Of its box, in fractions of the image; null: 1e-4, fp16 0.01."""
    ap_tolerance: Float | None = Field(default=None, gt=0)
    """Of AP 50:95 on the split, on the scale of 0 to 1; null: 0.001, fp16 0.005."""

    @model_validator(mode="after")
    def _a_fixed_batch_is_not_open(self) -> Self:
        if self.dynamic_batch and self.fixed_batch != 1:
            rule = "goes with dynamic_batch: false; an open batch takes every size"
            raise refusal([not_allowed("fixed_batch", self.fixed_batch, rule, 1)])
        return self

    def input_shape(self, resolution: int, block: int) -> tuple[int, int]:
        """Height and width of the file's input, for a model of this resolution.

        Raises:
            ConfigError: a side is no multiple of `block`, patch_size x num_windows.
        """
        if problem := self.shape_problem(block):
            raise as_config_error([problem])
        return self.shape or (resolution, resolution)

    def shape_problem(self, block: int) -> Problem | None:
        """What is wrong with `shape` for a model whose sides are multiples of `block`."""
        if self.shape is None or all(side > 0 and side % block == 0 for side in self.shape):
            return None
        near = [max(block, round(side / block) * block) for side in self.shape]
        rule = f"both must be multiples of {block} (patch_size x num_windows)"
        return not_allowed("export.shape", list(self.shape), rule, near)


class PromoteConfig(Config):
    """The gate: when a trained model becomes the champion."""

    metric: Literal["map", "map50", "map75", "mar", "f1"] = "map"
    """What is compared: mAP 50:95, at one IoU, recall at train.eval_max_dets, or the best macro F1."""
    min_value: Float = Field(default=0.0, ge=0, le=1)
    """The candidate's metric must reach this, champion or not."""
    min_delta: Float = Field(default=0.0, ge=-1, le=1)
    """What the candidate must have over the champion on the same test split; negative tolerates a loss."""
    max_p_value: Float | None = Field(default=None, gt=0, lt=1)
    """Largest p-value of the paired bootstrap (evaluate.bootstrap_samples) at which a gain counts; null: any gain."""
    min_class_ap: dict[Text, Unit] = Field(default_factory=dict)
    """Class name → AP 50:95 that the candidate must reach in it, champion or not; "*" stands for all others."""
    max_class_loss: Float | None = Field(default=None, ge=0, le=1)
    """AP 50:95 that no class may lose against the champion; null: the mean alone decides."""
    allow_fewer_classes: Bool = False
    """Let a candidate that does not know every class of the champion replace it."""
    max_latency_ms: Float | None = Field(default=None, gt=0)
    """Ceiling of ONNX Runtime's milliseconds per image at batch 1, on the CPU with all threads (latency.json)."""
    max_size_mb: Float | None = Field(default=None, gt=0)
    """Ceiling of the size of model.onnx, in millions of bytes."""
    allow_unguarded_store: Bool = False
    """Promote also on a store that ignores conditional writes, where two runs may overwrite each other."""


class NotifyConfig(Config):
    """Who is told when a run ends."""

    webhook_secret_env: Annotated[Text, AfterValidator(_environment_name)] | None = None
    """Name of the environment variable that holds the webhook's URL; null: the summary is stored and nobody told."""
    format: Literal["auto", "json", "slack"] = "auto"
    """What is posted: the whole summary, or a message as Slack and its like take it; auto tells by Slack's host."""
