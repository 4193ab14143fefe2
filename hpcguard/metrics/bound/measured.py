"""The smallest distortion that an attack finds: an upper bound of the true one."""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hpcguard.attacks.gradient import Norm
from hpcguard.metrics.bound.grades import Distortion, Group, allowed_changes, check_images
from hpcguard.metrics.bound.radius import diameter

HALVINGS = 7  # of the logarithm of the radius
SMALLEST = {"linf": 1e-4, "l2": 1e-3}
BELOW = 0.999  # of the nearest so far, where a target is tried first
PULLS = 14  # halvings of the way from an image to its adversarial


def measured(
    model: nn.Module, x: Tensor, y: Tensor, norm: Norm, flagged: Tensor | None = None, group: Group = "all",
    steps: int = 40, targets: int = 9, seed: int = 0, batch_size: int = 256, also: Sequence[Tensor] = (),
) -> Distortion:  # fmt: skip
    """Distances [B] to the nearest wrong image found: PGD on the margin, its radius bisected, and what it found pulled
    back towards the image. inf where nothing was found, 0 for images that are wrong already.

    targets: so many wrong classes, by descending logit, are then tried each at radii below what was found, from the
    image itself and not from a random start. also: images [B, C, H, W] that another attack found, such as FAB. All are
    checked here: in [0, 1], changed in the group's coordinates alone, wrong for the model in float64; the distance is
    in float64. Raises InputError for NaN or infinite pixels or logits.
    """
    check_images(model, x)
    search = _Search(model, x, y, norm, allowed_changes(x, flagged, group).to(x.device), batch_size)
    for found in (x, *also):
        search.take(found, torch.arange(len(x)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        order = torch.cat([model(part) for part in x.split(batch_size)]).scatter(1, y[:, None], -math.inf)
    ranked = order.argsort(1, descending=True)[:, : order.shape[1] - 1]
    for target in (None, *ranked[:, :targets].T):
        search.bisect(target, steps, generator)
        search.pull_back()
    return Distortion("measured", norm, group, search.nearest.numpy())


class _Search:
    """The nearest wrong image so far, of each image, and its distance."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, norm: Norm, where: Tensor, batch_size: int) -> None:
        self.model, self.x, self.y, self.norm, self.where = model, x, y, norm, where
        self.precise = copy.deepcopy(model).double().eval()
        self.batch_size = batch_size
        self.best = x.clone()
        self.nearest = torch.full((len(x),), math.inf, dtype=torch.float64)

    @torch.no_grad()
    def take(self, images: Tensor, rows: Tensor) -> Tensor:
        """Keep those of `images` of these rows that are wrong and nearer; which are wrong, bool [n]."""
        wrong, x = [], self.x[rows]
        for part, labels in zip(images.split(self.batch_size), self.y[rows].split(self.batch_size), strict=True):
            logits = self.precise(part.double())
            own = logits.gather(1, labels[:, None])
            wrong.append((logits.scatter(1, labels[:, None], -math.inf) >= own).any(1) & logits.isfinite().all(1))
        change = images.double() - x.double()
        legal = ((change == 0) | self.where[rows]) & (images >= 0) & (images <= 1)
        found = (torch.cat(wrong) & legal.flatten(1).all(1)).cpu()
        order = math.inf if self.norm == "linf" else 2
        distance = torch.linalg.vector_norm(change.flatten(1), order, dim=1).cpu()
        nearer = found & (distance < self.nearest[rows])
        self.nearest[rows[nearer]] = distance[nearer]
        self.best[rows[nearer]] = images[nearer.to(images.device)]
        return found

    def bisect(self, target: Tensor | None, steps: int, generator: torch.Generator) -> None:
        """Bisect the radius of PGD, each image its own.

        target: a class each [B]; None: whichever is nearest to the true one. Begins just below what was found so far
        and leaves an image there where nothing is found.
        """
        high = self.nearest.clamp(max=diameter(self.norm, self.x[0].numel()))
        floor = torch.full_like(high, SMALLEST[self.norm]) if target is None else high / 8
        low, radius = floor, high * BELOW
        active = self.nearest > 0
        for turn in range(1 + HALVINGS):
            rows = active.nonzero()[:, 0]
            found = torch.zeros_like(active)
            for part in rows.split(self.batch_size):
                found[part] = self.take(self._attack(part, target, radius[part], steps, generator), part)
            # Where the first radius is too small for a target, all smaller ones are.
            active = active & found if turn == 0 and target is not None else active
            high, low = torch.where(found, torch.minimum(radius, self.nearest), high), torch.where(found, low, radius)
            low = torch.minimum(low, high) if turn else floor
            radius = (low * high).sqrt()

    def pull_back(self) -> None:
        """Bisect along the line from the image to the nearest wrong one."""
        rows = (self.nearest.isfinite() & (self.nearest > 0)).nonzero()[:, 0]
        if not len(rows):
            return
        far, x = self.best[rows], self.x[rows]
        low, high = torch.zeros(len(rows)), torch.ones(len(rows))
        for _ in range(PULLS):
            middle = (low + high) / 2
            found = self.take((x + middle.to(x)[:, None, None, None] * (far - x)).clamp(0, 1), rows)
            high, low = torch.where(found, middle, high), torch.where(found, low, middle)

    def _attack(
        self, rows: Tensor, target: Tensor | None, radius: Tensor, steps: int, generator: torch.Generator
    ) -> Tensor:
        """PGD on the margin with a radius for each image, from a random start, or from the image for a target."""
        x, y, where, norm = self.x[rows], self.y[rows], self.where[rows], self.norm
        size = radius.to(x)[:, None, None, None]
        attacked = x
        if target is None:
            noise = torch.empty(x.shape).uniform_(-1, 1, generator=generator).to(x) * where
            attacked = (x + noise / 4 * (size if norm == "linf" else size / _length(noise))).clamp(0, 1)
        for step in range(steps):
            moved = attacked.detach().requires_grad_()
            with torch.enable_grad():
                gain = _gain(self.model(moved), y, None if target is None else target[rows])
                gradient = torch.autograd.grad(gain, moved)[0] * where
            # Long steps first, which reach the surface; short ones settle on it.
            direction = gradient.sign() if norm == "linf" else gradient / _length(gradient)
            change = attacked - x + 2 * size * (1 - step / steps) ** 2 * direction
            change = change.clamp(-size, size) if norm == "linf" else change * (size / _length(change)).clamp(max=1)
            attacked = (x + change).clamp(0, 1)
        return attacked


def _gain(logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    own = logits.gather(1, y[:, None])
    if target is None:
        return (logits.scatter(1, y[:, None], -math.inf).amax(1) - own[:, 0]).sum()
    return (logits.gather(1, target[:, None]) - own).sum()


def _length(values: Tensor) -> Tensor:
    return values.flatten(1).norm(dim=1).clamp_min(1e-20)[:, None, None, None]
