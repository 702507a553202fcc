"""The Llama itself: normalisation, attention, the feed-forward network, a layer of them, the model, and generation."""

import math

import torch
from base_llama import LlamaPreTrainedModel
from config import LlamaConfig
from rope import apply_rotary_emb
from torch import nn
from torch.nn import functional as F
from utils import read_checkpoint


class RMSNorm(nn.Module):
    """Root mean square normalisation (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x divided by the root mean square over its last axis, without the weight. The shape stays.

        Source: equation 4 of the paper; here `self.eps` is added to the mean of the squares, inside the root, so that
        a vector of zeros is divided by something.
        """
        # to do: one line.
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        # done

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x normalised and multiplied by the weight. x: (..., dim); the shape and the number type stay.

        The normalisation is computed in float32, whatever the number type of x.
        """
        # to do: `_norm` of x in float32, back in x's number type, times the weight.
        return self._norm(x.float()).type_as(x) * self.weight
        # done


class Attention(nn.Module):
    """Causal self-attention with grouped queries (https://arxiv.org/abs/2305.13245, section 2.2)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.n_local_heads = config.n_heads
        self.n_local_kv_heads = config.n_kv_heads or config.n_heads
        assert self.n_local_heads % self.n_local_kv_heads == 0
        self.n_rep = self.n_local_heads // self.n_local_kv_heads
        self.head_dim = config.dim // config.n_heads
        self.max_seq_len = config.max_seq_len
        self.rope_theta = config.rope_theta
        self.compute_query = nn.Linear(config.dim, self.n_local_heads * self.head_dim, bias=False)
        self.compute_key = nn.Linear(config.dim, self.n_local_kv_heads * self.head_dim, bias=False)
        self.compute_value = nn.Linear(config.dim, self.n_local_kv_heads * self.head_dim, bias=False)
        self.compute_output = nn.Linear(self.n_local_heads * self.head_dim, config.dim, bias=False)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)

    def compute_query_key_value_scores(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Returns the mean of the values for each query, weighted by how well the keys match it.

        query, key, value and the result: (batch, n_local_heads, seqlen, head_dim). A position sees itself and those
        before it, never one after it. `self.attn_dropout` goes over the weights before they meet the values.

        Source: Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762), equation 1 and, for the mask, section 3.2.3.
        """
        # to do: products of queries and keys, scaled; the mask; a softmax over the keys; dropout; the weighted values.
        seqlen = query.shape[2]
        scores = query @ key.transpose(-2, -1) / math.sqrt(self.head_dim)
        later = torch.ones(seqlen, seqlen, dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
        weights = self.attn_dropout(F.softmax(scores, dim=-1))
        return weights @ value
        # done

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns what each position gathers from those that it sees. x and the result: (batch, seqlen, dim).

        With grouped queries, query heads 0 to n_rep - 1 share key and value head 0, the next n_rep share head 1, and
        so on. Positions are turned into queries and keys, not into values.
        """
        # to do: the three projections, divided into heads; `apply_rotary_emb` at theta=self.rope_theta; each key and
        #        value head n_rep times; heads before positions; `compute_query_key_value_scores`; heads side by side
        #        again; the projection `compute_output` and `resid_dropout`.
        batch, seqlen, _ = x.shape
        query = self.compute_query(x).view(batch, seqlen, self.n_local_heads, self.head_dim)
        key = self.compute_key(x).view(batch, seqlen, self.n_local_kv_heads, self.head_dim)
        value = self.compute_value(x).view(batch, seqlen, self.n_local_kv_heads, self.head_dim)
        query, key = apply_rotary_emb(query, key, self.head_dim, self.max_seq_len, self.rope_theta)
        key = key.repeat_interleave(self.n_rep, dim=2)
        value = value.repeat_interleave(self.n_rep, dim=2)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        output = self.compute_query_key_value_scores(query, key, value)
        output = output.transpose(1, 2).reshape(batch, seqlen, -1)
        return self.resid_dropout(self.compute_output(output))
        # done


