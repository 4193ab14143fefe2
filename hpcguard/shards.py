"""Explain one shard of a plan: unit by unit, each kept as it is done, published when all are.

Whatever ends the process costs the unit that it was at. An image that cannot be read or explained is left out and
listed (quarantined); a unit that does not fit into memory is tried with smaller batches.
"""

import os
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from hpcguard.attribution import explain_batch, segment_sensitivity, true_and_runner_up
from hpcguard.attribution.ahead import Block, segmented_ahead
from hpcguard.attribution.segments import labels_fit_a_byte, segments_on_device
from hpcguard.cluster.devices import full_float32, pick_device
from hpcguard.cluster.failures import is_out_of_memory, read_failures
from hpcguard.cluster.local import Report, cores_of_a_worker
from hpcguard.cluster.plan import Plan
from hpcguard.config import Config
from hpcguard.data import ImageSet, load_images
from hpcguard.errors import InputError
from hpcguard.metrics.stability import noise_instability
from hpcguard.models import fastest_layout, for_inference, load_model
from hpcguard.runs import RunFolder, claimed, digest_file, read_json, remove_temporaries
from hpcguard.store import Journal, ShardWriter, Unit, read_journal, rows_from, shard_problem, unit_problem

SegmentedBlock = tuple[np.ndarray, np.ndarray, np.ndarray | None]
Predict = Callable[[torch.Tensor], torch.Tensor]

MOST_SEGMENTERS = 4  # of cluster.segmenters: auto
LOOK_AGAIN_S = 1.0  # at a shard that another process computes
READERS = 8
PAUSES_S = (1.0, 5.0)  # between attempts to read images
MOST_TRIED = 64  # images looked at for one that can be read


@dataclass(frozen=True)
class Classifier:
    """The model that is explained, on images in [0, 1] on its device."""

    probabilities: Predict  # of a copy made for inference, which may have no gradients
    logits: Predict  # of the model itself, differentiable with respect to the images


@dataclass
class ShardTask:
    """task(index, slot, report) of the local pool: explains shard `index` of a plan; made once a worker process."""

    config: Config
    plan: Plan
    workers: int  # that share this machine
    attempt: str  # names what this job does, see cluster.attempt.new_attempt
    _model: tuple[torch.device, Classifier] | None = field(default=None, init=False)

    @cached_property
    def folder(self) -> RunFolder:
        return RunFolder(self.config.run)

    @cached_property
    def images(self) -> ImageSet:
        return load_images(self.config.data, "train")

    def __call__(self, index: int, slot: int, report: Report) -> None:
        ids = self.plan.shard_ids(index, self.images.ids)
        while True:
            with claimed(self.folder.lock(index)) as ours:
                if not self._problem(index, ids):
                    if ours:
                        self._forget(index)  # whoever published it was ended before it could
                    report(len(self.plan.units(index, self.images.ids)))  # another process has done it meanwhile
                    return
                if ours:
                    self._compute(index, ids, slot, report)
                    return
            report(0)
            time.sleep(LOOK_AGAIN_S)

    def _problem(self, index: int, ids: np.ndarray) -> str | None:
        return shard_problem(
            self.folder.shard(index), self.folder.manifest(index), ids, self.plan.fingerprint, values=False
        )

    def _compute(self, index: int, ids: np.ndarray, slot: int, report: Report) -> None:
        units = self.plan.units(index, self.images.ids)
        done = self.finished_units(index)
        # The first report tells of what former attempts finished.
        report(len(done))
        journal = Journal(self.folder.journal(index, f"{self.attempt}-{uuid.uuid4().hex[:6]}"), self.plan.fingerprint)
        explainer = self._explainer(index, slot)
        missing = [number for number in range(len(units)) if number not in done]
        with closing(explainer.explain([units[number] for number in missing])) as explained:
            for number, unit in zip(missing, explained, strict=True):
                journal.append(number, unit)
                done[number] = unit
                report(1)
        self._publish(index, ids, [done[number] for number in range(len(units))])

    def finished_units(self, index: int) -> dict[int, Unit]:
        """What all attempts at a shard have finished."""
        found: dict[int, Unit] = {}
        for path in self.folder.journals(index):
            found |= read_journal(path, self.plan.fingerprint)
        # Where nothing could be read, look again: the disk may be back.
        return {number: unit for number, unit in found.items() if unit.rows}

    def _publish(self, index: int, ids: np.ndarray, units: Sequence[Unit]) -> None:
        narrow = labels_fit_a_byte(self.config.attribution, *self.images.shape[1:])
        writer = ShardWriter(
            self.folder.shard(index), self.folder.manifest(index), self.plan.fingerprint, "u1" if narrow else "u2",
            self.plan.identity,
        )  # fmt: skip
        journals = self.folder.journals(index)
        writer.publish(
            ids, units, shard=index, attempts=[path.name.split(".", 1)[1].removesuffix(".units") for path in journals]
        )
        self._forget(index)

    def _forget(self, index: int) -> None:
        """Journals of a published shard, and what its killed writers left beside it."""
        remove_temporaries(self.folder.shard(index), self.folder.manifest(index))
        for path in self.folder.journals(index):
            path.unlink(missing_ok=True)

    def _explainer(self, index: int, slot: int) -> "Explainer":
        device, model = self._model = self._model or self._load(slot)
        killed = sum(failure.kind == "out-of-memory" for failure in read_failures(self.folder, index))
        batch = max(1, self.config.attribution.batch_size >> killed)
        return Explainer(self.config, self.images, model, device, self.workers, batch)

    def _load(self, slot: int) -> tuple[torch.device, Classifier]:
        device = pick_device(self.config.device, slot)
        weights = self.folder.explained_weights(self.config)
        if digest_file(weights) != self.plan.identity["model"]["weights_sha256"]:
            raise InputError(f"{weights}: changed since the plan was made; restore it, or set run to another folder")
        return device, classifier(self.config, self.images, weights, device)


