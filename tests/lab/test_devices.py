"""Devices that come to a guest on KVM and go again, and the check that boots one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from casemate import ContainerConfig, Sandbox, Settings
from tests.support.netns import links, network_namespace

pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.kvm, pytest.mark.vhost_vsock]

READ_AND_WRITE = """
set -e
IFS=: read major minor < /sys/block/vdb/dev
mknod /tmp/node b $major $minor
head -c 13 /tmp/node
printf guest | dd of=/tmp/node bs=512 seek=1 conv=notrunc,fsync
"""


@pytest.mark.tun
def test_attach_when_sandbox_runs_on_kvm_then_disk_and_nic_are_seen_and_go_again(
    busybox: str, settings: Settings, tmp_path: Path
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"from the host" + bytes((1 << 20) - 13))
    container = ContainerConfig(name="main", image=busybox, command=("cat",))
    with (
        network_namespace() as namespace,
        Sandbox.create(containers=(container,), start=True, settings=settings) as sandbox,
    ):
        main = sandbox.container()
        disk = sandbox.attach_block(image)
        assert disk.device == "/dev/vdb"
        used = main.exec(["sh", "-c", READ_AND_WRITE], capture=True)
        assert (used.exit_code, used.stdout) == (0, "from the host")
        assert image.read_bytes()[512:517] == b"guest"

        nic = sandbox.attach_nic(mac="02:00:00:00:00:05", netns=namespace)
        assert (nic.interface, list(links(namespace))) == ("eth0", [nic.tap])

        sandbox.detach(disk)
        sandbox.detach(nic)
        assert main.exec(["ls", "/sys/block/vdb"], capture=True).exit_code != 0
        assert links(namespace) == {}
        assert sandbox.attachments == ()


@pytest.mark.timeout(600)
def test_check_when_booted_on_kvm_then_a_guest_proves_it(settings: Settings) -> None:
    command = [sys.executable, "-m", "casemate", "check", "--boot", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["ok"], document["accelerator"]) == (True, "kvm")
    assert ("kvm", True) in [(one["accel"], one["up"]) for one in document["boot"]["attempts"]]
