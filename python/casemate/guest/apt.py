"""Kernels from apt: which ones the package lists offer, and how to get one without installing it. Needs no root.

Debian's ``cloud`` flavour comes first (small, all virtio); where there is none, Ubuntu's ``generic``, whose modules are a
package of their own. Choosing is pure; :class:`Apt` runs the tools.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from casemate.errors import CasemateError, InvalidConfigError, UnsupportedError
from casemate.guest.command import CommandResult, run_command

__all__ = ["Apt", "AptKernel", "Progress", "choose_kernel", "parse_packages", "series_of", "version_key"]

Progress = Callable[[str, int, int], None]
"""``(step, done, total)``; ``total`` is 0 when it is not known."""

_KERNEL_NAME = re.compile(r"linux-image-(?P<release>\d+\.\d+\.\d+\S*?-(?P<flavour>cloud-amd64|generic))")
_FLAVOURS = ("cloud-amd64", "generic")
_OPTIONS = (
    # A cache directory that only root may enter can't be written by apt's own download user.
    *("-o", "APT::Sandbox::User=root"),
    *("-o", "APT::Get::AllowUnauthenticated=false"),
    *("-o", "Acquire::Retries=2", "-o", "Acquire::http::Timeout=30", "-o", "Acquire::https::Timeout=30"),
)
_LIST_DEADLINE_S = 60.0
_FETCH_DEADLINE_S = 900.0


class AptKernel(msgspec.Struct, frozen=True, kw_only=True):
    """A kernel package that can be downloaded."""

    package: str
    version: str
    release: str
    flavour: str
    size_bytes: int

    @property
    def series(self) -> str:
        """``6.12`` of ``6.12.117+deb12-cloud-amd64``."""
        return series_of(self.release)

    @property
    def id(self) -> str:
        """Name of its directory in the cache."""
        return f"{self.package}-{self.version.replace(':', '%3a').replace('/', '_')}"


def series_of(release: str) -> str:
    """The first two numbers of a kernel release."""
    found = re.match(r"\d+\.\d+", release)
    return found.group() if found else release


def version_key(text: str) -> tuple[int, ...]:
    """The numbers of a release or version in their order, so that 6.1.0-56 is newer than 6.1.0-9."""
    return tuple(int(number) for number in re.findall(r"\d+", text))


def parse_packages(text: str) -> tuple[AptKernel, ...]:
    """Kernels among the stanzas that ``apt-cache show`` printed: those that can be downloaded."""
    kernels = []
    for stanza in text.split("\n\n"):
        fields: dict[str, str] = {}
        for line in stanza.splitlines():
            key, separator, value = line.partition(": ")
            if separator and not line.startswith(" "):
                fields.setdefault(key, value.strip())
        name = _KERNEL_NAME.fullmatch(fields.get("Package", ""))
        # A stanza without a file name is of an installed package that no list offers any more.
        if name is None or not fields.get("Filename") or not fields.get("Version"):
            continue
        size = fields.get("Size", "0")
        kernels.append(
            AptKernel(
                package=fields["Package"],
                version=fields["Version"],
                release=name["release"],
                flavour=name["flavour"],
                size_bytes=int(size) if size.isdigit() else 0,
            )
        )
    return tuple(kernels)


def choose_kernel(kernels: Iterable[AptKernel], series: str | None) -> AptKernel:
    """The newest kernel of ``series`` (None: of the newest series), of the best flavour that has one.

    Raises:
        InvalidConfigError: There is none of that series; the text lists those that there are.
    """
    known = tuple(kernels)
    matching = [kernel for kernel in known if series in (None, kernel.series)]
    if not matching:
        offered = ", ".join(sorted({kernel.series for kernel in known}, key=version_key)) or "none"
        raise InvalidConfigError(
            f"kernel series {series} is not offered by this host's package lists; they have: {offered}",
            path="kernel",
        )
    best = min(_FLAVOURS.index(kernel.flavour) for kernel in matching)
    return max(
        (kernel for kernel in matching if kernel.flavour == _FLAVOURS[best]),
        key=lambda kernel: (version_key(kernel.release), version_key(kernel.version)),
    )


class Apt:
    """apt of this host.

    Args:
        timeout_factor: Multiplies deadlines.
        progress: Told how far a download is.
    """

    __slots__ = ("_factor", "_progress")

    def __init__(self, *, timeout_factor: float = 1.0, progress: Progress | None = None) -> None:
        self._factor = timeout_factor
        self._progress = progress

    @staticmethod
    def is_installed() -> bool:
        """Whether the host has apt."""
        return shutil.which("apt-get") is not None and shutil.which("apt-cache") is not None

    def list_kernels(self) -> tuple[AptKernel, ...]:
        """Kernels that can be downloaded.

        Raises:
            UnsupportedError: There are no package lists; the text says what to run. As root they are fetched once.
        Blocks: for apt, about half a second; for the lists, tens of seconds.
        """
        kernels = self._query()
        if not kernels:
            self._update("the package lists have no kernel")
            kernels = self._query()
        if not kernels:
            raise UnsupportedError(
                "apt offers no cloud or generic kernel for amd64", capability="kernel package"
            )
        return kernels

    def _query(self) -> tuple[AptKernel, ...]:
        found = self._run(
            "apt-cache", "search", "--names-only", r"^linux-image-[0-9].*-(cloud-amd64|generic)$"
        )
        names = [line.split(" ", 1)[0] for line in found.output.splitlines()]
        names = [name for name in names if _KERNEL_NAME.fullmatch(name)]
        if not names:
            return ()
        return parse_packages(self._run("apt-cache", "show", "--no-all-versions", *names).output)

    def _update(self, reason: str) -> None:
        if os.geteuid() != 0:
            raise UnsupportedError(f"{reason}; run once: sudo apt-get update", capability="apt package lists")
        self._report("package lists", 0, 0)
        result = self._run("apt-get", *_OPTIONS, "update", deadline_s=_FETCH_DEADLINE_S)
        if result.status != 0:
            raise UnsupportedError(
                f"{reason}, and apt-get update failed: {result.error_text}", capability="apt package lists"
            )

    def download(self, kernel: AptKernel, directory: Path) -> tuple[Path, ...]:
        """Download the packages of ``kernel`` into ``directory`` and return their files; apt checks their signatures' hashes.

        Raises:
            UnsupportedError: apt could not; the text has its words.
        Blocks: for the network, at most 15 min.
        """
        wanted = [f"{kernel.package}={kernel.version}"]
        if kernel.flavour == "generic":
            wanted.append(f"linux-modules-{kernel.release}")
        result = self._run(
            "apt-get", *_OPTIONS, "-q", "-o", "APT::Status-Fd={status_fd}", "download", *wanted,
            deadline_s=_FETCH_DEADLINE_S, directory=directory, on_status_line=self._on_status(kernel),
        )  # fmt: skip
        files = tuple(sorted(directory.glob("*.deb")))
        if result.status != 0 or len(files) != len(wanted):
            raise UnsupportedError(
                f"apt-get could not download {' '.join(wanted)}: {result.error_text}",
                capability="kernel package",
            )
        return files

    def refresh(self, reason: str) -> bool:
        """Fetch the package lists again when that is allowed here; whether it was done."""
        if os.geteuid() != 0:
            return False
        try:
            self._update(reason)
        except UnsupportedError:
            return False
        return True

    def _on_status(self, kernel: AptKernel) -> Callable[[str], None]:
        def on_line(line: str) -> None:
            fields = line.split(":")
            if len(fields) >= 3 and fields[0] == "dlstatus":
                with_fraction = re.match(r"[0-9.]+", fields[2])
                percent = float(with_fraction.group()) if with_fraction else 0.0
                self._report(kernel.package, int(kernel.size_bytes * percent / 100), kernel.size_bytes)

        return on_line

    def _report(self, step: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(step, done, total)

    def _run(
        self,
        *argv: str,
        deadline_s: float = _LIST_DEADLINE_S,
        directory: Path | None = None,
        on_status_line: Callable[[str], None] | None = None,
    ) -> CommandResult:
        try:
            return run_command(
                argv, deadline_s=deadline_s * self._factor, directory=directory, on_status_line=on_status_line
            )
        except CasemateError as exc:
            exc.op = exc.op or "guest.kernel"
            raise
