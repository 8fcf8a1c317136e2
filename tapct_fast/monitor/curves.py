"""The numbers of a run over its steps, as curves of its page."""

import math
from collections.abc import Iterable, Sequence

from tapct_fast.config import Config
from tapct_fast.monitor.checks import DATA_WAIT, percent
from tapct_fast.monitor.losses import head_losses
from tapct_fast.monitor.record import Record, Row, column
from tapct_fast.report import Curve, Interval
from tapct_fast.ssl.health import MEANINGS

_SCHEDULES = (
    ("lr", "learning rate"),
    ("weight_decay", "weight decay"),
    ("momentum", "teacher momentum"),
    ("teacher_temp", "teacher temperature"),
)


def loss_curves(record: Record) -> list[Curve]:
    """Return the losses, those of heads beside ln P."""
    heads = [loss.curve() for loss in head_losses(record.config, record.rows)]
    return heads + _named(record.rows, [("koleo", "KoLeo")])


def health_curves(record: Record) -> list[Curve]:
    """Return what says whether targets and features are well."""
    config, rows = record.config, record.rows
    curves = []
    heads = {"dino": config.heads.dino, "ibot": config.heads.ibot or config.heads.dino}
    for name, meaning in MEANINGS.items():
        # The share is the same curve.
        if not rows or name not in rows[-1] or name.endswith("_share"):
            continue
        head = name.rpartition("_")[2]
        if name.startswith("teacher_entropy"):
            num = heads[head].num_prototypes
            level, text = math.log(num), f"uniform: ln {num} = {math.log(num):.2f}"
            curve = _curve(rows, name, name, level, text)
        else:
            curve = _curve(rows, name, name)
        curves.append(curve._replace(remark=meaning))
    return curves


def optimisation_curves(record: Record) -> list[Curve]:
    """Return gradient norms beside their clip, and the schedules."""
    return _norm_curves(record.config, record.rows) + _named(record.rows, _SCHEDULES)


def _norm_curves(config: Config, rows: Sequence[Row]) -> list[Curve]:
    if not rows:
        return []
    clip = config.optim.clip_norm
    return [
        _curve(rows, name, name.replace("_", " "), clip, f"clip: {clip:g}")
        for name in rows[-1]
        if name.startswith("grad_norm_")
    ]


def speed_curves(record: Record) -> list[Curve]:
    """Return the samples per second, and the share of time that waits for data."""
    rows = record.rows
    if not rows:
        return []
    return [
        _curve(rows, "samples_per_s", "samples per second"),
        _curve(
            rows,
            "data_wait",
            "share of the time that waits for data",
            DATA_WAIT,
            f"look at it: {percent(DATA_WAIT)}",
        ),
    ]


def probe_curves(record: Record) -> list[Curve]:
    """Return the scores of the probe with their intervals."""
    rows = scored(record.probes)
    if not rows:
        return []
    return [
        _curve(rows, kind, title)._replace(
            interval_N2=[dice_interval(row, kind)[1:] for row in rows]
        )
        for kind, title in (("linear", "Dice, linear head"), ("knn", "Dice, kNN"))
    ]


def scored(probes: Sequence[Row]) -> list[Row]:
    """Return the probes that have ended with a score."""
    return [row for row in probes if isinstance(row.get("linear"), int | float)]


def dice_interval(row: Row, kind: str) -> Interval:
    """Return a score of a probe with its ends; NaN where there is none."""
    mean, low, high = (row.get(name) for name in (kind, f"{kind}_low", f"{kind}_high"))
    if low is None or high is None:
        low = high = math.nan
    return Interval(math.nan if mean is None else mean, low, high)


def _named(rows: Sequence[Row], names: Iterable[tuple[str, str]]) -> list[Curve]:
    return [_curve(rows, name, title) for name, title in names if name in rows[-1]] if rows else []


def _curve(
    rows: Sequence[Row], name: str, title: str, level: float | None = None, level_text: str = ""
) -> Curve:
    step_N, value_N = column(rows, name)
    return Curve(title, step_N.tolist(), value_N.tolist(), level, level_text)
