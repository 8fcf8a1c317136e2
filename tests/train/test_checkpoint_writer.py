"""Saving beside the run: what a kill, a full disk or a slow disk may leave behind."""

import json
import multiprocessing
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import safetensors.torch
import torch
from training_case import (
    assert_equal,
    run_in_server,
    run_of,
    save_and_record,
    save_until_killed,
    stepped_run,
    tensors,
    with_centers,
)

from tapct_fast.cli import main
from tapct_fast.config import Config
from tapct_fast.errors import CheckpointWriteError, TrainError
from tapct_fast.train import checkpoint_writer
from tapct_fast.train.checkpoint import (
    folders,
    load_latest,
    newest_intact,
    pointed_to,
    step_of,
    verify,
)
from tapct_fast.train.checkpoint_writer import CheckpointWriter, HostCopy, save

DATA = {
    "student.safetensors",
    "teacher.safetensors",
    "optimizer.safetensors",
    "config.json",
    "state.json",
}


@pytest.fixture
def config(tiny_config: Config) -> Config:
    return with_centers(tiny_config)


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_case", "torch.utils.tensorboard", "torch._dynamo"])
    return context


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Let the system refuse to write beyond ``num_bytes`` of any file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_files_are_those_that_safetensors_writes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    named = {
        "b": torch.randn(3, 5, generator=generator),
        "a": torch.randn(2, 4, generator=generator).T,  # not dense
        "half": torch.randn(3, generator=generator).bfloat16(),
        "flag": torch.tensor([True, False, True]),
        "step": torch.tensor(7.0),
        "count": torch.tensor(2**40),
    }
    copy = HostCopy()
    for _ in range(2):  # the second one goes into the same memory
        copy.take(named)
        path = tmp_path / "file.safetensors"
        path.write_bytes(copy.header + bytes(copy.data_N.numpy()))
        loaded = safetensors.torch.load_file(path)
        assert loaded.keys() == named.keys()
        assert all(
            torch.equal(loaded[n], t) and loaded[n].dtype == t.dtype for n, t in named.items()
        )
        dense = {name: tensor.contiguous() for name, tensor in named.items()}
        assert path.read_bytes() == safetensors.torch.save(dense)
        assert path.stat().st_size == copy.num_bytes
        named["b"].add_(1)


