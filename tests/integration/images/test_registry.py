"""Pulls from a real registry on loopback: open, with a password, by tag and digest, by several processes at once."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

import casemate
from casemate import images
from casemate.cli import main
from casemate.config.settings import Settings
from casemate.errors import NotFoundError, RegistryError
from tests.support import registry
from tests.support.oci import Layout

pytestmark = [pytest.mark.root, pytest.mark.erofs, pytest.mark.registry]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        cache_root=tmp_path / "cache", state_root=tmp_path / "state", docker_config=tmp_path / "docker"
    )


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """Two layers, the upper with a whiteout, compressed."""
    made = Layout()
    made.add_image(
        [
            {"etc/": b"", "etc/passwd": b"root:x:0:0::/:/bin/sh\n", "gone": b"x"},
            {".wh.gone": b"", "big": os.urandom(300_000)},
        ],
        tag="1",
        compress=True,
    )
    return made.write(tmp_path / "layout")


def cached(settings: Settings, place: str) -> list[str]:
    return sorted(os.listdir(settings.cache_root / "images" / place))


def test_pull_when_registry_is_open_then_the_same_image_as_from_the_layout(
    open_registry: str, layout: Path, settings: Settings, tmp_path: Path
) -> None:
    registry.push(layout, f"{open_registry}/team/app:1")
    told: list[casemate.types.Progress] = []
    image = casemate.pull(f"{open_registry}/team/app:1", settings=settings, progress=told.append)
    assert image.name == f"{open_registry}/team/app:1"
    assert image.passwd.startswith("root:")
    other = images.resolve(
        f"oci:{layout}:1", settings=Settings(cache_root=tmp_path / "other", state_root=settings.state_root)
    )
    assert (image.digest, image.layers) == (other.digest, other.layers)
    assert image.rootfs.read_bytes() == other.rootfs.read_bytes()
    phases = [event.phase for event in told]
    assert list(dict.fromkeys(phases)) == ["download", "unpack", "pack"]
    last = [event for event in told if event.phase == "download"][-1]
    assert last.done_bytes == last.total_bytes > 300_000
    assert cached(settings, "parts") == cached(settings, "work") == []


def test_resolve_when_it_was_pulled_then_found_by_each_of_its_names_without_the_registry(
    open_registry: str, layout: Path, settings: Settings
) -> None:
    registry.push(layout, f"{open_registry}/names/app:latest")
    pulled = images.pull(f"docker://{open_registry}/names/app", settings=settings)
    elsewhere = replace(settings, default_registry=open_registry)
    for reference in (
        f"{open_registry}/names/app",
        f"{open_registry}/names/app:latest",
        f"docker://{open_registry}/names/app",
        pulled.digest,
        pulled.digest[7:19],
    ):
        assert images.resolve(reference, settings=settings, pull_policy="never") == pulled
    assert images.resolve("names/app", settings=elsewhere) == pulled
    with pytest.raises(
        NotFoundError, match=r"to fetch docker\.io/names/app:latest from its registry, say docker://names"
    ):
        images.resolve("names/app", settings=settings)


def test_pull_when_by_digest_then_that_and_no_other(
    open_registry: str, layout: Path, settings: Settings
) -> None:
    registry.push(layout, f"{open_registry}/by/digest:1")
    digest = images.pull(f"{open_registry}/by/digest:1", settings=settings).digest
    image = images.resolve(f"docker://{open_registry}/by/digest@{digest}", settings=settings)
    assert (image.name, image.digest) == (f"{open_registry}/by/digest@{digest}", digest)
    with pytest.raises(NotFoundError, match="manifest unknown"):
        images.pull(f"{open_registry}/by/digest@sha256:{'0' * 64}", settings=settings)


def test_pull_when_the_tag_moved_then_the_new_image(
    open_registry: str, layout: Path, settings: Settings, tmp_path: Path
) -> None:
    name = f"{open_registry}/moving/app:1"
    registry.push(layout, name)
    first = images.pull(name, settings=settings)
    newer = Layout()
    newer.add_image([{"new": b"n"}], tag="1")
    registry.push(newer.write(tmp_path / "newer"), name)
    assert images.resolve(f"docker://{name}", settings=settings) == first
    second = images.pull(name, settings=settings)
    assert second.digest != first.digest
    assert images.resolve(name, settings=settings) == second


def test_pull_when_nothing_has_that_name_then_not_found_and_nothing_is_left(
    open_registry: str, settings: Settings
) -> None:
    with pytest.raises(NotFoundError, match="has no image .*manifest unknown"):
        images.pull(f"{open_registry}/no/such:1", settings=settings)
    assert not settings.cache_root.exists()


def write_docker_config(settings: Settings, document: object) -> None:
    settings.docker_config.mkdir()
    (settings.docker_config / "config.json").write_text(json.dumps(document), "utf-8")


def test_pull_when_registry_wants_a_password_then_that_of_the_docker_configuration(
    locked_registry: str, layout: Path, settings: Settings
) -> None:
    name = f"{locked_registry}/private/app:1"
    registry.push(layout, name, credentials=True)
    with pytest.raises(RegistryError, match=rf"status 401.*docker login {locked_registry}") as caught:
        images.pull(name, settings=settings)
    assert (caught.value.status, caught.value.registry) == (401, locked_registry)
    auth = base64.b64encode(f"{registry.USER}:{registry.PASSWORD}".encode()).decode()
    write_docker_config(settings, {"auths": {locked_registry: {"auth": auth}}})
    assert images.pull(name, settings=settings).name == name


def test_pull_when_password_is_wrong_then_error_without_it(locked_registry: str, settings: Settings) -> None:
    auth = base64.b64encode(f"{registry.USER}:hunter2-secret".encode()).decode()
    write_docker_config(settings, {"auths": {locked_registry: {"auth": auth}}})
    with pytest.raises(RegistryError, match="credential of config.json is not enough") as caught:
        images.pull(f"{locked_registry}/private/other:1", settings=settings)
    assert caught.value.status == 401
    assert "hunter2" not in repr(caught.value) + str(caught.value) and auth not in str(caught.value)


def test_pull_when_a_helper_has_the_password_then_asked_for_that_host(
    locked_registry: str, layout: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{locked_registry}/helped/app:1"
    registry.push(layout, name, credentials=True)
    helper = tmp_path / "bin/docker-credential-test"
    helper.parent.mkdir()
    answer = json.dumps({"ServerURL": "x", "Username": registry.USER, "Secret": registry.PASSWORD})
    helper.write_text(f"#!/bin/sh\ncat >{tmp_path}/asked\necho '{answer}'\n", "utf-8")
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{helper.parent}:{os.environ['PATH']}")
    write_docker_config(settings, {"credHelpers": {locked_registry: "test"}})
    assert images.pull(name, settings=settings).name == name
    assert (tmp_path / "asked").read_text("utf-8").strip() == locked_registry


def test_pull_when_three_processes_ask_then_one_downloads(
    open_registry: str, layout: Path, settings: Settings
) -> None:
    name = f"{open_registry}/shared/app:1"
    registry.push(layout, name)
    code = (
        "import sys; from pathlib import Path; import casemate\n"
        "told = []\n"
        "image = casemate.pull(sys.argv[1], settings=casemate.Settings(cache_root=Path(sys.argv[2])), progress=told.append)\n"
        "print(image.digest, any(event.phase != 'wait' for event in told))"
    )
    argv = [sys.executable, "-c", code, name, str(settings.cache_root)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env) for _ in range(3)]
    answers = [process.communicate(timeout=100)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len({digest for digest, _ in answers}) == 1
    assert [told for _, told in answers].count("True") == 1
    assert cached(settings, "parts") == cached(settings, "work") == []


def test_command_line_when_pulled_then_listed_and_removed(
    open_registry: str,
    layout: Path,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = f"{open_registry}/cli/app:1"
    registry.push(layout, name)
    monkeypatch.setenv("CASEMATE_CACHE", str(settings.cache_root))
    monkeypatch.setenv("CASEMATE_STATE_ROOT", str(settings.state_root))
    assert main(["pull", "--json", name]) == 0
    pulled = json.loads(capsys.readouterr().out)
    assert pulled["name"] == name and pulled["fstype"] == "erofs"
    assert main(["pull", name]) == 0
    assert capsys.readouterr().out.split() == [name, pulled["digest"]]
    assert main(["images", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [pulled]
    assert main(["images", "gc", "--older-than", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"removed": [], "freed_bytes": 0, "kept": 1}
    assert main(["images", "rm", name]) == 0
    assert capsys.readouterr().out.split() == [name]
    assert main(["rmi", "--json", name]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"removed": []} and "is not stored; none is stored" in printed.err


async def test_async_pull_when_registry_is_open_then_the_image(
    open_registry: str, layout: Path, settings: Settings
) -> None:
    registry.push(layout, f"{open_registry}/async/app:1")
    image = await casemate.async_pull(f"{open_registry}/async/app:1", settings=settings)
    assert image.rootfs.exists()
