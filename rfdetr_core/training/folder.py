"""A training that lives in one folder of the local disk: what the stages of a pipeline do, in one process.

report.json, report.html   what was found in the dataset
dataset/<digest>/          the prepared dataset
probe.json                 the batch size, where it was searched
checkpoint*.pth            see `checkpoint`
metrics.jsonl, .csv        one row per epoch
weights.json               what was loaded before the first step, if anything
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rfdetr_core.config import ModelConfig, ModelSection, TrainConfig
from rfdetr_core.config.sections import DatasetConfig
from rfdetr_core.data.checks import CheckOptions
from rfdetr_core.data.class_names import named
from rfdetr_core.data.findings import Report
from rfdetr_core.data.intake import take_in
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.data.preparing import PrepareOptions, dataset_digest, report_dropped, write_prepared
from rfdetr_core.data.report import report_html, report_json
from rfdetr_core.data.scales import largest_useful_short_side
from rfdetr_core.errors import CheckpointError, ConfigError
from rfdetr_core.models.weight_file import WeightFile
from rfdetr_core.pretrained import fetch_weights
from rfdetr_core.storage.local import local_errors
from rfdetr_core.training import checkpoint
from rfdetr_core.training.batch_size import ProbeResult, on_this_device, probe
from rfdetr_core.training.identity import differences, training_identity
from rfdetr_core.training.loop import TrainingJob
from rfdetr_core.training.worst_case import DatasetFacts

PROBE = "probe.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Weights that a training begins with, and the digest that tells them from others."""

    weights: Callable[[], WeightFile]
    digest: str


def job_in_folder(
    section: ModelSection, train: TrainConfig, start: Start | None = None, given: DatasetConfig | None = None
) -> TrainingJob:
    """Validate and prepare `train.dataset_dir`, find the batch size if it is "auto"; results go to `train.output_dir`.

    A dataset that is prepared already is used as it is; what was prepared or searched before is taken over.
    Without `start` the weights are drawn. `given` says what is tolerated in the dataset; its place and layout are those
    of `train`.

    Raises:
        ConfigError: too few classes for the dataset, or the folder holds another training.
        StorageAccessError: the folder cannot be made, or not written.
        DatasetError: the dataset cannot be trained on; report.html says why.
        CheckpointError: the folder's checkpoint cannot be read.
        DeviceMemoryError: not even a batch of one image fits.
    """
    output = Path(train.output_dir)
    options = PrepareOptions(train_short_side=largest_useful_short_side(section, train))
    taken = given or DatasetConfig(uri=str(train.dataset_dir))
    report = Report(CheckOptions.of(taken, section))
    source = Path(str(train.dataset_dir))
    dataset = _prepared_dataset(source, output, options, train.dataset_file, report, taken.missing_test)
    dataset.class_map = named(dataset.class_map, train.class_names)
    model = section.for_dataset(len(dataset.class_map))
    inputs = training_identity(
        model, train, dataset_digest=dataset.digest, start=None if start is None else start.digest
    )
    resume = None if train.resume is None else partial(fetch_weights, train.resume)
    if train.resume is None or Path(train.resume).expanduser().resolve().parent != output:
        _refuse_another_training(output, inputs, model, train, dataset.digest)
    batch_size, grad_accum_steps, predicted = _batch(model, train, dataset, inputs, output / PROBE)
    return TrainingJob(
        model=model,
        train=train,
        dataset=dataset,
        checkpoints=output,
        output=output,
        batch_size=batch_size,
        grad_accum_steps=grad_accum_steps,
        inputs=inputs,
        start_weights=None if start is None else start.weights,
        resume=resume,
        predicted_peak_bytes=predicted,
    )


