from __future__ import annotations

import pytest

from casemate.hypervisor.qemu.failure import describe_exit, explain, find_panic, printable_tail

PANIC = (
    b"\x1b[2J[    0.000000] Linux version 6.12\r\n"
    b"[    1.234567][    T1] Kernel panic - not syncing: No working init found.  Try passing init= option\r\n"
    b"[    1.234600] CPU: 0 PID: 1 Comm: swapper/0\r\n"
    b"[    1.300000] ---[ end Kernel panic - not syncing: No working init found. ]---\r\n"
)


@pytest.mark.parametrize(
    ("status", "stderr", "kind", "text"),
    [
        (1, b"qemu-system-x86_64: -device bogus: 'bogus' is not a valid device model name\n", "option", "'bogus' is not"),
        (1, b"/usr/bin/qemu-system-x86_64: -bogus: invalid option\n", "option", "-bogus: invalid option"),
        (1, b"qemu-system-x86_64: unsupported machine type\nUse -machine help\n", "option", "unsupported machine type"),
        (1, b"qemu-system-x86_64: unable to find CPU model 'x'\n", "option", "unable to find CPU model"),
        (1, b"qemu: could not open kernel file '/x': No such file or directory\n", "kernel", "'/x'"),
        (1, b"qemu: invalid kernel header\n", "kernel", "invalid kernel header"),
        (1, b"qemu-system-x86_64: cannot set up guest memory 'pc.ram': Cannot allocate memory\n", "memory", "pc.ram"),
        (1, b"Could not access KVM kernel module: Permission denied\nqemu: failed to initialize kvm: Permission denied\n",
         "kvm", "Permission denied"),
        (1, b"qemu-system-x86_64: -blockdev driver=raw: Could not open '/d': No such file\n", "disk", "/d"),
        (1, b"something else\n", "error", "status 1: something else"),
        (1, b"", "error", "said nothing"),
        (None, b"", "error", "unknown status"),
        (0, b"qemu-system-x86_64: warning: x\n", "ended", "powered off"),
        (-9, b"", "signal", "SIGKILL (by a user, by the out-of-memory killer"),
        (-11, b"", "signal", "SIGSEGV"),
        (-6, b"qemu-system-x86_64: error: failed to set MSR 0x10a to 0x69\n", "kvm", "failed to set MSR"),
        (-6, b"", "signal", "SIGABRT"),
        (-31, b"", "signal", "seccomp=False"),
        (-64, b"", "signal", "SIGRTMAX"),
    ],
)  # fmt: skip
def test_explain_when_qemu_ended_then_names_the_cause(
    status: int | None, stderr: bytes, kind: str, text: str
) -> None:
    cause = explain(status, stderr, b"login: ")

    assert cause.kind == kind
    assert text in cause.text
    assert "\n" not in cause.text


def test_explain_when_guest_panicked_then_the_panic_comes_first() -> None:
    cause = explain(0, b"", PANIC)

    assert cause.kind == "panic"
    assert cause.text == "the guest kernel panicked: No working init found.  Try passing init= option"
    assert find_panic(b"all is well") is None


def test_explain_when_only_a_warning_stands_in_stderr_then_it_is_no_cause() -> None:
    stderr = b"qemu: warning: -cpu: feature\nqemu: -smp: invalid\n"

    assert "invalid" in explain(1, stderr, b"").text


def test_describe_exit_when_called_then_carries_status_and_tails_without_terminal_control() -> None:
    error = describe_exit(1, b"qemu: -x: invalid option\n", PANIC, sandbox_id="s1", op="qemu.run")

    assert (error.status, error.sandbox_id, error.op) == (1, "s1", "qemu.run")
    assert error.log_tail == "qemu: -x: invalid option"
    assert error.console_tail.startswith("[    0.000000] Linux")
    assert str(error).startswith("the virtual machine ended: the guest kernel panicked")


def test_printable_tail_when_guest_sends_anything_then_stays_bounded_text() -> None:
    assert printable_tail(b"a\x00b\x07\xff\n" * 50, lines=2) == "ab�\nab�"
    assert printable_tail(b"") == ""
