"""Tasks of whole scans, from a CSV: classes, values, neighbours, few shots; patients together."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tapct_fast import evaluate
from tapct_fast.cli import main
from tapct_fast.downstream.features import Features
from tapct_fast.errors import InputError
from tapct_fast.evaluation.encoders import grid_features
from tapct_fast.evaluation.measures import of_classes, of_retrieval
from tapct_fast.evaluation.retrieval import retrieval
from tapct_fast.evaluation.scan_probe import probe_scans_level
from tapct_fast.evaluation.splits import patient_folds
from tapct_fast.io.nifti import write_nifti
from tapct_fast.io.read import read_volume
from tapct_fast.io.volume import Volume

CANARY = "DOE_JANE"
NUM = 20


def density(volume: Volume) -> Features:
    """Tokens that know the HU of their patch, without the noise of single voxels."""
    x = torch.from_numpy(volume.hu_ZYX).float().reshape(3, 4, 4, 4, 4, 4).mean((1, 3, 5)) / 1000
    tokens = torch.stack([x, x.square(), torch.ones_like(x)], dim=-1)
    return grid_features(tokens, volume.affine)


def noise(volume: Volume) -> Features:
    """Tokens that depend on the scan and know nothing of it."""
    seed = int(np.abs(volume.hu_ZYX.astype(np.int64)).sum()) % 2**31
    tokens = torch.randn(3, 4, 4, 3, generator=torch.Generator().manual_seed(seed))
    return grid_features(tokens, volume.affine)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty scans of ten patients; an organ is dense in every second patient."""
    folder = tmp_path_factory.mktemp("scans") / CANARY
    folder.mkdir()
    rows = ["scan,patient,target"]
    for i in range(NUM):
        rng = np.random.default_rng(i)
        patient = i // 2
        hu_ZYX = rng.normal(-900, 60, (12, 16, 16))
        hu_ZYX[3:9, 4:12, 4:12] = rng.normal(40 + 60 * (patient % 2), 30, (6, 8, 8))
        write_nifti(
            folder / f"{CANARY}_{i}.nii", hu_ZYX.astype(np.int16), np.diag([-2.0, -2, 5, 1])
        )
        rows.append(f"{CANARY}_{i}.nii,{CANARY}{patient},{'dense' if patient % 2 else 'plain'}")
    (folder / "cases.csv").write_text("\n".join(rows) + "\n")
    return folder / "cases.csv"


def bags_of(table: Path) -> list[torch.Tensor]:
    return [density(read_volume(table.parent / f"{CANARY}_{i}.nii")).cls_ND for i in range(NUM)]


