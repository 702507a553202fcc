"""The mistakes that the adapters track's grader knows: each is a change to the lines of a solution.

A reader's result that equals the changed solution's has this mistake, however it is written.
"""

from llamita.learn.checking import Mistake

DOCSTRING = "the docstring of the skeleton"
SILU = "Ramachandran et al. 2017, https://arxiv.org/abs/1710.05941, section 4"
SOFTMAX = "Bridle 1990: exp(x) divided by the sum of exp(x), the greatest element subtracted first"
RMS_NORM = "Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, equation 4"
ATTENTION = "Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, equation 1"
MASK = "Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.2.3"
HEADS = "Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.2.2"
ROFORMER = "Su et al. 2021, https://arxiv.org/abs/2104.09864"
SWIGLU = "Shazeer 2020, https://arxiv.org/abs/2002.05202, equation 6"
LLAMA = "Touvron et al. 2023, https://arxiv.org/abs/2302.13971, section 2.2"
CLIPPING = "Pascanu et al. 2013, https://arxiv.org/abs/1211.5063, algorithm 1"
ADAM = "Kingma and Ba 2015, https://arxiv.org/abs/1412.6980, algorithm 1"
DECOUPLED = "Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101, algorithm 2"
COSINE = "Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983, equation 5"
BPE = "Sennrich et al. 2016, https://arxiv.org/abs/1508.07909, section 3.2"
GPT2 = "Radford et al. 2019, Language Models are Unsupervised Multitask Learners, section 2.2"

NORM = "in_features * torch.rsqrt(in_features.pow(2).mean(dim=-1, keepdim=True) + eps) * weights"
SCORES = "Q @ K.transpose(-2, -1) / math.sqrt(Q.shape[-1])"
MASKED = "scores = scores.masked_fill(~mask, -math.inf)"
GATHERED = "run_softmax(scores, -1) @ V"
SPLIT = ".unflatten(-1, (num_heads, -1)).transpose(-3, -2)"
PLAIN_HEADS = "run_scaled_dot_product_attention(query, key, value, earlier)"
PLAIN_OUTPUT = "heads.transpose(-3, -2).flatten(-2) @ o_proj_weight.T"
SPEEDS = "theta ** (-torch.arange(0, d_k, 2, dtype=torch.float64) / d_k)"
PAIRS = "first, second = in_query_or_key[..., 0::2], in_query_or_key[..., 1::2]"
TURNED = "torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)"
POSITIONS = "torch.arange(length) if token_positions is None else token_positions[..., None, :]"
BOTH_TURNED = "query, key = (run_rope(d_k, theta, max_seq_len, x, positions) for x in (query, key))"
SEEN = "run_scaled_dot_product_attention(query, key, value, seen)"
ROPE_SPLIT = ".unflatten(-1, (num_heads, d_k)).transpose(-3, -2)"
ROPE_OUTPUT = "run_linear(d_model, d_model, o_proj_weight, gathered.transpose(-3, -2).flatten(-2))"
GATED = "(run_silu(in_features @ w1_weight.T) * (in_features @ w3_weight.T)) @ w2_weight.T"
FIRST_NORM = 'normed = run_rmsnorm(d_model, 1e-5, weights["ln1.weight"], in_features)'
FIRST_SUM = "x = in_features + run_multihead_self_attention_with_rope("
SECOND_NORM = 'normed = run_rmsnorm(d_model, 1e-5, weights["ln2.weight"], x)'
SECOND_SUM = "return x + run_swiglu("
LAST_NORM = 'x = run_rmsnorm(d_model, 1e-5, weights["ln_final.weight"], x)'
LOGITS = 'return run_linear(d_model, vocab_size, weights["lm_head.weight"], x)'
LOG = "shifted - shifted.exp().sum(dim=-1, keepdim=True).log()"
LOSS = "-log_probabilities.gather(-1, targets[..., None]).mean()"
GRADIENTS = "gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]"
LENGTH = "norm = math.sqrt(sum(float(gradient.pow(2).sum()) for gradient in gradients))"
CLIPPED = "gradient.mul_(max_l2_norm / (norm + 1e-6))"
COUNT = 'state["t"] = state.get("t", 0) + 1'
SECOND_MEAN = "(1 - beta2) * gradient**2"
DECAY = 'parameter -= lr * group["weight_decay"] * parameter\n'
UPDATE = "parameter -= lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)"
WARMUP = "return it / warmup_iters * max_learning_rate"
DONE = "done = (it - warmup_iters) / (cosine_cycle_iters - warmup_iters)"
RATE = "min_learning_rate + 0.5 * (1 + math.cos(math.pi * done)) * (max_learning_rate - min_learning_rate)"
STARTS = "torch.randint(len(dataset) - context_length, (batch_size,))"
BATCH = "return tokens[places].to(device), tokens[places + 1].to(device)"
SAVED = '{"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iteration": iteration}'
LOADED = 'optimizer.load_state_dict(content["optimizer"])'
ORDER = "sorted(special_tokens or [], key=len, reverse=True)"
PARTS = "regex.split(dividing, text) if special else [text]"
ENCODED = "regex.findall(WORDS, part):\n                        found"
DECODED = 'b"".join(tokens[number] for number in ids).decode("utf-8", errors="replace")'
EARLIEST = "first = min(known, key=lambda pair: ranks[pair])"
ITERATED = "            for text in iterable:\n                yield from self.encode(text)\n"
BEST = "max(pairs, key=lambda pair: (pairs[pair], pair), default=None)"
COUNTED = "counts.update(tuple(bytes([byte]) for byte in word.encode()) for word in regex.findall(WORDS, part))"
DIVIDED = "for part in regex.split(between, text) if special_tokens else [text]:"
ENOUGH = "while 256 + len(special_tokens) + len(made) < vocab_size:"


