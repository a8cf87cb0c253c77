"""From where a dataset lies to a folder of this machine: as it is, downloaded, or unpacked."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rfdetr_core.data.annotations import ClassMap
from rfdetr_core.data.boxes import ValidSplit
from rfdetr_core.data.findings import Report
from rfdetr_core.data.formats.archive import is_archive, unpack
from rfdetr_core.data.formats.layout import read_folder
from rfdetr_core.data.splitting import fill_missing_splits
from rfdetr_core.data.validation import validate
from rfdetr_core.errors import DatasetError
from rfdetr_core.storage import Location, location


def local_dataset(uri: str, scratch: Path, *, max_unpacked_gb: float) -> Path:
    """The dataset of a folder, an s3:// prefix, or a .zip or .tar(.gz) archive at either, as a local folder.

    A local folder stays where it is; anything else goes below `scratch`.

    Raises:
        DatasetError: there is nothing, or an archive that cannot be used.
        StorageAccessError, StorageUnavailableError: see `Location`.
    """
    source = location(uri)
    local = source.local_path
    if local is not None and local.is_dir():
        return local
    if is_archive(source.name):
        if local is None:
            local = scratch / source.name
            source.download_file(local)
        elif not local.is_file():
            raise DatasetError(f"{local}: no such file", hint="check dataset.uri")
        unpack(local, scratch / "unpacked", max_unpacked_gb * 1e9)
        if source.local_path is None:
            local.unlink()
        return scratch / "unpacked"
    if local is not None:
        raise DatasetError(f"{local}: no such folder", hint="give the folder that holds the dataset, or an archive")
    source.download_tree(scratch / "source")
    return scratch / "source"


def remote_version(uri: str, options: dict[str, Any]) -> str | None:
    """A digest of what lies in a store, known from its listing, and of the options; None for what lies here.

    Names, sizes and entity tags: a store gives a file another tag when its bytes change. A store without tags has no
    version.
    """
    source = location(uri)
    if source.local_path is not None:
        return None
    files = _listed(source)
    if not files or any(not tag for _, _, tag in files):
        return None
    content = json.dumps({"uri": source.uri, "files": files, "options": options}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _listed(source: Location) -> list[tuple[str, int, str]]:
    if is_archive(source.name):
        return [(source.name, 0, source.entity_tag())]
    return [(info.name, info.size, info.tag) for info in source.list_files()]


def take_in(
    folder: Path, layout: str, report: Report, *, missing_test: str = "hash", pixels: bool = True, name: str = ""
) -> tuple[ClassMap, dict[str, ValidSplit]]:
    """Read a local folder, judge it, and fill in the splits that it does not have.

    Args:
        layout: see `read_folder`.
        missing_test, pixels: see `fill_missing_splits` and `validate`.
        name: what errors call the folder, where it is a copy of something else.

    Raises:
        DatasetError: it cannot be used; `report` holds what was found.
    """
    try:
        splits = read_folder(folder, layout, max_mb=report.options.max_annotation_mb)
        class_map, valid = validate(splits, report, pixels=pixels)
        filled = fill_missing_splits(valid, report, missing_test=missing_test)
        report.raise_errors(str(folder))
    except DatasetError as error:
        raise DatasetError(error.message.replace(str(folder), name or str(folder)), hint=error.hint) from error
    return class_map, filled
