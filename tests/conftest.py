"""One thread, the Triton interpreter where there is no GPU, real CT where it is present."""

import locale
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from browser import Browser

# Before any kernel is imported: without a device the kernels run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)  # the thread count changes the bits of a sum

# Started with `&` by a script, the suite and all that it starts would ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or os.environ.get("TAPCT_REQUIRE_GPU") == "1":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device; not measured here"))


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    torch.manual_seed(0)
    before = locale.setlocale(locale.LC_ALL)
    yield
    # GDCM's DICOM writer leaves the C locale, in which torch.compile cannot read its own templates.
    locale.setlocale(locale.LC_ALL, before)


@pytest.fixture(scope="session")
def real_ct() -> Path:
    """Folder of real CT; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("TAPCT_TEST_DATA", REPOSITORY / ".." / "shared" / "data" / "ct"))
    if not (folder / "nifti").is_dir():
        pytest.skip("no real CT: set TAPCT_TEST_DATA to a folder with nifti/ and dicom/")
    return folder


@pytest.fixture(scope="session")
def fp8_on_cpu() -> None:
    """Emulated float8 products; tests that need them skip where PyTorch has none."""
    one = torch.ones(16, 16).to(torch.float8_e4m3fn)
    scale = torch.ones(16, 1)
    try:
        torch._scaled_mm(one, one.t(), scale, scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip(
            f"torch {torch.__version__} takes no scales of rows on the CPU; not tested here"
        )


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None or not shutil.which("bash"):
        pytest.skip("no chromium: the page was not opened in a browser")
    opened = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.end()


@pytest.fixture
def browser(chromium: Browser) -> Browser:
    """An empty page; one program serves all tests."""
    chromium.forget()
    return chromium
