"""Labels texts with a language model that was not tuned for it, by the words that it finds likeliest after a question.

A text is followed by a suffix and by each label's words in turn; a label's score is the log-probability of its tokens
there. Asks a runner for logits and works in numpy; knows nothing of frameworks, files or training.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llamita.backend.interface import Forward
from llamita.data.labelled_batches import Keep, by_length, truncate
from llamita.evaluation.classification import log_softmax
from llamita.evaluation.perplexity import MAX_LOGITS
from llamita.text.tokenizer import Tokenizer

CONTENT_FREE = ("N/A", "[MASK]", "")
"""Texts without content, for calibration: those of Zhao et al. 2021, section 4."""
Reduction = Literal["sum", "mean"]
MAX_ROWS = 64


def default_suffix(labels: Sequence[str]) -> str:
    """Returns a question with the labels: `Is this movie awful, bad, average, good, or excellent? This movie is `."""
    return f"Is this movie {listed(labels)}? This movie is "


def listed(words: Sequence[str]) -> str:
    """Returns `a or b`, or `a, b, or c`."""
    if len(words) < 3:
        return " or ".join(words)
    return f"{', '.join(words[:-1])}, or {words[-1]}"


@dataclass(frozen=True)
class Prompt:
    """The ids of a text and its question, then those of each label's words; `truncated` where the text was cut."""

    context: tuple[int, ...]
    labels: tuple[tuple[int, ...], ...]
    truncated: bool


def build_prompt(
    tokenizer: Tokenizer, text: str, suffix: str, labels: Sequence[str], length: int, keep: Keep = "end"
) -> Prompt:
    """Returns the ids of `text suffix label` for each label, at most `length` with the longest; only the text is cut.

    All of it is encoded in one piece with single spaces between, as it would stand in a document; a label's ids begin
    where those of the whole first differ from those without the label. ValueError where nothing stands before the
    label, or the suffix alone is too long.
    """
    head = " ".join(part for part in (text, suffix.rstrip()) if part)
    bos = tokenizer.bos_id is not None
    alone = tokenizer.encode(head, bos=bos)
    whole = [tokenizer.encode(f"{head} {label}".lstrip(), bos=bos) for label in labels]
    start = min(shared_length(alone, ids) for ids in whole)
    if start == 0:
        raise ValueError("nothing precedes the label: there is neither BOS nor suffix; give a suffix")
    endings = tuple(tuple(ids[start:]) for ids in whole)
    context = np.array(alone[:start])
    surplus = len(context) + max(map(len, endings)) - length
    if surplus <= 0:
        return Prompt(tuple(context.tolist()), endings, False)
    # Only the text may be cut: the ids that its own encoding shares with the whole.
    own = min(shared_length(tokenizer.encode(text, bos=bos), alone), start)
    if surplus > own - bos:
        raise ValueError(
            f"the suffix with its label takes {len(context) - own + max(map(len, endings)) + bos} tokens, more than "
            f"the {length} of the context; shorten the suffix"
        )
    kept = truncate(context[:own], own - surplus, keep, int(bos))
    return Prompt((*kept.tolist(), *context[own:].tolist()), endings, True)


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns the length of the longest common prefix of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def label_scores(runner: Forward, prompts: Sequence[Prompt], vocab_size: int, reduction: Reduction) -> np.ndarray:
    """Returns the log-probability of each label's tokens after each prompt, their sum or mean: float64 [n, labels].

    Labels that share all ids before their last share a row, so labels of one token cost one row a text. Rows run
    together padded on the right, which causal attention does not see. K: ids of a label.
    """
    scores = np.zeros((len(prompts), len(prompts[0].labels)))
    wanted: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for n, prompt in enumerate(prompts):
        for label, ids in enumerate(prompt.labels):
            wanted.setdefault((*prompt.context, *ids[:-1]), []).append((n, label))
    longest = max(len(ids) for prompt in prompts for ids in prompt.labels)
    for row, log_p_KV in _last_log_probabilities(runner, list(wanted), longest, vocab_size):
        for n, label in wanted[row]:
            ids = prompts[n].labels[label]
            log_p_K = log_p_KV[-len(ids) :][np.arange(len(ids)), list(ids)]
            scores[n, label] = log_p_K.sum() if reduction == "sum" else log_p_K.mean()
    return scores


def _last_log_probabilities(
    runner: Forward, rows: Sequence[tuple[int, ...]], count: int, vocab_size: int
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Yields each row with log p (K, V) of the next token after each of its last K tokens, K at most `count`."""
    longest = max(map(len, rows))
    at_once = max(1, min(MAX_ROWS, MAX_LOGITS // (longest * vocab_size)))
    for ids in by_length([np.array(row) for row in rows], at_once):
        T = max(len(rows[i]) for i in ids)
        tokens_BT = np.zeros((len(ids), T), dtype=np.int64)
        for b, i in enumerate(ids):
            tokens_BT[b, : len(rows[i])] = rows[i]
        logits_BTV = runner.forward(tokens_BT)["logits"]
        for b, i in enumerate(ids):
            end = len(rows[i])
            yield rows[i], log_softmax(logits_BTV[b, max(0, end - count) : end].astype(np.float64))


@dataclass(frozen=True)
class ZeroShot:
    """log p over the labels (float64 [n, labels]), and the number of texts that were cut for the question to fit."""

    log_probabilities: np.ndarray
    truncated: int


def zero_shot(
    runner: Forward,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    labels: Sequence[str],
    *,
    suffix: str,
    length: int,
    vocab_size: int,
    keep: Keep = "end",
    reduction: Reduction = "sum",
    calibrate: bool = False,
) -> ZeroShot:
    """Labels texts by the likelihood of each label's words after `suffix`.

    The scores are normalised to probabilities over the labels. With `calibrate`, these are divided by the mean
    probabilities of texts without content and normalised again (contextual calibration, Zhao et al. 2021,
    arXiv:2102.09690). ValueError without texts, or without two different labels.
    """
    if len(set(labels)) < max(2, len(labels)) or not all(labels):
        raise ValueError(f"labels={list(labels)} must be at least two different words")

    def prompts(of: Iterable[str]) -> list[Prompt]:
        return [build_prompt(tokenizer, text, suffix, labels, length, keep) for text in of]

    asked = prompts(texts)
    if not asked:
        raise ValueError("there is no text to label")
    log_p = log_softmax(label_scores(runner, asked, vocab_size, reduction))
    if calibrate:
        empty = log_softmax(label_scores(runner, prompts(CONTENT_FREE), vocab_size, reduction))
        log_p = log_softmax(log_p - np.log(np.exp(empty).mean(axis=0)))
    return ZeroShot(log_p, sum(prompt.truncated for prompt in asked))
