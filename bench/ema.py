"""The teacher's moving average over all parameters: foreach, a loop, compiled.

``tapct_fast.ssl.ema.update_teacher`` is ``torch._foreach_lerp_``; there is no kernel of ours.
Rivals are a loop over ``lerp_`` and that loop under torch.compile, which fuses it. Bytes are 12 per
float32 parameter: read both, write one. Shapes: ViT-S and ViT-B with both heads.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from bench.harness import Case, Device, Results, Work, compiled, op_bench
from tapct_fast.config import HeadConfig, HeadsConfig, HuConfig, VitConfig
from tapct_fast.ssl.ema import update_teacher
from tapct_fast.ssl.method import Networks

MOMENTUM = 0.994

Update = Callable[[Sequence[Tensor], Sequence[Tensor]], None]


def loop(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> None:
    """Move one parameter after another."""
    for mean, new in zip(teacher, student, strict=True):
        mean.lerp_(new, 1 - MOMENTUM)


def cases(device: Device, is_tiny: bool) -> Iterator[Case]:
    """Yield both model sizes."""
    small = HeadConfig(num_prototypes=16, bottleneck_dim=8, hidden_dim=16)
    tiny = {"tiny": (VitConfig(dim=64, depth=1), HeadsConfig(dino=small, ibot=small))}
    full = {"ViT-S": VitConfig(dim=384), "ViT-B": VitConfig(dim=768)}
    sizes = tiny if is_tiny else {name: (vit, HeadsConfig()) for name, vit in full.items()}
    for name, (vit, heads) in sizes.items():
        yield Case(f"{name} float32", partial(_work, vit, heads, device, is_tiny))


def _work(vit: VitConfig, heads: HeadsConfig, device: Device, is_tiny: bool) -> Work:
    with torch.device("meta"):
        networks = Networks(vit, heads, HuConfig())
    student = networks.to_empty(device=device).requires_grad_(False)
    for parameter in student.parameters():
        parameter.fill_(0.5)
    updates: dict[str, Update] = {"eager loop": loop}
    if not is_tiny:
        updates |= compiled(loop, device)
    new = list(student.parameters())
    old = [torch.zeros_like(p) for p in new]
    module = nn.Module()
    for i, mean in enumerate(old):
        module.register_parameter(str(i), nn.Parameter(mean, requires_grad=False))

    def foreach() -> Sequence[Tensor]:
        update_teacher(module, student, MOMENTUM)
        return old

    def run(update: Update) -> Sequence[Tensor]:
        update(old, new)
        return old

    variants: dict[str, Results] = {"tapct update_teacher, foreach": foreach}
    variants |= {name: partial(run, update) for name, update in updates.items()}

    def once(call: Results) -> Sequence[Tensor]:
        for mean in old:
            mean.zero_()
        return [torch.stack([mean.mean() for mean in call()])]

    expected = torch.full((len(old),), 0.5 * (1 - MOMENTUM), dtype=torch.float64, device=device)
    return Work(
        variants,
        [expected],
        tolerance=1e-5,
        bytes=3 * sum(p.nbytes for p in new),
        dtype=torch.float32,
        backend="torch._foreach_lerp_",
        checks={name: partial(once, call) for name, call in variants.items()},
        values={"parameters": sum(p.numel() for p in new), "tensors": len(new)},
    )


main = op_bench(__file__, ["tapct_fast/ssl/ema.py"], cases)

if __name__ == "__main__":
    main()
