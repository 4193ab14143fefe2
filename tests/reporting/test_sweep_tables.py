"""Tables of a sweep for a paper, word by word."""
# ruff: noqa: E501

from typing import Any

from hpcguard.reporting.sweep_page import front_sheet, notes, sheets, summary
from hpcguard.reporting.sweep_tables import latex_text, sheets_latex, sheets_markdown, short_names
from hpcguard.sweeps.analysis import analyse

AXES = ["rule", "refinement.masking.weight"]


def rows(*figures: tuple[str, int, float | None, float | None]) -> list[dict[str, Any]]:
    return [
        {"rule": rule, AXES[1]: 0.5, "seed": seed, "state": "done", "clean": clean, "autoattack": robust}
        if clean is not None
        else {"rule": rule, AXES[1]: 0.5, "seed": seed, "state": "failed"}
        for rule, seed, clean, robust in figures
    ]


TWO = rows(("a_b", 0, 0.5, 0.3), ("a_b", 1, 0.6, 0.2), ("none", 0, 0.4, 0.31), ("none", 1, 0.5, 0.19))


def test_quality_of_explanations_is_neither_in_percent_nor_bold() -> None:
    measured = [{**row, "red_alarms": 0, "explanation_attacked_jaccard": 0.25 + row["seed"]} for row in TWO]
    sheet = sheets(analyse(measured, AXES, {"rule": "none"}))[-1]
    text = sheets_markdown([sheet], [])
    assert "| rule | masking.weight | seeds | attacked jaccard |" in text
    # Means of 0.25 and 1.25: s = 0.7071, 12.706 * 0.7071 / sqrt(2) = 6.353
    assert "| a_b | 0.5 | 2 | 0.750 ± 6.353 |" in text
    assert "explanation" not in sheets_markdown(sheets(analyse(measured, AXES, {"rule": "none"}))[:-1], [])


def test_latex() -> None:
    analysis = analyse(TWO, AXES, {"rule": "none"})
    found = sheets_latex(sheets(analysis)[:2], notes(analysis))
    # Means 55 and 45, s = 7.07, t = 12.706 for two seeds: 12.706 * 7.07 / sqrt(2) = 63.5
    assert (
        found
        == r"""% Needs \usepackage{booktabs}.
% 4 of 4 cells are measured.

\begin{table}
\centering
\caption{Accuracy in \%. Means over seeds $\pm$ 95\% interval (Student's t). Bold: the highest mean of a column, be its distance from the others chance or not.}
\label{tab:means}
\begin{tabular}{lllrr}
\toprule
rule & masking.weight & seeds & clean & AutoAttack \\
\midrule
a\_b & 0.5 & 2 & $\mathbf{55.0} \pm 63.5$ & $\mathbf{25.0} \pm 63.5$ \\
none & 0.5 & 2 & $45.0 \pm 63.5$ & $\mathbf{25.0} \pm 76.2$ \\
\bottomrule
\end{tabular}
\end{table}

\begin{table}
\centering
\caption{Differences from the control (rule=none) with the same seed, in points: means over the pairs $\pm$ 95\% interval (Student's t).}
\label{tab:differences}
\begin{tabular}{lllrr}
\toprule
rule & masking.weight & pairs & clean & AutoAttack \\
\midrule
a\_b & 0.5 & 2 & $+10.0 \pm 0.0$ & $0.0 \pm 12.7$ \\
\bottomrule
\end{tabular}
\end{table}
"""
    )


def test_latex_says_what_it_is_given() -> None:
    assert latex_text(r"50% of a_b & {x}^2 \ ~$#") == (
        r"50\% of a\_b \& \{x\}\textasciicircum{}2 \textbackslash{} \textasciitilde{}\$\#"
    )
    assert latex_text("– ± −") == r"-- $\pm$ $-$"


