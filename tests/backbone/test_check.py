"""The check of a backbone: its definition, its table, and that it finds what is wrong."""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tapct_fast import __version__, cli
from tapct_fast.backbone import check
from tapct_fast.backbone.backbone import Backbone
from tapct_fast.backbone.check import (
    CheckReport,
    ParityRow,
    check_backbone,
    define_tokens,
    fixed_input,
    parity,
    render,
)
from tapct_fast.backbone.describe import stated_license
from tapct_fast.backbone.load import default_preprocess, find_files
from tapct_fast.config import VitConfig
from tapct_fast.errors import BackboneError, InputError
from tapct_fast.model.vit import Vit
from tapct_kernels import attention_ref, choose_backend
from tapct_kernels.attention import _dense_refusal, _provided, provide

CANARY = "DOE_JANE_19700101"  # stands for a patient's name in a path
CONFIG = VitConfig(dim=64, depth=2, image_zyx=(8, 64, 64), layer_scale=0.5)


def drawn_vit(config: VitConfig) -> Vit:
    """A Vit none of whose parameters is constant: ``init_weights`` leaves biases at zero."""
    vit = Vit(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in vit.named_parameters():
            weight.normal_(0.0, 0.1, generator=generator)
            if "norm" in name and name.endswith("weight"):
                weight.add_(1.0)
    return vit


@pytest.fixture
def backbone() -> Backbone:
    return Backbone(drawn_vit(CONFIG), default_preprocess(CONFIG)).eval()


@pytest.fixture
def folder(backbone: Backbone, tmp_path: Path) -> Path:
    path = tmp_path / CANARY
    backbone.save_pretrained(path)
    return path


@pytest.fixture
def amx_restored() -> Iterator[None]:
    """Take back what a test offers as ``amx``."""
    before = dict(_provided)
    yield
    _provided.clear()
    _provided.update(before)
    choose_backend.cache_clear()
    _dense_refusal.cache_clear()


def row_of(rows: list[ParityRow], precision: str, attention: str) -> ParityRow:
    (row,) = (row for row in rows if (row.precision, row.attention) == (precision, attention))
    return row


FORMS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "swiglu": {"ffn": "swiglu"},
    "no registers, no layer scale": {"num_registers": 0, "layer_scale": None},
    "two heads of 32": {"head_dim": 32},
    "another patch": {"patch_zyx": (2, 16, 8)},
}


