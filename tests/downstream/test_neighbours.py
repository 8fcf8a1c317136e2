import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tapct_fast.downstream import neighbours
from tapct_fast.downstream.neighbours import nearest
from tapct_fast.errors import InputError


def drawn(num: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and tiles that a test can fill and leave a rest of."""
    monkeypatch.setattr(neighbours, "_BLOCK_ROWS", 64)
    monkeypatch.setattr(neighbours, "_TILE_QUERIES", 48)
    monkeypatch.setattr(neighbours, "_PARTS", 8)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("num_queries", [1, 2, 31, 32, 48, 100])
@pytest.mark.parametrize("num_rows", [1, 63, 64, 500])
@pytest.mark.parametrize("similarity", ["cosine", "inner product"])
def test_neighbours_are_those_of_a_full_sort(
    num_queries: int, num_rows: int, similarity: neighbours.Similarity
) -> None:
    rows, query = drawn(num_rows, 16, 0), drawn(num_queries, 16, 1)
    got = nearest(rows, query, k=7, similarity=similarity)
    a, b = rows.double(), query.double()
    if similarity == "cosine":
        a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    top, index = (b @ a.T).sort(dim=1, descending=True)
    width = min(7, num_rows)
    assert torch.equal(got.index_MJ, index[:, :width])
    # float32 sums of 16 products of order one
    torch.testing.assert_close(got.similarity_MJ.double(), top[:, :width], rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_queries", [1, 5, 200])
def test_neighbours_are_those_of_faiss(num_queries: int) -> None:
    faiss = pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    rows, query = drawn(40_000, 32, 2), drawn(num_queries, 32, 3)
    index = faiss.IndexFlatIP(32)
    index.add(rows.numpy())
    similarity, found = index.search(query.numpy(), 20)
    got = nearest(rows, query, k=20, similarity="inner product")
    np.testing.assert_array_equal(got.index_MJ, found)
    np.testing.assert_allclose(got.similarity_MJ, similarity, rtol=1e-5)


@pytest.mark.usefixtures("small_blocks")
def test_rows_of_half_precision_are_compared_in_single() -> None:
    rows, query = drawn(300, 16, 0).half(), drawn(5, 16, 1)
    got, expected = nearest(rows, query, k=4), nearest(rows.float(), query, k=4)
    assert torch.equal(got.index_MJ, expected.index_MJ)
    assert torch.equal(got.similarity_MJ, expected.similarity_MJ)
    assert got.similarity_MJ.dtype == torch.float32


def test_more_threads_find_the_same_neighbours() -> None:
    rows, query = drawn(20_000, 32, 2), drawn(100, 32, 3)
    threads = torch.get_num_threads()
    one = nearest(rows, query, k=10)
    try:
        torch.set_num_threads(2)
        two = nearest(rows, query, k=10)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.index_MJ, two.index_MJ)
    torch.testing.assert_close(one.similarity_MJ, two.similarity_MJ)


@pytest.mark.usefixtures("small_blocks")
def test_a_row_of_zeros_is_at_a_right_angle_to_all() -> None:
    rows = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [3.0, 4.0]])
    got = nearest(rows, torch.tensor([[2.0, 0.0]]), k=3)
    assert got.index_MJ.tolist() == [[2, 0, 1]]
    assert got.similarity_MJ.tolist() == [[pytest.approx(0.6), 0.0, -1.0]]


def test_no_queries_have_no_neighbours() -> None:
    got = nearest(drawn(5, 3, 0), drawn(0, 3, 0), k=9)
    assert got.similarity_MJ.shape == got.index_MJ.shape == (0, 5)


def test_what_does_not_fit_is_refused() -> None:
    rows = drawn(5, 3, 0)
    for args, setting, message in (
        ((rows, drawn(2, 4, 0)), {"k": 1}, "equal width"),
        ((rows[:0], rows), {"k": 1}, "0 rows"),
        ((rows, rows), {"k": 0}, "k=0"),
        ((rows, rows), {"k": 1, "similarity": "l2"}, "l2"),
    ):
        with pytest.raises(InputError, match=message):
            nearest(*args, **setting)
