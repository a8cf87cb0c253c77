"""What can be said of pretrained weights without torch, before a GPU is asked for; the train stage loads them."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from components.runtime import StageContext
from rfdetr_core.config import VARIANTS, ModelSection
from rfdetr_core.errors import CheckpointError, MissingObjectError
from rfdetr_core.models.file_form import kind_in_file, other_kind, refuse_other_forms
from rfdetr_core.models.published import PUBLISHED
from rfdetr_core.pretrained import fetch_weights
from rfdetr_core.storage import location

PUT = "rfdetr-pipeline weights put brings published weights into the store and prints their URI"

_PUBLISHED_VARIANTS = {
    "rf-detr-nano.pth": "nano",
    "rf-detr-small.pth": "small",
    "rf-detr-medium.pth": "medium",
    "rf-detr-base.pth": "base",
    "rf-detr-base-2.pth": "base",
    "rf-detr-base-o365.pth": "base",
    "rf-detr-large-2026.pth": "large",
    "rf-detr-large.pth": "large-deprecated",
}
_DECISIVE = ("encoder", "hidden_dim", "patch_size", "dec_layers")
"""Fields in which weights and model must agree."""

log = logging.getLogger("stage.validate_dataset")


def check_weights(context: StageContext) -> None:
    """Look at `model.pretrain_weights`, if there are any, and write weights.json: URI, size, MD5, published name.

    Of `train.resume` it is asked only whether it is there: the train stage knows whether it needs it.

    Raises:
        StorageAccessError: there is no such file, or it may not be read.
        CheckpointError: it is no weight file, cut off, of a kind that is not built, or published for another variant.
    """
    resume = context.config.train.resume
    if resume is not None and not location(resume).exists():
        raise MissingObjectError(f"train.resume: {resume}: no such file", hint="check the path")
    uri = context.config.model.pretrain_weights
    if uri is None:
        return
    found = describe_weights(fetched(context, uri), uri, context.config.model)
    log.info("weights: %s, %d bytes, MD5 %s%s", uri, found["size"], found["md5"], _known_as(found["published"]))
    (context.output / "weights.json").write_text(json.dumps(found, indent=2) + "\n")


def fetched(context: StageContext, uri: str) -> Path:
    """The weights as a local file; those in S3 are copied to the scratch folder."""
    try:
        return fetch_weights(uri, cache=context.work / "weights")
    except MissingObjectError as error:
        raise MissingObjectError(f"model.pretrain_weights: {error.message}", hint=f"check the path; {PUT}") from error


def describe_weights(path: Path, uri: str, model: ModelSection) -> dict[str, Any]:
    """What weights.json says of a local file."""
    refuse_other_forms(path, uri)
    if (kind := kind_in_file(path)) is not None:
        raise other_kind(uri, kind)
    with path.open("rb") as file:
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    published = next((known.name for known in PUBLISHED.values() if known.md5 == md5), None)
    if published is not None:
        _refuse_another_variant(published, uri, model)
    return {"uri": uri, "size": path.stat().st_size, "md5": md5, "published": published}


def _refuse_another_variant(published: str, uri: str, model: ModelSection) -> None:
    variant = _PUBLISHED_VARIANTS.get(published)
    if variant is None:
        raise other_kind(uri, "segmentation" if "-seg-" in published else "keypoint")
    wanted = VARIANTS[variant]
    if any(getattr(model, name) != wanted[name] for name in _DECISIVE):
        raise CheckpointError(
            f"{uri}: is the published {published}, weights of the variant {variant}; the model is {model.variant}",
            hint=f"set model.variant: {variant}, or give weights of {model.variant}",
        )


def _known_as(published: str | None) -> str:
    return f", the published {published}" if published else ""
