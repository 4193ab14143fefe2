"""RunFolder: the only place where the file names of a run exist; atomic publishing and digests."""

import fcntl
import glob
import hashlib
import json
import os
import stat
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hpcguard import __version__
from hpcguard.config import RECORDED, Config
from hpcguard.errors import InputError

SEAL = "sealed"  # key of a JSON object's digest of its own other keys


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run folder."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def shards(self) -> Path:
        return self.path / "shards"

    def shard(self, index: int) -> Path:
        return self.shards / f"{index:05d}.h5"

    def manifest(self, index: int) -> Path:
        return self.shards / f"{index:05d}.json"

    @property
    def unfinished(self) -> Path:
        return self.path / "unfinished"

    def journal(self, index: int, attempt: str) -> Path:
        """Finished units of one attempt at a shard that is not published yet."""
        return self.unfinished / f"{index:05d}.{attempt}.units"

    def journals(self, index: int) -> list[Path]:
        return sorted(self.unfinished.glob(f"{index:05d}.*.units"))

    def all_journals(self) -> dict[int, list[Path]]:
        """Journals by shard, looked up once for many shards."""
        found: dict[int, list[Path]] = {}
        for path in sorted(self.unfinished.glob("*.units")):
            found.setdefault(int(path.name.split(".", 1)[0]), []).append(path)
        return found

    def lock(self, index: int) -> Path:
        """Locked by the process that computes a shard."""
        return self.unfinished / f"{index:05d}.lock"

    @property
    def failures(self) -> Path:
        return self.path / "failures"

    def failure(self, index: int, attempt: str) -> Path:
        return self.failures / f"{index:05d}.{attempt}.json"

    @property
    def slurm(self) -> Path:
        return self.path / "slurm"

    def submission(self, number: int) -> Path:
        """Everything about one submission to Slurm: configuration, sbatch texts, job ids, logs."""
        return self.slurm / f"{number:04d}"

    @property
    def store(self) -> Path:
        return self.path / "store.h5"

    @property
    def store_manifest(self) -> Path:
        return self.path / "store.json"

    @property
    def packed(self) -> Path:
        """Shards copied into few large files, by consolidate --repack."""
        return self.path / "packed"

    def packed_file(self, generation: str, number: int) -> Path:
        """generation: a name of what was packed, so that no file under a published store is ever replaced."""
        return self.packed / f"{generation}-{number:03d}.h5"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def checkpoint(self, arm: str) -> Path:
        return self.path / "checkpoints" / arm

    def weights(self, arm: str) -> Path:
        """Final weights of an arm; published last, so it exists only for a finished arm."""
        return self.checkpoint(arm) / "model.safetensors"

    def training(self, arm: str) -> Path:
        """What an arm was trained with and how it went; published just before its weights."""
        return self.checkpoint(arm) / "training.json"

    def training_log(self, arm: str) -> Path:
        return self.checkpoint(arm) / "log.jsonl"

    def best_weights(self, arm: str) -> Path:
        """Weights of the epoch with the best robust accuracy, where weights() are those of the last."""
        return self.checkpoint(arm) / "best.safetensors"

    def steps_log(self, arm: str) -> Path:
        return self.checkpoint(arm) / "steps.jsonl"

    def events(self, arm: str) -> Path:
        """TensorBoard's event files."""
        return self.checkpoint(arm) / "events"

    def not_finite(self, arm: str) -> Path:
        """The batch whose loss was not finite, which ended the training."""
        return self.checkpoint(arm) / "not_finite.json"

    @property
    def results(self) -> Path:
        return self.path / "results"

    def result(self, arm: str) -> Path:
        return self.results / f"{arm}.json"

    def figures(self, arm: str, kind: str = "attacks") -> Path:
        """Figures of a result image by image; of attacks: which the model got right under which."""
        return self.results / (f"{arm}.h5" if kind == "attacks" else f"{arm}.{kind}.h5")

    def explanations(self, arm: str) -> Path:
        return self.results / f"{arm}.explanations.h5"

    def parts(self, arm: str) -> Path:
        """Figures of batches of images; deleted when all are there, and published."""
        return self.results / "parts" / arm

    def part(self, arm: str, kind: str, number: int) -> Path:
        """Figures of one batch."""
        return self.parts(arm) / kind / f"{number:05d}.h5"

    def note(self, arm: str, kind: str) -> Path:
        """What was found about a model as a whole, and what it depends on."""
        return self.results / "notes" / f"{arm}.{kind}.json"

    @property
    def report(self) -> Path:
        return self.path / "report" / "index.html"

    def explained_weights(self, config: Config) -> Path:
        """Weights of the model to be explained: model.weights, or the run's trained baseline; InputError if absent."""
        path = config.model.weights or self.weights("baseline")
        if path.is_file():
            return path
        if config.model.weights is not None:
            raise InputError(f"model.weights = {path}: no such file")
        raise InputError(
            f"model.weights is null and {path} is not there: set model.weights, or add a section baseline and "
            "run `python -m hpcguard.refine CONFIG --arm baseline` first"
        )

    def create(self) -> None:
        """Make the folder, private to its owner. Raises InputError if that is impossible, or others may enter it."""
        try:
            for folder in (self.path, self.shards, self.unfinished, self.failures, self.slurm, self.results, self.logs):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe = self.path / f".writable.{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InputError(
                f"run = {self.path}: cannot be written ({error.filename}: {error.strerror}); set run to another folder"
            ) from error
        check_private(self.path)

    def record_config(self, config: Config, sections: tuple[str, ...] = (), **digests: str) -> None:
        """Publish config.yaml as resolved, with digests and the code's revision.

        sections: only these are the stage's own; the others stay as they are recorded, if they are.
        """
        values = config.model_dump(mode="json")
        for section, key in (
            ("data", "root"),
            ("model", "weights"),
            ("refinement", "deepspeed"),
            ("baseline", "deepspeed"),
        ):
            if values[section] and values[section][key]:
                values[section][key] = str(Path(values[section][key]).resolve())
        known = yaml.safe_load(self.config.read_text(encoding="utf-8")) if self.config.exists() else {}
        recorded = {**known.pop(RECORDED, {}), "hpcguard": __version__, "revision": code_revision(), **digests}
        if known and sections:
            values = {**known, **{section: values[section] for section in sections}}
        values[RECORDED] = recorded
        with publish(self.config) as temporary:
            temporary.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


