"""Rows of a reward model's dataset to tokens, and which tokens it is trained at: the one that judges an answer, all of
an answer's, or those that end a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastrl.data.formats import Completions, Encoder, FormatError, Row, Text, TokenSequence
from fastrl.data.token_rows import TokenRow, token_row

IGNORE = -100  # the label of a token that has none


def state_sequence(text: Text, prompt: int) -> TokenSequence:
    """The sequence whose `loss_mask` is of hidden states, and not of tokens that are predicted: its first entry is for
    the prompt's last token, the others are for the completion's, so that there is one more than these.

    Args:
        text: at least one token; what counts are the tokens at which the hidden state is read.
        prompt: tokens of the prompt; where a token counts that comes before its last one, the prompt ends there.
    """
    first = text.counted.index(True) if any(text.counted) else len(text.ids) - 1
    cut = max(1, min(prompt, first + 1))
    return TokenSequence(text.ids[:cut], text.ids[cut:], text.counted[cut - 1 :])


def judging_token(ids: Sequence[int], pad_token_id: int) -> int:
    """Where transformers' sequence classifiers read the score: at the last token that is not the padding's."""
    return next((place for place in reversed(range(len(ids))) if ids[place] != pad_token_id), 0)


@dataclass(frozen=True)
class AnswerRow:
    """What rows of whole answers share.

    Args:
        pad_token_id: see `judging_token`.
        max_length: a row with an answer that is longer, its prompt included, has no token left, as TRL leaves it out.
    """

    encoder: Encoder
    pad_token_id: int
    max_length: int | None

    def sequences(self, answers: Completions, every_token: bool = False) -> list[TokenSequence]:
        """Each answer with its judging token counted, or with all of its tokens up to that one."""
        texts = [text.ids for text in answers.texts()]
        limit = self.max_length
        if any(not ids or (limit is not None and len(ids) > limit) for ids in texts):
            return [TokenSequence([], [], [])] * len(texts)
        prompt = len(answers.prompt_ids)
        sequences = []
        for ids in texts:
            last = judging_token(ids, self.pad_token_id)
            first = min(prompt, last) if every_token else last
            counted = [first <= place <= last for place in range(len(ids))]
            sequences.append(state_sequence(Text(ids, counted), prompt))
        return sequences


class ComparedRow(AnswerRow):
    """A preference row, or one of "chosen_ids" and "rejected_ids" of any length, to its two answers and a "margin"."""

    def __call__(self, row: Row) -> TokenRow:
        if row.get("chosen_ids") is not None and row.get("rejected_ids") is not None:
            answers = Completions([], [list(row["chosen_ids"]), list(row["rejected_ids"])])
            sequences = AnswerRow(self.encoder, self.pad_token_id, None).sequences(answers)
        else:
            sequences = self.sequences(self.encoder.preference(row))
        margin = row.get("margin")
        return token_row(sequences, margin=0.0 if margin is None else float(margin))


class RankedRow(AnswerRow):
    """A K-ranked row to its K answers and their "ranks"."""

    def __call__(self, row: Row) -> TokenRow:
        answers, ranks = self.encoder.ranked(row)
        return token_row(self.sequences(answers), ranks=ranks)


class OutcomeRow(AnswerRow):
    """An unpaired row to its answer, all of whose tokens count, and the "label"."""

    def __call__(self, row: Row) -> TokenRow:
        answer, label = self.encoder.unpaired(row)
        return token_row(self.sequences(answer, every_token=True), label=label)


@dataclass(frozen=True)
class StepRow:
    """A stepwise row, or one of "input_ids" and "labels", to one sequence and a list of "labels", one for each entry of
    its mask. It is cut as TRL's `PRMTrainer` cut it: the prompt to its end, completion and whole to their beginning.

    Args:
        classes: labels are numbers from 0 to this, exclusive.
    """

    encoder: Encoder
    classes: int
    step_separator: str
    last_step_only: bool
    max_length: int | None
    max_prompt_length: int | None
    max_completion_length: int | None

    def __call__(self, row: Row) -> TokenRow:
        ids, labels, prompt = self._given(row) if row.get("input_ids") is not None else self._encoded(row)
        wrong = [label for label in labels if label != IGNORE and not 0 <= label < self.classes]
        if wrong:
            raise FormatError(
                f"label {wrong[0]}: expected one of {', '.join(map(str, range(self.classes)))}, the model's classes "
                "(ratings of -1, 0 and 1 are classes 0, 1 and 2 of a model with num_labels=3)"
            )
        if not ids:
            return token_row([TokenSequence([], [], [])], labels=[])
        sequence = state_sequence(Text(ids, [label != IGNORE for label in labels]), prompt)
        return token_row([sequence], labels=labels[len(labels) - len(sequence.loss_mask) :])

    def _given(self, row: Row) -> tuple[list[int], list[int], int]:
        ids, labels = list(row["input_ids"]), list(row.get("labels") or ())
        if len(ids) != len(labels):
            raise FormatError(f"{len(ids)} input_ids, but {len(labels)} labels")
        return ids, labels, 1

    def _encoded(self, row: Row) -> tuple[list[int], list[int], int]:
        answer, labels = self.encoder.stepwise(row, self.step_separator, self.last_step_only)
        prompt, (ids,) = answer.prompt_ids, answer.completion_ids
        if self.max_prompt_length is not None:
            prompt = prompt[-self.max_prompt_length :]
        kept = slice(self.max_completion_length)
        whole = slice(self.max_length)
        return (prompt + ids[kept])[whole], ([IGNORE] * len(prompt) + labels[kept])[whole], len(prompt)
