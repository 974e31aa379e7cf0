"""Chat: messages of a request -> prompt text, by the model's Jinja template, in the sandbox that transformers uses.

Template contract: Hugging Face "chat templates" (messages, add_generation_prompt, special tokens by name, `tojson`,
`raise_exception`, `strftime_now`, loop controls, `{% generation %}` blocks).
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from tessera.core.errors import ModelError, RequestError
from tessera.serve.checks import Fields, bad, one_of, string
from tessera.serve.fields import NO_IMAGES, NO_TOOLS

MAX_MESSAGES = 65536
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"})


class Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks the assistant's words for training; here it only shows its body."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own convention)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The body alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: dt.datetime.now().strftime(form)
    return environment


class ChatTemplate:
    """A compiled template. `tokens`: special tokens by name (`bos_token`, ...), as templates use them."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        self.source = source
        self._tokens = dict(tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error

    def render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        more: Mapping[str, Any] | None = None,
    ) -> str:
        """Text of a conversation. `continue_final`: it ends with the last message's content, open for more."""
        values = {**self._tokens, **(more or {}), "messages": messages, "tools": None, "documents": None}
        try:
            text = self._template.render(add_generation_prompt=add_generation_prompt, **values)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise RequestError(f"messages: the chat template refused them: {error}", "messages") from error
        return _cut_after(text, messages[-1].get("content")) if continue_final else text


def _cut_after(text: str, content: object) -> str:
    last = content.strip() if isinstance(content, str) else ""
    at = text.rfind(last) if last else -1
    if at < 0:
        message = "continue_final_message: the chat template does not show the last message's content as it is"
        raise RequestError(message, "continue_final_message")
    return text[: at + len(last)]


PART = Fields(
    honoured={"type": string, "text": string},
    passed={"cache_control": "prefixes are cached anyway"},
)


def _content(value: Any, field: str) -> str:
    """A string, or a list of text parts, which are joined by line breaks (as vLLM does)."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise bad(field, value, "a string or a list of text parts")
    return "\n".join(_part(part, f"{field}[{i}]") for i, part in enumerate(value))


def _part(part: Any, field: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind not in ("text", "input_text"):
        found = f"{field}.type: found {kind[:60]!r}, allowed is 'text': {NO_IMAGES.remedy}"
        raise RequestError(found, f"{field}.type")
    text = PART.read(part, field).get("text")
    if not isinstance(text, str):
        raise RequestError(f"{field}.text is missing", f"{field}.text")
    return text


MESSAGE = Fields(
    honoured={
        "role": one_of(*ROLES),
        "content": _content,
        "name": string,
        "tool_call_id": string,
        "reasoning_content": string,
    },
    passed={"refusal": "empty in answers of this server", "annotations": "not part of the text"},
    refused={"tool_calls": NO_TOOLS, "function_call": NO_TOOLS, "tools": NO_TOOLS, "audio": NO_IMAGES},
)


def read_messages(value: Any) -> list[dict[str, Any]]:
    """Checks the `messages` of a request; content as parts becomes one text."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        raise bad("messages", value, f"a list of 1 to {MAX_MESSAGES} messages")
    messages = []
    for i, one in enumerate(value):
        message = MESSAGE.read(one, f"messages[{i}]")
        if "role" not in message:
            raise RequestError(f"messages[{i}].role is missing", f"messages[{i}].role")
        if "content" not in message and message["role"] != "assistant":
            raise RequestError(f"messages[{i}].content is missing", f"messages[{i}].content")
        messages.append({"content": "", **message})
    return messages


def template_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """`chat_template_kwargs` and `reasoning_effort` as variables of the template."""
    more = dict(values.get("chat_template_kwargs", {}))
    for name in more:
        if name in RESERVED or not name.isidentifier():
            raise RequestError(f"chat_template_kwargs.{name[:60]} cannot be set", "chat_template_kwargs")
    effort = values.get("reasoning_effort")
    if effort is not None:
        thinking = effort != "none"
        more = {"reasoning_effort": effort, "thinking": thinking, "enable_thinking": thinking, **more}
    return more
