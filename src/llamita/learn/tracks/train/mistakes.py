"""The mistakes that the training track's grader knows: each is a change to the lines of a solution.

A reader's result that equals the changed solution's has this mistake, however it is written. Most lines are the same in
both frameworks; those that are not are in `texts`.
"""

import texts

from llamita.learn.checking import Mistake

GPT2 = "Radford et al. 2019, Language models are unsupervised multitask learners, section 2.2; the docstring's rules"
BPE = "Sennrich et al. 2016, https://arxiv.org/abs/1508.07909, algorithm 1"
BYTES = "Radford et al. 2019, section 2.2: tokens are sequences of bytes, not of characters"
DOCSTRING = "the docstring"
NEXT_TOKEN = "Bengio et al. 2003, A neural probabilistic language model, section 2: each word from those before it"
ENTROPY = "Bengio et al. 2003, A neural probabilistic language model, section 2: the mean of -log p of what came next"
STABLE = "Blanchard, Higham and Higham 2021, https://arxiv.org/abs/1909.03469: the shifted log-sum-exp"
PRECISION = "Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740, section 3.3: sums in float32"
ADAM = "Kingma and Ba 2015, https://arxiv.org/abs/1412.6980, algorithm 1"
DECOUPLED = "Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101, algorithm 2"
COSINE = "Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983, equation 5; the docstring for the warm-up"
CLIPPING = "Pascanu, Mikolov and Bengio 2013, https://arxiv.org/abs/1211.5063, algorithm 1"
ACCUMULATION = "the docstring: the mean over all scored labels of all batches, each counting the same"
PACKING = "Krell et al. 2021, https://arxiv.org/abs/2107.02027: packed documents are computed as if alone"
CHAT = "the docstring: what the assistant says is scored, with the end of its turns, and nothing else"
LORA = "Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1"
FRESH = "Hu et al. 2021, section 4.1: B is zero, so that the product BA is zero at the beginning; the docstring for A"
DPO = "Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7"
LIKELIHOOD = "Rafailov et al. 2023, https://arxiv.org/abs/2305.18290: log pi(y|x) is the sum over the answer's tokens"
LAST_TOKEN = "Radford et al. 2018, Improving language understanding, section 3.2: the last token's state"
SOFTMAX = "Radford et al. 2018, Improving language understanding, equation 3"
CALIBRATION = "Guo et al. 2017, https://arxiv.org/abs/1706.04599, equation 3"
SMALL = f"{STABLE}; the logarithm of a softmax that is 0 in float32 is infinite"
TEMPERATURE = "Guo et al. 2017, https://arxiv.org/abs/1706.04599, section 4.2, temperature scaling"

SPLIT = r're.findall(r" ?\w+| ?[^\w\s]+|\s+(?!\S)|\s+", text)'
EACH_PAIR = "for pair in pairwise(tokens):"
CHOICE = "min(pairs, key=lambda pair: (-pairs[pair], pair))"
WORDS = 'words = {tuple(word.encode("utf-8")): count for'
MERGING = """            while candidates := [pair for pair in pairwise(parts) if pair in rank]:
                first = min(candidates, key=lambda pair: rank[pair])
                parts = merged(parts, first, 256 + rank[first])
"""
LONGEST_FIRST = """            contents = [bytes([byte]) for byte in range(256)]
            for one, other in merges:
                contents.append(contents[one] + contents[other])
            left, parts = bytes(parts), ()
            while left:
                best = max((c for c in set(contents) if left.startswith(c)), key=len)
                left, parts = left[len(best):], (*parts, contents.index(best))
"""
JOINED = 'b"".join(contents[token] for token in tokens).decode("utf-8", errors="replace")'
SHIFTED = "inputs, labels = rows[:, :-1], rows[:, 1:]"
SCORED = "(scored, normalizer - chosen, 0.0)"
MEAN = f"summed_cross_entropy(logits, labels) / {texts.AT_LEAST_ONE}"
COUNTED = "count = (labels != IGNORE_INDEX).sum()"
DECAY = "    parameter = parameter - learning_rate * weight_decay * parameter\n"
M = "m = beta1 * m + (1 - beta1) * gradient\n"
V = "v = beta2 * v + (1 - beta2) * gradient * gradient\n"
M_HAT, V_HAT = "m_hat = m / (1 - beta1**t)", "v_hat = v / (1 - beta2**t)"
STEP = "parameter = parameter - learning_rate * m_hat / (v_hat.sqrt() + epsilon)"
RISE = "peak * (step + 1) / warmup_steps"
PROGRESS = "min(1.0, (step + 1 - warmup_steps) / (steps - warmup_steps))"
FALL = "minimum + (peak - minimum) * (1 + math.cos(math.pi * progress)) / 2"
NORM = "sum((gradient * gradient).sum() for gradient in gradients.values()) ** 0.5"
CLIPPED = "{name: gradient * scale for name, gradient in gradients.items()}, norm"
TOTAL = "total = total + value"
COUNT = "count = count + (batch.labels != IGNORE_INDEX).sum()"
SUMS = "sums[name] + gradients[name] for name"
MEANS = "return total / count, {name: gradient / count for name"
CLIP = "gradients, norm = clipped(gradients, settings.clip)"
RATE = "rate = learning_rate(step, settings.peak, settings.minimum, settings.warmup_steps, settings.steps)"
STARTS = "range(0, len(stream) - 1, length)"
SAME = "(numbers[:, 1:] == numbers[:, :-1]) & (numbers[:, 1:] != 0)"
SEES = "(numbers[:, :, None] == numbers[:, None, :]) & (place[:, None] >= place[None, :])"
SHIFTED_TURNS = "return row[:-1], said[1:]"
MINE = 'mine = role == "assistant"'
UNIFORM = "(2 * uniform - 1) * bound"
BOUND = "1 / math.sqrt(uniform.shape[1])"
SCALE = "scale = alpha / a.shape[0]"
ADAPTED = "x @ weight.T + scale * ((x @ a.T) @ b.T)"
MERGED = "weight + alpha / a.shape[0] * (b @ a)"
MARGIN = "(chosen - reference_chosen) - (rejected - reference_rejected)"
ANSWER = "(scored, chosen, 0.0).sum(-1)"
BIN_ERROR = "error += here.mean() * abs(right[here].mean() - confidence[here].mean())"
BIN = "np.ceil(confidence * bins)"


