"""Every hostile NIfTI file and DICOM series is judged within a second."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

LIMIT_S = 1.0


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cases(n): the test judges n hostile files, one by one")


@pytest.fixture(autouse=True)
def _judged_within_a_second(request: pytest.FixtureRequest) -> Iterator[None]:
    began = time.perf_counter()
    yield
    if not request.path.name.startswith(("test_nifti", "test_dicom")):
        return
    if "real_ct" in request.fixturenames:  # full-size scans, sound or repaired
        return
    marker = request.node.get_closest_marker("cases")
    num_cases = marker.args[0] if marker else 1
    assert time.perf_counter() - began < LIMIT_S * num_cases


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "CANARY_FOLDER"
    folder.mkdir()
    return folder
