"""Block masks: the kernel's bits, the law of the host loop, exact counts. N views, L tokens."""

import importlib
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tapct_fast.config import MaskConfig
from tapct_kernels import BlockLaw, block_law, block_masks, block_masks_ref, tuning
from tapct_kernels.block_masks import (
    _block_masks,
    _draw_block,
    _Law,
    _masks_triton,
    philox_words,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter takes CPU tensors
ASPECT = (0.3, 1 / 0.3)


def law_of(
    grid_zyx: tuple[int, int, int], counts: tuple[int, ...], min_block: int = 4, device: str = "cpu"
) -> BlockLaw:
    return block_law(counts, grid_zyx, min_block=min_block, aspect=ASPECT, device=device)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The host loop that the bench compares with: another program of the same law."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent.parent)
    return importlib.import_module("bench.host_masks")


@pytest.fixture
def _nan_outputs() -> Any:
    """Fill new tensors with NaN or the largest integer, so that a value left out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_words_are_those_of_philox() -> None:
    """Random123's known answer for counter and key zero."""
    known = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox_words(0, 0, 0, 0) == known
    assert [word.tolist() for word in philox_words(0, np.zeros(1, np.uint64), 0, 0)] == [
        [word] for word in known
    ]


@pytest.mark.usefixtures("_nan_outputs")
@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, -1])
@pytest.mark.parametrize(
    ("grid_zyx", "counts", "min_block"),
    [
        ((3, 28, 28), (0, 470, 1176), 4),
        ((1, 4, 4), (0, 0, 16, 5, 8), 1),  # as many tokens as the block has places
        ((3, 5, 7), (50, 105), 4),  # all masked
        ((2, 3, 1), (0, 0), 4),  # nothing masked
        ((1, 1, 1), (1,), 1),
        ((2, 4, 4), (10, 20), 10_000),  # no block: all by single tokens
    ],
    ids=str,
)
def test_kernel_draws_the_bits_of_the_eager_definition(
    grid_zyx: tuple[int, int, int], counts: tuple[int, ...], min_block: int, seed: int
) -> None:
    expected = block_masks_ref(law_of(grid_zyx, counts, min_block), torch.tensor(seed))
    law = law_of(grid_zyx, counts, min_block, DEVICE)
    found = _masks_triton(torch.tensor(seed, device=DEVICE), *law)
    for tensor, wanted in zip(found, expected, strict=True):
        assert torch.equal(tensor.cpu(), wanted)


