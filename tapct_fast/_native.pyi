from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

has_cuda: bool

_FloatOrBits = npt.NDArray[np.float32] | npt.NDArray[np.uint16]  # of bfloat16

class NiftiImage:
    # Raises TypeError: only read_nifti makes one.
    def __init__(self, *args: object, **kwargs: object) -> None: ...
    @property
    def data_ZYX(self) -> npt.NDArray[np.int16]: ...
    @property
    def version(self) -> int: ...
    @property
    def big_endian(self) -> bool: ...
    @property
    def dims_xyz(self) -> tuple[int, int, int]: ...
    @property
    def pixdim_xyz(self) -> tuple[float, float, float]: ...
    @property
    def qfac(self) -> float: ...
    @property
    def xyzt_units(self) -> int: ...
    @property
    def datatype(self) -> int: ...
    @property
    def slope(self) -> float: ...
    @property
    def inter(self) -> float: ...
    @property
    def rounded(self) -> bool: ...
    @property
    def num_members(self) -> int: ...
    @property
    def has_lone_inter(self) -> bool: ...
    @property
    def qform_code(self) -> int: ...
    @property
    def sform_code(self) -> int: ...
    @property
    def quaternion_bcd(self) -> tuple[float, float, float]: ...
    @property
    def offset_xyz(self) -> tuple[float, float, float]: ...
    @property
    def srow(self) -> npt.NDArray[np.float64]: ...