def shard_problems(folder: RunFolder, plan: Plan, ids: np.ndarray) -> dict[int, str]:
    """Why each unusable shard of a plan is so, by its number; judged by digests, its rows are not read."""
    there = {entry.name for entry in os.scandir(folder.shards)} if folder.shards.is_dir() else set()
    begun = [k for k in range(plan.num_shards) if {folder.shard(k).name, folder.manifest(k).name} & there]

    def look(index: int) -> str | None:
        return shard_problem(
            folder.shard(index), folder.manifest(index), plan.shard_ids(index, ids), plan.fingerprint, values=False
        )

    problems: dict[int, str | None] = dict.fromkeys(range(plan.num_shards), "missing")
    with ThreadPoolExecutor(READERS) as readers:  # mostly waits for the disk and for SHA-256
        problems |= zip(begun, readers.map(look, begun), strict=True)
    return {index: problem for index, problem in problems.items() if problem}


def quarantined(folder: RunFolder, shards: Iterable[int]) -> dict[int, str]:
    """Images that were left out of published shards, and why."""
    left_out = {}
    for index in shards:
        if folder.manifest(index).exists():
            for entry in read_json(folder.manifest(index), "run attribute again").get("quarantined", []):
                left_out[int(entry["image"])] = str(entry["why"])
    return left_out


