"""What reward functions read: the text of a completion, plain or conversational, and the answer inside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation

Completion = str | Sequence[Mapping[str, str]]
"""A string, or the messages that the model added, as TRL passes them: `[{"role": "assistant", "content": ...}]`."""

_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
# A sign only where nothing that it could be subtracted from stands before it; commas only between thousands.
_NUMBER = re.compile(
    r"(?:(?<![\w)])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:/\d+)?"
)
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


def extracted_answer(text: str) -> str | None:
    r"""What a completion states as its answer, in a form in which equal answers are equal; None where it states none.

    The last `<answer>...</answer>`; otherwise the last `\boxed{...}`; otherwise the last number. A number is given by
    its value: "1,000", "1000." and "1e3" are one answer. Other text keeps its words, in lower case, without the
    punctuation and Markdown around it.
    """
    tagged = _ANSWER_TAG.findall(text)
    stated = tagged[-1] if tagged else boxed_answer(text)
    if stated is None:
        numbers = _NUMBER.findall(text)
        return canonical_answer(numbers[-1]) if numbers else None
    inner = boxed_answer(stated)
    return canonical_answer(stated if inner is None else inner) or None


def boxed_answer(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, whose braces are balanced; None where there is none."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth = 0
        first = start + len("\\boxed")
        for end in range(first, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[first + 1 : end]
        start = text.rfind("\\boxed{", 0, start)  # this one was cut off
    return None


def number_value(text: str) -> Decimal | None:
    """The value of a text that is exactly one finite number, commas between thousands allowed; otherwise None."""
    try:
        value = Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def canonical_answer(text: str) -> str:
    """An answer in the form of `extracted_answer`: a number by its value, other text by its words in lower case."""
    words = " ".join(text.split()).strip(_AROUND).lower()
    value = number_value(words)
    if value is None:
        return words
    return "0" if value == 0 else f"{value.normalize():f}" if abs(value.adjusted()) < 30 else str(value.normalize())
