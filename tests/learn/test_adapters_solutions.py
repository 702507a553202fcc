"""The adapters' solutions against PyTorch's operators, transformers and the tokenizers library."""

import io
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from torch.nn import functional as F

from llamita.learn.harness import assembled
from tests.learn.graded import Graded

ADAPTERS = Graded("adapters", "torch")


@pytest.fixture(scope="module")
def solutions() -> Any:
    return assembled(ADAPTERS.files(), ["adapters"]).adapters


@pytest.fixture(scope="module")
def checks() -> Any:
    return ADAPTERS.module("checks")


def test_small_functions_are_pytorchs(solutions: Any) -> None:
    x, weight, tokens = torch.randn(2, 3, 6) * 10, torch.randn(5, 6), torch.tensor([[0, 4], [2, 2]])
    torch.testing.assert_close(solutions.run_linear(6, 5, weight, x), F.linear(x, weight))
    torch.testing.assert_close(solutions.run_embedding(5, 6, weight, tokens), F.embedding(tokens, weight))
    torch.testing.assert_close(solutions.run_silu(x), F.silu(x))
    torch.testing.assert_close(solutions.run_softmax(100 * x, 1), F.softmax(100 * x, 1))
    torch.testing.assert_close(solutions.run_rmsnorm(6, 0.1, weight[0], x), F.rms_norm(x, (6,), weight[0], 0.1))
    logits, targets = 300 * torch.randn(7, 9), torch.randint(9, (7,))
    torch.testing.assert_close(solutions.run_cross_entropy(logits, targets), F.cross_entropy(logits, targets))
    query, key, value = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 7, 6), torch.randn(2, 3, 7, 6)
    mask = torch.randn(2, 3, 4, 7) > 0
    mask[..., 0] = True
    for chosen in (None, mask):
        got = solutions.run_scaled_dot_product_attention(query, key, value, chosen)
        torch.testing.assert_close(got, F.scaled_dot_product_attention(query, key, value, chosen))


def test_heads_are_those_of_pytorchs_multihead_attention(solutions: Any) -> None:
    module = torch.nn.MultiheadAttention(24, 3, bias=False, batch_first=True)
    weights = [*module.in_proj_weight.detach().chunk(3), module.out_proj.weight.detach()]
    x = torch.randn(2, 5, 24)
    with torch.no_grad():
        expected, _ = module(x, x, x, attn_mask=torch.ones(5, 5, dtype=torch.bool).triu(1))
    torch.testing.assert_close(solutions.run_multihead_self_attention(24, 3, *weights, x), expected)


def test_rotary_is_a_product_with_complex_numbers(solutions: Any) -> None:
    x, positions = torch.randn(2, 3, 5, 8), torch.tensor([4, 0, 7, 2, 9])
    turn = np.exp(1j * positions.numpy()[:, None] * 300.0 ** (-np.arange(0, 8, 2) / 8))
    turned = (x[..., 0::2] + 1j * x[..., 1::2]).numpy() * turn
    expected = np.stack((turned.real, turned.imag), -1).reshape(x.shape)
    np.testing.assert_allclose(solutions.run_rope(8, 300.0, 16, x, positions), expected, atol=1e-6)


