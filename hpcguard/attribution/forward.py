"""Perturbed images through the model: rows of many images in shared batches, one buffer in flight."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Predict = Callable[[Tensor], Tensor]
Job = tuple[int, Tensor]
"""(index of an image, bool [n, d] rows of it to evaluate)."""


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
        return torch.cat([self._checked(self.images[batch].clone(), self.ids[batch]) for batch in batches])

    @torch.inference_mode()
    def evaluate(self, jobs: list[Job], labels: Tensor, deduplicate: bool) -> list[Tensor]:
        """Probabilities of each image's explained labels [B, L] for each job's rows, one float64 [n, L] a job.

        deduplicate: equal rows of an image are evaluated once.
        """
        distinct = [_distinct(rows) if deduplicate else (rows, None) for _, rows in jobs]
        answers = [labels.new_empty(len(rows), labels.shape[1], dtype=torch.float64) for rows, _ in distinct]
        count = sum(len(rows) for rows, _ in distinct)
        layout = torch.channels_last if _is_channels_last(self.images) else torch.contiguous_format
        shape = (min(self.batch_size, count), *self.images.shape[1:])
        buffer = torch.empty(shape, device=self.images.device, memory_format=layout)
        bits = _in_memory_order(buffer, layout)
        perturbing, choice = -1, None
        for spans in _model_batches([len(rows) for rows, _ in distinct], self.batch_size):
            filled = 0
            for job, first, last in spans:
                if choice is None or job != perturbing:
                    perturbing, choice = job, self._choice(jobs[job][0], layout)
                choice.perturb(distinct[job][0][first:last], bits[filled : filled + last - first])
                filled += last - first
            owners = np.concatenate([np.full(last - first, self.ids[jobs[job][0]]) for job, first, last in spans])
            probability = self._checked(buffer[:filled], owners, self.classes)
            start = 0
            for job, first, last in spans:
                answers[job][first:last] = probability[start : start + last - first, labels[jobs[job][0]]]
                start += last - first
        pairs = zip(answers, distinct, strict=True)
        return [answer if back is None else answer[back] for answer, (_, back) in pairs]

    def _choice(self, image: int, layout: torch.memory_format) -> "_Choice":
        one = slice(image, image + 1)
        shown, hidden = (_in_memory_order(each[one], layout) for each in (self.images, self.hidden))
        segment = self.maps[one, None].expand_as(self.images[one])
        return _Choice(hidden, shown ^ hidden, _in_memory_order(segment, layout))

    def _checked(self, batch: Tensor, owners: np.ndarray, classes: int | None = None) -> Tensor:
        """The model's answer, if it is [rows, K] and finite; `owners` are the image ids of the rows."""
        probability = self.predict(batch)
        if not isinstance(probability, Tensor):
            raise ValueError(f"predict: expected a tensor [{len(batch)}, K], got a {type(probability).__name__}")
        shape = tuple(probability.shape)
        if len(shape) != 2 or shape[0] != len(batch) or shape[1] == 0:
            raise ValueError(f"predict: expected probabilities [{len(batch)}, K], got {shape}")
        if classes not in (None, shape[1]):
            raise ValueError(f"predict: {classes} classes for the images themselves, {shape[1]} for perturbed ones")
        finite = torch.isfinite(probability).all(1)
        if not finite.all():
            bad = np.unique(owners[~finite.cpu().numpy()])
            raise ValueError(f"predict: NaN or infinite probabilities for image ids {bad[:5].tolist()}")
        return probability


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


def _distinct(rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """(distinct rows in the order of their first appearance, which of them each row is), None if all are distinct."""
    packed = np.packbits(rows.cpu().numpy(), axis=1)
    keys = packed.view(np.dtype((np.void, packed.shape[1])))[:, 0]
    _, first, back = np.unique(keys, return_index=True, return_inverse=True)
    if len(first) == len(rows):
        return rows, None
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    device = rows.device
    return rows[torch.from_numpy(first[order]).to(device)], torch.from_numpy(rank[back]).to(device)


def _model_batches(lengths: list[int], batch_size: int) -> Iterator[list[tuple[int, int, int]]]:
    """All rows of all jobs, packed into model batches of (job, first row, last row + 1)."""
    spans: list[tuple[int, int, int]] = []
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
