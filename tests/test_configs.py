"""The configurations that come with hpcguard, and the real thing on CIFAR-10 where it is at hand."""

import json
from pathlib import Path

import pytest
from real_data import CIFAR10, RESNET20, needs_cifar10, needs_resnet20

from hpcguard.cli import main, run_stage
from hpcguard.config import load_config
from hpcguard.refinement.engine import deepspeed_config
from hpcguard.store import open_rows

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_loads_and_names_its_command(path: Path) -> None:
    config = load_config(path)
    assert config.run == Path("runs") / path.stem
    for arm in config.arms():
        assert config.arm(arm).batch_size % config.arm(arm).processes == 0
    assert "pgd" in config.arms()
    header = path.read_text().split("\nrun:")[0]
    assert f"configs/{path.name}" in header or "tools/quickstart" in header
    for word in ("#   command", "#   time", "#   result"):
        assert word in header


@pytest.mark.parametrize("path", sorted((CONFIGS / "deepspeed").glob("*.json")), ids=lambda path: path.stem)
def test_every_deepspeed_configuration_is_accepted(path: Path) -> None:
    stage, _, half = path.stem.removeprefix("zero").partition("_")
    changes = {"deepspeed": path, "precision": "bfloat16" if half else "float32"}
    training = load_config(CONFIGS / "cifar10.yaml").refinement.model_copy(update=changes)
    values = deepspeed_config(training, 4)
    assert values["zero_optimization"]["stage"] == int(stage)
    assert ("torch_autocast" in values) == bool(half)


@needs_cifar10
@needs_resnet20
def test_real_photographs_with_the_published_resnet20(tmp_path: Path) -> None:
    changes = [
        f"run={tmp_path}/run", f"data.root={CIFAR10}", f"model.weights={RESNET20}", "data.train_images=24",
        "attribution.num_samples=32", "cluster.shards=2", "refinement.max_steps=2", "refinement.batch_size=12",
        "evaluation.images=12", "evaluation.pgd_steps=3", "evaluation.autoattack=none", "evaluation.explained=2",
    ]  # fmt: skip
    stages = ["attribute", "consolidate", "refine", "evaluate", "report"]
    assert main([*stages, str(CONFIGS / "cifar10_resnet20.yaml"), *changes]) == 0
    rows = open_rows(tmp_path / "run/store.h5")
    assert len(rows["image_id"]) == 24
    assert (rows["predicted"] == rows["label"]).mean() > 0.9  # training images of a net with 91.7% on test images
    assert 15 < rows["num_segments"].mean() < 45
    result = json.loads((tmp_path / "run/results/guided.json").read_text())
    assert result["attacks"]["clean"]["of"] == 12
    assert (tmp_path / "run/report/index.html").exists()


@needs_cifar10
def test_the_full_configuration_plans_all_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = [f"run={tmp_path}/run", f"data.root={CIFAR10}", "attribution.num_samples=8", "attribution.batch_size=16"]
    assert run_stage("attribute", [str(CONFIGS / "cifar10.yaml"), *changes, "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "49000 of cifar10, 3x32x32" in output
    assert "64 shards of at most 768 images, units of 64" in output
