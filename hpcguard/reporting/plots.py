"""Figures as PNG bytes. Drawn with matplotlib's Agg canvas alone: no window system, no global state."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hpcguard.reporting.arms import Arm, attack_title, radius
from hpcguard.reporting.overlay import COLOURS, overlay

# Okabe and Ito's colours, told apart by the colour-blind; the marker says it once more.
BASELINE, GUIDED = ("#6b6b6b", "s"), ("#0072b2", "o")
CONTROLS = (("#d55e00", "^"), ("#009e73", "D"), ("#cc79a7", "v"), ("#e69f00", "P"), ("#56b4e9", "X"))
INK, FAINT, WRONG = "#222222", "#d9d9d9", "#a11212"
DPI = 160
CELL_PIXELS = 320  # an explanation is enlarged to at least so many pixels


@dataclass(frozen=True)
class Panel:
    """One arm's explanation of an image: segments [H, W], coefficients [S] of the true class."""

    title: str
    segments: np.ndarray
    coefficients: np.ndarray
    caption: str
    right: bool = True


def accuracy_figure(arms: Sequence[Arm]) -> bytes:
    """Accuracy and 95% interval of every arm under every attack."""
    attacks = list(arms[0].attacks)
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    spread = min(0.16, 0.7 / len(arms))
    for place, (arm, (colour, marker)) in enumerate(zip(arms, arm_styles(arms), strict=True)):
        x = np.arange(len(attacks)) + (place - (len(arms) - 1) / 2) * spread
        share = np.array([[arm.attacks[name][key] for name in attacks] for key in ("accuracy", "low", "high")])
        low, high = np.maximum(0, share[0] - share[1]), np.maximum(0, share[2] - share[0])
        axes.errorbar(
            x, share[0], (low, high), fmt=marker, color=colour, markersize=6, capsize=3, linewidth=1.4, label=arm.name
        )
    axes.set_xticks(range(len(attacks)), [attack_title(name) for name in attacks])
    axes.set_xlim(-0.5, len(attacks) - 0.5)
    share_axis(axes, f"accuracy, eps {radius(arms[0].evaluation)}")
    axes.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    return png(figure)


def training_figure(arms: Sequence[Arm]) -> bytes | None:
    """Loss, and clean and robust validation accuracy, by epoch; None if there is no log."""
    styles = [(arm, colour, marker) for arm, (colour, marker) in zip(arms, arm_styles(arms), strict=True) if arm.log]
    if not styles:
        return None
    validated = any("validation_clean" in entry for arm, _, _ in styles for entry in arm.log)
    figure = Figure(figsize=(8.4, 3.5), layout="constrained")
    panels = figure.subplots(1, 2 if validated else 1, squeeze=False)[0]
    for arm, colour, marker in styles:
        epochs = [entry["epoch"] for entry in arm.log]
        every = 1 + len(epochs) // 20
        look = {"color": colour, "marker": marker, "markersize": 4, "markevery": every, "linewidth": 1.4}
        panels[0].plot(epochs, [entry["loss"] for entry in arm.log], label=arm.name, **look)
        if validated:
            for key, line in (("validation_clean", ":"), ("validation_robust", "-")):
                name = _robust_label(arm) if key == "validation_robust" else None
                shares = [entry.get(key, math.nan) for entry in arm.log]
                panels[1].plot(epochs, shares, linestyle=line, label=name, **look)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("training loss", color=INK)
    panels[0].legend(frameon=False)
    if validated:
        share_axis(panels[1], "validation accuracy")
        panels[1].plot([], [], ":", color=INK, label="dotted: clean")
        panels[1].legend(frameon=False, fontsize=8.5)
    for axes in panels:
        axes.set_xlabel("epoch", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        plain(axes)
    return png(figure)


def rounds_figure(rounds: Sequence[Mapping[str, Any]]) -> bytes:
    """Validation accuracy, flagged share, and Jaccard of the flags with the round before, by round."""
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    numbers = [each["number"] for each in rounds]
    lines = (
        ("validation_clean", "validation, clean", CONTROLS[0]),
        ("validation_robust", "validation, PGD-10", GUIDED),
        ("flagged", "flagged superpixels", CONTROLS[2]),
        ("jaccard", "Jaccard of the flags", CONTROLS[1]),
    )
    for key, label, (colour, marker) in lines:
        values = [math.nan if each[key] is None else each[key] for each in rounds]
        if not all(map(math.isnan, values)):
            axes.plot(numbers, values, color=colour, marker=marker, markersize=5, linewidth=1.4, label=label)
    share_axis(axes, "share")
    axes.set_xlabel("round", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1), fontsize=8.5)
    return png(figure)


def explanation_figure(image: np.ndarray, label: str, panels: Sequence[Panel]) -> bytes:
    """One row: `image` [C, H, W] in [0, 1], then every panel's overlay, all on one symmetric scale."""
    scale = max((float(np.nanmax(np.abs(panel.coefficients))) for panel in panels), default=0.0) or 1.0
    zoom = max(1, -(-CELL_PIXELS // max(image.shape[1:])))
    cell, step, width, height = 1.9, 2.0, 0.1 + 2.0 * (1 + len(panels)) + 0.75, 2.45  # inches
    figure = Figure(figsize=(width, height))

    def place(left: float, wide: float) -> Axes:
        # Placed by hand, so that the cells of one row stand under those of the row before.
        return figure.add_axes((left / width, 0.26 / height, wide / width, cell / height))

    first = place(0.1, cell)
    shown = image.transpose(1, 2, 0) if len(image) == 3 else image.mean(0)
    first.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    _label(first, "image", label, INK)
    for column, panel in enumerate(panels, 1):
        axes = place(0.1 + column * step, cell)
        axes.imshow(overlay(image, panel.segments, panel.coefficients, scale, zoom), interpolation="nearest")
        _label(axes, panel.title, panel.caption, INK if panel.right else WRONG)
    bar = place(0.1 + step * (1 + len(panels)), 0.12)
    mappable = ScalarMappable(Normalize(-scale, scale), COLOURS)
    figure.colorbar(mappable, cax=bar, ticks=[-scale, 0, scale])
    bar.set_yticklabels([f"−{scale:.2g}", "0", f"+{scale:.2g}"], fontsize=8.5, color=INK)
    return png(figure)


def arm_styles(arms: Sequence[Arm]) -> list[tuple[str, str]]:
    return named_styles([arm.name for arm in arms])


def named_styles(names: Sequence[str]) -> list[tuple[str, str]]:
    """Colour and marker of every arm; baseline and guided have the same ones in every report."""
    controls = iter(CONTROLS * len(names))
    fixed = {"baseline": BASELINE, "guided": GUIDED}
    return [fixed[name] if name in fixed else next(controls) for name in names]


def _robust_label(arm: Arm) -> str:
    eps = arm.log[-1].get("validation_eps")
    return f"{arm.name}, PGD-10" + (f", eps {eps:.3f}" if eps is not None else "")


def share_axis(axes: Axes, label: str) -> None:
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks(np.linspace(0, 1, 6), [f"{share}%" for share in range(0, 101, 20)])
    axes.set_ylabel(label, color=INK)
    plain(axes)


def plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _label(axes: Axes, title: str, caption: str, colour: str) -> None:
    axes.set_title(title, fontsize=10, color=INK, parse_math=False)
    axes.set_xlabel(caption, fontsize=9, color=colour, parse_math=False)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=FAINT, linewidth=0.8)


def png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    out = io.BytesIO()
    # Without matplotlib's version in it, the same numbers give the same bytes.
    figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    return out.getvalue()
