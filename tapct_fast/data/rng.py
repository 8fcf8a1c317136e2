"""Random streams named by integers: a checkpoint saves none of them, a resume advances none.

A stream is named by (run seed, ``Stream``, further integers such as the sample index). Two names
that differ anywhere give unrelated streams, whatever their lengths: numpy's own ``SeedSequence``
zero-pads, so that there (1,) and (1, 0) are one stream, and it joins the words of large integers.
"""

import hashlib
from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What a stream is for; the values are part of every run's identity and never change."""

    CASE_ORDER = 0
    BOX = 1
    VIEWS = 2
    MASKS = 3
    WEIGHTS = 4
    DROP_PATH = 5


def generator(seed: int, *stream: int) -> np.random.Generator:
    """Return the generator of one stream: Philox4x64-10 keyed by a 128-bit hash of the integers.

    Args:
        seed: Seed of the run, in [0, 2**64).
        stream: Integers in [0, 2**64) that name the stream within the run.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox).
    """
    name = b"".join(int(part).to_bytes(8, "little") for part in (seed, *stream))
    key = hashlib.blake2b(name, digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
