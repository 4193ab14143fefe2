"""Where real data that is not part of the repository may lie: data/ of the checkout, or where the variables say."""

import os
from pathlib import Path

import pytest

DATA = Path(__file__).parents[1] / "data"
CIFAR10 = Path(os.environ.get("HPCGUARD_CIFAR10", DATA / "cifar10"))
RESNET20 = Path(os.environ.get("HPCGUARD_WEIGHTS", DATA / "weights")) / "resnet20-12fca82f.th"

needs_cifar10 = pytest.mark.skipif(
    not (CIFAR10 / "cifar-10-batches-py").is_dir(), reason="needs CIFAR-10 in data/cifar10 or HPCGUARD_CIFAR10"
)
needs_resnet20 = pytest.mark.skipif(
    not RESNET20.is_file(), reason="needs resnet20-12fca82f.th in data/weights or HPCGUARD_WEIGHTS"
)
