"""An archive check tells every scan's state, survives kills, and names nobody."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tapct_fast.cli import main
from tapct_fast.errors import InputError
from tapct_fast.io.nifti import write_nifti
from tapct_fast.io.pack import locate
from tapct_fast.io.verify import Verification, verify

CANARY = "DOE^JOHN"
AFFINE = np.diag([-0.8, -0.8, 2.5, 1.0])


def write_scan(path: Path, seed: int = 0, size: int = 24) -> Path:
    rng = np.random.default_rng(seed)
    hu_ZYX = rng.normal(0, 300, (8, size, size)).clip(-1000, 1500).astype(np.int16)
    write_nifti(path, hu_ZYX, AFFINE)
    return path


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Two good scans and four bad ones; every name holds the canary."""
    folder = tmp_path / CANARY
    folder.mkdir()
    for n in range(2):
        write_scan(folder / f"{CANARY}{n}.nii.gz", n)
    whole = write_scan(folder / f"{CANARY}_flipped.nii.gz", 2)
    data = bytearray(whole.read_bytes())
    data[len(data) // 2] ^= 4
    whole.write_bytes(data)
    cut = write_scan(folder / f"{CANARY}_cut.nii", 3)
    cut.write_bytes(cut.read_bytes()[:-100])
    write_nifti(folder / f"{CANARY}_labels.nii.gz", np.eye(8, dtype=np.int16)[None] + 1, AFFINE)
    empty = folder / CANARY
    empty.mkdir()
    (empty / f"{CANARY}.dcm").touch()
    return folder


def outcome(verification: Verification) -> list[tuple[str, bool, str, object]]:
    """Everything but the times."""
    return [(row.case, row.is_accepted, row.code, row.report) for row in verification.rows]


def test_every_scan_gets_its_state_and_its_reason(archive: Path, tmp_path: Path) -> None:
    found = verify([archive], tmp_path / "out")
    codes = sorted(row.code for row in found.rows)
    assert codes == ["", "", "dims", "hu", "integrity", "integrity"]
    assert found.num_refused == 4
    for row in found.rows:
        source = locate(tmp_path / "out", row.case, [archive])
        expected = {"flipped": "integrity", "cut": "dims", "labels": "hu"}
        assert row.code == next(
            (code for word, code in expected.items() if word in source.name),
            "integrity" if source.is_dir() else "",
        )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["num_accepted"] == 2
    assert report["refused_by_code"] == {"dims": 1, "hu": 1, "integrity": 2}
    assert [row["case"] for row in report["scans"]] == [row.case for row in found.rows]


def test_a_policy_that_accepts_doubts_accepts_the_label_map(archive: Path, tmp_path: Path) -> None:
    found = verify([archive], tmp_path / "out", policy="warn")
    assert found.num_refused == 3
    (kept,) = (row for row in found.rows if row.is_accepted and row.report["findings"])
    assert kept.report["findings"][0]["code"] == "hu"
    assert verify([archive], tmp_path / "out", check_hu=False).num_refused == 3


def test_a_second_run_checks_only_what_changed(archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = verify([archive], out)
    again = verify([archive], out, threads=1)
    assert again.num_resumed == len(again.rows) == len(first.rows)
    assert again.rows == first.rows
    cut = archive / f"{CANARY}_cut.nii"
    write_scan(cut, 3)
    mended = verify([archive], out)
    assert mended.num_resumed == len(first.rows) - 1
    assert mended.num_refused == first.num_refused - 1
    # Other settings are other questions.
    assert verify([archive], out, policy="repair").num_resumed == 0


def test_the_number_of_threads_changes_nothing(archive: Path, tmp_path: Path) -> None:
    one = verify([archive], tmp_path / "out", threads=1)
    (tmp_path / "out" / "verify.jsonl").unlink()
    assert outcome(verify([archive], tmp_path / "out", threads=4)) == outcome(one)


def test_a_killed_run_goes_on_and_ends_like_an_unbroken_one(tmp_path: Path) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    archive.mkdir()
    for n in range(24):
        write_scan(archive / f"{n}.nii.gz", n, size=96)
    (archive / "5.nii.gz").write_bytes((archive / "5.nii.gz").read_bytes()[:-9])
    script = (
        "import sys; from pathlib import Path; from tapct_fast.io.verify import verify; "
        "verify([Path(sys.argv[1])], Path(sys.argv[2]), threads=1)"
    )
    rng = random.Random(0)
    num_killed = 0
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", script, archive, out])
        deadline = time.monotonic() + 30
        log = out / "verify.jsonl"
        before = log.stat().st_size if log.exists() else 0
        # Killed while it works, not while Python starts.
        while time.monotonic() < deadline and process.poll() is None:
            if log.exists() and log.stat().st_size > before:
                break
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            num_killed += 1
        process.wait()
    assert num_killed > 0
    with (out / "verify.jsonl").open("a") as log_file:
        log_file.write('\n{"signature": "torn')
    resumed = verify([archive], out)
    assert resumed.num_resumed > 0
    (out / "verify.jsonl").unlink()
    assert outcome(verify([archive], out)) == outcome(resumed)
    assert resumed.num_refused == 1


def test_nothing_written_or_printed_names_a_scan(
    archive: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["verify", str(archive), "--out", str(out)]) == 65
    texts = [path.read_bytes().decode("latin-1") for path in out.iterdir()]
    for text in (*texts, *capfd.readouterr()):
        assert CANARY not in text
        assert str(tmp_path) not in text


def test_the_command_says_what_it_found(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    main(["verify", str(archive), "--out", str(out)])
    assert "accepted 2, refused 4" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert "6</b>" in page
    assert "truncated or damaged bytes" in page
    assert page.count("<td>case-") == 4
    assert main(["verify", str(archive / f"{CANARY}0.nii.gz"), "--out", str(out)]) == 0
    assert main(["verify", str(tmp_path / "absent"), "--out", str(out)]) == 2


def test_an_archive_without_scans_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("none")
    (tmp_path / "scan.gz").write_bytes(gzip.compress(b"none"))
    with pytest.raises(InputError, match="without scans"):
        verify([tmp_path], tmp_path / "out")
