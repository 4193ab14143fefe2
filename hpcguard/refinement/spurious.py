"""Which segments are spurious: plain functions over store rows (N images, labels: true then runner-up, S segments).

Every criterion judges an image by its own row, so rows may come in blocks and in any order.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hpcguard.config import SpuriousConfig
from hpcguard.config.spurious import Above, Below
from hpcguard.data.foreground import open_foreground
from hpcguard.errors import InputError
from hpcguard.randomness import keyed_generator
from hpcguard.runs import digest_file

Rows = Mapping[str, Any]
"""Columns by name: arrays, or anything that gives an array when it is sliced, such as an HDF5 data set."""

BLOCK_PIXELS = 2**22  # of segment maps held at once
BLOCK_ROWS = 1024
ALWAYS = ("image_id", "num_segments", "coefficients", "standard_error")
ALSO = {"sensitivity": "sensitivity", "instability": "instability", "irrelevant": "interval", "outside": "segments"}
NEEDS = {"sensitivity": "attribution.sensitivity=true", "instability": "attribution.noisy_copies=5"}


def flag_segments(rows: Rows, config: SpuriousConfig, seed: int) -> np.ndarray:
    """Flagged segments, bool [N, S]; never padding, at most config.share of an image's segments.

    What `criteria` flag is combined; of too many, the first by this order are kept: with combine = any, the best place
    that a segment has among those that one criterion flags, with all, its worst; then the sum of its places; then its
    number. With config.random, random segments of the same area instead. Raises InputError where a criterion's column
    was not computed, or foreground masks do not fit.
    """
    masks = None
    if "outside" in config.criteria and config.foreground is not None:
        masks = open_foreground(config.foreground, rows["image_id"][:], tuple(rows["segments"].shape[1:]))
    for name in config.criteria:
        if len(rows["num_segments"]) and not is_computed(rows, name):
            raise InputError(
                f"spurious.criteria = {name}: the store's {name} was not computed; set {NEEDS[name]} and attribute in "
                "another run folder (run=...), or choose other criteria"
            )
    flagged = np.zeros((len(rows["num_segments"]), rows["coefficients"].shape[2]), bool)
    columns = {*ALWAYS, *(ALSO[name] for name in config.criteria if name in ALSO)}
    columns |= {"segments"} if config.random else set()
    for part in _blocks(rows, "segments" in columns):
        block = {name: np.asarray(rows[name][part]) for name in columns}
        own = None if masks is None else np.asarray(masks[block["image_id"]])
        most = np.floor(config.share * block["num_segments"]).astype(int)
        judged = [judge(block, name, config, own) for name in config.criteria]
        flagged[part] = _strongest(judged, config.combine, most)
        if config.random:
            areas = segment_areas(block["segments"], flagged.shape[1])
            flagged[part] = _random_like(flagged[part], areas, block, seed)
    return flagged


def spurious_identity(config: SpuriousConfig) -> dict[str, Any]:
    """What flags depend on beside the store: every key, and the foreground masks' digest in place of their path."""
    masks = config.foreground if "outside" in config.criteria else None
    if masks is not None and not masks.is_file():
        raise InputError(f"spurious.foreground = {masks}: no such file; save masks [images, H, W] with numpy.save")
    return {**config.identity(), "foreground_sha256": digest_file(masks) if masks else None}


def is_computed(rows: Rows, criterion: str) -> bool:
    """Whether the rows have what a criterion looks at: attribution leaves a column NaN that it does not compute."""
    return criterion not in NEEDS or (criterion in rows and not np.isnan(rows[criterion][:1]).all())


