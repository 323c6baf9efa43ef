"""OCI layouts: which image is found, and what is refused before anything is unpacked."""

from __future__ import annotations

from pathlib import Path

import pytest

from casemate.errors import ImageError, NotFoundError
from casemate.images.layout import find_in_layout
from casemate.images.source import Candidate, DirectoryFiles, Plan
from tests.support.oci import INDEX, Layout

DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"


def find(root: Path, tag: str | None = None) -> Candidate:
    files = DirectoryFiles(root, reference="ref")
    return find_in_layout(files, path=str(root), tag=tag, reference="ref", architecture="amd64")


def prepare(candidate: Candidate, tmp_path: Path) -> Plan:
    return candidate.prepare(tmp_path, lambda done, total: None)


def test_find_when_layout_has_one_image_then_plan_of_it(tmp_path: Path) -> None:
    layout = Layout()
    config: dict[str, object] = {
        "Entrypoint": ["/bin/app"],
        "Cmd": ["run"],
        "Env": ["A=1"],
        "WorkingDir": "/srv",
        "User": "app",
        "Volumes": {"/data": {}, "/a": {}},
        "ExposedPorts": {"80/tcp": {}},
        "StopSignal": "SIGINT",
        "Labels": {"k": "v"},
    }
    descriptor = layout.add_image([{"a": b"1"}, {"b": b"2"}], config=config, compress=True)
    candidate = find(layout.write(tmp_path / "app"))
    assert (candidate.digest, candidate.name) == (descriptor["digest"], "app:latest")
    plan = prepare(candidate, tmp_path)
    assert (plan.config.entrypoint, plan.config.command, plan.config.env) == (
        ("/bin/app",),
        ("run",),
        ("A=1",),
    )
    assert (plan.config.working_dir, plan.config.user, plan.config.stop_signal) == ("/srv", "app", "SIGINT")
    assert (plan.config.volumes, plan.config.exposed_ports) == (("/a", "/data"), ("80/tcp",))
    assert (plan.config.labels, plan.created) == ({"k": "v"}, "2026-01-02T03:04:05Z")
    assert len(plan.layers) == 2
    assert all(layer.path.is_file() and layer.digest != layer.diff_id for layer in plan.layers)


def test_find_when_several_tags_then_the_named_one(tmp_path: Path) -> None:
    layout = Layout()
    first = layout.add_image([{"a": b"1"}], tag="1")
    second = layout.add_image([{"a": b"2"}], tag="docker.io/library/app:2")
    root = layout.write(tmp_path / "app")
    assert (find(root, "1").digest, find(root, "1").name) == (first["digest"], "app:1")
    for tag in ("2", "docker.io/library/app:2"):
        assert (find(root, tag).digest, find(root, tag).name) == (second["digest"], "docker.io/library/app:2")
    with pytest.raises(NotFoundError, match=r"name one of 1, docker\.io/library/app:2"):
        find(root)
    with pytest.raises(NotFoundError, match=r"no image '3'.*it has 1, docker"):
        find(root, "3")


def test_find_when_no_tag_is_given_then_latest(tmp_path: Path) -> None:
    layout = Layout()
    layout.add_image([{"a": b"1"}], tag="1")
    latest = layout.add_image([{"a": b"2"}], tag="latest")
    assert find(layout.write(tmp_path / "app")).digest == latest["digest"]


def test_find_when_index_has_platforms_then_ours(tmp_path: Path) -> None:
    layout = Layout()
    layout.add_image([{"a": b"arm"}], architecture="arm64")
    layout.add_image([{"a": b"attestation"}], architecture="unknown")
    ours = layout.add_image([{"a": b"amd"}])
    assert find(layout.write(tmp_path / "app")).digest == ours["digest"]


@pytest.mark.parametrize("index_type", [INDEX, DOCKER_LIST])
def test_find_when_index_is_nested_then_followed(tmp_path: Path, index_type: str) -> None:
    layout = Layout()
    entries = []
    for architecture in ("arm64", "amd64"):
        descriptor = layout.add_image([{"a": architecture.encode()}], architecture=architecture, listed=False)
        entries.append(descriptor | {"platform": {"os": "linux", "architecture": architecture}})
    inner = layout.add_json({"schemaVersion": 2, "manifests": entries}, index_type)
    layout.list_descriptor(inner, tag="multi")
    assert find(layout.write(tmp_path / "app"), "multi").digest == entries[1]["digest"]


def test_find_when_index_nests_without_end_then_error(tmp_path: Path) -> None:
    layout = Layout()
    descriptor = layout.add_image([{"a": b""}], listed=False)
    for _ in range(5):
        descriptor = layout.add_json({"manifests": [descriptor]}, INDEX)
    layout.list_descriptor(descriptor, tag=None)
    with pytest.raises(ImageError, match="nests more than"):
        find(layout.write(tmp_path / "app"))


