"""Configuration: one pydantic model a section, read from YAML with dotted overrides.

Every key's meaning stands under its field; `--help` of a stage prints it from there.
"""

import difflib
import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from hpcguard.errors import InputError

RECORDED = "recorded"  # what a run folder's config.yaml holds beside the configuration: digests, code revision


def parse_fraction(value: object) -> object:
    """Accept '8/255' beside 0.0314."""
    if isinstance(value, str) and "/" in value:
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError("write a number or a fraction such as 8/255") from error
    return value


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


Share = Annotated[float, Field(ge=0, le=1)]
Epsilon = Annotated[float, BeforeValidator(parse_fraction), Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )

    PLACE: ClassVar[frozenset[str]] = frozenset()
    """Keys that say where something lies or how fast it runs; results do not depend on them."""

    def identity(self) -> dict[str, Any]:
        """What results depend on: every key but PLACE, as JSON values."""
        return self.model_dump(mode="json", exclude=set(self.PLACE))


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


OWN_OPTIONS = frozenset(
    """array begin chdir comment dependency error export export-file get-user-env input job-name kill-on-invalid-dep
    no-requeue open-mode output parsable quiet requeue signal test-only wait wrap clusters""".split()  # noqa: SIM905
)
"""sbatch options that hpcguard sets itself, or relies on."""
OWN_KEYS = {
    "time": "minutes", "mem": "memory_gb", "nodes": "nodes", "ntasks": "tasks_per_node",
    "ntasks-per-node": "tasks_per_node", "cpus-per-task": "cpus_per_task", "gpus-per-node": "gpus_per_node",
}  # fmt: skip
"""sbatch options that have keys of their own."""


def check_plain(value: str) -> str:
    """No control characters: a line break would start another line of an sbatch script."""
    if not value or not value.isprintable():
        raise ValueError(f"{value!r}: write printable characters in one line")
    return value


def check_option(name: str) -> str:
    if not re.fullmatch("[a-z][a-z-]*", name):
        raise ValueError(f"{name!r}: write the long name of an sbatch option without --, such as mem-per-cpu")
    if name in OWN_KEYS:
        raise ValueError(f"{name}: use {OWN_KEYS[name]} of the kind of job instead")
    if name in OWN_OPTIONS:
        raise ValueError(f"{name}: hpcguard sets it itself; leave it out")
    return name


def check_variable(name: str) -> str:
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"{name!r}: write the name of an environment variable")
    if name.startswith(("SLURM", "SBATCH", "SRUN", "SUBMITIT")) or name == "CUDA_VISIBLE_DEVICES":
        raise ValueError(f"{name}: Slurm sets it for each job; leave it out")
    return name


Plain = Annotated[str, AfterValidator(check_plain)]
Options = dict[Annotated[str, AfterValidator(check_option)], bool | int | float | Plain]


class JobConfig(Section):
    """What one kind of job asks for."""

    nodes: int = Field(1, gt=0)
    """Nodes of the job; an array task of attribution has one."""
    tasks_per_node: int = Field(1, gt=0)
    """Processes on each node, started by srun (refine: one a GPU); attribution has one, with a worker a GPU."""
    cpus_per_task: int | None = Field(None, gt=0)
    """CPU cores of each process; null: the cluster's default."""
    gpus_per_node: int = Field(0, ge=0)
    """GPUs on each node; 0: none are asked for."""
    memory_gb: float | None = Field(None, gt=0)
    """Memory on each node in GiB; null: the cluster's default."""
    minutes: int = Field(60, gt=0)
    """Time limit. Attribution that reaches it is requeued and goes on where it was."""
    options: Options = {}
    """Any other sbatch options of this kind of job by their long names, such as {exclusive: true}."""


