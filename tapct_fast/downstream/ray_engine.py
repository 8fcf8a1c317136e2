"""The same work on a Ray cluster: an actor of Ray Data per GPU, or as many as asked for on CPUs.

Every worker sees the scans and the output folder under the same paths. Workers write each scan as a
lone process does; what comes back to the driver are counts and times. Paths travel in Ray's object
store and in no message; the key behind the ids stays with the driver.
"""

import contextlib
import copy
import logging
import os
import queue
import socket
import threading
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tapct_fast.backbone.backbone import Backbone
from tapct_fast.downstream.archive import Done, Item, Job, embed_items
from tapct_fast.downstream.read_ahead import MOST_STALLED, stalled_text
from tapct_fast.downstream.records import CASES, REFUSED
from tapct_fast.errors import InputError, StoppedError, TapctError

MOST_SCANS = 16  # of a task; a kill costs a worker one scan, a task bounds how late news is
TASKS_PER_WORKER = 8  # at least, so that the last ones end together
KNOCK_S = 10.0
START_S = 300.0  # for actors to start and load the backbone
_SPARE = 0.9  # of a core: actors that take every core leave none for Ray's own tasks


class RayCluster(NamedTuple):
    """Where and with how many workers to embed.

    Attributes:
        address: Of a running cluster, ``auto`` for that of this machine; None starts one here.
        workers: Actors; 0 takes one per GPU, or on CPUs one per core.
        device: ``cpu``, or ``cuda`` for one GPU each.
        threads: Of torch in each worker; 0 shares those of this process among the workers.
    """

    address: str | None = None
    workers: int = 0
    device: str = "cpu"
    threads: int = 0

    @property
    def torch_device(self) -> torch.device:
        """The device of a worker."""
        return torch.device(self.device)


