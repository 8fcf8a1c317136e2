"""The training store: int16 HU volumes in chunked, compressed, checksummed files with one index.

Layout of a store folder::

    index.json          all cases, and the SHA-256 of itself
    cases/<id>.b2nd     voxels in canonical LPS, HU clipped to [-1024, 3071]; plain Blosc2
    cases/<id>.json     the case's record, with the SHA-256 of itself; written last, so that its
                        presence means "packed"
    quarantine.jsonl    inputs that could not be packed, with field and reason
    .key                random key behind the case ids; without it ids say nothing about paths

Shape suffixes: Z Y X voxels.
"""

import hashlib
import json
import os
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from tapct_fast import _native
from tapct_fast.errors import FormatError, InputError, StoreError
from tapct_fast.io.atomic import atomic_file, read_json, write_json
from tapct_fast.io.case_id import case_id, ensure_key, read_key
from tapct_fast.io.quarantine import Refusal, read_or_refuse, write_quarantine
from tapct_fast.io.read import find_scans
from tapct_fast.io.volume import Volume

STORE_FORMAT = "tapct-store"
STORE_VERSION = 1
HU_RANGE = (-1024, 3071)  # 12 bits: air to dense bone; scanners pad with values below
CHUNK_ZYX = (16, 128, 128)  # voxels; what one checksum covers
BLOCK_ZYX = (4, 64, 64)  # voxels; 32 KiB, decoded alone
CLEVEL = {"lz4hc": 5, "zstd": 3}

Zyx = tuple[int, int, int]
Codec = Literal["lz4hc", "zstd"]


class CaseRecord(NamedTuple):
    """One packed volume.

    Attributes:
        case: Id that reveals nothing about the source; ``locate`` finds the source again.
        file: Path of the voxels inside the store folder.
        shape_zyx: Voxels.
        spacing_mm: z, y, x.
        affine: 16 numbers, rows first; voxel (x, y, z, 1) to RAS+ mm.
        crc32s: One per compressed chunk and one over the rest of the file.
    """

    case: str
    file: str
    shape_zyx: Zyx
    spacing_mm: tuple[float, float, float]
    affine: tuple[float, ...]
    crc32s: tuple[int, ...]


class PackReport(NamedTuple):
    """How many inputs of one ``pack`` call were packed, were there before, and were refused."""

    packed: int
    skipped: int
    quarantined: int


@dataclass(frozen=True, slots=True)
class Store:
    """A store opened for reading; safe to share between threads, cheap to send to processes."""

    directory: Path
    cases: tuple[CaseRecord, ...]
    codec: str
    fingerprint: str  # SHA-256 of the index: equal fingerprints hold equal voxels

    @classmethod
    def open(cls, directory: Path) -> "Store":
        """Read and verify the index.

        Raises:
            StoreError: The folder is no store, or its index is damaged or of another version.
        """
        way_out = "make or rebuild it with 'tapct-fast pack'"
        index = _read_sealed(directory / "index.json", "store index", way_out)
        cases = tuple(_record(raw) for raw in index["cases"])
        return cls(directory, cases, index["codec"], index["sha256"])

    def read_box(
        self, case: int, lo_zyx: Sequence[int], shape_zyx: Sequence[int]
    ) -> npt.NDArray[np.int16]:
        """Decode one box; every chunk it touches is verified.

        Args:
            case: Position in ``cases``.
            lo_zyx: First voxel.
            shape_zyx: Voxels; the box must lie inside the volume.

        Returns:
            HU, int16, of shape ``shape_zyx``.

        Raises:
            StoreError: The box exceeds the volume, or the file is missing or damaged.
        """
        record = self.cases[case]
        if any(
            lo < 0 or size < 1 or lo + size > whole
            for lo, size, whole in zip(lo_zyx, shape_zyx, record.shape_zyx, strict=True)
        ):
            raise StoreError(
                f"box at {tuple(lo_zyx)} of shape {tuple(shape_zyx)} exceeds {record.case} of "
                f"shape {record.shape_zyx}; clip the box before read_box"
            )
        path = os.fsencode(self.directory / record.file)
        try:
            return _native.read_box(path, record.crc32s, lo_zyx, shape_zyx)
        except OSError as error:
            raise StoreError(f"{record.case}: {error.strerror}; {_repack(record.case)}") from None
        except StoreError as error:
            raise StoreError(f"{record.case}: {error}; {_repack(record.case)}") from None

    def read_volume(self, case: int) -> Volume:
        """Decode a whole case.

        Raises:
            StoreError: The file is missing or damaged.
        """
        record = self.cases[case]
        return Volume(
            hu_ZYX=self.read_box(case, (0, 0, 0), record.shape_zyx),
            spacing_mm=record.spacing_mm,
            affine=np.array(record.affine, dtype=np.float64).reshape(4, 4),
        )

    def verify(self) -> None:
        """Read every byte of every case and check it.

        Raises:
            StoreError: A file is missing or damaged; the message names the case.
        """
        for case in range(len(self.cases)):
            self.read_volume(case)


