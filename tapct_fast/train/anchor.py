"""The Gram anchor of a run, where its config asks for one."""

from tapct_fast.config import Config
from tapct_fast.ssl.gram import Anchor


def make_anchor(config: Config) -> Anchor | None:
    """Return the anchor of a run, without weights: ``Anchor.refresh`` or a checkpoint fills it."""
    return None if config.gram is None else Anchor(config.gram, config.vit, config.hu)
