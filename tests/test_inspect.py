"""inspect and export: numbers against NumPy and plain h5py on the same rows, pictures against the images."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml
from PIL import Image

from hpcguard.cli import run_stage
from hpcguard.config import load_config
from hpcguard.data import load_images
from hpcguard.runs import read_sealed, write_sealed
from hpcguard.store.schema import COLUMN

Rows = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def rows(attributed: Path) -> Rows:
    with h5py.File(attributed / "store.h5") as file:
        return {name: file[name][:] for name in COLUMN}


@pytest.fixture
def copy(attributed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(attributed, tmp_path / "run"))


def said(capsys: pytest.CaptureFixture[str], stage: str, *arguments: object) -> str:
    capsys.readouterr()
    assert run_stage(stage, list(map(str, arguments))) == 0
    return capsys.readouterr().out


def refused(capfd: pytest.CaptureFixture[str], stage: str, *arguments: object) -> str:
    capfd.readouterr()
    assert run_stage(stage, list(map(str, arguments))) == 2
    line = capfd.readouterr().err.strip()
    assert "\n" not in line and line.startswith(f"hpcguard {stage}: ")
    return line


# --------------------------------------------------------------------------------------------------------- numbers
def test_the_numbers_are_those_of_the_rows(attributed: Path, rows: Rows, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, "inspect", attributed, "--json"))
    assert (found["images"], found["height"], found["width"]) == (120, 8, 8)
    assert found["image_id"] == {"least": rows["image_id"].min(), "mean": rows["image_id"].mean(),
                                 "most": rows["image_id"].max()}  # fmt: skip
    assert found["segments"]["mean"] == rows["num_segments"].mean()
    assert found["samples"]["most"] == rows["num_samples"].max()
    assert found["statistics"]["score"] == pytest.approx(rows["score"][:, 0].mean(dtype=float))
    magnitude = np.nanmean(np.abs(rows["coefficients"][:, 0]), 1, dtype=float)
    assert found["statistics"]["mean_abs_coefficient"] == pytest.approx(magnitude.mean())
    for label, each in found["classes"].items():
        own = rows["label"] == int(label)
        assert each["images"] == own.sum()
        assert each["accuracy"] == pytest.approx((rows["predicted"] == rows["label"])[own].mean())
        assert each["mean_abs_coefficient"] == pytest.approx(magnitude[own].mean())
    files = [attributed / "store.h5", *sorted((attributed / "shards").glob("*.h5"))]
    assert found["bytes"] == sum(path.stat().st_size for path in files) and found["files"] == len(files) - 1
    stored = 0
    for path in files[1:]:
        with h5py.File(path) as file:
            stored += file["segments"].id.get_storage_size()
    assert found["columns"]["segments"]["stored_bytes"] == stored
    assert found["columns"]["coefficients"]["bytes"] == rows["coefficients"].nbytes
    text = said(capsys, "inspect", attributed / "store.h5")
    assert "120 images of 8x8" in text and "gzip" in text and "fletcher32" in text


def test_a_shard_alone_and_a_moved_store_are_read_too(
    attributed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lone = shutil.copy(attributed / "shards/00001.h5", tmp_path / "lone.h5")
    assert json.loads(said(capsys, "inspect", lone, "--json"))["images"] == 32
    assert "no digest" in said(capsys, "inspect", lone, "--verify")
    verified = said(capsys, "inspect", attributed / "shards/00001.h5", "--verify")
    assert "digest of the file, the plan's ids and the values of 32 rows" in verified


def test_an_explanation_in_numbers(attributed: Path, rows: Rows, capsys: pytest.CaptureFixture[str]) -> None:
    place = 17
    image = rows["image_id"][place]
    found = json.loads(said(capsys, "inspect", attributed, "--image", image, "--json"))
    count = rows["num_segments"][place]
    assert found["label"] == rows["label"][place] and found["num_segments"] == count
    assert found["pixels"] == [int((rows["segments"][place] == k).sum()) for k in range(count)]
    for k, each in enumerate(found["explained"]):
        assert each["target"] == rows["target"][place, k]
        assert np.array_equal(np.float32(each["coefficients"]), rows["coefficients"][place, k, :count])
        assert np.array_equal(np.float32(each["standard_error"]), rows["standard_error"][place, k, :count])
    assert np.array_equal(np.float32(found["sensitivity"]), rows["sensitivity"][place, :count])
    assert found["instability"] is None  # noisy_copies is 0
    lines = said(capsys, "inspect", attributed, "--image", image).splitlines()
    first = next(line for line in lines[1:] if line[:1].isdigit()).split()
    largest = np.nanargmax(np.abs(rows["coefficients"][place, 0]))
    assert int(first[0]) == largest
    assert float(first[2]) == pytest.approx(rows["coefficients"][place, 0, largest], abs=6e-5)


def test_what_each_criterion_flags_a_class(attributed: Path, rows: Rows, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, "inspect", attributed, "--json"))["spurious"]
    assert found["thresholds"]["sensitivity"] == {"above": None, "quantile": 0.8}
    assert sorted(found["all"]) == ["irrelevant", "misleading", "sensitivity", "weight"]  # instability is not there
    own = rows["label"] == 3
    counts, values = rows["num_segments"][own], rows["sensitivity"][own].astype(float)
    bounds = [np.quantile(row[:count], 0.8) for row, count in zip(values, counts, strict=True)]
    shares = (values > np.array(bounds)[:, None]).sum(1) / counts
    assert found["classes"]["3"]["sensitivity"] == pytest.approx(shares.mean())
    assert len(found["classes"]) == 10
    text = said(capsys, "inspect", attributed)
    title = text.index("share of segments that each criterion")
    assert f"{shares.mean():.3f}" in text[title:]
    lone = said(capsys, "inspect", attributed / "shards/00001.h5")  # which has no statistics beside it
    assert "each criterion" not in lone


def test_the_picture_shows_the_image_that_was_asked_for(
    attributed: Path, rows: Rows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = load_images(load_config(attributed).data, "train")
    likeness = {}
    for place in (5, 80):
        path = tmp_path / f"{place}.png"
        assert str(path) in said(capsys, "inspect", attributed, "--image", rows["image_id"][place], "--picture", path)
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        likeness[place] = drawn_image(path)
    for place, drawn in likeness.items():
        shown = images.images(rows["image_id"][[place]])[0].mean(0)
        assert np.abs(drawn - shown).max() < 0.02
    assert np.abs(likeness[5] - likeness[80]).max() > 0.2


def drawn_image(path: Path) -> np.ndarray:
    """The left panel of an explanation's figure, as grey levels [8, 8]: 1.9 inches at 0.1, 0.26 above the bottom."""
    with Image.open(path) as picture:
        picture.verify()
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("L"), float) / 255
    dpi, cell = 160, 1.9 / 8
    centres = (np.arange(8) + 0.5) * cell
    down, right = (len(pixels) / dpi - 0.26 - 1.9 + centres) * dpi, (0.1 + centres) * dpi
    return pixels[np.ix_(down.astype(int), right.astype(int))]


