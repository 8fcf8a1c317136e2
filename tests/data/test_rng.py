import numpy as np
import pytest

from tapct_fast.data.rng import Stream, generator


def test_stream_values_are_the_ones_that_runs_were_started_with() -> None:
    assert [(s.name, int(s)) for s in Stream] == [
        ("CASE_ORDER", 0),
        ("BOX", 1),
        ("VIEWS", 2),
        ("MASKS", 3),
        ("WEIGHTS", 4),
        ("DROP_PATH", 5),
    ]
    assert generator(0).integers(0, 2**32, 3).tolist() == [2420682225, 2253115859, 2835575116]
    drawn = generator(7, 2, 123456789012, 1).integers(0, 2**32, 3)
    assert drawn.tolist() == [2558397692, 3385922031, 975286049]


def test_a_name_gives_the_same_stream_again() -> None:
    np.testing.assert_array_equal(generator(3, 1, 4).random(100), generator(3, 1, 4).random(100))


def test_names_that_differ_anywhere_give_different_streams() -> None:
    # (1,) and (1, 0) share a stream under SeedSequence, and so do (1 + 2 * 2**32, 3) and (1, 2, 3)
    names = [(1,), (1, 0), (0, 1), (1, 0, 0), (1 + 2 * 2**32, 3), (1, 2, 3), (1, 2), (2, 1)]
    first = {name: generator(*name).integers(0, 2**63) for name in names}
    assert len(set(first.values())) == len(names)


def test_neighbouring_streams_are_uncorrelated() -> None:
    drawn = np.stack([generator(0, Stream.VIEWS, index).random(500) for index in range(40)])
    correlation = np.corrcoef(drawn)[~np.eye(40, dtype=bool)]
    assert np.abs(correlation).max() < 5 / np.sqrt(500)  # 780 pairs: 5 sigma
    assert abs(drawn.mean() - 0.5) < 5 / np.sqrt(12 * drawn.size)


@pytest.mark.parametrize("name", [(-1,), (0, -1), (2**64,)])
def test_an_integer_out_of_range_is_refused_rather_than_wrapped(name: tuple[int, ...]) -> None:
    with pytest.raises(OverflowError):
        generator(*name)
