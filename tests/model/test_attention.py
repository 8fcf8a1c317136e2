"""Fused attention against the explicit softmax in float64."""

import torch

from tapct_fast.model.attention import Attention


def test_fused_attention_equals_the_explicit_softmax_in_float64() -> None:
    attention = Attention(24, 8).double()
    x_NTD = torch.randn(2, 7, 24, dtype=torch.float64)
    weight, bias = attention.qkv.weight, attention.qkv.bias
    heads = []
    for head in range(3):
        rows = [slice(24 * part + 8 * head, 24 * part + 8 * head + 8) for part in range(3)]
        q, k, v = (x_NTD @ weight[r].T + bias[r] for r in rows)
        scores = q @ k.mT / 8**0.5
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heads.append(weights @ v)
    expected = torch.cat(heads, dim=-1) @ attention.proj.weight.T + attention.proj.bias
    torch.testing.assert_close(attention(x_NTD), expected, rtol=1e-12, atol=1e-12)


def test_attention_does_not_hold_a_score_matrix() -> None:
    attention = Attention(64, 64)
    x_NTD = torch.randn(1, 4096, 64)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        attention(x_NTD)
    largest = max(event.cpu_memory_usage for event in profile.events())
    # the scores alone would be 64 MiB in float32; qkv is 3 MiB
    assert 0 < largest < 16 * 2**20
