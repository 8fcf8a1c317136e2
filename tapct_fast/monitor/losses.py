"""The cross-entropies of a run, scaled so that a student that knows nothing has ln P."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from tapct_fast.config import Config
from tapct_fast.monitor.record import Row
from tapct_fast.report import Curve
from tapct_fast.train.loop import uniform_loss

_TERMS = {"dino_global", "dino_local", "ibot"}


class HeadLoss(NamedTuple):
    """One head's loss per step; ``uniform`` = ln P for a student whose logits are all equal."""

    title: str
    step_N: Sequence[int]
    value_N: Sequence[float]
    num_prototypes: int

    @property
    def uniform(self) -> float:
        """The loss of a student that knows nothing, ln P."""
        return math.log(self.num_prototypes)

    def curve(self) -> Curve:
        """Return it to be drawn beside ln P."""
        text = f"uniform: ln {self.num_prototypes} = {self.uniform:.2f}"
        return Curve(self.title, self.step_N, self.value_N, self.uniform, text)


def head_losses(config: Config, rows: Sequence[Row]) -> list[HeadLoss]:
    """Return the DINO loss and, where tokens are masked, the iBOT loss per masked token."""
    rows = [row for row in rows if row.keys() >= _TERMS]
    step_N = [int(row["step"]) for row in rows]
    dino_N = [row["dino_global"] + row["dino_local"] for row in rows]
    num_prototypes = config.heads.dino.num_prototypes
    losses = [HeadLoss("DINO loss", step_N, dino_N, num_prototypes)]
    share = masked_share(config)
    if share and config.losses.ibot_weight:
        num_prototypes = (config.heads.ibot or config.heads.dino).num_prototypes
        ibot_N = [row["ibot"] / share for row in rows]
        losses.append(HeadLoss("iBOT loss", step_N, ibot_N, num_prototypes))
    return losses


def masked_share(config: Config) -> float:
    """Return the share of the global views that are masked: a row's iBOT loss counts all views."""
    alone = dataclasses.replace(config.losses, dino_weight=0.0, ibot_weight=1.0)
    level = uniform_loss(dataclasses.replace(config, losses=alone))
    return level / math.log((config.heads.ibot or config.heads.dino).num_prototypes)
