"""BlockShuffled: a shuffled epoch over an AttributionDataset that reads whole blocks of neighbouring rows."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from hpcguard.errors import InputError
from hpcguard.randomness import keyed_generator
from hpcguard.store.dataset import AttributionDataset

SHUFFLED_BYTES = 12 << 20  # of rows, decoded and mixed at a time
SHUFFLED_ROWS = (2048, 8192)  # at least and at most
BLOCKS_MIXED = 64  # at least, where chunks are small enough: neighbours are often of one class


class BlockShuffled(IterableDataset[dict[str, Tensor]]):
    """Whole batches of a dataset: DataLoader(BlockShuffled(dataset, 64), batch_size=None, num_workers=4).

    Blocks of neighbouring rows are drawn at random, and the rows of many of them are decoded at a time, mixed and cut
    into batches: a part of the epoch. The order of the blocks depends on seed and epoch alone. Rank `rank` of `world`
    has a `world`-th of it, one row more or less, in parts of its own: every row comes once an epoch. Its workers share
    its parts (or, where they are more than its parts, its batches), and change no batch. drop_last: whole batches
    only, equally many on every rank.

    shuffled_rows: of a part, about; block_rows: of a block. By default what takes about 12 MiB, and BLOCKS_MIXED blocks
    of whole chunks, or fewer where a chunk has more rows.
    """

    def __init__(
        self, dataset: AttributionDataset, batch_size: int, seed: int = 0, rank: int = 0, world: int = 1,
        drop_last: bool = False, shuffled_rows: int | None = None, block_rows: int | None = None,
    ) -> None:  # fmt: skip
        sizes = [each for each in (batch_size, world, shuffled_rows, block_rows) if each is not None]
        if min(sizes) < 1 or not 0 <= rank < world:
            raise InputError(
                f"batch_size {batch_size}, shuffled_rows {shuffled_rows}, block_rows {block_rows}, rank {rank} of "
                f"{world}: sizes are at least 1, ranks are 0 to world - 1"
            )
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.world, self.drop_last = rank, world, drop_last
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that outlive an epoch
        rows = shuffled_rows or shuffled(dataset)
        self.part_rows = -(-rows // batch_size) * batch_size
        block = block_rows or blocks_of(dataset, rows)
        # Of every block that has any, the items in it.
        self._by_row = np.argsort(dataset.positions, kind="stable")
        edges = np.array([0, *(stop for _, stop in dataset.reader.blocks(block))])
        bounds = np.unique(np.searchsorted(dataset.positions[self._by_row], edges))
        self._starts, self._stops = bounds[:-1], bounds[1:]

    def set_epoch(self, epoch: int) -> None:
        """Before an epoch begins: another epoch, another order."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        """Batches of this rank."""
        first, last = self._share()
        return -(-(last - first) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        first, last = self._own(*((worker.id, worker.num_workers) if worker else (0, 1)))
        if first == last:
            return
        items, ends = self._order()
        ahead: dict[str, np.ndarray] = {}
        decoded = first
        for start, stop, begin, end in self._parts(first, last):
            mixed = start + self._generator(1 + start).permutation(stop - start)
            own = mixed[begin - start : end - start]
            if self.dataset.memory:
                yield from (self.dataset.batch(items[chosen]) for chosen in self._batches(own))
            elif len(own) < len(mixed):  # of a part that several workers share
                yield from self._decoded(items, own, self.dataset.decode(items[np.sort(own)]), np.sort(own))
            else:
                # Up to the end of a block: no chunk is decoded for two parts.
                upto = min(int(ends[np.searchsorted(ends, stop)]), last)
                rows = self._extended(ahead, items[max(decoded, start) : upto])
                yield from self._decoded(items, own, rows, np.arange(start, stop))
                ahead = {name: values[stop - start :].copy() for name, values in rows.items()}
                decoded = upto

    def _own(self, number: int, workers: int) -> tuple[int, int]:
        """Places in the epoch's order of one worker of this rank: whole parts, or whole batches where those are few."""
        first, last = self._share()
        step = self.part_rows if -(-(last - first) // self.part_rows) >= workers else self.batch_size
        count = -(-(last - first) // step)
        return first + count * number // workers * step, min(first + count * (number + 1) // workers * step, last)

    def _share(self) -> tuple[int, int]:
        """This rank's places in the epoch's order."""
        rows = len(self.dataset)
        first, last = rows * self.rank // self.world, rows * (self.rank + 1) // self.world
        return first, first + rows // self.world // self.batch_size * self.batch_size if self.drop_last else last

    def _parts(self, first: int, last: int) -> Iterator[tuple[int, int, int, int]]:
        """(start, stop) of each part that has places first:last, and the (begin, end) of these in its mixed order."""
        begin, end = self._share()
        for start, stop in pairwise([*range(begin, end, self.part_rows), end]):
            if start < last and stop > first:
                yield start, stop, max(start, first), min(stop, last)

    def _order(self) -> tuple[np.ndarray, np.ndarray]:
        """Items in the order of the epoch's blocks, neighbours within each, and where the blocks end."""
        chosen = self._generator(0).permutation(len(self._starts))
        ends = np.cumsum(self._stops[chosen] - self._starts[chosen])
        parts = [self._by_row[self._starts[block] : self._stops[block]] for block in chosen]
        return np.concatenate(parts), ends

    def _generator(self, number: int) -> np.random.Generator:
        return keyed_generator("blocks", self.seed, (int(self._epoch) << 32) + number)

    def _extended(self, ahead: dict[str, np.ndarray], more: np.ndarray) -> dict[str, np.ndarray]:
        """Rows that were decoded with the part before, and those of further items."""
        rows = self.dataset.decode(more)
        return {name: np.concatenate([ahead[name], values]) if ahead else values for name, values in rows.items()}

    def _decoded(
        self, items: np.ndarray, own: np.ndarray, rows: dict[str, np.ndarray], places: np.ndarray
    ) -> Iterator[dict[str, Tensor]]:
        """Batches from decoded rows, which are those at some ascending places of the epoch's order."""
        for chosen in self._batches(own):
            at = np.searchsorted(places, chosen)
            yield self.dataset.complete(items[chosen], {name: values[at] for name, values in rows.items()})

    def _batches(self, places: np.ndarray) -> Iterator[np.ndarray]:
        yield from (places[start : start + self.batch_size] for start in range(0, len(places), self.batch_size))


def shuffled(dataset: AttributionDataset) -> int:
    """Rows of a part: small ones many, for many blocks must meet in it, large ones few, for they take memory."""
    least, most = SHUFFLED_ROWS
    return min(most, max(least, SHUFFLED_BYTES // max(1, dataset.reader.row_bytes(dataset.columns))))


def blocks_of(dataset: AttributionDataset, rows: int) -> int:
    """Rows of a block: whole chunks of all columns if BLOCKS_MIXED such blocks fit into a part, else of the widest."""
    reader, columns = dataset.reader, dataset.columns or ("image_id",)
    most = max(1, rows // BLOCKS_MIXED)
    if reader.block_rows(columns) <= most:
        return reader.block_rows(columns)
    chunks = {name: reader.chunk_rows(name) for name in columns}
    if max(chunks.values()) <= most:
        return most // max(chunks.values()) * max(chunks.values())
    chunk = chunks[max(columns, key=lambda name: reader.row_bytes([name]))]
    return max(1, most // chunk) * chunk