class DicomScan:
    # Raises TypeError: only scan_dicom makes one.
    def __init__(self, *args: object, **kwargs: object) -> None: ...
    @property
    def has_mark(self) -> bool: ...
    @property
    def start(self) -> bytes: ...
    @property
    def field(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def code(self) -> str: ...
    @property
    def os_error(self) -> int: ...
    @property
    def values(self) -> dict[str, tuple[str, bytes]]: ...
    @property
    def transfer_syntax(self) -> str: ...
    @property
    def is_big_endian(self) -> bool: ...
    @property
    def deflated_at(self) -> int | None: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def pixel_offset(self) -> int | None: ...
    @property
    def pixel_bytes(self) -> int | None: ...

def scan_dicom(
    sources: Sequence[str | bytes | memoryview], tags: Sequence[tuple[str, int]], threads: int
) -> list[DicomScan]: ...
def read_slices(out_ZYX: npt.NDArray[np.int16], slices: Sequence[object], threads: int) -> None: ...
def read_nifti(
    path: str | bytes,
    max_bytes: int,
    buffer: npt.NDArray[np.uint8] | None = None,
    threads: int = 1,
) -> NiftiImage: ...
def write_gzip(
    path: str | bytes,
    head: npt.NDArray[np.uint8],
    body: npt.NDArray[np.uint8],
    level: int,
    threads: int,
) -> None: ...
def flip(data_ZYX: npt.NDArray[np.int16], axes_zyx: Sequence[bool]) -> None: ...
def render_views(
    boxes: Sequence[npt.NDArray[np.int16]],
    params_VBP: npt.NDArray[np.float32],
    keys_VB: npt.NDArray[np.uint64],
    turns_VB: npt.NDArray[np.uint8],
    out_VBZYX: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    antialias: bool,
    clip: Sequence[float],
    mean: float,
    std: float,
    num_threads: int,
) -> None: ...
def render_views_gpu(
    boxes: Sequence[int],
    shapes_zyx: Sequence[Sequence[int]],
    params_VBP: npt.NDArray[np.float32],
    keys_VB: npt.NDArray[np.uint64],
    turns_VB: npt.NDArray[np.uint8],
    out: int,
    size_zyx: Sequence[int],
    is_bf16: bool,
    antialias: bool,
    clip: Sequence[float],
    mean: float,
    std: float,
    scratch: int,
    num_scratch: int,
    stream: int,
) -> None: ...
def hu_stats(hu: npt.NDArray[np.int16], low: int, high: int) -> tuple[int, int, int]: ...
def write_b2nd(
    path: str | bytes,
    data_ZYX: npt.NDArray[np.int16],
    affine: Sequence[float],
    spacing_mm: Sequence[float],
    hu_range: Sequence[int],
    source_sha256: bytes,
    codec: Literal["lz4hc", "zstd"],
    clevel: int,
    chunk_zyx: Sequence[int],
    block_zyx: Sequence[int],
) -> list[int]: ...
def hu_to_pixels(
    hu_ZYX: npt.NDArray[np.int16],
    out_ZYX: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    resize_yx: Sequence[int],
    antialias: bool,
    pad_hu: float,
    clip: Sequence[float],
    mean: float,
    std: float,
    num_threads: int,
) -> None: ...

class BoxReader:
    def __init__(
        self,
        names: Sequence[str],
        paths: Sequence[str | bytes],
        crc32s: list[bytes],
        use_mmap: bool,
        max_open: int,
    ) -> None: ...
    def read_boxes(
        self,
        cases: npt.NDArray[np.int64],
        lo_Nzyx: npt.NDArray[np.int64],
        shape_zyx: Sequence[int],
        out: npt.NDArray[np.int16] | npt.NDArray[np.uint16],
        zscore: Sequence[float] | None,
        num_threads: int,
    ) -> None: ...

def inflate_backend() -> str: ...
def blosc2_version() -> str: ...
def cuda_devices() -> list[str]: ...
def has_avx2() -> bool: ...
def has_amx() -> bool: ...
def has_avx512_bf16() -> bool: ...
def attention_amx(
    qkv_NT3HK: npt.NDArray[np.uint16],
    out_NTHK: npt.NDArray[np.uint16],
    level_NHT: npt.NDArray[np.float32],
    num_threads: int,
) -> None: ...
def attention_amx_backward(
    grad_out_NTHK: npt.NDArray[np.uint16],
    qkv_NT3HK: npt.NDArray[np.uint16],
    out_NTHK: npt.NDArray[np.uint16],
    level_NHT: npt.NDArray[np.float32],
    grad_qkv_NT3HK: npt.NDArray[np.uint16],
    num_threads: int,
) -> None: ...
def attention_avx(
    qkv_NT3HK: npt.NDArray[np.float32],
    out_NTHK: npt.NDArray[np.float32],
    level_NHT: npt.NDArray[np.float32],
    num_threads: int,
    lanes: int = 0,
) -> None: ...
def attention_avx_backward(
    grad_out_NTHK: npt.NDArray[np.float32],
    qkv_NT3HK: npt.NDArray[np.float32],
    out_NTHK: npt.NDArray[np.float32],
    level_NHT: npt.NDArray[np.float32],
    grad_qkv_NT3HK: npt.NDArray[np.float32],
    num_threads: int,
    lanes: int = 0,
) -> None: ...
def matmul_amx(
    a_MK: npt.NDArray[np.float32],
    b_KN: npt.NDArray[np.float32],
    bias_N: npt.NDArray[np.float32] | None,
    out_MN: npt.NDArray[np.float32],
    pieces: int,
    num_threads: int,
) -> None: ...
def add_norm(
    x_ND: npt.NDArray[np.float32],
    branch_ND: npt.NDArray[np.uint16] | None,
    weight_D: npt.NDArray[np.float32],
    bias_D: npt.NDArray[np.float32],
    eps: float,
    out_ND: npt.NDArray[np.uint16],
    num_threads: int,
) -> None: ...
def gelu(x: npt.NDArray[np.uint16], num_threads: int) -> None: ...
def bias_gelu(
    x_ND: npt.NDArray[np.float32],
    bias_D: npt.NDArray[np.float32],
    out_ND: npt.NDArray[np.float32],
    num_threads: int,
) -> None: ...
def bias_gelu_backward(
    grad_ND: npt.NDArray[np.float32],
    x_ND: npt.NDArray[np.float32],
    bias_D: npt.NDArray[np.float32],
    grad_x_ND: npt.NDArray[np.float32],
    grad_bias_D: npt.NDArray[np.float32],
    num_threads: int,
) -> None: ...
def residual_norm(
    x_NTD: npt.NDArray[np.float32],
    branch_KTD: _FloatOrBits | None,
    gamma_D: npt.NDArray[np.float32] | None,
    weight_D: npt.NDArray[np.float32] | None,
    bias_D: npt.NDArray[np.float32] | None,
    index_K: npt.NDArray[np.int64] | None,
    next_index_J: npt.NDArray[np.int64] | None,
    scale: float,
    eps: float,
    out_NTD: npt.NDArray[np.float32] | None,
    normed_JTD: _FloatOrBits | None,
    num_threads: int,
) -> None: ...
def residual_norm_backward(
    grad_out_NTD: npt.NDArray[np.float32] | None,
    grad_normed_JTD: _FloatOrBits | None,
    read_NTD: npt.NDArray[np.float32],
    branch_KTD: _FloatOrBits | None,
    gamma_D: npt.NDArray[np.float32] | None,
    weight_D: npt.NDArray[np.float32] | None,
    index_K: npt.NDArray[np.int64] | None,
    next_index_J: npt.NDArray[np.int64] | None,
    scale: float,
    eps: float,
    grad_x_NTD: npt.NDArray[np.float32],
    grad_branch_KTD: _FloatOrBits | None,
    grads_3D: npt.NDArray[np.float32],
    num_threads: int,
) -> None: ...
