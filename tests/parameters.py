"""`python -m tests.parameters` (make parameters): every parameter of the seed document, and whether its tests pass.

A test says what it proves by `@pytest.mark.parameter("lr")`. A parameter that no test proves, or of which one fails,
ends the command with 1. `--collect-only` counts the tests without running them; paths choose others than tests/.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from rfdetr_core.config import ModelSection, TrainConfig
from rfdetr_core.config.problems import show

SEED: dict[str, Any] = {
    "dataset_dir": "required",
    "output_dir": "output",
    "epochs": 100,
    "batch_size": 4,
    "grad_accum_steps": 4,
    "lr": 1e-4,
    "lr_encoder": 1.5e-4,
    "resolution": "model-specific",
    "weight_decay": 1e-4,
    "use_ema": True,
    "gradient_checkpointing": False,
    "checkpoint_interval": 10,
    "resume": None,
    "tensorboard": True,
    "wandb": False,
    "mlflow": False,
    "project": None,
    "run": None,
    "early_stopping": False,
    "early_stopping_patience": 10,
    "early_stopping_min_delta": 0.001,
    "early_stopping_use_ema": False,
    "eval_max_dets": 500,
    "eval_interval": 1,
    "log_per_class_metrics": True,
    "progress_bar": None,
    "num_workers": 2,
    "accelerator": "auto",
    "seed": None,
    "lr_scheduler": "step",
    "lr_min_factor": 0.0,
    "warmup_epochs": 0.0,
    "drop_path": 0.0,
    "compute_val_loss": True,
    "compute_test_loss": True,
    "fp16_eval": False,
    "pin_memory": None,
    "persistent_workers": None,
    "prefetch_factor": None,
    "aug_config": None,
    # Beside the reference table: the automatic batch, the epoch of "step", and what is deprecated.
    "auto_batch_target_effective": 16,
    "auto_batch_max_targets_per_image": 100,
    "auto_batch_ema_headroom": 0.7,
    "lr_drop": 100,
    "group_detr": "model-specific",
    "ia_bce_loss": "model-specific",
    "segmentation_head": "model-specific",
    "num_select": "model-specific",
}
"""The seed's parameters in its order, with their defaults."""

ROOT = Path(__file__).parents[1]

Outcomes = dict[str, str]
"""Test → passed, failed, skipped, or "" if it has not run."""


class Proofs:
    """A pytest plugin: which tests prove which parameter, and how they ended."""

    def __init__(self) -> None:
        self.of: dict[str, Outcomes] = {}
        self._names: dict[str, set[str]] = {}  # by test

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note what is selected."""
        for item in session.items:
            names = {name for marker in item.iter_markers("parameter") for name in marker.args}
            self._names[item.nodeid] = names
            for name in names:
                self.of.setdefault(name, {})[item.nodeid] = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test ends as its worst phase: setup, call, teardown."""
        if report.when == "call" or report.outcome != "passed":
            for name in self._names.get(report.nodeid, ()):
                if self.of[name][report.nodeid] != "failed":
                    self.of[name][report.nodeid] = report.outcome


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tests that carry the marker, then print the table; 0 if every parameter is proven."""
    parser = argparse.ArgumentParser(prog="python -m tests.parameters", description=__doc__)
    parser.add_argument("--collect-only", action="store_true", help="count the tests, do not run them")
    parser.add_argument("paths", nargs="*", default=[str(ROOT / "tests")], help="where the tests are")
    given = parser.parse_args(argv)
    proofs = Proofs()
    options = ["-c", str(ROOT / "pyproject.toml"), "-q", "-m", "parameter and not long", *given.paths]
    if given.collect_only:
        with redirect_stdout(io.StringIO()) as listing:
            code = pytest.main([*options, "--collect-only"], plugins=[proofs])
    else:
        listing = io.StringIO()
        code = pytest.main(options, plugins=[proofs])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        sys.stdout.write(f"{listing.getvalue()}\nthe tests could not be run\n")
        return int(code)
    lines, proven = report(proofs.of, ran=not given.collect_only)
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if proven else 1


def report(found: Mapping[str, Mapping[str, str]], *, ran: bool) -> tuple[list[str], bool]:
    """The table, and whether every parameter of the seed is proven and every name is that of a field.

    Of fields beside the seed there is a row where a test proves them.
    """
    fields = [*TrainConfig.model_fields, *ModelSection.model_fields]
    others = [name for name in dict.fromkeys(fields) if name in found and name not in SEED]
    rows = [("parameter", "default", "tests", "outcome")]
    wrong: list[str] = []
    for name in [*SEED, *others]:
        outcomes = list(found.get(name, {}).values())
        outcome = _outcome(outcomes, ran=ran)
        rows.append((name, _default(name), str(len(outcomes)), outcome))
        if outcome not in ("passed", "not run"):
            wrong.append(f"{name}: {outcome}")
    wrong += [f"{name}: no such parameter" for name in sorted(found.keys() - set(fields))]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1 + len(SEED), "-- beside the seed --")
    failed = [f"  {test}" for tests in found.values() for test, outcome in tests.items() if outcome == "failed"]
    verdict = "; ".join(wrong) if wrong else f"{len(SEED)} parameters of the seed, none missing"
    return [*lines, *dict.fromkeys(failed), verdict], not wrong


def _outcome(outcomes: Iterable[str], *, ran: bool) -> str:
    """Of all tests together; where every one was skipped nothing is proven."""
    ended = set(outcomes)
    if not ended:
        return "no test"
    if not ran:
        return "not run"
    return next((worst for worst in ("failed", "", "passed", "skipped") if worst in ended), "") or "not finished"


def _default(name: str) -> str:
    if name in SEED:
        return SEED[name] if SEED[name] in ("required", "model-specific") else show(SEED[name])
    owner = TrainConfig if name in TrainConfig.model_fields else ModelSection
    info = owner.model_fields[name]
    return "model-specific" if info.is_required() else show(info.default)


if __name__ == "__main__":
    sys.exit(main())
