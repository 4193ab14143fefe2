"""Tables of a sweep for a page and for a paper: Markdown, and LaTeX with booktabs."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcguard.reporting.arms import attack_title
from hpcguard.reporting.tables import MISSING, Table, duration, to_markdown
from hpcguard.sweeps.axes import shown
from hpcguard.sweeps.cost import CostLine
from hpcguard.sweeps.effects import NAME, Effect
from hpcguard.sweeps.means import Estimate, Line
from hpcguard.sweeps.table import EXPLANATION

STAGES = {"refine": "training", "attribute": "attribution", "evaluate": "evaluation"}
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", MISSING: "--", "±": r"$\pm$", "−": "$-$",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """Of estimates: shares of 1, shown in %, unless scale and digits say otherwise."""

    title: str
    signed: bool = False  # differences
    best: bool = False  # the highest mean is bold
    scale: float = 100
    digits: int = 1


@dataclass(frozen=True)
class Sheet:
    """A table with text columns first, then estimates; a form of it each for page, Markdown and LaTeX."""

    name: str
    caption: str
    heads: Sequence[str]
    columns: Sequence[Column]
    lines: Sequence[tuple[Sequence[str], Sequence[Estimate]]]


def value_text(value: Any) -> str:
    return MISSING if value is None else shown(value)


def short_names(axes: Sequence[str]) -> dict[str, str]:
    """Dotted keys without their section, where the rest tells them apart."""
    short = {name: name.partition(".")[2] or name for name in axes}
    taken = list(short.values())
    return {name: each if taken.count(each) == 1 else name for name, each in short.items()}


def means_sheet(lines: Sequence[Line], axes: Sequence[str], measures: Sequence[str], single: bool) -> Sheet:
    spread = "One seed, so no intervals." if single else "Means over seeds ± 95% interval (Student's t)."
    best = "Bold: the highest mean of a column, be its distance from the others chance or not."
    return Sheet(
        "means", f"Accuracy in %. {spread} {best}", [*_heads(axes), "seeds"],
        [Column(attack_title(name), best=True) for name in measures],
        [_estimates(line, axes, measures) for line in lines],
    )  # fmt: skip


def gains_sheet(
    lines: Sequence[Line], axes: Sequence[str], measures: Sequence[str], control: Mapping[str, Any], single: bool
) -> Sheet:
    told = ", ".join(f"{name}={shown(value)}" for name, value in control.items())
    spread = "one pair a line, so no intervals" if single else "means over the pairs ± 95% interval (Student's t)"
    return Sheet(
        "differences", f"Differences from the control ({told}) with the same seed, in points: {spread}.",
        [*_heads(axes), "pairs"], [Column(attack_title(name), signed=True) for name in measures],
        [_estimates(line, axes, measures) for line in lines],
    )  # fmt: skip


def explanations_sheet(lines: Sequence[Line], axes: Sequence[str], qualities: Sequence[str]) -> Sheet:
    """Quality of explanations; which way is better differs by figure, so none is bold."""
    return Sheet(
        "explanations", "Quality of explanations: means over seeds ± 95% interval.", [*_heads(axes), "seeds"],
        [Column(name.removeprefix(EXPLANATION).replace("_", " "), scale=1, digits=3) for name in qualities],
        [_estimates(line, axes, qualities) for line in lines],
    )  # fmt: skip


def effects_sheet(effects: Sequence[Effect], measures: Sequence[str]) -> Sheet:
    """A line a level, with its mean and its difference from the reference level under each measure."""
    by_factor: dict[tuple[str, ...], dict[str, Effect]] = {}
    for effect in effects:
        by_factor.setdefault(effect.factor, {})[effect.measure] = effect
    columns = [Column(f"{attack_title(name)}{what}", bool(what)) for name in measures for what in ("", ", difference")]
    lines = []
    for factor, of_measure in by_factor.items():
        first = next(iter(of_measure.values()))
        for place, level in enumerate(first.levels):
            found = [_at(of_measure.get(name), level.values) for name in measures]
            texts = [factor_name(factor), level_name(factor, level.values), str(level.cells)]
            texts[1] += " (reference)" if place == first.reference else ""
            texts[2] += "" if first.balanced else "*"
            lines.append((texts, [each for pair in found for each in pair]))
    caption = (
        "Main effects, in % and in points: a level's mean over the cells that differ in nothing else, and its "
        "difference from the reference level in these. Cells of one seed are averaged first; ± 95% interval over seeds."
    )
    if any(not effect.balanced for effect in effects):
        caption += " *: nothing else is measured at every level, so these means are of different cells."
    return Sheet("effects", caption, ["axis", "level", "cells"], columns, lines)


def factor_name(factor: Sequence[str]) -> str:
    """A factor of several axes goes by its explicit name, if that is one of them."""
    return NAME if NAME in factor else ", ".join(_heads(factor))


def level_name(factor: Sequence[str], values: Sequence[Any]) -> str:
    named = dict(zip(factor, values, strict=True))
    return value_text(named[NAME]) if NAME in named else ", ".join(map(value_text, values))


def cost_table(lines: Sequence[CostLine]) -> Table:
    columns = ["stage", "jobs", "median", "all", "cost", "unshared"]
    rows = [
        [
            STAGES[line.kind], str(line.jobs), duration(line.median), duration(line.seconds),
            f"{line.hours:.2f} {line.unit}-hours", f"{line.unshared:.2f} {line.unit}-hours",
        ]
        for line in lines
    ]  # fmt: skip
    return Table(columns, rows)


def as_table(sheet: Sheet, bold: Callable[[str], str], minus: str = "-") -> Table:
    """As text; bold: how the best is marked."""
    best = [_best(sheet, place) for place in range(len(sheet.columns))]
    rows = []
    for texts, estimates in sheet.lines:
        cells = []
        for column, most, estimate in zip(sheet.columns, best, estimates, strict=True):
            mean, half = _figures(estimate, column)
            shown_mean = bold(mean) if column.best and mean == most else mean
            cells.append((shown_mean + (f" ± {half}" if half else "")).replace("-", minus) if mean else MISSING)
        rows.append([*texts, *cells])
    return Table([*sheet.heads, *(column.title for column in sheet.columns)], rows)


def sheets_markdown(sheets: Sequence[Sheet], notes: Sequence[str]) -> str:
    parts = [" ".join(notes)] if notes else []
    for sheet in sheets:
        parts += [sheet.caption, to_markdown(as_table(sheet, "**{}**".format)).rstrip()]
    return "\n\n".join(parts) + "\n"


def sheets_latex(sheets: Sequence[Sheet], notes: Sequence[str]) -> str:
    r"""Tables to be \input in a paper that uses the package booktabs."""
    head = [f"% {line}" for line in (r"Needs \usepackage{booktabs}.", *notes)]
    return "\n".join([*head, *(line for sheet in sheets for line in ["", *_latex(sheet)])]) + "\n"


def latex_text(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in text)


def _latex(sheet: Sheet) -> list[str]:
    best = [_best(sheet, place) for place in range(len(sheet.columns))]
    lines = [
        r"\begin{table}", r"\centering", rf"\caption{{{latex_text(sheet.caption)}}}", rf"\label{{tab:{sheet.name}}}",
        rf"\begin{{tabular}}{{{'l' * len(sheet.heads)}{'r' * len(sheet.columns)}}}", r"\toprule",
        _latex_row([latex_text(title) for title in (*sheet.heads, *(column.title for column in sheet.columns))]),
        r"\midrule",
    ]  # fmt: skip
    for texts, estimates in sheet.lines:
        found = [
            _latex_figure(estimate, column, most)
            for estimate, column, most in zip(estimates, sheet.columns, best, strict=True)
        ]
        lines.append(_latex_row([*map(latex_text, texts), *found]))
    return [*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _latex_figure(estimate: Estimate, column: Column, best: str) -> str:
    mean, half = _figures(estimate, column)
    if not mean:
        return "--"
    shown_mean = rf"\mathbf{{{mean}}}" if column.best and mean == best else mean
    return f"${shown_mean}" + (rf" \pm {half}$" if half else "$")


def _figures(estimate: Estimate, column: Column) -> tuple[str, str]:
    """Mean and half width, in % by default; empty where there is none."""
    if not estimate.count:
        return "", ""
    mean, half = (f"{column.scale * each:.{column.digits}f}" for each in (estimate.mean, estimate.half))
    return signed_points(estimate.mean) if column.signed else mean, "" if math.isnan(estimate.half) else half


def signed_points(share: float) -> str:
    text = f"{100 * share:+.1f}"
    return "0.0" if text[1:] == "0.0" else text


def _best(sheet: Sheet, place: int) -> str:
    """As it is shown, so that what looks equal is marked alike."""
    known = [estimates[place] for _, estimates in sheet.lines if estimates[place].count]
    return _figures(max(known, key=lambda each: each.mean), sheet.columns[place])[0] if known else ""


def _estimates(line: Line, axes: Sequence[str], measures: Sequence[str]) -> tuple[list[str], list[Estimate]]:
    texts = [value_text(line.values[name]) for name in axes]
    return [*texts, str(line.count)], [line.estimates[name] for name in measures]


def _at(effect: Effect | None, values: tuple[Any, ...]) -> tuple[Estimate, Estimate]:
    level = next((level for level in effect.levels if level.values == values), None) if effect else None
    return (level.mean, level.gain) if level else (Estimate(()), Estimate(()))


def _heads(axes: Sequence[str]) -> list[str]:
    return list(short_names(axes).values())
