"""The commands on datasets of `python -m rfdetr_core data`: validate, convert, stats."""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rfdetr_core.config import RunConfig, load_run_config, merge, parse_assignments
from rfdetr_core.data.annotations import ClassMap
from rfdetr_core.data.boxes import ValidSplit
from rfdetr_core.data.checks import CheckOptions
from rfdetr_core.data.conversion import write_coco, write_yolo
from rfdetr_core.data.findings import Report
from rfdetr_core.data.intake import local_dataset, take_in
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.data.preparing import PrepareOptions, write_prepared
from rfdetr_core.data.report import report_html, report_json
from rfdetr_core.data.scales import largest_useful_short_side
from rfdetr_core.data.statistics import shape_histograms, split_statistics
from rfdetr_core.errors import ConfigError, StorageAccessError
from rfdetr_core.storage import location
from rfdetr_core.storage.local import local_errors

SECTIONS = ("dataset", "model", "train")

log = logging.getLogger("rfdetr_core.data")


def validate(arguments: argparse.Namespace) -> None:
    """Print every kind of finding, the worst first, and what the dataset holds.

    Raises:
        ConfigError, DatasetError, StorageAccessError: it cannot be used, or not be found; the report is written first.
    """
    config = _config(arguments)
    report = _report(config)
    class_map = splits = document = None
    try:
        with _source(config) as folder:
            try:
                class_map, splits = _taken(folder, config, report, arguments)
                document = _described(class_map, splits)
            finally:
                for finding in report.worst_first:
                    print(f"{finding.severity:8}{finding.count:7}  {finding.code}: {finding.message}")
                    print(f"{'':17}{finding.rows[0]}{' …' if finding.count > 1 else ''}")
                if arguments.report is not None:
                    _write_reports(Path(arguments.report), config, report, document, class_map, splits)
    finally:
        if arguments.report is not None and Path(arguments.report).is_dir():
            print(Path(arguments.report) / "report.html")
    _print_counts(document)


def convert(arguments: argparse.Namespace) -> None:
    """Write a dataset as COCO, YOLO or prepared, into a folder that appears whole or not at all.

    Raises:
        ConfigError: the folder holds something.
        DatasetError, StorageAccessError: see `validate`.
    """
    target: Path = arguments.out
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--out {target}: exists and is not an empty folder", hint="name a new folder")
    config = _config(arguments)
    report = _report(config)
    with local_errors("write", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-")
    with scratch, _source(config) as folder:
        written = Path(scratch.name) / "new"
        class_map, splits = _taken(folder, config, report, arguments)
        if arguments.to == "prepared":
            side = largest_useful_short_side(config.model, config.train) if config.dataset.reduce else None
            uri = config.dataset.uri
            write_prepared(written, class_map, splits, PrepareOptions(side), source=uri, report=report)
        elif arguments.to == "coco":
            write_coco(written, class_map, splits)
        else:
            for line in write_yolo(written, class_map, splits):
                log.warning("%s", line)
        report.tell(log)
        with local_errors("write", target):
            if target.exists():
                target.rmdir()
            written.rename(target)
    _print_counts(_described(class_map, splits))
    print(target)


def stats(arguments: argparse.Namespace) -> None:
    """Print counts per split and class, and the shapes of boxes and images; with --json as a file too."""
    config = _config(arguments)
    report = _report(config)
    with _source(config) as folder:
        if (folder / "dataset.json").is_file():
            dataset = PreparedDataset(folder)
            class_map = dataset.class_map
            tables = {name: dataset.split(name).table for name in dataset.document["splits"]}
        else:
            class_map, splits = _taken(folder, config, report, arguments)
            tables = {name: split.table for name, split in splits.items()}
    document = {
        "classes": class_map.to_json(),
        "splits": {name: split_statistics(table, class_map) for name, table in tables.items()},
    }
    _print_counts(document)
    for name, table in tables.items():
        for title, (labels, counts) in shape_histograms(table, report.options).items():
            shown = "  ".join(f"{label} {count}" for label, count in zip(labels, counts, strict=True) if count)
            print(f"{name}: {title}: {shown or 'none'}")
    if arguments.json is not None:
        with local_errors("write", Path(arguments.json)):
            Path(arguments.json).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(arguments: argparse.Namespace) -> RunConfig:
    """The sections dataset and model as YAML and command line say."""
    given = parse_assignments(arguments.set)
    for name in given:
        if name not in SECTIONS:
            raise ConfigError(f"--set {name}…: has no effect on a dataset", hint=f"a field of {', '.join(SECTIONS)}")
    overrides = merge(given, {"dataset": {"uri": arguments.dataset}})
    if arguments.config is not None:
        return load_run_config(arguments.config, overrides)
    return RunConfig.parse({"name": "dataset", **overrides})


def _report(config: RunConfig) -> Report:
    return Report(CheckOptions.of(config.dataset, config.model))


@contextmanager
def _source(config: RunConfig) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rfdetr-data-") as scratch:
        limit = config.dataset.max_unpacked_gb
        yield local_dataset(config.dataset.uri, Path(scratch), max_unpacked_gb=limit)


def _taken(
    folder: Path, config: RunConfig, report: Report, arguments: argparse.Namespace
) -> tuple[ClassMap, dict[str, ValidSplit]]:
    dataset = config.dataset
    pixels = not arguments.headers_only and getattr(arguments, "to", "") != "prepared"
    return take_in(folder, dataset.format, report, missing_test=dataset.missing_test, pixels=pixels, name=dataset.uri)


def _described(class_map: ClassMap, splits: dict[str, ValidSplit]) -> dict[str, Any]:
    return {
        "classes": class_map.to_json(),
        "splits": {name: split_statistics(split.table, class_map) for name, split in splits.items()},
    }


def _write_reports(
    folder: Path,
    config: RunConfig,
    report: Report,
    document: dict[str, Any] | None,
    class_map: ClassMap | None,
    splits: dict[str, ValidSplit] | None,
) -> None:
    if location(str(folder)).local_path is None:
        raise StorageAccessError(f"--report {folder}: must be a local folder")
    uri = config.dataset.uri
    with local_errors("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps(report_json(uri, report, document), indent=2)
        (folder / "report.json").write_text(content + "\n")
        (folder / "report.html").write_text(report_html(uri, report, document, class_map, splits))


def _print_counts(document: dict[str, Any] | None) -> None:
    if document is None:
        return
    for name, split in document["splits"].items():
        print(f"{name}: {split['images']} images, {split['boxes']} boxes, {split['images_without_boxes']} without")
    for row in document["classes"][:50]:
        counts = "  ".join(f"{name} {s['boxes_per_class'][row['name']]}" for name, s in document["splits"].items())
        print(f"  {row['label']} {row['name']}: {counts}")
    if len(document["classes"]) > 50:
        print(f"  … {len(document['classes']) - 50} more classes")
