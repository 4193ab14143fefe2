"""Which segments are spurious: every criterion on rows judged by hand, their combination, the control, refusals."""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcguard.config import Config, SpuriousConfig, load_config
from hpcguard.errors import InputError
from hpcguard.refinement.spurious import (
    check_flagged,
    flag_segments,
    misleading_evidence,
    row_quantile,
    segment_areas,
    spurious_identity,
)
from hpcguard.runs import digest_file

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
    "interval": np.array(
        [[[0.3, 0.3, 0.05, 0.3, 0.3], [9.0] * 5], [[0.2, 0.1, 0.1, 0.1, NAN], [9.0, 9.0, 9.0, 9.0, NAN]]], np.float32
    ),
    "sensitivity": np.array([[1.0, 5.0, 2.0, 4.0, 3.0], [7.0, 7.0, 7.0, 8.0, NAN]], np.float32),
    "instability": np.array([[0.01, 0.02, 0.0, 0.5, 0.0], [0.0, 0.3, 0.0, 0.0, NAN]], np.float32),
    # 3x4 pixels: areas 4, 4, 2, 1, 1 and 6, 2, 2, 2
    "segments": np.array(
        [[[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 4]], [[0, 0, 0, 1], [0, 0, 0, 1], [2, 2, 3, 3]]], np.uint8
    ),
}  # fmt: skip


def flags(*criteria: str, share: float = 1.0, rows: dict[str, Any] = ROWS, **values: Any) -> list[list[int]]:
    config = SpuriousConfig.model_validate({"criteria": criteria, "share": share, **values})
    flagged = flag_segments(rows, config, 0)
    assert flagged.shape == (2, 5) and not flagged[1, 4]  # padding
    return [np.flatnonzero(row).tolist() for row in flagged]


# -------------------------------------------------------------------------------------------------------- criteria
def test_misleading_segments_support_the_wrong_class_more_than_the_true_one() -> None:
    # wrong - true: [-1, .5, 0, .2, .8] and [.2, -.1, -.6, 1.2]
    assert flags("misleading", z=0) == [[1, 3, 4], [0, 3]]
    # errors of the difference: 0.141 everywhere but 0.5 for the second image's segment 0
    assert flags("misleading", z=1) == [[1, 3, 4], [3]]
    assert flags("misleading", z=2) == [[1, 4], [3]]
    assert misleading_evidence(ROWS, 1.0)[1, 0] == pytest.approx(0.2 - 0.5)
    assert SpuriousConfig().criteria == ("misleading",) and SpuriousConfig().misleading == "difference"


def test_misleading_by_one_label_alone() -> None:
    assert flags("misleading", misleading="against", z=0) == [[1, 4], [0, 3]]
    assert flags("misleading", misleading="against", z=1) == [[1, 4], [3]]  # -0.1 with an error of 0.3 may be 0
    assert flags("misleading", misleading="against", z=3) == [[4], [3]]
    assert flags("misleading", misleading="for-wrong", z=0) == [[1, 2, 3, 4], [0, 1, 3]]
    assert flags("misleading", misleading="for-wrong", z=1.5) == [[1, 3, 4], [3]]


def test_weight_takes_large_coefficients_of_the_true_label_of_either_sign() -> None:
    assert flags("weight", weight={"above": 0.15}) == [[0, 1, 4], [1, 2, 3]]
    # |a| sorted: 0 .1 .2 .4 .5, its 0.7 quantile 0.36; of four, .1 .2 .3 .6: 0.33
    assert flags("weight", weight={"quantile": 0.7}) == [[0, 4], [3]]
    assert flags("weight", weight={"quantile": 0.0}) == [[0, 1, 2, 4], [1, 2, 3]]  # all but the smallest
    assert flags("weight", weight={"quantile": 1.0}) == [[], []]


def test_sensitivity_and_instability() -> None:
    assert flags("sensitivity", sensitivity={"above": 3.5}) == [[1, 3], [0, 1, 2, 3]]
    assert flags("sensitivity", sensitivity={"quantile": 0.5}) == [[1, 3], [3]]  # equal values are not above
    assert flags("instability", instability={"above": 0.01}) == [[1, 3], [1]]
    # sorted 0 0 .01 .02 .5: the 0.75 quantile is .02; of 0 0 0 .3 it is .075
    assert flags("instability", instability={"quantile": 0.75}) == [[3], [1]]


