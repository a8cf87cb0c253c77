"""validate_dataset: resolve the configuration, check the dataset, publish it in the prepared form.

Slim: no torch. The prepared dataset goes to <root>/datasets/<digest>/ once and is shared by all runs; the run's
own folder holds where it lies, and the report.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.runtime import Stage, StageContext, run_stage
from components.train.trainjob import AWAITED
from components.validate_dataset.weights import check_weights
from rfdetr_core.config import RunConfig
from rfdetr_core.data.class_names import named
from rfdetr_core.data.formats.layout import read_folder
from rfdetr_core.data.prepared import PrepareOptions, dataset_digest, write_prepared
from rfdetr_core.data.report import report_html, report_json
from rfdetr_core.data.scales import largest_useful_short_side
from rfdetr_core.data.splitting import fill_missing_splits
from rfdetr_core.data.validation import Report, ValidSplit, validate
from rfdetr_core.errors import ConfigError, DatasetError
from rfdetr_core.publication import publish, read_manifest
from rfdetr_core.storage import location

STAGE = Stage(
    name="validate_dataset",
    folder="dataset",
    summary="Check a dataset and publish it in the prepared form.",
    reads=(
        "dataset",
        "model.resolution",
        "model.patch_size",
        "model.num_windows",
        "model.num_channels",
        "model.pretrain_weights",
        "model.encoder",
        "model.hidden_dim",
        "model.dec_layers",
        "train.class_names",
        "train.resume",
        "train.multi_scale",
        "train.expanded_scales",
    ),
    resolves_config=True,
)

log = logging.getLogger("stage.validate_dataset")


def body(context: StageContext) -> None:
    """Write dataset.json, report.json and report.html, and weights.json; publish the prepared dataset if it is new."""
    config, report = context.config, Report()
    _refuse_nodes_that_nobody_starts(context)
    check_weights(context)
    source = _source_folder(context)
    try:
        class_map, splits = validate(read_folder(source, config.dataset.format), report)
        class_map = named(class_map, config.train.class_names)
        splits = fill_missing_splits(splits, report)
    except DatasetError:
        _write_report(context.output, config, report, None)
        context.target().upload_tree(context.output, progress=False)  # for people; unpublished, so no stage reads it
        raise
    report.tell(log)

    limit = largest_useful_short_side(config.model, config.train) if config.dataset.reduce else None
    options = PrepareOptions(train_short_side=limit)
    digest = dataset_digest(class_map, splits, options)
    place = f"datasets/{digest}"
    if read_manifest(context.root / place) is not None:
        log.info("this dataset is prepared already: %s", place)
        document = (context.root / place / "dataset.json").read_json()
    else:
        prepared = context.work / "prepared"
        document = write_prepared(prepared, class_map, splits, options, source=config.dataset.uri)
        publish(prepared, context.root / place, inputs=digest)
    _tell(splits, class_map.names)
    context.facts |= {"dataset_digest": digest}
    (context.output / "dataset.json").write_text(json.dumps({**document, "location": place}, indent=2) + "\n")
    _write_report(context.output, config, report, document)


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


def _source_folder(context: StageContext) -> Path:
    """The dataset as a local folder; an S3 prefix is copied to the scratch folder."""
    source = location(context.config.dataset.uri)
    if source.local_path is not None:
        return source.local_path
    source.download_tree(context.work / "source")
    return context.work / "source"


def _write_report(folder: Path, config: RunConfig, report: Report, document: dict[str, Any] | None) -> None:
    uri = config.dataset.uri
    (folder / "report.json").write_text(json.dumps(report_json(uri, report, document), indent=2) + "\n")
    (folder / "report.html").write_text(report_html(uri, report, document))


def _tell(splits: dict[str, ValidSplit], names: tuple[str, ...]) -> None:
    counts = ", ".join(f"{split} {len(s.table)} images / {len(s.table.boxes)} boxes" for split, s in splits.items())
    log.info("%d classes (%s); %s", len(names), ", ".join(names[:8]) + ("…" if len(names) > 8 else ""), counts)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_stage(STAGE, body, argv)


if __name__ == "__main__":
    sys.exit(main())
