"""No name reaches a message, report or log, whatever is wrong with a series."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from dicom_series import (
    CANARY,
    Z_MM,
    assert_refused,
    assert_right,
    change,
    make_slice,
    write_series,
)
from pydicom import dcmread
from pydicom.dataset import Dataset

from tapct_fast.cli import main
from tapct_fast.errors import TapctError
from tapct_fast.io.convert import save_nifti
from tapct_fast.io.read import check_series, read_volume

# PS3.15 table E.1-1: attributes that identify, by their value representation a name fits in.
IDENTIFYING = (
    *("PatientName", "PatientID", "OtherPatientNames", "PatientBirthName", "PatientAddress"),
    *("PatientMotherBirthName", "IssuerOfPatientID", "PatientComments", "AdditionalPatientHistory"),
    *("EthnicGroup", "Occupation", "MilitaryRank", "BranchOfService", "PatientTelephoneNumbers"),
    *("CountryOfResidence", "RegionOfResidence", "PatientReligiousPreference", "MedicalAlerts"),
    *("Allergies", "ResponsiblePerson", "ResponsibleOrganization", "InsurancePlanIdentification"),
    *("InstitutionName", "InstitutionAddress", "InstitutionalDepartmentName", "StationName"),
    *("ReferringPhysicianName", "ReferringPhysicianAddress", "PhysiciansOfRecord"),
    *("ReferringPhysicianTelephoneNumbers", "PerformingPhysicianName", "OperatorsName"),
    *("NameOfPhysiciansReadingStudy", "RequestingPhysician", "RequestingService"),
    *("ScheduledPerformingPhysicianName", "AccessionNumber", "StudyID", "StudyDescription"),
    *(
        "SeriesDescription",
        "ProtocolName",
        "AdmissionID",
        "IssuerOfAdmissionID",
        "CurrentPatientLocation",
    ),
    *("PatientInstitutionResidence", "VisitComments", "AdmittingDiagnosesDescription"),
    *("DeviceSerialNumber", "PerformedProcedureStepID", "PerformedProcedureStepDescription"),
    *("RequestedProcedureID", "RequestedProcedureDescription", "ReasonForTheRequestedProcedure"),
    *("ServiceEpisodeDescription", "ImageComments", "FrameComments", "ContentCreatorName"),
    *("PersonName", "VerifyingObserverName", "DerivationDescription", "AcquisitionComments"),
    *("RequestedProcedureComments", "StudyComments", "InterpretationAuthor", "DetectorID"),
    *("PlateID", "CassetteID", "GantryID", "ScheduledStationName", "PerformedStationName"),
)


def _with_canaries(folder: Path) -> list[Path]:
    folder.mkdir()
    paths = []
    for number, z_mm in enumerate(Z_MM):
        dataset = make_slice(z_mm, number=number)
        for keyword in IDENTIFYING:
            setattr(dataset, keyword, f"{CANARY}-{keyword}"[:16])
        block = dataset.private_block(0x0011, f"{CANARY} PRIVATE", create=True)
        block.add_new(1, "LO", f"{CANARY} IN PRIVATE")
        path = folder / f"{CANARY}_{number}.dcm"
        dataset.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


BREAKS: tuple[Callable[[list[Path]], object], ...] = (
    lambda paths: paths[3].unlink(),
    lambda paths: paths[3].write_bytes(paths[2].read_bytes()),
    lambda paths: paths[3].write_bytes(b""),
    lambda paths: paths[3].write_bytes(paths[3].read_bytes()[:700]),
    lambda paths: paths[3].write_bytes(paths[3].read_bytes()[:-9]),
    lambda paths: paths[3].write_bytes(CANARY.encode() * 99),
    lambda paths: [path.write_bytes(path.read_bytes()[:3000]) for path in paths],
    *(
        lambda paths, values=values: change(paths[3], **values)
        for values in (
            {"PatientID": f"{CANARY}2"},
            {"ImageType": [CANARY, CANARY]},
            {"Modality": CANARY},
            {"RescaleType": CANARY},
            {"PhotometricInterpretation": CANARY},
            {"ConvolutionKernel": CANARY},
            {"FrameOfReferenceUID": "1.2.77"},
            {"SeriesInstanceUID": "1.2.77"},
            {"Rows": 7},
            {"RescaleSlope": "0"},
            {"PixelSpacing": [0.1, 0.1]},
            {"ImageType": ["ORIGINAL", CANARY, "LOCALIZER"]},
            {"LossyImageCompression": "01"},
        )
    ),
)


@pytest.mark.parametrize("number", range(len(BREAKS)))
def test_no_error_report_or_log_tells_a_name(
    tmp_path: Path,
    number: int,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    paths = _with_canaries(tmp_path / CANARY)
    BREAKS[number](paths)
    recwarn.clear()
    caplog.clear()
    caplog.set_level(0)
    told = []
    for policy in ("error", "warn", "repair"):
        try:
            report = read_volume(tmp_path / CANARY, check_hu=False, policy=policy).report
            told.append(json.dumps(report and report.to_json()))
        except TapctError as error:
            told.append(f"{error} {error.__context__ if not error.__suppress_context__ else ''}")
    told.append(json.dumps(check_series(tmp_path / CANARY).to_json()))
    told += [*capfd.readouterr(), caplog.text, *(str(item.message) for item in recwarn)]
    assert CANARY not in "".join(told)
    assert os.fspath(tmp_path) not in "".join(told)


def test_sixty_identifying_fields_hold_the_canary(tmp_path: Path) -> None:
    dataset = dcmread(_with_canaries(tmp_path / CANARY)[0])
    assert sum(CANARY in str(dataset[keyword].value) for keyword in IDENTIFYING) >= 60


@pytest.mark.cases(len(BREAKS))
def test_an_archive_check_and_a_saved_volume_tell_no_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    archive, out = tmp_path / CANARY, tmp_path / "out"
    archive.mkdir()
    sound = archive / f"{CANARY}_sound"
    _with_canaries(sound)
    for number, spoil in enumerate(BREAKS):
        spoil(_with_canaries(archive / f"{CANARY}_{number}"))
    caplog.set_level(0)
    caplog.clear()
    assert main(["verify", str(archive), "--no-check-hu", "--out", str(out)]) == 65
    volume = read_volume(sound, check_hu=False)
    save_nifti(out / "saved.nii", volume.hu_ZYX, volume)
    told = "".join([*capfd.readouterr(), caplog.text])
    assert CANARY not in told
    assert os.fspath(tmp_path) not in told
    results = [path for path in out.rglob("*") if path.is_file()]
    assert len(results) >= 4
    for path in results:
        assert CANARY.encode() not in path.read_bytes()
        assert CANARY not in path.name


@pytest.mark.parametrize(
    "keyword",
    [
        "Rows",
        "PixelSpacing",
        "ImagePositionPatient",
        "RescaleSlope",
        "BitsStored",
        "NumberOfFrames",
    ],
)
@pytest.mark.parametrize("vr", ["LO", "PN", "IS", "DS", "UI"])
def test_a_name_in_a_number_field_is_not_repeated(
    folder: Path,
    keyword: str,
    vr: str,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    write_series(folder)
    path = sorted(folder.iterdir())[0]
    dataset = dcmread(path)
    if keyword in dataset:
        del dataset[keyword]
    tag = Dataset()
    setattr(tag, keyword, [1, 1, 1] if keyword == "ImagePositionPatient" else None)
    tag = next(iter(tag)).tag
    dataset.add_new(tag, "LO", CANARY)
    dataset.save_as(path)
    raw = path.read_bytes()
    where = raw.index(b"LO" + len(CANARY).to_bytes(2, "little") + CANARY.encode())
    path.write_bytes(raw[:where] + vr.encode() + raw[where + 2 :])
    caplog.set_level(0)
    recwarn.clear()
    assert_refused(folder, keyword, "number")
    outputs = [*capfd.readouterr(), caplog.text, *(str(item.message) for item in recwarn)]
    assert CANARY not in "".join(outputs)


def test_pydicoms_own_warnings_and_logs_stay_inside(
    folder: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    write_series(folder)
    path = sorted(folder.iterdir())[0]
    raw = path.read_bytes()
    uid = b"UI\x06\x001.2.6\0"
    assert uid in raw
    for other in folder.iterdir():
        other.write_bytes(other.read_bytes().replace(uid, b"UI\x06\x00CANARY"))
    with pytest.warns(UserWarning, match=CANARY):  # pydicom alone does leak it
        str(dcmread(path).FrameOfReferenceUID)
    caplog.set_level(0)
    caplog.clear()
    recwarn.clear()
    assert_right(folder)
    outputs = [*capfd.readouterr(), caplog.text, *(str(item.message) for item in recwarn)]
    assert CANARY not in "".join(outputs)
