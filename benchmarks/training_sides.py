"""One side of the comparison of trainings: loads images, counts metrics or trains, ours or the reference's.

Runs as a script in the environment of its side and speaks JSON lines over stdin and stdout: a first line prepares, and
every further one asks for a turn. It imports nothing of the other side; both read the same files.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

Turn = Callable[[], dict[str, Any]]
NEVER = 1_000_000  # epochs: who asks for turns decides when it ends


class Channel:
    """Requests in, answers out. What libraries print goes to stderr, not between the answers."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def receive(self) -> dict[str, Any]:
        """The next request; without one, this process ends."""
        line = sys.stdin.readline()
        if not line:
            raise SystemExit(0)
        request: dict[str, Any] = json.loads(line)
        return request

    def send(self, answer: dict[str, Any]) -> None:
        """Answer the last request."""
        self._out.write(json.dumps(answer) + "\n")


def main() -> None:
    """Prepare, then answer one request after the other."""
    channel = Channel()
    warnings.simplefilter("ignore")
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    case = channel.receive()
    torch.set_num_threads(case["threads"])
    torch.manual_seed(0)
    ours = case.pop("side") == "ours"
    if case["part"] == "training":
        (train_ours if ours else train_theirs)(case, channel)  # asks for its turns itself, in the midst of its loop
        return
    build = {"loader": (loader_theirs, loader_ours), "metrics": (metrics_theirs, metrics_ours)}[case["part"]][ours]
    turn = build(case)
    channel.send({})
    while True:
        channel.receive()
        channel.send({**turn(), "peak": peak_bytes(case["device"])})


# ---- loading images ---------------------------------------------------------------------------------------------


def loader_ours(case: dict[str, Any]) -> Turn:
    """A turn is an epoch of items, or of batches up to the network's input."""
    from rfdetr_core.config import ModelSection, TrainConfig
    from rfdetr_core.data.loading import EpochSampler, LoaderSettings, train_loader
    from rfdetr_core.data.scales import configured_scales
    from rfdetr_core.training.folder import dataset_in_folder

    cpu = torch.device("cpu")
    train = TrainConfig.parse({"multi_scale": case["multi_scale"]})
    prepared = Path(case["folder"]) / "prepared"
    prepared.mkdir(parents=True)
    split = dataset_in_folder(Path(case["dataset"]), prepared, "train").split("train")
    scales = configured_scales(ModelSection.parse({"variant": case["variant"]}), train)
    sampler = EpochSampler(len(split), batch_size=case["batch"], grad_accum_steps=1, seed=0, scales=scales)
    settings = LoaderSettings(num_workers=0, pin_memory=None, persistent_workers=None, prefetch_factor=None)
    loader = train_loader(split, sampler, settings, cpu, seed=0, scale_jitter=True, flip=True)
    epochs = iter(range(NEVER))

    def items() -> Iterable[Any]:
        return (loader.dataset[draw] for batch in sampler for draw in batch)

    def inputs() -> Iterable[Any]:
        return (batch.on(cpu) for batch in loader)

    def turn() -> dict[str, Any]:
        sampler.start(next(epochs))
        return {"seconds": seconds_of(items() if case["until"] == "item" else inputs()) / len(split)}

    return turn


def loader_theirs(case: dict[str, Any]) -> Turn:
    """The same; its items are the normalised floats that ours become after the batch, on the device."""
    from rfdetr.training import RFDETRDataModule

    data = RFDETRDataModule(*reference_configs(case, num_workers=0))
    data.setup("fit")
    loader = data.train_dataloader()
    dataset = loader.dataset

    def turn() -> dict[str, Any]:
        work = (dataset[image] for image in range(len(dataset))) if case["until"] == "item" else loader
        return {"seconds": seconds_of(work) / len(dataset)}

    return turn


def seconds_of(work: Iterable[Any]) -> float:
    """Seconds that it takes to go through it all."""
    start = time.perf_counter()
    for _ in work:
        pass
    return time.perf_counter() - start


# ---- counting metrics -------------------------------------------------------------------------------------------