@dataclass
class Explainer:
    """Explains units of images with one model on one device."""

    config: Config
    images: ImageSet
    model: Classifier
    device: torch.device
    workers: int
    batch_size: int

    def explain(self, units: Sequence[np.ndarray]) -> Generator[Unit, None, None]:
        """One Unit for the ids of each. Raises what the model or the segmentation raises for every image of a unit."""
        position = 0
        while position < len(units):
            broken: dict[int, str] = {}  # images that cannot be read, as the blocks ahead are drawn
            blocks = (self._readable(ids, broken) for ids in units[position:])
            with closing(self._segmented(blocks)) as segmented:
                while position < len(units):
                    try:
                        ids, pixels, segments = next(segmented)
                    except Exception:
                        ids, pixels = self._readable(units[position], broken)
                        yield self._unit(ids, pixels, None, _of(broken, units[position]))
                        position += 1
                        break  # the stream is over: begin another behind the unit that it could not segment
                    yield self._unit(ids, pixels, segments, _of(broken, units[position]))
                    position += 1

    def _segmented(self, blocks: Iterable[Block]) -> Generator[SegmentedBlock, None, None]:
        """Blocks with their segments; with none where they are best made with the explanation."""
        processes = segmenters(self.config, self.workers, self.device.type, self.images.shape[0])
        if processes:
            yield from segmented_ahead(blocks, self.config.attribution, processes)
        else:
            yield from ((*block, None) for block in blocks)

    def _readable(self, ids: np.ndarray, broken: dict[int, str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and pixels of the images that can be read; the others go to `broken`. OSError if the disk gives none."""
        for pause in (*PAUSES_S, None):
            try:
                return ids, self.images.images(ids)
            except InputError:
                break
            except OSError:
                if pause is None:
                    break
                time.sleep(pause)  # a network disk may come back
        good: list[np.ndarray] = []
        faults: list[Exception] = []
        for image in ids:
            try:
                good.append(self.images.images([image]))
            except (InputError, OSError) as error:
                broken[int(image)] = str(error)
                faults.append(error)
        if not good and isinstance(faults[0], OSError):
            raise faults[0]
        readable = np.array([image for image in ids if int(image) not in broken], ids.dtype)
        return readable, np.concatenate(good) if good else self.images.images([])

    def _unit(self, ids: np.ndarray, pixels: np.ndarray, segments: np.ndarray | None, broken: dict[int, str]) -> Unit:
        started = time.perf_counter()
        try:
            rows = self._fitting(ids, pixels, segments) if len(ids) else {}
        except Exception as error:
            if is_out_of_memory(error):
                raise
            ids, pixels, poisoned = self._without_poisoned(ids, pixels, error)
            broken = {**broken, **poisoned}
            rows = self._fitting(ids, pixels, None) if len(ids) else {}
        return Unit(rows, time.perf_counter() - started, broken, self.batch_size)

    def _without_poisoned(
        self, ids: np.ndarray, pixels: np.ndarray, error: Exception
    ) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        """The images of a unit that can be explained alone; `error` again if it is not the images."""
        poisoned: dict[int, str] = {}
        for row in range(len(ids)):
            try:
                self._fitting(ids[row : row + 1], pixels[row : row + 1], None)
            except Exception as alone:
                if is_out_of_memory(alone):
                    raise
                poisoned[int(ids[row])] = f"{type(alone).__name__}: {' '.join(str(alone).split())}"
        if len(poisoned) == len(ids) and not self._explains_others(ids):
            raise error
        good = np.array([int(image) not in poisoned for image in ids])
        return ids[good], pixels[good], poisoned

    def _explains_others(self, ids: np.ndarray) -> bool:
        """Whether an image outside of this unit can be explained."""
        for image in readable_ids(self.images, len(ids) + 1):
            if image not in ids:
                try:
                    self._fitting(np.array([image]), self.images.images([image]), None)
                except Exception:
                    return False
                return True
        return False

    def _fitting(self, ids: np.ndarray, pixels: np.ndarray, segments: np.ndarray | None) -> dict[str, np.ndarray]:
        """Rows of these images, with batches halved until they fit into memory."""
        while True:
            try:
                rows = explain_unit(
                    self.model, pixels, self.images.labels_of(ids), ids, self.config, self.device, segments,
                    self.batch_size,
                )  # fmt: skip
                break
            except Exception as error:
                if not is_out_of_memory(error) or self.batch_size == 1:
                    raise
            self.batch_size //= 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        if problem := unit_problem(rows):
            raise ValueError(problem)
        return rows


def _of(broken: dict[int, str], ids: np.ndarray) -> dict[int, str]:
    return {image: why for image, why in broken.items() if image in ids}


def segmenters(config: Config, workers: int, device_type: str, channels: int) -> int:
    """How many processes segment for each of so many workers whose models run on such a device."""
    if config.cluster.segmenters != "auto":
        return config.cluster.segmenters
    if device_type == "cpu" or segments_on_device(config.attribution, device_type, channels):
        return 0
    return min(MOST_SEGMENTERS, cores_of_a_worker(workers) - 1)


def readable_ids(images: ImageSet, wanted: int) -> np.ndarray:
    """The first few ids whose images can be read. Raises the first one's error if none of the first many can."""
    found: list[int] = []
    faults: list[Exception] = [InputError(f"{images.name} {images.split}: no images")]
    for image in images.ids[:MOST_TRIED]:
        try:
            images.images([image])
        except (InputError, OSError) as error:
            faults.append(error)
            continue
        found.append(image)
        if len(found) == wanted:
            break
    if not found:
        raise faults[:2][-1]
    return np.array(found, np.int64)


def classifier(config: Config, images: ImageSet, weights: Any, device: torch.device) -> Classifier:
    """The configured model with its weights, to be called and to be differentiated."""
    full_float32()
    example = torch.from_numpy(images.images(readable_ids(images, 2))).to(device)
    plain = load_model(config.model, len(images.classes), images.shape[0], weights)
    quick = for_inference(plain, example)
    return Classifier(lambda batch: quick(batch).softmax(1), plain.to(device).requires_grad_(False))


def explain_unit(
    model: Classifier,
    images: np.ndarray,
    labels: np.ndarray,
    ids: np.ndarray,
    config: Config,
    device: torch.device,
    segments: np.ndarray | None = None,
    batch_size: int | None = None,
) -> dict[str, np.ndarray]:
    """Store rows of one unit: the true label and the strongest wrong one explained."""
    predict = model.probabilities
    settings = config.attribution
    if batch_size is not None:
        settings = settings.model_copy(update={"batch_size": batch_size})
    pixels = fastest_layout(torch.from_numpy(images).to(device))
    with torch.inference_mode():
        targets = true_and_runner_up(predict(pixels.clone()), torch.from_numpy(labels).to(device))
    explained = explain_batch(predict, pixels, ids, settings, targets.cpu().numpy(), segments)
    pairs, maps = explained.targets, explained.segments
    sensitivity = instability = None
    if settings.sensitivity:
        sensitivity = segment_sensitivity(model.logits, pixels, ids, pairs, maps, settings.batch_size)
    if settings.noisy_copies:
        instability = noise_instability(
            predict, pixels, ids, settings, pairs[:, :1], maps, settings.noisy_copies, settings.noise, settings.seed
        )[:, 0]  # fmt: skip
    return rows_from(explained, labels, sensitivity, instability)
