"""What a guest is told on its kernel command line."""

from __future__ import annotations

from pathlib import Path

from casemate.config.sandbox import SandboxConfig
from casemate.guest import GuestAssets
from casemate.hypervisor.boot import boot_assets


def assets(image: Path | None = None) -> GuestAssets:
    return GuestAssets(
        kernel=Path("/k"),
        initrd=None if image else Path("/i"),
        kernel_release="6.1",
        kernel_source="test",
        initrd_bytes=0,
        modules=(),
        agent="unknown" if image else "casemate",
        image=image,
    )


def test_boot_assets_when_initrd_then_no_root_and_the_users_words_come_last() -> None:
    boot = boot_assets(SandboxConfig(kernel_parameters=("quiet", "x=1")), assets(), "tcg", host_port=5)
    assert boot.parameters[-3:] == ("casemate.host_port=5", "quiet", "x=1")
    assert not any(word.startswith("root=") for word in boot.parameters)
    assert (boot.kernel, boot.initrd, boot.image) == ("/k", "/i", None)


def test_boot_assets_when_image_then_its_first_partition_is_the_root() -> None:
    boot = boot_assets(SandboxConfig(), assets(Path("/disk")), "kvm", host_port=5)
    assert {"root=/dev/vda1", "rootfstype=ext4", "ro", "systemd.unit=kata-containers.target"} <= set(
        boot.parameters
    )


def test_boot_assets_when_the_user_names_the_root_then_only_that_one_is_there() -> None:
    config = SandboxConfig(kernel_parameters=("root=/dev/vda",))
    boot = boot_assets(config, assets(Path("/disk")), "kvm", host_port=5)
    assert [word for word in boot.parameters if word.startswith("root=")] == ["root=/dev/vda"]


def test_boot_assets_when_debug_then_agent_and_kernel_say_more() -> None:
    boot = boot_assets(SandboxConfig(debug=True), assets(), "tcg", host_port=5)
    assert "agent.log=debug" in boot.parameters
    assert "quiet" not in boot.parameters
