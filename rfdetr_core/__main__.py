"""`python -m rfdetr_core`: what the shared package does without any pipeline."""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from rfdetr_core.errors import ExitError

INTERRUPTED = 130  # Ctrl-C, as shells number it

AddParser = Callable[..., argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except ExitError as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: stopped by Ctrl-C", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rfdetr_core", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    topics = parser.add_subparsers(required=True, metavar="command")
    for add in (_add_train, _add_evaluate, _add_export, _add_predict, _add_data):
        add(topics.add_parser)
    return parser


def _add_train(add_parser: AddParser) -> None:
    train = _command(add_parser, "train", "train, or continue a training, in a folder of this machine")
    train.add_argument("--config", required=True, help="YAML of a run; its sections dataset, model and train are used")
    _add_set(train, "train.epochs=3")
    train.add_argument("--dataset-dir", metavar="DIR", help="the dataset, instead of dataset.uri")
    train.add_argument(
        "--output-dir", metavar="DIR", default="output", help="checkpoints, metrics and reports; default: %(default)s"
    )
    train.add_argument(
        "--pretrain-weights", metavar="FILE", help="a path, a published name, s3:// or https://; instead of model's"
    )


def _add_evaluate(add_parser: AddParser) -> None:
    evaluate = _command(add_parser, "evaluate", "COCO metrics of weights on a dataset")
    _add_weights(evaluate)
    evaluate.add_argument("--dataset-dir", metavar="DIR", required=True, help="a dataset, prepared or as it came")
    evaluate.add_argument("--split", default="test", help="test or valid; default: %(default)s")
    evaluate.add_argument("--batch-size", type=int, default=8, help="images at once; default: %(default)s")
    evaluate.add_argument(
        "--max-dets", type=int, default=500, help="detections per image that count; default: %(default)s"
    )
    evaluate.add_argument("--num-workers", type=int, default=2, help="processes that load images; default: %(default)s")
    _add_json(evaluate)


def _add_export(add_parser: AddParser) -> None:
    export = _command(add_parser, "export", "write the ONNX model of weights, proven to compute the same")
    _add_weights(export)
    export.add_argument(
        "--output-dir", metavar="DIR", default="output", help="folder of rfdetr-<variant>.onnx; default: %(default)s"
    )
    _add_set(export, "export.opset=18")


def _add_predict(add_parser: AddParser) -> None:
    predict = _command(add_parser, "predict", "detections in pictures")
    _add_weights(predict)
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="a picture that Pillow opens")
    predict.add_argument("--threshold", type=float, default=0.5, help="least score; default: %(default)s")
    _add_json(predict)


def _add_data(add_parser: AddParser) -> None:
    data = add_parser("data", help="datasets").add_subparsers(required=True, metavar="command")
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
    validate = _add_source(data.add_parser, "validate", "check a dataset; exit code 2 if it cannot be trained on")
    validate.add_argument("--report", metavar="DIR", help="write report.html and report.json there")
    convert = _add_source(data.add_parser, "convert", "check a dataset and write it in another form")
    convert.add_argument("--to", choices=("coco", "yolo", "prepared"), required=True, help="the form")
    convert.add_argument("--out", metavar="DIR", type=Path, required=True, help="new or empty folder")
    stats = _add_source(data.add_parser, "stats", "count images, boxes and classes, also of a prepared dataset")
    _add_json(stats)


def _add_source(add_parser: AddParser, name: str, text: str) -> argparse.ArgumentParser:
    """A command on a dataset."""
    parser = _command(add_parser, name, text, module="dataset_cli")
    parser.add_argument("dataset", metavar="URI", help="a folder or archive: a path, or s3://bucket/prefix")
    parser.add_argument("--config", metavar="FILE", help="YAML of a run: its sections dataset and model count")
    parser.add_argument(
        "--headers-only", action="store_true", help="decode no pixels: ten times as fast, and blind to broken ones"
    )
    _add_set(parser, "dataset.format=voc or dataset.strict=true")
    return parser


def _command(add_parser: AddParser, name: str, text: str, *, module: str = "cli") -> argparse.ArgumentParser:
    """A command of a module that is loaded when it runs: help and mistyped options cost nothing."""
    parser = add_parser(name, help=text, description=text)
    parser.set_defaults(command=_from_module(module, name))
    return parser


def _from_module(module: str, name: str) -> Callable[[argparse.Namespace], None]:
    def run(arguments: argparse.Namespace) -> None:
        from rfdetr_core import cli

        with cli.speaking():
            getattr(importlib.import_module(f"rfdetr_core.{module}"), name)(arguments)

    return run


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", metavar="FILE", required=True, help="checkpoint_best_total.pth: a path, s3:// or https://"
    )


def _add_set(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument(
        "--set", metavar="FIELD=VALUE", action="append", default=[], help=f"one field, such as {example}; repeatable"
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the result there as well")


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
