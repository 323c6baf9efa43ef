"""What is asked of VMM and agent, and in which order, on fakes that note it."""

from __future__ import annotations

from casemate import Sandbox
from tests.support.fake_vm import FakeVm


def test_create_when_all_goes_well_then_vmm_and_agent_are_asked_in_order(fake_vm: FakeVm) -> None:
    with Sandbox.create(
        fake_vm.config("ordered"), containers=(fake_vm.container(),), start=True, settings=fake_vm.settings
    ) as sandbox:
        assert sandbox.container().exec(["echo", "there"], capture=True).stdout == "there\n"
    assert fake_vm.asked() == [
        "start",
        "CreateSandbox",
        "GetGuestDetails",
        "CreateContainer",
        "StartContainer",
        "ReadStdout",
        "ExecProcess",
        "ReadStdout",
        "ReadStderr",
        "CloseStdin",
        "ReadStdout",
        "WaitProcess",
        "DestroySandbox",
        "qmp_capabilities",
        "quit",
    ]
