"""Build an OCI image of a Debian userland with Python, from the distribution's own packages.

``python -m scripts.debian_image [CACHE]`` prints the layout's path. Packages are really configured
(``mmdebstrap --variant=essential``): about half a minute once; later calls only compare package versions.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from casemate.bench.layout import write_layout
from casemate.config.settings import Settings

__all__ = ["build_debian_image"]

# Raise it when what is built changes.
RECIPE = 1
PACKAGES = ("python3",)
# Packages whose versions stand for the image's: a newer one of these makes a new image.
WATCHED = ("base-files", "bash", "coreutils", "dash", "libc6", "libssl3", "python3", "python3.11-minimal")
NOT_NEEDED = ("doc", "man", "locale", "info", "lintian")
TAG = "debian"
ENVIRONMENT = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8")
HOOKS = Path("/usr/share/mmdebstrap/hooks/merged-usr")


def build_debian_image(cache: Path) -> Path:
    """Return the image layout for the packages of today, building it under ``cache`` when it is not there. Blocks: up to minutes."""
    suite = _suite()
    layout = cache / "images" / f"debian-{suite}-{_key(suite)}"
    layout.parent.mkdir(parents=True, exist_ok=True)
    with (layout.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not layout.exists():
            _build(suite, layout)
    return layout


def _build(suite: str, layout: Path) -> None:
    if shutil.which("mmdebstrap") is None:
        raise SystemExit("mmdebstrap is missing: ./dev setup installs it")
    print(f"building a Debian image ({suite}, {', '.join(PACKAGES)}); about half a minute", file=sys.stderr)
    scratch = Path(tempfile.mkdtemp(prefix=".build-", dir=layout.parent))
    try:
        layer = scratch / "layer.tar"
        command = ["mmdebstrap", "--quiet", "--variant=essential", f"--include={','.join(PACKAGES)}"]
        command += ['--aptopt=APT::Install-Recommends "false"']
        command += [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in NOT_NEEDED]
        if HOOKS.is_dir():
            command.append(f"--hook-dir={HOOKS}")
        # The builder's own name and resolver have no place in an image.
        command.append('--customize-hook=rm -f "$1/etc/hostname" "$1/etc/resolv.conf"')
        command += ["--format=tar", suite, str(layer), *_sources()]
        made = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | {"SOURCE_DATE_EPOCH": "0"}
        )
        if made.returncode != 0:
            raise SystemExit(f"mmdebstrap ended with status {made.returncode}:\n{made.stderr[-4000:]}")
        whole = scratch / "layout"
        write_layout(whole, layer, tag=TAG, command=["/bin/bash"], environment=ENVIRONMENT)
        whole.rename(layout)
    finally:
        shutil.rmtree(scratch)


def _suite() -> str:
    release = platform.freedesktop_os_release()
    return release.get("VERSION_CODENAME", "bookworm") if release.get("ID") == "debian" else "bookworm"


def _sources() -> list[str]:
    """The host's own package sources where it is a Debian; mmdebstrap's default elsewhere."""
    if platform.freedesktop_os_release().get("ID") != "debian":
        return []
    candidates = (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list"))
    return [str(path) for path in candidates if path.exists()][:1]


def _key(suite: str) -> str:
    """Digest of all that the image depends on."""
    versions = ""
    if shutil.which("apt-cache"):
        policy = subprocess.run(
            ["apt-cache", "policy", *WATCHED],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"LC_ALL": "C"},
        )
        versions = "".join(line for line in policy.stdout.splitlines() if line.startswith("  Candidate:"))
    text = f"{RECIPE} {suite} {platform.machine()} {PACKAGES} {NOT_NEEDED} {versions}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def main() -> int:
    """Print the layout's path."""
    cache = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else Settings.from_environment().cache_root
    print(build_debian_image(cache))
    return 0


if __name__ == "__main__":
    sys.exit(main())
