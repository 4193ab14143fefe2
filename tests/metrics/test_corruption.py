"""Accuracy on corrupted images against a plain loop; mCE against Hendrycks & Dietterich's formulas written out."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hpcguard.config.corruptions import SEVERITIES, Corruption
from hpcguard.metrics.corrupted import right_when_corrupted
from hpcguard.metrics.corruption import mean_corruption_error, summarise_corruptions

NAMES: tuple[Corruption, ...] = ("fog", "snow", "contrast")


def net(x: Tensor) -> Tensor:
    return torch.stack([x[:, 0].mean((1, 2)), x[:, 1].mean((1, 2)), x[:, 2].mean((1, 2))], 1)


def read(name: Corruption, severity: int, ids: np.ndarray) -> np.ndarray:
    """Images that depend on all three."""
    key = [NAMES.index(name), severity]
    return np.stack([np.random.default_rng([*key, image]).random((3, 4, 4), np.float32) for image in ids.tolist()])


@pytest.mark.parametrize("batch_size", [3, 100])
def test_outcomes_are_those_of_a_loop(batch_size: int) -> None:
    ids, labels = np.arange(10, 20), torch.arange(10) % 3
    sets: list[int] = []
    right = right_when_corrupted(net, read, NAMES, ids, labels, batch_size, lambda: sets.append(1))
    assert right.shape == (3, 5, 10) and len(sets) == 15
    for place, name in enumerate(NAMES):
        for severity in SEVERITIES:
            for row, image_id in enumerate(ids):
                (image,) = read(name, severity, np.array([image_id]))
                assert right[place, severity - 1, row] == (image.mean((1, 2)).argmax() == row % 3)
    assert 0 < right.mean() < 1


def test_means_of_accuracies() -> None:
    generator = np.random.default_rng(0)
    right, clean = generator.random((3, 5, 200)) < 0.6, generator.random(200) < 0.9
    summary = summarise_corruptions(NAMES, right, clean)
    assert summary["images"] == 200 and summary["clean"] == clean.mean()
    assert list(summary["corruptions"]) == list(NAMES)
    assert summary["corruptions"]["snow"]["severities"] == pytest.approx([right[1, s].mean() for s in range(5)])
    mean = summary["mean_accuracy"]
    assert mean["mean"] == pytest.approx(right.mean())
    assert mean["low"] < mean["mean"] < mean["high"]
    # 15 independent outcomes an image: the half width is 1.96 standard errors of a mean over images
    assert (mean["high"] - mean["low"]) / 2 == pytest.approx(1.96 * right.mean((0, 1)).std() / 200**0.5, rel=0.1)


def test_versions_of_an_image_are_no_images_of_their_own() -> None:
    """If every version has the image's one outcome, 3000 outcomes say no more than 200 do."""
    one = np.random.default_rng(0).random(200) < 0.6
    mean = summarise_corruptions(NAMES, np.broadcast_to(one, (3, 5, 200)), one)["mean_accuracy"]
    assert (mean["high"] - mean["low"]) / 2 == pytest.approx(1.96 * one.std() / 200**0.5, rel=0.1)


def test_mean_corruption_error_as_defined() -> None:
    generator = np.random.default_rng(1)
    right, reference = generator.random((3, 5, 400)) < 0.7, generator.random((3, 5, 400)) < 0.5
    clean, reference_clean = generator.random(400) < 0.95, generator.random(400) < 0.9
    plain, relative = [], []
    for own, other in zip(right, reference, strict=True):
        errors, others = [1 - row.mean() for row in own], [1 - row.mean() for row in other]
        plain.append(sum(errors) / sum(others))
        excess = sum(error - (1 - clean.mean()) for error in errors)
        relative.append(excess / sum(error - (1 - reference_clean.mean()) for error in others))
    found = mean_corruption_error(NAMES, right, clean, reference, reference_clean)
    for kind, expected in (("mce", plain), ("relative_mce", relative)):
        assert found[kind]["mean"] == pytest.approx(np.mean(expected))
        assert list(found[kind]["corruptions"].values()) == pytest.approx(expected)
        assert found[kind]["low"] < found[kind]["mean"] < found[kind]["high"]


def test_the_reference_itself_is_one_without_doubt() -> None:
    right = np.random.default_rng(2).random((3, 5, 50)) < 0.5
    clean = np.ones(50, bool)
    found = mean_corruption_error(NAMES, right, clean, right, clean)
    for kind in ("mce", "relative_mce"):
        assert [found[kind][key] for key in ("mean", "low", "high")] == pytest.approx([1, 1, 1])


def test_no_ratio_to_a_reference_that_makes_no_errors() -> None:
    right = np.random.default_rng(3).random((3, 5, 50)) < 0.5
    perfect, clean = right.copy(), np.ones(50, bool)
    perfect[1] = True
    found = mean_corruption_error(NAMES, right, clean, perfect, clean)
    assert found["mce"]["corruptions"]["snow"] is None and found["mce"]["corruptions"]["fog"] == 1
    assert found["mce"]["mean"] is found["mce"]["low"] is None
