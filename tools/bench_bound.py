#!/usr/bin/env python3
"""The attribution-aware bound on CIFAR-10 test images of a small ResNet: certified against measured, and what the split
into flagged and other pixels gives.

  python tools/bench_bound.py [--json] [--parts linf,l2,split] [--images 200] [--cifar10 DIR] [--weights FILE]

Needs CIFAR-10 in DIR (data/cifar10) and an adversarially trained ResNet in FILE (data/weights/resnet4b.pth). An image
takes about ten seconds a norm on a free core. Flagged are the pixels of the segments whose |LIME coefficient| of the
true label is in the image's upper fifth (SpuriousConfig, criterion weight). Ends with an error if a certified
distortion is above what an attack found.
"""

import argparse
import json
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pyautoattack
import torch
from bench_lime import ResNet4b
from bench_parts import Figures, hardware, run_parts
from torch import Tensor, nn

from hpcguard.attacks.gradient import Norm
from hpcguard.attribution import LimeConfig, explain_batch, true_and_runner_up
from hpcguard.cluster.heap import freed_memory_kept
from hpcguard.config import DataConfig, SpuriousConfig
from hpcguard.data import load_images
from hpcguard.metrics.bound import Distortion, certified, constant_shares, estimated, measured, summarise
from hpcguard.metrics.bound.grades import Group
from hpcguard.models import Normalized
from hpcguard.models.weights import load_weights
from hpcguard.refinement.spurious import flag_segments
from hpcguard.store.schema import rows_from

PARTS = ("linf", "l2", "split")
CHUNK = 10  # images between two lines of progress
SHOWN = {"linf": (255, "/255"), "l2": (1, "")}
GROUPS: tuple[Group, ...] = ("all", "flagged", "unflagged")


def robust_model(weights: Path) -> nn.Module:
    model = Normalized(ResNet4b(), (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)).eval()
    load_weights(model, weights)
    return model


def test_images(arguments: argparse.Namespace, count: int) -> tuple[Tensor, Tensor, np.ndarray]:
    test = load_images(DataConfig(name="cifar10", root=arguments.cifar10), "test")
    ids = test.ids[:count]
    return torch.from_numpy(test.images(ids)), torch.from_numpy(test.labels_of(ids)), ids


def flagged_pixels(model: nn.Module, x: Tensor, y: Tensor, ids: np.ndarray) -> Tensor:
    """bool [B, 1, H, W]."""
    with torch.inference_mode():
        targets = true_and_runner_up(model(x), y).numpy()
    config = LimeConfig(segmentation="slic", num_segments=50, num_samples=500)
    explained = explain_batch(lambda batch: model(batch).softmax(1), x, ids, config, targets)
    flagged = flag_segments(rows_from(explained, y.numpy()), SpuriousConfig(criteria=("weight",)), seed=0)
    segments = explained.segments.astype(np.int64).reshape(len(x), -1)
    return torch.from_numpy(np.take_along_axis(flagged, segments, 1)).view(len(x), 1, *x.shape[2:])


def fab(model: nn.Module, x: Tensor, y: Tensor, norm: Norm) -> Tensor:
    """Images that the library's minimal-norm attack finds; x itself where it finds none."""
    attacker = pyautoattack.AutoAttack(model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=1.0, device="cpu")
    return attacker.fab.attack_single_run(x, y)


def in_chunks(
    model: nn.Module, x: Tensor, y: Tensor, found: Distortion, evaluations: int, flagged: Tensor | None = None
) -> Distortion:
    """certified, for the norm and group of what was found, telling how far it is; ends at the first that is unsound."""
    parts: list[Distortion] = []
    for rows in torch.arange(len(x)).split(CHUNK):
        own = None if flagged is None else flagged[rows]
        parts.append(certified(model, x[rows], y[rows], found.norm, own, found.group, evaluations))
        values = np.concatenate([each.values for each in parts])
        sofar = Distortion("certified", found.norm, found.group, values, [one for each in parts for one in each.splits])
        upto = Distortion("measured", found.norm, found.group, found.values[: len(values)])
        figures = summarise(sofar, upto, range(len(values)))
        print(
            f"  {found.norm} {found.group}: {len(values)} of {len(x)} images certified, non-trivial "
            f"{figures.get('non_trivial_share', 0):.3f}, median ratio {figures.get('ratio_q50', 0):.3f}", flush=True,
        )  # fmt: skip
    return sofar


