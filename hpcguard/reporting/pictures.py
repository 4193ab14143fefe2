"""Pictures of a report: figures with file names, captions, and words for those who cannot see them."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from hpcguard.reporting.arms import Arm, attack_title, role
from hpcguard.reporting.plots import Panel, accuracy_figure, explanation_figure, rounds_figure, training_figure
from hpcguard.reporting.tables import explanation_csv, results_csv, rows_csv, training_csv


@dataclass(frozen=True)
class Picture:
    """A figure, and the unrounded numbers in it as CSV."""

    name: str
    png: bytes
    alt: str
    csv: str
    caption: str = ""

    @property
    def uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode()

    @property
    def csv_name(self) -> str:
        return PurePath(self.name).with_suffix(".csv").name


def accuracy_picture(arms: Sequence[Arm]) -> Picture:
    shares = [
        f"{arm.name} " + ", ".join(f"{attack_title(name)} {row['accuracy']:.1%}" for name, row in arm.attacks.items())
        for arm in arms
    ]
    alt = f"Accuracy with 95% intervals, by attack: {'; '.join(shares)}"
    return Picture("accuracy.png", accuracy_figure(arms), alt, results_csv(arms))


def training_picture(arms: Sequence[Arm]) -> Picture | None:
    """Training curves; None if no arm has a log."""
    png = training_figure(arms)
    if png is None:
        return None
    ends = [f"{arm.name} from {arm.log[0]['loss']:.3f} to {arm.log[-1]['loss']:.3f}" for arm in arms if arm.log]
    alt = f"Loss and validation accuracy by epoch; loss: {'; '.join(ends)}"
    return Picture("training.png", png, alt, training_csv(arms))


def rounds_picture(rounds: Sequence[Mapping[str, Any]]) -> Picture:
    """What each round of a closed loop gave, see loop.json."""
    alt = (
        f"Validation accuracy, flagged share and agreement of the flags with the round before, of {len(rounds)} rounds"
    )
    flat = [{**each, "flagged": each["spurious"]["flagged"], "spurious": None} for each in rounds]
    columns = ["number", "validation_clean", "validation_robust", "flagged", "jaccard"]
    return Picture("rounds.png", rounds_figure(flat), alt, rows_csv(columns, flat))


def explanation_pictures(arms: Sequence[Arm], images: np.ndarray, classes: Sequence[str]) -> list[Picture]:
    """One picture for every explained image; `images` [n, C, H, W] are theirs, in the order of the rows."""
    return [_explanation(arms, place, image, classes) for place, image in enumerate(images)]


def _explanation(arms: Sequence[Arm], place: int, image: np.ndarray, classes: Sequence[str]) -> Picture:
    explained = [(arm.name, arm.explanations) for arm in arms if arm.explanations]
    panels = [_panel(name, rows, place, classes) for name, rows in explained]
    number, label = (int(explained[0][1][column][place]) for column in ("image_id", "label"))
    pairs = list(zip(explained, panels, strict=True))
    said = "; ".join(f"{name} {panel.caption}" for (name, _), panel in pairs)
    return Picture(
        f"explanation_{number}.png",
        explanation_figure(image, f"true class {classes[label]}", panels),
        f"Test image {number} of class {classes[label]}, superpixels coloured by coefficient for each model; {said}",
        explanation_csv([(name, panel.segments, panel.coefficients) for (name, _), panel in pairs]),
        f"Test image {number}, true class {classes[label]}",
    )


def _panel(name: str, rows: dict[str, np.ndarray], place: int, classes: Sequence[str]) -> Panel:
    predicted, label = int(rows["predicted"][place]), int(rows["label"][place])
    # The explained labels are the true one and the strongest other one, so the predicted one is among them.
    known = rows["probability"][place][rows["target"][place] == predicted]
    sure = f" ({known[0]:.1%})" if len(known) else ""
    caption = f"predicts {classes[predicted]}{sure}" + ("" if predicted == label else ", wrong")
    title = f"{name} ({role(name)})"
    return Panel(title, rows["segments"][place], rows["coefficients"][place, 0], caption, predicted == label)


def stored_explanation(row: dict[str, np.ndarray], image: np.ndarray, classes: Sequence[str]) -> Picture:
    """The explanations of one stored row (columns without their first axis): a panel for each explained label."""
    number, label, predicted = (int(row[column]) for column in ("image_id", "label", "predicted"))
    panels = [
        Panel(
            f"{'true class' if target == label else 'other class'} {classes[target]}",
            row["segments"],
            row["coefficients"][place],
            f"probability {row['probability'][place]:.1%}, R² {row['score'][place]:.2f}",
        )
        for place, target in enumerate(row["target"].tolist())
    ]
    said = "; ".join(f"{panel.title}: {panel.caption}" for panel in panels)
    caption = f"Image {number}, true class {classes[label]}, predicted {classes[predicted]}"
    figure = explanation_figure(image, f"{classes[label]}, predicted {classes[predicted]}", panels)
    numbers = explanation_csv([(panel.title, panel.segments, panel.coefficients) for panel in panels])
    alt = f"{caption}; superpixels by coefficient: {said}"
    return Picture(f"explanation_{number}.png", figure, alt, numbers, caption)
