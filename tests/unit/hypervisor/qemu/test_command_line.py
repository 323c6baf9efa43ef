from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casemate.config.sandbox import SandboxConfig
from casemate.hypervisor import BlockDevice, GuestAssets
from casemate.hypervisor.qemu.accel import Accelerator
from casemate.hypervisor.qemu.command_line import render_command_line
from casemate.hypervisor.qemu.options import escape, render
from casemate.hypervisor.qemu.plan import VsockChoice, make_plan

UUID = "9d5ee2ff-2f1c-4b1e-9d59-1d8ee7b6a4a1"
DISK = BlockDevice(id="c1", path="/images/a,b.erofs", serial="c1")


def command_line(
    config: SandboxConfig,
    *,
    accel: str = "tcg",
    vsock: VsockChoice | None = None,
    disks: tuple[BlockDevice, ...] = (DISK,),
    assets: GuestAssets | None = None,
) -> list[str]:
    plan = make_plan(
        config,
        sandbox_id="web",
        uuid=UUID,
        qemu="/usr/bin/qemu-system-x86_64",
        accelerator=Accelerator(name=accel, reason=""),
        assets=assets or GuestAssets(kernel="/k", initrd="/i", parameters=("console=ttyS0", 'x="y z"')),
        vsock=vsock or VsockChoice(kind="vhost-user"),
        disks=disks,
    )
    return render_command_line(plan)


def values(arguments: list[str], option: str) -> list[str]:
    return [arguments[i + 1] for i, word in enumerate(arguments) if word == option]


def test_command_line_when_q35_on_tcg_then_is_golden() -> None:
    assert command_line(SandboxConfig(vcpus=2, hotplug_ports=1)) == [
        "/usr/bin/qemu-system-x86_64",
        "-name", "sandbox-web",
        "-uuid", UUID,
        "-machine", "q35,vmport=off,smbus=off,sata=off,dump-guest-core=off,memory-backend=mem0",
        "-accel", "tcg,thread=single",
        "-cpu", "max,-erms,-fsrm",
        "-chardev", "socket,id=qmp,fd=3,server=on,wait=off",
        "-chardev", "socket,id=console,fd=4",
        "-chardev", "socket,id=vsock,fd=5",
        "-mon", "chardev=qmp,mode=control",
        "-serial", "chardev:console",
        "-m", "512M",
        "-object", "memory-backend-memfd,id=mem0,size=512M,share=on",
        "-object", "rng-random,id=rng0,filename=/dev/urandom",
        "-blockdev", "driver=raw,node-name=drive-c1,read-only=on,file.driver=file,file.filename=/images/a,,b.erofs,file.locking=off",
        "-device", "pcie-root-port,id=rp0,bus=pcie.0,addr=0x0f,chassis=1,slot=1",
        "-device", "virtio-rng-pci,id=virtio-rng0,bus=pcie.0,addr=0x01,rng=rng0",
        "-device", "vhost-user-vsock-pci,id=vsock0,bus=pcie.0,addr=0x02,chardev=vsock",
        "-device", "virtio-blk-pci,id=virtio-c1,bus=pcie.0,addr=0x03,drive=drive-c1,serial=c1,config-wce=off,share-rw=on",
        "-rtc", "base=utc,driftfix=slew,clock=host",
        "-vga", "none", "-display", "none", "-no-user-config", "-nodefaults", "-no-reboot",
        "-kernel", "/k",
        "-initrd", "/i",
        "-append", 'console=ttyS0 x="y z"',
        "-sandbox", "on,obsolete=deny,spawn=deny,resourcecontrol=deny",
        "-smp", "cpus=2,sockets=1,cores=2,threads=1,maxcpus=2",
    ]  # fmt: skip