class SlurmConfig(Section):
    """How jobs are submitted (cluster.executor = slurm)."""

    partition: Plain | None = None
    """sbatch --partition; null: the cluster's default."""
    account: Plain | None = None
    """sbatch --account."""
    qos: Plain | None = None
    """sbatch --qos."""
    constraint: Plain | None = None
    """sbatch --constraint, such as a100."""
    options: Options = {}
    """Any other sbatch options of all jobs by their long names, such as {reservation: week, mail-user: me@lab}."""
    modules: list[Plain] = []
    """Environment modules that a job loads first."""
    source: Path | None = None
    """A shell file that a job sources next, such as a virtual environment's bin/activate."""
    python: list[Plain] = []
    """Command of the Python that jobs run, word by word, such as [apptainer, exec, --nv, image.sif, python]; empty: the
    one that submits."""
    srun: list[Plain] = []
    """More arguments of srun, such as [--container-image=lab/image]."""
    export: list[Annotated[str, AfterValidator(check_variable)]] = []
    """Names of further environment variables that jobs inherit; no others go with them but PATH and the like."""
    shards_per_task: int | None = Field(None, gt=0)
    """Shards that an array task works through; null: one for each of its workers. More where the cluster's limits on
    jobs ask for it."""
    tasks_at_once: int = Field(64, gt=0)
    """Array tasks that run at once at the most, over all arrays of a submission."""
    signal_seconds: int = Field(90, ge=1)
    """A task is told so long before its time limit, finishes its unit of images and is requeued."""
    rounds: int = Field(3, ge=0)
    """Times that missing shards are submitted again by themselves before a person must (`hpcguard retry`)."""
    max_memory_gb: float | None = Field(None, gt=0)
    """Shards that ran out of memory are submitted again with twice as much, up to this; null: four times memory_gb."""
    then: list[Literal["refine", "evaluate", "report"]] = []
    """Stages submitted with attribution to follow its consolidation, such as [refine, evaluate, report]."""
    next: Path | None = None
    """Configuration of the next round, attributed when the last of those stages has ended well."""
    attribute: JobConfig = JobConfig()
    """An array task of attribution."""
    consolidate: JobConfig = JobConfig()
    """The job after the arrays: verifies, submits again what may be, consolidates."""
    refine: JobConfig = JobConfig(minutes=24 * 60)
    """Training."""
    evaluate: JobConfig = JobConfig(minutes=24 * 60)
    """Evaluation and report."""

    @model_validator(mode="after")
    def _one_node_for_arrays(self) -> "SlurmConfig":
        for kind in ("attribute", "consolidate", "evaluate"):
            job: JobConfig = getattr(self, kind)
            if job.nodes * job.tasks_per_node > 1:
                raise ValueError(f"{kind}: runs in one process on one node; leave nodes and tasks_per_node at 1")
        return self


