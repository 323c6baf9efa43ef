"""``casemate env``: what is where, in which version."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path
from typing import Any

from casemate import __version__, _core
from casemate.cli import options as common
from casemate.cli.document import to_toml
from casemate.config.settings import Settings
from casemate.errors import CasemateError
from casemate.host.cgroup import read_cgroups
from casemate.host.kernel import read_nodes, read_protection
from casemate.hypervisor import vsock
from casemate.hypervisor.host import HostFacts, read_host_facts
from casemate.hypervisor.proof import proof_key, read_proof
from casemate.hypervisor.qemu.accel import choose_accelerator
from casemate.hypervisor.qemu.probe import find_qemu

VERSION = 1
"""Of the document: grows when a field changes its meaning or goes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``env``."""
    common.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print the environment as TOML or JSON. What can't be found out is told in its place."""
    settings = Settings.from_environment()
    facts = read_host_facts()
    document = {
        "document_version": VERSION,
        "casemate": _casemate(),
        "settings": settings,
        "host": _host(facts),
        "hypervisor": _hypervisor(settings, facts),
        "guest": _guest(settings),
    }
    if options.json:
        common.print_json(document)
    else:
        print(to_toml(document), end="")
    return 0


def _casemate() -> dict[str, Any]:
    return {
        "version": __version__,
        "core_version": _core.__version__,
        "python": platform.python_version(),
        "python_executable": sys.executable,
        "package": str(Path(__file__).resolve().parent.parent),
    }


def _host(facts: HostFacts) -> dict[str, Any]:
    system = os.uname()
    cgroups = read_cgroups()
    return {
        "kernel": system.release,
        "machine": system.machine,
        "memory_mib": facts.memory_mib,
        "cpus": os.cpu_count(),
        "cpu_vendor": facts.cpu_vendor,
        "hardware_virtualisation": facts.has_hardware_virtualisation,
        "is_guest": facts.is_nested,
        "kvm_modules": facts.kvm_modules,
        "kvm_error": facts.kvm_error,
        "vhost_vsock": vsock.is_usable(),
        "protection": read_protection(),
        "cgroup": cgroups.version,
        "cgroup_controllers": cgroups.controllers,
        "numa_nodes": len(read_nodes()),
        "user_id": os.geteuid(),
    }


def _hypervisor(settings: Settings, facts: HostFacts) -> dict[str, Any]:
    try:
        qemu = find_qemu(settings.qemu, cache_root=settings.cache_root)
    except CasemateError as error:
        return {"name": "qemu", "error": str(error)}
    proof = read_proof(settings.cache_root, proof_key(qemu, facts))
    chosen = choose_accelerator("auto", facts, proof=proof)
    return {
        "name": "qemu",
        "path": qemu.path,
        "version": qemu.version_text,
        "accelerator": chosen.name,
        "accelerator_reason": chosen.reason,
        "proven": proof is not None,
        "vsock": "vhost" if settings.vsock != "user" and vsock.is_usable() else "vhost-user",
    }


def _guest(settings: Settings) -> dict[str, Any]:
    from casemate.guest.assets import agent_path
    from casemate.guest.store import Store

    document: dict[str, Any] = {}
    try:
        document["agent"] = str(agent_path())
        document["agent_bytes"] = os.stat(document["agent"]).st_size
    except CasemateError as error:
        document["agent_error"] = str(error)
    store = Store(settings.cache_root / "guest")
    entry = store.read_current("auto")
    document["kernel"] = None if entry is None else str(store.kernel_path(entry))
    document["kernel_release"] = None if entry is None else entry.release
    document["kernel_source"] = None if entry is None else entry.source
    document["initrds"] = len(store.list_initrds())
    return document
