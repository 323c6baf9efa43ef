"""What the end of a QEMU process means: its status, stderr and the guest's console as one error with a named cause."""

from __future__ import annotations

import re
import signal

import msgspec

from casemate.errors import VmmExitedError

__all__ = ["ExitCause", "describe_exit", "find_panic", "printable_tail"]

_TAIL_LINES = 20
_PANIC = re.compile(r"(?<!end )Kernel panic - not syncing: ?(.*)")
_TIME_STAMP = re.compile(r"^\[ *\d+\.\d+\](?:\[ *[TC]\d+\])? ?")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[^\[]|[\x00-\x08\x0b-\x1f\x7f]")
_PREFIX = re.compile(r"^(?:\(qemu\) )?(?:[^\s:]*qemu[^\s:]*): ?(?:error: )?")

# What QEMU says, in the order in which it is looked for, and what that is.
_STDERR_CAUSES = (
    (
        "memory",
        re.compile(r"cannot allocate memory|cannot set up guest memory|failed to allocate", re.IGNORECASE),
    ),
    (
        "kernel",
        re.compile(
            r"could not open kernel file|invalid kernel header|could not load kernel|linux kernel too old"
            r"|error loading uncompressed kernel|elf .*not supported|Error loading .*kernel",
            re.IGNORECASE,
        ),
    ),
    ("initrd", re.compile(r"initrd|could not read.*initial ram", re.IGNORECASE)),
    (
        "kvm",
        re.compile(
            r"/dev/kvm|failed to initialize kvm|KVM_|\bkvm\b.*(?:assert|fail)|accel/kvm|failed to set MSR",
            re.IGNORECASE,
        ),
    ),
    ("disk", re.compile(r"-blockdev|-drive|Could not open|failed to get .*lock", re.IGNORECASE)),
    (
        "option",
        re.compile(
            r"invalid option|unsupported machine type|is not a valid device|unable to find CPU model"
            r"|Property '.*' not found|Invalid parameter|Parameter '.*' (?:is missing|expects)"
            r"|requires an argument|invalid accelerator|Invalid SMP CPUs|Invalid CPU topology"
            r"|invalid object type|No '.*' bus found|Bus '.*' (?:not found|does not)|smp configuration"
            r"|: -[a-z]",
            re.IGNORECASE,
        ),
    ),
)
_WORDS = {
    "memory": "the host could not give the guest's memory",
    "kernel": "QEMU could not load the kernel",
    "initrd": "QEMU could not load the initrd",
    "kvm": "KVM failed",
    "disk": "QEMU could not open a disk",
    "option": "QEMU rejected an option",
}


class ExitCause(msgspec.Struct, frozen=True, kw_only=True):
    """Why a VMM ended.

    Args:
        kind: ``panic``, ``signal``, ``memory``, ``kernel``, ``initrd``, ``kvm``, ``disk``, ``option``, ``error`` (any other failure) or
            ``ended`` (the guest powered off or restarted).
        text: The cause in one line.
    """

    kind: str
    text: str


def describe_exit(
    status: int | None, stderr: bytes, console: bytes, *, sandbox_id: str | None = None, op: str | None = None
) -> VmmExitedError:
    """The error for a QEMU that ended.

    Args:
        status: Exit status, negative for a signal, None when unknown.
        stderr: End of its standard error.
        console: End of the guest's console.
    """
    cause = explain(status, stderr, console)
    return VmmExitedError(
        f"the virtual machine ended: {cause.text}",
        status=status,
        log_tail=printable_tail(stderr),
        console_tail=printable_tail(console),
        sandbox_id=sandbox_id,
        op=op,
    )


def explain(status: int | None, stderr: bytes, console: bytes) -> ExitCause:
    """The cause. A panic of the guest comes first: QEMU then ends as if all were well."""
    panic = find_panic(console)
    if panic is not None:
        return ExitCause(kind="panic", text=f"the guest kernel panicked: {panic}")
    lines = [
        line for line in printable_tail(stderr).splitlines() if line.strip() and ": warning: " not in line
    ]
    if status is not None and status < 0 and status not in (-signal.SIGABRT, -signal.SIGSYS):
        return ExitCause(kind="signal", text=_signal_text(-status))
    for kind, pattern in _STDERR_CAUSES:
        for line in lines:
            if pattern.search(line):
                return ExitCause(kind=kind, text=f"{_WORDS[kind]}: {_PREFIX.sub('', line.strip())}")
    if status is not None and status < 0:
        last = f": {_PREFIX.sub('', lines[-1].strip())}" if lines else ""
        return ExitCause(kind="signal", text=_signal_text(-status) + last)
    if status == 0:
        return ExitCause(kind="ended", text="the guest powered off or restarted")
    how = "with an unknown status" if status is None else f"with status {status}"
    last = f": {_PREFIX.sub('', lines[-1].strip())}" if lines else " and said nothing"
    return ExitCause(kind="error", text=f"QEMU ended {how}{last}")


def find_panic(console: bytes) -> str | None:
    """What the guest's kernel said as it panicked, None when it did not."""
    matches = _PANIC.findall(printable_tail(console, lines=None))
    return matches[0].strip() or "no reason given" if matches else None


def printable_tail(data: bytes, *, lines: int | None = _TAIL_LINES) -> str:
    """The last ``lines`` lines (None: all) without terminal control, as text."""
    text = _ESCAPES.sub("", data.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n"))
    kept = text.rstrip("\n").split("\n")
    return "\n".join(kept if lines is None else kept[-lines:])


def _signal_text(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    hints: dict[int, str] = {
        signal.SIGKILL: " (by a user, by the out-of-memory killer, or with its owner)",
        signal.SIGSYS: " (its system call filter: a call that this QEMU needs is denied; try seccomp=False)",
        signal.SIGABRT: " (it found a fault in itself)",
    }
    return f"QEMU was killed by {name}{hints.get(number, '')}"
