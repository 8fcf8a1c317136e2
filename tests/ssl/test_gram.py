"""The Gram loss against its L x L formula in float64; the anchor against the teacher it copied."""

import itertools

import numpy as np
import pytest
import torch

from tapct_fast.config import GramConfig, HuConfig, VitConfig
from tapct_fast.model.vit import Vit
from tapct_fast.ssl.gram import Anchor, anchor_size_zyx, anchor_step, gram_loss, resize_patches

VIT = VitConfig(dim=64, depth=1, image_zyx=(8, 16, 16), layer_scale=1.0)


def formula(student: np.ndarray, anchor: np.ndarray) -> float:
    """The definition: a loop over views and pairs of tokens."""
    total, num_pairs = 0.0, 0
    for s, a in zip(student, anchor, strict=True):
        for i, j in itertools.product(range(len(s)), repeat=2):
            ours = s[i] @ s[j] / (np.linalg.norm(s[i]) * np.linalg.norm(s[j]))
            theirs = a[i] @ a[j] / (np.linalg.norm(a[i]) * np.linalg.norm(a[j]))
            total += (ours - theirs) ** 2
            num_pairs += 1
    return total / num_pairs


@pytest.mark.parametrize("shape", [(1, 1, 4), (2, 7, 5), (3, 12, 33)])
@pytest.mark.parametrize("apart", [1e-4, 1.0])
def test_loss_is_the_mean_square_over_all_pairs_of_tokens(
    shape: tuple[int, int, int], apart: float
) -> None:
    rng = np.random.default_rng(0)
    anchor = rng.normal(size=shape)
    student = anchor + apart * rng.normal(size=shape)
    expected = formula(student, anchor)
    s, a = torch.from_numpy(student), torch.from_numpy(anchor)
    # Terms are as large as apart^2 and may cancel: one token has similarity 1, always.
    close = {"rel": 1e-9, "abs": 1e-15 * apart**2}
    assert gram_loss(s, a).item() == pytest.approx(expected, **close)
    # float32 rounds tokens of length 1 by 6e-8, so their squared distance by 2 * 6e-8 * apart.
    close = {"rel": 1e-5, "abs": 1.2e-7 * apart}
    assert gram_loss(s.float(), a.float()).item() == pytest.approx(expected, **close)


def test_gradient_is_that_of_finite_differences_and_the_anchor_gets_none() -> None:
    student = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    anchor = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: gram_loss(s, anchor), (student,))
    gram_loss(student, anchor).backward()
    assert anchor.grad is None


def test_the_length_of_tokens_and_a_common_rotation_do_not_count() -> None:
    anchor = torch.randn(2, 9, 6, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    student = anchor @ turn * torch.rand(2, 9, 1, dtype=torch.float64).add(0.5)
    assert abs(gram_loss(student, anchor).item()) < 1e-15
    assert gram_loss(anchor, anchor).item() == 0.0


def test_views_do_not_meet_so_micro_batches_average_to_the_whole() -> None:
    student, anchor = torch.randn(2, 4, 6, 8, dtype=torch.float64).unbind(0)
    parts = [gram_loss(s, a) for s, a in zip(student.split(2), anchor.split(2), strict=True)]
    torch.testing.assert_close(torch.stack(parts).mean(), gram_loss(student, anchor))


def test_half_precision_tokens_are_compared_in_float32() -> None:
    student, anchor = torch.randn(2, 2, 6, 8).bfloat16().unbind(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gram_loss(student, anchor)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(gram_loss(student.double(), anchor.double()).item(), 1e-5)


def test_tokens_of_twice_the_plane_become_the_mean_of_four() -> None:
    patches = torch.randn(2, 3 * 4 * 6, 5)
    got = resize_patches(patches, (3, 4, 6), (3, 2, 3))
    expected = patches.reshape(2, 3, 2, 2, 3, 2, 5).mean(dim=(3, 5)).reshape(2, 18, 5)
    torch.testing.assert_close(got, expected)
    assert resize_patches(patches, (3, 4, 6), (3, 4, 6)) is patches


def test_a_linear_field_stays_linear_between_half_pixel_centres() -> None:
    def field(z: int, y: int, x: int) -> torch.Tensor:
        axes = [(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (z, y, x)]
        z_ZYX, y_ZYX, x_ZYX = torch.meshgrid(*axes, indexing="ij")
        return 2 * z_ZYX - 3 * y_ZYX + 5 * x_ZYX

    patches_NLD = field(3, 9, 12).reshape(1, -1, 1)
    got = resize_patches(patches_NLD, (3, 9, 12), (3, 6, 5)).reshape(3, 6, 5)
    torch.testing.assert_close(got, field(3, 6, 5))  # no centre lies beyond the old ones


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            GramConfig(start_step=3, refresh_every=2, max_refreshes=2),
            [None, None, None, 3, 3, 5, 5, 7, 7, 7, 7],
        ),
        (GramConfig(start_step=0, refresh_every=4, max_refreshes=0), [0] * 11),
    ],
)
def test_the_anchor_is_the_teacher_of_the_start_and_of_each_refresh(
    config: GramConfig, expected: list[int | None]
) -> None:
    assert [anchor_step(config, step) for step in range(11)] == expected


def test_the_anchors_views_are_whole_patches() -> None:
    assert anchor_size_zyx(GramConfig(scale=2), (12, 224, 224), (4, 8, 8)) == (12, 448, 448)
    assert anchor_size_zyx(GramConfig(scale=1.3), (12, 224, 160), (4, 8, 8)) == (12, 288, 208)


@torch.no_grad()
def test_an_anchor_keeps_the_teacher_it_copied_until_it_is_refreshed() -> None:
    gram = GramConfig(start_step=1, refresh_every=2, max_refreshes=1)
    teacher, anchor = Vit(VIT), Anchor(gram, VIT, HuConfig())
    views = torch.randn(2, 1, 8, 32, 32)
    seen = []
    for step in range(5):
        teacher.init_weights(step)
        anchor.refresh(teacher, step)
        seen.append(anchor.patches(views))
    for step, at in ((1, 1), (2, 1), (3, 3), (4, 3)):
        teacher.init_weights(at)
        assert torch.equal(seen[step], teacher(views).patches_BLD)
    assert not any(parameter.requires_grad for parameter in anchor.parameters())


@torch.no_grad()
def test_an_anchor_of_scale_2_sees_views_of_twice_the_plane() -> None:
    teacher, anchor = Vit(VIT), Anchor(GramConfig(scale=2.0), VIT, HuConfig())
    teacher.init_weights(3)
    anchor.refresh(teacher, 0)
    views = torch.randn(1, 1, 8, 16, 16)
    larger = torch.nn.functional.interpolate(views, size=(8, 32, 32), mode="trilinear")
    whole = teacher(larger).patches_BLD.reshape(1, 2, 2, 2, 2, 2, 64)
    torch.testing.assert_close(anchor.patches(views), whole.mean(dim=(3, 5)).reshape(1, 8, 64))
