"""hpcguard compare: what it says, what it refuses, and what it makes of damaged results."""

import copy
import csv
import json
import random
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcguard.cli import main, run_stage
from hpcguard.metrics.accuracy import wilson_interval
from hpcguard.metrics.paired import compare_paired

IMAGES = 200
HALF = {"right": 1, "of": 2, "accuracy": 0.5, "low": 0.1, "high": 0.9}


@dataclass(frozen=True)
class Outcomes:
    """A stand-in for what hpcguard.store.outcomes.read_outcomes gives."""

    image_id: np.ndarray
    label: np.ndarray
    right: dict[str, np.ndarray]


def outcomes(seed: int, share: float = 0.5) -> Outcomes:
    clean = np.random.default_rng(0).random(IMAGES) < 0.9
    attacked = clean & (np.random.default_rng(seed).random(IMAGES) < share)
    return Outcomes(np.arange(IMAGES), np.arange(IMAGES) % 10, {"clean": clean, "pgd-20": attacked})


def result(arm: str, measured: Outcomes) -> dict[str, Any]:
    """As `evaluate` writes it."""
    rows = {}
    for attack, right in measured.right.items():
        low, high = wilson_interval(int(right.sum()), IMAGES)
        rows[attack] = {
            "right": int(right.sum()), "of": IMAGES, "accuracy": float(right.mean()), "low": low, "high": high,
            "seconds": 1.5,
        }  # fmt: skip
    return {
        "arm": arm,
        "weights": f"checkpoints/{arm}/model.safetensors",
        "identity": {
            "weights_sha256": "ab" * 32,
            "evaluation": {"images": IMAGES, "eps": 8 / 255, "pgd_steps": 20, "batch_size": 256, "seed": 0},
            "test_sha256": "cd" * 32,
        },
        "images": IMAGES,
        "attacks": rows,
        "alarms": [{"name": "randomness", "measured": {}, "limit": 1e-4, "red": False, "meaning": "-"}],
        "trusted": True,
        "hardware": {"device": "cpu"},
    }


