"""Malformed input: one line that names it, exit status 2, no traceback, nothing half-written."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from hpcguard.cli import OF_RESULTS, STAGES, main, run_stage


class Case:
    """What a case may change: a copy of a run folder with a store, and a configuration beside it."""

    def __init__(self, folder: Path, run: Path, config: Path) -> None:
        self.folder, self.run, self.config = folder, run, config
        self.arguments: list[str] = []

    def edit(self, **changes: Any) -> None:
        values = yaml.safe_load(self.config.read_text())
        for section, change in changes.items():
            merged = isinstance(change, dict) and isinstance(values.get(section), dict)
            values[section] = {**values[section], **change} if merged else change
        self.config.write_text(yaml.safe_dump(values))

    def set(self, *overrides: str) -> None:
        self.arguments += overrides

    @property
    def weights(self) -> Path:
        return self.run / "checkpoints/baseline/model.safetensors"


@pytest.fixture
def case(tmp_path: Path, attributed: Path, make_config: Callable[..., Path]) -> Case:
    shutil.copytree(attributed, tmp_path / "run")
    return Case(tmp_path, tmp_path / "run", make_config(tmp_path))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def broken_yaml(c: Case) -> None:
    c.config.write_text("data: {name: digits\nmodel: [")


def binary_config(c: Case) -> None:
    c.config.write_bytes(b"\x89PNG\r\n\xff\xfe")


def list_config(c: Case) -> None:
    c.config.write_text("- data\n- model\n")


def no_config(c: Case) -> None:
    c.config.unlink()


def folder_without_config(c: Case) -> None:
    c.config = c.folder / "empty"
    c.config.mkdir()


def missing_weights(c: Case) -> None:
    c.edit(baseline=None)
    c.set("model.weights=/nowhere/net.pth")


def no_weights_at_all(c: Case) -> None:
    c.weights.unlink()


def truncated_safetensors(c: Case) -> None:
    truncate(c.weights)


def other_weights(c: Case, content: Any) -> None:
    torch.save(content, c.folder / "net.pth")
    c.edit(baseline=None)
    c.set(f"model.weights={c.folder}/net.pth")


def truncated_pth(c: Case) -> None:
    other_weights(c, {"a": torch.zeros(1000)})
    truncate(c.folder / "net.pth")


def weights_with_code(c: Case) -> None:
    other_weights(c, {"a": os.getcwd})


def weights_of_another_net(c: Case) -> None:
    other_weights(c, {"conv.weight": torch.zeros(3)})


def model_of_another_width(c: Case) -> None:
    c.edit(model={"options": {"width": 8}})


def fashion(c: Case, damage: bool) -> None:
    folder = c.folder / "fashion"
    folder.mkdir()
    if damage:
        for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
            (folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(b"not idx"))
    c.set("data.name=fashion-mnist", f"data.root={folder}")


def cifar_without_files(c: Case) -> None:
    (c.folder / "cifar-10-batches-py").mkdir()
    c.set("data.name=cifar10", f"data.root={c.folder}")


def damaged_cifar(c: Case) -> None:
    cifar_without_files(c)
    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta"]
    for name in names:
        (c.folder / "cifar-10-batches-py" / name).write_bytes(b"\x80\x04K\x01.")


def damaged_pictures(c: Case) -> None:
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            (c.folder / "pictures" / part / label).mkdir(parents=True)
            for index in range(40):
                Image.new("RGB", (16, 16), (index, 0, 0)).save(c.folder / "pictures" / part / label / f"{index}.png")
    for picture in (c.folder / "pictures/train").glob("*/*.png"):
        truncate(picture)
    c.run = c.folder / "other"
    c.edit(baseline=None, run=str(c.run), model={"weights": str(c.folder / "net.pth")})
    torch.manual_seed(0)
    c.set("data.name=image-folder", f"data.root={c.folder}/pictures", "data.train_images=null", "data.validation=0")
    from hpcguard.config import ModelConfig
    from hpcguard.models import build_model

    net = build_model(ModelConfig(options={"width": 4}), 2, 3).net
    torch.save(net.state_dict(), c.folder / "net.pth")


def unwritable_run(c: Case) -> None:
    (c.folder / "file").write_text("")  # a file where a folder must be: unwritable even for root
    weights = c.folder / "kept.safetensors"
    shutil.copy(c.weights, weights)
    c.edit(baseline=None, run=str(c.folder / "file/run"), model={"weights": str(weights)})


def plan_of_other_settings(c: Case) -> None:
    c.set("attribution.num_samples=33")


def plan_of_other_data(c: Case) -> None:
    c.set("data.train_images=100")


def plan_of_other_weights(c: Case) -> None:
    shutil.copy(c.weights, c.folder / "net.safetensors")
    content = bytearray((c.folder / "net.safetensors").read_bytes())
    content[-2] ^= 1
    (c.folder / "net.safetensors").write_bytes(content)
    c.edit(baseline=None)
    c.set(f"model.weights={c.folder}/net.safetensors")


def torn_plan(c: Case) -> None:
    truncate(c.run / "plan.json")


def no_plan(c: Case) -> None:
    (c.run / "plan.json").unlink()


def missing_shard(c: Case) -> None:
    (c.run / "store.h5").unlink()
    (c.run / "shards/00002.h5").unlink()


def no_store(c: Case) -> None:
    (c.run / "store.h5").unlink()


def no_store_manifest(c: Case) -> None:
    (c.run / "store.json").unlink()


def torn_store_manifest(c: Case) -> None:
    truncate(c.run / "store.json")


def changed_shard_under_store(c: Case) -> None:
    truncate(c.run / "shards/00001.h5")


def overwrite(path: Path, content: str) -> None:
    path.write_text(content)


def empty_training(c: Case) -> None:
    overwrite(c.run / "checkpoints/baseline/training.json", "{}")
    arm(c, "baseline")


def no_folder(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("")


def too_few_outputs(c: Case) -> None:
    (c.folder / "narrow.py").write_text(
        "import torch\ndef net():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))\n"
    )
    sys.path.insert(0, str(c.folder))
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))
    torch.save(net.state_dict(), c.folder / "net.pth")
    c.edit(baseline=None, run=str(c.folder / "r2"), model={"name": "narrow:net", "options": {}})
    c.set(f"model.weights={c.folder}/net.pth")


def deepspeed(c: Case, content: str | None) -> None:
    path = c.folder / "ds.json"
    if content is not None:
        path.write_text(content)
    c.set("refinement.engine=deepspeed", f"refinement.deepspeed={path}")


def arm(c: Case, name: str) -> None:
    c.set("--arm", name)


def half_a_world(c: Case) -> None:
    os.environ["RANK"] = "0"


CASES: list[tuple[str, str, Callable[[Case], object], list[str]]] = [
    ("unknown key", "attribute", lambda c: c.set("attribution.num_sample=5"), ["num_sample", "mean num_samples"]),
    ("unknown section", "attribute", lambda c: c.edit(atribution={}), ["atribution", "attribution"]),
    ("wrong type", "attribute", lambda c: c.set("attribution.num_samples=many"), ["num_samples", "many"]),
    ("negative count", "attribute", lambda c: c.set("cluster.workers=-1"), ["cluster.workers = -1", "greater than 0"]),
    ("zero samples", "attribute", lambda c: c.set("attribution.num_samples=0"), ["num_samples = 0"]),
    ("not a number", "refine", lambda c: c.set("refinement.learning_rate=.nan"), ["learning_rate", "finite"]),
    ("eps of 8", "evaluate", lambda c: c.set("evaluation.eps=8"), ["evaluation.eps = 8", "less than or equal to 1"]),
    ("override without =", "attribute", lambda c: c.set("data.size"), ["data.size", "section.key=value"]),
    ("a section as number", "attribute", lambda c: c.set("model=3"), ["model = 3", "weights"]),
    ("missing configuration", "attribute", no_config, ["config.yaml", "no such file"]),
    ("folder, no configuration", "attribute", folder_without_config, ["empty", "no config.yaml"]),
    ("broken YAML", "attribute", broken_yaml, ["config.yaml", "line", "not valid YAML"]),
    ("binary configuration", "attribute", binary_config, ["config.yaml", "not valid YAML"]),
    ("list as configuration", "attribute", list_config, ["expected sections", "list"]),
    ("unknown data set", "attribute", lambda c: c.set("data.name=mnist"), ["data.name = 'mnist'", "'digits'"]),
    ("no CIFAR root", "attribute", lambda c: c.set("data.name=cifar10"), ["data.root must be set"]),
    ("CIFAR not there", "attribute", lambda c: c.set("data.name=cifar10", "data.root=/no/such"), ["/no/such/cifar-10"]),
    ("CIFAR without files", "attribute", cifar_without_files, ["data_batch_1", "data.root"]),
    ("damaged CIFAR", "attribute", damaged_cifar, ["damaged", "MD5"]),
    ("no Fashion-MNIST", "attribute", lambda c: fashion(c, False), ["train-images-idx3-ubyte.gz", "data.root"]),
    ("damaged Fashion-MNIST", "attribute", lambda c: fashion(c, True), ["-ubyte.gz"]),
    ("damaged pictures", "attribute", damaged_pictures, ["cat/0.png"]),
    ("too many images asked", "attribute", lambda c: c.set("data.train_images=9999"), ["data.train_images = 9999"]),
    ("too many test images", "evaluate", lambda c: c.set("evaluation.images=9999"), ["images = 9999", "449"]),
    ("unknown model", "attribute", lambda c: c.set("model.name=resnet19"), ["model.name = resnet19", "resnet18"]),
    ("unknown option", "attribute", lambda c: c.edit(model={"options": {"depth": 3}}), ["model.options", "depth"]),
    ("own model, not importable", "attribute", lambda c: c.set("model.name=no.such:net"), ["no.such:net", "imported"]),
    ("wrong mean", "attribute", lambda c: c.set("model.mean=[0.1,0.2]"), ["model.mean", "2 values"]),
    ("missing weights", "attribute", missing_weights, ["model.weights = /nowhere/net.pth", "no such file"]),
    ("no weights at all", "attribute", no_weights_at_all, ["model.weights is null", "--arm baseline"]),
    ("truncated safetensors", "attribute", truncated_safetensors, ["model.safetensors"]),
    ("truncated pth", "attribute", truncated_pth, ["net.pth"]),
    ("weights that need code", "attribute", weights_with_code, ["net.pth"]),
    ("weights of another net", "attribute", weights_of_another_net, ["net.pth", "conv.weight"]),
    ("model of another width", "attribute", model_of_another_width, ["model.safetensors", "shape"]),
    ("unwritable run folder", "attribute", unwritable_run, ["file/run", "cannot be written"]),
    ("unknown device", "attribute", lambda c: c.set("device=gpu"), ["device = gpu", "cuda:N"]),
    ("plan of other settings", "attribute", plan_of_other_settings, ["attribution.num_samples was 32 (now 33)"]),
    ("plan of other data", "attribute", plan_of_other_data, ["data.train_images was 120 (now 100)"]),
    ("plan of other weights", "attribute", plan_of_other_weights, ["model.weights_sha256 was"]),
    ("torn plan", "attribute", torn_plan, ["plan.json", "damaged"]),
    ("consolidate without a plan", "consolidate", no_plan, ["plan.json", "attribute"]),
    ("consolidate, shard missing", "consolidate", missing_shard, ["1 of 4 shards", "00002 (missing)", "attribute"]),
    ("refine without a store", "refine", no_store, ["store.h5", "consolidate"]),
    ("refine, no store manifest", "refine", no_store_manifest, ["store.json", "consolidate"]),
    ("refine, torn store manifest", "refine", torn_store_manifest, ["store.json", "damaged"]),
    ("refine, a shard changed", "refine", changed_shard_under_store, ["00001.h5 has changed"]),
    ("unknown arm", "refine", lambda c: arm(c, "trades"), ["'trades'", "guided"]),
    ("too large a batch", "refine", lambda c: c.set("refinement.batch_size=1000"), ["batch_size = 1000", "120"]),
    ("all masks empty", "refine", lambda c: c.set("refinement.spurious.z=1000"), ["empty masks", "z (1000"]),
    ("a criterion not computed", "refine", lambda c: c.set("refinement.spurious.criteria=[instability]"),
     ["noisy_copies=5"]),
    ("no loss left", "refine", lambda c: c.set("refinement.adversarial_weight=0", "refinement.masking.weight=0"),
     ["no loss is left"]),
    ("DeepSpeed file missing", "refine", lambda c: deepspeed(c, None), ["ds.json: not there", "refinement.deepspeed"]),
    ("DeepSpeed file torn", "refine", lambda c: deepspeed(c, "{"), ["ds.json", "not JSON"]),
    ("ZeRO 3", "refine", lambda c: deepspeed(c, '{"zero_optimization": {"stage": 3}}'), ["stage = 3", "0, 1, 2"]),
    ("half a world", "refine", half_a_world, ["RANK", "MASTER_ADDR"]),
    ("trained with other settings", "refine", lambda c: arm(c, "baseline") or c.set("baseline.epochs=3"),
     ["training.epochs was 2 (now 3)"]),
    ("evaluate an untrained arm", "evaluate", lambda c: arm(c, "guided"), ["guided", "refine"]),
    ("report without results", "report", lambda c: None, ["evaluate"]),
    ("model of other classes", "attribute", too_few_outputs, ["(1, 5)", "10 classes"]),
    ("huge seed", "refine", lambda c: c.set(f"refinement.seed={2**64}"), ["refinement.seed", "less than"]),
    ("huge threads", "attribute", lambda c: c.set("cluster.threads=1000000000"), ["cluster.threads", "1024"]),
    ("tiny std", "attribute", lambda c: c.set("model.std=[1e-300]"), ["model.std"]),
    ("training.json is empty", "refine", empty_training, ["training.json", "damaged, identity"]),
    ("store.json is empty", "refine", lambda c: overwrite(c.run / "store.json", "{}"), ["store.json", "damaged"]),
    ("shards is a file", "attribute", lambda c: no_folder(c.run / "shards"), ["shards"]),
    ("checkpoints is a file", "refine", lambda c: no_folder(c.run / "checkpoints"), ["checkpoints"]),
    ("nested DeepSpeed type", "refine", lambda c: deepspeed(c, '{"zero_optimization": 3}'), ["wrong type"]),
    ("half precision", "refine", lambda c: deepspeed(c, '{"bf16": {"enabled": true}}'), ["bf16 is refused"]),
    ("a recursive anchor", "attribute", lambda c: overwrite(c.config, "data: &a {name: *a}"), ["config.yaml"]),
    ("status of no run", "status", lambda c: c.set("run=/no/such/run"), ["/no/such/run", "no such folder"]),
]  # fmt: skip


def tree(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("name", "stage", "change", "expected"), CASES, ids=[name for name, *_ in CASES])
def test_one_line_and_status_two(
    case: Case, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    name: str, stage: str, change: Callable[[Case], object], expected: list[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(os, "environ", os.environ.copy())
    change(case)
    before = tree(case.run) if case.run.exists() else {}
    status = run_stage(stage, [str(case.config), *case.arguments])
    error = capfd.readouterr().err
    assert status == 2, error
    line = error.strip()
    assert "\n" not in line, error
    assert line.startswith(f"hpcguard {stage}: ")
    for part in expected:
        assert part in line, line
    after = tree(case.run) if case.run.exists() else {}
    changed = {path for path in after if after[path] != before.get(path)}
    changed = {path for path in changed if not path.endswith(("config.yaml", "plan.json", ".lock"))}
    assert not [path for path in changed if not path.endswith(("config.yaml", "plan.json"))]


@pytest.mark.parametrize("stage", ["attribute", "refine"])
def test_as_a_user_types_it(tmp_path: Path, stage: str) -> None:
    """The same through a real process: nothing but that line."""
    command = [sys.executable, "-m", f"hpcguard.{stage}", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "none.yaml: no such file" in done.stderr


def test_the_command_names_its_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attribut"]) == 2
    assert "one of attribute, consolidate" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "Explain every training image" in capsys.readouterr().out


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_what_an_example_and_the_keys(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_stage(stage, ["--help"])
    assert caught.value.code == 0
    output = capsys.readouterr().out
    for part in ("example:", f"python -m hpcguard.{stage}"):
        assert part in output
    for part in ("keys and defaults:", "run = "):
        assert (part in output) == (stage not in OF_RESULTS)


BROKEN_NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        if len(x) > 2:
            raise RuntimeError('boom')
        return self.w * x.mean((1, 2, 3))[:, None].expand(-1, 10)
"""


def test_a_code_error_in_a_worker_is_status_one_with_a_log(
    case: Case, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that fails only when called: the shard fails, the log has the traceback, the rest is kept."""
    (case.folder / "broken_net.py").write_text(BROKEN_NET)
    monkeypatch.syspath_prepend(case.folder)
    monkeypatch.setenv("PYTHONPATH", str(case.folder))
    torch.save({"w": torch.zeros(1)}, case.folder / "net.pth")
    run = case.folder / "broken"
    case.edit(
        baseline=None,
        run=str(run),
        model={"name": "broken_net:Net", "options": {}, "weights": str(case.folder / "net.pth")},
    )
    assert run_stage("attribute", [str(case.config)]) == 1
    output = capsys.readouterr().out
    failed = output.count("FAILED (error): RuntimeError: boom")
    assert output.count("broken_net.py") == 1  # once for equal errors
    records = [json.loads(path.read_text()) for path in (run / "failures").glob("*.json")]
    assert all(record["kind"] == "error" and record["final"] and "in forward" in record["tail"] for record in records)
    assert len(records) == failed >= 3
    assert f"stopped early: {failed} shards failed with the same error" in output  # two workers: three or four
    assert json.loads((run / "plan.json").read_text())["unit"] == 8
