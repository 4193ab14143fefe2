"""Tables and pictures of what is measured beside attacks: alarms, radii, corruptions, explanations, claim, bound."""

from collections.abc import Mapping, Sequence
from typing import Any

from hpcguard.metrics.corruption import mean_corruption_error
from hpcguard.metrics.paired import compare_paired
from hpcguard.metrics.resampling import compare_figures
from hpcguard.reporting.arms import Arm, attack_title
from hpcguard.reporting.compare_tables import paired_rows
from hpcguard.reporting.corruption_plots import corruption_figure, corruption_table
from hpcguard.reporting.curve_plots import curve_figure
from hpcguard.reporting.pictures import Picture
from hpcguard.reporting.tables import MISSING, Table, rows_csv
from hpcguard.reporting.vulnerability_plots import vulnerability_figure

QUALITY = {
    "stability": "stability, top-k Jaccard between seeds",
    "deletion": "deletion (lower is better)",
    "insertion": "insertion (higher is better)",
    "faithfulness": "insertion less deletion",
    "attacked_jaccard": "clean and attacked image, top-k Jaccard",
    "attacked_spearman": "clean and attacked image, rank correlation",
    "flagged_share": "share of attribution on flagged segments",
}
RED = "RED"


def alarm_table(arms: Sequence[Arm]) -> Table | None:
    """A row an alarm, a column an arm."""
    measured = [arm for arm in arms if arm.result.get("alarms")]
    if not measured:
        return None
    names = dict.fromkeys(row["name"] for arm in measured for row in arm.result["alarms"])
    rows = [[name, *(_alarm_cell(arm, name) for arm in measured)] for name in names]
    return Table(["alarm", *(arm.name for arm in measured)], rows)


def _alarm_cell(arm: Arm, name: str) -> str:
    row = next((row for row in arm.result["alarms"] if row["name"] == name), None)
    if row is None or row["red"] is None:
        return MISSING
    share = f" {row['measured']['share']:.1%}" if "share" in row["measured"] else ""
    share += f" of {row['measured']['of']:.0f}" if share and "of" in row["measured"] else ""
    return f"{RED if row['red'] else 'ok'}{share}"


def curve_picture(arms: Sequence[Arm]) -> Picture | None:
    """Accuracy by radius; None if no arm has a curve."""
    curves = {arm.name: arm.result["curve"] for arm in arms if arm.result.get("curve")}
    if not curves:
        return None
    keys = ("radii", "right", "accuracy", "low", "high")
    lines = [
        {"arm": name, **curve, **dict(zip(keys, row, strict=True))}
        for name, curve in curves.items()
        for row in zip(*(curve[key] for key in keys), strict=True)
    ]
    ends = [f"{name} from {curve['accuracy'][0]:.1%} to {curve['accuracy'][-1]:.1%}" for name, curve in curves.items()]
    first = next(iter(curves.values()))
    alt = f"Accuracy under {attack_title(first['attack'])} by radius; {'; '.join(ends)}"
    text = rows_csv(["arm", "attack", "norm", "of", *keys], lines)
    return Picture("curve.png", curve_figure(curves), alt, text.replace("radii", "eps", 1))


def paired_table(arms: Sequence[Arm]) -> Table | None:
    """The guided arm against every other, image by image; None without outcomes of both."""
    guided = next((arm for arm in arms if arm.name == "guided"), None)
    others = [arm for arm in arms if arm is not guided and arm.outcomes]
    if guided is None or not guided.outcomes or not others:
        return None
    pairs = {
        other.name: {name: compare_paired(guided.outcomes[name], right) for name, right in other.outcomes.items()}
        for other in others
    }  # fmt: skip
    return paired_rows("guided", pairs)


def corruption_summary(arms: Sequence[Arm], reference: str) -> Table | None:
    """Accuracy on clean and corrupted images, and errors relative to those of the arm `reference`."""
    found = [arm for arm in arms if arm.result.get("corruptions")]
    if not found:
        return None
    other = next((arm for arm in found if arm.name == reference), None)
    rows = []
    for arm in found:
        summary = arm.result["corruptions"]
        errors = _errors(arm, other) if other else {}
        relative = [f"{_percent(errors[key])}" if key in errors else MISSING for key in ("mce", "relative_mce")]
        rows.append([arm.name, f"{summary['clean']:.1%}", _percent(summary["mean_accuracy"]), *relative])
    return Table(["arm", "clean", "corrupted, mean", "mCE", "relative mCE"], rows)


def _errors(arm: Arm, reference: Arm) -> dict[str, Any]:
    names = list(arm.result["corruptions"]["corruptions"])
    tables = [each.tables.get("corruptions") for each in (arm, reference)]
    if any(table is None for table in tables) or not arm.outcomes or not reference.outcomes:
        return {}
    own, theirs = (table["right"].transpose(1, 2, 0) for table in tables if table is not None)
    count = own.shape[2]
    return mean_corruption_error(
        names, own, arm.outcomes["clean"][:count], theirs, reference.outcomes["clean"][:count]
    )  # fmt: skip


def corruption_picture(arms: Sequence[Arm]) -> Picture | None:
    found = {arm.name: arm.result["corruptions"] for arm in arms if arm.result.get("corruptions")}
    if not found:
        return None
    lines = [
        {"arm": name, "corruption": corruption, "severity": severity, "accuracy": accuracy}
        for name, summary in found.items()
        for corruption, row in summary["corruptions"].items()
        for severity, accuracy in enumerate(row["severities"], 1)
    ]
    source = next(iter(found.values()))["name"]
    means = "; ".join(f"{name} {summary['mean_accuracy']['mean']:.1%}" for name, summary in found.items())
    alt = f"Accuracy on images of {source} by corruption and by severity; means: {means}"
    text = rows_csv(["arm", "corruption", "severity", "accuracy"], lines)
    return Picture("corruptions.png", corruption_figure(found, source), alt, text)


