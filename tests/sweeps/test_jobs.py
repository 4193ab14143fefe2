"""Cells to distinct jobs: what is shared, what is not, and what their configurations say."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from hpcguard.config import Config, load_config
from hpcguard.config.sweep import SweepConfig, load_sweep
from hpcguard.errors import InputError
from hpcguard.sweeps.grid import expand, matches
from hpcguard.sweeps.jobs import Graph, job_config, plan_jobs
from hpcguard.sweeps.listing import SUFFIXES, images_in
from hpcguard.sweeps.settings import Resolver

BASE: dict[str, Any] = {"baseline": {"epochs": 3, "engine": "torch"}, "refinement": {"engine": "torch", "epochs": 2}}
SAMPLES, MASKING = "attribution.num_samples", "refinement.masking.weight"
CRITERIA = "refinement.spurious.criteria"


def graph_of(base: dict[str, Any] | None = None, run: Path = Path("sweep"), **values: Any) -> tuple[Graph, Config]:
    config = Config.model_validate(BASE if base is None else base)
    sweep = SweepConfig.model_validate(values)
    return plan_jobs(run, config, expand(sweep)), config


def counts(graph: Graph) -> dict[str, int]:
    kinds = [job.kind for job in graph.jobs.values()]
    return {kind: kinds.count(kind) for kind in ("refine", "attribute", "evaluate")}


def test_24_cells_with_3_seeds_need_each_store_once() -> None:
    graph, _ = graph_of(
        axes={
            SAMPLES: [64, 128], MASKING: [0, 0.5], "refinement.sensitivity.weight": [0, 0.01],
            "refinement.attack.eps": [0.01, 0.02, 0.03],
        },
        seeds=[0, 1, 2],
    )  # fmt: skip
    # Without guidance (a quarter of the cells) nothing depends on the explanations; one more training is the baseline.
    assert len(graph.cells) == 72
    assert counts(graph) == {"refine": 54 + 9 + 1, "attribute": 2, "evaluate": 54 + 9}
    stores = {job.needs for job in graph.jobs.values() if job.kind == "refine" and job.folder.startswith("stores/")}
    assert len(stores) == 2 and all(len(needs) == 1 for needs in stores)


def test_what_a_training_does_not_use_makes_no_other_job() -> None:
    graph, _ = graph_of(
        axes={
            "refinement.spurious.criteria": [["misleading"], ["weight"]],
            "terms": {
                "none": {"refinement": {"masking": {"weight": 0}, "sensitivity": {"weight": 0}}},
                "masking": {"refinement.sensitivity.weight": 0},
            },
        }
    )
    assert counts(graph) == {"refine": 1 + 2 + 1, "attribute": 1, "evaluate": 1 + 2}
    plain, _ = graph_of(
        base={
            "refinement": {
                "start": "scratch",
                "masking": {"weight": 0},
                "sensitivity": {"weight": 0},
                "clean_weight": 1,
            }
        },
        axes={"refinement.adversarial_weight": [0], "refinement.attack.eps": [0.1, 0.2]},
    )
    assert counts(plain) == {
        "refine": 1,
        "attribute": 0,
        "evaluate": 1,
    }  # from scratch and not attacked: no model either


def test_every_section_that_matters_makes_another_job() -> None:
    for key, values, models, stores in (
        ("data.train_images", [100, 200], 2, 2),
        ("model.activation", ["gelu", "relu"], 2, 2),
        ("baseline.seed", [0, 1], 2, 2),
        ("attribution.seed", [0, 1], 1, 2),
        ("refinement.spurious.share", [0.1, 0.2], 1, 1),
        ("refinement.attack.steps", [1, 2], 1, 1),
    ):
        graph, _ = graph_of(axes={key: values})
        assert counts(graph) == {"refine": models + 2, "attribute": stores, "evaluate": 2}, key
    graph, _ = graph_of(axes={"refinement.threads": [1, 2]})  # says how fast it runs: one job
    assert counts(graph) == {"refine": 2, "attribute": 1, "evaluate": 1}


def test_the_bytes_of_given_weights_count_not_their_name(tmp_path: Path) -> None:
    for name, value in (("a", 0.0), ("b", 0.0), ("c", 1.0)):
        save_file({"w": torch.full((2,), value)}, tmp_path / f"{name}.safetensors")
    files = [str(tmp_path / f"{name}.safetensors") for name in "abc"]
    graph, _ = graph_of(base={}, axes={"model.weights": files})
    assert counts(graph) == {"refine": 2, "attribute": 2, "evaluate": 2}


@pytest.mark.parametrize(("split", "trainings"), [(0, 1), (0.2, 3)])
def test_validation_makes_other_trainings_only_where_there_is_a_split(split: float, trainings: int) -> None:
    base = {**BASE, "data": {"validation": split}, "evaluation": {"eps": 0.1}}
    cells = [{"refinement.validation_eps": eps} for eps in (None, 0.1, 0.2)]  # the first two are the same
    cells += [{"refinement.validation_images": images} for images in (32, 256)]  # and the last is the default
    graph, config = graph_of(base=base, cells=cells)
    assert counts(graph) == {"refine": trainings + 1, "attribute": 1, "evaluate": trainings}
    for name, inputs in graph.inputs.items():
        if inputs.training is not None:
            written = config.validation_eps(inputs.training)
            assert inputs.training.validation_eps == (written if split else None), name


def image_folder(root: Path) -> dict[str, Any]:
    for name, size in (
        ("train/cat/1.png", 3),
        ("train/cat/deep/2.JPEG", 4),
        ("train/dog/1.png", 3),
        ("test/cat/3.png", 2),
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    return {**BASE, "data": {"name": "image-folder", "root": str(root), "size": 32}}


def test_other_images_of_a_folder_make_other_jobs_and_moved_ones_do_not(tmp_path: Path) -> None:
    base = image_folder(tmp_path / "images")
    first, _ = graph_of(base=base, axes={MASKING: [0.5]})
    (tmp_path / "images/train/cat/notes.txt").write_text("no image")
    moved = {**base, "data": {**base["data"], "root": str(tmp_path / "elsewhere")}}
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    again, _ = graph_of(base=moved, axes={MASKING: [0.5]})
    assert again.jobs.keys() == first.jobs.keys()
    (tmp_path / "elsewhere/test/cat/3.png").write_bytes(b"another picture")
    changed, _ = graph_of(base=moved, axes={MASKING: [0.5]})
    assert not changed.jobs.keys() & first.jobs.keys()


def test_the_listing_is_of_the_images_that_torchvision_finds(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS

    image_folder(tmp_path)
    assert set(SUFFIXES) == set(IMG_EXTENSIONS)
    for part in ("train", "test"):
        files = {Path(path) for path, _ in ImageFolder(str(tmp_path / part)).samples}
        assert {tmp_path / name for name, _ in images_in(tmp_path / part)} == files


@pytest.mark.parametrize(
    ("root", "said"), [(None, "data.root must be set"), ("nowhere", "nowhere/train: no such folder")]
)
def test_an_image_folder_that_is_not_there_is_refused_while_planning(root: str | None, said: str) -> None:
    base = {**BASE, "data": {"name": "image-folder", "root": root, "size": 32}}
    with pytest.raises(InputError, match=said):
        graph_of(base=base, axes={MASKING: [0.5]})


def test_a_baseline_that_is_a_cell_too_is_trained_once() -> None:
    cell = {
        "refinement": {"engine": "torch", "epochs": 3, "start": "scratch", "clean_weight": 1, "adversarial_weight": 0}
    }
    cell["refinement"] |= {"masking": {"weight": 0}, "sensitivity": {"weight": 0}}  # type: ignore[dict-item]
    graph, _ = graph_of(axes={"arm": {"guided": {}, "baseline": cell}})
    guided, baseline = graph.cells
    assert counts(graph) == {"refine": 2, "attribute": 1, "evaluate": 2}
    store = graph.jobs[graph.jobs[guided.refine].needs[0]]
    assert store.needs == (baseline.refine,)


@pytest.mark.parametrize("first", ["guided", "pgd"])
def test_all_arms_are_held_against_what_was_explained(first: str, tmp_path: Path) -> None:
    """Also the control, which starts from scratch and is not guided, in whatever order the cells stand."""
    off = {
        "refinement": {**BASE["refinement"], "start": "scratch", "masking": {"weight": 0}, "sensitivity": {"weight": 0}}
    }
    arms = {first: {"guided": {}, "pgd": off}[first], "guided": {}, "pgd": off}
    graph, base = graph_of(run=tmp_path, axes={"arm": arms})
    explained = graph.jobs[graph.jobs[graph.cells[0 if first == "guided" else 1].refine].needs[0]].needs[0]
    weights = tmp_path / graph.jobs[explained].folder / "checkpoints" / graph.jobs[explained].arm / "model.safetensors"
    for cell in graph.cells:
        job = graph.jobs[cell.evaluate]
        assert job.needs == (cell.refine, explained)
        assert tmp_path / job.explained == weights
        assert job_config(tmp_path, base, [job], graph.inputs)["model"]["weights"] == str(weights)
    names = list(graph.jobs)
    assert all(names.index(need) < names.index(name) for name in names for need in graph.jobs[name].needs)
    alone, _ = graph_of(axes={"arm": {"pgd": off}})
    assert counts(alone) == {"refine": 1, "attribute": 0, "evaluate": 1}  # nothing is trained only to be held against
    assert alone.jobs[alone.cells[0].evaluate].explained == ""


def test_rounds_share_the_rounds_before() -> None:
    graph, _ = graph_of(axes={"rounds": [1, 2, 3, 4]})
    assert counts(graph) == {"refine": 1 + 4, "attribute": 4, "evaluate": 4}
    trained = [graph.jobs[cell.refine] for cell in graph.cells]
    for before, after in itertools.pairwise(trained):
        assert graph.jobs[after.needs[0]].needs == (before.name,)  # its store explains what the round before trained
    seeds = [graph.inputs[job.name].training.seed for job in trained]  # type: ignore[union-attr]
    assert seeds == [0, 1, 2, 3]  # as in the closed loop
    with pytest.raises(InputError, match=r"cell rounds=2, .*uses no explanations"):
        graph_of(axes={"rounds": [2], MASKING: [0], "refinement.sensitivity.weight": [0]})


def test_configurations_give_what_the_cell_says(tmp_path: Path) -> None:
    graph, base = graph_of(run=tmp_path, axes={SAMPLES: [64], MASKING: [0.25]}, seeds=[5])
    cell = graph.cells[0]
    job = graph.jobs[cell.refine]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(job_config(tmp_path, base, [job], graph.inputs)))
    config = load_config(path)
    assert config.run == tmp_path / job.folder
    assert config.attribution.num_samples == 64
    training = config.arm(job.arm)
    assert training == base.refinement.model_copy(
        update={"masking": training.masking, "seed": 5, "sensitivity": base.refinement.sensitivity}
    )
    assert training.masking.weight == 0.25
    assert config.model.weights is not None and config.model.weights.is_relative_to(tmp_path / "models")
    measured = job_config(tmp_path, base, [graph.jobs[cell.evaluate]], graph.inputs)
    assert measured["attribution"]["num_samples"] == base.attribution.num_samples  # all models are measured alike


@pytest.mark.parametrize(
    ("base", "changes", "expected"),
    [
        (BASE, {"refinement.maskin.weight": [0]}, "cell .*unknown key refinement.maskin"),
        (
            BASE,
            {"refinement.epochs": [-1]},
            "cell refinement.epochs=-1: refinement.epochs = -1: input should be greater",
        ),
        (BASE, {"refinement.spurious.weight.above": [0.1]}, None),  # its quantile was a default, which gives way
        (BASE, {"model.weights": ["none.pth"]}, "cell .*baseline: model.weights is set too"),
        ({}, {"model.weights": ["none.pth"]}, "cell .*model.weights = none.pth: no such file"),
        ({}, {"refinement.epochs": [1]}, "cell .*there is no model to explain"),
        (BASE, {"rounds": [0]}, "rounds = 0: write a whole number"),
        (BASE, {"rounds": [True]}, "rounds = True"),
        (BASE, {CRITERIA: [["weight", "instability"]]}, "criteria = instability: .*set attribution.noisy_copies=5"),
        (BASE, {CRITERIA: [["instability"]], "attribution.noisy_copies": [2]}, None),
        (
            BASE,
            {CRITERIA: [["sensitivity"]], "attribution.sensitivity": [False]},
            "criteria = sensitivity: .*set attribution.sensitivity=true",
        ),
    ],
)
def test_cells_that_cannot_be_done(base: dict[str, Any], changes: dict[str, Any], expected: str | None) -> None:
    if expected is None:
        graph_of(base, axes=changes)
        return
    with pytest.raises(InputError, match=expected):
        graph_of(base, axes=changes)


def test_a_cell_is_what_load_config_makes_of_its_changes(tmp_path: Path) -> None:
    """The quick way to settings against the whole configuration with the same overrides."""
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(BASE))
    changes = ["refinement.attack.eps=4/255", "refinement.spurious.weight.above=0.3", "model.options.width=8"]
    whole = load_config(path, changes)
    sweep = SweepConfig(axes={key: [yaml.safe_load(value)] for key, value in (each.split("=") for each in changes)})
    settings = Resolver(load_config(path)).settings(expand(sweep)[0])
    assert settings.refinement.section == whole.refinement
    assert settings.model.section == whole.model
    assert settings.attribution.section == whole.attribution


CONFIGS = Path(__file__).parents[2] / "configs/sweeps"
# Settings, and stores for all seeds.
CELLS = {"components": 10, "spurious_rule": 4, "strength": 16, "samples": 6, "rounds": 5}
STUDY = {"study": 13, "study_2": 4, "study_choice": 13}
STORES = {"components": 1, "spurious_rule": 1, "strength": 1, "samples": 5, "rounds": 1 + 3 * 3}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_sweep_that_comes_with_hpcguard_plans(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parents[1])
    sweep, base = load_sweep(path, [])
    graph = plan_jobs(sweep.run, base, expand(sweep))
    name = path.stem.removesuffix("_small")
    assert sweep.run == Path("runs/sweeps") / path.stem
    seeds = 1 if name == "study_choice" else 3
    assert len(graph.cells) == seeds * (CELLS | STUDY)[name]
    assert counts(graph)["attribute"] == STORES.get(name, 1)
    assert counts(graph)["evaluate"] == len(graph.cells)  # no two cells are the same
    controls = [cell for cell in graph.cells if matches(cell.values, sweep.control)]
    assert len(controls) == seeds
    assert not any(graph.inputs[cell.refine].training.guided for cell in controls)  # type: ignore[union-attr]
    header = path.read_text().split("\nrun:")[0]
    assert f"hpcguard sweep configs/sweeps/{path.name}" in header
    assert all(word in header for word in ("#   time", "#   result"))


def test_there_is_a_small_version_of_each() -> None:
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert names == {f"{name}{size}" for name in CELLS for size in ("", "_small")} | STUDY.keys()
