"""Deletion and insertion curves against additive models, whose curves are sums, and a plain loop over copies."""

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpcguard.attribution import LimeConfig, explain_batch
from hpcguard.metrics.faithfulness import area_under_curve, deletion_curve, insertion_curve, order_by_coefficient

NAN = np.nan
IMAGES = torch.rand(3, 2, 6, 6, generator=torch.Generator().manual_seed(1))
# 4, 2 and 3 segments that are not rectangles.
SEGMENTS = np.stack([(np.arange(36).reshape(6, 6) * 7 % 36) * count // 36 for count in (4, 2, 3)])
ORDER = np.array([[2, 0, 3, 1], [1, 0, -1, -1], [0, 2, 1, -1]])
TARGET = np.array([1, 0, 2])
COUNTS = np.array([4, 2, 3], np.uint16)
COLOURS = torch.rand(3, 2, 6, 6, generator=torch.Generator().manual_seed(3))
WEIGHTS = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(2)) / 72


def additive(x: Tensor) -> Tensor:
    return torch.einsum("nchw,kchw->nk", x, WEIGHTS)


def fills(fill: str | float | Tensor) -> np.ndarray:
    """What hidden pixels show, by a loop over segments."""
    if isinstance(fill, Tensor):
        return np.broadcast_to(fill.double().numpy(), IMAGES.shape)
    hidden = np.full(IMAGES.shape, 0.0 if fill == "mean" else float(fill))
    if fill == "mean":
        for image, result, segments in zip(IMAGES.double().numpy(), hidden, SEGMENTS, strict=True):
            for segment in np.unique(segments):
                result[:, segments == segment] = image[:, segments == segment].mean(1, keepdims=True)
    return hidden


def contributions(hidden: np.ndarray) -> np.ndarray:
    """How much each segment adds to the target of the additive model when it is shown, [B, 4]."""
    parts = WEIGHTS.double().numpy()[TARGET] * (IMAGES.double().numpy() - hidden)
    return np.array([[parts[i][:, SEGMENTS[i] == j].sum() for j in range(4)] for i in range(3)])


@pytest.mark.parametrize(
    "fill", ["mean", 0.25, COLOURS[:1, :, :1, :1], COLOURS], ids=["mean", "constant", "colour", "own"]
)
def test_curves_of_an_additive_model_in_closed_form(fill: str | float | Tensor) -> None:
    hidden = fills(fill)
    gains = contributions(hidden)
    whole = (WEIGHTS.double().numpy()[TARGET] * IMAGES.double().numpy()).sum((1, 2, 3))
    empty = (WEIGHTS.double().numpy()[TARGET] * hidden).sum((1, 2, 3))
    deletion = deletion_curve(additive, IMAGES, SEGMENTS, ORDER, TARGET, fill)
    insertion = insertion_curve(additive, IMAGES, SEGMENTS, ORDER, TARGET, fill)
    assert deletion.shape == insertion.shape == (3, 5)
    for i in range(3):
        steps = [0.0, *(gains[i, j] for j in ORDER[i] if j >= 0)]
        changes = np.cumsum(steps + [0.0] * (5 - len(steps)))  # past its own segments the curve stays
        assert deletion[i] == pytest.approx(whole[i] - changes, abs=1e-6)
        assert insertion[i] == pytest.approx(empty[i] + changes, abs=1e-6)
        assert insertion[i, -1] == pytest.approx(whole[i], abs=1e-6)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3), nn.Softmax(1)).eval()


NET = small_net()


