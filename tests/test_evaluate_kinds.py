"""python -m hpcguard.evaluate: what is measured beside attacks, against the same in one piece."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpcguard.attribution import true_and_runner_up
from hpcguard.cli import run_stage
from hpcguard.config import Config, load_config
from hpcguard.data.corruptions import corrupt
from hpcguard.evaluation.units import test_images as images_of
from hpcguard.metrics.claim import explained_rows, measure_claim
from hpcguard.metrics.explanations import explanation_quality
from hpcguard.metrics.robustness import is_right
from hpcguard.models import load_model
from hpcguard.refinement.spurious import flag_segments
from hpcguard.store import read_table

SMALL = [
    "evaluation.alarms.images=4", "evaluation.alarms.queries=20", "evaluation.explained=0", "evaluation.images=20",
    "evaluation.batch_size=8", "evaluation.eps=0.1", "evaluation.pgd_steps=3",
]  # fmt: skip
ALL = [
    *SMALL, "evaluation.corruptions.images=12", "evaluation.corruptions.names=[fog,contrast]",
    "evaluation.explanations.images=10", "evaluation.vulnerability.images=20",
    "evaluation.vulnerability.radii=[0.05,0.2]", "evaluation.vulnerability.draws=2", "evaluation.bound.images=5",
    "evaluation.bound.steps=5",
]  # fmt: skip


def said(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "results/baseline.json").read_text())
    return values


def subject(run: Path, settings: list[str]) -> tuple[Config, nn.Module, Tensor, Tensor, np.ndarray]:
    config = load_config(run, settings)
    test = images_of(config)
    model = load_model(config.model, 10, 1, config.model.weights).requires_grad_(False)
    return config, model, torch.from_numpy(test.images(test.ids)), torch.from_numpy(test.labels), test.ids


@pytest.fixture
def measured(run: Path) -> Path:
    assert run_stage("evaluate", [str(run), *ALL]) == 0
    return run


def test_batches_find_what_one_piece_finds(measured: Path) -> None:
    config, model, x, y, ids = subject(measured, ALL)
    result = said(measured)

    right = read_table(measured / "results/baseline.corruptions.h5").columns["right"]
    assert right.shape == (12, 2, 5)
    fog = torch.from_numpy(corrupt(x[:12].numpy(), ids[:12], "fog", 4))
    assert np.array_equal(right[:, 0, 3], (model(fog).argmax(1) == y[:12]).numpy())
    assert result["corruptions"]["name"] == "hpcguard-c 1"
    assert result["corruptions"]["corruptions"]["fog"]["severities"][3] == right[:, 0, 3].mean()

    rows = explained_rows(model, x, y, ids, config.attribution, noisy=False)
    _, claim = measure_claim(
        model, x, y, rows, config.evaluation.spurious, config.evaluation.vulnerability, 100, config.evaluation.seed
    )
    assert claim and same(result["vulnerability"]["rows"], claim)

    flagged = flag_segments(rows, config.evaluation.spurious, config.evaluation.seed)[:10]
    targets = true_and_runner_up(model(x), y).numpy()[:10]
    quality = explanation_quality(
        lambda batch: model(batch).softmax(1), x[:10], x[:10], ids[:10], targets, config.attribution, flagged
    )
    table = read_table(measured / "results/baseline.quality.h5").columns
    for name in ("stability", "deletion", "insertion", "flagged_share"):
        np.testing.assert_allclose(table[name], quality[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert result["explanations"]["deletion"]["mean"] == pytest.approx(quality["deletion"].mean(), abs=1e-6)
    assert (table["attacked_spearman"] < 0.999).any()


def same(one: Any, other: Any) -> bool:
    """Equal up to rounding, however nested."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other if one is None or other is None else bool(one == pytest.approx(other, rel=1e-4, abs=1e-6))


def test_certificates_are_below_what_attacks_find(measured: Path) -> None:
    _, model, x, y, _ = subject(measured, ALL)
    columns = read_table(measured / "results/baseline.bound.h5").columns
    right = is_right(model, x[:5], y[:5], 5).numpy()
    for group in ("all", "flagged", "unflagged"):
        certified, found = columns[f"certified/{group}"], columns[f"measured/{group}"]
        some = ~np.isnan(certified)
        assert (certified[some] <= found[some]).all() and (certified[some & right] > 0).all()
    assert (columns["certified/all"][~right] == 0).all() and right.any()
    bound = said(measured)["bound"]
    assert bound["norm"] == "linf" and 0 < bound["all"]["certified_median"] < bound["all"]["measured_median"]