def corruption_rows(arms: Sequence[Arm]) -> Table | None:
    found = {arm.name: arm.result["corruptions"] for arm in arms if arm.result.get("corruptions")}
    return Table(*corruption_table(found)) if found else None


def quality_table(arms: Sequence[Arm]) -> Table | None:
    """Figures of explanations by arm, and what each differs by from the first on the same images."""
    found = [arm for arm in arms if arm.result.get("explanations")]
    if not found:
        return None
    first, others = found[0], found[1:]
    changes = {arm.name: _changes(first, arm) for arm in others}
    columns = ["figure", first.name]
    columns += [title for arm in others for title in (arm.name, f"{arm.name} less {first.name}")]
    rows = []
    for name, title in QUALITY.items():
        cells = [_figure(first.result["explanations"].get(name))]
        for arm in others:
            change = changes[arm.name].get(name, {}).get("difference")
            cells += [_figure(arm.result["explanations"].get(name)), _figure(change, "+")]
        rows.append([title, *cells])
    return Table(columns, rows)


def _changes(first: Arm, other: Arm) -> dict[str, Any]:
    before, after = first.tables.get("quality"), other.tables.get("quality")
    return compare_figures(before, after) if before and after else {}


def claim_picture(arms: Sequence[Arm]) -> Picture | None:
    found = _claims(arms)
    if not found:
        return None
    lines = [
        {
            "arm": name, "eps": row["eps"], "images": row["images"],
            **{f"success_{key}": row["success"][key] for key in ("flagged", "random", "rest", "p_value")},
            **{f"difference_{key}": row["success"]["difference"][key] for key in ("mean", "low", "high")},
            **{f"growth_ratio_{key}": row["growth"]["ratio"][key] for key in ("mean", "low", "high")},
        }
        for name, rows in found.items()
        for row in rows
    ]  # fmt: skip
    alt = f"Flagged segments against random ones of equal area, by radius, of {', '.join(found)}"
    return Picture("vulnerability.png", vulnerability_figure(found), alt, rows_csv(list(lines[0]), lines))


def claim_table(arms: Sequence[Arm]) -> Table | None:
    """How many images fall to attacks on flagged segments, random ones of equal area, and the rest."""
    columns = ["arm", "eps", "images", "flagged", "random", "difference", "p", "rest", "loss, flagged / random"]
    rows = [
        [
            name, f"{255 * row['eps']:.3g}/255", str(row["images"]), f"{row['success']['flagged']:.1%}",
            f"{row['success']['random']:.1%}", _percent(row["success"]["difference"], "+"),
            f"{row['success']['p_value']:.2g}", f"{row['success']['rest']:.1%}", _figure(row["growth"]["ratio"]),
        ]
        for name, found in _claims(arms).items()
        for row in found
    ]  # fmt: skip
    return Table(columns, rows) if rows else None


def _claims(arms: Sequence[Arm]) -> dict[str, list[dict[str, Any]]]:
    found = {arm.name: (arm.result.get("vulnerability") or {}).get("rows") for arm in arms}
    return {name: rows for name, rows in found.items() if rows}


def bound_table(arms: Sequence[Arm]) -> Table | None:
    """Medians over right images of each grade, in a column of its own, and what the split gives."""
    columns = ["arm", "pixels that change", "images", "certified", "over the plain bound", "estimated", "measured",
               "certified / measured", "non-trivial", "share of the constant"]  # fmt: skip
    rows = []
    for arm in arms:
        bound = arm.result.get("bound") or {}
        scale = 255 if bound.get("norm") == "linf" else 1
        flagged = bound.get("flagged_constant_share")
        shares = {} if flagged is None else {"flagged": flagged, "unflagged": 1 - flagged}
        for group in ("all", "flagged", "unflagged"):
            if bound.get(group):
                share = f"{shares[group]:.0%}" if group in shares else MISSING
                rows.append([arm.name, group, *_bound_cells(bound[group], scale), share])
    return Table(columns, rows) if rows else None


def _bound_cells(row: Mapping[str, float | None], scale: float) -> list[str]:
    unit = "/255" if scale == 255 else ""

    def shown(name: str, form: str, times: float = 1, after: str = "") -> str:
        value = row.get(name)
        return MISSING if value is None else f"{value * times:{form}}{after}"

    measured = "not broken" if row.get("not_broken") and row.get("measured_median") is None else None
    return [
        f"{row['right']:.0f} of {row['images']:.0f}",
        shown("certified_median", ".3g", scale, unit),
        shown("gain", ".2f", 1, " times"),
        shown("estimated_median", ".3g", scale, unit),
        measured or shown("measured_median", ".3g", scale, unit),
        shown("ratio_q50", ".3f"),
        shown("non_trivial_share", ".0%"),
    ]


def _percent(value: Mapping[str, Any], sign: str = "") -> str:
    if value["mean"] is None:
        return MISSING
    bounds = (
        ""
        if None in (value["low"], value["high"])
        else f" [{100 * value['low']:{sign}.1f}, {100 * value['high']:{sign}.1f}]"
    )
    return f"{100 * value['mean']:{sign}.1f}%{bounds}"


def _figure(value: Mapping[str, Any] | None, sign: str = "") -> str:
    if value is None or value["mean"] is None:
        return MISSING
    bounds = "" if None in (value["low"], value["high"]) else f" [{value['low']:{sign}.2f}, {value['high']:{sign}.2f}]"
    return f"{value['mean']:{sign}.2f}{bounds}"
