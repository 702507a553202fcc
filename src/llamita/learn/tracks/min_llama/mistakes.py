"""The mistakes that min-llama's grader knows: each is a change to the lines of a solution.

A reader's result that equals the changed solution's has this mistake, however it is written.
"""

from llamita.learn.checking import Mistake

ROFORMER = "Su et al. 2021, https://arxiv.org/abs/2104.09864"
RMS_NORM = "Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, equation 4"
ATTENTION = "Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, equation 1"
MASK = "Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.2.3"
GROUPED = "Ainslie et al. 2023, https://arxiv.org/abs/2305.13245, section 2.2"
SWIGLU = "Shazeer 2020, https://arxiv.org/abs/2002.05202, equation 6"
LLAMA = "Touvron et al. 2023, https://arxiv.org/abs/2302.13971, section 2.2"
TEMPERATURE = "Ackley, Hinton and Sejnowski 1985: probabilities are proportional to exp(logit / temperature)"
ADAM = "Kingma and Ba 2015, https://arxiv.org/abs/1412.6980, algorithm 1"
EFFICIENT = "Kingma and Ba 2015, https://arxiv.org/abs/1412.6980, end of section 2"
DECOUPLED = "Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101, algorithm 2"
LAST_TOKEN = "the docstring: the last token that is not padding has seen the whole text"

TURN = "(real * cos - imag * sin, real * sin + imag * cos)"
QUERY_PAIRS = "query.float().unflatten(-1, (-1, 2)).unbind(-1)"
KEY_PAIRS = "key.float().unflatten(-1, (-1, 2)).unbind(-1)"
POSITIONS = "torch.arange(seqlen, device=query.device).float()"
NORM = "x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)"
NORM_FORWARD = "self._norm(x.float()).type_as(x) * self.weight"
LATER = "torch.ones(seqlen, seqlen, dtype=torch.bool, device=query.device).triu(1)"
MASKED = '        scores = scores.masked_fill(later, float("-inf"))\n'
SCALE = " / math.sqrt(self.head_dim)"
WEIGHTS = "self.attn_dropout(F.softmax(scores, dim=-1))"
REPEATED_KEY = "key.repeat_interleave(self.n_rep, dim=2)"
REPEATED_VALUE = "value.repeat_interleave(self.n_rep, dim=2)"
TURNED = "query, key = apply_rotary_emb(query, key, self.head_dim, self.max_seq_len, self.rope_theta)"
OUTPUT = "self.resid_dropout(self.compute_output(output))"
GATED = "F.silu(self.w1(x)) * self.w3(x)"
FIRST_HALF = "h = x + self.attention(self.attention_norm(x))"
SECOND_HALF = "return h + self.feed_forward(self.ffn_norm(h))"
MOST_LIKELY = "logits.argmax(dim=-1, keepdim=True)"
PROBABILITIES = "F.softmax(logits / temperature, dim=-1)"
DRAWN = "torch.multinomial(probabilities, num_samples=1)"
ALPHA = "lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)"
UPDATE = "p.sub_(alpha * m / (v.sqrt() + eps))"
DECAY = "p.sub_(lr * weight_decay * p)"
BEFORE_UPDATE = '                state["step"] += 1\n'
LAST = "last = (input_ids != self.pad_id).sum(dim=1) - 1"
STATE = "state = hidden[torch.arange(len(input_ids), device=input_ids.device), last]"
LABELS = "F.log_softmax(self.classifier_head(self.dropout(state)), dim=-1)"


def of(check: str, file: str, name: str, source: str, *changes: tuple[str, str]) -> Mistake:
    return Mistake(name, check, file, changes, source)


def rotary(name: str, *changes: tuple[str, str], source: str = "equation 34") -> Mistake:
    return of("apply_rotary_emb", "rope", name, f"{ROFORMER}, {source}", *changes)


def norm(name: str, new: str) -> Mistake:
    return of("RMSNorm._norm", "llama", name, RMS_NORM, (NORM, new))


def score(name: str, *changes: tuple[str, str], source: str = ATTENTION) -> Mistake:
    return of("Attention.compute_query_key_value_scores", "llama", name, source, *changes)


