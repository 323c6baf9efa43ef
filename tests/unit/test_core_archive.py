"""The native archive functions as Python sees them: classes and attributes of their errors, progress."""

from __future__ import annotations

import errno
import gzip
from pathlib import Path

import pytest

from casemate import _core
from casemate.errors import HostError, ImageError, InvalidConfigError
from tests.support.oci import sha256, tar


def test_unpack_layer_when_whole_then_size_and_progress(tmp_path: Path) -> None:
    data = tar({"a": b"x" * 1000})
    packed = gzip.compress(data)
    (tmp_path / "layer").write_bytes(packed)
    root = tmp_path / "root"
    root.mkdir()
    told: list[int] = []
    size_bytes = _core.unpack_layer(
        tmp_path / "layer",
        root,
        media_type="application/vnd.oci.image.layer.v1.tar+gzip",
        digest=sha256(packed),
        diff_id=sha256(data),
        progress=told.append,
    )
    assert size_bytes == len(data) and told[-1] == len(packed)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"digest": f"sha256:{'0' * 64}"}, "the digest is sha256:"),
        ({"digest": "sha512:00"}, 'digest "sha512:00" is not supported'),
        ({"diff_id": f"sha256:{'0' * 64}"}, "the diff_id is sha256:"),
        ({"media_type": "application/wasm"}, 'media type "application/wasm" is not supported'),
        ({"max_bytes": 1}, "more than 1 bytes"),
        ({"max_entries": 0}, "more than 0 members"),
    ],
)
def test_unpack_layer_when_refused_then_image_error_with_digest(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    data = tar({"a": b"x"})
    (tmp_path / "layer").write_bytes(data)
    (tmp_path / "root").mkdir()
    arguments: dict[str, object] = {"media_type": "", "digest": sha256(data)} | changes
    with pytest.raises(ImageError, match=words) as caught:
        _core.unpack_layer(tmp_path / "layer", tmp_path / "root", **arguments)  # type: ignore[arg-type]
    assert caught.value.digest == arguments["digest"]


def test_unpack_layer_when_file_is_absent_then_host_error(tmp_path: Path) -> None:
    with pytest.raises(HostError) as caught:
        _core.unpack_layer(tmp_path / "absent", tmp_path, media_type="", digest=sha256(b""))
    assert (caught.value.errno, caught.value.target) == (errno.ENOENT, str(tmp_path / "absent"))


def test_unpack_layer_when_progress_raises_then_it_comes_through(tmp_path: Path) -> None:
    data = tar({"a": b"x"})
    (tmp_path / "layer").write_bytes(data)
    (tmp_path / "root").mkdir()

    def stop(done_bytes: int) -> None:
        raise LookupError(done_bytes)

    with pytest.raises(LookupError):
        _core.unpack_layer(
            tmp_path / "layer", tmp_path / "root", media_type="", digest=sha256(data), progress=stop
        )


def test_decompress_when_whole_then_data() -> None:
    assert _core.decompress(gzip.compress(b"data"), format="gzip", max_bytes=4) == b"data"


@pytest.mark.parametrize(
    ("data", "form", "path", "words"),
    [
        (gzip.compress(b"data", mtime=0), "gzip", "data", "more than 3 bytes"),
        (gzip.compress(b"dat", mtime=0)[:-6], "gzip", "data", "cut short"),
        (b"????", "zstd", "data", "damaged|cut short"),
        (b"????", "lz4-legacy", "data", "damaged"),
        (b"", "xz", "format", "lz4-legacy, zstd or gzip is expected"),
    ],
)
def test_decompress_when_it_can_not_then_error_names_the_argument(
    data: bytes, form: str, path: str, words: str
) -> None:
    with pytest.raises(InvalidConfigError, match=words) as caught:
        _core.decompress(data, format=form, max_bytes=3)
    assert caught.value.path == path


def test_read_tree_file_when_too_large_then_image_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1234")
    assert _core.read_tree_file(tmp_path, "/a", max_bytes=4) == b"1234"
    assert _core.read_tree_file(tmp_path, "b", max_bytes=4) is None
    with pytest.raises(ImageError, match="more than 3 bytes") as caught:
        _core.read_tree_file(tmp_path, "a", max_bytes=3)
    assert caught.value.digest == ""


def test_remove_tree_when_it_can_not_then_host_error(tmp_path: Path) -> None:
    (tmp_path / "tree" / "a").mkdir(parents=True)
    _core.remove_tree(tmp_path / "tree")
    _core.remove_tree(tmp_path / "tree")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(HostError) as caught:
        _core.remove_tree("/proc/self")
    assert caught.value.target == "/proc/self"