# ---------------------------------------------------------------------------------------------------------- verify
def test_verify_finds_what_is_wrong(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_stage("inspect", [str(copy), "--verify"]) == 0
    assert "verified digests of 5 files and the values of 120 rows" in capfd.readouterr().out
    shard = copy / "shards/00002.h5"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "00002.h5 has changed" in refused(capfd, "inspect", copy, "--verify")
    assert "differ from the manifest" in refused(capfd, "inspect", shard, "--verify")
    shard.unlink()
    assert "00002.h5 is missing" in refused(capfd, "inspect", copy, "--verify")
    assert "00002.h5" in refused(capfd, "inspect", copy)


def test_verify_compares_a_shard_with_the_plan(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A shard that is sound, and in the place of another."""
    shards = copy / "shards"
    for suffix in ("h5", "json"):
        shutil.copy(shards / f"00001.{suffix}", shards / f"00003.{suffix}")
    assert "a duplicate of 00001.h5" in refused(capfd, "inspect", shards / "00003.h5", "--verify")
    recorded = read_sealed(shards / "00003.json", "")
    write_sealed(shards / "00003.json", {**recorded, "file": "00003.h5"})
    assert "other image ids than planned" in refused(capfd, "inspect", shards / "00003.h5", "--verify")
    shutil.copy(shards / "00001.h5", shards / "00009.h5")
    assert "no shard of this plan" in refused(capfd, "inspect", shards / "00009.h5", "--verify")


def test_verify_knows_the_digests_of_packed_files(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_stage("consolidate", [str(copy), "--repack"]) == 0
    packed = min((copy / "packed").glob("*.h5"))
    assert "verified digest of the file and" in said(capfd, "inspect", packed, "--verify")
    with h5py.File(packed, "r+") as file:
        file["coefficients"][0, :, 0] = 0.5
    assert "has changed since it was made" in refused(capfd, "inspect", packed, "--verify")
    shutil.copy(packed, copy / "packed/other.h5")
    assert "not under" in refused(capfd, "inspect", copy / "packed/other.h5", "--verify")


@pytest.mark.parametrize(
    ("column", "place", "value", "said"),
    [("coefficients", (3, 0, 0), np.nan, "NaN"), ("num_segments", 3, 0, "num_segments"),
     ("image_id", 3, 0, "image 0 has several rows")],
)  # fmt: skip
def test_verify_looks_at_values_where_there_is_no_digest(
    attributed: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    column: str,
    place: Any,
    value: float,
    said: str,
) -> None:
    lone = shutil.copy(attributed / "shards/00000.h5", tmp_path / "lone.h5")
    with h5py.File(lone, "r+") as file:
        file["image_id"][0] = 0
        file[column][place] = value
    assert said in refused(capfd, "inspect", lone, "--verify")


# ---------------------------------------------------------------------------------------------------------- export
@pytest.mark.parametrize("ending", ["npz", "h5"])
def test_an_export_read_without_hpcguard_is_the_store(
    attributed: Path, rows: Rows, tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    chosen = np.isin(rows["label"], [3, 5])
    out, some = tmp_path / f"all.{ending}", tmp_path / f"some.{ending}"
    said(capsys, "export", attributed, out)
    assert f"{chosen.sum()} of 120 rows" in said(capsys, "export", attributed / "store.h5", some, "--labels", "3,5")
    shutil.rmtree(tmp_path / "none", ignore_errors=True)
    for path, expected in ((out, np.ones(120, bool)), (some, chosen)):
        found = read_plainly(path)
        for name in COLUMN:
            assert found[name].dtype == rows[name].dtype
            assert found[name].tobytes() == rows[name][expected].tobytes(), name
        assert [str(name) for name in found["classes"]] == [str(k) for k in range(10)]
        assert int(found["schema"]) == h5py.File(attributed / "store.h5").attrs["schema"]


def read_plainly(path: Path) -> dict[str, Any]:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    with h5py.File(path) as file:
        assert not any(file[name].is_virtual for name in COLUMN)
        assert {file[name].compression for name in COLUMN} == {"gzip"} and file["segments"].fletcher32
        assert [axis.label for axis in file["coefficients"].dims] == ["image", "explained label", "segment"]
        assert all(file[name].attrs["meaning"] for name in COLUMN)
        return {name: file[name][:] for name in COLUMN} | dict(file.attrs)


def test_images_are_chosen_by_id_and_range(
    attributed: Path, rows: Rows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = rows["image_id"]
    said(capsys, "export", attributed, tmp_path / "a.npz", "--images", f"{ids[70]},{ids[2]}-{ids[6]}, {ids[4]}")
    assert np.load(tmp_path / "a.npz")["image_id"].tolist() == [*ids[2:7].tolist(), ids[70]]
    label = rows["label"][70]
    said(capsys, "export", attributed, tmp_path / "b.npz", "--images", f"0-{ids[-1]}", "--labels", label)
    assert np.array_equal(np.load(tmp_path / "b.npz")["image_id"], ids[rows["label"] == label])


def test_a_store_outside_its_run_folder_is_exported_without_names(
    attributed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lone = shutil.copy(attributed / "shards/00000.h5", tmp_path / "lone.h5")
    said(capsys, "export", lone, tmp_path / "a.npz")
    assert len(np.load(tmp_path / "a.npz")["classes"]) == 0


def test_a_repacked_store_holds_the_same(
    copy: Path, rows: Rows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said(capsys, "consolidate", copy, "--repack")
    shutil.rmtree(copy / "shards")
    assert "values of 120 rows" in said(capsys, "inspect", copy, "--verify")
    said(capsys, "export", copy, tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as found:
        assert all(found[name].tobytes() == rows[name].tobytes() for name in COLUMN)
    packed = next((copy / "packed").glob("*.h5"))
    assert json.loads(said(capsys, "inspect", packed, "--json"))["images"] <= 120


def test_the_example_of_the_documentation_runs(attributed: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/quickstart").symlink_to(attributed)
    text = (Path(__file__).parents[1] / "docs/store.md").read_text()
    example = text.partition("```python\n")[2].partition("```")[0]
    assert "import hpcguard" not in example
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1:] == ["(8,", "8)", "True"]


def test_the_documentation_names_every_column() -> None:
    text = (Path(__file__).parents[1] / "docs/store.md").read_text()
    assert all(f"`{name}`" in text for name in COLUMN)


# ------------------------------------------------------------------------------------------------------- bad input
def other_seed(run: Path) -> None:
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["data"]["seed"] = 5
    (run / "config.yaml").write_text(yaml.safe_dump(values))


def garbage(run: Path) -> None:
    (run / "store.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))


def old_schema(run: Path) -> None:
    with h5py.File(run / "store.h5", "r+") as file:
        file.attrs["schema"] = 0


CASES: list[tuple[str, list[str], Callable[[Path], object] | None, list[str]]] = [
    ("inspect", ["{run}/none.h5"], None, ["none.h5", "no such file"]),
    ("inspect", ["{run}/shards"], None, ["shards", "no run folder"]),
    ("inspect", ["{run}/none.yaml"], None, ["none.yaml", "no such file"]),
    ("inspect", ["{run}"], lambda run: (run / "store.h5").unlink(), ["no store yet", "consolidate"]),
    ("inspect", ["{run}"], garbage, ["store.h5", "cannot be read as a store"]),
    ("inspect", ["{run}/plan.json"], None, ["plan.json", "cannot be read as a store"]),
    ("inspect", ["{run}"], old_schema, ["has schema 0", "python -m hpcguard.attribute RUN"]),
    ("inspect", ["{run}", "--image", "99999"], None, ["--image 99999", "120 ids"]),
    ("inspect", ["{run}", "--picture", "a.png"], None, ["--picture a.png", "--image"]),
    ("inspect", ["{run}", "--image", "0", "--picture", "a.jpg"], None, ["a.jpg", "PNG"]),
    ("inspect", ["{run}", "--image", "{id}", "--picture", "{out}.png", "data.size=9"], None, ["8x8", "9x9"]),
    ("inspect", ["{run}", "--image", "{id}", "--picture", "{out}.png"], other_seed, ["other images"]),
    ("inspect", ["{run}", "--image", "{id}", "--picture", "{run}/none/a.png", "data.name=x"], None, ["data.name"]),
    ("inspect", ["{run}", "--verify"], lambda run: (run / "store.json").unlink(), ["store.json", "consolidate"]),
    ("export", ["{run}", "{out}.csv"], None, [".csv", ".npz, .h5"]),
    ("export", ["{run}", "{run}/store.h5"], None, ["store.h5", "there already"]),
    ("export", ["{run}", "{out}.h5", "--images", "3,x"], None, ["'x' is no id"]),
    ("export", ["{run}", "{out}.h5", "--images", "99999"], None, ["no row of image 99999"]),
    ("export", ["{run}", "{out}.h5", "--images", "99990-99999"], None, ["no row in 99990-99999"]),
    ("export", ["{run}", "{out}.h5", "--labels", "cat"], None, ["'cat' is no class", "0 to 9"]),
    ("export", ["{run}", "{out}.h5", "--labels", "12"], None, ["'12' is no class"]),
    ("export", ["{run}", "{out}.h5", "--images", "{id}", "--labels", "{other}"], None, ["no row fits"]),
]


@pytest.mark.parametrize(("stage", "arguments", "change", "expected"), CASES)
def test_bad_input_is_one_line_and_nothing_is_written(
    copy: Path, rows: Rows, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    stage: str, arguments: list[str], change: Callable[[Path], object] | None, expected: list[str],
) -> None:  # fmt: skip
    if change:
        change(copy)
    before = sorted(tmp_path.rglob("*"))
    other = (int(rows["label"][0]) + 1) % 10
    places = {"run": copy, "out": tmp_path / "out", "id": rows["image_id"][0], "other": other}
    line = refused(capfd, stage, *(each.format(**places) for each in arguments))
    for part in expected:
        assert part in line, line
    assert sorted(tmp_path.rglob("*")) == before


def test_as_a_user_types_it(attributed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hpcguard", "export", str(attributed), "--images", "99999", str(tmp_path / "a.h5")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
