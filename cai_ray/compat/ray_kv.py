"""Short texts between a driver and its workers, in Ray's own key-value store.

ray 2.60.0: the store of the control service is private (`ray.experimental.internal_kv`). It needs no port and
no shared disk, and it outlives workers that die. The public way would be a named actor: one more process to place, and
to keep alive longer than all others.
"""

from __future__ import annotations

_NAMESPACE = b"cai_ray"


def put(key: str, name: str, value: bytes) -> None:
    """Stores a value under a key and a name; it replaces the value before."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(f"{key}/{name}".encode(), value, overwrite=True, namespace=_NAMESPACE)


def get(key: str, name: str) -> bytes | None:
    """The value under a key and a name; None if there is none."""
    from ray.experimental.internal_kv import _internal_kv_get

    return _internal_kv_get(f"{key}/{name}".encode(), namespace=_NAMESPACE)


def names(key: str, prefix: str = "") -> list[str]:
    """The names under a key that begin with a prefix."""
    from ray.experimental.internal_kv import _internal_kv_list

    keys = _internal_kv_list(f"{key}/{prefix}".encode(), namespace=_NAMESPACE)
    return [name.decode().removeprefix(f"{key}/") for name in keys]


def forget(key: str) -> None:
    """Deletes all values under a key."""
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(f"{key}/".encode(), del_by_prefix=True, namespace=_NAMESPACE)
