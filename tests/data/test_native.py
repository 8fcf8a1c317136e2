"""Shape suffixes: V views, B boxes, Z Y X voxels."""

import dataclasses
import hashlib
import threading

import numpy as np
import pytest
import torch
import view_cases
from torch import Tensor
from view_cases import ALL, HU, MAX, MEAN, OFF, boxes_of

from tapct_fast.config import ViewGroupConfig, ViewsConfig, Zyx
from tapct_fast.data.native import render_batch
from tapct_fast.data.reference import gaussian_noise, render
from tapct_fast.data.rng import generator
from tapct_fast.data.views import ViewTable, draw_views

# Wider than for all renderers: native code measures 2.2e-6 at most, 1e-7 on average.
STAGES = view_cases.STAGES | {
    "gamma": dataclasses.replace(OFF, gamma_prob=1, gamma=(0.3, 3.0)),
    "blur": dataclasses.replace(OFF, blur_sigma=(0.05, 3.0)),
    "noise": dataclasses.replace(OFF, noise_prob=1, noise_std=(0.1, 2.0)),
}
SHAPES: list[Zyx] = [(9, 40, 37), (3, 12, 14), (30, 11, 50), (1, 1, 1), (1, 30, 2)]


def group_of(*, size_zyx: Zyx = (5, 24, 24), antialias: bool = True, blur: float = 0.0, num: int = 3
) -> ViewGroupConfig:  # fmt: skip
    return ViewGroupConfig(
        num=num,
        size_zyx=size_zyx,
        in_plane_scale=(0.05, 1.0),
        depth_scale=(0.2, 1.0),
        antialias=antialias,
        blur_prob=(blur, blur),
    )


def tables_of(config: ViewsConfig, group: ViewGroupConfig, boxes: list[Tensor]) -> list[ViewTable]:
    return [
        draw_views(config, group, HU, (z, y, x), spacing_mm=(2.0, 1.0, 1.0), rng=generator(7, n))
        for n, box in enumerate(boxes)
        for z, y, x in [box.shape]
    ]


def native(
    boxes: list[Tensor],
    tables: list[ViewTable],
    group: ViewGroupConfig,
    *,
    dtype: torch.dtype = torch.float32,
    threads: int = 1,
) -> Tensor:
    out_VBZYX = torch.full((group.num, len(boxes), *group.size_zyx), torch.nan, dtype=dtype)
    render_batch(boxes, tables, group, HU, out_VBZYX, threads=threads)
    return out_VBZYX


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_agrees_with_torch_on_mixed_shapes(stage: str, antialias: bool) -> None:
    group = group_of(antialias=antialias, blur={"blur": 1.0, "all": 0.5}.get(stage, 0.0), num=6)
    boxes = boxes_of(SHAPES)
    tables = tables_of(STAGES[stage], group, boxes)
    views = native(boxes, tables, group)
    expected = torch.stack(
        [render(box, table, group, HU) for box, table in zip(boxes, tables, strict=True)], dim=1
    )
    error = (views - expected).abs()
    assert error.max() <= MAX
    assert error.mean() <= MEAN


def test_views_of_training_size_agree_with_torch() -> None:
    group = group_of(size_zyx=(12, 224, 224), blur=0.5, num=2)
    boxes = boxes_of([(40, 300, 280)])
    tables = tables_of(ALL, group, boxes)
    error = (native(boxes, tables, group)[:, 0] - render(boxes[0], tables[0], group, HU)).abs()
    assert error.max() <= MAX
    assert error.mean() <= MEAN


def test_bfloat16_is_the_rounded_float32() -> None:
    group, boxes = group_of(blur=0.5), boxes_of(SHAPES)
    tables = tables_of(ALL, group, boxes)
    rounded = native(boxes, tables, group, dtype=torch.bfloat16)
    assert torch.equal(rounded, native(boxes, tables, group).bfloat16())


def test_neither_threads_nor_neighbours_nor_repetition_change_a_bit() -> None:
    group, boxes = group_of(blur=0.5), boxes_of(SHAPES)
    tables = tables_of(ALL, group, boxes)
    together = native(boxes, tables, group)
    assert torch.equal(native(boxes, tables, group, threads=2), together)
    assert torch.equal(native(boxes, tables, group, threads=64), together)
    for b in reversed(range(len(boxes))):
        alone = native(boxes[b : b + 1], tables[b : b + 1], group)
        assert torch.equal(alone[:, 0], together[:, b])


