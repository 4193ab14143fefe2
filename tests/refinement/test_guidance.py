"""Spurious segments against hand-computed values."""

import numpy as np
import pytest

from hpcguard.config import SpuriousConfig
from hpcguard.errors import InputError
from hpcguard.refinement.spurious import check_flagged, flag_segments, misleading_evidence

NAN = np.nan
ROWS = {
    "image_id": np.array([3, 8]),
    "num_segments": np.array([5, 4]),
    # true label, then the strongest wrong one; the second image has four segments only
    "coefficients": np.array(
        [[[0.5, -0.2, 0.1, 0.0, -0.4], [-0.5, 0.3, 0.1, 0.2, 0.4]],
         [[-0.1, 0.2, 0.3, -0.6, NAN], [0.1, 0.1, -0.3, 0.6, NAN]]], dtype=np.float32,
    ),
    "standard_error": np.array(
        [[[0.1] * 5, [0.1] * 5], [[0.3, 0.1, 0.1, 0.1, NAN], [0.4, 0.1, 0.1, 0.1, NAN]]], dtype=np.float32
    ),
}  # fmt: skip


def flags(share: float = 1.0, z: float = 0.0, rule: str = "misleading", seed: int = 0) -> list[list[int]]:
    flagged = flag_segments(ROWS, SpuriousConfig(rule=rule, share=share, z=z), seed)
    return [np.flatnonzero(row).tolist() for row in flagged]


def test_misleading_segments_support_the_wrong_class_more_than_the_true_one() -> None:
    # wrong - true: [-1, .5, 0, .2, .8] and [.2, -.1, -.6, 1.2]
    assert flags() == [[1, 3, 4], [0, 3]]


def test_the_share_keeps_the_strongest() -> None:
    assert flags(share=0.4) == [[1, 4], [3]]
    assert flags(share=0.2) == [[4], []]  # a fifth of four segments is none


def test_what_lies_within_its_error_is_not_flagged() -> None:
    # errors of the difference: 0.141 everywhere but 0.5 for the second image's segment 0
    assert flags(z=1.0) == [[1, 3, 4], [3]]
    assert flags(z=2.0) == [[1, 4], [3]]
    assert misleading_evidence(ROWS, 1.0)[1, 0] == pytest.approx(0.2 - 0.5)


def test_the_papers_rule_takes_large_weights_of_either_sign() -> None:
    assert flags(share=0.4, rule="weight") == [[0, 4], [3]]


def test_the_random_control_has_masks_of_equal_size() -> None:
    guided = flag_segments(ROWS, SpuriousConfig(share=1, z=0), 0)
    seen = set()
    for seed in range(40):
        random = flag_segments(ROWS, SpuriousConfig(rule="random", share=1, z=0), seed)
        assert np.array_equal(random.sum(1), guided.sum(1))
        assert not random[1, 4]  # padding
        seen.add(tuple(np.flatnonzero(random[0])))
    assert len(seen) > 5


def test_empty_and_full_masks_are_counted_and_refused() -> None:
    flagged = np.array([[True, False], [False, False], [True, True], [False, False]])
    shares = check_flagged(flagged, np.full(4, 2), SpuriousConfig(max_empty=0.5))
    assert shares == {"flagged": 3 / 8, "empty": 0.5, "full": 0.25}
    with pytest.raises(InputError, match="50% of the images have empty masks"):
        check_flagged(flagged, np.full(4, 2), SpuriousConfig(max_empty=0.4))
    with pytest.raises(InputError, match="full masks"):
        check_flagged(np.ones((4, 2), bool), np.full(4, 2), SpuriousConfig())
