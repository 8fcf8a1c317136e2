"""Judge the slices of one series and make a volume of them.

Every judgement becomes a finding. Refusals are collected before the first of them ends the reading,
so that a report names all that is wrong with a series.

Shape suffixes: N slices, Z Y X voxels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from tapct_fast.errors import FormatError
from tapct_fast.io.dicom.fields import integer_of, numbers_of, text_of
from tapct_fast.io.dicom.file import DicomFile, frames_of
from tapct_fast.io.dicom.slice import (
    SLICE_FIELDS,
    check_slice,
    is_localizer,
    is_lossy,
    read_slices,
    syntax_of,
)
from tapct_fast.io.dicom.stack import SliceStack, stack_slices
from tapct_fast.io.findings import Inspection
from tapct_fast.io.orient import Affine, spacing_of, to_lps
from tapct_fast.io.regrid import AIR_HU, even_grid
from tapct_fast.io.volume import MAX_VOXELS, Volume

# Slices of one scan agree on these.
_MATRIX = ("Rows", "Columns")
SHARED_FIELDS = ("PatientID", "FrameOfReferenceUID", "SeriesNumber", "ConvolutionKernel")
_POSITION = "ImagePositionPatient"


def read_volume_of(files: list[DicomFile], inspection: Inspection, threads: int) -> Volume:
    """Judge the files of one series, read their pixels and return the volume."""
    files = [frame for file in files for frame in frames_of(file)]
    inspection.facts |= {"format": "DICOM", "num_slices": len(files)}
    files = _without_localizers(files, inspection)
    refusals = _Refusals(inspection)
    with refusals.collected():
        _check_slices(files, refusals)
        _check_shared(files, refusals)
    stack = stack_of(files)
    files, stack = _without_copies(files, stack, inspection, threads)
    rows, columns = (integer_of(files[0].header, name, files[0].place) for name in _MATRIX)
    if len(files) * rows * columns > MAX_VOXELS:
        raise FormatError(
            "Rows, Columns", f"{len(files)} slices of {rows}x{columns} are too many", "limit"
        )
    _note_facts(files, stack, inspection, (len(files), rows, columns))
    _judge_stack(stack, inspection)
    _judge_tilt_tag(files, stack, inspection)
    _note_slices(files, stack, inspection)
    if is_lossy(files):
        inspection.doubt(
            "lossy",
            "LossyImageCompression",
            "the slices went through lossy compression; fetch the original series",
        )
    file_ZYX = read_slices([files[index] for index in stack.order], rows, columns, threads)
    affine = None if stack.problems else stack.affine
    if affine is None:
        file_ZYX, affine = _repair(file_ZYX, stack, inspection)
    hu_ZYX, affine = to_lps(file_ZYX, affine)
    return Volume(hu_ZYX=hu_ZYX, spacing_mm=spacing_of(affine), affine=affine)


def stack_of(files: Sequence[DicomFile]) -> SliceStack:
    """Sort the slices of a series; its problems say whether they form a regular grid."""
    position, orientation, spacing = (
        np.array([numbers_of(file.header, name, count, file.place) for file in files])
        for name, count in (
            (_POSITION, 3),
            ("ImageOrientationPatient", 6),
            ("PixelSpacing", 2),
        )
    )
    return stack_slices(position, orientation, spacing)


class _Refusals:
    """Errors that are all recorded before the first of them is raised."""

    def __init__(self, inspection: Inspection) -> None:
        self._inspection = inspection
        self._errors: list[FormatError] = []

    def attempt(self, check: Callable[[], object]) -> None:
        try:
            check()
        except FormatError as error:
            self._errors.append(error)

    @contextmanager
    def collected(self) -> Iterator[None]:
        yield
        for error in self._errors:
            self._inspection.record(error)
        if self._errors:
            raise self._errors[0]


def _without_localizers(files: list[DicomFile], inspection: Inspection) -> list[DicomFile]:
    slices = [file for file in files if not is_localizer(file.header)]
    if slices and len(slices) < len(files):
        inspection.mend(
            "foreign_slices",
            "ImageType",
            f"{len(files) - len(slices)} of {len(files)} files are localizers; move them out of "
            "the folder, or let policy='repair' drop them",
        )
        return slices
    return files


def _check_slices(files: list[DicomFile], refusals: _Refusals) -> None:
    """Check each slice; those whose fields agree with an earlier one's need no check."""
    seen = set()
    for file in files:
        judged = tuple(map(file.header.get, SLICE_FIELDS))
        if judged not in seen:
            seen.add(judged)
            refusals.attempt(lambda file=file: check_slice(file))  # type: ignore[misc]


