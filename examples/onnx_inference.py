"""Detections of an exported model in picture files, with onnxruntime, numpy and Pillow alone.

    python onnx_inference.py model.onnx picture.jpg ...

Prints per detection: file, class, score, and the box x1 y1 x2 y2 in pixels.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
facts = session.get_modelmeta().custom_metadata_map
names = json.loads(facts["class_names"])
height, width = json.loads(facts["resolution"])
mean, std = (np.array(json.loads(facts[key]), np.float32) for key in ("mean", "std"))
threshold = float(facts.get("threshold", 0.5))  # of the best F1 in the evaluation
assert (facts["resize"], facts["channels"]) == ("bilinear-antialias", "RGB"), "this program has no other way to read"

for name in sys.argv[2:]:
    image = ImageOps.exif_transpose(Image.open(name)).convert("RGB")
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32)
    batch = ((pixels / 255 - mean) / std).transpose(2, 0, 1)[None]
    extent = np.array([image.width, image.height] * 2)
    if facts["post_processing"] == "true":
        sizes = np.array([[image.height, image.width]], np.int64)
        boxes, scores, labels = (output[0] for output in session.run(None, {"input": batch, "sizes": sizes}))
    else:
        dets, logits = (output[0] for output in session.run(None, {"input": batch}))
        best = np.argsort(-logits, axis=None, kind="stable")[: int(facts["num_select"])]
        queries, labels = np.divmod(best, logits.shape[1])
        scores = 1 / (1 + np.exp(-logits.ravel()[best]))
        centre, size = np.split(dets[queries], 2, axis=1)
        boxes = np.clip(np.hstack([centre - size / 2, centre + size / 2]) * extent, 0, extent)
    for box, score, label in zip(boxes, scores, labels, strict=True):
        if score >= threshold and 0 <= label < len(names) and names[label]:  # others are no detections
            print(name, names[label], f"{score:.3f}", *(f"{side:.1f}" for side in box))  # noqa: T201
