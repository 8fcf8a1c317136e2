"""Whole training steps: student, teacher, losses, backward, clip, AdamW and the teacher's update.

Rivals in one process on the same views from the same weights: D is dinov3's structure by formula
(``bench.train_rivals``), its blocks, heads and the Sinkhorn of masked tokens compiled one by one; E
is our eager step of commit 5b7510c (``bench.train_eager``). Before a row is written three steps of
each are held to D's losses: to 1e-4 of the total in float32 and to 5 % in bfloat16, where D rounds
its weights and the others their products; ``agreement`` also holds how far the weights are apart,
as a share of how far they moved. With drop path each draws its own rows: nothing is compared.

``flops`` are those of the model that our step computes, a backward as two forwards, nothing
recomputed: neither rows that drop path skips count, nor rows of the last block that no loss reads,
for the rivals too, though they compute the latter. ``mfu`` is of 989.5 TFLOP/s nominal (H100,
H200). ``bytes`` is the least that a step moves: views read, weights, gradients and moments read and
written once. Views are noise, masks are drawn once; no data is read. On a CPU ``products_ms`` is
what torch's profiler finds of matrix products and attention in one step: E's time over that of ours
is what a step of the same products could win at most, if all else were free.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.harness import (
    Device,
    Run,
    Work,
    floor_ms,
    peak_extra_bytes,
    start,
    this_device,
    time_ms,
)
from bench.train_eager import EAGER, Eager
from bench.train_rivals import (
    DINOV3,
    Compiled,
    LossNumbers,
    MicroBatches,
    Rival,
    Stepper,
)
from bench.train_runs import (
    LOSS_ERROR,
    OURS,
    SOURCES,
    VALUES,
    D,
    E,
    Library,
    dtype_name,
    every_graph_compiles,
    least_bytes,
    method_of,
    random_batch,
    run_config,
    step_flops,
    tiny_run,
)
from tapct_fast.config import Config, TrainConfig
from tapct_fast.recipes import debug

NOMINAL_TFLOPS = 989.5  # bfloat16, dense: NVIDIA's sheets of H100 SXM and H200
NUM_CHECKED = 3  # steps
LARGEST_BATCH = 256
PRODUCTS = (
    *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    *(f"aten::_scaled_dot_product_flash_attention_for_cpu{end}" for end in ("", "_backward")),
    *("tapct::attention_cpu", "tapct::attention_cpu_backward"),
    *("tapct::addmm_amx", "GeneratedBackwardFor_tapct_addmm_amx_default"),
    "GeneratedBackwardFor_tapct_attention_cpu_default",  # its forward, where a gradient is wanted
)


class Setting(NamedTuple):
    """One row.

    Attributes:
        name: Of the model and its views.
        config: The run; one micro-batch.
        dtype: Of the matrix products.
        rounds: Timed steps of each variant.
        grows: Double the batch until memory ends, each variant for itself.
    """

    name: str
    config: Config
    dtype: torch.dtype
    rounds: int = 10
    grows: bool = False

    @property
    def case(self) -> str:
        """Name of the row."""
        batch = "largest batch" if self.grows else f"batch {self.config.train.batch_size}"
        drop = f", drop path {p:g}" if (p := self.config.vit.drop_path) else ""
        return f"{self.name}, {batch}{drop}, {dtype_name(self.dtype)}"


def settings(device: Device, is_tiny: bool) -> Iterator[Setting]:
    """Yield the rows of a device, the most valuable first."""
    fp32, bf16 = torch.float32, torch.bfloat16
    if is_tiny:
        config = tiny_run()
        yield from (Setting("tiny", config, dtype, rounds=3) for dtype in (fp32, bf16))
    elif device == "cpu":
        small = run_config(
            384, sizes=((8, 96, 96), (8, 48, 48)), num_local=4, num_prototypes=4096, batch=4
        )
        for dtype in (fp32, bf16):
            yield Setting("debug", debug(), dtype, rounds=20)
            yield Setting("ViT-S, 2x8x96x96 + 4x8x48x48", small, dtype)
    else:
        full = ((12, 224, 224), (12, 96, 96))
        words = "2x12x224x224 + 8x12x96x96"
        for drop_path in (0.0, 0.3):
            for name, dim in (("ViT-B", 768), ("ViT-S", 384)):
                config = run_config(dim, sizes=full, batch=32, drop_path=drop_path)
                yield Setting(f"{name}, {words}", config, bf16)
        for name, dim in (("ViT-B", 768), ("ViT-S", 384)):
            yield Setting(f"{name}, {words}", run_config(dim, sizes=full, batch=16), bf16, 3, True)


def steppers(
    config: Config, device: Device, dtype: torch.dtype, *, is_tiny: bool
) -> dict[str, Callable[[], Stepper]]:
    """Return how to build each variant, ours first, all from the same weights."""
    state = method_of(config).state_dict()
    compiled: Compiled = "no" if is_tiny else "blocks"
    where: dict[str, Any] = {"device": device, "dtype": dtype}
    return {
        OURS: partial(Library, config, state, **where),
        E: partial(Eager, config, state, EAGER, **where),
        D: partial(Rival, config, state, DINOV3, compiled=compiled, **where),
    }


def agreement(
    variants: Mapping[str, Stepper], batches: Sequence[MicroBatches], dtype: torch.dtype
) -> dict[str, dict[str, float]]:
    """Do a few steps with every variant; return how far each is from D, in losses and weights.

    Raises:
        ValueError: A variant's losses are further away than they may be: nothing to time.
    """
    before = _weights(variants[D])
    losses = {
        name: [stepper.step(batch, VALUES) for batch in batches]
        for name, stepper in variants.items()
    }
    after = _weights(variants[D])
    found = {}
    for name, stepper in variants.items():
        worst = max(
            abs(mine[key] - wanted[key]) / abs(wanted["total"])
            for mine, wanted in zip(losses[name], losses[D], strict=True)
            for key in wanted
        )
        if not worst <= LOSS_ERROR[dtype]:  # so that NaN fails
            raise ValueError(f"{name} is off D's losses by {worst:.2g} of the total; not timed")
        apart = float((_weights(stepper) - after).norm() / (after - before).norm())
        found[name] = {"losses": float(f"{worst:.2g}"), "update": float(f"{apart:.2g}")}
    return found


@torch.no_grad()
def _weights(stepper: Stepper) -> Tensor:
    return torch.cat([p.flatten() for p in stepper.student.parameters()])


def _measure(run: Run, setting: Setting, device: Device) -> None:
    config, dtype = setting.config, setting.dtype
    builders = steppers(config, device, dtype, is_tiny=run.is_tiny)
    batches = [[(random_batch(config, seed, device), seed)] for seed in range(NUM_CHECKED)]
    values: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    if setting.grows:
        times, memory, sizes = _grow(setting, builders, device)
        values |= {"batch": sizes, "verified": "the same variants in the rows of batch 32"}
    else:
        variants = {name: build() for name, build in builders.items()}
        if config.vit.drop_path:
            values["verified"] = "the same variants in the row without drop path"
        else:
            values["agreement"] = agreement(variants, batches, dtype)
            values["verified"] = f"{NUM_CHECKED} steps against D, see agreement"
        calls = {
            name: partial(_next_step, stepper, cycle(batches)) for name, stepper in variants.items()
        }
        times = time_ms(calls, device=device, rounds=setting.rounds)
        memory = {name: peak_extra_bytes(call, device) for name, call in calls.items()}
        if device == "cpu":
            values["products_ms"] = {name: products_ms(call) for name, call in calls.items()}
    batch = batches[0][0][0]
    num_samples = {name: sizes.get(name, batch.num_samples) for name in times}
    flops = step_flops(config)
    moved = least_bytes(batch, builders[OURS]())
    if floor := floor_ms(device, Work({}, [], 0.0, moved, dtype, flops)):
        values["floor_ms"] = floor
    rates = {name: num_samples[name] / p50 * 1e3 for name, (_, p50, _) in times.items()}
    if device == "cuda":
        values["nominal_tflops"] = NOMINAL_TFLOPS
        values["mfu"] = {
            name: round(rate * flops / batch.num_samples / 1e12 / NOMINAL_TFLOPS, 4)
            for name, rate in rates.items()
        }
    run.write(
        setting.case,
        device,
        times,
        dtype=dtype_name(dtype),
        bytes=moved,
        flops=flops,
        samples_per_s={name: round(rate, 3) for name, rate in rates.items()},
        ratio_to_ours={name: round(rates[OURS] / rate, 3) for name, rate in rates.items()},
        extra_bytes=memory,
        masked_tokens=batch.masked_index_M.shape[0],
        backend=f"blocks of D {'not ' if run.is_tiny else ''}compiled",
        **values,
    )


def products_ms(call: Callable[[], Any]) -> float:
    """Return the milliseconds that a call spends in matrix products and attention on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    events = profile.key_averages()
    microseconds: float = sum(e.self_cpu_time_total for e in events if e.key in PRODUCTS)
    return round(microseconds / 1e3, 4)


