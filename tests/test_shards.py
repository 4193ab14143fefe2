"""One shard at a time: resume within it, poisoned images, too little memory, and two processes at the same shard.

What is computed how often is counted by a user's own segmentation callable: it writes a line for every image.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from hpcguard.cli import run_stage
from hpcguard.cluster.plan import Plan
from hpcguard.config import ModelConfig, load_config
from hpcguard.data import load_images
from hpcguard.models import build_model
from hpcguard.runs import RunFolder, claimed, is_claimed
from hpcguard.shards import ShardTask
from hpcguard.store.schema import COLUMN

SEGMENTS = """
import hashlib, os, time
from pathlib import Path
import numpy as np

HERE = Path(__file__).parent


def segments(pixels):
    digest = hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest()
    with (HERE / "seen").open("a") as file:
        file.write(f"{digest} {os.getpid()}\\n")
    if (HERE / "slow").exists():
        time.sleep(0.05)
    if (HERE / "poison").exists() and digest in (HERE / "poison").read_text():
        raise ArithmeticError("poisoned")
    rows, columns = np.indices(pixels.shape[:2]) * 3 // pixels.shape[0]
    return rows * 3 + columns
"""
HUNGRY = """
import torch
from hpcguard.models.small_cnn import SmallCNN


class Net(SmallCNN):
    def forward(self, images):
        if len(images) > 8:
            torch.empty(2**50)  # more than any machine has
        return super().forward(images)