def test_noise_is_the_references_to_rounding() -> None:
    group = group_of(size_zyx=(3, 7, 7), num=1)
    config = dataclasses.replace(OFF, noise_prob=1, noise_std=(1.0, 1.0))
    boxes = boxes_of([(4, 9, 9)])
    (table,) = tables_of(config, group, boxes)
    plain = table._replace(noise_std_V=np.zeros(1, dtype=np.float32))
    noise = native(boxes, [table], group) - native(boxes, [plain], group)
    expected = gaussian_noise(int(table.noise_key_V[0]), 3 * 7 * 7)
    torch.testing.assert_close(noise.flatten(), expected, atol=1e-5, rtol=0)


def test_a_known_view_keeps_its_bits() -> None:
    # Every clone of a loop and every x86-64 machine must give them: nothing is contracted or fused.
    group = group_of(size_zyx=(4, 8, 8), blur=1.0, num=2)
    boxes = boxes_of([(6, 20, 20)])
    tables = tables_of(dataclasses.replace(ALL, noise_prob=1), group, boxes)
    views = native(boxes, tables, group)
    assert hashlib.sha256(views.numpy().tobytes()).hexdigest()[:16] == "ffda9d05822badd3"


def test_python_goes_on_while_views_are_rendered() -> None:
    # One long call: between short ones this thread would get its turn with the lock held as well.
    group, boxes = group_of(size_zyx=(12, 96, 96), num=8), boxes_of([(30, 200, 200)]) * 16
    tables = tables_of(ALL, group, boxes)
    out_VBZYX = torch.zeros(8, 16, *group.size_zyx)  # here: torch drops the lock as it fills
    started, done = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        render_batch(boxes, tables, group, HU, out_VBZYX)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    ticks = 0
    while not done.wait(0.001):
        ticks += 1
    thread.join()
    assert ticks > 10  # measured: 83 to 85; 0 with the lock held


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lo_V3", np.nan, "lo and hi must be finite"),
        ("hi_V3", 1e9, "below 2\\^24"),
        ("window_V2", 5.0, "increasing pair"),
        ("gamma_V", 0.0, "gamma and contrast"),
        ("contrast_V", np.inf, "gamma and contrast"),
        ("sigma_V3", -1.0, "sigma must be"),
        ("noise_std_V", np.nan, "noise_std must be"),
        ("turns_V", 4, "turns must be"),
    ],
)
def test_a_view_that_cannot_be_is_refused_and_nothing_is_written(
    field: str, value: float, message: str
) -> None:
    group, boxes = group_of(num=2), boxes_of([(9, 40, 37), (3, 12, 14)])
    tables = tables_of(OFF, group, boxes)
    bad = getattr(tables[1], field).copy()
    bad[-1] = value
    tables[1] = tables[1]._replace(**{field: bad})
    out_VBZYX = torch.full((2, 2, *group.size_zyx), torch.nan)
    with pytest.raises(ValueError, match=message):
        render_batch(boxes, tables, group, HU, out_VBZYX)
    assert out_VBZYX.isnan().all()


def test_an_intensity_contract_that_cannot_be_is_refused() -> None:
    group, boxes = group_of(num=1), boxes_of([(4, 9, 9)])
    tables = tables_of(OFF, group, boxes)
    hu = dataclasses.replace(HU, mean=float("nan"))
    with pytest.raises(ValueError, match="clip range, mean and deviation"):
        render_batch(boxes, tables, group, hu, torch.empty(1, 1, *group.size_zyx))


def test_only_a_square_view_can_be_turned() -> None:
    group, boxes = group_of(size_zyx=(4, 8, 16), num=1), boxes_of([(4, 9, 9)])
    tables = tables_of(OFF, group, boxes)
    tables[0] = tables[0]._replace(turns_V=np.ones(1, dtype=np.uint8))
    with pytest.raises(ValueError, match="only a square view"):
        native(boxes, tables, group)


def test_arrays_that_do_not_agree_are_refused() -> None:
    group, boxes = group_of(), boxes_of(SHAPES)
    tables = tables_of(OFF, group, boxes)
    with pytest.raises(ValueError, match="do not agree"):
        native(boxes[:-1], tables, group)
    with pytest.raises(ValueError, match="does not have the views"):
        render_batch(boxes, tables, group, HU, torch.empty(2, len(boxes), *group.size_zyx))
