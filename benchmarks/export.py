"""ONNX Runtime's latency of our exported model beside the one that rfdetr 1.11.2 exports, taking turns in one run.

    python -m benchmarks.export                              # nano and medium, 1 and 2 threads
    python -m benchmarks.export --variants nano --turns 30

All files hold the same weights and get the same image. Said as well is in how many images all queries agree to 1e-3:
where two of the first 300 tokens have scores as close as float32 rounds, either order is right, and self-attention
then changes every query. `make peer` installs the reference.
Each side exports as it does by default: ours with an open batch size, the reference with a fixed one; ours with a
fixed one is a third contender. A ratio compares two neighbouring turns, so that a machine whose speed drifts slows
both.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from benchmarks.model import REFERENCE_PYTHON
from benchmarks.sides import CLASSES, reference_class
from rfdetr_core.config import ExportConfig, ModelConfig
from rfdetr_core.export.onnx import export_onnx
from rfdetr_core.models.detector import RFDETR
from rfdetr_core.models.weights import TrainedModel
from tests.models.golden import fill_w1

WARM_UP = 3
IMAGES = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line per variant and count of threads."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m benchmarks.export"
    )
    parser.add_argument("--variants", nargs="+", default=["nano", "medium"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--turns", type=int, default=20)
    arguments = parser.parse_args(argv)
    if not REFERENCE_PYTHON.exists():
        print("error: the reference package is not installed (make peer)", file=sys.stderr)
        return 2
    print(f"onnxruntime {onnxruntime.__version__}, torch {torch.__version__}")
    for variant in arguments.variants:
        with tempfile.TemporaryDirectory() as folder:
            files = export_all(variant, Path(folder))
            for name, path in files.items():
                print(f"{variant} {name}: {nodes(path)}")
            for threads in arguments.threads:
                run_turns(variant, files, threads, arguments.turns)
    return 0


def export_all(variant: str, folder: Path) -> dict[str, Path]:
    """The reference's file, and ours with an open and a fixed batch size, all of the same weights."""
    config = ModelConfig.parse({"variant": variant, "num_classes": CLASSES})
    module, weights = RFDETR(config).eval(), folder / f"{variant}.pth"
    fill_w1(module, keep=False)
    torch.save({"model": module.state_dict()}, weights)
    program = Path(__file__).with_name("export_sides.py")
    command = [REFERENCE_PYTHON, "-P", program, reference_class(variant), weights, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stderr[-2000:]}error: the reference does not export")
    files = {"reference": Path(done.stdout.split()[-1])}
    trained = TrainedModel(module, config, tuple(map(str, range(CLASSES))), "regular", 0, "")
    for name, settings in {"ours": {}, "ours, fixed batch": {"dynamic_batch": False}}.items():
        files[name] = folder / f"{variant}-{len(files)}.onnx"
        export_onnx(trained, files[name], ExportConfig.parse(settings))
    return files


def nodes(path: Path) -> str:
    """How many nodes stand in the file, and how many ONNX Runtime makes of them; constants do not count."""
    written = sum(node.op_type != "Constant" for node in onnx.load(str(path), load_external_data=False).graph.node)
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = str(Path(folder) / "optimized.onnx"), 3
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        run = len(onnx.load(options.optimized_model_filepath).graph.node)
    return f"{written} nodes, {run} after optimisation, {path.stat().st_size / 1e6:.1f} MB"


def run_turns(variant: str, files: dict[str, Path], threads: int, turns: int) -> None:
    """Time all files in turns, and print each beside the first one."""
    sessions = {}
    for name, path in files.items():
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        sessions[name] = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    side = next(iter(sessions.values())).get_inputs()[0].shape[-1]
    images = np.random.default_rng(0).standard_normal((IMAGES, 1, 3, side, side), dtype=np.float32)
    taken: dict[str, list[float]] = {name: [] for name in sessions}
    found: dict[str, dict[int, Any]] = {name: {} for name in sessions}
    for turn in range(turns + WARM_UP):
        for name, session in sessions.items():
            started = time.perf_counter()
            found[name][turn % IMAGES] = session.run(["dets", "labels"], {"input": images[turn % IMAGES]})
            taken[name].append(1000 * (time.perf_counter() - started))
    reference, *others = sessions
    print(f"{variant}, {threads} thread{'s' * (threads > 1)}, milliseconds: ", end="")
    print(f"{reference} {statistics.median(taken[reference][WARM_UP:]):.1f}", end="")
    for name in others:
        ratios = [a / b for a, b in zip(taken[name][WARM_UP:], taken[reference][WARM_UP:], strict=True)]
        pairs = [zip(found[name][i], outputs, strict=True) for i, outputs in found[reference].items()]
        same = sum(all(np.abs(a - b).max() < 1e-3 for a, b in pair) for pair in pairs)
        print(f"; {name} {statistics.median(taken[name][WARM_UP:]):.1f}, ratio ", end="")
        print(f"{min(ratios):.2f} / {statistics.median(ratios):.2f} / {max(ratios):.2f}", end="")
        print(f" (all queries agree in {same} of {len(pairs)} images)", end="")
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
