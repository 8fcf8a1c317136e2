"""Read one DICOM CT series from a folder.

Common readers return a volume for nearly every broken series, with a wrong spacing. Here a folder
gives the one volume its headers prove, or an error that names the field.

Shape suffixes: N slices, Z Y X voxels.
"""

from pathlib import Path
from typing import NamedTuple

from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.dicom.fields import integer_of, text_of
from tapct_fast.io.dicom.file import (
    CT_IMAGE,
    MULTI_FRAME_CT,
    DicomFile,
    num_threads,
    open_files,
)
from tapct_fast.io.dicom.series import read_volume_of, stack_of
from tapct_fast.io.dicom.slice import is_localizer
from tapct_fast.io.findings import Inspection
from tapct_fast.io.orient import spacing_of
from tapct_fast.io.volume import Volume

_CT_CLASSES = ("", CT_IMAGE, *MULTI_FRAME_CT)

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


def list_series(folder: Path, *, threads: int | None = None) -> list[SeriesInfo]:
    """List the series whose files lie directly in a folder, or in a zip archive.

    Raises:
        InputError: The folder holds no DICOM files.
        FormatError: A file is damaged.
    """
    with open_files(folder, num_threads(threads)) as files:
        return [_describe(key, group) for key, group in _group(files).items()]


def read_series(
    folder: Path,
    *,
    series: str | None = None,
    inspection: Inspection | None = None,
    threads: int | None = None,
) -> Volume:
    """Read one CT series as Hounsfield units.

    Args:
        folder: Holds the slices directly, or is a zip archive of them. Other files and other
            modalities in it are passed over.
        series: Which series, by the key of ``list_series`` or the whole SeriesInstanceUID; needed
            where the folder holds more than one CT series.
        inspection: Receives what is found; by default nothing doubtful is accepted.
        threads: Read headers and pixels; None takes all cores.

    Returns:
        Volume in canonical LPS; each slice's own slope and intercept are applied, and positions,
        not file names or instance numbers, give the order.

    Raises:
        InputError: A decoder is not installed, no DICOM file or no such series.
        FormatError: The series is not a regular CT volume, or a file is damaged.
    """
    threads = num_threads(threads)
    with open_files(folder, threads) as files:
        chosen = _choose(_group(files), series)
        return read_volume_of(chosen, inspection or Inspection(), threads)


def _group(files: list[DicomFile]) -> dict[str, list[DicomFile]]:
    """Split files into series, keyed "1", "2", ... in the order of SeriesInstanceUID."""
    series: dict[tuple[str, str], list[DicomFile]] = {}
    for file in files:
        for field in ("Modality", "SeriesInstanceUID"):
            if field not in file.header:
                raise FormatError(
                    field, f"missing in {file.place}; the file may be cut short", "header"
                )
        uids = (text_of(file.header, "SeriesInstanceUID"), text_of(file.header, "StudyInstanceUID"))
        series.setdefault(uids, []).append(file)
    return {str(key): series[uids] for key, uids in enumerate(sorted(series), start=1)}


def _choose(groups: dict[str, list[DicomFile]], series: str | None) -> list[DicomFile]:
    """Return the files of the series asked for, or of the only CT series."""
    if series is not None:
        for key, files in groups.items():
            if series == key or series == text_of(files[0].header, "SeriesInstanceUID"):
                return files
    candidates = {
        key: files
        for key, files in groups.items()
        if any(text_of(file.header, "Modality") == "CT" for file in files)
        and any(
            text_of(file.header, "SOPClassUID") in ("", CT_IMAGE, *MULTI_FRAME_CT) for file in files
        )
        and not all(is_localizer(file.header) for file in files)
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
            "foreign_slices",
        )
    # Nothing to choose: the checks of a lone series name the field that rules it out.
    if len(groups) == 1:
        return next(iter(groups.values()))
    raise FormatError("Modality", f"the folder holds no CT images, only {listing}", "unsupported")


def _describe(key: str, files: list[DicomFile]) -> SeriesInfo:
    modality = text_of(files[0].header, "Modality")
    try:
        rows, columns = (
            integer_of(files[0].header, field, files[0].place) for field in ("Rows", "Columns")
        )
        matrix_yx = (rows, columns)
    except FormatError:
        matrix_yx = None
    try:
        stack = stack_of(files)
        spacing_mm = None if stack.problems else spacing_of(stack.affine)
    except FormatError:
        spacing_mm = None
    try:
        num_slices = sum(
            integer_of(file.header, "NumberOfFrames", file.place, missing=1) for file in files
        )
    except FormatError:
        num_slices = len(files)
    return SeriesInfo(
        key, modality if modality in _MODALITIES else "other", num_slices, matrix_yx, spacing_mm
    )
