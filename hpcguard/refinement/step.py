"""GuidedStep: one module whose forward is a whole training step and returns its loss.

One module called once as engine(...) is the pattern that is right on DeepSpeed's ZeRO 0, 1 and 2.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcguard.attacks import fgsm, pgd
from hpcguard.config import TrainingConfig
from hpcguard.models import Normalized
from hpcguard.refinement.losses import sensitivity_penalty
from hpcguard.refinement.masking import hide


class GuidedStep(nn.Module):
    """Clean, attacked and masked cross-entropy and the sensitivity penalty, weighted as configured.

    With masking and sensitivity off it is standard or adversarial training: the controls run this code too.
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

    def forward(self, x: Tensor, y: Tensor, pixels: Tensor, noise: Tensor, sensitivity_weight: float) -> Tensor:
        """Loss of a batch: x [B, C, H, W], y [B], flagged `pixels` [B, 1, H, W], `noise` in [-1, 1] like x."""
        weights = (
            self.config.clean_weight,
            self.config.adversarial_weight if self.config.attacked else 0.0,
            self.config.masking.weight,
            sensitivity_weight,
        )
        penalised = sensitivity_weight > 0
        leaf = x.detach().requires_grad_(penalised)
        inputs = [leaf] if weights[0] or penalised else []
        if weights[1]:
            inputs.append(self._attack(x, y, noise))
        if weights[2]:
            inputs.append(hide(x, pixels, self._fill(noise)))
        outputs = list(self.model(torch.cat(inputs)).split(len(x)))
        terms = [x.new_zeros(()) for _ in weights]
        if weights[0] or penalised:
            clean = outputs.pop(0)
            terms[0] = functional.cross_entropy(clean, y)
            if penalised:
                terms[3] = sensitivity_penalty(clean, leaf, y, pixels)
        for index in (1, 2):
            if weights[index]:
                terms[index] = functional.cross_entropy(outputs.pop(0), y)
        self.terms = torch.stack([term.detach() for term in terms])
        return torch.stack([weight * term for weight, term in zip(weights, terms, strict=True) if weight]).sum()

    def _attack(self, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        attack = self.config.attack
        was_training = self.model.training
        self.model.eval()  # crafting in training mode would move the batch statistics once a step of the attack
        if attack.method == "fgsm":
            attacked = fgsm(self.model, x, y, attack.eps)
        else:
            attacked = pgd(self.model, x, y, attack.eps, attack.steps, attack.step_size, noise)
        self.model.train(was_training)
        return attacked.detach()

    def _fill(self, noise: Tensor) -> Tensor:
        return self.mean_colour if self.config.masking.fill == "mean" else (noise + 1) / 2
