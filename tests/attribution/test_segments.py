"""Superpixels against scikit-image and lime called directly; the user's own; what is refused, and when."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lime import lime_image
from lime.wrappers.scikit_image import SegmentationAlgorithm
from real_data import CIFAR10, needs_cifar10
from skimage import data, segmentation, transform

from hpcguard.attribution import LimeConfig, explain_batch
from hpcguard.attribution.segments import (
    check_segmentation,
    grid_segments,
    labels_fit_a_byte,
    quickshift_maps,
    relabel,
    segment_batch,
    segment_image,
    segments_on_device,
)
from hpcguard.cli import run_stage
from hpcguard.config import DataConfig, load_config
from hpcguard.data import load_images
from hpcguard.errors import InputError

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")  # all inside scikit-image's wheel
LIME = {"kernel_size": 4, "max_dist": 200, "ratio": 0.2}


def photograph(name: str, size: int) -> np.ndarray:
    """The middle square of a picture, resized: float32 [3, H, W]."""
    pixels = getattr(data, name)()
    side = min(pixels.shape[:2])
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    square = transform.resize(pixels[top : top + side, left : left + side] / 255, (size, size), anti_aliasing=True)
    return np.moveaxis(square, -1, 0).astype(np.float32)


def as_pixels(image: np.ndarray) -> np.ndarray:
    return np.moveaxis(image, 0, -1).astype(np.float64)


def dense(labels: np.ndarray) -> np.ndarray:
    return np.unique(labels, return_inverse=True)[1].reshape(labels.shape)


def quietly(image: np.ndarray, **settings: Any) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return segment_image(image, LimeConfig(**settings))


# defaults and options


@pytest.mark.parametrize(("size", "count"), [(8, 16), (16, 24), (28, 40), (32, 50), (64, 64), (96, 64), (224, 100)])
def test_slic_by_default(size: int, count: int) -> None:
    image = photograph("astronaut", size)
    expected = segmentation.slic(as_pixels(image), n_segments=count, compactness=10, start_label=0)
    assert np.array_equal(quietly(image), dense(expected))
    grey = segmentation.slic(as_pixels(image[:1]), n_segments=count, compactness=0.1, start_label=0, channel_axis=-1)
    assert np.array_equal(quietly(image[:1]), dense(grey))


@pytest.mark.parametrize(("size", "kernel_size", "max_dist"), [(8, 1, 10), (63, 1, 10), (64, 2, 20), (191, 2, 20)])
def test_quickshift_by_default(size: int, kernel_size: int, max_dist: int) -> None:
    image = photograph("coffee", size)
    expected = segmentation.quickshift(as_pixels(image), kernel_size=kernel_size, max_dist=max_dist, ratio=0.2, rng=42)
    assert np.array_equal(quietly(image, segmentation="quickshift"), expected)


@pytest.mark.parametrize(
    ("size", "scale", "min_size"),
    [(8, 10, 2), (16, 10, 8), (32, 10, 8), (64, 25, 16), (96, 50, 32), (128, 100, 50), (224, 100, 100)],
)
def test_felzenszwalb_by_default(size: int, scale: int, min_size: int) -> None:
    image = photograph("chelsea", size)
    expected = segmentation.felzenszwalb(as_pixels(image), scale=scale, sigma=0.5, min_size=min_size)
    assert np.array_equal(quietly(image, segmentation="felzenszwalb"), dense(expected))


@pytest.mark.parametrize("size", [12, 32, 64])
def test_limes_default_superpixels(size: int) -> None:
    image = photograph("astronaut", size)
    pixels = as_pixels(image)
    ours = quietly(image, segmentation="quickshift", segmentation_options=LIME)
    assert np.array_equal(ours, SegmentationAlgorithm("quickshift", **LIME)(pixels))
    package = lime_image.LimeImageExplainer(random_state=0)
    theirs = package.explain_instance(pixels, lambda batch: np.full((len(batch), 2), 0.5), num_samples=4, top_labels=1)
    assert np.array_equal(ours, theirs.segments)


def test_limes_superpixels_are_the_default_of_large_images() -> None:
    image = photograph("astronaut", 192)
    assert np.array_equal(
        quietly(image, segmentation="quickshift"), SegmentationAlgorithm("quickshift", **LIME)(as_pixels(image))
    )


def test_options_reach_the_method() -> None:
    image = photograph("rocket", 40)
    pixels = as_pixels(image)
    for method, options in {
        "slic": {"compactness": 3.0, "sigma": 1.0, "max_num_iter": 2},
        "quickshift": {"kernel_size": 1.5, "max_dist": 6.0, "ratio": 1.0, "sigma": 0.5},
        "felzenszwalb": {"scale": 40.0, "sigma": 0.8, "min_size": 12},
    }.items():
        fixed = {"slic": {"n_segments": 30, "start_label": 0}, "quickshift": {"rng": 42}}.get(method, {})
        expected = getattr(segmentation, method)(pixels, **fixed, **options)
        ours = quietly(image, segmentation=method, segmentation_options=options, num_segments=30)
        assert np.array_equal(ours, dense(expected)), method


def test_defaults_give_neither_too_few_nor_too_many() -> None:
    images = {size: [photograph(name, size) for name in PHOTOGRAPHS] for size in (32, 64, 128, 224)}
    for size in (8, 16):
        digits = load_images(DataConfig(size=size), "train")
        images[size] = list(digits.images(digits.ids[:20]))
    for size, some in images.items():
        for method in ("slic", "felzenszwalb", "grid"):
            counts = [quietly(image, segmentation=method).max() + 1 for image in some]
            assert 9 <= np.mean(counts) <= 120, (size, method, counts)


@needs_cifar10
@pytest.mark.parametrize(
    ("method", "low", "high"), [("slic", 20, 40), ("quickshift", 10, 20), ("felzenszwalb", 30, 60), ("grid", 49, 49)]
)
def test_defaults_on_cifar10(method: str, low: int, high: int) -> None:
    test = load_images(DataConfig(name="cifar10", root=CIFAR10), "test")
    counts = [quietly(image, segmentation=method).max() + 1 for image in test.images(test.ids[:40])]
    assert min(counts) >= 4
    assert low <= np.mean(counts) <= high


# clean maps


@pytest.mark.parametrize("method", ["slic", "quickshift", "felzenszwalb", "grid"])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_segment_labels_are_dense(method: str, channels: int) -> None:
    image = np.random.default_rng(0).random((channels, 32, 32), np.float32)
    labels = quietly(image, segmentation=method)
    assert (labels.shape, labels.dtype) == ((32, 32), np.int64)
    assert np.array_equal(np.unique(labels), np.arange(labels.max() + 1))


def test_relabel_keeps_the_partition() -> None:
    assert np.array_equal(relabel(np.array([[7, 3], [3, 9]])), [[1, 0], [0, 2]])
    assert np.array_equal(relabel(np.array([[-1, 3], [3, 9]])), [[0, 1], [1, 2]])
    assert np.array_equal(relabel(np.array([[0, 2], [2, 3]])), [[0, 1], [1, 2]])
    assert np.array_equal(relabel(np.array([[0.5, 0.2]])), [[1, 0]])
    kept = np.array([[1, 0], [0, 2]], np.uint8)
    assert relabel(kept).dtype == np.int64
    assert np.array_equal(relabel(kept), kept)


@pytest.mark.parametrize(
    ("method", "remedy"),
    [
        ("felzenszwalb", "lower scale and min_size of attribution.segmentation_options"),
        ("quickshift", "lower kernel_size and max_dist of attribution.segmentation_options"),
        ("slic", "raise attribution.num_segments"),
    ],
)
def test_too_few_segments_warn(method: str, remedy: str) -> None:
    settings = {"slic": {"num_segments": 2}, "quickshift": {"segmentation_options": LIME}}.get(method, {})
    with pytest.warns(UserWarning, match=rf"{method} gives [123] segment\(s\) on an image of 32x32.*{remedy}"):
        segment_image(np.ones((3, 32, 32), np.float32), LimeConfig(segmentation=method, **settings))


def test_every_image_whose_labels_fit_a_byte_has_them() -> None:
    random = np.random.default_rng(0)
    narrow = 0
    for height, width in ((8, 8), (16, 16), (15, 18), (17, 17), (16, 19), (14, 28), (32, 32)):
        for count in (None, 9, 40, 60, 64, 68, 80, 112, 128, 300):
            for method in ("slic", "grid"):
                config = LimeConfig(segmentation=method, num_segments=count)
                if labels_fit_a_byte(config, height, width):
                    narrow += 1
                    for image in random.random((2, 3, height, width), np.float32):
                        assert quietly(image, segmentation=method, num_segments=count).max() <= 255
    assert narrow > 70
    assert not labels_fit_a_byte(LimeConfig(num_segments=80), 17, 17), "slic gives 267 on noise"
    for method in ("quickshift", "felzenszwalb", "own:method"):
        assert not labels_fit_a_byte(LimeConfig(segmentation=method), 32, 32)
        assert labels_fit_a_byte(LimeConfig(segmentation=method), 16, 16)


# where a batch is segmented


def test_who_segments() -> None:
    quickshift = LimeConfig(segmentation="quickshift")
    assert segments_on_device(quickshift, "cuda", 3)
    assert segments_on_device(quickshift, "cuda", 1)
    assert not segments_on_device(quickshift, "cuda", 4)
    assert not segments_on_device(quickshift, "cpu", 3)
    assert not segments_on_device(LimeConfig(), "cuda", 3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("options", [{}, {"kernel_size": 1.5, "max_dist": 4, "sigma": 0.6}, LIME])
def test_torchs_quickshift_gives_the_same_maps(channels: int, options: dict[str, float]) -> None:
    images = np.stack([photograph(name, 30) for name in PHOTOGRAPHS] + [np.ones((3, 30, 30), np.float32)])[:, :channels]
    config = LimeConfig(segmentation="quickshift", segmentation_options=options, batch_size=2)
    with warnings.catch_warnings(record=True) as by_torch:
        warnings.simplefilter("always")
        ours = quickshift_maps(torch.from_numpy(images), config)
    with warnings.catch_warnings(record=True) as by_skimage:
        warnings.simplefilter("always")
        expected = np.stack([segment_image(image, config) for image in images])
    assert np.array_equal(ours, expected)
    assert ours.dtype == expected.dtype
    assert [str(each.message) for each in by_torch] == [str(each.message) for each in by_skimage]
    assert len(by_torch) >= 3 or options is not LIME


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:quickshift gives")
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("method", ["quickshift", "slic"])
def test_a_batch_on_a_gpu(method: str, channels: int) -> None:
    images = np.stack([np.concatenate([photograph(name, 32)] * 2)[:channels] for name in PHOTOGRAPHS])
    config = LimeConfig(segmentation=method)
    expected = [segment_image(image, config) for image in images]
    assert np.array_equal(segment_batch(torch.from_numpy(images).cuda(), config), expected)


def test_explanations_have_the_configured_segments() -> None:
    images = np.stack([photograph(name, 32) for name in PHOTOGRAPHS])
    config = LimeConfig(segmentation="felzenszwalb", num_samples=16)
    result = explain_batch(lambda x: x.mean((2, 3)).softmax(1), images, np.arange(4), config)
    for image, labels in zip(images, result.segments, strict=True):
        expected = segmentation.felzenszwalb(as_pixels(image), scale=10, sigma=0.5, min_size=8)
        assert np.array_equal(labels, dense(expected))


# the user's own

OWN = """
import numpy as np
SEEN = []
LIST = [1]
def rows(pixels, height=4):
    SEEN.append((pixels.dtype.str, pixels.shape, float(pixels.max()), type(height).__name__))
    pixels[:] = 7
    return np.repeat(np.arange(len(pixels)) // height, pixels.shape[1]).reshape(pixels.shape[:2])
def gaps(pixels):
    return np.where(pixels[..., 0] > 0.5, 900, -3)
def floats(pixels):
    return rows(pixels).astype(float)
def flat(pixels):
    return rows(pixels).ravel()
def none(pixels):
    return None
def fails(pixels):
    raise ZeroDivisionError("twice\\nover")
def each(pixels):
    return np.arange(pixels[..., 0].size).reshape(pixels.shape[:2])
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], LimeConfig]:
    (tmp_path / "own_segments_5.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_segments_5", raising=False)
    return lambda name: LimeConfig(segmentation=f"own_segments_5:{name}")