@dataclass(frozen=True)
class LoopFolder:
    """Paths of a closed loop: a run folder for each round, and what the loop decided."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def record(self) -> Path:
        return self.path / "loop.json"

    def round(self, number: int) -> Path:
        return self.path / f"round-{number}"

    def round_config(self, number: int) -> Path:
        return self.path / f"round-{number}.yaml"

    def create(self) -> None:
        """Make the folder, private to its owner. Raises InputError if it is a run folder or others may enter it."""
        if (self.path / "plan.json").exists():
            raise InputError(
                f"run = {self.path}: is the folder of a single run; set run to another folder for the loop"
            )
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_private(self.path)


def run_of(file: Path) -> RunFolder | None:
    """The run folder that a store, a shard or an explanation file lies in."""
    place = file.resolve()
    for folder in (place.parent, place.parent.parent):
        if RunFolder(folder).config.is_file():
            return RunFolder(folder)
    return None


def check_private(folder: Path) -> None:
    """InputError unless only we can enter a folder: what lies in it is executed."""
    status = folder.stat()
    if status.st_uid != os.getuid():
        raise InputError(f"{folder}: belongs to user {status.st_uid}, not to us; use a run folder of your own")
    if mode := stat.S_IMODE(status.st_mode) & 0o077:
        raise InputError(
            f"{folder}: open to others (mode {stat.S_IMODE(status.st_mode):04o}, {mode:03o} too much); "
            f"check what is in it, then `chmod 700 {folder}`"
        )


@contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success fsync it, rename it to `path` and fsync the folder.

    Whatever happens, `path` is either the old file or the whole new one. The temporary name is unique to this
    attempt, so two writers cannot mix their bytes.
    """
    with publish_together(path) as (temporary,):
        yield temporary


