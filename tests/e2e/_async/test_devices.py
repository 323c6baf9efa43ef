"""Devices that are attached to a running guest and used there, on both faces."""

from __future__ import annotations

from pathlib import Path

import pytest

from casemate import (
    AsyncSandbox,
    ContainerConfig,
    InvalidConfigError,
    InvalidStateError,
    NotFoundError,
    ResourceExhaustedError,
    SandboxConfig,
    Settings,
    UnsupportedError,
)
from casemate.agent import messages
from tests.support.netns import links, network_namespace

pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.tun, pytest.mark.busybox]

# Containers get no nodes of the sandbox's devices by themselves.
OPEN_NODE = 'set -e; IFS=: read major minor < "/sys/block/$1/dev"; mknod /tmp/node b $major $minor; '


def looping(image: str) -> ContainerConfig:
    """A container whose first process waits for its input to end."""
    return ContainerConfig(name="main", image=image, command=("cat",))


def make_image(path: Path) -> Path:
    path.write_bytes(b"from the host" + bytes((1 << 20) - 13))
    return path


async def test_attach_block_when_the_guest_reads_and_writes_then_the_file_has_it(
    busybox: str, settings: Settings, tmp_path: Path
) -> None:
    image = make_image(tmp_path / "disk.img")
    async with await AsyncSandbox.create(
        containers=(looping(busybox),), start=True, settings=settings
    ) as sandbox:
        disk = await sandbox.attach_block(image, discard=True)
        assert disk.device == "/dev/vdb"
        script = (
            OPEN_NODE
            + "head -c 13 /tmp/node; printf guest | dd of=/tmp/node bs=512 seek=1 conv=notrunc,fsync"
        )
        main = sandbox.container()

        result = await main.exec(["sh", "-c", script, "sh", "vdb"], capture=True)

        assert (result.exit_code, result.stdout) == (0, "from the host")
        assert image.read_bytes()[512:517] == b"guest"
        await sandbox.detach(disk)
        assert (await main.exec(["ls", "/sys/block/vdb"], capture=True)).exit_code != 0
        again = await sandbox.attach_block(image, readonly=True)
        refused = await main.exec(["sh", "-c", "echo x > /tmp/node"], capture=True)
        assert refused.exit_code != 0
        assert sandbox.attachments == sandbox.inspect().devices == (again,)


async def test_attach_nic_when_frames_are_sent_then_they_come_out_of_the_tap(
    busybox: str, settings: Settings
) -> None:
    with network_namespace() as namespace:
        async with await AsyncSandbox.create(
            containers=(looping(busybox),), start=True, settings=settings
        ) as sandbox:
            nic = await sandbox.attach_nic(mac="02:00:00:00:00:05", netns=namespace)
            assert (nic.interface, nic.tap, list(links(namespace))) == ("eth0", "cm0", ["cm0"])
            before = received_packets(namespace)

            await send_frames(sandbox, "eth0")

            assert received_packets(namespace) > before
            await sandbox.detach(nic.id)
            assert links(namespace) == {}
            assert sandbox.attachments == ()


async def send_frames(sandbox: AsyncSandbox, interface: str) -> None:
    """With a capability that containers have only by their specification."""
    script = f"ip link set {interface} up && ip address add 192.0.2.1/24 dev {interface} && "
    script += f"arping -c 2 -w 3 -I {interface} 192.0.2.2; ip link show {interface}"
    capabilities = ("CAP_NET_ADMIN", "CAP_NET_RAW")
    process = messages.ProcessSpec(
        args=("/bin/sh", "-c", script),
        env=("PATH=/bin",),
        capabilities=messages.LinuxCapabilities(
            bounding=capabilities, effective=capabilities, permitted=capabilities
        ),
    )
    agent = sandbox._running_agent("test")
    await agent.call(
        "ExecProcess", messages.ExecProcessRequest(container_id="main", exec_id="net", process=process)
    )
    request = messages.WaitProcessRequest(container_id="main", exec_id="net")
    answer = await agent.ask("WaitProcess", request, messages.WaitProcessResponse)
    assert answer.status == 0


def received_packets(namespace: str) -> int:
    return int(links(namespace)["cm0"]["stats64"]["rx"]["packets"])


async def test_attach_when_bridges_are_asked_for_then_devices_come_behind_them(
    busybox: str, settings: Settings, tmp_path: Path
) -> None:
    image = make_image(tmp_path / "disk.img")
    config = SandboxConfig(hotplug_ports=1, hotplug_bridges=1)
    async with await AsyncSandbox.create(config, settings=settings) as sandbox:
        disks = [await sandbox.attach_block(image, readonly=True) for _ in range(4)]

        assert [(disk.pci_path, disk.device) for disk in disks] == [
            ("0f/00", "/dev/vda"),
            ("10/00/01", "/dev/vdb"),
            ("10/00/02", "/dev/vdc"),
            ("10/00/03", "/dev/vdd"),
        ]
        await sandbox.detach(disks[2])
        assert (await sandbox.attach_block(image, readonly=True)).pci_path == "10/00/02"
        for disk in sandbox.attachments:
            await sandbox.detach(disk)


async def test_attach_when_it_can_not_be_then_refused_before_anything_is_made(
    settings: Settings, tmp_path: Path
) -> None:
    image = make_image(tmp_path / "disk.img")
    (tmp_path / "empty").touch()
    async with await AsyncSandbox.create(SandboxConfig(hotplug_ports=1), settings=settings) as sandbox:
        for path, error in (
            (tmp_path / "missing", NotFoundError),
            (tmp_path, InvalidConfigError),
            (tmp_path / "empty", InvalidConfigError),
            (Path("/dev/null"), InvalidConfigError),
        ):
            with pytest.raises(error):
                await sandbox.attach_block(path)
        with pytest.raises(InvalidConfigError, match="six pairs"):
            await sandbox.attach_nic(mac="02:00")
        with pytest.raises(NotFoundError, match="there are: none"):
            await sandbox.detach("disk0")
        assert sandbox.inspect().topology.places() == {}

        disk = await sandbox.attach_block(image)
        with pytest.raises(ResourceExhaustedError, match="all 1 places are taken"):
            await sandbox.attach_block(image)
        await sandbox.pause()
        with pytest.raises(InvalidStateError, match="is paused"):
            await sandbox.detach(disk)
        await sandbox.resume()
        other = await AsyncSandbox.attach(sandbox.id, settings=settings)
        assert other.attachments == (disk,)
        with pytest.raises(InvalidStateError, match="owns"):
            await other.attach_block(image)
        await other.aclose()
    with pytest.raises(InvalidStateError):
        await sandbox.detach(disk)


async def test_attach_when_the_machine_is_microvm_then_unsupported(
    settings: Settings, tmp_path: Path
) -> None:
    image = make_image(tmp_path / "disk.img")
    async with await AsyncSandbox.create(SandboxConfig(machine="microvm"), settings=settings) as sandbox:
        with pytest.raises(UnsupportedError, match="use machine 'q35'") as caught:
            await sandbox.attach_block(image)
        assert caught.value.capability == "hotplug"
