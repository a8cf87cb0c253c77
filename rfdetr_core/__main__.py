"""`python -m rfdetr_core`: what the shared package does without any pipeline."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from rfdetr_core.errors import RFDETRError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except RFDETRError as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rfdetr_core", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    topics = parser.add_subparsers(required=True, metavar="topic")
    data = topics.add_parser("data", help="datasets").add_subparsers(required=True, metavar="command")
    sample = data.add_parser(
        "sample",
        help="draw a COCO dataset of textured shapes",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    sample.add_argument("--out", type=Path, required=True, help="new or empty folder")
    sample.add_argument("--train", type=int, default=800, help="training images")
    sample.add_argument("--valid", type=int, default=100, help="validation images")
    sample.add_argument("--test", type=int, default=100, help="test images")
    sample.add_argument("--size", type=int, default=400, help="side in pixels, about")
    sample.add_argument("--max-objects", type=int, default=6, help="most shapes in an image")
    sample.add_argument("--seed", type=int, default=0, help="of all that is random")
    sample.set_defaults(command=_sample)
    return parser


def _sample(arguments: argparse.Namespace) -> None:
    from rfdetr_core.data.sample import write_sample_dataset

    write_sample_dataset(
        arguments.out,
        train=arguments.train,
        valid=arguments.valid,
        test=arguments.test,
        size=arguments.size,
        max_objects=arguments.max_objects,
        seed=arguments.seed,
    )
    print(f"wrote {arguments.train} / {arguments.valid} / {arguments.test} images to {arguments.out}")


if __name__ == "__main__":
    sys.exit(main())
