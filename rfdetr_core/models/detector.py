"""The RF-DETR detector: encoder, projector, two-stage transformer and heads (model spec sections 1 to 4).

Module names reproduce the published state dict (spec section 7).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from rfdetr_core.config import ENCODERS, ModelConfig
from rfdetr_core.errors import ConfigError
from rfdetr_core.models.boxes import refine
from rfdetr_core.models.decoder import MLP, Decoder
from rfdetr_core.models.deformable_attention import DeformableAttention
from rfdetr_core.models.export_form import ExportedViT
from rfdetr_core.models.linear import Linear, vouch_for
from rfdetr_core.models.projector import SCALE_FACTORS, Projector
from rfdetr_core.models.transformer import Transformer, flatten_levels
from rfdetr_core.models.vit import WindowedViT

_REGISTERS = 4
_CLASS_PRIOR = 0.01  # initial probability of every class


class EncoderSlot(nn.Module):
    """Holds the ViT one level deeper, where the published state dict has it."""

    def __init__(self, vit: WindowedViT) -> None:
        super().__init__()
        self.encoder = vit


class Backbone(nn.Module):
    """Encoder and projector: images (B, channels, H, W) to maps (B, h, w, D), one per scale."""

    def __init__(self, config: ModelConfig, drop_path: float) -> None:
        super().__init__()
        size = ENCODERS[config.encoder]
        depths = config.out_feature_indexes
        self.encoder = EncoderSlot(
            WindowedViT(
                width=size.width,
                depth=size.depth,
                heads=size.heads,
                weight_std=size.weight_std,
                position_std=size.position_std,
                patch_size=config.patch_size,
                num_windows=config.num_windows,
                table_side=config.positional_encoding_size,
                outputs_after_blocks=depths,
                windowed_blocks=sorted(set(range(max(depths) + 1)) - set(depths)),
                registers=_REGISTERS if "registers" in config.encoder.split("_") else 0,
                channels=config.num_channels,
                drop_path=drop_path,
                gradient_checkpointing=config.gradient_checkpointing,
            )
        )
        self.projector = Projector(
            [size.width] * len(depths),
            config.hidden_dim,
            [SCALE_FACTORS[scale] for scale in config.projector_scale],
            layer_norm=config.layer_norm,
        )

    def forward(self, images: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        return cast(list[Tensor], self.projector(self.encoder.encoder(images, grid)))


class RFDETR(nn.Module):
    """The detector of `config`, randomly initialised.

    `drop_path` is the stochastic depth of the last encoder block; it rises linearly from 0 at the first.
    Raises ConfigError for a configuration that cannot be built.
    """

    _kp_active_mask: Tensor

    def __init__(self, config: ModelConfig, *, drop_path: float = 0.0) -> None:
        _check(config)
        super().__init__()
        self.config = config
        width, num_logits = config.hidden_dim, config.num_classes + 1
        # Empty in a detector; the published files of keypoint-aware releases carry it.
        self.register_buffer("_kp_active_mask", torch.zeros(0, 0, dtype=torch.bool))
        box_head = MLP(width, width, 4, 3)
        decoder = Decoder(
            width,
            layers=config.dec_layers,
            ffn_width=config.dim_feedforward,
            self_heads=config.sa_nheads,
            cross_heads=config.ca_nheads,
            levels=len(config.projector_scale),
            points=config.dec_n_points,
            bbox_reparam=config.bbox_reparam,
            box_head=None if config.lite_refpoint_refine else box_head,
        )
        self.transformer = Transformer(width, num_logits, config.group_detr, decoder, two_stage=config.two_stage)
        self.class_embed = Linear(width, num_logits)
        self.bbox_embed = box_head
        self.refpoint_embed = nn.Embedding(config.num_queries * config.group_detr, 4)
        self.query_feat = nn.Embedding(config.num_queries * config.group_detr, width)
        self.backbone = nn.ModuleList([Backbone(config, drop_path)])
        self._initialise()
        if config.freeze_encoder:
            vouch_for(self._backbone.encoder.requires_grad_(False))

    @property
    def _backbone(self) -> Backbone:
        return cast(Backbone, self.backbone[0])

    def _initialise(self) -> None:
        """Everything but the backbone, which initialises itself (spec 4.7)."""
        for parameter in self.transformer.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.transformer.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()
        nn.init.constant_(self.class_embed.bias, -math.log((1.0 - _CLASS_PRIOR) / _CLASS_PRIOR))
        last = cast(nn.Linear, self.bbox_embed.layers[-1])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        nn.init.zeros_(self.refpoint_embed.weight)
        if self.config.two_stage:
            for class_head, box_head in zip(
                self.transformer.enc_out_class_embed, self.transformer.enc_out_bbox_embed, strict=True
            ):
                class_head.load_state_dict(self.class_embed.state_dict())
                box_head.load_state_dict(self.bbox_embed.state_dict())

    def forward(
        self, images: Tensor | Sequence[Tensor], mask: Tensor | None = None, *, with_aux: bool | None = None
    ) -> dict[str, Any]:
        """Detect objects in normalised images (B, C, H, W), or in a list of (C, H, W), padded here.

        `mask` (B, H, W) is True on padding. The result holds `pred_logits` (B, n, num_classes + 1) and `pred_boxes`
        (B, n, 4) cxcywh in fractions of the input; n is num_queries, in training mode times group_detr. `with_aux`
        (default: in training mode) adds `aux_outputs`, the same for each earlier decoder layer, and `enc_outputs`,
        for the two-stage selection.

        Raises ConfigError when H or W is not a multiple of patch_size x num_windows.
        """
        if not isinstance(images, Tensor):
            if mask is not None:
                raise ConfigError("a list of images brings its own padding mask", hint="pass mask=None")
            images, mask = pad_images(images)
        size = (int(images.shape[-2]), int(images.shape[-1]))
        return self.detect(images, mask, size=size, with_aux=self.training if with_aux is None else with_aux)

    def detect(self, images: Tensor, mask: Tensor | None, *, size: tuple[int, int], with_aux: bool) -> dict[str, Any]:
        """`forward` for a batch whose `size` (H, W) is known as plain integers, as an export needs it."""
        config = self.config
        height, width = size
        if height % config.block or width % config.block:
            raise ConfigError(
                f"image size {height}x{width} is not a multiple of {config.block}",
                hint="patch_size x num_windows must divide both sides",
            )
        grid = (height // config.patch_size, width // config.patch_size)
        maps = self._backbone(images, grid)
        memory = flatten_levels(maps, self._backbone.projector.shapes(grid), mask)
        groups = config.group_detr if self.training else 1
        active = config.num_queries * groups
        hidden, bases, selection = self.transformer(
            memory,
            self.query_feat.weight[:active],
            self.refpoint_embed.weight[:active],
            queries=config.num_queries,
            groups=groups,
            all_layers=with_aux,
        )
        layers = self._heads(hidden, bases)
        outputs: dict[str, Any] = layers[-1]
        if with_aux:
            outputs["aux_outputs"] = layers[:-1]
            if selection is not None and selection.logits is not None:
                boxes = selection.boxes if config.bbox_reparam else selection.boxes.sigmoid()
                outputs["enc_outputs"] = {"pred_logits": selection.logits, "pred_boxes": boxes}
        return outputs

    def _heads(self, hidden: list[Tensor], bases: list[Tensor]) -> list[dict[str, Any]]:
        """Class logits and boxes of each layer; the layers share one matrix product per linear."""
        states, base = torch.stack(hidden), torch.stack(bases)
        logits = self.class_embed(states)
        deltas = self.bbox_embed(states)
        boxes = refine(deltas, base) if self.config.bbox_reparam else (deltas + base).sigmoid()
        return [
            {"pred_logits": layer_logits, "pred_boxes": layer_boxes}
            for layer_logits, layer_boxes in zip(logits.unbind(), boxes.unbind(), strict=True)
        ]


def pad_images(images: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Images (C, H, W) of different sizes to one batch, zero-padded at the bottom and right.

    The mask (B, H, W) is True on padding, and None when the sizes agree.
    """
    height, width = (max(image.shape[side] for image in images) for side in (-2, -1))
    if all(image.shape[-2:] == (height, width) for image in images):
        return torch.stack(list(images)), None
    batch = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool, device=batch.device)
    for row, image in enumerate(images):
        batch[row, :, : image.shape[-2], : image.shape[-1]] = image
        mask[row, : image.shape[-2], : image.shape[-1]] = False
    return batch, mask