def test_the_model_gives_the_logits_of_transformers(solutions: Any) -> None:
    """transformers pairs the halves of a head, so its query and key rows are in another order."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=3, rope_theta=300.0, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.4)
    halves = torch.arange(24).view(3, 2, 4).transpose(1, 2).reshape(-1)  # neighbours 0 1 2 3 stand at 0 4 1 5
    names = {"self_attn": "attn", "o_proj": "output_proj", "mlp": "ffn", "gate_proj": "w1", "down_proj": "w2"}
    names |= {"up_proj": "w3", "input_layernorm": "ln1", "post_attention_layernorm": "ln2"}
    names |= {"embed_tokens": "token_embeddings", "norm": "ln_final"}
    weights = {}
    for name, tensor in model.state_dict().items():
        parts = [names.get(part, part) for part in name.removeprefix("model.").split(".")]
        reordered = tensor[halves] if parts[-2] in ("q_proj", "k_proj") else tensor
        weights[".".join(parts)] = reordered
    tokens = torch.randint(31, (2, 9))
    with torch.no_grad():
        expected = model(tokens).logits
    got = solutions.run_transformer_lm(31, 16, 24, 2, 3, 40, 300.0, weights, tokens)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_the_checks_leave_room_for_rounding(checks: Any) -> None:
    """In float64 the whole model differs from float32 by far less than what is counted as wrong."""
    seen: list[dict[str, np.ndarray]] = []
    adapters = assembled(ADAPTERS.files(), ["adapters"]).adapters

    def twice(run: Any, name: str) -> None:
        def double(*arguments: Any) -> Any:
            def wider(value: Any) -> Any:
                if isinstance(value, dict):
                    return {key: wider(each) for key, each in value.items()}
                return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

            return getattr(adapters, name)(*map(wider, arguments))

        plain, exact = run(getattr(adapters, name)), run(double)
        seen.append({key: np.abs(plain[key] - exact[key]) / (1e-5 + 1e-4 * np.abs(exact[key])) for key in plain})

    twice(checks.block, "run_transformer_block")
    twice(checks.whole_model, "run_transformer_lm")
    twice(checks.multihead_with_rope, "run_multihead_self_attention_with_rope")
    assert max(float(ratio.max()) for each in seen for ratio in each.values()) < 0.3


def test_clipping_adamw_and_schedule_are_pytorchs(solutions: Any) -> None:
    def parameters() -> list[torch.nn.Parameter]:
        torch.manual_seed(1)
        found = [torch.nn.Parameter(torch.randn(3, 4)) for _ in range(3)]
        for parameter in found[:2]:
            parameter.grad = torch.randn(3, 4)
        return found

    for limit in (0.5, 50.0):
        mine, others = parameters(), parameters()
        solutions.run_gradient_clipping(iter(mine), limit)
        torch.nn.utils.clip_grad_norm_(others, limit)
        for one, other in zip(mine[:2], others[:2], strict=True):
            torch.testing.assert_close(one.grad, other.grad)
    options: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 0.01, "weight_decay": 0.3}
    mine, others = parameters(), parameters()
    optimizers = solutions.get_adamw_cls()(mine, **options), torch.optim.AdamW(others, **options)
    for step in range(10):
        for one, other in zip(mine[:2], others[:2], strict=True):
            one.grad = torch.sin(torch.arange(12.0) * (step + 1)).view(3, 4)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(mine, others, strict=True):
        torch.testing.assert_close(one, other)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=14, eta_min=0.1)
    for iteration in range(7, 22):
        rate = solutions.run_get_lr_cosine_schedule(iteration, 1.0, 0.1, 7, 21)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    assert [solutions.run_get_lr_cosine_schedule(it, 1.0, 0.1, 4, 8) for it in (0, 1, 9, 99)] == [0, 0.25, 0.1, 0.1]


def of_library(vocab: dict[int, bytes], merges: list[tuple[bytes, bytes]]) -> tokenizers.Tokenizer:
    """The tokenizers library's byte-level BPE with this vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    pairs = [(spelled(left), spelled(right)) for left, right in merges]
    found = tokenizers.Tokenizer(models.BPE({spelled(token): number for number, token in vocab.items()}, pairs))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return found


def test_the_tokenizer_is_the_librarys(solutions: Any, checks: Any, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text(checks.TEXT, "utf-8")
    trained = solutions.run_train_bpe(tmp_path / "corpus.txt", 330, ["<|end|>"])
    for vocab, merges in (checks.reference_bpe(), trained):
        library = of_library(vocab, merges)
        mine = solutions.get_tokenizer(vocab, merges)
        for text in (checks.TEXT, "don't  stop\n\n 1234 é🙂", "aaaaaaaaa  "):
            assert mine.encode(text) == library.encode(text).ids
            assert mine.decode(mine.encode(text)) == text
    marked = solutions.get_tokenizer(vocab, merges, ["<|end|>"])
    library.add_special_tokens(["<|end|>"])
    assert marked.encode("low<|end|> new") == library.encode("low<|end|> new").ids
    assert list(marked.encode_iterable(io.StringIO("low\nnew\n"))) == marked.encode("low\nnew\n")


def test_merges_are_those_of_the_obvious_program(solutions: Any, checks: Any, tmp_path: Path) -> None:
    """Counted anew for every merge, over words that the library divides."""
    (tmp_path / "corpus.txt").write_text(checks.TEXT, "utf-8")
    vocab, merges = solutions.run_train_bpe(tmp_path / "corpus.txt", 300, list(checks.SPECIAL))
    divide = pre_tokenizers.Split(tokenizers.Regex(solutions.WORDS), "isolated")
    parts = checks.TEXT.replace("<|end|>", "<|endoftext|>").split("<|endoftext|>")
    words = [[bytes([b]) for b in word.encode()] for part in parts for word, _ in divide.pre_tokenize_str(part)]
    for merge in merges:
        counts: dict[tuple[bytes, bytes], int] = {}
        for word in words:
            for left, right in itertools.pairwise(word):
                counts[left, right] = counts.get((left, right), 0) + 1
        assert merge == max(counts, key=lambda pair: (counts[pair], pair))
        for word in words:
            place = 0
            while place < len(word) - 1:
                if (word[place], word[place + 1]) == merge:
                    word[place : place + 2] = [merge[0] + merge[1]]
                place += 1
    assert len(vocab) == 300
    assert len(merges) == 300 - 256 - 2


@pytest.mark.parametrize("name", sorted(ADAPTERS.module("figures").FIGURES))
def test_figures_can_be_drawn(name: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    ADAPTERS.module("figures").FIGURES[name](figure)
    assert all(axes.has_data() or axes.patches for axes in figure.axes)


def test_checkpoints_restore_what_was_saved(solutions: Any, checks: Any, tmp_path: Path) -> None:
    model, optimizer = checks.trained(seed=1, steps=3)
    solutions.run_save_checkpoint(model, optimizer, 7, tmp_path / "checkpoint")
    again, other = checks.trained(seed=2, steps=1)
    assert solutions.run_load_checkpoint(tmp_path / "checkpoint", again, other) == 7
    for one, two in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, atol=0, rtol=0)
    state: Any = SimpleNamespace(**other.state_dict())
    torch.testing.assert_close(state.state[0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
