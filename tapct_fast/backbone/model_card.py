"""The model card of an exported backbone: README.md with the header that the hub reads.

It says what the files beside it and the run's own records say, and nothing else: what is unknown
is called unknown. It holds no path and nothing of a patient. Its last line is the hash of what is
above it, so that a card that somebody went on writing is told from one that may be replaced.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors import safe_open

from tapct_fast import __version__
from tapct_fast.backbone.load import CARD_FILE, HUB_ID, WEIGHTS_FILE, load_backbone
from tapct_fast.backbone.measured import Measurement, read_measured
from tapct_fast.backbone.preprocess import Preprocess
from tapct_fast.backbone.schema import CONFIG_FILE, PREPROCESSOR_FILE, read_config, read_preprocess
from tapct_fast.config import Config, VitConfig
from tapct_fast.errors import InputError
from tapct_fast.io.atomic import sha256_file, write_atomic

UNKNOWN_LICENSE = "unknown"
_LICENSE = re.compile(r"[A-Za-z][A-Za-z0-9.+-]{1,79}")
_TAGS = ("ct", "dinov2", "3d", "medical")
_SEAL = "<!-- tapct-fast: sha256 of the lines above: {} -->\n"


class Training(NamedTuple):
    """What the run behind a backbone says about itself."""

    config: Config
    step: int  # that was exported
    which: Literal["teacher", "student"]
    weights_sha256: str  # of the checkpoint's file
    state: dict[str, Any]  # state.json of the checkpoint
    num_scans: int | None = None


class Statement(NamedTuple):
    """What only the person who exports can say.

    Attributes:
        license: Of the weights, as the hub abbreviates it: ``apache-2.0``, ``cc-by-nc-4.0``, or
            ``other``; None where it is not known.
        base_model: Hub id of the weights that the run started from.
        probe: ``probe.jsonl`` of the run, or ``probe.json`` of an evaluation of this backbone, for
            the numbers that were measured.
    """

    license: str | None = None
    base_model: str | None = None
    probe: Path | None = None


def check_statement(statement: Statement) -> None:
    """Refuse what the header cannot hold, before an export begins.

    Raises:
        InputError: The licence is no identifier, the base model no hub id, or there is no probe
            file.
    """
    if statement.license is not None and not _LICENSE.fullmatch(statement.license):
        raise InputError(
            "--license is no identifier; give the hub's abbreviation, such as apache-2.0 or other"
        )
    if statement.base_model is not None and not HUB_ID.fullmatch(statement.base_model):
        raise InputError("--base-model is no hub id owner/name")
    if statement.probe is not None and not statement.probe.is_file():
        raise InputError(
            "--probe is no file; name probe.jsonl of the run or probe.json of an evaluation"
        )


def write_model_card(folder: Path, training: Training, statement: Statement) -> Path:
    """Write ``README.md`` into an exported folder.

    Args:
        folder: With weights, config and preprocessor.
        training: Of the run.
        statement: See ``check_statement``.

    Raises:
        FormatError: The probe's file is damaged.
    """
    config = read_config(folder / CONFIG_FILE)
    assert isinstance(config, VitConfig)  # the folder is ours
    body = "\n".join(
        [
            _header(statement),
            f"# 3D vision transformer for CT, {config.depth} blocks of width {config.dim}",
            "",
            *_what(config, folder, training),
            *_use(),
            *_preprocessing(read_preprocess(folder / PREPROCESSOR_FILE), config),
            *_training(training, statement),
            *_scores(folder, training, statement),
            *_limits(statement),
            *_hashes(folder, training),
        ]
    )
    text = body + "\n"
    path = folder / CARD_FILE
    write_atomic(path, (text + _SEAL.format(_digest(text))).encode())
    return path


def is_untouched(card: Path) -> bool:
    """Say whether a card is as ``write_model_card`` wrote it."""
    text = card.read_bytes().decode(errors="replace")
    body, newline, seal = text.rstrip("\n").rpartition("\n")
    return seal + "\n" == _SEAL.format(_digest(body + newline))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _header(statement: Statement) -> str:
    lines = [
        "---",
        f"license: {statement.license or UNKNOWN_LICENSE}",
        "library_name: tapct-fast",
        "pipeline_tag: image-feature-extraction",
        *(("base_model: " + statement.base_model,) if statement.base_model else ()),
        "tags:",
        *(f"- {tag}" for tag in _TAGS),
        "---",
        "",
    ]
    return "\n".join(lines)


def _what(config: VitConfig, folder: Path, training: Training) -> list[str]:
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    num = sum(math.prod(shape) for shape in shapes)
    return [
        f"The {training.which} of a self-supervised run, to be used frozen: it turns a CT scan "
        "into one vector per patch and one per window. It has no head and names nothing in a scan.",
        "",
        *_table(
            ("", ""),
            [
                ("parameters", f"{num:,}"),
                (
                    "blocks",
                    f"{config.depth} of width {config.dim}, heads {config.num_heads} of "
                    f"{config.head_dim}, feed-forward {config.ffn} of {config.mlp_dim}",
                ),
                ("patch", f"{_sizes(config.patch_zyx)} voxels (z, y, x)"),
                ("trained on windows of", f"{_sizes(config.image_zyx)} voxels (z, y, x)"),
                ("register tokens", f"{config.num_registers}"),
            ],
        ),
    ]


def _use() -> list[str]:
    return [
        "## Use",
        "",
        "```python",
        "import tapct_fast",
        "",
        'backbone = tapct_fast.load_backbone("FOLDER")  # or owner/name of the hub',
        'features = tapct_fast.embed_volume(backbone, tapct_fast.read_volume("scan.nii.gz"))',
        "```",
        "",
        "Nothing in the folder is code, and nothing of it is executed.",
        "",
    ]


def _preprocessing(preprocess: Preprocess, config: VitConfig) -> list[str]:
    (low, high), multiple = preprocess.hu.clip, preprocess.plane_multiple
    antialias = ", antialiased" if preprocess.antialias else ""
    plane = (
        "none: the scan's own rows and columns"
        if preprocess.resize_yx is None
        else f"to {_sizes(preprocess.resize_yx)} pixels (y, x), bilinear{antialias}; slices stay"
    )
    return [
        "## Preprocessing",
        "",
        "In this order, as `preprocessor.json` says; `load_backbone` does it.",
        "",
        *_table(
            ("step", "value"),
            [
                (
                    "input",
                    "Hounsfield units; axes z, y, x with z to superior, y to posterior, x to the "
                    "patient's left",
                ),
                ("resize in plane", plane),
                (
                    "pad at the end",
                    f"with {preprocess.pad_hu:g} HU, to multiples of "
                    f"{_sizes((preprocess.depth_multiple, multiple, multiple))} voxels (z, y, x)",
                ),
                ("clip", f"{low:g} to {high:g} HU"),
                ("mean, standard deviation", f"{preprocess.hu.mean:g}, {preprocess.hu.std:g} HU"),
                ("windows", f"{config.image_zyx[0]} slices, slid along z"),
            ],
        ),
    ]


def _training(training: Training, statement: Statement) -> list[str]:
    config, state = training.config, training.state
    num = "not recorded" if training.num_scans is None else f"{training.num_scans:,}"
    ibot = config.heads.ibot or config.heads.dino
    rows = [
        ("scans", num),
        ("steps", f"{training.step:,} of {config.train.num_steps:,}"),
        ("batch", f"{config.train.batch_size:,} samples"),
        (
            "views of a sample",
            f"{config.views.global_views.num} of {_sizes(config.views.global_views.size_zyx)}, "
            f"{config.views.local_views.num} of {_sizes(config.views.local_views.size_zyx)} voxels",
        ),
        (
            "losses",
            f"DINO {config.losses.dino_weight:g} with {config.heads.dino.num_prototypes:,} "
            f"prototypes, iBOT {config.losses.ibot_weight:g} with {ibot.num_prototypes:,}, KoLeo "
            f"{config.losses.koleo_weight:g}; centering {config.losses.centering}",
        ),
        (
            "learning rate",
            f"base {config.schedule.base_lr:g}, warm-up {config.schedule.warmup_steps:,} steps",
        ),
        ("teacher momentum", " to ".join(f"{m:g}" for m in config.schedule.momentum)),
        ("seed", f"{config.train.seed}"),
    ]
    started, guided = (state.get(name) for name in ("start_sha256", "guide_sha256"))
    if started:
        name = statement.base_model or "name them as base_model before you share"
        rows.append(("started from", f"weights of sha256 `{_hex(started)}` ({name})"))
    if guided:
        rows.append(("targets from", f"a frozen teacher of sha256 `{_hex(guided)}`"))
    return [
        "## Training",
        "",
        "Self-supervised, without labels, on the scans of one store. What they are, and whose, is "
        "not recorded in the run: say it here, as far as you may.",
        "",
        *_table(("", ""), rows),
    ]


def _scores(folder: Path, training: Training, statement: Statement) -> list[str]:
    if statement.probe is None:
        return ["## Measured", "", "Nothing was measured of this backbone.", ""]
    measured = read_measured(
        statement.probe,
        step=training.step,
        which=training.which,
        fingerprint=lambda: load_backbone(folder).fingerprint(),
    )
    rows = [
        (
            score.name,
            f"{score.value:.{_digits(score)}f}",
            "none"
            if score.low is None
            else f"{score.low:.{_digits(score)}f} to {score.high:.{_digits(score)}f}",
        )
        for score in measured.scores
    ]
    return ["## Measured", "", measured.text, "", *_table(("score", "", "95 % interval"), rows)]


def _digits(score: Measurement) -> int:
    return 3 if abs(score.value) < 10 else 1  # a Dice, or millimetres


def _limits(statement: Statement) -> list[str]:
    lines = [
        "Not a medical device; not for diagnosis.",
        "Scanners, protocols, ages and regions of the body of the training scans are not recorded, "
        "and features of others may be of less use. Measure on scans of your own.",
        "Values must be Hounsfield units; a scan in other units gives features without meaning.",
        "Features can tell much of a scan and may tell scans of the training data from others: "
        "share them as you would share the scans.",
    ]
    if statement.license is None:
        lines.append("The licence of the weights is unknown: state it before you share them.")
    return ["## Limits", "", *(f"- {line}" for line in lines), ""]


def _hashes(folder: Path, training: Training) -> list[str]:
    environment = training.state.get("environment") or {}
    versions = ", ".join(
        f"{name} {_plain(str(environment[name]))}"
        for name in ("tapct_fast", "torch")
        if name in environment
    )
    rows = [
        (name, f"sha256 `{sha256_file(folder / name)}`")
        for name in (WEIGHTS_FILE, CONFIG_FILE, PREPROCESSOR_FILE)
    ]
    rows += [
        (f"{training.which} of the checkpoint", f"sha256 `{training.weights_sha256}`"),
        ("store", f"fingerprint `{_hex(training.state.get('store'))}`"),
        ("trained with", versions or "not recorded"),
        ("exported with", f"tapct_fast {__version__}"),
    ]
    return ["## Files", "", *_table(("", ""), rows)]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def _sizes(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))


def _hex(value: Any) -> str:
    """Return a hash of a file from outside as what it must be."""
    return value if isinstance(value, str) and re.fullmatch(r"[0-9a-z]{1,64}", value) else "unknown"


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]", "?", text)[:40]
