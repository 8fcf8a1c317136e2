"""Writes checkpoints beside the run: a copy on the host at once, the disk in one thread.

In this order, so that a crash at any point leaves a checkpoint that loads: every data file is
written, hashed and fsynced; the manifest too; the folder is read back against its manifest, takes
its name, and its parent is fsynced; ``latest.json`` names it; the oldest folders go.

Shape suffixes: N bytes.
"""

import errno
import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tapct_fast.config import to_json
from tapct_fast.errors import CheckpointWriteError, TrainError
from tapct_fast.io.atomic import atomic_folder, remove_folder, write_hashed, write_json
from tapct_fast.ssl.shards import whole
from tapct_fast.train.checkpoint import (
    STATE,
    DamagedError,
    Run,
    folders,
    identity,
    point_to,
    pointed_to,
    tensors_of,
    verify,
    versioned,
)
from tapct_fast.train.guard import each_finite
from tapct_fast.train.incident import replayed_from

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DTYPES = {  # names of the safetensors format
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}


class HostCopy:
    """The tensors of one file in host memory, laid out as the file has them.

    The memory is pinned where tensors are on CUDA, and used again by the next copy.
    """

    def __init__(self) -> None:
        self.header = b""
        self.data_N = torch.empty(0, dtype=torch.uint8)
        self._finite: list[tuple[list[str], Tensor]] = []  # names, and a bool of each

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + self.data_N.numel()

    def take(self, tensors: dict[str, Tensor]) -> bool:
        """Copy; True if a part is only there when the current CUDA stream has come so far."""
        names = _in_order(tensors)
        entries: dict[str, dict[str, Any]] = {}
        end = 0
        for name in names:
            tensor = tensors[name]
            start, end = end, end + tensor.nbytes
            entries[name] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        is_cuda = any(tensor.is_cuda for tensor in tensors.values())
        if self.data_N.numel() != end:
            self.data_N = torch.empty(end, dtype=torch.uint8, pin_memory=is_cuda)
        here = {name: t for name, t in tensors.items() if not isinstance(t, DTensor)}
        self._finite = _finite(here, is_cuda)
        for name in names:
            tensor = tensors[name].detach()
            if name not in here:  # one after the other: no device has room for all of them
                tensor = whole(tensor)
                self._finite += _finite({name: tensor}, is_cuda)
            start, end = entries[name]["data_offsets"]
            room = self.data_N[start:end].view(tensor.dtype).view(tensor.shape)
            room.copy_(tensor, non_blocking=True)
        return is_cuda

    def first_not_finite(self) -> str | None:
        """Return the name of a tensor that holds NaN or infinity."""
        for names, is_finite in self._finite:
            bad = [n for n, finite in zip(names, is_finite.tolist(), strict=True) if not finite]
            if bad:
                return bad[0]
        return None


def _in_order(tensors: dict[str, Tensor]) -> list[str]:
    # Widest first, so that each one is aligned; safetensors orders them so too.
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def gather(run: Run) -> None:
    """Send the shards of this process to the one that submits the run at the same time."""
    for kind in STATE:
        tensors = tensors_of(run, kind)
        for name in _in_order(tensors):
            whole(tensors[name])


