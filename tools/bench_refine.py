#!/usr/bin/env python3
"""Measure refinement: a guided step against a plain PGD-10 step, ours against bare torch, DeepSpeed against DDP.

  python tools/bench_refine.py [--json] [--parts step,ddp,scaling,parity,gpu] [--cifar10 DIR] [--robust-weights FILE]

step     a whole optimiser step of ResNet-18 (32x32, batch 64, PGD-10): guided (masking, penalty, attack), guided with
         the penalty in every 4th step, PGD-10 alone by the same code, and by a hand-written torch loop
ddp      2 processes of one thread: the PGD-10 step by DeepSpeed (ZeRO 1) and by torch's DistributedDataParallel
scaling  images a second of 2 processes of one thread against 1 process of one thread, the same global batch
parity   PGD-20 robust accuracy of resnet4b (FILE) at 2/255 on 300 test images of CIFAR-10 (DIR), ours and the attack
         library's (pip install --no-deps torchattacks), three random starts each
gpu      on a GPU, images a second of a PGD-10 step in bfloat16 and channels_last, batch --gpu-batch, and the share of
         its time that its 11 forward and backward passes take by themselves

Ratios are medians over rounds in which every task has its turn, in a random order. With random images and labels, since
a step's cost does not depend on them. step, ddp and scaling take about 20 minutes on 2 cores.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from bench_lime import ResNet4b
from bench_parts import Figures, hardware, in_turns, ratio, run_parts
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from hpcguard.attacks import pgd, random_start
from hpcguard.cluster.heap import freed_memory_kept
from hpcguard.cluster.ranks import run_ranks, torch_rank
from hpcguard.config import DataConfig, ModelConfig, TrainingConfig
from hpcguard.data import load_images
from hpcguard.models import Normalized, build_model
from hpcguard.refinement.engine import make_engine, make_optimizer
from hpcguard.refinement.step import GuidedStep

PARTS = ("step", "ddp", "scaling", "parity", "gpu")
MEAN_COLOUR = torch.full((3,), 0.5)
UNGUIDED = {"masking": {"weight": 0}, "sensitivity": {"weight": 0}}
EPS, ATTACK_STEP = 8 / 255, 2 / 255
Task = Callable[[], object]


def training(arguments: argparse.Namespace, engine: str = "torch", **changes: Any) -> TrainingConfig:
    attack = {"method": "pgd", "eps": EPS, "steps": 10, "step_size": ATTACK_STEP}
    return TrainingConfig.model_validate(
        {"batch_size": arguments.batch, "attack": attack, "engine": engine, "processes": 1, **changes}
    )


def make_net() -> Normalized:
    torch.manual_seed(0)
    return build_model(ModelConfig(name="resnet18-cifar", mean=(0.5,), std=(0.25,)), 10, 3)


def make_batch(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, labels, flagged pixels (a fifth) and noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, 3, 32, 32, generator=generator)
    flagged = torch.rand(count, 1, 32, 32, generator=generator) < 0.2
    noise = torch.empty_like(x).uniform_(-1, 1, generator=generator)
    return x, torch.randint(0, 10, (count,), generator=generator), flagged, noise


# ------------------------------------------------------------------------------------------------------------ step
def part_step(arguments: argparse.Namespace) -> Figures:
    """One process, all threads. guided every 4th: a step with the penalty and three without, of those same rounds."""
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    batch = [each.to(device) for each in make_batch(arguments.batch)]

    def ours(weight: float, config: TrainingConfig) -> Task:
        return finished(engine_step(config, device, batch, weight))

    guided = training(arguments)
    tasks = {
        "pgd": ours(0.0, training(arguments, **UNGUIDED)),
        "bare": finished(bare_step(batch)),
        "guided": ours(1.0, guided),
        "without_penalty": ours(0.0, guided),
        "penalty_at_clean": ours(1.0, training(arguments, sensitivity={"at": "clean"})),
    }
    with nullcontext() if arguments.default_malloc else freed_memory_kept():  # as refine does; here for all tasks
        seconds = in_turns(tasks, arguments.rounds)
    for name, every in seconds.items():
        print(f"  {name:<18} {statistics.median(every):8.2f} s a step", flush=True)
    fourth = [(one + 3 * other) / 4 for one, other in zip(seconds["guided"], seconds["without_penalty"], strict=True)]
    return {
        "guided_vs_pgd_at": ratio(seconds["guided"], seconds["pgd"]),
        "guided_every4_vs_pgd_at": ratio(fourth, seconds["pgd"]),
        "guided_at_clean_vs_pgd_at": ratio(seconds["penalty_at_clean"], seconds["pgd"]),
        "pgd_at_vs_bare_torch": ratio(seconds["pgd"], seconds["bare"]),
        "pgd_step_s": statistics.median(seconds["pgd"]),
    }


def engine_step(config: TrainingConfig, device: torch.device, batch: Sequence[Tensor], weight: float) -> Task:
    engine = make_engine(GuidedStep(make_net(), config, MEAN_COLOUR).train(), config, device, 1)

    def step() -> None:
        engine.backward(engine(*batch, weight))
        engine.step()

    return step


def bare_step(batch: Sequence[Tensor]) -> Task:
    """PGD training as one writes it by hand."""
    x, y, _, noise = batch
    net = make_net().to(x.device)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9, weight_decay=5e-4, nesterov=True)

    def step() -> None:
        net.eval()
        attacked = (x + EPS * noise).clamp(0, 1)
        for _ in range(10):
            attacked.requires_grad_()
            gradient = torch.autograd.grad(functional.cross_entropy(net(attacked), y), attacked)[0]
            attacked = attacked.detach() + ATTACK_STEP * gradient.sign()
            attacked = attacked.clamp(x - EPS, x + EPS).clamp(0, 1)
        net.train()
        optimizer.zero_grad()
        functional.cross_entropy(net(attacked), y).backward()
        optimizer.step()

    return step


# ------------------------------------------------------------------------------------------------- ddp and scaling
def part_ddp(arguments: argparse.Namespace) -> Figures:
    """The same GuidedStep, batch and optimiser in both; each rank has half of the batch."""
    figures = in_ranks(2, "ddp", arguments)
    for name in ("deepspeed", "ddp"):
        print(f"  {name:<18} {statistics.median(figures[name]):8.2f} s a step", flush=True)
    return {"deepspeed_vs_ddp": ratio(figures["deepspeed"], figures["ddp"])}


def part_scaling(arguments: argparse.Namespace) -> Figures:
    """DeepSpeed in 1 and in 2 processes, in turns; both have the same global batch."""
    one, two = [], []
    for _ in range(arguments.rounds):
        one.append(statistics.median(in_ranks(1, "scaling", arguments)["deepspeed"]))
        two.append(statistics.median(in_ranks(2, "scaling", arguments)["deepspeed"]))
        print(f"  1 process {one[-1]:8.2f} s a step, 2 processes {two[-1]:8.2f} s", flush=True)
    return {"scaling_2": ratio(one, two), "images_per_second_2": arguments.batch / statistics.median(two)}


def in_ranks(processes: int, role: str, arguments: argparse.Namespace) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory(prefix="bench-refine-") as folder:
        out = Path(folder) / "seconds.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--as-rank", role, "--out", str(out)]
        command += ["--batch", str(arguments.batch), "--rounds", str(arguments.rounds)]
        if status := run_ranks(command, processes, 1):
            raise SystemExit(f"a rank of {role} ended with {status}")
        found: dict[str, list[float]] = json.loads(out.read_text())
        return found


def as_rank(role: str, out: Path, arguments: argparse.Namespace) -> None:
    """One rank's steps; the first writes what they took."""
    torch.set_num_threads(1)
    place, device = torch_rank(), torch.device("cpu")
    assert place is not None
    with tempfile.TemporaryDirectory() as folder:
        zero1 = Path(folder) / "zero1.json"
        zero1.write_text('{"zero_optimization": {"stage": 1}}')
        config = training(arguments, "deepspeed", **UNGUIDED, deepspeed=zero1)
        engine = make_engine(GuidedStep(make_net(), config, MEAN_COLOUR).train(), config, device, place.size)
        micro = arguments.batch // place.size
        batch = [each[place.rank * micro :][:micro] for each in make_batch(arguments.batch)]

        def deepspeed() -> None:
            engine.backward(engine(*batch, 0.0))
            engine.step()

        tasks: dict[str, Task] = {"deepspeed": deepspeed}
        if role == "ddp":
            tasks["ddp"] = ddp_step(config, batch)
        with freed_memory_kept():
            seconds = in_turns(tasks, arguments.rounds if role == "ddp" else 1)
        if place.rank == 0:
            out.write_text(json.dumps(seconds))
        engine.barrier()


