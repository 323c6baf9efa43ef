"""Context ids and connections of the kernel's own vsock."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator

import pytest

from casemate import ContainerConfig, ResourceExhaustedError, Sandbox, SandboxConfig, Settings
from casemate.hypervisor import vsock

pytestmark = [pytest.mark.root, pytest.mark.vhost_vsock]

TAKEN = 7001


def choose(numbers: Iterator[int]) -> Callable[[int, int], int]:
    return lambda first, last: next(numbers)


@pytest.fixture
def taken() -> Iterator[int]:
    """A context id that another VM holds."""
    fd, cid = vsock.reserve_cid(choose=choose(iter([TAKEN])))
    yield cid
    os.close(fd)


@pytest.mark.lab_smoke
def test_reserve_cid_when_the_id_is_in_use_then_takes_the_next(taken: int) -> None:
    fd, cid = vsock.reserve_cid(choose=choose(iter([taken, taken, taken + 1])))
    os.close(fd)
    assert cid == taken + 1


@pytest.mark.lab_smoke
def test_reserve_cid_when_all_are_in_use_then_gives_up(taken: int) -> None:
    with pytest.raises(ResourceExhaustedError):
        vsock.reserve_cid(choose=choose(itertools.repeat(taken)))


@pytest.mark.lab_smoke
def test_reserve_cid_when_its_descriptor_is_closed_then_the_id_is_free_again(taken: int) -> None:
    first, _ = vsock.reserve_cid(choose=choose(iter([taken + 1])))
    os.close(first)
    second, cid = vsock.reserve_cid(choose=choose(iter([taken + 1])))
    os.close(second)
    assert cid == taken + 1


@pytest.mark.lab_smoke
def test_reserve_cid_when_eight_race_for_the_same_ids_then_each_has_its_own() -> None:
    together = threading.Barrier(8)
    got: list[tuple[int, int]] = []

    def race() -> None:
        together.wait()
        got.append(vsock.reserve_cid(choose=choose(iter(range(TAKEN, TAKEN + 8)))))

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for fd, _ in got:
        os.close(fd)
    assert sorted(cid for _, cid in got) == list(range(TAKEN, TAKEN + 8))


@pytest.mark.qemu
@pytest.mark.kvm
def test_reserve_cid_when_a_sandbox_holds_the_id_then_it_is_taken_until_the_sandbox_ends(
    busybox: str, settings: Settings
) -> None:
    container = ContainerConfig(image=busybox, command=("cat",))
    with Sandbox.create(SandboxConfig(), containers=(container,), start=True, settings=settings) as sandbox:
        cid = int(sandbox.agent_url.removeprefix("vsock://").partition(":")[0])
        fd, other = vsock.reserve_cid(choose=choose(iter([cid, TAKEN])))
        os.close(fd)
        assert other == TAKEN
    fd, again = vsock.reserve_cid(choose=choose(iter([cid])))
    os.close(fd)
    assert again == cid