def of(file: str, check: str, source: str, name: str, *changes: tuple[str, str]) -> Mistake:
    return Mistake(name, check, file, changes, source)


def split(name: str, new: str) -> Mistake:
    return of("bpe", "words_of", GPT2, name, (SPLIT, new))


def pairs(name: str, old: str, new: str) -> Mistake:
    return of("bpe", "count_pairs", BPE, name, (old, new))


def choice(name: str, new: str) -> Mistake:
    return of("bpe", "most_frequent", f"{BPE}; the docstring for ties", name, (CHOICE, new))


def merging(name: str, *changes: tuple[str, str]) -> Mistake:
    return of("bpe", "merged", BPE, name, *changes)


def learning(name: str, old: str, new: str, source: str = BPE) -> Mistake:
    return of("bpe", "train", source, name, (old, new))


def encoding(name: str, old: str, new: str) -> Mistake:
    return of("bpe", "encode", f"{BPE}; merges in the order in which they were learned", name, (old, new))


def decoding(name: str, old: str, new: str) -> Mistake:
    return of("bpe", "decode", BYTES, name, (old, new))


def shift(name: str, old: str, new: str) -> Mistake:
    return of("loss", "shifted", NEXT_TOKEN, name, (old, new))


def summed(name: str, *changes: tuple[str, str], source: str = ENTROPY) -> Mistake:
    return of("loss", "summed_cross_entropy", source, name, *changes)


def mean(name: str, old: str, new: str) -> Mistake:
    return of("loss", "cross_entropy", ENTROPY, name, (old, new))


def adamw(name: str, *changes: tuple[str, str], source: str = ADAM) -> Mistake:
    return of("adamw", "adamw_update", source, name, *changes)


def decay(name: str, new: str) -> Mistake:
    return of("adamw", "decays", DOCSTRING, name, ("parameter.ndim >= 2", new))


def rate(name: str, *changes: tuple[str, str]) -> Mistake:
    return of("schedule", "learning_rate", COSINE, name, *changes)


def norm(name: str, new: str) -> Mistake:
    return of("clipping", "global_norm", CLIPPING, name, (NORM, new))


def clip(name: str, old: str, new: str) -> Mistake:
    return of("clipping", "clipped", CLIPPING, name, (old, new))


def accumulation(name: str, *changes: tuple[str, str]) -> Mistake:
    return of("loop", "mean_gradients", ACCUMULATION, name, *changes)


def step(name: str, old: str, new: str, source: str = DOCSTRING) -> Mistake:
    return of("loop", "train_step", source, name, (old, new))


def packing(check: str, name: str, *changes: tuple[str, str]) -> Mistake:
    return of("packing", check, PACKING, name, *changes)


def turns(name: str, old: str, new: str) -> Mistake:
    return of("instructions", "inputs_and_labels", CHAT, name, (old, new))


def fresh(name: str, old: str, new: str) -> Mistake:
    return of("lora", "fresh_factors", FRESH, name, (old, new))


def adapted(name: str, old: str, new: str) -> Mistake:
    return of("lora", "adapted", LORA, name, (old, new))


def merged(name: str, new: str) -> Mistake:
    return of("lora", "merged_weight", LORA, name, (MERGED, new))


def likelihood(name: str, old: str, new: str, source: str = LIKELIHOOD) -> Mistake:
    return of("dpo", "answer_log_probs", source, name, (old, new))


def dpo(name: str, *changes: tuple[str, str]) -> Mistake:
    return of("dpo", "dpo_loss", DPO, name, *changes)


def pooling(name: str, old: str, new: str) -> Mistake:
    return of("classifier", "last_states", LAST_TOKEN, name, (old, new))


def classes(name: str, old: str, new: str, source: str = SOFTMAX) -> Mistake:
    return of("classifier", "class_log_probs", source, name, (old, new))


def class_loss(name: str, new: str) -> Mistake:
    return of("classifier", "classification_loss", SOFTMAX, name, (f"-{texts.OF_LABELS}.mean()", new))


def calibration(name: str, *changes: tuple[str, str]) -> Mistake:
    return of("calibration", "expected_calibration_error", CALIBRATION, name, *changes)


def temperature(name: str, old: str, new: str) -> Mistake:
    return of("calibration", "fitted_temperature", TEMPERATURE, name, (old, new))


