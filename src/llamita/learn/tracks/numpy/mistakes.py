"""The mistakes that the numpy track's grader knows: each is a change to the lines of a solution.

A reader's result that equals the changed solution's has this mistake, however it is written.
"""

from llamita.learn.checking import Mistake

UNCHANGED = "the docstring: no function changes the arrays that it is given"
SAME_DTYPE = "the docstring: where x is float32, the result is float32 too"
SOFTMAX = "Bridle 1990: exp(x) divided by the sum of exp(x); the docstring for the subtraction"
LINEAR = "the docstring: number o is the dot product of x with row o of the weight"
EMBEDDING = "the docstring: row t for token t"
SILU = "Ramachandran et al. 2017, https://arxiv.org/abs/1710.05941, section 4"
RMS_NORM = "Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, equation 4"
ROFORMER = "Su et al. 2021, https://arxiv.org/abs/2104.09864"
ATTENTION = "Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, equation 1"
MASK = "Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.2.3"
GROUPED = "Ainslie et al. 2023, https://arxiv.org/abs/2305.13245, section 2.2"
SWIGLU = "Shazeer 2020, https://arxiv.org/abs/2002.05202, equation 6"
LLAMA = "Touvron et al. 2023, https://arxiv.org/abs/2302.13971, section 2.2"
BFLOAT16 = "the docstring: a bfloat16 number is the upper half of a float32"
FORMAT = "the docstring; https://github.com/huggingface/safetensors, section Format"
TEMPERATURE = "Ackley, Hinton and Sejnowski 1985: probabilities are proportional to exp(logit / temperature)"
DOCSTRING = "the docstring"
CHAIN = "the chain rule; Goodfellow et al. 2016, Deep Learning, section 6.5.2"
ADAM = "Kingma and Ba 2015, https://arxiv.org/abs/1412.6980, algorithm 1"
DECOUPLED = "Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101, algorithm 2"

MAXIMUM = "np.exp(x - x.max(axis=-1, keepdims=True))"
QUOTIENT = "exponentials / exponentials.sum(axis=-1, keepdims=True)"
NORM = "x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight"
SPEEDS = "theta ** (-2 * np.arange(head_size // 2) / head_size)"
ANGLES = "return positions[:, None] * speeds[None, :]"
HALF_TURN = "np.concatenate((a * cos - b * sin, a * sin + b * cos), axis=-1).astype(x.dtype)"
HALVES = "a, b = x[..., :half], x[..., half:]"
NEIGHBOURS = "a, b = x[..., 0::2], x[..., 1::2]"
NEIGHBOUR_A = "turned[..., 0::2] = a * cos - b * sin"
NEIGHBOUR_B = "turned[..., 1::2] = a * sin + b * cos"
SEEN = "np.arange(S)[None, :] <= np.arange(S - T, S)[:, None]"
SCORES = "query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1])"
MASKED = "scores = np.where(mask, scores, -np.inf)"
GATHERED = "softmax(scores) @ value"
REPEATED = "np.repeat(key, shared, axis=-3), np.repeat(value, shared, axis=-3), mask"
SHORT = '(np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)'
DATA = "content[start + begin : start + end]"
SHAPED = '.reshape(entry["shape"])'
HEADS = ".reshape(batch, T, -1, config.head_dim).swapaxes(1, 2)"
TURNED = "query, key = rotate_halves(query, turn), rotate_halves(key, turn)"
GATHER = "grouped_attention(query, key, value, causal_mask(T, key.shape[2]))"
OUTPUT = 'linear(gathered.swapaxes(1, 2).reshape(batch, T, -1), weights[f"{prefix}.o_proj.weight"])'
GATED = 'silu(linear(x, weights[f"{prefix}.gate_proj.weight"])) * linear(x, weights[f"{prefix}.up_proj.weight"])'
FIRST_NORM = 'y = rms_norm(x, weights[f"{prefix}.input_layernorm.weight"], config.rms_norm_eps)'
FIRST_SUM = "x = x + self_attention(config, weights, layer, y, cache)"
SECOND_NORM = 'y = rms_norm(x, weights[f"{prefix}.post_attention_layernorm.weight"], config.rms_norm_eps)'
SECOND_SUM = "return x + feed_forward(weights, layer, y)"
LAST_NORM = 'x = rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)'
LAYERS = "for layer in range(config.num_hidden_layers):\n        x"
CACHES = "None if caches is None else caches[layer]"
SUMS = "np.cumsum(softmax(logits / temperature), axis=-1)"
DRAWN = "np.minimum((sums <= number[..., None]).sum(axis=-1), logits.shape[-1] - 1)"
CHOSEN = "token = choose(forward(config, weights, tokens, caches)[0, -1])"
STOP = "        if token in stop:\n            return\n        yield token\n"
NEXT = "tokens = np.array([[token]])"
LOSS = "float(-chosen.mean())"
LABELS = "counted = labels != IGNORED\n    chosen"
LOG = "shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))"
AT_LABEL = "gradient[counted, labels[counted]] -= 1"
AVERAGE = "return gradient / counted.sum()"
PRODUCTS = "gradient @ weight, gradient.T @ x"
ADDED = "np.add.at(total, tokens, gradient)"
DECAY = "parameter -= self.lr * self.weight_decay * parameter\n"
FIRST_MEAN = "beta1 * self.m[name] + (1 - beta1) * g"
SECOND_MEAN = "beta2 * self.v[name] + (1 - beta2) * g * g"
FIRST_CORRECTED = "self.m[name] / (1 - beta1**self.steps)"
SECOND_CORRECTED = "self.v[name] / (1 - beta2**self.steps)"
UPDATE = "parameter -= self.lr * m / (np.sqrt(v) + self.eps)"

ATTENTION_NAME = "def attention("
MASKED_FLOAT64 = "(lambda found: lambda *given: found(*given).astype(float if len(given) == 4 else np.float32))\n"
BEFORE_SOFTMAX = "# to do: two or three lines;"
FLOAT64 = "the result is float64, where x is float32: twice the memory and half the speed from here on"


