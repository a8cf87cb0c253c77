"""Weights as safetensors: tensors after a JSON header, so that reading them executes nothing.

The format (https://github.com/huggingface/safetensors, "Format"): 8 bytes little-endian length of the header, the
header {name: {dtype, shape, data_offsets}}, the tensors' bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rfdetr_core.models.weights import TrainedModel

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
_TYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8


def write_portable(trained: TrainedModel, folder: Path) -> None:
    """Write model.safetensors and model.json: what is needed to build the detector without executing anything."""
    write_safetensors(trained.module.state_dict(), folder / WEIGHTS, {"format": "pt"})
    description = {
        "model_config": trained.config.model_dump(mode="json"),
        "class_names": list(trained.class_names),
        "source": trained.source,
        "epoch": trained.epoch,
        "checkpoint_sha256": trained.sha256,
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n")


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors in the order of their names; a tensor that stands under two names is written twice."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    rows, offset = [], 0
    for name, tensor in sorted(tensors.items()):
        data = tensor.detach().cpu().contiguous()
        size = data.numel() * data.element_size()
        shape = list(data.shape)
        header[name] = {"dtype": _TYPES[data.dtype], "shape": shape, "data_offsets": [offset, offset + size]}
        rows.append(data)
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for data in rows:
            file.write(data.flatten().view(torch.uint8).numpy().tobytes())