def test_irrelevant_is_surely_small() -> None:
    absolute = {"coefficient": {"below": 0.25}, "interval": {"below": 0.15}}
    assert flags("irrelevant", irrelevant=absolute) == [[2], [1]]
    # the wrong label's intervals do not count; |a| below .25 are [1, 2, 3] and [0, 1]
    assert flags("irrelevant", irrelevant={**absolute, "interval": {"below": 1}}) == [[1, 2, 3], [0, 1]]
    # medians of |a|: .2 and .25; medians of the intervals: .3 and .1
    halves = {"coefficient": {"quantile": 0.5}, "interval": {"quantile": 0.5}}
    assert flags("irrelevant", irrelevant=halves) == [[2], []]
    assert flags("irrelevant", irrelevant={**halves, "interval": {"below": 1}}) == [[2, 3], [0, 1]]
    # with a cap, |a| + interval is smallest where it is strongest: .5 .15 .3 in the first image
    loose = {"coefficient": {"below": 0.25}, "interval": {"below": 1}}
    assert flags("irrelevant", irrelevant=loose, share=0.4) == [[2, 3], [0]]
    assert flags("irrelevant", irrelevant=loose, share=0.25) == [[2], [0]]


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    """For images 0 to 8: image 3 has its left half in the foreground, image 8 its first row, the others nothing."""
    inside = np.zeros((9, 3, 4), np.uint8)
    inside[3, :, :2] = 255
    inside[8, 0] = 1
    np.save(tmp_path / "masks.npy", inside)
    np.save(tmp_path / "bool.npy", inside > 0)
    return tmp_path / "masks.npy"


def test_outside_of_the_foreground(masks: Path) -> None:
    # shares in the foreground: 1 0 1 0 0 and 1/2 1/2 0 0
    assert flags("outside", foreground=masks) == [[1, 3, 4], [2, 3]]
    assert flags("outside", foreground=masks, foreground_share=0.6) == [[1, 3, 4], [0, 1, 2, 3]]
    assert flags("outside", foreground=masks.with_name("bool.npy")) == [[1, 3, 4], [2, 3]]
    assert flags("outside", foreground=masks, foreground_share=0.6, share=0.5) == [[1, 3], [2, 3]]


def test_quantiles_are_numpys() -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=(40, 12))
    counts = random.integers(1, 13, 40)
    values[np.arange(12) >= counts[:, None]] = NAN
    for quantile in (0, 0.1, 0.5, 0.83, 1):
        expected = [np.quantile(row[:count], quantile) for row, count in zip(values, counts, strict=True)]
        assert row_quantile(values, quantile)[:, 0] == pytest.approx(expected, rel=1e-12)


# ----------------------------------------------------------------------------------------------- combination and cap
def test_any_and_all() -> None:
    both = {"weight": {"above": 0.15}, "sensitivity": {"above": 3.5}}  # [0 1 4] [1 2 3] and [1 3] [0 1 2 3]
    assert flags("weight", "sensitivity", **both) == [[0, 1, 3, 4], [0, 1, 2, 3]]
    assert flags("weight", "sensitivity", combine="all", **both) == [[1], [1, 2, 3]]


def test_the_share_keeps_the_strongest() -> None:
    assert flags("misleading", z=0, share=0.4) == [[1, 4], [3]]
    assert flags("misleading", z=0, share=0.2) == [[4], []]  # a fifth of four segments is none