def _check_shared(files: list[DicomFile], refusals: _Refusals) -> None:
    def check(field: str) -> None:
        if len({text_of(file.header, field) for file in files}) > 1:
            raise FormatError(
                field, "differs between slices; the series mixes several scans", "foreign_slices"
            )

    def check_size(field: str) -> None:
        first = integer_of(files[0].header, field, files[0].place)
        for file in files:
            size = integer_of(file.header, field, file.place)
            if size != first:
                raise FormatError(
                    field,
                    f"is {size} in {file.place}, {first} in the first slice",
                    "foreign_slices",
                )

    for field in SHARED_FIELDS:
        refusals.attempt(lambda field=field: check(field))  # type: ignore[misc]
    for field in _MATRIX:
        refusals.attempt(lambda field=field: check_size(field))  # type: ignore[misc]


def _without_copies(
    files: list[DicomFile], stack: SliceStack, inspection: Inspection, threads: int
) -> tuple[list[DicomFile], SliceStack]:
    """Drop slices that repeat another one to the last voxel; others in one place are refused."""
    groups = stack.copies()
    if not groups:
        return files, stack
    reason = stack.problems[0].reason
    rows, columns = (integer_of(files[0].header, name, files[0].place) for name in _MATRIX)
    dropped: set[int] = set()
    for first, *others in groups:
        kept_ZYX = read_slices([files[first]], rows, columns, threads)
        kept_at = numbers_of(files[first].header, _POSITION, 3, files[first].place)
        for other in others:
            at = numbers_of(files[other].header, _POSITION, 3, files[other].place)
            is_same = np.allclose(at, kept_at, rtol=0.0, atol=1e-3) and np.array_equal(
                read_slices([files[other]], rows, columns, threads), kept_ZYX
            )
            if not is_same:
                inspection.refuse("duplicate_slices", _POSITION, reason)
            dropped.add(other)
    inspection.mend(
        "duplicate_slices",
        _POSITION,
        f"{reason}; their voxels are equal, so that policy='repair' can drop the copies",
    )
    files = [file for index, file in enumerate(files) if index not in dropped]
    return files, stack_of(files)


def _judge_stack(stack: SliceStack, inspection: Inspection) -> None:
    reasons = "; ".join(problem.reason for problem in stack.problems)
    for problem in sorted(stack.problems, key=lambda problem: problem.severity == "refuse"):
        if problem.severity == "refuse":
            inspection.refuse(problem.code, _POSITION, reasons)
        elif any(other.severity == "refuse" for other in stack.problems):
            continue  # nothing is mended in a series that is refused
        else:
            inspection.mend(problem.code, _POSITION, reasons)


def _judge_tilt_tag(files: list[DicomFile], stack: SliceStack, inspection: Inspection) -> None:
    is_axial = np.allclose([*stack.row, *stack.column], (1, 0, 0, 0, 1, 0), atol=1e-3)
    if not is_axial:
        return
    for file in files:
        # A reformatted stack may be axial although the gantry was tilted; an original one cannot.
        if "ORIGINAL" in text_of(file.header, "ImageType"):
            tilt = numbers_of(file.header, "GantryDetectorTilt", 1, file.place, missing=0.0)[0]
            if abs(tilt) > 0.5:
                inspection.doubt(
                    "form_conflict",
                    "GantryDetectorTilt",
                    f"{tilt:g} degrees in {file.place}, but ImageOrientationPatient shows none; "
                    "check the series against its original",
                )
                return