class ClusterConfig(Section):
    executor: Literal["local", "slurm"] = "local"
    """Where attribution runs: local is a bounded pool of worker processes on this machine; slurm submits array jobs,
    which cluster.slurm describes, and returns at once."""
    workers: int = Field(2, gt=0, le=1024)
    """Worker processes at once (at most one a shard), locally; an array task has one a GPU, or by cpus_per_task."""
    shards: int = Field(4, gt=0, le=100_000)
    """Shards to plan. The stored values do not depend on it."""
    threads: int = Field(1, gt=0, le=1024)
    """Torch threads of each worker process."""
    segmenters: Literal["auto"] | Annotated[int, Field(ge=0, le=256)] = "auto"
    """Processes of each worker that segment coming images while it explains; 0: the worker does it itself, in between.
    auto: up to 4 of the worker's share of the cores where the model runs on a GPU and segmentation does not, else 0.
    The stored values do not depend on it."""
    mpi_ranks: int = Field(1, gt=0, le=1024)
    """Ranks that consolidate starts when it is not already under mpiexec or srun."""
    attempts: int = Field(2, gt=0)
    """Times that a shard is tried at once when its worker process dies."""
    equal_errors: int = Field(3, gt=0)
    """Attribution stops when so many shards failed with the same error: the rest would too."""
    quarantine: Share = 0.01
    """Largest share of the images that may be left out because they cannot be read or explained."""
    images_per_second: float | None = Field(None, gt=0)
    """Rate of one worker, for --dry-run on a machine unlike those of the jobs; null: measured on two images."""
    slurm: SlurmConfig = SlurmConfig()
    """How jobs are submitted."""

    @property
    def workers_of_a_task(self) -> int:
        """Workers of an array task: one a GPU, else by its cores."""
        asked = self.slurm.attribute
        return asked.gpus_per_node or max(1, (asked.cpus_per_task or 1) // self.threads)


class AttackConfig(Section):
    method: Literal["none", "fgsm", "pgd"] = "pgd"
    """Attack that makes the training examples, Linf in [0,1] pixel space."""
    eps: Epsilon = 8 / 255
    """Radius, as a number or a fraction such as 8/255."""
    steps: int = Field(10, gt=0)
    """Steps of PGD."""
    step_size: Epsilon | None = None
    """Step of PGD; null: eps / 4 (FGSM always steps by eps)."""


class SpuriousConfig(Section):
    rule: Literal["misleading", "weight", "random"] = "misleading"
    """misleading: supports the strongest wrong class more than the true one; weight: large |coefficient| (the paper's
    tau); random: as many random segments as misleading flags, the control."""
    share: Share = 0.2
    """Largest share of an image's segments that is flagged."""
    z: float = Field(1.0, ge=0)
    """misleading flags only what lies so many standard errors above zero."""
    max_empty: Share = 0.9
    """Refuse to train when a larger share of images has no flagged segment, or has all segments flagged."""


class MaskingConfig(Section):
    weight: Weight = 0.5
    """Weight of the cross-entropy on images whose flagged segments are hidden; 0: off."""
    fill: Literal["mean", "noise"] = "mean"
    """What flagged segments show: the training set's mean colour, or uniform noise."""


class SensitivityConfig(Section):
    weight: Weight = 1.0
    """Weight of the squared input gradient of the true-class margin over flagged segments; 0: off."""
    every: int = Field(1, gt=0)
    """Apply it in every k-th step, with k times the weight."""


class TrainingConfig(Section):
    PLACE = frozenset({"deepspeed", "processes", "threads"})
    epochs: int = Field(10, gt=0)
    """Passes over the training split."""
    max_steps: int | None = Field(None, gt=0)
    """Stop after so many optimiser steps; null: none."""
    batch_size: int = Field(128, gt=0)
    """Global batch: images in one optimiser step over all processes."""
    accumulation: int = Field(1, gt=0)
    """Split every process's share of the batch in so many micro-batches."""
    learning_rate: float = Field(0.05, gt=0)
    """Peak learning rate of SGD with Nesterov momentum."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD."""
    weight_decay: Weight = 5e-4
    """Weight decay."""
    warmup: Share = 0.1
    """Share of all steps over which the learning rate rises; then it falls as a cosine to 0."""
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
        return self.masking.weight > 0 or self.sensitivity.weight > 0

    @property
    def attacked(self) -> bool:
        return self.adversarial_weight > 0 and self.attack.method != "none"

    @model_validator(mode="after")
    def _some_loss_remains(self) -> "TrainingConfig":
        if not (self.clean_weight or self.attacked or self.masking.weight):
            raise ValueError("no loss is left: set clean_weight, masking.weight, or adversarial_weight with an attack")
        if self.engine == "torch" and self.processes > 1:
            raise ValueError(f"processes = {self.processes}: engine torch runs in one process; use engine: deepspeed")
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


class EvaluationConfig(Section):
    PLACE = frozenset({"workers", "threads"})
    images: int | None = Field(None, gt=0)
    """Test images, drawn by data.seed; null: all."""
    eps: Epsilon = 8 / 255
    """Linf radius of every attack, as a number or a fraction such as 8/255."""
    pgd_steps: int = Field(20, gt=0)
    """Steps of PGD."""
    pgd_restarts: int = Field(1, gt=0)
    """Random restarts of PGD; an image counts as robust if it survives all."""
    autoattack: Literal["standard", "rand", "fast", "untargeted", "none"] = "standard"
    """AutoAttack's version (pyautoattack). Named so in the results: fast is its apgd-ce and apgd-t alone, untargeted
    its apgd-ce, fab and square, for fewer than 4 classes."""
    batch_size: int = Field(256, gt=0, le=1_000_000)
    """Images in one forward pass."""
    explained: int = Field(8, ge=0)
    """Test images explained with every model, for the report's pictures."""
    workers: int = Field(1, gt=0, le=1024)
    """Models evaluated at once, each in a process of its own."""
    threads: int = Field(1, gt=0, le=1024)
    """Torch threads of each worker process."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the attacks."""


class Config(Section):
    run: Path = Path("runs/default")
    """The run folder: everything that the stages write."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    attribution: LimeConfig = LimeConfig()
    cluster: ClusterConfig = ClusterConfig()
    baseline: BaselineConfig | None = None
    """How refine --arm baseline trains the model to be explained, from scratch, when model.weights is null."""
    refinement: TrainingConfig = TrainingConfig()
    """The guided arm."""
    controls: dict[str, dict[str, Any]] = {}
    """Other arms by name, each a set of changes to refinement, for example {pgd: {masking: {weight: 0}}}."""
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _arms_are_consistent(self) -> "Config":
        if self.baseline is not None and self.model.weights is not None:
            raise ValueError("baseline: model.weights is set too; keep one of them")
        for name in self.controls:
            if name in ("baseline", "guided") or not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(
                    f"controls.{name}: choose another name of letters, digits, - and _ (baseline and guided are taken)"
                )
            self.arm(name)
        return self

    def arms(self) -> list[str]:
        """Names of the arms that refine trains after attribution, controls first."""
        return [*self.controls, "guided"]

    def arm(self, name: str) -> TrainingConfig:
        """How one arm is trained: baseline, guided, or a control."""
        if name == "baseline" and self.baseline is not None:
            return self.baseline
        if name == "guided":
            return self.refinement
        if name not in self.controls:
            known = [*(["baseline"] if self.baseline is not None else []), *self.arms()]
            raise InputError(f"arm {name!r} is not in this configuration: one of {', '.join(known)}")
        merged = _merge(self.refinement.model_dump(), self.controls[name])
        try:
            return TrainingConfig.model_validate(merged)
        except ValidationError as error:
            raise InputError(_explain(error, TrainingConfig, f"controls.{name}")) from error


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def load_config(source: Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, or a run folder's config.yaml, and apply `section.key=value` overrides.

    Raises InputError with one line that names the key, the value and what is allowed.
    """
    path = source / "config.yaml" if source.is_dir() else source
    if not path.is_file():
        what = "holds no config.yaml, so it is no run folder" if source.is_dir() else "no such file"
        raise InputError(f"{source}: {what}; give a configuration such as configs/quickstart.yaml, or a run folder")
    merged = _read_yaml(path)
    merged.pop(RECORDED, None)
    if source.is_dir():
        merged["run"] = str(source)  # a run folder may have been moved, or be named from elsewhere
    for override in overrides or []:
        if "=" not in override.lstrip("="):
            raise InputError(f"{override!r} is no override: write section.key=value, for example data.size=32")
    try:
        combined = OmegaConf.merge(OmegaConf.create(merged), OmegaConf.from_dotlist(list(overrides or [])))
        values = OmegaConf.to_container(combined, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path} with {overrides or 'no overrides'}: {str(error).splitlines()[0]}") from error
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: {_explain(error, Config)}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise InputError(f"{path}: {where}not valid YAML ({getattr(error, 'problem', None) or error})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected sections such as 'data:' at the top level, found {type(values).__name__}")
    return values


def _explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """One line for a validation error: key, value, what is allowed."""
    details = error.errors(include_url=False)
    keys = [_keys(detail) for detail in details]
    same = [detail for detail, key in zip(details, keys, strict=True) if key == keys[0]]
    line = _explain_one(details[0], model, prefix)
    # One key that takes either of several types is one mistake, with several ways to mend it.
    line += "".join(f", or {detail['msg'][0].lower()}{detail['msg'][1:]}" for detail in same[1:])
    return line if len(same) == len(details) else f"{line} (and {len(details) - len(same)} more)"


def _keys(detail: ErrorDetails) -> list[str]:
    """Where a validation error lies, without the names that pydantic gives to the members of a union."""
    members = ("literal[", "float", "int", "constrained-")
    return [str(part) for part in detail["loc"] if not str(part).startswith(members)]


def _explain_one(detail: ErrorDetails, model: type[BaseModel], prefix: str) -> str:
    keys = _keys(detail)
    name = ".".join([*([prefix] if prefix else []), *keys])
    if detail["type"] == "extra_forbidden":
        allowed = list(_section(model, keys[:-1]).model_fields)
        close = difflib.get_close_matches(keys[-1], allowed, 1)
        guess = f"; did you mean {close[0]}?" if close else ""
        return f"unknown key {name} = {_short(detail['input'])}{guess} Allowed: {', '.join(allowed)}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "model_type":
        message = f"expected the keys {', '.join(_section(model, keys).model_fields)}"
    if detail["type"] == "value_error":
        return f"{name}: {message}" if name else message
    return f"{name} = {_short(detail['input'])}: {message[0].lower()}{message[1:]}"


def _section(model: type[BaseModel], keys: list[str]) -> type[BaseModel]:
    for key in keys:
        field = model.model_fields.get(key)
        nested = [t for t in _flatten(field.annotation) if _is_section(t)] if field else []
        if nested:
            model = nested[0]
    return model


def _flatten(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__args__", None) or (annotation,)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _show_default(value: Any) -> str:
    if isinstance(value, float) and 0 < value < 1 and (255 * value).is_integer():
        return f"{255 * value:.0f}/255"
    return "null" if value is None else str(value)


def describe_keys(
    model: type[BaseModel] = Config,
    prefix: str = "",
    sections: tuple[str, ...] = (),
    defaults: BaseModel | None = None,
) -> list[tuple[str, str, str]]:
    """(key, default, meaning) of every key, for --help; `sections` keeps only those top-level sections."""
    rows: list[tuple[str, str, str]] = []
    for key, field in model.model_fields.items():
        if sections and not prefix and key not in sections:
            continue
        default = getattr(defaults, key) if defaults else field.default
        nested = [kind for kind in _flatten(field.annotation) if _is_section(kind)]
        if nested:
            own = default if isinstance(default, BaseModel) else None
            rows += describe_keys(nested[0], f"{prefix}{key}.", defaults=own)
        else:
            rows.append((prefix + key, _show_default(default), field.description or ""))
    return rows
