"""hpcguard-c against direct computations, Pillow and closed forms; severities; what an image gets depends on."""

import colorsys
import io
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from skimage import data

from hpcguard.config.corruptions import CORRUPTIONS, SEVERITIES, Corruption
from hpcguard.data.corruptions import corrupt

HALF = 0.5 / 255 + 1e-6  # what rounding to 8 bits may change


def pictures(count: int, channels: int = 3, height: int = 32, width: int = 32) -> np.ndarray:
    """Smooth and rough colours with an edge, float32 [count, C, H, W] of 8 bits."""
    generator = np.random.default_rng(0)
    ys, xs = np.mgrid[:height, :width] / max(height, width)
    waves = generator.uniform(2, 9, (count, channels, 1, 1)) * (ys + generator.uniform(0.3, 2, (count, 1, 1, 1)) * xs)
    images = 0.5 + 0.35 * np.sin(waves + generator.uniform(0, 6, (count, channels, 1, 1)))
    images += generator.uniform(-0.08, 0.08, images.shape)
    images[:, :, height // 4 : height // 2, width // 3 : width // 2] = 0.1
    return (np.rint(255 * images) / 255).astype(np.float32)


def photographs(count: int) -> np.ndarray:
    """Crops of a photograph that comes with scikit-image, float32 [count, 3, 32, 32]."""
    picture = Image.fromarray(data.astronaut())
    places = np.random.default_rng(0).integers(0, 512 - 128, (count, 2)).tolist()
    crops = [np.asarray(picture.resize((32, 32), box=(x, y, x + 128, y + 128))) for x, y in places]
    return np.stack(crops).transpose(0, 3, 1, 2) / np.float32(255)


def flat(count: int, value: float) -> np.ndarray:
    return np.full((count, 3, 32, 32), value, np.float32)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_an_image_is_corrupted_alike_in_any_batch_and_stronger_with_severity(corruption: Corruption) -> None:
    images, ids = photographs(40), np.arange(100, 140)
    distances = []
    for severity in SEVERITIES:
        changed = corrupt(images, ids, corruption, severity)
        assert changed.dtype == np.float32 and changed.shape == images.shape
        assert changed.min() >= 0 and changed.max() <= 1
        bytes_ = 255 * changed
        assert np.allclose(bytes_, np.rint(bytes_), atol=1e-3)
        for rows in ([7], [3, 1], [39, 0, 7]):
            assert np.array_equal(corrupt(images[rows], ids[rows], corruption, severity), changed[rows])
        distances.append(np.sqrt(np.square(changed - images).mean((1, 2, 3))).mean())
    assert distances[0] > 0
    assert all(weaker < stronger for weaker, stronger in pairwise(distances)), distances


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 48, 32), (3, 96, 100)])
def test_any_size_of_one_or_three_channels(corruption: Corruption, shape: tuple[int, int, int]) -> None:
    images = pictures(2, *shape)
    for severity in (1, 5):
        changed = corrupt(images, np.array([0, 1]), corruption, severity)
        assert changed.shape == images.shape and np.isfinite(changed).all()
    assert not np.array_equal(changed, images)


RANDOM: tuple[Corruption, ...] = (
    "gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "snow", "frost", "fog",
    "elastic_transform",
)  # fmt: skip


@pytest.mark.parametrize("corruption", RANDOM)
def test_seed_and_id_matter(corruption: Corruption) -> None:
    images = np.repeat(pictures(1), 2, axis=0)
    one, other = corrupt(images, np.array([4, 5]), corruption, 5)
    (reseeded,) = corrupt(images[:1], np.array([4]), corruption, 5, seed=1)
    assert not np.array_equal(one, other) and not np.array_equal(one, reseeded)


def test_corruptions_and_severities_draw_other_noise() -> None:
    images, ids = flat(1, 0.5), np.array([0])
    weak, strong = (corrupt(images, ids, "gaussian_noise", severity)[0] - 0.5 for severity in (1, 5))
    shot = corrupt(images, ids, "shot_noise", 5)[0] - 0.5
    for one, other in ((weak, strong), (strong, shot)):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.08  # of 3072 pairs: four standard errors


@pytest.mark.parametrize(("severity", "deviation"), [(1, 0.04), (3, 0.08), (5, 0.10)])
def test_gaussian_noise_has_its_deviation(severity: int, deviation: float) -> None:
    noise = corrupt(flat(20, 0.5), np.arange(20), "gaussian_noise", severity) - 0.5
    assert noise.std() == pytest.approx(deviation, rel=0.02)
    assert abs(noise.mean()) < 0.003
    assert abs(stats.kurtosis(noise.ravel())) < 0.1


@pytest.mark.parametrize(("severity", "photons"), [(1, 500), (5, 50)])
def test_shot_noise_has_the_variance_of_counts(severity: int, photons: int) -> None:
    noisy = corrupt(flat(20, 0.4), np.arange(20), "shot_noise", severity)
    assert noisy.mean() == pytest.approx(0.4, abs=0.002)
    assert noisy.var() == pytest.approx(0.4 / photons, rel=0.05)


def test_impulse_noise_makes_its_share_black_or_white() -> None:
    noisy = corrupt(flat(40, 0.5), np.arange(40), "impulse_noise", 5)
    black, white = (noisy == 0).mean(), (noisy == 1).mean()
    assert black == pytest.approx(0.035, abs=0.003) and white == pytest.approx(0.035, abs=0.003)
    assert ((noisy == 0) | (noisy == 1) | (abs(noisy - 0.5) < HALF)).all()


