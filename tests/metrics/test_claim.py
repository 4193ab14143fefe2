"""The claim measured on a small net: the same as its parts called one by one, and on comparable images only."""

import numpy as np
import pytest
import torch
from torch import nn

from hpcguard.attribution import LimeConfig, explain_batch
from hpcguard.config import SpuriousConfig
from hpcguard.config.explanations import VulnerabilityConfig
from hpcguard.errors import InputError
from hpcguard.metrics.claim import explained_rows, flagged_and_random, measure_claim
from hpcguard.metrics.vulnerability import attack_pixels, pixels_of

CONFIG = LimeConfig(segmentation="grid", num_segments=9, num_samples=64, unit=5)
VULNERABILITY = VulnerabilityConfig(radii=(0.05, 0.2), steps=4, draws=3)
IDS = np.arange(20, 32)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.GELU(), nn.Flatten(), nn.Linear(6 * 49, 3)).eval()


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.rand((12, 1, 9, 9), generator=torch.Generator().manual_seed(1))


def labels(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The net's own answers but for two images."""
    y = net(x).argmax(1)
    y[[2, 7]] = (y[[2, 7]] + 1) % 3
    return y


def test_rows_are_those_of_one_explanation(net: nn.Module, x: torch.Tensor) -> None:
    y = labels(net, x)
    rows = explained_rows(net, x, y, IDS, CONFIG, noisy=True)
    with torch.no_grad():
        logits = net(x).scatter(1, y[:, None], -torch.inf)
    targets = np.stack([y.numpy(), logits.argmax(1).numpy()], axis=1)
    whole = explain_batch(lambda batch: net(batch).softmax(1), x, IDS, CONFIG, targets=targets)
    for name in ("coefficients", "standard_error", "interval"):
        assert rows[name] == pytest.approx(getattr(whole, name), abs=1e-6, nan_ok=True)
    assert np.array_equal(rows["segments"], whole.segments) and np.array_equal(rows["image_id"], IDS)
    assert rows["sensitivity"].shape == rows["instability"].shape == (12, 9)
    assert "instability" not in explained_rows(net, x, y, IDS, CONFIG, noisy=False)


def test_only_right_images_with_some_segments_flagged_are_attacked(net: nn.Module, x: torch.Tensor) -> None:
    y = labels(net, x)
    rows = explained_rows(net, x, y, IDS, CONFIG, noisy=False)
    rows["sensitivity"][4] = 1.0  # none above the others
    rule = SpuriousConfig(criteria=("sensitivity",))
    outcomes, summary = measure_claim(net, x, y, rows, rule, VULNERABILITY, 5)
    kept = np.setdiff1d(np.arange(12), [2, 4, 7])
    assert outcomes["image_id"].tolist() == IDS[kept].tolist()
    flagged, random = flagged_and_random(rows, rule, 3, 0)
    assert np.array_equal(flagged_and_random(rows, rule.model_copy(update={"random": True}), 3, 0)[0], flagged)
    sets = {"flagged": flagged, "rest": ~flagged}
    for place, eps in enumerate(VULNERABILITY.radii):
        for name, chosen in sets.items():
            where = pixels_of(rows["segments"], chosen)[kept]
            wrong, growth = attack_pixels(net, x[kept], y[kept], where, eps, 4, 99)
            assert np.array_equal(outcomes[f"{name}_success"][place], wrong)
            assert outcomes[f"{name}_growth"][place] == pytest.approx(growth, abs=1e-5)
        assert summary[place]["images"] == 9 and summary[place]["eps"] == eps
    # Nine equal segments: as many random ones as flagged ones, and not the same in every draw.
    assert np.array_equal(random.sum(2)[:, kept], np.broadcast_to(flagged.sum(1)[kept], (3, 9)))
    assert not np.array_equal(random[0], random[1])


def test_no_image_to_attack_is_no_result(net: nn.Module, x: torch.Tensor) -> None:
    y = (net(x).argmax(1) + 1) % 3
    rows = explained_rows(net, x, y, IDS, CONFIG, noisy=False)
    assert measure_claim(net, x, y, rows, SpuriousConfig(), VULNERABILITY, 5) == ({}, [])


def test_masks_of_training_images_are_refused() -> None:
    rule = SpuriousConfig(criteria=("outside",), foreground="masks.npy")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="masks are of training images"):
        flagged_and_random({}, rule, 1, 0)