def of(check: str, file: str, name: str, source: str, *changes: tuple[str, str]) -> Mistake:
    return Mistake(name, check, file, changes, source)


def converted(check: str, file: str, name: str, source: str, dtype: str) -> Mistake:
    """The right numbers in another dtype; a change above the function, so that it can be planted beside any other."""
    return of(check, file, name, source, (f"\ndef {check}(", f"\n@{as_dtype(dtype)}\ndef {check}("))


def as_dtype(dtype: str) -> str:
    """A decorator's source that converts a function's result."""
    return f"(lambda found: lambda *given: np.asarray(found(*given)).astype(np.{dtype}))"


def softmax(name: str, *changes: tuple[str, str], source: str = SOFTMAX) -> Mistake:
    return of("softmax", "functions", name, source, *changes)


def linear(name: str, new: str) -> Mistake:
    return of("linear", "functions", name, LINEAR, ("x @ weight.T", new))


def silu(name: str, new: str, source: str = SILU) -> Mistake:
    return of("silu", "functions", name, source, ("x / (1 + np.exp(-x))", new))


def norm(name: str, new: str, source: str = RMS_NORM) -> Mistake:
    return of("rms_norm", "functions", name, source, (NORM, new))


def angle(name: str, *changes: tuple[str, str]) -> Mistake:
    return of("angles", "rope", name, f"{ROFORMER}, section 3.2.2", *changes)


def halves(name: str, *changes: tuple[str, str], source: str = f"{ROFORMER}, equation 34") -> Mistake:
    return of("rotate_halves", "rope", name, source, *changes)


def neighbours(name: str, *changes: tuple[str, str], source: str = f"{ROFORMER}, equation 34") -> Mistake:
    return of("rotate_neighbours", "rope", name, source, *changes)


def mask(name: str, new: str) -> Mistake:
    return of("causal_mask", "attention", name, MASK, (SEEN, new))


def attention(name: str, *changes: tuple[str, str], source: str = ATTENTION) -> Mistake:
    return of("attention", "attention", name, source, *changes)


def grouped(name: str, *changes: tuple[str, str], source: str = GROUPED) -> Mistake:
    return of("grouped_attention", "attention", name, source, *changes)


def bits(name: str, *changes: tuple[str, str], source: str = BFLOAT16) -> Mistake:
    return of("float32_of", "weights", name, source, *changes)


def reading(name: str, *changes: tuple[str, str]) -> Mistake:
    return of("read_safetensors", "weights", name, FORMAT, *changes)


def projected(name: str, *changes: tuple[str, str], source: str = ATTENTION) -> Mistake:
    return of("self_attention", "llama", name, source, *changes)


def cached(name: str, *changes: tuple[str, str], source: str = DOCSTRING) -> Mistake:
    return of("self_attention with a cache", "llama", name, source, *changes)


def gate(name: str, *changes: tuple[str, str]) -> Mistake:
    return of("feed_forward", "llama", name, SWIGLU, *changes)


def layer(name: str, *changes: tuple[str, str], source: str = LLAMA) -> Mistake:
    return of("one_layer", "llama", name, source, *changes)


def whole(name: str, *changes: tuple[str, str], source: str = DOCSTRING) -> Mistake:
    return of("forward", "llama", name, source, *changes)


def drawing(name: str, *changes: tuple[str, str], source: str = TEMPERATURE) -> Mistake:
    return of("sample", "generate", name, source, *changes)


def extended(name: str, *changes: tuple[str, str]) -> Mistake:
    return of("KeyValueCache.extend", "cache", name, DOCSTRING, *changes)


def writing(name: str, *changes: tuple[str, str]) -> Mistake:
    return of("generate", "generate", name, DOCSTRING, *changes)


def loss(name: str, *changes: tuple[str, str], source: str = DOCSTRING) -> Mistake:
    return of("cross_entropy", "loss", name, source, *changes)


def gradient(name: str, *changes: tuple[str, str], source: str = DOCSTRING) -> Mistake:
    return of("cross_entropy_gradient", "loss", name, source, *changes)


def adamw(name: str, *changes: tuple[str, str], source: str = ADAM) -> Mistake:
    return of("AdamW.step", "optimizer", name, source, *changes)