def _finite(tensors: dict[str, Tensor], is_cuda: bool) -> list[tuple[list[str], Tensor]]:
    """Return per device the floating-point tensors' names and, on the host soon, their verdicts."""
    groups: dict[torch.device, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            groups.setdefault(tensor.device, []).append(name)
    found = []
    for names in groups.values():
        is_finite = each_finite([tensors[name] for name in names])
        host = torch.empty(is_finite.shape, dtype=torch.bool, pin_memory=is_cuda)
        found.append((names, host.copy_(is_finite, non_blocking=True)))
    return found


class CheckpointWriter:
    """Saves a run while it goes on; a context manager, used by rank 0 only.

    One save is in the air at a time, so memory on the host is that of one checkpoint.

    Args:
        directory: The run's folder.
        keep: Checkpoints to keep; beside them stays the one that the last incident is replayed
            from.
        saved: Told of every checkpoint that is complete and verified, in the caller's thread.
    """

    def __init__(
        self, directory: Path, *, keep: int, saved: Callable[[int, Path], None] | None = None
    ) -> None:
        assert keep >= 2, "the newest one may turn out to be damaged"
        self._directory = directory
        self._keep = keep
        self._saved = saved
        self._copies = {kind: HostCopy() for kind in STATE}
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[tuple[int, Path]] | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.wait()
        finally:  # with an error too, the save in the air is finished; the error is what is told
            self._pool.shutdown(wait=True)

    def submit(self, run: Run, step: int) -> Path:
        """Copy the run after ``step`` steps and let it be written; waits for the save before.

        Returns:
            The folder that the checkpoint will have.

        Raises:
            CheckpointWriteError: The save before could not be written.
            TrainError: A tensor of the save before was not finite.
        """
        self.wait()
        is_cuda = [copy.take(tensors_of(run, kind)) for kind, copy in self._copies.items()]
        copied = torch.cuda.current_stream().record_event() if any(is_cuda) else None
        texts = {
            "config.json": to_json(run.config),
            "state.json": json.dumps(versioned({"step": step, **identity(run)}), indent=1),
        }
        folder = self._directory / "checkpoints" / f"step-{step:08d}"
        self._pending = self._pool.submit(self._save, folder, step, texts, copied)
        return folder

    def poll(self) -> None:
        """Tell of a save that has finished, if there is one; raises as ``wait`` does."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last submitted run is on the disk.

        Raises:
            CheckpointWriteError: The disk is full or cannot be written; earlier checkpoints are as
                before.
            TrainError: A tensor is not finite: such a state is never written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            step, folder = pending.result()
            if self._saved is not None:
                self._saved(step, folder)

    def _save(
        self, folder: Path, step: int, texts: dict[str, str], copied: torch.cuda.Event | None
    ) -> tuple[int, Path]:
        if copied is not None:
            copied.synchronize()
        for kind, copy in self._copies.items():
            name = copy.first_not_finite()
            if name is not None:
                raise TrainError(
                    f"{kind} {name} is not finite after step {step}; no checkpoint was written. "
                    "Resume from the one before"
                )
        try:
            self._write(folder, texts)
        except DamagedError as error:
            raise CheckpointWriteError(
                f"the checkpoint of step {step} was read back otherwise than written ({error}); "
                "check the disk and give the same command again"
            ) from None
        except OSError as error:
            raise CheckpointWriteError(self._refusal(step, error)) from None
        return step, folder

    def _write(self, folder: Path, texts: dict[str, str]) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as temporary:
            parts: dict[str, list[bytes | memoryview]] = {
                f"{kind}.safetensors": [copy.header, copy.data_N.numpy().data]
                for kind, copy in self._copies.items()
            }
            parts |= {name: [text.encode() + b"\n"] for name, text in texts.items()}
            hashes = {name: write_hashed(temporary / name, part) for name, part in parts.items()}
            files = {
                name: {"sha256": digest, "size": (temporary / name).stat().st_size}
                for name, digest in hashes.items()
            }
            write_json(temporary / "manifest.json", versioned({"files": files}))
            verify(temporary)
        point_to(folder)
        self._remove_old()

    def _remove_old(self) -> None:
        held = {pointed_to(self._directory), replayed_from(self._directory)}
        for folder in folders(self._directory)[: -self._keep]:
            if folder.name not in held:
                remove_folder(folder)

    def _refusal(self, step: int, error: OSError) -> str:
        text = f"the checkpoint of step {step} cannot be written: {error.strerror}"
        if error.errno in _FULL:
            needed = sum(copy.num_bytes for copy in self._copies.values())
            free = shutil.disk_usage(self._directory).free
            text += f"; it needs {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free"
        return f"{text}. Earlier checkpoints are intact: mend that and give the same command again"


def save(run: Run, directory: Path, step: int) -> Path:
    """Write the run after ``step`` steps and wait for it; see ``CheckpointWriter``."""
    with CheckpointWriter(directory, keep=run.config.train.keep_checkpoints) as writer:
        return writer.submit(run, step)
