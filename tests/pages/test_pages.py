"""Every page, of work that was really done, in a browser: it shows, and tells no secret."""

import json
import os
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Browser

from tapct_fast import recipes
from tapct_fast.cli import main
from tapct_fast.config import Config
from tapct_fast.data.phantom import make_phantom
from tapct_fast.data.pipeline import ViewBatch, ViewPipeline
from tapct_fast.errors import StoppedError
from tapct_fast.io.nifti import write_nifti
from tapct_fast.io.pack import pack
from tapct_fast.monitor.probe import OnlineProbe
from tapct_fast.monitor.run_report import RunReport
from tapct_fast.train.loop import train

CANARY = "DOE_JANE_19700101"  # stands for a patient's name in a path
NUM_SCANS = 4
SMALL = {
    "train.num_steps": "16",
    "train.batch_size": "4",
    "train.group_size": "4",
    "train.checkpoint_every": "8",
    "vit.dim": "64",
    "vit.depth": "1",
    "vit.image_zyx": "8,32,32",
    "views.global_views.size_zyx": "8,32,32",
    "views.local_views.size_zyx": "8,16,16",
    "views.local_views.num": "2",
    "heads.dino.num_prototypes": "32",
    "heads.ibot.num_prototypes": "32",
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms with labels, two kinds of unusable files, and a store of the phantoms."""
    root = tmp_path_factory.mktemp("archive") / CANARY
    (root / "scans").mkdir(parents=True)
    for i in range(NUM_SCANS):
        phantom = make_phantom(1, i, shape_zyx=(16, 64, 64), spacing_mm=(10.0 + i, 5.5, 5.5))
        affine = phantom.volume.affine
        write_nifti(root / "scans" / f"{i}.nii.gz", phantom.volume.hu_ZYX, affine)
        write_nifti(root / f"labels-{i}.nii.gz", phantom.labels_ZYX.astype(np.uint8), affine)
    pack([root / "scans"], root / "store")
    (root / "scans" / "cut.nii.gz").write_bytes((root / "scans" / "0.nii.gz").read_bytes()[:-99])
    (root / "scans" / "no.nii.gz").write_bytes(b"not a scan")
    return root


class Kill:
    """Asks the run to stop behind a step, as a scheduler does."""

    def __init__(self, step: int) -> None:
        self._step = step

    def logged(self, row: Mapping[str, Any]) -> None:
        if row["step"] == self._step:
            os.kill(os.getpid(), signal.SIGTERM)

    def saved(self, step: int, folder: Path) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def run(archive: Path) -> Path:
    """A run with a probe, that met a NaN and was stopped and resumed."""
    out = archive / "run"
    config = recipes.override(recipes.debug(), SMALL)
    make = ViewPipeline._batch

    def spoilt(self: ViewPipeline, step: int, micro: int, loaded: Any) -> tuple[ViewBatch, Any]:
        batch, event = make(self, step, micro, loaded)
        if step == 4:
            batch.global_VBZYX[0, 0, 0, 0, 0] = torch.nan
        return batch, event

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ViewPipeline, "_batch", spoilt)
        with pytest.raises(StoppedError):
            _train(config, archive, out, [Kill(10)])
        _train(config, archive, out, [])
    return out


def _train(config: Config, archive: Path, out: Path, more: list[Any]) -> None:
    scans = [archive / "scans" / f"{i}.nii.gz" for i in range(NUM_SCANS)]
    labels = [archive / f"labels-{i}.nii.gz" for i in range(NUM_SCANS)]
    num_steps = config.train.num_steps
    probe = OnlineProbe(out, scans, labels, num_steps=num_steps, device="cpu", seed=0)
    observers = [probe, RunReport(out, config), *more]
    train(config, archive / "store", out, device="cpu", track=[], observers=observers)


@pytest.fixture(scope="module")
def features(archive: Path, run: Path) -> Path:
    assert main(["export", str(run), str(archive / "backbone")]) == 0
    out = archive / "features"
    words = ["embed", str(archive / "backbone"), str(archive / "scans"), "--out", str(out)]
    assert main(words) == 0
    return out


@pytest.fixture(scope="module")
def probed(archive: Path, features: Path) -> Path:
    """The exported backbone beside a random one on the labelled phantoms."""
    scans = [f"scans/{i}.nii.gz,labels-{i}.nii.gz,{CANARY}-{i}" for i in range(NUM_SCANS)]
    (archive / "cases.csv").write_text("\n".join(["scan,labels,patient", *scans]) + "\n")
    out, backbone = archive / "probed", str(archive / "backbone")
    words = ["probe", str(archive / "cases.csv"), "--backbone", backbone, f"random:{backbone}"]
    assert features.is_dir()
    assert main([*words, "--folds", "2", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def pages(archive: Path, run: Path, features: Path, probed: Path) -> dict[str, Path]:
    main(["verify", str(archive / "scans"), "--out", str(archive / "checked")])
    assert main(["bench", "plot", "--out", str(archive / "bench")]) == 0
    folders = {"train": run, "embed": features, "probe": probed, "verify": archive / "checked"}
    folders["bench"] = archive / "bench"
    return {name: folder / "report.html" for name, folder in folders.items()}


NAMES = ("train", "embed", "probe", "verify", "bench")


@pytest.mark.parametrize("name", NAMES)
def test_a_browser_shows_the_page_in_wide_and_narrow_windows(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    for width in (1280, 640):
        browser.open(pages[name], width)
        assert browser.value("innerWidth") == width
        # Nothing is wider than the window, and every drawing has a size.
        assert browser.value("document.documentElement.scrollWidth") <= width
        shown = "[...document.querySelectorAll('svg')].filter(s=>s.checkVisibility())"
        assert browser.value(f"{shown}.every(s=>s.getBoundingClientRect().height > 4)")
        # One look: the same house style for title, text and sections.
        assert browser.value("getComputedStyle(document.querySelector('h1')).fontSize") == "34px"
        assert browser.value("document.querySelectorAll('section > h2').length") >= 3
    assert not browser.errors


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_no_address_no_path_and_no_patient(
    pages: dict[str, Path], archive: Path, name: str
) -> None:
    page = pages[name].read_text().replace("http://www.w3.org/2000/svg", "")  # names, not loaded
    assert page.isascii()
    assert not re.search(r"https?:|@import|url\(|file:|\ssrc=|<link|<iframe", page)
    for secret in (
        CANARY,
        str(archive),
        archive.parent.name,
        str(Path.home()),
        ".nii",
        os.uname()[1],
    ):
        assert secret not in page
    text = re.sub(r"<style>.*?</style>|<script>.*?</script>|<[^>]+>", " ", page, flags=re.DOTALL)
    assert not re.search(r"(^|\s)/\w+/\w", text)


def test_the_report_of_a_run_tells_its_life(run: Path) -> None:
    page = (run / "report.html").read_text()
    text = re.sub(r"<[^>]+>", "|", page)
    assert "Finished; written at" in page
    assert "<script" not in page
    # It was skipped at step 5 (data of position 4), and resumed behind the stop.
    sessions = [json.loads(row) for row in (run / "sessions.jsonl").read_text().splitlines()]
    assert [row["step"] for row in sessions] == [0, 11]
    assert re.search(r"\|5\|+skipped\|+not finite", text)
    assert re.search(r"UTC\|+step 11\|", text)
    assert re.search(r"UTC\|+the start\|", text)
    assert re.search(rf"\|scans\|+{NUM_SCANS}\|", text)
    assert sessions[0]["store"] in page
    assert re.search(r"\|16\|+\d\.\d\d\| \|\d\.\d\d to \d\.\d\d\|", text)  # the last probe
    newest = run / "checkpoints" / "step-00000016"
    manifest = json.loads((newest / "manifest.json").read_text())
    assert manifest["files"]["teacher.safetensors"]["sha256"] in page
    # Only what differs stands beside the closest recipe; every setting is below.
    head, _, every = page.partition("<details><summary>All ")
    beside = head.rpartition("recipe debug")[2]
    assert all(f"<td>{name}</td>" in beside for name in SMALL if name != "train.group_size")
    assert "schedule.base_lr" not in beside
    assert "<dt>schedule.base_lr</dt><dd>0.008</dd>" in every
    assert f"<dd>{torch.__version__}</dd>" in page


def test_the_report_of_an_archive_counts_and_hashes(features: Path) -> None:
    page = (features / "report.html").read_text()
    text = re.sub(r"<[^>]+>", "|", page)
    assert re.search(rf"\|embedded\|+{NUM_SCANS}\|", text)
    assert re.search(r"\|refused\|+2\|+33\.3% of all", text)
    assert re.search(r"truncated or damaged bytes \(integrity\)\|+2\|", text)
    # Tokens of 4 slices: 40, 44, 48 and 52 mm apart.
    for spacing in (40, 44, 48, 52):
        assert re.search(rf"\|{spacing}\|+1\|", text)
    assert json.loads((features / "settings.json").read_text())["backbone"] in page


def test_the_verb_writes_either_page_anew_and_refuses_other_folders(
    run: Path, features: Path, probed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, title in ((run, "Training run"), (features, "Features")):
        before = (folder / "report.html").read_text()
        (folder / "report.html").unlink()
        assert main(["report", str(folder)]) == 0
        assert capsys.readouterr().out == "written: report.html in DIR\n"
        again = (folder / "report.html").read_text()
        assert f"<h1>{title}</h1>" in again
        # The same but for the time.
        pattern = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC\."
        assert re.sub(pattern, "", again) == re.sub(pattern, "", before)
    assert main(["report", str(probed)]) == 2
    assert "give the same probe again" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert "neither a run nor features" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none")]) == 2
