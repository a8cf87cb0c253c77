"""The weights of a version, without pickle: what the file says, byte by byte, and that it builds the same detector."""

from __future__ import annotations

import ast
import json
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rfdetr_core.config import ModelConfig
from rfdetr_core.models.detector import RFDETR
from rfdetr_core.models.safetensors import DESCRIPTION, WEIGHTS, write_portable, write_safetensors
from rfdetr_core.models.weights import TrainedModel
from tests.models import golden

TYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "I64": np.int64, "U8": np.uint8, "BOOL": np.bool_}


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and arrays, by the words of the format's description."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    arrays, end = {}, 0
    for name, row in header.items():
        if name == "__metadata__":
            continue
        start, stop = row["data_offsets"]
        assert start == end  # no holes, no overlap
        end = stop
        arrays[name] = np.frombuffer(body[start:stop], TYPES[row["dtype"]]).reshape(row["shape"])
    assert end == len(body) and (8 + length) % 8 == 0
    return header, arrays


def test_every_type_and_shape(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3).t(),  # not contiguous
        "half": torch.tensor([1.5, -2], dtype=torch.float16),
        "flag": torch.tensor([True, False, True]),
        "whole": torch.tensor(7),
        "none": torch.zeros(0, 4),
        "double": torch.tensor([[1e-300]], dtype=torch.float64),
    }
    write_safetensors(tensors, tmp_path / "t.safetensors", {"format": "pt"})
    header, arrays = read(tmp_path / "t.safetensors")
    assert header["__metadata__"] == {"format": "pt"}
    assert set(arrays) == set(tensors)
    for name, tensor in tensors.items():
        assert np.array_equal(arrays[name], tensor.numpy()), name


def test_the_two_files_build_the_same_detector(tmp_path: Path) -> None:
    module = golden.shared_tiny()
    trained = TrainedModel(module, module.config, ("ant", "Käfer"), "ema", 3, "abc")
    write_portable(trained, tmp_path)
    said = json.loads((tmp_path / DESCRIPTION).read_text())
    assert (said["class_names"], said["source"], said["epoch"], said["checkpoint_sha256"]) == (
        *(["ant", "Käfer"], "ema", 3, "abc"),
    )
    _, arrays = read(tmp_path / WEIGHTS)
    again = RFDETR(ModelConfig.parse(said["model_config"]))
    again.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})
    assert again.config == module.config
    assert all(value.equal(module.state_dict()[name]) for name, value in again.state_dict().items())


PEER = Path(__file__).parents[2] / ".peer" / "bin" / "python"


@pytest.mark.long
@pytest.mark.skipif(not PEER.exists(), reason="the reference package, which brings safetensors, is missing: make peer")
def test_the_formats_own_package_reads_it(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "flag": torch.tensor([True]), "b": torch.tensor(2)}
    write_safetensors(tensors, tmp_path / "t.safetensors", {"format": "pt"})
    program = "import sys, safetensors.torch as s; print({k: v.tolist() for k, v in s.load_file(sys.argv[1]).items()})"
    command = [PEER, "-c", program, tmp_path / "t.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == {name: tensor.tolist() for name, tensor in tensors.items()}