def _note_facts(
    files: list[DicomFile],
    stack: SliceStack,
    inspection: Inspection,
    shape_zyx: tuple[int, int, int],
) -> None:
    step = float(np.median(np.diff(stack.along_mm_N)))
    signed = {integer_of(f.header, "PixelRepresentation", f.place) for f in files}
    inspection.facts |= {
        "transfer_syntax": sorted({syntax_of(file).name for file in files}),
        "stored_type": " and ".join("int16" if s else "uint16" for s in sorted(signed)),
        "num_slices": len(files),
        "shape_zyx": list(shape_zyx),
        "spacing_mm": [round(mm, 6) for mm in (step, *stack.spacing_yx_mm)],
        "stored_axes": "".join(_axis(v) for v in (stack.row, stack.column, stack.normal)),
        "tilt_deg": round(stack.tilt_deg, 3),
    }


def _axis(direction: NDArray[np.float64]) -> str:
    """Return the patient's side to which a direction points: L, P, S or their opposites."""
    axis = int(np.argmax(np.abs(direction)))
    return ("LPS" if direction[axis] > 0 else "RAI")[axis]


def _note_slices(files: list[DicomFile], stack: SliceStack, inspection: Inspection) -> None:
    num_padded = sum(bool(text_of(file.header, "PixelPaddingValue")) for file in files)
    if num_padded:
        inspection.note(
            "padding",
            "PixelPaddingValue",
            f"{num_padded} slices declare a value for pixels outside the scan; it is kept, or "
            "-32768 where it leaves int16",
        )
    try:
        thickness = [
            numbers_of(file.header, "SliceThickness", 1, file.place, missing=0.0)[0]
            for file in files
        ]
    except FormatError as error:
        inspection.note("spacing", error.field, error.reason)  # decides no voxel
        return
    step, thickest = float(np.median(np.diff(stack.along_mm_N))), max(thickness)
    if thickest > 0 and abs(thickest - step) > 0.02 * step:
        effect = "overlap" if thickest > step else "leave gaps"
        inspection.note(
            "spacing",
            "SliceThickness",
            f"slices {thickest:g} mm thick every {step:.4g} mm {effect}; the spacing is that of "
            "the positions",
        )


def _repair(
    file_ZYX: NDArray[np.int16], stack: SliceStack, inspection: Inspection
) -> tuple[NDArray[np.int16], Affine]:
    """Resample leaning or unevenly spaced slices to a rectangular grid."""
    np.maximum(file_ZYX, AIR_HU, out=file_ZYX)  # padding would bleed into its neighbours
    offset_N3 = stack.position_N3 - stack.position_N3[0]
    grid = even_grid(
        file_ZYX,
        position_mm_N=stack.along_mm_N,
        shift_yx_mm_N2=np.stack([offset_N3 @ stack.column, offset_N3 @ stack.row], axis=1),
        pixel_spacing_mm=stack.spacing_yx_mm,
    )
    offset_z, offset_y, offset_x = grid.offset_zyx_mm
    origin = stack.position_N3[0] + (
        offset_z * stack.normal + offset_y * stack.column + offset_x * stack.row
    )
    inspection.note(
        "tilt" if stack.tilt_deg > 0.1 else "uneven_spacing",
        _POSITION,
        f"resampled to {len(grid.hu_ZYX)} slices every {grid.spacing_mm[0]:.4g} mm; "
        f"{grid.num_filled} voxels that no slice measured are air, and all below air were raised "
        "to it",
    )
    return grid.hu_ZYX, stack.affine_of(stack.normal * grid.spacing_mm[0], origin)