class FeedForward(nn.Module):
    """The feed-forward network with a gate (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int | None, multiple_of: int, dropout: float) -> None:
        super().__init__()
        if hidden_dim is None:
            hidden_dim = multiple_of * math.ceil(int(2 * 4 * dim / 3) / multiple_of)
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)  # the gate
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)  # down
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)  # up
        self.dropout = nn.Dropout(dropout)

    def SwiGLU(self, x: torch.Tensor) -> torch.Tensor:
        """Returns what passes the gate. x: (..., dim); the result: (..., hidden_dim).

        Source: the paper's equation 6 up to its last product: Swish (SiLU) of the gate `w1`, times `w3`.
        """
        # to do: one line.
        return F.silu(self.w1(x)) * self.w3(x)
        # done

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x and the result: (..., dim)."""
        return self.dropout(self.w2(self.SwiGLU(x)))


class LlamaLayer(nn.Module):
    """One layer: attention and the feed-forward network, each behind a norm and beside a residual connection."""

    def __init__(self, layer_id: int, config: LlamaConfig) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config.dim, config.hidden_dim, config.multiple_of, config.dropout)
        self.attention_norm = RMSNorm(config.dim, eps=config.layer_norm_eps)
        self.ffn_norm = RMSNorm(config.dim, eps=config.layer_norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the hidden states after this layer. x and the result: (batch, seqlen, dim).

        Source: Touvron et al. 2023 (https://arxiv.org/abs/2302.13971), section 2.2: the input of each half is
        normalised, not its output. What is added back is the input before its norm.
        """
        # to do: attention on the normalised x, added to x; then the same with the feed-forward network.
        h = x + self.attention(self.attention_norm(x))
        return h + self.feed_forward(self.ffn_norm(h))
        # done


class Llama(LlamaPreTrainedModel):
    """The model: embeddings, layers, a last norm, and logits from the embeddings' own matrix."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.params = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(LlamaLayer(layer_id, config) for layer_id in range(config.n_layers))
        self.norm = RMSNorm(config.dim, eps=config.layer_norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.tok_embeddings.weight = self.output.weight  # one matrix for both
        self.init_weights()
        for name, parameter in self.named_parameters():
            if name.endswith(("w3.weight", "compute_output.weight")):
                nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layers))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns logits and the hidden states after the last norm.

        tokens: (batch, seqlen). The logits are (batch, 1, vocab_size), of the last position alone, or
        (batch, seqlen, vocab_size) where targets are given. The hidden states are (batch, seqlen, dim).
        """
        h = self.dropout(self.tok_embeddings(tokens))
        for layer in self.layers:
            h = layer(h)
        h = self.norm(h)
        return self.output(h if targets is not None else h[:, [-1], :]), h

    @torch.inference_mode()
    def generate(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0) -> torch.Tensor:
        """Returns idx with max_new_tokens more tokens in each row. idx: (batch, seqlen), the prompts.

        At temperature 0 each token is the most likely one. At any other, the logits are divided by the temperature,
        and the token is drawn from their softmax. Nothing is cached: each new token reads everything again.
        """
        for _ in range(max_new_tokens):
            seen = idx[:, -self.params.max_seq_len :]  # the model is made for no more positions
            logits = self(seen)[0][:, -1, :]  # (batch, vocab_size)
            # to do: idx_next, (batch, 1), the next token of each row.
            if temperature == 0.0:
                idx_next = logits.argmax(dim=-1, keepdim=True)
            else:
                probabilities = F.softmax(logits / temperature, dim=-1)
                idx_next = torch.multinomial(probabilities, num_samples=1)
            # done
            idx = torch.cat((idx, idx_next), dim=1)
        return idx


def load_pretrained(checkpoint: str, dropout: float | None = None) -> Llama:
    """Returns the model of a checkpoint: `stories.pt`, or llama2.c's `stories42M.pt`."""
    arguments, state = read_checkpoint(checkpoint)
    if dropout is not None:
        arguments = {**arguments, "dropout": dropout}
    model = Llama(LlamaConfig.from_arguments(arguments))
    if not torch.equal(state["tok_embeddings.weight"], state["output.weight"]):  # a model with two matrices
        model.tok_embeddings = nn.Embedding(model.vocab_size, model.config.dim)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or [name for name in unexpected if not name.endswith("freqs_cos") and not name.endswith("freqs_sin")]:
        raise ValueError(f"{checkpoint} does not fit: missing {missing}, unexpected {unexpected}")
    return model