def embed_on_ray(
    backbone: Backbone, job: Job, items: Iterable[Item], num_items: int, cluster: RayCluster
) -> Iterator[Done]:
    """Embed scans on a cluster, and yield what became of each, in no order.

    Raises:
        InputError: Ray is not installed, or the cluster is not there or has too few GPUs or CPUs.
        StoppedError: The cluster does not answer.
    """
    ray = _import_ray()
    with _connected(ray, cluster):
        workers = _num_workers(ray.cluster_resources(), cluster)
        threads = cluster.threads or max(1, torch.get_num_threads() // workers)
        rows = _outcomes(ray, backbone, job, items, num_items, workers, threads, cluster)
        yield from _within(rows, job, START_S + job.timeout_s)


def _import_ray() -> Any:
    # Before Ray is imported, which reads them once. Nobody is told of this run.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError:
        raise InputError("Ray is not installed: pip install 'tapct-fast[ray]'") from None
    for handler in logging.getLogger("ray.data").handlers:
        if handler.get_name() == "console":  # its log of the plan; what fails is raised
            handler.setLevel(logging.ERROR)
    return ray


@contextlib.contextmanager
def _connected(ray: Any, cluster: RayCluster) -> Iterator[None]:
    if ray.is_initialized():
        yield  # the caller's own cluster, which stays
        return
    try:
        _knock(cluster.address)
        ray.init(
            address=cluster.address,
            include_dashboard=None if cluster.address else False,
            log_to_driver=False,
            logging_level="ERROR",
            num_cpus=None if cluster.address else _num_cpus(cluster),
        )
    except (OSError, ValueError, RuntimeError):
        raise InputError(
            "the Ray cluster cannot be reached; check --ray-address, or start one: ray start --head"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str | None) -> None:
    """Look whether anybody listens at HOST:PORT; Ray itself tries for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if colon and "/" not in host:
        socket.create_connection((host, int(port)), timeout=KNOCK_S).close()


def _num_cpus(cluster: RayCluster) -> int:
    return max(len(os.sched_getaffinity(0)), cluster.workers)


def _num_workers(resources: dict[str, float], cluster: RayCluster) -> int:
    kind = "GPU" if cluster.device == "cuda" else "CPU"
    there = int(resources.get(kind, 0))
    workers = cluster.workers or there
    if workers < 1 or workers > there:
        way_out = "give fewer" if there else "give another --ray-address or --device"
        raise InputError(
            f"{max(workers, 1)} workers on a Ray cluster with {there} {kind}s; {way_out}"
        )
    return workers


def _outcomes(
    ray: Any,
    backbone: Backbone,
    job: Job,
    items: Iterable[Item],
    num_items: int,
    workers: int,
    threads: int,
    cluster: RayCluster,
) -> Iterator[Done]:
    """Run the actors and yield the rows that they return."""
    import pyarrow

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    num_scans = max(1, min(MOST_SCANS, num_items // (workers * TASKS_PER_WORKER)))
    tables, rest = [], iter(items)
    while batch := list(islice(rest, num_scans)):
        cases = [item.case for item in batch]
        # Bytes, not text: what prints rows of text for a look at them does not show these.
        places = [os.fsencode(item.scan) for item in batch]
        tables.append(pyarrow.table({"case": cases, "place": places}))
    if not tables:
        return
    cores = ray.cluster_resources().get("CPU", 1.0)
    is_cuda = cluster.device == "cuda"
    dataset = ray.data.from_arrow(tables).map_batches(
        _Worker,
        fn_constructor_args=(ray.put(_on_host(backbone)), job, cluster.device, threads, workers),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=_SPARE * min(threads, cores / workers),
        num_gpus=1 if is_cuda else None,
    )
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in block.to_pylist():
            if row["error"]:
                raise StoppedError(row["error"])
            del row["error"]
            yield Done(**row)


def _on_host(backbone: Backbone) -> Backbone:
    return backbone if backbone.device.type == "cpu" else copy.deepcopy(backbone).cpu()


class _Worker:
    """An actor: the backbone on its device, and the loop of ``embed_items``."""

    def __init__(self, ref: Any, job: Job, device: str, threads: int, workers: int) -> None:
        import ray

        torch.set_num_threads(threads)
        self._backbone: Backbone = ray.get(ref).to(device)
        self._job = job._replace(memory_bytes=max(1, job.memory_bytes // workers))
        self._num_late = 0  # reads in a row that did not end

    def __call__(self, batch: Any) -> Any:
        import pyarrow

        rows, error = [], ""
        items = [Item(row["case"], Path(os.fsdecode(row["place"]))) for row in batch.to_pylist()]
        try:
            rows = [done._asdict() for done in embed_items(self._backbone, self._job, items)]
        except TapctError as stopped:
            error = str(stopped)
        except OSError as failed:  # Ray would log the path in it
            error = f"the output folder cannot be written by a worker: {failed.strerror}"
        for row in rows:  # a task has too few scans for ``ReadAhead`` to tell that storage is gone
            self._num_late = self._num_late + 1 if row["code"] == "timeout" else 0
        if self._num_late > MOST_STALLED:
            error = stalled_text(self._num_late, self._job.timeout_s)
        if error:
            rows = [Done("", "skipped")._asdict()]
        return pyarrow.Table.from_pylist([{**row, "error": error} for row in rows])


def _within(rows: Iterator[Done], job: Job, patience_s: float) -> Iterator[Done]:
    """Yield rows; raise where neither a row comes nor a scan is written for so long."""
    fetched: queue.Queue[Done | BaseException | None] = queue.Queue()

    def fetch() -> None:
        try:
            for row in rows:
                fetched.put(row)
            fetched.put(None)
        except BaseException as error:  # raised again where the row is asked for
            fetched.put(error)

    # A daemon: Ray waits for ever where it should not.
    threading.Thread(target=fetch, name="embed-ray", daemon=True).start()
    written = _last_write(job)
    while True:
        try:
            row = fetched.get(timeout=patience_s)
        except queue.Empty:
            before, written = written, _last_write(job)
            if written != before:
                continue
            raise StoppedError(
                f"the Ray cluster has finished no scan in {patience_s:g} s; the same command "
                "goes on"
            ) from None
        if row is None:
            return
        if isinstance(row, BaseException):
            raise row
        yield row


def _last_write(job: Job) -> tuple[int, ...]:
    return tuple((job.out / name).stat().st_mtime_ns for name in (CASES, REFUSED))