@contextmanager
def publish_together(*paths: Path) -> Iterator[list[Path]]:
    """publish for files of one folder that belong together: none is renamed before all are on the disk.

    They are renamed in their order. Between two renames the first is new and the others are old: let the last be the
    one that says what the others must be.
    """
    folder = paths[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    temporaries = [_temporary(path) for path in paths]
    try:
        yield temporaries
        for temporary in temporaries:
            to_disk(temporary)
        for temporary, path in zip(temporaries, paths, strict=True):
            temporary.replace(path)
        to_disk(folder)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """fsync a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(*paths: Path) -> None:
    """What killed writers of these files have left. Only for who holds their lock: other writers would lose theirs."""
    for path in paths:
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            left.unlink(missing_ok=True)


def publish_json_once(path: Path, values: Mapping[str, Any]) -> bool:
    """Publish a JSON file unless there is one already, however many processes try; whether it was us."""
    temporary = _temporary(path)
    temporary.write_text(_json_text(values), encoding="utf-8")
    try:
        os.link(temporary, path)  # unlike a rename, this fails if the name is taken
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")


def sealed_text(values: Mapping[str, Any]) -> str:
    """What write_sealed publishes."""
    return _json_text(sealed(values))


def _json_text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1) + "\n"


@contextmanager
def exclusive(folder: Path, patience: float = 5.0) -> Iterator[None]:
    """Hold a folder's lock; InputError if another process still has it after `patience` seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise InputError(f"{folder}: another process is writing it; wait for it, or end it") from error
                time.sleep(0.1)
            except OSError:  # a file system without locks: publishing by rename still keeps files whole
                break
        yield


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Hold a lock file for the block, deleted after it; False if another process, on any node, holds it.

    The kernel gives a lock back however its holder ends (on NFS 3 not if the whole node does). True on a file system
    without locks: then work may be done twice, which publishing by rename makes harmless.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    looks = 3
    while True:
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                looks -= 1
                if looks:  # perhaps only is_claimed, which holds it for an instant
                    time.sleep(0.05)
                    continue
                yield False
                return
            except OSError:
                yield True
                return
            if not _is_open_at(path, file.fileno()):
                continue  # its last holder deleted it between our open and our lock
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
            return


def size(path: Path) -> int:
    """Bytes of a file; 0 for one that has just gone."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def is_claimed(path: Path) -> bool:
    """Whether some process holds a lock file."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _is_open_at(path: Path, descriptor: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    with publish(path) as temporary:
        temporary.write_text(_json_text(values), encoding="utf-8")


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Publish a JSON object whose last key is a digest of all others, see read_sealed."""
    write_json(path, sealed(values))


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {**values, SEAL: _seal(values)}


def read_sealed(path: Path, remedy: str, **required: type) -> dict[str, Any]:
    """What write_sealed published, as read_json; InputError too if a single bit of it has changed."""
    text, values = _read_object(path, remedy, required)
    content = {key: value for key, value in values.items() if key != SEAL}
    # The text as well: JSON has several for one value (1e-05 and 1E-05), and every changed bit is to be found.
    if values.get(SEAL) != _seal(content) or text != _json_text({**content, SEAL: values[SEAL]}):
        raise InputError(f"{path}: damaged, its digest does not fit its contents; {remedy}")
    return content


def _seal(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(_json_text(values).encode()).hexdigest()


def read_json(path: Path, remedy: str, **required: type) -> dict[str, Any]:
    """Read a JSON object. Raises InputError with `remedy` if it is missing, torn, or lacks a required key=type."""
    return _read_object(path, remedy, required)[1]


def _read_object(path: Path, remedy: str, required: Mapping[str, type]) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_bytes().decode()  # as it is: read_text would turn \r into \n
        values = json.loads(text)
    except FileNotFoundError as error:
        raise InputError(f"{path}: not there; {remedy}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: damaged, not JSON ({error}); {remedy}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: damaged, expected a JSON object, found {type(values).__name__}; {remedy}")
    for key, kind in required.items():
        if not isinstance(values.get(key), kind):
            raise InputError(f"{path}: damaged, {key} is {_short(values.get(key))}, no {kind.__name__}; {remedy}")
    return text, values


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_json(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def digest_arrays(*arrays: np.ndarray) -> str:
    """SHA-256 over dtypes, shapes and bytes, in hexadecimal."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(f"{array.dtype.str}{array.shape}".encode())
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} as {'a.b': 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """'key: old (now new)' for every differing leaf of two nested mappings; empty if they are equal."""
    old, new = flatten(then), flatten(now)
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{key} was {_short(old.get(key))} (now {_short(new.get(key))})" for key in keys)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"


def code_revision() -> str:
    """Git revision of hpcguard's source, '+changes' if the tree is dirty, 'unknown' outside a checkout."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+changes", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
