"""The life of a sandbox from its making to its end, in the pieces that are swept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from casemate import Container, Process, Sandbox
from casemate.observe import failpoints
from tests.support.fake_vm import FakeVm, make_fake_vm

__all__ = ["attach_and_detach", "live", "live_in_fork", "make_and_remove", "start", "use_everything"]


def start(fake_vm: FakeVm, name: str) -> Sandbox:
    """A sandbox with one container and two ports for what comes later."""
    return Sandbox.create(
        fake_vm.config(name, hotplug_ports=2),
        containers=(fake_vm.container(),),
        start=True,
        settings=fake_vm.settings,
    )


def use_everything(container: Container) -> None:
    """Everything that goes over the agent's connection while a container runs."""
    process = container.exec(["cat"], terminal=True)
    try:
        process.resize(24, 80)
        process.stdin.write(b"typed")
        assert process.stdout.read() == b"typed"
    finally:
        # Whoever was given a process ends it.
        end(process)
    assert process.exit_code == 137
    assert container.exec(["cat"], input=b"through", capture=True).stdout == "through"
    container.pause()
    container.resume()


def end(process: Process) -> None:
    """Kill and wait; a step that fails is done again before its error goes on."""
    try:
        process.signal(9)
        process.wait(30)
    finally:
        process.signal(9)
        process.wait(30)


def make_and_remove(sandbox: Sandbox, fake_vm: FakeVm) -> None:
    """A container comes and goes."""
    container = sandbox.create_container(fake_vm.container("second"))
    container.start()
    container.remove()


def attach_and_detach(sandbox: Sandbox, fake_vm: FakeVm) -> None:
    """A disk and a network interface come and go."""
    for attachment in (sandbox.attach_block(fake_vm.disk), sandbox.attach_nic()):
        sandbox.detach(attachment)


def live(fake_vm: FakeVm, name: str) -> None:
    """All of it."""
    with start(fake_vm, name) as sandbox:
        use_everything(sandbox.container())
        make_and_remove(sandbox, fake_vm)
        attach_and_detach(sandbox, fake_vm)


def live_in_fork(document: dict[str, Any]) -> None:
    """The same in a process that shares nothing with the test but files, with a failpoint set."""
    directory, cache_root, state_root, log = (
        Path(document[key]) for key in ("directory", "cache_root", "state_root", "log")
    )
    with failpoints.armed(document["setting"]):
        live(make_fake_vm(directory, cache_root, state_root, log), document["name"])
