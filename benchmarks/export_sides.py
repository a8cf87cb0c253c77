"""Exports the reference's detector with its own defaults; runs in the environment of `make peer`.

    .peer/bin/python -P benchmarks/export_sides.py CLASS WEIGHTS FOLDER

The last line that it prints is the path of the ONNX file. With -P, onnx is the package and not our onnx.py.
"""

import os
import sys
import warnings


def main() -> None:
    """Nothing is downloaded."""
    name, weights, folder = sys.argv[1:]
    warnings.simplefilter("ignore")
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    import rfdetr

    detector = getattr(rfdetr, name)(pretrain_weights=weights, device="cpu")
    print(detector.export(output_dir=folder, output_name="reference", verbose=False))


if __name__ == "__main__":
    main()
