"""Other people's models and weights, as they come; and what is left of weights and images after damage."""

import gzip
import json
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hpcguard.attacks import fgsm
from hpcguard.cli import run_stage
from hpcguard.config import DataConfig, ModelConfig
from hpcguard.data import load_images
from hpcguard.errors import InputError
from hpcguard.models import build_model, load_model, load_weights, save_weights
from hpcguard.models.external import keep_ready_made

ZOO = """
import torch
from torch import nn

class Normalising(nn.Module):
    '''As in RobustBench: normalisation is the model's own, and its input lies in [0, 1].'''

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.25]).view(1, 1, 1, 1))
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        self.seen = []

    def forward(self, x):
        self.seen.append((x.detach().min().item(), x.detach().max().item()))
        return self.net((x - self.mean) / 0.5)

def load_model(model_name, dataset="cifar10", threat_model="Linf"):
    model = Normalising()
    model.load_state_dict(torch.load(model_name, weights_only=True))
    return model

TRAINED = Normalising()
with torch.no_grad():
    TRAINED.net[1].weight.copy_(torch.linspace(-1, 1, 640).view(10, 64))
    TRAINED.net[1].bias.zero_()

def trained():
    return TRAINED

def other():
    model = Normalising()
    nn.init.zeros_(model.net[1].weight)
    nn.init.zeros_(model.net[1].bias)
    return model

def untrained():
    return Normalising()

def broken():
    TRAINED.net[1].bias.data[0] = float("nan")
    return TRAINED
"""


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"zoo_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(ZOO)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    return name


def test_a_robustbench_model_sees_pixels_and_gives_logits(zoo: str, tmp_path: Path) -> None:
    """load_model(name, dataset, threat_model) by model.options, mean and std null: nothing is done to x."""
    plain = build_model(ModelConfig(name=f"{zoo}:untrained"), 10, 1)
    torch.save(plain.net.state_dict(), tmp_path / "theirs.pt")
    options = {"model_name": str(tmp_path / "theirs.pt"), "threat_model": "Linf"}
    model = build_model(ModelConfig(name=f"{zoo}:load_model", options=options), 10, 1).eval()
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6)
    assert torch.equal(model(x), plain.net.net((x - 0.25) / 0.5))
    model.net.seen.clear()
    attacked = fgsm(model, x, y, 0.3)
    model(attacked)
    assert all(low >= 0 and high <= 1 for low, high in model.net.seen)
    assert (attacked - x).abs().max() == pytest.approx(0.3, abs=1e-6)


def test_a_module_may_be_named_itself(zoo: str) -> None:
    one, two = (build_model(ModelConfig(name=f"{zoo}:TRAINED"), 10, 1) for _ in range(2))
    assert one.net is not two.net, "loading weights into one must not change the other"
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(one(x), two(x))
    with pytest.raises(InputError, match=r"remove model\.options"):
        build_model(ModelConfig(name=f"{zoo}:TRAINED", options={"a": 1}), 10, 1)


@pytest.mark.parametrize("name", ["TRAINED", "trained"])
def test_ready_made_weights_become_a_file(zoo: str, tmp_path: Path, name: str) -> None:
    config, path = ModelConfig(name=f"{zoo}:{name}"), tmp_path / "kept.safetensors"
    keep_ready_made(config, 10, 1, path)
    fresh = load_model(ModelConfig(name=f"{zoo}:untrained"), 10, 1, path)
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(fresh(x), build_model(config, 10, 1).eval()(x))


@pytest.mark.parametrize(
    ("name", "says"), [("untrained", "every time"), ("broken", "holds values that are not finite"), (None, "weights")]
)
def test_what_is_not_ready_made(zoo: str, tmp_path: Path, name: str | None, says: str) -> None:
    config = ModelConfig(name=f"{zoo}:{name}" if name else "small-cnn")
    with pytest.raises(InputError, match=says):
        keep_ready_made(config, 10, 1, tmp_path / "kept.safetensors")
    assert not (tmp_path / "kept.safetensors").exists()