def metrics_ours(case: dict[str, Any]) -> Turn:
    """All that `coco_metrics` counts, from the detections of batches."""
    from rfdetr_core.data.annotations import AnnotationTable, ClassMap
    from rfdetr_core.evaluation.metrics import Detections, coco_metrics

    with np.load(case["problem"]) as problem:
        arrays = dict(problem)
    sides = arrays["box_sides"]
    offsets = np.concatenate([[0], np.cumsum(arrays["box_counts"])])
    table = AnnotationTable(
        file_names=np.array([f"{i}.jpg" for i in range(len(arrays["sizes"]))]),
        widths=arrays["sizes"][:, 0],
        heights=arrays["sizes"][:, 1],
        offsets=offsets,
        boxes=arrays["boxes"].astype(np.float64),
        labels=arrays["labels"],
        areas=np.prod(sides, axis=1),
        crowd=arrays["crowd"],
    )
    classes = ClassMap(tuple(range(case["classes"])), tuple(f"class_{i}" for i in range(case["classes"])))
    starts = [*range(0, len(table), case["batch"]), len(table)]
    ends = np.concatenate([[0], np.cumsum(arrays["found_counts"])])[starts]
    images = np.repeat(np.arange(len(table)), arrays["found_counts"])
    parts = [
        Detections(
            images=images[rows],
            labels=arrays["found_labels"][rows],
            scores=arrays["found_scores"][rows].astype(np.float64),
            boxes=arrays["found_boxes"][rows].astype(np.float64),
        )
        for rows in map(slice, ends[:-1], ends[1:])
    ]

    def turn() -> dict[str, Any]:
        start = time.perf_counter()
        found = coco_metrics(table, classes, Detections.concatenate(parts), max_dets=case["max_dets"])
        return {"seconds": time.perf_counter() - start, "map": found.map, "map50": found.map50, "f1": found.f1}

    return turn


def metrics_theirs(case: dict[str, Any]) -> Turn:
    """Its metric object with the evaluator that is its default, and its F1 sweep, batch by batch."""
    from rfdetr.evaluation.f1_sweep import sweep_confidence_thresholds
    from rfdetr.evaluation.matching import build_matching_data, init_matching_accumulator, merge_matching_data
    from rfdetr.training.coco_map import OnePassCocoMeanAveragePrecision

    with np.load(case["problem"]) as problem:
        arrays = {name: torch.from_numpy(array) for name, array in problem.items()}

    def by_image(counts: str, **names: str) -> list[dict[str, torch.Tensor]]:
        columns = {key: arrays[name].split(arrays[counts].tolist()) for key, name in names.items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    found = by_image("found_counts", boxes="found_boxes", scores="found_scores", labels="found_labels")
    truth = by_image("box_counts", boxes="boxes", labels="labels", iscrowd="crowd")
    for target in truth:
        target["iscrowd"] = target["iscrowd"].long()
    batches = [slice(i, i + case["batch"]) for i in range(0, len(truth), case["batch"])]

    def turn() -> dict[str, Any]:
        start = time.perf_counter()
        metric = OnePassCocoMeanAveragePrecision(
            class_metrics=case["per_class"],
            max_detection_thresholds=[1, 10, case["max_dets"]],
            backend="vernier",
            sync_on_compute=False,
        )
        matched = init_matching_accumulator()
        for rows in batches:
            metric.update(found[rows], truth[rows])
            merge_matching_data(matched, build_matching_data(found[rows], truth[rows], iou_threshold=0.5))
        result = metric.compute()
        classes = sorted(matched)
        present = [i for i, name in enumerate(classes) if matched[name]["total_gt"] > 0]
        sweep = sweep_confidence_thresholds([matched[name] for name in classes], np.linspace(0.0, 1.0, 101), present)
        f1 = max(row["macro_f1"] for row in sweep)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "map": float(result["map"]), "map50": float(result["map_50"]), "f1": float(f1)}

    return turn


# ---- training ---------------------------------------------------------------------------------------------------


