"""Mutated datasets: structured changes to JSON, YAML, XML, label files and image bytes of small whole datasets.

    python -m tests.data.mutations [--count 10000] [--seed 0]

Each input is validated, and prepared if it passes. Whatever it holds: a typed error of one line or a result, within
ten seconds, and no file outside of the folder given. Prints how many of which outcome; exits with 1 on any other.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rfdetr_core.data.checks import CHECKS, CheckOptions
from rfdetr_core.data.findings import Report
from rfdetr_core.data.intake import take_in
from rfdetr_core.data.preparing import PrepareOptions, write_prepared
from rfdetr_core.data.report import report_html, report_json
from rfdetr_core.errors import UserError
from tests.data.helpers import grid_dataset, picture
from tests.data.layouts import small_voc, small_yolo

LONGEST = 10.0  # seconds
VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 2**31, 2**63, 2**70, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "1"),
    *("../a.png", "/etc/passwd", "a\0b", "\ud800", "x" * 5000, [], {}, [[]], {"": []}, "train000.png", [1, 2], "None"),
]
TOKENS = [
    *("nan", "inf", "-1", "1e400", "0", "999999999999999999999", "a", "..", "/", "\0", "\t", "é", "&amp;", "&x;", "<"),
    *(
        ">",
        "{",
        "}",
        "[",
        "]",
        ":",
        "-",
        "!!python/object:os.system",
        "*a",
        "&a",
        "<<",
        "%",
        "|",
        "\r\n",
        "\ufeff",
        '"',
    ),
    *("<!DOCTYPE a>", "<![CDATA[", "<object>", "names:", "train:", "path: /", "path: ..", "1_0", "\x85", "\u2028"),
]


def templates(folder: Path) -> list[Path]:
    """A small whole dataset of each format."""
    coco = grid_dataset(folder / "coco", 3)
    shutil.copytree(coco / "valid", coco / "test")
    picture(40, 30, 5).save(coco / "train" / "extra.jpg", exif=_turned())
    yolo = small_yolo(folder / "yolo")
    shutil.copytree(yolo / "valid", yolo / "test")
    voc = small_voc(folder / "voc")
    (voc / "ImageSets" / "Main" / "test.txt").write_text("v\n")
    return [coco, yolo, voc]


def _turned() -> Any:
    tags = picture().getexif()
    tags[0x0112] = 6
    return tags


def mutate(folder: Path, rng: random.Random) -> str:
    """Change one to three files of a dataset; returns what was done."""
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        if not files:
            break
        text = [path for path in files if path.suffix in (".json", ".yaml", ".xml", ".txt")]
        path = rng.choice(text if text and rng.random() < 0.7 else files)
        if path.suffix == ".json" and rng.random() < 0.7:
            how: Callable[[Path, random.Random], None] = _json
        elif path.suffix in (".yaml", ".xml", ".txt") and rng.random() < 0.7:
            how = _tokens
        else:
            how = rng.choice([_bytes, _bytes, _bytes, _whole_file])
        done.append(f"{how.__name__} {path.relative_to(folder)}")
        how(path, rng)
    return "; ".join(done)


def _json(path: Path, rng: random.Random) -> None:
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # changed already
        return _bytes(path, rng)
    for _ in range(rng.randint(1, 3)):
        node: Any = document
        while isinstance(node, dict | list) and node:
            key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.25:
                what = rng.random()
                if what < 0.15:
                    del node[key]
                elif what < 0.3 and isinstance(node, list):
                    node.append(copy.deepcopy(node[key]))
                elif what < 0.34:
                    deep: Any = 1
                    for _ in range(200):
                        deep = [deep]
                    node[key] = deep
                else:
                    node[key] = copy.deepcopy(rng.choice(VALUES))
                break
            node = node[key]
    path.write_text(json.dumps(document), errors="surrogatepass")
    return None


def _tokens(path: Path, rng: random.Random) -> None:
    text = path.read_bytes().decode("utf-8", "replace")
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.3:  # a line goes, or comes again
            lines = text.split("\n")
            i = rng.randrange(len(lines))
            lines[i : i + 1] = rng.choice(([], [lines[i]] * 2, [lines[i]] * 50))
            text = "\n".join(lines)
        else:
            start = rng.randrange(len(text) + 1)
            text = text[:start] + rng.choice(TOKENS) + text[start + rng.choice((0, 0, 1, 5)) :]
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def _bytes(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 8)):
        if data:
            data[rng.randrange(min(len(data), rng.choice((64, 400, 10**9))))] = rng.randrange(256)
    if rng.random() < 0.3:
        del data[rng.randrange(len(data) + 1) :]
    if rng.random() < 0.1:
        data += rng.randbytes(rng.randrange(2000))
    path.write_bytes(bytes(data))


def _whole_file(path: Path, rng: random.Random) -> None:
    """It is empty, noise, nested deeply, gone, a folder, a link, cut, or has another name."""
    what = rng.randrange(8)
    if what == 0:
        path.write_bytes(b"")
    elif what == 1:
        path.write_bytes(rng.randbytes(rng.randrange(3000)))
    elif what == 6:
        path.rename(path.with_name(rng.choice(["new\nline" + path.suffix, "é" + path.suffix, "a" * 200 + path.suffix])))
    elif what == 7:
        opening = {".json": b'{"images":[', ".xml": b"<annotation>", ".yaml": b"[", ".txt": b"0 "}.get(
            path.suffix, b"\0"
        )
        path.write_bytes(opening * rng.choice((500, 50_000)))
    else:
        path.unlink()
        if what == 3:
            path.mkdir()
        elif what == 4:
            path.symlink_to(rng.choice(["/etc/passwd", "../../outside", path.name, "gone"]))
        elif what == 5:
            path.write_bytes(b"\xff\xd8\xff\xe0" + bytes(40))


LENIENT = {code: 10**6 for code, check in CHECKS.items() if not check.final}


def outcome(folder: Path, out: Path, lenient: bool) -> str:
    """Validate, and prepare if that passes; the class of the error, or "usable".

    `lenient` tolerates whatever can be, so that the way on without what is broken is gone as well.
    """
    report = Report(CheckOptions(max_image_pixels=1_000_000, tolerate=LENIENT if lenient else {}))
    document = class_map = splits = None
    try:
        class_map, splits = take_in(folder, "auto", report, pixels=False)
        document = write_prepared(out, class_map, splits, PrepareOptions(24), source="mutated", report=report)
        return "usable"
    except UserError as error:
        assert "\n" not in str(error) and str(error).strip(), repr(str(error))
        return type(error).__name__
    finally:
        json.dumps(report_json("mutated", report, document)).encode()
        page = report_html("mutated", report, document, class_map, splits)
        assert len(page.encode()) < 5_000_000


def run(count: int, seed: int, work: Path) -> tuple[Counter[str], list[str]]:
    """Outcomes by name, and what went wrong, a line each."""
    originals = templates(work / "originals")
    before = {path.relative_to(work).as_posix() for path in work.rglob("*")}
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    for number in range(count):
        rng = random.Random(seed * 1_000_003 + number)
        place = work / "case"
        shutil.copytree(rng.choice(originals), place / "data")
        done = mutate(place / "data", rng)
        inside = {path.relative_to(place).as_posix() for path in place.rglob("*")}
        start = time.monotonic()
        try:
            outcomes[outcome(place / "data", place / "out", number % 2 == 0)] += 1
        except Exception as error:
            wrong.append(f"case {number} ({done}): {type(error).__name__}: {error}")
        took = time.monotonic() - start
        if took > LONGEST:
            wrong.append(f"case {number} ({done}): took {took:.1f} s")
        written = {path.relative_to(place).as_posix() for path in place.rglob("*")} - inside
        if stray := [name for name in written if not f"{name}/".startswith("out/")]:
            wrong.append(f"case {number} ({done}): wrote {stray}")
        shutil.rmtree(place)
        if number % 500 == 0 and {path.relative_to(work).as_posix() for path in work.rglob("*")} != before:
            wrong.append(f"case {number}: something lies outside of its folder")
    if {path.relative_to(work).as_posix() for path in work.rglob("*")} != before:
        wrong.append("something lies outside of the folders")
    return outcomes, wrong


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # Pillow's words on broken tags
    with tempfile.TemporaryDirectory() as work:
        outcomes, wrong = run(arguments.count, arguments.seed, Path(work))
    sys.stdout.write(f"{dict(outcomes)}\n" + "".join(f"{line}\n" for line in wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
