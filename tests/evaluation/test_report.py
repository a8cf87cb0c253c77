"""report.html of an evaluation."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rfdetr_core import html
from rfdetr_core.data.annotations import ClassMap
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.evaluation import report as module
from rfdetr_core.evaluation.detections import Detections
from rfdetr_core.evaluation.metrics import coco_metrics
from rfdetr_core.evaluation.report import evaluation_html
from rfdetr_core.evaluation.samples import LONGEST_SIDE, MIN_SCORE, draw_sample
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


def page_of(
    dataset: PreparedDataset,
    *,
    champion: dict[str, Any] | None = None,
    detections: Detections | None = None,
    samples: int = 12,
) -> str:
    split = dataset.split("valid")
    found = perfect(dataset) if detections is None else detections
    metrics = coco_metrics(split.table, dataset.class_map, found, max_dets=500)
    candidate = {**metrics.to_json(), "source": "ema", "epoch": 4, "weights_sha256": "0" * 64}
    content = {"candidate": candidate, "champion": champion, "split": "valid", "images": len(split), "test_digest": "x"}
    return evaluation_html(
        name="<b>cells</b>",
        document=content,
        metrics=metrics,
        split=split,
        class_map=dataset.class_map,
        detections=found,
        sample_images=samples,
    )


def test_the_page_stands_alone_and_escapes_every_name(dataset: PreparedDataset) -> None:
    page = page_of(dataset)
    seen = Page(page)
    assert "http" not in page and "src=" in page
    assert all(source.startswith('src="data:image/jpeg;base64,') for source in re.findall(r'src="[^"]*', page))
    assert {"script", "link", "iframe", "b", "i"}.isdisjoint(seen.tags)
    for name in (*NAMES, "Evaluation of <b>cells</b>", "<i>0&.png"):
        assert name in seen.text
    assert len(page) < 8_000_000
    assert page.startswith("<!doctype html>") and page.count("<svg") == page.count("</svg>") == 1


def test_it_says_first_how_good_the_model_is(dataset: PreparedDataset) -> None:
    text = Page(page_of(dataset)).text
    assert "mAP 1.000, mAP50 1.000 on valid; there is no champion to compare with" in text
    assert "6 images of the valid split, ema weights of epoch 5" in text
    assert "f1 at 500 detections" in text and "map at 500 detections" in text


@pytest.mark.parametrize(
    ("champion", "word", "kind"),
    [(0.9, "better than", "good"), (1.0, "equal to", "warn"), (1.1, "worse than", "warn")],
)
def test_the_champion_stands_beside(dataset: PreparedDataset, champion: float, word: str, kind: str) -> None:
    split = dataset.split("valid")
    row = coco_metrics(split.table, dataset.class_map, Detections.concatenate([]), max_dets=500).to_json()
    own = coco_metrics(split.table, dataset.class_map, perfect(dataset), max_dets=500).map
    row |= {"map": own + champion - 1, "version": "run-7"}
    row["per_class"] = {NAMES[0]: {"ap": 0.123}}  # it may know fewer classes
    page = page_of(dataset, champion=row)
    text = Page(page).text
    assert f"on valid: {word} the champion run-7 ({champion * -1 + 1:+.3f} mAP)" in text
    assert f'<p class="verdict {kind}">' in page
    assert "0.123" in text and "champion AP" in text


def test_without_ground_truth_it_says_so(dataset: PreparedDataset, tmp_path: Path) -> None:
    write_dataset(tmp_path / "source", None, document(annotations=[]))
    empty = prepared(tmp_path / "source", tmp_path / "prepared")
    page = page_of(empty, detections=Detections.concatenate([]))
    assert "No metric is defined: the valid split has no boxes" in Page(page).text
    assert "-1.000" not in page and page.count("<polyline") == 0


def test_pictures_are_spread_and_the_same_each_time(dataset: PreparedDataset) -> None:
    page = page_of(dataset, samples=3)
    assert re.findall(r"<figcaption>([^<]*)", page) == [
        "&lt;i&gt;0&amp;.png",
        "&lt;i&gt;2&amp;.png",
        "&lt;i&gt;5&amp;.png",
    ]
    assert page_of(dataset, samples=3) == page
    assert page_of(dataset, samples=0).count("<figure>") == 0
    assert page_of(dataset, samples=100).count("<figure>") == 6
    first = re.findall(r"base64,([^\"]*)", page)[0]
    assert Image.open(io.BytesIO(base64.b64decode(first))).size == (200, 150)


def test_pictures_stop_before_the_page_grows_too_large(
    dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PICTURE_BYTES", 50_000)  # noise: about 30 kB each
    page = page_of(dataset)
    shown = page.count("<figure>")
    assert 1 < shown < 6
    assert f"{6 - shown} more are left out" in Page(page).text


def test_many_classes_fit_into_one_chart() -> None:
    table, class_map, detections = random_problem(3, images=30, labels=40, detections=2000)
    metrics = coco_metrics(table, class_map, detections, max_dets=100)
    chart = module._curves(metrics, class_map)
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


def test_a_sample_shows_what_was_annotated_and_what_was_found(tmp_path: Path) -> None:
    dataset = grey_dataset(tmp_path, 400, 300)
    rows = [(0, 1, 0.9, (250, 200, 350, 280)), (0, 0, MIN_SCORE - 0.01, (300, 20, 380, 60)), (1, 0, 0.9, (5, 5, 60, 8))]
    picture = draw_sample(dataset.split("train"), 0, detections_of(rows), classes(2))
    pixels = np.asarray(picture)
    assert picture.size == (400, 300)
    assert pixels[100, 10].tolist() == pixels[10, 100].tolist() == [255, 255, 255]  # annotated
    colour = tuple(int(html.COLOURS[1][i : i + 2], 16) for i in (1, 3, 5))
    assert tuple(pixels[240, 250].tolist()) == tuple(pixels[200, 340].tolist()) == colour  # found
    assert pixels[40, 300].tolist() == [90, 90, 90]  # too unsure to be shown
    assert pixels[8, 30].tolist() == [90, 90, 90]  # of another image
    lettered = (pixels[186:200, 250:340] == 255).all(axis=2)
    assert lettered.any()


def test_a_large_sample_is_reduced_with_its_boxes(tmp_path: Path) -> None:
    dataset = grey_dataset(tmp_path, 960, 480)
    picture = draw_sample(dataset.split("train"), 0, Detections.concatenate([]), ClassMap((1,), ("a",)))
    assert picture.size == (LONGEST_SIDE, 240)
    white = np.nonzero((np.asarray(picture) == 255).all(axis=2))
    assert (white[1].min(), white[1].max(), white[0].min(), white[0].max()) == (5, 245, 5, 125)


def test_a_thread_of_an_image_can_be_drawn(tmp_path: Path) -> None:
    write_dataset(tmp_path / "s", document([image_row(1, "a.png", 2000, 1)], [annotation(bbox=(0, 0, 100, 1))]))
    dataset = prepared(tmp_path / "s", tmp_path / "p")
    picture = draw_sample(dataset.split("train"), 0, Detections.concatenate([]), classes(1))
    assert picture.size == (LONGEST_SIDE, 1)
