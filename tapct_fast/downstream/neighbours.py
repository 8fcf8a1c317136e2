"""Exact nearest neighbours of feature rows on the host: a matrix product per block of rows.

Memory beyond the inputs and the result is bounded: one block of rows in float32, its scores for one
tile of queries. Threads are torch's own (``torch.set_num_threads``).

Shape suffixes: N rows that are searched, M queries, D width, J neighbours, K classes or values,
P parts of a block.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tapct_fast.errors import InputError

Similarity = Literal["cosine", "inner product"]

# Scores of a block and tile take 64 MB: selection costs a quarter of a product of this size.
_BLOCK_ROWS, _TILE_QUERIES = 16384, 1024
_FEW_QUERIES, _PARTS = 32, 256


class Neighbours(NamedTuple):
    """Per query, the most similar rows first."""

    similarity_MJ: Tensor  # float32
    index_MJ: Tensor  # int64


def nearest(
    rows_ND: Tensor, query_MD: Tensor, *, k: int, similarity: Similarity = "cosine"
) -> Neighbours:
    """Return the rows that are most similar to each query.

    Args:
        rows_ND: Features; of float16 or bfloat16, products are still in float32.
        query_MD: Of equal width.
        k: Neighbours per query, at most the rows there are. Which of equally similar rows are
            among them is not defined.
        similarity: Cosine, in which a row of zeros is as similar as one at a right angle; or inner
            product, which is the same for rows of unit length.

    Raises:
        InputError: The shapes do not fit, there are no rows, or ``k`` is not positive.
    """
    if rows_ND.ndim != 2 or query_MD.ndim != 2 or rows_ND.shape[1] != query_MD.shape[1]:
        raise InputError(
            f"nearest: features of shapes {tuple(rows_ND.shape)} and {tuple(query_MD.shape)} are "
            "not two tables of equal width"
        )
    if len(rows_ND) == 0 or k < 1:
        raise InputError(f"nearest: k={k} neighbours among {len(rows_ND)} rows; give both")
    is_cosine = similarity == "cosine"
    if not is_cosine and similarity != "inner product":
        raise InputError(f"nearest: similarity {similarity!r} is neither cosine nor inner product")
    query_MD = F.normalize(query_MD.float(), dim=1) if is_cosine else query_MD.float()
    tiles = query_MD.split(_TILE_QUERIES)  # type: ignore[no-untyped-call]
    best: list[Neighbours | None] = [None] * len(tiles)
    for start in range(0, len(rows_ND), _BLOCK_ROWS):
        block_ND = rows_ND[start : start + _BLOCK_ROWS].float()
        scale_N = block_ND.norm(dim=1).clamp_min(1e-12).reciprocal() if is_cosine else None
        for number, tile_MD in enumerate(tiles):
            scores_MN = _products(tile_MD, block_ND)
            if scale_N is not None:
                scores_MN *= scale_N
            top_MJ, index_MJ = scores_MN.topk(min(k, len(block_ND)), dim=1)
            best[number] = _merged(best[number], Neighbours(top_MJ, index_MJ + start), k)
    parts = [part for part in best if part is not None]
    if not parts:
        width = min(k, len(rows_ND))
        return Neighbours(query_MD.new_zeros(0, width), torch.zeros(0, width, dtype=torch.int64))
    return Neighbours(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _products(query_MD: Tensor, block_ND: Tensor) -> Tensor:
    if len(query_MD) >= _FEW_QUERIES:
        return query_MD @ block_ND.T
    # MKL reads memory at half its speed in one narrow product, at full speed in a batch of them.
    parts = _PARTS if len(block_ND) % _PARTS == 0 else 1
    block_PND = block_ND.reshape(parts, -1, block_ND.shape[1])
    scores_NM = torch.bmm(block_PND, query_MD.T.expand(parts, -1, -1)).flatten(0, 1)
    return scores_NM.T.contiguous()


def _merged(a: Neighbours | None, b: Neighbours, k: int) -> Neighbours:
    if a is None:
        return b
    similarity_MJ = torch.cat([a.similarity_MJ, b.similarity_MJ], dim=1)
    index_MJ = torch.cat([a.index_MJ, b.index_MJ], dim=1)
    top_MJ, place_MJ = similarity_MJ.topk(min(k, similarity_MJ.shape[1]), dim=1)
    return Neighbours(top_MJ, index_MJ.gather(1, place_MJ))


def vote(train_ND: Tensor, target_NK: Tensor, test_MD: Tensor, *, k: int, temp: float) -> Tensor:
    """Return the mean target of each row's neighbours in cosine similarity.

    Args:
        train_ND: Features with known targets.
        target_NK: Shares of classes, or values.
        test_MD: Features of equal width.
        k: Neighbours that vote, at most the training rows.
        temp: A neighbour weighs exp(similarity / temp).

    Raises:
        InputError: As ``nearest``.

    Source: Wu et al., arXiv:1805.01978 section 3.4; DINOv2, arXiv:2304.07193.
    """
    votes = []
    for rows_MD in test_MD.split(_BLOCK_ROWS):  # type: ignore[no-untyped-call]
        top_MJ, index_MJ = nearest(train_ND, rows_MD, k=k)
        weight_MJ = torch.softmax(top_MJ / temp, dim=1)
        votes.append(torch.einsum("mj,mjk->mk", weight_MJ, target_NK[index_MJ]))
    return torch.cat(votes)
