"""ModelConfig: the variant and the architecture flags of RF-DETR (model spec section 1, training spec 1.3)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from rfdetr_core.config.base import Config, Int


class EncoderSize(NamedTuple):
    """Width, depth (blocks) and attention heads of a ViT encoder."""

    width: int
    depth: int
    heads: int


ENCODERS: dict[str, EncoderSize] = {
    "dinov2_windowed_pico": EncoderSize(width=128, depth=6, heads=4),  # ours: demos and tests on a CPU
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


class ModelConfig(Config):
    """The detector's architecture. A variant fills every field that is not given."""

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
    resolution: Int = Field(ge=1)
    """Side of the square input in pixels."""
    positional_encoding_size: Int = Field(ge=1)
    """Side of the positional table, in patches; follows the resolution unless given."""
    num_queries: Int = Field(ge=1)
    """Object queries per group."""
    num_select: Int = Field(ge=1)
    """Detections kept by post-processing."""
    group_detr: Int = Field(ge=1)
    """Query groups in training; evaluation uses the first."""
    num_classes: Int = Field(default=90, ge=1)
    """Classes; the head has one more column. Taken from the dataset unless given."""
    num_channels: Int = Field(default=3, ge=1)
    """Image channels."""
    two_stage: bool = True
    """References from the encoder's best tokens, instead of a learned table."""
    bbox_reparam: bool = True
    """Box deltas relative to the reference's size, instead of in logit space."""
    lite_refpoint_refine: bool = True
    """References refined once, instead of after each decoder layer."""
    layer_norm: bool = True
    """Layer norm in the projector, instead of batch norm."""
    ia_bce_loss: bool = True
    """IoU-aware classification loss, instead of the focal loss."""
    gradient_checkpointing: bool = False
    """Recompute encoder blocks in backward: less memory, more time."""
    freeze_encoder: bool = False
    """Keep the encoder's weights as they are."""
    segmentation_head: bool = False
    """Predict masks as well."""
    mask_downsample_ratio: Int = Field(default=4, ge=1)
    """Image side over mask side, for segmentation."""
    backbone_lora: bool = False
    """Train low-rank adapters of the encoder instead of its weights."""
    num_decoder_registers: Int = Field(default=0, ge=0)
    """Extra tokens in the decoder."""
    compile: bool = False
    """torch.compile the training step (CUDA)."""
    cuda_graphs: bool = False
    """Capture the training step as CUDA graphs."""
    fused_optimizer: bool = True
    """AdamW's fused kernel where the device has it."""
    device: str | None = None
    """Deprecated spelling of train.accelerator, for the Python API."""
    pretrain_weights: str | None = None
    """Weights to start from: a path or an s3:// URI; null trains from scratch."""

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
        if variant not in VARIANTS:
            return {**VARIANTS["nano"], "positional_encoding_size": 1, **given}  # the field itself reports it
        filled = {**VARIANTS[variant], **given}
        if "positional_encoding_size" not in filled:
            try:
                filled["positional_encoding_size"] = int(filled["resolution"]) // int(filled["patch_size"])
            except (TypeError, ValueError, ZeroDivisionError):
                filled["positional_encoding_size"] = 1  # the faulty field reports itself
        return filled
