"""ModelConfig: variant and architecture flags of RF-DETR (model spec section 1, training spec 1.3)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, Field, model_validator

from rfdetr_core.config.base import Bool, Config, Int, Text, Uri, whole_number
from rfdetr_core.config.device import legal_device, warn_moved_to_train
from rfdetr_core.config.problems import Problem, not_allowed, refusal
from rfdetr_core.config.resolution import legal_resolution, nearest_resolutions
from rfdetr_core.errors import ConfigError


class EncoderSize(NamedTuple):
    """Width, depth (blocks) and attention heads of a ViT encoder, and how its weights are drawn from scratch.

    The standard deviations are DINOv2's; at a width of 128 they leave so little signal in every branch that
    the first epochs are spent on growing it.
    """

    width: int
    depth: int
    heads: int
    weight_std: float = 0.02
    position_std: float = 0.02


ENCODERS: dict[str, EncoderSize] = {
    "dinov2_windowed_pico": EncoderSize(width=128, depth=6, heads=4, weight_std=0.06, position_std=0.3),  # ours
    "dinov2_windowed_small": EncoderSize(width=384, depth=12, heads=6),
    "dinov2_registers_windowed_small": EncoderSize(width=384, depth=12, heads=6),
    "dinov2_windowed_base": EncoderSize(width=768, depth=12, heads=12),
}

_SMALL_16: dict[str, Any] = {
    "encoder": "dinov2_windowed_small",
    "hidden_dim": 256,
    "patch_size": 16,
    "num_windows": 2,
    "out_feature_indexes": (3, 6, 9, 12),
    "projector_scale": ("P4",),
    "sa_nheads": 8,
    "ca_nheads": 16,
    "dec_n_points": 2,
    "dim_feedforward": 2048,
    "num_queries": 300,
    "num_select": 300,
    "group_detr": 13,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "pico": {
        "encoder": "dinov2_windowed_pico",
        "hidden_dim": 128,
        "patch_size": 8,
        "num_windows": 2,
        "out_feature_indexes": (1, 3, 5, 6),
        "projector_scale": ("P4",),
        "sa_nheads": 4,
        "ca_nheads": 8,
        "dec_n_points": 2,
        "dim_feedforward": 1024,
        "num_queries": 50,
        "num_select": 50,
        "group_detr": 5,
        "dec_layers": 2,
        "resolution": 128,
    },
    "nano": {**_SMALL_16, "dec_layers": 2, "resolution": 384},
    "small": {**_SMALL_16, "dec_layers": 3, "resolution": 512},
    "medium": {**_SMALL_16, "dec_layers": 4, "resolution": 576},
    "large": {**_SMALL_16, "dec_layers": 4, "resolution": 704},
    "base": {
        **_SMALL_16,
        "patch_size": 14,
        "num_windows": 4,
        "out_feature_indexes": (2, 5, 8, 11),
        "dec_layers": 3,
        "resolution": 560,
        "positional_encoding_size": 37,
    },
    "large-deprecated": {
        **_SMALL_16,
        "encoder": "dinov2_windowed_base",
        "hidden_dim": 384,
        "patch_size": 14,
        "num_windows": 4,
        "out_feature_indexes": (2, 5, 8, 11),
        "projector_scale": ("P3", "P5"),
        "sa_nheads": 12,
        "ca_nheads": 24,
        "dec_n_points": 4,
        "dec_layers": 3,
        "resolution": 560,
        "positional_encoding_size": 37,
    },
}
"""Defaults of each variant (model spec 1.1); a field the user gives wins."""


_CLASSIFICATION_LOSSES = ("ia_bce_loss", "use_position_supervised_loss", "use_varifocal_loss")  # the first wins


_MAX_SIDE = 4096
"""Pixels. Six times the largest published size: beyond it a typing error is likelier than a wish."""


class ModelSection(Config):
    """The `model` section: like ModelConfig, but the number of classes may be left to the dataset.

    A variant fills every architecture field that is not given or null.
    """

    variant: Literal["pico", "nano", "small", "medium", "large", "base", "large-deprecated"] = "nano"
    """Model size; pico is ours, for demos and tests on a CPU."""
    encoder: Literal[
        "dinov2_windowed_pico",
        "dinov2_windowed_small",
        "dinov2_registers_windowed_small",
        "dinov2_windowed_base",
    ]
    """ViT encoder."""
    hidden_dim: Int = Field(ge=8)
    """Width of projector and decoder."""
    patch_size: Int = Field(ge=1)
    """Side of a ViT patch in pixels."""
    num_windows: Int = Field(ge=1)
    """Windows per side; the input must divide by patch_size x num_windows."""
    out_feature_indexes: tuple[Int, ...]
    """Encoder depths whose token maps feed the projector, counted in blocks from 1."""
    projector_scale: tuple[Literal["P3", "P4", "P5"], ...]
    """Feature scales that the decoder attends to, in ascending order."""
    dec_layers: Int = Field(ge=1)
    """Decoder layers."""
    sa_nheads: Int = Field(ge=1)
    """Heads of the decoder's self-attention."""
    ca_nheads: Int = Field(ge=1)
    """Heads of the decoder's deformable cross-attention."""
    dec_n_points: Int = Field(ge=1)
    """Sampling points per head and level of the deformable attention."""
    dim_feedforward: Int = Field(ge=1)
    """Inner width of the decoder's feed-forward layers; 2048 in all published variants."""
    resolution: Int
    """Side of the square input in pixels: a multiple of patch_size x num_windows, at most 4096.
    One of 14 is rounded up."""
    requested_resolution: Int | None = None
    """The resolution that was asked for, where it had to be rounded up. Recorded by us, never given."""
    positional_encoding_size: Int = Field(ge=1)
    """Side of the positional table, in patches; follows the resolution unless given."""
    num_queries: Int = Field(ge=1)
    """Object queries per group."""
    num_select: Int = Field(ge=1)
    """Detections kept by post-processing."""
    group_detr: Int = Field(ge=1)
    """Query groups in training; evaluation uses the first."""
    num_classes: Int | None = Field(default=None, ge=1)
    """Classes; the head has one more column. Null: as many as the dataset has."""
    num_channels: Int = Field(default=3, ge=1)
    """Image channels: image files are read as grey for 1, RGB for 3, RGBA for 4; others only predict, from arrays."""
    two_stage: Bool = True
    """References from the encoder's best tokens, instead of a learned table."""
    bbox_reparam: Bool = True
    """Box deltas relative to the reference's size, instead of in logit space."""
    lite_refpoint_refine: Bool = True
    """References refined once, instead of after each decoder layer."""
    layer_norm: Bool = True
    """Layer norm in the projector, instead of batch norm."""
    ia_bce_loss: Bool = True
    """IoU-aware classification loss, instead of the focal loss or of one of the next two."""
    use_position_supervised_loss: Bool = False
    """Position-supervised classification loss; needs ia_bce_loss: false."""
    use_varifocal_loss: Bool = False
    """Varifocal classification loss; needs ia_bce_loss: false."""
    sum_group_losses: Bool = False
    """Add up the losses of the query groups in training, instead of averaging them."""
    gradient_checkpointing: Bool = False
    """Recompute encoder blocks in backward: less memory, more time."""
    freeze_encoder: Bool = False
    """Keep the encoder's weights as they are."""
    segmentation_head: Bool = False
    """Predict masks as well."""
    mask_downsample_ratio: Int = Field(default=4, ge=1)
    """Image side over mask side, for segmentation."""
    backbone_lora: Bool = False
    """Train low-rank adapters of the encoder instead of its weights."""
    num_decoder_registers: Int = Field(default=0, ge=0)
    """Extra tokens in the decoder."""
    compile: Bool = False
    """torch.compile the model in training, on CPU or GPU; needs a C++ compiler there."""
    cuda_graphs: Bool = False
    """Capture the training step as CUDA graphs."""
    fused_optimizer: Bool = True
    """AdamW's fused kernel; with false the one of several launches. Under fp16 it is never the fused one."""
    device: Annotated[Text, AfterValidator(legal_device)] | None = Field(default=None, exclude=True)
    """Where the model of the Python API trains and predicts: "cpu", "cuda", "cuda:N" or "mps"; null: the best there is.
    In a pipeline a deprecated spelling of train.accelerator, and of train.devices for "cuda:N"."""
    amp: Bool | None = Field(default=None, exclude=True)
    """Deprecated: false is train.amp_dtype: null, where that is "auto"; true has no effect."""
    pretrain_weights: Uri | None = None
    """Weights to start from: a path or an s3:// URI; null trains from scratch."""

    if TYPE_CHECKING:
        # The variant gives what is not given here, which no type checker can know.
        def __init__(self, **values: Any) -> None: ...

    @property
    def block(self) -> int:
        """The input side must be a multiple of this: patch_size x num_windows."""
        return self.patch_size * self.num_windows

    @model_validator(mode="before")
    @classmethod
    def _fill_from_variant(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        variant = given.get("variant", "nano")
        known = isinstance(variant, str) and variant in VARIANTS  # if not, the field itself reports it
        fills = VARIANTS[variant if known else "nano"]
        follows = {*fills, "positional_encoding_size"}
        filled = fills | {k: v for k, v in given.items() if v is not None or k not in follows}
        _round_resolution(filled)
        if "positional_encoding_size" not in filled:
            resolution, patch = _positive(filled["resolution"]), _positive(filled["patch_size"])
            # Where one of them is faulty it reports itself.
            filled["positional_encoding_size"] = max(resolution // patch, 1) if resolution and patch else 1
        if given.get("num_select") is None:
            classes = _positive(filled.get("num_classes", cls.model_fields["num_classes"].default))
            queries = _positive(filled["num_queries"])
            if classes and queries:
                filled["num_select"] = min(filled["num_select"], queries * (classes + 1))
        return filled

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.amp is not None:
            warn_moved_to_train("amp")
        problems = list(self._inconsistencies())
        if problems:
            raise refusal(problems)
        return self

    def _inconsistencies(self) -> Iterator[Problem]:
        largest = _MAX_SIDE // self.block * self.block
        if self.resolution > _MAX_SIDE:
            rule = f"must be at most {_MAX_SIDE} pixels"
            yield not_allowed("resolution", self.resolution, rule, *((largest,) if largest else ()))
        elif self.resolution < 1 or self.resolution % self.block:
            rule = f"must be a multiple of patch_size x num_windows = {self.block}, or of 14"
            near = tuple(side for side in nearest_resolutions(self.resolution, self.block) if side <= _MAX_SIDE)
            yield not_allowed("resolution", self.resolution, rule, *((near,) if near else ()))
        requested = self.requested_resolution
        if requested is not None and (
            requested == self.resolution or legal_resolution(requested, self.block) != self.resolution
        ):
            yield not_allowed("requested_resolution", requested, "is recorded by us, never given; leave it out")
        # 4: the sine embedding gives each coordinate half of it, in sine and cosine pairs.
        step = math.lcm(self.sa_nheads, self.ca_nheads, 4)
        if self.hidden_dim % step:
            rule = f"must be a multiple of 4, sa_nheads = {self.sa_nheads} and ca_nheads = {self.ca_nheads}"
            yield not_allowed("hidden_dim", self.hidden_dim, rule, max(round(self.hidden_dim / step), 1) * step)
        yield from self._misplaced_features()
        yield from self._second_losses()
        available = self.num_queries * (self.num_classes + 1) if self.num_classes else None
        if available is not None and self.num_select > available:
            rule = f"must be at most num_queries x (num_classes + 1) = {available}"
            yield not_allowed("num_select", self.num_select, rule, available)

    def _misplaced_features(self) -> Iterator[Problem]:
        depth = ENCODERS[self.encoder].depth
        indexes = self.out_feature_indexes
        ascending = all(a < b for a, b in pairwise(indexes))
        if not indexes or not ascending or indexes[0] < 1 or indexes[-1] > depth:
            rule = f"must be ascending encoder depths between 1 and {depth}"
            use = sorted({min(max(index, 1), depth) for index in indexes}) or [depth]
            yield not_allowed("out_feature_indexes", indexes, rule, use)
        scales = self.projector_scale
        if not scales or list(scales) != sorted(set(scales)):
            rule = "must be ascending scales, each once"
            yield not_allowed("projector_scale", scales, rule, sorted(set(scales)) or ["P4"])

    def _second_losses(self) -> Iterator[Problem]:
        """Of two classification losses one would be ignored."""
        first, *others = [name for name in _CLASSIFICATION_LOSSES if getattr(self, name)] or [""]
        for name in others:
            yield not_allowed(name, True, f"{first} is true, and one loss is used; set model.{first}: false")

    def with_num_classes(self, num_classes: int) -> ModelConfig:
        """The architecture for that many classes.

        num_select, where it is the variant's own, shrinks to what there is to select from.

        Raises:
            ConfigError: the number is not positive, or num_select was given and is too large for it.
        """
        values = self.model_dump(exclude={"num_classes"})
        if self.num_select == VARIANTS[self.variant]["num_select"]:
            del values["num_select"]
        return ModelConfig.parse({**values, "num_classes": num_classes})

    def for_dataset(self, classes: int) -> ModelConfig:
        """The architecture for a dataset of so many classes; a larger num_classes that was given is kept.

        Raises:
            ConfigError: a num_classes that was given is too small.
        """
        given = self.num_classes
        if given is not None and given < classes:
            raise ConfigError(
                f"model.num_classes: {given} is too small: the dataset has {classes} classes",
                hint=f"use {classes}, or leave it out",
            )
        return self.with_num_classes(classes if given is None else given)


class ModelConfig(ModelSection):
    """The detector's architecture, complete: what the model's constructor takes."""

    num_classes: Int = Field(default=90, ge=1)
    """Classes; the head has one more column."""


def _positive(value: Any) -> int:
    """The value as a positive whole number, or 0 if it is none."""
    try:
        return max(int(whole_number(value)), 0)
    except ValueError:
        return 0


def _round_resolution(filled: dict[str, Any]) -> None:
    """Replace a multiple of 14 by the next legal size, and keep what was asked for."""
    requested = _positive(filled["resolution"])
    block = _positive(filled["patch_size"]) * _positive(filled["num_windows"])
    legal = legal_resolution(requested, block) if block else None
    if legal is not None and legal != requested and legal <= _MAX_SIDE:
        filled.update(resolution=legal, requested_resolution=requested)
        warnings.warn(
            f"resolution {requested} is not a multiple of patch_size x num_windows = {block}: "
            f"{legal} is used for training, evaluation and export",
            UserWarning,
            stacklevel=2,
        )
