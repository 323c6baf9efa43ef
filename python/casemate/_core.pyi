"""Native parts: the guest agent's connection, child processes, the vsock backend, archives. This file is their manual.

Every class is safe to use from several threads. Calls that wait release the interpreter; a call says **Blocks** when it
does. A ``watch`` is a :class:`ChildProcess` or whatever else has a pidfd: a wait ends when that process does. A handle used in
another process than the one that made it raises InternalError.
"""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Self, final

from _typeshed import HasFileno

__all__ = [
    "ChildProcess",
    "Connection",
    "FailpointScript",
    "VsockBackend",
    "__optimized__",
    "__version__",
    "accept",
    "connect_hybrid",
    "connect_vsock",
    "create_tap",
    "decompress",
    "read_tree_file",
    "remove_tree",
    "serve_echo",
    "set_failpoints",
    "spawn",
    "tsc_khz",
    "unpack_layer",
]

__version__: str
__optimized__: bool
"""False for a build for work on the tree: it has debug assertions, and its speed is nobody's."""

@final
class FailpointScript:
    """What one native failpoint does, hit by hit; made and set by :mod:`casemate.observe.failpoints`, which has the grammar.

    Args:
        terms: How many hits (None: all that follow), ``off``, ``error``, ``delay``, ``cancel`` or ``kill``, and its argument.
    """

    def __new__(cls, terms: Sequence[tuple[int | None, str, str]]) -> Self: ...
    @property
    def hits(self) -> int:
        """How often the point was passed while this was set."""

def set_failpoints(scripts: Mapping[str, FailpointScript]) -> None:
    """Set these scripts, by point, in place of all that are set. Raises: InvalidConfigError. Does not block."""

def serve_echo(take_fd: int) -> None:
    """Serve the connected stream socket with the agents' server and answer every request with its own payload.

    For measurements and tests of clients. Raises: AgentConnectionError when the socket fails. Blocks: until the peer closes it,
    without a deadline; signals do not end it, so run it in a thread or a process of its own.
    """

@final
class ChildProcess:
    """A process started by :func:`spawn`. It is killed when this process ends, however it ends."""

    @property
    def pid(self) -> int:
        """Process id."""
    @property
    def start_time_ticks(self) -> int:
        """Field 22 of ``/proc/<pid>/stat``: clock ticks from the host's boot to the process's start."""
    def fileno(self) -> int:
        """The pidfd: readable when the process has ended. Borrowed, stays owned by this object."""
    def exit_status(self) -> int | None:
        """Exit status, negative for a signal, None while it runs. Does not block."""
    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for its end and until the rest of stderr and console has been read; return the exit status.

        Raises: DeadlineExceededError. Blocks: until then, woken by signals.
        """
    def send_signal(self, signal: int) -> bool:
        """Send a signal through the pidfd; False when it has ended already."""
    def stderr_tail(self) -> bytes:
        """At most the last 64 KiB of its stderr."""
    def console_since(self, position: int) -> tuple[bytes, int]:
        """What is kept (at most 64 KiB) of the console's output behind its first ``position`` bytes; and how many came so far."""
    def console_tail(self) -> bytes:
        """At most the last 64 KiB of what came from the console descriptor (empty without one)."""

def spawn(
    argv: Sequence[str],
    *,
    fds: Sequence[tuple[int, int]] = (),
    take_console_fd: int | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
) -> ChildProcess:
    """Start ``argv[0]`` (a path, or a name looked up in PATH) tied to this process.

    The child is made by a native thread that lives as long as the process, with SIGKILL as its parent-death signal, in
    a process group of its own, stdin and stdout on ``/dev/null``, stderr on a pipe that a native thread reads into a bounded tail.

    Args:
        fds: ``(borrowed descriptor here, number in the child)``; all others are closed in the child.
        take_console_fd: Read into a second bounded tail until it ends; owned by the native side from here on.
        env: Whole environment of the child; None: this process's.
    Raises: HostError with ``errno`` and ``target`` (the program) when it can't be started.
    Blocks: for fork and exec, milliseconds.
    """

