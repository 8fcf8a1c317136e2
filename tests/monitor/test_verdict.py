"""The verdict is quiet on a healthy run and says what is wrong with a sick one."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tapct_fast import recipes
from tapct_fast.monitor.checks import Finding
from tapct_fast.monitor.record import Record, read_record
from tapct_fast.monitor.run_report import render_run_report
from tapct_fast.monitor.verdict import headline, judge, worst
from tapct_fast.monitor.watch import render

LN = math.log(128)


def changed(record: Record, last: int = 40, **numbers: Any) -> Record:
    """Give the last rows other numbers."""
    rows = [*record.rows[:-last], *({**row, **numbers} for row in record.rows[-last:])]
    return record._replace(rows=rows)


def findings(record: Record) -> list[Finding]:
    return [finding for finding in judge(record) if finding.severity != "ok"]


def test_a_really_trained_healthy_run_has_no_finding_at_any_step(healthy: Record) -> None:
    for num in range(len(healthy.rows) + 1):
        young = healthy._replace(rows=healthy.rows[:num])
        # The speed of a shared machine is no matter of the run.
        found = [f for f in findings(young) if f.about not in ("speed", "data")]
        assert not found, (num, found)
    assert headline(healthy, judge(healthy)).startswith("Healthy at step 60 of 60")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("learning rate", {"schedule.base_lr": "20"}),
        (
            "temperature",
            {
                "schedule.teacher_temp": "10,10",
                "losses.student_temp": "10",
                "losses.koleo_weight": "0",
            },
        ),
    ],
)
def test_a_run_really_trained_sick_is_called_sick(
    trained: Any, name: str, settings: Mapping[str, str]
) -> None:
    record = read_record(trained("sick", {"train.num_steps": "50", **settings}))
    found = {f.about: f for f in findings(record)}
    assert worst(list(found.values())) == "bad", name
    assert any("ln 32 = 3.47" in f.text for f in found.values())
    assert headline(record, list(found.values())).startswith("Not healthy at step 50")


def test_steady_healthy_numbers_have_no_finding(steady: Record) -> None:
    assert findings(steady) == []
    assert worst(judge(steady)) == "ok"
    checks = len(judge(steady))
    assert headline(steady, judge(steady)) == (
        f"Healthy at step 100 of 400: {checks} checks without a finding."
    )
    assert all(f.text and f.rule for f in judge(steady))


# What is changed in the last 40 of 100 rows, the severity, what it is about, words of the sentence.
SICK = [
    ({"dino_global": 0.97, "dino_local": LN - 0.97}, "bad", "DINO loss", "head is uniform"),
    ({"ibot": LN / 2}, "bad", "iBOT loss", "equals ln 128 = 4.85"),
    ({"dino_local": 4.2}, "warn", "DINO loss", "worse than one that knows nothing"),
    ({"ibot": 3.0}, "bad", "iBOT loss", "is 6.00, above"),
    ({"loss": math.nan}, "bad", "losses", "not a finite number at step 100"),
    ({"teacher_entropy_dino_share": 0.999}, "bad", "DINO targets", "uniform (99.9 % of ln P)"),
    ({"teacher_entropy_ibot_share": 0.999}, "bad", "iBOT targets", "schedule.teacher_temp"),
    ({"teacher_entropy_dino": 0.01}, "warn", "DINO targets", "one-hot"),
    ({"prototype_usage_dino": 0.03}, "warn", "DINO prototypes", "3.0 % of what the rows allow"),
    ({"prototype_usage_ibot": 0.0}, "bad", "iBOT prototypes", "one iBOT prototype"),
    ({"effective_rank": 1.6}, "warn", "rank", "few directions"),
    ({"effective_rank": 1.01}, "bad", "rank", "features have collapsed"),
    ({"koleo_distance": 0.05}, "warn", "distance", "close together"),
    ({"koleo_distance": 0.001}, "bad", "distance", "all cls tokens are equal"),
    ({"patch_similarity": 0.7}, "warn", "patches", "Gram anchoring"),
    ({"patch_similarity": 0.99}, "bad", "patches", "dense features have collapsed"),
    ({"grad_norm_backbone": 4.0}, "warn", "gradients", "clipped at every step"),
    ({"grad_norm_ibot_head": 0.44 * 0.9 * 7}, None, "gradients", ""),
    ({"data_wait": 0.2}, "warn", "data", "20 % of the time"),
    ({"data_wait": 0.04}, None, "data", ""),
    ({"samples_per_s": 6.0}, "warn", "speed", "from 12 to 6 samples/s"),
    ({"lr": 0.0}, "bad", "learning rate", "nothing is learned"),
    ({"skipped": 1}, "warn", "skipped steps", "1 step of 100"),
]


@pytest.mark.parametrize(("numbers", "severity", "about", "words"), SICK)
def test_every_sickness_has_its_sentence(
    steady: Record, numbers: dict[str, Any], severity: str | None, about: str, words: str
) -> None:
    found = findings(changed(steady, **numbers))
    if severity is None:
        assert found == []
        return
    (finding,) = found
    assert (finding.severity, finding.about) == (severity, about)
    assert words in finding.text
    assert worst(found) == severity


def test_a_gradient_that_grows_is_told_before_it_is_clipped(steady: Record) -> None:
    calm = [{**row, "grad_norm_dino_head": 0.05} for row in steady.rows[:60]]
    grown = [{**row, "grad_norm_dino_head": 2.0} for row in steady.rows[60:]]
    (finding,) = findings(steady._replace(rows=calm + grown))
    assert "gradient of the DINO head has grown from 0.05 to 2" in finding.text


def test_steps_that_are_skipped_more_and_more_are_bad(steady: Record) -> None:
    rows = [{**row, "skipped": max(0, row["step"] - 90)} for row in steady.rows]
    (finding,) = findings(steady._replace(rows=rows))
    assert (finding.severity, finding.about) == ("bad", "skipped steps")
    assert "10 steps of 100" in finding.text
    # The same number of old ones is a warning only.
    (finding,) = findings(steady._replace(rows=[{**row, "skipped": 10} for row in steady.rows]))
    assert finding.severity == "warn"


def test_the_loss_of_one_skipped_step_is_no_overflow(steady: Record) -> None:
    skipped = changed(steady, last=1, loss=math.nan, dino_local=math.nan, skipped=1)
    assert "nan" not in " ".join(f.text for f in judge(skipped))
    (finding,) = findings(skipped)
    assert (finding.severity, finding.about) == ("warn", "skipped steps")
    rows = [{k: v for k, v in row.items() if k != "skipped"} for row in skipped.rows]
    (finding,) = findings(steady._replace(rows=rows))
    assert (finding.severity, finding.about) == ("bad", "losses")
    assert finding.text.startswith("loss, dino_local: not a finite number")


def test_one_outlier_is_no_finding(steady: Record) -> None:
    assert not findings(changed(steady, last=3, effective_rank=1.0, data_wait=0.9, ibot=9.0))


def test_nothing_is_said_about_losses_before_the_warm_up_has_ended(steady: Record) -> None:
    sick = changed(steady, last=100, ibot=LN / 2, effective_rank=1.0)
    young = sick._replace(rows=sick.rows[:39])
    assert not findings(young)
    assert "judged from step 40 on" in headline(young, judge(young))
    assert {f.about for f in findings(sick._replace(rows=sick.rows[:40]))} == {"iBOT loss", "rank"}
    # A run too short for that is judged at its end.
    short = recipes.override(sick.config, {"train.num_steps": "30"})
    done = sick._replace(config=short, rows=sick.rows[:30])
    assert {f.about for f in findings(done)} == {"iBOT loss", "rank"}
    assert not findings(done._replace(rows=sick.rows[:29]))


def test_a_last_layer_that_never_trains_is_told_from_the_first_row(steady: Record) -> None:
    config = recipes.override(steady.config, {"schedule.freeze_last_layer_steps": "400"})
    (finding,) = findings(steady._replace(config=config, rows=steady.rows[:1]))
    assert finding.severity == "bad"
    assert "freeze_last_layer_steps=400 of 400" in finding.text


def test_a_run_without_masks_has_no_ibot_to_judge(steady: Record) -> None:
    config = recipes.override(steady.config, {"masks.prob": "0"})
    rows = [
        {k: v for k, v in row.items() if "ibot" not in k} | {"ibot": 0.0} for row in steady.rows
    ]
    found = judge(steady._replace(config=config, rows=rows))
    assert worst(found) == "ok"
    assert not any("iBOT" in f.about for f in found)


def test_an_older_run_without_health_numbers_is_judged_by_its_losses(steady: Record) -> None:
    plain = {"dino_global", "dino_local", "ibot", "koleo", "lr", "loss", "step"}
    rows = [{k: row[k] for k in plain} for row in steady.rows]
    found = judge(steady._replace(rows=rows))
    assert worst(found) == "ok"
    assert {"DINO loss", "iBOT loss"} <= {f.about for f in found}


@pytest.mark.parametrize("value", ["absent", math.nan, math.inf, 0])
def test_no_number_of_a_row_whatever_it_is_breaks_verdict_view_or_page(
    steady: Record, value: Any
) -> None:
    # They are made while the run is on: an error in them would end it.
    for name in steady.rows[0]:
        if name == "step":
            continue
        for last in (1, 100):
            odd = changed(steady, last=last, **{name: value})
            if value == "absent":
                rows = [{k: v for k, v in row.items() if v != "absent"} for row in odd.rows]
                odd = odd._replace(rows=rows)
            assert render(odd, judge(odd)).isascii()
        assert render_run_report(odd, is_running=True).endswith("</html>\n")


def test_silence_is_told_unless_the_run_has_finished(steady: Record) -> None:
    (finding,) = findings(steady._replace(idle_seconds=3600))
    assert "No row for 3600 s" in finding.text
    assert not findings(steady._replace(idle_seconds=50))
    config = recipes.override(steady.config, {"train.num_steps": "100"})
    assert not findings(steady._replace(config=config, idle_seconds=3600))


def test_a_probe_that_falls_or_fails_is_told(steady: Record) -> None:
    best = {"step": 60, "linear": 0.6, "linear_low": 0.58, "linear_high": 0.62, "knn": 0.5}
    near = {**best, "step": 80, "linear": 0.58, "linear_low": 0.56, "linear_high": 0.6}
    worse = {**best, "step": 100, "linear": 0.5, "linear_low": 0.48, "linear_high": 0.52}
    assert not findings(steady._replace(probes=[best, near]))
    (finding,) = findings(steady._replace(probes=[best, near, worse]))
    assert "Dice 0.500 at step 100, 0.600 at step 60" in finding.text
    (finding,) = findings(steady._replace(probes=[best, {"step": 80, "error": "no labels"}]))
    assert "The probe of step 80 failed: no labels." in finding.text


def test_no_row_at_all_is_no_verdict(steady: Record) -> None:
    empty = steady._replace(rows=[])
    assert judge(empty) == []
    assert headline(empty, []) == "No step has been logged yet."


def test_every_finding_with_a_cause_stands_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "health.md").read_text()
    for *_, about, _ in SICK:
        assert f"| {about.replace('DINO ', '').replace('iBOT ', '')} |" in page, about
