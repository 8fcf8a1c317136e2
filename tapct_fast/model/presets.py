"""Named sizes of the vision transformer.

The 3D forms have the layout of the released TAP-CT models. How the released 2D and 2.5D models cut
their input is not public: the forms here are our own design and no released weights are claimed to
fit them. 2D takes single slices; 2.5D takes stacks of six slices, the depth its users feed, and one
patch spans the whole stack, so both have one token layer in depth.
"""

from collections.abc import Callable

from tapct_fast.config import VitConfig

DIM_S, DIM_B = 384, 768  # DINOv2 ViT-S and ViT-B: 6 and 12 heads of 64


def vit_s_3d() -> VitConfig:
    """Return ViT-S on 12x224x224 voxels, patches of 4x8x8."""
    return VitConfig(dim=DIM_S)


def vit_b_3d() -> VitConfig:
    """Return ViT-B on 12x224x224 voxels, patches of 4x8x8."""
    return VitConfig(dim=DIM_B)


def vit_s_25d() -> VitConfig:
    """Return ViT-S on stacks of 6x224x224 voxels, patches of 6x8x8."""
    return VitConfig(dim=DIM_S, image_zyx=(6, 224, 224), patch_zyx=(6, 8, 8))


def vit_b_25d() -> VitConfig:
    """Return ViT-B on stacks of 6x224x224 voxels, patches of 6x8x8."""
    return VitConfig(dim=DIM_B, image_zyx=(6, 224, 224), patch_zyx=(6, 8, 8))


def vit_s_2d() -> VitConfig:
    """Return ViT-S on slices of 224x224 voxels, patches of 1x8x8."""
    return VitConfig(dim=DIM_S, image_zyx=(1, 224, 224), patch_zyx=(1, 8, 8))


def vit_b_2d() -> VitConfig:
    """Return ViT-B on slices of 224x224 voxels, patches of 1x8x8."""
    return VitConfig(dim=DIM_B, image_zyx=(1, 224, 224), patch_zyx=(1, 8, 8))


VIT_PRESETS: dict[str, Callable[[], VitConfig]] = {
    preset.__name__: preset
    for preset in (vit_s_3d, vit_b_3d, vit_s_25d, vit_b_25d, vit_s_2d, vit_b_2d)
}