def test_command_line_when_microvm_on_kvm_then_is_golden() -> None:
    arguments = command_line(
        SandboxConfig(machine="microvm", seccomp=False, qemu_arguments=("-S", "-d,x")),
        accel="kvm",
        vsock=VsockChoice(kind="vhost", guest_cid=77),
    )

    assert arguments == [
        "/usr/bin/qemu-system-x86_64",
        "-name", "sandbox-web",
        "-uuid", UUID,
        "-machine", "microvm,acpi=on,rtc=on,dump-guest-core=off",
        "-accel", "kvm",
        "-cpu", "host",
        "-chardev", "socket,id=qmp,fd=3,server=on,wait=off",
        "-chardev", "socket,id=console,fd=4",
        "-mon", "chardev=qmp,mode=control",
        "-serial", "chardev:console",
        "-m", "512M",
        "-object", "rng-random,id=rng0,filename=/dev/urandom",
        "-blockdev", "driver=raw,node-name=drive-c1,read-only=on,file.driver=file,file.filename=/images/a,,b.erofs,file.locking=off",
        "-device", "virtio-rng-device,id=virtio-rng0,rng=rng0",
        "-device", "vhost-vsock-device,id=vsock0,vhostfd=5,guest-cid=77",
        "-device", "virtio-blk-device,id=virtio-c1,drive=drive-c1,serial=c1,config-wce=off,share-rw=on",
        "-rtc", "base=utc,driftfix=slew,clock=host",
        "-vga", "none", "-display", "none", "-no-user-config", "-nodefaults", "-no-reboot",
        "-kernel", "/k",
        "-initrd", "/i",
        "-append", 'console=ttyS0 x="y z"',
        "-smp", "cpus=1,sockets=1,cores=1,threads=1,maxcpus=1",
        "-S", "-d,x",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "accel", "expected"),
    [
        (SandboxConfig(vcpus=1), "tcg", "tcg"),
        (SandboxConfig(vcpus=2), "tcg", "tcg,thread=single"),
        (SandboxConfig(vcpus=1, max_vcpus=2), "tcg", "tcg,thread=single"),
        (SandboxConfig(vcpus=2), "kvm", "kvm"),
    ],
)
def test_command_line_when_emulation_may_have_several_vcpus_then_they_share_a_thread(
    config: SandboxConfig, accel: str, expected: str
) -> None:
    assert values(command_line(config, accel=accel), "-accel") == [expected]


def test_command_line_when_kvm_on_q35_then_lost_timer_ticks_are_discarded_and_only_there() -> None:
    assert values(command_line(SandboxConfig(), accel="kvm"), "-global") == [
        "kvm-pit.lost_tick_policy=discard"
    ]
    assert values(command_line(SandboxConfig()), "-global") == []


def test_command_line_when_the_size_may_grow_then_leaves_room() -> None:
    arguments = command_line(SandboxConfig(vcpus=1, max_vcpus=4, memory_mib=256, max_memory_mib=1024))

    assert values(arguments, "-m") == ["256M,slots=10,maxmem=1024M"]
    assert values(arguments, "-smp") == ["cpus=1,sockets=1,cores=4,threads=1,maxcpus=4"]


def test_command_line_when_debugging_then_threads_have_names() -> None:
    assert values(command_line(SandboxConfig(debug=True)), "-name") == ["sandbox-web,debug-threads=on"]


def test_command_line_when_guest_boots_from_an_image_then_has_no_initrd() -> None:
    arguments = command_line(SandboxConfig(), assets=GuestAssets(kernel="/k", image="/g.img"))

    assert "-initrd" not in arguments
    assert "-append" not in arguments
    assert "file.filename=/g.img" in values(arguments, "-blockdev")[0]


def test_command_line_when_disk_is_writable_then_it_is_locked_and_not_shared() -> None:
    writable = BlockDevice(id="v", path="/dev/loop7", serial="v", read_only=False, host_device=True)
    arguments = command_line(SandboxConfig(), disks=(writable,))

    assert values(arguments, "-blockdev") == [
        "driver=raw,node-name=drive-v,read-only=off,file.driver=host_device,file.filename=/dev/loop7"
    ]
    assert "share-rw" not in values(arguments, "-device")[-1]


def test_command_line_when_vsock_has_a_path_then_qemu_connects_to_it() -> None:
    arguments = command_line(SandboxConfig(), vsock=VsockChoice(kind="vhost-user", path="/run/v,s.sock"))

    assert "socket,id=vsock,path=/run/v,,s.sock" in values(arguments, "-chardev")


def split_as_qemu(text: str) -> list[str]:
    """QEMU's rule: a comma ends a part unless it is doubled."""
    parts, part, i = [], "", 0
    while i < len(text):
        if text[i] == ",":
            if text[i + 1 : i + 2] != ",":
                parts.append(part)
                part = ""
                i += 1
                continue
            i += 1
        part += text[i]
        i += 1
    return [*parts, part]


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_escape_when_text_holds_anything_then_qemus_rule_gives_it_back(text: str) -> None:
    assert split_as_qemu(f"a={escape(text)}") == [f"a={text}"]


@given(
    st.lists(
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1), min_size=1
    )
)
def test_render_when_several_values_hold_commas_then_qemus_rule_tells_them_apart(texts: list[str]) -> None:
    rendered = render("h", [(f"k{i}", text) for i, text in enumerate(texts)])

    assert split_as_qemu(rendered) == ["h", *(f"k{i}={text}" for i, text in enumerate(texts))]
