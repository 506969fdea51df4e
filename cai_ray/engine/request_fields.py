"""The fields of a request to an endpoint: what is sent at first, and what an endpoint's refusals change.

Servers differ in what they take. A field that one of them refuses is left out, renamed or made smaller. The change is
tried on the request that was refused, and once that is answered it holds for the engine's life.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cai_ray.config.engine import EngineConfig
from cai_ray.engine.refusals import Refused, read_refusals, refuses_model, refuses_something
from cai_ray.errors import InputError, RowError

NEUTRAL: dict[str, Any] = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Sampling from the model's own distribution. Without them vLLM, SGLang and llama.cpp sample by defaults of their own
or of the served model's generation_config.json. OpenAI's own API has the first of them alone."""
_RENAMED = {"max_tokens": "max_completion_tokens"}
_FEWEST_LOGPROBS = 2
_WITHOUT = "; use a model and an endpoint that give log-probabilities"
# Fields without which an answer would mean something else, and what to do.
_NEEDED = {
    "logprobs": f"the probabilities of the options cannot be read without it{_WITHOUT}",
    "top_logprobs": f"the probabilities of the options cannot be read without it{_WITHOUT}",
    "continue_final_message": "a begun answer cannot be continued without it; set continues: false",
    "add_generation_prompt": "a begun answer cannot be continued without it; set continues: false",
    "max_tokens": "answers would have no limit without it; leave_out: [max_tokens] accepts that",
}

Changes = dict[str, str | int | None]
"""By field what is sent in its place: another name, a smaller number, or nothing (None). A refused temperature stands
with its value, since another one may be taken."""


def key_of(field: str, value: Any) -> str:
    return f"temperature={value:g}" if field == "temperature" and isinstance(value, int | float) else field


class RequestFields:
    """What one engine sends, with the changes that its endpoint has taught it."""

    def __init__(self, config: EngineConfig):
        self._config = config
        self._name = f"endpoint {config.base_url}"
        self.learned: Changes = {}
        self._accepted: set[str] = set()

    def complete(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a request by the settings: neutral sampling, then `fields`, then `extra`, without what
        `leave_out` names or `extra` sets to null."""
        body = NEUTRAL | dict(fields) | self._config.extra
        return {k: v for k, v in body.items() if v is not None and k not in self._config.leave_out}

    def change(self, body: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
        """The fields as they are sent, after what was learned and what this request tries."""
        changes = self.learned | changes
        sent: dict[str, Any] = {}
        for field, value in body.items():
            instead = changes.get(key_of(field, value), field)
            if isinstance(instead, int):
                sent[field] = min(value, instead)
            elif instead is not None:
                sent[instead] = value
        return sent

    def accept(self, sent: Mapping[str, Any], changes: Changes) -> Changes:
        """Notes that a request was answered, and returns what of its changes is new."""
        self._accepted |= sent.keys()
        new = {key: instead for key, instead in changes.items() if key not in self.learned}
        self.learned |= changes
        return new

    def react(self, response: str, said: str, sent: dict[str, Any]) -> Changes:
        """The changes that an error response asks for.

        Args:
            response: its text.
            said: its status and message, for errors.
            sent: the request's fields.

        Raises:
            InputError: it refuses what must not be left out, so that every row would fail.
            RowError: it refuses this request, and not a field.
        """
        changes: Changes = {}
        refused = read_refusals(response, sent)
        # What matters least goes first: a server may take either of two fields, and not both.
        for field in (NEUTRAL.keys() & refused.keys()) - self._config.extra.keys() or refused.keys():
            changes |= self._change(field, refused[field], said, sent)
        if not changes and refuses_model(response) and "model" not in self._accepted:
            raise InputError(
                f"{self._name}: {said}; check base_url and the model's name, {sent.get('model')!r}"
            )
        if not changes and refuses_something(response):  # perhaps it is what few servers know
            changes = self.guesses(sent)
        if not changes:
            raise RowError(f"refused by the endpoint: {said}")
        return changes

    def react_to_failure(self, response: str, sent: dict[str, Any]) -> Changes:
        """The changes that an answer with a status of 500 or more asks for: some servers fail at a field that they do
        not know. It refuses a field only if it names one that was never taken, as such; any other failure may pass.
        """
        changes: Changes = {}
        for field, refused in read_refusals(response, sent).items():
            if refused.unsupported and field not in self._accepted | self._config.extra.keys():
                if field in _RENAMED:
                    changes[field] = _RENAMED[field]
                elif field not in (*_NEEDED, *_RENAMED.values()):
                    changes[key_of(field, sent[field])] = None
        return changes

    def guesses(self, sent: Mapping[str, Any]) -> Changes:
        """What few servers know is left out, where one refuses or fails without a word."""
        fields = NEUTRAL.keys() & sent.keys() - self._accepted - self._config.extra.keys()
        return dict.fromkeys(sorted(fields))

    @property
    def knows_any(self) -> bool:
        """Whether a request was answered before."""
        return bool(self._accepted)

    def _change(self, field: str, refused: Refused, said: str, sent: Mapping[str, Any]) -> Changes:
        original = next((old for old, new in _RENAMED.items() if new == field and old not in sent), field)
        if field in self._config.extra:
            if field in self._accepted or (original in _RENAMED and not refused.unsupported):
                return {}
            raise InputError(
                f"{self._name}: {said}; `extra` asks for {field}: take it out, or give another value"
            )
        if field in ("logprobs", "top_logprobs") and "top_logprobs" in sent:
            limit = refused.limit or 0
            if _FEWEST_LOGPROBS <= limit < sent["top_logprobs"]:
                return {"top_logprobs": limit}
        if original in _NEEDED:
            if field in self._accepted or (original in _RENAMED and not refused.unsupported):
                return {}  # of this row, such as an answer that would be too long
            if field in _RENAMED:
                return {field: _RENAMED[field]}
            raise InputError(f"{self._name}: {said}; {_NEEDED[original]}")
        return {key_of(field, sent[field]): None}


def describe(changes: Changes) -> str:
    """One line on what was learned, and how to say it from the start."""
    parts = [f"sends {key} as {new}" for key, new in changes.items() if isinstance(new, str)]
    parts += [f"asks for {key}={most} at most" for key, most in changes.items() if isinstance(most, int)]
    if without := sorted(key for key, instead in changes.items() if instead is None):
        names = sorted({key.partition("=")[0] for key in without})
        parts.append(f"leaves out {', '.join(without)} (from the start with leave_out: [{', '.join(names)}])")
        if NEUTRAL.keys() & names:
            parts.append("where the server has sampling defaults of its own, they hold")
    return "; ".join(parts)
