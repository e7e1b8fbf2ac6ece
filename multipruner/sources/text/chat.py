"""Conversations: how data sets write them, and how they become text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multipruner.core.errors import CalibrationError

Messages = list[dict[str, str]]
"""Objects with a ``role`` and a ``content`` each, as chat templates take them."""
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""Names of ShareGPT and its like, as chat templates call them; all others stay as they are."""
_KEYS = (("role", "content"), ("from", "value"))
PLAIN = "plain"
TEMPLATES = {
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}",
    PLAIN: "",
}
"""Templates that have a name here; :data:`PLAIN` is paragraphs "role: text"."""


def messages_of(value: Any) -> Messages | None:
    """Return a conversation as a data set holds it, or ``None`` where a value is none.

    Objects with ``role`` and ``content`` or with ``from`` and ``value`` (ShareGPT), in a list or, as some versions of
    ``datasets`` give them, as lists in an object. Content in parts counts with its parts of text.
    """
    if isinstance(value, Mapping) and value and all(isinstance(inner, list) for inner in value.values()):
        value = [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not value:
        return None
    found = [_message(entry) for entry in value]
    return None if None in found else [message for message in found if message and message["content"].strip()]


def _message(entry: Any) -> dict[str, str] | None:
    if not isinstance(entry, Mapping):
        return None
    for who, what in _KEYS:
        if isinstance(role := entry.get(who), str) and what in entry:
            content = entry[what]
            if isinstance(content, list):
                parts = [part.get("text") for part in content if isinstance(part, Mapping)]
                content = "\n".join(part for part in parts if isinstance(part, str))
            if content is None or isinstance(content, str):  # None: a call of a tool
                return {"role": _ROLES.get(role.lower(), role.lower()), "content": content or ""}
    return None


class Chat:
    """Renders conversations with a chat template.

    Attributes:
        how: what they are rendered with, in words.
        refused: how many conversations the template has refused.
        reason: why, the first time.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        """Take the tokenizer's own template, or the one that is named.

        Args:
            tokenizer: the model's.
            template: a Jinja file, a JSON file with ``chat_template``, a name in :data:`TEMPLATES`, or the name of one
                of the tokenizer's templates; default: the tokenizer's own, or plain paragraphs where it has none.

        Raises:
            CalibrationError: when there is no such template.
        """
        self._tokenizer, self._template, self.how = tokenizer, *_template(tokenizer, template)
        self.refused, self.reason = 0, ""

    def render(self, messages: Messages) -> str:
        """Return a conversation as text; empty where the template refuses it."""
        if self._template is None:
            return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
        try:
            text = self._tokenizer.apply_chat_template(messages, chat_template=self._template, tokenize=False)
        except Exception as error:  # a template is a program: it raises what it likes
            self.refused += 1
            self.reason = self.reason or " ".join(str(error).split())[:200]
            return ""
        return text if isinstance(text, str) else ""


def _template(tokenizer: Any, wanted: str | None) -> tuple[str | None, str]:
    """Return a template (``None``: plain paragraphs), and what it is called."""
    own = getattr(tokenizer, "chat_template", None)
    named = own if isinstance(own, dict) else {}
    if wanted is None:
        own = named.get("default") if named else own
        if isinstance(own, str):
            return own, "the model's chat template"
        return None, 'paragraphs "role: text" (the tokenizer has no chat template)'
    if wanted == PLAIN:
        return None, 'paragraphs "role: text"'
    path = Path(wanted).expanduser()
    if wanted not in {*named, *TEMPLATES} and path.is_file():
        return _from_file(path), f"the chat template {path.name}"
    found = named.get(wanted) or TEMPLATES.get(wanted)
    if not found:
        known = ", ".join(dict.fromkeys((*TEMPLATES, *named)))
        raise CalibrationError(f"no chat template {wanted!r}: give a file (Jinja), or {known}")
    return found, f"the chat template {wanted}"


def _from_file(path: Path) -> str:
    """Return the template in a file: of Jinja, or of JSON as tokenizers have it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = json.loads(text).get("chat_template") if path.suffix.lower() == ".json" else text
    except (OSError, ValueError, AttributeError) as error:
        raise CalibrationError(f"cannot read the chat template {path}: {' '.join(str(error).split())}") from error
    if not isinstance(found, str) or not found.strip():
        raise CalibrationError(f"{path} holds no chat template: give a Jinja file, or JSON with chat_template")
    return found