@pytest.mark.parametrize("grid_zyx", [(3, 28, 28), (2, 8, 8), (1, 1, 1), (5, 3, 2)])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99, 1.0])
def test_counts_index_and_weights_are_exact(grid_zyx: tuple[int, int, int], share: float) -> None:
    full = math.prod(grid_zyx)
    counts = (0, int(share * full), int(share * full) // 2)
    law = law_of(grid_zyx, counts)
    for seed in range(20):
        mask_NL, index_M, weight_M = block_masks(law, torch.tensor(seed))
        count_N = mask_NL.sum(1)
        assert sorted(count_N.tolist()) == sorted(counts)
        assert torch.equal(index_M, mask_NL.flatten().nonzero()[:, 0])
        wanted = torch.cat([torch.full((int(c),), 1 / max(int(c), 1)) for c in count_N])
        assert torch.equal(weight_M, wanted)


def test_counts_are_dealt_to_any_view() -> None:
    law = law_of((1, 4, 4), (0, 0, 3, 6))
    drawn = torch.stack([block_masks(law, torch.tensor(s)).mask_NL.sum(1) for s in range(400)])
    for count in (3, 6):
        where = (drawn == count).sum(0)  # 400 batches over 4 places
        assert float(((where - 100) ** 2 / 100).sum()) < 16.3  # chi-square 0.999, 3 degrees


def test_blocks_follow_the_law_of_the_host_loop(host: Any) -> None:
    """Depth, height, width, corner and share of failures of 4,000 first blocks of either."""
    grid_zyx, missing, rng = (3, 28, 28), 700, np.random.default_rng(0)
    law = law_of(grid_zyx, (missing,))
    ours = _Law(law.aspect_2A.numpy(), grid_zyx, law.min_block)
    config, draws = MaskConfig(), 4000
    blocks = [
        [_draw_block(9, i, 0, missing, ours) for i in range(draws)],
        [host.draw_block(config, grid_zyx, missing, rng) for _ in range(draws)],
    ]
    for axis, edge in itertools.product(range(3), ("size", "start")):
        values = [
            np.array([_edge(b[axis], edge) for b in drawn if b is not None]) for drawn in blocks
        ]
        grid = np.arange(30)
        first, second = (np.searchsorted(np.sort(v), grid, "right") / len(v) for v in values)
        # Kolmogorov-Smirnov at 0.999 for 4,000 against 4,000: 1.95 * sqrt(2 / 4000)
        assert np.abs(first - second).max() < 0.044, (axis, edge)
    failed = [sum(b is None for b in drawn) / draws for drawn in blocks]
    assert abs(failed[0] - failed[1]) < 0.02


def _edge(side: slice, edge: str) -> int:
    return int(side.stop - side.start if edge == "size" else side.start)


def test_whole_masks_look_like_those_of_the_host_loop(host: Any) -> None:
    """Agreement of neighbours, in plane and in depth, of 64 masks of either."""
    grid_zyx, count = (3, 28, 28), 705
    ours = block_masks(law_of(grid_zyx, (count,) * 64), torch.tensor(3)).mask_NL.numpy()
    config = MaskConfig(prob=1.0, ratio=(0.3, 0.3))
    theirs = host.draw_masks(config, grid_zyx, 64, rng=np.random.default_rng(1))
    assert (theirs.sum(1) == count).all()
    for axis in (1, 2, 3):
        agree = [
            (np.diff(m.reshape(64, *grid_zyx).astype(int), axis=axis) == 0).mean()
            for m in (ours, theirs)
        ]
        assert abs(agree[0] - agree[1]) < 0.04  # 64 masks: deviation 0.05 / 8, times 4 and two


def test_seeds_give_other_masks_and_the_same_ones_again() -> None:
    law = law_of((3, 8, 8), (40, 60))
    first = block_masks(law, torch.tensor(1)).mask_NL
    assert torch.equal(first, block_masks(law, torch.tensor(1)).mask_NL)
    for other in (2, 2**32 + 1):  # both words of the key count
        assert not torch.equal(first, block_masks(law, torch.tensor(other)).mask_NL)


@pytest.mark.parametrize("layout", ["compact", "transposed", "stride 0"])
def test_op_passes_opcheck(layout: str) -> None:
    law = law_of((2, 4, 4), (10, 10))
    if layout == "transposed":
        law = law._replace(aspect_2A=law.aspect_2A.t().contiguous().t())
    elif layout == "stride 0":
        count_N, weight_N = (t[:1].expand(2) for t in law[:2])
        law = law._replace(count_N=count_N, weight_N=weight_N)
    torch.library.opcheck(_block_masks, (torch.tensor(3), *law))


def test_op_compiles_to_one_graph_for_every_seed() -> None:
    law = law_of((2, 4, 4), (0, 10))

    def draw(seed: Tensor) -> tuple[Tensor, ...]:
        return tuple(block_masks(law, seed))

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (torch.tensor(1), torch.tensor(2)):
            assert all(map(torch.equal, compiled(seed), draw(seed)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": (33,)}, "not within 0 .. 32"),
        ({"counts": ()}, "not within 0 .. 32"),
        ({"grid_zyx": (0, 4, 4)}, "has not 1 .. 65536"),
        ({"grid_zyx": (33, 64, 64)}, "has not 1 .. 65536"),
        ({"min_block": 0}, "min_block=0"),
        ({"aspect": (2.0, 1.0)}, "aspect="),
    ],
)
def test_wrong_laws_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"counts": (3,), "grid_zyx": (2, 4, 4), "min_block": 1, "aspect": ASPECT} | change
    with pytest.raises(ValueError, match=message):
        block_law(arguments.pop("counts"), arguments.pop("grid_zyx"), **arguments)


def test_a_seed_of_another_type_is_named() -> None:
    with pytest.raises(ValueError, match="not int64 of 0"):
        block_masks(law_of((2, 4, 4), (3,)), torch.zeros(1, dtype=torch.int64))


@pytest.mark.gpu
def test_every_configuration_draws_the_bits_of_the_eager_definition() -> None:
    counts = (0,) * 32 + tuple(range(270, 1150, 28))
    law, on_device = (law_of((3, 28, 28), counts, device=device) for device in ("cpu", "cuda"))
    for seed in range(20):
        expected = block_masks_ref(law, torch.tensor(seed))
        arguments = (torch.tensor(seed, device="cuda"), *on_device)
        for _, config, found in tuning.each_config(lambda a=arguments: _masks_triton(*a)):
            for tensor, wanted in zip(found, expected, strict=True):
                assert torch.equal(tensor.cpu(), wanted), (seed, config)
