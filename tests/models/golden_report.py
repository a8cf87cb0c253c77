"""`python -m tests.models.golden_report`: how far we are off every stored reference number, a row per file.

`--fast` leaves out the cases of full size, which take a minute or two. The exit code is 1 when something is out of
tolerance, or when a stored file or entry belongs to no case and is not listed in `LEFT_OUT`.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatch
from typing import NamedTuple

import torch

from tests.models import golden, golden_models, golden_units
from tests.models.golden_check import Check, Deviation, by_file, entries

Case = Callable[[], Check]

CASES: dict[str, Case] = {**golden_models.CASES, **golden_units.CASES}
LONG_CASES: dict[str, Case] = golden_models.LONG_CASES


@functools.cache
def computed(name: str) -> Check:
    """A case, computed once."""
    return (CASES | LONG_CASES)[name]()


LEFT_OUT: dict[str, tuple[tuple[str, str], ...]] = {
    "segmentation is not built": (
        ("full_seg_nano.npz", "*"),
        ("full.json", "seg_nano/*"),
        ("state_dict/state_dict_seg_nano.json", "*"),
        ("units.npz", "seg.*"),
        ("units.json", "seg/*"),
    ),
    "input of a case": (
        ("*.npz", "targets[0-9].*"),
        ("*.npz", "eval.target_sizes"),
        ("tiny.json", "*/targets"),
        ("units.npz", "*.targets[0-9].*"),
        ("units.npz", "msdeform.query"),
        ("units.npz", "msdeform.value_input"),
        ("units.npz", "msdeform.ref[24]"),
        ("units.npz", "msdeform.mask"),
        ("units.npz", "msdeform.cotangent"),
        ("units.npz", "sine.pos4"),
        ("units.npz", "proposals.mask"),
        ("units.npz", "proposals.memory_in"),
        ("units.npz", "pe.in_5x5"),
        ("units.npz", "box.[ab]_cxcywh"),
        ("units.npz", "matcher.logits"),
        ("units.npz", "matcher.boxes"),
        ("units.npz", "criterion.*.logits"),
        ("units.npz", "criterion.*.boxes"),
        ("units.npz", "post.logits"),
        ("units.npz", "post.boxes"),
        ("units.npz", "post.target_sizes"),
        ("units.npz", "pre.image_hwc_uint8"),
        ("units.json", "ema_decay_update_index_zero_based"),
    ),
    "how a case was made": (
        ("tiny.json", "meta/*"),
        ("tiny.json", "tiny_crowded/targets_seed"),
        ("tiny.json", "tiny_crowded/sizes"),
        ("tiny.json", "*/config_class"),
        ("tiny.json", "*/overrides"),
        ("tiny.json", "*/positional_encoding_size"),
        ("nano60_train.json", "config_class"),
        ("nano60_train.json", "overrides"),
        ("nano60_train.json", "image_s*"),
        ("full.json", "*/config_class"),
        ("full.json", "*/image_s*"),
        ("full.json", "*/targets_seed"),
        ("units.json", "msdeform/*"),
        ("units.json", "projector.*/[!k]*"),
        ("units.json", "backbone.*/[!k]*"),
        ("units.json", "criterion/num_classes_head"),
        ("units.json", "criterion/group_detr"),
        ("units.json", "criterion/focal_alpha"),
        ("units.json", "criterion/costs"),
    ),
    "divides losses that are compared": (("*.json", "*/train_num_boxes_*"), ("*.json", "*num_boxes")),
    "says how far apart scores are": (("*.json", "*_min_topk_gap"),),
    "masked tokens tie, in any order": (("tiny_padded.npz", "*.topk_indices"),),
    "position maps of the image change no output (spec, section 0)": (("units.npz", "possine.*"),),
    "a file that does not say its groups: tests/models/test_weights.py": (("units.npz", "slice.ckpt5x3_to_3x2.rows"),),
    "a defect of the reference": (("tiny.json", "var_registers_error"),),
    "rounding of the reference": (("tiny_float64.json", "max_abs_diff_float32_vs_float64"),),
}
"""What no case compares, as patterns of file and entry, by the reason."""

LONG_FILES = ("full*", "nano60_train*")
"""What `--fast` leaves out."""


class Row(NamedTuple):
    """One stored file."""

    file: str
    compared: int
    """Numbers."""
    results: str
    ok: bool


def stored_files() -> list[str]:
    """Every file of reference numbers, relative to their folder."""
    found = (path.relative_to(golden.FOLDER).as_posix() for path in golden.FOLDER.rglob("*.*"))
    return sorted(file for file in found if file.endswith((".npz", ".json")))


def is_long(file: str) -> bool:
    """Whether the file belongs to the cases of full size."""
    return any(fnmatch(file, pattern) for pattern in LONG_FILES)


def forgotten(file: str, compared: Iterable[Deviation]) -> list[str]:
    """Entries of a file that no case compared and that nothing in `LEFT_OUT` explains."""
    rest = set(entries(file)) - {deviation.entry for deviation in compared}
    return sorted(entry for entry in rest if not reason(file, entry))


def reason(file: str, entry: str) -> str:
    """Why an entry is compared by no case; empty if it has to be."""
    for why, patterns in LEFT_OUT.items():
        if any(fnmatch(file, of_file) and fnmatch(entry, of_entry) for of_file, of_entry in patterns):
            return why
    return ""


def row(file: str, deviations: list[Deviation]) -> Row:
    """The largest deviation of each kind, beside its tolerance, and what was forgotten."""
    missed = forgotten(file, deviations)
    worst: dict[str, Deviation] = {}
    for deviation in deviations:
        # Relative to the tolerance, which may differ within a kind; NaN must not hide behind a number.
        if deviation.kind not in worst or not _share(deviation) <= _share(worst[deviation.kind]):
            worst[deviation.kind] = deviation
    results = ", ".join(map(_result, worst.values()))
    if missed:
        shown = ", ".join(missed[:3]) + (", ..." if len(missed) > 3 else "")
        results = ", ".join(filter(None, [results, f"NO CASE for {len(missed)} entries: {shown}"]))
    elif not deviations:
        results = reason(file, next(iter(entries(file))))
    ok = not missed and all(deviation.ok for deviation in deviations)
    return Row(file, sum(deviation.count for deviation in deviations), results, ok)


def _share(deviation: Deviation) -> float:
    return deviation.largest / deviation.tolerance if deviation.tolerance else deviation.largest


def _result(deviation: Deviation) -> str:
    if deviation.kind == "equal":
        return "indices and names equal" if deviation.ok else f"{deviation.entry} NOT EQUAL"
    text = f"{deviation.kind} {deviation.largest:.0e} (of {deviation.tolerance:.0e})"
    return text if deviation.ok else f"{text} in {deviation.entry}"


def report(deviations: Mapping[str, list[Deviation]], *, fast: bool) -> list[Row]:
    """A row per stored file."""
    rows = []
    for file in stored_files():
        skipped = fast and is_long(file)
        rows.append(Row(file, 0, "left out by --fast", True) if skipped else row(file, deviations.get(file, [])))
    return rows


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    width = max(len(row.file) for row in rows)
    lines = [f"{'file':<{width}}  {'numbers':>9}  {'':<6}  largest deviation by kind (of what is allowed)"]
    for row in rows:
        verdict = "BREACH" if not row.ok else "ok" if row.compared else "-"
        lines.append(f"{row.file:<{width}}  {row.compared:>9,}  {verdict:<6}  {row.results}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Compute all cases and print the table; 1 if anything is out of tolerance or forgotten."""
    parser = argparse.ArgumentParser(prog="python -m tests.models.golden_report", description=__doc__)
    parser.add_argument("--fast", action="store_true", help="leave out the cases of full size")
    fast = parser.parse_args(arguments).fast
    torch.set_num_threads(1)  # as the reference ran, and exact indices may hang on the order of sums
    checks = []
    for name in CASES if fast else CASES | LONG_CASES:
        sys.stderr.write(f"{name}\n")
        checks.append(computed(name))
    rows = report(by_file(checks), fast=fast)
    breached = [row.file for row in rows if not row.ok]
    verdict = f"BREACH in {', '.join(breached)}" if breached else "all within tolerance"
    sys.stdout.write(f"{table(rows)}\n{sum(row.compared for row in rows):,} numbers compared, {verdict}\n")
    return 1 if breached else 0


if __name__ == "__main__":
    raise SystemExit(main())
