"""README.md of a version in the registry: what the model is, how good, how it is used, and what made it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rfdetr_core.promotion import Verdict, served_latency

_CLASSES_SHOWN = 100


def model_card(
    name: str,
    *,
    provenance: Mapping[str, Any],
    metrics: Mapping[str, Any],
    parity: Mapping[str, Any],
    latency: Mapping[str, Any],
    verdict: Verdict,
) -> str:
    """The page, in Markdown; every number is one of the files beside it."""
    parts = (
        _head(name, provenance, metrics, verdict),
        _quality(metrics),
        _use(metrics, parity, latency),
        _origin(provenance),
        _limits(metrics),
    )
    return "\n".join(line for part in parts for line in part) + "\n"


def _head(name: str, provenance: Mapping[str, Any], metrics: Mapping[str, Any], verdict: Verdict) -> Iterator[str]:
    candidate = metrics["candidate"]
    yield from (f"# {name}, version {provenance['run']}", "")
    size = f"{candidate.get('parameters', 0) / 1e6:.1f} M parameters, {candidate.get('resolution')} pixels square"
    yield f"An RF-DETR object detector ({candidate.get('variant')}, {size}) of"
    yield f"{len(candidate['per_class'])} classes, retrained by this pipeline."
    yield from ("", f"Gate at its registration: **{verdict.outcome}**: {verdict.reason}", "")


def _quality(metrics: Mapping[str, Any]) -> Iterator[str]:
    candidate, champion = metrics["candidate"], metrics["champion"]
    yield from ("## How good it is", "")
    yield f"On the {metrics['images']} images of the {metrics['split']} split (`metrics.json`, `report.html`)."
    yield from ("", *_table(["", "this version", *([f"{champion['version']}"] if champion else [])], _scores(metrics)))
    yield from ("", f"At most {candidate['max_dets']} detections per image and class.", "")
    rows = [
        [
            _cell(name),
            row["boxes"],
            _number(row["ap"]),
            _number(row["ap50"]),
            _number(row["f1"]),
            _number(row["f1_threshold"]),
        ]
        for name, row in candidate["per_class"].items()
    ]
    yield from _table(["class", "boxes", "AP", "AP50", "F1", "at score"], rows[:_CLASSES_SHOWN])
    if len(rows) > _CLASSES_SHOWN:
        yield from ("", f"{len(rows) - _CLASSES_SHOWN} more in `metrics.json`.")
    yield ""


def _scores(metrics: Mapping[str, Any]) -> Iterator[list[Any]]:
    titles = {"map": "AP 50:95", "map50": "AP50", "map75": "AP75", "mar": "AR 50:95", "f1": "best mean F1"}
    for key, title in titles.items():
        yield [title, *(_number(row[key]) for row in (metrics["candidate"], metrics["champion"]) if row)]


def _use(metrics: Mapping[str, Any], parity: Mapping[str, Any], latency: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## How it is used", "")
    yield "`model.onnx` holds class names, input size, normalisation and thresholds in its metadata; the program"
    yield "`examples/onnx_inference.py` of the pipeline's repository reads pictures with it. `model.safetensors` and"
    yield "`model.json` are the weights without pickle, `checkpoint_best_total.pth` continues training."
    yield ""
    yield f"Detections with a score of at least {_number(metrics['candidate']['f1_threshold'])} give the best mean F1."
    served = served_latency(latency)
    if served is not None:
        cores = max(row["threads"] for row in latency["rows"] if row["runtime"] == "onnxruntime")
        yield f"ONNX Runtime took {served:.1f} ms per image on {cores} threads (`latency.json`)."
    yield f"Its detections differ from those of the trained model by at most {parity['logits']:.1e} (logits) and"
    yield f"{parity['boxes']:.1e} (boxes, in fractions of the image) on {parity['images']} images (`parity.json`)."
    yield ""


def _origin(provenance: Mapping[str, Any]) -> Iterator[str]:
    dataset, code, parent = provenance["dataset"], provenance["code"], provenance["parent"]
    started = (parent["pretrain_weights"] or {}).get("uri", "random weights")
    rows = [
        ["run", provenance["run_uri"]],
        ["dataset", f"`{dataset['digest']}`"],
        ["from", dataset["source"]],
        ["training began with", started],
        ["compared with", parent["champion"] or "no champion"],
        ["weights", f"`{provenance['model']['weights_sha256']}`, {provenance['model']['source']}"],
        ["seed", provenance["seed"]],
        ["code", f"{code['version']}, {code['revision'] or 'unknown revision'}"],
    ]
    yield from ("## What made it", "", *_table(["", ""], ([key, _cell(value)] for key, value in rows)))
    yield from ("", "All of it is in `provenance.json` and `config.yaml`.", "")


def _limits(metrics: Mapping[str, Any]) -> Iterator[str]:
    candidate = metrics["candidate"]
    unseen = [name for name, row in candidate["per_class"].items() if row["boxes"] == 0]
    yield from ("## What is not known", "")
    yield "The numbers hold for images like those of the split; nothing was measured on others."
    if unseen:
        yield f"No image of the split shows: {', '.join(map(_cell, unseen[:20]))}{', …' if len(unseen) > 20 else ''}."
    if candidate.get("missing_classes"):
        yield f"It does not know these classes of the dataset: {', '.join(map(_cell, candidate['missing_classes']))}."
    yield "Licence and terms of use of the images are the owner's of the dataset; the pipeline does not know them."


def _table(header: Sequence[str], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"


def _number(value: float) -> str:
    return f"{value:.3f}" if value >= 0 else "not defined"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("<", "&lt;")
