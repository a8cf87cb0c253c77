"""What looks wrong after an epoch: causes of an mAP near 0, each with its numbers, the likeliest first.

Judged from what an evaluation leaves anyway: no forward pass, no image is read. The limits on losses come from an
untrained pico: loss_bbox 0.5, loss_giou 1.03, loss_ce 0.14; at a hundred times the default learning rate its first
epoch has a loss_bbox of 2.4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rfdetr_core.config import ModelConfig, TrainConfig
from rfdetr_core.data.annotations import AnnotationTable, ClassMap
from rfdetr_core.evaluation.detections import Detections
from rfdetr_core.evaluation.metrics import CocoMetrics

MAX_IMAGES = 2000  # that are looked at, evenly spaced: about a second
SCORE = 0.01  # the classifier's prior: what no query has learned to exceed
HEALTHY_MAP50 = 0.05
FEW_STEPS = 200
DEFAULT_LR = float(TrainConfig.model_fields["lr"].default)

Boxes = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Symptom:
    """One thing that looks wrong."""

    cause: str  # stable code, see docs/training_doctor.md
    weight: float  # 0 to 1; ranks the symptoms of one epoch
    evidence: str  # the numbers
    advice: str  # one sentence with the dotted field to change


def examine(
    *,
    metrics: CocoMetrics,
    detections: Detections,
    table: AnnotationTable,
    class_map: ClassMap,
    model: ModelConfig,
    train: TrainConfig,
    losses: Mapping[str, float],
    steps: int,
    start_weights: bool,
) -> list[Symptom]:
    """What looks wrong, the likeliest cause first; nothing if the detector is on its way.

    Swapped labels, more boxes than the model can give and losses that are not finite are told at any mAP, the rest
    below an mAP50 of 0.05.

    Args:
        detections: what `metrics` was computed from, of all images of `table`.
        losses: the epoch's mean training losses, named as by `Criterion`; others are only asked if they are finite.
        steps: optimizer steps so far.
        start_weights: training began from weights, not from random numbers.
    """
    if table.crowd.all():
        advice = "Annotate the validation split of dataset.uri: without boxes no model can be the best."
        return [Symptom("no_annotations", 1.0, f"none of {len(table)} validation images has a box", advice)]
    seen = _look(table, detections, len(class_map), model.resolution)
    swapped = list(_swapped(seen, class_map, start_weights))
    symptoms = [*_not_finite(losses, train), *_too_many(table, model, train), *swapped]
    if metrics.map50 < HEALTHY_MAP50:
        symptoms += [] if start_weights else [_random_start(metrics, model, train)]
        symptoms += _learning(losses, steps, model, train)
        symptoms += [*_collapsed(seen, class_map, train), *_small(seen, model)]
        symptoms += [] if swapped else [_stage(seen, class_map, train)]
    return sorted(symptoms, key=lambda symptom: -symptom.weight)


def report_lines(symptoms: Sequence[Symptom]) -> list[str]:
    """For the log: a headline and one line per symptom, best first; nothing for none."""
    if not symptoms:
        return []
    many = f"{len(symptoms)} things look wrong, the likeliest cause first"
    headline = f"doctor: {'one thing looks wrong' if len(symptoms) == 1 else many}"
    return [headline, *(f"  {n}. {s.cause}: {s.evidence}. {s.advice}" for n, s in enumerate(symptoms, 1))]


def to_json(symptoms: Sequence[Symptom]) -> list[dict[str, Any]]:
    """One object per symptom, in order."""
    return [asdict(symptom) for symptom in symptoms]


def _not_finite(losses: Mapping[str, float], train: TrainConfig) -> Iterator[Symptom]:
    broken = sorted(name for name, value in losses.items() if not math.isfinite(value))
    if broken:
        advice = f"Lower train.lr (now {train.lr:g}), or train in float32 with train.amp_dtype: null."
        yield Symptom("loss_not_finite", 1.0, f"not finite: {', '.join(broken)}", advice)


def _random_start(metrics: CocoMetrics, model: ModelConfig, train: TrainConfig) -> Symptom:
    advice = "Give model.pretrain_weights, or let train.epochs be many."
    if model.freeze_encoder or train.lr_encoder == 0:
        field = "model.freeze_encoder: true" if model.freeze_encoder else "train.lr_encoder: 0"
        advice = f"The encoder stays random: drop {field}, or give model.pretrain_weights."
    evidence = f"training began from random weights: an mAP50 of {metrics.map50:.3f} is normal in its first epochs"
    return Symptom("random_start", 0.95, evidence, advice)


def _learning(losses: Mapping[str, float], steps: int, model: ModelConfig, train: TrainConfig) -> Iterator[Symptom]:
    """Too few steps, or a learning rate that leaves the losses of an untrained detector or worse ones."""
    if steps < FEW_STEPS:
        evidence = f"{steps} optimizer steps so far"
        advice = "Let train.epochs be many, or lower train.batch_size x train.grad_accum_steps for more steps."
        yield Symptom("few_steps", 0.65 - 0.2 * steps / FEW_STEPS, evidence, advice)
    names = ("loss_ce", "loss_bbox", "loss_giou")
    ce, bbox, giou = (losses.get(name, math.nan) for name in names)
    evidence = f"train.lr is {train.lr:g}" + "".join(f", {name} {losses[name]:.3g}" for name in names if name in losses)
    advice = f"Bring train.lr nearer to its default of {DEFAULT_LR:g}"
    unmoved = giou > 0.95 or (model.ia_bce_loss and ce < 0.2)
    if bbox > 1.0 or giou > 1.3:
        worse = f"{evidence}: worse than an untrained detector"
        yield Symptom("lr_too_high", 0.78, worse, f"{advice}, or lengthen train.warmup_epochs.")
    elif train.lr >= 10 * DEFAULT_LR:
        yield Symptom("lr_too_high", 0.5, evidence, f"{advice}.")
    elif train.lr <= DEFAULT_LR / 100:
        yield Symptom("lr_too_low", 0.75 if unmoved else 0.66, evidence, f"{advice}.")
    elif unmoved and steps >= FEW_STEPS:
        advice = "Raise train.lr, or shorten train.warmup_epochs."
        yield Symptom("lr_too_low", 0.6, f"{evidence}: as of an untrained detector", advice)


def _swapped(seen: _Seen, class_map: ClassMap, start_weights: bool) -> Iterator[Symptom]:
    """Boxes are found, and each class goes by the name of another one."""
    rows = seen.confusion[seen.confusion.any(axis=1)]
    purity = rows.max(axis=1).sum() / max(rows.sum(), 1)
    names = len(set(rows.argmax(axis=1).tolist()))
    if seen.recall < 0.2 or seen.right >= 0.5 or purity < 0.7 or names <= len(rows) / 2:
        return
    by_one, step = max((np.trace(np.roll(seen.confusion, -step, axis=1)) / rows.sum(), step) for step in (1, -1))
    shift = f"; {by_one:.0%} are off by {step:+d}" if by_one >= 0.7 else ""
    advice = "Compare the class ids of train and valid in dataset.uri, and set train.class_names to have them checked."
    if start_weights:
        advice = f"{advice[:-1]}; or leave out model.pretrain_weights, if its classes stand in another order."
    yield Symptom("labels_swapped", 0.6 + 0.3 * float(purity), seen.naming(class_map) + shift, advice)


def _too_many(table: AnnotationTable, model: ModelConfig, train: TrainConfig) -> Iterator[Symptom]:
    """Annotated boxes that no detection is left for."""
    owners = np.stack([np.repeat(np.arange(len(table)), table.counts), table.labels])[:, ~table.crowd]
    per_image, per_class = np.bincount(owners[0]), np.unique(owners, axis=1, return_counts=True)[1]
    limits = (
        ("model.num_queries", model.num_queries, per_image, "boxes in an image"),
        ("model.num_select", model.num_select, per_image, "boxes in an image"),
        ("train.eval_max_dets", train.eval_max_dets, per_class, "boxes of a class in an image"),
    )
    lost = [float(np.maximum(counts - limit, 0).sum() / owners.shape[1]) for _, limit, counts, _ in limits]
    worst = max(lost)
    field, limit, counts, what = limits[lost.index(worst)]
    if worst >= 0.05:
        evidence = f"up to {counts.max()} {what}, {field} is {limit}: {worst:.0%} of all boxes cannot be found"
        yield Symptom("too_many_boxes", 0.3 + 0.6 * worst, evidence, f"Raise {field} to {counts.max()}.")


def _collapsed(seen: _Seen, class_map: ClassMap, train: TrainConfig) -> Iterator[Symptom]:
    """Every image gets the same answer: the place of its best detection, or the class of the best ones."""
    advice = f"Training collapsed: lower train.lr (now {train.lr:g}), or lengthen train.warmup_epochs."
    if len(seen.best) >= 5 and (share := _around_median(seen.best)) >= 0.9 and _around_median(seen.places) < 0.5:
        x1, y1, x2, y2 = np.median(seen.best, axis=0)
        evidence = f"the best detection of {share:.0%} of the images is at x {x1:.2f}-{x2:.2f}, y {y1:.2f}-{y2:.2f}"
        yield Symptom("one_place", 0.85 * share, f"{evidence} of the image{seen.note}", advice)
    found, wanted = (np.bincount(labels, minlength=len(class_map)) for labels in (seen.top_labels, seen.labels))
    label = int(found.argmax())
    share, expected = float(found[label] / max(found.sum(), 1)), wanted[label] / wanted.sum()
    if share >= 0.95 and expected < 0.5:
        evidence = f"{share:.0%} of the best detections are {class_map.names[label]}, {expected:.0%} of the boxes are"
        yield Symptom("one_class", 0.8 * share, evidence + seen.note, advice)


def _small(seen: _Seen, model: ModelConfig) -> Iterator[Symptom]:
    small = seen.sizes < model.patch_size
    found = float((seen.names[small] >= 0).mean()) if small.any() else 1.0
    if small.mean() >= 0.5 and found < 0.5:
        evidence = (
            f"{small.mean():.0%} of the boxes are smaller than a patch of {model.patch_size} px at {model.resolution} "
            f"px (median {np.median(seen.sizes):.1f} px), {found:.0%} of these are found{seen.note}"
        )
        advice = f"Raise model.resolution (now {model.resolution}), or cut the images of dataset.uri into tiles."
        yield Symptom("small_boxes", (0.3 + 0.5 * float(small.mean())) * (1 - found), evidence, advice)


def _stage(seen: _Seen, class_map: ClassMap, train: TrainConfig) -> Symptom:
    """How far detection came; always one, so that no low mAP goes without a word."""
    if seen.best_score < SCORE:
        advice = "Let train.epochs be many; if it lasts, raise train.lr."
        if train.cls_loss_coef == 0:
            advice = "Raise train.cls_loss_coef: at 0 nothing moves the scores."
        return Symptom("scores_low", 0.68, f"the best score is {seen.best_score:.4f}, below {SCORE:g}", advice)
    if seen.recall < 0.5:
        evidence = f"recall at IoU 0.5 and score {SCORE:g} is {seen.recall:.2f}, whatever the label{seen.note}"
        return Symptom("boxes_missed", 0.4 * (1 - seen.recall), evidence, "Let train.epochs be many.")
    if seen.right < 0.5:
        advice = "Let train.epochs be many, and check the labels of these classes in dataset.uri."
        return Symptom("classes_confused", 0.45, seen.naming(class_map), advice)
    evidence = f"recall is {seen.recall:.2f} at IoU 0.5, {seen.right:.0%} of it under the right label{seen.note}"
    advice = "False detections score as high: let train.epochs be many, and look for missing boxes in dataset.uri."
    return Symptom("false_detections", 0.4, evidence, advice)


class _Seen(NamedTuple):
    """N annotated boxes (no crowd regions) of I images, and the detections there; places as fractions of the image."""

    labels: Integers  # (N,)
    sizes: Boxes  # (N,) square root of the area, in pixels of the network's input
    places: Boxes  # (N, 4) x1, y1, x2, y2
    names: Integers  # (N,) label of the best-scored detection at IoU >= 0.5 and score >= SCORE; -1: none
    best: Boxes  # (at most I, 4) the best detection of each image that has one
    top_labels: Integers  # of each image's best detections, as many as it has boxes
    best_score: float
    confusion: Integers  # (classes, classes) boxes found: label x name
    note: str  # which images these are; empty for all

    @property  # of the boxes, under whatever label
    def recall(self) -> float:
        return float((self.names >= 0).mean())

    @property  # share of the boxes found
    def right(self) -> float:
        return float(np.trace(self.confusion) / max(self.confusion.sum(), 1))

    def naming(self, class_map: ClassMap) -> str:
        wrong = self.confusion * ~np.eye(len(self.confusion), dtype=np.bool_)
        label, name = divmod(int(wrong.argmax()), len(wrong))
        return (
            f"{self.recall:.0%} of the boxes are found, {self.right:.0%} of these under the right label; "
            f"{wrong.max()} of {self.confusion[label].sum()} {class_map.names[label]} are called "
            f"{class_map.names[name]}{self.note}"
        )


def _look(table: AnnotationTable, detections: Detections, classes: int, resolution: int) -> _Seen:
    """The images that have boxes; there is at least one."""
    annotated = np.unique(np.repeat(np.arange(len(table)), table.counts)[~table.crowd])
    count = min(len(annotated), MAX_IMAGES)
    images = annotated[np.linspace(0, len(annotated) - 1, count).round().astype(np.int64)]
    order = np.lexsort((-detections.scores, detections.images))  # by image, best first
    starts, ends = (np.searchsorted(detections.images[order], images, side=side) for side in ("left", "right"))
    parts: list[tuple[NDArray[Any], ...]] = []
    for image, start, end in zip(images.tolist(), starts.tolist(), ends.tolist(), strict=True):
        rows = np.arange(table.offsets[image], table.offsets[image + 1])
        rows, found = rows[~table.crowd[rows]], order[start:end]
        extent = np.array([table.widths[image], table.heights[image]] * 2, dtype=np.float64)
        places, found_places = table.boxes[rows] / extent, detections.boxes[found] / extent
        sizes = resolution * np.sqrt(np.prod(places[:, 2:] - places[:, :2], axis=1))
        hits = (_iou(places, found_places) >= 0.5) & (detections.scores[found] >= SCORE)  # (boxes, detections)
        hits = np.pad(hits, ((0, 0), (0, 1)), constant_values=True)  # behind all others: nothing
        names = np.append(detections.labels[found], -1)[hits.argmax(axis=1)]
        top_labels = detections.labels[found[: len(rows)]]
        parts.append((table.labels[rows], sizes, places, names, found_places[:1], top_labels))
    labels, sizes, places, names, best, top_labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    pairs = (labels * classes + names)[names >= 0]
    confusion = np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
    note = "" if count == len(annotated) else f" (in {count:,} of the {len(annotated):,} images with boxes)"
    best_score = float(detections.scores.max(initial=0.0))
    return _Seen(labels, sizes, places, names, best, top_labels, best_score, confusion, note)


def _iou(a: Boxes, b: Boxes) -> Boxes:
    """(A, B) overlaps of boxes (A, 4) and (B, 4) x1, y1, x2, y2; 0 where neither has an area."""
    sides = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    common = np.prod(np.clip(sides, 0.0, None), axis=-1)
    union = np.prod(a[:, 2:] - a[:, :2], axis=1)[:, None] + np.prod(b[:, 2:] - b[:, :2], axis=1) - common
    return np.asarray(np.divide(common, union, out=np.zeros_like(common), where=union > 0))


def _around_median(boxes: Boxes) -> float:
    """Share of the boxes that are about the same one."""
    return float((_iou(boxes, np.median(boxes, axis=0)[None]) >= 0.7).mean())
