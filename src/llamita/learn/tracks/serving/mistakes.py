"""The mistakes that the serving track's grader knows: each is a change to the lines of a solution.

Each stands here once for both frameworks: `texts` has the words in which their lines differ. A reader's result that
equals the changed solution's has this mistake, however it is written.
"""

import texts
from texts import AXIS, CAT, HIDDEN, KEEP, LIB, MAX, MIN, SWAP, TENSOR, TO, wide

from llamita.learn.checking import Mistake

SAFE_SOFTMAX = "Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867, algorithm 2"
SWISH = "Elfwing et al. 2017, https://arxiv.org/abs/1702.03118, section 2"
ATTENTION = "Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, equation 1"
HEADS = "Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.2.2"
MASK = "Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.2.3"
ROFORMER = "Su et al. 2021, https://arxiv.org/abs/2104.09864, equation 34"
SPEEDS = "Su et al. 2021, https://arxiv.org/abs/2104.09864, section 3.2.2"
GROUPED = "Ainslie et al. 2023, https://arxiv.org/abs/2305.13245, section 2.2"
RMS_NORM = "Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, equation 4"
SWIGLU = "Shazeer 2020, https://arxiv.org/abs/2002.05202, equation 6"
LLAMA = "Touvron et al. 2023, https://arxiv.org/abs/2302.13971, section 2.2"
QWEN2 = "Qwen team 2024, https://arxiv.org/abs/2407.10671, section 2.2.1 (biases of queries, keys and values)"
QWEN3 = "Qwen team 2025, https://arxiv.org/abs/2505.09388, section 2 (norms of queries and keys)"
TIED = "Press and Wolf 2016, https://arxiv.org/abs/1608.05859 (weight tying)"
TEMPERATURE = "Ackley, Hinton and Sejnowski 1985: probabilities are proportional to exp(logit / temperature)"
TOP_K = "Fan et al. 2018, https://arxiv.org/abs/1805.04833 (top-k random sampling)"
TOP_P = "Holtzman et al. 2019, https://arxiv.org/abs/1904.09751, section 3.1"
MIN_P = "Nguyen et al. 2024, https://arxiv.org/abs/2407.01082, section 3"
INVERSION = "Devroye 1986, Non-Uniform Random Variate Generation, section III.2 (inversion)"
CACHE = "Shazeer 2019, https://arxiv.org/abs/1911.02150, section 2.4 (incremental generation)"
CHUNKS = "Agrawal et al. 2023, https://arxiv.org/abs/2308.16369, section 4 (chunked prefills)"
AFFINE = "Jacob et al. 2017, https://arxiv.org/abs/1712.05877, section 2.1"
GROUPS = "Shen et al. 2019, https://arxiv.org/abs/1909.05840 (group-wise quantization)"
PACKING = "the docstring of QuantizedWeights: the number at 2i is in the lower four bits of its byte"
FLASH = "Dao et al. 2022, https://arxiv.org/abs/2205.14135, algorithm 1"
ORCA = "Yu et al. 2022, Orca, https://www.usenix.org/conference/osdi22/presentation/yu, section 3 (iteration-level scheduling)"
SELECTIVE = (
    "Yu et al. 2022, Orca, https://www.usenix.org/conference/osdi22/presentation/yu, section 3 (selective batching)"
)
PAGED = "Kwon et al. 2023, https://arxiv.org/abs/2309.06180, section 4.1"
BLOCKS = "Kwon et al. 2023, https://arxiv.org/abs/2309.06180, section 4.3"
SHARED = "Kwon et al. 2023, https://arxiv.org/abs/2309.06180, section 4.4"
RADIX = "Zheng et al. 2023, https://arxiv.org/abs/2312.07104, section 3"
LOOKAHEAD = "Leviathan et al. 2023, https://arxiv.org/abs/2211.17192, section 2.1"
SPECULATIVE = "Leviathan et al. 2023, https://arxiv.org/abs/2211.17192, section 2.3"

Change = tuple[str, str]


def at(check: str, file: str, source: str, *mistakes: tuple[str, *tuple[Change, ...]]) -> list[Mistake]:
    """Returns mistakes of one check that have a source in common: each is its name and its changes."""
    return [Mistake(name, check, file, tuple(changes), source) for name, *changes in mistakes]


EXPONENTIALS = f"{LIB}.exp(wide - wide.{MAX}({AXIS}=axis, {KEEP}))"
SUM = f"exponentials.sum({AXIS}=axis, {KEEP})"
SCORES = f"query @ key.{SWAP}(-2, -1) * scale"
MASKED = "        scores = scores + mask\n"
SOFTMAX = "softmax(scores, -1) @ value"
Q, K, V = (
    f"linear({name}, self.w{name[0]}).reshape(N, L, self.num_heads, self.head_dim).{SWAP}(1, 2)"
    for name in ("query", "key", "value")
)
TURNED = "(a * cos - b * sin, a * sin + b * cos)"
SLICES = "slices = offset if isinstance(offset, list) else [slice(0, L) if offset is None else offset]\n"
STACKED = f"{LIB}.stack(turned, {AXIS}=-1).flatten(-2) if self.traditional else {CAT}(turned, {AXIS}=-1)"
NORMED = f"wide * {LIB}.rsqrt({LIB}.square(wide).mean({AXIS}=-1, {KEEP}) + self.eps)"
NORM_RESULT = f"normed.{TO}(x.dtype) * self.weight"
GATE = "project(silu(project(x, self.w_gate)) * project(x, self.w_up), self.w_down)"
POSITIONS = "[slice(n, n + L) for n in first] if isinstance(first, list) else slice(first, first + L)"
ROTATED = "query, key = self.rope(query, positions), self.rope(key, positions)"
NORMED_HEADS = "query, key = self.q_norm(query), self.k_norm(key)"
FETCHED = "        key, value, mask = cache.update_and_fetch(key, value)\n"
ATTENDED = "scaled_dot_product_attention_grouped(query, key, value, mask=mask)"
FIRST_HALF = "h = x + self.attention(self.input_norm(x), cache)"
SECOND_HALF = "return h + self.mlp(self.post_attention_norm(h))"
LAYERS = "zip(self.blocks, caches, strict=True)"
RENORMALISED = f"        p = p / p.sum({AXIS}=-1, {KEEP})\n"
CUT_K = f"        p = {LIB}.where(places < top_k, p, 0.0)\n"
CUT_P = f"        p = {LIB}.where(before < top_p, p, 0.0)\n"
CUT_MIN = f"{LIB}.where(p >= min_p * p.{MAX}({AXIS}=-1, {KEEP}), p, 0.0)"
RENORMALISED_LAST = f"return p / p.sum({AXIS}=-1, {KEEP})"
BEYOND = f"(ends <= uniform[:, None] * ends[:, -1:]).sum({AXIS}=-1)"
NEW_KEY = f"{CAT}((self.key, key), {AXIS}=2)"
NEW_VALUE = f"{CAT}((self.value, value), {AXIS}=2)"
REWOUND = "self.key, self.value = self.key[:, :, : self.offset], self.value[:, :, : self.offset]"
PARTS = "for start in range(0, len(tokens), chunk):"
PART = "tokens[start : start + chunk]"
NUMBERS = "((groups - biases) / scales).round()"
NIBBLES = f"{LIB}.stack((q & 15, q >> 4), {AXIS}=-1).flatten(-2)"
WEIGHTS = "(groups * w.scales[..., None] + w.biases[..., None])"
MERGED_TOTAL = f"total = total * correction + weights.sum({AXIS}=-1, {KEEP})"
MERGED_OUTPUT = "output = output * correction + weights @ value"
SEEN = f"{LIB}.arange(start, end) <= positions"
NEW_POSITIONS = f"{TENSOR}(self.offset)[:, None] - L + {LIB}.arange(L)"
ADMIT = "while self.waiting and len(self.running) < self.batch_size:"
ENDED = "                request.tokens.pop()\n"
PLACE = "table.pages[(self.offset + i) // size], (self.offset + i) % size"
FLAT = f"pages.{SWAP}(0, 1).flatten(1, 2)[None, :, : self.offset]"
CONTEXT = f"context_lens[:, None] - L + {LIB}.arange(L)"
MATCHED = "while (len(found) + 1) * size < len(tokens):"
PREFIX = "self.pages.get(tuple(tokens[: (len(found) + 1) * size]))"
FULL = "reversed(range(len(tokens) // size))"
UNUSED = "if evicted < count and self.pool.holders[page] == 1:"
SAME = "while accepted < len(draft) and draft[accepted] == target[accepted]:"
SETTLED = "return [*draft[:accepted], target[accepted]]"
REFUSED = "if uniform[i] * q[draft[i]] >= p[draft[i]]:"
BONUS = "draw(target_probabilities[K:], uniform[K:])"
FORGET = "for cache in [*caches, *draft_caches]:"
BACK = "cache.rewind(max(0, cache.offset - (len(text) - 1)))"

