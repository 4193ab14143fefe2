"""Plans: whole units, nearly equal shards, one fingerprint a folder."""

import json
from pathlib import Path

import numpy as np
import pytest

from hpcguard.cluster.plan import agree_on_plan, attribution_identity, make_plan, read_plan
from hpcguard.config import Config, DataConfig
from hpcguard.data import ImageSet, load_images
from hpcguard.errors import InputError

IDS = np.arange(0, 1000, 3)


@pytest.mark.parametrize("shards", [1, 4, 7, 21, 500])
def test_units_are_the_same_for_any_number_of_shards(shards: int) -> None:
    plan = make_plan(IDS, 16, shards, {"a": 1})
    units = [unit.tolist() for index in range(plan.num_shards) for unit in plan.units(index, IDS)]
    assert units == [IDS[start : start + 16].tolist() for start in range(0, len(IDS), 16)]
    assert plan.num_shards == min(shards, 21)
    sizes = np.diff(plan.bounds)
    assert sizes.min() > 0
    assert sizes[:-1].max() - sizes[:-1].min() <= 16 if plan.num_shards > 2 else True


def test_the_fingerprint_is_of_what_values_depend_on() -> None:
    plan = make_plan(IDS, 16, 4, {"a": 1})
    assert plan.fingerprint == make_plan(IDS, 16, 9, {"a": 1}).fingerprint
    assert plan.fingerprint != make_plan(IDS, 16, 4, {"a": 2}).fingerprint


def test_the_identity_holds_settings_weights_data_and_version() -> None:
    images = load_images(DataConfig(), "train")

    def of(images: ImageSet = images, weights: str = "w", **changes: object) -> str:
        return make_plan(images.ids, 16, 4, attribution_identity(Config(**changes), images, weights)).fingerprint

    assert of() == of(cluster={"shards": 9, "workers": 7, "segmenters": 3}, data={"root": "/elsewhere"}, run="x")
    others = [
        of(weights="v"), of(images.subset(images.ids[:-1])), of(attribution={"num_samples": 99}),
        of(model={"mean": [0.5]}), of(data={"validation": 0.1}),
    ]  # fmt: skip
    assert len({of(), *others}) == 6


def test_a_plan_is_written_once_and_another_refused_with_the_difference(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    first = agree_on_plan(path, make_plan(IDS, 16, 4, {"attribution": {"seed": 0, "ridge": 1.0}}))
    assert agree_on_plan(path, make_plan(IDS, 16, 7, {"attribution": {"seed": 0, "ridge": 1.0}})) == first
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"attribution\.seed was 0 \(now 1\)") as caught:
        agree_on_plan(path, make_plan(IDS, 16, 4, {"attribution": {"seed": 1, "ridge": 1.0}}))
    assert "ridge" not in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "change",
    [{"schema": 9}, {"bounds": [0, 330, 334]}, {"bounds": [5, 334]}, {"unit": 3}, {"unit": "a"}, {"identity": {"a": 2}},
     {"bounds": 7}, {"sha256": None}, {"extra": 1}],
)  # fmt: skip
def test_a_changed_plan_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "plan.json"
    agree_on_plan(path, make_plan(IDS, 16, 1, {"a": 1}))
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=r"plan\.json"):
        read_plan(path)
