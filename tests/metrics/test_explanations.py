"""Figures of explanations against scipy, against hand-made ones and against the parts that they are made of."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from hpcguard.attribution import LimeConfig, explain_batch
from hpcguard.metrics.explanations import explanation_quality, flagged_share, spearman

NAN = np.nan
CONFIG = LimeConfig(segmentation="grid", num_segments=4, num_samples=64, unit=4)
WEIGHTS = torch.tensor([0.4, -0.1, 0.2, 0.05])


def quarters(x: Tensor) -> Tensor:
    """Means of the four quarters, [n, 4]."""
    return x.mean(1).unfold(1, 4, 4).unfold(2, 4, 4).mean((3, 4)).flatten(1)


def predict(x: Tensor) -> Tensor:
    """Linear in how far each quarter's first pixel is from its mean, which hiding it takes away."""
    first = x.mean(1)[:, ::4, ::4].flatten(1) - quarters(x)
    probability = 0.5 + (first * WEIGHTS).sum(1)
    return torch.stack([probability, 1 - probability], 1)


def pictures(count: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).uniform(0.3, 0.7, (count, 1, 8, 8)).astype(np.float32))


def quality(x: Tensor, attacked: Tensor, **values: object) -> dict[str, np.ndarray]:
    ids = np.arange(5, 5 + len(x))
    config = CONFIG.model_copy(update={key: values.pop(key) for key in ("unit",) if key in values})
    targets = np.zeros((len(x), 1), np.int64)
    return explanation_quality(predict, x, attacked, ids, targets, config, **values)  # type: ignore[arg-type]


def test_a_linear_model_is_explained_perfectly() -> None:
    """All 16 rows of four segments are known, so every seed agrees; the curves are those of the sorted effects."""
    x = pictures(6)
    flagged = np.zeros((6, 4), bool)
    flagged[:, 1] = True
    counts: list[int] = []
    found = quality(x, x, flagged=flagged, top=2, done=counts.append)
    assert counts == [4, 2]
    for name in ("stability", "attacked_jaccard", "attacked_spearman"):
        assert found[name] == pytest.approx(1)
    effects = ((x.mean(1)[:, ::4, ::4].flatten(1) - quarters(x)) * WEIGHTS).double().numpy()
    ordered = -np.sort(-effects, axis=1)
    taken = np.concatenate([np.zeros((6, 1)), ordered.cumsum(1)], axis=1)
    trapezoids = (taken[:, 1:] + taken[:, :-1]).mean(1) / 2
    assert found["deletion"] == pytest.approx(0.5 + effects.sum(1) - trapezoids, abs=1e-5)
    assert found["insertion"] == pytest.approx(0.5 + trapezoids, abs=1e-5)
    assert found["faithfulness"] == pytest.approx(found["insertion"] - found["deletion"])
    assert (found["faithfulness"] > 0).all()
    explained = explain_batch(predict, x, np.arange(5, 11), CONFIG, targets=np.zeros((6, 1), int))
    assert found["flagged_share"] == pytest.approx(flagged_share(explained.coefficients[:, 0], flagged))
    assert abs(effects[:, 1]) / abs(effects).sum(1) == pytest.approx(found["flagged_share"], abs=0.05)  # ridge


def test_an_attack_that_turns_the_explanation_round_is_seen() -> None:
    x = pictures(3)
    mean = quarters(x).reshape(3, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    found = quality(x, 2 * mean - x, top=1)  # every effect changes its sign, and no |effect| its size
    assert found["attacked_spearman"] == pytest.approx(-1)
    assert found["attacked_jaccard"] == pytest.approx(1)


def test_figures_do_not_depend_on_the_unit_and_no_flags_give_no_share() -> None:
    x = pictures(5)
    attacked = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    one, other = (quality(x, attacked, unit=unit) for unit in (2, 100))
    assert "flagged_share" not in one
    for name in one:
        assert one[name] == pytest.approx(other[name], abs=1e-6)


def test_sampling_noise_lowers_stability() -> None:
    """Too few rows for nine segments of a rough model: seeds differ."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 2, generator=generator)

    def rough(x: Tensor) -> Tensor:
        return torch.sin(9 * (x.flatten(1) @ weight)).softmax(1)

    config = CONFIG.model_copy(update={"num_segments": 9, "num_samples": 24})
    x, targets = pictures(8), np.zeros((8, 1), np.int64)
    few = explanation_quality(rough, x, x, np.arange(8), targets, config, repeats=3, top=3)
    many = config.model_copy(update={"num_samples": 512})  # all rows
    all_rows = explanation_quality(rough, x, x, np.arange(8), targets, many, repeats=3, top=3)
    assert few["stability"].mean() < 0.9 and all_rows["stability"] == pytest.approx(1)
    assert few["attacked_jaccard"] == pytest.approx(1)  # the same image on the same rows


def test_share_on_flagged_segments() -> None:
    coefficients = np.array([[0.5, -0.3, 0.2, NAN], [0.0, 0.0, NAN, NAN], [1.0, -1.0, 1.0, 1.0]])
    flagged = np.array([[False, True, True, False], [True, False, False, False], [True, True, True, True]])
    assert flagged_share(coefficients, flagged) == pytest.approx([0.5, NAN, 1.0], nan_ok=True)
    wider = np.pad(flagged, ((0, 0), (0, 2)))
    assert flagged_share(coefficients, wider) == pytest.approx([0.5, NAN, 1.0], nan_ok=True)
    assert flagged_share(coefficients, flagged[:, :2]) == pytest.approx([0.3, NAN, 0.5], nan_ok=True)
    wider[0, 5] = True
    with pytest.raises(ValueError, match="segments beyond the 4"):
        flagged_share(coefficients, wider)


def test_rank_correlation_is_scipys() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 6, (2, 20, 9)).astype(float)  # with ties
    first[3, 5:] = second[3, 5:] = NAN
    found = spearman(first, second)
    for row, one, other in zip(found, first, second, strict=True):
        own = ~np.isnan(one)
        assert row == pytest.approx(stats.spearmanr(one[own], other[own]).statistic)
    assert np.isnan(spearman(np.ones((1, 4)), np.arange(4.0)[None])).all()
