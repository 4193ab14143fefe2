"""How good a model's explanations are, image by image. N images, S segments."""

from collections.abc import Callable

import numpy as np
from scipy.stats import rankdata
from torch import Tensor

from hpcguard.attribution import LimeConfig, explain_batch
from hpcguard.attribution.explain import Predict
from hpcguard.metrics.attribution import topk_jaccard
from hpcguard.metrics.faithfulness import area_under_curve, deletion_curve, insertion_curve, order_by_coefficient
from hpcguard.metrics.stability import mean_pairwise_jaccard

Arrays = dict[str, np.ndarray]


def explanation_quality(
    predict: Predict, x: Tensor, attacked: Tensor, ids: np.ndarray, targets: np.ndarray, config: LimeConfig,
    flagged: np.ndarray | None = None, repeats: int = 2, top: int = 5, done: Callable[[int], None] = lambda count: None,
) -> Arrays:  # fmt: skip
    """Figures of each image's explanation of targets[:, 0], float64 [N] each.

    predict: probabilities, as for explain_batch. attacked: adversarial examples of x [N, C, H, W]; they are explained
    on the segments and sampling rows of the clean images. flagged: bool [N, S] on those segments. done: called with
    the number of images of each unit.

    stability: top-k Jaccard index between sampling seeds; deletion, insertion: areas under the curves (RISE);
    faithfulness: insertion less deletion; attacked_jaccard, attacked_spearman: agreement of clean and attacked image,
    by their top k and by the rank correlation of all coefficients (NaN if constant); flagged_share: see there.
    """
    parts = []
    for start in range(0, len(x), config.unit):
        rows = slice(start, start + config.unit)
        own = None if flagged is None else flagged[rows]
        parts.append(
            _unit_quality(predict, x[rows], attacked[rows], ids[rows], targets[rows], config, own, repeats, top)
        )
        done(len(ids[rows]))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _unit_quality(
    predict: Predict, x: Tensor, attacked: Tensor, ids: np.ndarray, targets: np.ndarray, config: LimeConfig,
    flagged: np.ndarray | None, repeats: int, top: int,
) -> Arrays:  # fmt: skip
    labels = targets[:, :1]
    first = explain_batch(predict, x, ids, config, targets=labels)
    found = [first.coefficients[:, 0]]
    for repeat in range(1, repeats):
        other_seed = config.model_copy(update={"seed": config.seed + repeat})
        again = explain_batch(predict, x, ids, other_seed, targets=labels, segments=first.segments)
        found.append(again.coefficients[:, 0])
    moved = explain_batch(predict, attacked, ids, config, targets=labels, segments=first.segments).coefficients[:, 0]
    areas = {
        name: area_under_curve(
            curve(predict, x, first.segments.astype(np.int64), order_by_coefficient(found[0]), labels[:, 0],
                  config.fill, config.batch_size),
            first.num_segments,
        )
        for name, curve in (("deletion", deletion_curve), ("insertion", insertion_curve))
    }  # fmt: skip
    out = {
        "stability": np.array([mean_pairwise_jaccard(each, top) for each in np.stack(found, axis=1)]),
        **areas,
        "faithfulness": areas["insertion"] - areas["deletion"],
        "attacked_jaccard": np.array([topk_jaccard(*pair, top) for pair in zip(found[0], moved, strict=True)]),
        "attacked_spearman": spearman(found[0], moved),
    }
    return out if flagged is None else {**out, "flagged_share": flagged_share(found[0], flagged)}


def flagged_share(coefficients: np.ndarray, flagged: np.ndarray) -> np.ndarray:
    """Share of an image's sum of |coefficient| that lies on flagged segments, float64 [N], of [N, S] and bool [N, S];
    NaN where every coefficient is 0. What chance has is the share of its segments that are flagged."""
    magnitude = np.nan_to_num(np.abs(coefficients.astype(np.float64)))
    width = magnitude.shape[1]
    if flagged[:, width:].any():
        raise ValueError(f"flagged: segments beyond the {width} that there are")
    total = magnitude.sum(1)
    on = (magnitude[:, : flagged.shape[1]] * flagged[:, :width]).sum(1)
    return np.divide(on, total, out=np.full(len(total), np.nan), where=total > 0)


def spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Rank correlation of an image's coefficients in two explanations [N, S], equal ones sharing their mean rank,
    float64 [N]; NaN where either is constant."""
    return np.array([_rank_correlation(*pair) for pair in zip(first, second, strict=True)])


def _rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    own = ~np.isnan(first)
    ranks = np.stack([rankdata(first[own]), rankdata(second[own])])
    ranks -= ranks.mean(1, keepdims=True)
    lengths = np.linalg.norm(ranks, axis=1).prod()
    return float(ranks[0] @ ranks[1] / lengths) if lengths else float("nan")
