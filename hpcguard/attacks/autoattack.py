"""AutoAttack (Croce & Hein 2020) through the maintained library pyautoattack."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hpcguard.attacks.gradient import Norm
from hpcguard.errors import InputError

LISTS: dict[str, list[str]] = {
    "standard": ["apgd-ce", "apgd-t", "fab-t", "square"],
    "rand": ["apgd-ce", "apgd-dlr"],
    "fast": ["apgd-ce", "apgd-t"],
    "untargeted": ["apgd-ce", "fab", "square"],
}
NEEDS = {"apgd-t": 4, "apgd-dlr": 3}  # classes, for the DLR losses
QUERIES = 5000  # of Square, as published
SLACK = 1e-5  # relative, of a distance in float32


def attacks_of(version: str | Sequence[str]) -> list[str]:
    """The attacks of a version, or of a list of them."""
    return LISTS[version] if isinstance(version, str) else list(version)


def check_classes(version: str | Sequence[str], classes: int) -> None:
    """Raises InputError if AutoAttack's version, or an attack of a list, needs more classes."""
    if version == "none":
        return
    needed = max(NEEDS.get(attack, 2) for attack in attacks_of(version))
    if classes < needed:
        raise InputError(
            f"evaluation.autoattack = {name_of(version)}: needs {needed} classes, there are {classes}; use untargeted"
        )


def name_of(version: str | Sequence[str]) -> str:
    """standard, or apgd-ce+square of a list."""
    return version if isinstance(version, str) else "+".join(version)


def autoattack(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, version: str | Sequence[str], seed: int, batch_size: int,
    norm: Norm = "linf", queries: int = QUERIES,
) -> Tensor:  # fmt: skip
    """Which images stay right under AutoAttack in the ball, bool [B]; `model` gives logits for x in [0, 1].

    version: one of LISTS (standard is what is published; rand is for randomised models), or a list of attacks, each as
    in the standard version. queries: of Square, an image. An image whose ball holds a point with a NaN or infinite
    logit, as far as an attack comes upon it, is not right: the library's own bookkeeping takes a NaN for the largest
    logit.
    Raises InputError for a version that needs more classes.
    """
    import pyautoattack  # brings a second of imports that only evaluation needs

    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    check_classes(version, classes)
    as_it_is = isinstance(version, str) and version in ("standard", "rand")
    chosen = {"version": version} if as_it_is else {"version": "custom", "attacks": attacks_of(version)}
    watched = _Watched(model, x, eps, norm)
    library_norm = {"linf": "Linf", "l2": "L2"}[norm]
    attacker = pyautoattack.AutoAttack(watched, norm=library_norm, eps=eps, seed=seed, device=x.device, **chosen)
    for targeted in (attacker.apgd_targeted, attacker.fab):  # with few classes there are fewer targets than 9
        targeted.n_target_classes = min(9, classes - 1)
    if not as_it_is:  # as in the standard version
        attacker.apgd.n_restarts = attacker.fab.n_restarts = 1
    attacker.square.n_queries = queries
    _, predicted = attacker.run_standard_evaluation(x, y, batch_size=batch_size)
    return (predicted == y) & ~watched.broken


class _Watched(nn.Module):
    """The model as it is, that notes whose ball a point lies in that it has no finite answer to."""

    def __init__(self, model: nn.Module, x: Tensor, eps: float, norm: Norm) -> None:
        super().__init__()
        self.model, self.x, self.eps, self.order = model, x, eps, {"linf": torch.inf, "l2": 2}[norm]
        self.broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def forward(self, points: Tensor) -> Tensor:
        logits = self.model(points)
        # One number for all answers, as this is done some ten thousand times: it is finite if they are.
        if not math.isfinite(logits.detach().sum().item()):
            self._note(points.detach()[~logits.detach().isfinite().all(1)])
        return logits

    def _note(self, points: Tensor) -> None:
        for point in points:
            distance = torch.linalg.vector_norm((self.x - point).flatten(1), self.order, dim=1)
            self.broken |= distance <= self.eps * (1 + SLACK) + 1e-7
