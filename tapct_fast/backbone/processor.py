"""``TAPCTProcessor``: from scans, or arrays as the released processor takes them, to pixel values.

What knows where it lies (a path, a DICOM folder, a ``Volume``, an array with its affine) is turned
to LPS; features find their way back to the scan's own axes. Shape suffixes: B batch, C channels,
Z Y X voxels or tokens.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tapct_fast.backbone.preprocess import Preprocess, check_is_hu, pad_end, token_affine
from tapct_fast.backbone.schema import PREPROCESSOR_FILE, preprocess_json
from tapct_fast.config import Zyx
from tapct_fast.errors import InputError
from tapct_fast.io.atomic import write_atomic
from tapct_fast.io.convert import from_numpy
from tapct_fast.io.orient import from_lps
from tapct_fast.io.read import read_volume
from tapct_fast.io.volume import Volume

Array = NDArray[Any] | Tensor
Scan = Volume | Path | str | Array
_NO_AIR_HU = -300.0  # a CT without a voxel below this has lost its air, or its offset


class ProcessedScans(Mapping[str, Tensor]):
    """What ``TAPCTProcessor`` returns: ``out["pixel_values"]``, and the way back.

    Attributes:
        pixel_values: (B, 1, Z, Y, X): float32 z-scores, or int16 HU if these were asked for.
        scans: Where each lies; None for an array without an affine.
    """

    def __init__(
        self,
        pixel_values: Tensor,
        scans: Sequence[Volume | None],
        sizes: Sequence[tuple[Zyx, Zyx]],
        preprocess: Preprocess,
    ) -> None:
        self.pixel_values = pixel_values
        self.scans = tuple(scans)
        self._sizes, self._preprocess = sizes, preprocess

    def __getitem__(self, key: str) -> Tensor:
        if key != "pixel_values":
            raise KeyError(f"no {key!r}; there is pixel_values")
        return self.pixel_values

    def __iter__(self) -> Iterator[str]:
        return iter(("pixel_values",))

    def __len__(self) -> int:
        return 1

    def to(self, device: torch.device | str) -> "ProcessedScans":
        """Return the same with the pixel values on a device."""
        return ProcessedScans(
            self.pixel_values.to(device), self.scans, self._sizes, self._preprocess
        )

    def restore(
        self, maps_CZYX: Tensor, index: int = 0, *, frame: Literal["scan", "lps"] = "scan"
    ) -> "RestoredMaps":
        """Place feature maps of one scan back into it.

        Args:
            maps_CZYX: ``backbone(pixel_values, reshape=True).last_hidden_state[index]``, or any
                maps on the token grid.
            index: Which scan of the batch.
            frame: ``scan`` for the axes of the file or array the scan came from, ``lps`` for ours.

        Raises:
            InputError: The maps do not fit, or the scan's place is not known.
        """
        scan = self.scans[index]
        if scan is None:
            raise InputError("the array came without an affine: where it lies is not known")
        grid_zyx, padded_zyx = maps_CZYX.shape[1:], self.pixel_values.shape[2:]
        if maps_CZYX.ndim != 4 or any(p % g for p, g in zip(padded_zyx, grid_zyx, strict=True)):
            raise InputError(
                f"maps of shape {tuple(maps_CZYX.shape)} are not (C, Z, Y, X) on a grid of patches "
                f"of {tuple(padded_zyx)} pixels"
            )
        z, y, x = (p // g for p, g in zip(padded_zyx, grid_zyx, strict=True))
        shape_zyx, pixels_zyx = self._sizes[index]
        kept = [-(-size // p) for size, p in zip(pixels_zyx, (z, y, x), strict=True)]
        array_CZYX = maps_CZYX[:, : kept[0], : kept[1], : kept[2]].detach().cpu().numpy()
        affine = scan.affine @ self._preprocess.pixel_affine(shape_zyx) @ token_affine((z, y, x))
        if frame == "scan" and scan.stored is not None:
            array_CZYX, affine = from_lps(array_CZYX, affine, scan.stored.affine)
        return RestoredMaps(array_CZYX, affine)


class RestoredMaps(NamedTuple):
    """Maps along the axes of a scan; ``affine`` maps their index (x, y, z, 1) to RAS+ mm."""

    array_CZYX: NDArray[Any]
    affine: NDArray[np.float64]


class TAPCTProcessor:
    """The released processor's steps, with orientation, air and checks.

    Args:
        preprocess: Those of the backbone (``backbone.preprocess``); None is the released one.
    """

    def __init__(self, preprocess: Preprocess | None = None) -> None:
        self.preprocess = preprocess or Preprocess()

    @classmethod
    def from_pretrained(
        cls, path_or_repo: str | Path, *, revision: str | None = None
    ) -> "TAPCTProcessor":
        """Load what is saved beside the weights of a backbone; see ``load_backbone``."""
        from tapct_fast.backbone.load import load_preprocess

        return cls(load_preprocess(path_or_repo, revision=revision))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``preprocessor.json`` into a folder, made if absent."""
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            write_atomic(Path(folder) / PREPROCESSOR_FILE, preprocess_json(self.preprocess))
        except OSError as error:
            raise InputError(f"the folder cannot be written: {error.strerror}") from None

    def __call__(
        self,
        images: Scan | Sequence[Scan],
        *,
        affine: NDArray[np.float64] | None = None,
        series: str | None = None,
        device: torch.device | str = "cpu",
        as_hu: bool = False,
        return_tensors: Literal["pt"] | None = None,
    ) -> ProcessedScans:
        """Return pixel values for the backbone.

        Args:
            images: A scan file or DICOM folder, a ``Volume``, an array [z, y, x] of HU with its
                ``affine``, a list of these, or as for the released processor an array or tensor
                (B, 1, Z, Y, X) of HU already in LPS. Scans of different size are padded with air
                at the end to the largest.
            affine: Of an array with three axes: (4, 4), its index (x, y, z, 1) to RAS+ mm.
            series: See ``read_volume``.
            device: Where the steps run and the result is.
            as_hu: Return int16 HU, only oriented and padded, which the backbone clips and z-scores
                inside patch embedding; at native resolution only.
            return_tensors: ``pt`` or None; torch tensors are all there is.

        Raises:
            InputError: A scan is not there, an array has no affine or the wrong shape, or values
                look already normalised.
            FormatError: A scan is damaged or is no CT.
        """
        if return_tensors not in (None, "pt"):
            raise InputError(f"return_tensors={return_tensors!r}: only pt (torch) is returned")
        if as_hu and self.preprocess.resize_yx:
            raise InputError("as_hu needs native resolution: preprocess.resize_yx=None")
        if isinstance(images, np.ndarray | Tensor) and images.ndim == 5:
            return self._from_batch(torch.as_tensor(images), device, as_hu)
        given: Sequence[Any] = images if isinstance(images, list | tuple) else [images]
        if not given:
            raise InputError("there is no scan to process")
        scans = [self._read(scan, affine, series) for scan in given]
        pixels = [
            self._steps(torch.from_numpy(scan.hu_ZYX)[None, None].to(device), as_hu)
            for scan in scans
        ]
        largest = [max(sizes) for sizes in zip(*(p.shape[2:] for p in pixels), strict=True)]
        air = self.preprocess.pad_hu if as_hu else self.preprocess.air
        padded = [_pad_to(p, largest, air) for p in pixels]
        return ProcessedScans(
            torch.cat(padded), scans, [self._sizes(s.hu_ZYX.shape) for s in scans], self.preprocess
        )

    def _read(self, scan: Scan, affine: NDArray[np.float64] | None, series: str | None) -> Volume:
        if isinstance(scan, Volume):
            return scan
        if isinstance(scan, Path | str):
            return read_volume(Path(scan), series=series)
        if affine is None:
            raise InputError(
                f"an array of shape {tuple(scan.shape)} has no affine; give affine=, or "
                "(B, 1, Z, Y, X) already in LPS"
            )
        return from_numpy(np.asarray(scan), np.asarray(affine), check_hu=False)

    def _from_batch(
        self, hu_BCZYX: Tensor, device: torch.device | str, as_hu: bool
    ) -> ProcessedScans:
        hu_BCZYX = hu_BCZYX.to(device)
        if not hu_BCZYX.is_floating_point():
            hu_BCZYX = hu_BCZYX.clamp(-32768, 32767).to(torch.int16)
        elif hu_BCZYX.dtype in (torch.float16, torch.float64):
            hu_BCZYX = hu_BCZYX.float()
        pixels_BCZYX = self._steps(hu_BCZYX, as_hu)
        lowest = float(hu_BCZYX.min())
        if lowest > _NO_AIR_HU:
            warnings.warn(
                f"the lowest value is {lowest:g}: no voxel holds air, which is -1000 HU; if the "
                "values are as stored, apply the rescale slope and intercept first",
                stacklevel=3,
            )
        sizes = [self._sizes(hu_BCZYX.shape[2:])] * len(hu_BCZYX)
        return ProcessedScans(pixels_BCZYX, [None] * len(hu_BCZYX), sizes, self.preprocess)

    def _steps(self, hu_BCZYX: Tensor, as_hu: bool) -> Tensor:
        if not as_hu:
            return self.preprocess.apply(hu_BCZYX)
        check_is_hu(hu_BCZYX)
        if hu_BCZYX.is_floating_point():
            hu_BCZYX = hu_BCZYX.round().clamp(-32768, 32767).to(torch.int16)
        return pad_end(hu_BCZYX, self.preprocess.multiples_zyx, self.preprocess.pad_hu)

    def _sizes(self, shape_zyx: Sequence[int]) -> tuple[Zyx, Zyx]:
        z, y, x = shape_zyx
        return (z, y, x), self.preprocess.resized_zyx((z, y, x))


def _pad_to(x_BCZYX: Tensor, sizes_zyx: Sequence[int], value: float) -> Tensor:
    extra = [size - have for size, have in zip(sizes_zyx, x_BCZYX.shape[2:], strict=True)]
    return F.pad(x_BCZYX, (0, extra[2], 0, extra[1], 0, extra[0]), value=value)
