"""A real torso in the page: its organs' names and HU, read by other means."""

import json
from pathlib import Path

import nibabel
import numpy as np
from browser import Browser

from tapct_fast.backbone.backbone import Backbone
from tapct_fast.io.read import read_labels, read_volume
from tapct_fast.view import label_map_of, read_label_names, write_view

LIVER, SPLEEN = 5, 1


def test_a_real_torso_shows_its_organs_where_they_are(
    real_ct: Path, backbone: Backbone, browser: Browser, tmp_path: Path
) -> None:
    folder = real_ct / "nifti"
    volume = read_volume(folder / "ts_ct_sm_int16.nii.gz")
    names = read_label_names(folder / "ts_label_names.json")
    labels = read_labels(folder / "ts_ct_sm_seg42.nii.gz")
    label_map = label_map_of("labels", labels, volume, names)
    written = write_view(backbone, volume, tmp_path, label_maps=(label_map,))
    assert {"labels.png", "labels.nii.gz"} <= set(written)
    copy, original = (
        nibabel.load(path)
        for path in (tmp_path / "labels.nii.gz", folder / "ts_ct_sm_seg42.nii.gz")
    )
    assert np.array_equal(copy.dataobj, original.dataobj)

    hu_ijk = np.asarray(nibabel.load(folder / "ts_ct_sm_int16.nii.gz").dataobj)
    labels_ijk = np.asarray(original.dataobj)
    browser.open(tmp_path / "view.html", 1280, 900, address="#layer=labels&window=soft")
    ready = "document.getElementById('viewer')?.dataset.ready == 'yes'"
    browser.wait(ready)
    found = json.loads(browser.value("document.getElementById('data-meta').textContent"))
    shown = {label["value"]: i for i, label in enumerate(found["labelMaps"][0]["labels"])}
    assert set(shown) == set(np.unique(labels_ijk)) - {0}
    sides = {}
    for label in {LIVER, SPLEEN} & set(shown):
        browser.value(f"document.querySelectorAll('#names button')[{shown[label]}].click()")
        data = "document.getElementById('viewer').dataset"
        browser.wait(f"{data}.labels == '{names[label]}'")
        i, j, k = map(int, browser.value(f"{data}.file").split(","))
        assert labels_ijk[i, j, k] == label
        assert int(browser.value(f"{data}.hu")) == hu_ijk[i, j, k]
        sides[label] = float(browser.value(f"{data}.ras").split(",")[0])
    assert sides
    if len(sides) == 2:  # the liver is on the right
        assert sides[LIVER] > sides[SPLEEN]
    assert browser.errors == []
