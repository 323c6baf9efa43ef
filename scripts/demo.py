"""A Debian userland in a virtual machine: what runs where, how long each phase took, and that nothing stays behind.

``./dev demo`` runs it. Exit status 0 when all of it held.
"""

from __future__ import annotations

import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from msgspec.structs import replace

import casemate
from casemate.cli.options import progress_printer
from scripts.debian_image import build_debian_image
from tests.support.leaks import find_leaks, start_permanent_threads, take_snapshot

# One shell line in the container: its kernel, its release file, its Python.
COMMAND = (
    "uname -r; cat /etc/os-release; "
    "python3 -c 'import sys; print(sys.version.split()[0], sum(range(10)), sep=\" and 0 + 1 + … + 9 = \")'"
)


def main() -> int:
    """Run the demo, return its exit status."""
    with tempfile.TemporaryDirectory(prefix="casemate-demo-") as state_root:
        # A state root of its own: what other sandboxes of this host do is none of the demo's business.
        return demonstrate(replace(casemate.Settings.from_environment(), state_root=Path(state_root)))


def demonstrate(settings: casemate.Settings) -> int:
    """Run the image and print what it says, return the exit status."""
    image = build_debian_image(settings.cache_root)

    def take() -> dict[str, frozenset[str]]:
        return take_snapshot(whole_host=True, state_root=settings.state_root)

    start_permanent_threads()
    before = take()
    result = casemate.run(
        f"oci:{image}", ["sh", "-c", COMMAND], settings=settings, progress=progress_printer()
    )
    left = find_leaks(before, take)

    if result.exit_code != 0:
        print(f"the container ended with status {result.exit_code}:\n{result.stderr}", file=sys.stderr)
        return 1
    guest_kernel, *release, python = result.stdout.splitlines()
    print(f"kernel of the host    {platform.release()}")
    print(f"kernel of the guest   {guest_kernel}")
    print(f"python3 in the guest  {python}")
    print("\n/etc/os-release of the container")
    print("\n".join(f"  {line}" for line in release))
    print("\nphases of the start")
    print_phases(result.timings)
    if left:
        print("\nleft behind:\n  " + "\n  ".join(left), file=sys.stderr)
        return 1
    print("\nnothing is left: no process, mount, cgroup, socket or state file")
    return 0


def print_phases(timings: Sequence[casemate.Phase]) -> None:
    """A table with a bar for each phase."""
    total_ms = sum(phase.duration_ms for phase in timings)
    for phase in timings:
        bar = "#" * round(40 * phase.duration_ms / total_ms) if total_ms else ""
        print(f"  {phase.name:<14} {phase.duration_ms:9.1f} ms  {bar}".rstrip())
    print(f"  {'all':<14} {total_ms:9.1f} ms")


if __name__ == "__main__":
    sys.exit(main())
