from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from casemate import guest
from casemate.config.settings import Settings
from casemate.errors import CasemateError, HostError, InvalidConfigError, UnsupportedError
from casemate.guest import assets, cpio
from tests.support.guest_files import make_bzimage, make_elf, make_kernel_deb, make_vmlinux, write_fake_apt

RELEASES = ["6.1.0-56-cloud-amd64", "6.12.117+deb12-cloud-amd64"]


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    path = tmp_path / "agent"
    path.write_bytes(make_elf(segments=[(1, b"agent")]))
    return path


@pytest.fixture
def roots(tmp_path: Path) -> Settings:
    return Settings(cache_root=tmp_path / "cache", state_root=tmp_path / "state")


@pytest.fixture
def apt_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    return write_fake_apt(tmp_path / "bin", RELEASES)


def _initrd_of(found: guest.GuestAssets) -> dict[str, bytes]:
    assert found.initrd is not None
    archive = found.initrd.read_bytes()
    assert len(archive) == found.initrd_bytes
    return {name.decode(): archive[start:end] for name, start, end in cpio.walk(archive)}


@pytest.mark.parametrize(
    ("wanted", "release"), [(None, RELEASES[1]), ("auto", RELEASES[1]), ("6.1", RELEASES[0])]
)
def test_resolve_of_series_gives_kernel_and_initrd(
    wanted: str | None, release: str, roots: Settings, agent: Path, apt_log: Path
) -> None:
    found = guest.resolve(wanted, machine="q35", settings=roots, agent=agent)

    assert found.kernel_release == release
    assert found.kernel.read_bytes() == make_vmlinux(release)
    assert found.agent == "casemate"
    assert found.modules == (
        "virtio_ring", "virtio", "virtio_pci", "vsock", "vmw_vsock_virtio_transport", "virtio_blk", "erofs", "overlay",
        "virtio_rng",
    )  # fmt: skip
    content = _initrd_of(found)
    assert content["init"] == agent.read_bytes()
    assert content["lib/casemate/modules.demand"] == b"virtio_rng.ko virtio.ko\n"


def test_resolve_for_microvm_takes_its_bus(roots: Settings, agent: Path, apt_log: Path) -> None:
    found = guest.resolve("6.1", machine="microvm", settings=roots, agent=agent)

    assert found.modules.index("virtio_mmio") < found.modules.index("vsock")


def test_resolve_again_asks_nobody_and_is_quick(roots: Settings, agent: Path, apt_log: Path) -> None:
    first = guest.resolve(machine="q35", settings=roots, agent=agent)
    before = apt_log.read_text()

    started = time.process_time()
    again = guest.resolve(machine="q35", settings=roots, agent=agent)
    spent_s = time.process_time() - started

    assert again == first
    assert apt_log.read_text() == before
    assert spent_s < 0.005


def test_resolve_with_all_cached_imports_nothing_heavy(roots: Settings, agent: Path, apt_log: Path) -> None:
    guest.resolve(machine="q35", settings=roots, agent=agent)
    program = (
        "import sys; from pathlib import Path; from casemate import guest; from casemate.config.settings import Settings\n"
        "guest.resolve(machine='q35', settings=Settings(cache_root=Path(sys.argv[1])), agent=Path(sys.argv[2]))\n"
        "print(*sorted({'lzma', 'subprocess', 'hashlib', 'shutil', 'tempfile', 'asyncio', 'mmap'} & set(sys.modules)))"
    )

    run = subprocess.run(
        [sys.executable, "-c", program, str(roots.cache_root), str(agent)],
        capture_output=True,
        text=True,
        check=True,
    )

    assert run.stdout.split() == []


def test_resolve_when_agent_is_replaced_makes_another_initrd(
    roots: Settings, agent: Path, apt_log: Path
) -> None:
    first = guest.resolve(machine="q35", settings=roots, agent=agent)
    newer = make_elf(segments=[(1, b"newer")])
    agent.write_bytes(newer)

    second = guest.resolve(machine="q35", settings=roots, agent=agent)

    assert second.initrd != first.initrd
    assert _initrd_of(second)["init"] == newer


def test_resolve_when_initrd_in_cache_was_cut_makes_it_again(
    roots: Settings, agent: Path, apt_log: Path
) -> None:
    first = guest.resolve(machine="q35", settings=roots, agent=agent)
    assert first.initrd is not None
    whole = first.initrd.read_bytes()
    first.initrd.write_bytes(whole[:100])

    guest.resolve(machine="q35", settings=roots, agent=agent)

    assert first.initrd.read_bytes() == whole


def test_resolve_of_read_only_cache_with_all_in_it_works(roots: Settings, agent: Path, apt_log: Path) -> None:
    first = guest.resolve(machine="q35", settings=roots, agent=agent)
    directories = [path for path in roots.cache_root.rglob("*") if path.is_dir()]
    for path in directories:
        path.chmod(0o555)

    assert guest.resolve(machine="q35", settings=roots, agent=agent) == first
    for path in directories:
        path.chmod(0o755)


def test_resolve_of_cache_that_cannot_be_written_names_the_setting(
    tmp_path: Path, agent: Path, apt_log: Path
) -> None:
    (tmp_path / "blocked").write_bytes(b"")

    with pytest.raises(HostError, match="CASEMATE_CACHE") as caught:
        guest.resolve(machine="q35", settings=Settings(cache_root=tmp_path / "blocked"), agent=agent)
    assert str(tmp_path / "blocked") in caught.value.target


