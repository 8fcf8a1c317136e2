import hashlib
import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tapct_fast.backbone.load import load_backbone
from tapct_fast.errors import BackboneError, InputError

State = dict[str, Tensor]
Released = Callable[..., State]


def dinov2_float64(state: State, x_BCZYX: Tensor, grid_zyx: tuple[int, int, int]) -> State:
    """The DINOv2 forward pass in float64, by names, with explicit attention; heads are 64 wide."""
    chunk = re.compile(r"blocks\.\d+\.(\d+)\.")
    w = {
        chunk.sub(r"blocks.\1.", name.removeprefix("model.")): tensor.double()
        for name, tensor in state.items()
    }
    dim = w["cls_token"].shape[-1]
    patch = w["patch_embed.proj.weight"].shape[2:]
    x = F.conv3d(
        x_BCZYX.double(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch
    )
    assert tuple(x.shape[2:]) == grid_zyx
    x = x.flatten(2).mT
    x = torch.cat([w["cls_token"].expand(len(x), 1, dim), x], 1) + w["pos_embed"]
    registers = w.get("register_tokens", torch.zeros(1, 0, dim).double())
    x = torch.cat([x[:, :1], registers.expand(len(x), -1, dim), x[:, 1:]], 1)

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        return x * w[name + ".weight"] + w[name + ".bias"]

    depth = 1 + max(int(n.split(".")[1]) for n in w if n.startswith("blocks."))
    for i in range(depth):
        b = f"blocks.{i}."
        q, k, v = linear(b + "attn.qkv", norm(b + "norm1", x)).chunk(3, -1)
        heads = [
            torch.softmax(qh @ kh.mT / 8.0, -1) @ vh
            for qh, kh, vh in zip(q.split(64, -1), k.split(64, -1), v.split(64, -1), strict=True)
        ]
        x = x + linear(b + "attn.proj", torch.cat(heads, -1)) * w.get(b + "ls1.gamma", 1.0)
        y = norm(b + "norm2", x)
        if b + "mlp.w12.weight" in w:
            gate, value = linear(b + "mlp.w12", y).chunk(2, -1)
            y = linear(b + "mlp.w3", gate * torch.sigmoid(gate) * value)
        else:
            y = linear(b + "mlp.fc1", y)
            y = linear(b + "mlp.fc2", y * 0.5 * (1 + torch.erf(y / 2**0.5)))
        x = x + y * w.get(b + "ls2.gamma", 1.0)
    x = norm("norm", x)
    first = 1 + registers.shape[1]
    return {"cls": x[:, 0], "registers": x[:, 1:first], "patches": x[:, first:]}


def write(folder: Path, state: State, name: str = "model.safetensors") -> Path:
    path = folder / name
    save_file(state, path)
    return path


FORMS = {
    "released": {},
    "bare names": {"prefix": ""},
    "chunked": {"num_chunks": 2},
    "chunked bare swiglu": {"num_chunks": 2, "prefix": "", "swiglu": True},
    "no registers": {"registers": 0},
    "no layer scale": {"layer_scale": False},
    "no mask token": {"mask_token": False},
    "two heads": {"dim": 128, "depth": 2},
    "one patch in depth": {"patch": (1, 8, 8), "positions": 9 * 9},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_a_lone_file_computes_what_dinov2_computes(
    tmp_path: Path, released: Released, form: dict[str, object]
) -> None:
    state = released(**form)
    backbone = load_backbone(write(tmp_path, state), precision="fp32")
    x_BCZYX = torch.randn(2, 1, *backbone.vit.config.image_zyx)
    with torch.no_grad():
        out = backbone(x_BCZYX)
    expected = dinov2_float64(state, x_BCZYX, backbone.vit.config.grid_zyx)
    close = {"rtol": 1e-3, "atol": 1e-4}  # float32 sums of 256 products, four blocks
    torch.testing.assert_close(out.pooler_output.double(), expected["cls"], **close)
    torch.testing.assert_close(out.last_hidden_state.double(), expected["patches"], **close)
    torch.testing.assert_close(out.registers.double(), expected["registers"], **close)


def test_prefix_and_chunks_change_no_bit(tmp_path: Path, released: Released) -> None:
    x_BCZYX = torch.randn(1, 1, 8, 64, 64)
    outputs = []
    for number, form in enumerate(({}, {"prefix": ""}, {"num_chunks": 4})):
        path = write(tmp_path, released(**form), f"{number}.safetensors")
        with torch.no_grad():
            outputs.append(load_backbone(path, precision="fp32")(x_BCZYX).last_hidden_state)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_the_released_size_is_recognised(tmp_path: Path, released: Released) -> None:
    state = released(dim=128, depth=1, positions=2352)
    config = load_backbone(write(tmp_path, state)).vit.config
    assert config.image_zyx == (12, 224, 224)
    assert config.grid_zyx == (3, 28, 28)
    assert config.num_heads == 2
    assert config.num_registers == 4


@pytest.mark.parametrize("hidden", [40, 256, 300, 8])
@pytest.mark.parametrize("swiglu", [False, True])
def test_any_feed_forward_width_is_read_off(
    tmp_path: Path, released: Released, hidden: int, swiglu: bool
) -> None:
    state = released(depth=1, swiglu=swiglu)
    hidden = (hidden + 7) // 8 * 8 if swiglu else hidden  # our SwiGLU rounds to 8
    names = ("mlp.w12", "mlp.w3") if swiglu else ("mlp.fc1", "mlp.fc2")
    up, down = (f"model.blocks.0.{name}.weight" for name in names)
    rows = 2 * hidden if swiglu else hidden
    state[up], state[down] = torch.ones(rows, 64), torch.ones(64, hidden)
    state[up.replace("weight", "bias")] = torch.ones(rows)
    assert load_backbone(write(tmp_path, state)).vit.config.mlp_dim == hidden


def test_half_precision_weights_are_widened(tmp_path: Path, released: Released) -> None:
    state = {name: tensor.bfloat16() for name, tensor in released().items()}
    backbone = load_backbone(write(tmp_path, state), precision="fp32")
    assert torch.equal(backbone.vit.norm.weight, state["model.norm.weight"].float())


Q = "model.blocks.1.attn.qkv.weight"
DAMAGE: dict[str, tuple[Callable[[State], object], list[str]]] = {
    "missing": (lambda s: s.pop(Q), ["blocks.1.attn.qkv.weight", "missing", "(192, 64)"]),
    "missing block": (
        lambda s: [s.pop(k) for k in list(s) if ".blocks.1." in k],
        ["blocks.1.norm1.weight", "missing", "(64,)"],
    ),
    "missing cls": (lambda s: s.pop("model.cls_token"), ["cls_token", "missing", "(1, 1, D)"]),
    "missing pos": (lambda s: s.pop("model.pos_embed"), ["pos_embed", "missing"]),
    "missing gamma": (
        lambda s: s.pop("model.blocks.3.ls2.gamma"),
        ["blocks.3.ls2.gamma", "missing", "(64,)"],
    ),
    "extra": (
        lambda s: s.update({"model.head.weight": torch.ones(3, 64)}),
        ["head.weight", "extra", "(3, 64)", "no such key"],
    ),
    "shape": (
        lambda s: s.update({Q: torch.ones(191, 64)}),
        ["blocks.1.attn.qkv.weight", "(191, 64)", "(192, 64)"],
    ),
    "cls shape": (
        lambda s: s.update({"model.cls_token": torch.ones(1, 1, 63)}),
        ["cls_token", "(1, 1, 63)", "(1, 1, 64)"],
    ),
    "2D patches": (
        lambda s: s.update({"model.patch_embed.proj.weight": torch.ones(64, 1, 8, 8)}),
        ["patch_embed.proj.weight", "(64, 1, 8, 8)", "(D, 1, Z, Y, X)"],
    ),
    "three channels": (
        lambda s: s.update({"model.patch_embed.proj.weight": torch.ones(64, 3, 4, 8, 8)}),
        ["patch_embed.proj.weight", "(64, 3, 4, 8, 8)", "one input channel"],
    ),
    "fc2 shape": (
        lambda s: s.update({"model.blocks.2.mlp.fc2.weight": torch.ones(64, 255)}),
        ["blocks.2.mlp.fc2.weight", "(64, 255)", "(64, 256)"],
    ),
    "nan": (
        lambda s: s.update({"model.norm.bias": torch.full((64,), torch.nan)}),
        ["norm.bias", "NaN"],
    ),
    "integers": (
        lambda s: s.update({"model.norm.bias": torch.ones(64, dtype=torch.int32)}),
        ["norm.bias", "int32"],
    ),
    "mixed prefix": (
        lambda s: s.update({"norm.bias": s.pop("model.norm.bias")}),
        ["norm.bias", "prefix"],
    ),
    "doubled": (
        lambda s: s.update({"model.blocks.0.0.norm1.weight": torch.ones(64)}),
        ["blocks.0.norm1.weight", "second"],
    ),
    "ambiguous grid": (
        lambda s: s.update({"model.pos_embed": torch.ones(1, 257, 64)}),
        ["pos_embed", "256", "config.json"],
    ),
    "no positions": (
        lambda s: s.update({"model.pos_embed": torch.ones(1, 0, 64)}),
        ["pos_embed", "config.json"],
    ),
    "odd width": (
        lambda s: s.update({k: v[..., :48] for k, v in s.items()}),
        ["dim=48", "head_dim=64"],
    ),
    "training checkpoint": (
        lambda s: [s.update({"backbone." + k[6:]: s.pop(k)}) for k in list(s)],
        ["tapct-fast export"],
    ),
    "empty": (lambda s: s.clear(), ["missing"]),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_state_is_one_line_that_names_the_key(
    tmp_path: Path,
    released: Released,
    damage: Callable[[State], object],
    words: list[str],
) -> None:
    state = released()
    damage(state)
    path = write(tmp_path, {name: tensor.contiguous() for name, tensor in state.items()})
    with pytest.raises(BackboneError) as error:
        load_backbone(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(tmp_path) not in message
    assert not [word for word in words if word not in message], message


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_an_error(tmp_path: Path, released: Released, keep: float) -> None:
    path = write(tmp_path, released())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(BackboneError, match="damaged"):
        load_backbone(path)


class Trap:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_a_pickle_is_never_opened(tmp_path: Path, name: str) -> None:
    fired = tmp_path / "fired"
    torch.save({"cls_token": Trap(fired)}, tmp_path / name)
    with pytest.raises(BackboneError):
        load_backbone(tmp_path / name)
    assert not fired.exists()


def test_a_folder_with_a_pickle_only_says_what_it_lacks(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"holds no model\.safetensors"):
        load_backbone(tmp_path)


def test_a_run_folder_points_to_export(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="tapct-fast export"):
        load_backbone(tmp_path)


def test_a_device_that_is_not_there_is_an_error(tmp_path: Path, released: Released) -> None:
    path = write(tmp_path, released())
    with pytest.raises(InputError, match="device"):
        load_backbone(path, device="warp")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no GPU"):
            load_backbone(path, device="cuda")


def test_a_hub_id_without_the_hub_library_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"pip install 'tapct-fast\[hf\]'"):
        load_backbone("owner/no-such-backbone")


def test_a_hub_id_fetches_weights_and_json_and_no_code(
    tmp_path: Path, released: Released, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, released())
    asked: dict[str, object] = {}

    def snapshot_download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(repo=repo, revision=revision, names=allow_patterns)
        return str(tmp_path)

    # Stands for the network, which tests do not have; what is loaded from the snapshot is real.
    hub, errors = types.ModuleType("huggingface_hub"), types.ModuleType("huggingface_hub.errors")
    vars(hub).update(snapshot_download=snapshot_download, errors=errors)
    vars(errors).update(HfHubHTTPError=type("HfHubHTTPError", (OSError,), {}))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    assert load_backbone("owner/name", revision="v1").vit.config.dim == 64
    names = ["model.safetensors", "config.json", "preprocessor.json", "README.md"]
    assert asked == {"repo": "owner/name", "revision": "v1", "names": names}


FOREIGN = {"architectures": ["TAPCTModel"], "auto_map": {"AutoModel": "modeling_tapct.TAPCTModel"}}


def test_a_released_config_settles_an_ambiguous_grid(tmp_path: Path, released: Released) -> None:
    write(tmp_path, released(positions=256))
    config = FOREIGN | {"img_size": [16, 64, 64], "hidden_size": 64, "unknown": {"a": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_backbone(tmp_path).vit.config.grid_zyx == (4, 8, 8)


@pytest.mark.parametrize(
    "stated", [{"embed_dim": 65}, {"depth": 12}, {"num_heads": 2}, {"img_size": [8, 64, 32]}]
)
def test_a_released_config_must_agree_with_the_tensors(
    tmp_path: Path, released: Released, stated: dict[str, object]
) -> None:
    write(tmp_path, released())
    (tmp_path / "config.json").write_text(json.dumps(FOREIGN | stated))
    with pytest.raises(BackboneError, match=r"config\.json states"):
        load_backbone(tmp_path)


def test_weights_that_are_not_those_stated_are_refused(tmp_path: Path, released: Released) -> None:
    from tapct_fast.backbone.export import save_backbone

    backbone = load_backbone(write(tmp_path, released()), precision="fp32")
    folder = save_backbone(backbone, tmp_path / "saved")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert json.loads((folder / "config.json").read_text())["weights_sha256"] == digest
    load_backbone(folder, sha256=digest.upper())
    with pytest.raises(BackboneError, match=r"not the one given.*copy it again"):
        load_backbone(folder, sha256="0" * 64)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-9] ^= 1  # a bit of a weight: nothing else can tell
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(BackboneError, match=r"not that in config\.json"):
        load_backbone(folder)
