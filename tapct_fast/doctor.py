"""What is installed, which backend is chosen and why, what is missing and how to get it."""

import platform
import shutil
import sys
from importlib import metadata
from importlib.util import find_spec
from typing import NamedTuple


class Finding(NamedTuple):
    """One line of the report; ``remedy`` is empty where nothing is missing."""

    name: str
    state: str
    remedy: str = ""


# import name, distribution, what it is for, how to get it
_OPTIONAL = (
    ("pydicom", "pydicom", "DICOM series", "pip install 'tapct-fast[dicom]'"),
    ("gdcm", "python-gdcm", "compressed DICOM", "pip install 'tapct-fast[dicom]'"),
    ("SimpleITK", "SimpleITK", "NRRD and MetaImage", "pip install 'tapct-fast[itk]'"),
    ("pyarrow", "pyarrow", "the manifest of embed", "pip install 'tapct-fast[embed]'"),
    ("ray", "ray", "embed on a cluster", "pip install 'tapct-fast[ray]'"),
    ("tensorboard", "tensorboard", "TensorBoard logs", "pip install 'tapct-fast[track]'"),
    ("wandb", "wandb", "logs for Weights & Biases", "pip install 'tapct-fast[track]'"),
    ("mlflow", "mlflow-skinny", "logs for MLflow", "pip install 'tapct-fast[track]'"),
    ("huggingface_hub", "huggingface-hub", "backbones by hub id", "pip install 'tapct-fast[hf]'"),
)


def examine() -> list[Finding]:
    """Look at the machine and the installation; imports torch, changes nothing."""
    return [*_versions(), *_native(), *_devices(), *_optional(), *_system()]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> list[Finding]:
    rows = [Finding("tapct-fast", _version("tapct-fast") or "source tree", "")]
    rows.append(
        Finding("python", f"{platform.python_version()} on {sys.platform} {platform.machine()}")
    )
    for name in ("torch", "triton", "numpy", "safetensors"):
        version = _version(name)
        remedy = "" if version else "Triton has Linux wheels only; CPU work does not need it"
        rows.append(Finding(name, version or "missing", remedy))
    return rows


def _native() -> list[Finding]:
    try:
        from tapct_fast import _native
    except ImportError:
        return [Finding("native core", "missing", "pip install -e . (needs a C++20 compiler)")]
    backend = _native.inflate_backend()
    remedy = ""
    if not backend.startswith("libdeflate"):
        remedy = "optional: install libdeflate's headers (Debian: libdeflate-dev) and rebuild"
    rows = [
        Finding("inflate", f"{backend} (chosen when the native core was built)", remedy),
        Finding("store codec", f"c-blosc2 {_native.blosc2_version()}"),
    ]
    if _native.has_cuda:
        devices = _native.cuda_devices()
        rows.append(Finding("native CUDA", ", ".join(devices) or "built, no device found"))
    else:
        rows.append(
            Finding("native CUDA", "not built", "optional: rebuild with TAPCT_CUDA=ON and nvcc")
        )
    return rows


def _devices() -> list[Finding]:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "fp32: the device has no bf16"
        return [
            Finding("device", f"cuda ({', '.join(names)})"),
            Finding("precision", f"{bf16} (auto)"),
            Finding("fused ops", "Triton kernels (inputs are on CUDA)"),
            _launches(),
            *_attention("cuda"),
            _renderer("cuda"),
        ]
    why = "torch is a CPU build" if torch.version.cuda is None else "no CUDA device is visible"
    return [
        Finding("device", f"cpu, {torch.get_num_threads()} threads ({why})"),
        Finding("precision", "fp32 (auto: CPU runs are kept exact)"),
        Finding(
            "fused ops",
            "native residual_norm and gelu in float32, other ops and dtypes eager definitions "
            "(Triton kernels need CUDA)",
        ),
        *_attention("cpu"),
        _renderer("cpu"),
    ]


def _renderer(device_type: str) -> Finding:
    """Say what renders the views of a run by default, and which other renderers could."""
    try:
        from tapct_fast.data.render import RENDERERS, choose_renderer, obstacle_to
    except ImportError as error:  # the native core is missing
        return Finding("views", f"missing ({error})", "pip install -e . (needs a C++20 compiler)")
    chosen = choose_renderer("auto", device_type)
    obstacles = {name: obstacle_to(name, device_type) for name in RENDERERS if name != chosen}
    others = [name for name, obstacle in obstacles.items() if not obstacle]
    remedies = [f"{name}: {obstacle}" for name, obstacle in obstacles.items() if obstacle]
    return Finding(
        "views",
        f"{chosen} (auto; --views.renderer {' or '.join(others)} would run too)",
        f"optional: {'; '.join(remedies)}" if remedies else "",
    )


def _launches() -> Finding:
    """Say where the block sizes of the Triton kernels come from."""
    try:
        from tapct_kernels.tuning import table_path
    except ImportError as error:  # Triton has no wheel here
        return Finding("launch configurations", f"missing ({error})", "pip install triton (Linux)")
    path = table_path()
    assert path is not None  # asked on CUDA only
    if path.exists():
        return Finding("launch configurations", f"tuned for this device ({path.name})")
    remedy = "optional: python -m bench.tune, in a clone on this device"
    return Finding("launch configurations", f"defaults (no {path.name})", remedy)


def _attention(device_type: str) -> list[Finding]:
    """Choose as training and inference would, and say why the kernels before it were not taken."""
    import torch

    try:
        from tapct_kernels import choose_backend, choose_varlen_backend
    except ImportError as error:  # Triton has no wheel here
        return [Finding("attention", f"missing ({error})", "pip install triton (Linux)")]
    dtype = torch.float32
    if device_type == "cuda" and torch.cuda.is_bf16_supported():
        dtype = torch.bfloat16
    import tapct_fast.model.cpu_attention  # noqa: F401 - offers its kernels

    rows = []
    for name, chosen in (
        ("attention", choose_backend(device_type, dtype, 64, True)),
        ("attention, bf16 inference", choose_backend(device_type, torch.bfloat16, 64, False)),
        ("attention, mixed lengths", choose_varlen_backend(device_type, dtype, 64, False)),
    ):
        reasons = "; ".join(f"{other}: {reason}" for other, reason in chosen.passed_over)
        rows.append(Finding(name, f"{chosen}{f' (passed over {reasons})' if reasons else ''}"))
    return rows


def _optional() -> list[Finding]:
    rows = []
    for module, distribution, purpose, remedy in _OPTIONAL:
        if find_spec(module):
            rows.append(Finding(module, f"{_version(distribution) or 'present'} ({purpose})"))
        else:
            rows.append(Finding(module, f"missing ({purpose})", remedy))
    return rows


def _system() -> list[Finding]:
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    state = "present" if browser else "missing"
    return [
        Finding(
            "chromium", f"{state} (tests of the report page)", "" if browser else "Debian: chromium"
        )
    ]


def render(findings: list[Finding]) -> str:
    """Lay the findings out as two columns, remedies below what they mend."""
    width = max(len(f.name) for f in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.name:<{width}}  {finding.state}")
        if finding.remedy:
            lines.append(f"{'':<{width}}    -> {finding.remedy}")
    return "\n".join(lines)
