# Made by scripts/unasync.py from tests/e2e/_async/test_processes.py; do not edit.
"""Processes in a container: who they are, where they are, and streams that nobody reads or that are half closed."""

from __future__ import annotations

import pytest

from casemate import Sandbox, ContainerConfig, DeadlineExceededError, Settings

pytestmark = [pytest.mark.root, pytest.mark.qemu]

WHO = ["sh", "-c", "echo $(id -un):$(id -gn) $(pwd) $GIVEN"]


def test_processes_when_several_run_then_each_has_its_user_place_and_streams(
    busybox: str, settings: Settings
) -> None:
    config = ContainerConfig(image=busybox, command=("cat",))
    with Sandbox.create(containers=(config,), start=True, settings=settings) as sandbox:
        container = sandbox.container()
        by_name = container.exec(
            WHO, capture=True, user="nobody:nogroup", cwd="/tmp", env={"GIVEN": "a b"}
        )
        assert by_name.stdout == "nobody:nogroup /tmp a b\n"
        only_user = container.exec(["sh", "-c", "echo $(id -u) $(id -g)"], capture=True, user="nobody")
        assert only_user.stdout == "65534 65534\n"

        # One that writes and is not read stands still; the others do not.
        stalled = container.exec(["head", "-c", "8000000", "/dev/zero"])
        for number in range(3):
            assert (container.exec(["echo", str(number)], capture=True)).stdout == f"{number}\n"
        with pytest.raises(DeadlineExceededError):
            stalled.wait(0.5)
        assert len(stalled.stdout.read_all()) == 8_000_000
        assert stalled.wait(60) == 0

        # Its input ends, its output goes on: what it sorted comes after the end.
        sorting = container.exec(["sort"])
        sorting.stdin.write(b"b\na\n")
        sorting.stdin.close()
        assert sorting.stdout.read_all() == b"a\nb\n"
        assert sorting.wait(60) == 0