@final
class Connection:
    """One ttrpc connection to an agent, as client.

    Requests and answers are JSON documents with the protocol's own field names (bytes fields as base64); the stream
    calls carry bytes as they are. Blocking callers use :meth:`submit` and :meth:`wait`; on an event loop use
    :meth:`submit`, watch :meth:`fileno` and call :meth:`on_readable`. The two are not mixed on one connection.
    Several threads may wait at once: one of them reads for all.

    Errors that an answer can carry: AgentRpcError (``method``, ``code``, ``details``), AgentConnectionError when the
    connection broke or ``watch`` ended, DeadlineExceededError when the slot's time ran out.
    """

    def __new__(cls, take_fd: int, *, watch: HasFileno | None = None) -> Self:
        """Own the connected stream socket ``take_fd``. Waits end at once when ``watch`` (the VMM) ends."""
    def fileno(self) -> int:
        """The socket, borrowed; for ``loop.add_reader`` and, while :attr:`wants_write`, ``add_writer``. -1 when closed."""
    def submit(self, service: str, method: str, request: bytes, *, timeout_s: float | None = None) -> int:
        """Send a request given as JSON, return its slot.

        Does not block: what the socket does not take at once is kept and sent by a later call, wait or on_writable.

        Args:
            timeout_s: Seconds until the answer is due, also told to the agent; None for no deadline.
        Raises: InvalidConfigError when ``method`` is unknown or the document does not fit it (``path``),
            AgentConnectionError when closed.
        """
    def submit_raw(self, service: str, method: str, request: bytes, *, timeout_s: float | None = None) -> int:
        """As :meth:`submit` with a protobuf message; its answer is one too."""
    def call(self, service: str, method: str, request: bytes, timeout_s: float | None = None) -> bytes:
        """:meth:`submit` and :meth:`wait` in one crossing. A wait that is interrupted (Ctrl-C) forgets the request.

        Raises and blocks: as both.
        """
    def call_raw(self, service: str, method: str, request: bytes, timeout_s: float | None = None) -> bytes:
        """:meth:`submit_raw` and :meth:`wait` in one, as :meth:`call`."""
    def submit_write_stdin(self, container_id: str, exec_id: str, data: bytes, *, timeout_s: float | None = None) -> int:
        """WriteStdin; the answer is the decimal count of bytes taken."""
    def submit_read(self, container_id: str, exec_id: str, length: int, *, stderr: bool = False) -> int:
        """ReadStdout or ReadStderr of at most ``length`` bytes; the answer is the data, empty at the end."""
    def wait(self, slot: int) -> bytes:
        """The answer of ``slot``, once. Blocks until it came, its deadline passed, or the connection broke."""
    def wait_any(self, slots: Sequence[int], timeout_s: float | None = None) -> list[int]:
        """Those of ``slots`` whose :meth:`wait` would not block, at least one; empty at ``timeout_s``. Blocks."""
    def cancel(self, slot: int) -> None:
        """Forget the slot; a late answer is dropped and counted."""
    def on_readable(self) -> list[tuple[int, bytes | BaseException]]:
        """Read what is there; return finished slots with answer or exception (also those past their deadline). Does not block."""
    def on_writable(self) -> None:
        """Send what is kept. Does not block."""
    def fail(self, text: str) -> list[int]:
        """Break the connection: every open slot ends with AgentConnectionError(text); return the open slots."""
    @property
    def wants_write(self) -> bool:
        """Whether bytes are kept that the socket did not take."""
    @property
    def dropped_answers_total(self) -> int:
        """Answers that came for slots already forgotten."""
    @property
    def closed(self) -> bool:
        """Whether the connection is closed or broken."""
    def close(self) -> None:
        """Close; everything that waits ends with AgentConnectionError. Idempotent."""

def connect_hybrid(path: str, port: int, *, timeout_s: float, watch: HasFileno | None = None) -> int:
    """Connect through a hybrid vsock socket (``CONNECT <port>``), retrying refusals every 1 to 5 ms; return the socket.

    Raises: DeadlineExceededError, AgentConnectionError (``watch`` ended, malformed answer). Blocks: until connected.
    """

def connect_vsock(cid: int, port: int, *, timeout_s: float, watch: HasFileno | None = None) -> int:
    """Connect to ``cid:port`` over AF_VSOCK, retrying refusals every 1 to 5 ms; return the socket. Raises and blocks as above."""

def accept(listener_fd: int, *, timeout_s: float, watch: HasFileno | None = None) -> int:
    """Accept one connection on the borrowed listener; return the new socket, close-on-exec.

    Raises: DeadlineExceededError, AgentConnectionError when ``watch`` ended. Blocks: until then.
    """

