"""Which images a step sees, and reading them ahead."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpcguard.config import TrainingConfig
from hpcguard.errors import InputError
from hpcguard.refinement.batches import Batches, draw_noise, read_ahead, shares
from hpcguard.refinement.engine import TorchEngine
from hpcguard.refinement.step import GuidedStep


def test_the_next_is_read_while_one_is_in_use() -> None:
    begun = [threading.Event() for _ in range(4)]

    def read(step: int) -> int:
        begun[step].set()
        return step

    found = read_ahead(read, range(4))
    for step in range(4):
        assert next(found) == step
        if step < 3:
            assert begun[step + 1].wait(10)  # without anybody asking for it
        assert not any(each.is_set() for each in begun[step + 2 :])
    assert next(found, None) is None


def test_a_read_that_fails_fails_when_its_turn_comes() -> None:
    def read(step: int) -> int:
        if step == 2:
            raise InputError("store.h5: damaged")
        return step

    found: Iterator[int] = read_ahead(read, range(5))
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(InputError, match="damaged"):
        next(found)
    assert not any(thread.name.startswith("next-batch") for thread in threading.enumerate())


def test_stopping_early_ends_the_thread() -> None:
    found = read_ahead(lambda step: step, range(5))
    next(found)
    found.close()  # type: ignore[attr-defined]
    assert not any(thread.name.startswith("next-batch") for thread in threading.enumerate())
    assert list(read_ahead(lambda step: step, range(5, 5))) == []


def test_every_image_once_an_epoch_and_nothing_after_the_last_step() -> None:
    config = TrainingConfig(batch_size=4, epochs=2, masking={"weight": 0}, sensitivity={"weight": 0}, seed=3)  # type: ignore[arg-type]
    asked: list[np.ndarray] = []

    def read(positions: np.ndarray) -> dict[str, Tensor]:
        asked.append(positions)
        return {"image": torch.zeros(len(positions), 1, 8, 8), "label": torch.from_numpy(positions)}

    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    engine = TorchEngine(GuidedStep(net, config, torch.zeros(1)), config, torch.device("cpu"))  # type: ignore[arg-type]
    batches = Batches(read, np.arange(12))
    steps = list(shares(engine, batches, 0, config))
    assert [step for step, _, _ in steps] == list(range(6))
    assert all(np.array_equal(chosen, share.y.numpy()) for _, chosen, share in steps)
    first, second = (np.concatenate(asked[k : k + 3]) for k in (0, 3))
    assert sorted(first) == sorted(second) == list(range(12))
    assert not np.array_equal(first, second)
    later = list(shares(engine, batches, 4, config))  # resumed
    assert [step for step, _, _ in later] == [4, 5]
    assert all(torch.equal(one.noise, other.noise) for (*_, one), (*_, other) in zip(steps[4:], later, strict=True))
    count = len(asked)
    assert list(shares(engine, batches, 6, config)) == [] and len(asked) == count


def test_a_ranks_noise_is_its_part_of_the_whole() -> None:
    whole = draw_noise(torch.Size([6, 3, 5, 7]), 0, 4, 2)
    assert torch.equal(torch.cat([draw_noise(torch.Size([2, 3, 5, 7]), first, 4, 2) for first in (0, 2, 4)]), whole)
    many = draw_noise(torch.Size([64, 3, 32, 32]), 0, 0, 0)
    assert (many.min(), many.max(), many.mean(), many.var()) == pytest.approx((-1, 1, 0, 1 / 3), abs=0.005)
    assert not torch.equal(draw_noise(many.shape, 0, 1, 0), many)
    assert len(many.flatten(1).unique(dim=0)) == 64
