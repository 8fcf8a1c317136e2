"""Read one DICOM CT series from a folder.

Common readers return a volume for nearly every broken series, with a wrong spacing. Here a folder
gives the one volume its headers prove, or an error that names the field.

Shape suffixes: N slices, Z Y X voxels.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.dicom_slice import (
    CT_IMAGE,
    DICOMDIR,
    MULTI_FRAME_CT,
    SHARED_FIELDS,
    DicomFile,
    check_slice,
    integer_of,
    is_dicom,
    is_localizer,
    numbers_of,
    read_header,
    read_hu,
    silence_pydicom,
    text_of,
)
from tapct_fast.io.findings import Inspection
from tapct_fast.io.orient import spacing_of, to_lps
from tapct_fast.io.slices import SliceStack, stack_slices
from tapct_fast.io.volume import MAX_VOXELS, Volume

# Printed when a folder holds no CT; any other text in the field could be a name.
_MODALITIES = frozenset(
    {
        *(
            "CT",
            "MR",
            "PT",
            "NM",
            "US",
            "CR",
            "DX",
            "MG",
            "XA",
            "OT",
            "SC",
            "SEG",
            "SR",
            "PR",
            "KO",
        ),
        *("REG", "DOC", "RTSTRUCT", "RTDOSE", "RTPLAN"),
    }
)


class SeriesInfo(NamedTuple):
    """One series of a folder, described without any text from its files."""

    key: str  # what ``series=`` takes: "1", "2", ... in the order of SeriesInstanceUID
    modality: str
    num_slices: int
    matrix_yx: tuple[int, int] | None  # None where the headers do not say
    spacing_mm: tuple[float, float, float] | None  # z, y, x; None where slices form no grid

    def __str__(self) -> str:
        matrix = "x".join(map(str, self.matrix_yx)) if self.matrix_yx else "unknown size"
        spacing = "no regular spacing"
        if self.spacing_mm:
            spacing = "spacing " + " x ".join(f"{mm:.3g}" for mm in self.spacing_mm) + " mm"
        return f"{self.key} ({self.modality}, {self.num_slices} slices of {matrix}, {spacing})"


def list_series(folder: Path) -> list[SeriesInfo]:
    """List the series whose files lie directly in a folder.

    Raises:
        InputError: pydicom is not installed, or the folder holds no DICOM files.
        FormatError: A file is damaged.
    """
    with silence_pydicom():
        return [_describe(key, files) for key, files in _group(_headers(folder)).items()]


def read_series(
    folder: Path, *, series: str | None = None, inspection: Inspection | None = None
) -> Volume:
    """Read one CT series as Hounsfield units.

    Args:
        folder: Holds the slices directly. Other files and other modalities in it are passed over.
        series: Which series, by the key of ``list_series`` or the whole SeriesInstanceUID; needed
            where the folder holds more than one CT series.
        inspection: Receives what is found; by default nothing doubtful is accepted.

    Returns:
        Volume in canonical LPS; each slice's own slope and intercept are applied, and positions,
        not file names or instance numbers, give the order.

    Raises:
        InputError: pydicom or a decoder is not installed, no DICOM file or no such series.
        FormatError: The series is not a regular CT volume, or a file is damaged.
    """
    inspection = inspection or Inspection()
    with silence_pydicom():
        files = _choose(_group(_headers(folder)), series)
        rows, columns = _check_series(files)
        stack = _stack(files)
        file_ZYX = np.empty((len(files), rows, columns), np.int16)
        for z, index in enumerate(stack.order):
            file_ZYX[z] = read_hu(files[index], rows, columns)
    hu_ZYX, affine = to_lps(file_ZYX, stack.affine)
    return Volume(hu_ZYX=hu_ZYX, spacing_mm=spacing_of(affine), affine=affine)


def _headers(folder: Path) -> list[DicomFile]:
    """Parse the header of every DICOM file directly in the folder, in name order."""
    try:
        paths = sorted(
            path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")
        )
    except OSError as error:
        raise InputError(f"the folder cannot be read: {error.strerror}") from None
    files = []
    for number, path in enumerate(paths, start=1):
        place = f"file {number} of {len(paths)}"
        if is_dicom(path, place):
            file = DicomFile(path, read_header(path, place), place)
            if text_of(file, "MediaStorageSOPClassUID") != DICOMDIR:
                files.append(file)
    if not files:
        raise InputError(
            "the folder holds no DICOM files; name the folder in which the slices of a series lie"
        )
    return files


def _group(files: list[DicomFile]) -> dict[str, list[DicomFile]]:
    """Split files into series, keyed "1", "2", ... in the order of SeriesInstanceUID."""
    series: dict[tuple[str, str], list[DicomFile]] = {}
    for file in files:
        for field in ("Modality", "SeriesInstanceUID"):
            if field not in file.header:
                raise FormatError(field, f"missing in {file.place}; the file may be cut short")
        uids = (text_of(file, "SeriesInstanceUID"), text_of(file, "StudyInstanceUID"))
        series.setdefault(uids, []).append(file)
    return {str(key): series[uids] for key, uids in enumerate(sorted(series), start=1)}


def _choose(groups: dict[str, list[DicomFile]], series: str | None) -> list[DicomFile]:
    """Return the files of the series asked for, or of the only CT series."""
    if series is not None:
        for key, files in groups.items():
            if series == key or series == text_of(files[0], "SeriesInstanceUID"):
                return files
    candidates = {
        key: files
        for key, files in groups.items()
        if any(text_of(file, "Modality") == "CT" for file in files)
        and any(text_of(file, "SOPClassUID") in ("", CT_IMAGE, *MULTI_FRAME_CT) for file in files)
        and not all(is_localizer(file) for file in files)
    }
    if series is None and len(candidates) == 1:
        return next(iter(candidates.values()))
    listing = "; ".join(str(_describe(*item)) for item in (candidates or groups).items())
    if series is not None:
        raise InputError(f"no such series; the folder holds {listing}")
    if candidates:
        raise FormatError(
            "SeriesInstanceUID",
            f"the folder holds {len(candidates)} CT series: {listing}; name one, for example "
            f"series={min(candidates)!r} (--series {min(candidates)}), or give each its own folder",
        )
    # Nothing to choose: the checks of a lone series name the field that rules it out.
    if len(groups) == 1:
        return next(iter(groups.values()))
    raise FormatError("Modality", f"the folder holds no CT images, only {listing}")


def _describe(key: str, files: list[DicomFile]) -> SeriesInfo:
    modality = text_of(files[0], "Modality")
    try:
        matrix_yx = (integer_of(files[0], "Rows"), integer_of(files[0], "Columns"))
    except FormatError:
        matrix_yx = None
    try:
        spacing_mm = spacing_of(_stack(files).affine)
    except FormatError:
        spacing_mm = None
    return SeriesInfo(
        key, modality if modality in _MODALITIES else "other", len(files), matrix_yx, spacing_mm
    )


def _check_series(files: list[DicomFile]) -> tuple[int, int]:
    """Refuse files that are not slices of one CT; return their rows and columns."""
    for file in files:
        check_slice(file)
    for field in SHARED_FIELDS:
        if len({text_of(file, field) for file in files}) > 1:
            raise FormatError(field, "differs between slices; the series mixes several scans")
    rows, columns = (integer_of(files[0], field) for field in ("Rows", "Columns"))
    for file in files:
        for field, first in (("Rows", rows), ("Columns", columns)):
            if integer_of(file, field) != first:
                raise FormatError(
                    field,
                    f"is {integer_of(file, field)} in {file.place}, {first} in the first slice",
                )
    if len(files) * rows * columns > MAX_VOXELS:
        raise FormatError("Rows, Columns", f"{len(files)} slices of {rows}x{columns} are too many")
    return rows, columns


def _stack(files: list[DicomFile]) -> SliceStack:
    """Sort the slices of a series and check that they form a regular grid."""
    orientation_N6 = np.array([numbers_of(file, "ImageOrientationPatient", 6) for file in files])
    stack = stack_slices(
        np.array([numbers_of(file, "ImagePositionPatient", 3) for file in files]),
        orientation_N6,
        np.array([numbers_of(file, "PixelSpacing", 2) for file in files]),
    )
    is_axial = np.allclose(orientation_N6[0], (1, 0, 0, 0, 1, 0), atol=1e-3)
    for file in files:
        # A reformatted stack may be axial although the gantry was tilted; an original one cannot.
        if is_axial and "ORIGINAL" in text_of(file, "ImageType"):
            tilt_deg = numbers_of(file, "GantryDetectorTilt", 1, missing=0.0)[0]
            if abs(tilt_deg) > 0.5:
                raise FormatError(
                    "GantryDetectorTilt",
                    f"{tilt_deg:g} degrees in {file.place}, but ImageOrientationPatient shows none",
                )
    return stack
