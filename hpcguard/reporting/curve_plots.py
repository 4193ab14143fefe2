"""Accuracy against radius, as PNG bytes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hpcguard.reporting.arms import attack_title
from hpcguard.reporting.plots import INK, named_styles, plain, png, share_axis


def curve_figure(curves: Mapping[str, Mapping[str, Any]]) -> bytes:
    """A line an arm with its 95% band; curves: as results hold them, by arm."""
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    first = next(iter(curves.values()))
    linf = first["norm"] == "linf"
    for (name, curve), (colour, marker) in zip(curves.items(), named_styles(list(curves)), strict=True):
        x = np.array(curve["radii"]) * (255 if linf else 1)
        axes.plot(x, curve["accuracy"], color=colour, marker=marker, markersize=5, linewidth=1.4, label=name)
        axes.fill_between(x, curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0)
    share_axis(axes, f"accuracy under {attack_title(first['attack'])}")
    axes.set_xlabel("radius, Linf, in 1/255" if linf else "radius, L2, pixels in [0, 1]", color=INK)
    axes.set_xlim(left=0)
    axes.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    plain(axes)
    return png(figure)
