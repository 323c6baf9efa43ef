"""One way to unpack what kernels and their modules are packed in: gzip and xz by the standard library, the rest natively."""

from __future__ import annotations

from collections.abc import Callable

from casemate.errors import InvalidConfigError

__all__ = ["Decompress", "decompress"]

Decompress = Callable[..., bytes]
"""``(data, *, format, max_bytes) -> bytes``, as :func:`casemate._core.decompress`."""


def decompress(data: bytes, *, form: str, max_bytes: int, native: Decompress | None = None) -> bytes:
    """Decompress ``data``.

    Args:
        data: One whole compressed stream; what follows its end is ignored.
        form: ``gzip``, ``xz``, ``zstd`` or ``lz4-legacy``.
        max_bytes: The result may not be longer.
        native: For zstd and lz4; :func:`casemate._core.decompress` by default.

    Raises:
        InvalidConfigError: Damaged, cut short, or longer than ``max_bytes``.
    Blocks: for the decompression.
    """
    if form == "gzip":
        return _gzip(data, max_bytes)
    if form == "xz":
        return _xz(data, max_bytes)
    if native is None:
        from casemate._core import decompress as native
    assert native is not None
    return native(data, format=form, max_bytes=max_bytes)


def _gzip(data: bytes, max_bytes: int) -> bytes:
    import zlib

    stream = zlib.decompressobj(wbits=31)
    try:
        result = stream.decompress(data, max_bytes + 1)
    except zlib.error as exc:
        raise InvalidConfigError(f"damaged gzip data: {exc}") from exc
    return _checked(result, ended=stream.eof, form="gzip", max_bytes=max_bytes)


def _xz(data: bytes, max_bytes: int) -> bytes:
    import lzma

    stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)
    try:
        result = stream.decompress(data, max_bytes + 1)
    except lzma.LZMAError as exc:
        raise InvalidConfigError(f"damaged xz data: {exc}") from exc
    return _checked(result, ended=stream.eof, form="xz", max_bytes=max_bytes)


def _checked(result: bytes, *, ended: bool, form: str, max_bytes: int) -> bytes:
    if len(result) > max_bytes:
        raise InvalidConfigError(f"{form} data is longer than {max_bytes} bytes")
    if not ended:
        raise InvalidConfigError(f"{form} data is cut short after {len(result)} bytes of its content")
    return result