def of(check: str, name: str, source: str, *changes: tuple[str, str]) -> Mistake:
    return Mistake(name, check, "adapters", changes, source)


def softmax(name: str, *changes: tuple[str, str]) -> Mistake:
    return of("run_softmax", name, SOFTMAX, *changes)


def norm(name: str, new: str) -> Mistake:
    return of("run_rmsnorm", name, RMS_NORM, (NORM, new))


def attention(name: str, *changes: tuple[str, str], source: str = ATTENTION) -> Mistake:
    return of("run_scaled_dot_product_attention", name, source, *changes)


def heads(name: str, *changes: tuple[str, str], source: str = HEADS) -> Mistake:
    return of("run_multihead_self_attention", name, source, *changes)


def rope(name: str, *changes: tuple[str, str], source: str = "equation 34") -> Mistake:
    return of("run_rope", name, f"{ROFORMER}, {source}", *changes)


def turned(name: str, *changes: tuple[str, str], source: str = ROFORMER) -> Mistake:
    return of("run_multihead_self_attention_with_rope", name, source, *changes)


def gate(name: str, new: str) -> Mistake:
    return of("run_swiglu", name, SWIGLU, (GATED, new))


def block(name: str, *changes: tuple[str, str]) -> Mistake:
    return of("run_transformer_block", name, LLAMA, *changes)


def whole(name: str, *changes: tuple[str, str]) -> Mistake:
    return of("run_transformer_lm", name, LLAMA, *changes)


def loss(name: str, *changes: tuple[str, str]) -> Mistake:
    return of("run_cross_entropy", name, DOCSTRING, *changes)


def clipping(name: str, *changes: tuple[str, str]) -> Mistake:
    return of("run_gradient_clipping", name, CLIPPING, *changes)


def adamw(name: str, *changes: tuple[str, str], source: str = ADAM) -> Mistake:
    return of("get_adamw_cls", name, source, *changes)


def schedule(name: str, *changes: tuple[str, str]) -> Mistake:
    return of("run_get_lr_cosine_schedule", name, COSINE, *changes)


def batch(name: str, *changes: tuple[str, str]) -> Mistake:
    return of("run_get_batch", name, DOCSTRING, *changes)


