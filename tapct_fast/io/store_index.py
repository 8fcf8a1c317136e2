"""The JSON files of a store: the index, and one record per case; each holds its own SHA-256."""

import hashlib
import json
import typing
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tapct_fast.errors import FormatError, StoreError
from tapct_fast.io.atomic import MAX_JSON_BYTES, parse_json, read_limited, write_atomic

STORE_FORMAT = "tapct-store"
STORE_VERSION = 3

Zyx = tuple[int, int, int]
Codec = Literal["lz4hc", "zstd"]


class CaseRecord(NamedTuple):
    """One packed volume.

    Attributes:
        case: Id that reveals nothing about the source; ``locate`` finds the source again.
        file: Path of the voxels inside the store folder.
        shape_zyx: Voxels.
        spacing_mm: z, y, x.
        body_zyx: First voxel and end of the box that holds the patient; see ``io.body``.
        affine: 16 numbers, rows first; voxel (x, y, z, 1) to RAS+ mm.
        crc32s: Big endian, 4 bytes each: one per compressed chunk and one over the rest of the
            file; hexadecimal in the JSON files.
        source_sha256: Of the source, hexadecimal; see ``io.source``.
        source_bytes: Size of the source.
    """

    case: str
    file: str
    shape_zyx: Zyx
    spacing_mm: tuple[float, float, float]
    body_zyx: tuple[Zyx, Zyx]
    affine: tuple[float, ...]
    crc32s: bytes
    source_sha256: str = ""
    source_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return self._asdict() | {"crc32s": self.crc32s.hex()}


def record_of(raw: dict[str, Any]) -> CaseRecord:
    """Return the record in a JSON object whose SHA-256 was right.

    Raises:
        StoreError: It points outside its store.
    """
    z, y, x = raw["shape_zyx"]
    sz, sy, sx = raw["spacing_mm"]
    (lz, ly, lx), (hz, hy, hx) = raw["body_zyx"]
    case, file = raw["case"], raw["file"]
    if file != f"cases/{case}.b2nd" or "/" in case:
        raise StoreError("a case record points outside its store; pack it again")
    return CaseRecord(
        case,
        file,
        (z, y, x),
        (sz, sy, sx),
        ((lz, ly, lx), (hz, hy, hx)),
        tuple(raw["affine"]),
        bytes.fromhex(raw["crc32s"]),
        raw["source_sha256"],
        raw["source_bytes"],
    )


def versioned(codec: str) -> dict[str, Any]:
    """Return the fields that every JSON file of a store begins with."""
    return {"format": STORE_FORMAT, "version": STORE_VERSION, "codec": codec}


def check_version(raw: Any) -> None:
    """Refuse what another version or another program wrote.

    Raises:
        StoreError: It is not of this version.
    """
    if not isinstance(raw, dict) or raw.get("format") != STORE_FORMAT:
        raise StoreError("this is not a tapct store; make one with 'tapct-fast pack'")
    if raw.get("version") != STORE_VERSION:
        raise StoreError(
            f"written by store version {raw.get('version')}; this tapct_fast reads "
            f"{STORE_VERSION}: pack again into a new folder"
        )


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object with its SHA-256, atomically."""
    text = _canonical(content)
    # The text that is hashed is the one written: who reads it need not make it again.
    write_atomic(path, text[:-1] + _seal(hashlib.sha256(text).hexdigest()))


def read_sealed(
    path: Path, kind: str, way_out: str, *, limit: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """Read a JSON object and hold it to its SHA-256; ``kind`` names it in errors.

    Raises:
        StoreError: It is missing, larger than ``limit`` bytes, damaged or of another version.
    """
    try:
        data = read_limited(path, kind, limit=limit)
        raw = parse_json(data, path, kind)
    except FormatError as error:
        raise StoreError(f"{error}; {way_out}") from None
    check_version(raw)
    stated = raw.get("sha256")
    seal = _seal(str(stated))
    if data.endswith(seal):
        digest = hashlib.sha256(memoryview(data)[: -len(seal)])
        digest.update(b"}")
        found = digest.hexdigest()
    else:  # laid out otherwise, as until 0.1
        content = {key: value for key, value in raw.items() if key != "sha256"}
        found = hashlib.sha256(_canonical(content)).hexdigest()
    if stated != found:
        raise StoreError(f"{kind}: {path.name} is damaged; {way_out}")
    return typing.cast(dict[str, Any], raw)


def _canonical(content: dict[str, Any]) -> bytes:
    """Return the one form of an object that is hashed."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _seal(sha256: str) -> bytes:
    return f',"sha256":"{sha256}"}}'.encode()
