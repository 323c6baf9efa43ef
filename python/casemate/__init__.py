"""OCI containers inside virtual machines: one VM a sandbox, a guest agent in it, containers in the guest.

>>> import casemate
>>> result = casemate.run("oci:./debian", ["uname", "-r"])  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from casemate._async.container import AsyncContainer
    from casemate._async.process import AsyncProcess
    from casemate._async.pull import async_pull
    from casemate._async.run import async_run
    from casemate._async.sandbox import AsyncSandbox
    from casemate._sync.container import Container
    from casemate._sync.process import Process
    from casemate._sync.pull import pull
    from casemate._sync.run import run
    from casemate._sync.sandbox import Sandbox
    from casemate.config.container import ContainerConfig
    from casemate.config.monitor import MonitorConfig
    from casemate.config.sandbox import SandboxConfig, TimeoutConfig
    from casemate.config.settings import Settings
    from casemate.errors import (
        AgentConnectionError,
        AgentError,
        AgentRpcError,
        AlreadyExistsError,
        CasemateError,
        CgroupError,
        CommandError,
        DeadlineExceededError,
        HostError,
        HypervisorError,
        ImageError,
        InternalError,
        InvalidConfigError,
        InvalidStateError,
        MountError,
        NotFoundError,
        QmpError,
        RegistryError,
        ResourceExhaustedError,
        UnsupportedError,
        VmmApiError,
        VmmExitedError,
    )
    from casemate.persist.recovery import CleanupReport, SandboxInfo
    from casemate.types import (
        BlockAttachment,
        Event,
        EventKind,
        ExecResult,
        NicAttachment,
        Phase,
        RunResult,
        State,
    )

__version__ = "0.1.0"

_HOMES = {
    "casemate._async.container": ("AsyncContainer",),
    "casemate._async.process": ("AsyncProcess",),
    "casemate._async.pull": ("async_pull",),
    "casemate._async.run": ("async_run",),
    "casemate._async.sandbox": ("AsyncSandbox",),
    "casemate._sync.container": ("Container",),
    "casemate._sync.process": ("Process",),
    "casemate._sync.pull": ("pull",),
    "casemate._sync.run": ("run",),
    "casemate._sync.sandbox": ("Sandbox",),
    "casemate.config.container": ("ContainerConfig",),
    "casemate.config.monitor": ("MonitorConfig",),
    "casemate.config.sandbox": ("SandboxConfig", "TimeoutConfig"),
    "casemate.config.settings": ("Settings",),
    "casemate.errors": (
        "AgentConnectionError",
        "AgentError",
        "AgentRpcError",
        "AlreadyExistsError",
        "CasemateError",
        "CgroupError",
        "CommandError",
        "DeadlineExceededError",
        "HostError",
        "HypervisorError",
        "ImageError",
        "InternalError",
        "InvalidConfigError",
        "InvalidStateError",
        "MountError",
        "NotFoundError",
        "QmpError",
        "RegistryError",
        "ResourceExhaustedError",
        "UnsupportedError",
        "VmmApiError",
        "VmmExitedError",
    ),
    "casemate.persist.recovery": ("CleanupReport", "SandboxInfo"),
    "casemate.types": (
        "BlockAttachment",
        "Event",
        "EventKind",
        "ExecResult",
        "NicAttachment",
        "Phase",
        "RunResult",
        "State",
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AgentConnectionError",
    "AgentError",
    "AgentRpcError",
    "AlreadyExistsError",
    "AsyncContainer",
    "AsyncProcess",
    "AsyncSandbox",
    "BlockAttachment",
    "CasemateError",
    "CgroupError",
    "CleanupReport",
    "CommandError",
    "Container",
    "ContainerConfig",
    "DeadlineExceededError",
    "Event",
    "EventKind",
    "ExecResult",
    "HostError",
    "HypervisorError",
    "ImageError",
    "InternalError",
    "InvalidConfigError",
    "InvalidStateError",
    "MonitorConfig",
    "MountError",
    "NicAttachment",
    "NotFoundError",
    "Phase",
    "Process",
    "QmpError",
    "RegistryError",
    "ResourceExhaustedError",
    "RunResult",
    "Sandbox",
    "SandboxConfig",
    "SandboxInfo",
    "Settings",
    "State",
    "TimeoutConfig",
    "UnsupportedError",
    "VmmApiError",
    "VmmExitedError",
    "async_pull",
    "async_run",
    "pull",
    "run",
]


def __getattr__(name: str) -> Any:
    # Only what is used is imported: a shim runs per pod, and its start is on everybody's path.
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'casemate' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
