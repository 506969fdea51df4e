"""Short texts between a driver and its workers, in Ray's own key-value store: no actor, no port, no shared disk.

Written for Ray 2.60, whose functions for this store begin with an underscore.
"""

from __future__ import annotations

_NAMESPACE = b"cai_ray"


def put(key: str, name: str, value: bytes) -> None:
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(f"{key}/{name}".encode(), value, overwrite=True, namespace=_NAMESPACE)


def get(key: str, name: str) -> bytes | None:
    from ray.experimental.internal_kv import _internal_kv_get

    return _internal_kv_get(f"{key}/{name}".encode(), namespace=_NAMESPACE)


def names(key: str, prefix: str = "") -> list[str]:
    """The names under a key that begin with a prefix."""
    from ray.experimental.internal_kv import _internal_kv_list

    paths = _internal_kv_list(f"{key}/{prefix}".encode(), namespace=_NAMESPACE)
    return [path.decode().removeprefix(f"{key}/") for path in paths]


def forget(key: str) -> None:
    """Deletes a key with everything under it."""
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(f"{key}/".encode(), del_by_prefix=True, namespace=_NAMESPACE)
