#!/usr/bin/env python3
"""Measure hpcguard's LIME engine: cost against the bare forward pass, lime and captum; fidelity; samples; coverage.

  python tools/bench_lime.py [--json] [--parts cost,fidelity,...] [--rounds 9] [--cifar10 DIR] [--weights FILE]

Every figure is a ratio of two things measured in this run, on one thread, in shuffled rounds (median of ratios). All
parts take half an hour on a CPU. The parts `samples` and `robust` need CIFAR-10 in DIR (data/cifar10), the published
ResNet-20 in FILE (data/weights/resnet20-12fca82f.th) and a small adversarially trained net
(data/weights/resnet4b.pth). captum (pip install captum) is needed for its own ratio only, else null.
"""

import argparse
import json
import os
import random
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # lime's bars

import numpy as np
import torch
from bench_parts import Figures, run_parts
from lime.lime_image import LimeImageExplainer
from torch import Tensor, nn

from hpcguard.attribution import Attribution, LimeConfig, explain_batch
from hpcguard.attribution.ahead import segmented_ahead
from hpcguard.attribution.explain import hidden_fill
from hpcguard.attribution.forward import Perturber
from hpcguard.attribution.sampling import draw_samples
from hpcguard.attribution.segments import quickshift_maps, segment_batch, segment_image
from hpcguard.attribution.surrogate import fit_surrogate, lime_weights
from hpcguard.cluster.devices import full_float32
from hpcguard.config import DataConfig, ModelConfig
from hpcguard.data import load_images
from hpcguard.metrics.stability import mean_pairwise_jaccard
from hpcguard.models import Normalized, fastest_layout, for_inference, load_model

PARTS = ("cost", "small", "large", "fidelity", "memory", "device", "segments", "samples", "robust")
DESIGNS = ("antithetic", "hadamard", "sobol")
SLIC = {"segmentation": "slic", "num_segments": 50}
SHIFT = {"segmentation": "quickshift", "segmentation_options": {"kernel_size": 4, "max_dist": 200, "ratio": 0.2}}


