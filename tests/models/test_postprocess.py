"""The selection of the best detections."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rfdetr_core.models.postprocess import best_first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@given(
    rows=st.integers(1, 3),
    # few different values: most examples have ties, many at the border of the selection
    values=st.lists(st.sampled_from([0.0, 1e-45, 1e-8, 0.25, 0.5, 0.5000001, 0.99, 1.0]), min_size=1, max_size=60),
    share=st.floats(0.0, 1.0),
)
def test_is_the_beginning_of_a_stable_sort(dtype: torch.dtype, rows: int, values: list[float], share: float) -> None:
    scores = torch.tensor([values[i:] + values[:i] for i in range(rows)], dtype=dtype)
    k = max(1, round(share * scores.shape[1]))
    expected = scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(best_first(scores, k), expected)
