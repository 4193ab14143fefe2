"""Tables, sentences, figures and the page, from plain values."""

import csv
import io
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image
from synthetic import arms, epoch, explanations, result, store, training

from hpcguard.errors import InputError
from hpcguard.reporting import arms as checks
from hpcguard.reporting.arms import Arm, attack_title, parse_log, radius
from hpcguard.reporting.html import render_page
from hpcguard.reporting.overlay import BORDER, borders, overlay
from hpcguard.reporting.pictures import Picture, explanation_pictures
from hpcguard.reporting.plots import Panel, accuracy_figure, arm_styles, explanation_figure, training_figure
from hpcguard.reporting.summary import cautions, summarise, verdict
from hpcguard.reporting.tables import (
    Table,
    attribution_table,
    cost_table,
    duration,
    loss_table,
    percent,
    result_table,
    results_csv,
    stability_table,
    to_markdown,
    to_text,
    training_table,
)


def refusal(call: Any, *arguments: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_no_module_imports_torch() -> None:
    code = (
        "import importlib, pkgutil, sys, hpcguard.reporting as package\n"
        "for module in pkgutil.iter_modules(package.__path__):\n"
        "    importlib.import_module(f'hpcguard.reporting.{module.name}')\n"
        "found = {'torch', 'torchvision', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "sys.exit(f'imported {found}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Tables


def test_result_table_shows_the_numbers_of_the_results() -> None:
    table = result_table(arms())
    assert table.columns == ["arm", "clean", "FGSM", "PGD-20", "AutoAttack", "training time"]
    assert [row[0] for row in table.rows] == ["baseline", "pgd", "guided"]
    assert table.rows[2][4] == percent(result("guided")["attacks"]["autoattack"]) == "45.0% [35.6, 54.8]"
    assert table.rows[0][5] == "–" and table.rows[2][5] == "48.3 s"


def test_csv_is_unrounded_and_complete() -> None:
    rows = list(csv.DictReader(io.StringIO(results_csv(arms()))))
    assert len(rows) == 12
    for arm in arms():
        for attack, expected in arm.attacks.items():
            (row,) = [row for row in rows if (row["arm"], row["attack"]) == (arm.name, attack)]
            for key in ("right", "of", "accuracy", "low", "high"):
                assert float(row[key]) == expected[key]
            assert float(row["eps"]) == (0 if attack == "clean" else 0.1)
    assert [row["training_seconds"] for row in rows[::4]] == ["", "48.3", "48.3"]


def test_markdown_and_text_hold_the_same_cells() -> None:
    table = result_table(arms())
    markdown, text = to_markdown(table), to_text(table)
    for row in table.rows:
        assert "| " + " | ".join(row) + " |" in markdown
        assert all(cell in text for cell in row)
    assert markdown.splitlines()[1] == "| --- | --- | --- | --- | --- | --- |"
    start = text.index("AutoAttack")
    assert [line[start:].split("  ")[0] for line in text.splitlines()[1:]] == [row[4] for row in table.rows]


def test_markdown_escapes_what_would_break_it() -> None:
    assert to_markdown(Table(["a|b"], [["<i>"]])) == "| a\\|b |\n| --- |\n| &lt;i> |\n"


def test_training_tables() -> None:
    table = training_table(arms())
    assert [row[0] for row in table.rows] == ["pgd", "guided"]
    assert table.rows[1] == ["guided", "216", "12", "2", "cpu", "48.3 s", "17.4%", "0.2%", "0.0%"]
    assert table.rows[0][6:] == ["–", "–", "–"]
    # A clean loss is computed beside the others, but its weight is 0: it is no part of the loss.
    assert loss_table(arms()).rows[1] == ["guided", "0.5000", "–", "0.3750 × 1", "0.2500 × 0.5", "–"]
    assert loss_table(arms()).rows[0] == ["pgd", "0.5000", "–", "0.3750 × 1", "–", "–"]


def test_other_tables() -> None:
    shown = dict(attribution_table(store()).rows)
    assert shown["images explained"] == "1213" and shown["weighted R² of the surrogates"] == "0.776"
    first, *others = arms()
    unexplained = Arm("x", {**first.result, "explanation_jaccard5": None})
    assert [row[1] for row in stability_table([unexplained, *others]).rows] == ["–", "0.75", "0.75"]


def test_cost_is_processes_times_threads_times_hours() -> None:
    pgd = {**training("pgd"), "seconds": 1800, "world_size": 2, "threads": 4}
    guided = {**training("guided"), "seconds": 3600, "world_size": 2, "threads": 4, "device": "cuda:0"}
    measured = [Arm("pgd", result("pgd"), pgd), Arm("guided", {**result("guided"), "seconds": 7200}, guided)]
    shown = {row[0]: row[3] for row in cost_table(measured, {**store(), "worker_seconds": 1800}).rows}
    assert shown["training pgd"] == "4.00 core-hours" and shown["training guided"] == "2.00 GPU-hours"
    assert shown["evaluation guided"] == "2.00 core-hours" and shown["attribution"] == "0.50 worker-hours"


@pytest.mark.parametrize(("seconds", "shown"), [(0.04, "0.0 s"), (99.9, "99.9 s"), (150, "2 min"), (9000, "2.5 h")])
def test_duration(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_names_of_the_field() -> None:
    titles = [attack_title(name) for name in ("clean", "fgsm", "pgd-20x3", "autoattack", "autoattack-fast")]
    assert titles == ["clean", "FGSM", "PGD-20x3", "AutoAttack", "AutoAttack-fast"]
    assert radius({"eps": 8 / 255}) == "0.031 (8/255)" and radius({"eps": 0.1, "norm": "linf"}) == "0.100 (25.5/255)"
    assert radius({"eps": 0.5, "norm": "l2"}) == "0.5 (L2)"


# Sentences


def test_overlapping_intervals_are_no_difference() -> None:
    first, baseline, clean = summarise(arms())
    assert first == (
        "Under AutoAttack at eps 0.100 (25.5/255) on 100 test images the guided model keeps 45.0% [35.6, 54.8], "
        "the control pgd 44.0% [34.7, 53.8]: the intervals overlap, so this run alone does not tell them apart."
    )
    assert baseline.startswith("The baseline keeps 0.0%") and "disjoint, and guided is 45.0 points higher" in baseline
    assert clean.startswith("Accuracy on the same images unattacked: baseline 98.0%")


def test_disjoint_intervals_are_a_difference_in_either_direction() -> None:
    better = summarise(arms(guided=(95, 90, 85, 80)))[0]
    assert "the intervals are disjoint, and guided is 36.0 points higher" in better and "no difference" not in better
    worse = summarise(arms(guided=(95, 30, 20, 10)))[0]
    assert "the intervals are disjoint, and guided is 34.0 points lower" in worse


def test_touching_intervals_overlap() -> None:
    assert verdict({"low": 0.5, "high": 0.7}, {"low": 0.3, "high": 0.5}) == "within the noise"
    assert verdict({"low": 0.51, "high": 0.7}, {"low": 0.3, "high": 0.5}) == "higher"
    assert verdict({"low": 0.1, "high": 0.2}, {"low": 0.3, "high": 0.5}) == "lower"


def test_summary_says_what_is_missing() -> None:
    baseline, pgd, guided = arms()
    assert summarise([baseline, pgd])[-1] == "The guided model is not measured yet, so nothing is compared."
    assert "No control is measured" in summarise([baseline, guided])[0]


def test_summary_names_the_strongest_attack_that_was_run() -> None:
    weak = [Arm(name, result(name, (95, 60, 50))) for name in ("baseline", "guided")]
    assert summarise(weak)[0].startswith("Under PGD-20 at eps")
    assert "AutoAttack was not run" in cautions(weak, None)[0]


def test_cautions() -> None:
    assert cautions(arms(), store()) == []
    masked = cautions(arms(guided=(95, 40, 60, 45)), None)
    assert masked == [
        "guided: PGD-20 leaves more images right than the weaker FGSM (60 against 40); gradients may be masked."
    ]
    baseline, pgd, guided = arms()
    assert pgd.training and guided.training
    pgd.training["steps"] = 100
    guided.training["identity"]["store"] = "another"
    assert [line.split(":")[0] for line in cautions([baseline, pgd, guided], store())] == [
        "The arms were trained for different numbers of steps",
        "guided was trained with another store than the one described here.",
    ]


# What is refused


def test_damaged_results_are_named() -> None:
    where = "results/guided.json"
    for change, said in (
        ({"attacks": {}}, "attacks has no row clean"),
        ({"arm": "pgd"}, "arm is 'pgd', expected 'guided'"),
        ({"identity": {}}, "evaluation is missing"),
        ({"attacks": {"clean": {"right": 5, "of": 4}}}, "accuracy is missing"),
        (
            {"attacks": {"clean": {**result("g")["attacks"]["clean"], "accuracy": 0.5}}},
            "clean: accuracy is not right / of",
        ),
        ({"explanation_jaccard5": 2}, "explanation_jaccard5 is 2"),
        ({"images": None}, "images is None, expected a number"),
    ):
        line = refusal(checks.check_result, {**result("guided"), **change}, "guided", where)
        assert line.startswith(f"{where}: damaged, {said}") and "evaluate" in line
    checks.check_result(result("guided"), "guided", where)


def test_damaged_training_and_store_are_named() -> None:
    assert "loss is missing" in refusal(checks.check_training, {**training("pgd"), "last_epoch": {"epoch": 1}}, "t")
    assert "statistics is missing" in refusal(
        checks.check_store, {"images": 1, "shards": 1, "worker_seconds": 1.0}, "s"
    )
    checks.check_training(training("guided", guided=True), "t")
    checks.check_store(store(), "s")


def test_arms_of_different_settings_are_refused() -> None:
    other = Arm("guided", result("guided", eps=0.2))
    line = refusal(checks.check_comparable, [arms()[0], other])
    assert "arm guided" in line and "evaluation.eps was 0.1 (now 0.2)" in line and "evaluate" in line
    images = result("guided")
    images["identity"]["test_sha256"] = "another"
    assert "test_sha256 was digest (now another)" in refusal(
        checks.check_comparable, [arms()[0], Arm("guided", images)]
    )


def test_results_of_earlier_weights_are_refused() -> None:
    stale = Arm("guided", result("guided"), {**training("guided"), "weights_sha256": "newer"})
    assert "was trained again after it was measured" in refusal(checks.check_comparable, [arms()[0], stale])


def test_log_of_a_resumed_training() -> None:
    lines = [json.dumps(epoch(number, loss)) for number, loss in ((1, 3.0), (2, 2.0), (3, 1.5), (2, 1.9), (3, 1.4))]
    assert [(e["epoch"], e["loss"]) for e in parse_log("\n".join(lines), "log")] == [(1, 3.0), (2, 1.9), (3, 1.4)]
    assert parse_log("", "log") == []
    assert "log: line 2 is damaged" in refusal(parse_log, lines[0] + '\n{"epoch": 2, "lo', "log")


# Pictures


def test_overlay_colours() -> None:
    image, segments = np.zeros((1, 2, 4), np.float32), np.array([[0, 0, 1, 2], [0, 0, 1, 2]])
    painted = overlay(image, segments, np.array([0.2, -0.2, 0.0]), 0.2, zoom=8)
    assert painted.shape == (16, 32, 3) and painted.dtype == np.uint8
    supports, against, neither = (painted[4, x].astype(int) for x in (4, 20, 28))
    assert supports[2] > supports[0] + 50  # blue
    assert against[0] > against[2] + 40  # red
    assert np.ptp(neither) <= 1  # grey
    # 0.65 of RdBu's blue end (5, 48, 97), 0.35 of black lifted to 0.3
    assert supports.tolist() == [30, 58, 90]
    assert (painted[:, [15, 16, 23, 24]] == BORDER).all() and (painted[:, 0] != BORDER).all()


def test_overlay_of_bright_pixels_and_all_zero_coefficients() -> None:
    white = overlay(np.ones((3, 2, 2), np.float32), np.zeros((2, 2), int), np.array([0.0, np.nan]), 0.0, zoom=1)
    assert (white >= 248).all()


def test_borders() -> None:
    assert borders(np.zeros((3, 3), np.uint16)).sum() == 0
    assert borders(np.array([[0, 0, 0, 1]], np.uint16)).tolist() == [[False, False, True, True]]


def test_explanation_figure_shows_both_colours_and_the_image() -> None:
    rows = explanations(np.array([7]), np.array([3]))
    panel = Panel("guided", rows["segments"][0], rows["coefficients"][0, 0], "predicts 3")
    shown = pixels(explanation_figure(np.ones((1, 16, 16), np.float32), "true class 3", [panel])).astype(int)
    height, width = shown.shape[:2]
    inch = height / 2.45
    left, right = (shown[height // 2, int(x * inch)] for x in (0.1 + 2 + 0.5, 0.1 + 2 + 1.4))
    assert left[2] > left[0] + 50 and right[0] > right[2] + 20
    assert (shown[height // 2, int(1.0 * inch)] == 255).all() and width > 4 * inch


def test_explanation_pictures_say_in_words_what_they_show() -> None:
    rows = explanations(np.array([7, 9]), np.array([0, 1]))
    explained = [Arm(name, result(name), explanations=rows) for name in ("baseline", "guided")]
    first, second = explanation_pictures(explained, np.zeros((2, 3, 16, 16), np.float32), ["cat", "dog", "fox"])
    assert first.name == "explanation_7.png" and second.caption == "Test image 9, true class dog"
    assert first.alt.endswith("baseline predicts dog (62.5%), wrong; guided predicts dog (62.5%), wrong")
    assert first.uri.startswith("data:image/png;base64,") and pixels(first.png).shape[2] == 3


def test_class_names_are_no_formulas() -> None:
    rows = explanations(np.array([7]), np.array([0]))
    explained = [Arm("guided", result("guided"), explanations=rows)]
    (picture,) = explanation_pictures(explained, np.zeros((1, 1, 16, 16), np.float32), ["$x", "$\\bad{"])
    assert "$x" in picture.caption


def test_figures_are_drawn_the_same_twice() -> None:
    assert accuracy_figure(arms()) == accuracy_figure(arms())
    assert pixels(accuracy_figure(arms())).std() > 5
    drawn = training_figure(arms())
    assert drawn is not None and pixels(drawn).std() > 5
    assert training_figure(arms()[:1]) is None


def test_curves_without_validation() -> None:
    log = [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0}]
    drawn = training_figure([Arm("guided", result("guided"), training("guided"), log)])
    assert drawn is not None and pixels(drawn).std() > 1


def test_styles_stay_with_their_arms() -> None:
    many = [Arm(name, {}) for name in ("baseline", *"abcdefg", "guided")]
    assert arm_styles(many)[0] == arm_styles(many[:1])[0] and arm_styles(many)[-1] == arm_styles(many[-1:])[0]
    assert len(set(arm_styles(many)[1:6])) == 5


# The page


def page(**changes: Any) -> str:
    picture = Picture("accuracy.png", b"png", 'accuracy of "<b>"', "arm\n", "<caption>")
    values = {
        "title": "a <run>", "subject": "cnn on digits", "summary": ["First <i>.", "Second."], "cautions": ["careful"],
        "results": result_table(arms()), "accuracy": picture, "eps": "0.1", "explanations": [picture],
        "stability": stability_table(arms()), "training": training_table(arms()), "losses": loss_table(arms()),
        "curves": None, "attribution": attribution_table(store()), "commands": ["python -m hpcguard.report x"],
        "hardware": Table(["arm"], [["a"]]), "settings": "run: <x>", "rounds": None, "by_round": None,
        "cost": cost_table(arms(), store()), "norm": "L2",
    }  # fmt: skip
    measured = ("paired", "alarms", "by_radius", "corruptions", "corrupted", "each_corruption", "quality", "claim",
                "claims", "bound")  # fmt: skip
    return render_page({**values, **dict.fromkeys(measured), **changes})


def test_page_escapes_everything() -> None:
    text = page(results=Table(["arm"], [["<script>alert(1)</script>"]]))
    assert "<script" not in text and "&lt;script&gt;" in text
    assert "<title>a &lt;run&gt;" in text and "First &lt;i&gt;. Second." in text and "run: &lt;x&gt;" in text
    assert 'alt="accuracy of &#34;&lt;b&gt;&#34;"' in text and "&lt;caption&gt;" in text


def test_page_shows_only_what_is_there() -> None:
    text = page(explanations=[], training=Table([], []), attribution=None, cautions=[])
    for absent in ("Explanations before", "<h2>Training", "explained training set", 'class="cautions"'):
        assert absent in page() and absent not in text


def test_page_needs_every_value() -> None:
    with pytest.raises(Exception, match="summary"):
        render_page({"title": "x", "subject": "y"})
