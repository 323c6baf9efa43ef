from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from casemate.errors import HostError, ResourceExhaustedError
from casemate.hypervisor import vsock


class Kernel:
    """The device's side: refuses ids that are taken."""

    def __init__(self, taken: set[int], error: int | None = None) -> None:
        self.taken = taken
        self.error = error
        self.asked: list[int] = []

    def __call__(self, fd: int, cid: bytes) -> None:
        os.fstat(fd)
        self.asked.append(int.from_bytes(cid, "little"))
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        if self.asked[-1] in self.taken:
            raise OSError(errno.EADDRINUSE, "Address already in use")


@pytest.fixture
def device(tmp_path: Path) -> str:
    path = tmp_path / "vhost-vsock"
    path.touch()
    return str(path)


def choose(numbers: Iterator[int]) -> object:
    return lambda first, last: next(numbers)


def test_reserve_cid_when_first_is_taken_then_takes_another(device: str) -> None:
    kernel = Kernel({7})

    fd, cid = vsock.reserve_cid(device, set_cid=kernel, choose=choose(iter([7, 9])))  # type: ignore[arg-type]
    os.close(fd)

    assert cid == 9
    assert kernel.asked == [7, 9]


def test_reserve_cid_when_kernel_refuses_for_another_reason_then_asks_once_and_leaks_nothing(
    device: str,
) -> None:
    kernel = Kernel(set(), errno.EPERM)
    before = os.listdir("/proc/self/fd")

    with pytest.raises(HostError) as caught:
        vsock.reserve_cid(device, set_cid=kernel)

    assert caught.value.errno == errno.EPERM
    assert len(kernel.asked) == 1
    assert os.listdir("/proc/self/fd") == before


def test_reserve_cid_when_all_are_taken_then_gives_up(device: str) -> None:
    kernel = Kernel({5})

    with pytest.raises(ResourceExhaustedError):
        vsock.reserve_cid(device, set_cid=kernel, choose=lambda first, last: 5)

    assert len(kernel.asked) == 64


def test_reserve_cid_when_chosen_by_itself_then_stays_in_range(device: str) -> None:
    fd, cid = vsock.reserve_cid(device, set_cid=Kernel(set()))
    os.close(fd)

    assert vsock.FIRST_CID <= cid <= vsock.LAST_CID


def test_reserve_cid_when_device_is_missing_then_names_it(tmp_path: Path) -> None:
    with pytest.raises(HostError) as caught:
        vsock.reserve_cid(str(tmp_path / "none"))

    assert caught.value.errno == errno.ENOENT
    assert not vsock.is_usable(str(tmp_path / "none"))