class Bench:
    """Results in run folders, and the outcomes that lie beside them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.held = folder, {}
        module = types.ModuleType("hpcguard.store.outcomes")
        module.read_outcomes = lambda path: self.held[Path(path)]  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "hpcguard.store.outcomes", module)

    def add(self, run: str, arm: str, measured: Outcomes, per_image: bool = True, **changes: Any) -> Path:
        path = self.folder / run / "results" / f"{arm}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**result(arm, measured), **changes}))
        if per_image:
            path.with_suffix(".h5").touch()
            self.held[path.with_suffix(".h5")] = measured
        return path


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def refused(capsys: pytest.CaptureFixture[str], *paths: Path) -> str:
    assert run_stage("compare", [str(path) for path in paths]) == 2
    caught = capsys.readouterr()
    assert caught.out == ""
    line = caught.err.strip()
    assert "\n" not in line
    assert line.startswith("hpcguard compare: ")
    return line


def test_table_differences_and_files(bench: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    one, two = outcomes(1, 0.4), outcomes(2, 0.7)
    paths = [bench.add("a", "pgd", one), bench.add("a", "guided", two)]
    out = tmp_path / "new" / "comparison"
    assert main(["compare", *map(str, paths), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    pair = compare_paired(one.right["pgd-20"], two.right["pgd-20"])
    assert f"{100 * pair.difference:+.1f} points [{100 * pair.low:+.1f}, {100 * pair.high:+.1f}]" in text
    assert f"{one.right['pgd-20'].mean():.1%}" in text
    assert "+0.0 points [+0.0, +0.0]" in text, "clean: the same images right"
    rows = list(csv.DictReader((out / "comparison.csv").open()))
    assert [(row["model"], row["attack"]) for row in rows] == [
        ("pgd", "clean"), ("pgd", "pgd-20"), ("guided", "clean"), ("guided", "pgd-20"),
    ]  # fmt: skip
    assert rows[1]["against"] == ""
    assert float(rows[3]["mcnemar_exact_p"]) == pair.exact
    assert int(rows[3]["only_this"]) == pair.second == int((two.right["pgd-20"] & ~one.right["pgd-20"]).sum())
    assert float(rows[3]["accuracy"]) == two.right["pgd-20"].mean()
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    markdown = (out / "comparison.md").read_text()
    assert markdown.count("PGD-20") == 2
    assert sorted(path.name for path in out.iterdir()) == ["comparison.csv", "comparison.md", "comparison.png"]


def test_what_is_right_under_every_attack_is_a_row(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """FGSM breaks other images than PGD, so neither row is it."""
    paths, worst = [], []
    for seed, arm in ((1, "pgd"), (2, "guided")):
        measured = outcomes(seed)
        measured.right["fgsm"] = measured.right["clean"] & ~measured.right["pgd-20"] | (np.arange(IMAGES) < 60)
        worst.append(measured.right["clean"] & measured.right["pgd-20"] & measured.right["fgsm"])
        row = result(arm, Outcomes(measured.image_id, measured.label, {"worst": worst[-1]}))["attacks"]["worst"]
        paths.append(bench.add("a", arm, measured, worst=row))
    assert run_stage("compare", [str(path) for path in paths]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "guided  all of them" in line)
    assert f"{100 * (worst[1].mean() - worst[0].mean()):+.1f} points" in line


def test_without_per_image_outcomes_only_accuracies(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [bench.add("a", "pgd", outcomes(1)), bench.add("a", "guided", outcomes(2), per_image=False)]
    assert run_stage("compare", [str(path) for path in paths]) == 0
    text = capsys.readouterr().out
    assert "note: no per-image outcomes beside the result of guided" in text
    assert "points [" not in text


def test_three_models_of_two_runs(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [
        bench.add(run, arm, outcomes(k))
        for k, (run, arm) in enumerate([("a", "guided"), ("b", "guided"), ("b", "pgd")])
    ]
    assert run_stage("compare", [str(path) for path in paths]) == 0
    text = capsys.readouterr().out
    assert "a/guided" in text
    assert "b/guided" in text
    assert "not corrected" in text
    assert text.count("points [") == 4


def test_a_red_alarm_marks_the_model(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    red = {"alarms": [{"name": "randomness", "red": True}, {"name": "transfer", "red": None}], "trusted": False}
    paths = [bench.add("a", "pgd", outcomes(1)), bench.add("a", "guided", outcomes(2), **red)]
    assert run_stage("compare", [str(path) for path in paths]) == 0
    text = capsys.readouterr().out
    assert "guided (not trusted)" in text
    assert "guided is not to be trusted: randomness" in text
    bench.add("a", "guided", outcomes(2), **{**red, "trusted": True})
    assert "trusted is True, with 1 red alarms" in refused(capsys, *paths)


def edited(values: dict[str, Any], *keys: str, to: Any) -> dict[str, Any]:
    values = copy.deepcopy(values)
    place = values
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    return values


@pytest.mark.parametrize(
    ("keys", "to", "says"),
    [
        (("identity", "test_sha256"), "ef" * 32, "other test images"),
        (("identity", "evaluation", "eps"), 0.1, "eps 0.1 against 0.03137"),
        (("identity", "evaluation", "norm"), "l2", "norm l2 against linf"),
        (("attacks", "fgsm"), HALF, "clean, pgd-20, fgsm"),
        (("attacks", "pgd-20"), HALF, "on 2 images against 200"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_with_the_reason(
    bench: Bench, capsys: pytest.CaptureFixture[str], keys: tuple[str, ...], to: Any, says: str
) -> None:
    first, other = bench.add("a", "pgd", outcomes(1), False), bench.add("b", "pgd", outcomes(1), False)
    other.write_text(json.dumps(edited(json.loads(other.read_text()), *keys, to=to)))
    line = refused(capsys, first, other)
    assert says in line
    assert str(other) in line


def test_another_seed_is_a_note(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    first, other = bench.add("a", "pgd", outcomes(1)), bench.add("a", "guided", outcomes(2))
    other.write_text(json.dumps(edited(json.loads(other.read_text()), "identity", "evaluation", "seed", to=5)))
    assert run_stage("compare", [str(first), str(other)]) == 0
    assert "seed was 0 (now 5)" in capsys.readouterr().out


def test_outcomes_that_are_not_of_the_result(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = outcomes(1), outcomes(2)
    first, other = bench.add("a", "pgd", one), bench.add("a", "guided", two)
    beside = other.with_suffix(".h5")
    bench.held[beside] = outcomes(2, 0.1)
    assert "not of one evaluation" in refused(capsys, first, other)
    bench.add("a", "guided", two, outcomes_sha256="ab" * 32)
    assert "not the per-image outcomes" in refused(capsys, first, other)
    bench.add("a", "guided", two)
    bench.held[beside] = Outcomes(two.image_id + 1, two.label, two.right)
    assert "per-image image_ids differ" in refused(capsys, first, other)
    bench.held[beside] = Outcomes(two.image_id, two.label + 1, two.right)
    assert "per-image labels differ" in refused(capsys, first, other)
    bench.held[beside] = Outcomes(two.image_id, two.label, {"clean": two.right["clean"]})
    assert run_stage("compare", [str(first), str(other)]) == 0
    assert capsys.readouterr().out.count("points [") == 1


def test_one_result_and_the_same_twice(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    path = bench.add("a", "pgd", outcomes(1))
    assert "give two results" in refused(capsys, path)
    assert "given twice" in refused(capsys, path, path)
    assert "not there" in refused(capsys, path, path.with_name("absent.json"))
    assert str(path.parent) in refused(capsys, path, path.parent)


# -------------------------------------------------------------------------------------------- malformed results
WRONG = (None, True, -1, 1.5, float("nan"), float("inf"), "text", "", [], {}, [1], 10**400, "\ud800\n", "$x$")


def leaves(values: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Keys of everything that a comparison reads, to the last leaf."""
    found = [path] if path else []
    for key, value in values.items() if isinstance(values, dict) else []:
        found += leaves(value, (*path, key))
    return found


