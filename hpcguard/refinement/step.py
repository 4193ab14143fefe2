"""GuidedStep: one module whose forward is a whole training step and returns its loss.

One module called once as engine(...) is the pattern that is right on DeepSpeed's ZeRO 0, 1 and 2.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcguard.attacks import fgsm, pgd, random_start
from hpcguard.config import TrainingConfig
from hpcguard.models import Normalized
from hpcguard.refinement.losses import divergence, margin_gradient, sensitivity_penalty
from hpcguard.refinement.masking import hide
from hpcguard.refinement.second_order import piecewise_linear

TRADES_START = 0.001  # noise of TRADES' own start, where the divergence has no gradient yet


class GuidedStep(nn.Module):
    """Clean, attacked and masked losses and the sensitivity penalty, weighted as configured.

    With masking and sensitivity off it is standard, FGSM, PGD or TRADES training: the controls run this code too.
    `terms` holds the last step's unweighted terms as a detached tensor, in the order of TERMS.
    """

    TERMS = ("clean", "adversarial", "masked", "sensitivity")

    mean_colour: Tensor

    def __init__(self, model: Normalized, config: TrainingConfig, mean_colour: Tensor) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.terms = torch.zeros(len(self.TERMS))
        self.register_buffer("mean_colour", mean_colour.reshape(1, -1, 1, 1), persistent=False)

    def forward(
        self, x: Tensor, y: Tensor, pixels: Tensor, noise: Tensor, sensitivity_weight: float,
        fill: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Loss of a batch: x [B, C, H, W], y [B], flagged `pixels` [B, 1, H, W], `noise` in [-1, 1] like x, and `fill`
        like x, what flagged segments show where that is neither the mean colour nor noise."""
        if x.is_cuda and self.config.precision == "bfloat16":
            x = x.contiguous(memory_format=torch.channels_last)  # tensor cores' layout; convolutions keep their input's
        weights = (
            self.config.clean_weight,
            self.config.adversarial_weight if self.config.attacked else 0.0,
            self.config.masking.weight,
            sensitivity_weight,
        )
        terms = [x.new_zeros(()) for _ in weights]
        start, first = self._start(x, pixels, noise), None
        if weights[3]:
            terms[3], first = self._penalty(x, y, pixels, start)
        inputs = {"clean": x} if self._needs_clean() else {}
        if weights[1]:
            inputs["adversarial"] = self._attack(x, y, pixels, start, first)
        if weights[2]:
            whole = inputs["adversarial"] if self.config.masking.of == "attacked" else x
            inputs["masked"] = hide(whole, pixels, self._fill(noise, fill))
        if inputs:
            outputs = self.model(torch.cat(list(inputs.values()))).float().split(len(x))
            terms[:3] = self._losses(dict(zip(inputs, outputs, strict=True)), y, terms)
        self.terms = torch.stack([term.detach() for term in terms])
        return torch.stack([weight * term for weight, term in zip(weights, terms, strict=True) if weight]).sum()

    def _needs_clean(self) -> bool:
        compared = self.config.masking.weight and self.config.masking.loss == "consistency"
        return bool(self.config.clean_weight or compared or (self.config.attacked and self._trades))

    @property
    def _trades(self) -> bool:
        return self.config.attack.method == "trades"

    @property
    def _shares_start(self) -> bool:
        """Whether the penalty is taken where the attack begins, so that its gradient is the attack's first."""
        return self.config.attacked and self.config.attack.method == "pgd" and self.config.sensitivity.at == "start"

    def _losses(self, logits: dict[str, Tensor], y: Tensor, terms: list[Tensor]) -> list[Tensor]:
        """Clean, adversarial and masked term of the logits that there are."""
        clean, adversarial, masked = terms[:3]
        if "clean" in logits:
            clean = functional.cross_entropy(logits["clean"], y)
        if "adversarial" in logits and self._trades:
            adversarial = divergence(logits["clean"], logits["adversarial"])
        elif "adversarial" in logits:
            adversarial = functional.cross_entropy(logits["adversarial"], y)
        if "masked" in logits and self.config.masking.loss == "consistency":
            masked = divergence(logits["clean"], logits["masked"])
        elif "masked" in logits:
            masked = functional.cross_entropy(logits["masked"], y)
        return [clean, adversarial, masked]

    def _penalty(self, x: Tensor, y: Tensor, pixels: Tensor, start: Tensor) -> tuple[Tensor, Tensor | None]:
        """The sensitivity term, and the attack's first gradient where it is one.

        In eval mode, where an image's gradient is its own and not also that of its batch's statistics, and in float32.
        """
        leaf = (start if self._shares_start else x).detach().requires_grad_()
        with _evaluating(self.model), torch.autocast(x.device.type, enabled=False):
            with piecewise_linear():
                logits = self.model(leaf)
            gradient = margin_gradient(logits, leaf, y)
        # The cross-entropy rises where the margin falls.
        return sensitivity_penalty(gradient, pixels), -gradient.detach() if self._shares_start else None

    def _start(self, x: Tensor, pixels: Tensor, noise: Tensor) -> Tensor:
        """Where the attack begins."""
        attack = self.config.attack
        if attack.method in ("none", "fgsm"):
            return x
        where = self._where(pixels)
        if self._trades:
            return (x + TRADES_START * (noise if where is None else noise * where)).clamp(0, 1)
        return random_start(x, noise, attack.eps, attack.norm, where)

    def _attack(self, x: Tensor, y: Tensor, pixels: Tensor, start: Tensor, first: Tensor | None) -> Tensor:
        attack, where = self.config.attack, self._where(pixels)
        with _evaluating(self.model):  # crafting in training mode would move the batch statistics once a step
            if attack.method == "fgsm":
                return fgsm(self.model, x, y, attack.eps, attack.norm, where).detach()
            loss = self._divergence_from(x) if self._trades else None
            return pgd(
                self.model, x, y, attack.eps, attack.steps, attack.step_size, start, attack.norm, where, loss, first
            ).detach()

    def _divergence_from(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """What TRADES' attack ascends."""
        with torch.no_grad():
            clean = self.model(x).float()
        return lambda logits: len(x) * divergence(clean, logits.float())

    def _where(self, pixels: Tensor) -> Tensor | None:
        return {"everywhere": None, "flagged": pixels, "unflagged": ~pixels}[self.config.attack.where]

    def _fill(self, noise: Tensor, given: Tensor | None) -> Tensor:
        kind = self.config.masking.fill
        if kind == "mean":
            return self.mean_colour
        if kind == "noise":
            return (noise + 1) / 2
        if given is None:
            raise ValueError(f"masking.fill = {kind}: forward needs it as `fill`")
        return given


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
