"""Distillation: a frozen larger run gives the targets of a smaller one.

The guide takes the teacher's place in ``DinoMethod.targets`` with its backbone and its heads; the
student's own EMA goes on beside it and is what gets exported.
Source: DINOv2, arXiv:2304.07193 section 5: same loop, frozen larger teacher, an EMA of the student
as the result, neither masks in the student's input nor drop path.
"""

from pathlib import Path
from typing import NamedTuple

from tapct_fast.backbone.export import read_checkpoint
from tapct_fast.config import Config
from tapct_fast.errors import ConfigError
from tapct_fast.ssl.method import Networks


class Guide(NamedTuple):
    """A frozen teacher of another run."""

    networks: Networks
    sha256: str  # of its weights' file


def load_guide(run: Path, config: Config) -> Guide:
    """Load the teacher of a run as the guide of another one, on the host, without gradients.

    Args:
        run: A run's folder, or one of its checkpoints.
        config: The run to be guided. Its heads may be of another shape, but its targets are the
            guide's: as many prototypes, and patches that show the same voxels.

    Raises:
        InputError: There is no checkpoint.
        CheckpointError: It is damaged.
        ConfigError: The guide's targets do not fit the run; names the setting.
    """
    saved = read_checkpoint(run, "teacher")
    check_guide(saved.config, config)
    networks = Networks(saved.config.vit, saved.config.heads, saved.config.hu)
    named = {name: t for name, t in saved.tensors.items() if "_center." not in name}
    networks.load_state_dict(named)
    return Guide(networks.requires_grad_(False).eval(), saved.sha256)


def check_guide(guide: Config, config: Config) -> None:
    """Require that targets of a run with config ``guide`` fit a run with ``config``.

    Raises:
        ConfigError: They do not; names the setting.
    """
    for kind in ("dino", "ibot"):
        theirs, ours = (
            (getattr(heads, kind) or heads.dino).num_prototypes
            for heads in (guide.heads, config.heads)
        )
        if theirs != ours:
            setting = f"heads.{kind if getattr(config.heads, kind) else 'dino'}.num_prototypes"
            raise ConfigError(
                f"the guide has {theirs} prototypes, {setting}={ours}; give --{setting} {theirs}"
            )
    if guide.vit.patch_zyx != config.vit.patch_zyx:
        patch = ",".join(map(str, guide.vit.patch_zyx))
        raise ConfigError(
            f"the guide cuts patches of {guide.vit.patch_zyx} voxels, vit.patch_zyx="
            f"{config.vit.patch_zyx}; give --vit.patch_zyx {patch}"
        )
    if guide.hu != config.hu:
        raise ConfigError(f"the guide was trained with {guide.hu}, this run has {config.hu}")