def judge(
    rows: Rows, criterion: str, config: SpuriousConfig, foreground: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What one criterion flags, bool [N, S], and how strong its evidence is, float64 [N, S]: only its order counts.

    foreground: for outside, masks [N, H, W] of these rows.
    """
    coefficients = np.asarray(rows["coefficients"], np.float64)
    if criterion == "misleading":
        evidence = misleading_evidence(rows, config.z, config.misleading)
        return evidence > 0, evidence
    if criterion == "weight":
        weight = np.abs(coefficients[:, 0])
        return _above(weight, config.weight), weight
    if criterion in NEEDS:
        values = np.asarray(rows[criterion], np.float64)
        return _above(values, getattr(config, criterion)), values
    if criterion == "irrelevant":
        weight, interval = np.abs(coefficients[:, 0]), np.asarray(rows["interval"][:, 0], np.float64)
        small = _below(weight, config.irrelevant.coefficient) & _below(interval, config.irrelevant.interval)
        return small, -(weight + interval)
    if foreground is None:
        raise ValueError(f"criterion {criterion!r}: unknown, or foreground masks are missing")
    inside = foreground_share(rows["segments"], foreground, coefficients.shape[2])
    return inside < config.foreground_share, -inside


def misleading_evidence(rows: Rows, z: float, kind: str = "difference") -> np.ndarray:
    """How much a segment speaks for the wrong, less z standard errors, [N, S]; see SpuriousConfig.misleading.

    The two errors of a difference are added as if independent; the labels share their samples, and in a classifier
    one's gain is mostly the other's loss, so this is the order of the truth and not a bound.
    """
    true, wrong = rows["coefficients"][:, 0], rows["coefficients"][:, 1]
    true_error, wrong_error = rows["standard_error"][:, 0], rows["standard_error"][:, 1]
    if kind == "against":
        return -true - z * true_error
    if kind == "for-wrong":
        return wrong - z * wrong_error
    return wrong - true - z * np.hypot(true_error, wrong_error)


def row_quantile(values: np.ndarray, quantile: float) -> np.ndarray:
    """Each row's quantile of its numbers, linearly interpolated, [N, 1]; NaN padding does not count.

    np.nanquantile goes through the rows in Python, which a million of them wait a minute for.
    """
    ordered = np.sort(values, axis=1)  # NaN last
    place = quantile * (np.isfinite(values).sum(1, keepdims=True) - 1)
    low = np.floor(place).astype(int)
    below = np.take_along_axis(ordered, low, 1)
    above = np.take_along_axis(ordered, np.ceil(place).astype(int), 1)
    return below + (above - below) * (place - low)


def _above(values: np.ndarray, threshold: Above) -> np.ndarray:
    """NaN padding compares as not above."""
    return values > (row_quantile(values, threshold.quantile) if threshold.quantile is not None else threshold.above)


def _below(values: np.ndarray, threshold: Below) -> np.ndarray:
    return values < (row_quantile(values, threshold.quantile) if threshold.quantile is not None else threshold.below)


def segment_areas(segments: np.ndarray, count: int) -> np.ndarray:
    """Pixels of each segment, int64 [N, count], of maps [N, H, W]."""
    return _sums(segments, None, count).astype(np.int64)


def foreground_share(segments: np.ndarray, foreground: np.ndarray, count: int) -> np.ndarray:
    """Share of each segment's pixels where foreground [N, H, W] is not 0, float64 [N, count]; NaN for padding."""
    areas = _sums(segments, None, count)
    with np.errstate(invalid="ignore"):
        return _sums(segments, np.asarray(foreground) != 0, count) / areas


def _sums(segments: np.ndarray, values: np.ndarray | None, count: int) -> np.ndarray:
    """Sums of values (None: ones) over the pixels of each segment, [N, count]."""
    maps = np.asarray(segments)
    places = maps.reshape(len(maps), -1) + count * np.arange(len(maps))[:, None]
    weights = None if values is None else values.ravel()
    return np.bincount(places.ravel(), weights, len(maps) * count).reshape(len(maps), count)


def _strongest(judged: Sequence[tuple[np.ndarray, np.ndarray]], combine: str, most: np.ndarray) -> np.ndarray:
    """The `most[n]` strongest of the segments that any or all of the criteria flag in each row."""
    flags = np.stack([flag for flag, _ in judged])
    places = np.stack([_places(np.where(flag, -strength, np.inf)) for flag, strength in judged])
    places[~flags] = flags.shape[2]
    flagged, place = (flags.any(0), places.min(0)) if combine == "any" else (flags.all(0), places.max(0))
    order = place * (flags.shape[2] * len(flags) + 1) + places.sum(0)
    return flagged & (_places(np.where(flagged, order, np.inf)) < most[:, None])


def _places(values: np.ndarray) -> np.ndarray:
    """Place of each value in its row by ascending order, of equal ones the first first."""
    return np.argsort(np.argsort(values, axis=1, kind="stable"), axis=1)


def _random_like(flagged: np.ndarray, areas: np.ndarray, rows: Rows, seed: int) -> np.ndarray:
    """Random segments of each image of the area of the flagged ones: the control for whether it matters which.

    Often nothing but the flagged segments themselves has exactly their area, and the control would be what it controls.
    So a flagged segment is among the random ones with the probability of chance, the flagged share of the area, and
    unflagged ones whose area comes nearest to what is left make up the rest.
    """
    chosen = np.zeros_like(flagged)
    for row, guided, image_id, own, count in zip(
        chosen, flagged, rows["image_id"], areas, rows["num_segments"], strict=True
    ):
        generator = keyed_generator("spurious", seed, int(image_id))
        order = generator.permutation(int(count))
        target = int(own[guided].sum())
        row[:count] = guided[:count] & (generator.random(int(count)) * own.sum() < target)
        others = order[~guided[order]]
        row[others[_nearest_subset(own[others].tolist(), target - int(own[row].sum()))]] = True
    return chosen


def _nearest_subset(areas: list[int], target: int) -> list[int]:
    """Places of areas whose sum comes nearest to `target` (the smaller sum if two are as near), of the first ones.

    Sums that the first k areas can make are the bits of an integer: a shift and an or for each area.
    """
    reach = [1]
    most = (1 << (2 * target + 1)) - 1  # 0 can be made, so nothing beyond twice the target is nearer
    for area in areas:
        reach.append((reach[-1] | reach[-1] << area) & most)
    low = (reach[-1] & ((1 << (target + 1)) - 1)).bit_length() - 1
    beyond = reach[-1] >> target
    high = target + (beyond & -beyond).bit_length() - 1
    left = high if beyond and high - target < target - low else low
    taken = []
    for place in range(len(areas) - 1, -1, -1):
        if not reach[place] >> left & 1:
            taken.append(place)
            left -= areas[place]
    return taken


def _blocks(rows: Rows, with_segments: bool) -> Iterator[slice]:
    step = BLOCK_ROWS
    if with_segments:
        step = max(1, min(step, BLOCK_PIXELS // int(np.prod(rows["segments"].shape[1:]))))
    for start in range(0, len(rows["num_segments"]), step):
        yield slice(start, start + step)


def check_flagged(
    flagged: np.ndarray, num_segments: np.ndarray, config: SpuriousConfig, segments: Any = None
) -> dict[str, float]:
    """Shares of segments flagged, of images with none and with all flagged; with segments [N, H, W], of image area too.

    Raises InputError beyond config.max_empty: training on empty masks would be called guided and be none.
    """
    count = flagged.sum(1)
    shares = {
        "flagged": float((count / num_segments).mean()),
        "empty": float((count == 0).mean()),
        "full": float((count == num_segments).mean()),
    }
    if segments is not None:
        shares["area"] = _flagged_area(flagged, segments)
    for kind in ("empty", "full"):
        if shares[kind] > config.max_empty:
            raise InputError(
                f"spurious.criteria = {', '.join(config.criteria)}: {shares[kind]:.0%} of the images have {kind} "
                f"masks, more than spurious.max_empty = {config.max_empty}; change share ({config.share}), "
                f"z ({config.z}) or the criteria's thresholds"
            )
    return shares


def _flagged_area(flagged: np.ndarray, segments: Any) -> float:
    """Mean share of the images' pixels in flagged segments."""
    total = 0.0
    for part in _blocks({"segments": segments, "num_segments": flagged}, with_segments=True):
        areas = segment_areas(segments[part], flagged.shape[1])
        total += float(((areas * flagged[part]).sum(1) / areas.sum(1)).sum())
    return total / len(flagged)
