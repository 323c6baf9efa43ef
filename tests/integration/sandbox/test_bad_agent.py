"""An agent that answers what it should not: told within the deadline, and the sandbox can be ended."""

from __future__ import annotations

import time

import pytest

from casemate import AgentRpcError, DeadlineExceededError, Sandbox, TimeoutConfig
from tests.support.fake_vm import FakeVm

pytestmark = pytest.mark.root

# Bytes that are no frame, and a frame larger than any, are skipped: the request they should have answered ends by itself.
REQUEST_S = 1.0


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("garbage", DeadlineExceededError),
        ("length", AgentRpcError),
        ("stream", DeadlineExceededError),
        ("trickle", DeadlineExceededError),
        ("silence", DeadlineExceededError),
        ("refuse", AgentRpcError),
    ],
)
def test_exec_when_the_agents_answer_is_no_answer_then_told_in_time_and_the_sandbox_ends(
    fake_vm: FakeVm, fault: str, kind: type[Exception]
) -> None:
    fake_vm.script["faults"] = {"ExecProcess": fault}
    config = fake_vm.config("bad-agent", timeouts=TimeoutConfig(request_s=REQUEST_S, stop_s=2.0))
    with Sandbox.create(
        config, containers=(fake_vm.container(),), start=True, settings=fake_vm.settings
    ) as sandbox:
        started = time.monotonic()
        with pytest.raises(kind):
            sandbox.container().exec(["true"])
        # A broken connection is explained first: the VMM is given two seconds to have ended.
        assert time.monotonic() - started < REQUEST_S * fake_vm.settings.timeout_factor + 3
        stopped = time.monotonic()
    assert time.monotonic() - stopped < 2 * 2.0 * fake_vm.settings.timeout_factor + 3
    assert list((fake_vm.settings.state_root / "sandboxes").iterdir()) == []