@pytest.mark.parametrize("size_zyx", [(8, 64, 64), (12, 32, 48)], ids=["own grid", "another grid"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_definition_in_float64_is_the_vit(
    form: dict[str, Any], size_zyx: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "_MAX_SCORES", 1000)  # a few rows of the softmax at a time
    config = dataclasses.replace(CONFIG, **form)
    vit = drawn_vit(config).double()
    x_BCZYX = torch.randn(2, 1, *size_zyx, dtype=torch.float64)
    with torch.no_grad():
        out = vit(x_BCZYX)
        found_BTD = define_tokens(vit.state_dict(), config, x_BCZYX, torch.float64)
    expected_BTD = torch.cat([out.cls_BD[:, None], out.registers_BRD, out.patches_BLD], dim=1)
    torch.testing.assert_close(found_BTD, expected_BTD, rtol=1e-10, atol=1e-10)


def test_a_sound_backbone_holds_every_bound(backbone: Backbone) -> None:
    rows, not_run = parity(backbone, fixed_input(backbone))
    names = {(row.precision, row.attention) for row in rows}
    expected = {(p, a) for p in ("fp32", "bf16", "fp16") for a in ("sdpa flash", "sdpa math")}
    assert expected <= names
    assert {row.verdict for row in rows} == {"holds"}
    assert sum(row.is_default for row in rows) == 1
    for row in rows:
        assert row.relative_error is not None
        assert row.min_cosine is not None
        # Between equal and what the number of bits allows: something was computed and compared.
        assert 0 < row.relative_error < {"fp32": 1e-5, "bf16": 0.02, "fp16": 0.002}[row.precision]
        assert row.min_cosine >= (0.999999 if row.precision == "fp32" else 0.9995)
        assert row.forward_ms is not None
    assert (
        any(line.startswith("amx (fp32, fp16): ") for line in not_run)
        or ("bf16", "amx") not in names
    )


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the golden text is that of the CPU")
def test_head_of_the_table_says_what_was_checked(
    folder: Path, backbone: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\ntags: [ct]\n---\n# A model\n")
    assert cli.main(["check", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    device = lines.pop(10)
    assert device.startswith("- device: ")
    assert device.endswith(f", {torch.get_num_threads()} threads")
    assert lines[:12] == [
        "- architecture: 2 blocks, width 64, 1 heads of 64, mlp of 256, 4 registers, LayerScale, "
        "patch 4x8x8, positions 2x8x8",
        "- architecture from: config.json",
        f"- parameters: {sum(p.numel() for p in backbone.vit.parameters()):,}",
        "- tensors: 36 (F32), optional ones absent: none",
        f"- weights file: sha256 {sha256((folder / 'model.safetensors').read_bytes())} "
        "(as config.json states)",
        f"- backbone in fp32: sha256 {backbone.fingerprint()}",
        "- preprocessing: plane 64x64, padded to multiples of 4x8x8 with -1024 HU, "
        "clip -1008..822, mean -86.8086, std 322.635",
        "- preprocessing from: preprocessor.json",
        "- licence of the weights: cc-by-nc-4.0 (README.md)",
        f"- versions: tapct-fast {__version__}, torch {torch.__version__}, "
        f"python {platform.python_version()}",
        "- input: synthetic phantom, seed 0, 8x64x64 voxels, 133 tokens",
        "",
    ]
    words = [word.strip() for word in lines[12].strip("|").split("|")]
    assert words == [
        *("precision", "attention", "relative error", "min cosine", "mean cosine"),
        *("ms", "extra MiB", "verdict"),
    ]
    assert lines[-1] == "- result: every bound holds"


def test_json_holds_what_the_table_says_and_no_path(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "check.json"
    assert cli.main(["check", str(folder), "--slices", "5", "--json", str(path)]) == 0
    captured = capsys.readouterr()
    raw = json.loads(path.read_text())
    assert (raw["format"], raw["version"], raw["holds"]) == ("tapct-check", 1, True)
    rows = tuple(ParityRow(**row) for row in raw["rows"])
    report = CheckReport(raw["facts"], rows, tuple(raw["not_run"]))
    assert captured.out == render(report) + "\n"
    assert "8x64x64 voxels" in captured.out  # five slices, padded to whole patches
    assert CANARY not in captured.out + captured.err + path.read_text()


def test_what_the_file_lacks_is_said(tmp_path: Path, folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    kept = {
        name: tensor.half()
        for name, tensor in state.items()
        if not name.endswith(("mask_token", ".gamma"))
    }
    save_file(kept, tmp_path / "lone.safetensors")
    report = check_backbone(tmp_path / "lone.safetensors")
    assert report.holds
    absent = "31 (F16), optional ones absent: mask_token, ls1.gamma, ls2.gamma"
    assert report.facts["tensors"] == absent
    assert report.facts["weights file"].endswith(" (stated nowhere)")
    assert "no LayerScale" in report.facts["architecture"]
    assert report.facts["architecture from"] == "the tensors"
    assert report.facts["preprocessing from"] == "the released default"
    assert report.facts["licence of the weights"] == "not stated: ask the publisher"


@pytest.mark.usefixtures("amx_restored")
def test_a_backend_that_is_wrong_beyond_its_trial_fails_by_name(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def forgets_the_last_keys(qkv_NT3HK: Tensor) -> Tensor:
        if qkv_NT3HK.shape[1] <= 64:  # as in the trial
            return attention_ref(qkv_NT3HK)
        return _without_tail(qkv_NT3HK)

    provide("amx", forgets_the_last_keys, "broken 1.0")
    assert cli.main(["check", str(folder)]) == 65
    out = capsys.readouterr().out
    (row,) = (line for line in out.splitlines() if line.startswith("| bf16") and "amx" in line)
    assert "FAILS: a token's cosine below 0.9995" in row
    assert "amx (broken 1.0)" in out
    assert out.splitlines()[-1].startswith("- result: FAILS: bf16 amx; choose a row that holds")


def _without_tail(qkv_NT3HK: Tensor) -> Tensor:
    """Return attention that sees the first 64 keys only, as a kernel with a wrong bound would."""
    query_NTHK, key_NTHK, value_NTHK = qkv_NT3HK.float().unbind(2)
    score_NHTS = torch.einsum("nthk,nshk->nhts", query_NTHK, key_NTHK[:, :64]) / 8
    out_NTHK = torch.einsum("nhts,nshk->nthk", score_NHTS.softmax(-1), value_NTHK[:, :64])
    return out_NTHK.to(qkv_NT3HK.dtype)


@pytest.mark.usefixtures("amx_restored")
def test_one_wrong_token_is_enough(backbone: Backbone) -> None:
    def spoils_the_last_token(qkv_NT3HK: Tensor) -> Tensor:
        out_NTHK = attention_ref(qkv_NT3HK)
        if qkv_NT3HK.shape[1] > 64:
            out_NTHK[:, -1] *= -10
        return out_NTHK

    provide("amx", spoils_the_last_token, "broken 1.0")
    row = row_of(parity(backbone, fixed_input(backbone))[0], "bf16", "amx")
    assert row.mean_cosine is not None
    assert row.mean_cosine > 0.9995
    assert row.verdict == "FAILS: a token's cosine below 0.9995"


@pytest.mark.usefixtures("amx_restored")
def test_a_backend_that_raises_fails_without_a_path(backbone: Backbone) -> None:
    def takes_small_ones(qkv_NT3HK: Tensor) -> Tensor:
        if qkv_NT3HK.shape[1] > 64:
            raise RuntimeError(f"no kernel in /home/{CANARY}/kernels.so for this size\nmore")
        return attention_ref(qkv_NT3HK)

    provide("amx", takes_small_ones, "broken 1.0")
    row = row_of(parity(backbone, fixed_input(backbone))[0], "bf16", "amx")
    assert row.verdict == "FAILS: RuntimeError: no kernel in ... for this size"


@pytest.mark.usefixtures("amx_restored")
def test_a_backend_that_fails_its_trial_is_not_run(backbone: Backbone) -> None:
    provide("amx", lambda qkv_NT3HK: 1.1 * attention_ref(qkv_NT3HK), "broken 1.0")
    rows, not_run = parity(backbone, fixed_input(backbone))
    assert "amx" not in {row.attention for row in rows}
    assert any(line.startswith("amx (bf16): wrong result: relative error 0.1") for line in not_run)


def test_a_nan_in_the_file_is_an_error_that_names_its_tensor(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_file(folder / "model.safetensors")
    state["model.blocks.1.mlp.fc1.weight"][3, 5] = torch.nan
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").unlink()  # states the hash of the file that was there
    assert cli.main(["check", str(folder)]) == BackboneError.exit_code
    captured = capsys.readouterr()
    assert "blocks.1.mlp.fc1.weight: holds NaN or infinite values" in captured.err
    assert not captured.out


def test_a_nan_in_memory_fails_every_row(backbone: Backbone) -> None:
    pixels_BCZYX = fixed_input(backbone)
    with torch.no_grad():
        backbone.vit.get_parameter("blocks.1.mlp.fc1.weight")[3, 5] = torch.nan
    rows, _ = parity(backbone, pixels_BCZYX)
    assert {row.verdict for row in rows} == {
        "FAILS: features are not finite: a weight is NaN or infinite"
    }
    report = CheckReport({}, tuple(rows), ())
    assert not report.holds
    assert report.failures == [f"{row.precision} {row.attention}" for row in rows]


def test_float16_that_overflows_fails_with_the_block_and_the_way_out(backbone: Backbone) -> None:
    with torch.no_grad():
        backbone.vit.get_parameter("blocks.1.mlp.fc1.bias").add_(3e4)
        backbone.vit.get_parameter("blocks.1.mlp.fc2.weight").mul_(100)
    rows, _ = parity(backbone, fixed_input(backbone))
    row = row_of(rows, "fp16", "sdpa flash")
    assert row.verdict.startswith("FAILS: features are not finite: block 1 overflowed in float16")
    assert row.verdict.endswith("load the backbone with precision='bf16'")
    assert row.relative_error is None
    assert row_of(rows, "fp32", "sdpa flash").verdict == "holds"


def test_quadratic_memory_is_not_taken(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_MAX_MATH_BYTES", 1000)
    rows, _ = parity(backbone, fixed_input(backbone))
    assert row_of(rows, "fp32", "sdpa math").verdict.startswith("not measured: its scores take")
    assert row_of(rows, "fp32", "sdpa flash").verdict == "holds"
    assert CheckReport({}, tuple(rows), ()).holds


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\n", "apache-2.0 (README.md)"),
        ("---\r\nlicense: 'mit'\r\n---\r\n", "mit (README.md)"),
        ("---\nlicense: \x1b[31mred|`\n---\n", "?[31mred?? (README.md)"),
        ("---\nlicense:\n---\n", None),
        ("# no front matter\nlicense: mit\n", None),
        ("---\ntags: x\n---\nlicense: mit\n", None),
        ("", None),
    ],
)
def test_licence_is_what_the_model_card_states(
    card: str, expected: str | None, folder: Path
) -> None:
    (folder / "README.md").write_bytes(card.encode())
    assert stated_license(find_files(folder)) == expected


def test_licence_of_a_foreign_config_counts(
    tmp_path: Path, released: Callable[..., dict[str, Tensor]]
) -> None:
    save_file(released(), tmp_path / "model.safetensors")
    config = {"architectures": ["TAPCTModel"], "license": "cc-by-4.0"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stated_license(find_files(tmp_path)) == "cc-by-4.0 (config.json)"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--slices", "0"], "--slices 0 is not positive"),
        (["--slices", "1000000"], "give a smaller --slices"),
        (["--device", "abacus"], "give cpu, cuda or cuda:0"),
        (["--json", f"/nowhere/{CANARY}.json"], "--json FILE lies in a folder that does not exist"),
    ],
)
def test_wrong_arguments_are_named(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", str(folder), *words]) == InputError.exit_code
    error = capsys.readouterr().err
    assert message in error
    assert CANARY not in error


def test_nothing_there_is_said_without_the_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", str(tmp_path / CANARY / "gone")]) == InputError.exit_code
    error = capsys.readouterr().err
    assert "neither a folder, a .safetensors file nor a hub id" in error
    assert CANARY not in error


@pytest.mark.gpu
def test_every_bound_holds_on_the_gpu(folder: Path) -> None:
    report = check_backbone(folder, device="cuda")
    assert report.holds, render(report)
    assert all(row.extra_mib for row in report.rows if row.verdict == "holds")
