"""BlockShuffled: an epoch over an AttributionDataset that decodes every chunk once, though the rows are shuffled."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from hpcguard.errors import InputError
from hpcguard.randomness import keyed_generator
from hpcguard.store.dataset import AttributionDataset

SHUFFLED_ROWS = 2048  # decoded and mixed at a time


class BlockShuffled(IterableDataset[dict[str, Tensor]]):
    """Whole batches of a dataset: DataLoader(BlockShuffled(dataset, 64), batch_size=None, num_workers=4).

    Blocks of neighbouring rows are drawn at random, about `shuffled_rows` rows are decoded at a time, and mixed. The
    order of an epoch depends on seed and epoch alone. Rank `rank` of `world` has a `world`-th of it, one row more or
    less, and its workers share its batches: every row comes once an epoch, and which rows make up a batch does not
    depend on the number of workers. drop_last: whole batches only, equally many on every rank.
    """

    def __init__(
        self, dataset: AttributionDataset, batch_size: int, seed: int = 0, rank: int = 0, world: int = 1,
        drop_last: bool = False, shuffled_rows: int = SHUFFLED_ROWS, block_rows: int | None = None,
    ) -> None:  # fmt: skip
        if min(batch_size, world, shuffled_rows, block_rows or 1) < 1 or not 0 <= rank < world:
            raise InputError(
                f"batch_size {batch_size}, shuffled_rows {shuffled_rows}, block_rows {block_rows}, rank {rank} of "
                f"{world}: sizes are at least 1, ranks are 0 to world - 1"
            )
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.world, self.drop_last, self.shuffled_rows = rank, world, drop_last, shuffled_rows
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that outlive an epoch
        reader = dataset.reader
        block = block_rows or reader.block_rows(dataset.columns or ("image_id",))
        # Of every block that has any, the items in it.
        self._by_row = np.argsort(dataset.positions, kind="stable")
        edges = np.array([0, *(stop for _, stop in reader.blocks(block))])
        bounds = np.unique(np.searchsorted(dataset.positions[self._by_row], edges))
        self._starts, self._stops = bounds[:-1], bounds[1:]

    def set_epoch(self, epoch: int) -> None:
        """Before an epoch begins: another epoch, another order."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        """Batches of this rank."""
        return self._batches()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        batches, first, last = self._batches(), *self._share()
        start = first + batches * number // workers * self.batch_size
        stop = min(first + batches * (number + 1) // workers * self.batch_size, last)
        waiting: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
        room = self.batch_size
        for indices in self._order(start, stop):
            decoded = self.dataset.decode(indices)
            begin = 0
            while begin < len(indices):
                end = min(begin + room, len(indices))
                waiting.append((indices[begin:end], {name: each[begin:end] for name, each in decoded.items()}))
                room -= end - begin
                begin = end
                if room == 0:
                    yield self._batch(waiting)
                    waiting, room = [], self.batch_size
        if waiting:
            yield self._batch(waiting)

    def _share(self) -> tuple[int, int]:
        """This rank's part of the epoch's order."""
        rows = len(self.dataset)
        return rows * self.rank // self.world, rows * (self.rank + 1) // self.world

    def _batches(self) -> int:
        if self.drop_last:
            return len(self.dataset) // self.world // self.batch_size
        first, last = self._share()
        return -(-(last - first) // self.batch_size)

    def _order(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Items at places start:stop of the epoch's order, in parts that are decoded together."""
        epoch = int(self._epoch)
        chosen = keyed_generator("blocks", self.seed, epoch << 32).permutation(len(self._starts))
        ends = np.cumsum(self._stops[chosen] - self._starts[chosen])
        begins = ends - (self._stops[chosen] - self._starts[chosen])
        part = begins // self.shuffled_rows
        for number in np.unique(part):
            own = np.flatnonzero(part == number)
            first, last = begins[own[0]], ends[own[-1]]
            if last <= start or first >= stop:
                continue
            items = np.concatenate([self._by_row[self._starts[block] : self._stops[block]] for block in chosen[own]])
            keyed_generator("blocks", self.seed, (epoch << 32) + 1 + int(number)).shuffle(items)
            yield items[max(0, start - first) : stop - first]

    def _batch(self, parts: list[tuple[np.ndarray, dict[str, np.ndarray]]]) -> dict[str, Tensor]:
        if len(parts) == 1:
            return self.dataset.complete(*parts[0])
        indices = np.concatenate([each for each, _ in parts])
        columns = {name: np.concatenate([decoded[name] for _, decoded in parts]) for name in self.dataset.columns}
        return self.dataset.complete(indices, columns)
