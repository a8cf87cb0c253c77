"""Exports the reference's detector with its own defaults; runs in the environment of `make peer`.

    .peer/bin/python benchmarks/onnx_reference.py VARIANT WEIGHTS FOLDER

The last line that it prints is the path of the ONNX file.
"""

import os
import sys
import warnings


def main() -> None:
    """Weights, inputs and names as in sides.py: nothing is downloaded."""
    variant, weights, folder = sys.argv[1:]
    warnings.simplefilter("ignore")
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    import rfdetr
    from sides import reference_class

    detector = getattr(rfdetr, reference_class(variant))(pretrain_weights=weights, device="cpu")
    print(detector.export(output_dir=folder, output_name=f"reference-{variant}", verbose=False))


if __name__ == "__main__":
    main()