def test_what_is_saved_is_the_run_at_the_call_not_what_it_became(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other, gate = stepped_run(config), run_of(config, seed=3), threading.Event()
    expected, write = tensors(run), checkpoint_writer.write_hashed

    def slow(*args: object) -> str:
        assert gate.wait(60)
        return write(*args)

    monkeypatch.setattr(checkpoint_writer, "write_hashed", slow)
    told: list[tuple[int, Path]] = []
    with CheckpointWriter(tmp_path, keep=2, saved=lambda *args: told.append(args)) as writer:
        folder = writer.submit(run, 5)
        with torch.no_grad():
            for tensor in (*run.method.parameters(), *run.guard):
                tensor.add_(1)
        writer.poll()
        assert told == []
        assert not folder.exists()
        gate.set()
        writer.wait()
        assert told == [(5, folder)]
        writer.poll()
    assert told == [(5, folder)]
    assert load_latest(other, tmp_path, notify=pytest.fail) == 5
    assert_equal(tensors(other), expected)


def test_a_failed_save_is_told_at_the_next_one_and_the_one_after_works(
    config: Config, tmp_path: Path
) -> None:
    run = stepped_run(config)
    with CheckpointWriter(tmp_path, keep=2) as writer:
        with largest_file(1000):
            writer.submit(run, 1)
            with pytest.raises(CheckpointWriteError, match="step 1 cannot be written"):
                writer.submit(run, 2)
        writer.submit(run, 3)
    assert [step_of(folder) for folder in folders(tmp_path)] == [3]


def test_an_error_of_the_run_is_told_and_the_save_in_the_air_is_finished(
    config: Config, tmp_path: Path
) -> None:
    def fail_behind_a_save() -> None:
        with CheckpointWriter(tmp_path, keep=2) as writer:
            writer.submit(stepped_run(config), 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_behind_a_save()
    assert pointed_to(tmp_path) == "step-00000001"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["student", "teacher", "optimizer"])
def test_one_number_that_is_not_finite_is_found_by_name(
    config: Config, tmp_path: Path, kind: str, value: float
) -> None:
    run = stepped_run(config)
    weight = run.method.student.backbone.blocks[1].mlp.fc1.weight
    place = {
        "student": weight.data,
        "teacher": run.method.teacher.backbone.blocks[1].mlp.fc1.weight.data,
        "optimizer": run.optimizer.state[weight]["exp_avg"],
    }
    place[kind][-1, -1] = value
    with pytest.raises(TrainError, match=rf"{kind} backbone\.blocks\.1\.mlp\.fc1\.weight.* step 4"):
        save(run, tmp_path, 4)
    assert not (tmp_path / "checkpoints").exists()


def test_large_finite_numbers_are_no_damage(config: Config, tmp_path: Path) -> None:
    run = stepped_run(config)
    run.method.student.backbone.norm.weight.data.fill_(1e30)  # a sum of squares would overflow
    save(run, tmp_path, 1)


def test_data_is_on_the_disk_before_the_manifest_the_name_and_the_pointer(
    config: Config, tmp_path: Path, server: ForkServerContext
) -> None:
    assert run_in_server(server, save_and_record, config, tmp_path, 4) == 0
    calls = [tuple(call) for call in json.loads((tmp_path / "calls.json").read_text())]
    for step in range(1, 5):
        start = calls.index(("save", str(step)))
        end = calls.index(("save", str(step + 1))) if step < 4 else len(calls)
        mine = calls[start:end]
        folder = f"step-{step:08d}"
        manifest = mine.index(("rename", "manifest.json"))
        data_synced = [mine.index(("fsync", name)) for name in DATA]
        manifest_synced = next(
            i for i, (call, name) in enumerate(mine) if call == "fsync" and "manifest" in name
        )
        named = mine.index(("rename", folder))
        name_synced = mine.index(("fsync", "checkpoints"), named)
        pointer_synced = next(
            i for i, (call, name) in enumerate(mine) if call == "fsync" and "latest" in name
        )
        pointed = mine.index(("rename", "latest.json"))
        assert max(data_synced) < manifest_synced < manifest < named < name_synced
        assert name_synced < pointer_synced < pointed
        removed = [i for i, (call, name) in enumerate(mine) if call == "rename" and ".tmp" in name]
        assert len(removed) == (step > 2)
        assert all(i > pointed for i in removed)


def test_a_kill_at_any_call_of_a_save_leaves_whole_checkpoints_and_a_true_pointer(
    config: Config, tmp_path: Path, server: ForkServerContext
) -> None:
    num_saves = 4  # the last two also remove
    assert run_in_server(server, save_until_killed, config, tmp_path, num_saves, 0) == 0
    num_calls = int((tmp_path / "num_calls").read_text())
    run, expected = run_of(config), tensors(stepped_run(config))
    for kill_at in range(1, num_calls + 1, max(num_calls // 40, 1)):
        out = tmp_path / str(kill_at)
        out.mkdir()
        code = run_in_server(server, save_until_killed, config, out, num_saves, kill_at)
        assert code == -signal.SIGKILL
        for folder in folders(out):
            verify(folder)  # what has a name is whole
        steps = [step_of(folder) for folder in folders(out)]
        newest, damaged = newest_intact(out, notify=pytest.fail)
        assert damaged == []
        if pointed_to(out):
            verify(out / "checkpoints" / pointed_to(out))
            pointed = step_of(Path(pointed_to(out)))
            assert newest is not None
            # The next one may have its name already, not yet the pointer.
            assert pointed <= step_of(newest) <= pointed + 1
            assert {pointed - 1, pointed} - {0} <= set(steps)
        if newest is not None:
            assert load_latest(run, out, notify=pytest.fail) == step_of(newest)
            assert_equal(tensors(run), expected)
            assert pointed_to(out) == newest.name
            left = {path.name for path in (out / "checkpoints").iterdir()}
            assert left == {"latest.json", *(folder.name for folder in folders(out))}


def check_a_full_disk(config: Config, folder: Path, error: CheckpointWriteError) -> None:
    assert error.exit_code == 74
    assert "MB are free" in str(error)
    assert str(folder) not in str(error)
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"latest.json", "step-00000001"}  # nothing half written is left
    run = run_of(config)
    assert load_latest(run, folder, notify=pytest.fail) == 1
    assert_equal(tensors(run), tensors(stepped_run(config, seed=1)))


def test_a_write_refused_at_any_of_25_points_leaves_the_checkpoint_before(
    config: Config, tmp_path: Path
) -> None:
    first = save(stepped_run(config, seed=1), tmp_path, 1)
    largest = max(path.stat().st_size for path in first.iterdir())
    needed = sum(path.stat().st_size for path in first.glob("*.safetensors"))
    run = stepped_run(config, seed=2)
    for point in range(25):
        with largest_file(largest * point // 25), pytest.raises(CheckpointWriteError) as caught:
            save(run, tmp_path, 2)
        assert f"it needs {needed / 1e6:.1f} MB" in str(caught.value)
        check_a_full_disk(config, tmp_path, caught.value)
    save(run, tmp_path, 2)  # with room again it goes on
    assert pointed_to(tmp_path) == "step-00000002"


def test_a_disk_full_at_any_of_25_points_leaves_the_checkpoint_before(
    config: Config, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("no small disk: mounting a tmpfs needs root")
    try:
        first = save(stepped_run(config, seed=1), disk, 1)
        size = sum(path.stat().st_size for path in first.iterdir())
        free = shutil.disk_usage(disk).free
        run = stepped_run(config, seed=2)
        for point in range(25):
            # A tmpfs counts pages: the last points end between the small files.
            room = size * point // 24 - 4096 if point < 24 else size - 2 * 4096
            (disk / "filler").write_bytes(bytes(max(free - max(room, 0), 0)))
            with pytest.raises(CheckpointWriteError, match="No space left") as caught:
                save(run, disk, 2)
            check_a_full_disk(config, disk, caught.value)
        (disk / "filler").unlink()
        save(run, disk, 2)
        assert pointed_to(disk) == "step-00000002"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_line_and_exit_code_74_on_the_command_line(
    tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "debug", str(tiny_store), "--out", str(tmp_path / "run"), "--device", "cpu"]
    words += ["--vit.dim", "64", "--vit.depth", "1", "--heads.ibot", "none"]
    words += [
        "--train.batch_size",
        "2",
        "--train.group_size",
        "2",
        "--train.num_steps",
        "2",
        "--train.checkpoint_every",
        "1",
    ]
    with largest_file(100_000):
        assert main(words) == 74
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the checkpoint of step 1 cannot be written: File too large; it needs" in line
    assert str(tmp_path) not in line
    assert main(words) == 0
