"""Ten views of a volume by every renderer, beside the libraries that augment volumes today.

The work: int16 160x320x320 to two views of 12x224x224 and eight of 12x96x96, z-scored float32 (on
CUDA also bfloat16): crop and resize, three flips, gamma, contrast, blur and noise, each in half of
the views. Each call renders other views. native, torch and dali render the same tables, and are
held to torch before they are timed. The rivals (``bench.view_rivals``) draw their own views from
the same ranges and are held to their shape and range only; none antialiases.

A second case reads the real chest of ``bench.chest`` from a store and renders a sample of the
recipe vit-s, from the region that its views look at and from the whole crop.

On the CPU all have one thread, and ``cpu_ms_per_volume`` is the mean CPU time of the process, which
other programs disturb less than the time by the clock. On CUDA the boxes are on the device.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.chest import tiled_chest
from bench.harness import WARM_UP, Device, Run, Work, floor_ms, start, this_device, time_ms, version
from bench.view_rivals import rivals
from tapct_fast.config import HuConfig, ViewGroupConfig, ViewsConfig, Zyx
from tapct_fast.data.render import RENDERERS, RendererName, make_renderer, obstacle_to
from tapct_fast.data.rng import generator
from tapct_fast.data.samples import Samples
from tapct_fast.data.views import ViewTable, draw_views
from tapct_fast.io.nifti import write_nifti
from tapct_fast.io.pack import pack
from tapct_fast.io.store import Store
from tapct_fast.recipes import recipe

SOURCES = [
    *("csrc/views.cpp", "csrc/gpu/views.cu", "csrc/gpu/view_tile.hpp", "bench/view_rivals.py"),
    *(f"tapct_fast/data/{name}.py" for name in ("views", "reference", "native", "dali", "render")),
    *("tapct_fast/data/samples.py", "csrc/box_reader.cpp"),
]
HU = HuConfig()
LAW = ViewsConfig(
    flip_prob_zyx=(0.5, 0.5, 0.5),
    window_prob=0.0,
    gamma_prob=0.5,
    gamma=(0.7, 1.5),
    contrast_prob=0.5,
    contrast=(0.75, 1.25),
    blur_sigma=(0.3, 1.0),
    thick_slice_prob=0.0,
    noise_prob=0.5,
    noise_std=(0.0, 0.1),
)
MAX, MEAN = 1e-3, 1e-5  # z-scores by which a renderer may differ from torch
VOLUMES = 12  # of different draws
MIXED: Sequence[Zyx] = ((160, 320, 320), (30, 90, 80), (9, 40, 37), (3, 12, 14), (1, 30, 2))
BATCH = 64  # on CUDA
BOX: Zyx = (40, 320, 320)  # of a batch on CUDA: 52 MB would not be read twice from the L2

Render = Callable[[int], Sequence[Tensor]]  # the number of the draw -> views of every group


class Clocked:
    """A call that notes the CPU time of the process."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self.cpu_ms: list[float] = []

    def __call__(self) -> None:
        """Run."""
        start = time.process_time()
        self._call()
        self.cpu_ms.append((time.process_time() - start) * 1e3)

    def mean(self) -> float:
        """Return the mean over all but the first rounds."""
        return round(float(np.mean(self.cpu_ms[WARM_UP:])), 2)