def timed(tasks: dict[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each task in each round, in shuffled order; a first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(rounds + 1):
        for name in random.sample(list(tasks), len(tasks)):
            started = time.perf_counter()
            tasks[name]()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: np.array(values) for name, values in seconds.items()}


def median_ratio(over: np.ndarray, under: np.ndarray) -> float:
    """Median over rounds of the ratio within a round: a machine that slows down for a while slows both."""
    return float(np.median(over / under))


def photographs(count: int, size: int, folder: Path) -> np.ndarray:
    """Test images of CIFAR-10 at 32 pixels, else crops of a photograph that comes with scikit-image."""
    if size == 32 and (folder / "cifar-10-batches-py").is_dir():
        test = load_images(DataConfig(name="cifar10", root=folder), "test")
        return test.images(test.ids[:count])
    from skimage import data, transform

    picture = data.astronaut() / 255
    crops = [picture[20 * k : 20 * k + 300, 15 * k : 15 * k + 300] for k in range(count)]
    return np.stack([transform.resize(crop, (size, size)).transpose(2, 0, 1) for crop in crops]).astype(np.float32)


def classifier(model: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    """What lime's users write: float images [n, H, W, C] to probabilities."""

    device = next(model.parameters()).device

    def predict(batch: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(batch.transpose(0, 3, 1, 2)).float().to(device)).softmax(1).cpu().numpy()

    return predict


def run_lime(model: nn.Module, images: np.ndarray, segments: np.ndarray, samples: int, batch_size: int) -> list[Any]:
    explainer = LimeImageExplainer(random_state=0)
    return [
        explainer.explain_instance(
            image.transpose(1, 2, 0).astype(np.float64), classifier(model), top_labels=2, num_samples=samples,
            batch_size=batch_size, segmentation_fn=lambda _, map=map: map,
        )
        for image, map in zip(images, segments, strict=True)
    ]  # fmt: skip


def run_captum(model: nn.Module, images: np.ndarray, segments: np.ndarray, samples: int) -> None:
    from captum._utils.models.linear_model import SkLearnRidge
    from captum.attr import Lime

    explainer, device = Lime(model, interpretable_model=SkLearnRidge(alpha=1)), next(model.parameters()).device
    for image, map in zip(images, segments, strict=True):
        explainer.attribute(
            torch.from_numpy(image)[None].to(device), target=0, n_samples=samples, perturbations_per_eval=256,
            feature_mask=torch.from_numpy(map)[None, None].to(device),
        )  # fmt: skip


def captum_is_there() -> bool:
    try:
        import captum  # noqa: F401
    except ImportError:
        return False
    return True


def cost(model: nn.Module, images: np.ndarray, arguments: argparse.Namespace, samples: int = 1000) -> Figures:
    """Wall time of the engine, of the same rows through the same model, of lime and of captum."""
    device = torch.device(arguments.device)
    model, pixels = Normalized(model).eval().to(device), fastest_layout(torch.from_numpy(images).to(device))
    quick = for_inference(model, pixels[:2])
    predict = lambda x: quick(x).softmax(1)  # noqa: E731
    # On a GPU the engine's time includes segmentation, which it does there; elsewhere all are given the same maps.
    on_gpu = device.type == "cuda"
    method = {"segmentation": "quickshift"} if on_gpu else SLIC
    config = LimeConfig(design="lime", num_samples=samples, deduplicate=False, batch_size=arguments.batch, **method)
    segments = segment_batch(pixels, config)
    explain = partial(
        explain_batch, images=pixels, ids=np.arange(len(images)), config=config, segments=None if on_gpu else segments
    )
    batches: list[Tensor] = []
    explain(lambda x: (batches.append(x.clone(memory_format=torch.preserve_format)), predict(x))[1])

    @torch.inference_mode()
    def forward() -> None:
        for rows in batches:
            probability = predict(rows)
        probability.cpu()  # waits for a GPU

    tasks: dict[str, Callable[[], object]] = {
        "engine": lambda: explain(predict),
        "floor": forward,
        "lime_default": lambda: run_lime(model, images, segments, samples, 10),
        "lime_256": lambda: run_lime(model, images, segments, samples, 256),
    }
    if captum_is_there():
        tasks["captum_256"] = lambda: run_captum(model, images, segments, samples)
    seconds = timed(tasks, arguments.rounds)
    print_seconds(seconds, len(images))
    print(f"  segments {segments.reshape(len(images), -1).max(1).mean() + 1:.1f}")
    others = {name: median_ratio(seconds[name], seconds["engine"]) for name in tasks if name != "floor"}
    return {
        "floor_ratio": median_ratio(seconds["engine"], seconds["floor"]),
        "vs_lime_default": others["lime_default"],
        "vs_lime_256": others["lime_256"],
        "vs_captum_256": others.get("captum_256"),
    }


def print_seconds(seconds: dict[str, np.ndarray], images: int) -> None:
    print(
        f"  seconds an image: { {name: round(float(np.median(each)) / images, 3) for name, each in seconds.items()} }"
    )


def part_cost(arguments: argparse.Namespace) -> Figures:
    """ResNet-18 (torchvision's) at 32x32, 1000 samples."""
    images = photographs(2 if arguments.device == "cpu" else 16, 32, arguments.cifar10)
    return cost(resnet18(), images, arguments)


def resnet18() -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=10).eval()


def part_small(arguments: argparse.Namespace) -> Figures:
    """The same for a tiny network, where everything but the forward pass shows."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    tiny = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 10)).eval()
    arguments = argparse.Namespace(**{**vars(arguments), "batch": 128})  # what fits in a core's cache
    figures = cost(tiny, photographs(4, 32, arguments.cifar10), arguments)
    return {"small_net_vs_lime_default": figures["vs_lime_default"], "small_net_floor_ratio": figures["floor_ratio"]}


def trained(arguments: argparse.Namespace) -> nn.Module:
    """The published ResNet-20 if its file is there, else an untrained ResNet-18, whose coefficients are small."""
    if not arguments.weights.exists():
        print(f"  {arguments.weights} is not there: an untrained ResNet-18 instead")
        return resnet18()
    norm = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    return load_model(ModelConfig(name="resnet20-cifar", **norm), 10, 3, arguments.weights).eval()


def part_large(arguments: argparse.Namespace) -> Figures:
    """ResNet-18 at 224x224, 8 images, lime's default quickshift in one process beside the model's thread."""
    device, samples, batch = torch.device(arguments.device), 128, 64
    images = photographs(8, 224, arguments.cifar10)
    quick = for_inference(Normalized(resnet18()), torch.from_numpy(images[:2]).to(device))
    predict = lambda x: quick(x).softmax(1)  # noqa: E731
    config = LimeConfig(num_samples=samples, batch_size=batch, **SHIFT)
    sizes: list[int] = []  # of the model's batches
    buffer = fastest_layout(torch.from_numpy(np.resize(images, (batch, *images.shape[1:]))).to(device))

    def explain(model: Callable[[Tensor], Tensor] = predict) -> None:
        pairs = [(np.arange(k, k + 2), images[k : k + 2]) for k in range(0, len(images), 2)]
        for ids, pixels, maps in segmented_ahead(pairs, config, 1):
            explain_batch(model, fastest_layout(torch.from_numpy(pixels).to(device)), ids, config, segments=maps)

    @torch.inference_mode()
    def forward() -> None:
        for size in sizes:
            probability = predict(buffer[:size])
        probability.cpu()

    explain(lambda x: (sizes.append(len(x)), torch.full((len(x), 10), 0.1, device=device))[1])
    tasks = {"overlapped": explain, "floor": forward}
    seconds = timed(tasks, min(arguments.rounds, 5))
    print_seconds(seconds, len(images))
    return {"imagenet_like_ratio": median_ratio(seconds["overlapped"], seconds["floor"])}


def part_fidelity(arguments: argparse.Namespace) -> Figures:
    """Coefficients against the lime package, ResNet-20: on its probabilities, and with attribution's forward pass."""
    model = trained(arguments)
    images = photographs(6, 32, arguments.cifar10)
    quick = for_inference(model if isinstance(model, Normalized) else Normalized(model), torch.from_numpy(images[:2]))
    same, own, orders = [], [], []
    for index, image in enumerate(images):
        config = LimeConfig(design="lime", num_samples=500, seed=0, **SLIC)
        segments = segment_image(image, config)
        answers: list[np.ndarray] = []
        predict = classifier(model)
        theirs = LimeImageExplainer(random_state=index).explain_instance(
            image.transpose(1, 2, 0).astype(np.float64), lambda x, p=predict, a=answers: a.append(p(x)) or a[-1],
            top_labels=3, num_samples=500, segmentation_fn=lambda _, map=segments: map,
        )  # fmt: skip
        given = iter(torch.from_numpy(np.concatenate(answers)).split([1, 499]))
        labels, ids = np.array([theirs.top_labels]), np.array([index])
        exact = explain_batch(
            lambda _, g=given: next(g), image[None], ids,
            config.model_copy(update={"batch_size": 1000, "deduplicate": False}), labels, segments[None],
        ).to_lime(0)  # fmt: skip
        forward = explain_batch(
            lambda x: quick(x).softmax(1), fastest_layout(torch.from_numpy(image[None])), ids, config, labels,
            segments[None],
        ).to_lime(0)  # fmt: skip
        for label in theirs.top_labels:
            expected = dict(theirs.local_exp[label])
            same.append(max(abs(weight - expected[s]) for s, weight in exact.local_exp[label]))
            own.append(max(abs(weight - expected[s]) for s, weight in forward.local_exp[label]))
            orders.append([s for s, _ in forward.local_exp[label]] == [s for s, _ in theirs.local_exp[label]])
    return {
        "max_abs_diff_same_probabilities": max(same),
        "max_abs_diff_own_forward": max(own),
        "order_equal": float(np.mean(orders)),
    }


def part_memory(arguments: argparse.Namespace) -> Figures:
    """Bytes of the largest batch that the model is ever given."""
    image = photographs(1, 32, arguments.cifar10)
    tiny = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 10)).eval()
    peaks = []
    for samples in (1000, 100_000):
        seen: list[int] = []
        config = LimeConfig(num_samples=samples, design="iid", **SLIC)
        explain_batch(
            lambda x, s=seen: (s.append(x.untyped_storage().nbytes()), tiny(x).softmax(1))[1],
            image,
            np.array([0]),
            config,
        )
        peaks.append(max(seen))
    return {"peak_rows_in_flight_bytes": float(peaks[0]), "peak_rows_in_flight_bytes_100k": float(peaks[1])}


