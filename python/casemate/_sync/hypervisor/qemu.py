# Made by scripts/unasync.py from python/casemate/_async/hypervisor/qemu.py; do not edit.
"""The QEMU driver: one VM from its plan to its end. Decisions are in ``casemate.hypervisor.qemu``; here is what waits."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from casemate import _core
from casemate._sync.qmp import QmpClient
from casemate._compat import blocking as compat
from casemate.agent.transport import HybridTransport, Transport, VsockTransport
from casemate.config.sandbox import SandboxConfig, check_host
from casemate.config.settings import Settings
from casemate.errors import (
    DeadlineExceededError,
    HostError,
    HypervisorError,
    InvalidStateError,
    VmmExitedError,
)
from casemate.hypervisor import (
    BlockAddress,
    BlockDevice,
    Capabilities,
    GuestAssets,
    NicDevice,
    PluggedDevice,
    VmmProcess,
    vsock,
)
from casemate.hypervisor.host import HostFacts, read_host_facts
from casemate.hypervisor.pci import Topology
from casemate.hypervisor.qemu import plan as planning
from casemate.hypervisor.qemu.accel import PROOF_FILE, Accelerator, choose_accelerator
from casemate.hypervisor.qemu.command_line import render_command_line
from casemate.hypervisor.qemu.probe import QemuBinary, find_qemu
from casemate.observe import failpoints
from casemate.observe.log import Log

if TYPE_CHECKING:
    from casemate._sync.hypervisor.qemu_hotplug import Hotplug
    from casemate._sync.transaction import Performer
    from casemate.hypervisor.proof import BootProof
    from casemate.keeper.birth import NewKeeper
    from casemate.keeper.vmm import KeptVmm

__all__ = ["QMP_SOCKET", "Qemu"]

_log = Log(__name__)

QMP_SOCKET = "qmp.sock"
VSOCK_SOCKET = "vsock.sock"
_DEVICE_END = "vsock device"
_VHOST_USER_CID = 3
"""Every VM with a back end of its own may have the same: no kernel tells them apart."""
_KILL_S = 5.0
_TAIL_S = 0.5
_BROKEN = ("guest-panicked", "internal-error", "io-error")


class Qemu:
    """One VM of QEMU.

    Make it with :meth:`create`, then ``plan``, ``prepare``, ``start``, and ``stop`` at the end, also after a failure.

    Attributes:
        qemu: The binary and its version.
        accelerator: The one that was chosen, with its reason.
        uuid: Of the VM, random.
        changed: Called when a place of :attr:`topology` is taken, before anything is made, or given back.
    """

    __slots__ = (
        "_assets",
        "_config",
        "_directory",
        "_disks",
        "_hotplug",
        "_keeper",
        "_kept",
        "_negotiated",
        "_plan",
        "_process",
        "_qmp",
        "_qmp_lock",
        "_sandbox_id",
        "_spawn_fds",
        "_stop_lock",
        "_timeouts",
        "_use_vhost",
        "_vsock",
        "accelerator",
        "changed",
        "qemu",
        "uuid",
    )

    def __init__(
        self,
        config: SandboxConfig,
        *,
        sandbox_id: str,
        qemu: QemuBinary,
        accelerator: Accelerator,
        use_vhost: bool = False,
        timeout_factor: float = 1.0,
        uuid: str | None = None,
    ) -> None:
        self.qemu = qemu
        self.accelerator = accelerator
        self.uuid = uuid or _random_uuid()
        self._config = config
        self._sandbox_id = sandbox_id
        self._timeouts = config.timeouts.scaled(timeout_factor)
        self._use_vhost = use_vhost
        self._vsock = planning.VsockChoice(
            kind="vhost" if use_vhost else "vhost-user", guest_cid=_VHOST_USER_CID
        )
        self._assets: GuestAssets | None = None
        self._disks: tuple[BlockDevice, ...] = ()
        self._plan: planning.VmPlan | None = None
        self._directory: Path | None = None
        self._keeper: NewKeeper | None = None
        self._process: _core.ChildProcess | KeptVmm | None = None
        self._qmp: QmpClient | None = None
        self._qmp_lock = compat.Lock()
        self._negotiated = False
        self._hotplug: Hotplug | None = None
        self.changed: Callable[[], compat.Later[None]] = _nothing
        self._stop_lock = compat.Lock()
        # What lives as long as the VM, and what is closed here once QEMU holds it.
        self._kept = contextlib.ExitStack()
        self._spawn_fds: dict[str, int] = {}

    @classmethod
    def create(
        cls,
        config: SandboxConfig,
        settings: Settings,
        *,
        sandbox_id: str,
        pvm_kernel: bool = False,
        facts: HostFacts | None = None,
        on_trial: bool = False,
    ) -> Qemu:
        """A driver for ``config`` on this host. Makes nothing.

        Args:
            pvm_kernel: The guest's kernel runs on PVM.
            facts: Of this host, when they were read already.
            on_trial: Take the accelerator that ``config`` names, whatever is known of it.

        Raises:
            NotFoundError: There is no QEMU; the text names the package.
            UnsupportedError: QEMU is too old, or KVM is wanted and does not work.
            InvalidConfigError: More memory than the host has.
        Blocks: for a few file reads; the first time with a QEMU for its answer to ``--version``.
        """
        facts = facts if facts is not None else read_host_facts()
        check_host(config, memory_mib=facts.memory_mib)
        qemu, proof = compat.to_thread(_find, config, settings, facts)
        if on_trial:
            accelerator = Accelerator(name=config.accel, reason="on trial")
        else:
            accelerator = choose_accelerator(config.accel, facts, pvm_kernel=pvm_kernel, proof=proof)
        return cls(
            config,
            sandbox_id=sandbox_id,
            qemu=qemu,
            accelerator=accelerator,
            use_vhost=settings.vsock == "kernel" or (settings.vsock == "auto" and vsock.is_usable()),
            timeout_factor=settings.timeout_factor,
        )

    @property
    def capabilities(self) -> Capabilities:
        """What this VM can do."""
        return planning.capabilities(self._config.machine, self.accelerator.name)

    @property
    def accel_name(self) -> str:
        """The accelerator that was chosen."""
        return self.accelerator.name

    @property
    def accel_reason(self) -> str:
        """Why it was chosen."""
        return self.accelerator.reason

    @property
    def vm_plan(self) -> planning.VmPlan:
        """The VM as it was planned. Raises: InvalidStateError before :meth:`plan`."""
        if self._plan is None:
            raise InvalidStateError("there is nothing planned", state="new", wanted="planned")
        return self._plan

    @property
    def process(self) -> _core.ChildProcess | KeptVmm:
        """QEMU's process. Raises: InvalidStateError before :meth:`start`."""
        if self._process is None:
            raise InvalidStateError("QEMU was not started", state="planned", wanted="running")
        return self._process

    def plan(self, assets: GuestAssets, disks: Sequence[BlockDevice] = ()) -> tuple[BlockAddress, ...]:
        """Decide on everything; return where the guest finds each of ``disks``. Makes nothing, does not block.

        Raises:
            InvalidConfigError: What is wanted does not fit together.
            ResourceExhaustedError: More disks than slots.
        """
        self._assets = assets
        self._disks = tuple(disks)
        return self._make_plan().disks

    def launch_with(self, keeper: NewKeeper) -> None:
        """Let ``keeper`` start QEMU and serve its vsock device, so that both outlive this process. Comes before :meth:`prepare`."""
        self._keeper = keeper

    def prepare(self, directory: Path) -> Transport:
        """Make the sockets in ``directory``, the console, and the vsock device's other end; return how the agent is reached.

        Raises:
            HostError: A socket can't be made.
            InvalidStateError: Without a plan, or twice.
        Does not block.
        """
        if self._plan is None or self._directory is not None:
            raise InvalidStateError(
                "prepare comes once, after plan", state="prepared" if self._plan else "new", wanted="planned"
            )
        self._directory = directory
        self._make_qmp(directory / QMP_SOCKET)
        # As a step of the closing: what follows it is closed all the same.
        self._kept.callback(failpoints.hit, "qemu.close")
        failpoints.hit("qemu.vsock")
        if not self._use_vhost:
            ours, theirs = socket.socketpair()
            with ours:
                self._hand_over("vsock", theirs.detach())
                failpoints.hit("qemu.vsock_backend")
                if self._keeper is not None:
                    self._hand_over(_DEVICE_END, ours.detach())
                else:
                    backend = _core.VsockBackend(
                        ours.detach(), str(directory / VSOCK_SOCKET), self._vsock.guest_cid
                    )
                    self._kept.callback(backend.close)
            return HybridTransport(directory / VSOCK_SOCKET)
        fd, cid = vsock.reserve_cid()
        self._hand_over("vsock", fd)
        self._vsock = planning.VsockChoice(kind="vhost", guest_cid=cid)
        self._make_plan()
        return VsockTransport(cid)

    def start(self) -> VmmProcess:
        """Start QEMU; it runs when this returns. That it rejected its plan shows as its end (:meth:`exit_error`).

        Raises:
            HostError: The process can't be started.
            InvalidStateError: Before :meth:`prepare`, or twice.
        Blocks: for fork and exec.
        """
        plan = self._plan
        if plan is None or self._directory is None or self._process is not None:
            raise InvalidStateError("start comes once, after prepare", state="new", wanted="prepared")
        ours, theirs = socket.socketpair()
        self._hand_over("console", theirs.detach())
        try:
            with ours:
                failpoints.hit("qemu.spawn")
                fds = [(self._spawn_fds[name], number) for name, number in plan.fds.items()]
                words = render_command_line(plan)
                if self._keeper is not None:
                    self._process = self._spawn_kept(self._keeper, words, fds, ours)
                else:
                    self._process = _core.spawn(words, fds=fds, take_console_fd=ours.detach())
        finally:
            # QEMU must hold the only copy of its listener: else its end would not end the connection.
            self._close_spawn_fds()
        failpoints.hit("qemu.spawned")
        _log.debug(
            "QEMU started",
            extra={"sandbox": self._sandbox_id, "op": "qemu.start", "target": self._process.pid},
        )
        return VmmProcess(pid=self._process.pid, start_time_ticks=self._process.start_time_ticks)

    def _spawn_kept(
        self, keeper: NewKeeper, words: Sequence[str], fds: Sequence[tuple[int, int]], console: socket.socket
    ) -> KeptVmm:
        assert self._directory is not None
        device = self._spawn_fds.get(_DEVICE_END)
        vsock = None if device is None else (device, self._directory / VSOCK_SOCKET, self._vsock.guest_cid)
        # Not interrupted: a VMM that nobody knows of would be left.
        spawning = compat.to_thread(
            keeper.spawn,
            words,
            fds=fds,
            console_fd=console.fileno(),
            vsock=vsock,
            timeout_s=self._timeouts.control_s,
        )
        return compat.shielded(spawning)

    def hand_over(self) -> None:
        """Forget QEMU: it is its keeper's now. Nothing is ended or removed. Does not block."""
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None
        self._kept.pop_all()

    def qmp(self, timeout_s: float | None = None) -> QmpClient:
        """The QMP connection, negotiated. The first call waits until QEMU has come up, at most ``timeout_s`` (None: as configured).

        Raises:
            VmmExitedError: QEMU ended, with its cause.
            DeadlineExceededError: QEMU did not come up in that time.
            UnsupportedError: It is older than version 5.
        """
        client = self._qmp
        if client is None or self._process is None:
            raise InvalidStateError("QEMU does not run", state="stopped", wanted="running")
        with self._qmp_lock:
            if not self._negotiated:
                limit_s = self._timeouts.control_s if timeout_s is None else timeout_s
                client.negotiate(timeout_s=limit_s)
                self._negotiated = True
        return client

    def exit_error(self, wait_s: float = 1.0) -> VmmExitedError | None:
        """Why QEMU ended, with its stderr and the guest's console; None when it has not within ``wait_s``. Blocks: until then."""
        # Here, not above: its patterns cost more to compile than most starts need.
        from casemate.hypervisor.qemu.failure import describe_exit

        process = self.process
        if process.exit_status() is None:
            compat.wait_readable([process.fileno()], time.monotonic() + wait_s)
        status: int | None
        try:
            status = compat.to_thread(process.wait, _TAIL_S)
        except DeadlineExceededError:
            # It runs, or another process still holds its stderr.
            status = process.exit_status()
            if status is None:
                return None
        return describe_exit(
            status, process.stderr_tail(), process.console_tail(), sandbox_id=self._sandbox_id, op="qemu.run"
        )

    def pause(self) -> None:
        """Stop the vCPUs. Raises: QmpError, VmmExitedError, DeadlineExceededError. Blocks: until QEMU has."""
        (self.qmp()).execute("stop", timeout_s=self._timeouts.control_s)

    def resume(self) -> None:
        """Let the vCPUs go on. Raises and blocks as :meth:`pause`."""
        (self.qmp()).execute("cont", timeout_s=self._timeouts.control_s)

    def check(self, timeout_s: float) -> None:
        """Ask QEMU whether its guest runs.

        Raises:
            HypervisorError: The guest can't run on.
            DeadlineExceededError: QEMU does not answer in ``timeout_s``; VmmExitedError.
        Blocks: until the answer.
        """
        status = ((self.qmp(timeout_s)).execute("query-status", timeout_s=timeout_s))["status"]
        if status in _BROKEN:
            raise HypervisorError(
                f"QEMU says that the guest is in the state {status}",
                op="qemu.check",
                sandbox_id=self._sandbox_id,
            )

    @property
    def topology(self) -> Topology:
        """The bridges for later devices, and what is behind them."""
        if self._hotplug is not None:
            return self._hotplug.topology
        return Topology() if self._plan is None else self._plan.topology

    @property
    def plugged(self) -> tuple[PluggedDevice, ...]:
        """What was plugged in while it runs."""
        return () if self._hotplug is None else self._hotplug.plugged

    def attach(self, device: BlockDevice | NicDevice, ask: Performer | None = None) -> PluggedDevice:
        """Plug ``device`` in at a free place. A failure leaves nothing behind.

        Args:
            ask: Asks the guest whether it has it; None: the guest may see it a moment later.

        Raises:
            InvalidConfigError: It can't be handed to QEMU; nothing was made.
            UnsupportedError: The machine has no root ports.
            ResourceExhaustedError: All are taken.
            AlreadyExistsError: A device has that name.
            HostError: A tap device can't be made.
            QmpError: QEMU refused.
            DeadlineExceededError: The guest did not have it in ``timeouts.hotplug_s``.
        Blocks: until QEMU, and with ``ask`` the guest has it.
        """
        return self._later_devices().attach(self.qmp(), device, ask)

    def detach(self, device_id: str, ask: Performer | None = None) -> None:
        """Take a device away when the guest has let it go. A failure leaves it plugged in; at the deadline the guest may
        still let it go.

        Raises:
            NotFoundError: No such device was attached.
            DeadlineExceededError: The guest did not answer in ``timeouts.hotplug_s``.
            HypervisorError: The guest refused.
        Blocks: until then.
        """
        self._later_devices().detach(self.qmp(), device_id, ask)

    def attach_block(self, disk: BlockDevice) -> BlockAddress:
        """As :meth:`attach`; says where the guest will find the disk."""
        plugged = self.attach(disk)
        return BlockAddress(id=disk.id, pci_path=plugged.pci_path, serial=disk.serial)

    def detach_block(self, disk_id: str) -> None:
        """As :meth:`detach`."""
        self.detach(disk_id)

    def stop(self) -> None:
        """End QEMU and remove what was made. Idempotent; also after any failed step.

        QEMU is asked to quit and is killed when it does not within ``timeouts.stop_s``.

        Raises:
            DeadlineExceededError: The killed process did not end in 5 s (the kernel holds it).
        Blocks: until it ended.
        """
        with self._stop_lock:
            try:
                if self._process is not None and self._process.exit_status() is None:
                    self._end_process(self._process)
            except BaseException as error:
                self._release(error)
                raise
            self._release(None)

    def _release(self, first: BaseException | None) -> None:
        self._close_spawn_fds()
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None
        try:
            # The vsock back end joins its thread.
            compat.to_thread(self._kept.close)
        except Exception as error:
            if first is None:
                raise
            first.add_note(f"and what was made for QEMU could not be closed: {error}")

    def _end_process(self, process: _core.ChildProcess | KeptVmm) -> None:
        deadline = time.monotonic() + self._timeouts.stop_s
        try:
            self._quit(process, deadline)
        except VmmExitedError:
            pass  # what was wanted
        except (HypervisorError, DeadlineExceededError, InvalidStateError) as error:
            _log.warning(
                "QEMU does not quit and is killed",
                extra={"sandbox": self._sandbox_id, "op": "qemu.stop", "cause": str(error)},
            )
        finally:
            # Also after an interruption: QEMU does not outlive this.
            self._kill(process)

    def _quit(self, process: _core.ChildProcess | KeptVmm, deadline: float) -> None:
        failpoints.hit("qemu.quit")
        if self._qmp_lock.locked():
            raise HypervisorError("QEMU has not answered at all yet, and somebody waits for that already")
        client = self.qmp(max(deadline - time.monotonic(), 0.01))
        client.execute("quit", timeout_s=max(deadline - time.monotonic(), 0.01))
        compat.wait_readable([process.fileno()], deadline)

    def _kill(self, process: _core.ChildProcess | KeptVmm) -> None:
        if process.exit_status() is None:
            process.send_signal(signal.SIGKILL)
            failpoints.hit("qemu.killed")
            if not compat.wait_readable([process.fileno()], time.monotonic() + _KILL_S):
                raise DeadlineExceededError(
                    f"QEMU (pid {process.pid}) did not end within {_KILL_S:g} s after SIGKILL",
                    deadline_s=_KILL_S,
                    waited_s=_KILL_S,
                    op="qemu.stop",
                    sandbox_id=self._sandbox_id,
                )

    def _make_plan(self) -> planning.VmPlan:
        if self._assets is None:
            raise InvalidStateError("there is nothing planned", state="new", wanted="planned")
        self._plan = planning.make_plan(
            self._config,
            sandbox_id=self._sandbox_id,
            uuid=self.uuid,
            qemu=self.qemu.path,
            accelerator=self.accelerator,
            assets=self._assets,
            vsock=self._vsock,
            disks=self._disks,
        )
        return self._plan

    def _later_devices(self) -> Hotplug:
        if self._hotplug is None:
            # Here, not above: most sandboxes never need it.
            from casemate._sync.hypervisor.qemu_hotplug import Hotplug

            self._hotplug = Hotplug(self.topology, self._config.machine, self._timeouts, self.changed)
        return self._hotplug

    def _make_qmp(self, path: Path) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            failpoints.hit("qemu.qmp_socket")
            listener.bind(str(path))
            self._kept.callback(_remove, path)
            os.chmod(path, 0o600)
            listener.listen(1)
            failpoints.hit("qemu.qmp_connect")
            client.connect(str(path))
        except BaseException as error:
            listener.close()
            client.close()
            if not isinstance(error, OSError) or isinstance(error, HostError):
                raise
            raise HostError(
                f"no QMP socket can be made at {path}: {error.strerror or error}",
                errno=error.errno or 0,
                target=str(path),
                op="qemu.prepare",
                sandbox_id=self._sandbox_id,
            ) from error
        self._hand_over("qmp", listener.detach())
        self._qmp = QmpClient(client, explain=self._explain)

    def _explain(self, error: HypervisorError) -> Exception:
        ended = self.exit_error() if self._process is not None else None
        return error if ended is None else ended

    def _hand_over(self, name: str, take_fd: int) -> None:
        self._spawn_fds[name] = take_fd

    def _close_spawn_fds(self) -> None:
        while self._spawn_fds:
            _, fd = self._spawn_fds.popitem()
            os.close(fd)


def _nothing() -> None:
    """Nobody wants to know."""


def _find(config: SandboxConfig, settings: Settings, facts: HostFacts) -> tuple[QemuBinary, BootProof | None]:
    qemu = find_qemu(config.qemu_path or settings.qemu, cache_root=settings.cache_root)
    if not (settings.cache_root / PROOF_FILE).exists():
        return qemu, None
    # Here, not above: most hosts have no proof.
    from casemate.hypervisor.proof import proof_key, read_proof

    return qemu, read_proof(settings.cache_root, proof_key(qemu, facts))


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def _random_uuid() -> str:
    # Version 4. The module uuid costs 2 ms to import.
    bits = bytearray(os.urandom(16))
    bits[6] = bits[6] & 0x0F | 0x40
    bits[8] = bits[8] & 0x3F | 0x80
    text = bits.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