def test_brightness_adds_to_hsv_value() -> None:
    images = pictures(2)
    images[0, :, 0, 0] = 0  # black has no hue
    brighter = corrupt(images, np.arange(2), "brightness", 4)
    for image, changed in zip(images, brighter, strict=True):
        for y, x in ((0, 0), (3, 30), (17, 8), (31, 31)):
            hue, saturation, value = colorsys.rgb_to_hsv(*image[:, y, x].tolist())
            expected = colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.2))
            assert changed[:, y, x] == pytest.approx(expected, abs=HALF)
    assert corrupt(images[:, :1], np.arange(2), "brightness", 4) == pytest.approx(
        np.minimum(images[:, :1] + 0.2, 1), abs=HALF
    )


def test_contrast_shrinks_about_the_channel_means() -> None:
    images = pictures(2)
    means = images.mean((2, 3), keepdims=True)
    expected = 0.15 * images + 0.85 * means
    assert corrupt(images, np.arange(2), "contrast", 5) == pytest.approx(expected, abs=HALF)


def test_pixelate_averages_boxes() -> None:
    """0.75 of 32 pixels are 24: a coarse pixel is the mean of those whose centres it holds, and is shown at the
    centres that it holds."""
    image = pictures(1)
    holds = (np.arange(32) + 0.5) * 24 // 32 == np.arange(24)[:, None]
    share = holds / holds.sum(1, keepdims=True)
    coarse = share @ image[0].astype(np.float64) @ share.T
    expected = holds.T @ coarse @ holds
    changed = corrupt(image, np.arange(1), "pixelate", 4)[0]
    assert changed == pytest.approx(expected, abs=1.05 / 255)  # Pillow rounds to bytes after each side
    assert abs(changed - image[0]).max() > 0.05


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_pillows(channels: int) -> None:
    images = pictures(1, channels)
    pixels = np.rint(255 * images[0].transpose(1, 2, 0)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels if channels == 3 else pixels[..., 0]).save(file, "JPEG", quality=40)
    expected = np.asarray(Image.open(file)).reshape(pixels.shape).transpose(2, 0, 1) / np.float32(255)
    changed = corrupt(images, np.arange(1), "jpeg_compression", 5)[0]
    assert np.array_equal(changed, expected)


def test_defocus_of_a_point_is_its_disk() -> None:
    """Radius 1 before the slight smoothing of 0.2: a plus of five pixels, of 1/5 each."""
    image = np.zeros((1, 1, 32, 32), np.float32)
    image[0, 0, 16, 16] = 1
    blurred = corrupt(image, np.arange(1), "defocus_blur", 4)[0, 0]
    expected = np.zeros((32, 32))
    expected[15:18, 16] = expected[16, 15:18] = 0.2
    assert blurred == pytest.approx(expected, abs=HALF)


def test_motion_blur_keeps_what_a_picture_sums_to_and_lies_on_a_line() -> None:
    image = np.zeros((1, 1, 32, 32), np.float32)
    image[0, 0, 16, 20] = 1
    blurred = corrupt(image, np.array([3]), "motion_blur", 3)[0, 0]
    assert blurred.sum() == pytest.approx(1, abs=0.03)
    ys, xs = np.nonzero(blurred)
    assert len(ys) >= 4 and xs.max() == 20 and (xs.max() - xs.min()) >= abs(ys - 16).max()  # within 45 degrees


def test_zoom_blur_keeps_the_centre_and_flat_pictures() -> None:
    assert corrupt(flat(1, 0.6), np.arange(1), "zoom_blur", 5) == pytest.approx(0.6, abs=HALF)
    ramp = np.broadcast_to(np.linspace(0, 1, 33, dtype=np.float32), (1, 1, 33, 33))
    blurred = corrupt(np.ascontiguousarray(ramp), np.arange(1), "zoom_blur", 5)[0, 0, 16]
    # A magnification by z divides the distance from the centre by z.
    factor = (1 + sum(1 / (1 + k / 100) for k in range(26))) / 27
    assert blurred == pytest.approx(0.5 + factor * (ramp[0, 0, 0] - 0.5), abs=HALF)


def test_glass_blur_moves_pixels_by_at_most_its_reach() -> None:
    image = np.zeros((1, 1, 32, 32), np.float32)
    image[..., 16:] = 1
    blurred = corrupt(image, np.arange(1), "glass_blur", 5)[0, 0]
    changed = np.flatnonzero((abs(blurred - image[0, 0]) > 0.3).any(0))
    assert len(changed) and changed.min() >= 8 and changed.max() <= 23  # a pixel can be handed on, though rarely far


def test_fog_keeps_the_brightest_value_possible() -> None:
    images = pictures(3)
    for image, foggy in zip(images, corrupt(images, np.arange(3), "fog", 5), strict=True):
        brightest = image.max()
        low, high = image * brightest / (brightest + 1.5), (image + 1.5) * brightest / (brightest + 1.5)
        assert (foggy >= low - HALF).all() and (foggy <= high + HALF).all()


def test_snow_and_frost_only_whiten() -> None:
    images = pictures(3)
    assert (corrupt(images, np.arange(3), "snow", 3) >= images - HALF).all()
    assert (corrupt(images, np.arange(3), "frost", 2) >= images - HALF).all()


def test_wrong_arrays_are_refused() -> None:
    for images in (np.zeros((1, 2, 8, 8), np.float32), np.zeros((2, 3, 8, 8), np.float32), np.zeros((3, 8, 8))):
        with pytest.raises(ValueError, match="expected"):
            corrupt(images, np.array([0]), "fog", 1)