def _next_step(stepper: Stepper, batches: Iterator[MicroBatches]) -> LossNumbers:
    return stepper.step(next(batches), VALUES)


def _grow(
    setting: Setting, builders: Mapping[str, Callable[[], Stepper]], device: Device
) -> tuple[dict[str, list[float]], dict[str, int], dict[str, int]]:
    """Return times, memory and batch of each variant at the largest batch, a power of two."""
    times: dict[str, list[float]] = {}
    memory: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for name, build in builders.items():
        size = setting.config.train.batch_size
        while size <= LARGEST_BATCH and (found := _try(setting, build, size, device)):
            times[name], memory[name] = found
            sizes[name] = size
            size *= 2
    return times, memory, sizes


def _try(
    setting: Setting, build: Callable[[], Stepper], size: int, device: Device
) -> tuple[list[float], int] | None:
    """Return time and memory at one batch, None where memory ends; nothing outlives the call."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    config = replace(setting.config, train=TrainConfig(batch_size=size, group_size=size))
    try:
        call = partial(_next_step, build(), cycle([[(random_batch(config, 0, device), 0)]]))
        times = time_ms({"": call}, device=device, rounds=setting.rounds)
        return times[""], peak_extra_bytes(call, device)
    except torch.cuda.OutOfMemoryError:
        return None


def main(argv: Sequence[str] | None = None) -> None:
    """Measure on CUDA where there is a device, else on the CPU."""
    run = start(__file__, SOURCES, argv)
    device = this_device()
    for setting in settings(device, run.is_tiny):
        if not run.wants(setting.case, device):
            continue
        torch._dynamo.reset()
        began = time.perf_counter()
        with every_graph_compiles():
            _measure(run, setting, device)
        print(f"train, {setting.case}: {time.perf_counter() - began:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
