"""Runs that were really trained, healthy and sick, in seconds; and rows made by hand."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapct_fast import recipes
from tapct_fast.config import Config
from tapct_fast.data.phantom import make_phantom
from tapct_fast.io.nifti import write_nifti
from tapct_fast.io.pack import pack
from tapct_fast.monitor.record import Record, read_record
from tapct_fast.train.loop import train

SMALL = {
    "train.num_steps": "60",
    "train.checkpoint_every": "60",
    "train.num_workers": "1",
    "vit.dim": "64",
    "vit.depth": "2",
    "vit.image_zyx": "8,32,32",
    "crops.extent_mm_zyx": "96,200,200",
    "views.global_views.size_zyx": "8,32,32",
    "views.global_views.in_plane_scale": "0.5,1",
    "views.local_views.size_zyx": "8,16,16",
    "views.local_views.in_plane_scale": "0.2,0.4",
    "views.local_views.num": "2",
    "heads.dino.num_prototypes": "32",
    "heads.ibot.num_prototypes": "32",
    "schedule.warmup_steps": "10",
    "schedule.momentum": "0.9,0.99",
}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path]]:
    """Six small phantoms with their label maps."""
    folder = tmp_path_factory.mktemp("Mueller^Eva")  # a name that must show up nowhere
    found = []
    for i in range(6):
        phantom = make_phantom(1, i, shape_zyx=(16, 64, 64), spacing_mm=(12.0, 5.5, 5.5))
        paths = folder / f"{i}.nii.gz", folder / f"labels-{i}.nii.gz"
        write_nifti(paths[0], phantom.volume.hu_ZYX, phantom.volume.affine)
        write_nifti(paths[1], phantom.labels_ZYX.astype(np.uint8), phantom.volume.affine)
        found.append(paths)
    return found


@pytest.fixture(scope="session")
def store(pairs: list[tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "store"
    pack([scan for scan, _ in pairs], folder)
    return folder


Trained = Callable[[str, Mapping[str, str]], Path]


@pytest.fixture(scope="session")
def trained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train the small run with other settings; returns its folder."""

    def run(name: str, settings: Mapping[str, str]) -> Path:
        out = tmp_path_factory.mktemp(name)
        train(recipes.override(recipes.debug(), SMALL | dict(settings)), store, out, device="cpu")
        return out

    return run


@pytest.fixture(scope="session")
def healthy_run(trained: Trained) -> Path:
    return trained("healthy", {})


@pytest.fixture(scope="session")
def healthy(healthy_run: Path) -> Record:
    return read_record(healthy_run)._replace(idle_seconds=0.0)


@pytest.fixture
def config() -> Config:
    """128 prototypes, half of the views masked, warm after step 20, 400 steps."""
    return recipes.override(recipes.debug(), {"train.num_steps": "400"})


@pytest.fixture
def steady(config: Config) -> Record:
    """The numbers of a healthy run of ``debug`` at its end, for 100 rows."""
    assert config.heads.dino.num_prototypes == 128
    row: dict[str, Any] = {
        "loss": 6.6,
        "dino_global": 0.87,
        "dino_local": 3.48,
        "ibot": 2.23,
        "koleo": 0.38,
        "grad_norm_backbone": 1.26,
        "grad_norm_dino_head": 0.51,
        "grad_norm_ibot_head": 0.44,
        "lr": 1e-4,
        "last_layer_lr": 1e-4,
        "weight_decay": 0.04,
        "momentum": 0.98,
        "teacher_temp": 0.04,
        "samples_per_s": 12.0,
        "data_wait": 0.0,
        "skipped": 0,
        "teacher_entropy_dino": 4.15,
        "teacher_entropy_dino_share": 4.15 / math.log(128),
        "teacher_entropy_ibot": 3.62,
        "teacher_entropy_ibot_share": 3.62 / math.log(128),
        "prototype_usage_dino": 0.68,
        "prototype_usage_ibot": 0.52,
        "effective_rank": 7.0,
        "koleo_distance": 0.85,
        "patch_similarity": 0.24,
        "cls_agreement": 0.8,
    }
    return Record(config, [{"step": step, **row} for step in range(1, 101)])
