"""Stored: the store, shard or explanation file that a command line names, and the run folder that it lies in."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hpcguard.cluster.plan import read_plan
from hpcguard.config import Config, load_config
from hpcguard.data import ImageSet, load_images
from hpcguard.errors import InputError
from hpcguard.runs import RunFolder, digest_file, run_of
from hpcguard.store import StoreReader, read_manifest, read_store_manifest, shard_problem, view_problem


@dataclass(frozen=True)
class Stored:
    path: Path
    folder: RunFolder | None
    source: Path | None  # what its configuration is read from
    overrides: list[str]

    @cached_property
    def reader(self) -> StoreReader:
        return StoreReader(self.path)

    @property
    def of_test_images(self) -> bool:
        """Whether `evaluate` made it: all other rows are of training images."""
        return self.folder is not None and self.path.resolve().parent == self.folder.results.resolve()

    def config(self) -> Config:
        if self.source is None:
            raise InputError(
                f"{self.path}: lies in no run folder, so its data set is not known; give the run folder, or copy its "
                "config.yaml beside the store"
            )
        return load_config(self.source, self.overrides)

    def classes(self) -> tuple[str, ...]:
        """Names of the classes; none if the data set is not known or not at hand."""
        try:
            return self.images().classes
        except InputError:
            return ()

    def images(self) -> ImageSet:
        """The image set that the rows are of. Raises InputError if it is not known, or another than was explained."""
        return self._images

    @cached_property
    def _images(self) -> ImageSet:
        config = self.config()
        images = load_images(config.data, config.evaluation.split if self.of_test_images else "train")
        if images.shape[1:] != self.reader.shapes["segments"][1:]:
            shown, stored = (f"{height}x{width}" for height, width in (images.shape[1:], self._size))
            raise InputError(f"{self.path}: explains images of {stored}, data.size gives {shown}; change data.size")
        if self.folder is not None and self.folder.plan.exists() and not self.of_test_images:
            explained = read_plan(self.folder.plan).identity.get("data", {}).get("sha256")
            if explained != images.digest():
                raise InputError(
                    f"{self.path}: data.name = {config.data.name}, data.root = {config.data.root} are other images "
                    "than those that were explained; name theirs"
                )
        return images

    @property
    def _size(self) -> tuple[int, int]:
        height, width = self.reader.shapes["segments"][1:]
        return height, width

    def record(self) -> dict[str, Any]:
        """The manifest of a run's store, which has its statistics; nothing for other files, or if it is damaged."""
        if self.folder is None or self.path.resolve() != self.folder.store.resolve():
            return {}
        try:
            return read_store_manifest(self.folder.store_manifest)
        except InputError:
            return {}

    def digest_problem(self) -> tuple[str | None, str]:
        """(what is wrong or None, what was compared): the digests of the file, and of the files under a store."""
        folder, path = self.folder, self.path
        if folder is not None and path.resolve() == folder.store.resolve():
            problem = view_problem(folder.store, folder.store_manifest, read_plan(folder.plan).fingerprint)
            recorded = None if problem else read_store_manifest(folder.store_manifest)["images"]
            if recorded is not None and recorded != len(self.reader):
                problem = f"{path}: {len(self.reader)} rows, its manifest says {recorded}"
            return problem, f"digests of {1 + len(self.reader.files())} files"
        place = path.resolve()
        if folder is not None and place.parent == folder.shards.resolve():
            return self._shard_problem(folder)
        if folder is not None and place.parent == folder.packed.resolve():
            return self._packed_problem(folder)
        return None, "no digest, for there is no manifest of it"

    def _shard_problem(self, folder: RunFolder) -> tuple[str | None, str]:
        """Against the plan: file, manifest and ids; without the ids where the images are not at hand."""
        path, plan = self.path, read_plan(folder.plan)
        index = next((k for k in range(plan.num_shards) if folder.shard(k).name == path.name), None)
        if index is None:
            return f"{path}: no shard of this plan, which has {plan.num_shards}; remove it", ""
        recorded, checked = read_manifest(folder.manifest(index)), "digest of the file, the plan's ids"
        problem = None if recorded["file"] == path.name else f"a duplicate of {recorded['file']}"
        if recorded["sha256"] != digest_file(path):
            problem = "its bytes differ from the manifest's digest"
        if problem is None:  # of damaged files not even the size of the images can be read
            try:
                ids = plan.shard_ids(index, self.images().ids)
                problem = shard_problem(path, folder.manifest(index), ids, plan.fingerprint, values=False)
            except InputError:
                checked = "digest of the file (not which images it must hold: they are not at hand)"
        redo = f"run `python -m hpcguard.attribute {folder.path}` to redo it"
        return f"{path}: {problem}; {redo}" if problem else None, checked

    def _packed_problem(self, folder: RunFolder) -> tuple[str | None, str]:
        recorded = read_store_manifest(folder.store_manifest)["sources"]
        name = f"{folder.packed.name}/{self.path.name}"
        if name not in recorded:
            return f"{self.path}: not under {folder.store}, which is over other files; remove it", ""
        if recorded[name] != digest_file(self.path):
            return f"{self.path}: has changed since it was made; run consolidate on this run again", ""
        return None, "digest of the file"


def find_store(source: Path, overrides: list[str]) -> Stored:
    """From a store's file, a run folder or a configuration. Raises InputError if there is none."""
    if source.is_dir() or source.suffix in (".yaml", ".yml"):
        folder = RunFolder(source) if source.is_dir() else RunFolder(load_config(source, overrides).run)
        if not folder.store.is_file():
            what = "holds no config.yaml, so it is no run folder" if not folder.config.is_file() else "no store yet"
            raise InputError(f"{folder.path}: {what}; `python -m hpcguard.consolidate` makes {folder.store.name}")
        return Stored(folder.store, folder, source, overrides)
    if not source.is_file():
        raise InputError(f"{source}: no such file; give a store such as RUN/store.h5, or a run folder")
    own = run_of(source)
    return Stored(source, own, own.path if own else None, overrides)
