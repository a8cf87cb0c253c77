"""A detector from a weight file of any form, and into one of ours.

Our own files name their architecture in full and are taken as they are; what others wrote is read by the rules of
model spec 7.3.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import torch

from rfdetr_core.coco_names import COCO_NAMES, COCO_SLOTS, names_by_slot
from rfdetr_core.config import VARIANTS, ModelConfig, ModelSection, refuse_unbuilt
from rfdetr_core.data.annotations import ClassMap
from rfdetr_core.errors import CheckpointError, ConfigError
from rfdetr_core.models.detector import RFDETR
from rfdetr_core.models.weight_file import (
    WeightFile,
    architecture_of,
    read_weight_file,
    refuse_other_kinds,
    variant_of,
)
from rfdetr_core.models.weights import TrainedModel, load_pretrained
from rfdetr_core.training import checkpoint
from rfdetr_core.training.state import tell

log = logging.getLogger(__name__)

FROM_ELSEWHERE = "pretrained"
"""`TrainedModel.source` of weights that no training of ours made; their epoch is -1."""

_SPARE = "__background__"  # what some files call the head's last column


def read_detector(path: Path) -> TrainedModel:
    """The detector of a weight file, in eval mode on the CPU: architecture, class names and weights are the file's.

    Raises:
        CheckpointError: it cannot be read, is a checkpoint for resuming or of another format version of ours, or
            does not say what detector it holds.
    """
    try:
        content = checkpoint.load(path)
    except CheckpointError:  # of another program, damaged, or ours of another version: the reader of all forms tells
        file = read_weight_file(path)
        if file.format_version is not None:
            raise
        return _from_foreign(file)
    return checkpoint.trained_from(content, path)


def _from_foreign(file: WeightFile) -> TrainedModel:
    refuse_other_kinds(file)
    path, variant = file.path, variant_of(file)
    if variant not in VARIANTS:
        what = "of no variant that this program knows" if variant is None else f"of the kind {variant}"
        raise CheckpointError(
            f"{path}: is {what}", hint=f"known are {', '.join(VARIANTS)}; pretrain_weights takes the weights alone"
        )
    try:
        config = ModelConfig.parse({**architecture_of(file), "variant": variant})
        refuse_unbuilt(config, "model")
    except ConfigError as error:
        raise CheckpointError(f"{path}: names an architecture that cannot be built: {error.message}") from error
    return _built(file, config)


def begin_from(file: WeightFile, section: ModelSection) -> TrainedModel:
    """The detector of `section` with the weights of a file.

    Without `num_classes` it keeps the file's classes, as many as a detector has by default: 90 (spec 7.3, rule 4).

    Raises:
        CheckpointError: the weights do not fit.
        ConfigError: num_select was given and is too large for the file's classes.
    """
    refuse_another_variant(file, section)
    most = ModelConfig.model_fields["num_classes"].default
    if section.num_classes is None and file.num_classes > most:
        log.warning(
            "%s has %d classes, and num_classes is not given: the first %d are kept",
            file.path.name,
            file.num_classes,
            most,
        )
    return _built(file, section.with_num_classes(section.num_classes or min(file.num_classes, most)))


def refuse_another_variant(file: WeightFile, section: ModelSection) -> None:
    """Refuse weights of another kind of model, or of which decoder layers would be left out or stay random.

    Another number of layers than the file's may be wanted, if it is not the variant's own either.

    Raises:
        CheckpointError: the file is of a kind that is not built, or has another number of decoder layers.
    """
    refuse_other_kinds(file)
    variant, layers = variant_of(file), architecture_of(file).get("dec_layers")
    if layers in (None, section.dec_layers):  # none at all: refused when it is loaded
        return
    chosen = section.dec_layers != VARIANTS[section.variant]["dec_layers"]
    if chosen and variant in (None, section.variant):
        return
    hint = f"use weights of {section.variant}" + (f", or the variant {variant}" if variant in VARIANTS else "")
    raise CheckpointError(
        f"{file.path}: holds the weights of {variant or 'an unknown variant'} ({layers} decoder layers), "
        f"the model is {section.variant} ({section.dec_layers})",
        hint=f"set model.dec_layers: {layers}" if variant == section.variant else hint,
    )


def _built(file: WeightFile, config: ModelConfig) -> TrainedModel:
    module = RFDETR(config)
    tell(load_pretrained(module, file))
    names = class_names_of(file, config.num_classes)
    if (known := len(_names_in(file))) < config.num_classes:
        log.warning(
            "%s names %d of %d classes: the others are %s",
            file.path.name,
            known,
            config.num_classes,
            ", ".join(names[known : known + 3]) + (", …" if config.num_classes - known > 3 else ""),
        )
    return TrainedModel(module.eval(), config, names, FROM_ELSEWHERE, -1, checkpoint.sha256_of(file.path))


def class_names_of(file: WeightFile, num_classes: int) -> tuple[str, ...]:
    """The name of each class of a model of `num_classes` that has these weights.

    Weights of 91 slots without names are COCO's, where the class is the category id; "" is a slot without category.
    Other classes without a name are class_<label>: what the model finds of them is not lost.
    """
    names = _names_in(file)
    if names == names_by_slot() and num_classes == file.num_classes == len(names) - 1:
        return names  # the last slot is a category, not the spare one
    return (*names, *(f"class_{label}" for label in range(len(names), num_classes)))[:num_classes]


def _names_in(file: WeightFile) -> tuple[str, ...]:
    """The names that are the file's: COCO's too, which it need not spell out."""
    names = file.class_names[:-1] if file.class_names[-1:] == (_SPARE,) else file.class_names
    if file.num_classes + 1 == COCO_SLOTS and names in ((), tuple(COCO_NAMES.values())):
        return names_by_slot()
    return names


def as_weight_file(trained: TrainedModel) -> WeightFile:
    """The weights at hand, as if read from a file; they are copied to the CPU."""
    sections = checkpoint.published_sections(trained.config, trained.class_names)
    state = {key: value.detach().cpu().clone() for key, value in trained.module.state_dict().items()}
    digest = hashlib.md5(usedforsecurity=False)
    for tensor in state.values():
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return WeightFile(
        path=Path(f"the weights of this {sections['model_name']}"),
        state=state,
        args=sections["args"],
        model_name=sections["model_name"],
        model_config=sections["model_config"],
        class_names=trained.class_names,
        stubs=(),
        md5=digest.hexdigest(),
    )


def write_detector(trained: TrainedModel, path: Path) -> None:
    """Write the weights in the form of checkpoint_best_total.pth, which rfdetr 1.11 loads as well.

    Raises:
        StorageAccessError: the file cannot be written.
    """
    names = trained.class_names
    content = {
        "model": {key: value.detach().cpu() for key, value in trained.module.state_dict().items()},
        "source": trained.source,
        "epoch": trained.epoch,
        "config": trained.config.model_dump(mode="json"),
        "classes": ClassMap(tuple(range(len(names))), names).to_json(),
        **checkpoint.published_sections(trained.config, names),
    }
    checkpoint.save(content, path)