def probe_in_folder(section: ModelSection, train: TrainConfig, *, price_per_hour: float | None) -> ProbeResult:
    """Validate and prepare `train.dataset_dir` as `job_in_folder` does, and probe; nothing of it is taken over.

    Raises:
        DatasetError: the dataset cannot be trained on.
        DeviceMemoryError: the given batch, or a batch of one image, does not fit.
    """
    options = PrepareOptions(train_short_side=largest_useful_short_side(section, train))
    source, output = Path(str(train.dataset_dir)), Path(train.output_dir)
    taken = DatasetConfig(uri=str(source))
    report = Report(CheckOptions.of(taken, section))
    dataset = _prepared_dataset(source, output, options, train.dataset_file, report, taken.missing_test)
    model = section.for_dataset(len(dataset.class_map))
    return probe(model, train, DatasetFacts.of(dataset.document), price_per_hour=price_per_hour)


def dataset_in_folder(source: Path, folder: Path, split: str) -> PreparedDataset:
    """A dataset of which one split is wanted: as it is if it is prepared, else that split prepared below `folder`.

    Raises:
        DatasetError: it cannot be used.
    """
    if (source / "dataset.json").is_file():
        return PreparedDataset(source)
    class_map, splits = take_in(source, "auto", Report(), pixels=False)
    write_prepared(folder, class_map, {split: splits[split]}, PrepareOptions(train_short_side=None), source=str(source))
    return PreparedDataset(folder)


def _prepared_dataset(
    source: Path, output: Path, options: PrepareOptions, layout: str, report: Report, missing_test: str
) -> PreparedDataset:
    if (source / "dataset.json").is_file():
        return PreparedDataset(source)
    _make(output)
    document = class_map = splits = None
    try:
        class_map, splits = take_in(source, layout, report, missing_test=missing_test, pixels=False)
        folder = output / "dataset" / dataset_digest(class_map, splits, options)
        _make(folder.parent)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".preparing-") as scratch:
                new = Path(scratch) / "new"
                write_prepared(new, class_map, splits, options, source=str(source), report=report)
                new.rename(folder)  # whole, or not there
        else:
            report_dropped(PreparedDataset(folder).document, report)
            report.raise_errors(str(source))
        dataset = PreparedDataset(folder)
        document = dataset.document
    finally:
        report.tell(log)
        with local_errors("write", output):
            (output / "report.json").write_text(json.dumps(report_json(str(source), report, document), indent=2) + "\n")
            (output / "report.html").write_text(report_html(str(source), report, document, class_map, splits))
    return dataset


def _make(folder: Path) -> None:
    with local_errors("write", folder):
        folder.mkdir(parents=True, exist_ok=True)


def _refuse_another_training(output: Path, inputs: str, model: ModelConfig, train: TrainConfig, digest: str) -> None:
    """Refuse a folder whose newest whole checkpoint, or else best weights, are of another training."""
    found = checkpoint.newest_whole(output)
    total = output / checkpoint.BEST_TOTAL
    if found is None and total.exists():
        try:
            found = total, checkpoint.load(total)
        except CheckpointError as error:
            log.warning("%s", error.message)  # training begins, and writes another
    if found is not None and found[1].get("inputs") != inputs:
        raise ConfigError(
            f"{found[0]}: is of another training ({differences(found[1], model, train, digest)})",
            hint=f"give another output_dir, or continue it with resume={str(found[0])!r}",
        )


def _batch(
    model: ModelConfig, train: TrainConfig, dataset: PreparedDataset, inputs: str, found: Path
) -> tuple[int, int, int | None]:
    """Images per micro-batch, micro-batches per optimizer step, and the peak in bytes that was predicted for them.

    A search is made once and kept in `found`; again on another device. A given batch is proven when training begins.
    """
    if train.batch_size != "auto":
        return train.batch_size, train.grad_accum_steps, None
    facts = DatasetFacts.of(dataset.document)
    document = json.loads(found.read_bytes()) if found.exists() else {}
    if document.get("inputs") == inputs:
        result = on_this_device(document, model, train, facts)
    else:
        result = probe(model, train, facts).to_json()
    _write_probe(result | {"inputs": inputs}, found)
    return int(result["batch_size"]), int(result["grad_accum_steps"]), result["predicted_peak_bytes"]


def _write_probe(document: dict[str, Any], path: Path) -> None:
    with local_errors("write", path):
        path.write_text(json.dumps(document, indent=2) + "\n")