MISTAKES = (
    split("white space is lost: the text is only split at it", "text.split()"),
    split("a space is a word of its own, not the beginning of the next", r're.findall(r"\w+|[^\w\s]+|\s+", text)'),
    split("a space ends the word before it", r're.findall(r"\w+ ?|[^\w\s]+ ?|\s+", text)'),
    split(
        "rule 3 is left out: white space takes the space of the word after it",
        r're.findall(r" ?\w+| ?[^\w\s]+|\s+", text)',
    ),
    split("each punctuation mark is a word of its own", r're.findall(r" ?\w+| ?[^\w\s]|\s+(?!\S)|\s+", text)'),
    split(
        "letters and digits are kept apart, as in GPT-2",
        r're.findall(r" ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+", text)',
    ),
    split(
        "only ASCII letters count as letters", r're.findall(r" ?[A-Za-z0-9_]+| ?[^A-Za-z0-9_\s]+|\s+(?!\S)|\s+", text)'
    ),
    split(
        "a word begins with all spaces before it, not with one", r're.findall(r" *\w+| *[^\w\s]+|\s+(?!\S)|\s+", text)'
    ),
    split("any white space begins the word after it, not only a space", SPLIT.replace(r" ?", r"\s?")),
    split("rules 3 and 4 are left out: white space between words is lost", r're.findall(r" ?\w+| ?[^\w\s]+", text)'),
    pairs("a word counts once, however often it occurs", "counts.get(pair, 0) + count", "counts.get(pair, 0) + 1"),
    pairs(
        "a pair counts once a word, however often it stands in it",
        EACH_PAIR,
        "for pair in set(zip(tokens, tokens[1:], strict=False)):",
    ),
    pairs(
        "in a run of equal tokens, overlapping pairs are counted once",
        EACH_PAIR,
        "for pair in [p for i, p in enumerate(zip(tokens, tokens[1:], strict=False)) if p[0] != p[1]"
        " or next(n for n in range(i + 1) if n == i or tokens[i - n - 1] != p[0]) % 2 == 0]:",
    ),
    pairs(
        "pairs do not overlap: every second one is counted",
        EACH_PAIR,
        "for pair in zip(tokens[::2], tokens[1::2], strict=False):",
    ),
    pairs(
        "the order in a pair is lost",
        EACH_PAIR,
        "for pair in [tuple(sorted(p)) for p in zip(tokens, tokens[1:], strict=False)]:",
    ),
    pairs("a token's distance is two, not one", EACH_PAIR, "for pair in zip(tokens, tokens[2:], strict=False):"),
    choice("of equals, the one that was seen first is taken", "max(pairs, key=pairs.get)"),
    choice("of equals, the greatest pair is taken", "max(pairs, key=lambda pair: (pairs[pair], pair))"),
    choice("the least frequent is taken", "min(pairs, key=lambda pair: (pairs[pair], pair))"),
    choice("of equals, the second token decides first", "min(pairs, key=lambda pair: (-pairs[pair], pair[::-1]))"),
    choice("the smallest pair is taken, whatever its count", "min(pairs)"),
    merging(
        "only the first occurrence is merged",
        ("position += 2", "return (*found, new, *tokens[position + 2 :])"),
        ("            found.append(new)\n", ""),
    ),
    merging("the second token of the pair is kept", ("position += 2", "position += 1")),
    merging(
        "occurrences are looked for from the right",
        (
            "    found: list[int] = []\n    position",
            "    tokens, pair = tokens[::-1], pair[::-1]\n    found: list[int] = []\n    position",
        ),
        ("return tuple(found)", "return tuple(found[::-1])"),
    ),
    merging("the last token is lost", ("while position < len(tokens):", "while position < len(tokens) - 1:")),
    merging("the pair is merged in either order", ("position + 2]) == pair", "position + 2]) in (pair, pair[::-1])")),
    merging("the token after a merged pair is skipped", ("position += 2", "position += 3")),
    learning(
        "vocab_size is taken as the number of merges", "len(merges) < vocab_size - 256", "len(merges) < vocab_size"
    ),
    learning("there is one merge too many", "len(merges) < vocab_size - 256", "len(merges) < vocab_size - 255"),
    learning("there is one merge too few", "len(merges) < vocab_size - 256", "len(merges) < vocab_size - 257"),
    learning("pairs that occur once are merged too", "max(pairs.values()) < 2", "max(pairs.values()) < 1", DOCSTRING),
    learning("the first new token is 257, not 256", "256 + len(merges)", "257 + len(merges)", DOCSTRING),
    learning(
        "the text is not cut into words, so that pairs span them",
        "for text in texts for word in words_of(text)",
        "for text in texts for word in [text]",
    ),
    learning("how often a word occurs is left out", WORDS, 'words = {tuple(word.encode("utf-8")): 1 for'),
    learning(
        "pairs are counted once, before the first merge",
        "pairs = count_pairs(words)",
        "pairs = count_pairs(words) if not merges else {p: n for p, n in pairs.items() if p != pair}",
    ),
    learning("tokens are characters, not bytes", WORDS, "words = {tuple(map(ord, word)): count for", BYTES),
    encoding(
        "the first pair from the left is merged, not the one learned first",
        "first = min(candidates, key=lambda pair: rank[pair])",
        "first = candidates[0]",
    ),
    encoding(
        "the pair learned last is merged first",
        "first = min(candidates, key=lambda pair: rank[pair])",
        "first = max(candidates, key=lambda pair: rank[pair])",
    ),
    encoding("the text is not cut into words", "for word in words_of(text):", "for word in [text]:"),
    encoding("each word is merged once only", "while candidates := ", "if candidates := "),
    encoding("the longest token that fits is taken from the left", MERGING, LONGEST_FIRST),
    encoding("no merge is used", MERGING, ""),
    encoding(
        "equal words in a text are given once", "        tokens += known[word]\n", "            tokens += known[word]\n"
    ),
    decoding(
        "each token is decoded by itself, so that a character cut in two is lost",
        JOINED,
        '"".join(contents[token].decode("utf-8", errors="replace") for token in tokens)',
    ),
    decoding("bytes that are no UTF-8 are left out, not replaced", JOINED, JOINED.replace("replace", "ignore")),
    decoding("bytes are read as Latin-1", JOINED, JOINED.replace('"utf-8", errors="replace"', '"latin-1"')),
    decoding(
        "the two parts of a merge are exchanged",
        "contents[first] + contents[second]",
        "contents[second] + contents[first]",
    ),
    decoding("a space is put between tokens", JOINED, JOINED.replace('b""', 'b" "')),
    shift(
        "the labels are not shifted: each token is its own label",
        SHIFTED,
        "inputs, labels = rows[:, :-1], rows[:, :-1]",
    ),
    shift(
        "the labels are shifted the wrong way: the token before", SHIFTED, "inputs, labels = rows[:, 1:], rows[:, :-1]"
    ),
    shift("padding is scored", "labels == padding", "labels != labels"),
    shift("where the input is padding is left out, not where the label is", "labels == padding", "inputs == padding"),
    shift("the label of padding is 0, a token, not IGNORE_INDEX", "IGNORE_INDEX, labels)", "0, labels)"),
    shift("the inputs have IGNORE_INDEX for padding too", "return inputs,", f"return {texts.CHANGED_INPUTS},"),
    of(
        "loss",
        "shifted",
        texts.VIEW,
        "IGNORE_INDEX is written into the rows that were passed in, and so into the inputs too",
        (SHIFTED, f"rows[:, 1:] = {texts.CHANGED_LABELS}\n    {SHIFTED}"),
    ),
    summed(
        "positions that are IGNORE_INDEX are scored, as token 0",
        (SCORED, "(scored == scored, normalizer - chosen, 0.0)"),
    ),
    summed("the largest logit is not added again", (".log() + largest[..., 0]", ".log()"), source=STABLE),
    summed(
        "the exponentials overflow: the largest logit is not subtracted",
        ("(logits - largest).exp()", "logits.exp()"),
        (".log() + largest[..., 0]", ".log()"),
        source=STABLE,
    ),
    summed(
        "the logarithm is taken of a softmax, which may be 0",
        (SCORED, "(scored, -(chosen - normalizer).exp().log(), 0.0)"),
        source=SMALL,
    ),
    summed("the sign is wrong: log p, not -log p", (SCORED, "(scored, chosen - normalizer, 0.0)")),
    summed("the mean over all positions, not the sum", (f"{SCORED}.sum()", f"{SCORED}.mean()")),
    summed("the mean over scored positions, not the sum", (f"{SCORED}.sum()", f"{SCORED}.sum() / scored.sum()")),
    summed("the loss is in bits, not in nats", (SCORED, "(scored, (normalizer - chosen) / 0.6931471805599453, 0.0)")),
    summed("the logarithm is left out: 1 - p", (SCORED, "(scored, 1 - (chosen - normalizer).exp(), 0.0)")),
    summed(
        "the largest logit takes the place of the logarithm of the sum",
        (SCORED, "(scored, largest[..., 0] - chosen, 0.0)"),
    ),
    summed("the logits are not normalised", (SCORED, "(scored, -chosen, 0.0)")),
    summed("bfloat16 logits are not brought to float32 first", (texts.FLOAT32, "logits = logits"), source=PRECISION),
    summed(
        "the labels, which are shifted, are shifted again",
        (texts.FLOAT32, f"{texts.FLOAT32}[:, :-1]\n    labels = labels[:, 1:]"),
        source=NEXT_TOKEN,
    ),
    mean("positions that are not scored are in the mean", COUNTED, "count = (labels == labels).sum()"),
    mean(
        "the mean of the rows' means",
        MEAN,
        "sum(summed_cross_entropy(logits[i : i + 1], labels[i : i + 1]) / (labels[i] != IGNORE_INDEX).sum() for i in range(len(labels))) / len(labels) if count > 0 else 0.0 * count",
    ),
    mean("the sum, not the mean", MEAN, "summed_cross_entropy(logits, labels)"),
    mean("the sum is divided by the number of rows", MEAN, "summed_cross_entropy(logits, labels) / len(labels)"),
    mean("where no label is scored it is not 0", texts.AT_LEAST_ONE, "count"),
    adamw(
        "the decay goes through the means (L2 regularisation), not past them",
        (DECAY, "    gradient = gradient + weight_decay * parameter\n"),
        source=DECOUPLED,
    ),
    adamw(
        "the decay is not multiplied by the learning rate",
        (DECAY, "    parameter = parameter - weight_decay * parameter\n"),
        source=DECOUPLED,
    ),
    adamw(
        "the decay comes after the update, of the parameter that it gave",
        (DECAY, ""),
        (STEP, f"{STEP}\n{DECAY.rstrip()}"),
        source=f"{DECOUPLED}; PyTorch's order",
    ),
    adamw("the decay is left out", (DECAY, ""), source=DECOUPLED),
    adamw(
        "the bias is corrected as if this were the step before",
        (M_HAT, "m_hat = m / max(1e-12, 1 - beta1 ** (t - 1))"),
        (V_HAT, "v_hat = v / max(1e-12, 1 - beta2 ** (t - 1))"),
    ),
    adamw(
        "the bias is corrected as if this were the step after",
        (M_HAT, "m_hat = m / (1 - beta1 ** (t + 1))"),
        (V_HAT, "v_hat = v / (1 - beta2 ** (t + 1))"),
    ),
    adamw("the bias of m is not corrected", (M_HAT, "m_hat = m")),
    adamw("the bias of v is not corrected", (V_HAT, "v_hat = v")),
    adamw("no bias is corrected", (M_HAT, "m_hat = m"), (V_HAT, "v_hat = v")),
    adamw(
        "the bias is corrected by 1 - beta, whatever the step",
        (M_HAT, "m_hat = m / (1 - beta1)"),
        (V_HAT, "v_hat = v / (1 - beta2)"),
    ),
    adamw("epsilon is inside the root", ("(v_hat.sqrt() + epsilon)", "(v_hat + epsilon).sqrt()")),
    adamw("epsilon is left out", ("(v_hat.sqrt() + epsilon)", "v_hat.sqrt()")),
    adamw(
        "epsilon is added to the uncorrected root, as in the efficient form",
        ("(v_hat.sqrt() + epsilon)", "(v_hat.sqrt() + epsilon / (1 - beta2**t) ** 0.5)"),
        source=f"{ADAM}; the end of section 2 has the other form",
    ),
    adamw("the root is left out", ("(v_hat.sqrt() + epsilon)", "(v_hat + epsilon)")),
    adamw(
        "v is the mean of the gradient's absolute value, not of its square",
        (V, "v = beta2 * v + (1 - beta2) * abs(gradient)\n"),
    ),
    adamw("v is the mean of the square of m", (V, "v = beta2 * v + (1 - beta2) * m * m\n")),
    adamw(
        "beta1 and beta2 are exchanged in the means",
        (M, "m = beta2 * m + (1 - beta2) * gradient\n"),
        (V, "v = beta1 * v + (1 - beta1) * gradient * gradient\n"),
    ),
    adamw("the gradient enters m whole, without 1 - beta1", (M, "m = beta1 * m + gradient\n")),
    adamw("the square enters v whole, without 1 - beta2", (V, "v = beta2 * v + gradient * gradient\n")),
    adamw(
        "the update is added, not subtracted",
        (STEP, STEP.replace("parameter - learning_rate", "parameter + learning_rate")),
    ),
    adamw("the gradient takes the place of m in the update", (STEP, STEP.replace("m_hat", "gradient"))),
    adamw("m and v are returned with the bias corrected", ("return parameter, m, v", "return parameter, m_hat, v_hat")),
    adamw(
        "the parameter that was passed in is changed",
        (DECAY, "    parameter *= 1 - learning_rate * weight_decay\n"),
        (STEP, STEP.replace("= parameter - ", "-= ")),
        source=DOCSTRING,
    ),
    adamw(
        "the m and v that were passed in are changed",
        (M, "m *= beta1\n    m += (1 - beta1) * gradient\n"),
        (V, "v *= beta2\n    v += (1 - beta2) * gradient * gradient\n"),
        source=DOCSTRING,
    ),
    decay("every parameter decays", "True"),
    decay("none decays", "False"),
    decay("vectors decay, and matrices do not", "parameter.ndim < 2"),
    decay("only vectors decay", "parameter.ndim == 1"),
    decay("a number without an axis decays too", "parameter.ndim != 1"),
    decay("only what has two axes decays, not more", "parameter.ndim == 2"),
    decay("only what has more than two axes decays", "parameter.ndim > 2"),
    rate("the first step has a learning rate of 0", (RISE, "peak * step / warmup_steps")),
    rate(
        "the warm-up is one step too long: its last step is not at the peak",
        (RISE, "peak * (step + 1) / (warmup_steps + 1)"),
    ),
    rate("there is no warm-up", (RISE, "peak")),
    rate("the fall begins at the first step, not after the warm-up", (PROGRESS, "min(1.0, (step + 1) / steps)")),
    rate(
        "the fall is one step late: the last step is not at the minimum",
        (PROGRESS, "min(1.0, (step - warmup_steps) / (steps - warmup_steps))"),
    ),
    rate(
        "the fall is one step late, though it ends in time: step warmup_steps is still at the peak",
        (PROGRESS, "min(1.0, (step - warmup_steps) / (steps - 1 - warmup_steps))"),
    ),
    rate(
        "without a warm-up, step 0 is at the peak",
        (PROGRESS, PROGRESS.replace("warmup_steps", "max(1, warmup_steps)")),
    ),
    rate("after the last step it rises again", (PROGRESS, "(step + 1 - warmup_steps) / (steps - warmup_steps)")),
    rate("it falls to 0, not to the minimum", (FALL, "peak * (1 + math.cos(math.pi * progress)) / 2")),
    rate("the minimum is added on top", (FALL, "minimum + peak * (1 + math.cos(math.pi * progress)) / 2")),
    rate("it goes along a whole cosine: down and up again", (FALL, FALL.replace("math.pi", "2 * math.pi"))),
    rate(
        "it goes along a quarter of a cosine", (FALL, "minimum + (peak - minimum) * math.cos(math.pi * progress / 2)")
    ),
    rate("it falls along a straight line", (FALL, "minimum + (peak - minimum) * (1 - progress)")),
    rate("one is not added to the cosine", (FALL, "minimum + (peak - minimum) * math.cos(math.pi * progress)")),
    rate(
        "it is the greater of the cosine down to 0 and the minimum",
        (FALL, "max(minimum, peak * (1 + math.cos(math.pi * progress)) / 2)"),
    ),
    norm(
        "the norms are added, not their squares",
        "sum((gradient * gradient).sum() ** 0.5 for gradient in gradients.values())",
    ),
    norm("the root is left out", "sum((gradient * gradient).sum() for gradient in gradients.values())"),
    norm(
        "it is the largest of the norms", "max((gradient * gradient).sum() ** 0.5 for gradient in gradients.values())"
    ),
    norm(
        "squares are averaged over each gradient, not summed",
        "sum((gradient * gradient).mean() for gradient in gradients.values()) ** 0.5",
    ),
    norm("absolute values are added, not squares", "sum(abs(gradient).sum() for gradient in gradients.values())"),
    norm(
        "the sum of squares is divided by the number of gradients",
        "(sum((gradient * gradient).sum() for gradient in gradients.values()) / len(gradients)) ** 0.5",
    ),
    clip("each gradient is clipped by its own norm", CLIPPED, CLIPPED.replace("gradient * scale", texts.EACH_TENSOR)),
    clip("each number is clipped by itself", CLIPPED, CLIPPED.replace("gradient * scale", texts.EACH_VALUE)),
    clip("short gradients are made longer", texts.CLIP_SCALE, "limit / (norm + 1e-6)"),
    clip("the norm that is returned is the one after clipping", CLIPPED, f"{CLIPPED} * scale"),
    clip("the norm becomes 1, not the limit", texts.CLIP_SCALE, texts.CLIP_SCALE.replace("limit / ", "1 / ")),
    clip("gradients are multiplied by the limit, not by limit / norm", texts.CLIP_SCALE, texts.AT_MOST_ONE),
    clip(
        "the norm is squared in the quotient",
        texts.CLIP_SCALE,
        texts.CLIP_SCALE.replace("(norm + 1e-6)", "(norm * norm + 1e-6)"),
    ),
    clip("1e-6 is not added to the norm", texts.CLIP_SCALE, texts.CLIP_SCALE.replace("(norm + 1e-6)", "norm")),
    clip("nothing is clipped", CLIPPED, CLIPPED.replace("gradient * scale", "gradient")),
    clip(
        "the gradients that were passed in are changed",
        CLIPPED,
        CLIPPED.replace("gradient * scale", "gradient.__imul__(scale)"),
    ),
    accumulation(
        "the mean of the batches' means, so that labels of small batches count more",
        (TOTAL, "scored = (batch.labels != IGNORE_INDEX).sum()\n        total = total + value / scored"),
        (COUNT, "count = len(batches)"),
        (SUMS, "sums[name] + gradients[name] / scored for name"),
    ),
    accumulation("the sum is divided by the number of batches", (COUNT, "count = len(batches)")),
    accumulation(
        "labels that are not scored are counted", (COUNT, "count = count + (batch.labels == batch.labels).sum()")
    ),
    accumulation("nothing is divided: sums, not means", (MEANS, "return total, {name: gradient for name")),
    accumulation("the gradients are not divided", (MEANS, "return total / count, {name: gradient for name")),
    accumulation("the loss is not divided", (MEANS, "return total, {name: gradient / count for name")),
    accumulation("the gradients are those of the last batch", (SUMS, "gradients[name] for name")),
    accumulation(
        "the number of labels is that of the last batch", (COUNT, "count = (batch.labels != IGNORE_INDEX).sum()")
    ),
    accumulation("the loss is that of the last batch", (TOTAL, "total = value")),
    accumulation("what is counted is rows, not labels", (COUNT, "count = count + len(batch.labels)")),
    step("the gradients are not clipped", CLIP, "_, norm = clipped(gradients, settings.clip)", CLIPPING),
    step(
        "the gradients are clipped to 1, not to settings.clip",
        CLIP,
        "gradients, norm = clipped(gradients, 1.0)",
        CLIPPING,
    ),
    step("the norm is the one after clipping", CLIP, f"{CLIP}\n    norm = clipped(gradients, settings.clip)[1]"),
    step("the learning rate is the next step's", RATE, RATE.replace("(step,", "(step + 1,"), COSINE),
    step("the learning rate is the last step's", RATE, RATE.replace("(step,", "(step - 1,"), COSINE),
    step(
        "steps and warmup_steps are exchanged",
        RATE,
        RATE.replace("settings.warmup_steps, settings.steps", "settings.steps, settings.warmup_steps"),
        COSINE,
    ),
    step("the learning rate is always the peak", RATE, "rate = settings.peak", COSINE),
    step(
        "the old parameters are returned",
        "return optimizer.update(parameters, gradients, rate), loss",
        "optimizer.update(parameters, gradients, rate)\n    return parameters, loss",
    ),
    step(
        "the loss is that of the first batch alone",
        "loss, gradients = mean_gradients(summed_loss, parameters, batches)",
        "loss, _ = mean_gradients(summed_loss, parameters, batches[:1])\n    _, gradients = mean_gradients(summed_loss, parameters, batches)",
        ACCUMULATION,
    ),
    step(
        "the gradients are those of the first batch alone",
        "loss, gradients = mean_gradients(summed_loss, parameters, batches)",
        "_, gradients = mean_gradients(summed_loss, parameters, batches[:1])\n    loss, _ = mean_gradients(summed_loss, parameters, batches)",
        ACCUMULATION,
    ),
    packing(
        "packed",
        "rows do not share a token, so that some tokens are never a label",
        (STARTS, "range(0, len(stream), length + 1)"),
    ),
    packing(
        "packed", "the last row is left out where it is not full", (STARTS, "range(0, len(stream) - length, length)")
    ),
    packing("packed", "there is a row too many, of one token", (STARTS, "range(0, len(stream), length)")),
    packing(
        "packed", "documents are numbered over all rows, not from 1 in each", ("[order[owner] for", "[owner + 1 for")
    ),
    packing(
        "packed", "documents are numbered from 0, as padding is", ("dict.fromkeys(here), 1)", "dict.fromkeys(here), 0)")
    ),
    packing("packed", "padding has the number of the last document", ("[0] * missing", "[len(order)] * missing")),
    packing("packed", "padding has a number of its own, not 0", ("[0] * missing", "[len(order) + 1] * missing")),
    packing(
        "packed",
        "rows are filled up with 0, not with the padding that is given",
        ("[padding] * missing", "[0] * missing"),
    ),
    packing(
        "packed_labels",
        "a document's first token is guessed from the document before it",
        (SAME, "numbers[:, 1:] != 0"),
    ),
    packing("packed_labels", "padding is scored", (SAME, "numbers[:, 1:] == numbers[:, :-1]")),
    packing("packed_labels", "everything is scored", (SAME, "numbers[:, 1:] == numbers[:, 1:]")),
    packing(
        "packed_labels", "the labels are not shifted", ("rows[:, 1:], IGNORE_INDEX)", "rows[:, :-1], IGNORE_INDEX)")
    ),
    packing(
        "packed_labels",
        "what is not scored has the label 0, not IGNORE_INDEX",
        ("rows[:, 1:], IGNORE_INDEX)", "rows[:, 1:], 0)"),
    ),
    packing(
        "document_mask", "documents see those before them in the row", (SEES, SEES.replace("None] ==", "None] >="))
    ),
    packing(
        "document_mask",
        "the mask is causal only: all documents of a row see each other",
        (SEES, "(numbers[:, :, None] == numbers[:, :, None]) & (place[:, None] >= place[None, :])"),
    ),
    packing("document_mask", "a position sees those after it", (SEES, "(numbers[:, :, None] == numbers[:, None, :])")),
    packing("document_mask", "a position does not see itself", (SEES, SEES.replace(">= place", "> place"))),
    packing(
        "document_mask",
        "query and key are exchanged: a position sees itself and those after it",
        (SEES, SEES.replace(">= place", "<= place")),
    ),
    packing("document_mask", "True and False are exchanged", (SEES, f"(({SEES}) == False)")),
    packing("document_mask", "the mask holds numbers, not booleans", (SEES, f"1.0 * ({SEES})")),
    packing("document_mask", "padding sees nothing, not even itself", (SEES, f"{SEES} & (numbers[:, :, None] != 0)")),
    packing("positions_of", "positions do not begin again", ("return place - ", "return place + 0 * ")),
    packing("positions_of", "the first position is 1, not 0", ("return place - ", "return 1 + place - ")),
    packing("positions_of", "only the first token of a document begins again", (texts.CUMULATIVE, "")),
    packing(
        "positions_of",
        "positions begin again one token late",
        (
            "begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]",
            "begins[:, 2:] = numbers[:, 1:-1] != numbers[:, :-2]\n    begins[:, 1] = begins[:, 1] == 2",
        ),
    ),
    packing(
        "positions_of",
        "positions begin again one token early",
        (
            "begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]",
            "begins[:, 1:] = numbers[:, 1:] != numbers[:, 1:]\n    begins[:, :-1] = numbers[:, 1:] != numbers[:, :-1]",
        ),
    ),
    turns("the labels are not shifted", SHIFTED_TURNS, "return row[:-1], said[:-1]"),
    turns("inputs and labels are shifted the wrong way", SHIFTED_TURNS, "return row[1:], said[:-1]"),
    turns("what the user says is scored too", MINE, "mine = True"),
    turns("what the user says is scored, and the assistant's is not", MINE, 'mine = role == "user"'),
    turns(
        "the end of an answer is not scored, so that the model never learns to stop",
        "[*tokens, end] if mine",
        "[*tokens, IGNORE_INDEX] if mine",
    ),
    turns(
        "the end of the user's turn is scored",
        "[IGNORE_INDEX] * (len(tokens) + 1)",
        "[*[IGNORE_INDEX] * len(tokens), end]",
    ),
    turns(
        "the assistant's marker is scored",
        "said += [IGNORE_INDEX, *(",
        "said += [markers[role] if mine else IGNORE_INDEX, *(",
    ),
    turns(
        "only the last answer is scored", MINE, f"{MINE}\n        said = [IGNORE_INDEX] * len(said) if mine else said"
    ),
    turns("only the first answer is scored", MINE, f"{MINE} and set(said) <= {{IGNORE_INDEX}}"),
    turns(
        "the first token of an answer is not scored",
        "[*tokens, end] if mine",
        "[IGNORE_INDEX, *tokens[1:], end] if mine",
    ),
    turns(
        "the label of what is not scored is 0",
        "    return row[:-1], said[1:]",
        "    return row[:-1], [max(label, 0) for label in said[1:]]",
    ),
    fresh("A is zeros as well, so that nothing is ever learned", UNIFORM, "0 * uniform"),
    fresh("B is ones, not zeros: the adapter changes the model at once", ".zeros(", ".ones("),
    fresh("A has positive numbers only", UNIFORM, "uniform * bound"),
    fresh("A reaches half as far as it should", UNIFORM, "(uniform - 0.5) * bound"),
    fresh("A reaches to 1 / sqrt(R), not to 1 / sqrt(I)", BOUND, "1 / math.sqrt(uniform.shape[0])"),
    fresh("A reaches to 1 / sqrt(O), not to 1 / sqrt(I)", BOUND, "1 / math.sqrt(width)"),
    fresh("the root is left out: A reaches to 1 / I", BOUND, "1 / uniform.shape[1]"),
    fresh("A reaches to sqrt(3 / I): that gives a variance of 1 / I", BOUND, "math.sqrt(3 / uniform.shape[1])"),
    fresh("A reaches from -1 to 1", BOUND, "1"),
    fresh("A is turned round: 0 gives its upper end", UNIFORM, "(1 - 2 * uniform) * bound"),
    adapted("the scale is alpha alone, not alpha / R", SCALE, "scale = alpha"),
    adapted("the scale is 1 / R: alpha is left out", SCALE, "scale = 1 / a.shape[0]"),
    adapted("the scale is left out", SCALE, "scale = 1.0"),
    adapted("the scale is alpha / sqrt(R), as in rank-stabilised LoRA", SCALE, "scale = alpha / a.shape[0] ** 0.5"),
    adapted("the scale is alpha / I", SCALE, "scale = alpha / a.shape[1]"),
    adapted("the scale is alpha * R", SCALE, "scale = alpha * a.shape[0]"),
    adapted("the scale is R / alpha", SCALE, "scale = a.shape[0] / alpha"),
    adapted("the map itself is left out", ADAPTED, "scale * ((x @ a.T) @ b.T)"),
    adapted("the adapter is left out", ADAPTED, "x @ weight.T"),
    adapted("the map's own result is scaled too", ADAPTED, f"scale * ({ADAPTED.replace('scale * ', '')})"),
    adapted("the adapter is subtracted", ADAPTED, ADAPTED.replace("+ scale", "- scale")),
    merged("the scale is alpha alone, not alpha / R", "weight + alpha * (b @ a)"),
    merged("the scale is 1 / R: alpha is left out", "weight + 1 / a.shape[0] * (b @ a)"),
    merged("the scale is left out", "weight + b @ a"),
    merged("the scale is alpha / sqrt(R), as in rank-stabilised LoRA", "weight + alpha / a.shape[0] ** 0.5 * (b @ a)"),
    merged("the scale is R / alpha", "weight + a.shape[0] / alpha * (b @ a)"),
    merged("the product is transposed: A and B are exchanged", "weight + alpha / a.shape[0] * (b @ a).T"),
    merged("the weight that was passed in is changed", f"weight.__iadd__({MERGED.removeprefix('weight + ')})"),
    merged("the weight itself is left out", "alpha / a.shape[0] * (b @ a)"),
    merged("the adapter is subtracted", "weight - alpha / a.shape[0] * (b @ a)"),
    likelihood("the mean over an answer's tokens, not the sum", ANSWER, f"{ANSWER} / scored.sum(-1)"),
    likelihood("positions that are IGNORE_INDEX count, as token 0", ANSWER, "(scored == scored, chosen, 0.0).sum(-1)"),
    likelihood("the logits are not normalised", "log_probs = logits - ", "log_probs = logits - 0 * "),
    likelihood(
        "the logarithm is taken of a softmax, which may be 0",
        ANSWER,
        "(scored, chosen.exp().log(), 0.0).sum(-1)",
        source=SMALL,
    ),
    likelihood("the sum is over the whole batch", ANSWER, "(scored, chosen, 0.0).sum()"),
    likelihood("the sign is wrong: -log p", ANSWER, "(scored, -chosen, 0.0).sum(-1)"),
    likelihood("probabilities are added, not their logarithms", ANSWER, "(scored, chosen.exp(), 0.0).sum(-1)"),
    likelihood("the softmax is over positions, not over the vocabulary", "logits.logsumexp(-1", "logits.logsumexp(-2"),
    dpo("the reference is left out", (MARGIN, "chosen - rejected")),
    dpo(
        "the reference has the wrong sign: its two log-probabilities are exchanged",
        (MARGIN, MARGIN.replace("- reference", "+ reference")),
    ),
    dpo("the reference of the worse answer is left out", (MARGIN, "(chosen - reference_chosen) - rejected")),
    dpo("the reference of the better answer is left out", (MARGIN, "chosen - (rejected - reference_rejected)")),
    dpo("the better and the worse answer are exchanged", (MARGIN, f"-({MARGIN})")),
    dpo("the gains are added, not subtracted", (MARGIN, MARGIN.replace(") - (", ") + ("))),
    dpo("beta is left out", (texts.LOG_SIGMOID, texts.LOG_SIGMOID.replace("-beta * margin", "-margin"))),
    dpo(
        "the margin is divided by beta",
        (texts.LOG_SIGMOID, texts.LOG_SIGMOID.replace("-beta * margin", "-margin / beta")),
    ),
    dpo(
        "beta stands before the logarithm, not inside the sigmoid",
        (texts.LOG_SIGMOID, f"beta * {texts.LOG_SIGMOID.replace('-beta * margin', '-margin')}"),
    ),
    dpo("the sign is wrong: log sigmoid", (texts.LOG_SIGMOID, f"-{texts.LOG_SIGMOID}")),
    dpo("the sum over the pairs, not the mean", (f"{texts.LOG_SIGMOID}.mean()", f"{texts.LOG_SIGMOID}.sum()")),
    dpo("the logarithm is left out: 1 - sigmoid", (texts.LOG_SIGMOID, f"(1 - (-{texts.LOG_SIGMOID}).exp())")),
    dpo(
        "the exponential overflows for a large margin", (texts.LOG_SIGMOID, "-(1 / (1 + (-beta * margin).exp())).log()")
    ),
    dpo("the loss is IPO's squared one", (texts.LOG_SIGMOID, "((margin - 1 / (2 * beta)) ** 2)")),
    dpo("the loss is a hinge", (texts.LOG_SIGMOID, texts.HINGE)),
    pooling("the last column is taken, which may be padding", texts.STATES, "hidden[:, -1]"),
    pooling(
        "the number of tokens is taken for the place of the last: wrong with padding in front",
        texts.LAST,
        "real.sum(-1) - 1",
    ),
    pooling("the first real token is taken", texts.LAST, texts.FIRST),
    pooling("the first column is taken", texts.STATES, "hidden[:, 0]"),
    pooling("the token before the last is taken", texts.STATES, texts.STATES.replace("last]", "last - 1]")),
    pooling("the mean over all columns, padding too", texts.STATES, "hidden.mean(1)"),
    pooling("the mean over the real tokens", texts.STATES, texts.MEAN_OF_REAL),
    pooling("the largest value of each number over the real tokens", texts.STATES, texts.LARGEST),
    classes("the bias is left out", "@ weight.T + bias", "@ weight.T"),
    classes("the weight is not transposed", "@ weight.T + bias", "@ weight + bias"),
    classes("the softmax is left out: these are logits", texts.LOG_SOFTMAX, "logits"),
    classes("the logarithm is left out: these are probabilities", texts.LOG_SOFTMAX, f"({texts.LOG_SOFTMAX}).exp()"),
    classes(
        "the softmax is over the texts, not over the classes", texts.LOG_SOFTMAX, texts.LOG_SOFTMAX.replace("(-1", "(0")
    ),
    classes(
        "the logarithm is taken of a softmax, which may be 0",
        texts.LOG_SOFTMAX,
        f"({texts.LOG_SOFTMAX}).exp().log()",
        SMALL,
    ),
    classes("the exponentials overflow", texts.LOG_SOFTMAX, texts.OVERFLOWING),
    class_loss("the sum, not the mean", f"-{texts.OF_LABELS}.sum()"),
    class_loss("the sign is wrong", f"{texts.OF_LABELS}.mean()"),
    class_loss("the mean is over all classes, not over the right one", "-log_probs.mean()"),
    class_loss("the logarithm is taken away: 1 - p", f"(1 - {texts.OF_LABELS}.exp()).mean()"),
    class_loss("the loss is the logarithm of the mean probability", f"-{texts.OF_LABELS}.exp().mean().log()"),
    calibration(
        "the bins are not weighted by their texts",
        (BIN_ERROR, BIN_ERROR.replace("here.mean() * abs(", "1 / len(set(place)) * abs(")),
    ),
    calibration(
        "the largest distance of a bin, not the mean",
        (BIN_ERROR, "error = max(error, abs(right[here].mean() - confidence[here].mean()))"),
    ),
    calibration(
        "the distances are squared",
        (BIN_ERROR, "error += here.mean() * (right[here].mean() - confidence[here].mean()) ** 2"),
    ),
    calibration("the distances have signs, so that they cancel", (BIN_ERROR, BIN_ERROR.replace("abs(", "("))),
    calibration(
        "a confidence on the edge of two bins is in the upper one",
        (BIN, "np.minimum(np.floor(confidence * bins) + 1, bins)"),
    ),
    calibration(
        "a confidence on the edge of two bins is in the upper one, and one of 1 in none",
        (BIN, "np.floor(confidence * bins) + 1"),
    ),
    calibration(
        "the confidence is the right class's probability, not the greatest",
        ("probabilities.max(axis=1)", "probabilities[np.arange(len(labels)), labels]"),
    ),
    calibration(
        "the middle of a bin takes the place of its mean confidence",
        (BIN_ERROR, BIN_ERROR.replace("confidence[here].mean()", "(k - 0.5) / bins")),
    ),
    calibration(
        "there are no bins: one distance for all texts", (BIN_ERROR, "error = abs(right.mean() - confidence.mean())")
    ),
    calibration("right and wrong are exchanged", ("== labels", "!= labels")),
    calibration("the first bin, or the last, is left out", ("range(1, bins + 1)", "range(1, bins)")),
    calibration("the distances are summed, not averaged", (BIN_ERROR, BIN_ERROR.replace("here.mean() * ", ""))),
    temperature(
        "the result is 1 / T: the logits are multiplied by it", "np.exp(-(low + high) / 2)", "np.exp((low + high) / 2)"
    ),
    temperature(
        "the exponentials overflow: the largest logit is not taken out",
        "logits = logits - logits.max(axis=1, keepdims=True)",
        "pass",
    ),
    temperature("the wrong half is kept", "if slope(np.exp(middle)) > 0:", "if slope(np.exp(middle)) < 0:"),
    temperature(
        "it is fitted to the predictions, not to the right classes",
        "of_label = logits[np.arange(len(labels)), labels]",
        "of_label = logits.max(axis=1)",
    ),
    temperature("the search ends at 10", "np.log(1 / 100), np.log(1 / 0.01)", "np.log(1 / 10), np.log(1 / 0.1)"),
    temperature(
        "the mean confidence is brought to the accuracy, not the loss to its least",
        "((probabilities * logits).sum(axis=1) - of_label).mean()",
        "(probabilities.max(axis=1) - (of_label == logits.max(axis=1))).mean()",
    ),
    temperature("the logarithm is returned", "np.exp(-(low + high) / 2)", "-(low + high) / 2"),
    temperature(
        "the temperature is the root of the right one", "np.exp(-(low + high) / 2)", "np.exp(-(low + high) / 4)"
    ),
)
