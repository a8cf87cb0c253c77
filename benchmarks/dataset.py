"""Datasets: reading, checking and preparing, beside what one would use instead.

    python -m benchmarks.dataset generate DIR [--images 20000]     # 2.5 GB of JPEG files, and a large COCO file
    python -m benchmarks.dataset measure DIR

Every row is a fresh process, timed from its first line to its last, start of Python not counted; "cpu" is what it took
of the processor in that time, and peak memory is that process's. Rows of one kind stand together:

index      A COCO file of 118,000 images and 860,000 boxes, to a table (ours) or the index of pycocotools and hotcoco.
check      The generated images' dataset. Ours reads all bytes of every image, its header and its digest; hotcoco's
           healthcheck looks at the annotations alone.
prepare    The validate_dataset stage: check, decode every pixel, reduce train images of 1280x960 to 800x600, write and
           publish, report. Conversion by hotcoco writes label files only, by supervision it copies images too (its
           `as_yolo`); neither checks pixels or reduces them.
again      The stage once more, another run of unchanged data.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PEER_PYTHON = Path(__file__).parents[1] / ".peer" / "bin" / "python"  # make peer; it has supervision
WIDTH, HEIGHT, QUALITY = 1280, 960, 85
BOXES_PER_IMAGE = 7.5
CLASSES = 20
BIG_IMAGES, BIG_BOXES = 118_000, 860_000
SHARES = {"train": 0.9, "valid": 0.05, "test": 0.05}
RESULT = "RESULT "

Step = Callable[[Path], Any]


def generate(folder: Path, images: int) -> None:
    """A Roboflow COCO dataset below `folder`/data and `folder`/big.json."""
    pictures = 160
    with ProcessPoolExecutor() as pool:
        list(pool.map(_draw_some, [(folder, images, first, pictures) for first in range(pictures)]))
    for split in SHARES:
        names = _names(images)[split]
        (folder / "data" / split / "_annotations.coco.json").write_text(json.dumps(_document(names, BOXES_PER_IMAGE)))
    names = [f"{i:012d}.jpg" for i in range(BIG_IMAGES)]
    (folder / "big.json").write_text(json.dumps(_document(names, BIG_BOXES / BIG_IMAGES)))


def _names(images: int) -> dict[str, list[str]]:
    found, start = {}, 0
    for split, share in SHARES.items():
        count = round(images * share)
        found[split] = [f"{i:06d}.jpg" for i in range(start, start + count)]
        start += count
    return found


def _draw_some(job: tuple[Path, int, int, int]) -> None:
    """Every `pictures`th image: cut from one larger picture, each at another place, so that all bytes differ."""
    folder, images, first, pictures = job
    rng = np.random.default_rng(first)
    large = _picture(rng, WIDTH + 160, HEIGHT + 160)
    for split, names in _names(images).items():
        target = folder / "data" / split
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            number = int(name[:6])
            if number % pictures == first:
                place = number // pictures
                x, y = place * 37 % 160, place * 53 % 160
                large.crop((x, y, x + WIDTH, y + HEIGHT)).save(target / name, quality=QUALITY)


def _picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Patches at several scales, and a little noise: 110 to 150 kB at quality 85."""
    pixels = np.full((height, width, 3), 128.0, dtype=np.float32)
    for cells, strength in ((6, 50), (24, 25), (96, 9)):
        noise = rng.normal(0, strength, (cells * 3 // 4, cells, 3)).astype(np.float32)
        for channel in range(3):
            image = Image.fromarray(noise[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            pixels[..., channel] += np.asarray(image)
    pixels += rng.normal(0, 2.0, (height, width, 1)).astype(np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _document(names: list[str], boxes_per_image: float) -> dict[str, Any]:
    rng = np.random.default_rng(len(names))
    count = round(len(names) * boxes_per_image)
    sides = rng.uniform(20, 400, (count, 2))
    corners = rng.uniform(0, 1, (count, 2)) * (np.array([WIDTH, HEIGHT]) - sides)
    boxes = np.round(np.concatenate([corners, sides], axis=1), 2).tolist()
    of_image = rng.integers(1, len(names) + 1, count).tolist()
    labels = rng.integers(1, CLASSES + 1, count).tolist()
    rows = zip(boxes, of_image, labels, strict=True)
    return {
        "images": [{"id": i + 1, "file_name": n, "width": WIDTH, "height": HEIGHT} for i, n in enumerate(names)],
        "annotations": [
            {"id": i + 1, "image_id": image, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": 0}
            for i, (b, image, c) in enumerate(rows)
        ],
        "categories": [{"id": i + 1, "name": f"class {i + 1}"} for i in range(CLASSES)],
    }


# ---- the steps, each in a process of its own ----------------------------------------------------------------


def index_ours(folder: Path) -> str:
    from rfdetr_core.data.formats.coco import read_coco_split

    split = read_coco_split("train", folder / "big.json", root=folder, image_folder=folder)
    return f"{len(split.file_names)} images, {len(split.bboxes)} boxes"


def index_pycocotools(folder: Path) -> str:
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        return f"{len(COCO(str(folder / 'big.json')).anns)} boxes"


def index_hotcoco(folder: Path) -> str:
    from hotcoco import COCO

    return f"{len(COCO(str(folder / 'big.json')).get_ann_ids())} boxes"


def check_ours(folder: Path) -> str:
    from rfdetr_core.data.findings import Report
    from rfdetr_core.data.intake import take_in

    report = Report()
    _, splits = take_in(folder / "data", "auto", report, pixels=False)
    return f"{sum(len(split.table) for split in splits.values())} images, {len(report.findings)} kinds of findings"


def check_hotcoco(folder: Path) -> str:
    from hotcoco import COCO

    for split in SHARES:
        COCO(str(folder / "data" / split / "_annotations.coco.json")).healthcheck()
    return "annotations only"


def prepare_ours(folder: Path) -> str:
    return _stage(folder, "first")


def again_ours(folder: Path) -> str:
    return _stage(folder, "second")


def _stage(folder: Path, run: str) -> str:
    from components.validate_dataset import stage

    sections = {"name": "generated", "dataset": {"uri": str(folder / "data")}, "model": {"variant": "nano"}}
    (folder / "config.yaml").write_text(json.dumps(sections))
    root = folder / "root"
    with contextlib.redirect_stdout(io.StringIO()) as log:
        code = stage.main(["--run-uri", str(root / "runs" / run), "--config", str(folder / "config.yaml")])
    assert code == 0, log.getvalue()
    document = json.loads((root / "runs" / run / "dataset" / "dataset.json").read_text())
    stored = sum(path.stat().st_size for path in (root / document["location"]).rglob("*.tar"))
    page = (root / "runs" / run / "dataset" / "report.html").stat().st_size
    return f"{stored / 1e9:.2f} GB in shards, report {page / 1e6:.1f} MB"


def convert_hotcoco(folder: Path) -> str:
    from hotcoco import COCO

    for split in SHARES:
        COCO(str(folder / "data" / split / "_annotations.coco.json")).to_yolo(str(folder / "hotcoco" / split))
    return "label files only"


def convert_supervision(folder: Path) -> str:
    import supervision

    for split in SHARES:
        source = folder / "data" / split
        dataset = supervision.DetectionDataset.from_coco(str(source), str(source / "_annotations.coco.json"))
        target = folder / "supervision" / split
        dataset.as_yolo(str(target / "images"), str(target / "labels"), str(folder / "supervision" / "data.yaml"))
    return "labels and images"


STEPS: dict[str, Step] = {
    "index: ours": index_ours,
    "index: pycocotools": index_pycocotools,
    "index: hotcoco": index_hotcoco,
    "check: ours": check_ours,
    "check: hotcoco healthcheck": check_hotcoco,
    "prepare: ours": prepare_ours,
    "again: ours": again_ours,
    "convert: hotcoco": convert_hotcoco,
    "convert: supervision": convert_supervision,
}


def measure(folder: Path, only: list[str], peer: Path) -> None:
    """Print a row per step."""
    images = sum(1 for _ in (folder / "data").rglob("*.jpg"))
    size = sum(path.stat().st_size for path in (folder / "data").rglob("*.jpg"))
    cores = len(os.sched_getaffinity(0))
    print(f"{images} images, {size / images / 1000:.0f} kB on average; {cores} cores; Python {sys.version.split()[0]}")
    for name in STEPS:
        if only and not any(name.startswith(part) for part in only):
            continue
        for left in ("root", "hotcoco", "supervision") if not name.startswith("again") else ():
            shutil.rmtree(folder / left, ignore_errors=True)
        python = str(peer) if "supervision" in name else sys.executable
        row = _run(python, name, folder)
        rate = "" if name.startswith("index") else f"{images / row['seconds']:8.0f} images/s"
        took = f"{row['seconds']:8.2f} s {row['cpu']:8.2f} s cpu {row['rss'] / 1e6:6.0f} MB"
        print(f"{name:28}{took} {rate:18} {row['said']}", flush=True)


def _run(python: str, name: str, folder: Path) -> dict[str, Any]:
    command = [python, "-m", "benchmarks.dataset", "step", name, str(folder)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, "PYTHONPATH": "."}
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith(RESULT)), None)
    if line is None:
        return {
            "seconds": float("nan"),
            "cpu": float("nan"),
            "rss": float("nan"),
            "said": f"failed with {done.returncode}",
        }
    row: dict[str, Any] = json.loads(line.removeprefix(RESULT))
    return row


def step(name: str, folder: Path) -> None:
    """Run one step in this process."""
    import resource

    start = time.perf_counter()
    said = STEPS[name](folder)
    seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = used.ru_utime + used.ru_stime
    print(RESULT + json.dumps({"seconds": seconds, "cpu": cpu, "rss": used.ru_maxrss * 1024, "said": said}))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("generate")
    make.add_argument("folder", type=Path)
    make.add_argument("--images", type=int, default=20_000)
    look = commands.add_parser("measure")
    look.add_argument("folder", type=Path)
    look.add_argument("--peer", type=Path, default=PEER_PYTHON, help="Python that has supervision")
    look.add_argument("--only", nargs="*", default=[], help="beginnings of the rows' names")
    one = commands.add_parser("step")
    one.add_argument("name", choices=list(STEPS))
    one.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "generate":
        generate(arguments.folder, arguments.images)
    elif arguments.command == "measure":
        measure(arguments.folder, arguments.only, arguments.peer)
    else:
        step(arguments.name, arguments.folder)


if __name__ == "__main__":
    main()
