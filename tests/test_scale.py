"""docs/scale.md: its tables are what the script prints, and the script's formulas hold."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from bench import scale
from tapct_fast import recipes
from tapct_kernels import sinkhorn


def test_the_tables_of_the_page_are_those_of_the_script() -> None:
    page = scale.PAGE.read_text()
    assert scale.fill(page) == page, "python -m bench.scale --write"


def test_a_table_without_a_place_in_the_page_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 places for the table store"):
        scale.fill("# A page without tables\n")


class _SentBytes(TorchDispatchMode):
    """Adds up what is handed to all-reduce."""

    sizes: list[int]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if "allreduce" in str(func):
            self.sizes.extend(tensor.nbytes for tensor in args[0])
        return func(*args, **(kwargs or {}))


def test_sinkhorn_sends_what_the_page_says() -> None:
    config = recipes.vit_s()
    counted = _SentBytes()
    counted.sizes = []
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        heads = (config.heads.dino, config.heads.ibot)
        logits = [torch.zeros(2, head.num_prototypes) for head in heads if head is not None]
        with counted:
            sinkhorn(logits, 0.05, group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    assert len(counted.sizes) == 6
    # A ring sends each buffer 2 (W - 1) / W times.
    expected = sum(counted.sizes) * 2 * 7 / 8
    assert scale._traffic(config, 8)["Sinkhorn"] == expected


def test_gradients_and_shards_are_those_of_a_ring() -> None:
    sent = scale._traffic(recipes.vit_b(), 64)
    size = 4 * 133.36e6  # float32; the number of parameters is held to a built network elsewhere
    assert sent["all-reduce"] == pytest.approx(2 * 63 / 64 * size, rel=1e-3)
    # bfloat16 before forward, before backward and of the teacher, and float32 gradients: 10 bytes.
    assert sent["sharded"] == pytest.approx(63 / 64 * 10 * 133.36e6, rel=1e-3)


def test_a_sample_reads_the_blocks_that_hold_its_region() -> None:
    voxels, size = scale.bytes_per_sample(recipes.vit_s(), num_draws=200)
    whole = math.prod((50, 462, 462))  # 60 x 360 x 360 mm at 1.2 x 0.78 x 0.78 mm
    assert 0.5 * whole < voxels < whole
    # At the edges blocks of 4 x 64 x 64 hold more than is wanted.
    assert voxels * scale.VOXEL_BYTES < size < 1.6 * voxels * scale.VOXEL_BYTES
