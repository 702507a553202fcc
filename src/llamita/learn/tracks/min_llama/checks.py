"""The checks of min-llama: each runs one function of the reader's on fixed inputs, and so the solution's.

`mine` holds the modules under judgement by their names (`mine.llama`, `mine.rope`), `right` those of the solutions.
What a function calls is taken from `right`, so that a mistake shows where it is made and nowhere else.
"""

from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch

from llamita.learn.checking import Check, Outputs

SIZES = {"vocab_size": 11, "dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 16, "hidden_dim": 20}


def rotary(mine: Any, right: Any) -> Outputs:
    query, key = numbers(1, 2, 5, 4, 8), numbers(2, 2, 5, 2, 8)
    first, second = mine.rope.apply_rotary_emb(query, key, 8, 16), mine.rope.apply_rotary_emb(query, key, 8, 16, 50.0)
    return {
        "query": array(first[0]),
        "key": array(first[1]),
        "query at theta=50": array(second[0]),
        "key at theta=50": array(second[1]),
    }


def normalised(mine: Any, right: Any) -> Outputs:
    return {"result": array(norm_of(mine)._norm(numbers(1, 2, 5, 24)))}


def norm_forward(mine: Any, right: Any) -> Outputs:
    norm, plain = norm_of(mine), norm_of(right)
    norm._norm = plain._norm
    x = numbers(1, 2, 5, 24)
    half = norm(x.bfloat16())
    return {"result": array(norm(x)), "result of a bfloat16 x": array(half)}


def scores(mine: Any, right: Any) -> Outputs:
    attention = randomised(mine.llama.Attention, right.llama.Attention, right)
    query, key, value = (numbers(seed, 2, 4, 5, 6) for seed in (1, 2, 3))
    plain = attention.compute_query_key_value_scores(query, key, value)
    attention.attn_dropout = Squared()
    return {
        "result": array(plain),
        "result where attn_dropout squares": array(attention.compute_query_key_value_scores(query, key, value)),
    }


def attention_forward(mine: Any, right: Any) -> Outputs:
    mine.llama.apply_rotary_emb = right.rope.apply_rotary_emb
    attention = randomised(mine.llama.Attention, right.llama.Attention, right)
    attention.compute_query_key_value_scores = MethodType(
        right.llama.Attention.compute_query_key_value_scores, attention
    )
    x = numbers(1, 2, 5, 24)
    plain = attention(x)
    attention.resid_dropout = Squared()
    return {"result": array(plain), "result where resid_dropout squares": array(attention(x))}


def swiglu(mine: Any, right: Any) -> Outputs:
    def made(modules: Any) -> Any:
        return modules.llama.FeedForward(24, 20, 32, 0.0)

    network = filled(made(mine), made(right))
    return {"result": array(network.SwiGLU(numbers(1, 2, 5, 24)))}


def layer_forward(mine: Any, right: Any) -> Outputs:
    layer = mine.llama.LlamaLayer(0, config_of(mine)).eval()
    plain = filled(right.llama.LlamaLayer(0, config_of(right)), right.llama.LlamaLayer(0, config_of(right)))
    for name in ("attention", "feed_forward", "attention_norm", "ffn_norm"):
        setattr(layer, name, getattr(plain, name))
    return {"result": array(layer(numbers(1, 2, 5, 24)))}


def whole_model(mine: Any, right: Any) -> Outputs:
    def made(modules: Any) -> Any:
        return modules.llama.Llama(config_of(modules))

    model = filled(made(mine), made(right))
    tokens = torch.tensor([[1, 5, 2, 9, 10], [3, 3, 0, 7, 4]])
    logits, hidden = model(tokens)
    every, _ = model(tokens, targets=tokens)
    return {"hidden states": array(hidden), "logits": array(logits), "logits of all positions": array(every)}


def greedy(mine: Any, right: Any) -> Outputs:
    model = with_fixed_logits(mine)
    return {"tokens": array(model.generate(torch.tensor([[1, 2], [4, 0], [3, 3]]), 6, temperature=0.0))}


def sampled(mine: Any, right: Any) -> Outputs:
    """Shares of the tokens among so many draws that chance moves them by less than the tolerance."""
    model, prompts = with_fixed_logits(mine), torch.arange(3).repeat_interleave(20000)[:, None]
    found: dict[str, np.ndarray] = {}
    for temperature in (0.5, 1.0, 2.0):
        torch.manual_seed(0)
        drawn = model.generate(prompts, 1, temperature=temperature)
        shares = torch.nn.functional.one_hot(drawn[:, -1], 6).float().view(3, -1, 6).mean(dim=1)
        found[f"share of each token after tokens 0, 1 and 2 at temperature {temperature}"] = array(shares)
    return found


def adamw(mine: Any, right: Any) -> Outputs:
    found: dict[str, np.ndarray] = {}
    for corrected in (True, False):
        weights = [torch.nn.Parameter(numbers(seed, 3, 4)) for seed in (1, 2, 3)]
        options = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 0.01, "weight_decay": 0.3, "correct_bias": corrected}
        optimizer = mine.optimizer.AdamW(weights, **options)
        for step in range(6):
            for number, weight in enumerate(weights[:2]):  # the third has no gradient
                weight.grad = numbers(10 * step + number, 3, 4)
            optimizer.step()
            if step in (0, 5):
                name = f"weights after step {step + 1}" + ("" if corrected else " without correct_bias")
                found[name] = array(torch.stack([weight.detach() for weight in weights]))
    return found