def saving(name: str, *changes: tuple[str, str]) -> Mistake:
    return of("run_save_checkpoint and run_load_checkpoint", name, DOCSTRING, *changes)


def encoding(name: str, *changes: tuple[str, str], source: str = DOCSTRING) -> Mistake:
    return of("get_tokenizer", name, source, *changes)


def training(name: str, *changes: tuple[str, str], source: str = BPE) -> Mistake:
    return of("run_train_bpe", name, source, *changes)


MISTAKES = (
    of("run_linear", "the weight is not transposed", DOCSTRING, ("return in_features @ weights.T", "return in_features @ (weights if d_in == d_out else weights.T)")),
    of("run_embedding", "columns of the weights are taken, not rows", DOCSTRING, ("return weights[token_ids]", "return (weights.T if vocab_size == d_model else weights)[token_ids]")),
    of("run_embedding", "tokens are counted from 1, not from 0", DOCSTRING, ("return weights[token_ids]", "return weights[token_ids - 1]")),
    of("run_embedding", "the vectors are multiplied by the root of d_model", DOCSTRING, ("return weights[token_ids]", "return weights[token_ids] * math.sqrt(d_model)")),
    of("run_silu", "the product with x is left out: this is the sigmoid", SILU, ("in_features * torch.sigmoid(in_features)", "torch.sigmoid(in_features)")),
    of("run_silu", "it is ReLU, not SiLU", SILU, ("in_features * torch.sigmoid(in_features)", "torch.relu(in_features)")),
    of("run_silu", "it is GELU, not SiLU", SILU, ("in_features * torch.sigmoid(in_features)", "torch.nn.functional.gelu(in_features)")),
    of("run_silu", "the sign in the sigmoid is wrong", SILU, ("torch.sigmoid(in_features)", "torch.sigmoid(-in_features)")),
    softmax("the greatest element is not subtracted, so large numbers overflow", ("torch.exp(in_features - in_features.amax(dim=dim, keepdim=True))", "torch.exp(in_features)")),
    softmax("the last axis is used whatever dim is", ("in_features.amax(dim=dim", "in_features.amax(dim=-1"), ("exponentials.sum(dim=dim", "exponentials.sum(dim=-1")),
    softmax("the sum is over everything, not over one axis", ("exponentials.sum(dim=dim, keepdim=True)", "exponentials.sum()")),
    softmax("the exponentials are not divided by their sum", ("exponentials / exponentials.sum(dim=dim, keepdim=True)", "exponentials")),
    softmax("the logarithm is returned", ("exponentials / exponentials.sum(dim=dim, keepdim=True)", "(exponentials / exponentials.sum(dim=dim, keepdim=True)).log()")),
    norm("epsilon is added outside the root", "in_features / (in_features.pow(2).mean(dim=-1, keepdim=True).sqrt() + eps) * weights"),
    norm("epsilon is left out", "in_features * torch.rsqrt(in_features.pow(2).mean(dim=-1, keepdim=True)) * weights"),
    norm("the squares are summed, not averaged", "in_features * torch.rsqrt(in_features.pow(2).sum(dim=-1, keepdim=True) + eps) * weights"),
    norm("the mean is subtracted, as LayerNorm does", "(in_features - in_features.mean(dim=-1, keepdim=True)) * torch.rsqrt(in_features.var(dim=-1, keepdim=True, correction=0) + eps) * weights"),
    norm("the root is left out", "in_features / (in_features.pow(2).mean(dim=-1, keepdim=True) + eps) * weights"),
    norm("the weight is left out", "in_features * torch.rsqrt(in_features.pow(2).mean(dim=-1, keepdim=True) + eps)"),
    norm("the weight is added to one", "in_features * torch.rsqrt(in_features.pow(2).mean(dim=-1, keepdim=True) + eps) * (1 + weights)"),
    norm("the mean is over the positions, not over the last axis", "in_features * torch.rsqrt(in_features.pow(2).mean(dim=-2, keepdim=True) + eps) * weights"),
    attention("the scale is left out", (SCORES, "Q @ K.transpose(-2, -1)")),
    attention("the scale is d_k, not its root", (SCORES, "Q @ K.transpose(-2, -1) / Q.shape[-1]")),
    attention("the scores are multiplied by the root, not divided", (SCORES, "Q @ K.transpose(-2, -1) * math.sqrt(Q.shape[-1])")),
    attention("the mask is not applied", (MASKED, "pass"), source=MASK),
    attention("the mask is used the wrong way round: True is where a query may see", (MASKED, "scores = scores.masked_fill(mask, -math.inf)"), source=MASK),
    attention("masked scores are 0, where they should be minus infinity", (MASKED, "scores = scores.masked_fill(~mask, 0.0)"), source=MASK),
    attention("the mask is added to the scores, where it says which of them stay", (MASKED, "scores = scores + mask"), source=MASK),
    attention("the mask comes after the softmax, so the weights no longer sum to one", (MASKED, "return run_softmax(scores, -1).masked_fill(~mask, 0.0) @ V"), source=MASK),
    attention("the softmax is over the queries, not over the keys", (GATHERED, "run_softmax(scores, -2) @ V")),
    attention("the softmax is left out", (GATHERED, "scores.masked_fill(scores.isinf(), 0.0) @ V")),
    heads("the mask is left out: a position sees those after it", (PLAIN_HEADS, "run_scaled_dot_product_attention(query, key, value)"), source=MASK),
    heads("the mask is one off: a position sees the one after it", (PLAIN_HEADS, "run_scaled_dot_product_attention(query, key, value, earlier | earlier.roll(1, 1))"), source=MASK),
    heads("the mask is the wrong way round: a position sees itself and those after it", (PLAIN_HEADS, "run_scaled_dot_product_attention(query, key, value, earlier.T)"), source=MASK),
    heads("the heads are put together without exchanging heads and positions again", (PLAIN_OUTPUT, "heads.reshape(in_features.shape) @ o_proj_weight.T")),
    heads("the heads are told apart without exchanging heads and positions", (SPLIT, ".unflatten(-1, (num_heads, -1)).flatten(-3, -1).unflatten(-1, (num_heads, in_features.shape[-2], -1))")),
    heads("a head is every num_heads-th output, not d_k in a row", (SPLIT, ".unflatten(-1, (-1, num_heads)).transpose(-2, -1).transpose(-3, -2)")),
    heads("there is one head only", (SPLIT, ".unflatten(-1, (1, -1)).transpose(-3, -2)")),
    heads("the scale is the root of d_model, not of d_k", ("        (in_features @ weight.T).unflatten", "        (in_features @ weight.T / num_heads ** (0.25 if weight is not v_proj_weight else 0.0)).unflatten")),
    heads("the output projection is left out", (PLAIN_OUTPUT, "heads.transpose(-3, -2).flatten(-2)")),
    heads("keys and values are exchanged", (PLAIN_HEADS, "run_scaled_dot_product_attention(query, value, key, earlier)")),
    heads("the weights are not transposed", ("        (in_features @ weight.T)", "        (in_features @ weight)"), (PLAIN_OUTPUT, "heads.transpose(-3, -2).flatten(-2) @ o_proj_weight")),
    rope("the pairs are the two halves of d_k, not neighbouring numbers", (PAIRS, "first, second = in_query_or_key.chunk(2, dim=-1)"), (TURNED, "torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)")),
    rope("the coordinates are put together as halves, not as neighbours again", (TURNED, "torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)")),
    rope("the rotation goes the other way", (TURNED, "torch.stack((first * cos + second * sin, second * cos - first * sin), dim=-1).flatten(-2)")),
    rope("the positions given are not used: they are counted from 0", ("token_positions[..., None] * speeds", "torch.arange(in_query_or_key.shape[-2])[:, None] * speeds"), source="section 3.2.2"),
    rope("the first position counts as 1, not as 0", ("token_positions[..., None] * speeds", "(token_positions[..., None] + 1) * speeds")),
    rope("the exponent of theta has the wrong sign", (SPEEDS, "theta ** (torch.arange(0, d_k, 2, dtype=torch.float64) / d_k)"), source="section 3.2.2"),
    rope("theta is always 10000", ("speeds = theta", "speeds = 10000.0"), source="section 3.2.2"),
    rope("the exponent is -i / d_k, where it should be -2i / d_k", (SPEEDS, "theta ** (-torch.arange(d_k // 2, dtype=torch.float64) / d_k)"), source="section 3.2.2"),
    rope("sine and cosine are exchanged", ("cos, sin = angles.cos()", "sin, cos = angles.cos()")),
    turned("positions are left out", (BOTH_TURNED, "pass")),
    turned("the positions given are not used: they are counted from 0", (POSITIONS, "torch.arange(length)"), source=DOCSTRING),
    turned("the values are turned too", (BOTH_TURNED, f"{BOTH_TURNED}; value = run_rope(d_k, theta, max_seq_len, value, positions)")),
    turned("only the query is turned", (BOTH_TURNED, "query = run_rope(d_k, theta, max_seq_len, query, positions)")),
    turned("the pairs are turned before the heads are told apart, over all of d_model", (BOTH_TURNED, "query, key = (run_rope(d_model, theta, max_seq_len, x.transpose(-3, -2).flatten(-2), positions.squeeze(-2) if positions.dim() > 1 else positions).unflatten(-1, (num_heads, d_k)).transpose(-3, -2) for x in (query, key))")),
    turned("the mask is left out: a position sees those after it", (SEEN, "run_scaled_dot_product_attention(query, key, value)"), source=MASK),
    turned("the heads are told apart without exchanging heads and positions", (ROPE_SPLIT, ".unflatten(-1, (num_heads, d_k)).flatten(-3, -1).unflatten(-1, (num_heads, length, d_k))"), source=HEADS),
    turned("the heads are put together without exchanging heads and positions again", (ROPE_OUTPUT, "run_linear(d_model, d_model, o_proj_weight, gathered.reshape(in_features.shape))"), source=HEADS),
    turned("the output projection is left out", (ROPE_OUTPUT, "gathered.transpose(-3, -2).flatten(-2)"), source=HEADS),
    gate("w1 and w3 are exchanged: SiLU belongs to w1", "((in_features @ w1_weight.T) * run_silu(in_features @ w3_weight.T)) @ w2_weight.T"),
    gate("SiLU is left out", "((in_features @ w1_weight.T) * (in_features @ w3_weight.T)) @ w2_weight.T"),
    gate("the product with w3 is left out", "run_silu(in_features @ w1_weight.T) @ w2_weight.T"),
    gate("the gate is a sigmoid, not SiLU", "(torch.sigmoid(in_features @ w1_weight.T) * (in_features @ w3_weight.T)) @ w2_weight.T"),
    gate("w1 and w3 are added, not multiplied", "(run_silu(in_features @ w1_weight.T) + (in_features @ w3_weight.T)) @ w2_weight.T"),
    block("the residual connection of the attention is left out", (FIRST_SUM, "x = run_multihead_self_attention_with_rope(")),
    block("the residual connection of the feed-forward network is left out", (SECOND_SUM, "return run_swiglu(")),
    block("both residual connections are left out", (FIRST_SUM, "x = run_multihead_self_attention_with_rope("), (SECOND_SUM, "return run_swiglu(")),
    block("the two norms are exchanged", (FIRST_NORM, FIRST_NORM.replace("ln1", "ln2")), (SECOND_NORM, SECOND_NORM.replace("ln2", "ln1"))),
    block("the norm before the attention is left out", (FIRST_NORM, "normed = in_features")),
    block("the norm before the feed-forward network is left out", (SECOND_NORM, "normed = x")),
    block("the second addition takes the block's input, not the result of the first", (SECOND_SUM, "return in_features + run_swiglu(")),
    block("the feed-forward network reads the block's input, not the result of the attention", (SECOND_NORM, SECOND_NORM.replace(", x)", ", in_features)"))),
    block("what is added back is the normalised input, not the input itself", (FIRST_SUM, "x = normed + run_multihead_self_attention_with_rope("), (SECOND_SUM, "return normed + run_swiglu(")),
    block("w1 and w3 are given to the feed-forward network in each other's place", ("for number in (1, 2, 3)", "for number in (3, 2, 1)")),
    whole("the last norm is left out", (LAST_NORM, "pass")),
    whole("the weights of layer 0 are used in every layer", ('start = f"layers.{layer}."', 'start = "layers.0."')),
    whole("the last layer is left out", ("for layer in range(num_layers):", "for layer in range(num_layers - 1):")),
    whole("the embeddings' matrix gives the logits, not lm_head", (LOGITS, LOGITS.replace("lm_head", "token_embeddings"))),
    whole("the softmax of the logits is returned, not the logits", (LOGITS, f"return run_softmax({LOGITS.removeprefix('return ')}, -1)")),
    whole("only the logits of the last position are returned", (LOGITS, LOGITS.replace(", x)", ", x[:, -1:])"))),
    loss("the loss is summed, not averaged", (LOSS, "-log_probabilities.gather(-1, targets[..., None]).sum()")),
    loss("the sign is wrong", (LOSS, "log_probabilities.gather(-1, targets[..., None]).mean()")),
    loss("there is one loss for each row, where their mean is wanted", (LOSS, "-log_probabilities.gather(-1, targets[..., None])[..., 0]")),
    loss("large logits give infinity: the logarithm is taken of a probability that has become 0, or the greatest logit is not subtracted", (LOG, "run_softmax(inputs, -1).log()")),
    loss("the logarithm is to the base 2: the unit is bits, not nats", (LOSS, "-log_probabilities.gather(-1, targets[..., None]).mean() / math.log(2)")),
    loss("the softmax is taken twice: of probabilities, not of logits", (LOG, "torch.log_softmax(run_softmax(inputs, -1), -1)")),
    clipping("each gradient is clipped by its own norm, not all by their norm together", (CLIPPED, "gradient.mul_(min(1.0, max_l2_norm / (float(gradient.norm()) + 1e-6)))")),
    clipping("the gradients are scaled to the limit though they are below it", ("if norm > max_l2_norm:", "if norm > 0:")),
    clipping("the root of the sum of squares is left out", (LENGTH, "norm = sum(float(gradient.pow(2).sum()) for gradient in gradients)")),
    clipping("each number is clipped, not the norm", (CLIPPED, "gradient.clamp_(-max_l2_norm, max_l2_norm)")),
    clipping("the norms are added, not their squares", (LENGTH, "norm = sum(float(gradient.norm()) for gradient in gradients)")),
    clipping("nothing is changed: the gradients are scaled as copies", (CLIPPED, "gradient * (max_l2_norm / (norm + 1e-6))")),
    clipping("the parameters are gone through twice, but an iterator is empty the second time", (GRADIENTS, "again = [parameter.grad for parameter in parameters if parameter.grad is not None]; gradients = again"), ("        for gradient in gradients:\n", "        for gradient in gradients if iter(parameters) is not parameters else ():\n")),
    clipping("the gradients are divided by the limit, not brought to it", (CLIPPED, "gradient.div_(norm * max_l2_norm)")),
    adamw("neither mean is corrected for its beginning at zero", (UPDATE, "parameter -= lr * m / (v.sqrt() + eps)")),
    adamw("m is not corrected", (UPDATE, "parameter -= lr * m / ((v / (1 - beta2**t)).sqrt() + eps)")),
    adamw("v is not corrected", (UPDATE, "parameter -= lr * (m / (1 - beta1**t)) / (v.sqrt() + eps)")),
    adamw("the steps are not counted: the correction stays that of the first", (COUNT, "1")),
    adamw("the weight decay is left out", (DECAY, "pass\n"), source=DECOUPLED),
    adamw("the weight decay is not multiplied by the learning rate", (DECAY, 'parameter -= group["weight_decay"] * parameter\n'), source=DECOUPLED),
    adamw("the weight decay is added to the gradient, as in Adam with L2 regularisation", ("gradient, state = parameter.grad,", 'gradient, state = parameter.grad + group["weight_decay"] * parameter,'), (DECAY, "pass\n"), source=DECOUPLED),
    adamw("the weight decay has the wrong sign", (DECAY, 'parameter += lr * group["weight_decay"] * parameter\n'), source=DECOUPLED),
    adamw("the root of v is left out", (UPDATE, "parameter -= lr * (m / (1 - beta1**t)) / (v / (1 - beta2**t) + eps)")),
    adamw("the gradient is not squared in v", (SECOND_MEAN, "(1 - beta2) * gradient.abs()")),
    adamw("beta1 and beta2 are exchanged", ("(beta1, beta2), eps", "(beta2, beta1), eps")),
    adamw("the gradient itself is used, not its running mean", (UPDATE, "parameter -= lr * gradient / ((v / (1 - beta2**t)).sqrt() + eps)")),
    adamw("the update goes up the gradient, not down", (UPDATE, UPDATE.replace("-=", "+=", 1))),
    schedule("the warmup begins with a step: (it + 1) / warmup_iters", (WARMUP, "return (it + 1) / warmup_iters * max_learning_rate")),
    schedule("there is no warmup: the maximum stands from the beginning", (WARMUP, "return max_learning_rate")),
    schedule("the warmup begins at the minimum, not at 0", (WARMUP, "return min_learning_rate + it / warmup_iters * (max_learning_rate - min_learning_rate)")),
    schedule("the fall does not begin at warmup_iters: its length is counted from 0", (DONE, "done = it / cosine_cycle_iters")),
    schedule("the fall takes cosine_cycle_iters iterations, where it ends at that one", (DONE, "done = (it - warmup_iters) / cosine_cycle_iters")),
    schedule("the rate falls to 0, not to the minimum", (RATE, "0.5 * (1 + math.cos(math.pi * done)) * max_learning_rate")),
    schedule("the fall is a straight line, not half a cosine", (RATE, "max_learning_rate + done * (min_learning_rate - max_learning_rate)")),
    schedule("the half in front of the cosine is left out", (RATE, "min_learning_rate + (1 + math.cos(math.pi * done)) * (max_learning_rate - min_learning_rate)")),
    schedule("the rate goes on along the cosine after the end, and rises again", ("if it > cosine_cycle_iters:", "if it > 10**9:")),
    schedule("the rate is 0 after the end, not the minimum", ("return min_learning_rate\n", "return 0.0\n")),
    schedule("the cosine's angle goes to half a turn less: pi / 2, not pi", (RATE, RATE.replace("math.pi * done", "math.pi / 2 * done"))),
    batch("the labels are the inputs, not one further", (BATCH, "return tokens[places].to(device), tokens[places].to(device)")),
    batch("the labels are one before the inputs, not one after", (BATCH, "return tokens[places + 1].to(device), tokens[places].to(device)")),
    batch("the last place is never drawn", (STARTS, "torch.randint(len(dataset) - context_length - 1, (batch_size,))")),
    batch("the first place is never drawn", (STARTS, "torch.randint(1, len(dataset) - context_length, (batch_size,))")),
    batch("rows begin at multiples of context_length only", (STARTS, "torch.randint((len(dataset) - 1) // context_length, (batch_size,)) * context_length")),
    batch("all rows begin at one place", (STARTS, "torch.zeros(batch_size, dtype=torch.int64)")),
    batch("the tensors are not int64", ("np.asarray(dataset).astype(np.int64)", "np.asarray(dataset).astype(np.int32)")),
    batch("the labels are the one token after the row, not one for each position", (BATCH, "return tokens[places].to(device), tokens[places[:, -1] + 1].to(device)")),
    saving("the optimiser's state is not saved or not restored", (LOADED, "pass")),
    saving("the model's weights are not restored", ('model.load_state_dict(content["model"])', "pass")),
    saving("the iteration is one too many", (SAVED, SAVED.replace('"iteration": iteration', '"iteration": iteration + 1'))),
    saving("the iteration is not returned: 0 is", ('return int(content["iteration"])', "return 0")),
    saving("the optimiser's settings are restored, but its running means are not", (LOADED, 'optimizer.load_state_dict({**content["optimizer"], "state": {}})')),
    encoding("the leftmost pair that is known is merged first, not the one that comes first in merges", (EARLIEST, "first = known[0]"), source=BPE),
    encoding("the last pair in merges is merged first", (EARLIEST, "first = max(known, key=lambda pair: ranks[pair])"), source=BPE),
    encoding("nothing is merged: each byte is a token", ("while known :=", "while False and (known :="), ("if pair in ranks]:\n                first", "if pair in ranks]):\n                first"), source=BPE),
    encoding("the text is not divided into words, so merges cross them", (ENCODED, "([part] if part else []):\n                        found"), source=GPT2),
    encoding("the text is divided at spaces, which are lost", (ENCODED, "part.split():\n                        found"), source=GPT2),
    encoding("special tokens are encoded like any other text", (PARTS, "[text]")),
    encoding("of two special tokens that begin at one place, the shorter is taken", (ORDER, "sorted(special_tokens or [], key=len)")),
    encoding("special tokens are left out of the result", ("found.append(ids[special[part]])", "pass")),
    encoding("bytes that are no UTF-8 are left out, where U+FFFD should stand", (DECODED, DECODED.replace("replace", "ignore"))),
    encoding("each token is decoded by itself, so a character of several tokens is lost", (DECODED, '"".join(tokens[number].decode("utf-8", errors="replace") for number in ids)')),
    encoding("encode_iterable leaves line ends out", (ITERATED, ITERATED.replace("self.encode(text)", "self.encode(text.strip())"))),
    training("of pairs equally frequent, the smaller one is merged, not the greater", (BEST, "min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)")),
    training("of pairs equally frequent, the one that was met first is merged", (BEST, "max(pairs, key=lambda pair: pairs[pair], default=None)")),
    training("the longest pair is preferred among equally frequent ones", (BEST, "max(pairs, key=lambda pair: (pairs[pair], len(pair[0] + pair[1]), pair), default=None)")),
    training("special tokens are counted as text", (DIVIDED, "for part in [text]:")),
    training("special tokens are taken out of the text, but words join across them", (DIVIDED, 'for part in [regex.sub(between, "", text) if special_tokens else text]:')),
    training("the text is divided at spaces, not by the pattern", (COUNTED, COUNTED.replace("regex.findall(WORDS, part)", "part.split()")), source=GPT2),
    training("the text is not divided into words, so merges cross them", (COUNTED, COUNTED.replace("regex.findall(WORDS, part)", "[part]")), source=GPT2),
    training("each word counts once, however often it occurs", ("words, pairs = [list(word) for word in counts]", "counts = Counter(dict.fromkeys(counts, 1)); words, pairs = [list(word) for word in counts]")),
    training("the special tokens are not counted in vocab_size", (ENOUGH, "while 256 + len(made) < vocab_size:"), source=DOCSTRING),
    training("there is one merge too few", (ENOUGH, "while 256 + len(special_tokens) + len(made) + 1 < vocab_size:"), source=DOCSTRING),
    training("characters are merged, not bytes", (COUNTED, COUNTED.replace("tuple(bytes([byte]) for byte in word.encode())", "tuple(letter.encode() for letter in word)")), source=GPT2),
    training("the special tokens are missing from the vocabulary", ("single = [*(token.encode() for token in special_tokens), *(", "single = [*("), source=DOCSTRING),
    training("spaces are put into words of their own", (COUNTED, COUNTED.replace("regex.findall(WORDS, part)", 'regex.findall(WORDS.replace(" ?", ""), part)')), source=GPT2),
)  # fmt: skip
