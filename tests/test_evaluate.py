"""python -m hpcguard.evaluate: outcomes image by image, in whatever processes, killed, shared, of strange models."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyautoattack
import pytest
import torch
from night import REPOSITORY, environment
from slurm_cluster import Slurm, slurm  # noqa: F401  # a fixture
from torch import Tensor, nn
from torch.nn import functional

from hpcguard.cli import run_stage
from hpcguard.cluster.ranks import mpi_command
from hpcguard.config import DataConfig, EvaluationConfig, load_config
from hpcguard.data import load_images
from hpcguard.evaluation.units import test_images as images_of
from hpcguard.models import load_model
from hpcguard.store import read_outcomes, read_table

MakeConfig = Callable[..., Path]
SMALL = [
    "evaluation.alarms.images=2",
    "evaluation.alarms.queries=20",
    "evaluation.batch_size=10",
    "evaluation.explained=0",
    "evaluation.images=24",
    "evaluation.eps=0.1",
]


def evaluate(run: Path, *more: str) -> int:
    return run_stage("evaluate", [str(run), *SMALL, *more])


def result(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "results/baseline.json").read_text())
    return values


def subject(run: Path) -> tuple[nn.Module, Tensor, Tensor, np.ndarray]:
    """The model and its test images, loaded as anybody would."""
    config = load_config(run, SMALL)
    test = images_of(config)
    model = load_model(config.model, 10, 1, config.model.weights)
    return model, torch.from_numpy(test.images(test.ids)), torch.from_numpy(test.labels), test.ids


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"autoattack": "strong"}, "write one of standard, rand, fast, untargeted, none, or a list of"),
        ({"autoattack": ["apgd-ce", "apgd-ce"]}, "list of different ones of apgd-ce, apgd-dlr"),
        ({"autoattack": []}, "a list of"),
        ({"autoattack": 3}, "a list of"),
        ({"eps": 8}, "less than or equal to 1"),
        ({"curve": [0.1, 8]}, "less than or equal to 1"),
        ({"curve": [0]}, "greater than 0"),
        ({"pgd_losses": []}, "at least 1 item"),
        ({"pgd_losses": ["dlr"]}, "'cross-entropy' or 'margin'"),
    ],
)
def test_settings_that_cannot_be(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        EvaluationConfig.model_validate(change)


def test_settings_that_can_be() -> None:
    config = EvaluationConfig.model_validate(
        {"norm": "l2", "eps": "3/2", "curve": ["2", 0.5, 0.5], "autoattack": ["square", "apgd-ce"]}
    )
    assert (config.eps, config.curve, config.autoattack) == (1.5, [0.5, 2.0], ["square", "apgd-ce"])
    assert config.identity().keys() >= {"norm", "curve", "batch_size"}


def test_outcomes_are_those_of_plain_torch_and_of_the_library(run: Path) -> None:
    settings = ["evaluation.autoattack=fast", "evaluation.curve=[0.05,0.1,0.3]"]
    assert evaluate(run, *settings, "evaluation.workers=2") == 0
    found, said = read_outcomes(run / "results/baseline.h5"), result(run)
    model, x, y, ids = subject(run)
    assert np.array_equal(found.image_id, ids) and np.array_equal(found.label, y.numpy())
    clean = model(x).argmax(1) == y
    assert np.array_equal(found.right["clean"], clean.numpy())
    leaf = x.clone().requires_grad_()
    functional.cross_entropy(model(leaf), y, reduction="sum").backward()
    moved = (x + 0.1 * leaf.grad.sign()).clamp(0, 1)
    assert np.array_equal(found.right["fgsm"], (clean & (model(moved).argmax(1) == y)).numpy())
    theirs = []
    for start in range(0, 24, 10):  # the library itself on the same parts, wrong images and all
        library = pyautoattack.AutoAttack(
            model, norm="Linf", eps=0.1, seed=0, device="cpu", version="custom", attacks=["apgd-ce", "apgd-t"]
        )
        library.apgd.n_restarts = 1
        part = slice(start, start + 10)
        _, predicted = library.run_standard_evaluation(x[part], y[part], batch_size=10)
        theirs += (predicted == y[part]).tolist()
    assert found.right["autoattack-fast"].tolist() == theirs
    assert 0 < sum(theirs) < int(clean.sum())

    assert list(said["attacks"]) == list(found.right) == ["clean", "fgsm", "pgd-4", "pgd-4-margin", "autoattack-fast"]
    for name, row in said["attacks"].items():
        assert (row["right"], row["of"]) == (int(found.right[name].sum()), 24)
    assert said["worst"]["right"] == int(np.logical_and.reduce(list(found.right.values())).sum())
    curve = said["curve"]
    assert curve["radii"] == [0, 0.05, 0.1, 0.3] and curve["attack"] == "pgd-4-margin"
    assert curve["right"] == [int((falls_at(run) > radius).sum()) for radius in curve["radii"]]
    assert curve["right"][0] == int(clean.sum()) and curve["right"][2] <= said["attacks"]["pgd-4-margin"]["right"]
    assert sorted(curve["right"], reverse=True) == curve["right"] and curve["right"][-1] < curve["right"][0]
    assert said["seeds"] == {"attacks": 0, "images": 0, "explanations": 0}
    assert said["config"]["evaluation"]["workers"] == 2 and said["revision"]
    assert not (run / "results/parts/baseline").exists()


def falls_at(run: Path) -> np.ndarray:
    return read_table(run / "results/baseline.curve.h5").columns["falls_at"]


def columns(run: Path) -> dict[str, bytes]:
    found = read_outcomes(run / "results/baseline.h5")
    return {"ids": found.image_id.tobytes()} | {name: right.tobytes() for name, right in found.right.items()}


def test_shares_and_ranks_find_what_one_process_finds(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    restarts = "evaluation.pgd_restarts=2"
    assert evaluate(run, restarts) == 0
    alone = columns(run)
    assert 0 < sum(alone["pgd-4x2-margin"]) < 24
    shutil.rmtree(run / "results")
    for share in ("2/3", "0/3", "1/3"):
        assert not (run / "results/baseline.json").exists()
        assert evaluate(run, restarts, "--share", share) == 0
    assert "1 of 4 units are missing yet" in capfd.readouterr().out
    assert columns(run) == alone
    shutil.rmtree(run / "results")
    command = [sys.executable, "-m", "hpcguard.evaluate", str(run), *SMALL, restarts]
    if under := mpi_command(2, command):
        allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        oversubscribed = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
        subprocess.run(under, env={**os.environ, **allowed, **oversubscribed}, check=True)
        assert columns(run) == alone


def test_shares_leave_nothing_out_where_arms_end_apart(attributed: Path, tmp_path: Path) -> None:
    """One share after the other, each of which sees what the ones before have published."""
    run = tmp_path / "run"
    shutil.copytree(attributed, run)
    run.chmod(0o700)
    assert run_stage("refine", [str(run), f"run={run}", "refinement.epochs=1"]) == 0
    for share in range(9):
        assert evaluate(run, f"run={run}", "--share", f"{share}/9") == 0
    results = {path.name for path in (run / "results").glob("*.json")}
    assert results == {"baseline.json", "pgd.json", "guided.json"}
    alarms = [json.loads((run / "results" / name).read_text())["alarms"][-1] for name in sorted(results)]
    assert all(row["name"] == "transfer beats white box" and row["measured"] for row in alarms)


def test_an_array_of_jobs_does_it_in_shares(run: Path, slurm: Slurm) -> None:  # noqa: F811
    shutil.copytree(run, alone := run.parent / "alone", copy_function=shutil.copy)
    alone.chmod(0o700)
    assert evaluate(alone, f"run={alone}") == 0
    wanted = shlex.join([str(REPOSITORY / "slurm" / "evaluate.sh"), str(run), *SMALL])
    command = f"sbatch --parsable --wait --array=3-4 -o {run.parent}/%a.out {wanted}"
    slurm.run(command, seconds=120, environment=environment(run.parent) | {"SLURM_CONF": slurm.env["SLURM_CONF"]})
    said = [(run.parent / f"{task}.out").read_text() for task in (3, 4)]
    assert columns(run) == columns(alone), said
    assert sum("right under every attack" in each for each in said) == 1
    assert not (run / "report").exists()


@pytest.mark.parametrize("share", ["3/3", "1", "a/b", "-1/3", "0/0"])
def test_shares_that_cannot_be(run: Path, share: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(run, f"--share={share}") == 2
    assert f"--share {share}: write K/N" in capsys.readouterr().err


def parts(run: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (run / "results/parts/baseline/attacks").glob("0*.h5")}


def test_a_kill_costs_one_batch_at_the_most(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = [*SMALL, "evaluation.batch_size=3", "evaluation.pgd_steps=200"]
    process = subprocess.Popen([sys.executable, "-m", "hpcguard.evaluate", str(run), *slow], start_new_session=True)
    while process.poll() is None and len(parts(run)) < 3:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = parts(run)
    assert 3 <= len(kept) < 8
    damaged = run / "results/parts/baseline/attacks/00001.h5"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert (
        run_stage("evaluate", [str(run), *slow, "--share", "2/9"]) == 0
    )  # after the alarms, which is the damaged one's
    said = capsys.readouterr().out
    assert "attacks, batch 1: " in said and "doing it again" in said and "to do: 1 of attacks" in said
    again = parts(run)
    assert again.keys() == kept.keys()
    assert {name for name in kept if again[name] != kept[name]} == {"00001.h5"}
    assert run_stage("evaluate", [str(run), *slow]) == 0
    assert f"{8 - len(kept)} of attacks" in capsys.readouterr().out
    killed = columns(run)
    shutil.rmtree(run / "results")
    assert run_stage("evaluate", [str(run), *slow]) == 0
    assert columns(run) == killed


def test_parts_of_other_settings_are_not_mixed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(run, "--share", "1/4") == 0
    assert evaluate(run, "evaluation.seed=1", "--share", "2/4") == 0
    capsys.readouterr()
    assert evaluate(run, "evaluation.seed=1") == 0
    said = capsys.readouterr().out
    assert "to do: 1 of alarms, 2 of attacks" in said
    assert "batch 0: made with other weights, settings or images; doing it again" in said
    before = (run / "results/baseline.h5").stat().st_mtime_ns
    assert evaluate(run, "evaluation.seed=1", "evaluation.workers=2") == 0  # which changes nothing
    assert "measured already" in capsys.readouterr().out
    assert (run / "results/baseline.h5").stat().st_mtime_ns == before
    (run / "results/baseline.h5").unlink()
    assert evaluate(run, "evaluation.seed=1") == 0
    assert (run / "results/baseline.h5").exists()


def test_a_dry_run_starts_and_writes_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(run, "--share", "1/4") == 0
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    capsys.readouterr()
    assert evaluate(run, "--dry-run", "evaluation.autoattack=none") == 0
    said = capsys.readouterr().out
    for part in (
        "24 in 3 batches of at most 10",
        "FGSM, pgd-4, pgd-4-margin",
        "1 units are there, 3 to do",
        "of alarms: not known",
    ):
        assert part in said
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


class Odd(nn.Module):
    """A model for the tests below: its answers are not finite, or it fails."""

    def __init__(self, num_classes: int, fault: str, limit: float) -> None:
        super().__init__()
        self.head = nn.Linear(64, num_classes)
        self.fault, self.limit = fault, limit

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(x.flatten(1))
        if self.fault == "raises" and len(x) > 1:
            raise RuntimeError("no answer today")
        dark = x.flatten(1).mean(1, keepdim=True) < self.limit
        return logits + torch.where(dark, float("nan"), 0.0) if self.fault == "nan" else logits


def odd(num_classes: int, fault: str, limit: float) -> nn.Module:
    return Odd(num_classes, fault, limit)


def odd_run(tmp_path: Path, make_config: MakeConfig, fault: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.manual_seed(0)
    torch.save(Odd(10, "none", 0.5).state_dict(), tmp_path / "odd.pt")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    options = {"fault": fault, "limit": 0.29}
    model = {"name": "test_evaluate:odd", "options": options, "weights": str(tmp_path / "odd.pt")}
    return make_config(tmp_path, model=model, baseline=None)


def test_an_image_answered_with_nan_is_right_nowhere(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = odd_run(tmp_path, make_config, "nan", monkeypatch)
    settings = ["evaluation.explained=24", "evaluation.autoattack=fast", "evaluation.curve=[0.1]"]
    settings += [
        "evaluation.explanations.images=24",
        "evaluation.vulnerability.images=24",
        "evaluation.bound.images=24",
    ]
    settings += ["evaluation.bound.certified=false", "evaluation.bound.steps=2", "evaluation.vulnerability.draws=1"]
    assert run_stage("evaluate", [str(config), *settings]) == 0
    bound = read_table(tmp_path / "run/results/baseline.bound.h5").columns["measured/all"]
    claim = read_table(tmp_path / "run/results/baseline.vulnerability.h5").columns["flagged_area"]
    found = read_outcomes(tmp_path / "run/results/baseline.h5")
    test = images_of(load_config(config))
    dark = torch.from_numpy(test.images(found.image_id)).flatten(1).mean(1).numpy() < 0.29
    assert 0 < dark.sum() < 24
    assert not any((right & dark).any() for right in found.right.values())
    assert (falls_at(tmp_path / "run")[dark] == 0).all()
    assert (bound[dark] == 0).all() and np.isnan(claim[dark]).all()


def test_a_model_that_answers_nan_at_once_is_refused(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = odd_run(tmp_path, make_config, "nan", monkeypatch)
    assert run_stage("evaluate", [str(config), "model.options.limit=2", "evaluation.explained=0"]) == 2
    assert "gives NaN or infinite logits" in capsys.readouterr().err


def test_equal_failures_end_it_with_one_line(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = odd_run(tmp_path, make_config, "raises", monkeypatch)
    assert run_stage("evaluate", [str(config), "evaluation.batch_size=2"]) == 1
    said = [line for line in capsys.readouterr().out.splitlines() if "FAILED in" in line]
    assert len(said) == 1 and "RuntimeError: no answer today" in said[0]
    failures = int(said[0].split("FAILED in ")[1].split()[0])
    assert 3 <= failures < 14
    assert 'raise RuntimeError("no answer today")' in (tmp_path / "run/logs/evaluate_baseline.log").read_text()
    assert not (tmp_path / "run/results/baseline.json").exists()


def test_an_l2_curve_falls_on_real_digits(run: Path) -> None:
    settings = ["evaluation.norm=l2", "evaluation.eps=1.5", "evaluation.curve=[0.2,4]", "evaluation.curve_images=15"]
    assert evaluate(run, *settings) == 0
    curve = result(run)["curve"]
    assert (curve["norm"], curve["of"]) == ("l2", 15)
    assert curve["right"][0] >= curve["right"][1] > curve["right"][2]
    assert len(load_images(DataConfig(name="digits", size=8), "test")) > 24
