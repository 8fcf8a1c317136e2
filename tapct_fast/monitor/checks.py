"""The checks of a run: each reads its numbers and says what they mean, with cause and way out.

Thresholds are conventions of this project unless they name a source; docs/health.md has them in one
table. They were set so that the recipe ``debug`` is healthy and runs trained sick are not.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from tapct_fast.monitor.losses import HeadLoss, head_losses
from tapct_fast.monitor.record import Record, Row, column

Severity = Literal["ok", "warn", "bad"]

RECENT = 20  # rows that are judged, by their median
FEWEST = 5  # rows below which nothing is said

UNIFORM_MARGIN = 0.005  # of ln P
WORSE_MARGIN, FAR_WORSE_MARGIN = 0.02, 0.1  # of ln P
UNIFORM_ENTROPY = 0.985  # of ln P; DINO, arXiv:2104.14294 section 5.3: collapse is 0 or ln P
SHARP_ENTROPY = 0.05  # nats; e^0.05: 1.05 prototypes per row
FEW_PROTOTYPES, ONE_PROTOTYPE = 0.05, 0.01
LOW_RANK, NO_RANK = 2.0, 1.2
SMALL_DISTANCE, NO_DISTANCE = 0.1, 0.02
SIMILAR_PATCHES, EQUAL_PATCHES = 0.9, 0.98
SIMILARITY_RISE = 0.3  # of the lowest of the run; DINOv3, arXiv:2508.10104 section 4: dense decay
CLIPPED_SHARE = 0.95  # of the recent rows
NORM_GROWTH = 10.0  # times the lowest of the run
DATA_WAIT = 0.05  # of the time
SKIPPED_SHARE = 0.01  # of the steps
SLOWDOWN = 0.6  # of the run's median
SILENCE_ROWS, SILENCE_SECONDS = 20, 60.0  # without a row


class Finding(NamedTuple):
    """One judgement.

    Attributes:
        severity: ``ok``, ``warn`` (look at it) or ``bad`` (the run is not worth its time).
        about: What was judged, e.g. ``iBOT loss``.
        text: What is the case; unless ok, also the usual cause and the way out.
        rule: The threshold, and where it comes from.
    """

    severity: Severity
    about: str
    text: str
    rule: str


def percent(share: float, digits: int = 0) -> str:
    """Write a share in percent."""
    return f"{100 * share:.{digits}f} %"


def count(num: int, what: str) -> str:
    """Write a number of things."""
    return f"{num} {what}{'' if num == 1 else 's'}"


def judged_step(record: Record) -> int:
    """Return the step from which on losses, targets and features are judged.

    ``RECENT`` rows past the warm-up of the learning rate and the freeze of the last layer: a run
    that has just got there may not have left ln P yet.
    """
    config = record.config
    return min(_warm_step(record) + RECENT * config.train.log_every, config.train.num_steps)


def _warm_step(record: Record) -> int:
    schedule = record.config.schedule
    return max(schedule.warmup_steps, schedule.freeze_last_layer_steps)


def _settled(record: Record) -> Sequence[Row]:
    """Return the rows past the warm-up, once they are enough to be judged."""
    if record.step < judged_step(record):
        return []
    first = _warm_step(record)
    return [row for row in record.rows if row["step"] > first]


def _recent(rows: Sequence[Row], name: str) -> float | None:
    """Return the median of the latest values of a number; None where there are too few."""
    _, value_N = column(rows[-RECENT:], name)
    return float(np.median(value_N)) if value_N.size >= FEWEST else None


def _lowest(rows: Sequence[Row], name: str) -> float | None:
    """Return the lowest median of a number over ten parts of the run."""
    _, value_N = column(rows, name)
    if value_N.size < 2 * FEWEST:
        return None
    parts = np.array_split(value_N, min(10, value_N.size // FEWEST))
    return min(float(np.median(part)) for part in parts)


def _finite(record: Record) -> list[Finding]:
    names = ("loss", "dino_global", "dino_local", "ibot", "koleo")
    if not record.rows:
        return []
    # A run that counts skipped steps survives a few; one that does not has ended at the first.
    last = record.rows[-FEWEST:] if "skipped" in record.rows[-1] else record.rows[-1:]
    broken = [name for name in names if not any(np.isfinite(row.get(name, 0.0)) for row in last)]
    rule = "every loss is a number"
    if broken:
        text = (
            f"{', '.join(broken)}: not a finite number at step {record.step}. The numbers "
            "overflowed; lower schedule.base_lr, or set train.precision=fp32."
        )
        return [Finding("bad", "losses", text, rule)]
    return [Finding("ok", "losses", "All losses are finite.", rule)]


def _cross_entropies(record: Record) -> list[Finding]:
    rows = _settled(record)[-RECENT:]
    losses = head_losses(record.config, rows)
    return [_cross_entropy(loss) for loss in losses if np.isfinite(loss.value_N).sum() >= FEWEST]


def _cross_entropy(loss: HeadLoss) -> Finding:
    value_N = np.asarray(loss.value_N)
    value_N = value_N[np.isfinite(value_N)]  # a skipped step may have had none
    value = float(np.median(value_N))
    # A loss that has just begun to fall is below ln P in the last part only.
    lowest = min(float(np.median(part)) for part in np.array_split(value_N, 4))
    level, name = loss.uniform, f"ln {loss.num_prototypes} = {loss.uniform:.2f}"
    rule = f"below ln P by {percent(UNIFORM_MARGIN, 1)} of it, past the warm-up"
    if value > (1 + WORSE_MARGIN) * level:
        text = (
            f"{loss.title} is {value:.2f}, above {name}: the student does worse than one that "
            "knows nothing. Usually the learning rate is too high; lower schedule.base_lr or "
            "lengthen schedule.warmup_steps."
        )
        is_far = value > (1 + FAR_WORSE_MARGIN) * level
        return Finding("bad" if is_far else "warn", loss.title, text, rule)
    if lowest > (1 - UNIFORM_MARGIN) * level:
        text = (
            f"{loss.title} equals {name}: the head is uniform, its output says nothing. Usually "
            "the learning rate is too high, the last layer is dead or the features have "
            "collapsed. Start again with a lower schedule.base_lr; check "
            "schedule.freeze_last_layer_steps and losses.koleo_weight."
        )
        return Finding("bad", loss.title, text, rule)
    text = f"{loss.title} is {value:.2f}, {percent(1 - value / level)} below {name}."
    return Finding("ok", loss.title, text, rule)


def _entropies(record: Record) -> list[Finding]:
    return [
        finding
        for head, name in (("dino", "DINO"), ("ibot", "iBOT"))
        for finding in _entropy(_settled(record), head, name)
    ]


def _entropy(rows: Sequence[Row], head: str, name: str) -> list[Finding]:
    nats = _recent(rows, f"teacher_entropy_{head}")
    share = _recent(rows, f"teacher_entropy_{head}_share")
    if nats is None or share is None:
        return []
    about = f"{name} targets"
    rule = (
        f"entropy above {SHARP_ENTROPY} nats and below {percent(UNIFORM_ENTROPY, 1)} of ln P; "
        "collapse is 0 or ln P (DINO, section 5.3)"
    )
    if share > UNIFORM_ENTROPY:
        text = (
            f"The teacher's {name} targets are uniform ({percent(share, 1)} of ln P): they ask for "
            "nothing. Either all features are equal (look at rank and distance), or the teacher "
            "temperature is too high; lower schedule.teacher_temp, or schedule.base_lr."
        )
        return [Finding("bad", about, text, rule)]
    if nats < SHARP_ENTROPY:
        text = (
            f"The teacher's {name} targets are one-hot ({nats:.3f} nats): one prototype each. "
            "The teacher temperature is too low; raise schedule.teacher_temp."
        )
        return [Finding("warn", about, text, rule)]
    text = f"Entropy of the {name} targets is {nats:.2f} nats, {percent(share)} of ln P."
    return [Finding("ok", about, text, rule)]


def _usages(record: Record) -> list[Finding]:
    found = []
    for head, name in (("dino", "DINO"), ("ibot", "iBOT")):
        value = _recent(_settled(record), f"prototype_usage_{head}")
        if value is not None:
            few = (
                f"Few {name} prototypes are in use ({percent(value, 1)} of what the rows allow). "
                "Usually the batch holds little variety or the targets drift to few prototypes; "
                "keep losses.centering=sinkhorn, and give train.batch_size more samples."
            )
            one = (
                f"All rows are assigned to one {name} prototype: the targets have collapsed. Use "
                "losses.centering=sinkhorn, losses.koleo_weight above 0 and a lower "
                "schedule.base_lr, and start again."
            )
            fine = f"The rows use {percent(value)} of the {name} prototypes they could."
            limits = (FEW_PROTOTYPES, ONE_PROTOTYPE)
            found.append(_at_least(f"{name} prototypes", value, limits, (fine, few, one)))
    return found


def _ranks(record: Record) -> list[Finding]:
    value = _recent(_settled(record), "effective_rank")
    if value is None:
        return []
    collapsed = (
        f"The cls tokens have effective rank {value:.2f}: all scans look alike to the teacher. "
        "The features have collapsed; "
    )
    low = (
        f"The cls tokens use few directions (effective rank {value:.2f}). Soon after the start "
        "this is usual; if it does not rise, raise losses.koleo_weight or lower schedule.base_lr."
    )
    way_out = "start again with a lower schedule.base_lr and losses.koleo_weight above 0."
    fine = f"The cls tokens have effective rank {value:.1f}."
    return [_at_least("rank", value, (LOW_RANK, NO_RANK), (fine, low, collapsed + way_out))]


def _distances(record: Record) -> list[Finding]:
    value = _recent(_settled(record), "koleo_distance")
    if value is None:
        return []
    none = (
        f"The nearest neighbour of a cls token is {value:.3f} away: all cls tokens are equal. The "
        "features have collapsed; start again with losses.koleo_weight above 0 and a lower "
        "schedule.base_lr."
    )
    small = (
        f"The cls tokens lie close together (nearest neighbour {value:.3f} away). If they come "
        "closer still, raise losses.koleo_weight."
    )
    fine = f"The nearest neighbour of a cls token is {value:.2f} away, on a sphere of radius 1."
    limits = (SMALL_DISTANCE, NO_DISTANCE)
    return [_at_least("distance", value, limits, (fine, small, none))]


def _at_least(
    about: str, value: float, limits: tuple[float, float], texts: tuple[str, str, str]
) -> Finding:
    """Judge a number that is healthy above the first limit and bad below the second."""
    warn, bad = limits
    fine, low, none = texts
    rule = f"above {warn:g}; bad below {bad:g} (1 prototype, rank 1, distance 0 are collapse)"
    if value < bad:
        return Finding("bad", about, none, rule)
    return Finding("warn", about, low, rule) if value < warn else Finding("ok", about, fine, rule)


def _patches(record: Record) -> list[Finding]:
    rows = _settled(record)
    value, lowest = _recent(rows, "patch_similarity"), _lowest(rows, "patch_similarity")
    if value is None:
        return []
    rule = (
        f"below {SIMILAR_PATCHES}, and less than {SIMILARITY_RISE} above the run's lowest; bad "
        f"above {EQUAL_PATCHES} (drift: DINOv3, section 4)"
    )
    if value > EQUAL_PATCHES:
        text = (
            f"The patch tokens of a view are equal (mean cosine {value:.2f}): dense features have "
            "collapsed. Start again with a lower schedule.base_lr; check that views differ: "
            "tapct-fast views."
        )
        return [Finding("bad", "patches", text, rule)]
    rises = lowest is not None and value > max(0.5, lowest + SIMILARITY_RISE)
    if value > SIMILAR_PATCHES or rises:
        text = (
            f"The patch tokens of a view grow alike (mean cosine {value:.2f}"
            + (f", lowest {lowest:.2f}" if lowest is not None else "")
            + "): dense features degrade. Watch the probe and export the checkpoint where it is "
            "best; Gram anchoring (DINOv3) is the known remedy in long runs."
        )
        return [Finding("warn", "patches", text, rule)]
    text = f"The patch tokens of a view differ (mean cosine {value:.2f})."
    return [Finding("ok", "patches", text, rule)]


def _gradients(record: Record) -> list[Finding]:
    rows, clip = _settled(record), record.config.optim.clip_norm
    if len(rows) < FEWEST:
        return []
    rule = (
        f"clipped (norm above {clip:g}, optim.clip_norm) in less than {percent(CLIPPED_SHARE)} of "
        f"the recent rows, and below {NORM_GROWTH:g} times the run's lowest"
    )
    found = []
    prefix = "grad_norm_"
    for name in (key for key in rows[-1] if key.startswith(prefix)):
        part = name.removeprefix(prefix).replace("_", " ").replace("dino", "DINO")
        part = part.replace("ibot", "iBOT")
        _, norm_N = column(rows[-RECENT:], name)
        value, lowest = _recent(rows, name), _lowest(rows, name)
        if value is None:
            continue
        # Right after the warm-up a few clipped steps are usual: all recent rows must be there.
        if norm_N.size >= RECENT and float((norm_N > clip).mean()) >= CLIPPED_SHARE:
            text = (
                f"The gradient of the {part} is clipped at every step (norm {value:.3g}, clip "
                f"{clip:g}): its length says nothing any more. Lower schedule.base_lr or lengthen "
                "schedule.warmup_steps."
            )
            found.append(Finding("warn", "gradients", text, rule))
        elif lowest is not None and value > max(NORM_GROWTH * lowest, 0.1 * clip):
            text = (
                f"The gradient of the {part} has grown from {lowest:.3g} to {value:.3g}: the run "
                "is about to diverge. Go back to a checkpoint before, with a lower "
                "schedule.base_lr."
            )
            found.append(Finding("warn", "gradients", text, rule))
    return found or [Finding("ok", "gradients", "Gradient norms are steady.", rule)]


def _rates(record: Record) -> list[Finding]:
    if not record.rows:
        return []
    schedule, num_steps = record.config.schedule, record.config.train.num_steps
    rule = "learning rates above 0"
    if schedule.freeze_last_layer_steps >= num_steps:
        text = (
            f"The last layer never trains: schedule.freeze_last_layer_steps="
            f"{schedule.freeze_last_layer_steps} of {num_steps} steps. The losses stay uniform; "
            "lower it to about a hundredth of the run."
        )
        return [Finding("bad", "learning rate", text, rule)]
    _, lr_N = column(record.rows[-RECENT:], "lr")
    if lr_N.size >= FEWEST and not record.is_finished and not lr_N.any():
        text = (
            "The learning rate is 0: nothing is learned. Check schedule.warmup_steps, min_lr and "
            "base_lr."
        )
        return [Finding("bad", "learning rate", text, rule)]
    value = record.rows[-1].get("lr", 0.0)
    return [Finding("ok", "learning rate", f"The learning rate is {value:.3g}.", rule)]


def _skips(record: Record) -> list[Finding]:
    _, skipped_N = column(record.rows[-RECENT:], "skipped")
    if not skipped_N.size:
        return []
    before, num, step = int(skipped_N[0]), int(skipped_N[-1]), record.step
    rule = f"none; bad above {percent(SKIPPED_SHARE)} of the steps"
    if not num:
        return [Finding("ok", "skipped steps", "No step was skipped.", rule)]
    when = "and lately" if num > before else "none lately"
    text = (
        f"{count(num, 'step')} of {step} had a loss or gradient that was not finite and changed "
        f"nothing, {when}. "
    )
    if num > SKIPPED_SHARE * step and num > before:
        way_out = "The run is unstable: lower schedule.base_lr, or set train.precision=fp32."
        return [Finding("bad", "skipped steps", text + way_out, rule)]
    way_out = "A few do no harm; if there are more, lower schedule.base_lr."
    return [Finding("warn", "skipped steps", text + way_out, rule)]


def _speed(record: Record) -> list[Finding]:
    found = []
    wait = _recent(record.rows, "data_wait")
    if wait is not None:
        rule = f"waiting for data below {percent(DATA_WAIT)} of the time"
        if wait > DATA_WAIT:
            text = (
                f"{percent(wait)} of the time is spent waiting for data. Give train.num_workers "
                "more threads, put the store on a local disk, or choose a faster views.renderer."
            )
            found.append(Finding("warn", "data", text, rule))
        else:
            found.append(
                Finding("ok", "data", f"{percent(wait)} of the time waits for data.", rule)
            )
    _, earlier_N = column(record.rows[:-RECENT], "samples_per_s")
    now = _recent(record.rows, "samples_per_s")
    if now is not None and earlier_N.size >= RECENT:
        usual = float(np.median(earlier_N))
        rule = f"above {percent(SLOWDOWN)} of the run's median"
        if now < SLOWDOWN * usual:
            text = (
                f"The run has slowed from {usual:.3g} to {now:.3g} samples/s. Something else uses "
                "the device or the processor, it is throttled, or the disk is slow."
            )
            found.append(Finding("warn", "speed", text, rule))
        else:
            found.append(Finding("ok", "speed", f"{now:.3g} samples/s.", rule))
    return found


def _silence(record: Record) -> list[Finding]:
    rate = _recent(record.rows, "samples_per_s")
    if not rate or record.is_finished:
        return []
    expected = record.config.train.log_every * record.config.train.batch_size / rate
    limit = max(SILENCE_SECONDS, SILENCE_ROWS * expected)
    rule = f"a row at least every {limit:.0f} s, {SILENCE_ROWS} times the usual"
    if record.idle_seconds > limit:
        text = (
            f"No row for {record.idle_seconds:.0f} s, usually one every {expected:.1f} s: the run "
            "was stopped or hangs. If it is gone, the same tapct-fast train command goes on."
        )
        return [Finding("warn", "silence", text, rule)]
    return [Finding("ok", "silence", "Rows arrive as expected.", rule)]


def _probes(record: Record) -> list[Finding]:
    if not record.probes:
        return []
    found = []
    rule = "the 95 % intervals of the last and the best checkpoint overlap"
    last = record.probes[-1]
    if "error" in last:
        text = f"The probe of step {last['step']} failed: {last['error']}."
        found.append(Finding("warn", "probe", text, "every probe ends with a score"))
    scored = [row for row in record.probes if isinstance(row.get("linear"), int | float)]
    if scored:
        best, now = max(scored, key=lambda row: float(row["linear"])), scored[-1]
        high, low = now.get("linear_high"), best.get("linear_low")
        dice = f"Dice {now['linear']:.3f} at step {now['step']}"
        if high is not None and low is not None and high < low:
            text = (
                f"The linear probe got worse: {dice}, {best['linear']:.3f} at step "
                f"{best['step']}. Export that checkpoint if it is kept; a lower schedule.base_lr "
                "or a shorter run would have ended there."
            )
            found.append(Finding("warn", "probe", text, rule))
        else:
            found.append(Finding("ok", "probe", f"Linear probe: {dice}.", rule))
    return found


CHECKS: tuple[Callable[[Record], list[Finding]], ...] = (
    _finite,
    _rates,
    _cross_entropies,
    _entropies,
    _usages,
    _ranks,
    _distances,
    _patches,
    _gradients,
    _skips,
    _speed,
    _silence,
    _probes,
)
