"""Conversations as documents: a JSON object a line with `messages`, or with `prompt` and `completion`, through a tokenizer's chat template.

A document is the whole conversation as the template writes it; learned from are the assistant's turns alone, everything else is read as
the prompt. Where those turns are is what the template itself says: by its `{% generation %}` marks, or by what it writes of the messages
before a turn (with its generation prompt) and up to it, which must be the beginnings of what it writes of all of them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longtrain.data.formats import LeftOut, Part, Ranges, import_extra, read_json_lines
from longtrain.data.sources import DataError

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A chat template. ``render(messages, tools, prompt)`` gives the text (with `prompt`, and what an answer begins with) and the
    character ranges that it marks as the assistant's."""

    render: Callable[[list[dict], list | None, bool], tuple[str, Ranges]]
    marks: bool
    turns: str
    """`all` of the assistant's turns are learned from, or the `last`."""
    sha256: str

    def document(self, messages: list[dict], tools: list | None, first: int) -> tuple[str, Ranges]:
        """Text, and what is learned from of it: the assistant's turns among ``messages[first:]``. Raises ValueError."""
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= first]
        if not turns:
            raise ValueError("has no message of the assistant to learn from; correct the line")
        turns = turns[-1:] if self.turns == "last" else turns
        text, marked = self.render(messages, tools, False)
        if self.marks:
            answers = sum(message["role"] == "assistant" for message in messages)
            if len(marked) < answers or len(turns) < answers != len(marked):
                raise ValueError(f"has {answers} turns of the assistant, and the template marks {len(marked)}; correct the template")
            return text, marked if len(turns) == answers else marked[-len(turns) :]
        return text, [self._turn(text, messages, tools, turn) for turn in turns]

    def _turn(self, text: str, messages: list[dict], tools: list | None, turn: int) -> tuple[int, int]:
        before, after = self.render(messages[:turn], tools, True)[0], self.render(messages[: turn + 1], tools, False)[0]
        if not (text.startswith(after) and after.startswith(before)):
            marks = "mark the turns in the template, with {% generation %}"
            remedy = "build with --turns last" if self.turns == "all" and turn + 1 < len(messages) else marks
            raise ValueError(f"has a turn (message {turn}) that the template writes otherwise when more messages follow; {remedy}")
        return len(before), len(after)


def load_chat(tokenizer: Path, turns: str) -> Chat:
    """The chat template beside a `tokenizer.json`, or in the directory given. Raises DataError where there is none."""
    transformers = import_extra("transformers", "hf")
    jinja2 = import_extra("jinja2", "hf")
    from transformers.utils.chat_template_utils import render_jinja_template

    directory = tokenizer if tokenizer.is_dir() else tokenizer.parent
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        template = loaded.get_chat_template() if loaded.chat_template else None
    except (OSError, ValueError, KeyError) as error:
        why = f"--tokenizer {directory} cannot be read by transformers ({error})"
        raise DataError(f"{why}; give a directory with tokenizer_config.json") from None
    if template is None:
        raise DataError(
            f"--tokenizer {directory} has no chat template; give the tokenizer of a model trained to chat, or add a chat_template.jinja"
        )
    marks = _MARKS.search(template) is not None

    def render(messages: list[dict], tools: list | None, prompt: bool) -> tuple[str, Ranges]:
        try:
            (text,), marked = render_jinja_template(
                [messages], tools, None, template,
                return_assistant_tokens_mask=marks, add_generation_prompt=prompt, **loaded.special_tokens_map,
            )  # fmt: skip
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"is refused by the chat template ({error}); correct the line") from None
        return text, marked[0] if marked else []

    return Chat(render=render, marks=marks, turns=turns, sha256=hashlib.sha256(template.encode("utf-8")).hexdigest())


def read_chat(path: Path, offset: int, number: int, options: dict) -> Iterator[Part | LeftOut]:
    """A reader as in `formats`: a conversation a line; `Part.learned` are character ranges of its text."""
    chat = options["chat"]
    return read_json_lines(path, offset, number, lambda record: chat.document(*conversation(record)))


def conversation(record: Any) -> tuple[list[dict], list | None, int]:
    """The messages of a line, its tools, and the first message that may be learned from. Raises ValueError."""
    if not isinstance(record, dict):
        raise ValueError("is no JSON object; write one with messages, or with prompt and completion")
    if "messages" in record and not {"prompt", "completion"} & record.keys():
        return messages_of(record, "messages"), tools_of(record), 0
    if {"prompt", "completion"} <= record.keys() and "messages" not in record:
        prompt = messages_of(record, "prompt", role="user")
        return prompt + messages_of(record, "completion", role="assistant"), tools_of(record), len(prompt)
    held = ", ".join(sorted(record)[:6]) or "nothing"
    raise ValueError(f"has neither messages nor prompt and completion (it has {held}); correct the line")


def messages_of(record: dict, field: str, role: str | None = None) -> list[dict]:
    """The messages in a field; text in place of a list is one message of `role`."""
    found = record[field]
    if isinstance(found, str) and role is not None:
        return [{"role": role, "content": found}]
    good = isinstance(found, list) and found and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in found)
    if not good:
        raise ValueError(f"has {field} that is no list of messages ({{role: ..., content: ...}}); correct the line")
    return found


def tools_of(record: dict) -> list | None:
    tools = record.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise ValueError("has tools that are no list of JSON schemas; correct the line")
    return tools


def token_ranges(starts: Sequence[int], learned: Sequence[tuple[int, int]]) -> Ranges:
    """Ranges of tokens that begin within the character ranges; a token on the border belongs to the prompt. `starts`: ascending."""
    edges = [tuple(np.searchsorted(starts, span).tolist()) for span in learned]
    return [(first, stop) for first, stop in edges if stop > first]