def test_the_share_of_several_criteria_goes_by_places_and_then_by_agreement() -> None:
    """By weight 0 4 1 and 3 2 1, by sensitivity 1 3 and 3 0 1 2: places that any scale of either leaves as they are."""
    both = {"weight": {"above": 0.15}, "sensitivity": {"above": 3.5}}
    rows = {**ROWS, "sensitivity": 1000 * ROWS["sensitivity"]}
    scaled = {**both, "sensitivity": {"above": 3500}}
    for given, config in ((ROWS, both), (rows, scaled)):
        # First of one criterion are 0 and 1; 1 is flagged by the other too. Of the second image 3 is first in both.
        assert flags("weight", "sensitivity", share=0.25, rows=given, **config) == [[1], [3]]
        assert flags("weight", "sensitivity", share=0.5, rows=given, **config) == [[0, 1], [2, 3]]
        # worst places in the second image: 1: 2, 2: 3, 3: 0
        assert flags("weight", "sensitivity", combine="all", share=0.5, rows=given, **config) == [[1], [1, 3]]


# --------------------------------------------------------------------------------------------------------- control
def grown(seed: int, count: int = 30) -> dict[str, Any]:
    """Rows of images of 8x8 pixels with up to 9 segments of very different sizes."""
    random = np.random.default_rng(seed)
    counts = random.integers(4, 10, count)
    weights = [random.dirichlet(np.ones(each) / 2) for each in counts]
    maps = np.zeros((count, 8, 8), np.uint8)
    for own, each, weight in zip(maps, counts, weights, strict=True):
        own[...] = random.choice(each, (8, 8), p=weight)
        own.reshape(-1)[:each] = np.arange(each)
    coefficients = random.normal(size=(count, 2, 9)).astype(np.float32)
    coefficients[np.broadcast_to((np.arange(9) >= counts[:, None])[:, None], coefficients.shape)] = NAN
    return {"image_id": np.arange(count) * 7, "num_segments": counts, "segments": maps, "coefficients": coefficients,
            "standard_error": np.abs(coefficients) / 9}  # fmt: skip


def test_random_segments_have_the_nearest_area_that_unflagged_ones_can_add() -> None:
    """Against all subsets of each image's unflagged segments."""
    rows = grown(1)
    guided = flag_segments(rows, SpuriousConfig(share=0.5, z=0), 5)
    random = flag_segments(rows, SpuriousConfig(share=0.5, z=0, random=True), 5)
    areas = segment_areas(rows["segments"], 9)
    assert np.array_equal(areas, [[(own == k).sum() for k in range(9)] for own in rows["segments"]])
    added = []
    for own, flagged, chosen, count in zip(areas, guided, random, rows["num_segments"], strict=True):
        wanted = own[flagged & ~chosen].sum()  # the area of the flagged ones that are not among the random ones
        others = own[:count][~flagged[:count]].tolist()
        sums = {sum(each) for size in range(len(others) + 1) for each in combinations(others, size)}
        found = own[chosen & ~flagged].sum()
        assert abs(found - wanted) == min(abs(each - wanted) for each in sums)
        assert not chosen[count:].any()
        added.append(found)
    assert len(set(added)) > 5


def test_the_control_hits_flagged_segments_as_often_as_chance() -> None:
    """Where each segment has an area of its own, only the flagged ones themselves have exactly their area."""
    count = 400
    sizes = np.array([1, 2, 4, 8, 16, 33])
    maps = np.broadcast_to(np.repeat(np.arange(6), sizes).astype(np.uint8).reshape(8, 8), (count, 8, 8))
    coefficients = np.zeros((count, 2, 6), np.float32)
    coefficients[:, 0, 4] = -1
    rows = {"image_id": np.arange(count), "num_segments": np.full(count, 6), "segments": maps,
            "coefficients": coefficients, "standard_error": np.zeros((count, 2, 6), np.float32)}  # fmt: skip
    assert flag_segments(rows, SpuriousConfig(), 0).sum(0).tolist() == [0, 0, 0, 0, count, 0]
    random = flag_segments(rows, SpuriousConfig(random=True), 0)
    hits = random[:, 4].mean()
    assert abs(hits - 16 / 64) < 4 * np.sqrt(0.25 * 0.75 / count)
    # In its place 1 + 2 + 4 + 8 = 15, or nothing beside it.
    assert ((random * sizes).sum(1) == np.where(random[:, 4], 16, 15)).all()


