"""What reward functions read: the text of a completion, plain or conversational, and the answer inside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

Completion = str | Sequence[Mapping[str, str]]
"""A string, or the messages that the model added, as TRL passes them: `[{"role": "assistant", "content": ...}]`."""

_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
# Markdown and punctuation around the last word: "**7**.", "(7)", "\\boxed{7}" is left alone
_AROUND = " \t\r\n.,;:!?*_`'\"()[]$"


def completion_text(completion: Completion) -> str:
    """The completion as text: a string itself, or the content of the last message of a conversation."""
    if isinstance(completion, str):
        return completion
    return completion[-1]["content"] if completion else ""


def stated_answer(text: str) -> str:
    """The content of the last `<answer>...</answer>`, or the whole text where there is none; white space stripped."""
    tagged = _ANSWER_TAG.findall(text)
    return (tagged[-1] if tagged else text).strip()


def last_word(text: str) -> str:
    """The last word without the punctuation and Markdown around it: "so it is **7**." -> "7"."""
    words = text.strip(_AROUND).split()
    return words[-1].strip(_AROUND) if words else ""
