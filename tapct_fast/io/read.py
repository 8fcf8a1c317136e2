"""The door for every scan: find scans, read one of any format, refuse what cannot be CT.

Shape suffixes: Z Y X voxels.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tapct_fast import _native
from tapct_fast.errors import FormatError, InputError, Policy
from tapct_fast.io.dicom.archive import is_zip
from tapct_fast.io.dicom.file import DICOM_SUFFIXES
from tapct_fast.io.dicom.read import read_series
from tapct_fast.io.findings import Inspection, Report
from tapct_fast.io.itk import read_itk, read_itk_labels
from tapct_fast.io.nifti import read_nifti, read_nifti_labels
from tapct_fast.io.orient import axes_of
from tapct_fast.io.volume import Volume

_NIFTI_SUFFIXES = (".nii", ".nii.gz")
_ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
_VOLUME_SUFFIXES = (*_NIFTI_SUFFIXES, *_ITK_SUFFIXES, ".zip")

# Fat is near -100 HU and noise of a CT is above 5 HU: a scan with neither fat nor air below this is
# a windowed image, a label map, or stored values without their rescale intercept.
_HIGHEST_MINIMUM = -50
_LOWEST_MAXIMUM = -200  # a scan with no voxel above this holds no tissue
_CT_RANGE = (-4096, 4096)  # most voxels; padding and metal lie outside


def read_volume(
    path: Path | str,
    *,
    series: str | None = None,
    check_hu: bool = True,
    policy: Policy = "error",
    buffer: NDArray[Any] | None = None,
    threads: int = 1,
) -> Volume:
    """Read one CT as Hounsfield units in canonical LPS.

    Args:
        path: A ``.nii``, ``.nii.gz``, ``.nrrd``, ``.nhdr``, ``.mha`` or ``.mhd`` file, or a folder
            or zip archive with the slices of a DICOM series.
        series: Which series of a DICOM folder with several; see ``io.dicom.read.list_series``.
        check_hu: Doubt values which cannot be Hounsfield units.
        policy: What becomes of doubts and of damage that can be repaired: ``error`` refuses both,
            ``warn`` keeps doubtful scans as they are, ``repair`` also mends; see ``io.findings``.
        buffer: For NIfTI files: decode into this memory instead of new memory, and return voxels
            that are a view of it; see ``io.nifti.read_nifti``. A reused (or pinned) buffer saves
            the time in which the system clears new memory.
        threads: For NIfTI files of several gzip members, as ``write_nifti`` makes them: decode so
            many at once.

    Returns:
        Volume with ``hu_ZYX`` int16 (stored slope and intercept applied, nothing clipped) and the
        report of what was found.

    Raises:
        InputError: Nothing is there, or an optional reader is not installed.
        FormatError: The file is damaged, contradicts itself or is not CT.
    """
    return _read(
        Path(path),
        Inspection(policy),
        series=series,
        check_hu=check_hu,
        buffer=buffer,
        threads=threads,
    )


def check_volume(path: Path | str, *, series: str | None = None, check_hu: bool = True) -> Report:
    """Read a scan to its end and report everything that is wrong with it, without raising for it.

    Args:
        path: See ``read_volume``.
        series: See ``read_volume``.
        check_hu: Doubt values which cannot be Hounsfield units.

    Returns:
        The findings that ``read_volume`` would meet; ``report.refusal(policy)`` says which of them
        would stop it. A finding of severity ``refuse`` ends the inspection.

    Raises:
        InputError: Nothing is there, or an optional reader is not installed.
    """
    inspection = Inspection("repair")
    try:
        _read(Path(path), inspection, series=series, check_hu=check_hu)
    except FormatError as error:
        inspection.record(error)
    return inspection.report()


def check_series(folder: Path | str, *, series: str | None = None, check_hu: bool = True) -> Report:
    """Report everything that is wrong with a DICOM series; see ``check_volume``.

    Raises:
        InputError: There is no such folder, archive or series, or pydicom is not installed.
    """
    if not is_series(Path(folder)):
        raise InputError("this is not a folder or zip archive of DICOM files; use check_volume")
    return check_volume(folder, series=series, check_hu=check_hu)


def _read(
    path: Path,
    inspection: Inspection,
    *,
    series: str | None,
    check_hu: bool,
    buffer: NDArray[Any] | None = None,
    threads: int = 1,
) -> Volume:
    kind = _kind(path)
    if buffer is not None and kind != "nifti":
        raise InputError("buffer= is for NIfTI files; leave it out")
    if series is not None and kind != "dicom":
        raise InputError("series= is for DICOM folders, and this is a file; leave it out")
    if kind == "dicom":
        volume = read_series(path, series=series, inspection=inspection)
    elif kind == "nifti":
        volume = read_nifti(path, inspection, buffer=buffer, threads=threads)
    else:
        volume = read_itk(path)
        inspection.facts |= _facts_of(volume, path)
    if check_hu:
        check_is_hu(volume.hu_ZYX, inspection)
    return replace(volume, report=inspection.report())


def _facts_of(volume: Volume, path: Path) -> dict[str, Any]:
    """Return the facts that ``read_itk`` has no inspection to tell."""
    assert volume.stored is not None
    with path.open("rb") as file:
        is_nrrd = file.read(4) == b"NRRD"
    return {
        "format": "NRRD" if is_nrrd else "MetaImage",
        "shape_zyx": list(volume.hu_ZYX.shape),
        "spacing_mm": list(volume.spacing_mm),
        "stored_axes": axes_of(volume.stored.affine),
    }


def read_labels(path: Path | str) -> Volume:
    """Read a label map in canonical LPS; ``hu_ZYX`` of the result holds the int16 labels.

    Raises:
        InputError: Nothing is there, or it is a folder.
        FormatError: The file is damaged, or a label is not a whole number.
    """
    path = Path(path)
    kind = _kind(path)
    if kind == "dicom":
        raise InputError("a folder is not a label map; give a NIfTI, NRRD or MetaImage file")
    return read_nifti_labels(path) if kind == "nifti" else read_itk_labels(path)


def check_is_hu(hu: NDArray[np.int16], inspection: Inspection) -> None:
    """Doubt a volume whose values cannot be Hounsfield units.

    Raises:
        FormatError: The values are constant, windowed, normalised, unscaled or scrambled, and the
            policy refuses doubts.
    """
    way_out = "if these are HU all the same, pass check_hu=False (--no-check-hu)"
    low, high, num_inside = _native.hu_stats(np.ascontiguousarray(hu), *_CT_RANGE)
    reason = None
    if low == high:
        reason = f"every voxel is {low}"
    elif low >= _HIGHEST_MINIMUM and high <= 255:
        reason = "an 8-bit image, a label map or normalised values"
    elif low >= _HIGHEST_MINIMUM:
        reason = "neither air nor fat: not CT, or the rescale intercept was never applied"
    elif high <= _LOWEST_MAXIMUM:
        reason = "no tissue: not CT, or an intercept applied twice"
    elif num_inside < 0.5 * hu.size:
        reason = f"most voxels lie outside {_CT_RANGE[0]}..{_CT_RANGE[1]}: scrambled bytes?"
    inspection.facts["hu_range"] = [low, high]
    if reason:
        inspection.doubt("hu", "HU", f"values {low}..{high} cannot be a CT ({reason}); {way_out}")


def find_scans(paths: Sequence[Path]) -> list[Path]:
    """List the scans that files and folders name, each once, in the given order.

    A file is taken as it is. A folder is searched with all folders below it: every volume file is a
    scan, and so is every folder in which DICOM files lie.

    Raises:
        InputError: A path does not exist or holds no scan; it is named by its position.
    """
    return list(iter_scans(paths))


def iter_scans(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield what ``find_scans`` lists while the search goes on; of a scan passed it keeps 16 bytes.

    Raises:
        InputError: See ``find_scans``; in its turn.
    """
    seen: set[bytes] = set()
    for number, path in enumerate(paths, start=1):
        if not path.exists():
            raise InputError(f"input {number} does not exist; check the path")
        is_empty = True
        for scan in _search(path) if path.is_dir() else [path]:
            is_empty = False
            place = hashlib.blake2b(os.fsencode(os.path.realpath(scan)), digest_size=16).digest()
            if place not in seen:
                seen.add(place)
                yield scan
        if is_empty:
            raise InputError(
                f"input {number} is a folder without scans; a scan is a .nii, .nii.gz, .nrrd, "
                ".nhdr, .mha or .mhd file, or a folder or zip archive of DICOM slices"
            )


