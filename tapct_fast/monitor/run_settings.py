"""The settings of a run beside the recipe that they are closest to."""

from typing import Any, NamedTuple

from tapct_fast import recipes
from tapct_fast.config import Config
from tapct_fast.report import Table, details_html, facts_list, table_html


class Closest(NamedTuple):
    """A recipe, and the settings that a run has otherwise: name, the recipe's value, the run's."""

    recipe: str
    differences: list[tuple[str, Any, Any]]


def closest_recipe(config: Config) -> Closest:
    """Return the recipe, or recipe with one stage, that differs from a run in the fewest settings.

    A run does not know by which name it was started, and one that was started from Python has none.
    """
    names = [f"{name}+{stage}" for name in recipes.RECIPES for stage in recipes.STAGES]
    found = [
        Closest(name, _differences(recipes.recipe(name), config))
        for name in (*recipes.RECIPES, *names)
    ]
    return min(found, key=lambda closest: len(closest.differences))


def _differences(base: Config, config: Config) -> list[tuple[str, Any, Any]]:
    theirs, ours = recipes.settings(base), recipes.settings(config)
    # A node that is None in one of them (gram, heads.ibot) has no settings there.
    names = [*ours, *(name for name in theirs if name not in ours)]
    return [
        (name, theirs.get(name), ours.get(name))
        for name in names
        if theirs.get(name) != ours.get(name)
    ]


def summary_facts(config: Config) -> list[tuple[str, str]]:
    """Return what a reader asks first: backbone, prototypes, views, steps, losses."""
    vit, heads, train = config.vit, config.heads, config.train
    schedule, losses = config.schedule, config.losses
    views = config.views
    ibot = "shared" if heads.ibot is None else f"{heads.ibot.num_prototypes:,}"
    return [
        (
            "backbone",
            f"width {vit.dim}, {vit.depth} blocks, patches of {vit.patch_zyx} voxels (z, y, x)",
        ),
        ("prototypes", f"DINO {heads.dino.num_prototypes:,}, iBOT {ibot}"),
        (
            "views",
            f"{views.global_views.num} of {views.global_views.size_zyx} voxels, "
            f"{views.local_views.num} of {views.local_views.size_zyx}",
        ),
        (
            "steps",
            f"{train.num_steps:,} of {train.batch_size} samples, seed {train.seed}, a checkpoint "
            f"every {train.checkpoint_every:,}, a row every {train.log_every}",
        ),
        (
            "learning rate",
            f"base {schedule.base_lr:g}, warm-up {schedule.warmup_steps:,} steps, last layer "
            f"frozen for {schedule.freeze_last_layer_steps:,}",
        ),
        (
            "losses",
            f"DINO {losses.dino_weight:g}, iBOT {losses.ibot_weight:g}, KoLeo "
            f"{losses.koleo_weight:g}; centering {losses.centering}",
        ),
    ]


def settings_html(config: Config) -> str:
    """Return a summary, what differs from the closest recipe, and, closed, every setting."""
    name, differences = closest_recipe(config)
    rows = [
        (setting, setting_text(theirs), setting_text(ours)) for setting, theirs, ours in differences
    ]
    top = (
        table_html(
            Table("Beside the closest recipe", ("setting", f"recipe {name}", "this run"), rows)
        )
        if rows
        else f"<p>As recipe {name}.</p>"
    )
    every = [(key, setting_text(value)) for key, value in recipes.settings(config).items()]
    return (
        facts_list(summary_facts(config))
        + top
        + details_html(f"All {len(every)} settings", facts_list(every))
    )


def setting_text(value: Any) -> str:
    """Write a value as it is given on the command line."""
    if isinstance(value, list | tuple):
        return ",".join(map(setting_text, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
