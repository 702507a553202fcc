"""Labels from a language model that was never trained for them: which label's words are likeliest after a question.

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
"""Texts that say nothing, for calibration: those of Zhao et al. 2021, section 4."""
Reduction = Literal["sum", "mean"]
MAX_ROWS = 64


def default_suffix(labels: Sequence[str]) -> str:
    """A question that names the labels: `Is this movie awful, bad, average, good, or excellent? This movie is `."""
    return f"Is this movie {listed(labels)}? This movie is "


def listed(words: Sequence[str]) -> str:
    """`a or b`, `a, b, or c`."""
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
    """`text suffix label` for each label as ids, at most `length` with the longest label; of the text alone is cut.

    All of it is encoded in one piece with single spaces between, as it would stand in a document; a label's ids are
    those from where the whole first differs from what is encoded without it. ValueError where nothing stands before the
    label, or not even the suffix fits.
    """
    head = " ".join(each for each in (text, suffix.rstrip()) if each)
    bos = tokenizer.bos_id is not None
    alone = tokenizer.encode(head, bos=bos)
    whole = [tokenizer.encode(f"{head} {label}".lstrip(), bos=bos) for label in labels]
    start = min(_shared(alone, ids) for ids in whole)
    if start == 0:
        raise ValueError("nothing precedes the label: there is neither BOS nor suffix; give a suffix")
    endings = tuple(tuple(ids[start:]) for ids in whole)
    context = np.array(alone[:start])
    surplus = len(context) + max(map(len, endings)) - length
    if surplus <= 0:
        return Prompt(tuple(context.tolist()), endings, False)
    # What may be cut is the text: ids that its encoding alone shares with the whole.
    own = min(_shared(tokenizer.encode(text, bos=bos), alone), start)
    if surplus > own - bos:
        raise ValueError(
            f"the suffix with its label takes {len(context) - own + max(map(len, endings)) + bos} tokens, more than "
            f"the {length} of the context; shorten the suffix"
        )
    kept = truncate(context[:own], own - surplus, keep, int(bos))
    return Prompt((*kept.tolist(), *context[own:].tolist()), endings, True)


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def label_scores(runner: Forward, prompts: Sequence[Prompt], vocab_size: int, reduction: Reduction) -> np.ndarray:
    """The log-probability of each label's tokens after each prompt, their sum or mean: float64 [n, labels].

    What comes before the last token of a label is computed once for all labels that share it, so labels of one token
    cost one row a text. Rows run together padded on the right, which attention, being causal, does not see.
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
    """Each row with log p (K, V) of what follows each of its last tokens, at most `count` of them."""
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
    """log p over the labels (float64 [n, labels]), and how many texts were cut for their question to fit."""

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
    """Label texts by the likelihood of each label's words after `suffix`.

    The scores are made probabilities over the labels. With `calibrate` these are divided by the mean of those that
    texts without content get, and normalised again (contextual calibration, Zhao et al. 2021, arXiv:2102.09690).
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