@pytest.mark.parametrize("batch_size", [1, 3, 5, 100])
def test_curves_equal_a_loop_for_any_batch_size(batch_size: int) -> None:
    hidden = fills("mean")
    sizes = []

    def counted(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return NET(x)

    deletion = deletion_curve(counted, IMAGES, SEGMENTS, ORDER, TARGET, batch_size=batch_size)
    assert sum(sizes) == 5 + 3 + 4  # no copy twice
    assert len(sizes) == -(-12 // batch_size) and max(sizes) <= batch_size
    insertion = insertion_curve(counted, IMAGES, SEGMENTS, ORDER, TARGET, batch_size=batch_size)
    for i in range(3):
        for step in range(int(COUNTS[i]) + 1):
            changed = np.isin(SEGMENTS[i], ORDER[i, :step])
            for curve, copy in (
                (deletion, np.where(changed, hidden[i], IMAGES[i])),
                (insertion, np.where(changed, IMAGES[i], hidden[i])),
            ):
                with torch.no_grad():
                    expected = NET(torch.from_numpy(copy).float()[None])[0, TARGET[i]].item()
                assert curve[i, step] == pytest.approx(expected, abs=1e-6)


def test_a_curve_does_not_depend_on_the_other_images() -> None:
    together = deletion_curve(NET, IMAGES, SEGMENTS.astype(np.uint16), torch.from_numpy(ORDER), TARGET)
    alone = deletion_curve(NET, IMAGES[1:2], SEGMENTS[1:2], ORDER[1:2, :2], TARGET[1:2])
    assert alone.shape == (1, 3)
    assert together[1] == pytest.approx(np.append(alone[0], [alone[0, -1]] * 2), abs=1e-6)


def test_segments_that_the_order_leaves_out_stay() -> None:
    top = ORDER[:1, :2]
    full = deletion_curve(NET, IMAGES[:1], SEGMENTS[:1], ORDER[:1], TARGET[:1])
    assert deletion_curve(NET, IMAGES[:1], SEGMENTS[:1], top, TARGET[:1]) == pytest.approx(full[:, :3], abs=1e-6)


@pytest.mark.parametrize(
    ("row", "wrong"), [(0, [2, 0, 2, 1]), (1, [0, -1, 1, -1]), (1, [0, 1, 2, -1]), (2, [0, 1, -2, -1])]
)
def test_a_wrong_order_is_refused(row: int, wrong: list[int]) -> None:
    order = ORDER.copy()
    order[row] = wrong
    with pytest.raises(ValueError, match="order: expected"):
        deletion_curve(NET, IMAGES, SEGMENTS, order, TARGET)


def test_wrong_shapes_and_probabilities_are_refused() -> None:
    with pytest.raises(ValueError, match="segments"):
        deletion_curve(NET, IMAGES, SEGMENTS[:2], ORDER, TARGET)
    with pytest.raises(ValueError, match="target"):
        insertion_curve(NET, IMAGES, SEGMENTS, ORDER, TARGET[:, None])
    # The mean fill keeps NaN of one image to itself.
    images = IMAGES.clone()
    images[1] = torch.nan
    with pytest.raises(ValueError, match=r"images \[1\]"):
        deletion_curve(NET, images, SEGMENTS, ORDER, TARGET)


def test_area_under_curve() -> None:
    curves = np.array([[1.0, 0.5, 0.0, 0.0, 0.0], [1.0, 0.5, 0.0, 0.0, 0.0], [0.2, 0.8, 0.8, 0.8, 0.8]])
    # 0.75 + 0.25 over 4 steps and over 2, and 0.5 over the only step; what follows an image's segments does not count.
    assert area_under_curve(curves, np.array([4, 2, 1])) == pytest.approx([0.25, 0.5, 0.5])
    curves[2, 2:] = NAN
    assert area_under_curve(curves, np.array([4, 2, 1], np.uint16)) == pytest.approx([0.25, 0.5, 0.5])
    for counts in ([4, 2, 0], [4, 2, 5], [4, 2]):
        with pytest.raises(ValueError, match="num_segments"):
            area_under_curve(curves, np.array(counts))


def test_order_by_coefficient() -> None:
    coefficients = np.array([[0.1, -0.9, 0.5, 0.0], [0.2, 0.2, NAN, NAN], [-2.0, -1.0, -1.0, NAN]])
    order = order_by_coefficient(coefficients)
    assert order.dtype == np.int64
    assert order.tolist() == [[2, 0, 3, 1], [0, 1, -1, -1], [1, 2, 0, -1]]


def test_limes_order_has_the_best_areas_of_all_orders() -> None:
    """Of an additive model no order deletes faster or inserts faster than by contribution, which lime finds."""
    explained = explain_batch(
        additive, IMAGES, np.arange(3), LimeConfig(num_samples=256, ridge=1e-6), TARGET[:, None], SEGMENTS
    )
    order = order_by_coefficient(explained.coefficients[:, 0])

    def areas(order: np.ndarray) -> np.ndarray:
        curves = (curve(additive, IMAGES, SEGMENTS, order, TARGET) for curve in (deletion_curve, insertion_curve))
        return np.stack([area_under_curve(each, explained.num_segments) for each in curves])

    best = areas(order)
    for change in permutations(range(4)):
        # Only the image of four segments has all 24 orders; the others keep theirs.
        other = areas(np.vstack([change, order[1:]]))
        assert best[0, 0] <= other[0, 0] + 1e-9
        assert best[1, 0] >= other[1, 0] - 1e-9
        if list(change) != order[0].tolist():
            assert other[0, 0] - best[0, 0] > 1e-5