def test_where_no_subset_fits_the_nearest_is_taken() -> None:
    from hpcguard.refinement.spurious import _nearest_subset

    for areas, target, expected in (
        ([5, 9], 6, 5), ([5, 9], 8, 9), ([5, 9], 7, 5), ([5, 9], 2, 0), ([5, 9], 3, 5), ([5, 9], 12, 14), ([4], 0, 0),
    ):  # fmt: skip
        taken = _nearest_subset(areas, target)
        assert sum(areas[place] for place in taken) == expected and len(set(taken)) == len(taken)


def test_random_segments_belong_to_the_seed_and_the_image_id() -> None:
    rows = grown(2, 12)
    config = SpuriousConfig(share=0.5, z=0, random=True)
    first = flag_segments(rows, config, 0)
    assert np.array_equal(first, flag_segments(rows, config, 0))
    assert not np.array_equal(first, flag_segments(rows, config, 1))
    turned = flag_segments({name: values[::-1] for name, values in rows.items()}, config, 0)
    assert np.array_equal(turned[::-1], first)
    flagged = flag_segments(rows, SpuriousConfig(share=0.5, z=0), 0)
    sets = [{flag_segments(rows, config, seed)[place].tobytes() for seed in range(60)} for place in range(12)]
    for place, found in enumerate(sets):
        assert len(found) > 1 if flagged[place].any() else len(found) == 1
    assert np.mean([len(found) for found in sets]) > 5


