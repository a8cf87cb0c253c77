"""report.json and report.html of a dataset."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from rfdetr_core.data.checks import CHECKS
from rfdetr_core.data.findings import Report
from rfdetr_core.data.preparing import PrepareOptions, write_prepared
from rfdetr_core.data.report import ROWS_SHOWN, report_html, report_json
from rfdetr_core.data.statistics import split_statistics
from tests.data.helpers import annotation, document, image_row, validated, write_dataset


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def test_a_usable_dataset(tmp_path: Path) -> None:
    write_dataset(
        tmp_path / "s",
        document(
            [image_row(), image_row(2, "<b>bold</b>.png")],
            [annotation(1), annotation(2, category=2), annotation(3, bbox=(5, 5, 0, 9))],
            [{"id": 1, "name": "<script>alert(1)</script>"}, {"id": 2, "name": 'a "quoted" & one'}],
        ),
        document(categories=[]),
    )
    class_map, splits, report = validated(tmp_path / "s")
    (tmp_path / "p").mkdir()
    content = write_prepared(tmp_path / "p", class_map, splits, PrepareOptions(None), source="s3://b/<data>")

    found = report_json("s3://b/<data>", report, content)
    assert found["usable"] is True
    assert found["classes"] == class_map.to_json() and found["splits"] == content["splits"]
    assert {f["code"]: f["count"] for f in found["findings"]} == {
        "box-empty": 1, "class-absent": 1, "no-objects": 1
    }  # fmt: skip

    html = report_html("s3://b/<data>", report, content)
    page = Page(html)
    assert "script" not in page.tags and "http" not in html and "<b>bold" not in html
    for text in ("<script>alert(1)</script>", 'a "quoted" & one', "<b>bold</b>.png", "s3://b/<data>"):
        assert text in page.text
    assert "Usable: 0 errors, 2 warnings, 1 note" in page.text
    assert "train/a.png: annotation 3 [5.0, 5.0, 0.0, 9.0]" in page.text


def test_errors_come_first_and_open() -> None:
    report = Report()
    report.add("crowd", ["train"])
    report.add("box-empty", ["row"])
    report.add("unknown-image", [f"row {i}" for i in range(ROWS_SHOWN + 3)])
    html = report_html("source", report, None)
    text = Page(html).text
    assert text.index("unknown-image") < text.index("box-empty") < text.index("crowd")
    assert html.count("<details open>") == 1
    assert f"Not usable: {ROWS_SHOWN + 3} errors, 1 warning, 1 note" in text
    assert f"row {ROWS_SHOWN - 1}" in text and f"row {ROWS_SHOWN} " not in text
    assert "… 3 more in report.json" in text
    assert report_json("source", report, None)["usable"] is False
    assert len(report_json("source", report, None)["findings"][2]["rows"]) == ROWS_SHOWN + 3


def test_a_finding_of_as_many_rows_as_are_shown_has_no_more() -> None:
    report = Report()
    report.add("box-empty", [f"row {i}" for i in range(ROWS_SHOWN)])
    assert "more in report.json" not in report_html("source", report, None)


def test_a_dataset_that_could_not_even_be_read_is_not_called_usable() -> None:
    """The reader raises before anything is found."""
    assert report_json("source", Report(), None)["usable"] is False
    text = Page(report_html("source", Report(), None)).text
    assert "Not usable: 0 errors" in text and "could not be read" in text
    assert "Nothing to remark" not in text


def test_the_page_stays_below_5_mb_whatever_it_tells(tmp_path: Path) -> None:
    """Long rows of every code, a thousand classes, and large pictures in which nothing is alike."""
    rows = [image_row(i + 1, f"{i}.png", 320, 320) for i in range(40)]
    classes = [{"id": i + 1, "name": f"{i} {'long name ' * 20}"} for i in range(1000)]
    boxes = [annotation(i + 1, i % 40 + 1, i % 40 + 1) for i in range(80)]
    write_dataset(tmp_path / "s", document(rows, boxes, classes), document(rows[:2], boxes[:1], classes))
    class_map, splits, report = validated(tmp_path / "s")
    document_of = {
        "classes": class_map.to_json(),
        "splits": {name: split_statistics(split.table, class_map) for name, split in splits.items()},
    }
    for code in CHECKS:
        report.add(code, [f"train/{i}.png: {'x' * 5000}" for i in range(300)])
    html = report_html("source", report, document_of, class_map, splits)
    assert 3_000_000 < len(html.encode()) < 5_000_000
    assert "… 500 more in report.json" in html and "data:image/jpeg" in html


def test_pictures_of_each_class_and_of_the_worst_images(tmp_path: Path) -> None:
    rows = [image_row(i + 1, f"{i}.png") for i in range(6)]
    boxes = [
        annotation(1, 1, 1),
        annotation(2, 2, 2),
        annotation(3, 4, 1, (5, 5, 0, 9)),
        annotation(4, 4, 1, (5, 5, 9, 0)),
    ]
    write_dataset(tmp_path / "s", document(rows, boxes))
    class_map, splits, report = validated(tmp_path / "s")
    html = report_html("source", report, None, class_map, splits)
    text = Page(html).text
    assert text.index("Worst images, as they are now") < text.index("train/3.png · 0 boxes")
    assert text.index("Samples of each class") < text.index("cat: train/0.png · 1 boxes · cat")
    assert "dog: train/1.png · 1 boxes · dog" in text and "train/3.png 2 box-empty" in " ".join(text.split())
    (tmp_path / "s" / "train" / "0.png").unlink()  # gone meanwhile: left out
    assert "cat: train/0.png" not in Page(report_html("source", report, None, class_map, splits)).text