def test_find_when_only_other_platforms_then_error_names_them(tmp_path: Path) -> None:
    layout = Layout()
    layout.add_image([{"a": b""}], architecture="arm64")
    with pytest.raises(ImageError, match=r"nothing for linux/amd64: its index lists linux/arm64"):
        find(layout.write(tmp_path / "app"))


def test_prepare_when_docker_media_types_then_accepted(tmp_path: Path) -> None:
    layout = Layout()
    layout.add_image([{"a": b"1"}], compress=True, layer_type=DOCKER_LAYER, manifest_type=DOCKER_MANIFEST)
    plan = prepare(find(layout.write(tmp_path / "app")), tmp_path)
    assert plan.layers[0].media_type == DOCKER_LAYER


@pytest.mark.parametrize(
    ("layer_type", "words"),
    [
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "foreign layer"),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "foreign layer"),
        ("application/vnd.oci.image.layer.v1.tar+encrypted", "media type"),
        ("application/wasm", "media type"),
    ],
)
def test_prepare_when_layer_is_of_another_form_then_error(
    tmp_path: Path, layer_type: str, words: str
) -> None:
    layout = Layout()
    layout.add_image([{"a": b"1"}], layer_type=layer_type)
    with pytest.raises(ImageError, match=words) as caught:
        prepare(find(layout.write(tmp_path / "app")), tmp_path)
    assert caught.value.reference == "ref" and caught.value.digest.startswith("sha256:")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "arm64"}, "linux/arm64, linux/amd64 is expected"),
        ({"os": "windows"}, "windows/amd64"),
        ({"rootfs": {"type": "layers", "diff_ids": []}}, "1 layers, its configuration names 0"),
        ({"rootfs": {"type": "layers", "diff_ids": ["sha256:../../x"]}}, "has the digest"),
        ({"rootfs": 7}, "configuration"),
    ],
)
def test_prepare_when_configuration_does_not_fit_then_error(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    layout = Layout()
    descriptor = layout.add_image([{"a": b"1"}], listed=False, **changes)  # type: ignore[arg-type]
    layout.list_descriptor(descriptor, tag=None)
    with pytest.raises(ImageError, match=words):
        prepare(find(layout.write(tmp_path / "app")), tmp_path)


@pytest.mark.parametrize("which", ["manifest", "config", "layer"])
@pytest.mark.parametrize("damage", ["missing", "changed", "short"])
def test_prepare_when_a_blob_is_damaged_then_error_names_it(tmp_path: Path, which: str, damage: str) -> None:
    layout = Layout()
    layout.add_image([{"a": b"1" * 2000}])
    root = layout.write(tmp_path / "app")
    # The order in which they were added.
    blobs = dict(zip(("config", "layer", "manifest"), layout.blobs.items(), strict=True))
    digest, data = blobs[which]
    path = root / "blobs/sha256" / digest
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"X" + data[1:] if damage == "changed" else data[:-1])
    if which == "layer" and damage == "changed":
        # A layer's content is read only when it is unpacked.
        assert prepare(find(root), tmp_path).layers[0].digest == f"sha256:{digest}"
        return
    with pytest.raises(ImageError) as caught:
        prepare(find(root), tmp_path)
    assert caught.value.digest == f"sha256:{digest}"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("oci-layout", None, "no file oci-layout"),
        ("oci-layout", b"{", "oci-layout of image"),
        ("oci-layout", b'{"imageLayoutVersion": "2.0.0"}', "layout version '2.0.0'"),
        ("index.json", None, "no file index.json"),
        ("index.json", b"[]", "index.json of image"),
        ("index.json", b'{"manifests": []}', "its index lists no image"),
        ("index.json", b"[" * 100_000, "index.json of image"),
        ("index.json", b"\xff\xfe", "index.json of image"),
        (
            "index.json",
            b'{"manifests": [{"digest": "sha256:../../../etc/passwd", "size": 1}]}',
            "has the digest",
        ),
        ("index.json", b'{"manifests": [{"digest": "sha512:00", "size": 1}]}', "has the digest"),
        ("index.json", b" " * (9 << 20), "at most"),
    ],
)
def test_find_when_layout_is_damaged_then_error(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    layout = Layout()
    layout.add_image([{"a": b""}])
    root = layout.write(tmp_path / "app")
    if content is None:
        (root / name).unlink()
    else:
        (root / name).write_bytes(content)
    with pytest.raises(ImageError, match=words) as caught:
        find(root)
    assert caught.value.reference == "ref"
