"""Configuration: overrides, arms, and errors that name the key, the value and what is allowed."""

from pathlib import Path

import pytest
import yaml

from hpcguard.config import Config, describe_keys, load_config
from hpcguard.errors import InputError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text("run: somewhere\ncontrols: {pgd: {masking: {weight: 0}, epochs: 3}}\n")
    return path


def refusal(source: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(source, list(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_overrides_win_and_fractions_are_numbers(source: Path) -> None:
    config = load_config(source, ["data.size=16", "refinement.attack.eps=8/255", "evaluation.eps=0.5"])
    assert config.data.size == 16
    assert config.refinement.attack.eps == pytest.approx(8 / 255)
    assert config.evaluation.eps == 0.5


def test_a_control_is_the_guided_arm_with_changes(source: Path) -> None:
    config = load_config(source, ["refinement.learning_rate=0.2", "refinement.masking.fill=noise"])
    control = config.arm("pgd")
    assert (control.learning_rate, control.epochs, control.masking.weight) == (0.2, 3, 0)
    assert control.masking.fill == "noise"
    assert control.sensitivity == config.refinement.sensitivity
    assert config.arm("guided") is config.refinement
    assert config.arms() == ["pgd", "guided"]


def test_the_baseline_is_clean_training_from_scratch(source: Path) -> None:
    baseline = load_config(source, ["baseline.epochs=4"]).arm("baseline")
    assert (baseline.start, baseline.clean_weight, baseline.attacked, baseline.guided) == ("scratch", 1.0, False, False)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.siz=3", ["data.siz", "3", "did you mean size?", "train_images"]),
        ("data.size=7", ["data.size = 7", "greater than or equal to 8"]),
        ("data.name=cifar11", ["data.name = 'cifar11'", "'cifar10'"]),
        ("attribution.num_samples=many", ["attribution.num_samples = 'many'", "integer"]),
        ("attribution.fill=2", ["fill = 2", "from 0 to 1"]),
        ("refinement.attack.eps=8/x", ["refinement.attack.eps", "8/255"]),
        ("refinement.attack.eps=300", ["refinement.attack.eps = 300", "at most 1"]),
        ("refinement.learning_rate=.nan", ["refinement.learning_rate", "finite"]),
        ("baseline.masking.weight=1", ["baseline", "masking.weight"]),
        ("controls.guided.epochs=1", ["controls.guided", "another name"]),
        ("controls.pgd.epoch=1", ["controls.pgd.epoch", "did you mean epochs?"]),
        ("data=3", ["data = 3", "name, root"]),
        ("nonsense", ["'nonsense'", "section.key=value"]),
        ("data.size=${nowhere}", ["nowhere"]),
    ],
)
def test_errors_name_key_value_and_what_is_allowed(source: Path, override: str, expected: list[str]) -> None:
    message = refusal(source, override)
    for part in expected:
        assert part in message


def test_a_loss_must_remain(source: Path) -> None:
    assert "no loss is left" in refusal(source, "refinement.adversarial_weight=0", "refinement.masking.weight=0")


def test_unknown_arm_lists_the_known_ones(source: Path) -> None:
    with pytest.raises(InputError, match="one of pgd, guided"):
        load_config(source).arm("trades")


def test_a_run_folder_is_a_configuration_and_stands_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: elsewhere\nrecorded: {revision: abc}\n")
    assert load_config(tmp_path).run == tmp_path


def test_every_key_is_explained() -> None:
    unexplained = [key for key, _, meaning in describe_keys(Config) if not meaning]
    assert not unexplained
    defaults = {key: default for key, default, _ in describe_keys(Config)}
    assert defaults["refinement.attack.eps"] == "8/255"
    assert defaults["refinement.spurious.share"] == "0.2"  # and not 51/255
    assert defaults["refinement.spurious.criteria"] == "[misleading]"


def test_a_dumped_configuration_loads_to_itself(source: Path) -> None:
    config = load_config(source, ["baseline.epochs=4", "refinement.attack.eps=4/255"])
    source.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(source) == config
    assert isinstance(config, Config)