class Sliced:
    """Like an HDF5 data set: gives an array for a slice, and keeps in mind how much was asked for."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.shape, self.most = values, values.shape, 0

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, part: slice) -> np.ndarray:
        found = self.values[part]
        self.most = max(self.most, len(found))
        return found


def test_segments_are_read_only_where_they_are_needed_and_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcguard.refinement.spurious.BLOCK_PIXELS", 5 * 64)
    rows = grown(3)
    for config, most in ((SpuriousConfig(z=0), 0), (SpuriousConfig(z=0, random=True), 5)):
        lazy = Sliced(rows["segments"])
        assert np.array_equal(flag_segments({**rows, "segments": lazy}, config, 0), flag_segments(rows, config, 0))
        assert lazy.most == most


# ----------------------------------------------------------------------------------------------- counted and refused
def test_empty_and_full_masks_are_counted_and_refused() -> None:
    flagged = np.array([[True, False], [False, False], [True, True], [False, False]])
    shares = check_flagged(flagged, np.full(4, 2), SpuriousConfig(max_empty=0.5))
    assert shares == {"flagged": 3 / 8, "empty": 0.5, "full": 0.25}
    with pytest.raises(InputError, match="50% of the images have empty masks"):
        check_flagged(flagged, np.full(4, 2), SpuriousConfig(max_empty=0.4))
    with pytest.raises(InputError, match="full masks"):
        check_flagged(np.ones((4, 2), bool), np.full(4, 2), SpuriousConfig())


def test_the_flagged_area_is_that_of_the_pixels() -> None:
    flagged = np.array([[True, False, False, False, True], [False, True, False, False, False]])
    shares = check_flagged(flagged, ROWS["num_segments"], SpuriousConfig(), ROWS["segments"])
    assert shares["area"] == pytest.approx((5 / 12 + 2 / 12) / 2)
    assert shares["flagged"] == pytest.approx((2 / 5 + 1 / 4) / 2)


@pytest.mark.parametrize(
    ("name", "key"), [("sensitivity", "attribution.sensitivity=true"), ("instability", "attribution.noisy_copies=5")]
)
def test_a_criterion_that_was_not_computed_is_refused(name: str, key: str) -> None:
    rows = {**ROWS, name: np.full((2, 5), NAN, np.float32)}
    with pytest.raises(InputError) as caught:
        flags("weight", name, rows=rows)
    line = str(caught.value)
    assert line.startswith(f"spurious.criteria = {name}: ") and key in line and "another run folder" in line
    assert "\n" not in line
    assert flags("misleading", z=0, rows=rows) == [[1, 3, 4], [0, 3]]  # which does not need it


@pytest.mark.parametrize(
    ("save", "text"),
    [(None, "no such file"), (np.zeros((9, 3, 3), bool), "masks of 3x3, the images have 3x4"),
     (np.zeros((8, 3, 4), bool), "8 masks, none for image 8"), (np.zeros((9, 12), bool), r"bool \[9, 12\]"),
     (np.zeros((9, 3, 4), np.float32), r"float32 \[9, 3, 4\]"), (b"no array", "cannot be read as a .npy")],
)  # fmt: skip
def test_foreground_that_does_not_fit_is_refused(tmp_path: Path, save: Any, text: str) -> None:
    path = tmp_path / "masks.npy"
    if isinstance(save, bytes):
        path.write_bytes(save)
    elif save is not None:
        np.save(path, save)
    with pytest.raises(InputError, match=text) as caught:
        flags("outside", foreground=path)
    assert str(caught.value).startswith(f"spurious.foreground = {path}: ") and "\n" not in str(caught.value)


def test_the_identity_has_the_masks_and_not_their_path(masks: Path) -> None:
    config = SpuriousConfig(criteria=("outside",), foreground=masks)
    identity = spurious_identity(config)
    assert identity["foreground_sha256"] == digest_file(masks) and "foreground" not in identity
    moved = masks.rename(masks.with_name("moved.npy"))
    assert spurious_identity(SpuriousConfig(criteria=("outside",), foreground=moved)) == identity
    np.save(moved, np.ones((9, 3, 4), bool))
    assert spurious_identity(SpuriousConfig(criteria=("outside",), foreground=moved)) != identity
    assert spurious_identity(SpuriousConfig(foreground=moved))["foreground_sha256"] is None
    assert spurious_identity(SpuriousConfig(z=2)) != spurious_identity(SpuriousConfig())
    with pytest.raises(InputError, match="no such file"):
        spurious_identity(config)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rule=random", ["unknown key refinement.spurious.rule = 'random'", "criteria"]),
        ("criteria=[weigth]", ["refinement.spurious.criteria", "'weigth'", "'weight'"]),
        ("criteria=[]", ["refinement.spurious.criteria", "at least 1"]),
        ("criteria=[weight,weight]", ["refinement.spurious.criteria", "weight, weight", "each criterion once"]),
        ("criteria=[outside]", ["refinement.spurious", "foreground is null", ".npy"]),
        ("combine=both", ["refinement.spurious.combine = 'both'", "'any' or 'all'"]),
        ("misleading=true", ["refinement.spurious.misleading = True", "'against'"]),
        ("weight={}", ["refinement.spurious.weight", "above", "quantile"]),
        ("weight={above: 1, quantile: 0.5}", ["refinement.spurious.weight", "above = 1 and quantile = 0.5", "null"]),
        ("weight.quantile=1.5", ["refinement.spurious.weight.quantile = 1.5", "less than or equal to 1"]),
        ("irrelevant.interval={}", ["refinement.spurious.irrelevant.interval", "below", "quantile"]),
        ("sensitivity.below=1", ["refinement.spurious.sensitivity.below = 1", "above"]),
        ("share=2", ["refinement.spurious.share = 2", "less than or equal to 1"]),
    ],
)
def test_wrong_keys_are_one_line(tmp_path: Path, override: str, expected: list[str]) -> None:
    (tmp_path / "c.yaml").write_text("run: somewhere\n")
    with pytest.raises(InputError) as caught:
        load_config(tmp_path / "c.yaml", [f"refinement.spurious.{override}"])
    assert "\n" not in str(caught.value)
    for part in expected:
        assert part in str(caught.value)


def test_a_control_says_which_of_two_thresholds_it_drops() -> None:
    changes = {"weight": {"above": 0.1}}
    with pytest.raises(InputError, match=r"controls.other.spurious.weight: above = 0.1 and quantile = 0.8.*null"):
        Config.model_validate({"controls": {"other": {"spurious": changes}}})
    changes["weight"]["quantile"] = None  # type: ignore[assignment]
    config = Config.model_validate(
        {"controls": {"other": {"spurious": changes}, "random": {"spurious": {"random": 1}}}}
    )
    assert config.arm("other").spurious.weight.above == 0.1
    assert config.arm("random").spurious.random and config.arm("random").spurious.criteria == ("misleading",)
