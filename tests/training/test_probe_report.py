"""What people see of a probe: lines, a picture, a page."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rfdetr_core.training.probe_report import _rounded, _ticks, duration, picture, report_html, summary

GIB = 2**30


def found(**changes: Any) -> dict[str, Any]:
    """As probe.json has it: 1 GiB and a quarter for each image, of 20 GiB."""
    attempts = [
        {"batch_size": n, "seconds": 0.1 + 0.02 * n, "peak_bytes": GIB + n * GIB // 4, "left_bytes": None, "fits": True}
        for n in (1, 2, 4, 16, 64)
    ]
    attempts.append({"batch_size": 80, "seconds": None, "peak_bytes": None, "left_bytes": GIB, "fits": False})
    document: dict[str, Any] = {
        "batch_size": 50,
        "grad_accum_steps": 1,
        "effective_batch_size": 50,
        "safe_batch_size": 72,
        "stopped_by": "memory",
        "worst_case": {"height": 512, "width": 1344, "padded": True, "targets_per_image": 9, "shapes_known": True},
        "device": {"kind": "cuda", "name": "A GPU <1>", "memory_bytes": 24 * GIB, "driver": "1, CUDA 13"},
        "precision": "bf16-mixed",
        "available_bytes": 20 * GIB,
        "limit_bytes": 19 * GIB,
        "predicted_peak_bytes": 13 * GIB,
        "peak_bytes": 14 * GIB,
        "evaluation": {"batch_size": 50, "seconds": 0.5, "peak_bytes": 2 * GIB},
        "attempts": attempts,
        "cost": {
            "devices": 2,
            "seconds_per_optimizer_step": 1.5,
            "steps_per_epoch": 100,
            "seconds_per_epoch": 150.0,
            "seconds_per_evaluation": 12.0,
            "hours": 4.5,
            "device_hours": 9.0,
            "price_per_hour": 2.5,
            "price": 22.5,
            "max_hours": 3.0,
            "epochs_within_max_hours": 66,
            "fits": False,
        },
        "versions": {"torch": "2"},
    }
    return {**document, **changes}


def test_the_lines_tell_batch_memory_and_cost() -> None:
    batch, memory, cost = summary(found())
    assert batch.startswith("batch 50 x 1 = 50 per device (a larger batch does not fit; safe: 72) on A GPU")
    assert "512 x 1344 px with 9 boxes per image: peak 14.00 GiB (predicted 13.00) of 20.00 GiB" in memory
    assert "2.5 min per epoch of 100 steps, 12.0 s per evaluation, 4.50 h in all, 9.00 device-hours" in cost
    assert "price 22.50 at 2.5 per hour" in cost


def test_the_page_has_everything_and_is_safe() -> None:
    page = report_html(found())
    for text in ("A GPU &lt;1&gt;", "22.50", "66 epochs", "data:image/png;base64,", "1.00</td>"):
        assert text in page, text
    assert "<1>" not in page
    free = {**found()["cost"], "price": None, "fits": True}
    assert "no probe.price_per_hour is given" in report_html(found(cost=free, predicted_peak_bytes=None))


def colours(image: Any) -> set[tuple[int, ...]]:
    return {tuple(row) for row in np.unique(np.asarray(image).reshape(-1, 3), axis=0).tolist()}


def test_the_picture_shows_limit_steps_and_choice() -> None:
    shown = colours(picture(found()))
    red, blue, green = (201, 42, 42), (47, 111, 237), (43, 138, 62)
    assert {red, blue, green} <= shown
    far = found(limit_bytes=900 * GIB, available_bytes=950 * GIB, attempts=found()["attempts"][:-1])
    assert red not in colours(picture(far))  # a line far above would press all else to the axis


def test_one_step_is_enough_for_a_picture() -> None:
    assert picture(found(attempts=found()["attempts"][:1], batch_size=1)).size == (900, 620)


@pytest.mark.parametrize("value", [1e-6, 0.3, 1.0, 7.7, 12.0, 99.0, 4096.0])
def test_axes_end_at_round_numbers(value: float) -> None:
    end = _rounded(value)
    assert value <= end <= 2 * value
    ticks = _ticks(end)
    assert 3 <= len(ticks) <= 8 and ticks[-1] <= end * (1 + 1e-9)


def test_durations() -> None:
    assert [duration(s) for s in (0.04, 59.94, 90, 7200)] == ["0.0 s", "59.9 s", "1.5 min", "2.0 h"]
