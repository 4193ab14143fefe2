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

    @torch.inference_mode()
    def originals(self) -> Tensor:
        """Probabilities of the unperturbed images, [B, K]."""
        parts = [
            self._checked(self.images[start : start + self.batch_size], self.ids[start : start + self.batch_size])
            for start in range(0, len(self.images), self.batch_size)
        ]
        return torch.cat(parts)

    @torch.inference_mode()
    def evaluate(self, jobs: list[Job], labels: Tensor, deduplicate: bool) -> list[Tensor]:
        """Probabilities of each image's explained labels [B, L] for each job's rows, one [n, L] a job.

        deduplicate: equal rows of an image are evaluated once.
        """
        distinct = [_distinct(rows) if deduplicate else (rows, None) for _, rows in jobs]
        answers = [torch.empty(len(rows), labels.shape[1], device=self.images.device) for rows, _ in distinct]
        count = sum(len(rows) for rows, _ in distinct)
        layout = torch.channels_last if _is_channels_last(self.images) else torch.contiguous_format
        shape = (min(self.batch_size, count), *self.images.shape[1:])
        buffer = torch.empty(shape, device=self.images.device, memory_format=layout)
        for spans in _model_batches([len(rows) for rows, _ in distinct], self.batch_size):
            filled = 0
            for job, first, last in spans:
                rows = distinct[job][0][first:last]
                self._perturb(jobs[job][0], rows, buffer[filled : filled + last - first])
                filled += last - first
            owners = np.concatenate([np.full(last - first, self.ids[jobs[job][0]]) for job, first, last in spans])
            probability = self._checked(buffer[:filled], owners)
            start = 0
            for job, first, last in spans:
                answers[job][first:last] = probability[start : start + last - first, labels[jobs[job][0]]]
                start += last - first
        pairs = zip(answers, distinct, strict=True)
        return [answer if back is None else answer[back] for answer, (_, back) in pairs]

    def _perturb(self, image: int, rows: Tensor, out: Tensor) -> None:
        shown = rows.index_select(1, self.maps[image].flatten()).reshape(-1, 1, *self.maps.shape[1:])
        torch.where(shown, self.images[image], self.hidden[image], out=out)

    def _checked(self, batch: Tensor, owners: np.ndarray) -> Tensor:
        """The model's answer, if it is [rows, K] and finite; `owners` are the image ids of the rows."""
        probability = self.predict(batch)
        if probability.ndim != 2 or len(probability) != len(batch):
            raise ValueError(f"predict: expected probabilities [{len(batch)}, K], got {tuple(probability.shape)}")
        finite = torch.isfinite(probability).all(1)
        if not finite.all():
            bad = np.unique(owners[~finite.cpu().numpy()])
            raise ValueError(f"predict: NaN or infinite probabilities for image ids {bad[:5].tolist()}")
        return probability


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


def _is_channels_last(images: Tensor) -> bool:
    return images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
