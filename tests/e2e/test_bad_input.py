"""Input that can't be used: a typed error that says what to do, before anything is made, and nothing left."""

from __future__ import annotations

import json
import time
from pathlib import Path

import msgspec
import pytest

import casemate
from casemate import (
    CasemateError,
    ContainerConfig,
    DeadlineExceededError,
    ImageError,
    InvalidConfigError,
    NotFoundError,
    Sandbox,
    SandboxConfig,
    Settings,
    TimeoutConfig,
    UnsupportedError,
    VmmExitedError,
    guest,
)
from casemate.bench.floor import byte_program
from casemate.guest import cpio

pytestmark = [pytest.mark.root, pytest.mark.qemu]

LOOPS_FOR_EVER = byte_program(bytes.fromhex("ebfe"))
ENDS_AT_ONCE = byte_program(bytes.fromhex("b83c000000bf070000000f05"))


def archive(init: bytes) -> bytes:
    return cpio.write(
        [cpio.directory("dev"), cpio.node("dev/console", 0o600, 5, 1), cpio.file("init", init, 0o755)]
    )


def made_nothing(settings: Settings) -> bool:
    sandboxes = settings.state_root / "sandboxes"
    return not sandboxes.exists() or not list(sandboxes.iterdir())


def refused(
    settings: Settings, kind: type[CasemateError], image: str, config: SandboxConfig | None = None
) -> CasemateError:
    started = time.monotonic()
    with pytest.raises(kind) as caught:
        casemate.run(image, ["true"], config=config, settings=settings)
    assert time.monotonic() - started < 10
    assert made_nothing(settings)
    return caught.value


@pytest.mark.parametrize(
    "reference", ["oci:/nonexistent", "docker-archive:/nonexistent.tar", "no-such-image"]
)
def test_run_when_image_is_unknown_then_not_found(settings: Settings, reference: str) -> None:
    error = refused(settings, NotFoundError, reference)
    assert reference.partition(":")[2] in str(error) or reference in str(error)