def test_your_own_callable(own: Callable[[str], LimeConfig]) -> None:
    image = np.full((1, 24, 20), 0.25, np.float32)
    assert np.array_equal(segment_image(image, own("rows")), np.arange(24)[:, None].repeat(20, 1) // 4)
    assert image.max() == 0.25, "it gets a copy"
    with_option = own("rows").model_copy(update={"segmentation_options": {"height": 3.0}})
    assert segment_image(image, with_option).max() == 7
    assert sys.modules["own_segments_5"].SEEN == [("<f8", (24, 20, 1), 0.25, "int")] * 2
    image[0, 3] = 1
    with pytest.warns(UserWarning, match=r"own_segments_5:gaps gives 2 segment\(s\)"):
        labels = segment_image(image, own("gaps"))
    assert np.array_equal(labels, (image[0] > 0.5))
    thirds = LimeConfig(segmentation="skimage.segmentation:slic", segmentation_options={"n_segments": 9})
    colour = photograph("coffee", 32)
    assert np.array_equal(segment_image(colour, thirds), dense(segmentation.slic(as_pixels(colour), n_segments=9)))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("floats", "must give integer labels [24, 20] for pixels [24, 20, 3], gave float64 [24, 20]"),
        ("flat", "gave int64 [480]"),
        ("none", "gave object []"),
        ("absent", "cannot be imported (AttributeError"),
        ("LIST", "is a list, not callable"),
        ("fails", "ZeroDivisionError: twice"),
    ],
)
def test_an_unfit_callable_is_refused(own: Callable[[str], LimeConfig], name: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        check_segmentation(np.zeros((3, 24, 20), np.float32), own(name), 17)
    assert str(caught.value).startswith(f"attribution.segmentation = own_segments_5:{name}: ")
    assert says in str(caught.value)
    assert ("(image id 17)" in str(caught.value)) == (name not in ("absent", "LIST"))


def test_more_segments_than_can_be_kept(own: Callable[[str], LimeConfig]) -> None:
    assert segment_image(np.zeros((1, 255, 257), np.float32), own("each")).max() == 65_534
    with pytest.raises(InputError, match=r"gives 65536 segment.*at most 65535"):
        segment_image(np.zeros((1, 256, 256), np.float32), own("each"))
    with pytest.raises(InputError, match=r"4096.*raise kernel_size and max_dist of attribution\.segmentation_options"):
        options = {"max_dist": 0}
        config = LimeConfig(segmentation="quickshift", segmentation_options=options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hpcguard.attribution.segments.MOST_SEGMENTS", 4000)
            segment_image(np.random.default_rng(0).random((3, 64, 64), np.float32), config)
    maps = np.arange(256 * 256).reshape(1, 256, 256)
    with pytest.raises(ValueError, match="segments: 65536 in one image"):
        explain_batch(lambda x: x[:, :2, 0, 0], np.zeros((1, 3, 256, 256)), np.array([0]), LimeConfig(), segments=maps)


def test_a_failure_names_the_image(own: Callable[[str], LimeConfig]) -> None:
    image = torch.zeros(2, 3, 24, 20)
    with pytest.raises(RuntimeError, match=r"own_segments_5:fails: ZeroDivisionError: twice\nover \(image id 40\)"):
        explain_batch(lambda x: x[:, :2, 0, 0], image, np.array([40, 41]), own("fails"))


# the configuration


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["segmentation=slik"],
            ["attribution.segmentation", "slik: write slic, quickshift", "package.module:callable"],
        ),
        (
            ["segmentation_options.kernel_size=4"],
            ["segmentation_options.kernel_size = 4", "slic", "compactness, sigma"],
        ),
        (["segmentation=grid", "segmentation_options.a=1"], ["segmentation_options.a = 1", "grid", "allowed: none"]),
        (["segmentation=quickshift", "segmentation_options.kernel_size=0.5"], ["kernel_size = 0.5", "from 1 to"]),
        (["segmentation_options.max_num_iter=2.5"], ["max_num_iter = 2.5", "whole"]),
        (
            ["segmentation_options.compactness=much"],
            ["attribution.segmentation_options.compactness = 'much'", "number"],
        ),
        (["num_segments=1"], ["attribution.num_segments = 1", "greater than or equal to 2"]),
    ],
)
def test_what_a_configuration_may_not_say(tmp_path: Path, overrides: list[str], expected: list[str]) -> None:
    (tmp_path / "c.yaml").write_text("run: somewhere\n")
    with pytest.raises(InputError) as caught:
        load_config(tmp_path / "c.yaml", [f"attribution.{each}" for each in overrides])
    assert "\n" not in str(caught.value)
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize("arguments", [[], ["--dry-run"]])
@pytest.mark.parametrize("name", ["absent", "floats", "fails"])
def test_attribute_refuses_an_unfit_callable_before_it_starts(
    tmp_path: Path, own: Callable[[str], LimeConfig], make_config: Callable[..., Path],
    capfd: pytest.CaptureFixture[str], name: str, arguments: list[str],
) -> None:  # fmt: skip
    from hpcguard.config import ModelConfig
    from hpcguard.models import build_model

    torch.save(build_model(ModelConfig(options={"width": 4}), 10, 1).net.state_dict(), tmp_path / "net.pth")
    path = make_config(tmp_path, baseline=None, model={"weights": str(tmp_path / "net.pth")})
    values = yaml.safe_load(path.read_text())
    values["attribution"] = {"segmentation": f"own_segments_5:{name}"}
    path.write_text(yaml.safe_dump(values))
    assert run_stage("attribute", [str(path), *arguments]) == 2
    line = capfd.readouterr().err
    assert line.startswith(f"hpcguard attribute: attribution.segmentation = own_segments_5:{name}: ")
    assert line.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_grid_is_equal_rectangles() -> None:
    assert np.bincount(grid_segments(32, 32, 16).ravel()).tolist() == [64] * 16
    assert grid_segments(2, 9, 9).shape == (2, 9)