def groups_of(*, is_tiny: bool, antialias: bool = True) -> list[ViewGroupConfig]:
    """Return the global and the local views."""
    return [
        ViewGroupConfig(
            num=num,
            size_zyx=(4, size // 4, size // 4) if is_tiny else (12, size, size),
            in_plane_scale=in_plane,
            depth_scale=(low / 160, high / 160),
            antialias=antialias,
            blur_prob=(0.5, 0.5),
        )
        for num, size, in_plane, low, high in (
            (2, 224, (0.25, 1.0), 12, 32),
            (8, 96, (0.04, 0.25), 8, 16),
        )
    ]


def box_of(shape_zyx: Zyx, device: Device) -> Tensor:
    """Return noise between air and bone, int16."""
    values = generator(0).integers(-1100, 1500, shape_zyx).astype(np.int16)
    return torch.from_numpy(values).to(device)


def tables_of(
    groups: Sequence[ViewGroupConfig], shapes: Sequence[Zyx], draw: int
) -> list[list[ViewTable]]:
    """Draw the views of every group and box."""
    return [
        [
            draw_views(LAW, group, HU, shape, spacing_mm=(1.0, 1.0, 1.0), rng=generator(draw, g, b))
            for b, shape in enumerate(shapes)
        ]
        for g, group in enumerate(groups)
    ]


def renderer(
    name: RendererName,
    groups: Sequence[ViewGroupConfig],
    boxes: Sequence[Tensor],
    device: Device,
    dtype: torch.dtype = torch.float32,
) -> Render:
    """Return what renders draw ``n`` of the boxes; the host's drawing is part of it."""
    render = make_renderer(name, groups, HU, torch.device(device), batch_size=len(boxes))
    shapes: list[Zyx] = [(z, y, x) for z, y, x in (box.shape for box in boxes)]
    out = [
        torch.empty(group.num, len(boxes), *group.size_zyx, dtype=dtype, device=device)
        for group in groups
    ]

    def call(draw: int) -> Sequence[Tensor]:
        render(boxes, tables_of(groups, shapes, draw), out)
        return out

    return call


def agreement(
    renders: Mapping[RendererName, Render], expected: Render, draws: int
) -> dict[str, list[float]]:
    """Return the largest and the mean difference from torch of every renderer, in z-scores.

    Raises:
        ValueError: One is further away than all are allowed to be: nothing to time.
    """
    found: dict[str, list[float]] = {}
    for name, render in renders.items():
        largest, sums, number = 0.0, 0.0, 0
        for draw in range(draws):
            wanted = [views.clone() for views in expected(draw)]
            for views, right in zip(render(draw), wanted, strict=True):
                error = (views.float() - right.float()).abs()
                largest = max(largest, float(error.max()))
                sums, number = sums + float(error.double().sum()), number + error.numel()
        if not (largest <= MAX and sums / number <= MEAN):
            raise ValueError(f"{name} is off by {largest:.2g}, {sums / number:.2g} on average")
        found[name] = [float(f"{largest:.2g}"), float(f"{sums / number:.2g}")]
    return found


def _next(render: Render) -> Callable[[], Any]:
    """Return a call that renders another draw each time, round after round the same ones."""
    turn = iter(range(10**9))
    return lambda: render(next(turn) % VOLUMES)


def _renderers(device: Device) -> tuple[list[RendererName], dict[str, str]]:
    """Return the renderers that run here, and why the others do not."""
    obstacles = {name: obstacle_to(name, device) for name in RENDERERS}
    return (
        [name for name, obstacle in obstacles.items() if not obstacle],
        {name: obstacle for name, obstacle in obstacles.items() if obstacle},
    )


def _one_volume(run: Run) -> None:
    shape: Zyx = (20, 40, 40) if run.is_tiny else (160, 320, 320)
    groups = groups_of(is_tiny=run.is_tiny)
    case = f"ten views of {'x'.join(map(str, shape))}, 1 thread"
    if not run.wants(case, "cpu"):
        return
    box_ZYX = box_of(shape, "cpu")
    names, absent = _renderers("cpu")
    renders = {name: renderer(name, groups, [box_ZYX], "cpu") for name in names}
    errors = agreement(renders, renders["torch"], 2 if run.is_tiny else VOLUMES)
    others, missing = rivals(LAW, groups, HU, shape)
    np.random.seed(0)  # noqa: NPY002 - what batchgeneratorsv2 draws from
    torch.manual_seed(0)
    for name, render in others.items():
        _check_range(name, render(box_ZYX), groups)
    calls = {
        **{f"tapct {name}": Clocked(_next(renders[name])) for name in ("native", *names)},
        **{name: Clocked(partial(render, box_ZYX)) for name, render in others.items()},
    }
    times = time_ms(calls, device="cpu", rounds=3 if run.is_tiny else 2 * VOLUMES)
    cpu_ms = {name: call.mean() for name, call in calls.items()}
    best = min(ms for name, ms in cpu_ms.items() if name != "tapct native")
    run.write(
        case,
        "cpu",
        times,
        dtype="float32",
        bytes=sum(4 * group.num * int(np.prod(group.size_zyx)) for group in groups),
        cpu_ms_per_volume=cpu_ms,
        ratio_to_best_rival=round(best / cpu_ms["tapct native"], 2),
        difference_from_torch=errors,
        verified="native and dali by the same tables; rivals by shape and range",
        absent=absent | missing,
        rivals={
            name: version(name)
            for name in ("monai", "torchio", "batchgeneratorsv2", "kornia")
            if find_spec(name)
        },
        dali=version("nvidia-dali-cuda130"),
    )


def _check_range(name: str, views: Sequence[Tensor], groups: Sequence[ViewGroupConfig]) -> None:
    sizes = [group.size_zyx for group in groups for _ in range(group.num)]
    low, high = ((end - HU.mean) / HU.std for end in HU.clip)
    reach = 6 * LAW.noise_std[1]
    for view_ZYX, size in zip(views, sizes, strict=True):
        if (
            view_ZYX.dtype != torch.float32
            or tuple(view_ZYX.shape) != size
            or not low - reach <= float(view_ZYX.min()) < float(view_ZYX.max()) <= high + reach
        ):
            raise ValueError(f"{name} makes no such views; not timed")


def _mixed_shapes(run: Run, *, antialias: bool) -> None:
    words = "antialiased" if antialias else "not antialiased"
    case = f"ten views of {len(MIXED)} shapes, {words}, 1 thread"
    if not run.wants(case, "cpu"):
        return
    groups = groups_of(is_tiny=run.is_tiny, antialias=antialias)
    boxes = [box_of(shape, "cpu") for shape in (MIXED[1:] if run.is_tiny else MIXED)]
    names, absent = _renderers("cpu")
    renders = {name: renderer(name, groups, boxes, "cpu") for name in names}
    run.write(
        case,
        "cpu",
        time_ms(
            {f"tapct {name}": _next(render) for name, render in renders.items()},
            device="cpu",
            rounds=3 if run.is_tiny else VOLUMES,
        ),
        dtype="float32",
        bytes=len(boxes) * sum(4 * g.num * int(np.prod(g.size_zyx)) for g in groups),
        difference_from_torch=agreement(renders, renders["torch"], 2 if run.is_tiny else VOLUMES),
        verified="native and dali by the same tables",
        absent=absent,
    )


def _from_store(run: Run) -> None:
    volume = tiled_chest(is_tiny=run.is_tiny)
    if volume is None:
        return
    case = f"store to ten views, {'x'.join(map(str, volume.hu_ZYX.shape))}, 1 thread"
    if not run.wants(case, "cpu"):
        return
    config = recipe("vit-s")
    with tempfile.TemporaryDirectory() as folder:
        write_nifti(Path(folder) / "scan.nii", volume.hu_ZYX, volume.affine)
        pack([Path(folder) / "scan.nii"], Path(folder) / "store")
        store = Store.open(Path(folder) / "store")
        samples = Samples(store, config)
        device = torch.device("cpu")
        render = make_renderer("native", samples.groups, HU, device, batch_size=1)
        out = [torch.empty(g.num, 1, *g.size_zyx) for g in samples.groups]

        def from_region(index: int) -> Sequence[Tensor]:
            sample, hu_ZYX = samples.load(index)
            render([torch.from_numpy(hu_ZYX)], [[table] for table in sample.tables], out)
            return out

        def from_crop(index: int) -> Sequence[Tensor]:
            sample = samples.draw(index)
            crop = sample.crop
            hu_ZYX = store.read_box(crop.case, crop.lo_zyx, crop.shape_zyx)
            shift_3 = np.subtract(sample.region.lo_zyx, crop.lo_zyx).astype(np.float32)
            tables = [
                [t._replace(lo_V3=t.lo_V3 + shift_3, hi_V3=t.hi_V3 + shift_3)]
                for t in sample.tables
            ]
            render([torch.from_numpy(hu_ZYX)], tables, out)
            return out

        drawn = [samples.draw(index) for index in range(VOLUMES)]
        voxels = [int(np.prod(sample.region.shape_zyx)) for sample in drawn]
        renders: dict[str, Render] = {"region": from_region, "whole crop": from_crop}
        errors = {}
        for index in range(2 if run.is_tiny else VOLUMES):
            wanted = [views.clone() for views in from_crop(index)]
            for views, right in zip(from_region(index), wanted, strict=True):
                errors[index] = float((views - right).abs().max())
        if max(errors.values()) > MAX:
            raise ValueError("the region gives other views than the crop; not timed")
        run.write(
            case,
            "cpu",
            time_ms(
                {f"tapct {name}": _next(render) for name, render in renders.items()},
                device="cpu",
                rounds=3 if run.is_tiny else VOLUMES,
            ),
            dtype="float32",
            bytes=round(2 * float(np.mean(voxels))),
            share_of_crop=round(
                sum(voxels) / sum(int(np.prod(s.crop.shape_zyx)) for s in drawn), 3
            ),
            verified=f"the same views to {max(errors.values()):.1g} z-scores",
        )


def _on_device(run: Run, dtype: torch.dtype) -> None:
    shape, batch = ((8, 40, 40), 2) if run.is_tiny else (BOX, BATCH)
    width = str(dtype).removeprefix("torch.")
    case = f"ten views of {batch} boxes {'x'.join(map(str, shape))}, {width}"
    if not run.wants(case, "cuda"):
        return
    groups = groups_of(is_tiny=run.is_tiny)
    boxes = [box_of(shape, "cuda") for _ in range(batch)]
    names, absent = _renderers("cuda")
    renders = {name: renderer(name, groups, boxes, "cuda", dtype) for name in names}
    errors = {}
    if dtype == torch.float32:  # bfloat16 may fall on either side of a step
        errors = agreement(renders, renders["torch"], 1)
    times = time_ms(
        {f"tapct {name}": _next(render) for name, render in renders.items()},
        device="cuda",
        rounds=3 if run.is_tiny else VOLUMES,
    )
    written = sum(group.num * int(np.prod(group.size_zyx)) for group in groups)
    # Every box once, although its views may leave out some of it or look at some of it twice.
    moved = batch * (2 * int(np.prod(shape)) + dtype.itemsize * written)
    floor = floor_ms("cuda", Work({}, [], 0.0, moved, dtype))
    run.write(
        case,
        "cuda",
        times,
        dtype=width,
        bytes=moved,
        samples_per_s={name: round(batch / p50 * 1e3) for name, (_, p50, _) in times.items()},
        share_of_copy_bandwidth=floor
        and {name: round(floor / p50, 3) for name, (_, p50, _) in times.items()},
        difference_from_torch=errors,
        verified="native and dali by the same tables",
        absent=absent,
        **({"floor_ms": floor} if floor else {}),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure on CUDA where there is a device, else on one core."""
    run = start(__file__, SOURCES, argv)
    if this_device() == "cuda":
        for dtype in (torch.float32, torch.bfloat16):
            _on_device(run, dtype)
        return
    torch.set_num_threads(1)
    _one_volume(run)
    for antialias in (True, False):
        _mixed_shapes(run, antialias=antialias)
    _from_store(run)


if __name__ == "__main__":
    main()