def _search(folder: Path) -> Iterator[Path]:
    """Yield scans below a folder in name order, following links but visiting no folder twice."""
    visited = set()
    for name, subfolders, files in os.walk(folder, followlinks=True):
        here, place = Path(name), os.path.realpath(name)
        if place in visited:
            subfolders.clear()
            continue
        visited.add(place)
        subfolders[:] = sorted(entry for entry in subfolders if not entry.startswith("."))
        shown = [here / entry for entry in sorted(files) if not entry.startswith(".")]
        if any(_looks_like_dicom(path) for path in shown):
            yield here
        yield from (path for path in shown if _has_suffix(path, _VOLUME_SUFFIXES))


def is_series(path: Path) -> bool:
    """Say whether a scan is a folder or archive of DICOM files, which may hold several series.

    Raises:
        InputError: Nothing is there.
        FormatError: It is no scan.
    """
    return _kind(path) == "dicom"


def _kind(path: Path) -> Literal["dicom", "nifti", "itk"]:
    """Tell the format by content where it says so, else by the name."""
    if path.is_dir():
        return "dicom"
    try:
        with path.open("rb") as file:
            start = file.read(352)
    except OSError as error:
        raise InputError(f"the scan cannot be opened: {error.strerror}; check the path") from None
    if is_zip(start):
        return "dicom"
    if start[128:132] == b"DICM" or _has_suffix(path, DICOM_SUFFIXES):
        raise InputError("one DICOM file is not a volume; give the folder that holds its series")
    if start[:4] == b"NRRD" or start[:10] == b"ObjectType" or start[:5] == b"NDims":
        return "itk"
    if start[:2] == b"\x1f\x8b" or start[344:347] in (b"n+1", b"ni1") or start[4:7] == b"n+2":
        return "nifti"
    if _has_suffix(path, _ITK_SUFFIXES):
        return "itk"
    if _has_suffix(path, _NIFTI_SUFFIXES):
        return "nifti"
    raise FormatError(
        "file",
        "is not NIfTI, NRRD or MetaImage; for DICOM give the folder that holds the series",
        "unsupported",
    )


def _has_suffix(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(suffixes)


def _looks_like_dicom(path: Path) -> bool:
    """Tell a slice by its mark; an unreadable or misnamed file is left for the reader to judge."""
    if path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    if _has_suffix(path, DICOM_SUFFIXES):
        return True
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False
