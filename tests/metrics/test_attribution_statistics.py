"""Sums over store rows, however they are split, and likeness of explanations."""

import numpy as np
import pytest

from hpcguard.metrics.attribution import combine_statistics, row_statistics, summarise, topk_jaccard

NAN = np.nan


def rows(count: int = 12) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    coefficients = generator.normal(size=(count, 2, 4))
    coefficients[::3, :, 3] = NAN
    return {
        "label": np.arange(count) % 3, "predicted": np.arange(count) % 4, "coefficients": coefficients,
        "standard_error": np.abs(coefficients) / 10, "num_segments": np.where(np.arange(count) % 3, 4, 3),
        "score": generator.random((count, 2)), "num_samples": np.full(count, 64),
    }  # fmt: skip


def test_shards_add_up_to_the_whole() -> None:
    whole = rows()
    parts = [{name: values[start:stop] for name, values in whole.items()} for start, stop in ((0, 5), (5, 12))]
    total = row_statistics(whole, 3)
    combined = combine_statistics([row_statistics(part, 3) for part in parts])
    for name, values in total.items():
        assert combined[name] == pytest.approx(values)
    assert total["images"].tolist() == [4, 4, 4]


def test_the_summary_is_of_the_true_label() -> None:
    data = rows()
    summary = summarise(row_statistics(data, 3))
    magnitude = np.abs(data["coefficients"][:, 0])
    assert summary["images"] == 12
    assert summary["segments"] == pytest.approx((4 * 3 + 8 * 4) / 12)
    assert summary["accuracy"] == pytest.approx(np.mean(np.arange(12) % 3 == np.arange(12) % 4))
    assert summary["mean_abs_coefficient"] == pytest.approx(np.mean([np.nanmean(row) for row in magnitude]))
    expected = np.mean([np.nanmean(row) / 10 for row in magnitude]) / np.mean([np.nanmax(row) for row in magnitude])
    assert summary["relative_error"] == pytest.approx(expected)


def test_topk_jaccard() -> None:
    first = np.array([0.9, -0.8, 0.1, 0.0, NAN])
    assert topk_jaccard(first, first, 2) == 1
    assert topk_jaccard(first, np.array([0.9, 0.0, 0.1, -0.8, NAN]), 2) == pytest.approx(1 / 3)
    assert topk_jaccard(first, np.array([0.0, 0.1, 0.8, -0.9, NAN]), 2) == 0
    assert topk_jaccard(first, np.array([0.1, 0.2, 0.3, 0.4, NAN]), 4) == 1  # padding is never chosen before a segment
