"""A real registry (the Debian package docker-registry) on a loopback port, filled by skopeo."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

__all__ = ["PASSWORD", "USER", "find_program", "push", "serving"]

USER, PASSWORD = "reader", "opensesame"
# bcrypt of the password: the only form that this registry reads.
_HTPASSWD = f"{USER}:$2b$04$abcdefghijklmnopqrstuuFuhxWRTXIsURoluSTZ1N4tYaWGn9oOi\n"
_PACKAGE = "docker-registry"
_ADDRESS = re.compile(rb"listening on (127\.0\.0\.1:\d+)")
_START_S = 60.0


def find_program(cache: Path) -> str:
    """The registry's program: the installed one, else out of its package, which is not installed: that would start a service."""
    installed = shutil.which(_PACKAGE)
    if installed is not None:
        return installed
    unpacked = cache / _PACKAGE
    program = unpacked / "usr/bin" / _PACKAGE
    if not program.exists():
        packages = cache / f"{_PACKAGE}.packages"
        packages.mkdir(exist_ok=True)
        fetch = ["apt-get", "download", "-q", _PACKAGE]
        if subprocess.run(fetch, cwd=packages, capture_output=True, check=False).returncode:
            subprocess.run(["apt-get", "update", "-qq"], capture_output=True, check=True)
            subprocess.run(fetch, cwd=packages, capture_output=True, check=True)
        (package,) = packages.glob("*.deb")
        fresh = cache / f"{_PACKAGE}.new"
        shutil.rmtree(fresh, ignore_errors=True)
        subprocess.run(["dpkg-deb", "-x", package, fresh], check=True)
        fresh.rename(unpacked)
        shutil.rmtree(packages)
    return str(program)


@contextlib.contextmanager
def serving(program: str, directory: Path, *, locked: bool = False) -> Iterator[str]:
    """The address ``127.0.0.1:PORT`` of a registry with its data below ``directory``.

    Args:
        locked: Only :data:`USER` may read and write.
    """
    directory.mkdir(parents=True)
    access = ""
    if locked:
        (directory / "htpasswd").write_text(_HTPASSWD, "utf-8")
        access = f"auth: {{htpasswd: {{realm: test, path: {directory}/htpasswd}}}}\n"
    config = directory / "config.yml"
    config.write_text(
        "version: 0.1\nlog: {level: info}\n"
        f"storage: {{filesystem: {{rootdirectory: {directory}/data}}, delete: {{enabled: true}}}}\n"
        f'http: {{addr: "127.0.0.1:0"}}\n{access}',
        "utf-8",
    )
    process = subprocess.Popen(
        [program, "serve", str(config)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    killer = threading.Timer(_START_S, process.kill)
    killer.start()
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, b"")
        address = next((found[1].decode() for line in lines if (found := _ADDRESS.search(line))), None)
        killer.cancel()
        assert address is not None, "the registry ended, or did not listen in a minute"
        # Its log would fill the pipe.
        drain = threading.Thread(target=lambda: all(lines), daemon=True)
        drain.start()
        yield address
    finally:
        killer.cancel()
        killer.join()
        process.kill()
        process.wait()
    drain.join()
    process.stderr.close()


def push(layout: Path, target: str, *, credentials: bool = False) -> None:
    """Copy the image of a layout to ``HOST:PORT/NAME:TAG``."""
    argv = ["skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"]
    argv += ["--dest-creds", f"{USER}:{PASSWORD}"] if credentials else []
    result = subprocess.run(
        [*argv, f"oci:{layout}", f"docker://{target}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
