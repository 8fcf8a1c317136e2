"""The CUDA renderer against torch on the CPU. Shape suffixes: V views, B boxes, Z Y X voxels."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor
from view_cases import ALL, HU, MAX, MEAN, boxes_of

from tapct_fast import _native
from tapct_fast.config import ViewGroupConfig, Zyx
from tapct_fast.data import native
from tapct_fast.data.native import render_batch
from tapct_fast.data.reference import render
from tapct_fast.data.rng import generator
from tapct_fast.data.views import ViewTable, draw_views

SHAPES: list[Zyx] = [(9, 40, 37), (3, 12, 14), (30, 311, 250), (1, 1, 1), (1, 30, 2)]


def group_of(size_zyx: Zyx, *, num: int = 6, antialias: bool = True) -> ViewGroupConfig:
    return ViewGroupConfig(
        num=num,
        size_zyx=size_zyx,
        in_plane_scale=(0.05, 1.0),
        depth_scale=(0.2, 1.0),
        antialias=antialias,
        blur_prob=(0.5, 0.5),
    )


def tables_of(group: ViewGroupConfig, boxes: list[Tensor]) -> list[ViewTable]:
    return [
        draw_views(ALL, group, HU, (z, y, x), spacing_mm=(2.0, 1.0, 1.0), rng=generator(7, n))
        for n, box in enumerate(boxes)
        for z, y, x in [box.shape]
    ]


def on_gpu(
    boxes: list[Tensor], group: ViewGroupConfig, dtype: torch.dtype = torch.float32
) -> Tensor:
    shape = (group.num, len(boxes), *group.size_zyx)
    out_VBZYX = torch.full(shape, torch.nan, dtype=dtype, device="cuda")
    render_batch([box.cuda() for box in boxes], tables_of(group, boxes), group, HU, out_VBZYX)
    return out_VBZYX


@pytest.mark.gpu
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size_zyx", [(5, 24, 24), (12, 96, 96), (3, 70, 70), (2, 1, 1)])
def test_the_gpu_agrees_with_torch_on_mixed_shapes(size_zyx: Zyx, antialias: bool) -> None:
    group, boxes = group_of(size_zyx, antialias=antialias), boxes_of(SHAPES)
    expected_VBZYX = torch.stack(
        [
            render(box, table, group, HU)
            for box, table in zip(boxes, tables_of(group, boxes), strict=True)
        ],
        dim=1,
    )
    error = (on_gpu(boxes, group).cpu() - expected_VBZYX).abs()
    assert error.max() <= MAX
    assert error.mean() <= MEAN


@pytest.mark.gpu
def test_more_views_than_one_launch_carries_agree_with_torch() -> None:
    group, boxes = (
        group_of((3, 9, 9), num=30),
        boxes_of(SHAPES * 3),
    )  # 450 views; a launch takes 128
    views_VBZYX = on_gpu(boxes, group).cpu()
    for b, (box, table) in enumerate(zip(boxes, tables_of(group, boxes), strict=True)):
        assert (views_VBZYX[:, b] - render(box, table, group, HU)).abs().max() <= MAX


@pytest.mark.gpu
def test_bfloat16_is_the_rounded_float32_on_the_gpu() -> None:
    for size_zyx in [
        (5, 24, 24),
        (3, 33, 33),
    ]:  # rows that the four pixels of a store divide or not
        group, boxes = group_of(size_zyx), boxes_of(SHAPES)
        assert torch.equal(on_gpu(boxes, group, torch.bfloat16), on_gpu(boxes, group).bfloat16())


@pytest.mark.gpu
def test_a_hundred_renderings_are_equal_to_the_bit() -> None:
    group, boxes = group_of((5, 40, 40)), boxes_of(SHAPES)
    first_VBZYX = on_gpu(boxes, group)
    for _ in range(100):
        assert torch.equal(on_gpu(boxes, group), first_VBZYX)


@pytest.mark.gpu
def test_views_are_rendered_in_the_order_of_the_current_stream() -> None:
    group, boxes = group_of((12, 96, 96)), boxes_of(SHAPES)
    tables, expected_VBZYX = tables_of(group, boxes), on_gpu(boxes, group)
    side = torch.cuda.Stream()
    empty = [torch.zeros_like(box, device="cuda") for box in boxes]
    pinned = [box.pin_memory() for box in boxes]
    out_VBZYX = torch.full_like(expected_VBZYX, torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # about 0.1 s, so that work on another stream comes first
        for target, box in zip(empty, pinned, strict=True):
            target.copy_(box, non_blocking=True)
        render_batch(empty, tables, group, HU, out_VBZYX)
        copy_VBZYX = out_VBZYX.clone()
    side.synchronize()
    assert torch.equal(copy_VBZYX, expected_VBZYX)


@pytest.mark.gpu
def test_a_view_that_cannot_be_is_refused_before_the_gpu_sees_it() -> None:
    group, boxes = group_of((5, 24, 24)), boxes_of(SHAPES)
    tables = tables_of(group, boxes)
    tables[-1].gamma_V[-1] = 0
    out_VBZYX = torch.full((6, len(boxes), 5, 24, 24), torch.nan, device="cuda")
    with pytest.raises(ValueError, match="gamma and contrast"):
        render_batch([box.cuda() for box in boxes], tables, group, HU, out_VBZYX)
    assert out_VBZYX.isnan().all()
    with pytest.raises(ValueError, match="a box is on cpu"):
        render_batch(boxes, tables_of(group, boxes), group, HU, out_VBZYX)


def call_without_a_device(out_VBZYX: Tensor, boxes: list[Tensor], group: ViewGroupConfig) -> None:
    # The branch for CUDA, on addresses that nothing reads: a build without CUDA stops at the call.
    native._render_gpu(
        boxes,
        np.zeros((group.num, len(boxes), 14), dtype=np.float32),
        np.zeros((group.num, len(boxes)), dtype=np.uint64),
        np.zeros((group.num, len(boxes)), dtype=np.uint8),
        group,
        HU,
        out_VBZYX,
    )


def test_wrong_memory_is_refused_by_name() -> None:
    group, boxes = group_of((5, 24, 24), num=2), boxes_of(SHAPES)
    good_VBZYX = torch.empty(2, len(boxes), 5, 24, 24)
    with pytest.raises(ValueError, match=r"out has shape \(2, 5, 5, 24, 23\)"):
        call_without_a_device(good_VBZYX[..., :23], boxes, group)
    with pytest.raises(ValueError, match="contiguous float32 or bfloat16"):
        call_without_a_device(good_VBZYX.half(), boxes, group)
    with pytest.raises(ValueError, match="contiguous float32 or bfloat16"):
        call_without_a_device(good_VBZYX.transpose(3, 4), boxes, group)
    with pytest.raises(ValueError, match="contiguous int16"):
        call_without_a_device(good_VBZYX, [boxes[0].float(), *boxes[1:]], group)
    with pytest.raises(ValueError, match="contiguous int16"):
        call_without_a_device(good_VBZYX, [boxes[0].transpose(1, 2), *boxes[1:]], group)


def test_the_binding_checks_on_the_host_and_says_when_there_is_no_cuda_code() -> None:
    group = group_of((5, 24, 24), num=1)
    box = boxes_of([(9, 40, 37)])
    (table,) = tables_of(dataclasses.replace(group, num=1), box)
    params_VBP = np.concatenate(
        [
            *(table.lo_V3, table.hi_V3, table.window_V2, table.gamma_V[:, None]),
            *(table.contrast_V[:, None], table.sigma_V3, table.noise_std_V[:, None]),
        ],
        axis=1,
    )[:, None]
    params_VBP[:, :, 10:13] = 0  # a blur would want scratch memory
    keys_VB, turns_VB = table.noise_key_V[:, None], table.turns_V[:, None]

    def call(shapes: list[Zyx], params_VBP: np.ndarray) -> None:
        _native.render_views_gpu(
            [0], shapes, params_VBP, keys_VB, turns_VB, 0, group.size_zyx, False, True,
            HU.clip, HU.mean, HU.std, 0, 0, 0,
        )  # fmt: skip

    with pytest.raises(ValueError, match="not of one length"):
        call([], params_VBP)
    with pytest.raises(ValueError, match="do not agree"):
        call([(9, 40, 37)], params_VBP[:, :, :13].copy())
    if _native.has_cuda:
        with pytest.raises(ValueError, match="an axis must have"):
            call([(0, 40, 37)], params_VBP)
    else:
        with pytest.raises(RuntimeError, match="rebuild with TAPCT_CUDA=ON"):
            call([(9, 40, 37)], params_VBP)
