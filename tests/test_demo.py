import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from tapct_fast import demo, recipes
from tapct_fast.config import Config
from tapct_fast.data.phantom import LABEL_NAMES, make_phantom
from tapct_fast.demo import run_demo
from tapct_fast.downstream.dice import summarise
from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.nifti import write_nifti
from tapct_fast.io.store import Store


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Config:
    """The recipe at two steps, and a handful of phantoms: seconds instead of minutes."""
    for name, value in (("NUM_TRAIN", 3), ("NUM_FIT", 2), ("NUM_TEST", 2), ("NUM_SHOWN", 1)):
        monkeypatch.setattr(demo, name, value)
    config = recipes.debug()
    train = dataclasses.replace(
        config.train, num_steps=2, batch_size=2, group_size=2, checkpoint_every=2
    )
    return dataclasses.replace(config, train=train)


def test_the_demo_runs_every_stage_on_phantoms(tiny: Config, tmp_path: Path) -> None:
    lines: list[str] = []
    out = tmp_path / "demo"
    report = run_demo(out, seed=5, config=tiny, print_line=lines.append)

    assert report == out / "report.html"
    page = report.read_text()
    assert all(name in page for name in LABEL_NAMES[1:])
    assert "3 synthetic CT phantoms" in page
    assert "synthetic" in page
    assert "Not a medical device" in page
    assert str(tmp_path) not in page
    table = [line for line in lines if line.split("  ")[0] in LABEL_NAMES]
    assert len(table) == len(LABEL_NAMES) - 1
    assert len(Store.open(out / "store").cases) == 3
    rows = (out / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]
    assert (out / "backbone" / "model.safetensors").is_file()

    # Again, and it replaces what it wrote; another seed would not fit the old run.
    assert run_demo(out, seed=6, config=tiny).is_file()


def test_given_scans_train_alone_and_are_named_by_number(tiny: Config, tmp_path: Path) -> None:
    folder = tmp_path / "patient-miller"
    folder.mkdir()
    phantom = make_phantom(9)
    for name in ("miller-1.nii.gz", "miller-2.nii.gz"):
        write_nifti(folder / name, phantom.volume.hu_ZYX[10:30], phantom.volume.affine)
    (folder / "miller-2.nii.gz").write_bytes(b"no scan")
    lines: list[str] = []
    report = run_demo(tmp_path / "demo", [folder], config=tiny, print_line=lines.append)
    page = report.read_text()
    assert "1 given CT scan for" in page
    assert "scan 1" in page
    assert "scan 2" not in page
    assert "never seen a phantom" in page
    assert "miller" not in page + "".join(lines)
    assert len(Store.open(tmp_path / "demo" / "store").cases) == 1


def test_scans_of_which_none_can_be_used_stop_the_demo(tiny: Config, tmp_path: Path) -> None:
    (tmp_path / "scan.nii.gz").write_bytes(b"no scan")
    with pytest.raises(FormatError, match=r"no input could be used"):
        run_demo(tmp_path / "demo", [tmp_path / "scan.nii.gz"], config=tiny)


def test_a_folder_with_other_files_is_left_alone(tiny: Config, tmp_path: Path) -> None:
    precious = tmp_path / "run" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("precious")
    with pytest.raises(InputError, match="give a new folder"):
        run_demo(tmp_path, config=tiny)
    assert precious.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_a_long_scan_is_cut_to_its_middle_and_stays_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo, "MAX_SHOWN_SLICES", 10)
    volume = make_phantom(0, shape_zyx=(24, 15, 20), spacing_mm=(10.0, 17.6, 17.6)).volume
    cut = demo._middle(volume)
    assert np.array_equal(cut.hu_ZYX, volume.hu_ZYX[7:17])
    assert np.allclose(cut.affine @ (3, 4, 0, 1), volume.affine @ (3, 4, 7, 1))


def test_the_gain_is_paired_over_scans() -> None:
    rng = np.random.default_rng(0)
    hard_S = rng.uniform(0.1, 0.8, 8)  # scans differ far more than the two sets of weights do

    def result(hits_S: np.ndarray):
        confusions = [[[900, 100], [1000 - round(1000 * h), round(1000 * h)]] for h in hits_S]
        return summarise("linear head", ("a", "b"), np.array(confusions), seed=0)

    gain = demo._gain(result(hard_S + 0.05), result(hard_S), seed=0)
    assert 0 < gain.low < gain.mean < gain.high
    assert gain.high - gain.low < 0.03
    spread = result(hard_S).interval
    assert spread[1] - spread[0] > 0.1
