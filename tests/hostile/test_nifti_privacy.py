"""No free text of a NIfTI header reaches a message, report, archive check or written file."""

import gzip
import json
import os
import struct
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import nibabel as nib
import numpy as np
import pytest

from tapct_fast.cli import main
from tapct_fast.errors import FormatError, Policy, TapctError
from tapct_fast.io.convert import save_nifti
from tapct_fast.io.nifti import read_nifti_labels, write_nifti
from tapct_fast.io.read import check_volume, read_volume

CANARY = "CANARY"
AFFINE = np.array([[-0.8, 0, 0, 100.0], [0, -0.7, 0, 80.0], [0, 0, 2.5, -300.0], [0, 0, 0, 1]])
HU_ZYX = np.random.default_rng(0).normal(0, 300, (6, 20, 24)).clip(-1000, 1500).astype(np.int16)

# Offset and size of every text field; nifti1.h and nifti2.h.
TEXTS_1 = {
    "data_type": (4, 10),
    "db_name": (14, 18),
    "descrip": (148, 80),
    "aux_file": (228, 24),
    "intent_name": (328, 16),
}
TEXTS_2 = {"descrip": (240, 80), "aux_file": (320, 24), "intent_name": (508, 16)}


def named(version: int) -> bytes:
    """Return a sound scan with a name in every text field and in extensions of four kinds."""
    kind, texts = (nib.Nifti1Image, TEXTS_1) if version == 1 else (nib.Nifti2Image, TEXTS_2)
    image = kind(HU_ZYX.transpose(2, 1, 0), AFFINE)
    image.set_sform(AFFINE, code=1)
    image.set_qform(AFFINE, code=1)
    for code in (0, 4, 6, 18):  # unknown, AFNI, comment, Pypickle
        text = f"<{CANARY}>{CANARY}^NAME born 1950 in {CANARY}".encode()
        image.header.extensions.append(nib.nifti1.Nifti1Extension(code, text))
    data = bytearray(image.to_bytes())
    for offset, size in texts.values():
        data[offset : offset + size] = (CANARY * 16).encode()[:size]
    assert data.count(CANARY.encode()) >= 4 * 3 + len(texts)
    return bytes(data)


def put(offset: int, layout: str, *values: float | bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        copy = bytearray(data)
        struct.pack_into(f"<{layout}", copy, offset, *values)
        return bytes(copy)

    return change


SPOIL_1: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda data: data,
    "cut": lambda data: data[:-9],
    "cut in the header": lambda data: data[:300],
    "gzip cut": lambda data: gzip.compress(data)[:-9],
    "text for a header": lambda _: (CANARY * 200).encode(),
    "text after the voxels": lambda data: data + CANARY.encode(),
    "text after the stream": lambda data: gzip.compress(data) + CANARY.encode(),
    "text for a magic": put(344, "4s", CANARY.encode()),
    "text for all geometry": put(252, "76s", (CANARY * 13).encode()),
    "text for dim": put(40, "16s", (CANARY * 3).encode()),
    "text for pixdim": put(76, "32s", (CANARY * 6).encode()),
    "text for scaling": put(112, "8s", f"{CANARY}XY".encode()),
    "datatype": put(70, "h", 77),
    "vox_offset into the extensions": put(108, "f", 352.0),
    "units": put(123, "B", 1),
    "forms": put(268, "f", 105.0),
    "lone intercept": put(112, "2f", 0, 5),
    "no HU": put(112, "2f", 0.001, 0),
    "no orientation": put(252, "2h", 0, 0),
}
CASES = [(1, name, spoil) for name, spoil in SPOIL_1.items()]
CASES += [(2, name, SPOIL_1[name]) for name in ("nothing", "cut", "gzip cut", "text for a header")]


@pytest.mark.cases(len(CASES))
def test_no_text_of_a_header_is_told_or_copied(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    caplog.set_level(0)
    archive, out = tmp_path / CANARY, tmp_path / "out"
    archive.mkdir()
    told: list[str] = []
    errors: list[BaseException] = []
    written: list[Path] = []
    for number, (version, _, spoil) in enumerate(CASES):
        path = archive / f"{CANARY}_{number}.nii"
        path.write_bytes(spoil(named(version)))
        for policy in get_args(Policy):
            try:
                volume = read_volume(path, policy=policy)
            except TapctError as error:
                errors.append(error)
            else:
                assert volume.report is not None
                told.append(repr(volume.report))
                copies = [tmp_path / f"{number}{policy}_{k}.nii" for k in range(2)]
                write_nifti(copies[0], volume.hu_ZYX, volume.affine)
                save_nifti(copies[1], volume.hu_ZYX, volume)
                written += copies
        try:
            read_nifti_labels(path)
        except FormatError as error:
            errors.append(error)
        told.append(json.dumps(check_volume(path).to_json()))
    assert len(errors) > 50
    for error in errors:
        assert error.__suppress_context__ or error.__context__ is None
        told += traceback.format_exception_only(error)
    assert len(written) >= 12
    assert main(["verify", str(archive), "--out", str(out)]) == 65
    told += [*capfd.readouterr(), caplog.text, *(str(item.message) for item in recwarn)]
    assert CANARY not in "".join(told)
    assert os.fspath(tmp_path) not in "".join(told)
    results = [path for path in out.rglob("*") if path.is_file()]
    assert len(results) >= 3
    for path in (*written, *results):
        assert CANARY.encode() not in path.read_bytes()
        assert CANARY not in path.name