def needed(path: tuple[str, ...]) -> bool:
    return path[0] in ("arm", "attacks") or path[:2] in (("identity", "test_sha256"), ("identity", "evaluation"))


def mutations() -> list[tuple[str, bytes]]:
    """A result with a needed key gone, each needed value of each wrong type, and bytes cut, flipped and replaced."""
    whole = result("pgd", outcomes(1))
    text = json.dumps(whole).encode()
    kept = [
        path
        for path in leaves(whole)
        if needed(path) and path[-1] not in ("seconds", "seed", "pgd_steps", "images", "batch_size")
    ]
    found: list[tuple[str, bytes]] = []
    for path in kept:
        parent = edited(whole, *path, to=None)
        place = parent
        for key in path[:-1]:
            place = place[key]
        if path[:2] != ("attacks", "pgd-20") or len(path) > 2:  # a result without PGD is whole
            del place[path[-1]]
            found.append((f"{'.'.join(path)} missing", json.dumps(parent).encode()))
        allowed = {
            "identity.evaluation.eps": (True, 1.5),
            "arm": ("text",),
            "identity.test_sha256": ("text", "$x$", "\ud800\n"),
        }
        for wrong in WRONG:
            if wrong in allowed.get(".".join(path), ()) and not isinstance(wrong, bool):
                continue
            found.append(
                (f"{'.'.join(path)} = {str(wrong)[:9]!r}", json.dumps(edited(whole, *path, to=wrong)).encode())
            )
    found += [(f"cut at {length}", text[:length]) for length in range(0, len(text), len(text) // 12)]
    found += [
        ("binary", b"\x89HDF\r\n\x1a\n" + bytes(200)), ("zeros", bytes(64)), ("a list", b"[1, 2]"), ("a number", b"3"),
        ("null", b"null"), ("brackets", b"[" * 100_000), ("long number", b'{"arm": ' + b"9" * 5000 + b"}"),
        ("UTF-16", json.dumps(whole).encode("utf-16")), ("two objects", text + text), ("empty object", b"{}"),
    ]  # fmt: skip
    chance = random.Random(0)
    for number in range(30):
        cut = chance.randrange(len(text) - 8)
        found.append(
            (f"noise {number}", text[:cut] + bytes(chance.randrange(128, 256) for _ in range(8)) + text[cut + 8 :])
        )
    return found


def test_malformed_results_are_one_line_and_status_two(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    first = bench.add("a", "guided", outcomes(2), per_image=False)
    other = bench.folder / "other.json"
    cases = mutations()
    assert len(cases) >= 100
    accepted = []
    for name, content in cases:
        other.write_bytes(content)
        for pair in ((first, other), (other, first)):
            status = run_stage("compare", [str(path) for path in pair])
            caught = capsys.readouterr()
            if status == 0:
                accepted.append(name)
                continue
            assert status == 2, name
            assert caught.out == "", name
            assert caught.err.count("\n") == 1, (name, caught.err)
            assert str(other) in caught.err, (name, caught.err)
            assert len(caught.err) < 700, (name, caught.err)
    assert not accepted


def test_the_unchanged_result_is_accepted(bench: Bench) -> None:
    """Or the mutations above would prove nothing."""
    first = bench.add("a", "guided", outcomes(2), per_image=False)
    other = bench.folder / "other.json"
    other.write_text(json.dumps(result("pgd", outcomes(1))))
    assert run_stage("compare", [str(first), str(other)]) == 0


def test_nothing_half_written(bench: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first, other = bench.add("a", "pgd", outcomes(1)), bench.add("a", "guided", outcomes(2))
    other.write_text("{")
    assert run_stage("compare", [str(first), str(other), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    bench.add("a", "guided", outcomes(2))
    assert run_stage("compare", [str(first), str(other), "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.count("\n") == 2
