"""What the table of a sweep shows: means, differences from the control, main effects, the Pareto front."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcguard.sweeps.effects import NAME, Effect, main_effects
from hpcguard.sweeps.means import Line, as_held, gains, means, settings
from hpcguard.sweeps.pareto import main_of, on_front
from hpcguard.sweeps.table import CLEAN, Row, accuracies_in, qualities_in


@dataclass(frozen=True)
class Analysis:
    """Figures of one table; computed once, shown in several forms."""

    table: Sequence[Row]
    axes: Sequence[str]  # that tell the settings apart
    control: Mapping[str, Any]  # as the table has it
    measures: Sequence[str]  # accuracies, from the weakest attack to the strongest
    qualities: Sequence[str]  # of explanations
    main: Sequence[str]  # clean, and the strongest attack
    lines: Sequence[Line]  # means, a line a setting
    gains: Sequence[Line]  # paired differences, a line a setting beside the control's
    effects: Sequence[Effect]  # on clean and robust accuracy
    points: Sequence[Line]  # settings whose clean and robust accuracy are both measured
    front: Sequence[bool]  # which points no other one beats in both

    @property
    def robust(self) -> str:
        """The strongest attack; empty if none was run."""
        return next((name for name in self.main if name != CLEAN), "")

    @property
    def measured(self) -> int:
        return sum(row["state"] == "done" for row in self.table)

    @property
    def single(self) -> bool:
        """Whether no setting is measured with several seeds, so that there are no intervals."""
        return all(line.count < 2 for line in self.lines)


def analyse(table: Sequence[Row], axes: Sequence[str], control: Mapping[str, Any]) -> Analysis:
    measures, qualities = accuracies_in(table, axes), qualities_in(table, axes)
    axes = telling(table, axes, control)
    main = main_of(measures)
    lines = means(table, axes, [*measures, *qualities])
    points = [line for line in lines if len(main) == 2 and all(line.estimates[name].count for name in main)]
    return Analysis(
        table, axes, as_held(control, table), measures, qualities, main, lines,
        gains(table, axes, measures, control) if control else [],
        main_effects(table, axes, main, control), points,
        on_front([(line.estimates[main[0]].mean, line.estimates[main[1]].mean) for line in points]),
    )  # fmt: skip


def telling(table: Sequence[Row], axes: Sequence[str], control: Mapping[str, Any]) -> list[str]:
    """The axes without those that only cells with a name of their own set: the name stands for them."""
    grid = [row for row in table if row.get(NAME) is None]
    kept = [axis for axis in axes if axis == NAME or axis in control or any(row.get(axis) is not None for row in grid)]
    return kept if len(settings(table, kept)) == len(settings(table, axes)) else list(axes)
