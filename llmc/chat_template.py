"""Conversations to the text that a model was taught them as, by the Jinja template in its folder.

    template = chat_template.load(folder)
    text = template.render([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    ids = tokenizer.encode_special(text)

Templates are programs from elsewhere: they run in Jinja's sandbox, which lets them change nothing.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from llmc import tokenizer_config
from llmc.errors import ConfigError, FileFormatError, MissingDependencyError


class ChatTemplate:
    """One template, compiled.  `path` and `field` say where its text stands."""

    def __init__(self, source: str, path: Path, field: str = "template", tokens: Mapping[str, str] = {}) -> None:
        self.path, self.field = path, field
        self._tokens = dict(tokens)
        try:
            import jinja2
            from jinja2.ext import Extension, loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise MissingDependencyError(f"{path}: a chat template needs jinja2: pip install jinja2") from error

        class Generation(Extension):
            """{% generation %} marks what the model is to learn, which makes no difference to the text."""

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        Generation.tags = {"generation"}
        # The settings for which models' templates are written.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise FileFormatError(path, f"{field}, line {error.lineno}", str(error.message)) from None

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """The text of a conversation.

        Each message has a "role" and a "content".  With `add_generation_prompt` the text ends where the
        model's answer begins.  `variables` are passed on to the template (`tools`, `documents`, what it knows).
        Special tokens stand in the text by their names.

        FileFormatError for a template that fails, ConfigError for messages that it refuses (it may want roles to
        alternate) or that have no role.
        """
        for n, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ConfigError("messages", f"message {n} has no role")
        given = {"tools": None, "documents": None, **self._tokens, **variables}
        try:
            return self._template.render(
                messages=[dict(message) for message in messages], add_generation_prompt=add_generation_prompt, **given
            )
        except _Refused as error:
            raise ConfigError("messages", f"the chat template in {self.path} refuses them: {error}") from None
        except Exception as error:  # a template is a program, and may fail like any
            line = _line(error.__traceback__)
            where = self.field if line is None else f"{self.field}, line {line}"
            raise FileFormatError(self.path, where, f"{type(error).__name__}: {error}") from error


def load(folder: str | os.PathLike[str], name: str = "default") -> ChatTemplate | None:
    """The chat template of a folder: chat_template.jinja, else the one of that name in tokenizer_config.json; None
    where the folder has no template at all.

    ConfigError for a name that is not among its templates, FileFormatError for one that cannot be compiled.
    """
    config = tokenizer_config.read(Path(folder))
    if not config.templates:
        return None
    if name not in config.templates:
        raise ConfigError("chat_template", f"{folder} has {', '.join(config.templates)}, not {name!r}")
    text, path, field = config.templates[name]
    return ChatTemplate(text, path, field, config.names)


class _Refused(Exception):
    """A template has called raise_exception."""


def _line(trace: TracebackType | None) -> int | None:
    """The template's line in which an error came up: Jinja puts its own numbers into the trace."""
    found = None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            found = trace.tb_lineno
        trace = trace.tb_next
    return found


def _raise(message: str) -> NoReturn:
    raise _Refused(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
            sort_keys: bool = False) -> str:  # fmt: skip
    """JSON as it is: Jinja's own filter escapes <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
