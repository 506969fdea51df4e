"""Short texts between a driver and its workers, in Ray's own key-value store: no actor, no port, no shared disk."""

from __future__ import annotations

# Ray's own key-value store carries short texts between a driver and its workers: no actor, no port, no shared disk.
_NAMESPACE = b"cai_ray"


def put(key: str, what: str, value: bytes) -> None:
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(f"{key}/{what}".encode(), value, overwrite=True, namespace=_NAMESPACE)


def get(key: str, what: str) -> bytes | None:
    from ray.experimental.internal_kv import _internal_kv_get

    return _internal_kv_get(f"{key}/{what}".encode(), namespace=_NAMESPACE)


def names(key: str, beginning: str = "") -> list[str]:
    """What was put under a key: the names that begin so."""
    from ray.experimental.internal_kv import _internal_kv_list

    found = _internal_kv_list(f"{key}/{beginning}".encode(), namespace=_NAMESPACE)
    return [name.decode().removeprefix(f"{key}/") for name in found]


def forget(key: str) -> None:
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(f"{key}/".encode(), del_by_prefix=True, namespace=_NAMESPACE)
