"""What is explained and how: data, model, attribution."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from hpcguard.config.section import Epsilon, Section

SEGMENTATION_OPTIONS: dict[str, dict[str, tuple[float, float]]] = {
    "slic": {"compactness": (1e-9, 1e9), "sigma": (0, 1e3), "max_num_iter": (1, 1e4)},
    "quickshift": {"kernel_size": (1, 1e3), "max_dist": (0, 1e9), "ratio": (0, 1), "sigma": (0, 1e3)},
    "felzenszwalb": {"scale": (1e-9, 1e9), "sigma": (0, 1e3), "min_size": (1, 1e9)},
    "grid": {},
}  # smallest and largest value of each option
WHOLE_OPTIONS = ("max_num_iter", "min_size")


def check_segmentation_name(value: str) -> str:
    if value not in SEGMENTATION_OPTIONS and ":" not in value:
        raise ValueError(f"{value}: write {', '.join(SEGMENTATION_OPTIONS)} or your own package.module:callable")
    return value


class DataConfig(Section):
    PLACE = frozenset({"root"})
    name: Literal["digits", "fashion-mnist", "cifar10", "cifar100", "image-folder"] = "digits"
    """Image set. digits comes with scikit-learn; the others are read from data.root."""
    root: Path | None = None
    """Folder with the files: idx .gz for fashion-mnist, torchvision's folder for CIFAR, train/ and test/ otherwise."""
    size: int | None = Field(None, ge=8, le=512)
    """Resize images to size x size (bilinear); null keeps their own size. image-folder needs it."""
    train_images: int | None = Field(None, gt=0)
    """Use only so many training images, drawn by data.seed; null: all."""
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training images held out as the validation split, drawn by data.seed."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of those two draws."""


class ModelConfig(Section):
    PLACE = frozenset({"weights"})
    name: str = "small-cnn"
    """small-cnn, resnet20-cifar, resnet18-cifar, any torchvision classifier, or your own as package.module:callable."""
    weights: Path | None = None
    """Weights of the model to be explained (.safetensors, .pt, .pth, .th); null: checkpoints/baseline of the run."""
    mean: tuple[float, ...] | None = None
    """Channel means for normalisation inside the model; null: 0."""
    std: tuple[Annotated[float, Field(ge=1e-6)], ...] | None = None
    """Channel standard deviations for normalisation inside the model; null: 1."""
    activation: Literal["relu", "gelu", "softplus", "silu"] | None = None
    """Put in the place of every torch.nn.ReLU module, weights loaded as before; null: as built. Networks with smooth
    activations fit a penalty on their input gradients, ReLU networks hardly (arXiv:2409.20139)."""
    options: dict[str, Any] = {}
    """Keyword arguments for the model's constructor."""


class LimeConfig(Section):
    segmentation: Annotated[str, AfterValidator(check_segmentation_name)] = "slic"
    """slic, quickshift or felzenszwalb (scikit-image), grid (equal rectangles), or your own as package.module:callable:
    like lime's segmentation_fn it gets float64 [H, W, C] in [0, 1] (C = 1 if grey) and gives integer labels [H, W],
    always the same for the same pixels."""
    num_segments: int | None = Field(None, ge=2, le=4096)
    """Superpixels asked for (slic, grid); slic returns fewer on small images. null: by image size, 50 at 32x32."""
    segmentation_options: dict[str, float] = {}
    """Parameters of the chosen method, others by image size. slic: compactness, sigma, max_num_iter; quickshift:
    kernel_size, max_dist, ratio, sigma (4, 200, 0.2, 0 are lime's own); felzenszwalb: scale, sigma, min_size; your own
    callable gets them as keyword arguments."""
    num_samples: Literal["auto"] | Annotated[int, Field(ge=2, le=10_000_000)] = 256
    """Perturbed copies of an image, the image itself included; auto: as many as `precision` needs."""
    precision: float = Field(0.25, gt=0)
    """auto stops when every 95% interval reaches no further than this share of the label's largest coefficient, ..."""
    tolerance: float = Field(0.01, ge=0)
    """... plus this much probability: where a model hardly reacts, relative precision would cost without end."""
    min_samples: int = Field(128, ge=16)
    """auto looks first after so many."""
    max_samples: int = Field(2048, ge=16, le=10_000_000)
    """auto stops after so many at the latest."""
    design: Literal["lime", "iid", "antithetic", "hadamard", "sobol"] = "hadamard"
    """How 0/1 rows are drawn: the lime package's own stream; independent; in pairs (z, 1-z); Hadamard blocks and their
    complements; scrambled Sobol points, which have no honest standard errors. docs/lime.md compares them."""
    deduplicate: bool = True
    """Evaluate equal rows of an image once; turn off for a model with randomness."""
    kernel_width: float = Field(0.25, ge=0.01, le=100)
    """Width of lime's exponential kernel on the cosine distance."""
    ridge: float = Field(1.0, ge=1e-9)
    """L2 penalty of the surrogate (lime: 1) at the number of samples asked for; auto, which asks for max_samples, and
    images of which all rows are known, scale it with the rows that they have."""
    fill: Literal["mean"] | float = "mean"
    """What a hidden segment shows: its own mean colour, or a constant in [0, 1]."""
    batch_size: int = Field(256, gt=0, le=1_000_000)
    """Perturbed images in one forward pass; the most that are in memory at once."""
    unit: int = Field(16, gt=0)
    """Consecutive images that are always computed together: what makes results independent of shards and workers."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed; each image's random numbers are keyed by (seed, image id)."""
    sensitivity: bool = True
    """Also store how much the logits' margin reacts to each segment's pixels: one backward pass an image, next to
    nothing beside the perturbed images. Needs a model with gradients."""
    noisy_copies: int = Field(0, ge=0, le=1000)
    """Also store the variance of each coefficient over explanations of so many noisy copies of the image, each as dear
    as the image's own; 0: not computed. arXiv:2601.00968 takes 5."""
    noise: Epsilon = 10 / 255
    """Standard deviation of that noise; noisy pixels are clipped to [0, 1]."""

    @model_validator(mode="after")
    def _a_variance_needs_two(self) -> "LimeConfig":
        if self.noisy_copies == 1:
            raise ValueError("noisy_copies = 1: a variance needs at least 2; write 0 to compute none")
        return self

    @model_validator(mode="after")
    def _constant_fill_is_a_pixel(self) -> "LimeConfig":
        if self.fill != "mean" and not 0 <= float(self.fill) <= 1:
            raise ValueError(f"fill = {self.fill}: write mean or a constant from 0 to 1")
        if self.min_samples > self.max_samples:
            raise ValueError(f"min_samples = {self.min_samples} is more than max_samples = {self.max_samples}")
        return self

    @model_validator(mode="after")
    def _options_are_the_methods(self) -> "LimeConfig":
        if self.segmentation not in SEGMENTATION_OPTIONS:
            return self  # a user's callable knows best
        allowed = SEGMENTATION_OPTIONS[self.segmentation]
        for name, value in self.segmentation_options.items():
            key = f"segmentation_options.{name} = {value:g}"
            if name not in allowed:
                raise ValueError(f"{key}: unknown to {self.segmentation}; allowed: {', '.join(allowed) or 'none'}")
            low, high = allowed[name]
            if not low <= value <= high:
                raise ValueError(f"{key}: write a number from {low:g} to {high:g}")
            if name in WHOLE_OPTIONS and not value.is_integer():
                raise ValueError(f"{key}: write a whole number")
        return self

    @property
    def most_samples(self) -> int:
        """Rows of one image at the most."""
        return self.max_samples if self.num_samples == "auto" else self.num_samples
