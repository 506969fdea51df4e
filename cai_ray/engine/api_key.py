"""The key of an OpenAI-compatible endpoint. It comes only from this process's environment."""

from __future__ import annotations

import os

from cai_ray.config.engine import EngineConfig
from cai_ray.errors import InputError


def key_variable(config: EngineConfig) -> str:
    """The environment variable that holds the key; empty if the endpoint is asked without one.

    A key that happens to be in the environment is sent only over an encrypted connection, unless it is named for this
    endpoint.
    """
    if config.api_key_env is not None:
        return config.api_key_env
    return "OPENAI_API_KEY" if str(config.base_url).startswith("https://") else ""


def read_key(config: EngineConfig) -> str:
    """The key; empty if the endpoint is asked without one.

    Raises:
        InputError: the variable is not set, or its value cannot be a key.
    """
    variable = key_variable(config)
    key = os.environ.get(variable, "").strip() if variable else ""
    if variable and not key:
        raise InputError(
            f"environment variable {variable} is not set, but {config.base_url} needs the key in it; "
            "export it (on every node), or set api_key_env to another name, or to '' for an endpoint without a key"
        )
    if not (key.isascii() and key.isprintable() and " " not in key):  # the HTTP library would print it
        raise InputError(
            f"environment variable {variable} holds characters that no key has; export only the key"
        )
    return key
