"""Perturbed images through the model: rows of many images in shared batches, one buffer in flight."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Predict = Callable[[Tensor], Tensor]
Job = tuple[int, Tensor]
"""(index of an image, bool [n, d] rows of it to evaluate)."""
Span = tuple[int, int, int]
"""(index of a job, first row, last row + 1)."""


@dataclass(frozen=True)
class Perturber:
    """B images, what hides their segments, and the model that looks at the perturbed copies."""

    predict: Predict
    images: Tensor  # float32 [B, C, H, W]
    hidden: Tensor  # like images: what a pixel shows when its segment is hidden
    maps: Tensor  # int64 [B, H, W]
    ids: np.ndarray  # int64 [B], for messages
    batch_size: int
    classes: int | None = None  # how many the model has shown to have, once it has looked at the images

    @torch.inference_mode()
    def originals(self) -> Tensor:
        """Probabilities of the unperturbed images, [B, K]."""
        batches = [slice(start, start + self.batch_size) for start in range(0, len(self.images), self.batch_size)]
        # Clones, for a model may work in place and the images are the caller's.
        probability = torch.cat([self._answer(self.images[batch].clone()) for batch in batches])
        self._check_finite(self.ids[~_finite(probability).cpu().numpy()])
        return probability

    @torch.inference_mode()
    def evaluate(self, jobs: list[Job], labels: Tensor) -> list[Tensor]:
        """Probabilities of each image's explained labels [B, L] for each job's rows, one float64 [n, L] a job.

        Rows and answers lie on the host.
        """
        answers = [labels.new_empty(len(rows), labels.shape[1], dtype=torch.float64) for _, rows in jobs]
        finite = [labels.new_empty(len(rows), dtype=torch.bool) for _, rows in jobs]
        for spans, batch in self._perturbed(jobs):
            probability = self._answer(batch, self.classes)
            start = 0
            for job, first, last in spans:
                part = probability[start : start + last - first]
                answers[job][first:last], finite[job][first:last] = part[:, labels[jobs[job][0]]], _finite(part)
                start += last - first
        # Looked at once, so that no model batch waits until the host has seen the one before.
        good = torch.stack([each.all() for each in finite]).tolist()
        self._check_finite([self.ids[image] for (image, _), fine in zip(jobs, good, strict=True) if not fine])
        return [answer.cpu() for answer in answers]

    def _perturbed(self, jobs: list[Job]) -> Iterator[tuple[list[Span], Tensor]]:
        """Model batches of perturbed copies, in one buffer that each batch overwrites, and whose rows they are."""
        layout = torch.channels_last if _is_channels_last(self.images) else torch.contiguous_format
        lengths = [len(rows) for _, rows in jobs]
        shape = (min(self.batch_size, sum(lengths)), *self.images.shape[1:])
        buffer = torch.empty(shape, device=self.images.device, memory_format=layout)
        bits = _in_memory_order(buffer, layout)
        perturbing, choice = -1, None
        for spans in _model_batches(lengths, self.batch_size):
            filled = 0
            for job, first, last in spans:
                if choice is None or job != perturbing:
                    perturbing, choice = job, self._choice(jobs[job][0], layout)
                choice.perturb(jobs[job][1][first:last].to(bits.device), bits[filled : filled + last - first])
                filled += last - first
            yield spans, buffer[:filled]

    def _choice(self, image: int, layout: torch.memory_format) -> "_Choice":
        one = slice(image, image + 1)
        shown, hidden = (_in_memory_order(each[one], layout) for each in (self.images, self.hidden))
        segment = self.maps[one, None].expand_as(self.images[one])
        return _Choice(hidden, shown ^ hidden, _in_memory_order(segment, layout))

    def _answer(self, batch: Tensor, classes: int | None = None) -> Tensor:
        """What the model says, if it is [rows, K], with as many classes as before."""
        probability = self.predict(batch)
        if not isinstance(probability, Tensor):
            raise ValueError(f"predict: expected a tensor [{len(batch)}, K], got a {type(probability).__name__}")
        shape = tuple(probability.shape)
        if len(shape) != 2 or shape[0] != len(batch) or shape[1] == 0:
            raise ValueError(f"predict: expected probabilities [{len(batch)}, K], got {shape}")
        if classes not in (None, shape[1]):
            raise ValueError(f"predict: {classes} classes for the images themselves, {shape[1]} for perturbed ones")
        return probability

    def _check_finite(self, bad: Sequence[int]) -> None:
        """`bad`: ids of the images for which the model gave other than finite probabilities."""
        if len(bad):
            raise ValueError(f"predict: NaN or infinite probabilities for image ids {[int(each) for each in bad[:5]]}")


def _finite(probability: Tensor) -> Tensor:
    return torch.isfinite(probability).all(1)


@dataclass(frozen=True)
class _Choice:
    """One image's two faces, as bits of float32 in memory order: a row chooses between them for every segment."""

    hidden: Tensor  # int32 [1, P]
    differing: Tensor  # int32 [1, P], bits in which image and hidden image differ
    segment: Tensor  # int64 [1, P]

    def perturb(self, rows: Tensor, out: Tensor) -> None:
        """Perturbed copies for bool [n, d] rows, to int32 [n, P]: exact, in place, and quick on a CPU as on a GPU."""
        shown = rows.to(torch.int32).neg_()  # all bits of -1 are set
        torch.gather(shown, 1, self.segment.expand(len(rows), -1), out=out)
        out.bitwise_and_(self.differing).bitwise_xor_(self.hidden)


def _model_batches(lengths: list[int], batch_size: int) -> Iterator[list[Span]]:
    """All rows of all jobs, packed into model batches."""
    spans: list[Span] = []
    room = batch_size
    for job, length in enumerate(lengths):
        first = 0
        while first < length:
            last = min(length, first + room)
            spans.append((job, first, last))
            room -= last - first
            first = last
            if room == 0:
                yield spans
                spans, room = [], batch_size
    if spans:
        yield spans


def _in_memory_order(batch: Tensor, layout: torch.memory_format) -> Tensor:
    """[n, C, H, W] as [n, P] in the order of `layout`, float32 as its bits; a view where the batch has that layout."""
    batch = batch.contiguous(memory_format=layout)
    flat = (batch.permute(0, 2, 3, 1) if layout == torch.channels_last else batch).flatten(1)
    return flat.view(torch.int32) if flat.dtype == torch.float32 else flat


def _is_channels_last(images: Tensor) -> bool:
    return images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
