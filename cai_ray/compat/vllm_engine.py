"""vLLM's asynchronous engine, the error of a dead one, and the tokens of requests under way.

vllm 0.29.0: the first two stand in `vllm.v1` only, whose modules move between versions. Importing this module imports
vllm. A request whose final output alone is asked for says nothing before that; the front end has its tokens.
"""

from __future__ import annotations

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

__all__ = ["AsyncLLM", "EngineDeadError", "tokens_under_way"]


def tokens_under_way(llm: AsyncLLM) -> int:
    """Tokens that an engine has generated for requests that are not finished."""
    states = list(llm.output_processor.request_states.values())
    return sum(state.detokenizer.num_output_tokens() for state in states if state.detokenizer)
