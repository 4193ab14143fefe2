"""A selection of rows as a NumPy archive or as a plain HDF5 file: nothing of hpcguard is needed to read either."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np

from hpcguard.runs import publish
from hpcguard.store.reading import StoreReader
from hpcguard.store.schema import COLUMN
from hpcguard.store.sink import new_file

CHUNK_BYTES = 2**16
AXES = {"N": "image", "L": "explained label", "S": "segment", "H": "row", "W": "column"}
MEANING = {
    "image_id": "the image's place in the original training or test part of its data set, from 0",
    "label": "true class",
    "predicted": "class of the largest probability",
    "segments": "superpixel of every pixel, from 0",
    "num_segments": "superpixels of the image",
    "target": "explained class: first the true one, then the strongest other one",
    "probability": "the model's probability of the explained class on the whole image",
    "coefficients": "LIME's weight of each superpixel for the explained class; NaN past num_segments",
    "standard_error": "standard error of each coefficient; NaN past num_segments",
    "interval": "half the width of each coefficient's 95% interval; NaN past num_segments",
    "sensitivity": "mean |d margin / d x| over a superpixel's pixels and channels, x in [0, 1]; margin: logit of the "
    "first explained class less the second's; NaN past num_segments, everywhere if not computed",
    "instability": "variance of the first explained class's coefficient between noisy copies of the image; NaN past "
    "num_segments, everywhere if not computed",
    "intercept": "intercept of the linear surrogate",
    "score": "weighted R^2 of the linear surrogate",
    "effective_samples": "(sum of weights)^2 / sum of squared weights",
    "num_samples": "perturbed images that the model looked at",
}


def write_npz(path: Path, reader: StoreReader, rows: np.ndarray, classes: Sequence[str]) -> None:
    """Every column as an array, and schema, fingerprint and classes; np.load needs no pickle for it."""
    arrays = {name: reader.rows(name, rows) for name in reader.shapes}
    about = {"schema": np.array(reader.schema), "fingerprint": np.array(reader.fingerprint)}
    with publish(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **about, classes=np.array(classes, np.str_), **arrays)


def write_plain(path: Path, reader: StoreReader, rows: np.ndarray, classes: Sequence[str]) -> None:
    """One HDF5 file of HDF5's own filters that says of every column what it is; written block by block."""
    with publish(path) as temporary, new_file(temporary, path) as (file, sink):
        file.attrs["schema"] = reader.schema
        file.attrs["fingerprint"] = reader.fingerprint
        if classes:
            file.attrs["classes"] = np.array(classes, h5py.string_dtype())
        for name, shape in reader.shapes.items():
            for _ in _write_column(file, reader, name, (len(rows), *shape[1:]), rows):
                sink.check()


def _write_column(
    file: h5py.File, reader: StoreReader, name: str, shape: tuple[int, ...], rows: np.ndarray
) -> Iterator[None]:
    """Yields after every block."""
    chunk = min(len(rows), max(1, CHUNK_BYTES // max(1, reader.row_bytes([name]))))
    made = file.create_dataset(
        name, shape, reader.dtypes[name], chunks=(chunk, *shape[1:]), compression="gzip", compression_opts=4,
        shuffle=True, fletcher32=True,
    )  # fmt: skip
    made.attrs["meaning"] = MEANING.get(name, "")
    for place, axis in enumerate(COLUMN[name].axes):
        made.dims[place].label = AXES[axis]
    step = chunk * -(-1024 // chunk)
    for start in range(0, len(rows), step):
        made[start : start + step] = reader.rows(name, rows[start : start + step])
        yield