def test_markdown_with_failed_cells() -> None:
    analysis = analyse([*TWO, *rows(("a_b", 2, None, None), ("new|er", 0, None, None))], AXES, {"rule": "none"})
    text = sheets_markdown(sheets(analysis), notes(analysis))
    assert text.startswith("4 of 6 cells are measured; 2 failed. They count for nothing here.\n")
    assert "| a_b | 0.5 | 2 | **55.0** ± 63.5 | **25.0** ± 63.5 |" in text
    assert "| new\\|er | 0.5 | 0 | – | – |" in text
    assert "Differences from the control (rule=none)" in text
    assert "| rule | a_b | 2 | 55.0 ± 63.5 | +10.0 ± 0.0 | 25.0 ± 63.5 | 0.0 ± 12.7 |" in text
    assert "| rule | none (reference) | 2 | 45.0 ± 63.5 | – | 25.0 ± 76.2 | – |" in text


def test_one_seed_is_said_and_has_no_intervals() -> None:
    analysis = analyse([row for row in TWO if row["seed"] == 0], AXES, {"rule": "none"})
    text = sheets_markdown(sheets(analysis), notes(analysis))
    assert "measured with one seed" in text and "One seed, so no intervals." in text
    assert "| a_b | 0.5 | 1 | **50.0** | 30.0 |" in text and "| a_b | 0.5 | 1 | +10.0 | -1.0 |" in text
    assert not any("±" in line for line in text.splitlines() if line.startswith("|"))


def test_the_summary_says_no_more_than_the_seeds_do() -> None:
    table = rows(("a", 0, 0.5, 0.40), ("a", 1, 0.5, 0.50), ("none", 0, 0.5, 0.30), ("none", 1, 0.5, 0.31))
    assert "over 2 pairs: the 95% interval includes 0." in summary(analyse(table, AXES, {"rule": "none"}))[-1]
    table[1]["autoattack"] = 0.411
    assert summary(analyse(table, AXES, {"rule": "none"})) == [
        "2 settings, 2 seeds.",
        "Highest mean under AutoAttack: rule=a, masking.weight=0.5, 40.5 ± 7.0%; 50.0 ± 0.0% clean.",
        "That is +10.1 points from the control, ± 0.6 over 2 pairs: the 95% interval does not include 0.",
    ]
    assert summary(analyse(table, AXES, {"rule": "a"}))[-1] == "That is the control itself."
    single = [row for row in table if row["seed"] == 0]
    assert summary(analyse(single, AXES, {"rule": "none"}))[-1].endswith(
        "of one pair: whether by chance cannot be told."
    )
    nothing = analyse(rows(("a", 0, None, None)), AXES, {})
    assert summary(nothing)[-1] == "Nothing is measured yet." and len(sheets(nothing)) == 1


def test_the_front_and_the_control_are_named() -> None:
    table = rows(("low", 0, 0.5, 0.1), ("high", 0, 0.6, 0.2), ("robust", 0, 0.4, 0.3))
    lines = front_sheet(analyse(table, AXES, {"rule": "low"})).lines
    assert [(texts[1].split(",")[0], texts[2]) for texts, _ in lines] == [
        ("rule=low", "control"), ("rule=high", "Pareto front"), ("rule=robust", "Pareto front"),
    ]  # fmt: skip


def test_short_names_tell_axes_apart() -> None:
    assert short_names(["rule", "refinement.masking.weight", "refinement.seed", "baseline.seed"]) == {
        "rule": "rule", "refinement.masking.weight": "masking.weight", "refinement.seed": "refinement.seed",
        "baseline.seed": "baseline.seed",
    }  # fmt: skip


def test_keys_that_only_named_cells_set_are_told_by_the_name() -> None:
    grid = [{**row, "name": None, "attack": None} for row in TWO]
    named = [{**row, "rule": None, "name": "fgsm", "attack": "fgsm"} for row in TWO[:2]]
    assert analyse([*grid, *named], [*AXES, "name", "attack"], {}).axes == [*AXES, "name"]
    assert analyse([*grid, *named], [*AXES, "name", "attack"], {"attack": "fgsm"}).axes == [*AXES, "name", "attack"]
    twice = [*grid, *named, *({**row, "attack": "pgd"} for row in named)]  # the name does not tell these apart
    assert analyse(twice, [*AXES, "name", "attack"], {}).axes == [*AXES, "name", "attack"]
