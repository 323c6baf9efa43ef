"""The host's kernel, on trees of files as ``proc`` and ``sys`` have them."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from casemate.host import kernel
from casemate.hypervisor.host import HostFacts


def write(root: Path, **files: str) -> Path:
    """Files below ``root``; ``__`` in a name stands for a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def facts(*flags: str, vendor: str = "GenuineIntel") -> HostFacts:
    return HostFacts(memory_mib=1, cpu_flags=frozenset(flags), kvm_error="", pvm=False, cpu_vendor=vendor)


def modules(root: Path) -> Path:
    directory = root / "lib/modules/6.1"
    directory.mkdir(parents=True)
    (directory / "modules.builtin").write_text("kernel/drivers/net/tun.ko\n")
    (directory / "modules.dep").write_text(
        "kernel/drivers/vhost/vhost.ko.xz:\nkernel/drivers/vhost/vhost-net.ko.xz: kernel/drivers/vhost/vhost.ko.xz\n"
    )
    (root / "sys/module/vhost").mkdir(parents=True)
    (root / "sys/class/misc/vhost-vsock").mkdir(parents=True)
    return root


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("tun", "built in"),
        ("vhost", "loaded"),
        ("vhost_net", "available"),
        ("vhost_vsock", "built in"),
        ("ifb", "missing"),
        ("host", "missing"),
    ],
)
def test_module_state_then_follows_the_kernels_lists(name: str, state: str, tmp_path: Path) -> None:
    assert kernel.module_state(name, modules(tmp_path), "6.1") == state


def test_module_state_when_kernel_has_no_lists_then_is_unknown(tmp_path: Path) -> None:
    assert kernel.module_state("ifb", tmp_path, "6.1") == "unknown"


def test_modules_then_what_can_be_loaded_is_named_as_the_cure(tmp_path: Path) -> None:
    found = kernel.find_modules(facts("vmx"), modules(tmp_path), "6.1")

    assert found.state == "partly"
    assert found.cure.startswith("modprobe vhost_net,")
    assert "not in this kernel: kvm, erofs, ifb, kvm_intel" in found.text


@pytest.mark.parametrize(
    ("vendor", "flags", "state", "text"),
    [
        ("GenuineIntel", ("vmx", "lm", "sse4_1"), "yes", "GenuineIntel: vmx"),
        ("AuthenticAMD", ("svm", "lm", "sse4_1"), "yes", "AuthenticAMD: svm"),
        ("", ("svm", "lm", "sse4_1"), "yes", "unknown maker: svm"),
        ("GenuineIntel", ("vmx",), "partly", "GenuineIntel: vmx, without lm and sse4_1"),
        ("GenuineIntel", ("lm", "sse4_1"), "no", "GenuineIntel: neither vmx nor svm"),
    ],
)
def test_cpu_then_maker_and_flags_are_told(
    vendor: str, flags: tuple[str, ...], state: str, text: str
) -> None:
    found = kernel.find_cpu(facts(*flags, vendor=vendor))

    assert (found.state, found.text) == (state, text)


@pytest.mark.parametrize(
    ("files", "protection"),
    [
        ({}, "none"),
        ({"sys__module__kvm_intel__parameters__tdx": "Y\n"}, "tdx"),
        ({"sys__module__kvm_intel__parameters__tdx": "N\n"}, "none"),
        ({"sys__module__kvm_amd__parameters__sev_snp": "Y\n", "sys__module__kvm_amd__parameters__sev": "Y\n"}, "snp"),
        ({"sys__module__kvm_amd__parameters__sev_snp": "N\n", "sys__module__kvm_amd__parameters__sev": "1\n"}, "sev"),
    ],
)  # fmt: skip
def test_protection_when_x86_then_by_module_parameters(
    files: dict[str, str], protection: str, tmp_path: Path
) -> None:
    assert kernel.read_protection(write(tmp_path, **files), "x86_64") == protection


def test_protection_when_arm_then_kvm_is_asked(tmp_path: Path) -> None:
    # A file in the device's place: the question can't be asked of it.
    assert kernel.read_protection(write(tmp_path, dev__kvm=""), "aarch64") == "none"
    assert kernel.read_protection(tmp_path / "absent", "aarch64") == "none"


