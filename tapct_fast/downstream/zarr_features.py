"""A Zarr v3 group of a few arrays, written so that the same arrays give the same bytes.

One group per scan, uncompressed (float16 features hardly shrink), one chunk per 16 entries of the
first axis. Any Zarr v3 library reads it; writing and reading it takes none.

Source: Zarr core specification 3.0, zarr-specs.readthedocs.io.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tapct_fast.errors import FormatError
from tapct_fast.io.atomic import atomic_folder, read_json, sha256_file

CHUNK_ROWS = 16  # token slices; 19 MB of a ViT-B at 28 x 28 tokens
MAX_BYTES = 2**36  # of one array
_DTYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}

Array = NDArray[Any]


def write_group(
    path: Path, arrays: Mapping[str, tuple[Array, tuple[str, ...]]], attributes: Mapping[str, Any]
) -> tuple[str, int]:
    """Write arrays with the names of their axes as the group ``path``, atomically.

    Returns:
        The digest of ``digest_group`` and the bytes of all files.
    """
    with atomic_folder(path) as folder:
        group = {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}
        (folder / "zarr.json").write_text(json.dumps(group, indent=1) + "\n")
        for name, (array, axes) in arrays.items():
            _write_array(folder / name, array, axes)
        digest = digest_group(folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return digest, size


def digest_group(path: Path) -> str:
    """Return the SHA-256 over ``<sha256>  <name>`` of every file, a line each, sorted by name.

    It is what ``find * -type f | LC_ALL=C sort | xargs sha256sum | sha256sum`` prints there.
    """
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    lines = (f"{sha256_file(files[name])}  {name}\n" for name in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_array(path: Path) -> Array:
    """Read one array that ``write_group`` wrote.

    Raises:
        FormatError: It is of another form.
        OSError: A file cannot be read.
    """
    meta = read_json(path / "zarr.json", "features")
    try:
        shape = tuple(int(size) for size in meta["shape"])
        rows = int(meta["chunk_grid"]["configuration"]["chunk_shape"][0])
        dtype = _DTYPES[meta["data_type"]]
        if meta != _meta(shape, meta["data_type"], tuple(meta["dimension_names"]), rows):
            raise ValueError("written by another program")
        if rows < 1 or min(shape) < 1 or math.prod(shape) * dtype.itemsize > MAX_BYTES:
            raise ValueError("sizes out of range")
    except (KeyError, TypeError, IndexError, ValueError):
        raise FormatError("features", "a Zarr array of another form; embed again") from None
    array: Array = np.empty(shape, dtype)
    for place, first in _chunks(shape, rows):
        chunk = np.fromfile(path / "c" / place, dtype)
        if chunk.size != rows * math.prod(shape[1:]):
            raise FormatError("features", "a Zarr chunk has another length; embed again")
        held = array[first : first + rows]
        held[...] = chunk.reshape(rows, *shape[1:])[: len(held)]
    return array


def _write_array(path: Path, array: Array, axes: tuple[str, ...]) -> None:
    path.mkdir()
    rows = min(CHUNK_ROWS, len(array))
    meta = _meta(array.shape, array.dtype.name, axes, rows)
    (path / "zarr.json").write_text(json.dumps(meta, indent=1) + "\n")
    for place, first in _chunks(array.shape, rows):
        chunk = np.zeros((rows, *array.shape[1:]), _DTYPES[array.dtype.name])
        part = array[first : first + rows]
        chunk[: len(part)] = part
        file = path / "c" / place
        file.parent.mkdir(parents=True, exist_ok=True)
        chunk.tofile(file)


def _chunks(shape: tuple[int, ...], rows: int) -> Iterator[tuple[str, int]]:
    """Yield name and first row of each chunk: they differ along the first axis only."""
    for number, first in enumerate(range(0, shape[0], rows)):
        yield "/".join([str(number), *["0"] * (len(shape) - 1)]), first


def _meta(shape: tuple[int, ...], dtype: str, axes: tuple[str, ...], rows: int) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [rows, *shape[1:]]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "dimension_names": list(axes),
        "attributes": {},
    }
