"""report.html of an evaluation."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageColor

from rfdetr_core import html
from rfdetr_core.data.annotations import ClassMap
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.evaluation import report as module
from rfdetr_core.evaluation.analysis import Outcome, confusion, error_analysis, outcome
from rfdetr_core.evaluation.comparison import compare
from rfdetr_core.evaluation.detections import Detections
from rfdetr_core.evaluation.measure import Measurement
from rfdetr_core.evaluation.metrics import CocoMetrics, coco_metrics
from rfdetr_core.evaluation.report import evaluation_html, verdict
from rfdetr_core.evaluation.samples import ANNOTATED, LONGEST_SIDE, MISSED, RIGHT, WRONG, draw_sample
from tests.data.helpers import annotation, document, image_row, prepared, write_dataset
from tests.data.test_report import Page
from tests.evaluation.helpers import classes, detections_of, random_problem

NAMES = ("<b>bold</b>", 'quote " & amp', "<script>alert(1)</script>")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """Six pictures of noise, some with a box, of classes with hostile names."""
    folder = tmp_path_factory.mktemp("report")
    rows = [image_row(i + 1, f"<i>{i}&.png", 200, 150) for i in range(6)]
    boxes = [annotation(i + 1, i + 1, i % 2 + 1, (20, 20, 100, 80)) for i in range(4)]
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(NAMES)]
    write_dataset(folder / "source", document(rows, boxes, categories), document(rows, boxes, categories))
    return prepared(folder / "source", folder / "prepared")


def perfect(dataset: PreparedDataset) -> Detections:
    table = dataset.split("valid").table
    return Detections(
        np.repeat(np.arange(len(table)), table.counts), table.labels, np.full(len(table.labels), 0.9), table.boxes
    )


LATENCY = {
    "milliseconds": 12.5, "p90_milliseconds": 14.0, "images_per_second": 80.0, "batch_size": 1, "runs": 20,
    "device": "cpu", "device_name": "a processor", "threads": 2, "precision": "float32",
}  # fmt: skip


def row(metrics: CocoMetrics, table: Any, class_map: ClassMap, detections: Detections) -> dict[str, Any]:
    return {
        **metrics.to_json(), "source": "ema", "epoch": 4, "weights_sha256": "0" * 64, "weights_bytes": 3 * 2**20,
        "parameters": 1234, "variant": "nano", "resolution": 64, "classes": list(class_map.names),
        "missing_classes": [], "dropped_classes": [], "latency": LATENCY,
        "errors": error_analysis(table, class_map, detections, max_dets=500),
    }  # fmt: skip


def measurement(
    dataset: PreparedDataset,
    detections: Detections | None = None,
    champion: Detections | None = None,
    *,
    samples: int = 50,
    split: str = "valid",
    **document: Any,
) -> Measurement:
    """As `measure` makes it, of detections instead of models."""
    part, class_map = dataset.split(split), dataset.class_map
    table = part.table
    found = perfect(dataset) if detections is None else detections
    metrics = coco_metrics(table, class_map, found, max_dets=500)
    seen = outcome(table, len(class_map), found, score=max(metrics.f1_threshold, 0.0), max_dets=500)
    content: dict[str, Any] = {
        "candidate": row(metrics, table, class_map, found),
        "champion": None,
        "comparison": None,
        "split": split,
        "split_note": None,
        "images": len(part),
        "boxes": len(table.boxes),
        "boxes_by_size": {"small": 0, "medium": 4, "large": 0},
    }
    if champion is not None:
        theirs = coco_metrics(table, class_map, champion, max_dets=500)
        content["champion"] = {"version": "run-7", **row(theirs, table, class_map, champion)}
        result = compare(table, (metrics, found), (theirs, champion), samples=samples, seed=0)
        content["comparison"] = {"champion": "run-7", **result}
    return Measurement(
        {**content, **document}, confusion(table, class_map, seen), part, class_map, metrics, found, seen, champion
    )


def page_of(dataset: PreparedDataset, detections: Detections | None = None, samples: int = 12, **more: Any) -> str:
    return evaluation_html("<b>cells</b>", measurement(dataset, detections, **more), sample_images=samples)


def without(detections: Detections, *rows: int) -> Detections:
    """All but some of them."""
    return detections.select(np.setdiff1d(np.arange(len(detections.scores)), rows))


def test_the_page_stands_alone_and_escapes_every_name(dataset: PreparedDataset) -> None:
    page = page_of(dataset)
    seen = Page(page)
    assert "http" not in page and "src=" in page
    assert all(source.startswith('src="data:image/jpeg;base64,') for source in re.findall(r'src="[^"]*', page))
    assert {"script", "link", "iframe", "b", "i"}.isdisjoint(seen.tags)
    for name in (*NAMES, "Evaluation of <b>cells</b>", "<i>0&.png"):
        assert name in seen.text
    assert len(page) < 8_000_000
    assert page.startswith("<!doctype html>") and page.count("<svg") == page.count("</svg>") == 2


def test_it_says_first_how_good_the_model_is(dataset: PreparedDataset) -> None:
    text = Page(page_of(dataset)).text
    assert "mAP 1.000, mAP50 1.000 on valid; there is no champion to compare with" in text
    assert "6 images with 4 boxes of the valid split; ema weights of epoch 5, SHA-256 0000" in text
    assert "F1 at 500 detections" in text and "mAP at 500 detections" in text
    assert "Against the champion" not in text and "Not the split" not in text
    assert "12.500" in text and "cpu (a processor), 2 threads, float32" in text


def kind_of(page: str) -> str:
    """Of the first verdict."""
    return re.findall(r'<p class="verdict (\w+)">', page)[0]


def test_a_model_that_finds_nothing_is_no_good_even_without_a_champion(dataset: PreparedDataset) -> None:
    """Beside no other model every model is the best one."""
    nothing = page_of(dataset, Detections.concatenate([]))
    assert "the model finds nothing" in Page(nothing).text and kind_of(nothing) == "bad"
    little = page_of(dataset, replace(perfect(dataset), labels=np.full(4, 2)))
    assert kind_of(little) == "bad"
    document = measurement(dataset).document
    document["candidate"] |= {"map": 0.02, "map50": 0.06}
    assert "too little to be of use" in verdict(document) and kind_of(verdict(document)) == "warn"
    assert kind_of(page_of(dataset)) == "good"


@pytest.mark.parametrize(
    ("champion", "word", "kind"),
    [((0, 1, 2, 3), "better than", "good"), ((), "equal to", "warn")],
)
def test_the_champion_stands_beside(dataset: PreparedDataset, champion: Any, word: str, kind: str) -> None:
    ours = perfect(dataset)
    page = page_of(dataset, champion=without(ours, *champion))
    text = Page(page).text
    assert f"on valid: {word} the champion run-7" in text and kind_of(page) == kind
    assert "Against the champion run-7" in text and "50 draws of the 6 images" in text
    assert "95 % interval" in text and "champion AP" in text


def test_a_worse_model_is_called_so(dataset: PreparedDataset) -> None:
    page = page_of(dataset, without(perfect(dataset), 0, 1), champion=perfect(dataset))
    assert "on valid: worse than the champion run-7 (-0." in Page(page).text and kind_of(page) == "warn"


def test_a_gain_that_may_be_luck_is_not_shown_as_one(dataset: PreparedDataset) -> None:
    ours = perfect(dataset)
    page = page_of(dataset, champion=without(ours, 0))
    assert "it may be luck" in Page(page).text and kind_of(page) == "warn"
    document = measurement(dataset, champion=without(ours, 0), samples=0).document
    assert "interval" not in verdict(document) and kind_of(verdict(document)) == "good"


def test_it_names_classes_that_the_champion_does_not_share(dataset: PreparedDataset) -> None:
    measured = measurement(dataset, champion=perfect(dataset))
    measured.document["champion"] |= {"missing_classes": [NAMES[0]], "dropped_classes": ["wolf"]}
    text = Page(evaluation_html("x", measured, sample_images=0)).text
    assert f"The champion does not know {NAMES[0]}." in text
    assert "The champion knows, and this dataset lacks, wolf." in text


def test_another_split_than_asked_for_is_said_at_the_top(dataset: PreparedDataset) -> None:
    text = Page(page_of(dataset, split_note="measured on valid, because no image of test has a box")).text
    assert "Not the split that was asked for: measured on valid" in text
    assert text.index("Not the split") < text.index("COCO metrics")


def test_the_worst_and_the_best_pictures_are_shown_the_same_each_time(dataset: PreparedDataset) -> None:
    wrong = without(perfect(dataset), 3)
    page = page_of(dataset, wrong, samples=2)
    names = [caption.split(" · ") for caption in re.findall(r"<figcaption>([^<]*)", page)]
    assert [int(re.findall(r"\d", name)[0]) for name, *_ in names] == [3, 0, 0, 1]
    assert names[0][1:] == ["F1 0.00", "1 error"]
    assert page.index("Worst images") < page.index("Best images")
    assert page_of(dataset, wrong, samples=2) == page
    assert page_of(dataset, samples=0).count("<figure>") == 0
    assert page_of(dataset, samples=100).count("<figure>") == 6  # none of them twice
    first = re.findall(r"base64,([^\"]*)", page)[0]
    assert Image.open(io.BytesIO(base64.b64decode(first))).size == (320, 240)


def test_confusion_and_errors_have_their_tables(dataset: PreparedDataset) -> None:
    ours = perfect(dataset)
    swapped = replace(ours, labels=np.array([1, 1, 0, 1]))
    seen = Page(page_of(dataset, swapped))
    assert "Rows: annotated; columns: found" in seen.text and "right place, another class" in seen.text
    assert "&lt;b&gt;bold&lt;/b&gt; → quote &quot; &amp; amp: 1" in page_of(dataset, swapped)


def test_pictures_stop_before_the_page_grows_too_large(
    dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [len(figure) for figure in re.findall(r"<figure>.*?</figure>", page_of(dataset))]
    monkeypatch.setattr(module, "PICTURE_BYTES", int(3.5 * max(sizes)))  # they are of noise, and differ little
    page = page_of(dataset)
    assert page.count("<figure>") == 3  # one of the worst, for which half of the room is kept, and two of the best
    assert "2 more are left out" in Page(page).text and "1 more are left out" in Page(page).text


def test_many_classes_fit_into_one_chart() -> None:
    table, class_map, detections = random_problem(3, images=30, labels=40, detections=2000)
    metrics = coco_metrics(table, class_map, detections, max_dets=100)
    chart = module._precision_curves(metrics, class_map)
    assert module._f1_curves(metrics, class_map).count("<polyline") == module.CURVES_SHOWN  # and their mean
    present = sum(row["boxes"] > 0 for row in metrics.per_class.values())
    assert present > 12
    assert chart.count("<polyline") == module.CURVES_SHOWN
    assert f"{present - module.CURVES_SHOWN} less frequent classes are not drawn" in chart
    drawn = {name for name in class_map.names if f">{name} (AP50" in chart}
    least = min(metrics.per_class[name]["boxes"] for name in drawn)
    assert all(row["boxes"] <= least for name, row in metrics.per_class.items() if name not in drawn)
    assert len(chart) < 60_000


def test_a_chart_draws_its_points() -> None:
    chart = html.line_chart({"a": ([0.0, 1.0], [1.0, 0.5])}, x="recall", y="precision")
    assert re.findall(r'points="([^"]*)"', chart) == ["50.0,10.0 510.0,155.0"]
    assert ">recall<" in chart and ">precision<" in chart and ">a<" in chart
    twelve = html.line_chart({str(i): ([0.0], [0.0]) for i in range(12)}, x="x", y="y")
    assert twelve.count("<polyline") == 12 and f'stroke="{html.COLOURS[0]}" stroke-width="2"' in twelve


def test_tables_align_numbers_and_dash_what_is_undefined() -> None:
    table = html.table(["name", "value"], [["<x>", 0.12345], ["y", -1.0], ["z", None], ["w", 12345]])
    assert "<td>&lt;x&gt;</td>" in table
    assert re.findall(r'<td class="number">([^<]*)', table) == ["0.123", "–", "–", "12,345"]
    assert html.table(["a", "b"], []) == "<table><tr><th>a</th><th>b</th></tr></table>"
    assert 'class="number"' not in html.table(["a"], [[True], ["text"]])


# ---- pictures ---------------------------------------------------------------------------------------------


def grey_dataset(folder: Path, width: int, height: int) -> PreparedDataset:
    content = document([image_row(1, "a.png", width, height)], [annotation(bbox=(10, 10, width / 2, height / 2))])
    write_dataset(folder / "source", content)
    Image.new("RGB", (width, height), (90, 90, 90)).save(folder / "source" / "train" / "a.png")
    return prepared(folder / "source", folder / "prepared")


def outcome_of(dataset: PreparedDataset, rows: Any) -> Outcome:
    return outcome(dataset.split("train").table, 2, detections_of(rows), score=0.3, max_dets=100)


def rgb(colour: str) -> list[int]:
    return list(ImageColor.getrgb(colour))


def test_a_sample_shows_what_was_annotated_found_and_missed(tmp_path: Path) -> None:
    dataset = grey_dataset(tmp_path, 400, 300)
    rows = [(0, 1, 0.9, (250, 200, 350, 280)), (0, 0, 0.29, (300, 20, 380, 60))]
    pixels = np.asarray(draw_sample(dataset.split("train"), 0, outcome_of(dataset, rows), classes(2)))
    assert pixels.shape == (300, 400, 3)
    assert pixels[100, 10].tolist() == pixels[160, 100].tolist() == rgb(MISSED)
    assert pixels[240, 250].tolist() == pixels[200, 340].tolist() == rgb(WRONG)
    assert pixels[40, 300].tolist() == [90, 90, 90]  # too unsure to be shown
    assert (pixels[186:200, 250:340] == 255).all(axis=2).any()  # its name
    right = [(0, 0, 0.9, (14, 14, 210, 160))]
    pixels = np.asarray(draw_sample(dataset.split("train"), 0, outcome_of(dataset, right), classes(2)))
    assert pixels[100, 10].tolist() == rgb(ANNOTATED) and pixels[100, 14].tolist() == rgb(RIGHT)


def test_a_large_sample_is_reduced_with_its_boxes(tmp_path: Path) -> None:
    dataset = grey_dataset(tmp_path, 960, 480)
    rows = [(0, 0, 0.9, (10, 10, 490, 250))]
    picture = draw_sample(dataset.split("train"), 0, outcome_of(dataset, rows), ClassMap((1,), ("a",)))
    assert picture.size == (LONGEST_SIDE, 240)
    green = np.nonzero((np.asarray(picture) == rgb(RIGHT)).all(axis=2))
    assert (green[1].min(), green[1].max(), green[0].max()) == (4, 245, 125)


def test_a_thread_of_an_image_can_be_drawn(tmp_path: Path) -> None:
    write_dataset(tmp_path / "s", document([image_row(1, "a.png", 2000, 1)], [annotation(bbox=(0, 0, 100, 1))]))
    dataset = prepared(tmp_path / "s", tmp_path / "p")
    picture = draw_sample(dataset.split("train"), 0, outcome_of(dataset, []), classes(1))
    assert picture.size == (LONGEST_SIDE, 1)
