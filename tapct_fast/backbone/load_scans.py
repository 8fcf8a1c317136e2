"""From scan files to one batch of pixel values, with nothing in between that is kept.

Each thread reads one scan at a time and turns its voxels into pixel values in one native pass, so
that at most one volume of int16 HU per thread is alive. The interpreter is free meanwhile.

Shape suffixes: B batch, C channels (one), Z Y X voxels or pixels.
"""

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tapct_fast.backbone.preprocess import Preprocess
from tapct_fast.config import Zyx
from tapct_fast.errors import FormatError, InputError, Policy
from tapct_fast.io.findings import Report
from tapct_fast.io.pixels import hu_to_pixels
from tapct_fast.io.read import read_volume
from tapct_fast.io.volume import MAX_VOXELS

_DTYPES = (torch.bfloat16, torch.float32)


class LoadedScan(NamedTuple):
    """What is known about one scan once its voxels have become pixel values.

    Attributes:
        shape_zyx: Voxels of the scan in canonical LPS.
        spacing_mm: As in ``Volume``.
        affine: As in ``Volume``, of voxels; ``affine @ preprocess.pixel_affine(shape_zyx)`` is that
            of the pixels.
        pixels_zyx: Pixels before padding; in the batch, what lies beyond is air.
        report: What the reader found.
    """

    shape_zyx: Zyx
    spacing_mm: tuple[float, float, float]
    affine: NDArray[np.float64]
    pixels_zyx: Zyx
    report: Report | None


class LoadedScans(NamedTuple):
    """A batch for the backbone; ``scans`` are in the order of ``pixels_BCZYX``."""

    pixels_BCZYX: Tensor
    scans: tuple[LoadedScan, ...]


