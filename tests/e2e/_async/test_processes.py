"""Processes in a container: who they are, where they are, and streams that nobody reads or that are half closed."""

from __future__ import annotations

import pytest

from casemate import AsyncSandbox, ContainerConfig, DeadlineExceededError, Settings

pytestmark = [pytest.mark.root, pytest.mark.qemu]

WHO = ["sh", "-c", "echo $(id -un):$(id -gn) $(pwd) $GIVEN"]


async def test_processes_when_several_run_then_each_has_its_user_place_and_streams(
    busybox: str, settings: Settings
) -> None:
    config = ContainerConfig(image=busybox, command=("cat",))
    async with await AsyncSandbox.create(containers=(config,), start=True, settings=settings) as sandbox:
        container = sandbox.container()
        by_name = await container.exec(
            WHO, capture=True, user="nobody:nogroup", cwd="/tmp", env={"GIVEN": "a b"}
        )
        assert by_name.stdout == "nobody:nogroup /tmp a b\n"
        only_user = await container.exec(["sh", "-c", "echo $(id -u) $(id -g)"], capture=True, user="nobody")
        assert only_user.stdout == "65534 65534\n"

        # One that writes and is not read stands still; the others do not.
        stalled = await container.exec(["head", "-c", "8000000", "/dev/zero"])
        for number in range(3):
            assert (await container.exec(["echo", str(number)], capture=True)).stdout == f"{number}\n"
        with pytest.raises(DeadlineExceededError):
            await stalled.wait(0.5)
        assert len(await stalled.stdout.read_all()) == 8_000_000
        assert await stalled.wait(60) == 0

        # Its input ends, its output goes on: what it sorted comes after the end.
        sorting = await container.exec(["sort"])
        await sorting.stdin.write(b"b\na\n")
        await sorting.stdin.aclose()
        assert await sorting.stdout.read_all() == b"a\nb\n"
        assert await sorting.wait(60) == 0
