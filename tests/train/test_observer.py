"""Observers are told what a run has written, and closed however it ends."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tapct_fast.config import Config
from tapct_fast.train.checkpoint import folders, verify
from tapct_fast.train.loop import train


class Notes:
    """Writes down what it is told, and what is on the disk by then."""

    def __init__(self, out: Path, told: list[Any], *, fails_at: int = 0) -> None:
        self._out, self.told, self._fails_at = out, told, fails_at

    def logged(self, row: Mapping[str, Any]) -> None:
        last = (self._out / "metrics.jsonl").read_text().splitlines()[-1]
        assert json.loads(last) == row
        self.told.append(row["step"])
        if row["step"] == self._fails_at:
            raise KeyboardInterrupt

    def saved(self, step: int, folder: Path) -> None:
        verify(folder)
        self.told.append((step, folder.name))

    def close(self) -> None:
        self.told.append("closed")


def test_every_row_and_checkpoint_is_told_and_then_the_end(
    tiny_config: Config, tiny_store: Path, tmp_path: Path
) -> None:
    notes = Notes(tmp_path, [])
    train(tiny_config, tiny_store, tmp_path, device="cpu", observers=[notes])
    checkpoints = [(3, "step-00000003"), (6, "step-00000006")]
    assert [told for told in notes.told if isinstance(told, int)] == [1, 2, 3, 4, 5, 6]
    assert [told for told in notes.told if isinstance(told, tuple)] == checkpoints
    # A save takes as long as the disk does: it is told behind its row, whenever that is.
    assert notes.told.index(checkpoints[0]) > notes.told.index(3)
    assert notes.told[-2:] == [checkpoints[1], "closed"]
    assert [path.name for path in folders(tmp_path)] == [name for _, name in checkpoints]


def test_an_interrupted_run_closes_its_observers_in_order(
    tiny_config: Config, tiny_store: Path, tmp_path: Path
) -> None:
    told: list[Any] = []
    first, second = Notes(tmp_path, told), Notes(tmp_path, [], fails_at=2)
    second.close = lambda: told.append("closed second")  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config, tiny_store, tmp_path, device="cpu", observers=[first, second])
    assert told == [1, 2, "closed", "closed second"]
