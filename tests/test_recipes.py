"""Recipes fitted to hardware and data over a grid, and the stages behind a plus."""

import dataclasses
import itertools
import math
import re
from pathlib import Path

import pytest

from tapct_fast import recipes
from tapct_fast.config import Config, GramConfig, from_json, to_json
from tapct_fast.errors import ConfigError
from tapct_fast.recipes import GROUP_SIZE, Fit, fit_to
from tapct_fast.ssl.schedules import step_values

GPUS = (1, 2, 3, 4, 6, 8, 16, 24, 64, 100, 512)
SCANS = (50, 200, 500, 1000, 5000, 20_000, 100_000, 1_000_000, 10_000_000)
MEMORY = (None, 11.0, 23.6, 39.4, 79.1, 139.8)


@pytest.mark.parametrize("name", ["vit-s", "vit-b", "debug"])
def test_every_fitted_recipe_deals_its_batch_to_gpus_micro_batches_and_groups(name: str) -> None:
    for num_gpus, num_scans, memory in itertools.product(GPUS, SCANS, MEMORY):
        config = recipes.recipe(name, fit=Fit(num_gpus, num_scans, memory))
        settings = config.train
        share = settings.batch_size / (num_gpus * settings.accumulate * GROUP_SIZE)
        assert share == int(share) >= 1, (num_gpus, num_scans, memory)
        assert 5000 <= settings.num_steps <= 125_000
        assert config.schedule.warmup_steps < settings.num_steps
        first, final = config.schedule.momentum
        assert min(0.992, final) <= first <= final
        last = step_values(
            config.schedule,
            settings.num_steps - 1,
            num_steps=settings.num_steps,
            batch_size=settings.batch_size,
        )
        assert all(math.isfinite(value) and value > 0 for value in last)
        assert from_json(Config, to_json(config)) == config


def test_more_scans_never_mean_a_smaller_or_shorter_run() -> None:
    for num_gpus in GPUS:
        fitted = [fit_to(recipes.vit_s(), Fit(num_gpus, num_scans)) for num_scans in SCANS]
        for less, more in itertools.pairwise(fitted):
            assert less.train.batch_size <= more.train.batch_size
            assert less.train.num_steps <= more.train.num_steps
            assert less.heads.dino.num_prototypes <= more.heads.dino.num_prototypes
            assert less.vit.drop_path <= more.vit.drop_path


def test_more_gpus_share_the_batch_and_never_shrink_it() -> None:
    for num_scans in SCANS:
        fitted = [fit_to(recipes.vit_b(), Fit(2**i, num_scans)) for i in range(10)]
        for i, (less, more) in enumerate(itertools.pairwise(fitted)):
            assert less.train.batch_size <= more.train.batch_size
            assert less.train.batch_size >> i >= more.train.batch_size >> (i + 1)
            assert less.train.accumulate >= more.train.accumulate
            assert less.train.num_steps == more.train.num_steps
            assert less.heads == more.heads


def test_less_memory_means_more_micro_batches_of_the_same_batch() -> None:
    for num_gpus, num_scans in itertools.product(GPUS, SCANS):
        fitted = [fit_to(recipes.vit_s(), Fit(num_gpus, num_scans, m)) for m in MEMORY[1:]]
        for less, more in itertools.pairwise(fitted):
            assert less.train.accumulate >= more.train.accumulate
            settings = dataclasses.replace(less.train, accumulate=more.train.accumulate)
            assert dataclasses.replace(less, train=settings) == more
        eighty = fit_to(recipes.vit_s(), Fit(num_gpus, num_scans, 79.1))  # what an H100 reports
        assert eighty == fit_to(recipes.vit_s(), Fit(num_gpus, num_scans))


def test_one_gpu_and_500_scans_is_a_small_run() -> None:
    config = fit_to(recipes.vit_s(), Fit(1, 500))
    assert (config.train.batch_size, config.train.accumulate) == (64, 1)
    assert config.train.num_steps == 7 * 1250  # 125,000 sqrt(500 / 100,000) = 8839
    assert config.schedule.warmup_steps == 875
    assert config.schedule.teacher_temp_warmup_steps == 2625
    assert config.schedule.freeze_last_layer_steps == 88
    # 0.992 ** (64 / 1024) = 0.9995 averages 2000 steps, a fiftieth of the run is 175.
    assert config.schedule.momentum[0] == pytest.approx(1 - 1 / 175)
    assert config.heads.dino.num_prototypes == config.heads.ibot.num_prototypes == 4096
    assert config.vit.drop_path == 0.1


def test_the_anchors_are_met() -> None:
    """3DINO: batch 512 and 125,000 steps on 100,000 volumes; DINOv2: 65,536 prototypes for 1024."""
    config = fit_to(recipes.vit_b(), Fit(4, 100_000))
    assert (config.train.batch_size, config.train.num_steps) == (512, 125_000)
    large = fit_to(recipes.vit_b(), Fit(8, 1_000_000))
    assert (large.train.batch_size, large.heads.dino.num_prototypes) == (1024, 65536)
    assert large.schedule == recipes.vit_b().schedule


