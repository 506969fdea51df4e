"""vLLM's asynchronous engine and the error of a dead one.

vllm 0.29.0: both stand in `vllm.v1` only, whose modules move between versions. Importing this module imports vllm.
"""

from __future__ import annotations

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

__all__ = ["AsyncLLM", "EngineDeadError"]
