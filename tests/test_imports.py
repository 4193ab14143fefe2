"""The design's import rules, read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hpcguard
from hpcguard.cli import STAGES

ROOT = Path(hpcguard.__file__).parent
FILES = {path: str(path.relative_to(ROOT)) for path in sorted(ROOT.rglob("*.py"))}
ONLY = {
    "deepspeed": {"refinement/engine.py"},
    "submitit": {"cluster/submit.py"},
    "mpi4py": {"cluster/ranks.py"},
    "h5py": {"store/"},
    "pyautoattack": {"attacks/autoattack.py"},
}
READS_ENVIRONMENT = {"cluster/", "refinement/engine.py"}  # engine.py only sets DeepSpeed's own variables


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def allowed(name: str, places: set[str]) -> bool:
    return any(name == place or (place.endswith("/") and name.startswith(place)) for place in places)


@pytest.mark.parametrize("package", sorted(ONLY))
def test_only_one_place_imports_it(package: str) -> None:
    found = {name for path, name in FILES.items() for module in imported(path) if module.split(".")[0] == package}
    assert all(allowed(name, ONLY[package]) for name in found), found


def test_stages_do_not_import_stages() -> None:
    for stage in STAGES:
        others = {f"hpcguard.{other}" for other in STAGES if other != stage}
        assert not others & set(imported(ROOT / f"{stage}.py")), stage


def test_parts_do_not_import_stages_or_the_command_line() -> None:
    above = {f"hpcguard.{name}" for name in (*STAGES, "cli")}
    for path, name in FILES.items():
        if "/" in name:
            assert not above & set(imported(path)), name


def test_only_the_cluster_reads_the_environment() -> None:
    found = {name for path, name in FILES.items() if "os.environ" in path.read_text() or "getenv" in path.read_text()}
    assert all(allowed(name, READS_ENVIRONMENT) for name in found), found


def test_reporting_and_attribution_know_no_files_of_a_run() -> None:
    for path, name in FILES.items():
        if name.startswith(("attribution/", "attacks/", "metrics/", "models/")):
            assert "hpcguard.runs" not in set(imported(path)), name


def test_no_utils_and_no_long_functions() -> None:
    assert not [name for name in FILES.values() if "utils" in name]
    for path, name in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{name}: {node.name}"


def test_who_only_waits_or_looks_imports_no_torch() -> None:
    """Seconds of every array task, and of every look at a run."""
    for module in ("array_task", "status", "cancel"):
        code = f"import sys, hpcguard.{module}; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0, module
