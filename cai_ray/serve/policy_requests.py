"""Requests to the policies, in the form that vLLM takes, and what is refused before it gets there.

vLLM renders these requests itself and would read a special token in a content as structure of the prompt. So a content
with such a token is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import HTTPException
from pydantic import ValidationError
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest

from cai_ray.prompts.messages import plain_messages
from cai_ray.prompts.templates import TemplateSet, Thinking
from cai_ray.serve.schemas import ChatRequest, CompletionsRequest


def refuse_control_tokens(
    turns: Sequence[dict[str, str]], control_tokens: Sequence[str], thinking: Thinking | None = None
) -> None:
    """Raises HTTPException 400 if a content holds one of the model's control tokens.

    Args:
        thinking: the marks of thoughts, which an answer that is sent back may hold.
    """
    marks = {thinking.open, thinking.close} if thinking else set()
    for i, turn in enumerate(turns):
        allowed = marks if turn["role"] == "assistant" else set()
        token = next((t for t in control_tokens if t in turn["content"] and t not in allowed), None)
        if token is not None:
            raise HTTPException(
                400, f"messages.{i}.content holds {token!r}, a control token of this model; leave it out"
            )


def chat_request(
    body: ChatRequest, turns: list[dict[str, str]], templates: TemplateSet, max_tokens: int
) -> Any:
    """vLLM's request for an answer to `turns`, asked as the policy is asked in training."""
    return _vllm_request(
        ChatCompletionRequest,
        **_sampling(body, max_tokens),
        messages=plain_messages(templates.answer_messages(turns)),
        logprobs=body.logprobs,
        top_logprobs=body.top_logprobs if body.logprobs else None,
    )


def completion_request(body: CompletionsRequest, max_tokens: int) -> Any:
    """vLLM's request for the continuation of a raw text."""
    return _vllm_request(
        CompletionRequest, **_sampling(body, max_tokens), prompt=body.prompt, logprobs=body.logprobs
    )


def _sampling(body: ChatRequest | CompletionsRequest, max_tokens: int) -> dict[str, Any]:
    try:
        fields = body.sampling(max_tokens)
    except ValueError as e:
        raise HTTPException(400, str(e)) from e
    # Without a number the engine gives what the context has room for, up to the server's limit (policy.py).
    return fields if body.tokens is None else fields | {"max_tokens": body.tokens}


def _vllm_request(kind: Any, **fields: Any) -> Any:
    """A request of vLLM's. What it refuses beyond our own limits is the client's to correct, too."""
    try:
        return kind(**fields)
    except ValidationError as e:
        raise HTTPException(400, e.errors()[0]["msg"]) from None
