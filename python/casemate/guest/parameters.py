"""Parameters of the guest's kernel for each machine and accelerator. Pure."""

from __future__ import annotations

__all__ = ["kernel_parameters"]


def kernel_parameters(machine: str, accel: str, *, max_vcpus: int, debug: bool = False) -> tuple[str, ...]:
    """The parameters that a guest of ours boots with, in order."""
    words = ["tsc=reliable", "no_timer_check", "rcupdate.rcu_expedited=1", "noreplace-smp", "reboot=k",
             "cryptomgr.notests", "net.ifnames=0", "console=ttyS0", "debug" if debug else "quiet", "panic=-1",
             f"nr_cpus={max_vcpus}", "mitigations=off", "random.trust_cpu=on", "memhp_default_state=online"]
    if machine == "microvm" and accel == "tcg":
        words.append("tsc_early_khz=2450000")
    return tuple(words)