@pytest.mark.parametrize(("num_gpus", "num_scans"), [(0, 5), (1, 0)])
def test_nothing_is_fitted_to_nothing(num_gpus: int, num_scans: int) -> None:
    with pytest.raises(ConfigError, match=f"not to {num_gpus} and {num_scans}"):
        fit_to(recipes.vit_s(), Fit(num_gpus, num_scans))


@pytest.mark.parametrize("base", list(recipes.RECIPES))
@pytest.mark.parametrize("stage", list(recipes.STAGES))
def test_every_stage_of_every_recipe_survives_json(base: str, stage: str) -> None:
    config = recipes.recipe(f"{base}+{stage}")
    assert from_json(Config, to_json(config)) == config
    assert config != recipes.recipe(base)


def test_stages_apply_in_order_behind_the_fit() -> None:
    fit = Fit(1, 500)
    config = recipes.recipe("vit-s+continue+gram", fit=fit)
    assert config == recipes.anchored(recipes.continued(fit_to(recipes.vit_s(), fit)))
    assert config.train.num_steps == 8750 // 5


def test_an_unknown_stage_lists_the_known_ones() -> None:
    message = "no stage 'hires' of a recipe; stages: continue, high-res, gram, distill"
    with pytest.raises(ConfigError, match=message):
        recipes.recipe("vit-s+hires")
    with pytest.raises(ConfigError, match=re.escape("no recipe 'vit-x'; recipes: debug")):
        recipes.recipe("vit-x+gram")


def test_continuing_freezes_the_backbone_at_a_tenth_of_the_rate() -> None:
    before, config = recipes.vit_s(), recipes.recipe("vit-s+continue")
    assert config.train.num_steps == 25_000
    values = [
        step_values(config.schedule, step, num_steps=25_000, batch_size=64)
        for step in (0, 1249, 1250, 1251, 1250 + 2500)
    ]
    assert [v.backbone_scale for v in values[:3]] == [0, 0, 0]
    assert 0 < values[3].backbone_scale < 1e-3
    assert values[4].backbone_scale == 1
    assert config.schedule.base_lr == before.schedule.base_lr / 10
    assert config.vit == before.vit
    assert config.heads == before.heads


def test_the_high_resolution_stage_has_larger_views_and_a_constant_rate() -> None:
    before, config = recipes.vit_b(), recipes.recipe("vit-b+high-res")
    assert config.views.global_views.size_zyx == config.vit.image_zyx == (12, 384, 384)
    assert config.views.local_views.size_zyx == (12, 160, 160)
    assert (config.train.num_steps, config.train.batch_size) == (12_500, 64)
    assert config.train.accumulate == 4 * before.train.accumulate
    assert config.gram == GramConfig(weight=1.5, max_refreshes=0)
    rates = [
        step_values(config.schedule, step, num_steps=12_500, batch_size=64)
        for step in (1250, 6000, 12_499)
    ]
    peak = before.schedule.base_lr * math.sqrt(64 / 1024)
    assert [v.lr for v in rates] == pytest.approx([peak / 20] * 3, rel=1e-12)
    assert {v._replace(lr=0, last_layer_lr=0) for v in rates} == {
        rates[0]._replace(lr=0, last_layer_lr=0)
    }
    assert rates[0].weight_decay == before.schedule.weight_decay[1]
    assert rates[0].teacher_temp == before.schedule.teacher_temp[1]
    assert config.heads == before.heads


def test_the_high_resolution_stage_keeps_a_batch_that_does_not_divide_by_four() -> None:
    config = recipes.vit_s()
    odd = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, batch_size=6, group_size=1, accumulate=3),
    )
    assert recipes.high_res(odd).train.accumulate == 6
    one = dataclasses.replace(odd, train=dataclasses.replace(odd.train, batch_size=3))
    assert recipes.high_res(one).train.accumulate == 3


def test_the_gram_stage_anchors_the_last_fifth_with_three_refreshes() -> None:
    config = recipes.recipe("vit-s+gram")
    assert config.gram == GramConfig(start_step=100_000, refresh_every=6250, max_refreshes=3)


def test_a_distilled_student_has_no_drop_path_and_tokens_in_every_view() -> None:
    config = recipes.recipe("vit-s+distill")
    assert config.vit.drop_path == 0
    assert config.masks.prob == 1


def test_the_commands_and_the_table_of_the_page_are_true() -> None:
    text = (Path(__file__).parents[1] / "docs" / "practice.md").read_text()
    named = set(re.findall(r"^    .*? train (\S+) STORE", text, re.MULTILINE))
    assert {name.partition("+")[2] for name in named} - {""} == set(recipes.STAGES)
    assert all(recipes.recipe(name) for name in named)
    rows = re.findall(r"^\| (vit-\w) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 5
    for name, cells in rows:
        num_gpus, num_scans, *printed = cells.replace(",", "").split(" | ")
        config = recipes.recipe(name, fit=Fit(int(num_gpus), int(num_scans)))
        assert printed == [
            str(config.train.batch_size),
            str(config.train.accumulate),
            str(config.train.num_steps),
            f"{config.schedule.momentum[0]:.4f}",
            str(config.heads.dino.num_prototypes),
        ]
