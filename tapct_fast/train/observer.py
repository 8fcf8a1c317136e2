"""Who looks on while a run trains; on rank 0, between two steps, so it must be brief."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Observer(Protocol):
    """Told what a run has written; it changes nothing about the run, its random state included."""

    def logged(self, row: Mapping[str, Any]) -> None:
        """A row of ``metrics.jsonl`` was written."""

    def saved(self, step: int, folder: Path) -> None:
        """A checkpoint is complete and verified; a later one may remove it."""

    def close(self) -> None:
        """The run has ended, at its last step or before."""
