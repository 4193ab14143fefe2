"""Figures of corruptions and of vulnerability, drawn from the measures' own summaries, and the table of corruptions."""

import io
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hpcguard.config.corruptions import CORRUPTIONS
from hpcguard.metrics.corruption import summarise_corruptions
from hpcguard.metrics.vulnerability_summary import summarise_vulnerability
from hpcguard.reporting.corruption_plots import corruption_figure, corruption_table
from hpcguard.reporting.vulnerability_plots import vulnerability_figure


def summaries(*shares: float) -> dict[str, Any]:
    names = ["baseline", "guided", *(f"control{index}" for index in range(9))]
    generator = np.random.default_rng(0)
    clean = generator.random(30) < 0.9
    return {
        name: summarise_corruptions(CORRUPTIONS, generator.random((15, 5, 30)) < share, clean)
        for name, share in zip(names, shares, strict=False)
    }


def picture(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png)).convert("RGB")


def inked(png: bytes, colour: str) -> int:
    """Pixels of just that colour."""
    rgb = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return int((np.asarray(picture(png)) == rgb).all(-1).sum())


def test_higher_accuracy_is_more_ink_and_every_arm_has_its_own() -> None:
    low, high = (corruption_figure(summaries(0.5, share), "hpcguard-c 1") for share in (0.2, 0.8))
    assert inked(high, "#0072b2") > 3 * inked(low, "#0072b2") > 0
    assert inked(low, "#6b6b6b") == pytest.approx(inked(high, "#6b6b6b"), rel=0.1)
    assert corruption_figure(summaries(0.5), "hpcguard-c 1") == corruption_figure(summaries(0.5), "hpcguard-c 1")
    picture(corruption_figure(summaries(*([0.5] * 11)), "CIFAR-10-C"))


def test_the_table_says_the_measures() -> None:
    results = summaries(0.5, 0.7)
    header, rows = corruption_table(results)
    assert header == ["corruption", "baseline", "guided"] and len(rows) == 16
    assert rows[0][0] == "gaussian noise"
    assert rows[9][2] == f"{100 * results['guided']['corruptions']['fog']['mean']:.1f}"
    mean = results["guided"]["mean_accuracy"]
    assert rows[-1][2] == f"{100 * mean['mean']:.1f} [{100 * mean['low']:.1f}, {100 * mean['high']:.1f}]"


def outcomes(flagged: float, count: int = 40) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "flagged_success": generator.random((2, count)) < flagged,
        "random_success": generator.random((2, 3, count)) < 0.4,
        "rest_success": generator.random((2, count)) < 0.9,
        "flagged_growth": flagged * generator.random((2, count)),
        "random_growth": 0.4 * generator.random((2, 3, count)),
        "rest_growth": generator.random((2, count)),
        "flagged_area": np.full(count, 0.2), "random_area": np.full((3, count), 0.2), "rest_area": np.full(count, 0.8),
    }  # fmt: skip


def test_a_point_lies_as_high_as_its_value() -> None:
    """The marker of the model on which flagged segments gain more is the higher one, in both panels."""
    radii = (2 / 255, 8 / 255)
    results = {
        name: summarise_vulnerability(outcomes(share), radii) for name, share in (("guided", 0.2), ("baseline", 0.9))
    }
    pixels = np.asarray(picture(vulnerability_figure(results)))[80:]  # below the legend
    for panel in np.split(pixels, [pixels.shape[1] // 2], axis=1):
        rows = {}
        for name, rgb in (("guided", (0x00, 0x72, 0xB2)), ("baseline", (0x6B, 0x6B, 0x6B))):
            rows[name] = np.nonzero((panel == rgb).all(-1))[0]
        assert np.median(rows["baseline"]) < np.median(rows["guided"]) - 50


def test_an_attack_that_gains_nothing_has_no_ratio_and_is_drawn_all_the_same() -> None:
    still = {name: 0 * values for name, values in outcomes(0.5).items() if "area" not in name}
    rows = summarise_vulnerability({**outcomes(0.5), **still}, (0.01, 0.02))
    assert rows[0]["growth"]["ratio"] == {"mean": None, "low": None, "high": None}
    picture(vulnerability_figure({"none": rows}))


def test_drawing_imports_no_torch() -> None:
    code = (
        "import sys, hpcguard.reporting.corruption_plots, hpcguard.reporting.vulnerability_plots; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
