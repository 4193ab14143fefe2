"""The bench of the bound, on one real image and a net of real size."""

import importlib
from argparse import Namespace
from pathlib import Path

import pytest
from real_data import CIFAR10, RESNET20, needs_cifar10

from hpcguard.metrics.bound import certified, measured, summarise

WEIGHTS = RESNET20.with_name("resnet4b.pth")
TOOLS = Path(__file__).parents[2] / "tools"


@needs_cifar10
@pytest.mark.skipif(not WEIGHTS.is_file(), reason="needs resnet4b.pth in data/weights or HPCGUARD_WEIGHTS")
def test_a_small_resnet_has_certificates_that_say_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TOOLS)
    bench = importlib.import_module("bench_bound")
    model = bench.robust_model(WEIGHTS)
    x, y, ids = bench.test_images(Namespace(cifar10=CIFAR10), 1)
    low = certified(model, x, y, "linf", evaluations=1)
    figures = summarise(low, measured(model, x, y, "linf", steps=10, targets=0), ids)
    assert (figures["images"], figures["right"], figures["non_trivial_share"]) == (1, 1, 1)
    assert 0.05 < figures["ratio_q50"] < 1
    assert figures["measured_median"] < 8 / 255
