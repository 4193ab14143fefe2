"""The benches say what they promise; the figures themselves are for a quiet machine."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import need_slurm

BENCH = Path(__file__).parents[1] / "tools" / "bench_lime.py"
CLUSTER = BENCH.with_name("bench_cluster.py")


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


def test_store_reads_the_same_rows_as_a_memmap() -> None:
    command = [sys.executable, str(BENCH.with_name("bench_store.py")), "--parts", "read", "--read-rows", "1100"]
    done = subprocess.run([*command, "--rounds", "1", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # it compares a batch with the memmap's itself
    figures = json.loads(done.stdout.splitlines()[-1])
    assert {"read_vs_memmap", "read_in_memory_vs_memmap", "rows_per_second_one_worker"} <= figures.keys()


@pytest.mark.parametrize(("bench", "some"), [(BENCH, "cost, small"), (CLUSTER, "plan, folder, resume")])
def test_an_unknown_part_is_refused(bench: Path, some: str) -> None:
    done = subprocess.run([sys.executable, str(bench), "--parts", "speed"], capture_output=True, text=True)
    assert done.returncode == 2
    assert some in done.stderr
