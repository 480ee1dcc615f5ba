"""spach-doctor --cache: what the cache of finished exports holds."""

from __future__ import annotations

import datetime
from typing import Any

from spach_deploy.bundle.cache import CacheEntry, Store
from spach_deploy.common.files import CACHE_VARIABLE, NO_CACHE, is_own
from spach_deploy.common.operating_system import make_private
from spach_deploy.common.text import escaped, json_text
from spach_deploy.pipeline.cache import SIZE_VARIABLE, open_store

_NO_CACHE = (
    f"There is no cache: {CACHE_VARIABLE}={NO_CACHE}, or this user has no home directory."
    f" Give a directory with {CACHE_VARIABLE}=DIR."
)


def shown(*, as_json: bool) -> str:
    """The cache as text or JSON: folder, size, limit and entries, the last used first."""
    store = open_store()
    if store is None:
        return "null" if as_json else _NO_CACHE
    entries = store.entries()
    total = sum(entry.size_bytes for entry in entries)
    if as_json:
        facts = {"place": str(store.root), "bytes": total, "limit_bytes": store.limit_bytes}
        return json_text({**facts, "entries": [_plain(entry) for entry in entries]})
    lines = [
        f"place      {store.root}  ({CACHE_VARIABLE})",
        f"size       {total / 1e6:,.0f} MB of {store.limit_bytes / 1e6:,.0f} MB  ({SIZE_VARIABLE})",
        f"exports    {len(entries)}{', the last used first:' if entries else ''}{_why_none(store)}",
        *(f"  {_line(entry)}" for entry in entries),
    ]
    return escaped(lines)


def _why_none(store: Store) -> str:
    """Why entries of a directory in which others may write are not used; empty otherwise."""
    if not store.root.exists() or is_own(store.root):
        return ""
    return f": nothing is taken from where others may write ({make_private(store.root)})"


def cleared() -> str:
    """Empty the cache. Returns a sentence with the number of removed exports."""
    store = open_store()
    count = 0 if store is None else store.clear()
    return f"{count} finished {'export was' if count == 1 else 'exports were'} removed from the cache."


def _line(entry: CacheEntry) -> str:
    name = f"{entry.about.get('model', '')} {entry.about.get('precision', '')}".strip()
    return f"{name:<24} {entry.size_bytes / 1e6:>7,.0f} MB  used {_time(entry.used)}  {entry.about.get('target', '')}"


def _plain(entry: CacheEntry) -> dict[str, Any]:
    times = {"made": _time(entry.made), "used": _time(entry.used)}
    return {"key": entry.key, "bytes": entry.size_bytes, **times, **entry.about}


def _time(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.strftime("%Y-%m-%d %H:%M UTC")
