"""The watch over a sandbox with a real guest: what the fake of tests/integration/sandbox/test_monitor.py can't vouch for."""

from __future__ import annotations

import os
import signal
import time

import pytest

from casemate import (
    AgentConnectionError,
    ContainerConfig,
    EventKind,
    MonitorConfig,
    Sandbox,
    SandboxConfig,
    Settings,
    TimeoutConfig,
    VmmExitedError,
)
from casemate._sync.hypervisor.qemu import Qemu

pytestmark = [pytest.mark.root, pytest.mark.qemu]


@pytest.fixture(autouse=True)
def _no_log_records(caplog: pytest.LogCaptureFixture) -> None:
    """A kept record holds its error, that holds its frames, and those hold what was made."""
    caplog.set_level("CRITICAL", logger="casemate")


def start(image: str, settings: Settings, monitor: MonitorConfig) -> Sandbox:
    config = SandboxConfig(monitor=monitor, timeouts=TimeoutConfig(stop_s=2.0))
    container = ContainerConfig(name="main", image=image, command=("cat",))
    return Sandbox.create(config, containers=(container,), start=True, settings=settings)


def test_events_when_vmm_stands_still_and_goes_on_in_time_then_the_guest_lives(
    busybox: str, settings: Settings
) -> None:
    monitor = MonitorConfig(interval_s=0.3, timeout_s=1.0, failures=1000)
    with start(busybox, settings, monitor) as sandbox:
        events = sandbox.events()
        os.kill(sandbox.vmm_pid, signal.SIGSTOP)
        first = next(events)
        assert first.kind is EventKind.UNHEALTHY
        assert "does not answer" in first.text
        os.kill(sandbox.vmm_pid, signal.SIGCONT)
        assert sandbox.container().exec(["echo", "on"], capture=True).stdout == "on\n"


def test_events_when_vmm_stands_still_for_good_then_the_agent_is_given_up(
    busybox: str, settings: Settings
) -> None:
    monitor = MonitorConfig(interval_s=0.2, timeout_s=0.5, failures=2)
    with start(busybox, settings, monitor) as sandbox:
        container, events = sandbox.container(), sandbox.events()
        os.kill(sandbox.vmm_pid, signal.SIGSTOP)
        while next(events).kind is not EventKind.AGENT_DEAD:
            pass
        given_up_at = time.monotonic()
        with pytest.raises(AgentConnectionError, match="given up"):
            container.exec(["true"], capture=True)
        assert time.monotonic() - given_up_at < 1.0
        stopped_at = time.monotonic()
    # A VMM that does not quit is killed at its deadline; nobody waits for its agent.
    assert time.monotonic() - stopped_at < 2.0 * settings.timeout_factor + 5.0


def test_events_when_the_guest_panics_then_the_kernels_words_are_told(
    busybox: str, settings: Settings
) -> None:
    config = SandboxConfig(
        monitor=MonitorConfig(interval_s=600),
        timeouts=TimeoutConfig(stop_s=2.0),
        kernel_parameters=("unknown_nmi_panic=1",),
    )
    container = ContainerConfig(name="main", image=busybox, command=("cat",))
    with Sandbox.create(config, containers=(container,), start=True, settings=settings) as sandbox:
        events, driver = sandbox.events(), sandbox._own_driver("test")
        assert isinstance(driver, Qemu)
        driver.qmp().execute("inject-nmi", timeout_s=30)
        told = list(events)
        with pytest.raises(VmmExitedError, match=r"panicked: .*NMI"):
            sandbox.container().exec(["true"], capture=True)
    assert [event.kind for event in told] == [EventKind.GUEST_PANICKED, EventKind.VMM_EXITED]
    assert "NMI" in told[0].text