def pack(
    sources: Sequence[Path],
    directory: Path,
    *,
    codec: Codec = "lz4hc",
    series: str | None = None,
    check_hu: bool = True,
    progress: bool = False,
) -> PackReport:
    """Pack scans into a store; run again, it packs only what is missing.

    An input that cannot be read goes to ``quarantine.jsonl`` with its reason and is tried again in
    the next run; the rest goes on.

    Args:
        sources: Scan files, DICOM series folders, or folders searched recursively.
        directory: The store; made if it is missing.
        codec: ``lz4hc`` decodes fastest, ``zstd`` is about 15 % smaller.
        series: See ``read_volume``; for sources that are all DICOM folders.
        check_hu: Refuse volumes whose values cannot be HU.
        progress: Show a progress bar on stderr.

    Raises:
        InputError: A source does not exist or holds no scan.
        StoreError: The folder cannot be written, or holds a store of another version or codec.
    """
    if codec not in CLEVEL:
        raise InputError(f"codec={codec!r} is not one of {', '.join(CLEVEL)}")
    scans = find_scans(sources)
    try:
        return _pack(scans, directory, codec, series, check_hu, progress)
    except OSError as error:
        raise StoreError(
            f"the store cannot be written: {error.strerror}; free space or choose another folder"
        ) from None


def locate(
    directory: Path, case: str, sources: Sequence[Path], *, series: str | None = None
) -> Path:
    """Find which of ``sources``, read with ``series``, became ``case``: ids alone do not tell.

    Raises:
        InputError: None of the sources did.
        StoreError: The store has no key.
    """
    key = read_key(directory)
    scans: list[Path] = find_scans(sources)
    for scan in scans:
        if case_id(scan, key, series) == case:
            return scan
    raise InputError(f"none of these sources is {case}; name the folders that were given to pack")


def _pack(
    scans: Sequence[Path],
    directory: Path,
    codec: Codec,
    series: str | None,
    check_hu: bool,
    progress: bool,
) -> PackReport:
    (directory / "cases").mkdir(parents=True, exist_ok=True)
    _check_codec(directory, codec)
    key = ensure_key(directory)
    packed = skipped = 0
    refused: list[Refusal] = []
    ids = {case_id(scan, key, series): scan for scan in scans}
    for case, scan in tqdm(ids.items(), desc="pack", unit="scan", disable=not progress):
        if _sidecar(directory, case).exists():
            skipped += 1
            continue
        volume = read_or_refuse(scan, case, series=series, check_hu=check_hu)
        if isinstance(volume, Refusal):
            refused.append(volume)
        else:
            _write_case(directory, case, volume, codec)
            packed += 1
    write_quarantine(directory, ids, refused)
    _write_index(directory, codec)
    return PackReport(packed, skipped, len(refused))


