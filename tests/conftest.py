"""What all tests share: a missing system package fails under CI, and small run folders made by the real stages."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from digit_nets import digit_net
from slurm_cluster import slurm  # noqa: F401  # a fixture

from hpcguard.cli import run_stage

REPOSITORY = Path(__file__).parents[1]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.skipped and os.environ.get("CI") == "true" and "needs system package" in str(report.longrepr):
        report.outcome = "failed"
    return report


WAITING = ("test_sweep_slurm.py", "test_cluster_runs.py", "test_night.py", "test_mini_slurm.py", "test_loop.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that mostly wait for clusters come first, so that none of them is left to run alone at the end."""
    items.sort(key=lambda item: WAITING.index(item.path.name) if item.path.name in WAITING else len(WAITING))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Bits depend on the number of threads; workers have one."""
    torch.set_num_threads(1)


TINY = {
    "data": {"name": "digits", "size": 8, "train_images": 120, "validation": 0.1},
    "model": {"name": "small-cnn", "options": {"width": 4}},
    "attribution": {"segmentation": "grid", "num_segments": 9, "num_samples": 32, "unit": 8},
    "cluster": {"workers": 2, "shards": 4},
    "baseline": {"epochs": 2, "batch_size": 32, "engine": "torch"},
    "refinement": {
        "epochs": 2, "batch_size": 32, "engine": "torch", "attack": {"eps": 0.1, "steps": 2},
    },
    "controls": {"pgd": {"masking": {"weight": 0}, "sensitivity": {"weight": 0}}},
    "evaluation": {"images": 24, "eps": 0.1, "pgd_steps": 4, "autoattack": "none", "explained": 4,
                   "alarms": {"images": 4, "queries": 20}},
}  # fmt: skip


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Path]:
    """make_config(folder, section={...}) writes a small configuration whose run folder is folder/run."""

    def make(folder: Path, **changes: object) -> Path:
        values = {**TINY, "run": str(folder / "run")}
        for section, change in changes.items():
            values[section] = {**values.get(section, {}), **change} if isinstance(change, dict) else change
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return make


@pytest.fixture(scope="session")
def attributed(tmp_path_factory: pytest.TempPathFactory, make_config: Callable[..., Path]) -> Path:
    """A run folder with a baseline, all shards and a store; read only. Copy it to change it."""
    folder = tmp_path_factory.mktemp("attributed")
    config = str(make_config(folder))
    assert run_stage("refine", [config, "--arm", "baseline"]) == 0
    assert run_stage("attribute", [config]) == 0
    assert run_stage("consolidate", [config]) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def digit_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a small network that tells handwritten digits apart."""
    net = digit_net(size=8, width=4, epochs=8)
    path = tmp_path_factory.mktemp("weights") / "digits.pt"
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture
def run(tmp_path: Path, make_config: Callable[..., Path], digit_weights: Path) -> Path:
    """A run folder of a model that was trained elsewhere, and nothing more."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    model = {"weights": str(digit_weights)}
    make_config(tmp_path, baseline=None, controls={}, model=model).rename(folder / "config.yaml")
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs system package mount")
    if done.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