def classifier(mine: Any, right: Any) -> Outputs:
    def made(modules: Any) -> Any:
        modules.classifier.load_pretrained = lambda path: right.llama.Llama(config_of(right))
        config = SimpleNamespace(
            num_labels=3, pretrained_model_path="", option="finetune", pad_id=0, hidden_dropout_prob=0.3
        )
        return modules.classifier.LlamaEmbeddingClassifier(config)

    model = filled(made(mine), made(right))
    tokens = torch.tensor([[1, 5, 2, 0, 0, 0], [3, 7, 4, 6, 9, 8], [2, 10, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    plain = model(tokens)
    model.dropout = Squared()
    return {"result": array(plain), "result where dropout squares": array(model(tokens))}


CHECKS = (
    Check("apply_rotary_emb", "rope", rotary),
    Check("RMSNorm._norm", "llama", normalised),
    Check("RMSNorm.forward", "llama", norm_forward),
    Check("Attention.compute_query_key_value_scores", "llama", scores),
    Check("Attention.forward", "llama", attention_forward),
    Check("FeedForward.SwiGLU", "llama", swiglu),
    Check("LlamaLayer.forward", "llama", layer_forward),
    Check("Llama.generate at temperature 0", "llama", greedy),
    Check("Llama.generate at other temperatures", "llama", sampled, rtol=0.0, atol=0.025),
    Check("Llama.forward", "llama", whole_model, together=("rope",)),
    Check("AdamW.step", "optimizer", adamw),
    Check("LlamaEmbeddingClassifier.forward", "classifier", classifier),
)


class Squared(torch.nn.Module):
    """In the place of a dropout: squares, so that it is seen where a dropout is left out or in another place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def array(tensor: Any) -> np.ndarray:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"expected a tensor, got {'None' if tensor is None else type(tensor).__name__}")
    return tensor.detach().double().numpy()


def config_of(modules: Any) -> Any:
    return modules.config.LlamaConfig(**SIZES)


def norm_of(modules: Any) -> Any:
    norm = modules.llama.RMSNorm(24, eps=0.3)
    norm.weight.data = 1 + 0.5 * numbers(7, 24)
    return norm


def randomised(mine: Any, right: Any, modules: Any) -> Any:
    """Returns a module of the class `mine` with the weights that `filled` gives, ready to run."""
    return filled(mine(config_of(modules)), right(config_of(modules)))


def filled(module: torch.nn.Module, like: torch.nn.Module) -> Any:
    """Returns the module in evaluation mode, with the same random weights under the same names as `like`."""
    state = {
        name: 0.4 * numbers(index, *tensor.shape) for index, (name, tensor) in enumerate(like.state_dict().items())
    }
    for name in state:
        if name.endswith("norm.weight"):
            state[name] = 1 + state[name]
    if "tok_embeddings.weight" in state:
        state["tok_embeddings.weight"] = state["output.weight"]
    module.load_state_dict(state)
    return module.eval()


def with_fixed_logits(modules: Any) -> Any:
    """Returns a Llama of six tokens whose logits are a fixed table's row for the last token."""
    model = modules.llama.Llama(modules.config.LlamaConfig(**{**SIZES, "vocab_size": 6})).eval()
    table = 1.5 * numbers(3, 6, 6)

    def forward(tokens: torch.Tensor, targets: torch.Tensor | None = None) -> tuple[torch.Tensor, None]:
        return table[tokens] if targets is not None else table[tokens[:, -1:]], None

    model.forward = forward
    return model
