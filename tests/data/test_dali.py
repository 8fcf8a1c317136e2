"""Shape suffixes: V views, B boxes, Z Y X voxels."""

import dataclasses
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import Tensor
from view_cases import ALL, HU, MAX, MEAN, SHAPES, STAGES, boxes_of

from tapct_fast.config import ViewGroupConfig, ViewsConfig
from tapct_fast.data.dali import DaliRenderer
from tapct_fast.data.reference import render
from tapct_fast.data.rng import generator
from tapct_fast.data.views import ViewTable, draw_views
from tapct_fast.errors import InputError

needs_dali = pytest.mark.skipif(
    find_spec("nvidia") is None or find_spec("nvidia.dali") is None, reason="DALI is not installed"
)


def groups_of(*, antialias: bool = True, blur: float = 0.5) -> list[ViewGroupConfig]:
    return [
        ViewGroupConfig(
            num=num,
            size_zyx=size_zyx,
            in_plane_scale=(0.05, 1.0),
            depth_scale=(0.2, 1.0),
            antialias=antialias,
            blur_prob=(blur, blur),
        )
        for num, size_zyx in ((2, (12, 48, 48)), (3, (4, 16, 16)))
    ]


def tables_of(config: ViewsConfig, groups: list[ViewGroupConfig]) -> list[list[ViewTable]]:
    return [
        [
            draw_views(config, group, HU, shape, spacing_mm=(2, 1, 1), rng=generator(7, g, n))
            for n, shape in enumerate(SHAPES)
        ]
        for g, group in enumerate(groups)
    ]


def rendered(
    renderer: DaliRenderer,
    groups: list[ViewGroupConfig],
    tables: list[list[ViewTable]],
    *,
    which: slice = slice(None),
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    boxes = boxes_of()[which]
    out = [torch.full((g.num, len(boxes), *g.size_zyx), torch.nan, dtype=dtype) for g in groups]
    renderer(boxes, [tables_B[which] for tables_B in tables], out)
    return out


@needs_dali
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_agrees_with_torch_on_mixed_shapes(stage: str, antialias: bool) -> None:
    groups = groups_of(antialias=antialias, blur={"blur": 1.0, "all": 0.5}.get(stage, 0.0))
    tables = tables_of(STAGES[stage], groups)
    views = rendered(DaliRenderer(groups, HU, "cpu", batch_size=len(SHAPES)), groups, tables)
    for group, tables_B, views_VBZYX in zip(groups, tables, views, strict=True):
        for b, (box, table) in enumerate(zip(boxes_of(), tables_B, strict=True)):
            error = (views_VBZYX[:, b] - render(box, table, group, HU)).abs()
            assert error.max() <= MAX
            assert error.mean() <= MEAN


@needs_dali
def test_batch_size_threads_order_and_repetition_do_not_change_a_bit() -> None:
    groups = groups_of()
    tables = tables_of(ALL, groups)
    renderer = DaliRenderer(groups, HU, "cpu", batch_size=len(SHAPES))
    first = rendered(renderer, groups, tables)
    for views, again in zip(first, rendered(renderer, groups, tables), strict=True):
        assert torch.equal(views, again)
    threaded = DaliRenderer(groups, HU, "cpu", batch_size=8, threads=2)
    for views, again in zip(first, rendered(threaded, groups, tables), strict=True):
        assert torch.equal(views, again)
    small = DaliRenderer(groups, HU, "cpu", batch_size=3)
    for which in (slice(3, 5), slice(0, 1), slice(1, 4)):
        for views, part in zip(
            first, rendered(small, groups, tables, which=which), strict=True
        ):  # the calls of one renderer need not be alike
            assert torch.equal(views[:, which], part)


@needs_dali
def test_bfloat16_is_the_rounded_float32_and_a_group_may_be_empty() -> None:
    groups = groups_of()
    groups[1] = dataclasses.replace(groups[1], num=0)
    tables = tables_of(ALL, groups)
    renderer = DaliRenderer(groups, HU, "cpu", batch_size=len(SHAPES))
    exact, empty = rendered(renderer, groups, tables)
    rounded, _ = rendered(renderer, groups, tables, dtype=torch.bfloat16)
    assert torch.equal(rounded, exact.bfloat16())
    assert empty.shape[0] == 0


@needs_dali
def test_boxes_and_tables_are_left_as_they_were() -> None:
    groups = groups_of()
    tables, before = tables_of(ALL, groups), tables_of(ALL, groups)
    boxes = boxes_of()
    out = [torch.empty(g.num, len(boxes), *g.size_zyx) for g in groups]
    DaliRenderer(groups, HU, "cpu", batch_size=len(boxes))(boxes, tables, out)
    assert all(torch.equal(a, b) for a, b in zip(boxes, boxes_of(), strict=True))
    for table, original in zip(tables[0] + tables[1], before[0] + before[1], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(table, original, strict=True))


def test_without_dali_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(InputError, match=r"pip install 'tapct-fast\[dali\]'.*torch and native"):
        DaliRenderer(groups_of(), HU, "cpu", batch_size=1)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(InputError, match="pip install nvidia-dali-cuda120"):
        DaliRenderer(groups_of(), HU, "cpu", batch_size=1)


@needs_dali
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_error_says_so() -> None:
    with pytest.raises(InputError, match="finds no CUDA device"):
        DaliRenderer(groups_of(), HU, "cuda", batch_size=1)


def test_importing_the_renderer_does_not_import_dali() -> None:
    code = "import sys, tapct_fast.data.dali; sys.exit('nvidia.dali' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@needs_dali
@pytest.mark.gpu
def test_views_on_a_gpu_agree_with_torch_and_follow_the_stream() -> None:
    groups = groups_of()
    tables = tables_of(ALL, groups)
    renderer = DaliRenderer(groups, HU, "cuda", batch_size=len(SHAPES))
    for _ in range(3):
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            boxes = [box.cuda(non_blocking=True) for box in boxes_of()]
            out = [torch.full((g.num, 5, *g.size_zyx), torch.nan, device="cuda") for g in groups]
            renderer(boxes, tables, out)
            views = [o.cpu() for o in out]
        for group, tables_B, views_VBZYX in zip(groups, tables, views, strict=True):
            for b, (box, table) in enumerate(zip(boxes_of(), tables_B, strict=True)):
                error = (views_VBZYX[:, b] - render(box, table, group, HU)).abs()
                assert error.max() <= 2e-3  # DALI's GPU resize rounds otherwise
