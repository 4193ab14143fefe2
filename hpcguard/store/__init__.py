"""The attribution store: verified HDF5 shards, a virtual view over them, and a torch Dataset to train from."""

from hpcguard.store.blocks import BlockShuffled
from hpcguard.store.contents import describe, rows_of, stored_problem
from hpcguard.store.dataset import AttributionDataset
from hpcguard.store.export import write_npz, write_plain
from hpcguard.store.journal import Journal, Unit, read_journal
from hpcguard.store.reading import StoreReader
from hpcguard.store.schema import rows_from
from hpcguard.store.shard import ShardWriter, shard_problem, unit_problem, write_rows
from hpcguard.store.view import build_view, open_rows, view_problem

__all__ = [
    "AttributionDataset",
    "BlockShuffled",
    "Journal",
    "ShardWriter",
    "StoreReader",
    "Unit",
    "build_view",
    "describe",
    "open_rows",
    "read_journal",
    "rows_from",
    "rows_of",
    "shard_problem",
    "stored_problem",
    "unit_problem",
    "view_problem",
    "write_npz",
    "write_plain",
    "write_rows",
]
