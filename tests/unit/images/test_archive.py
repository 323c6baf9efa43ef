"""Archives: members by name, links in ``docker save``, hostile and cut files."""

from __future__ import annotations

import gzip
import hashlib
import tarfile
from pathlib import Path

import pytest

from casemate.errors import ImageError, NotFoundError
from casemate.images.archive import find_in_docker_archive, opened_archive
from casemate.images.source import Candidate, Plan
from tests.support.oci import Layout, docker_archive_files, member, sha256, tar


def find(path: Path, tag: str | None = None) -> Candidate:
    with opened_archive(path, reference="ref") as files:
        return find_in_docker_archive(files, path="app.tar", tag=tag, reference="ref", architecture="amd64")


def plan(path: Path, directory: Path) -> Plan:
    with opened_archive(path, reference="ref") as files:
        candidate = find_in_docker_archive(
            files, path="app.tar", tag=None, reference="ref", architecture="amd64"
        )
        return candidate.prepare(directory, lambda done, total: None)


@pytest.mark.parametrize("compress", [False, True])
def test_opened_archive_when_layout_then_members_read_back(tmp_path: Path, compress: bool) -> None:
    layout = Layout()
    layout.add_image([{"a": b"1" * 3_000_000}])
    path = layout.write_archive(tmp_path / "app.tar")
    if compress:
        path.write_bytes(gzip.compress(path.read_bytes()))
    reported: list[int] = []
    with opened_archive(path, reference="ref") as files:
        for name, data in layout.files().items():
            assert files.read(name, max_bytes=1 << 23) == data
            provided = files.provide(name, tmp_path, reported.append)
            assert provided is not None and provided.path.read_bytes() == data
            assert provided.digest == f"sha256:{hashlib.sha256(data).hexdigest()}"
        assert files.read("absent", max_bytes=1) is None
        assert files.provide("absent", tmp_path, reported.append) is None
        with pytest.raises(ImageError, match="at most 5"):
            files.read("index.json", max_bytes=5)
    assert max(reported) > 3_000_000


def test_find_in_docker_archive_when_one_image_then_plan(tmp_path: Path) -> None:
    layers = [{"a": b"1"}, {"b": b"2"}]
    path = tmp_path / "app.tar"
    path.write_bytes(tar(docker_archive_files(layers, config={"Cmd": ["sh"]})))
    made = plan(path, tmp_path)
    assert made.config.command == ("sh",)
    assert [layer.diff_id for layer in made.layers] == [sha256(tar(layer)) for layer in layers]
    assert [layer.digest for layer in made.layers] == [layer.diff_id for layer in made.layers]
    assert find(path).name == "app:1" and find(path, "1").digest == find(path, "app:1").digest == made.digest
    with pytest.raises(NotFoundError, match="no image '2'; it has app:1"):
        find(path, "2")


def test_find_in_docker_archive_when_layers_are_links_then_followed(tmp_path: Path) -> None:
    members = docker_archive_files([{"a": b"1"}, {"a": b"1"}])
    members["layer1/layer.tar"] = member(tarfile.SYMTYPE, link="../layer0/layer.tar")
    path = tmp_path / "app.tar"
    path.write_bytes(tar(members))
    made = plan(path, tmp_path)
    assert made.layers[0].diff_id == made.layers[1].diff_id == made.layers[1].digest


@pytest.mark.parametrize(
    ("link", "words"),
    [
        (member(tarfile.SYMTYPE, link="layer.tar"), "not a regular file"),
        (member(tarfile.SYMTYPE, link="/etc/passwd"), "is missing"),
        (member(tarfile.SYMTYPE, link="../../../../etc/passwd"), "is missing"),
        (member(tarfile.FIFOTYPE), "not a regular file"),
        (member(tarfile.DIRTYPE), "not a regular file"),
    ],
)
def test_find_in_docker_archive_when_layer_is_no_file_then_error(
    tmp_path: Path, link: tarfile.TarInfo, words: str
) -> None:
    members = docker_archive_files([{"a": b"1"}])
    members["layer0/layer.tar"] = link
    path = tmp_path / "app.tar"
    path.write_bytes(tar(members))
    with pytest.raises(ImageError, match=words):
        plan(path, tmp_path)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x"])
def test_opened_archive_when_member_escapes_then_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / "app.tar"
    path.write_bytes(tar({name: b"x"}))
    with pytest.raises(ImageError, match="leaves the archive"), opened_archive(path, reference="ref"):
        pass


@pytest.mark.parametrize("keep", [0, 100, 511, 700, 3000])
def test_opened_archive_when_cut_short_then_error(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "app.tar"
    path.write_bytes(tar({"a": b"x" * 5000, "b": b"y"})[:keep])
    with pytest.raises(ImageError, match="cut short"), opened_archive(path, reference="ref"):
        pass


@pytest.mark.parametrize("start", [b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0", b"BZh9"])
def test_opened_archive_when_otherwise_compressed_then_error_says_so(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "app.tar"
    path.write_bytes(start + b"\0" * 1000)
    with (
        pytest.raises(ImageError, match="compressed with something else than gzip"),
        opened_archive(path, reference="ref"),
    ):
        pass


def test_opened_archive_when_extension_header_is_huge_then_error_not_memory(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 30
    path = tmp_path / "app.tar"
    path.write_bytes(gzip.compress(info.tobuf() + b"\0" * (6 << 20)))
    with pytest.raises(ImageError, match=r"not a tar file|damaged"), opened_archive(path, reference="ref"):
        pass


def test_opened_archive_when_size_is_negative_then_error_not_a_loop(tmp_path: Path) -> None:
    first, second = tarfile.TarInfo("a"), tarfile.TarInfo("b")
    second.size = -1024
    path = tmp_path / "app.tar"
    path.write_bytes(first.tobuf(tarfile.GNU_FORMAT) + second.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with pytest.raises(ImageError, match="damaged"), opened_archive(path, reference="ref"):
        pass


def test_opened_archive_when_absent_or_not_a_file_then_error(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError), opened_archive(tmp_path / "absent", reference="ref"):
        pass
    with pytest.raises(ImageError, match="not a regular file"), opened_archive(tmp_path, reference="ref"):
        pass


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("manifest.json", b"[]", "has no image"),
        ("manifest.json", b"{}", "manifest.json of image"),
        (
            "manifest.json",
            b'[{"Config": "absent.json", "Layers": []}]',
            "'absent.json' of image 'ref' is missing",
        ),
        ("manifest.json", b'[{"Config": "../../etc/passwd", "Layers": []}]', "leaves the archive"),
    ],
)
def test_find_in_docker_archive_when_manifest_is_damaged_then_error(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    path = tmp_path / "app.tar"
    path.write_bytes(tar(docker_archive_files([{"a": b"1"}]) | {name: content}))
    with pytest.raises(ImageError, match=words):
        find(path)


def test_find_in_docker_archive_when_configuration_is_not_its_name_then_error(tmp_path: Path) -> None:
    members = docker_archive_files([{"a": b"1"}])
    name = next(name for name in members if name.endswith(".json") and name != "manifest.json")
    content = members[name]
    assert isinstance(content, bytes)
    path = tmp_path / "app.tar"
    path.write_bytes(tar(members | {name: content.replace(b"linux", b"Linux")}))
    with pytest.raises(ImageError, match="damaged: its digest is"):
        find(path)