def test_protection_when_arm_and_kvm_has_realms_then_cca(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def answer(fd: int, request: int, argument: int = 0) -> int:
        asked.append((request, argument))
        return 1

    monkeypatch.setattr(fcntl, "ioctl", answer)

    assert kernel.read_protection(write(tmp_path, dev__kvm=""), "aarch64") == "cca"
    assert asked == [(0xAE03, 240)]


def test_protection_when_power_then_by_the_ultravisor(tmp_path: Path) -> None:
    assert kernel.read_protection(tmp_path, "ppc64le") == "none"
    (tmp_path / "sys/firmware/ultravisor").mkdir(parents=True)
    assert kernel.read_protection(tmp_path, "ppc64le") == "pef"


@pytest.mark.parametrize(
    ("facilities", "cmdline", "protection"),
    [
        ("1 2 158", "ro prot_virt=1", "se"),
        ("1 2 158", "prot_virt=on quiet", "se"),
        ("1 2 158", "prot_virt=0", "none"),
        ("1 2 158", "quiet", "none"),
        ("1 2 1580", "prot_virt=1", "none"),
        ("1 2", "prot_virt=1", "none"),
    ],
)
def test_protection_when_z_then_facility_and_command_line_must_agree(
    facilities: str, cmdline: str, protection: str, tmp_path: Path
) -> None:
    root = write(
        tmp_path, proc__cpuinfo=f"vendor_id : IBM/S390\nfacilities : {facilities}\n", proc__cmdline=cmdline
    )

    assert kernel.read_protection(root, "s390x") == protection


def test_protection_when_there_is_none_then_the_finding_says_no(tmp_path: Path) -> None:
    assert kernel.find_protection(tmp_path, "riscv64").state == "no"
    assert kernel.find_protection(
        write(tmp_path, sys__module__kvm_intel__parameters__tdx="Y"), "x86_64"
    ).facts == {"kind": "tdx"}


def test_nesting_then_tells_both_directions(tmp_path: Path) -> None:
    root = write(tmp_path, sys__module__kvm_intel__parameters__nested="Y\n")

    inside = kernel.find_nesting(facts("hypervisor"), root)
    outside = kernel.find_nesting(facts("vmx"), tmp_path / "absent")

    assert inside.facts == {"is_guest": True, "nested": {"kvm_intel": True}}
    assert "its guests can virtualise too" in inside.text
    assert outside.facts == {"is_guest": False, "nested": {}}


@pytest.mark.parametrize(
    ("text", "numbers"), [("0-3,8", [0, 1, 2, 3, 8]), ("5\n", [5]), ("", []), ("x,2-", []), ("1,a-3", [1])]
)
def test_cpu_list_then_ranges_are_spelt_out(text: str, numbers: list[int]) -> None:
    assert kernel.parse_cpu_list(text) == numbers


def test_numa_then_each_node_has_cpus_memory_and_distances(tmp_path: Path) -> None:
    base = "sys__devices__system__node__"
    root = write(
        tmp_path,
        **{
            f"{base}online": "0,2\n",
            f"{base}node0__cpulist": "0-1\n",
            f"{base}node0__meminfo": "Node 0 MemTotal:       2097152 kB\n",
            f"{base}node0__distance": "10 21\n",
            f"{base}node2__cpulist": "2-3\n",
            f"{base}node2__meminfo": "",
            f"{base}node2__distance": "21 10\n",
        },
    )

    assert kernel.read_nodes(root) == [
        {"node": 0, "cpus": [0, 1], "memory_mib": 2048, "distances": [10, 21]},
        {"node": 2, "cpus": [2, 3], "memory_mib": 0, "distances": [21, 10]},
    ]
    assert kernel.find_numa(root).text == "2 nodes"
    assert kernel.find_numa(tmp_path / "absent").state == "no"


@pytest.mark.parametrize(("value", "state"), [("1\n", "yes"), ("2\n", "yes"), ("0\n", "partly")])
def test_bpf_jit_when_off_then_the_cure_turns_it_on(value: str, state: str, tmp_path: Path) -> None:
    found = kernel.find_bpf_jit(write(tmp_path, proc__sys__net__core__bpf_jit_enable=value))

    assert found.state == state
    assert bool(found.cure) == (state == "partly")