def test_a_ready_made_model_is_evaluated(
    zoo: str, tmp_path: Path, make_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"name": f"{zoo}:trained", "options": {}}
    config = make_config(tmp_path, baseline=None, model=model, evaluation={"explained": 0})
    assert run_stage("evaluate", [str(config)]) == 0
    changed = f"model.name={zoo}:other"
    assert run_stage("evaluate", [str(config), changed]) == 2
    assert "gives other weights now" in capsys.readouterr().err
    result = json.loads((tmp_path / "run/results/baseline.json").read_text())
    ids = np.random.default_rng(0).choice(load_images(DataConfig(name="digits", size=8), "test").ids, 24, replace=False)
    test = load_images(DataConfig(name="digits", size=8), "test").subset(ids)
    with torch.no_grad():
        logits = build_model(ModelConfig(**model), 10, 1)(torch.from_numpy(test.images(test.ids)))
    assert result["attacks"]["clean"]["right"] == int((logits.argmax(1).numpy() == test.labels).sum())


# ----------------------------------------------------------------------------------------------- weights as they come
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "_orig_mod."])
def test_checkpoints_of_other_projects(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    saved, loaded = (build_model(ModelConfig(), 10, 1) for _ in range(2))
    state = OrderedDict((prefix + key, values) for key, values in saved.net.state_dict().items())
    torch.save(state if wrapper is None else {wrapper: state, "acc": 83.1, "epoch": 9}, tmp_path / "theirs.pt")
    load_weights(loaded, tmp_path / "theirs.pt")
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded(x), saved(x))


def state_mutations(state: dict[str, Any]) -> list[tuple[str, Any]]:
    """What a state dict may hold in place of what it should."""
    found: list[tuple[str, Any]] = []
    for key, values in state.items():
        rest = {name: held for name, held in state.items() if name != key}
        found += [
            (f"{key} gone", rest),
            (f"{key} renamed", {**rest, f"x{key}": values}),
            (f"{key} is NaN", {**state, key: torch.full_like(values, torch.nan)}),
            (f"{key} is infinite", {**state, key: torch.full_like(values, -torch.inf)}),
            (f"{key} has another shape", {**state, key: values[None, None]}),
            (f"{key} is a list", {**state, key: values.tolist()}),
            (f"{key} is None", {**state, key: None}),
            (f"{key} is complex", {**state, key: values.to(torch.complex64)}),
        ]
    first = next(iter(state))
    found += [
        ("sparse", {**state, first: state[first].to_sparse()}),
        ("on the meta device", {**state, first: state[first].to("meta")}),
        ("whole numbers", {**state, first: state[first].to(torch.int64)}),
        ("yes and no", {**state, first: state[first] > 0}),
        ("keys that are numbers", dict(enumerate(state.values()))),
        ("a key twice nested", {"state_dict": {"state_dict": state}}),
    ]
    return found


def one_line(action: Callable[[], object]) -> str:
    """The message of an InputError of one line; '' if there was none."""
    try:
        action()
    except InputError as error:
        assert "\n" not in str(error)
        assert 10 < len(str(error)) < 700
        return str(error)
    return ""