def part_device(arguments: argparse.Namespace) -> Figures:
    """What a device does to results: quickshift in torch against scikit-image; coarser arithmetic against float32."""
    device = torch.device(arguments.device)
    images = photographs(16, 32, arguments.cifar10)
    model = trained(arguments).to(device)
    pixels = fastest_layout(torch.from_numpy(images).to(device))
    config = LimeConfig(segmentation="quickshift", num_samples=500)
    ours, theirs = quickshift_maps(pixels, config), np.stack([segment_image(image, config) for image in images])

    def explain(predict: Callable[[Tensor], Tensor]) -> np.ndarray:
        return explain_batch(predict, pixels, np.arange(len(images)), config, segments=theirs).coefficients

    def coarse(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return model(x).float().softmax(1)

    exact = explain(lambda x: model(x).softmax(1))
    differences = {"bf16": np.nanmax(np.abs(explain(coarse) - exact)) / np.nanmax(np.abs(exact)), "tf32": None}
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        differences["tf32"] = np.nanmax(np.abs(explain(lambda x: model(x).softmax(1)) - exact)) / np.nanmax(
            np.abs(exact)
        )
        full_float32()
    return {
        "quickshift_equal": float(np.mean([np.array_equal(*pair) for pair in zip(ours, theirs, strict=True)])),
        "bf16_share_of_largest": differences["bf16"],
        "tf32_share_of_largest": differences["tf32"],
    }


def part_segments(arguments: argparse.Namespace) -> Figures:
    """Segments an image by default: mean [least to most] of 16 images."""
    for size in (8, 16, 32, 64, 128, 224):
        source = DataConfig(name="digits", size=size) if size < 32 else None
        train = load_images(source, "train") if source else None
        images = train.images(train.ids[:16]) if train else photographs(16, size, arguments.cifar10)
        counts = {}
        for method in ("slic", "quickshift", "felzenszwalb", "grid"):
            found = segment_batch(torch.from_numpy(images), LimeConfig(segmentation=method)).reshape(16, -1).max(1) + 1
            counts[method] = f"{found.mean():.0f} [{found.min()}-{found.max()}]"
        what = "digits" if source else "photographs"
        print(f"  {what} {size}x{size}: {', '.join(f'{method} {count}' for method, count in counts.items())}")
    return {}


def part_samples(arguments: argparse.Namespace) -> Figures:
    """Agreement of repeats, cost of `auto`, coverage of its intervals: ResNet-20, real images, 10 repeats."""
    return sampling_figures(trained(arguments), arguments)


def part_robust(arguments: argparse.Namespace) -> Figures:
    """The same for a small adversarially trained net, which is smoother."""
    if not arguments.robust_weights.exists():
        print(f"  {arguments.robust_weights} is not there")
        return {}
    state = torch.load(arguments.robust_weights, map_location="cpu", weights_only=True)
    net = ResNet4b()
    net.load_state_dict(state.get("state_dict", state))
    model = Normalized(net, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)).eval()
    return {f"robust_{name}": value for name, value in sampling_figures(model, arguments).items()}


