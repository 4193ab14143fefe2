"""tools/bench_lime.py says what it promises; the figures themselves are for a quiet machine."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "tools" / "bench_lime.py"


def test_the_last_line_is_one_json_object() -> None:
    command = [sys.executable, str(BENCH), "--parts", "memory", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["peak_rows_in_flight_bytes"] == figures["peak_rows_in_flight_bytes_100k"] == 256 * 3 * 32 * 32 * 4


def test_an_unknown_part_is_refused() -> None:
    done = subprocess.run([sys.executable, str(BENCH), "--parts", "speed"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "cost, small" in done.stderr