def test_resolve_of_own_vmlinux_uses_it_in_place_with_nothing_to_load(
    tmp_path: Path, roots: Settings, agent: Path
) -> None:
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(make_vmlinux("6.12.0-casemate"))

    found = guest.resolve(kernel, machine="q35", settings=roots, agent=agent)

    assert (found.kernel, found.kernel_release, found.modules) == (kernel, "6.12.0-casemate", ())
    assert _initrd_of(found)["lib/casemate/modules.list"] == b""


def test_resolve_of_own_bzimage_boots_the_kernel_inside(tmp_path: Path, roots: Settings, agent: Path) -> None:
    image = tmp_path / "bzImage"
    image.write_bytes(make_bzimage(make_vmlinux("6.6.1-own"), release="6.6.1-own"))

    found = guest.resolve(str(image), machine="q35", settings=roots, agent=agent)

    assert found.kernel.read_bytes() == make_vmlinux("6.6.1-own")
    assert found.kernel_source == f"file {image}"


def test_resolve_of_kernel_package_takes_its_modules(tmp_path: Path, roots: Settings, agent: Path) -> None:
    package = tmp_path / "kernel.deb"
    package.write_bytes(make_kernel_deb("6.1.7"))

    found = guest.resolve(package, machine="q35", settings=roots, agent=agent)

    assert found.kernel_release == "6.1.7"
    assert "erofs" in found.modules


def test_resolve_of_own_kernel_takes_modules_beside_it(
    tmp_path: Path, roots: Settings, agent: Path, apt_log: Path
) -> None:
    cached = guest.resolve("6.1", machine="q35", settings=roots, agent=agent)
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(cached.kernel.read_bytes())

    assert guest.resolve(kernel, machine="q35", settings=roots, agent=agent).modules == cached.modules


def test_resolve_with_own_initrd_needs_no_agent(tmp_path: Path, roots: Settings) -> None:
    kernel, initrd = tmp_path / "vmlinux", tmp_path / "initrd"
    kernel.write_bytes(make_vmlinux())
    initrd.write_bytes(cpio.write([cpio.file("init", b"x")]))

    found = guest.resolve(kernel, initrd, machine="q35", settings=roots)

    assert (found.initrd, found.agent, found.initrd_bytes) == (initrd, "unknown", 512)


def test_resolve_with_own_image_has_no_initrd(tmp_path: Path, roots: Settings) -> None:
    kernel, image = tmp_path / "vmlinux", tmp_path / "image"
    kernel.write_bytes(make_vmlinux())
    image.write_bytes(bytes(510) + b"\x55\xaa" + bytes(3584))

    found = guest.resolve(kernel, image=image, machine="q35", settings=roots)

    assert (found.image, found.initrd, found.agent) == (image, None, "unknown")


@pytest.mark.parametrize(
    ("kernel", "initrd", "text"),
    [
        ("/no/such/vmlinux", None, "kernel /no/such/vmlinux does not exist"),
        ("6.x", None, "auto, a series such as 6.12, or the path of a kernel"),
        (None, "/no/such/initrd", "initrd /no/such/initrd does not exist"),
    ],
)
def test_resolve_of_wrong_names_says_so_and_makes_nothing(
    kernel: str | None, initrd: str | None, text: str, roots: Settings, agent: Path
) -> None:
    with pytest.raises(InvalidConfigError, match=text):
        guest.resolve(kernel, initrd, machine="q35", settings=roots, agent=agent)
    assert not roots.cache_root.exists()


def test_resolve_of_cut_kernel_and_initrd_makes_nothing(tmp_path: Path, roots: Settings, agent: Path) -> None:
    kernel, initrd = tmp_path / "bzImage", tmp_path / "initrd"
    kernel.write_bytes(make_bzimage(make_vmlinux())[:-50])
    initrd.write_bytes(cpio.write([cpio.file("init", bytes(900))])[:700])

    with pytest.raises(InvalidConfigError, match="cut short"):
        guest.resolve(kernel, machine="q35", settings=roots, agent=agent)
    with pytest.raises(InvalidConfigError, match="damaged"):
        guest.resolve(None, initrd, machine="q35", settings=roots, agent=agent)
    assert not list(roots.cache_root.rglob("vmlinux"))


def test_resolve_for_unknown_machine_lists_those_known(roots: Settings, agent: Path) -> None:
    with pytest.raises(InvalidConfigError, match="q35, microvm"):
        guest.resolve(machine="pc", settings=roots, agent=agent)


def test_resolve_with_agent_that_needs_a_linker_makes_no_initrd(
    roots: Settings, agent: Path, apt_log: Path
) -> None:
    agent.write_bytes(make_elf(segments=[(3, b"/lib/ld.so\0")]))

    with pytest.raises(UnsupportedError, match="dynamic linker"):
        guest.resolve(machine="q35", settings=roots, agent=agent)
    assert not list(roots.cache_root.rglob("*.img"))


def test_agent_path_without_agent_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "__file__", str(tmp_path / "guest/assets.py"))

    with pytest.raises(CasemateError, match="installed without the guest agent"):
        guest.agent_path()


def test_agent_path_finds_the_program_of_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "__file__", str(tmp_path / "guest/assets.py"))
    program = tmp_path / "_bin/casemate-agent"
    program.parent.mkdir()
    program.write_bytes(b"x")

    assert guest.agent_path() == program
