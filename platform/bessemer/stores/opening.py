"""From a URL to its store."""

from __future__ import annotations

import re
from pathlib import Path

from bessemer.errors import StoreError
from bessemer.stores.store import Patience, Store

__all__ = ["is_remote", "is_url", "open_store"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


def open_store(url: str | Path, patience: Patience = Patience()) -> Store:  # noqa: B008  # frozen
    """The store at a URL; nothing is asked of it yet.

    Args:
        url: a path, ``file:///path``, ``https://host/path``, ``s3://bucket/prefix``, ``gs://bucket/prefix``, or
            another scheme that fsspec knows, such as ``az://``.
        patience: how long to try where a connection drops or a server is busy.

    Raises:
        StoreError: the URL is none of these.
    """
    text = str(url)
    scheme = _SCHEME.match(text)
    if scheme is None or isinstance(url, Path):
        from bessemer.stores.local import LocalStore

        return LocalStore(text, patience)
    match scheme[1].lower():
        case "file":
            from bessemer.stores.local import LocalStore

            return LocalStore(text, patience)
        case "http" | "https":
            from bessemer.stores.web import WebStore

            return WebStore(text, patience)
        case "s3":
            from bessemer.stores.s3 import S3Store

            return S3Store(text, patience)
        case "pipe":
            raise StoreError(
                f"{text}: pipe: runs a shell command, which no URL may do; give the address of the data itself."
            )
    if not text[scheme.end() :].startswith("//"):
        raise StoreError(f"{text}: is no URL of a store; write {scheme[1]}://..., or ./{text} for a path.")
    from bessemer.stores.fsspec_store import FsspecStore

    return FsspecStore(text, patience)


def is_remote(url: str | Path) -> bool:
    """Whether a URL leads elsewhere than to files of this machine."""
    scheme = None if isinstance(url, Path) else _SCHEME.match(url)
    return scheme is not None and scheme[1].lower() != "file"


def is_url(place: str | Path) -> bool:
    """Whether a place is given as a URL, and not as a path."""
    return not isinstance(place, Path) and _SCHEME.match(place) is not None
