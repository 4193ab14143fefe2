"""The benches say what they promise; the figures themselves are for a quiet machine."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from real_data import CIFAR10, RESNET20, needs_cifar10, needs_resnet20
from slurm_cluster import need_slurm

BENCH = Path(__file__).parents[1] / "tools" / "bench_lime.py"
CLUSTER = BENCH.with_name("bench_cluster.py")
STORE = BENCH.with_name("bench_store.py")


def test_the_last_line_is_one_json_object() -> None:
    command = [sys.executable, str(BENCH), "--parts", "memory", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["peak_rows_in_flight_bytes"] == figures["peak_rows_in_flight_bytes_100k"] == 256 * 3 * 32 * 32 * 4


def cluster_figures(parts: str) -> dict[str, Any]:
    command = [sys.executable, str(CLUSTER), "--parts", parts, "--shards", "50", "--rounds", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # it asserts itself that the run is what it says it measures
    return json.loads(done.stdout.splitlines()[-1])


def test_cluster_plans_and_looks_at_as_many_shards_as_it_says() -> None:
    figures = cluster_figures("plan,folder,resume")
    assert {"plan_50_s", "plan_image_folder_50_s", "resume_scan_50_s", "hardware", "torch"} <= figures.keys()
    assert 700 < figures["resume_scan_bytes"] / (50 * 128) < 1100  # bytes an image


def test_cluster_asks_a_real_queue_for_status() -> None:
    need_slurm()
    assert {"status_50_s", "submit_20_tasks_s"} <= cluster_figures("status").keys()


def store_figures(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(STORE), *arguments, "--rounds", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_store_consolidates_with_one_rank_and_with_two() -> None:
    figures = store_figures("--parts", "consolidate", "--shards", "12", "--rows", "20")
    assert {"consolidate_1m_s", "mpi_speedup", "peak_memory_mb", "hardware", "hdf5"} <= figures.keys()


@pytest.mark.parametrize(("size", "status"), [(900, 0), (901, 1)])
def test_store_checks_the_goals_of_what_it_measured(
    size: float, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(STORE.parent)
    spec = importlib.util.spec_from_file_location("bench_store", STORE)
    assert spec and spec.loader
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    monkeypatch.setattr(bench, "part_size", lambda arguments: {"bytes_per_image": size, "mpi_speedup": None})
    monkeypatch.setattr(sys, "argv", ["bench_store.py", "--parts", "size", "--check"])
    assert bench.main() == status
    assert capsys.readouterr().err == status * "bench_store: bytes_per_image is 901, at most 900 is asked for\n"


def test_store_reads_the_same_rows_as_a_memmap() -> None:
    figures = store_figures("--parts", "read", "--read-rows", "1100")  # it compares a batch with the memmap's itself
    assert {"read_vs_memmap", "read_in_memory_vs_memmap", "rows_per_second_one_worker"} <= figures.keys()


@needs_cifar10
@needs_resnet20
def test_store_measures_real_explanations() -> None:
    figures = store_figures(
        "--parts", "size,write", "--images", "32", "--cifar10", str(CIFAR10), "--weights", str(RESNET20)
    )
    assert 25 < figures["segments_per_image"] < 32
    assert 500 < figures["bytes_per_image"] < 1500  # a small shard: its attributes weigh more
    assert 0 < figures["write_overhead"] < 1
    assert 0.01 < figures["ratio_to_dense_maps_224"] < 0.2


@pytest.mark.parametrize(
    ("bench", "some"), [(BENCH, "cost, small"), (CLUSTER, "plan, folder, resume"), (STORE, "size, write")]
)
def test_an_unknown_part_is_refused(bench: Path, some: str) -> None:
    done = subprocess.run([sys.executable, str(bench), "--parts", "speed"], capture_output=True, text=True)
    assert done.returncode == 2
    assert some in done.stderr


def test_refinement_measures_whole_steps(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH.with_name("bench_refine.py")), "--parts", "step,parity,gpu", "--batch", "2"]
    command += ["--rounds", "1", "--threads", "1", "--json", "--cifar10", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    named = {"guided_vs_pgd_at", "guided_every4_vs_pgd_at", "pgd_at_vs_bare_torch", "attack_parity", "hardware"}
    assert named <= figures.keys()
    assert figures["attack_parity"] is None  # without the images
    assert 0.3 < figures["pgd_at_vs_bare_torch"] < 3
    assert torch.cuda.is_available() or figures["bf16_share_of_floor"] is None
