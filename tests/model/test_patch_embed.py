"""Voxels to tokens through the module."""

import pytest
import torch

from tapct_fast.config import HuConfig
from tapct_fast.errors import InputError
from tapct_fast.model.patch_embed import PatchEmbed


def patch_embed() -> PatchEmbed:
    module = PatchEmbed(8, (2, 4, 4), HuConfig())
    module.init_weights(torch.Generator().manual_seed(0))
    return module


def test_initial_weights_fill_the_range_of_a_convolution() -> None:
    module = PatchEmbed(64, (4, 8, 8), HuConfig())
    module.init_weights(torch.Generator().manual_seed(0))
    bound = 256**-0.5
    weight = module.proj.weight.detach()
    assert weight.abs().max() <= bound
    # uniform on +-bound: the standard deviation of 16384 draws is within 2 % of bound / sqrt(3)
    torch.testing.assert_close(weight.std().item(), bound / 3**0.5, rtol=0.02, atol=0)
    assert module.proj.bias.abs().max() > bound / 2


def test_autocast_rounds_the_product_but_not_the_residual_stream() -> None:
    module = patch_embed()
    x_BCZYX = torch.randn(2, 1, 4, 8, 8)
    pos_LD, prefix_RD, token_D = torch.randn(8, 8), torch.randn(3, 8), torch.randn(8)
    exact = module(x_BCZYX, pos_LD, prefix_RD, token_D, None)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = module(x_BCZYX, pos_LD, prefix_RD, token_D, None)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded[:, :3], exact[:, :3])
    assert not torch.equal(rounded, exact)
    # 2^-8 relative per operand, 32 products of order 0.2
    torch.testing.assert_close(rounded, exact, rtol=0, atol=2e-2)


@pytest.mark.parametrize("shape", [(1, 1, 4, 8, 10), (1, 1, 3, 8, 8), (1, 1, 0, 8, 8)])
def test_volume_in_broken_patches_is_refused_with_the_way_out(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"not a multiple of the patch .* pad it"):
        patch_embed().grid_zyx(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 3, 4, 8, 8), (4, 8, 8)])
def test_volume_without_its_one_channel_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"not \(B, 1, Z, Y, X\)"):
        patch_embed().grid_zyx(torch.zeros(shape))
