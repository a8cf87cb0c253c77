"""validate_dataset: resolve the configuration, check the dataset, publish it in the prepared form.

Slim: no torch. The prepared dataset goes to <root>/datasets/<digest>/ once and is shared by all runs; the run's
own folder holds where it lies, and the report. What an unchanged dataset in a store was found to be is remembered in
<root>/datasets/sources/, so that a scheduled run does not download it again.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from components.runtime import Stage, StageContext, run_stage
from components.train.trainjob import AWAITED
from components.validate_dataset.weights import check_weights
from rfdetr_core.config import section_digest
from rfdetr_core.data.annotations import ClassMap
from rfdetr_core.data.boxes import ValidSplit
from rfdetr_core.data.checks import CheckOptions
from rfdetr_core.data.class_names import named
from rfdetr_core.data.findings import Report
from rfdetr_core.data.intake import local_dataset, remote_version, take_in
from rfdetr_core.data.preparing import PrepareOptions, dataset_digest, publish_prepared, report_dropped
from rfdetr_core.data.report import report_html, report_json
from rfdetr_core.data.scales import largest_useful_short_side
from rfdetr_core.errors import ConfigError, DatasetError
from rfdetr_core.publication import publish, read_manifest, seal
from rfdetr_core.storage import Location

DATA_FIELDS = (
    "dataset",
    "model.resolution",
    "model.patch_size",
    "model.num_windows",
    "model.num_channels",
    "model.num_queries",
    "train.class_names",
    "train.multi_scale",
    "train.expanded_scales",
)
"""What the prepared dataset and its report depend on."""

STAGE = Stage(
    name="validate_dataset",
    folder="dataset",
    summary="Check a dataset and publish it in the prepared form.",
    reads=(
        *DATA_FIELDS,
        "model.pretrain_weights",
        "model.encoder",
        "model.hidden_dim",
        "model.dec_layers",
        "train.resume",
    ),
    resolves_config=True,
)
REMEMBERED = ("dataset.json", "report.json", "report.html")

log = logging.getLogger("stage.validate_dataset")


@dataclass
class _Found:
    """What is known of the dataset so far; the report is written from it however the stage ends."""

    report: Report
    class_map: ClassMap | None = None
    splits: dict[str, ValidSplit] | None = None
    document: dict[str, Any] | None = None


def body(context: StageContext) -> None:
    """Write dataset.json, report.json and report.html, and weights.json; publish the prepared dataset if it is new."""
    config = context.config
    _refuse_nodes_that_nobody_starts(context)
    found = _Found(Report(CheckOptions.of(config.dataset, config.model)))
    check_weights(context)
    version = remote_version(config.dataset.uri, {"fields": section_digest(config, DATA_FIELDS)})
    memory = None if version is None else context.root / f"datasets/sources/{version}"
    if memory is not None and _recalled(context, memory):
        return
    try:
        digest = _prepare(context, found)
    except DatasetError:
        found.report.tell(log)
        _write_report(context, found)
        context.target().upload_tree(context.output, progress=False)  # for people; unpublished, so no stage reads it
        raise
    found.report.tell(log)
    context.facts |= {"dataset_digest": digest}
    described = {**(found.document or {}), "location": f"datasets/{digest}"}
    (context.output / "dataset.json").write_text(json.dumps(described, indent=2) + "\n")
    _write_report(context, found)
    if memory is not None:
        _remember(context, memory, digest)


def _prepare(context: StageContext, found: _Found) -> str:
    """Check the dataset, and publish its prepared form unless that is done; returns the digest."""
    config, report = context.config, found.report
    folder = local_dataset(config.dataset.uri, context.work, max_unpacked_gb=config.dataset.max_unpacked_gb)
    class_map, splits = take_in(
        folder,
        config.dataset.format,
        report,
        missing_test=config.dataset.missing_test,
        pixels=False,
        name=config.dataset.uri,
    )
    found.class_map, found.splits = named(class_map, config.train.class_names), splits
    _tell(splits, found.class_map.names)
    limit = largest_useful_short_side(config.model, config.train) if config.dataset.reduce else None
    options = PrepareOptions(train_short_side=limit)
    digest = dataset_digest(found.class_map, splits, options)
    place = context.root / f"datasets/{digest}"
    if read_manifest(place) is not None:
        log.info("this dataset is prepared already: datasets/%s", digest)
        document = (place / "dataset.json").read_json()
        report_dropped(document, report)
        report.raise_errors(config.dataset.uri)
    else:
        scratch = context.work / "prepared"
        document, sent = publish_prepared(
            place, scratch, found.class_map, splits, options, source=config.dataset.uri, report=report
        )
        seal(place, inputs=digest, known=sent)
    found.document = document
    return digest


def _refuse_nodes_that_nobody_starts(context: StageContext) -> None:
    """On a cluster several nodes train where the profile says so: hours later the train stage would refuse the same.

    Raises:
        ConfigError: the config asks for several, and the profile has one.
    """
    nodes = context.config.train.num_nodes
    if nodes > 1 and context.attempt and AWAITED not in os.environ:
        raise ConfigError(
            f"train.num_nodes: {nodes}, and the pipeline was compiled for one node",
            hint="compile and submit it with the profile multi-node",
        )


def _recalled(context: StageContext, memory: Location) -> bool:
    """Take over what an earlier run found of the same files, if the dataset it prepared is still there."""
    if read_manifest(memory) is None:
        return False
    document = (memory / "dataset.json").read_json()
    if read_manifest(context.root / document["location"]) is None:
        return False
    log.info("unchanged since it was prepared: %s", document["location"])
    memory.download_tree(context.output, names=REMEMBERED, progress=False)
    context.facts |= {"dataset_digest": document["digest"]}
    return True


def _remember(context: StageContext, memory: Location, digest: str) -> None:
    folder = context.work / "remembered"
    folder.mkdir()
    for name in REMEMBERED:
        (folder / name).write_bytes((context.output / name).read_bytes())
    publish(folder, memory, inputs=digest, progress=False)


def _write_report(context: StageContext, found: _Found) -> None:
    uri, folder = context.config.dataset.uri, context.output
    content = json.dumps(report_json(uri, found.report, found.document), indent=2)
    (folder / "report.json").write_text(content + "\n")
    page = report_html(uri, found.report, found.document, found.class_map, found.splits)
    (folder / "report.html").write_text(page)


def _tell(splits: dict[str, ValidSplit], names: tuple[str, ...]) -> None:
    counts = ", ".join(f"{split} {len(s.table)} images / {len(s.table.boxes)} boxes" for split, s in splits.items())
    log.info("%d classes (%s); %s", len(names), ", ".join(names[:8]) + ("…" if len(names) > 8 else ""), counts)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_stage(STAGE, body, argv)


if __name__ == "__main__":
    sys.exit(main())