@final
class VsockBackend:
    """A vhost-user-vsock device served in this process, for hosts without ``/dev/vhost-vsock``.

    Host to guest: connect to ``uds_path``, write ``CONNECT <port>\\n``, read ``OK <n>\\n``. Guest to host (context id 2,
    port P): the backend connects to ``<uds_path>_P``.
    """

    def __new__(cls, take_vhost_fd: int, uds_path: str, guest_cid: int) -> Self:
        """Serve on the connected vhost-user socket ``take_vhost_fd`` (the VMM holds the other end).

        With a socket pair, QEMU takes its end as ``-chardev socket,id=vs0,fd=N``. Makes the listening socket ``uds_path``
        (mode 0600, must not exist) before it returns and removes it on :meth:`close` or when the VMM is gone. A CONNECT
        that comes before the guest's driver runs, or that the guest refuses, is closed at once: dial again.

        Raises: HostError (``errno``, ``target``), InvalidConfigError when no guest may have ``guest_cid``. The descriptor
        is closed when this fails. Does not block.
        """
    def error(self) -> str | None:
        """Why the backend stopped by itself (also: the VMM closed its end), None while it runs or after :meth:`close`."""
    def stats(self) -> dict[str, int]:
        """Counters, in from the guest and out to it: ``connections_open``, ``connections_total``, ``packets_in_total``,
        ``packets_out_total``, ``packets_dropped_total``, ``resets_total``, ``bytes_in_total``, ``bytes_out_total``.
        """
    def close(self) -> None:
        """Stop the thread, close every connection, remove ``uds_path``. Idempotent.

        Raises: DeadlineExceededError. Blocks: until the thread ended, milliseconds and at most 5 s.
        """

def unpack_layer(
    path: str | PathLike[str],
    directory: str | PathLike[str],
    *,
    media_type: str,
    digest: str,
    diff_id: str | None = None,
    max_bytes: int | None = None,
    max_entries: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> int:
    """Apply one image layer (a tar file; none, gzip or zstd compressed, told by its first bytes) onto ``directory``.

    Whiteouts (``.wh.name``, ``.wh..wh..opq``), hard links, device nodes, FIFOs, holes, extended attributes, owners and times
    (also of directories) are kept, ``security.selinux`` and ``*.overlay.*`` attributes apart. A member with ``..`` in its
    name is refused; symbolic links on the way to it are followed as inside a chroot, so nothing outside ``directory`` is
    reached. Reads the file once and checks ``digest`` (``sha256:…``) and, when given, ``diff_id`` (of the uncompressed tar).
    ``directory`` must be the caller's alone, and is half changed after an error.

    Args:
        media_type: From the manifest, or empty; an unknown one, also one of a foreign layer, is refused.
        max_bytes: Bound of the uncompressed bytes, holes counted; 64 GiB by default.
        max_entries: Bound of the members and of directories made for them; 2,000,000 by default.
        progress: Called about every 50 ms with the compressed bytes read; what it raises ends the call.

    Returns: uncompressed bytes. Raises: ImageError (``digest``), HostError, ResourceExhaustedError (no space left).
    Needs: root for owners and device nodes. Blocks: for the unpacking, woken by signals.
    """

def read_tree_file(directory: str | PathLike[str], path: str, *, max_bytes: int) -> bytes | None:
    """Content of the regular file ``path`` below ``directory``, links resolved as inside a chroot; None when there is none.

    Raises: ImageError (larger than ``max_bytes``, a loop of links), HostError. Blocks: for the read.
    """

def remove_tree(path: str | PathLike[str]) -> None:
    """Remove ``path`` with all below it, however deep, following no link; not there is fine.

    Raises: HostError. Blocks: for the removal.
    """

def create_tap(name: str, *, borrow_netns_fd: int | None = None, owner: int | None = None) -> tuple[int, str]:
    """Make a tap device that is up and has no addresses; return its descriptor, which the caller owns, and its name.

    It goes when the last copy of the descriptor is closed. Frames have a virtio header in front (``IFF_VNET_HDR``).

    Args:
        name: At most 15 bytes; ``%d`` stands for the lowest number that is free.
        borrow_netns_fd: The network namespace to make it in; None: this process's.
        owner: User id that may open it too.
    Raises: InvalidConfigError (``path`` is ``name``), HostError (``errno``, ``target``); nothing is left then.
    Needs: CAP_NET_ADMIN in the namespace, ``/dev/net/tun``. Blocks: for the kernel, milliseconds.
    """

def tsc_khz() -> int | None:
    """Kilohertz of the host's time stamp counter, exact to some 30 millionths; None on machines without one.

    Blocks: about 2 ms, busy.
    """

def decompress(data: bytes, *, format: str, max_bytes: int) -> bytes:
    """Decompress ``lz4-legacy`` (kernel image), ``zstd`` or ``gzip``; for xz take :mod:`lzma`.

    Raises: InvalidConfigError when damaged or larger than ``max_bytes``. Blocks: for the work, the interpreter released.
    """