class ExportableDetector(nn.Module):
    """The detector at one input size: images (B, C, H, W) to (boxes (B, Q, 4) cxcywh, logits (B, Q, C))."""

    def __init__(self, model: RFDETR, size: tuple[int, int]) -> None:
        super().__init__()
        self.model = model
        self.size = size

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model.detect(images, None, size=self.size, with_aux=False)
        return outputs["pred_boxes"], outputs["pred_logits"]


def prepare_for_export(model: RFDETR, height: int, width: int) -> ExportableDetector:
    """A frozen copy of `model` in eval mode for inputs of height x width pixels (spec section 10).

    Its positional table is already resized, so that no antialiased bicubic operator is traced, and its encoder's
    blocks are folded; the batch size stays free. Raises ConfigError when the size is not a multiple of
    patch_size x num_windows.
    """
    block = model.config.block
    if height % block or width % block:
        raise ConfigError(f"export size {height}x{width} is not a multiple of {block}")
    exported = copy.deepcopy(model).eval().requires_grad_(False)
    embeddings = exported._backbone.encoder.encoder.embeddings
    grid = (height // model.config.patch_size, width // model.config.patch_size)
    table = embeddings.positions(grid).detach().clone()
    embeddings.position_embeddings = nn.Parameter(table, requires_grad=False)
    embeddings.table_grid = grid
    slot = exported._backbone.encoder
    slot.encoder = ExportedViT(slot.encoder, grid)  # type: ignore[assignment]
    return ExportableDetector(exported, (height, width)).eval().requires_grad_(False)


def _check(config: ModelConfig) -> None:
    """Refuse what the configuration may say and this module does not build."""
    unbuilt = {
        "segmentation_head": config.segmentation_head,
        "backbone_lora": config.backbone_lora,
        "num_decoder_registers": config.num_decoder_registers > 0,
    }
    for field, wanted in unbuilt.items():
        if wanted:
            raise ConfigError(f"model.{field}: {getattr(config, field)} is not built yet", hint="leave it out")
