"""Data sets as people have them: what is read, what is refused, and that nobody is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from tapct_fast.errors import FormatError, InputError, TapctError
from tapct_fast.evaluation import cases
from tapct_fast.evaluation.cases import Dataset, patient_id, read_dataset
from tapct_fast.evaluation.splits import Fold

CANARY = "DOE_JANE"


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def nnunet(folder: Path, num: int = 4, **changes: Any) -> Path:
    described = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 2, "spleen": 1},
        "numTraining": num,
        "file_ending": ".nii.gz",
        **changes,
    }
    for i in range(num):
        touch(folder, f"imagesTr/{CANARY}_{i}_0000.nii.gz", f"labelsTr/{CANARY}_{i}.nii.gz")
    touch(folder, "imagesTs/x_0000.nii.gz", "imagesTr/.hidden_0000.nii.gz")
    (folder / "dataset.json").write_text(json.dumps(described))
    return folder


def decathlon(folder: Path, **lists: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{CANARY}.json"
    path.write_text(json.dumps({"labels": {"0": "background", "1": "tumour"}, **lists}))
    for items in lists.values():
        for item in items if isinstance(items, list) else []:
            names = [item.get("image"), item.get("label")] if isinstance(item, dict) else []
            touch(
                folder, *(n for n in names if isinstance(n, str) and ".." not in n and n[0] != "/")
            )
    return path


def csv(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{CANARY}.csv"
    path.write_text(text)
    touch(folder, *(f"{name}{i}.nii" for name in "sl" for i in range(6)))
    return path


def refused(path: Path, message: str, kind: type[TapctError] = InputError, **options: Any) -> None:
    with pytest.raises(kind, match=message) as error:
        read_dataset(path, **options)
    assert CANARY not in str(error.value)


def test_an_nnunet_folder_is_read_as_nnunet_does(tmp_path: Path) -> None:
    dataset = read_dataset(nnunet(tmp_path / CANARY))
    assert [case.scan.name for case in dataset.cases] == [
        f"{CANARY}_{i}_0000.nii.gz" for i in range(4)
    ]
    assert [case.labels.name for case in dataset.cases if case.labels] == [
        f"{CANARY}_{i}.nii.gz" for i in range(4)
    ]
    assert dataset.label_names == {0: "background", 1: "spleen", 2: "liver"}
    assert list(dataset.label_names or {}) == [0, 1, 2]
    assert dataset.folds is None
    assert dataset.patients == tuple(f"patient {i:08d}" for i in range(4))
    assert "every scan counts as a patient" in dataset.remarks[0]
    assert CANARY not in repr(dataset)


def test_nnunets_own_split_is_honoured_and_checked(tmp_path: Path) -> None:
    names = [f"{CANARY}_{i}" for i in range(4)]
    folder = nnunet(tmp_path / "a")
    splits = [{"train": names[2:], "val": names[:2]}, {"train": names[:2], "val": names[2:]}]
    (folder / "splits_final.json").write_text(json.dumps(splits))
    assert read_dataset(folder).folds == (Fold((2, 3), (0, 1)), Fold((0, 1), (2, 3)))
    elsewhere = tmp_path / "splits_final.json"
    elsewhere.write_text(json.dumps(splits[:1]))
    assert read_dataset(folder, splits=elsewhere).folds == (Fold((2, 3), (0, 1)),)

    for content, message, kind in (
        (
            [{"train": names[1:], "val": names[:2]}],
            "fold 1 leaks: the patients of scan 2",
            InputError,
        ),
        (
            [{"train": [CANARY], "val": names[:2]}],
            "fold 1 names a case not in imagesTr",
            InputError,
        ),
        ([{"train": names[:2]}], "fold 1 has no lists", FormatError),
        ({}, "fold 1 has no lists", FormatError),
    ):
        elsewhere.write_text(json.dumps(content))
        refused(folder, message, kind, splits=elsewhere)
    refused(folder, "there is no splits_final|cannot be read", TapctError, splits=tmp_path / "none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_names": {"0": "CT", "1": "PET"}}, "has 2 channels.*copy the CT channel"),
        ({"labels": {"background": 0, "all": [1, 2], "core": 2}}, "labels are regions"),
        ({"labels": {"background": 0, "liver": 1, "ignore": 2}}, "'ignore'"),
    ],
)
def test_what_a_frozen_probe_cannot_score_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    refused(nnunet(tmp_path / CANARY, **changes), message)


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": {"liver": 1}},
        {"labels": {"background": 0, "liver": 0}},
        {"labels": {"background": 0, "liver": 1.5}},
        {"labels": {"background": 0, "liver": 70000}},
        {"labels": [0, 1]},
        {"file_ending": "/../../.nii"},
        {"channel_names": ["CT"]},
    ],
)
def test_a_damaged_description_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    refused(nnunet(tmp_path / CANARY, **changes), "dataset.json", FormatError)


def test_missing_and_stray_files_of_an_nnunet_folder_are_found(tmp_path: Path) -> None:
    folder = nnunet(tmp_path / CANARY)
    (folder / "labelsTr" / f"{CANARY}_1.nii.gz").unlink()
    refused(folder, "label map of scan 2 does not exist")
    touch(folder, f"imagesTr/{CANARY}_1_0001.nii.gz")
    refused(folder, r"imagesTr holds files that do not end in _0000\.nii\.gz")


def test_a_decathlon_list_is_read_with_its_split(tmp_path: Path) -> None:
    items = [{"image": f"imagesTr/{i}.nii", "label": f"labelsTr/{i}.nii"} for i in range(5)]
    path = decathlon(tmp_path / CANARY, training=items[:3], validation=items[3:], test=["t.nii"])
    dataset = read_dataset(path)
    assert dataset.folds == (Fold((0, 1, 2), (3, 4)),)
    assert dataset.label_names == {0: "background", 1: "tumour"}
    assert any("1 images without a label" in remark for remark in dataset.remarks)
    tested = read_dataset(
        decathlon(tmp_path / "b", training=items[:2], validation=[items[2]], test=items[3:])
    )
    assert tested.folds == (Fold((0, 1), (3, 4)),)
    assert any("1 validation scans are not used" in remark for remark in tested.remarks)
    assert read_dataset(decathlon(tmp_path / "c", training=items)).folds is None
    folder = tmp_path / "d"
    decathlon(folder, training=items).rename(folder / "dataset.json")
    assert len(read_dataset(folder).cases) == 5


def test_folds_patients_and_classes_of_a_list_are_honoured(tmp_path: Path) -> None:
    items = [
        {"image": f"{i}.nii", "label": i % 2, "patient": f"{CANARY}{i // 2}", "fold": i // 2}
        for i in range(6)
    ]
    dataset = read_dataset(decathlon(tmp_path / "a", training=items))
    assert dataset.folds is not None
    assert [fold.test for fold in dataset.folds] == [(0, 1), (2, 3), (4, 5)]
    assert [case.target for case in dataset.cases] == ["0", "1"] * 3
    assert all(case.labels is None for case in dataset.cases)
    assert dataset.patients[0] == dataset.patients[1] != dataset.patients[2]
    assert dataset.remarks == ()
    assert CANARY not in repr(dataset)

    items[1]["fold"] = 1
    refused(decathlon(tmp_path / "b", training=items), "patients of scan 1 are in its training")
    del items[3]["patient"]
    refused(decathlon(tmp_path / "c", training=items), "scan 4 has no patient, others do")


@pytest.mark.parametrize("name", ["../out.nii", "/etc/hostname", "link/out.nii"])
def test_paths_that_leave_the_folder_of_a_list_are_refused(tmp_path: Path, name: str) -> None:
    touch(tmp_path, f"{CANARY}/x.nii", "elsewhere/out.nii", "out.nii")
    (tmp_path / CANARY / "link").symlink_to(tmp_path / "elsewhere")
    for item in ({"image": name, "label": "x.nii"}, {"image": "x.nii", "label": name}):
        folder = tmp_path / CANARY
        (folder / "list.json").write_text(json.dumps({"training": [item]}))
        refused(folder / "list.json", "scan 1: a path leaves the folder")


@pytest.mark.parametrize(
    ("lists", "message", "kind"),
    [
        (
            {"training": [{"image": ["a", "b"], "label": "c"}]},
            "entry 1 has several images",
            InputError,
        ),
        (
            {"training": [{"image": "a.nii", "lable": "b", "label": "b"}]},
            "nearest is label",
            InputError,
        ),
        ({"training": [{"label": "b.nii"}]}, "entry 1 has no image", FormatError),
        ({"training": {}}, "nor a list 'training'", InputError),
        ({"training": [], "test": {}}, "'test' is not a list", FormatError),
        ({"training": []}, "no labelled scans", InputError),
        ({"training": [7]}, "entry 1 is not an object", FormatError),
        ({"training": [], "modality": {"0": "FLAIR", "1": "T1w"}}, "2 modalities", InputError),
    ],
)
def test_a_wrong_list_is_refused(
    tmp_path: Path, lists: dict[str, Any], message: str, kind: type[TapctError]
) -> None:
    refused(decathlon(tmp_path, **lists), message, kind)


def test_a_csv_names_scans_labels_patients_targets_and_parts(tmp_path: Path) -> None:
    text = (
        "scan,labels,patient,target,split\n"
        f"s0.nii,l0.nii,{CANARY}A,yes,train\ns1.nii,,{CANARY}A,no,train\n"
        f"s2.nii,l2.nii,{CANARY}B,,val\n{tmp_path}/s3.nii,l3.nii,{CANARY}C,yes,Test\n"
    )
    dataset = read_dataset(csv(tmp_path, "\ufeff" + text))
    assert [case.target for case in dataset.cases] == ["yes", "no", None, "yes"]
    assert [case.labels is None for case in dataset.cases] == [False, True, False, False]
    assert dataset.folds == (Fold((0, 1), (3,)),)
    assert dataset.patients[0] == dataset.patients[1]
    assert dataset.label_names is None
    assert dataset.remarks == ("1 validation scans are not used.",)
    assert CANARY not in repr(dataset)
    plain = read_dataset(csv(tmp_path / "b", "scan,fold\ns0.nii,1\n\ns1.nii,0\ns2.nii,1\n"))
    assert plain.folds == (Fold((0, 2), (1,)), Fold((1,), (0, 2)))
    assert "every scan counts" in plain.remarks[0]


@pytest.mark.parametrize(
    ("text", "message", "kind"),
    [
        (f"scan,{CANARY}_label\ns0.nii,l0.nii\n", "column 2 .* nearest is labels", InputError),
        ("label\nl0.nii\n", "column 1 .* nearest is labels", InputError),
        ("labels\nl0.nii\n", "needs one column 'scan'", InputError),
        ("scan,scan\ns0.nii,s1.nii\n", "no column twice", InputError),
        ("scan,target\ns0.nii\n", "row 1 has 1 cells, not 2", FormatError),
        ("scan,patient\ns0.nii,a\ns1.nii,\n", "scan 2 has an empty cell patient", InputError),
        ("scan\ns0.nii\nnone.nii\n", "scan 2 does not exist", InputError),
        ("scan,labels\ns0.nii,none.nii\n", "label map of scan 1 does not exist", InputError),
        ("scan\ns0.nii\n./s0.nii\n", "scans 1 and 2 are one file", InputError),
        ("scan,split\ns0.nii,train\ns1.nii,dev\n", "scan 2: split is not one of", InputError),
        ("scan,split\ns0.nii,train\n", "training scans only", InputError),
        ("scan,fold\ns0.nii,0\ns1.nii,b\n", "scan 2: fold is not a whole number", InputError),
        ("scan,fold\ns0.nii,0\ns1.nii,0\n", "one fold number", InputError),
        ("scan,fold,split\ns0.nii,0,train\ns1.nii,1,test\n", "both a split and folds", InputError),
        ("scan,patient,fold\ns0.nii,a,0\ns1.nii,a,1\n", "fold 1 leaks", InputError),
        ("scan,patient,split\ns0.nii,a,train\ns1.nii,a,test\n", "patients of scan 2", InputError),
        ('scan\n"s0.nii\n', "not a CSV in UTF-8", FormatError),
        ("", "not a CSV in UTF-8", FormatError),
        ("scan\n", "no labelled scans", InputError),
    ],
)
def test_a_wrong_csv_is_refused(
    tmp_path: Path, text: str, message: str, kind: type[TapctError]
) -> None:
    refused(csv(tmp_path, text), message, kind)


def test_other_things_and_large_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(tmp_path, "neither a folder with dataset.json")
    refused(tmp_path / "none.csv", "neither a folder")
    touch(tmp_path, "list.txt")
    refused(tmp_path / "list.txt", "neither a folder")
    path = csv(tmp_path, "scan\ns0.nii\n")
    refused(path, "splits goes with an nnU-Net folder", splits=tmp_path / "splits_final.json")
    path.write_bytes(b"scan\n\xff\xfe\n")
    refused(path, "not a CSV in UTF-8", FormatError)
    monkeypatch.setattr(cases, "MAX_BYTES", 4)
    refused(path, "DATASET: it is larger", FormatError)
    (tmp_path / "list.json").write_text("[1, 2, 3]")
    monkeypatch.undo()
    refused(tmp_path / "list.json", "not a JSON object", FormatError)
    (tmp_path / "list.json").write_text("{}")
    refused(tmp_path / "list.json", "nor a list 'training'")
    (tmp_path / "list.json").write_text('{"training": [NaN')
    refused(tmp_path / "list.json", "DATASET is not JSON", FormatError)


def test_patient_ids_are_keyed() -> None:
    assert patient_id(CANARY, b"a" * 32) == patient_id(CANARY, b"a" * 32)
    assert patient_id(CANARY, b"a" * 32) != patient_id(CANARY, b"b" * 32)
    assert CANARY not in patient_id(CANARY, b"a" * 32)
    assert isinstance(Dataset(cases=()).patients, tuple)