def test_what_is_asked_for_later_costs_no_other_attack(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stage("evaluate", [str(run), *SMALL]) == 0
    before = {path: path.stat().st_mtime_ns for path in (run / "results").rglob("*.h5")}
    notes = {path: path.stat().st_mtime_ns for path in (run / "results/notes").iterdir()}
    first = said(run)
    assert first["corruptions"] is None and len(first["alarms"]) == 11
    capsys.readouterr()
    assert run_stage("evaluate", [str(run), *ALL, "evaluation.bound.images=0"]) == 0
    out = capsys.readouterr().out
    assert "baseline: to do: 2 of corruptions, 2 of quality, 3 of vulnerability\n" in out
    assert run_stage("evaluate", [str(run), *ALL, "evaluation.bound.images=0", "evaluation.curve=[0.05,0.2]"]) == 0
    assert "baseline: to do: 3 of curve\n" in capsys.readouterr().out
    assert said(run)["curve"]["radii"] == [0, 0.05, 0.2]
    assert before.items() <= {path: path.stat().st_mtime_ns for path in (run / "results").rglob("*.h5")}.items()
    assert notes == {path: path.stat().st_mtime_ns for path in (run / "results/notes").iterdir()}
    assert said(run)["attacks"] == first["attacks"] and said(run)["corruptions"] and said(run)["vulnerability"]
    assert set(said(run)["tables_sha256"]) == {"curve", "corruptions", "quality", "vulnerability"}


def test_a_model_without_bounds_is_refused_before_anything(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An activation that no bound is known of, found in a dry run too."""
    options = ["model.activation=null", "model.name=test_evaluate_kinds:Bent", "model.options={}"]
    torch.save(Bent(10).state_dict(), run / "bent.pt")
    settings = [*SMALL, *options, f"model.weights={run}/bent.pt", "evaluation.bound.images=4"]
    for more in (["--dry-run"], []):
        assert run_stage("evaluate", [str(run), *settings, *more]) == 2
        assert "Tanh) is not supported" in capsys.readouterr().err
    assert not (run / "results/parts").exists()


class Bent(nn.Module):
    def __init__(self, num_classes: int, width: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


class Sure(nn.Module):
    """Probabilities for logits: its gradients vanish where it is sure."""

    def __init__(self, num_classes: int, scale: float) -> None:
        super().__init__()
        self.head, self.scale = nn.Linear(64, num_classes), scale

    def forward(self, x: Tensor) -> Tensor:
        return (self.scale * self.head(x.flatten(1))).softmax(1)


def test_a_masked_model_is_not_to_be_trusted(
    tmp_path: Path, make_config: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sure_net.py").write_text("from test_evaluate_kinds import Sure\n")
    torch.manual_seed(0)
    torch.save(Sure(10, 1.0).state_dict(), tmp_path / "sure.pt")
    places = [str(tmp_path), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(places))
    monkeypatch.syspath_prepend(str(tmp_path))
    model = {"name": "sure_net:Sure", "options": {"scale": 1000.0}, "weights": str(tmp_path / "sure.pt")}
    config = str(make_config(tmp_path, model=model, baseline=None, attribution={"sensitivity": False}))
    settings = [each for each in SMALL if "alarms.images" not in each]
    assert run_stage("evaluate", [config, *settings, "evaluation.alarms.images=20"]) == 0
    assert "NOT TO BE TRUSTED" in capsys.readouterr().out
    result = said(tmp_path / "run")
    red = {row["name"] for row in result["alarms"] if row["red"]}
    assert not result["trusted"] and "softmax outputs" in red
    assert run_stage("report", [config]) == 0
    out = capsys.readouterr().out
    assert "baseline (not to be trusted)" in out and "note: baseline is not to be trusted: softmax outputs." in out
    page = (tmp_path / "run/report/index.html").read_text()
    assert '<td class="red">RED' in page


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("evaluation.corruptions.names=[rain]", "evaluation.corruptions.names"),
        ("evaluation.corruptions.folder=/nowhere", "/nowhere/labels.npy: no such file"),
        ("evaluation.spurious.criteria=[outside] evaluation.spurious.foreground=masks.npy", "test images have none"),
        ("evaluation.bound.images=-1", "evaluation.bound.images"),
        ("evaluation.vulnerability.radii=[]", "evaluation.vulnerability.radii"),
        ("evaluation.alarms.images=0", "evaluation.alarms.images"),
    ],
)
def test_settings_that_cannot_be(run: Path, setting: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stage("evaluate", [str(run), *SMALL, "evaluation.corruptions.images=3", *setting.split()]) == 2
    error = capsys.readouterr().err
    assert expected in error and "Traceback" not in error
    assert not (run / "results/baseline.json").exists()