def ddp_step(config: TrainingConfig, batch: list[Tensor]) -> Task:
    module = DistributedDataParallel(GuidedStep(make_net(), config, MEAN_COLOUR).train())
    optimizer = make_optimizer(module, config)

    def step() -> None:
        optimizer.zero_grad()
        module(*batch, 0.0).backward()
        optimizer.step()

    return step


# ---------------------------------------------------------------------------------------------------------- parity
def part_parity(arguments: argparse.Namespace) -> Figures:
    """PGD-20 with step eps / 4 from a random start, last image; mean of three starts."""
    if not (arguments.robust_weights.exists() and (arguments.cifar10 / "cifar-10-batches-py").is_dir()):
        print(f"  {arguments.robust_weights} or {arguments.cifar10} is not there")
        return {"attack_parity": None}
    try:
        import torchattacks
    except ImportError:
        print("  torchattacks is not installed (pip install --no-deps torchattacks)")
        return {"attack_parity": None}
    torch.set_num_threads(arguments.threads)
    state = torch.load(arguments.robust_weights, map_location="cpu", weights_only=True)
    net = ResNet4b()
    net.load_state_dict(state.get("state_dict", state))
    model = Normalized(net, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)).eval()
    test = load_images(DataConfig(name="cifar10", root=arguments.cifar10), "test")
    x, y = torch.from_numpy(test.images(test.ids[:300])), torch.from_numpy(test.labels_of(test.ids[:300]))
    eps = 2 / 255
    theirs = torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=20, random_start=True)
    own, other = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        noise = torch.empty_like(x).uniform_(-1, 1)
        own.append(robust(model, pgd(model, x, y, eps, 20, start=random_start(x, noise, eps)), y))
        other.append(robust(model, theirs(x, y), y))
    return {
        "pgd20_ours": statistics.mean(own),
        "pgd20_library": statistics.mean(other),
        "attack_parity": abs(statistics.mean(own) - statistics.mean(other)),
    }


