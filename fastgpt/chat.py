"""The one chat format: a conversation becomes ids, and which of them a model learns to say.

::

    [bos] <|user|> text <|end|> <|assistant|> text <|end|> <|user|> text <|end|> ...

A ``<|system|>`` text may come first. The bos is the tokenizer's end-of-text id, for that is what
stands in front of a document in pretraining; there is exactly one. Roles and ends are ids of their
own, joined to the ids of the texts: what somebody writes is encoded without special tokens and can
never become one, whatever it spells.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastgpt.errors import UsageError
from fastgpt.tokenizer import Tokenizer

ROLES = ("user", "assistant", "system")
END = "<|end|>"
CHAT_TOKENS = (*(f"<|{role}|>" for role in ROLES), END)

Messages = Sequence[Mapping[str, Any]]
"""Each with "role" (one of `ROLES`) and "content"."""


def with_chat_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """``tokenizer`` with the `CHAT_TOKENS` it lacks appended behind its ids."""
    return tokenizer.with_special_tokens(CHAT_TOKENS)


def end_id(tokenizer: Tokenizer) -> int:
    """Id of ``<|end|>``, the end of a turn and of what a model says. Raises UsageError."""
    return _special(tokenizer, END)


def render(tokenizer: Tokenizer, messages: Messages) -> tuple[list[int], list[bool]]:
    """Ids of a conversation, and for each whether the model is to learn to produce it.

    That is the assistant's text and the ``<|end|>`` behind it, not ``<|assistant|>``, which is
    given to it. Raises UsageError for a tokenizer without `CHAT_TOKENS`, ValueError for a role that
    is none.
    """
    ids, mask = [tokenizer.eot_id], [False]
    end = end_id(tokenizer)
    for message in messages:
        said = [*tokenizer.encode(message["content"]), end]
        ids += [_role(tokenizer, message["role"]), *said]
        mask += [False, *[message["role"] == "assistant"] * len(said)]
    return ids, mask


def render_prompt(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Ids behind which the model says the assistant's next text: `render`'s and ``<|assistant|>``.

    Raises as `render`.
    """
    return [*render(tokenizer, messages)[0], _role(tokenizer, "assistant")]


def chat_template(tokenizer: Tokenizer) -> str:
    """Jinja template for Hugging Face's ``apply_chat_template`` that gives the ids of `render`.

    It joins strings, for that is all a template can do. So that nobody's text becomes a special
    token there, those it spells get a space behind the first character: the one case where the ids
    differ from `render`'s. ``{% generation %}`` marks what the mask of `render` marks.
    """
    text = "message['content']"
    for name in tokenizer.special_tokens:
        text += f" | replace({json.dumps(name)}, {json.dumps(f'{name[0]} {name[1:]}')})"
    bos = next(n for n, i in tokenizer.special_tokens.items() if i == tokenizer.eot_id)
    said = "{{ text }}" + END
    return (
        f"{{{{ {json.dumps(bos)} }}}}"
        "{% for message in messages %}"
        f"{{% set text = {text} %}}"
        "{{ '<|' + message['role'] + '|>' }}"
        "{% if message['role'] == 'assistant' %}"
        f"{{% generation %}}{said}{{% endgeneration %}}"
        f"{{% else %}}{said}{{% endif %}}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )


def _role(tokenizer: Tokenizer, role: str) -> int:
    if role not in ROLES:
        raise ValueError(f"role {role!r} is none of {', '.join(ROLES)}")
    return _special(tokenizer, f"<|{role}|>")


def _special(tokenizer: Tokenizer, name: str) -> int:
    if name not in tokenizer.special_tokens:
        raise UsageError(f"the tokenizer has no {name}: the model was not finetuned on chats")
    return tokenizer.special_tokens[name]