class ResNet4b(nn.Module):
    """The ResNet of resnet4b.pth: no normalisation, two stages, two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 2, 1)
        self.layer1 = nn.Sequential(PlainBlock(16, 32, 2), PlainBlock(32, 32, 1))
        self.layer2 = nn.Sequential(PlainBlock(32, 32, 2), PlainBlock(32, 32, 1))
        self.linear1, self.linear2 = nn.Linear(512, 100), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(torch.relu(self.conv1(x)))).flatten(1)
        return self.linear2(torch.relu(self.linear1(x)))


class PlainBlock(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1)
        self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride)) if stride > 1 else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + self.shortcut(x))


def sampling_figures(model: nn.Module, arguments: argparse.Namespace) -> Figures:
    test = load_images(DataConfig(name="cifar10", root=arguments.cifar10), "test")
    images = test.images(test.ids[: arguments.images])
    study = Study(for_inference(model, torch.from_numpy(images[:2])), images, arguments.repeats)
    auto = study.repeated(num_samples="auto")
    used, found = np.stack([run.num_samples for run in auto]), study.jaccard(auto)
    jaccard = {design: study.jaccard(study.repeated(design=design, num_samples=256)) for design in DESIGNS}
    print(f"  top-5 Jaccard at 256 rows: { {name: round(value, 3) for name, value in jaccard.items()} }")
    iid = study.iid_jaccard((64, 128, 192, 256, 384, 512, 768, 1024))
    print(f"  top-5 Jaccard of iid rows: { {number: round(value, 3) for number, value in iid.items()} }")
    quartiles = np.quantile(used, [0.25, 0.5, 0.75]).astype(int)
    print(f"  auto: {found:.3f} at {used.mean():.0f} rows on average (quartiles {quartiles}, most {used.max()})")
    # More rows agree better but for the noise of 10 repeats, which must not turn the curve.
    equal = float(np.interp(found, np.maximum.accumulate(list(iid.values())), list(iid)))
    return {
        "jaccard5_sobol256": jaccard["sobol"],
        "jaccard5_iid1024": iid[1024],
        "jaccard5_auto": found,
        "auto_rows": float(used.mean()),
        "iid_rows_of_equal_jaccard": equal,
        "auto_calls_ratio": float(used.mean()) / equal,
        "coverage95": study.coverage(auto),
        "pairs_explain": study.pairs_explain(),
    }


class Study:
    """Repeated explanations of the same images with different seeds; the predicted class is explained."""

    def __init__(self, model: nn.Module, images: np.ndarray, repeats: int) -> None:
        self.predict = lambda x: model(x).softmax(1)
        self.images, self.repeats = fastest_layout(torch.from_numpy(images)), repeats
        self.ids = np.arange(len(images))
        self.base = LimeConfig(**SLIC)
        self.segments = segment_batch(self.images, self.base)
        with torch.inference_mode():
            self.targets = self.predict(self.images).argmax(1, keepdim=True)

    def explain(self, **changes: Any) -> Attribution:
        config = LimeConfig(**{**self.base.model_dump(), **changes})
        return explain_batch(self.predict, self.images, self.ids, config, self.targets.numpy(), self.segments)

    def repeated(self, **changes: Any) -> list[Attribution]:
        return [self.explain(seed=seed, **changes) for seed in range(self.repeats)]

    def iid_jaccard(self, numbers: tuple[int, ...]) -> dict[int, float]:
        """Agreement of fits to the first n of the same rows, for every n: each row is evaluated once."""
        maps = torch.from_numpy(self.segments)
        counts = self.segments.reshape(len(maps), -1).max(1) + 1
        hidden = hidden_fill(self.images, maps, int(counts.max()), "mean")
        perturber = Perturber(self.predict, self.images, hidden, maps, self.ids, self.base.batch_size)
        fits = {number: np.full((self.repeats, len(maps), counts.max()), np.nan) for number in numbers}
        for seed in range(self.repeats):
            rows = [
                torch.from_numpy(draw_samples("iid", seed, int(i), max(numbers), int(count)).rows)
                for i, count in zip(self.ids, counts, strict=True)
            ]
            answers = perturber.evaluate(list(enumerate(rows)), self.targets)
            for number in numbers:
                for i, count in enumerate(counts):
                    first, answer = rows[i][:number], answers[i][:number]
                    fit = fit_surrogate(first, answer, lime_weights(first, 0.25), ridge=1.0, paired=False)
                    fits[number][seed, i, :count] = fit.coefficients[0].numpy()
        return {number: _jaccard(fits[number]) for number in numbers}

    def jaccard(self, runs: list[Attribution]) -> float:
        return _jaccard(np.stack([run.coefficients[:, 0] for run in runs]))

    def coverage(self, runs: list[Attribution], rows: int = 8192) -> float:
        """Share of 95% intervals that hold what many rows give, the ridge penalty in proportion."""
        ridge = rows / self.base.max_samples
        truth = self.explain(num_samples=rows, seed=10**6, ridge=ridge).coefficients[:, 0]
        values, widths = (np.stack([getattr(run, name)[:, 0] for run in runs]) for name in ("coefficients", "interval"))
        return float((np.abs(values - truth) <= widths)[np.isfinite(values)].mean())

    def pairs_explain(self, rows: int = 2048) -> float:
        """Median share of what a linear fit leaves that all pairwise products explain (R^2 adjusted for their number).

        Designs cannot do away with more than about this share of the variance of a coefficient.
        """
        shares = []
        for i, (image, segments) in enumerate(zip(self.images, self.segments, strict=True)):
            drawn = torch.from_numpy(draw_samples("iid", 10**6, i, rows, int(segments.max()) + 1).rows)
            maps = torch.from_numpy(segments)[None]
            hidden = hidden_fill(image[None], maps, int(segments.max()) + 1, "mean")
            perturber = Perturber(self.predict, image[None], hidden, maps, self.ids[:1], self.base.batch_size)
            y = perturber.evaluate([(0, drawn)], self.targets[i : i + 1])[0]
            root = lime_weights(drawn, 0.25).sqrt()[:, None]
            z = drawn.double() * 2 - 1
            first, second = torch.triu_indices(z.shape[1], z.shape[1], 1)
            linear = torch.cat([torch.ones_like(y), z], 1)
            mean_squares = []
            for design in (linear, torch.cat([linear, z[:, first] * z[:, second]], 1)):
                fit = torch.linalg.lstsq(root * design, root * y).solution
                mean_squares.append(float((root * (y - design @ fit)).square().sum()) / (rows - design.shape[1]))
            shares.append(1 - mean_squares[1] / mean_squares[0])
        return float(np.median(shares))


def _jaccard(runs: np.ndarray) -> float:
    """Mean over images of the mean over pairs of repeats; runs [R, B, S]."""
    return float(np.mean([mean_pairwise_jaccard(runs[:, i], 5) for i in range(runs.shape[1])]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of every timing")
    parser.add_argument("--robust-weights", type=Path, default=Path("data/weights/resnet4b.pth"))
    parser.add_argument("--images", type=int, default=24, help="images of the part samples")
    parser.add_argument("--repeats", type=int, default=10, help="repeats of the part samples")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for cost, small, large and device")
    parser.add_argument("--batch", type=int, default=256, help="rows in a forward pass, for cost")
    parser.add_argument("--cifar10", type=Path, default=Path("data/cifar10"))
    parser.add_argument("--weights", type=Path, default=Path("data/weights/resnet20-12fca82f.th"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    full_float32()
    random.seed(0)
    figures, _ = run_parts({name: globals()[f"part_{name}"] for name in PARTS}, parser, arguments)
    if arguments.json:
        print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
