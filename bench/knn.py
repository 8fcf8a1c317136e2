"""Exact nearest neighbours among a million patch features on the CPU, against FAISS.

Rows and queries are random and of unit length, at a ViT-S's width of 384; 20 neighbours by inner
product. Ours searches them as float32 and as float16; the rival is FAISS's flat index over the same
float32 rows, with as many threads. Verified before timing: the same neighbours in the same order,
but where two similarities are closer than float32 sums can tell; float16 against its own values.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Run, start, time_ms, version
from tapct_fast.downstream.neighbours import Neighbours, nearest

SOURCES = ["tapct_fast/downstream/neighbours.py"]
NUM_ROWS, WIDTH, NUM_NEIGHBOURS = 1_000_000, 384, 20
CLOSE = 2e-6  # of similarities up to 1: float32 sums of 384 products, in two orders

Search = Callable[[], Neighbours]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure 1, 64 and 1024 queries with one and two threads."""
    run = start(__file__, SOURCES, argv)
    generator = torch.Generator().manual_seed(0)

    def drawn(num: int) -> Tensor:
        return F.normalize(torch.randn(num, WIDTH, generator=generator), dim=1)

    rows_ND = drawn(5000 if run.is_tiny else NUM_ROWS)
    half_ND = rows_ND.half()
    index = _faiss_index(rows_ND)
    threads_before = torch.get_num_threads()
    try:
        for num_queries in (1, 64) if run.is_tiny else (1, 64, 1024):
            query_MD = drawn(num_queries)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                _measure(run, rows_ND, half_ND, query_MD, index, threads)
    finally:
        torch.set_num_threads(threads_before)


def _measure(
    run: Run, rows_ND: Tensor, half_ND: Tensor, query_MD: Tensor, index: Any, threads: int
) -> None:
    num_queries = len(query_MD)
    of = f"{num_queries} quer{'y' if num_queries == 1 else 'ies'} among {len(rows_ND)}x{WIDTH}"
    case = f"{of}, {threads} thread{'s' * (threads > 1)}"
    if not run.wants(case, "cpu"):
        return
    searches: dict[str, Search] = {
        "tapct nearest": lambda: nearest(
            rows_ND, query_MD, k=NUM_NEIGHBOURS, similarity="inner product"
        ),
        "tapct nearest, float16 rows": lambda: nearest(
            half_ND, query_MD, k=NUM_NEIGHBOURS, similarity="inner product"
        ),
    }
    absent = {}
    if index is None:
        absent["faiss IndexFlatIP"] = "not installed"
    else:
        searches["faiss IndexFlatIP"] = lambda: _ask(index, query_MD, threads)
    checked_MD = query_MD[:16]  # a full sort in float64 of a few; the others against ours
    expected = _by_sort(rows_ND, checked_MD)
    ours = searches["tapct nearest"]()
    _check("tapct nearest", Neighbours(*(t[:16] for t in ours)), expected)
    half = searches["tapct nearest, float16 rows"]()
    _check("float16 rows", Neighbours(*(t[:16] for t in half)), _by_sort(half_ND, checked_MD))
    if index is not None:
        _check("faiss", searches["faiss IndexFlatIP"](), ours)
    times = time_ms(searches, device="cpu", rounds=3 if run.is_tiny or num_queries > 64 else 9)
    run.write(
        case,
        "cpu",
        times,
        bytes=rows_ND.nbytes + query_MD.nbytes,
        flops=2 * num_queries * rows_ND.numel(),
        dtype="float32",
        absent=absent,
        verified="same neighbours; 16 queries by a full sort in float64",
        faiss=version("faiss-cpu"),
    )


def _faiss_index(rows_ND: Tensor) -> Any:
    try:
        faiss = importlib.import_module("faiss")
    except ModuleNotFoundError:
        return None
    index = faiss.IndexFlatIP(rows_ND.shape[1])
    index.add(rows_ND.numpy())
    return index


def _ask(index: Any, query_MD: Tensor, threads: int) -> Neighbours:
    importlib.import_module("faiss").omp_set_num_threads(threads)
    similarity_MJ, index_MJ = index.search(query_MD.numpy(), NUM_NEIGHBOURS)
    return Neighbours(torch.from_numpy(similarity_MJ), torch.from_numpy(index_MJ))


def _by_sort(rows_ND: Tensor, query_MD: Tensor) -> Neighbours:
    blocks = rows_ND.split(2**16)  # type: ignore[no-untyped-call]
    scores_MN = torch.cat([query_MD.double() @ block_ND.double().T for block_ND in blocks], dim=1)
    return Neighbours(*scores_MN.sort(dim=1, descending=True))


def _check(name: str, found: Neighbours, expected: Neighbours) -> None:
    """Compare similarities at every rank, and rows where the next rank is not as similar.

    Raises:
        ValueError: They differ: nothing to time.
    """
    width = found.index_MJ.shape[1]
    gap_MJ = -expected.similarity_MJ[:, : width + 1].diff(dim=1)
    apart_MJ = torch.ones_like(found.index_MJ, dtype=torch.bool)
    apart_MJ[:, : gap_MJ.shape[1]] &= gap_MJ[:, :width] > CLOSE
    apart_MJ[:, 1:] &= gap_MJ[:, : width - 1] > CLOSE
    off_MJ = found.similarity_MJ.double() - expected.similarity_MJ[:, :width].double()
    same_MJ = found.index_MJ == expected.index_MJ[:, :width]
    if off_MJ.abs().max() > CLOSE or not same_MJ[apart_MJ].all():
        raise ValueError(f"{name} finds other neighbours; not timed")


if __name__ == "__main__":
    main()