def attention(name: str, *changes: tuple[str, str], source: str = GROUPED) -> Mistake:
    return of("Attention.forward", "llama", name, source, *changes)


def gate(name: str, new: str) -> Mistake:
    return of("FeedForward.SwiGLU", "llama", name, SWIGLU, (GATED, new))


def layer(name: str, *changes: tuple[str, str]) -> Mistake:
    return of("LlamaLayer.forward", "llama", name, LLAMA, *changes)


def drawing(name: str, *changes: tuple[str, str]) -> Mistake:
    return of("Llama.generate at other temperatures", "llama", name, TEMPERATURE, *changes)


def adamw(name: str, *changes: tuple[str, str], source: str = ADAM) -> Mistake:
    return of("AdamW.step", "optimizer", name, source, *changes)


def pooling(name: str, *changes: tuple[str, str], source: str = LAST_TOKEN) -> Mistake:
    return of("LlamaEmbeddingClassifier.forward", "classifier", name, source, *changes)


MISTAKES = (
    rotary(
        "the pairs are the two halves of a head, not neighbouring numbers",
        (QUERY_PAIRS, "query.float().chunk(2, dim=-1)"),
        (KEY_PAIRS, "key.float().chunk(2, dim=-1)"),
        (f"torch.stack({TURN}, dim=-1).flatten(-2)", f"torch.cat({TURN}, dim=-1)"),
    ),
    rotary(
        "the coordinates are put together as halves, not as neighbours again",
        (f"torch.stack({TURN}, dim=-1).flatten(-2)", f"torch.cat({TURN}, dim=-1)"),
    ),
    rotary("the rotation goes the other way", (TURN, "(real * cos + imag * sin, imag * cos - real * sin)")),
    rotary(
        "the first position counts as 1, not as 0",
        (POSITIONS, "torch.arange(1, seqlen + 1, device=query.device).float()"),
    ),
    rotary(
        "the exponent of theta has the wrong sign",
        ("(-pairs / head_dim)", "(pairs / head_dim)"),
        source="section 3.2.2",
    ),
    rotary("theta is always 10000", ("frequencies = theta", "frequencies = 10000.0"), source="section 3.2.2"),
    rotary(
        "the exponent is -i / head_dim, where it should be -2i / head_dim",
        ("(-pairs / head_dim)", "(-pairs / 2 / head_dim)"),
        source="section 3.2.2",
    ),
    rotary(
        "the exponent is divided by half the head's size, not by all of it",
        ("(-pairs / head_dim)", "(-2 * pairs / head_dim)"),
        source="section 3.2.2",
    ),
    rotary("the key is not turned", ("turned(key_real, key_imag)", "key")),
    rotary("sine and cosine are exchanged", ("cos, sin = angles.cos()", "sin, cos = angles.cos()")),
    norm("epsilon is added outside the root", "x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)"),
    norm("epsilon is left out", "x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))"),
    norm("the squares are summed, not averaged", "x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + self.eps)"),
    norm("the mean is over the wrong axis", "x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + self.eps)"),
    norm("the mean is over everything, not over the last axis", "x * torch.rsqrt(x.pow(2).mean() + self.eps)"),
    norm("the root is left out", "x / (x.pow(2).mean(-1, keepdim=True) + self.eps)"),
    norm(
        "the result is multiplied by the root, not divided",
        "x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)",
    ),
    norm(
        "the mean is subtracted, as LayerNorm does",
        "(x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, correction=0) + self.eps)",
    ),
    of(
        "RMSNorm.forward",
        "llama",
        "the weight is left out",
        RMS_NORM,
        (NORM_FORWARD, "self._norm(x.float()).type_as(x)"),
    ),
    of(
        "RMSNorm.forward",
        "llama",
        "the weight is added to one, as Gemma does",
        RMS_NORM,
        (NORM_FORWARD, "self._norm(x.float()).type_as(x) * (1 + self.weight)"),
    ),
    of(
        "RMSNorm.forward",
        "llama",
        "the normalisation is left out",
        RMS_NORM,
        (NORM_FORWARD, "x * self.weight"),
    ),
    score("the scale is left out", (SCALE, "")),
    score(
        "the scale is the root of the number of heads, not of their size", (SCALE, " / math.sqrt(self.n_local_heads)")
    ),
    score("the scale is the head's size, not its root", (SCALE, " / self.head_dim")),
    score("the scores are multiplied by the root, not divided", (SCALE, " * math.sqrt(self.head_dim)")),
    score("the mask is one off: a position sees the one after it", ("triu(1)", "triu(2)"), source=MASK),
    score("the mask is one off: a position does not see itself", ("triu(1)", "triu(0)"), source=MASK),
    score("the mask is left out: a position sees those after it", (MASKED, ""), source=MASK),
    score(
        "the mask is the wrong way round: a position sees those after it alone", ("triu(1)", "tril(-1)"), source=MASK
    ),
    score("masked scores are 0, where they should be minus infinity", ('float("-inf")', "0.0"), source=MASK),
    score(
        "the mask comes after the softmax, so the weights no longer sum to one",
        (MASKED, ""),
        (WEIGHTS, "self.attn_dropout(F.softmax(scores, dim=-1).masked_fill(later, 0.0))"),
        source=MASK,
    ),
    score(
        "the softmax is over the queries, not over the keys", (WEIGHTS, "self.attn_dropout(F.softmax(scores, dim=-2))")
    ),
    score("the softmax is left out", (MASKED, ""), (WEIGHTS, "self.attn_dropout(scores.masked_fill(later, 0.0))")),
    score("attn_dropout is left out", (WEIGHTS, "F.softmax(scores, dim=-1)"), source="the docstring"),
    score(
        "attn_dropout is over the result, not over the weights",
        (WEIGHTS, "F.softmax(scores, dim=-1)"),
        ("return weights @ value", "return self.attn_dropout(weights @ value)"),
        source="the docstring",
    ),
    attention(
        "the key and value heads are tiled (0 1 0 1), where each should be repeated (0 0 1 1)",
        (REPEATED_KEY, "key.repeat(1, 1, self.n_rep, 1)"),
        (REPEATED_VALUE, "value.repeat(1, 1, self.n_rep, 1)"),
    ),
    attention("positions are left out: apply_rotary_emb is not called", (TURNED, "pass"), source=ROFORMER),
    attention(
        "the values are turned too",
        (TURNED, f"{TURNED}; value = apply_rotary_emb(query, value, self.head_dim, self.max_seq_len)[1]"),
        source=ROFORMER,
    ),
    attention(
        "the heads are put together without exchanging heads and positions again",
        ("output = output.transpose(1, 2).reshape(batch, seqlen, -1)", "output = output.reshape(batch, seqlen, -1)"),
        source=ATTENTION,
    ),
    attention(
        "the heads are told apart without exchanging heads and positions",
        (
            "query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)",
            "query, key, value = (t.reshape(batch, -1, seqlen, self.head_dim) for t in (query, key, value))",
        ),
        source=ATTENTION,
    ),
    attention("compute_output is left out", (OUTPUT, "self.resid_dropout(output)"), source=ATTENTION),
    attention("resid_dropout is left out", (OUTPUT, "self.compute_output(output)"), source="the docstring"),
    attention(
        "keys and values are exchanged",
        (
            "self.compute_query_key_value_scores(query, key, value)",
            "self.compute_query_key_value_scores(query, value, key)",
        ),
        source=ATTENTION,
    ),
    gate("gate and up are exchanged: SiLU belongs to w1", "self.w1(x) * F.silu(self.w3(x))"),
    gate("SiLU is left out", "self.w1(x) * self.w3(x)"),
    gate("the gate is a sigmoid, not SiLU", "F.sigmoid(self.w1(x)) * self.w3(x)"),
    gate("the gate is GELU, not SiLU", "F.gelu(self.w1(x)) * self.w3(x)"),
    gate("the gate is ReLU, not SiLU", "F.relu(self.w1(x)) * self.w3(x)"),
    gate("the product with w3 is left out", "F.silu(self.w1(x))"),
    gate("gate and up are added, not multiplied", "F.silu(self.w1(x)) + self.w3(x)"),
    layer(
        "the residual connection of the attention is left out",
        (FIRST_HALF, "h = self.attention(self.attention_norm(x))"),
    ),
    layer(
        "the residual connection of the feed-forward network is left out",
        (SECOND_HALF, "return self.feed_forward(self.ffn_norm(h))"),
    ),
    layer(
        "both residual connections are left out",
        (FIRST_HALF, "h = self.attention(self.attention_norm(x))"),
        (SECOND_HALF, "return self.feed_forward(self.ffn_norm(h))"),
    ),
    layer(
        "the norms are after the additions, not before attention and feed-forward network",
        (FIRST_HALF, "h = self.attention_norm(x + self.attention(x))"),
        (SECOND_HALF, "return self.ffn_norm(h + self.feed_forward(h))"),
    ),
    layer(
        "the outputs are normalised, not the inputs",
        (FIRST_HALF, "h = x + self.attention_norm(self.attention(x))"),
        (SECOND_HALF, "return h + self.ffn_norm(self.feed_forward(h))"),
    ),
    layer(
        "the second addition takes x, not the result of the first",
        (SECOND_HALF, "return x + self.feed_forward(self.ffn_norm(h))"),
    ),
    layer(
        "the feed-forward network reads x, not the result of the attention",
        (SECOND_HALF, "return h + self.feed_forward(self.ffn_norm(x))"),
    ),
    layer(
        "the two norms are exchanged",
        (FIRST_HALF, "h = x + self.attention(self.ffn_norm(x))"),
        (SECOND_HALF, "return h + self.feed_forward(self.attention_norm(h))"),
    ),
    layer("the norm before the attention is left out", (FIRST_HALF, "h = x + self.attention(x)")),
    layer("the norm before the feed-forward network is left out", (SECOND_HALF, "return h + self.feed_forward(h)")),
    layer(
        "what is added back is the normalised input, not the input itself",
        (FIRST_HALF, "h = self.attention_norm(x); h = h + self.attention(h)"),
        (SECOND_HALF, "h = self.ffn_norm(h); return h + self.feed_forward(h)"),
    ),
    of(
        "Llama.generate at temperature 0",
        "llama",
        "the least likely token is taken",
        "the docstring",
        (MOST_LIKELY, "logits.argmin(dim=-1, keepdim=True)"),
    ),
    of(
        "Llama.generate at temperature 0",
        "llama",
        "all rows get the first row's token",
        "the docstring",
        (MOST_LIKELY, "logits.argmax(dim=-1, keepdim=True)[:1].expand(len(idx), 1)"),
    ),
    drawing(
        "the logits are multiplied by the temperature, not divided",
        (PROBABILITIES, "F.softmax(logits * temperature, dim=-1)"),
    ),
    drawing(
        "the most likely token is taken at every temperature", (DRAWN, "probabilities.argmax(dim=-1, keepdim=True)")
    ),
    drawing(
        "the temperature changes nothing: it must divide the logits, before the softmax",
        (PROBABILITIES, "F.softmax(logits, dim=-1)"),
    ),
    drawing(
        "the logits are divided by the temperature twice", (PROBABILITIES, "F.softmax(logits / temperature**2, dim=-1)")
    ),
    drawing("the softmax is left out: tokens are drawn evenly", (PROBABILITIES, "torch.ones_like(logits)")),
    adamw("the bias correction is left out", (ALPHA, "lr"), source=EFFICIENT),
    adamw(
        "the bias correction is off by one: the first step counts as 2",
        ('t = state["step"]', 't = state["step"] + 1'),
        source=EFFICIENT,
    ),
    adamw("the bias of the squares is not corrected", (ALPHA, "lr / (1 - beta1**t)"), source=EFFICIENT),
    adamw(
        "the bias of the gradient's mean is not corrected", (ALPHA, "lr * math.sqrt(1 - beta2**t)"), source=EFFICIENT
    ),
    adamw(
        "the root is missing in the bias correction", (ALPHA, "lr * (1 - beta2**t) / (1 - beta1**t)"), source=EFFICIENT
    ),
    adamw(
        "the two bias corrections are exchanged",
        (ALPHA, "lr * math.sqrt(1 - beta1**t) / (1 - beta2**t)"),
        source=EFFICIENT,
    ),
    adamw("the bias is corrected without correct_bias too", ("if correct_bias:", "if True:"), source="the docstring"),
    adamw(
        "the moments themselves are corrected, so epsilon has another size than in the efficient form that is asked for",
        (UPDATE, "p.sub_(alpha * m / (v.sqrt() + eps * (math.sqrt(1 - beta2**t) if correct_bias else 1.0)))"),
        source=EFFICIENT,
    ),
    adamw(
        "the weight decay comes before the update, where the docstring has it after",
        (f"                {DECAY}\n", ""),
        (BEFORE_UPDATE, f"{BEFORE_UPDATE}                {DECAY}\n"),
        source=DECOUPLED,
    ),
    adamw(
        "the weight decay is not multiplied by the learning rate", (DECAY, "p.sub_(weight_decay * p)"), source=DECOUPLED
    ),
    adamw(
        "the weight decay is multiplied by the corrected step, not by lr",
        (DECAY, "p.sub_(alpha * weight_decay * p)"),
        source=DECOUPLED,
    ),
    adamw("the weight decay is left out", (DECAY, "pass"), source=DECOUPLED),
    adamw("the weight decay has the wrong sign", (DECAY, "p.add_(lr * weight_decay * p)"), source=DECOUPLED),
    adamw(
        "the weight decay is added to the gradient, as in Adam with L2 regularisation",
        ("grad = p.grad\n", "grad = p.grad + weight_decay * p\n"),
        (DECAY, "pass"),
        source=DECOUPLED,
    ),
    adamw("epsilon is inside the root", ("(v.sqrt() + eps)", "(v + eps).sqrt()")),
    adamw("epsilon is left out", ("(v.sqrt() + eps)", "v.sqrt()")),
    adamw("the gradient is not squared in the second mean", ("(1 - beta2) * grad * grad", "(1 - beta2) * grad")),
    adamw("the root of the second mean is left out", ("v.sqrt() + eps", "v + eps")),
    adamw("beta1 and beta2 are exchanged", ("beta1, beta2 = group", "beta2, beta1 = group")),
    adamw("the update goes up the gradient, not down", (UPDATE, "p.add_(alpha * m / (v.sqrt() + eps))")),
    adamw("the gradient itself is used, not its running mean", ("p.sub_(alpha * m /", "p.sub_(alpha * grad /")),
    adamw(
        "the running means lack the factors 1 - beta",
        ("add_((1 - beta1) * grad)", "add_(grad)"),
        ("add_((1 - beta2) * grad * grad)", "add_(grad * grad)"),
    ),
    pooling("the last position is used, which is padding in a short text", (LAST, "last = -1")),
    pooling("the first position is used, which has seen nothing of the text", (LAST, "last = 0")),
    pooling(
        "the position after the last token is used",
        (LAST, "last = (input_ids != self.pad_id).sum(dim=1) % input_ids.shape[1]"),
    ),
    pooling("the mean over all positions is used, padding included", (STATE, "state = hidden.mean(dim=1)")),
    pooling(
        "the mean over the tokens is used, not the last one",
        (
            STATE,
            "mask = (input_ids != self.pad_id)[..., None]; state = (hidden * mask).sum(dim=1) / mask.sum(dim=1)",
        ),
    ),
    pooling(
        "the log-softmax is left out", (LABELS, "self.classifier_head(self.dropout(state))"), source="the docstring"
    ),
    pooling(
        "the softmax has no logarithm",
        (LABELS, "F.softmax(self.classifier_head(self.dropout(state)), dim=-1)"),
        source="the docstring",
    ),
    pooling(
        "the log-softmax is over the rows, not over the labels",
        (LABELS, "F.log_softmax(self.classifier_head(self.dropout(state)), dim=0)"),
        source="the docstring",
    ),
    pooling(
        "dropout is left out", (LABELS, "F.log_softmax(self.classifier_head(state), dim=-1)"), source="the docstring"
    ),
    pooling(
        "dropout is after the head, not before it",
        (LABELS, "F.log_softmax(self.dropout(self.classifier_head(state)), dim=-1)"),
        source="the docstring",
    ),
)