@pytest.mark.parametrize("reference", ["", "oci:", "ftp:/x"])
def test_run_when_reference_has_no_meaning_then_refused(settings: Settings, reference: str) -> None:
    refused(settings, CasemateError, reference)


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_run_when_a_layer_is_damaged_then_its_digest_is_named(
    fresh_layout: Path, settings: Settings, damage: str
) -> None:
    layout = fresh_layout
    index = json.loads((layout / "index.json").read_text())
    manifest = json.loads(blob(layout, index["manifests"][0]["digest"]).read_text())
    digest = manifest["layers"][0]["digest"]
    file = blob(layout, digest)
    data = bytearray(file.read_bytes())
    file.write_bytes(data[: len(data) // 2] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    error = refused(settings, ImageError, f"oci:{layout}")
    assert digest in str(error)


def blob(layout: Path, digest: str) -> Path:
    return layout / "blobs" / digest.replace(":", "/")


@pytest.mark.parametrize("what", ["kernel", "initrd"])
@pytest.mark.parametrize("content", [None, b"", b"not one", b"\x7fELF" + bytes(60)])
def test_run_when_kernel_or_initrd_cannot_be_one_then_the_file_is_named(
    busybox: str, settings: Settings, tmp_path: Path, what: str, content: bytes | None
) -> None:
    path = tmp_path / what
    if content is not None:
        path.write_bytes(content)
    config = msgspec.structs.replace(SandboxConfig(), **{what: str(path)})
    error = refused(settings, CasemateError, busybox, config)
    assert isinstance(error, (InvalidConfigError, NotFoundError))
    assert str(path) in str(error)


def test_run_when_kernel_is_cut_short_then_refused(busybox: str, settings: Settings, tmp_path: Path) -> None:
    whole = guest.resolve(None, None, machine="q35", settings=settings).kernel
    path = tmp_path / "vmlinux"
    path.write_bytes(Path(whole).read_bytes()[:1_000_000])
    assert str(path) in str(refused(settings, InvalidConfigError, busybox, SandboxConfig(kernel=str(path))))


def test_run_when_qemu_is_missing_then_the_cure_is_told(busybox: str, settings: Settings) -> None:
    error = refused(settings, CasemateError, busybox, SandboxConfig(qemu_path="/nonexistent/qemu"))
    assert isinstance(error, (NotFoundError, UnsupportedError))
    assert "/nonexistent/qemu" in str(error)


def test_run_when_qemu_is_too_old_then_versions_are_told(
    busybox: str, settings: Settings, tmp_path: Path
) -> None:
    old = tmp_path / "qemu-system-x86_64"
    old.write_text("#!/bin/sh\necho 'QEMU emulator version 4.2.1'\n")
    old.chmod(0o755)
    error = refused(settings, UnsupportedError, busybox, SandboxConfig(qemu_path=str(old)))
    assert "4.2" in str(error) and "5" in str(error)


def test_run_when_qemu_rejects_an_option_then_its_words_come_within_a_second(
    busybox: str, settings: Settings
) -> None:
    casemate.run(busybox, ["true"], settings=settings)
    started = time.monotonic()
    with pytest.raises(VmmExitedError) as caught:
        casemate.run(
            busybox, ["true"], config=SandboxConfig(qemu_arguments=("-no-such-option",)), settings=settings
        )
    assert time.monotonic() - started < 1.0 * settings.timeout_factor + 0.5
    assert "no-such-option" in str(caught.value)
    assert "no-such-option" in caught.value.log_tail
    assert made_nothing(settings)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (SandboxConfig, "vcpus", 0),
        (SandboxConfig, "vcpus", 10_000),
        (SandboxConfig, "memory_mib", 1),
        (SandboxConfig, "name", ""),
        (SandboxConfig, "name", "a/b"),
        (SandboxConfig, "name", "../up"),
        (SandboxConfig, "machine", "pc"),
        (ContainerConfig, "name", "a b"),
        (ContainerConfig, "cwd", "relative"),
    ],
)
def test_config_when_a_value_has_no_meaning_then_its_place_is_named(
    settings: Settings, kind: type[SandboxConfig | ContainerConfig], field: str, value: object
) -> None:
    given = {"image": "oci:x"} if kind is ContainerConfig else {}
    with pytest.raises(InvalidConfigError) as caught:
        kind(**given, **{field: value})  # type: ignore[arg-type]
    assert caught.value.path == field
    assert made_nothing(settings)


def test_run_when_memory_is_larger_than_the_hosts_then_refused(busybox: str, settings: Settings) -> None:
    error = refused(settings, InvalidConfigError, busybox, SandboxConfig(memory_mib=8 << 20))
    assert isinstance(error, InvalidConfigError) and error.path == "memory_mib"


def test_run_when_user_is_unknown_then_refused(busybox: str, settings: Settings) -> None:
    with pytest.raises(InvalidConfigError, match="nobody-here"):
        casemate.run(busybox, ["true"], user="nobody-here", settings=settings)
    assert made_nothing(settings)


def test_create_when_the_agent_never_answers_then_deadline_and_console_are_told(
    settings: Settings, tmp_path: Path
) -> None:
    initrd = tmp_path / "loops.img"
    initrd.write_bytes(archive(LOOPS_FOR_EVER))
    config = SandboxConfig(initrd=str(initrd), timeouts=TimeoutConfig(boot_s=4.0))
    with pytest.raises(DeadlineExceededError, match="agent did not answer") as caught:
        Sandbox.create(config, settings=settings)
    assert caught.value.deadline_s == pytest.approx(4.0 * settings.timeout_factor)
    assert made_nothing(settings)


def test_create_when_the_guest_panics_then_the_panic_is_in_the_error(
    settings: Settings, tmp_path: Path
) -> None:
    initrd = tmp_path / "panics.img"
    initrd.write_bytes(archive(ENDS_AT_ONCE))
    with pytest.raises(VmmExitedError, match=r"panicked.*Attempted to kill init"):
        Sandbox.create(SandboxConfig(initrd=str(initrd)), settings=settings)
    assert made_nothing(settings)


def test_create_when_accelerator_is_not_there_then_the_reason_is_told(settings: Settings) -> None:
    with pytest.raises(UnsupportedError) as caught:
        Sandbox.create(SandboxConfig(accel="kvm"), settings=settings)
    assert caught.value.capability == "kvm"
    assert made_nothing(settings)
