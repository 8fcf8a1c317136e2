"""The errors users meet. Each message names the field or setting, the reason and the way out.

No message carries a patient's name, an identifier or a path: readers name fields, the command line
names inputs by position.
"""

from typing import Literal, get_args

# What becomes of a scan that is doubtful or could be repaired; see io.findings.
Policy = Literal["error", "warn", "repair"]
POLICIES: tuple[str, ...] = get_args(Policy)


class TapctError(Exception):
    """Base of every error a user can meet; ``exit_code`` is what the command line returns."""

    exit_code = 65


class ConfigError(TapctError, ValueError):
    """A setting is unknown, out of range or contradicts another one."""

    exit_code = 2


class InputError(TapctError, ValueError):
    """An argument names something that is missing or of the wrong kind."""

    exit_code = 2


class FormatError(TapctError, ValueError):
    """A scan is damaged, contradicts itself or is not CT.

    ``field`` names where; ``code`` is a reason code of ``io.findings``, or empty where the field
    decides it.
    """

    def __init__(self, field: str, reason: str, code: str = "") -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason
        self.code = code

    def __reduce__(self) -> tuple[type["FormatError"], tuple[str, str, str]]:
        return type(self), (self.field, self.reason, self.code)


class StoreError(TapctError, ValueError):
    """A training store is damaged, incomplete or was written by another version."""


class StoreReadError(StoreError):
    """The system could not read a file of a training store; it may another time."""


class CheckpointError(TapctError, ValueError):
    """A training checkpoint is damaged or does not fit the run that wants to resume from it."""


class CheckpointWriteError(CheckpointError):
    """The system could not write a checkpoint: the disk is full, or fails. Earlier ones stay."""

    exit_code = 74  # EX_IOERR


class BackboneError(TapctError, ValueError):
    """Backbone weights or their config are damaged or do not describe a known architecture."""


class TrainError(TapctError, RuntimeError):
    """Training stopped before a step that would have damaged the weights."""

    exit_code = 70


class StoppedError(TapctError):
    """A run was asked to stop and has written a checkpoint; the same command goes on."""

    exit_code = 75  # EX_TEMPFAIL: a cluster may queue the job again
