"""Small labelled data sets of phantoms, below a folder that carries a patient's name."""

import json
from pathlib import Path

import numpy as np
import pytest

from tapct_fast.data.phantom import LABEL, make_phantom
from tapct_fast.io.nifti import write_nifti

CANARY = "DOE_JANE_19700101"
LABELS = {"background": 0, "bone": LABEL["bone"], "lungs": LABEL["left lung"]}


def write_nnunet(folder: Path, num: int = 6) -> Path:
    """Write phantoms with two labels, bone and both lungs, as an nnU-Net raw folder."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for i in range(num):
        phantom = make_phantom(5, i, shape_zyx=(10, 48, 56), spacing_mm=(24.0, 6.5, 6.5))
        labels_ZYX = phantom.labels_ZYX.copy()
        labels_ZYX[labels_ZYX == LABEL["right lung"]] = LABEL["left lung"]
        labels_ZYX[~np.isin(labels_ZYX, list(LABELS.values()))] = 0
        affine = phantom.volume.affine
        write_nifti(
            folder / "imagesTr" / f"{CANARY}_{i}_0000.nii.gz", phantom.volume.hu_ZYX, affine
        )
        write_nifti(
            folder / "labelsTr" / f"{CANARY}_{i}.nii.gz", labels_ZYX.astype(np.uint8), affine
        )
    described = {"channel_names": {"0": "CT"}, "labels": LABELS, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="session")
def nnunet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six phantoms; not to be changed."""
    return write_nnunet(tmp_path_factory.mktemp("data") / CANARY)