def robust(model: nn.Module, attacked: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(attacked).argmax(1) == y).double().mean())


# ------------------------------------------------------------------------------------------------------------- gpu
def part_gpu(arguments: argparse.Namespace) -> Figures:
    """The step's passes alone: 10 with the gradient of the images, 1 with that of the weights."""
    names = ("bf16_images_per_second", "bf16_share_of_floor")
    if not torch.cuda.is_available():
        print("  no GPU here")
        return dict.fromkeys(names)
    device = torch.device("cuda")
    batch = [each.to(device) for each in make_batch(arguments.gpu_batch)]
    config = training(arguments, **UNGUIDED, precision="bfloat16")
    net = make_net().to(device, memory_format=torch.channels_last)
    x, y = batch[0].contiguous(memory_format=torch.channels_last), batch[1]

    def passes() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            net.eval()
            for _ in range(10):
                leaf = x.detach().requires_grad_()
                torch.autograd.grad(functional.cross_entropy(net(leaf).float(), y), leaf)
            net.train()
            loss = functional.cross_entropy(net(x).float(), y)
        net.zero_grad()
        loss.backward()

    tasks = {"step": finished(engine_step(config, device, batch, 0.0)), "floor": finished(passes)}
    seconds = in_turns(tasks, 10 * arguments.rounds)
    rate = arguments.gpu_batch / statistics.median(seconds["step"])
    return dict(zip(names, (rate, ratio(seconds["floor"], seconds["step"])), strict=True))


def finished(task: Task) -> Task:
    """The task, and waiting for the GPU to have done it."""

    def run() -> None:
        task()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


# ------------------------------------------------------------------------------------------------------------ main
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--default-malloc", action="store_true", help="part step without freed_memory_kept, to compare")
    parser.add_argument("--device", default="cpu", help="of part step: cpu or cuda")
    parser.add_argument("--gpu-batch", type=int, default=512)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of parts step and parity")
    parser.add_argument("--cifar10", type=Path, default=Path("data/cifar10"))
    parser.add_argument("--robust-weights", type=Path, default=Path("data/weights/resnet4b.pth"))
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_rank:
        as_rank(arguments.as_rank, arguments.out, arguments)
        return 0
    figures, load = run_parts({name: globals()[f"part_{name}"] for name in PARTS}, parser, arguments)
    if arguments.json:
        print(json.dumps({**figures, "hardware": hardware(), "torch": torch.__version__, "load": load}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
