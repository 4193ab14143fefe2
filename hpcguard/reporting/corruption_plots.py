"""Accuracy on corrupted images, as PNG bytes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hpcguard.reporting.plots import INK, named_styles, plain, png, share_axis


def corruption_figure(results: Mapping[str, Mapping[str, Any]], source: str) -> bytes:
    """Bars of every corruption's accuracy, all severities together, with 95% intervals, a colour an arm; below, the
    mean over all corruptions by severity.

    results: metrics.corruption.summarise_corruptions by arm, all of the same corruptions; source: what made the images.
    """
    names = list(next(iter(results.values()))["corruptions"])
    figure = Figure(figsize=(8.4, 6.2), layout="constrained")
    bars, lines = figure.subplots(2, 1, height_ratios=(3, 2))
    width = 0.8 / len(results)
    for place, ((arm, summary), (colour, marker)) in enumerate(
        zip(results.items(), named_styles(list(results)), strict=True)
    ):
        rows = [summary["corruptions"][name] for name in names]
        mean, low, high = np.array([[row[key] for key in ("mean", "low", "high")] for row in rows]).T
        x = np.arange(len(names)) + (place - (len(results) - 1) / 2) * width
        spread = np.maximum(0, [mean - low, high - mean])
        bars.bar(x, mean, width, color=colour, label=f"{arm} {summary['mean_accuracy']['mean']:.1%}")
        bars.errorbar(x, mean, spread, fmt="none", ecolor=INK, elinewidth=0.8, capsize=1.5)
        # Severity 0 are the images themselves.
        by_severity = [summary["clean"], *np.mean([row["severities"] for row in rows], axis=0)]
        lines.plot(range(len(by_severity)), by_severity, color=colour, marker=marker, markersize=5, linewidth=1.4)
    bars.set_xticks(range(len(names)), [name.replace("_", " ") for name in names], rotation=40, ha="right")
    share_axis(bars, f"accuracy, {source}")
    bars.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1), fontsize=9)
    share_axis(lines, "mean accuracy")
    lines.set_xticks(range(len(by_severity)), ["clean", *range(1, len(by_severity))])
    lines.set_xlabel("severity", color=INK)
    plain(lines)
    return png(figure)


def corruption_table(results: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text: every corruption's accuracy by arm in per cent, then their mean with its interval."""
    names = list(next(iter(results.values()))["corruptions"])
    rows = [
        [name.replace("_", " "), *(f"{100 * each['corruptions'][name]['mean']:.1f}" for each in results.values())]
        for name in names
    ]
    means = [each["mean_accuracy"] for each in results.values()]
    rows.append(["mean", *(_with_interval(mean) for mean in means)])
    return ["corruption", *results], rows


def _with_interval(value: Mapping[str, float]) -> str:
    return f"{100 * value['mean']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"