def test_mutated_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    model = build_model(ModelConfig(options={"width": 2}), 10, 1).eval()
    state, path = dict(model.net.state_dict()), tmp_path / "w.pt"
    before = {key: values.clone() for key, values in state.items()}
    mutations = state_mutations(state)
    assert len(mutations) >= 100
    for name, content in mutations:
        torch.save(content, path)
        assert one_line(lambda: load_weights(model, path)).startswith(str(path)), name
    assert all(torch.equal(values, before[key]) for key, values in model.net.state_dict().items())
    torch.save(before, path)
    load_weights(model, path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_bytes_never_give_other_keys_or_values_that_are_not_finite(tmp_path: Path, suffix: str) -> None:
    """A flipped bit of a number may give another number; anything else is refused in one line."""
    saved, model = (build_model(ModelConfig(options={"width": 2}), 10, 1).eval() for _ in range(2))
    path, chance, refused = tmp_path / f"w{suffix}", random.Random(0), 0
    if suffix == ".pt":
        torch.save(saved.net.state_dict(), path)
    else:
        save_weights(saved, path, {})
    whole = path.read_bytes()
    for number in range(100):
        damaged = bytearray(whole)
        if number % 2:
            del damaged[chance.randrange(len(whole)) :]
        for _ in range(1 + number % 5):
            if damaged:
                damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        line = one_line(lambda: load_weights(model, path))
        refused += bool(line)
        assert not line or line.startswith(str(path))
        assert all(values.isfinite().all() for values in model.net.state_dict().values())
    assert refused >= 50


def test_torchscript_says_what_it_is(tmp_path: Path) -> None:
    net = build_model(ModelConfig(options={"width": 2}), 10, 1)
    with warnings.catch_warnings(action="ignore"):
        traced = torch.jit.trace(net.net, torch.rand(1, 1, 8, 8))
    torch.jit.save(traced, tmp_path / "scripted.pt")
    assert "TorchScript" in one_line(lambda: load_weights(net, tmp_path / "scripted.pt"))


# ------------------------------------------------------------------------------------------------------------- images
def damage(whole: bytes, number: int, chance: random.Random) -> bytes:
    """Cut, or with bytes changed, inserted or removed."""
    damaged = bytearray(whole)
    place = chance.randrange(len(whole))
    if number % 4 == 0:
        del damaged[place:]
    elif number % 4 == 1:
        damaged[place : place + 4] = bytes(chance.randrange(256) for _ in range(4))
    elif number % 4 == 2:
        del damaged[place : place + 1 + chance.randrange(8)]
    else:
        damaged[place:place] = bytes(1 + chance.randrange(8))
    return bytes(damaged)


def check_images(config: DataConfig) -> None:
    for split in ("train", "test"):
        held = load_images(config, split)  # type: ignore[arg-type]
        images = held.images(held.ids)
        assert images.dtype == np.float32
        assert np.isfinite(images).all()
        assert images.min() >= 0
        assert images.max() <= 1
        assert held.labels.min() >= 0
        assert held.labels.max() < len(held.classes)


def test_damaged_pictures_are_refused_or_still_pixels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / part / label).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / part / label / "0.png")
    victim = tmp_path / "test/cat/0.png"
    whole, chance, refused = victim.read_bytes(), random.Random(1), 0
    config = DataConfig(name="image-folder", root=tmp_path, size=8)
    check_images(config)
    for number in range(100):
        victim.write_bytes(damage(whole, number, chance))
        refused += bool(line := one_line(lambda: check_images(config)))
        assert not line or "cat/0.png" in line
    assert refused >= 50


def idx(values: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return header + values.astype(np.uint8).tobytes()


def test_damaged_arrays_are_refused_or_still_pixels(tmp_path: Path) -> None:
    """Fashion-MNIST's idx files, packed again after the damage so that gzip's own checksum does not find it."""
    generator = np.random.default_rng(0)
    for part in ("train", "t10k"):
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(idx(generator.integers(0, 256, (20, 28, 28))))
        )
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(20) % 10)))
    config = DataConfig(name="fashion-mnist", root=tmp_path)
    whole_set = one_line(lambda: check_images(config))
    chance, refused = random.Random(2), 0
    for number in range(100):
        name = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")[number % 2]
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(gzip.compress(damage(gzip.decompress(whole), number // 2, chance)))
        refused += bool(line := one_line(lambda: check_images(config)))
        assert not line or "ubyte.gz" in line
        (tmp_path / name).write_bytes(whole)
    assert refused >= 50
    assert not whole_set
