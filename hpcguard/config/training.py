"""How an arm is trained."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from hpcguard.config.objective import AttackConfig, MaskingConfig, SensitivityConfig
from hpcguard.config.section import Radius, Section, Share, Weight
from hpcguard.config.spurious import SpuriousConfig


class TrainingConfig(Section):
    PLACE = frozenset({"accumulation", "deepspeed", "processes", "threads", "keep", "checkpoint_minutes", "log_every"})
    epochs: int = Field(10, gt=0)
    """Passes over the training split."""
    max_steps: int | None = Field(None, gt=0)
    """Stop after so many optimiser steps; null: none."""
    batch_size: int = Field(128, gt=0)
    """Global batch: images in one optimiser step over all processes."""
    accumulation: int = Field(1, gt=0)
    """Split every process's share of the batch in so many micro-batches, to save memory."""
    learning_rate: float = Field(0.05, gt=0)
    """Peak learning rate of SGD with Nesterov momentum."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD."""
    weight_decay: Weight = 5e-4
    """Weight decay."""
    schedule: Literal["cosine", "one-cycle", "piecewise"] = "cosine"
    """How the learning rate falls after its warm-up: as a cosine to 0; one-cycle: rises and falls by cosines, as
    torch's OneCycleLR; piecewise: multiplied by factor at each of milestones."""
    warmup: Share = 0.1
    """Share of all steps over which the learning rate rises (one-cycle: 0.3 is usual)."""
    milestones: list[Share] = [0.5, 0.75]
    """piecewise: shares of all steps, ascending."""
    factor: float = Field(0.1, gt=0, le=1)
    """piecewise: what the learning rate is multiplied by at each milestone."""
    clip: float | None = Field(None, gt=0)
    """Largest norm of the whole gradient; null: none."""
    averaging: float = Field(0.0, ge=0, lt=1)
    """Decay of an exponential moving average of the weights, which is then what is validated and published, such as
    0.999; 0: off."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 computes convolutions and linear layers in it; weights, optimizer, images and attacks stay float32."""
    augment: Literal["none", "crop", "crop-flip"] = "none"
    """Random shifts by up to an eighth of the size, and horizontal flips; masks move with their images."""
    clean_weight: Weight = 0.0
    """Weight of the cross-entropy on clean images."""
    adversarial_weight: Weight = 1.0
    """Weight of the cross-entropy on attacked images."""
    attack: AttackConfig = AttackConfig()
    spurious: SpuriousConfig = SpuriousConfig()
    masking: MaskingConfig = MaskingConfig()
    sensitivity: SensitivityConfig = SensitivityConfig()
    start: Literal["baseline", "scratch"] = "baseline"
    """Where training starts: from the weights that were explained, or from a fresh initialisation."""
    choose: Literal["last", "best"] = "last"
    """Weights to publish: those of the last step, or of the epoch with the best robust accuracy on the validation split
    (data.validation), for adversarial training overfits. With last, those are kept beside them in best.safetensors."""
    validation_images: int = Field(256, gt=0)
    """So many images of the validation split are attacked after every epoch, at most."""
    validation_eps: Radius | None = None
    """Radius of that attack, in the training's norm if that is l2; null: that of an l2 training, else evaluation.eps.
    Weights depend on it, so set it where they are to be evaluated at several radii."""
    keep: int = Field(2, gt=0)
    """Checkpoints kept while training, besides that of the best epoch; the older serve where the newest is damaged."""
    checkpoint_minutes: float | None = Field(15.0, ge=0)
    """A checkpoint after so many minutes within an epoch too; null: only after epochs, and when told to stop."""
    log_every: int = Field(10, gt=0)
    """Steps between two lines of steps.jsonl."""
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """deepspeed, or plain torch in one process (the reference)."""
    deepspeed: Path | None = None
    """DeepSpeed JSON, for example configs/deepspeed/zero1.json; null: ZeRO 0, float32."""
    processes: int = Field(1, gt=0, le=1024)
    """Processes that refine starts here when no launcher (srun, torchrun, mpiexec, deepspeed) has started it."""
    threads: int = Field(1, gt=0, le=1024)
    """Torch threads of each training process on a CPU."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of initialisation, order, augmentation and attack noise."""

    @property
    def guided(self) -> bool:
        """Whether a loss term needs the store's flagged segments."""
        aimed = self.attacked and self.attack.where != "everywhere"
        return self.masking.weight > 0 or self.sensitivity.weight > 0 or aimed

    @property
    def attacked(self) -> bool:
        return self.adversarial_weight > 0 and self.attack.method != "none"

    @property
    def noisy(self) -> bool:
        """Whether a step needs random numbers for each pixel: a random start, or noise as fill."""
        starts = self.attacked and self.attack.method in ("pgd", "trades")
        return starts or (self.masking.weight > 0 and self.masking.fill == "noise")

    @model_validator(mode="after")
    def _some_loss_remains(self) -> "TrainingConfig":
        if not (self.clean_weight or self.attacked or self.masking.weight):
            raise ValueError("no loss is left: set clean_weight, masking.weight, or adversarial_weight with an attack")
        if self.attacked and self.attack.method == "trades" and not self.clean_weight:
            raise ValueError("clean_weight = 0: TRADES alone is best at one answer for all; set clean_weight to 1")
        if self.masking.weight and self.masking.of == "attacked" and not self.attacked:
            raise ValueError("masking.of = attacked: nothing is attacked; set adversarial_weight and attack.method")
        if self.engine == "torch" and self.processes > 1:
            raise ValueError(f"processes = {self.processes}: engine torch runs in one process; use engine: deepspeed")
        if sorted(self.milestones) != self.milestones:
            raise ValueError(f"milestones = {self.milestones}: write them in ascending order")
        return self


class BaselineConfig(TrainingConfig):
    """Training of the model to be explained: plain clean training unless asked otherwise."""

    clean_weight: Weight = 1.0
    """Weight of the cross-entropy on clean images."""
    adversarial_weight: Weight = 0.0
    """Weight of the cross-entropy on attacked images."""
    masking: MaskingConfig = MaskingConfig(weight=0)
    sensitivity: SensitivityConfig = SensitivityConfig(weight=0)
    start: Literal["scratch"] = "scratch"
    """A baseline starts from a fresh initialisation."""

    @model_validator(mode="after")
    def _nothing_is_explained_yet(self) -> "BaselineConfig":
        if self.guided:
            raise ValueError("masking.weight and sensitivity.weight must be 0: nothing is explained yet")
        return self
