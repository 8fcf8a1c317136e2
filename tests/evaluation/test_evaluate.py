"""From a data set to a table with rivals: once encoded, equal terms, nobody named, no leak."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tapct_fast import evaluate
from tapct_fast.downstream.features import Features
from tapct_fast.downstream.probe import linear_segmentation
from tapct_fast.errors import BackboneError, FormatError, InputError
from tapct_fast.evaluation.cases import Dataset, read_dataset
from tapct_fast.evaluation.encoders import grid_features, open_encoder
from tapct_fast.evaluation.scores import bootstrap
from tapct_fast.evaluation.segmentation import apply_head, load_head
from tapct_fast.evaluation.splits import Fold, patient_folds
from tapct_fast.io.nifti import write_nifti
from tapct_fast.io.read import read_labels, read_volume
from tapct_fast.io.volume import Volume

CANARY = "DOE_JANE"


@dataclasses.dataclass
class Counted:
    """Half of the resolution in plane: HU, and HU squared; counts the scans that it encodes."""

    name: str = "counted"
    scale: float = 1.0
    num: int = 0
    own: str = "1"

    def fingerprint(self) -> str:
        return self.own and f"counted {self.scale} {self.own}"

    def encode(self, volume: Volume) -> Features:
        self.num += 1
        x_ZYX = torch.from_numpy(volume.hu_ZYX[:, ::2, ::2].astype(np.float32)) / 1000 * self.scale
        tokens_ZYXC = torch.stack([x_ZYX, x_ZYX.square(), x_ZYX.abs()], dim=-1)
        return grid_features(tokens_ZYXC, volume.affine @ np.diag([2.0, 2.0, 1.0, 1.0]))


class Failing(Counted):
    def encode(self, volume: Volume) -> Features:
        del volume
        raise BackboneError("the features are not finite")


class Unused(Counted):
    def encode(self, volume: Volume) -> Features:
        raise AssertionError(f"{volume.hu_ZYX.shape} was encoded")


def nobody_is_named(folder: Path) -> None:
    for path in folder.rglob("*"):
        assert CANARY not in path.name
        assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path.name


def test_an_nnunet_folder_becomes_a_table_with_two_rivals(nnunet: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    notices: list[str] = []
    specs = [Counted(), "intensity", "plain=random:debug"]
    found = evaluate(nnunet, specs, out=out, folds=3, notify=notices.append)
    assert (found.num_scans, found.num_patients, found.num_encoded) == (6, 6, 18)
    assert [result.name for result in found.results] == ["counted", "intensity", "plain"]
    names = [score.name for score in found.results[0].scores]
    assert names[:3] == ["dice", "nsd 2 mm", "hd95 mm"]
    assert "dice, lungs" in names
    assert all(score.low <= score.value <= score.high for r in found.results for score in r.scores)
    assert [difference.rival for difference in found.differences] == ["intensity", "plain"]
    text = str(found)
    for part in (
        "| counted",
        "intensity",
        "counted minus rival",
        "3 folds",
        "a patient of its own",
    ):
        assert part in text
    assert notices == []

    # The same by hand, fold by fold, from features that were never in a file.
    volumes = [read_volume(path) for path in sorted((nnunet / "imagesTr").iterdir())]
    maps = [read_labels(path) for path in sorted((nnunet / "labelsTr").iterdir())]
    values = sorted(json.loads((nnunet / "dataset.json").read_text())["labels"].values())
    maps = [
        Volume(np.searchsorted(values, m.hu_ZYX).astype(np.int16), m.spacing_mm, m.affine)
        for m in maps
    ]
    scans = [(Counted().encode(v), m) for v, m in zip(volumes, maps, strict=True)]
    folds = patient_folds([f"patient {i:08d}" for i in range(6)], folds=3, seed=0)
    dice_SK = np.zeros((6, 3))
    for fold in folds:
        train, test = ([scans[i] for i in part] for part in fold)
        result = linear_segmentation(train, test, num_classes=3)
        dice_SK[list(fold.test)] = result.dice_SK
    assert found.results[0].scores[0].value == pytest.approx(dice_SK[:, 1:].mean(), abs=2e-3)
    rows = [row["dice"] for row in found.results[0].rows]
    np.testing.assert_allclose(rows, dice_SK[:, 1:], atol=5e-3)  # float16 in the cache
    means = np.array(rows).mean(1)
    low, high = bootstrap(lambda r: float(means[r].mean()), list("abcdef"), seed=0)
    assert found.results[0].scores[0][2:] == pytest.approx((low, high))
    rival = np.array([row["dice"] for row in found.results[1].rows]).mean(1)
    low, high = bootstrap(lambda r: float((means - rival)[r].mean()), list("abcdef"), seed=0)
    difference = found.differences[0].scores[0]
    assert difference[1:] == pytest.approx(((means - rival).mean(), low, high))

    # A kept head is that of all scans, and segments one of them.
    head = load_head(out / "heads" / "counted.safetensors")
    assert head.label_names == ("background", "bone", "lungs")
    assert head.label_values == tuple(values)
    hits = apply_head(head, scans[0][0], maps[0]) == maps[0].hu_ZYX
    assert hits.mean() > 0.8

    written = json.loads((out / "probe.json").read_text())
    assert written["settings"]["decoder"] == "linear"
    assert written["results"][1]["name"] == "intensity"
    assert written["cases"][0]["scores"]["counted"] == found.results[0].rows[0]
    assert re.fullmatch(r"case-[0-9a-f]{16}", written["cases"][0]["case"])
    assert re.fullmatch(r"patient-[0-9a-f]{16}", written["cases"][0]["patient"])
    page = (out / "report.html").read_text()
    for part in ("Differences", "counted", "hd95 mm, lungs", found.data, "keyed hash"):
        assert part in page
    assert "http" not in page
    nobody_is_named(out)
    assert (out / "cache" / ".key").stat().st_mode & 0o077 == 0


def test_a_second_run_encodes_nothing_and_writes_the_same(nnunet: Path, tmp_path: Path) -> None:
    encoder, out = Counted(), tmp_path / "out"
    assert evaluate(nnunet, [encoder, "intensity"], out=out, folds=2).num_encoded == 12
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert evaluate(nnunet, [encoder, "intensity"], out=out, folds=2).num_encoded == 0
    assert encoder.num == 6
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before

    # Another encoder and other settings use what is there; other weights do not.
    assert evaluate(nnunet, [encoder, Counted("b", 2.0)], out=out, folds=3).num_encoded == 6
    assert {path.name for path in (out / "heads").glob("*.json")} == {"counted.json", "b.json"}
    assert evaluate(nnunet, [Counted(own="2")], out=out, folds=2).num_encoded == 6

    # Nor do scans that were changed.
    changed = tmp_path / CANARY
    shutil.copytree(nnunet, changed)
    shared = tmp_path / "cache"
    assert evaluate(changed, [encoder], out=tmp_path / "a", cache=shared, folds=2).num_encoded == 6
    first, second = sorted((changed / "imagesTr").iterdir())[:2]
    volume = read_volume(first)
    first.unlink()
    hu_ZYX = volume.hu_ZYX.copy()
    hu_ZYX[0, 0, 0] -= 1
    write_nifti(first, hu_ZYX, volume.affine)
    assert evaluate(changed, [encoder], out=tmp_path / "b", cache=shared, folds=2).num_encoded == 1
    assert not (tmp_path / "b" / "cache").exists()
    assert second.exists()


def test_damaged_features_are_made_again_with_a_notice(nnunet: Path, tmp_path: Path) -> None:
    encoder, out = Counted(), tmp_path / "out"
    evaluate(nnunet, [encoder], out=out, folds=2)
    before = (out / "probe.json").read_bytes()
    damaged, cut, *_ = sorted((out / "cache" / "features").rglob("*.safetensors"))
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    cut.with_suffix(".json").unlink()  # as if the run was killed between the two files
    next((out / "cache" / "scans").iterdir()).write_text("{}")
    notices: list[str] = []
    found = evaluate(nnunet, [encoder], out=out, folds=2, notify=notices.append)
    assert found.num_encoded == 2
    (notice,) = notices
    assert re.fullmatch(
        r"cached features of scan [1-6] by counted are made again: sha256 .*", notice
    )
    assert damaged.read_bytes() == data
    assert (out / "probe.json").read_bytes() == before


def test_neither_threads_nor_the_cache_change_a_score(nnunet: Path, tmp_path: Path) -> None:
    specs = ["random:debug", "intensity"]
    one = evaluate(nnunet, specs, out=tmp_path / "one", folds=2, decoder="linear")
    torch.set_num_threads(2)
    try:
        two = evaluate(nnunet, specs, out=tmp_path / "two", folds=2, decoder="linear")
    finally:
        torch.set_num_threads(1)
    again = evaluate(nnunet, specs, out=tmp_path / "one", folds=2, decoder="linear")
    for other in (two, again):
        assert [r.scores for r in other.results] == [r.scores for r in one.results]
        assert other.differences == one.differences


def test_what_cannot_be_read_is_left_out_for_everyone(nnunet: Path, tmp_path: Path) -> None:
    folder = tmp_path / CANARY
    shutil.copytree(nnunet, folder)
    scan = sorted((folder / "imagesTr").iterdir())[1]
    scan.write_bytes(scan.read_bytes()[:-20])
    labels = sorted((folder / "labelsTr").iterdir())[4]
    labels.write_bytes(b"no label map")
    out = tmp_path / "out"
    found = evaluate(folder, [Counted(), "intensity"], out=out, folds=2)
    assert (found.num_scans, found.num_left_out, found.num_encoded) == (4, 2, 8)
    assert "2 scans could not be read and are left out for every backbone" in str(found)
    rows = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert rows[0]["code"] == "integrity"
    assert rows[1]["field"].startswith("label map")
    assert not {row["case"] for row in rows} & {case["case"] for case in found.cases}
    nobody_is_named(out)

    for path in (folder / "imagesTr").iterdir():
        path.write_bytes(b"")
    with pytest.raises(FormatError, match="0 can be used, 2 are needed") as error:
        evaluate(folder, [Counted()], out=out, folds=2)
    assert CANARY not in str(error.value)


def test_leakage_in_each_form_is_refused_before_anything_is_encoded(
    nnunet: Path, tmp_path: Path
) -> None:
    unused = Unused()
    dataset = read_dataset(nnunet)
    folds = (Fold((0, 1, 2), (2, 3)),)
    with pytest.raises(InputError, match="fold 1 leaks: the patients of scan 3"):
        evaluate(dataclasses.replace(dataset, folds=folds), [unused], out=tmp_path / "out")
    both = [
        dataclasses.replace(case, patient=f"{CANARY}{i // 2}")
        for i, case in enumerate(dataset.cases)
    ]
    with pytest.raises(InputError, match="fold 1 leaks: the patients of scan 2") as error:
        evaluate(
            Dataset(cases=tuple(both), folds=(Fold((0, 2, 3), (1,)),)),
            [unused],
            out=tmp_path / "out",
        )
    assert CANARY not in str(error.value)

    copy = tmp_path / f"{CANARY}.nii.gz"
    volume = read_volume(dataset.cases[1].scan)
    moved = volume.affine.copy()
    moved[:3, 3] += 7  # the same voxels elsewhere, in a file of other bytes
    write_nifti(copy, volume.hu_ZYX, moved, level=1)
    added = dataclasses.replace(dataset.cases[5], scan=copy, patient=f"{CANARY} again")
    with pytest.raises(InputError, match="scans 2, 7 hold the same voxels") as error:
        evaluate(
            dataclasses.replace(dataset, cases=(*dataset.cases, added)),
            [unused],
            out=tmp_path / "out",
        )
    assert CANARY not in str(error.value)


def test_patients_are_never_divided(nnunet: Path, tmp_path: Path) -> None:
    dataset = read_dataset(nnunet)
    cases = [
        dataclasses.replace(c, patient=f"{CANARY}{i % 3}") for i, c in enumerate(dataset.cases)
    ]
    grouped = dataclasses.replace(dataset, cases=tuple(cases), remarks=())
    found = evaluate(grouped, [Counted()], out=tmp_path / "out", folds=5)
    assert found.num_patients == 3
    folds_of = {(case["patient"], case["fold"]) for case in found.cases}
    assert len(folds_of) == 3
    nobody_is_named(tmp_path / "out")


def test_a_given_split_tests_its_own_scans_only(nnunet: Path, tmp_path: Path) -> None:
    dataset = dataclasses.replace(read_dataset(nnunet), folds=(Fold((0, 1, 3), (2, 5)),))
    found = evaluate(dataset, [Counted()], out=tmp_path / "out")
    assert found.num_scans == 2
    assert "The split is the data set's own." in str(found)
    few = evaluate(dataset, [Counted()], out=tmp_path / "out", shots=1)
    assert "Heads are fitted on 1 scans." in few.remarks
    assert few.results[0].scores != found.results[0].scores


def test_the_conv_decoder_is_asked_for_and_leaves_no_head(
    nnunet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tapct_fast.evaluation.conv_decoder.STEPS", 12)
    found = evaluate(nnunet, [Counted()], out=tmp_path / "out", folds=2, decoder="conv")
    assert found.settings["decoder"] == "conv"
    assert not (tmp_path / "out" / "heads").exists()
    assert found.results[0].scores[0].value > 0.1


def test_an_encoder_without_a_fingerprint_is_asked_every_time(nnunet: Path, tmp_path: Path) -> None:
    unknown, out = Counted(own=""), tmp_path / "out"
    for _ in range(2):
        found = evaluate(nnunet, [unknown], out=out, folds=2)
        assert found.num_encoded == 6
    assert unknown.num == 12
    assert list((out / "cache" / "features").glob("*")) == []
    assert [p.name for p in (out / "cache").iterdir() if "once" in p.name] == []
    assert "not known" in (out / "report.html").read_text()


def test_wrong_calls_say_what_to_do(nnunet: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for specs, options, message in (
        ([], {}, "needs an encoder"),
        ([Counted(), Counted(scale=2.0)], {}, "two encoders are called 'counted'"),
        ([Failing("sick")], {}, "sick on scan 1: the features are not finite"),
        ([Counted()], {"task": "detection"}, "task='detection' is not one of"),
        ([Counted()], {"task": "regression"}, "scan 1 has no target"),
        ([Counted()], {"decoder": "unet"}, "decoder='unet' is not one of"),
        ([Counted()], {"folds": 1}, "folds=1 must be at least 2"),
        ([Counted()], {"shots": 0}, "shots=0 must be at least 1"),
        ([Counted()], {"shots": 5, "folds": 3}, "fold 1 has 4 training scans"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(nnunet, specs, out=out, **options)  # type: ignore[arg-type]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="OUT holds other files"):
        evaluate(nnunet, [Counted()], out=other)
    with pytest.raises(InputError, match="OUT is a file"):
        evaluate(nnunet, [Counted()], out=other / "thesis.tex")
    labels = json.loads((nnunet / "dataset.json").read_text())["labels"]
    del labels["bone"]
    names = {value: name for name, value in labels.items()}
    with pytest.raises(InputError, match="label map of scan 1 has the value"):
        evaluate(dataclasses.replace(read_dataset(nnunet), label_names=names), [Counted()], out=out)


def test_a_set_without_label_names_takes_the_values_that_occur(
    nnunet: Path, tmp_path: Path
) -> None:
    dataset = dataclasses.replace(read_dataset(nnunet), label_names=None)
    found = evaluate(dataset, [open_encoder(Counted())], out=tmp_path / "out", folds=2)
    values = sorted(json.loads((nnunet / "dataset.json").read_text())["labels"].values())
    assert load_head(tmp_path / "out" / "heads" / "counted.safetensors").label_values == tuple(
        values
    )
    assert f"dice, {values[1]}" in [score.name for score in found.results[0].scores]