"""


@pytest.fixture
def config(tmp_path: Path, make_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """120 digits in 4 shards of up to 4 units of 8, segmented by the callable above."""
    (tmp_path / "counting.py").write_text(SEGMENTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    torch.manual_seed(0)
    torch.save(build_model(ModelConfig(options={"width": 4}), 10, 1).net.state_dict(), tmp_path / "net.pth")
    path = make_config(tmp_path, baseline=None, device="cpu", model={"weights": str(tmp_path / "net.pth")})
    values = yaml.safe_load(path.read_text())
    values["attribution"] = {"segmentation": "counting:segments", "num_samples": 32, "unit": 8}
    path.write_text(yaml.safe_dump(values))
    yield path
    sys.modules.pop("counting", None)


def seen(config: Path) -> Counter[str]:
    """How often each image was segmented, by its digest."""
    path = config.parent / "seen"
    return Counter(line.split()[0] for line in path.read_text().splitlines()) if path.exists() else Counter()


def shards(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "shards").glob("*.h5"))}


def change(config: Path, **sections: object) -> Path:
    values = yaml.safe_load(config.read_text())
    for section, changes in sections.items():
        values[section] = {**values[section], **changes} if isinstance(changes, dict) else changes
    config.write_text(yaml.safe_dump(values))
    return config


@pytest.fixture
def whole(config: Path) -> dict[str, bytes]:
    """Shards of a run that nothing disturbs; what it saw is forgotten."""
    assert run_stage("attribute", [str(config), f"run={config.parent}/whole"]) == 0
    (config.parent / "seen").unlink()
    return shards(config.parent / "whole")


def test_a_killed_process_costs_a_unit_and_not_a_shard(config: Path, whole: dict[str, bytes]) -> None:
    """kill -9 of the stage while both workers are within their shards, again and again."""
    (config.parent / "slow").touch()
    command = [sys.executable, "-m", "hpcguard.attribute", str(config), "cluster.shards=2"]
    kills = 3
    for kill in range(1, kills + 1):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        while sum(seen(config).values()) < 30 * kill:
            time.sleep(0.02)
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "0 done, 2 to do" in done.stdout
    counts = seen(config)
    looks = kills + 1  # each start of the stage looks at the first image
    assert len(counts) == 120
    # At most one unit of 8 for each of the two workers a kill.
    assert sum(counts.values()) - 120 <= kills * 2 * 8 + looks
    assert not list((config.parent / "run/unfinished").iterdir())
    run_stage("consolidate", [str(config), "cluster.shards=2"])
    run_stage("consolidate", [str(config), f"run={config.parent}/whole"])
    with h5py.File(config.parent / "run/store.h5") as one, h5py.File(config.parent / "whole/store.h5") as other:
        assert all(one[name][:].tobytes() == other[name][:].tobytes() for name in other)


def test_two_processes_at_the_same_run_share_its_work(config: Path, whole: dict[str, bytes]) -> None:
    """The same command twice at the same time: every image is computed once, by one of them; both end well."""
    (config.parent / "slow").touch()
    command = [sys.executable, "-m", "hpcguard.attribute", str(config)]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(400) for process in both] == [0, 0]
    assert shards(config.parent / "run") == whole
    assert sum(seen(config).values()) <= 120 + 2  # and the look of each at the first image


def test_a_poisoned_image_is_quarantined_and_the_rest_goes_on(
    config: Path, whole: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    images = load_images(load_config(config).data, "train")
    poisoned = images.ids[[20, 21, 50]]
    digests = []
    run_stage("attribute", [str(config), f"run={config.parent}/other"])
    for image in images.images(poisoned):
        digests.append(hashlib.sha256(np.ascontiguousarray(image[0].astype(np.float64)[..., None])).hexdigest())
    assert set(digests) <= set(seen(config))  # so that these are the digests which the callable sees
    (config.parent / "poison").write_text(" ".join(digests))
    assert run_stage("attribute", [str(config)]) == 0
    output = capsys.readouterr().out
    assert f"image {poisoned[0]} is left out (quarantined): RuntimeError: " in output
    assert "poisoned" in output
    manifests = [json.loads(path.read_text()) for path in sorted((config.parent / "run/shards").glob("*.json"))]
    left_out = [entry["image"] for manifest in manifests for entry in manifest["quarantined"]]
    assert sorted(left_out) == sorted(poisoned)
    assert sum(manifest["rows"] for manifest in manifests) == 117
    assert run_stage("consolidate", [str(config)]) == 2
    refused = capsys.readouterr().err
    assert "3 of 120 images could not be explained, more than cluster.quarantine = 0.01" in refused
    assert run_stage("consolidate", [str(config), "cluster.quarantine=0.05"]) == 0
    assert "117 images (3 quarantined)" in capsys.readouterr().out
    with h5py.File(config.parent / "run/store.h5") as store:
        kept = store["image_id"][:]
    assert np.array_equal(kept, images.ids[~np.isin(images.ids, poisoned)])
    # Shards without a poisoned image are untouched by all this.
    clean = [f"{manifest['shard']:05d}.h5" for manifest in manifests if not manifest["quarantined"]]
    assert clean and all(shards(config.parent / "run")[name] == whole[name] for name in clean)
    assert run_stage("refine", [str(config)]) == 0
    trained = json.loads((config.parent / "run/checkpoints/guided/training.json").read_text())
    assert trained["identity"]["quarantined"] == sorted(int(image) for image in poisoned)


def test_an_image_that_cannot_be_read_is_quarantined(config: Path) -> None:
    pictures = config.parent / "pictures"
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            (pictures / part / label).mkdir(parents=True)
            for index in range(12):
                Image.new("RGB", (8, 8), (index, 90, 0)).save(pictures / part / label / f"{index:02d}.png")
    (pictures / "train/cat/00.png").write_bytes(b"no picture")  # the very first image
    (pictures / "train/dog/03.png").unlink()
    (pictures / "train/dog/03.png").symlink_to("nowhere.png")
    torch.save(build_model(ModelConfig(options={"width": 4}), 2, 3).net.state_dict(), config.parent / "net.pth")
    data = {"name": "image-folder", "root": str(pictures), "train_images": None, "validation": 0}
    change(config, data=data, cluster={"shards": 3, "segmenters": 1})
    (pictures / "train/dog/03.png").unlink()
    (pictures / "train/dog/03.png").write_bytes(b"\x89PNG")
    assert run_stage("attribute", [str(config)]) == 0
    manifests = [json.loads(path.read_text()) for path in sorted((config.parent / "run/shards").glob("*.json"))]
    left_out = {entry["image"]: entry["why"] for manifest in manifests for entry in manifest["quarantined"]}
    assert sorted(left_out) == [0, 15]
    assert "cat/00.png: cannot be decoded" in left_out[0]
    assert sum(manifest["rows"] for manifest in manifests) == 22


def test_too_little_memory_is_answered_by_smaller_batches(config: Path, whole: dict[str, bytes]) -> None:
    """A net whose allocation fails, really, for more than 8 images at once."""
    (config.parent / "hungry.py").write_text(HUNGRY)
    change(config, model={"name": "hungry:Net", "options": {"channels": 1, "width": 4}})
    assert run_stage("attribute", [str(config)]) == 0
    for path in sorted((config.parent / "run/shards").glob("*.json")):
        assert json.loads(path.read_text())["batch_size"] == 8
        name = path.with_suffix(".h5").name
        with h5py.File(path.with_suffix(".h5")) as one, h5py.File(config.parent / "whole/shards" / name) as other:
            for column in other:
                last_bit = 2.0**-11 if COLUMN[column].bits < 23 else 1e-5
                assert np.allclose(one[column][:], other[column][:], last_bit, 1e-6, equal_nan=True), column


def test_a_lock_is_given_back_by_a_killed_process_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "00001.lock"
    code = (
        "import sys, time; from pathlib import Path; from hpcguard.runs import claimed\n"
        "with claimed(Path(sys.argv[1])) as ours:\n    print(ours, flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "True\n"
    assert is_claimed(path)
    with claimed(path) as ours:
        assert not ours
    holder.kill()
    holder.wait()
    assert not is_claimed(path)
    with claimed(path) as ours:
        assert ours and path.exists()
    assert not path.exists()
    assert not is_claimed(path)


def test_torn_files_of_killed_writers_go_under_the_shard_s_lock(config: Path) -> None:
    loaded = load_config(config)
    folder, plan = RunFolder(loaded.run), Plan({}, "print", 8, [0, 32, 64])
    folder.shards.mkdir(parents=True)
    for name in (".00000.h5.1-a.tmp", ".00000.json.1-a.tmp", ".00001.h5.1-a.tmp"):
        (folder.shards / name).touch()
    ShardTask(loaded, plan, 1, "attempt")._forget(0)
    assert [path.name for path in folder.shards.iterdir()] == [".00001.h5.1-a.tmp"]
