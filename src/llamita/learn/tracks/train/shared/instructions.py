"""Instruction tuning: a conversation as one row of tokens, of which only what the assistant says is learned."""

from collections.abc import Mapping, Sequence

IGNORE_INDEX = -100
"""The label of a position that is not scored."""


def inputs_and_labels(
    turns: Sequence[tuple[str, Sequence[int]]], markers: Mapping[str, int], end: int
) -> tuple[list[int], list[int]]:
    """Returns (inputs, labels) of a conversation, two lists of one length.

    turns: (role, tokens) in their order, the role being "user" or "assistant". Each turn is laid out as the marker of
    its role, its tokens, and `end`; the turns follow each other. inputs are all tokens of this row but the last; the
    label at t is the token after inputs[t] where the assistant is to say that token: its words and the `end` that
    closes its turn, in every one of its turns. Markers and all that is the user's are IGNORE_INDEX as labels.
    """
    # to do: tokens, and beside them the labels as they would be unshifted; then shift.
    row: list[int] = []
    said: list[int] = []
    for role, tokens in turns:
        row += [markers[role], *tokens, end]
        mine = role == "assistant"
        said += [IGNORE_INDEX, *([*tokens, end] if mine else [IGNORE_INDEX] * (len(tokens) + 1))]
    return row[:-1], said[1:]
    # done
