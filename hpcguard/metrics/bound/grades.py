"""A distortion carries its grade; grades are compared, never mixed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from hpcguard.attacks.gradient import Norm
from hpcguard.errors import InputError

Grade = Literal["estimated", "certified", "measured"]
Group = Literal["all", "flagged", "unflagged"]


class UnsoundBoundError(RuntimeError):
    """A certified distortion above one that an attack found: one of the two is computed wrongly."""


@dataclass(frozen=True)
class Split:
    """Lipschitz constants of one image's margins within `radius`, for changes of flagged coordinates and of the rest.

    margins, flagged, rest: float64 [K - 1], of the margins over each wrong class.
    """

    norm: Norm
    margins: np.ndarray
    radius: float
    flagged: np.ndarray
    rest: np.ndarray

    def budget_of_rest(self, budget: float) -> float:
        """How far the rest may be changed while flagged coordinates are by at most `budget`, each in the norm alone.

        |delta_S| L_S + |delta_R| L_R < margin keeps the answer, where both together stay within the radius. 0 if the
        budget alone is too much.
        """
        left = self.margins - budget * self.flagged
        if budget > self.radius or left.min() < 0:
            return 0.0
        room = self.radius if self.norm == "linf" else float(np.sqrt(self.radius**2 - budget**2))
        ratios = np.divide(left, self.rest, out=np.full(len(left), np.inf), where=self.rest > 0)
        return float(min(ratios.min(), room))


@dataclass(frozen=True)
class Distortion:
    """Of each image the distance at which the answer changes, or a bound of it: float64 [B], pixels in [0, 1].

    group: the coordinates that may change. splits: of certified ones, None for images that are wrong already.
    """

    grade: Grade
    norm: Norm
    group: Group
    values: np.ndarray
    splits: list[Split | None] = field(default_factory=list)


def assert_sound(certified: Distortion, measured: Distortion, ids: Sequence[int] | np.ndarray) -> None:
    """Raises UnsoundBoundError, naming the images by their id, unless certified <= measured for each of them."""
    if (certified.grade, measured.grade) != ("certified", "measured"):
        raise ValueError(f"expected grades certified and measured, got {certified.grade} and {measured.grade}")
    if (certified.norm, certified.group) != (measured.norm, measured.group):
        raise ValueError(f"expected the same norm and group, got {certified.norm} {certified.group} and "
                         f"{measured.norm} {measured.group}")  # fmt: skip
    bad = np.flatnonzero(~(certified.values <= measured.values))
    if len(bad):
        listed = "; ".join(
            f"image {ids[each]}: certified {certified.values[each]:.6g}, measured {measured.values[each]:.6g}"
            for each in bad[:5]
        )
        raise UnsoundBoundError(
            f"bound ({certified.norm}, {certified.group}): {len(bad)} of {len(ids)} certified distortions are above "
            f"what an attack found ({listed}); neither can be trusted, please report it with the model"
        )


def allowed_changes(x: Tensor, flagged: Tensor | None, group: Group) -> Tensor:
    """The coordinates that may change, bool of x's shape on the CPU. Raises InputError for a mask that does not fit."""
    if flagged is None:
        if group != "all":
            raise InputError(f"bound: group = {group} needs the flagged pixels; give flagged, or group = all")
        return torch.ones(x.shape, dtype=torch.bool)
    mask = flagged.detach().cpu()
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape not in (x.shape, (len(x), 1, *x.shape[2:])):
        raise InputError(
            f"bound: flagged is {mask.dtype} {list(mask.shape)}; expected bool {[len(x), 1, *x.shape[2:]]} or "
            f"{list(x.shape)}"
        )
    mask = mask.expand(x.shape)
    return {"all": torch.ones_like(mask), "flagged": mask, "unflagged": ~mask}[group]


@torch.no_grad()
def check_images(model: nn.Module, x: Tensor, batch_size: int = 256) -> None:
    """Raises InputError, naming the images by their place, for pixels or logits that are NaN or infinite."""
    finite = x.flatten(1).isfinite().all(1)
    if finite.all():
        finite = torch.cat([model(part).isfinite().all(1) for part in x.split(batch_size)])
    if not finite.all():
        bad = (~finite).nonzero()[:, 0].tolist()
        raise InputError(
            f"bound: pixels or logits of images {bad[:5]} of {len(x)} are NaN or infinite; check weights and data"
        )
