"""One side of a comparison: builds a detector, ours or the reference's, and times what it is told to.

Runs as a script in the environment of its side and speaks JSON lines over stdin and stdout. It imports nothing of the
other side; the weights come from a file, inputs and targets from a seed.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

CLASSES = 90
BOXES_PER_IMAGE = 8


def main() -> None:
    """Answer requests: `prepare` once, then `time` and `outputs` as often as asked for."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not end up between the answers
    warnings.simplefilter("ignore")
    side = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "prepare":
            side = Side(**request["case"])
            answer: Any = {}
        elif request["do"] == "time":
            assert side is not None
            answer = side.time(request["calls"])
        else:
            assert side is not None
            answer = side.outputs()
        channel.write(json.dumps(answer) + "\n")


class Side:
    """A detector and the work to time: an evaluation forward, or a training step without its optimizer."""

    def __init__(
        self,
        *,
        side: str,
        variant: str,
        task: str,
        batch: int,
        resolution: int,
        weights: str,
        threads: int,
        device: str,
        precision: str,
        compiled: bool,
        allocator: str,
    ) -> None:
        if side == "ours" and task in ("train", "eval") and allocator == "stage":
            from rfdetr_core.hardware import keep_freed_memory

            keep_freed_memory()
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.device = torch.device(device)
        build = _ours if side == "ours" else _reference
        self.model, self.criterion = build(variant, weights, export=task == "export")
        self.model.to(self.device).train(task == "train")
        self.criterion.to(self.device).train(task == "train")
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(batch, 3, resolution, resolution, generator=generator).to(self.device)
        centre = torch.rand(batch, BOXES_PER_IMAGE, 2, generator=generator) * 0.6 + 0.2
        extent = torch.rand(batch, BOXES_PER_IMAGE, 2, generator=generator) * 0.3 + 0.05
        labels = torch.randint(1, CLASSES, (batch, BOXES_PER_IMAGE), generator=generator)
        self.targets = [
            {"boxes": boxes.to(self.device), "labels": row.to(self.device)}
            for boxes, row in zip(torch.cat([centre, extent], dim=-1), labels, strict=True)
        ]
        self.call = torch.compile(self.model) if compiled else self.model
        self.autocast = (
            torch.autocast(self.device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
        )
        self.work: Callable[[], float] = self._step if task == "train" else self._forward

    def _forward(self) -> float:
        with torch.inference_mode(), self.autocast:
            self.call(self.images)
        return 0.0

    def _step(self) -> float:
        with self.autocast:
            outputs = self.call(self.images)
            losses = self.criterion(outputs, self.targets)
            weights = self.criterion.weight_dict
            loss = torch.stack([losses[name] * weights[name] for name in weights if name in losses]).sum()
        loss.backward()
        self.model.zero_grad(set_to_none=True)
        return float(loss.detach())

    def time(self, calls: int) -> dict[str, float]:
        """Seconds of each of `calls` calls on average, and the peak memory in bytes so far."""
        self._wait()
        start = time.perf_counter()
        for _ in range(calls):
            loss = self.work()
        self._wait()
        return {"seconds": (time.perf_counter() - start) / calls, "peak": self._peak(), "loss": loss}

    def outputs(self) -> dict[str, Any]:
        """Every 10th row of the last layer's boxes and logits: proof that both sides compute the same."""
        with torch.inference_mode():
            result = self.model(self.images)
        boxes, logits = (
            (result["pred_boxes"], result["pred_logits"]) if isinstance(result, dict) else (result[0], result[1])
        )
        return {"boxes": boxes[:, ::10].cpu().tolist(), "logits": logits[:, ::10].cpu().tolist()}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _ours(variant: str, weights: str, *, export: bool) -> tuple[torch.nn.Module, torch.nn.Module]:
    from rfdetr_core.config import ModelConfig
    from rfdetr_core.models.detector import RFDETR
    from rfdetr_core.models.linear import vouch_for
    from rfdetr_core.training.criterion import Criterion

    del export  # our evaluation form is the one that is exported
    config = ModelConfig(variant=variant, num_classes=CLASSES)
    model = RFDETR(config)
    model.load_state_dict(torch.load(weights, weights_only=True)["model"])
    vouch_for(model)  # as predict and evaluate do; without effect in a training step
    return model, Criterion(config)


def reference_class(variant: str) -> str:
    """The reference's name of a variant: large-deprecated is RFDETRLargeDeprecated."""
    return "RFDETR" + "".join(part.capitalize() for part in variant.split("-"))


def _reference(variant: str, weights: str, *, export: bool) -> tuple[torch.nn.Module, torch.nn.Module]:
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    import rfdetr
    from rfdetr.config import TrainConfig
    from rfdetr.training import RFDETRModelModule

    # Without a file of weights, base and large-deprecated would fetch DINOv2's.
    detector = getattr(rfdetr, reference_class(variant))(pretrain_weights=weights, device="cpu")
    settings = TrainConfig(dataset_dir=".", output_dir=".", tensorboard=False)
    module = RFDETRModelModule(detector.model_config, settings)
    module.model.load_state_dict(torch.load(weights, weights_only=True)["model"])
    if export:
        module.model.eval().export()
    return module.model, module.criterion


if __name__ == "__main__":
    main()
