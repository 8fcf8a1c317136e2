"""A run small enough to train in milliseconds, and a store to train it on."""

from pathlib import Path

import numpy as np
import pytest

from tapct_fast.config import (
    Config,
    CropConfig,
    HeadConfig,
    HeadsConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
    ViewGroupConfig,
    ViewsConfig,
    VitConfig,
)
from tapct_fast.io.nifti import write_nifti
from tapct_fast.io.pack import pack


@pytest.fixture(scope="session")
def tiny_config() -> Config:
    """Six steps of four samples in two micro-batches, drop path and every augmentation on."""
    head = HeadConfig(num_prototypes=32, bottleneck_dim=8, hidden_dim=16)
    return Config(
        crops=CropConfig(extent_mm_zyx=(32.0, 32.0, 32.0)),
        views=ViewsConfig(
            global_views=ViewGroupConfig(
                num=2, size_zyx=(8, 16, 16), in_plane_scale=(0.3, 1.0), depth_scale=(0.5, 1.0)
            ),
            local_views=ViewGroupConfig(
                num=2, size_zyx=(4, 8, 8), in_plane_scale=(0.1, 0.3), depth_scale=(0.2, 0.5)
            ),
        ),
        vit=VitConfig(dim=64, depth=2, image_zyx=(8, 16, 16), layer_scale=0.1, drop_path=0.3),
        heads=HeadsConfig(dino=head, ibot=head),
        optim=OptimConfig(layer_decay=0.9),
        schedule=ScheduleConfig(
            base_lr=1e-2,
            warmup_steps=2,
            teacher_temp_warmup_steps=4,
            freeze_last_layer_steps=1,
            momentum=(0.9, 1.0),
        ),
        train=TrainConfig(
            num_steps=6,
            batch_size=4,
            group_size=2,
            accumulate=2,
            checkpoint_every=3,
            log_every=1,
            seed=3,
        ),
    )


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three cases of waves between air and bone."""
    folder = tmp_path_factory.mktemp("store")
    z, y, x = np.meshgrid(*(np.arange(n) for n in (20, 24, 24)), indexing="ij")
    for case in range(3):
        wave = np.sin(0.3 * z + case) + np.sin(0.5 * y) + np.cos(0.4 * x * (1 + case))
        hu_ZYX = (600 * wave - 200).clip(-1024, 1500).astype(np.int16)
        write_nifti(folder / f"{case}.nii.gz", hu_ZYX, np.diag([-2.0, -2.0, 2.0, 1.0]))
    pack([folder], folder / "store")
    return folder / "store"