MISTAKES = [
    # Attention and what it stands on
    *at(
        "softmax", "basics", SAFE_SOFTMAX,
        ("the greatest number is not subtracted, so exp overflows", (EXPONENTIALS, f"{LIB}.exp(wide)")),
        ("the softmax is over the last axis, whatever `axis` says", (EXPONENTIALS, EXPONENTIALS.replace("=axis", "=-1")), (SUM, SUM.replace("=axis", "=-1"))),
        ("the sum is over the last axis, whatever `axis` says", (SUM, SUM.replace("=axis", "=-1"))),
        ("the sum is over all numbers, not along the axis", (SUM, "exponentials.sum()")),
        ("the exponentials are not divided by their sum", (f"(exponentials / {SUM})", "exponentials")),
        ("the result is the logarithm of the shares", (f"(exponentials / {SUM})", f"{LIB}.log(exponentials / {SUM})")),
        ("the dtype becomes float32", (f".{TO}(x.dtype)", "")),
        ("the sum is taken in x's dtype, where float16 overflows", (f"wide = {wide('x')}", "wide = x")),
    ),
    *at(
        "linear", "basics", "the docstring: x times the transpose of w, plus the bias",
        ("the bias is left out", ("y if bias is None else y + bias", "y")),
        ("the bias is subtracted", ("y + bias", "y - bias")),
    ),
    *at(
        "silu", "basics", SWISH,
        ("the sigmoid is not multiplied by x", ("return x / (", "return 1 / (")),
        ("the sigmoid has the wrong sign", ("exp(-x)", "exp(x)")),
        ("tanh stands in the place of the sigmoid", (f"x / (1 + {LIB}.exp(-x))", f"x * {LIB}.tanh(x)")),
        ("the sigmoid is that of 1.702 x, an approximation of GELU", ("exp(-x)", "exp(-1.702 * x)")),
        ("this is ReLU", (f"x / (1 + {LIB}.exp(-x))", f"{LIB}.where(x > 0, x, 0.0)")),
        ("the dtype becomes float32", ("return x / (", f"x = {wide('x')}\n    return x / (")),
    ),
    *at(
        "scaled_dot_product_attention_simple", "attention", ATTENTION,
        ("the scale is left out", (f"{SCORES}\n    if mask", f"query @ key.{SWAP}(-2, -1)\n    if mask")),
        ("the scale is left out where none is given", ("scale = query.shape[-1] ** -0.5 if scale", "scale = 1.0 if scale")),
        ("the scores are divided by the scale, not multiplied", (f"{SCORES}\n    if mask", f"query @ key.{SWAP}(-2, -1) / scale\n    if mask")),
        ("the scale is 1 / E, where it should be 1 / sqrt(E)", ("scale = query.shape[-1] ** -0.5 if", "scale = query.shape[-1] ** -1.0 if")),
        ("the scale is taken from the number of keys, not from the head's size", ("scale = query.shape[-1] ** -0.5 if", "scale = key.shape[-2] ** -0.5 if")),
        ("a scale that is given is ignored", ("scale = query.shape[-1] ** -0.5 if scale is None else scale\n    scores", "scale = query.shape[-1] ** -0.5\n    scores")),
        ("the softmax is over the queries, not over the keys", (SOFTMAX, "softmax(scores, -2) @ value")),
        ("the scores are used without a softmax", (SOFTMAX, "scores @ value")),
        ("the weights meet the values from the last to the first", (SOFTMAX, f"softmax(scores, -1) @ {texts.REVERSED_VALUE}")),
    ),
    *at(
        "scaled_dot_product_attention_simple", "attention", MASK,
        ("the mask is left out", (MASKED, "        pass\n")),
        ("the mask is multiplied, not added", (MASKED, "        scores = scores * mask\n")),
        ("the mask is subtracted", (MASKED, "        scores = scores - mask\n")),
        ("the mask is scaled with the scores", (MASKED, "        scores = scores + mask * scale\n")),
        ("the mask is added after the softmax", (MASKED, "        return (softmax(scores, -1) + mask) @ value\n")),
    ),
    *at(
        "SimpleMultiHeadAttention", "attention", HEADS,
        ("a head's numbers are taken from all over the width, not side by side", *((x, x.replace("self.num_heads, self.head_dim", "self.head_dim, self.num_heads").replace("(1, 2)", "(1, 3)") + f".{SWAP}(2, 3)") for x in (Q, K, V))),
        ("positions and heads are mixed: the shape (N, H, L, E) is made without exchanging two axes", *((x, x.replace("N, L, self.num_heads,", "N, self.num_heads, L,").replace(f".{SWAP}(1, 2)", "")) for x in (Q, K, V))),
        ("the heads are put side by side without exchanging two axes back", (f"gathered.{SWAP}(1, 2).reshape", "gathered.reshape")),
        ("the keys come from the queries", ("linear(key, self.wk)", "linear(query, self.wk)")),
        ("the values come from the queries", ("linear(value, self.wv)", "linear(query, self.wv)")),
        ("the values come from the keys", ("linear(value, self.wv)", "linear(key, self.wv)")),
        ("wq and wk are exchanged", ("linear(query, self.wq)", "linear(query, self.wk)"), ("linear(key, self.wk)", "linear(key, self.wq)")),
        ("wk is used for the values too", ("linear(value, self.wv)", "linear(value, self.wk)")),
        ("the last projection, wo, is left out", (f"linear(gathered.{SWAP}(1, 2).reshape(N, L, -1), self.wo)", f"gathered.{SWAP}(1, 2).reshape(N, L, -1)")),
        ("wo is transposed", ("-1), self.wo)", "-1), self.wo.T)")),
        ("the mask is not passed on", ("(q, k, v, mask=mask)", "(q, k, v)")),
        ("the scale is taken from the width, not from the head's size", ("(q, k, v, mask=mask)", "(q, k, v, query.shape[-1] ** -0.5, mask)")),
    ),
    *at(
        "RoPE", "positional_encoding", ROFORMER,
        ("the two layouts are exchanged", ("self.traditional = traditional", "self.traditional = not traditional")),
        ("pairs of neighbours are put together as halves", (STACKED, f"{CAT}(turned, {AXIS}=-1)")),
        ("halves are put together as neighbours", (STACKED, f"{LIB}.stack(turned, {AXIS}=-1).flatten(-2)")),
        ("the pairs are neighbours, whatever `traditional` says", ("if self.traditional:\n", "if True:\n"), (STACKED, f"{LIB}.stack(turned, {AXIS}=-1).flatten(-2)")),
        ("the pairs are halves, whatever `traditional` says", ("if self.traditional:\n", "if False:\n"), (STACKED, f"{CAT}(turned, {AXIS}=-1)")),
        ("the layouts are exchanged where pairs are taken, not where they are put together", ("if self.traditional:\n", "if not self.traditional:\n")),
        ("the layouts are exchanged where pairs are put together, not where they are taken", (STACKED, STACKED.replace("if self", "if not self"))),
        ("the rotation goes the other way", (TURNED, "(a * cos + b * sin, b * cos - a * sin)")),
        ("sine and cosine are exchanged", (texts.TURNS, texts.EXCHANGED_TURNS)),
        ("the first position counts as 1, not as 0", (texts.ANGLES, f"(1 + {texts.ANGLES})")),
        ("both coordinates are turned as the first one is", (TURNED, "(a * cos - b * sin, b * cos - a * sin)")),
        ("the offset is ignored", (SLICES, "slices = [slice(0, L)] * (len(offset) if isinstance(offset, list) else 1)\n")),
        ("the offset is counted twice", (SLICES, SLICES + "        slices = [slice(2 * s.start, 2 * s.start + L) for s in slices]\n")),
        ("all rows have the positions of the first", (SLICES, SLICES + "        slices = slices[:1]\n")),
        ("the dtype becomes float32", (f"return joined.{TO}(x.dtype)", "return joined")),
    ),
    *at(
        "RoPE", "positional_encoding", SPEEDS,
        ("the exponent of the base has the wrong sign", (texts.FREQUENCIES, texts.FREQUENCIES[1:])),
        ("the base is always 10000", ("frequencies = base **", "frequencies = 10000 **")),
        ("the exponent is -i / dims, where it should be -2i / dims", (texts.FREQUENCIES, f"{texts.FREQUENCIES} / 2")),
        ("the exponent is divided by half of dims, not by all of it", (texts.FREQUENCIES, f"{texts.FREQUENCIES} * 2")),
        ("the angles are in turns, not in radians", ("* frequencies[None, :]", "* frequencies[None, :] * 6.283185307179586")),
    ),
    *at(
        "causal_mask", "attention", MASK,
        ("the queries stand at the beginning, where they are the last of S positions", ("(S - L, S)[:, None]", "(L)[:, None]")),
        ("a position does not see itself", ("[None, :] > positions", "[None, :] >= positions")),
        ("the mask is one off: a position sees the one after it", ("[None, :] > positions", "[None, :] > positions + 1")),
        ("the mask hides what came before, not what comes after", ("[None, :] > positions", "[None, :] < positions")),
        ("the mask is ones and zeros, not what is added to scores", (texts.CAUSAL, texts.CAUSAL_ONES)),
        ("hidden places have a large number, not minus infinity", (texts.CAUSAL, texts.CAUSAL_LARGE)),
        ("the dtype is always float32", (texts.CAUSAL, texts.CAUSAL_WIDE)),
    ),
    *at(
        "scaled_dot_product_attention_grouped", "attention", GROUPED,
        (
            "the heads of keys are tiled, not repeated: query head i reads head i % H, where it should read i // G",
            ("query.reshape(*batch, H, heads // H, L, E)", f"query.reshape(*batch, heads // H, H, L, E).{SWAP}(-4, -3)"),
            ("gathered.reshape(query.shape)", f"gathered.{SWAP}(-4, -3).reshape(query.shape)"),
            (texts.GROUP_MASK, texts.GROUP_MASK_TILED),
        ),
        ("the groups of the result are in another order than the queries'", ("gathered.reshape(query.shape)", f"gathered.{SWAP}(-4, -3).reshape(query.shape)")),
        ("the mask's heads are tiled, not grouped as the queries are", (texts.GROUP_MASK, texts.GROUP_MASK_TILED)),
        ("all query heads read the first head of keys", ("scale, mask)\n    return gathered", "scale, mask)\n    gathered = scaled_dot_product_attention_simple(grouped, key[..., :1, :, :, :], value, scale, mask)\n    return gathered")),
        ("a scale that is given is ignored", ("(grouped, key, value, scale, mask)", "(grouped, key, value, None, mask)")),
        ("the scale is left out where none is given", ("(grouped, key, value, scale, mask)", "(grouped, key, value, scale or 1.0, mask)")),
    ),
    *at(
        "scaled_dot_product_attention_grouped", "attention", MASK,
        ('"causal" hides nothing', ("mask = causal_mask(L, S, query.dtype)", "mask = None")),
        ("the causal mask is made for queries at the beginning", ("causal_mask(L, S, query.dtype)", "causal_mask(S, S, query.dtype)[:L]")),
        ("a mask that is given is ignored", (f"mask = {texts.GROUP_MASK}", "mask = None")),
        ("the causal mask is used where none is asked for", ("    if isinstance(mask, str):", "    if mask is None or isinstance(mask, str):")),
    ),
    # The model
    *at(
        "RMSNorm", "layers", RMS_NORM,
        ("epsilon is added outside the root", (NORMED, f"wide / ({LIB}.sqrt({LIB}.square(wide).mean({AXIS}=-1, {KEEP})) + self.eps)")),
        ("epsilon is left out", (" + self.eps)", ")")),
        ("the squares are summed, not averaged", (f".mean({AXIS}", f".sum({AXIS}")),
        ("the root is left out", (NORMED, f"wide / ({LIB}.square(wide).mean({AXIS}=-1, {KEEP}) + self.eps)")),
        ("the result is multiplied by the root, not divided", (f"{LIB}.rsqrt(", f"{LIB}.sqrt(")),
        ("the mean is over everything, not over the last axis", (f".mean({AXIS}=-1, {KEEP})", ".mean()")),
        ("the mean is subtracted, as LayerNorm does", ("        normed = wide", f"        wide = wide - wide.mean({AXIS}=-1, {KEEP})\n        normed = wide")),
        ("the weight is left out", (NORM_RESULT, f"normed.{TO}(x.dtype)")),
        ("one is added to the weight, as Gemma does", (NORM_RESULT, f"normed.{TO}(x.dtype) * (1 + self.weight)")),
        ("the squares are computed in x's dtype, where float16 overflows", (f"wide = {wide('x')}", "wide = x")),
        ("the dtype becomes float32", (NORM_RESULT, f"normed * {wide('self.weight')}")),
    ),
    *at(
        "MLP", "layers", SWIGLU,
        ("gate and up are exchanged", (GATE, "project(silu(project(x, self.w_up)) * project(x, self.w_gate), self.w_down)")),
        ("silu is left out", (GATE, "project(project(x, self.w_gate) * project(x, self.w_up), self.w_down)")),
        ("silu is over the product, not over the gate alone", (GATE, "project(silu(project(x, self.w_gate) * project(x, self.w_up)), self.w_down)")),
        ("silu is over both", (GATE, "project(silu(project(x, self.w_gate)) * silu(project(x, self.w_up)), self.w_down)")),
        ("gate and up are added, not multiplied", (GATE, "project(silu(project(x, self.w_gate)) + project(x, self.w_up), self.w_down)")),
        ("up is left out", (GATE, "project(silu(project(x, self.w_gate)), self.w_down)")),
        ("down is left out", (GATE, "silu(project(x, self.w_gate)) * project(x, self.w_up)")),
    ),
    *at(
        "Embedding", "layers", "the docstring: row i of the weight belongs to token i",
        ("the rows are counted from 1", ("self.weight[x]", "self.weight[x - 1]")),
        ("the rows are multiplied by the root of their size, as Gemma does", ("self.weight[x]", "self.weight[x] * self.embedding_dim**0.5")),
    ),
    *at(
        "Embedding.as_linear", "layers", TIED,
        ("the logits are divided by the root of the width", ("project(x, self.weight)", "project(x, self.weight) * self.embedding_dim**-0.5")),
        ("the result has probabilities, not logits", ("return project(x, self.weight)", f"p = {LIB}.exp(project(x, self.weight))\n        return p / p.sum({AXIS}=-1, {KEEP})")),
    ),
    *at(
        "Attention", "model", CACHE,
        ("the cache's position is forgotten: every call begins at 0", (POSITIONS, "slice(0, L)")),
        ("the cache's position is added twice", (POSITIONS, "[slice(2 * n, 2 * n + L) for n in first] if isinstance(first, list) else slice(2 * first, 2 * first + L)")),
        (
            "the position is read after the cache has taken the new keys",
            (POSITIONS, "[slice(n + L, n + 2 * L) for n in first] if isinstance(first, list) else slice(first + L, first + 2 * L)"),
        ),
        ("the position is one too many", (POSITIONS, "[slice(n + 1, n + 1 + L) for n in first] if isinstance(first, list) else slice(first + 1, first + 1 + L)")),
        ("all rows have the position of the first", (POSITIONS, "slice(first[0], first[0] + L) if isinstance(first, list) else slice(first, first + L)")),
        ("keys go into the cache without their rotation, and new ones stay without it", (ROTATED, "query = self.rope(query, positions)")),
        ("the cache's mask is not used: it is always causal", (ATTENDED, ATTENDED.replace("mask=mask", 'mask="causal"'))),
        ("there is no mask", (ATTENDED, ATTENDED.replace(", mask=mask", ""))),
        ("the keys of the cache are not used", (FETCHED, '        cache.update_and_fetch(key, value)\n        mask = "causal"\n')),
    ),
    *at(
        "Attention", "model", SPEEDS,
        ("the values are rotated too", (ROTATED, f"{ROTATED}\n        value = self.rope(value, positions)")),
        ("the queries are not rotated", (ROTATED, "key = self.rope(key, positions)")),
        ("the pairs are neighbours, where these checkpoints have halves", ("config.rope_theta)", "config.rope_theta, True)")),
    ),
    *at(
        "Attention", "model", QWEN3,
        ("the norms come after the rotation", ("        if self.q_norm is not None and self.k_norm is not None:\n            query, key = self.q_norm(query), self.k_norm(key)\n", ""), (ROTATED, f"{ROTATED}\n        if self.q_norm is not None and self.k_norm is not None:\n            {NORMED_HEADS}")),
        ("the norms are left out", (NORMED_HEADS, "pass")),
        ("the norms of queries and keys are exchanged", (NORMED_HEADS, "query, key = self.k_norm(query), self.q_norm(key)")),
        ("the keys have no norm", (NORMED_HEADS, "query = self.q_norm(query)")),
    ),
    *at(
        "Attention", "model", QWEN2,
        ("the biases are left out", ("self.wq, self.bq)", "self.wq)"), ("self.wk, self.bk)", "self.wk)"), ("self.wv, self.bv)", "self.wv)"), ("self.wo, self.bo)", "self.wo)")),
        ("the last projection has no bias", ("self.wo, self.bo)", "self.wo)")),
        ("the queries have no bias", ("self.wq, self.bq)", "self.wq)")),
        ("the keys have no bias", ("self.wk, self.bk)", "self.wk)")),
        ("the values have no bias", ("self.wv, self.bv)", "self.wv)")),
        ("the biases of keys and values are exchanged", ("self.wk, self.bk)", "self.wk, self.bv)"), ("self.wv, self.bv)", "self.wv, self.bk)")),
    ),
    *at(
        "Attention", "model", GROUPED,
        ("the heads are put side by side without exchanging two axes back", (f"gathered.{SWAP}(1, 2).reshape(N, L, -1)", "gathered.reshape(N, L, -1)")),
        ("the heads of keys and values are exchanged with their sizes", ("key = project(x, self.wk, self.bk).reshape(N, L, self.num_kv_heads, self.head_dim)", f"key = project(x, self.wk, self.bk).reshape(N, L, self.head_dim, self.num_kv_heads).{SWAP}(2, 3)")),
    ),
    *at(
        "TransformerBlock", "model", LLAMA,
        ("the input is added after its norm, not before", (FIRST_HALF, "h = self.input_norm(x) + self.attention(self.input_norm(x), cache)")),
        ("attention reads x without its norm", (FIRST_HALF, "h = x + self.attention(x, cache)")),
        ("the input is not added to attention's result", (FIRST_HALF, "h = self.attention(self.input_norm(x), cache)")),
        ("the norm comes after attention, not before", (FIRST_HALF, "h = x + self.input_norm(self.attention(x, cache))")),
        ("x is added at the end, where h should be", (SECOND_HALF, "return x + self.mlp(self.post_attention_norm(h))")),
        ("the feed-forward network's input is not added to its result", (SECOND_HALF, "return self.mlp(self.post_attention_norm(h))")),
        ("the feed-forward network reads h without its norm", (SECOND_HALF, "return h + self.mlp(h)")),
        ("the feed-forward network reads x: both halves are side by side", (SECOND_HALF, "return h + self.mlp(self.post_attention_norm(x))")),
        ("the two norms are exchanged", (FIRST_HALF, FIRST_HALF.replace("input_norm", "post_attention_norm")), (SECOND_HALF, SECOND_HALF.replace("post_attention_norm", "input_norm"))),
        ("both halves have the first norm", (SECOND_HALF, SECOND_HALF.replace("post_attention_norm", "input_norm"))),
        ("the cache is not passed on", (FIRST_HALF, FIRST_HALF.replace(", cache)", ", NoCache())"))),
    ),
    *at(
        "Model", "model", LLAMA,
        ("the last norm is left out", ("        h = self.norm(h)\n", "")),
        ("the layers run from the last to the first", (LAYERS, "zip(self.blocks[::-1], caches, strict=True)")),
        ("the last layer is left out", (LAYERS, "zip(self.blocks[:-1], caches, strict=False)")),
        ("every layer reads the embeddings, not the layer before", ("h = block(h, cache)", "h = block(self.embedding(tokens), cache)")),
        ("the embeddings are multiplied by the root of the width, as Gemma does", ("h = self.embedding(tokens)\n", "h = self.embedding(tokens) * self.config.hidden_size**0.5\n")),
    ),
    *at(
        "Model", "model", TIED,
        ("lm_head is not used", ("self.embedding.as_linear(h) if self.lm_head is None else project(h, self.lm_head)", "self.embedding.as_linear(h)")),
    ),
    *at(
        "Model", "model", CACHE,
        ("the caches are not used", (LAYERS, "zip(self.blocks, [NoCache() for _ in caches], strict=True)")),
        ("all layers use the first layer's cache", (LAYERS, "zip(self.blocks, [caches[0]] * len(caches), strict=True)")),
        ("the caches are taken from the last to the first", (LAYERS, "zip(self.blocks, caches[::-1], strict=True)")),
    ),
    # Writing
    *at(
        "distribution", "sampler", TEMPERATURE,
        ("the logits are multiplied by the temperature, not divided", (f"{wide('logits')} / temp", f"{wide('logits')} * temp")),
        ("the temperature is ignored", (f"{wide('logits')} / temp", wide("logits"))),
    ),
    *at(
        "distribution", "sampler", TOP_K,
        ("top_k keeps one token too many", (CUT_K, CUT_K.replace("<", "<="))),
        ("top_k keeps one token too few", (CUT_K, CUT_K.replace("top_k", "max(1, top_k - 1)"))),
        ("top_k keeps the least likely tokens", (CUT_K, CUT_K.replace("places < top_k", "places + top_k >= logits.shape[-1]"))),
        ("top_k is ignored", (CUT_K, "")),
        ("top_k compares places in the vocabulary, not in the order of probabilities", (CUT_K, CUT_K.replace("places", "order"))),
        (
            "what top_k leaves is not divided by its sum before top_p looks at it",
            (CUT_K + RENORMALISED, CUT_K),
        ),
    ),
    *at(
        "distribution", "sampler", TOP_P,
        ("the token that reaches top_p is cut off too", (texts.BEFORE, texts.UPTO), (CUT_P, CUT_P.replace("before < top_p", "(before < top_p) | (places == 0)"))),
        ("the token that reaches top_p is cut off too, so that nothing may be left", (texts.BEFORE, texts.UPTO)),
        ("top_p takes tokens in the order of the vocabulary, not from the most likely down", (texts.BEFORE, texts.UNORDERED)),
        ("top_p is ignored", (CUT_P, "")),
        ("top_p keeps the tail, not the most likely", (CUT_P, CUT_P.replace("before < top_p", "before >= top_p"))),
        ("top_p is a least probability, not a sum", (CUT_P, CUT_P.replace("before < top_p", "p >= (1 - top_p) * (places > 0)"))),
    ),
    *at(
        "distribution", "sampler", MIN_P,
        ("min_p is compared with the probability itself, not with its ratio to the greatest", (CUT_MIN, f"{LIB}.where(p >= min_p, p, 0.0)")),
        ("min_p is ignored", (CUT_MIN, "p")),
        ("min_p keeps the tail", (CUT_MIN, CUT_MIN.replace(">=", "<="))),
        ("what is left is not divided by its sum at the end", (RENORMALISED_LAST, "return p")),
        ("what is left is never divided by its sum", (CUT_K + RENORMALISED, CUT_K), (CUT_P + RENORMALISED, CUT_P), (RENORMALISED_LAST, "return p")),
    ),
    *at(
        "draw", "sampler", INVERSION,
        ("a token of probability 0 is drawn where the number lies on its end", (BEYOND, BEYOND.replace("<=", "<"))),
        ("the token is one too many", (BEYOND, f"{LIB}.clip({BEYOND} + 1, 0, 5)")),
        ("the most likely token is taken", (BEYOND, "probabilities.argmax(-1)")),
        ("the line begins at the last token", (BEYOND, f"probabilities.shape[-1] - 1 - ({texts.ENDS_FROM_LAST} <= uniform[:, None]).sum({AXIS}=-1)")),
        ("the number is compared with probabilities, not with their sums", (f"ends = probabilities.cumsum({AXIS}=-1)", "ends = probabilities")),
        ("the number counts tokens, not probability", (BEYOND, f"{LIB}.floor(uniform * probabilities.shape[-1])")),
    ),
    *at(
        "KvCache.update_and_fetch", "kv_cache", CACHE,
        ("the new keys and values stand before the old ones", (NEW_KEY, NEW_KEY.replace("(self.key, key)", "(key, self.key)")), (NEW_VALUE, NEW_VALUE.replace("(self.value, value)", "(value, self.value)"))),
        ("only the new keys and values are returned", ("return self.key, self.value,", "return key, value,")),
        ("the offset counts calls, not positions", ("self.offset += key.shape[2]", "self.offset += 1")),
        ("the offset is the number of new positions", ("self.offset += key.shape[2]", "self.offset = key.shape[2]")),
        ("the offset counts heads, not positions", ("self.offset += key.shape[2]", "self.offset += key.shape[1]")),
        ("the offset does not move", ("self.offset += key.shape[2]", "self.offset += 0")),
        ("keys are kept in the place of values", ("self.value = value if", "value = key\n        self.value = value if")),
        ("the new values are not kept", (NEW_VALUE, "self.value")),
        ("the last result is no mask", (', "causal"\n', ", None\n")),
    ),
    *at(
        "KvCache.rewind", "kv_cache", CACHE,
        ("rewind(0) forgets everything", (REWOUND, "self.key, self.value = self.key[:, :, :-n], self.value[:, :, :-n]")),
        ("the first positions are forgotten, not the last", (REWOUND, "self.key, self.value = self.key[:, :, n:], self.value[:, :, n:]")),
        ("the offset does not move", ("self.offset -= n", "pass"), (REWOUND, REWOUND.replace(": self.offset", ": self.offset - n"))),
        ("keys and values are kept, only the offset moves", (REWOUND, "pass")),
        ("the values are not cut", (REWOUND, "self.key = self.key[:, :, : self.offset]")),
        ("n is what stays, not what is forgotten", (REWOUND, "self.offset = n\n            self.key, self.value = self.key[:, :, :n], self.value[:, :, :n]")),
    ),
    *at(
        "prefill", "generate", CHUNKS,
        ("the logits are those of the last chunk's first position", ("return logits[:, -1]", "return logits[:, 0]")),
        ("the logits are those of all positions", ("return logits[:, -1]", "return logits")),
        ("the chunks overlap by one token", (PART, "tokens[max(0, start - 1) : start + chunk]")),
        ("all tokens are run at once, whatever `chunk` says", (PARTS, "for start in range(0, 1):"), (PART, "tokens[start:]")),
        ("only the last chunk is run", (PARTS, "for start in range(0, len(tokens), chunk)[-1:]:")),
        ("every chunk begins with the first token again", (PART, "tokens[: start + chunk]")),
        ("the first chunk is run in the place of all", (PART, "tokens[:chunk]")),
        ("the tokens are run one by one, whatever `chunk` says", (PARTS, "for start in range(len(tokens)):"), (PART, "tokens[start : start + 1]")),
        ("the last chunk is left out where it is not full", (PARTS, "for start in range(0, max(1, len(tokens) - chunk + 1), chunk):")),
        ("the chunks are run from the last to the first", (PARTS, "for start in range(0, len(tokens), chunk)[::-1]:")),
    ),
    *at(
        "generate", "generate", CACHE,
        ("the whole text is run again for every token, on top of what is in the caches", ("prefill(model, [token], caches, chunk)", "prefill(model, [*prompt, *tokens], caches, chunk)")),
        ("all new tokens are run again for every token", ("prefill(model, [token], caches, chunk)", "prefill(model, tokens, caches, chunk)")),
        ("the prompt's last token is run in the place of the new one", ("prefill(model, [token], caches, chunk)", "prefill(model, [prompt[-1]], caches, chunk)")),
        ("the prompt's last token is run twice", ("    logits = prefill(model, prompt, caches, chunk)\n", "    logits = prefill(model, [*prompt, prompt[-1]], caches, chunk)\n")),
        ("only the prompt's last token is run", ("    logits = prefill(model, prompt, caches, chunk)\n", "    logits = prefill(model, prompt[-1:], caches, chunk)\n")),
        ("the token that ends the text is part of the result", ("            break\n        tokens.append(token)\n        if", "            tokens.append(token)\n            break\n        tokens.append(token)\n        if")),
        ("eos_ids is ignored", ("    logits = prefill(model, prompt, caches, chunk)\n", "    eos_ids = ()\n    logits = prefill(model, prompt, caches, chunk)\n")),
        ("the prompt is part of the result", ("    return tokens\n", "    return [*prompt, *tokens]\n")),
        ("there is one token too many", ("while len(tokens) < max_tokens:", "while len(tokens) <= max_tokens:"), ("        if len(tokens) < max_tokens:", "        if True:")),
        ("there is one token too few", ("while len(tokens) < max_tokens:", "while len(tokens) < max(1, max_tokens - 1):")),
        ("max_tokens counts the prompt too", ("while len(tokens) < max_tokens:", "while len(tokens) < max(0, max_tokens - len(prompt)):")),
        ("the prompt is read at once, whatever `chunk` says", ("    logits = prefill(model, prompt, caches, chunk)\n", "    logits = prefill(model, prompt, caches, len(prompt))\n")),
    ),
    # Less memory
    *at(
        "quantize_weights", "quantize", AFFINE,
        ("the scale divides the range into 2**bits steps, where there are 2**bits - 1", ("/ (2**bits - 1)", "/ 2**bits"), (NUMBERS, f"{LIB}.clip({NUMBERS}, 0, 2**bits - 1)")),
        ("numbers are rounded down, not to the nearest", (".round()", "")),
        ("halves are rounded up, where they go to the even neighbour", (NUMBERS, f"{LIB}.floor((groups - biases) / scales + 0.5)")),
        ("the scale is always that of 4 bits", ("/ (2**bits - 1)", "/ 15")),
        ("the bias is the greatest weight, not the least", (f"biases = groups.{MIN}(", f"biases = groups.{MAX}("), (f"groups.{MAX}({AXIS}=-1, {KEEP}) - biases", f"biases - groups.{MIN}({AXIS}=-1, {KEEP})"), ("(groups - biases)", "(biases - groups)")),
        ("the bias is left out: zero becomes 0", (f"groups.{MIN}({AXIS}=-1, {KEEP})", f"groups.{MIN}({AXIS}=-1, {KEEP}) * 0.0"), (NUMBERS, f"{LIB}.clip({NUMBERS}, 0, 2**bits - 1)")),
        ("the scale is 0 where all weights of a group are equal", ("scales == 0, 1.0, scales", "scales == 0, 0.0, scales"), ("- biases) / scales)", f"- biases) / {LIB}.where(scales == 0, 1.0, scales))")),
    ),
    *at(
        "quantize_weights", "quantize", GROUPS,
        ("a row has one scale and bias, not one for each group", (f"biases = groups.{MIN}({AXIS}=-1, {KEEP})", f"biases = groups * 0.0 + groups.{MIN}({AXIS}=-1, {KEEP}).{MIN}({AXIS}=-2, {KEEP})\n    biases = biases[..., :1]"), (f"groups.{MAX}({AXIS}=-1, {KEEP}) - biases", f"groups.{MAX}({AXIS}=-1, {KEEP}).{MAX}({AXIS}=-2, {KEEP}) - biases")),
    ),
    *at(
        "quantize_weights", "quantize", PACKING,
        ("the two numbers of a byte are exchanged", ("q[:, 0::2] | (q[:, 1::2] << 4)", "q[:, 1::2] | (q[:, 0::2] << 4)")),
        ("a byte has numbers from the two halves of a row, not neighbours", ("q[:, 0::2] | (q[:, 1::2] << 4)", "q[:, : inputs // 2] | (q[:, inputs // 2 :] << 4)")),
        ("numbers of 4 bits are not packed, but a byte each", ("        q = q[:, 0::2] | (q[:, 1::2] << 4)\n", "        pass\n")),
    ),
    *at(
        "dequantize_weights", "quantize", PACKING,
        ("the two numbers of a byte are exchanged", ("(q & 15, q >> 4)", "(q >> 4, q & 15)")),
        ("the lower numbers come first, then all upper ones", (NIBBLES, f"{CAT}((q & 15, q >> 4), {AXIS}=-1)")),
        ("the upper number of a byte is not shifted down", ("q >> 4)", "q & 240)")),
        ("the lower number keeps the upper bits", ("(q & 15,", "(q,")),
        ("numbers of 4 bits are read with a sign", (f"groups = {wide('q')}", f"groups = ({wide('q')} - 16.0 * (q > 7) * (w.bits == 4))")),
    ),
    *at(
        "dequantize_weights", "quantize", AFFINE,
        ("the bias is left out", (" + w.biases[..., None])", ")")),
        ("the bias is subtracted, not added", (" + w.biases", " - w.biases")),
        ("the bias is multiplied by the scale too", (WEIGHTS, "((groups + w.biases[..., None]) * w.scales[..., None])")),
        ("the scale is left out", (WEIGHTS, "(groups + w.biases[..., None])")),
        ("the numbers are divided by the scale", ("groups * w.scales", "groups / w.scales")),
    ),
    *at(
        "dequantize_weights", "quantize", GROUPS,
        ("scales and biases are tiled: weight i has those of group i % G, where it should be i // group_size", (WEIGHTS, "(groups.reshape(q.shape[0], w.group_size, -1) * w.scales[:, None] + w.biases[:, None])")),
        ("all groups of a row have the first one's scale", ("groups * w.scales[..., None]", "groups * w.scales[:, :1, None]")),
        ("all groups of a row have the first one's bias", ("w.biases[..., None]", "w.biases[:, :1, None]")),
    ),
    *at(
        "quantized_linear", "quantize", AFFINE,
        ("the bias is left out", (f".{TO}(x.dtype), bias)", f".{TO}(x.dtype))")),
        ("the dtype becomes float32", (f"linear(x, dequantize_weights(w).{TO}(x.dtype), bias)", f"linear({wide('x')}, dequantize_weights(w), bias)")),
    ),
    *at(
        "merge_block", "flash_attention", FLASH,
        ("the output so far is not rescaled to the new maximum", (MERGED_OUTPUT, "output = output + weights @ value")),
        ("the total so far is not rescaled to the new maximum", (MERGED_TOTAL, MERGED_TOTAL.replace("total * correction", "total"))),
        ("neither total nor output are rescaled to the new maximum", (f"correction = {LIB}.exp(maximum - greatest)", "correction = 1.0")),
        ("the factor for the sums so far is inverted", ("exp(maximum - greatest)", "exp(greatest - maximum)")),
        ("the maximum is that of this block, not of all so far", (f"{LIB}.maximum(maximum, scores.{MAX}({AXIS}=-1, {KEEP}))", f"{LIB}.maximum(scores.{MAX}({AXIS}=-1, {KEEP}), {TENSOR}(-1e30))")),
        ("this block is rescaled too", ("weights @ value", "correction * (weights @ value)"), (f"weights.sum({AXIS}=-1, {KEEP})", f"correction * weights.sum({AXIS}=-1, {KEEP})")),
        ("the output is divided by the total in every block", ("return greatest, total, output", "return greatest, total, output / total")),
        ("the total has this block alone", (MERGED_TOTAL, f"total = weights.sum({AXIS}=-1, {KEEP})")),
        ("the output has this block alone", (MERGED_OUTPUT, "output = weights @ value")),
        ("the total is of scores, not of their exponentials", (f"weights.sum({AXIS}=-1, {KEEP})", f"{LIB}.where(scores > {HIDDEN}, scores, 0.0).sum({AXIS}=-1, {KEEP})")),
        ("the maximum is over the whole block, not of each query", (f"scores.{MAX}({AXIS}=-1, {KEEP})", f"scores.{MAX}()")),
    ),
    *at(
        "flash_attention", "flash_attention", FLASH,
        ("the output is not divided by the total", ("(output / total)", "output")),
        ("the last block is left out where it is not full", ("range(0, S, block_size)", "range(0, max(1, S - block_size + 1), block_size)")),
        ("the first block alone is looked at", ("range(0, S, block_size)", "range(0, 1)")),
        ("a scale that is given is ignored", ("scale = E**-0.5 if scale is None else scale\n", "scale = E**-0.5\n")),
        ("the scale is left out", ("(-2, -1) * scale", "(-2, -1)")),
        ("the values are always those of the first block", ("block = value[..., start:end, :]", "block = value[..., 0 : end - start, :]")),
        ("the keys are always those of the first block", ("key[..., start:end, :]", "key[..., 0 : end - start, :]")),
        ("the dtype becomes float32", (f"(output / total).{TO}(query.dtype)", "output / total")),
    ),
    *at(
        "flash_attention", "flash_attention", MASK,
        ("`causal` is ignored", ("        if causal:\n", "        if False:\n")),
        ("every block's mask is the first one's: its keys count from 0 again", (SEEN, f"{LIB}.arange(0, end - start) <= positions")),
        ("the queries stand at the beginning, where they are the last of S positions", ("arange(S - L, S)[:, None]", "arange(0, L)[:, None]")),
        ("a position sees the one after it", (SEEN, SEEN + " + 1")),
    ),
    # Serving
    *at(
        "BatchKvCache.update_and_fetch", "batch", SELECTIVE,
        ("the zeros stand before a request's positions, not behind them", (texts.PADDED, texts.PADDED_BEFORE)),
        ("nothing is hidden: queries see the zeros of shorter requests", (texts.WHERE_SEEN.format("key"), texts.NOTHING_HIDDEN.format("key"))),
        ("a position does not see itself", (f"{LIB}.arange(S) <= positions", f"{LIB}.arange(S) < positions")),
        ("a position sees the one after it", (f"{LIB}.arange(S) <= positions", f"{LIB}.arange(S) <= 1 + positions")),
        ("positions are counted L too far: those that come next, in the place of the new ones", (NEW_POSITIONS, NEW_POSITIONS.replace(" - L +", " +"))),
        ("all requests have the length of the longest", (NEW_POSITIONS, f"S - L + {LIB}.arange(L) + 0 * {TENSOR}(self.offset)[:, None]")),
        ("all requests have the length of the first", (NEW_POSITIONS, f"{TENSOR}(self.offset[:1] * len(self.caches))[:, None] - L + {LIB}.arange(L)")),
        ("the new positions see each other, later ones too", (NEW_POSITIONS, f"{TENSOR}(self.offset)[:, None] - 1 + 0 * {LIB}.arange(L)")),
        ("positions are counted before the new ones: they see only what was there", (NEW_POSITIONS, f"{TENSOR}(self.offset)[:, None] - L - 1 + 0 * {LIB}.arange(L)")),
        ("the values are those of the keys", ("filled(row[1], S)", "filled(row[0], S)")),
        ("every request gets the first one's keys and values", ("key[n : n + 1], value[n : n + 1]", "key[:1], value[:1]")),
        ("the mask hides what is seen and shows what is hidden", (f"{LIB}.arange(S) <= positions", f"{LIB}.arange(S) > positions")),
    ),
    *at(
        "Batcher.step", "batch", ORCA,
        ("a new request waits until all running ones are finished", (ADMIT, "while self.waiting and not self.running or 0 < len(self.running) < min(self.batch_size, len(self.waiting) + len(self.running)) and not any(r.read for r in self.running):")),
        ("the request that came last begins first", ("self.waiting.pop(0)", "self.waiting.pop()")),
        ("one more request runs than there are places", ("< self.batch_size:", "<= self.batch_size:")),
        ("only one request runs at a time", ("< self.batch_size:", "< 1:")),
        ("every request has a call of its own", ("        if writing:\n", "        for writing in [[request] for request in writing]:\n")),
        ("a request whose prompt was read to its end in this step gets a second token in it", ("        finished = []\n", f"        if reading and first.tokens:\n            logits = self.model({TENSOR}([[first.tokens[-1]]]), first.caches)\n            first.tokens.append(int(self.sampler(logits[:, -1])[0]))\n        finished = []\n")),
        ("the token that ends a text stays among its tokens", (ENDED, "                pass\n")),
        ("eos_ids is ignored", ("request.tokens[-1] in self.eos_ids", "False")),
        ("requests have one token too many", ("if ended or len(request.tokens) == request.max_tokens:", "if ended or len(request.tokens) > request.max_tokens:")),
        ("the newest request that is running reads first", ("first = reading[0]", "first = reading[-1]")),
        ("finished requests are returned from the last to the first", ("                finished.append(request)\n", "                finished.insert(0, request)\n")),
    ),
    *at(
        "Batcher.step", "batch", CHUNKS,
        ("the whole prompt is read at once, whatever `chunk` says", ("first.prompt[first.read : first.read + self.chunk]", "first.prompt[first.read :]")),
        ("all prompts that are not yet read get a chunk in every step", ("        if reading:\n            first = reading[0]\n", "        for first in reading:\n")),
        ("the others wait while a prompt is read", ("        if writing:\n", "        if writing and not reading:\n")),
        ("every chunk begins with the first token again", ("first.prompt[first.read : first.read + self.chunk]", "first.prompt[first.read * 0 : self.chunk]"), ("first.read += len(part)", "first.read = min(len(first.prompt), first.read + self.chunk)")),
        ("a request has its first token after its first chunk", ("            if first.read == len(first.prompt):\n", "            if not first.tokens:\n")),
        ("the first token is left out: the last chunk is only read", ("first.tokens.append(int(self.sampler(logits[:, -1])[0]))", "first.tokens.append(first.prompt[-1])")),
    ),
    *at(
        "BlockTable.reserve", "paged_cache", PAGED,
        ("there is a page more than it takes where the last one is full", ("* self.pool.page_size < length", "* self.pool.page_size <= length")),
        ("the page that is not full at the end is missing", ("< length:", "< length // self.pool.page_size * self.pool.page_size:")),
        ("pages that are there already are allocated again", ("        while len(self.pages)", "        self.pages = []\n        while len(self.pages)")),
        ("there is a page for every position", ("len(self.pages) * self.pool.page_size < length", "len(self.pages) < length")),
        ("new pages come before the old ones", ("self.pages.append(self.pool.allocate())", "self.pages.insert(0, self.pool.allocate())")),
        ("one page is allocated at most", ("        while len(self.pages)", "        if len(self.pages)")),
    ),
    *at(
        "PagedKvCache.update_and_fetch", "paged_cache", PAGED,
        ("the block table is ignored: a position lies in page s // page_size", (PLACE, "(self.offset + i) // size, (self.offset + i) % size")),
        ("the positions count from 0 in every call", (PLACE, "table.pages[i // size], i % size")),
        ("the place in the page counts from 0 in every call", (PLACE, "table.pages[(self.offset + i) // size], i % size")),
        ("all goes into the last page", (PLACE, "table.pages[-1], (self.offset + i) % size")),
        ("it all goes into the first layer's memory", ("table.pool.keys[self.layer], table.pool.values[self.layer]", "table.pool.keys[0], table.pool.values[0]")),
        ("keys are written in the place of values", ("= value[0, :, i]", "= key[0, :, i]")),
        ("the values are not written", ("            values[page, :, place] = value[0, :, i]\n", "")),
        ("the offset does not move", ("        self.offset += L\n        return self.fetched(keys), self.fetched(values),", "        self.offset += L\n        found = self.fetched(keys), self.fetched(values)\n        self.offset -= L\n        return *found,")),
        ("the keys are returned in the place of the values", ("self.fetched(keys), self.fetched(values)", "self.fetched(keys), self.fetched(keys)")),
        ("only the last of the new positions is written", ("for i in range(L):", "for i in range(L - 1, L):")),
    ),
    *at(
        "PagedKvCache.fetched", "paged_cache", PAGED,
        ("the block table is ignored: pages come in the order of the memory", (texts.GATHERED_PAGES, "memory[: len(self.table.pages)]")),
        ("the pages are sorted by their numbers", (texts.GATHERED_PAGES, texts.GATHERED_PAGES.replace("self.table.pages", "sorted(self.table.pages)"))),
        ("the pages come from the last to the first", (texts.GATHERED_PAGES, texts.GATHERED_PAGES.replace("self.table.pages", "self.table.pages[::-1]"))),
        ("the last page is not cut: places that hold nothing yet are returned", ("[None, :, : self.offset]", "[None]")),
        ("pages and heads are mixed: their axes are not exchanged", (FLAT, "pages.reshape(1, pages.shape[1], -1, pages.shape[3])[:, :, : self.offset]")),
        ("heads are taken for positions", (FLAT, f"pages.{SWAP}(1, 2).reshape(1, pages.shape[1], -1, pages.shape[3])[:, :, : self.offset]")),
    ),
    *at(
        "paged_attention", "paged_cache", BLOCKS,
        ("the block table is ignored: pages come in the order of the memory", (texts.TABLE, texts.IN_MEMORY_ORDER)),
        ("all texts have the first one's pages", (texts.TABLE, texts.FIRST_TABLE)),
        ("context_lens is ignored: queries see places that hold nothing of their text", (texts.WHERE_SEEN.format("query"), texts.NOTHING_HIDDEN.format("query"))),
        ("a position does not see itself", (f"{LIB}.arange(M * page_size) <= positions", f"{LIB}.arange(M * page_size) < positions")),
        ("a position sees the one after it", (f"{LIB}.arange(M * page_size) <= positions", f"{LIB}.arange(M * page_size) <= 1 + positions")),
        ("all texts have the length of the longest", (CONTEXT, f"context_lens.max() - L + {LIB}.arange(L) + 0 * context_lens[:, None]")),
        ("the new positions see each other, later ones too", (CONTEXT, f"context_lens[:, None] - 1 + 0 * {LIB}.arange(L)")),
        ("a scale that is given is ignored", ("(query, keys, values, scale, mask)", "(query, keys, values, None, mask)")),
        ("the values are those of the keys", ("values = value_pages[pages]", "values = key_pages[pages]")),
        ("pages and heads are mixed: their axes are not exchanged", (f"key_pages[pages].{SWAP}(1, 2)", "key_pages[pages]"), (f"value_pages[pages].{SWAP}(1, 2)", "value_pages[pages]")),
        ("a text's pages come from the last to the first", (texts.TABLE, texts.REVERSED_TABLE)),
    ),
    *at(
        "PrefixCache.match", "prefix_cache", SHARED,
        ("the prefix is as long as the prompt: no token is left to run", (MATCHED, MATCHED.replace("<", "<="))),
        ("a page is found by its own tokens alone, whatever stands before them", (PREFIX, "next((p for k, p in self.pages.items() if k[-size:] == tuple(tokens[len(found) * size : (len(found) + 1) * size])), None)"), ("            self.pages[key] = self.pages.pop(key)\n", "            self.pages[key] = self.pages.pop(key, found[number])\n")),
        ("only the first page is looked for", (MATCHED, "while not found and size < len(tokens):")),
        ("the caller does not hold the pages", ("            self.pool.hold(found[number])\n", "")),
        ("only the last page is held", ("            self.pool.hold(found[number])\n", "            if number == len(found) - 1:\n                self.pool.hold(found[number])\n")),
    ),
    *at(
        "PrefixCache.match", "prefix_cache", RADIX,
        ("a page that is found stays where it was in the order of use", ("            self.pages[key] = self.pages.pop(key)\n", "")),
        ("the first page becomes the most recent before the last one does", ("reversed(range(len(found)))", "range(len(found))")),
    ),
    *at(
        "PrefixCache.insert", "prefix_cache", SHARED,
        ("a page that the tokens do not fill is kept too", (FULL, "reversed(range(min(len(pages), -(-len(tokens) // size))))")),
        ("a known page is replaced by the new one", ("            if key not in self.pages:\n", "            if True:\n")),
        ("the prefix cache does not hold what it keeps", ("                self.pool.hold(pages[number])\n", "")),
        ("all pages are held, those that were known too", ("            if key not in self.pages:\n                self.pages[key] = pages[number]\n                self.pool.hold(pages[number])\n", "            self.pool.hold(pages[number])\n            if key not in self.pages:\n                self.pages[key] = pages[number]\n")),
        ("a page is kept by its own tokens alone", ("            key = tuple(tokens[: (number + 1) * size])\n            if", "            key = tuple(tokens[number * size : (number + 1) * size])\n            if")),
        ("a known page becomes the most recently used", ("                self.pool.hold(pages[number])\n", "                self.pool.hold(pages[number])\n            else:\n                self.pages[key] = self.pages.pop(key)\n")),
        ("the first page alone is kept", (FULL, "range(len(tokens) // size)[:1]")),
        ("the last full page is left out", (FULL, "reversed(range((len(tokens) - 1) // size))")),
    ),
    *at(
        "PrefixCache.insert", "prefix_cache", RADIX,
        ("the first page comes before the last one in the order of use", (FULL, "range(len(tokens) // size)")),
    ),
    *at(
        "PrefixCache.evict", "prefix_cache", RADIX,
        ("pages that others hold are evicted too", (UNUSED, "if evicted < count:")),
        ("the most recently used go first", ("in list(self.pages.items()):", "in reversed(list(self.pages.items())):")),
        ("a page that others hold ends the search", (UNUSED, "if self.pool.holders[page] > 1:\n                break\n            if evicted < count:")),
        ("the pages are not released", ("                self.pool.release(page)\n", "")),
        ("the pages can still be found", ("                del self.pages[key]\n", "")),
        ("all pages that nobody else holds are evicted", (UNUSED, "if self.pool.holders[page] == 1:")),
        ("one page too many is evicted", (UNUSED, UNUSED.replace("<", "<="))),
        ("the result is the number that was asked for, not of those evicted", ("return evicted", "return count")),
        ("pages that are passed over count too", ("                evicted += 1\n", "            evicted += 1\n")),
    ),
    *at(
        "accept_greedy", "speculative", LOOKAHEAD,
        ("a guess is accepted after a mismatch", (SETTLED, "same = [d for d, t in zip(draft, target, strict=False) if d == t]\n    return [*same, target[accepted]]")),
        ("the guess that differs is kept", (SETTLED, "return [*draft[: accepted + 1]] if accepted < len(draft) else [*draft, target[-1]]")),
        ("the large model's own next token is left out", (SETTLED, "return list(draft[:accepted])")),
        ("all guesses are accepted", (SETTLED, "return [*draft, target[len(draft)]]")),
        ("no guess is accepted", (SETTLED, "return [target[0]]")),
        ("the token after the guesses is left out where all are accepted", (SETTLED, "return [*draft[:accepted], *target[accepted : len(draft)]]")),
        ("the large model's tokens are one off", (SETTLED, "return [*draft[:accepted], target[min(accepted + 1, len(draft))]]")),
        ("the large model's tokens are taken to the end, whatever was guessed", (SETTLED, "return list(target)")),
    ),
    *at(
        "accept_sampled", "speculative", SPECULATIVE,
        ("p and q are exchanged where a guess is accepted", (REFUSED, "if uniform[i] * p[draft[i]] >= q[draft[i]]:")),
        ("a guess is accepted with probability p, not p / q", (REFUSED, "if uniform[i] >= p[draft[i]]:")),
        ("a guess is accepted with probability 1 - p / q", (REFUSED, REFUSED.replace(">=", "<"))),
        ("a guess is accepted only where p is at least q", (REFUSED, "if q[draft[i]] > p[draft[i]]:")),
        ("all guesses are accepted", (REFUSED, "if False:")),
        ("the token in a guess's place is drawn from p, not from what p has more than q", (texts.REST, "p")),
        ("the token in a guess's place is drawn from what q has more than p", (texts.REST, texts.REST.replace("p - q", "q - p"))),
        ("the token in a guess's place is drawn from the difference without its sign", (texts.REST, f"{LIB}.abs(p - q)")),
        ("the token in a guess's place takes that guess's number", ("draw((rest / rest.sum())[None], uniform[K:])", "draw((rest / rest.sum())[None], uniform[i : i + 1])")),
        ("the guess stays where it is refused", ("[*draft[:i], int(", "[*draft[: i + 1], int(")),
        ("nothing comes in the place of a refused guess", ("return [*draft[:i], int(draw((rest / rest.sum())[None], uniform[K:])[0])]", "return [*draft[:i]]")),
        ("no token is drawn where all guesses are accepted", (f"return [*draft, int({BONUS}[0])]", "return [*draft]")),
        ("the last token is drawn from the row before the last", (BONUS, "draw(target_probabilities[K - 1 : K], uniform[K:])")),
    ),
    *at(
        "speculative_generate", "speculative", LOOKAHEAD,
        ("no cache forgets what was refused", (FORGET, "for cache in ():")),
        ("the small model's caches do not forget what was refused", (FORGET, "for cache in caches:")),
        ("the large model's caches do not forget what was refused", (FORGET, "for cache in draft_caches:")),
        ("all caches forget one position too few", (BACK, BACK.replace("(len(text) - 1)", "len(text)"))),
        ("the small model's caches forget one position too few", (BACK, BACK.replace("- 1)", "- (cache in caches))"))),
        ("the large model's caches forget one position too few", (BACK, BACK.replace("- 1)", "- (cache in draft_caches))"))),
        ("the caches forget one position too many, whose token is run again", (BACK, BACK.replace("- 1)", "- 2)"))),
        ("eos_ids is ignored", ("            if token in eos_ids:\n                return tokens\n", "")),
        ("the token that ends the text is part of the result", ("            if token in eos_ids:\n                return tokens\n", "            if token in eos_ids:\n                return [*tokens, token]\n")),
        ("a round's tokens are not cut at max_tokens", ("            if len(tokens) == max_tokens:\n                return tokens\n        for", "        if len(tokens) >= max_tokens:\n            return tokens\n        for")),
        ("the prompt is part of the result", ("text, tokens = list(prompt), list[int]()", "text, tokens = list(prompt), list(prompt)")),
        ("one guess fewer is made than `count` says", ("for _ in range(count):", "for _ in range(count - 1):"), ("-count - 1 :]", "-count :]")),
        ("only one token of each round is used", ("for token in accept_greedy(draft, target):", "for token in accept_greedy(draft, target)[:1]:")),
        ("the guesses themselves are used, without the large model", ("for token in accept_greedy(draft, target):", "for token in draft:")),
    ),
]  # fmt: skip