MISTAKES = (
    softmax("the greatest element is not subtracted, so large numbers overflow", (MAXIMUM, "np.exp(x)")),
    softmax("the sum is over everything, not over the last axis", (QUOTIENT, "exponentials / exponentials.sum()")),
    softmax("the sum is over the first axis, not over the last", (QUOTIENT, "exponentials / exponentials.sum(axis=0, keepdims=True)")),
    softmax("the exponentials are not divided by their sum", (QUOTIENT, "exponentials")),
    softmax("the exponential is left out", (MAXIMUM, "x - x.max(axis=-1, keepdims=True)")),
    softmax("the powers are of 2, not of e", (MAXIMUM, "np.exp2(x - x.max(axis=-1, keepdims=True))")),
    softmax("the logarithm is returned", (QUOTIENT, f"np.log({QUOTIENT})")),
    softmax("the sign is wrong: small numbers get much", (MAXIMUM, "np.exp(x.min(axis=-1, keepdims=True) - x)")),
    softmax("the greatest element of everything is subtracted, not that of each row, so small rows become 0 / 0", (MAXIMUM, "np.exp(x - x.max())")),
    softmax("the greatest element of each column is subtracted, not that of each row", (MAXIMUM, "np.exp(x - x.max(axis=0, keepdims=True))")),
    softmax("the maximum and the sum are over everything, not over the last axis", (MAXIMUM, "np.exp(x - x.max())"), (QUOTIENT, "exponentials / exponentials.sum()")),
    softmax("the maximum and the sum are over the first axis, not over the last", (MAXIMUM, "np.exp(x - x.max(axis=0, keepdims=True))"), (QUOTIENT, "exponentials / exponentials.sum(axis=0, keepdims=True)")),
    softmax("the argument is changed: `x -= ...` writes into the caller's array, `x = x - ...` makes another", (BEFORE_SOFTMAX, f"x -= x.max(axis=-1, keepdims=True)\n    {BEFORE_SOFTMAX}"), source=UNCHANGED),
    softmax("the argument is changed: the exponentials are written into the caller's array", (MAXIMUM, f"{MAXIMUM}; x[...] = exponentials"), source=UNCHANGED),
    softmax("the argument is changed: the result is written into the caller's array", (QUOTIENT, f"np.divide({QUOTIENT.replace(' /', ',', 1)}, out=x)"), source=UNCHANGED),
    converted("softmax", "functions", FLOAT64, SAME_DTYPE, "float64"),
    linear("the weight is not transposed", "x @ (weight if weight.shape[0] == x.shape[-1] else weight.T)"),
    linear("a bias of one is added", "x @ weight.T + 1"),
    converted("linear", "functions", FLOAT64, SAME_DTYPE, "float64"),
    of("embedding", "functions", "columns of the weight are taken, not rows", EMBEDDING, ("return weight[tokens]", "return weight.T[tokens] if weight.shape[0] == weight.shape[1] else weight[tokens]")),
    of("embedding", "functions", "tokens are counted from 1, not from 0", EMBEDDING, ("weight[tokens]", "weight[tokens - 1]")),
    of("embedding", "functions", "the vectors are multiplied by the root of the width, as Gemma does", EMBEDDING, ("weight[tokens]", "weight[tokens] * np.sqrt(weight.shape[-1])")),
    silu("the product with x is left out: this is the sigmoid", "1 / (1 + np.exp(-x))"),
    silu("the exponent has the wrong sign", "x / (1 + np.exp(x))"),
    silu("it is ReLU, not SiLU", "np.maximum(x, 0)"),
    silu("it is GELU (in its approximation by tanh), not SiLU", "x / 2 * (1 + np.tanh(0.7978846 * (x + 0.044715 * x**3)))"),
    silu("it is tanh, not SiLU", "np.tanh(x)"),
    silu("x multiplies the exponential, not the sigmoid", "1 / (1 + x * np.exp(-x))"),
    silu("the argument is changed: `x /= ...` writes into the caller's array, `x = x / ...` makes another", "np.divide(x, 1 + np.exp(-x), out=x)", UNCHANGED),
    converted("silu", "functions", FLOAT64, SAME_DTYPE, "float64"),
    norm("epsilon is added outside the root", "x / (np.sqrt((x * x).mean(axis=-1, keepdims=True)) + eps) * weight"),
    norm("epsilon is left out", "x / np.sqrt((x * x).mean(axis=-1, keepdims=True)) * weight"),
    norm("the squares are summed, not averaged", "x / np.sqrt((x * x).sum(axis=-1, keepdims=True) + eps) * weight"),
    norm("the mean is over the wrong axis", "x / np.sqrt((x * x).mean(axis=-2, keepdims=True) + eps) * weight"),
    norm("the mean is over everything, not over the last axis", "x / np.sqrt((x * x).mean() + eps) * weight"),
    norm("the root is left out", "x / ((x * x).mean(axis=-1, keepdims=True) + eps) * weight"),
    norm("x is multiplied by the root, not divided", "x * np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight"),
    norm("the mean is subtracted, as LayerNorm does", "(x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + eps) * weight"),
    norm("the weight is left out", "x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)"),
    norm("the weight is added to one, as Gemma does", "x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * (1 + weight)"),
    norm("the normalisation is left out", "x * weight"),
    norm("x is divided by the weight too, where the weight multiplies", "x / (np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight)"),
    norm("the argument is changed: `x /= ...` writes into the caller's array, `x = x / ...` makes another", "np.divide(x, np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps), out=x) * weight", UNCHANGED),
    norm("the argument is changed: the result is written into the caller's array", "np.multiply(x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps), weight, out=x)", UNCHANGED),
    converted("rms_norm", "functions", FLOAT64, SAME_DTYPE, "float64"),
    angle("the exponent of theta has the wrong sign", (SPEEDS, SPEEDS.replace("-2", "2", 1))),
    angle("theta is always 10000", ("speeds = theta", "speeds = 10000.0")),
    angle("the exponent is -i / head_size, where it should be -2i / head_size", (SPEEDS, SPEEDS.replace("-2", "-1"))),
    angle("the exponent is divided by half the head's size, not by all of it", (SPEEDS, SPEEDS.replace("/ head_size)", "/ (head_size // 2))"))),
    angle("the first position counts as 1, not as 0", ("positions[:, None]", "(positions[:, None] + 1)")),
    angle("pairs are counted from 1, not from 0", (SPEEDS, "theta ** (-2 * np.arange(1, head_size // 2 + 1) / head_size)")),
    angle("the positions given are not used: they are counted from 0 here", ("positions[:, None]", "np.arange(len(positions))[:, None]")),
    angle("the angles are in degrees, not in radians", ("return positions[:, None] * speeds[None, :]", "return np.degrees(positions[:, None] * speeds[None, :])")),
    angle("the angles are doubled, one after the other, to the head's size; there is one for each pair", (ANGLES, "return np.concatenate([positions[:, None] * speeds[None, :]] * 2, axis=-1)")),
    angle("each angle stands twice in a row, up to the head's size; there is one for each pair", (ANGLES, "return np.repeat(positions[:, None] * speeds[None, :], 2, axis=-1)")),
    angle("positions and pairs are exchanged: the shape is (head_size / 2, T)", (ANGLES, "return (positions[:, None] * speeds[None, :]).T")),
    halves("the pairs are neighbouring numbers, not the two halves of a head", (HALVES, NEIGHBOURS), (HALF_TURN, "np.stack((a * cos - b * sin, a * sin + b * cos), axis=-1).reshape(x.shape).astype(x.dtype)")),
    halves("the coordinates are put together as neighbours, not as halves again", (HALF_TURN, "np.stack((a * cos - b * sin, a * sin + b * cos), axis=-1).reshape(x.shape).astype(x.dtype)")),
    halves("the pairs are neighbours, but are put together as halves", (HALVES, NEIGHBOURS)),
    halves("the rotation goes the other way", (HALF_TURN, "np.concatenate((a * cos + b * sin, b * cos - a * sin), axis=-1).astype(x.dtype)")),
    halves("sine and cosine are exchanged", (f"{HALVES}\n    cos, sin =", f"{HALVES}\n    sin, cos =")),
    halves("the two halves are exchanged", (HALVES, "b, a = x[..., :half], x[..., half:]")),
    halves("both signs are plus", (HALF_TURN, "np.concatenate((a * cos + b * sin, a * sin + b * cos), axis=-1).astype(x.dtype)")),
    halves("only the first half is turned", (HALF_TURN, "np.concatenate((a * cos - b * sin, b), axis=-1).astype(x.dtype)")),
    halves("the result is float64, where x is float32: twice the memory and half the speed from here on", ("axis=-1).astype(x.dtype)", "axis=-1).astype(np.float64)"), source="the docstring: the result has the dtype of x"),
    neighbours("the pairs are the two halves of a head, not neighbouring numbers", (NEIGHBOURS, "half = x.shape[-1] // 2; a, b = x[..., :half], x[..., half:]"), (NEIGHBOUR_A, "turned[..., :half] = a * cos - b * sin"), (NEIGHBOUR_B, "turned[..., half:] = a * sin + b * cos")),
    neighbours("the coordinates are put together as halves, not as neighbours again", (NEIGHBOUR_A, "half = x.shape[-1] // 2; turned[..., :half] = a * cos - b * sin"), (NEIGHBOUR_B, "turned[..., half:] = a * sin + b * cos")),
    neighbours("the rotation goes the other way", (NEIGHBOUR_A, "turned[..., 0::2] = a * cos + b * sin"), (NEIGHBOUR_B, "turned[..., 1::2] = b * cos - a * sin")),
    neighbours("sine and cosine are exchanged", (f"{NEIGHBOURS}\n    cos, sin =", f"{NEIGHBOURS}\n    sin, cos =")),
    neighbours("the second of each pair is computed from the first that is turned already", (NEIGHBOUR_B, "turned[..., 1::2] = turned[..., 0::2] * sin + b * cos")),
    neighbours("both signs are plus", (NEIGHBOUR_A, "turned[..., 0::2] = a * cos + b * sin")),
    neighbours("the result is float64, where x is float32: twice the memory and half the speed from here on", ("np.empty_like(x)", "np.empty(x.shape)"), source="the docstring: the result has the dtype of x"),
    mask("the queries are taken as the first T positions, not as the last T", "np.arange(S)[None, :] <= np.arange(T)[:, None]"),
    mask("the mask is one off: a query sees the key after its own position", "np.arange(S)[None, :] <= np.arange(S - T, S)[:, None] + 1"),
    mask("the mask is one off: a query does not see its own position", "np.arange(S)[None, :] < np.arange(S - T, S)[:, None]"),
    mask("True and False are exchanged: True is where a query may see", "np.arange(S)[None, :] > np.arange(S - T, S)[:, None]"),
    mask("the mask is the wrong way round: a query sees its own position and those after it", "np.arange(S)[None, :] >= np.arange(S - T, S)[:, None]"),
    mask("the mask hides nothing", "np.ones((T, S), bool)"),
    mask("queries and keys are exchanged: the shape is (S, T)", "(np.arange(S)[None, :] <= np.arange(S - T, S)[:, None]).T"),
    converted("causal_mask", "attention", "the mask is of floats, not of booleans", "the docstring: booleans, True where it may", "float64"),
    converted("causal_mask", "attention", "the mask is of whole numbers, not of booleans", "the docstring: booleans, True where it may", "int64"),
    attention("the scale is left out", (SCORES, "query @ key.swapaxes(-1, -2)")),
    attention("the scale is the head's size, not its root", (SCORES, "query @ key.swapaxes(-1, -2) / query.shape[-1]")),
    attention("the scores are multiplied by the root, not divided", (SCORES, "query @ key.swapaxes(-1, -2) * math.sqrt(query.shape[-1])")),
    attention("the scale is the root of the number of keys, not of the head's size", (SCORES, "query @ key.swapaxes(-1, -2) / math.sqrt(key.shape[-2])")),
    attention("the mask is not applied", (MASKED, "pass"), source=MASK),
    attention("masked scores are 0, where they should be minus infinity", (MASKED, "scores = np.where(mask, scores, 0.0)"), source=MASK),
    attention("the mask is added to the scores, where it says which of them stay", (MASKED, "scores = scores + mask"), source=MASK),
    attention("the mask is used the wrong way round: True is where a query may see", (MASKED, "scores = np.where(mask, -np.inf, scores)"), source=MASK),
    attention("the mask comes after the softmax, so the weights no longer sum to one", (MASKED, "return np.where(mask, softmax(scores), 0.0) @ value"), source=MASK),
    attention("the softmax is over the queries, not over the keys", (GATHERED, "softmax(scores.swapaxes(-1, -2)).swapaxes(-1, -2) @ value")),
    attention("the softmax is left out", (MASKED, "scores = np.where(mask, scores, 0.0)"), (GATHERED, "scores @ value")),
    attention("keys are used where the values belong", (GATHERED, "softmax(scores) @ key")),
    attention("the scale is applied after the softmax", (SCORES, "query @ key.swapaxes(-1, -2)"), (GATHERED, "softmax(scores) / math.sqrt(query.shape[-1]) @ value")),
    converted("attention", "attention", "the result is float64, where the arguments are float32; np.sqrt(H) makes it so, math.sqrt(H) does not", "the docstring: `math.sqrt`", "float64"),
    attention("the result with a mask is float64, where the arguments are float32; np.where of two plain numbers makes it so", (ATTENTION_NAME, f"@{MASKED_FLOAT64}{ATTENTION_NAME}"), source=SAME_DTYPE),
    grouped("the key and value heads are tiled (0 1 0 1), where each should be repeated (0 0 1 1)", (REPEATED, "*(np.concatenate([t] * shared, axis=-3) for t in (key, value)), mask")),
    grouped("the mask is not passed on", (REPEATED, "np.repeat(key, shared, axis=-3), np.repeat(value, shared, axis=-3)")),
    grouped("only the first key and value head is used", (REPEATED, "key[..., :1, :, :], value[..., :1, :, :], mask")),
    grouped("the keys are tiled (0 1 0 1), the values repeated (0 0 1 1)", ("np.repeat(key, shared, axis=-3)", "np.concatenate([key] * shared, axis=-3)")),
    bits("the bits are read as float16, which has other fields", (SHORT, 'np.frombuffer(data, dtype="<f2").astype(np.float32)')),
    bits("the bits are converted as whole numbers, not taken as a number's bits", (SHORT, 'np.frombuffer(data, dtype="<u2").astype(np.float32)')),
    bits("the shifted bits are converted as whole numbers; view takes them as bits", (SHORT, '(np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).astype(np.float32)')),
    bits("the bits are not shifted: they are the upper half of a float32", (SHORT, 'np.frombuffer(data, dtype="<u2").astype(np.uint32).view(np.float32)')),
    bits("the two bytes of a number are exchanged", (SHORT, '(np.frombuffer(data, dtype=">u2").astype(np.uint32) << 16).view(np.float32)')),
    bits("an unknown dtype is no ValueError", ('raise ValueError(f"expected F32, F16 or BF16, got {dtype}")', "return np.zeros(1, np.float32)"), source=DOCSTRING),
    bits("float16 stays float16", ('np.frombuffer(data, dtype="<f2").astype(np.float32)', 'np.frombuffer(data, dtype="<f2")'), source=DOCSTRING),
    reading("the offsets are counted from the header's beginning, not from its end", (DATA, "content[8 + begin : 8 + end]")),
    reading("the offsets are counted from the file's beginning, not from the header's end", (DATA, "content[begin:end]")),
    reading("the 8 bytes of the length are not counted in", (DATA, "content[start - 8 + begin : start - 8 + end]")),
    reading("the arrays are read one after the other in the header's order, not by their offsets", ("arrays = {}", "arrays = {}; position = start"), (DATA, "content[position : position + end - begin]; position += end - begin")),
    reading("the first axis is taken to run fastest, not the last", (SHAPED, '.reshape(entry["shape"], order="F")')),
    reading("the arrays are not brought into their shapes", (SHAPED, "")),
    reading("__metadata__ is returned as an array", ('if name != "__metadata__":', 'if name == "__metadata__": arrays[name] = None\n        else:')),
    projected("positions are left out: queries and keys are not turned", (TURNED, "pass"), source=ROFORMER),
    projected("only the query is turned", (TURNED, "query = rotate_halves(query, turn)"), source=ROFORMER),
    projected("only the key is turned", (TURNED, "key = rotate_halves(key, turn)"), source=ROFORMER),
    projected("the values are turned too", (TURNED, f"{TURNED}; value = rotate_halves(value, turn)"), source=ROFORMER),
    projected("the mask is left out: a position sees those after it", (GATHER, "grouped_attention(query, key, value)"), source=MASK),
    projected("the heads are told apart without exchanging heads and positions", (HEADS, ".reshape(batch, -1, T, config.head_dim)")),
    projected("a head is every N-th output, not H in a row", (HEADS, ".reshape(batch, T, config.head_dim, -1).transpose(0, 3, 1, 2)")),
    projected("the heads are put together without exchanging heads and positions again", (OUTPUT, 'linear(gathered.reshape(batch, T, -1), weights[f"{prefix}.o_proj.weight"])')),
    projected("the numbers of the heads are interleaved at the end, not side by side", (OUTPUT, 'linear(gathered.transpose(0, 2, 3, 1).reshape(batch, T, -1), weights[f"{prefix}.o_proj.weight"])')),
    projected("the pairs are neighbouring numbers (rotate_neighbours), not the halves of this file's weights", ("import angles, rotate_halves", "import angles, rotate_neighbours as rotate_halves"), source=ROFORMER),
    projected("the weights of layer 0 are used in every layer", ('prefix = f"model.layers.{layer}.self_attn"', 'prefix = "model.layers.0.self_attn"'), source=DOCSTRING),
    projected("keys and values are exchanged", (GATHER, "grouped_attention(query, value, key, causal_mask(T, key.shape[2]))")),
    projected("queries are turned by the heads' numbers, not by the positions: heads and positions are exchanged too late", (TURNED, "turn_heads = lambda t: rotate_halves(t.swapaxes(1, 2), angles(first + np.arange(t.shape[1]), config.head_dim, config.rope_theta)).swapaxes(1, 2); query, key = turn_heads(query), turn_heads(key)"), source=ROFORMER),
    cached("positions begin at 0 again, not at `first`", ("first + np.arange(T)", "np.arange(T)")),
    cached("the keys and values of the cache are not used: only the new positions are seen", (GATHER, "grouped_attention(query, key[:, :, -T:], value[:, :, -T:], causal_mask(T, T))")),
    cached("the mask is left out where there is a cache", (GATHER, "grouped_attention(query, key, value, None if first else causal_mask(T, T))"), source=MASK),
    cached("the mask takes the queries as the first positions, not as the last", (GATHER, "grouped_attention(query, key, value, np.arange(key.shape[2])[None, :] <= np.arange(T)[:, None])"), source=MASK),
    cached("the positions are one too far where there is a cache: the first is cache.length", ("first + np.arange(T)", "first + (first > 0) + np.arange(T)")),
    gate("gate and up are exchanged: SiLU belongs to gate_proj", (GATED, 'linear(x, weights[f"{prefix}.gate_proj.weight"]) * silu(linear(x, weights[f"{prefix}.up_proj.weight"]))')),
    gate("SiLU is left out", ("gated = silu(", "gated = (")),
    gate("the gate is a sigmoid, not SiLU", ("gated = silu(", "gated = (lambda t: 1 / (1 + np.exp(-t)))(")),
    gate("the gate is ReLU, not SiLU", ("gated = silu(", "gated = (lambda t: np.maximum(t, 0))(")),
    gate("the product with up_proj is left out", (GATED, 'silu(linear(x, weights[f"{prefix}.gate_proj.weight"]))')),
    gate("gate and up are added, not multiplied", (")) * linear(", ")) + linear(")),
    gate("SiLU is over the product, not over the gate", (GATED, 'silu(linear(x, weights[f"{prefix}.gate_proj.weight"]) * linear(x, weights[f"{prefix}.up_proj.weight"]))')),
    gate("down_proj is left out", ('return linear(gated, weights[f"{prefix}.down_proj.weight"])', "return gated")),
    gate("x is added already here; one_layer does that", ('return linear(gated, weights[f"{prefix}.down_proj.weight"])', 'return x + linear(gated, weights[f"{prefix}.down_proj.weight"])')),
    layer("the residual connection of the attention is left out", (FIRST_SUM, "x = self_attention(config, weights, layer, y, cache)")),
    layer("the residual connection of the feed-forward network is left out", (SECOND_SUM, "return feed_forward(weights, layer, y)")),
    layer("both residual connections are left out", (FIRST_SUM, "x = self_attention(config, weights, layer, y, cache)"), (SECOND_SUM, "return feed_forward(weights, layer, y)")),
    layer("the two norms are exchanged", ("input_layernorm.weight\"]", "post_attention_layernorm.weight\"] * 1.0"), (SECOND_NORM, SECOND_NORM.replace("post_attention", "input"))),
    layer("the norm before the attention is left out", (FIRST_NORM, "y = x")),
    layer("the norm before the feed-forward network is left out", (SECOND_NORM, "y = x")),
    layer("the feed-forward network reads what the attention read", (SECOND_NORM, "pass")),
    layer("the second addition takes the layer's input, not the result of the first", (FIRST_NORM, f"before = x; {FIRST_NORM}"), (SECOND_SUM, "return before + feed_forward(weights, layer, y)")),
    layer("what is added back is the normalised input, not the input itself", (FIRST_SUM, "x = y + self_attention(config, weights, layer, y, cache)"), (SECOND_SUM, "return y + feed_forward(weights, layer, y)")),
    layer("the outputs are normalised, not the inputs", (FIRST_NORM, "y = x"), (FIRST_SUM, 'x = x + rms_norm(self_attention(config, weights, layer, y, cache), weights[f"{prefix}.input_layernorm.weight"], config.rms_norm_eps)'), (SECOND_NORM, "y = x"), (SECOND_SUM, 'return x + rms_norm(feed_forward(weights, layer, y), weights[f"{prefix}.post_attention_layernorm.weight"], config.rms_norm_eps)')),
    layer("attention and feed-forward network both read the layer's input, side by side", (FIRST_NORM, f"before = x; {FIRST_NORM}"), (SECOND_NORM, SECOND_NORM.replace("rms_norm(x,", "rms_norm(before,"))),
    layer("the cache is not passed on", (FIRST_SUM, "x = x + self_attention(config, weights, layer, y)"), source=DOCSTRING),
    layer("the argument is changed: `x += ...` writes into the caller's array, `x = x + ...` makes another", (FIRST_SUM, FIRST_SUM.replace("= x +", "+=")), source=UNCHANGED),
    layer("the argument is changed by both additions: `x += ...` writes into the caller's array, `x = x + ...` makes another", (FIRST_SUM, FIRST_SUM.replace("= x +", "+=")), (SECOND_SUM, f"x += {SECOND_SUM.removeprefix('return x + ')}\n    return x"), source=UNCHANGED),
    converted("one_layer", "llama", FLOAT64, SAME_DTYPE, "float64"),
    whole("the last norm is left out", (LAST_NORM, "pass")),
    whole("the weights of layer 0 are used in every layer", ("one_layer(config, weights, layer, x, None", "one_layer(config, weights, 0, x, None")),
    whole("the last layer is left out", ("range(config.num_hidden_layers)", "range(config.num_hidden_layers - 1)")),
    whole("the layers go in the opposite order", ("range(config.num_hidden_layers)", "reversed(range(config.num_hidden_layers))")),
    whole("the embeddings' matrix is used where the model has an lm_head.weight", ('"model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"', '"model.embed_tokens.weight"')),
    whole("the caches are not passed on", (CACHES, "None")),
    whole("all layers share the first cache", (CACHES, "None if caches is None else caches[0]")),
    whole("the last norm is applied after every layer", (LAYERS, 'for layer in range(config.num_hidden_layers):\n        x = rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps) if layer else x\n        x')),
    whole("each layer's result is added to its input again", ("x = one_layer(", "x = x + one_layer(")),
    whole("the softmax of the logits is returned, not the logits", ("rms_norm, silu\n", "rms_norm, silu, softmax\n"), ("return linear(x, weights[\"model.embed_tokens", "return softmax(linear(x, weights[\"model.embed_tokens"), ('else "lm_head.weight"])', 'else "lm_head.weight"]))')),
    of("greedy", "generate", "the least likely token is taken", DOCSTRING, ("logits.argmax(axis=-1)", "logits.argmin(axis=-1)")),
    of("greedy", "generate", "the greatest logit is returned, not its token", DOCSTRING, ("logits.argmax(axis=-1)", "logits.max(axis=-1)")),
    of("greedy", "generate", "one token is taken for all rows", DOCSTRING, ("logits.argmax(axis=-1)", "logits.argmax()")),
    of("greedy", "generate", "of two that are equally likely, the last is taken", DOCSTRING, ("logits.argmax(axis=-1)", "logits.shape[-1] - 1 - logits[..., ::-1].argmax(axis=-1)")),
    drawing("the logits are multiplied by the temperature, not divided", ("logits / temperature", "logits * temperature")),
    drawing("the temperature is left out", ("logits / temperature", "logits")),
    drawing("the probabilities are divided by the temperature, not the logits", (SUMS, "np.cumsum(softmax(logits) / temperature, axis=-1)")),
    drawing("the running sum is over another axis", (SUMS, "np.cumsum(softmax(logits / temperature), axis=0)"), source=DOCSTRING),
    drawing("the token before is taken: the first whose sum is more than the number is meant", (DRAWN, "np.maximum((sums <= number[..., None]).sum(axis=-1) - 1, 0)"), source=DOCSTRING),
    drawing("the token after is taken: the first whose sum is more than the number is meant", (DRAWN, "np.minimum((sums <= number[..., None]).sum(axis=-1) + 1, logits.shape[-1] - 1)"), source=DOCSTRING),
    drawing("the softmax is left out", (SUMS, "np.cumsum(logits / temperature, axis=-1)")),
    drawing("the sums are compared the wrong way round", ("sums <= number", "sums > number"), source=DOCSTRING),
    drawing("the most likely token is taken whatever the number is", (DRAWN, "(logits + 0 * number[..., None]).argmax(axis=-1)")),
    drawing("the result may be past the last token: rounding may leave all sums below the number", (DRAWN, "(sums <= number[..., None]).sum(axis=-1)"), source=DOCSTRING),
    drawing("where rounding leaves all sums below the number, argmax finds no True and gives token 0, not the last", (DRAWN, "(sums > number[..., None]).argmax(axis=-1)"), source=DOCSTRING),
    extended("the new keys and values are written at the beginning, over the old ones", ("self.keys[:, :, self.length : end] = key", "self.keys[:, :, : key.shape[2]] = key"), ("self.values[:, :, self.length : end] = value", "self.values[:, :, : key.shape[2]] = value")),
    extended("the length is not counted", ("self.length = end", "pass")),
    extended("the whole capacity is returned, not the filled part", ("return self.keys[:, :, :end], self.values[:, :, :end]", "return self.keys, self.values")),
    extended("only the new keys and values are returned", ("return self.keys[:, :, :end], self.values[:, :, :end]", "return key, value")),
    extended("the length counts calls, not positions", ("self.length = end", "self.length += 1")),
    extended("keys and values are returned in the wrong order", ("return self.keys[:, :, :end], self.values[:, :, :end]", "return self.values[:, :, :end], self.keys[:, :, :end]")),
    extended("the keys are kept in the place of the values too", ("self.values[:, :, self.length : end] = value", "self.values[:, :, self.length : end] = key")),
    extended("the new positions are returned before they are counted: the last ones are missing", ("return self.keys[:, :, :end], self.values[:, :, :end]", "return self.keys[:, :, : end - key.shape[2]], self.values[:, :, : end - key.shape[2]]")),
    writing("everything is read again for each token, though the caches hold it", (NEXT, "tokens = np.append(tokens, [[token]], axis=1)")),
    writing("the caches are not given to forward, so a token sees itself alone", (CHOSEN, "token = choose(forward(config, weights, tokens)[0, -1])")),
    writing("the logits of the first position are used, not those of the last", (CHOSEN, "token = choose(forward(config, weights, tokens, caches)[0, 0])")),
    writing("choose is given logits of two axes, (1, vocabulary), where it takes those of one row, (vocabulary,)", (CHOSEN, "token = choose(forward(config, weights, tokens, caches)[:, -1])")),
    writing("the stop token is yielded", (STOP, "        yield token\n        if token in stop:\n            return\n")),
    writing("the stop token does not end the text", (STOP, "        yield token\n")),
    writing("the prompt is read again each time: tokens stays as it was", (NEXT, "pass")),
    writing("the prompt is read without its last token", (CHOSEN, "tokens = tokens[:, :-1] if tokens.shape[1] > 1 else tokens; token = choose(forward(config, weights, tokens, caches)[0, -1])")),
    writing("a token that stops is left out, but the text goes on", (STOP, "        if token not in stop:\n            yield token\n")),
    loss("the sign is wrong: the log-probability itself is returned", (LOSS, "float(chosen.mean())")),
    loss("the loss is summed, not averaged", (LOSS, "float(-chosen.sum())")),
    loss("the logarithm is to the base 2: the unit is bits, not nats", (LOSS, "float(-chosen.mean() / np.log(2))")),
    loss("the logarithm is left out", (LOSS, "float(-np.exp(chosen).mean())")),
    loss("the mean is over all positions, the ignored ones too", (LOSS, "float(-chosen.sum() / labels.size)")),
    loss("ignored labels are counted: -100 is an index from the end, or is cut to 0", (LABELS, "counted = labels == labels; labels = np.maximum(labels, 0)\n    chosen")),
    loss("the logarithm is taken of a softmax that has become 0", (LOG, "np.log(softmax(logits))")),
    loss("the greatest logit is not subtracted, so large numbers overflow", (LOG, "logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))")),
    loss("the softmax is left out: the logits are taken as log-probabilities", (LOG, "logits")),
    gradient("the 1 at the label is not subtracted", (AT_LABEL, "pass")),
    gradient("the sign is wrong", (AVERAGE, "return -gradient / counted.sum()")),
    gradient("it is not divided by the number of positions", (AVERAGE, "return gradient")),
    gradient("it is divided by all positions, the ignored ones too", (AVERAGE, "return gradient / counted.size")),
    gradient("ignored positions have a gradient", ("    gradient[~counted] = 0\n", "")),
    gradient("ignored positions have a gradient, as if their label was token 0", ("    gradient[~counted] = 0\n", "    gradient[~counted, 0] -= 1\n")),
    gradient("it is the derivative of the softmax alone: p (1 - p) at the label, -p q elsewhere", (AT_LABEL, "chosen = np.take_along_axis(gradient, np.maximum(labels, 0)[..., None], -1); gradient = -chosen * gradient; gradient[counted, labels[counted]] += chosen[counted, 0]")),
    gradient("it is divided by the elements of the vocabulary too, as a mean over all numbers is", (AVERAGE, "return gradient / counted.sum() / logits.shape[-1]")),
    of("linear_gradients", "loss", "the weight is transposed in the derivative by x", CHAIN, (PRODUCTS, "gradient @ (weight.T if weight.shape[0] == weight.shape[1] else weight), gradient.T @ x")),
    of("linear_gradients", "loss", "the derivative by the weight is transposed", CHAIN, (PRODUCTS, "gradient @ weight, x.T @ gradient")),
    of("linear_gradients", "loss", "the derivative by the weight is a mean over the rows, not a sum", CHAIN, (PRODUCTS, "gradient @ weight, gradient.T @ x / len(x)")),
    of("linear_gradients", "loss", "the two derivatives are in the wrong order", CHAIN, (PRODUCTS, "gradient.T @ x, gradient @ weight")),
    of("embedding_gradient", "loss", "of a token that occurs more than once, only the last place counts", CHAIN, (ADDED, "total[tokens] += gradient")),
    of("embedding_gradient", "loss", "of a token that occurs more than once, the places are averaged", CHAIN, (ADDED, f"{ADDED}; total /= np.maximum(np.bincount(tokens, minlength=vocabulary), 1)[:, None]")),
    of("embedding_gradient", "loss", "tokens are counted from 1, not from 0", CHAIN, (ADDED, "np.add.at(total, tokens - 1, gradient)")),
    adamw("m is not corrected", (FIRST_CORRECTED, "self.m[name]")),
    adamw("v is not corrected", (SECOND_CORRECTED, "self.v[name]")),
    adamw("neither m nor v is corrected", (FIRST_CORRECTED, "self.m[name]"), (SECOND_CORRECTED, "self.v[name]")),
    adamw("the corrected means are kept, so they are corrected again and again", ("m = self.m[name] / ", "m = self.m[name] = self.m[name] / "), ("v = self.v[name] / ", "v = self.v[name] = self.v[name] / ")),
    adamw("steps are counted once for each parameter, not once for all", ("self.steps += 1\n", "pass\n"), ("g = gradients[name]\n", "g = gradients[name]; self.steps += 1\n")),
    adamw("steps are counted from 0, and the first is not corrected", ("self.steps += 1\n", "self.steps += 1; t = max(self.steps - 1, 1)\n"), (FIRST_CORRECTED, "self.m[name] / (1 - beta1**t)"), (SECOND_CORRECTED, "self.v[name] / (1 - beta2**t)")),
    adamw("the weight decay is not multiplied by the learning rate", (DECAY, "parameter -= self.weight_decay * parameter\n"), source=DECOUPLED),
    adamw("the weight decay is left out", (DECAY, "pass\n"), source=DECOUPLED),
    adamw("the weight decay has the wrong sign", (DECAY, "parameter += self.lr * self.weight_decay * parameter\n"), source=DECOUPLED),
    adamw("the weight decay is added to the gradient, as in Adam with L2 regularisation", ("g = gradients[name]\n", "g = gradients[name] + self.weight_decay * parameter\n"), (DECAY, "pass\n"), source=DECOUPLED),
    adamw("the weight decay comes after the update, not before", (DECAY, "pass\n"), (UPDATE, f"{UPDATE}; {DECAY.strip()}"), source=DOCSTRING),
    adamw("epsilon is inside the root", ("(np.sqrt(v) + self.eps)", "np.sqrt(v + self.eps)")),
    adamw("epsilon is left out", ("(np.sqrt(v) + self.eps)", "np.sqrt(v)")),
    adamw("the root of v is left out", ("(np.sqrt(v) + self.eps)", "(v + self.eps)")),
    adamw("the gradient is not squared in v", (SECOND_MEAN, "beta2 * self.v[name] + (1 - beta2) * np.abs(g)")),
    adamw("beta1 and beta2 are exchanged", ("beta1, beta2 = self.betas", "beta2, beta1 = self.betas")),
    adamw("the update goes up the gradient, not down", (UPDATE, UPDATE.replace("-=", "+="))),
    adamw("the gradient itself is used, not its running mean", (UPDATE, UPDATE.replace("* m /", "* g /"))),
    adamw("the running means lack the factors 1 - beta", (FIRST_MEAN, "beta1 * self.m[name] + g"), (SECOND_MEAN, "beta2 * self.v[name] + g * g")),
    adamw("beta and 1 - beta are exchanged in m", (FIRST_MEAN, "(1 - beta1) * self.m[name] + beta1 * g")),
    adamw("m and v are begun anew in each step", (FIRST_MEAN, "(1 - beta1) * g"), (SECOND_MEAN, "(1 - beta2) * g * g")),
    adamw("m is begun anew in each step", (FIRST_MEAN, "(1 - beta1) * g")),
    adamw("v is begun anew in each step", (SECOND_MEAN, "(1 - beta2) * g * g")),
    adamw("the steps are not counted: each is taken as the first", ("self.steps += 1\n", "self.steps = 1\n")),
    adamw("the steps are not counted: t stays 0, and 1 - beta ** 0 is 0", ("self.steps += 1\n", "pass\n")),
    adamw("the parameters are not changed: `a = a - b` makes another array", (DECAY, "parameter = parameter - self.lr * self.weight_decay * parameter\n"), (UPDATE, "parameter = parameter - self.lr * m / (np.sqrt(v) + self.eps)"), source=DOCSTRING),
    adamw("the decay alone changes the array; the update makes another", (UPDATE, "parameter = parameter - self.lr * m / (np.sqrt(v) + self.eps)"), source=DOCSTRING),
)  # fmt: skip