def load_for_tapct(
    paths: Sequence[Path | str],
    *,
    preprocess: Preprocess | None = None,
    dtype: torch.dtype = torch.bfloat16,
    threads: int | None = None,
    series: str | None = None,
    policy: Policy = "error",
    check_hu: bool = True,
    out: Tensor | None = None,
    pin_memory: bool = False,
) -> LoadedScans:
    """Read scans and return their pixel values, equal to ``preprocess.apply`` up to rounding.

    Scans of different size are padded with air at the end to the largest of the batch: in depth,
    and at native resolution (``resize_yx=None``) in plane too. A scan alone in its batch holds only
    the padding to the multiples of ``preprocess``.

    Args:
        paths: Scans as for ``read_volume``, one per batch entry.
        preprocess: That of the backbone (``backbone.preprocess``); None is the released one.
        dtype: bfloat16 or float32.
        threads: Scans read at the same time; spare threads share the slices of each. None takes
            one per core of this process. Memory grows by one volume of int16 HU per thread.
        series: See ``read_volume``; for paths that are all DICOM folders.
        policy: See ``read_volume``.
        check_hu: See ``read_volume``.
        out: Receives the pixel values: (B, 1, Z, Y, X) of ``dtype``, contiguous, on the host, at
            least as large as the batch needs. Reused from call to call it saves the page faults of
            fresh memory.
        pin_memory: Return page-locked memory, for copies to a GPU that do not wait.

    Returns:
        The batch, ``out`` itself where it was given, and what is known of each scan.

    Raises:
        InputError: A setting is wrong, ``out`` is too small, or a scan is not there; scans are
            named by their position in ``paths``, from 1.
        FormatError: A scan is damaged, contradicts itself or is not CT.
    """
    preprocess = preprocess or Preprocess()
    if dtype not in _DTYPES:
        raise InputError(f"dtype {dtype} is not one of {', '.join(map(str, _DTYPES))}")
    if threads is None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if threads < 1:
        raise InputError(f"threads={threads} is not positive")
    if isinstance(paths, str | Path) or not paths:
        raise InputError("paths is not a list of at least one scan; give [path]")
    if out is not None:
        _check_out(out, len(paths), dtype, pin_memory)
    # Pinned at once where the scan is the whole batch; else the batch is, when its size is known.
    is_alone = out is None and len(paths) == 1
    slice_threads = max(1, threads // len(paths))

    def load(index: int) -> tuple[LoadedScan, Tensor]:
        volume = read_volume(paths[index], series=series, check_hu=check_hu, policy=policy)
        z, y, x = volume.hu_ZYX.shape
        scan = LoadedScan(
            (z, y, x),
            volume.spacing_mm,
            volume.affine,
            preprocess.resized_zyx((z, y, x)),
            volume.report,
        )
        padded_zyx = preprocess.padded_zyx(scan.pixels_zyx)
        if out is None:
            pixels_ZYX = _allocate(padded_zyx, dtype, pin_memory and is_alone)
        else:
            pixels_ZYX = out[index, 0]
            if any(size < p for size, p in zip(pixels_ZYX.shape, padded_zyx, strict=True)):
                raise InputError(
                    f"out has room for {tuple(pixels_ZYX.shape)} pixels, the scan needs "
                    f"{padded_zyx} (z, y, x)"
                )
        hu_to_pixels(
            volume.hu_ZYX,
            _as_numpy(pixels_ZYX),
            resize_yx=preprocess.resize_yx,
            hu=preprocess.hu,
            pad_hu=preprocess.pad_hu,
            antialias=preprocess.antialias,
            num_threads=slice_threads,
        )
        return scan, pixels_ZYX

    def load_or_name(index: int) -> tuple[LoadedScan, Tensor]:
        try:
            return load(index)
        except FormatError as error:
            place = f"{error.reason} (input {index + 1} of {len(paths)})"
            raise FormatError(error.field, place, error.code) from None
        except InputError as error:
            raise InputError(f"input {index + 1} of {len(paths)}: {error}") from None

    with ThreadPoolExecutor(min(threads, len(paths))) as pool:
        futures = [pool.submit(load_or_name, index) for index in range(len(paths))]
        try:
            loaded = [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()  # after an error: scans not begun are not read
    scans = tuple(scan for scan, _ in loaded)
    if out is not None:
        return LoadedScans(out, scans)
    return LoadedScans(
        _stack([pixels_ZYX for _, pixels_ZYX in loaded], preprocess, pin_memory), scans
    )


def _stack(pixels: list[Tensor], preprocess: Preprocess, pin_memory: bool) -> Tensor:
    """Copy scans into one batch, air behind each; one scan is a batch as it is."""
    if len(pixels) == 1:
        return pixels[0][None, None]
    z, y, x = (max(sizes) for sizes in zip(*(p.shape for p in pixels), strict=True))
    batch_BCZYX = _allocate((len(pixels), 1, z, y, x), pixels[0].dtype, pin_memory)
    for index in range(len(pixels)):
        scan_ZYX, target_ZYX = pixels[index], batch_BCZYX[index, 0]
        if scan_ZYX.shape != target_ZYX.shape:
            target_ZYX.fill_(preprocess.air)
        z, y, x = scan_ZYX.shape
        target_ZYX[:z, :y, :x] = scan_ZYX
        pixels[index] = target_ZYX  # frees the scan's own memory before the next is copied
    return batch_BCZYX


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, pin_memory: bool) -> Tensor:
    if math.prod(shape[-3:]) > MAX_VOXELS:
        raise InputError(
            f"{shape[-3:]} pixels (z, y, x) per scan are more than {MAX_VOXELS}; set a smaller "
            "preprocess.resize_yx, or load scans of such different size one by one"
        )
    return torch.empty(shape, dtype=dtype, pin_memory=pin_memory)


def _as_numpy(pixels_ZYX: Tensor) -> NDArray[np.float32] | NDArray[np.uint16]:
    if pixels_ZYX.dtype == torch.bfloat16:
        pixels_ZYX = pixels_ZYX.view(torch.uint16)  # numpy has no bfloat16: its bits
    array: NDArray[np.float32] | NDArray[np.uint16] = pixels_ZYX.numpy()
    return array


def _check_out(out: Tensor, batch: int, dtype: torch.dtype, pin_memory: bool) -> None:
    if out.dtype != dtype or out.device.type != "cpu" or out.requires_grad:
        raise InputError(f"out is not a plain {dtype} tensor on the host")
    if out.ndim != 5 or out.shape[:2] != (batch, 1) or not out.is_contiguous():
        raise InputError(
            f"out of shape {tuple(out.shape)} is not a contiguous ({batch}, 1, Z, Y, X)"
        )
    if pin_memory and not out.is_pinned():
        raise InputError("out is not pinned; allocate it with pin_memory=True, or ask for neither")
