"""Sandboxes on the fake VMM: the real driver with a fake QEMU, or the mock driver; and what the fake was asked."""

from __future__ import annotations

import json
import os
import shlex
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from casemate import ContainerConfig, SandboxConfig, Settings, TimeoutConfig
from casemate.bench.layout import write_layout
from casemate.hypervisor import fake
from tests.support.tiny_guest import write_tiny_kernel

__all__ = ["FakeVm", "make_fake_vm"]


@dataclass(frozen=True, kw_only=True)
class FakeVm:
    """What sandboxes on the fake VMM are made from.

    Attributes:
        settings: With a cache that holds their kernel and image, and a state root of the test's own.
        qemu: The fake QEMU. kernel: A kernel that is never run. image: Reference of an image of one file.
        log: Where the fake notes what it was asked.
    """

    settings: Settings
    qemu: Path
    kernel: Path
    image: str
    log: Path
    script: dict[str, Any] = field(default_factory=dict)

    def config(self, name: str | None = None, *, hypervisor: str = "qemu", **values: Any) -> SandboxConfig:
        """A sandbox on the fake; ``values`` go to its configuration."""
        script = json.dumps({"log": str(self.log), **self.script, **values.pop("script", {})})
        return SandboxConfig(
            **{
                "name": name,
                "hypervisor": hypervisor,
                "accel": "tcg",
                "memory_mib": 64,
                "kernel": str(self.kernel),
                "qemu_path": str(self.qemu),
                "qemu_arguments": ("-fake", script),
                "timeouts": TimeoutConfig(stop_s=2.0),
                **values,
            }
        )

    def container(self, name: str = "main", *command: str) -> ContainerConfig:
        """A container; without a command one that echoes its input."""
        return ContainerConfig(name=name, image=self.image, command=command or ("cat",))

    @property
    def disk(self) -> Path:
        """A raw image of 1 MiB."""
        return self.kernel.parent / "disk.img"

    def entries(self) -> list[dict[str, Any]]:
        """What the fake noted, in order."""
        return [json.loads(line) for line in self.log.read_text("utf-8").splitlines()]

    def asked(self) -> list[str]:
        """Names of the QMP commands and requests to the agent, in order."""
        entries = self.entries()
        return [entry.get("qmp") or entry.get("rpc") or "start" for entry in entries]

    def forget(self) -> None:
        """Empty the notes."""
        self.log.unlink(missing_ok=True)


def make_fake_qemu(directory: Path) -> Path:
    """A program that takes QEMU's place."""
    path = directory / "fake-qemu"
    path.write_text(f'#!/bin/sh\nexec {shlex.join(fake.command())} "$@"\n')
    path.chmod(0o755)
    return path


def make_image(directory: Path) -> str:
    """Reference of an image with one file."""
    (directory / "file").write_bytes(b"one file\n")
    with tarfile.open(directory / "layer.tar", "w") as archive:
        archive.add(directory / "file", "file")
    write_layout(
        directory / "layout", directory / "layer.tar", tag="light", command=["cat"], environment=["A=1"]
    )
    return f"oci:{directory / 'layout'}"


def make_fake_vm(directory: Path, cache_root: Path, state_root: Path, log: Path) -> FakeVm:
    """Everything at once, in ``directory``; made anew only when it is not there."""
    if not (directory / "fake-qemu").exists():
        make_fake_qemu(directory)
        write_tiny_kernel(directory / "kernel", "never run")
        make_image(directory)
        (directory / "disk.img").write_bytes(bytes(1 << 20))
    return FakeVm(
        settings=Settings(
            state_root=state_root,
            cache_root=cache_root,
            vsock="user",
            timeout_factor=float(os.environ.get("CASEMATE_TIMEOUT_FACTOR", "1")),
        ),
        qemu=directory / "fake-qemu",
        kernel=directory / "kernel",
        image=f"oci:{directory / 'layout'}",
        log=log,
    )
