"""State directories that can't be used: told with the cure before a VMM runs, and nothing that is not ours is touched."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from casemate import (
    AlreadyExistsError,
    HostError,
    InvalidConfigError,
    InvalidStateError,
    NotFoundError,
    Sandbox,
    Settings,
)
from tests.support.fake_vm import FakeVm
from tests.support.sweep import vmm_pids

pytestmark = pytest.mark.root

NAME = "bad-state"
ANOTHER_USER = 65534
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@contextmanager
def mounted(path: Path, options: str) -> Iterator[None]:
    """A small file system in memory at ``path``."""
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "casemate-test", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


def start(fake_vm: FakeVm, settings: Settings) -> Sandbox:
    return Sandbox.create(
        fake_vm.config(NAME), containers=(fake_vm.container(),), start=True, settings=settings
    )


def refusal(fake_vm: FakeVm, settings: Settings, kind: type[Exception]) -> Exception:
    """The error of a start, before which no VMM ran."""
    with pytest.raises(kind) as caught:
        start(fake_vm, settings)
    assert not fake_vm.log.exists(), "a VMM was started"
    return caught.value


@pytest.mark.parametrize("which", ["state root", "sandboxes", "the sandbox's own"])
def test_create_when_a_directory_is_a_link_then_refused_and_its_target_is_untouched(
    fake_vm: FakeVm, tmp_path: Path, which: str
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious").write_text("another's")
    root = tmp_path / "r"
    link = {"state root": root, "sandboxes": root / "sandboxes"}.get(which, root / "sandboxes" / NAME)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)

    error = refusal(fake_vm, replace(fake_vm.settings, state_root=root), InvalidConfigError)

    assert f"{link} is a symbolic link" in str(error)
    assert [(path.name, path.read_text()) for path in target.iterdir()] == [("precious", "another's")]


def test_create_when_the_directory_is_another_users_then_refused_and_untouched(fake_vm: FakeVm) -> None:
    path = fake_vm.settings.state_root / "sandboxes" / NAME
    path.mkdir(parents=True)
    (path / "precious").write_text("another's")
    os.chown(path, ANOTHER_USER, ANOTHER_USER)

    error = refusal(fake_vm, fake_vm.settings, InvalidConfigError)

    assert f"{path} belongs to user {ANOTHER_USER}" in str(error)
    assert (path / "precious").read_text() == "another's"
    (path / "precious").unlink()
    path.rmdir()
    path.parent.rmdir()


def test_document_when_it_is_another_users_then_not_believed_and_its_vmm_lives(fake_vm: FakeVm) -> None:
    with start(fake_vm, fake_vm.settings) as sandbox:
        document = json.loads((fake_vm.settings.state_root / "sandboxes" / NAME / "state.json").read_text())
        # A document that points at a process of somebody else: this sandbox's own VMM.
        left = fake_vm.settings.state_root / "sandboxes" / "foreign"
        left.mkdir()
        forged = document | {"id": "foreign", "owner": document["owner"] | {"start_time_ticks": 1}}
        (left / "state.json").write_text(json.dumps(forged))
        os.chown(left / "state.json", ANOTHER_USER, ANOTHER_USER)

        with pytest.raises(InvalidConfigError, match=f"belongs to user {ANOTHER_USER}"):
            Sandbox.attach("foreign", settings=fake_vm.settings)
        done = Sandbox.cleanup("foreign", settings=fake_vm.settings)

        assert (done.removed, done.ended_pids) == (True, ())
        assert f"belongs to user {ANOTHER_USER}" in done.unverified[0]
        assert vmm_pids(NAME) == [sandbox.vmm_pid]


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ('{"version": 1, "id": "bad-st', "is not a state document"),
        ("", "is not a state document"),
        ('{"version": 1000}', "is of version 1000"),
        ("[]", "is not a state document"),
    ],
)
def test_document_when_cut_short_or_newer_then_told_by_all_and_the_name_can_be_taken(
    fake_vm: FakeVm, document: str, told: str
) -> None:
    path = fake_vm.settings.state_root / "sandboxes" / NAME
    path.mkdir(parents=True)
    (path / "state.json").write_text(document)

    with pytest.raises(InvalidConfigError, match=told):
        Sandbox.attach(NAME, settings=fake_vm.settings)
    (info,) = Sandbox.list(settings=fake_vm.settings)
    assert (info.alive, info.record) == (False, None)
    assert told in str(info.problem)
    with start(fake_vm, fake_vm.settings) as sandbox:
        assert sandbox.inspect().id == NAME


def test_name_when_another_process_owns_it_then_create_attach_and_cleanup_say_so(fake_vm: FakeVm) -> None:
    with start(fake_vm, fake_vm.settings) as sandbox:
        with pytest.raises(AlreadyExistsError, match="choose another name"):
            start(fake_vm, fake_vm.settings)
        with pytest.raises(InvalidStateError, match=f"living process {os.getpid()}"):
            Sandbox.cleanup(NAME, settings=fake_vm.settings)
        assert sandbox.container().exec(["true"], capture=True).exit_code == 0
        with pytest.raises(NotFoundError, match=NAME):
            Sandbox.attach("nobody", settings=fake_vm.settings)


def test_create_when_the_state_root_is_read_only_then_told_by_errno_and_path(
    fake_vm: FakeVm, tmp_path: Path
) -> None:
    root = tmp_path / "r"
    with mounted(root, "ro,size=64k"):
        error = refusal(fake_vm, replace(fake_vm.settings, state_root=root), HostError)
        assert isinstance(error, HostError)
        assert error.errno == errno.EROFS
        assert str(root) in str(error)


def fill(root: Path, left_pages: int) -> None:
    """Leave so many pages free."""
    free = os.statvfs(root)
    with (root / "filler").open("wb") as file:
        file.write(bytes((free.f_bfree - left_pages) * free.f_bsize))


@pytest.mark.parametrize("left_pages", [0, 1])
def test_create_when_the_disk_is_full_at_any_write_then_told_and_nothing_stays(
    fake_vm: FakeVm, tmp_path: Path, left_pages: int
) -> None:
    root = tmp_path / "r"
    settings = replace(fake_vm.settings, state_root=root)
    with mounted(root, "size=256k"):
        (root / "sandboxes").mkdir()
        fill(root, left_pages)
        with pytest.raises(HostError) as caught:
            start(fake_vm, settings)
        assert caught.value.errno == errno.ENOSPC
        assert "No space left" in str(caught.value)
        assert vmm_pids(NAME) == []
        assert list((root / "sandboxes").iterdir()) == []
        (root / "filler").unlink()
        with start(fake_vm, settings) as sandbox:
            assert sandbox.container().exec(["echo", "room"], capture=True).stdout == "room\n"


def test_sandbox_when_the_disk_fills_up_later_then_it_serves_on_and_can_be_stopped(
    fake_vm: FakeVm, tmp_path: Path
) -> None:
    root = tmp_path / "r"
    settings = replace(fake_vm.settings, state_root=root)
    with mounted(root, "size=256k"):
        with start(fake_vm, settings) as sandbox:
            fill(root, 0)
            with pytest.raises(HostError, match="No space left"):
                sandbox.create_container(fake_vm.container("second"))
            assert [one.id for one in sandbox.containers] == ["main"]
            assert sandbox.container("main").exec(["true"], capture=True).exit_code == 0
            (info,) = Sandbox.list(settings=settings)
            assert info.record is not None
            assert [one.id for one in info.record.containers] == ["main"]
        assert list((root / "sandboxes").iterdir()) == []