def plain(norm: Norm, arguments: argparse.Namespace) -> Figures:
    x, y, ids = test_images(arguments, arguments.images)
    model, scale = robust_model(arguments.weights), SHOWN[norm][0]
    found = measured(model, x, y, norm, steps=20, targets=3, also=[fab(model, x, y, norm)])
    bound = in_chunks(model, x, y, found, arguments.evaluations)
    guess = estimated(model, x, y, norm)
    figures = summarise(bound, found, ids)
    medians = ("certified_median", "measured_median")
    right = found.values > 0
    above = float((guess.values[right] > found.values[right]).mean())
    return {
        **{f"{norm}_{name}": value * (scale if name in medians else 1) for name, value in figures.items()},
        f"{norm}_estimated_median": float(np.median(guess.values[right])) * scale,
        f"{norm}_estimated_above_measured": above,
    }


def part_linf(arguments: argparse.Namespace) -> Figures:
    """All pixels, Linf; medians in units of 1/255."""
    return plain("linf", arguments)


def part_l2(arguments: argparse.Namespace) -> Figures:
    """All pixels, L2."""
    return plain("l2", arguments)


def part_split(arguments: argparse.Namespace) -> Figures:
    """Changes of flagged pixels alone, of the others alone, of all; medians, Linf in units of 1/255."""
    x, y, ids = test_images(arguments, arguments.split_images)
    model = robust_model(arguments.weights)
    flagged = flagged_pixels(model, x, y, ids)
    right = (model(x).argmax(1) == y).numpy()
    figures: Figures = {"flagged_area": float(flagged[right].double().mean())}
    norms: tuple[Norm, ...] = ("linf", "l2")
    for norm in norms:
        middle = partial(_median, right, SHOWN[norm][0])
        for group in GROUPS:
            found = measured(model, x, y, norm, flagged, group, steps=20, targets=3)
            bound = in_chunks(model, x, y, found, arguments.evaluations, flagged)
            figures[f"{norm}_{group}_certified"] = middle(bound.values)
            figures[f"{norm}_{group}_estimated"] = middle(estimated(model, x, y, norm, flagged, group).values)
            figures[f"{norm}_{group}_measured"] = middle(found.values)
            if group == "all":
                figures[f"{norm}_constant_share_of_flagged"] = float(np.nanmedian(constant_shares(bound)))
        figures[f"{norm}_all_estimated_split"] = middle(estimated(model, x, y, norm, flagged, split=True).values)
    return figures


def _median(right: np.ndarray, scale: float, values: np.ndarray) -> float:
    return float(np.median(values[right])) * scale


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--images", type=int, default=200, help="images of the parts linf and l2")
    parser.add_argument("--split-images", type=int, default=20, help="images of the part split")
    parser.add_argument("--evaluations", type=int, default=3, help="most radii at which an image's Jacobian is bounded")
    parser.add_argument("--cifar10", type=Path, default=Path("data/cifar10"))
    parser.add_argument("--weights", type=Path, default=Path("data/weights/resnet4b.pth"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with freed_memory_kept():  # the forms of every layer are freed and asked for again
        figures, load = run_parts({name: globals()[f"part_{name}"] for name in PARTS}, parser, arguments)
    print(f"{hardware()}; torch {torch.__version__}")
    if arguments.json:
        print(json.dumps({**figures, "load": load, "hardware": hardware(), "torch": torch.__version__}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
