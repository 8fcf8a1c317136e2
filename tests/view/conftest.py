"""A body that is different on every side, in a file whose axes are not the page's."""

import nibabel
import numpy as np
import pytest
import torch
from body_case import LANDMARK_MM, NAME, Body

from tapct_fast.backbone.backbone import Backbone
from tapct_fast.backbone.preprocess import Preprocess
from tapct_fast.config import VitConfig
from tapct_fast.io.read import read_labels, read_volume
from tapct_fast.model.vit import Vit


@pytest.fixture(scope="session")
def body(tmp_path_factory: pytest.TempPathFactory) -> Body:
    """An ellipsoid of muscle with a bone cube (label 1) and a ball of fat (label 2).

    The file runs along A, S, R (i, j, k) in voxels of 2.5, 4, 2 mm.
    """
    affine = np.zeros((4, 4))
    affine[1, 0], affine[2, 1], affine[0, 2], affine[3, 3] = 2.5, 4.0, 2.0, 1.0
    shape = (56, 30, 70)
    affine[:3, 3] = -(affine[:3, :3] @ (np.array(shape) - 1) / 2) + (0.5, 1.42, -2.0)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    world = index @ affine[:3, :3].T + affine[:3, 3]
    hu = np.full(shape, -1000.0)
    hu[((world / (62, 60, 90)) ** 2).sum(-1) < 1] = 50
    cube = (np.abs(world - LANDMARK_MM) < 9).all(-1)
    ball = np.linalg.norm(world - (30, -20, -20), axis=-1) < 16
    hu[cube], hu[ball] = 900, -100
    hu += np.random.default_rng(0).normal(0, 6, shape)
    labels = cube.astype(np.uint8) + 7 * ball.astype(np.uint8)
    folder = tmp_path_factory.mktemp("view") / NAME
    folder.mkdir()
    hu = np.rint(hu).astype(np.int16)
    for name, array in (("scan", hu), ("labels", labels)):
        nibabel.Nifti1Image(array, affine).to_filename(folder / f"{NAME}-{name}.nii.gz")
    scan, label_file = (folder / f"{NAME}-{name}.nii.gz" for name in ("scan", "labels"))
    return Body(scan, label_file, read_volume(scan), read_labels(label_file), hu, affine)


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    """A random network with two heads and two registers."""
    config = VitConfig(
        dim=128, depth=2, image_zyx=(12, 64, 64), num_registers=2, layer_scale=1.0, drop_path=0.0
    )
    vit = Vit(config)
    vit.init_weights(0)
    vit.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    vit.pos_embed.normal_(std=0.3, generator=generator)
    for block in vit.blocks:  # so that attention is far from even
        block.attn.qkv.weight.normal_(std=0.15, generator=generator)
    return Backbone(vit, Preprocess(resize_yx=(64, 64)))