PATIENTS = [f"patient {i // 2:08d}" for i in range(NUM)]
CLASSES = [1 - i // 2 % 2 for i in range(NUM)]  # dense, plain


def test_classes_are_told_beside_a_rival_that_knows_nothing(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = evaluate(table, [density, noise], out=out, task="classification", folds=5)
    assert (found.num_scans, found.num_patients) == (NUM, 10)
    assert [score.name for score in found.results[0].scores] == ["auroc", "balanced accuracy"]
    folds = patient_folds(PATIENTS, folds=5, seed=0, stratify=CLASSES)
    predicted = probe_scans_level(
        bags_of(table),
        np.array(CLASSES),
        PATIENTS,
        task="classification",
        pooling="mean",
        head="logistic",
        folds=folds,
        seed=0,
    )
    expected = of_classes(predicted, dict(enumerate(CLASSES)), range(NUM))
    assert found.results[0].scores == expected.scores(PATIENTS, seed=0)
    assert found.results[0].scores[0].value > 0.95
    assert 0.1 < found.results[1].scores[0].value < 0.9
    auroc = found.differences[0].scores[0]
    known, unknown = (result.scores[0].value for result in found.results)
    assert auroc.value == pytest.approx(known - unknown)
    assert auroc.low > 0
    assert found.chance == {"auroc": 0.5, "balanced accuracy": 0.5}
    assert "| chance" in str(found)

    written = json.loads((out / "probe.json").read_text())
    assert written["settings"]["head"] == "logistic"
    assert written["classes"] == ["dense", "plain"]
    assert written["cases"][3]["scores"]["density"]["class"] == CLASSES[3]
    assert len({(case["patient"], case["fold"]) for case in written["cases"]}) == 10
    for path in out.rglob("*"):
        assert CANARY not in path.name
        assert not path.is_file() or CANARY.encode() not in path.read_bytes()


def test_values_are_estimated(table: Path, tmp_path: Path) -> None:
    lines = table.read_text().splitlines()
    values = [
        float(read_volume(table.parent / f"{CANARY}_{i}.nii").hu_ZYX[3:9, 4:12, 4:12].mean())
        for i in range(NUM)
    ]
    path = table.parent / "values.csv"
    rows = [f"{line.rsplit(',', 1)[0]},{v}" for line, v in zip(lines[1:], values, strict=True)]
    path.write_text("\n".join([lines[0], *rows]))
    found = evaluate(path, [density, noise], out=tmp_path, task="regression", head="ridge")
    scores = {score.name: score.value for score in found.results[0].scores}
    assert list(scores) == ["r2", "mae", "spearman"]
    assert scores["r2"] > 0.9
    assert scores["mae"] < 0.5 * found.chance["mae"]
    assert found.results[0].rows[4]["value"] == pytest.approx(values[4])
    mae = found.differences[0].scores[1]
    assert mae.value == pytest.approx(scores["mae"] - found.results[1].scores[1].value)
    assert mae.high < 0  # a smaller error
    with pytest.raises(InputError, match="the target of scan 1 is not a finite number"):
        evaluate(table, [density], out=tmp_path, task="regression")


def test_neighbours_are_looked_for_among_other_patients(table: Path, tmp_path: Path) -> None:
    found = evaluate(table, [density, noise], out=tmp_path, task="retrieval", pooling="mean+std")
    bags = bags_of(table)
    vectors = torch.stack([torch.cat([b.mean(0), b.std(0, correction=0)]) for b in bags])
    expected = of_retrieval(retrieval(vectors, np.array(CLASSES), PATIENTS), range(NUM))
    for score, other in zip(
        found.results[0].scores, expected.scores(PATIENTS, seed=0), strict=True
    ):
        assert score.name == other.name
        assert score[1:] == pytest.approx(other[1:])
    assert found.differences[0].scores[3].name == "map"
    assert found.cases[0]["fold"] is None
    assert "among those of other patients" in str(found)
    for options, message in (
        ({"shots": 2}, "fits nothing"),
        ({"pooling": "abmil"}, "fits nothing"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(table, [density], out=tmp_path, task="retrieval", **options)  # type: ignore[arg-type]


def test_few_shots_are_of_each_class(table: Path, tmp_path: Path) -> None:
    found = evaluate(table, [density], out=tmp_path, shots=2, head="knn", pooling="max")
    assert found.task == "classification"
    assert "Heads are fitted on 2 scans of each class." in found.remarks
    assert found.num_scans == NUM
    other = evaluate(table, [density], out=tmp_path, shots=2, head="knn", pooling="max", seed=1)
    assert other.results[0].rows != found.results[0].rows


def test_the_command_line_has_the_same_tasks(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    command = ["probe", str(table), "--out", out, "--backbone", "intensity"]
    assert main([*command, "--task", "classification", "--pooling", "mean+std+max"]) == 0
    assert "| auroc" in capsys.readouterr().out
    assert main([*command, "--task", "classification", "--head", "ridge", "--seed", "1"]) == 0
    assert "encoded 0" in capsys.readouterr().out
    assert main([*command, "--task", "segmentation"]) == 2
    assert "scan 1 has no label map" in capsys.readouterr().err
    assert main([*command, "--task", "regression", "--head", "logistic"]) == 2
    assert "head 'logistic' classifies" in capsys.readouterr().err


def never(volume: Volume) -> Features:
    raise AssertionError(f"{volume.hu_ZYX.shape} was encoded")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "median"}, "pooling='median' is not one of"),
        ({"head": "svm"}, "head='svm' is not one of"),
        ({"task": "regression", "head": "logistic"}, "head 'logistic' classifies"),
        ({"pooling": "abmil", "head": "knn"}, "pooling 'abmil' trains a linear head of its own"),
        ({"task": "retrieval", "head": "knn"}, "head='knn' is for classification and regression"),
        ({"task": "segmentation", "head": "knn"}, "head='knn' is for classification and"),
        ({"task": "retrieval", "pooling": "abmil"}, "retrieval fits nothing"),
        ({"task": "retrieval", "pooling": "median"}, "pooling='median' is not one of"),
    ],
)
def test_heads_that_do_not_fit_are_refused_before_a_scan_is_encoded(
    table: Path, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(table, [never], out=tmp_path, **options)  # type: ignore[arg-type]


def test_a_file_that_a_function_misses_is_not_blamed_on_the_output(
    table: Path, tmp_path: Path
) -> None:
    def without_weights(volume: Volume) -> Features:
        del volume
        Path(f"{CANARY}.safetensors").read_bytes()
        raise AssertionError

    message = "without_weights on scan 1: it could not read a file: No such file or directory"
    with pytest.raises(InputError, match=message) as raised:
        evaluate(table, [without_weights], out=tmp_path, task="classification")
    assert CANARY not in str(raised.value)
