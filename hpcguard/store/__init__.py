"""The attribution store: verified HDF5 shards, a virtual view over them, and a torch Dataset to train from."""

from hpcguard.store.dataset import AttributionDataset
from hpcguard.store.schema import rows_from
from hpcguard.store.shard import ShardWriter, shard_problem, write_rows
from hpcguard.store.view import build_view, open_rows, view_problem

__all__ = [
    "AttributionDataset",
    "ShardWriter",
    "build_view",
    "open_rows",
    "rows_from",
    "shard_problem",
    "view_problem",
    "write_rows",
]
