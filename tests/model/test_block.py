"""The transformer block and the rows drop path keeps."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapct_fast.config import VitConfig
from tapct_fast.model.block import Block, Mlp, Stream, SwiGlu, draw_kept_rows, start_stream


def block(**settings: object) -> Block:
    config = VitConfig(dim=16, head_dim=8, depth=1, layer_scale=0.5, **settings)
    return Block(config).double()


def run(
    module: Block,
    x_BTD: Tensor,
    keep_2N: Tensor | None = None,
    next_rows: Tensor | None = None,
    next_norm: nn.LayerNorm | None = None,
) -> Stream:
    """Run one block on its own, as the first one of a network."""
    attn_N, mlp_N = (None, None) if keep_2N is None else keep_2N
    start = start_stream(x_BTD, module.norm1, attn_N)
    stream: Stream = module(*start, (attn_N, mlp_N, next_rows), next_norm)
    return stream


def test_mlp_and_swiglu_follow_their_formulas() -> None:
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    mlp = Mlp(8, 12).double()
    hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(mlp(x), gelu @ mlp.fc2.weight.T + mlp.fc2.bias)

    swiglu = SwiGlu(8, 12).double()
    both = x @ swiglu.w12.weight.T + swiglu.w12.bias
    gate, value = both[..., :12], both[..., 12:]
    gated = gate / (1 + torch.exp(-gate)) * value
    torch.testing.assert_close(swiglu(x), gated @ swiglu.w3.weight.T + swiglu.w3.bias)


def test_branch_runs_on_kept_rows_only_and_is_scaled_up() -> None:
    module = block()
    x_BTD = torch.randn(5, 4, 16, dtype=torch.float64)
    keep_2N = torch.tensor([[0, 2, 4], [1, 2, 3]])
    seen: list[int] = []
    module.attn.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    module.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    found, normed = run(module, x_BTD, keep_2N)
    assert normed is None
    assert seen == [3, 3]

    def indicator(rows: list[int]) -> torch.Tensor:
        return torch.isin(torch.arange(5), torch.tensor(rows)).double()[:, None, None] * 5 / 3

    expected = x_BTD + indicator([0, 2, 4]) * 0.5 * module.attn(module.norm1(x_BTD))
    expected = expected + indicator([1, 2, 3]) * 0.5 * module.mlp(module.norm2(expected))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_the_subset_match_finite_differences() -> None:
    module = block()
    x_BTD = torch.randn(3, 2, 16, dtype=torch.float64, requires_grad=True)
    keep_2N = torch.tensor([[0, 2], [1, 2]])
    assert torch.autograd.gradcheck(lambda x: run(module, x, keep_2N).x_BTD, (x_BTD,))


def test_keeping_every_row_equals_no_drop_path() -> None:
    module = block()
    x_BTD = torch.randn(3, 4, 16, dtype=torch.float64)
    everything = run(module, x_BTD, torch.arange(3).expand(2, 3)).x_BTD
    torch.testing.assert_close(everything, run(module, x_BTD).x_BTD, rtol=1e-14, atol=1e-14)


def test_the_rows_of_the_next_branch_come_normed() -> None:
    module, next_norm = block(), nn.LayerNorm(16, eps=1e-6).double()
    nn.init.normal_(next_norm.weight)
    nn.init.normal_(next_norm.bias)
    x_BTD, keep_2N = torch.randn(3, 4, 16, dtype=torch.float64), torch.tensor([[0, 2], [1, 2]])
    next_rows = torch.tensor([2, 0])
    out_BTD, normed_JTD = run(module, x_BTD, keep_2N, next_rows, next_norm)
    assert torch.equal(out_BTD, run(module, x_BTD, keep_2N).x_BTD)
    torch.testing.assert_close(normed_JTD, next_norm(out_BTD[next_rows]), rtol=1e-12, atol=1e-12)


def test_norms_have_the_dtype_of_the_next_product() -> None:
    module = block().float()
    x_BTD = torch.randn(3, 4, 16)
    assert run(module, x_BTD, next_norm=module.norm1).normed_KTD.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        out_BTD, normed_BTD = run(module, x_BTD, next_norm=module.norm1)
    assert out_BTD.dtype == torch.float32
    assert normed_BTD.dtype == torch.bfloat16
    half = run(module.bfloat16(), x_BTD.bfloat16(), next_norm=module.norm1)
    assert {t.dtype for t in half} == {torch.bfloat16}


@pytest.mark.parametrize("kept", [False, True])
def test_block_compiles_to_one_graph(kept: bool) -> None:
    module = block(ffn="swiglu")
    x_BTD = torch.randn(3, 4, 16, dtype=torch.float64)
    keep_2N = torch.tensor([[0, 2], [1, 2]]) if kept else None
    arguments = (module, x_BTD, keep_2N, None, module.norm1)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), run(*arguments))


@pytest.mark.parametrize(("batch", "drop_path", "kept"), [(8, 0.3, 5), (7, 0.5, 3), (1, 0.9, 1)])
def test_kept_rows_are_distinct_and_as_many_as_dinov2_keeps(
    batch: int, drop_path: float, kept: int
) -> None:
    keep_S2N = draw_kept_rows([3], depth=6, num_views=1, group_size=batch, drop_path=drop_path)
    assert keep_S2N.shape == (6, 2, kept)
    assert (keep_S2N.diff(dim=-1) > 0).all()
    assert keep_S2N.min() >= 0
    assert keep_S2N.max() < batch


def test_a_group_keeps_the_same_rows_whatever_batch_it_is_in() -> None:
    law = {"depth": 3, "num_views": 2, "group_size": 4, "drop_path": 0.4}
    alone = [draw_kept_rows([seed], **law) for seed in (7, 8, 9)]
    together_S2N = draw_kept_rows([7, 8, 9], **law)
    assert together_S2N.shape[2] == sum(kept_S2N.shape[2] for kept_S2N in alone)
    view_S2N, sample_S2N = together_S2N // 12, together_S2N % 12
    for group, kept_S2N in enumerate(alone):
        for block in range(3):
            for branch in range(2):
                mine = sample_S2N[block, branch] // 4 == group
                rows = view_S2N[block, branch, mine] * 4 + sample_S2N[block, branch, mine] % 4
                assert rows.tolist() == kept_S2N[block, branch].tolist()


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_checkpointing_changes_no_bit_of_tokens_and_gradients(
    checkpointing: str, kept: bool
) -> None:
    rows = (torch.tensor([0, 2]), torch.tensor([1, 2]), None) if kept else (None, None, None)
    results = []
    for how in ("none", checkpointing):
        torch.manual_seed(0)
        block = Block(VitConfig(dim=16, head_dim=8, layer_scale=0.5))
        block.checkpointing = how
        x_BTD = torch.randn(3, 5, 16, requires_grad=True)
        stream = start_stream(x_BTD, block.norm1, rows[0])
        out_BTD = block(*stream, rows).x_BTD
        out_BTD.square().sum().backward()
        results.append([out_BTD, x_BTD.grad, *(p.grad for p in block.parameters())])
    assert all(map(torch.equal, *results))


def test_kept_rows_depend_on_the_seed_alone_and_are_uniform() -> None:
    def draw(seed: int) -> Tensor:
        return draw_kept_rows([seed], depth=2000, num_views=2, group_size=4, drop_path=0.3)

    first = draw(5)
    torch.rand(3)
    assert torch.equal(first, draw(5))
    assert not torch.equal(first, draw(6))
    assert (first[:, 0] != first[:, 1]).any()
    share_B = F.one_hot(first.flatten(), 8).double().mean(0) * 5
    # 5 of 8 rows, 4000 draws: five standard deviations of a binomial share
    torch.testing.assert_close(
        share_B, torch.full((8,), 5 / 8, dtype=torch.float64), rtol=0, atol=0.039
    )
