"""Exceptions. The class says what a caller can do, the attributes say what happened.

::

    CasemateError                       .op .sandbox_id .container_id
    ├─ InvalidConfigError  (ValueError) .path: where in the document
    ├─ InvalidStateError                .state .wanted
    ├─ NotFoundError (LookupError)
    ├─ AlreadyExistsError
    ├─ UnsupportedError                 .capability: what the host, VMM or guest lacks
    ├─ ResourceExhaustedError
    ├─ DeadlineExceededError (TimeoutError)   .deadline_s .waited_s
    ├─ HostError (OSError)              .errno .target
    │  ├─ CgroupError
    │  └─ MountError
    ├─ ImageError                       .reference .digest
    ├─ RegistryError                    .registry .status: of HTTP, 0 when it could not be reached
    ├─ HypervisorError
    │  ├─ QmpError                      .command .error_class
    │  ├─ VmmApiError                   .status .body
    │  └─ VmmExitedError                .status .log_tail .console_tail
    ├─ AgentError
    │  ├─ AgentConnectionError (ConnectionError)
    │  ├─ AgentRpcError                 .method .code .details
    │  └─ CommandError                  .command .exit_code: 127 not found, 126 not executable
    └─ InternalError                    a defect of casemate
"""

from __future__ import annotations

__all__ = [
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
]


class CasemateError(Exception):
    """Base of every exception that casemate raises on purpose.

    Args:
        text: What was given, what was expected, and what to do.
        op: The operation that failed, as ``noun.verb`` (``"sandbox.start"``).
        sandbox_id: The sandbox it was about.
        container_id: The container it was about.
    """

    def __init__(
        self,
        text: str = "",
        *,
        op: str | None = None,
        sandbox_id: str | None = None,
        container_id: str | None = None,
    ) -> None:
        super().__init__(text)
        self.op = op
        self.sandbox_id = sandbox_id
        self.container_id = container_id

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class InvalidConfigError(CasemateError, ValueError):
    """A value that can't be used; nothing was made. ``path`` says where in the document."""

    def __init__(self, text: str = "", *, path: str = "", **context: str | None) -> None:
        super().__init__(text, **context)
        self.path = path


class InvalidStateError(CasemateError):
    """The object is in ``state``, the call needs ``wanted``."""

    def __init__(self, text: str = "", *, state: str = "", wanted: str = "", **context: str | None) -> None:
        super().__init__(text, **context)
        self.state = state
        self.wanted = wanted


class NotFoundError(CasemateError, LookupError):
    """What was named does not exist."""


class AlreadyExistsError(CasemateError):
    """The name is taken."""


class UnsupportedError(CasemateError):
    """The host, the VMM or the guest can't do it; ``capability`` names what is missing."""

    def __init__(self, text: str = "", *, capability: str = "", **context: str | None) -> None:
        super().__init__(text, **context)
        self.capability = capability


class ResourceExhaustedError(CasemateError):
    """No slot, context identifier, bus, memory or disk space is left."""


class DeadlineExceededError(CasemateError, TimeoutError):
    """The operation did not end within ``deadline_s`` seconds; it waited ``waited_s``."""

    def __init__(
        self, text: str = "", *, deadline_s: float = 0.0, waited_s: float = 0.0, **context: str | None
    ) -> None:
        super().__init__(text, **context)
        self.deadline_s = deadline_s
        self.waited_s = waited_s


class HostError(CasemateError, OSError):
    """A system call of the host failed on ``target`` with ``errno``."""

    def __init__(self, text: str = "", *, errno: int = 0, target: str = "", **context: str | None) -> None:
        super().__init__(text, **context)
        self.errno = errno
        self.target = target


class CgroupError(HostError):
    """A cgroup file could not be read or written."""


class MountError(HostError):
    """A mount could not be made or removed."""


class ImageError(CasemateError):
    """An image is damaged or not of a form that can be read."""

    def __init__(
        self, text: str = "", *, reference: str = "", digest: str = "", **context: str | None
    ) -> None:
        super().__init__(text, **context)
        self.reference = reference
        self.digest = digest


class RegistryError(CasemateError):
    """A registry can't be reached, wants other credentials, or answers with an error.

    ``status`` is that of its answer (401 and 403: credentials are missing or not enough), 0 when none came.
    """

    def __init__(self, text: str = "", *, registry: str = "", status: int = 0, **context: str | None) -> None:
        super().__init__(text, **context)
        self.registry = registry
        self.status = status


class HypervisorError(CasemateError):
    """The VMM refused or failed."""


class QmpError(HypervisorError):
    """QEMU answered ``command`` with an error of class ``error_class``."""

    def __init__(
        self, text: str = "", *, command: str = "", error_class: str = "", **context: str | None
    ) -> None:
        super().__init__(text, **context)
        self.command = command
        self.error_class = error_class


class VmmApiError(HypervisorError):
    """The VMM's HTTP interface answered with ``status`` and ``body``."""

    def __init__(self, text: str = "", *, status: int = 0, body: str = "", **context: str | None) -> None:
        super().__init__(text, **context)
        self.status = status
        self.body = body


class VmmExitedError(HypervisorError):
    """The VMM's process is gone.

    ``status`` is its exit status, negative for a signal, ``None`` when unknown. ``log_tail`` is the end of its stderr,
    ``console_tail`` the end of the guest's console.
    """

    def __init__(
        self,
        text: str = "",
        *,
        status: int | None = None,
        log_tail: str = "",
        console_tail: str = "",
        **context: str | None,
    ) -> None:
        super().__init__(text, **context)
        self.status = status
        self.log_tail = log_tail
        self.console_tail = console_tail


class AgentError(CasemateError):
    """The guest agent failed or can't be reached."""


class AgentConnectionError(AgentError, ConnectionError):
    """The connection to the guest agent broke or could not be made."""


class AgentRpcError(AgentError):
    """The agent answered ``method`` with the gRPC status ``code``."""

    def __init__(
        self, text: str = "", *, method: str = "", code: int = 0, details: str = "", **context: str | None
    ) -> None:
        super().__init__(text, **context)
        self.method = method
        self.code = code
        self.details = details


class CommandError(AgentError):
    """A command could not be executed in its container.

    ``exit_code`` is what a shell would report: 127 when there is no such command, 126 when it can't be executed.
    """

    def __init__(
        self, text: str = "", *, command: str = "", exit_code: int = 127, **context: str | None
    ) -> None:
        super().__init__(text, **context)
        self.command = command
        self.exit_code = exit_code


class InternalError(CasemateError):
    """A defect of casemate: please report it with its text."""
