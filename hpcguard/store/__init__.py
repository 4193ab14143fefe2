"""The attribution store: verified HDF5 shards, a virtual view over them, and a torch Dataset to train from."""

from hpcguard.store.blocks import BlockShuffled
from hpcguard.store.contents import describe, rows_of, stored_problem
from hpcguard.store.dataset import AttributionDataset
from hpcguard.store.export import write_npz, write_plain
from hpcguard.store.image_table import ImageTable, join_tables, read_table, table_problem, write_table
from hpcguard.store.journal import Journal, Unit, read_journal
from hpcguard.store.outcomes import Outcomes, outcomes_of, read_outcomes
from hpcguard.store.pack import generation, group_shards, pack_shards
from hpcguard.store.reading import StoreReader
from hpcguard.store.schema import SCHEMA_VERSION, attributes, rows_from
from hpcguard.store.shard import ShardWriter, read_manifest, shard_problem, unit_problem, write_rows
from hpcguard.store.view import build_view, open_rows, read_store_manifest, store_shapes, view_problem, write_view

__all__ = [
    "SCHEMA_VERSION",
    "AttributionDataset",
    "BlockShuffled",
    "ImageTable",
    "Journal",
    "Outcomes",
    "ShardWriter",
    "StoreReader",
    "Unit",
    "attributes",
    "build_view",
    "describe",
    "generation",
    "group_shards",
    "join_tables",
    "open_rows",
    "outcomes_of",
    "pack_shards",
    "read_journal",
    "read_manifest",
    "read_outcomes",
    "read_store_manifest",
    "read_table",
    "rows_from",
    "rows_of",
    "shard_problem",
    "store_shapes",
    "stored_problem",
    "table_problem",
    "unit_problem",
    "view_problem",
    "write_npz",
    "write_plain",
    "write_rows",
    "write_table",
    "write_view",
]
