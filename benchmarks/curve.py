"""The curve of a training: mAP on the validation split per epoch, as a PNG.

    python -m rfdetr_core train --config examples/bccd.yaml --dataset-dir bccd/coco --output-dir runs/curve
    python benchmarks/curve.py runs/curve/metrics.jsonl curve.png --title "Blood cells from random weights"

Needs matplotlib, which nothing else here does; any Python that has it will do.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

CURVES = {
    "val/ema_mAP_50": ("mAP50, averaged weights", "tab:blue", "-"),
    "val/mAP_50": ("mAP50, raw weights", "tab:blue", ":"),
    "val/ema_mAP_50_95": ("mAP, averaged weights", "tab:orange", "-"),
    "val/mAP_50_95": ("mAP, raw weights", "tab:orange", ":"),
}


def main() -> None:
    """Read metrics.jsonl, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path, help="metrics.jsonl of a training")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--title", default="")
    parser.add_argument("--note", default="", help="hardware and time, below the axis")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.metrics.read_text().splitlines()]

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    for name, (label, colour, style) in CURVES.items():
        points = [(row["epoch"] + 1, row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, color=colour, linestyle=style)
    axes.set(xlabel="\n".join(filter(None, ["epoch", arguments.note])), title=arguments.title, ylim=(0, 1))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(arguments.picture)


if __name__ == "__main__":
    main()
