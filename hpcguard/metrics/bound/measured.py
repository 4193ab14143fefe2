"""The smallest distortion that an attack finds: an upper bound of the true one."""

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from hpcguard.attacks.gradient import Norm, pgd, random_start
from hpcguard.metrics.bound.grades import Distortion, Group, allowed_changes, check_images
from hpcguard.metrics.bound.radius import diameter

RADII = 127  # 7 halvings
SMALLEST = {"linf": 1e-4, "l2": 1e-3}
HALVINGS = 14  # on the way from an image to its adversarial


def measured(
    model: nn.Module, x: Tensor, y: Tensor, norm: Norm, flagged: Tensor | None = None, group: Group = "all",
    steps: int = 40, seed: int = 0, batch_size: int = 256, also: Sequence[Tensor] = (),
) -> Distortion:  # fmt: skip
    """Distances [B] to the nearest wrong image found: PGD on the margin, its radius bisected, and what it found pulled
    back towards the image. inf where nothing was found, 0 for images that are wrong already.

    also: images [B, C, H, W] that another attack found, such as FAB. All are checked here: in [0, 1], changed in the
    group's coordinates alone, wrong for the model in float64; the distance is in float64. Raises InputError for NaN or
    infinite pixels or logits.
    """
    check_images(model, x)
    search = _Search(model, x, y, norm, allowed_changes(x, flagged, group).to(x.device), batch_size)
    for found in (x, *also):
        search.take(found, torch.arange(len(x)))
    search.bisect(steps, seed)
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

    def bisect(self, steps: int, seed: int) -> None:
        """Bisect over a common grid of radii, so that images at the same radius are attacked together."""
        radii = np.geomspace(SMALLEST[self.norm], diameter(self.norm, self.x[0].numel()), RADII)
        low, high = torch.full((len(self.x),), -1), torch.full((len(self.x),), RADII)
        for _ in range(RADII.bit_length()):
            middle = (low + high) // 2
            active = (high - low > 1) & (self.nearest > 0)
            for index in middle[active].unique().tolist():
                for rows in (active & (middle == index)).nonzero()[:, 0].split(self.batch_size):
                    found = self.take(self._attack(rows, float(radii[index]), steps, seed), rows)
                    high[rows[found]] = index
                    low[rows[~found]] = index

    def pull_back(self) -> None:
        """Bisect along the line from the image to the nearest wrong one."""
        rows = (self.nearest.isfinite() & (self.nearest > 0)).nonzero()[:, 0]
        if not len(rows):
            return
        far, x = self.best[rows], self.x[rows]
        low, high = torch.zeros(len(rows)), torch.ones(len(rows))
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            found = self.take((x + middle.to(x)[:, None, None, None] * (far - x)).clamp(0, 1), rows)
            high, low = torch.where(found, middle, high), torch.where(found, low, middle)

    def _attack(self, rows: Tensor, radius: float, steps: int, seed: int) -> Tensor:
        x, y, where = self.x[rows], self.y[rows], self.where[rows]
        noise = torch.empty(x.shape).uniform_(-1, 1, generator=torch.Generator().manual_seed(seed)).to(x)
        start = random_start(x, noise, radius / 4, self.norm, where)

        def margin(logits: Tensor) -> Tensor:
            others = logits.scatter(1, y[:, None], -math.inf).amax(1)
            return (others - logits.gather(1, y[:, None])[:, 0]).sum()

        return pgd(
            self.model, x, y, radius, steps, step_size=2.5 * radius / steps, start=start, norm=self.norm, where=where,
            loss=margin,
        )  # fmt: skip