class Turns:
    """Stops a training at the beginning of every epoch until a turn is asked for, and times what it does in between.

    A turn goes from the beginning of an epoch's first step to the beginning of the next epoch's: steps, waiting between
    them, and then validation, checkpoints, and the fetch of the next epoch's first batch.
    """

    def __init__(self, channel: Channel, steps: int, device: str, validation: Callable[[], float]) -> None:
        self._channel, self._steps, self._device, self._validation = channel, steps, device, validation
        self._done = 0
        self._start = self._ended = self._began = 0.0
        self._step = self._wait = 0.0
        self._sides: list[int] = []

    def begin_step(self) -> None:
        """The batch is there, the step begins."""
        now = self._now()
        if self._done % self._steps:
            self._wait += now - self._ended
        else:
            self._channel.send(self._answer(now) if self._done else {})
            self._channel.receive()
            self._step = self._wait = 0.0
            self._sides = []
            now = self._start = time.perf_counter()
        self._began = now

    def end_step(self, side: int) -> None:
        """The step is done, the average updated; the images had `side` pixels."""
        self._ended = self._now()
        self._step += self._ended - self._began
        self._sides.append(side)
        self._done += 1

    def _answer(self, now: float) -> dict[str, Any]:
        return {
            "seconds": (self._step + self._wait) / self._steps,
            "wait": self._wait / self._steps,
            "validation": self._validation(),
            "end": now - self._ended,
            "epoch": now - self._start,
            "sides": self._sides,
            "peak": peak_bytes(self._device),
        }

    def _now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def train_ours(case: dict[str, Any], channel: Channel) -> None:
    """Through the Python API; its steps are timed around `Engine.optimizer_step`."""
    import rfdetr_core
    from rfdetr_core.training.engine import Engine

    output = Path(case["folder"])

    def validation() -> float:
        return float(json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])["seconds/eval"])

    turns = Turns(channel, case["steps"], case["device"], validation)
    take_step = Engine.optimizer_step

    def timed(self: Engine, window: Sequence[Any], **settings: Any) -> Any:
        turns.begin_step()
        result = take_step(self, window, **settings)
        turns.end_step(int(window[0].pixels.shape[-1]))
        return result

    Engine.optimizer_step = timed  # type: ignore[method-assign]
    detector = getattr(rfdetr_core, "RFDETR" + case["variant"].capitalize())()
    detector.train(
        dataset_dir=case["dataset"],
        output_dir=output,
        epochs=NEVER,
        batch_size=case["batch"],
        grad_accum_steps=1,
        num_workers=case["workers"],
        multi_scale=case["multi_scale"],
        use_ema=True,
        seed=0,
        accelerator="gpu" if case["device"] == "cuda" else case["device"],
        amp_dtype="bf16" if case["precision"] == "bf16" else None,
        # Where our defaults do more than the reference's: both do the same here.
        eval_base_model=False,
        compute_val_loss=False,
        log_per_class_metrics=False,
        tensorboard=False,
    )


def train_theirs(case: dict[str, Any], channel: Channel) -> None:
    """By its own trainer, with one more callback at the end of its list; its loss in validation is off by default."""
    import pytorch_lightning as pl
    from rfdetr.training import RFDETRDataModule, RFDETRModelModule, build_trainer

    class Timer(pl.Callback):
        def __init__(self) -> None:
            self.validation = 0.0
            self.turns = Turns(channel, case["steps"], case["device"], lambda: self.validation)

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            self.turns.begin_step()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.turns.end_step(int(batch[0].tensors.shape[-1]))

        def on_validation_start(self, trainer: Any, module: Any) -> None:
            self.began = time.perf_counter()

        def on_validation_end(self, trainer: Any, module: Any) -> None:
            self.validation = time.perf_counter() - self.began

    model, train = reference_configs(case, num_workers=case["workers"])
    trainer = build_trainer(train, model, accelerator="gpu" if case["device"] == "cuda" else case["device"])
    trainer.callbacks.append(Timer())
    trainer.fit(RFDETRModelModule(model, train), datamodule=RFDETRDataModule(model, train))


def reference_configs(case: dict[str, Any], *, num_workers: int) -> tuple[Any, Any]:
    """Its ModelConfig and TrainConfig."""
    import rfdetr.config

    kind = getattr(rfdetr.config, f"RFDETR{case['variant'].capitalize()}Config")
    model = kind(pretrain_weights=None, device=case["device"], num_classes=case["classes"])
    train = rfdetr.config.TrainConfig(
        dataset_dir=case["dataset"],
        output_dir=case["folder"],
        epochs=NEVER,
        batch_size=case["batch"],
        grad_accum_steps=1,
        num_workers=num_workers,
        multi_scale=case["multi_scale"],
        use_ema=True,
        seed=0,
        amp_dtype="bf16" if case["precision"] == "bf16" else None,
        tensorboard=False,
    )
    return model, train


def peak_bytes(device: str) -> int:
    """Of the GPU; or of this process at its peak, and what its loading processes have for themselves."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return own + sum(private_bytes(child.pid) for child in multiprocessing.active_children())


def private_bytes(process: int | None) -> int:
    """Resident pages that it shares with no other process."""
    with suppress(OSError):  # it just ended
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
    return 0


if __name__ == "__main__":
    main()