def _write_case(directory: Path, case: str, volume: Volume, codec: Codec) -> None:
    hu_ZYX = np.clip(volume.hu_ZYX, *HU_RANGE)
    file = f"cases/{case}.b2nd"
    with atomic_file(directory / file) as temporary:
        crc32s = _native.write_b2nd(
            os.fsencode(temporary), hu_ZYX, codec, CLEVEL[codec], CHUNK_ZYX, BLOCK_ZYX
        )
    z, y, x = hu_ZYX.shape
    record = CaseRecord(
        case=case,
        file=file,
        shape_zyx=(z, y, x),
        spacing_mm=volume.spacing_mm,
        affine=tuple(float(a) for a in volume.affine.ravel()),
        crc32s=tuple(crc32s),
    )
    _write_sealed(_sidecar(directory, case), _versioned(codec) | record._asdict())


def _write_index(directory: Path, codec: Codec) -> None:
    """List every packed case: those of this run and of earlier ones."""
    cases = []
    for sidecar in sorted((directory / "cases").glob("case-*.json")):
        raw = _read_sealed(sidecar, f"record of {sidecar.stem}", _repack(sidecar.stem))
        if raw["codec"] != codec:
            raise StoreError(
                f"{sidecar.stem} is {raw['codec']}, not {codec}; {_repack(sidecar.stem)}"
            )
        cases.append(_record(raw)._asdict())
    _write_sealed(directory / "index.json", _versioned(codec) | {"cases": cases})


def _check_codec(directory: Path, codec: Codec) -> None:
    """Refuse to add to a store of another version or codec before hours of packing."""
    try:
        raw = read_json(directory / "index.json", "store index")
    except FormatError:
        return  # missing or damaged: it is rebuilt from the records of the cases
    _check_version(raw)
    if raw.get("codec") != codec:
        raise StoreError(f"the store is packed as {raw.get('codec')}; use that or a new folder")


def _versioned(codec: str) -> dict[str, Any]:
    return {"format": STORE_FORMAT, "version": STORE_VERSION, "codec": codec}


def _check_version(raw: Any) -> None:
    if not isinstance(raw, dict) or raw.get("format") != STORE_FORMAT:
        raise StoreError("this is not a tapct store; make one with 'tapct-fast pack'")
    if raw.get("version") != STORE_VERSION:
        raise StoreError(
            f"written by store version {raw.get('version')}; this tapct_fast reads "
            f"{STORE_VERSION}: pack again"
        )


def _sha256(content: dict[str, Any]) -> str:
    """Hash an object in one canonical form, without its own hash."""
    content = {key: value for key, value in content.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _write_sealed(path: Path, content: dict[str, Any]) -> None:
    write_json(path, content | {"sha256": _sha256(content)})


def _read_sealed(path: Path, kind: str, way_out: str) -> dict[str, Any]:
    try:
        raw = read_json(path, kind)
    except FormatError as error:
        raise StoreError(f"{error}; {way_out}") from None
    _check_version(raw)
    if raw.get("sha256") != _sha256(raw):
        raise StoreError(f"{kind}: {path.name} is damaged; {way_out}")
    return typing.cast(dict[str, Any], raw)


def _record(raw: dict[str, Any]) -> CaseRecord:
    z, y, x = raw["shape_zyx"]
    sz, sy, sx = raw["spacing_mm"]
    case, file = raw["case"], raw["file"]
    if file != f"cases/{case}.b2nd" or "/" in case:
        raise StoreError("a case record points outside its store; pack it again")
    affine, crc32s = tuple(raw["affine"]), tuple(raw["crc32s"])
    return CaseRecord(case, file, (z, y, x), (sz, sy, sx), affine, crc32s)


def _repack(case: str) -> str:
    return f"delete cases/{case}.json and pack again"


def _sidecar(directory: Path, case: str) -> Path:
    return directory / "cases" / f"{case}.json"
