"""The OCI specification and storages of a container that was made from an image. Pure.

Source: OCI runtime specification 1.1, ``config.md`` and ``config-linux.md``; the defaults are those container engines share.
"""

from __future__ import annotations

from collections.abc import Mapping

from casemate.agent.messages import (
    LinuxCapabilities,
    LinuxDeviceCgroup,
    LinuxNamespace,
    LinuxResources,
    LinuxSpec,
    Mount,
    PosixRlimit,
    ProcessSpec,
    Root,
    Spec,
    Storage,
    User,
)

__all__ = ["CAPABILITIES", "build_spec", "build_storages", "guest_rootfs_path"]

GUEST_CONTAINERS = "/run/kata-containers"
"""Where both the reference system's agent and ours keep what belongs to a container."""

OVERLAY_DIRECTORY_OPTION = "io.katacontainers.volume.overlayfs.create_directory"

CAPABILITIES = tuple(
    f"CAP_{name}"
    for name in (
        "CHOWN",
        "DAC_OVERRIDE",
        "FSETID",
        "FOWNER",
        "MKNOD",
        "NET_RAW",
        "SETGID",
        "SETUID",
        "SETFCAP",
        "SETPCAP",
        "NET_BIND_SERVICE",
        "SYS_CHROOT",
        "KILL",
        "AUDIT_WRITE",
    )
)

_MOUNTS = (
    Mount(destination="/proc", type="proc", source="proc", options=("nosuid", "noexec", "nodev")),
    Mount(
        destination="/dev",
        type="tmpfs",
        source="tmpfs",
        options=("nosuid", "strictatime", "mode=755", "size=65536k"),
    ),
    Mount(
        destination="/dev/pts",
        type="devpts",
        source="devpts",
        options=("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
    ),
    Mount(
        destination="/dev/shm",
        type="tmpfs",
        source="shm",
        options=("nosuid", "noexec", "nodev", "mode=1777", "size=65536k"),
    ),
    Mount(destination="/dev/mqueue", type="mqueue", source="mqueue", options=("nosuid", "noexec", "nodev")),
    Mount(destination="/sys", type="sysfs", source="sysfs", options=("nosuid", "noexec", "nodev", "ro")),
    Mount(
        destination="/sys/fs/cgroup",
        type="cgroup",
        source="cgroup",
        options=("nosuid", "noexec", "nodev", "relatime", "ro"),
    ),
)

_MASKED = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/firmware",
)

_READONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


def _device(kind: str, major: int, minor: int, access: str = "rwm") -> LinuxDeviceCgroup:
    return LinuxDeviceCgroup(allow=True, type=kind, major=major, minor=minor, access=access)


_DEVICES = (
    LinuxDeviceCgroup(allow=False, type="a", access="rwm"),
    _device("c", 1, 3),
    _device("c", 1, 5),
    _device("c", 1, 7),
    _device("c", 1, 8),
    _device("c", 1, 9),
    _device("c", 5, 0),
    _device("c", 5, 1),
    _device("c", 5, 2),
    LinuxDeviceCgroup(allow=True, type="c", major=136, access="rwm"),
)


def guest_rootfs_path(container_id: str) -> str:
    """Guest path of a container's root directory."""
    return f"{GUEST_CONTAINERS}/{container_id}/rootfs"


def build_storages(container_id: str, *, driver: str, source: str, fstype: str) -> tuple[Storage, ...]:
    """Storages of a root file system: the read-only image disk, and a writable overlay on guest memory over it.

    Args:
        driver: ``blk`` with a PCI path as ``source``, or ``mmioblk`` with a device.
        fstype: Of the image disk.
    """
    base = f"{GUEST_CONTAINERS}/{container_id}"
    lower, upper, work = f"{base}/lower", f"{base}/overlay/upper", f"{base}/overlay/work"
    return (
        Storage(driver=driver, source=source, fstype=fstype, mount_point=lower, options=("ro",)),
        Storage(
            driver="overlayfs",
            source="overlay",
            fstype="overlay",
            mount_point=guest_rootfs_path(container_id),
            driver_options=(f"{OVERLAY_DIRECTORY_OPTION}={upper}", f"{OVERLAY_DIRECTORY_OPTION}={work}"),
            options=(f"lowerdir={lower}", f"upperdir={upper}", f"workdir={work}"),
        ),
    )


def build_process(
    args: tuple[str, ...], env: tuple[str, ...], cwd: str, user: User, *, terminal: bool
) -> ProcessSpec:
    """A process with the capabilities and limits that container engines give by default.

    A user other than root gets no effective capability, as with other engines.
    """
    held = CAPABILITIES if user.uid == 0 else ()
    return ProcessSpec(
        terminal=terminal,
        user=user,
        args=args,
        env=(*env, "TERM=xterm") if terminal and not any(entry.startswith("TERM=") for entry in env) else env,
        cwd=cwd,
        capabilities=LinuxCapabilities(bounding=CAPABILITIES, effective=held, permitted=held),
        rlimits=(PosixRlimit(type="RLIMIT_NOFILE", hard=1048576, soft=1048576),),
    )


def build_spec(
    container_id: str,
    process: ProcessSpec,
    *,
    hostname: str,
    readonly_rootfs: bool,
    annotations: Mapping[str, str] | None = None,
) -> Spec:
    """The specification of a container with mount, pid, ipc, uts and cgroup namespaces of its own.

    The network is the guest's: a sandbox is one network.
    """
    return Spec(
        process=process,
        root=Root(path=guest_rootfs_path(container_id), readonly=readonly_rootfs),
        hostname=hostname,
        mounts=_MOUNTS,
        annotations=dict(annotations or {}),
        linux=LinuxSpec(
            cgroups_path=f"/{container_id}",
            namespaces=tuple(LinuxNamespace(type=kind) for kind in ("pid", "ipc", "uts", "mount", "cgroup")),
            resources=LinuxResources(devices=_DEVICES),
            masked_paths=_MASKED,
            readonly_paths=_READONLY,
        ),
    )
