"""The MLX model against the float64 oracle and against the PyTorch model: layers, logits, loss, gradients, weights."""

import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("mlx.core", reason="mlx is not installed")
import mlx.core as mx

from llamita.backend.mlx.model import layers, weights
from llamita.backend.mlx.model.attention import Dropout
from llamita.backend.mlx.train.losses import chunked_cross_entropy
from llamita.backend.torch.model import weights as torch_weights
from llamita.backend.torch.train import losses as torch_losses
from llamita.model.host_array import HostArray
from llamita.model.parameters import initialize_parameters
from llamita.model.presets import PRESETS, preset
from llamita.storage import files, model_directory
from tests import reference
from tests.backend.torch.model.test_model import KINDS, VARIANTS, relative_difference, shrunk, small


def perturbed(config, seed=1) -> dict[str, HostArray]:
    """Fresh values, norms and biases moved off their ones and zeros, so that a wrong one shows."""
    random, arrays = np.random.default_rng(seed), {}
    for name, values in initialize_parameters(config, seed):
        if values.ndim == 1:
            values = values + 0.3 * random.standard_normal(values.shape).astype(np.float32)
        arrays[name] = HostArray.from_numpy(values)
    return arrays


def to_numpy(arrays) -> dict[str, np.ndarray]:
    return {name: array.to_numpy() for name, array in arrays.items()}


def random_tokens(config, *shape) -> np.ndarray:
    return np.random.default_rng(2).integers(0, config.vocab_size, shape, dtype=np.int32)


def random_labels(config, *shape) -> np.ndarray:
    labels = np.random.default_rng(3).integers(0, config.num_labels or config.vocab_size, shape, dtype=np.int32)
    labels[:, :2] = -100
    return labels


def forward(model, tokens_BT, **more) -> dict[str, np.ndarray]:
    """The residual stream at every place, and the logits."""
    seen = {}
    output = model(mx.array(tokens_BT), trace=lambda name, x: seen.update({name: x}), **more)
    return {name: np.array(x) for name, x in (seen | {"logits": output.logits_BTV}).items()}


def mlx_loss_and_gradients(model, tokens_BT, labels_BT, segments_BT=None):
    fused = list(model.fused_parameters())
    own = [item.parameter for item in fused]

    def loss(parameters):
        for item, values in zip(fused, parameters, strict=True):
            item.replace(values)
        hidden_BTD = model.hidden(tokens_BT, segments_BT=segments_BT)
        return chunked_cross_entropy(hidden_BTD, model.head, labels_BT, chunk_size=13)

    tokens_BT, labels_BT = mx.array(tokens_BT), mx.array(labels_BT)
    segments_BT = None if segments_BT is None else mx.array(segments_BT)
    nats, gradients = mx.value_and_grad(loss)(own)
    for item, values in zip(fused, own, strict=True):
        item.replace(values)
    parts = [
        zip(item.parts, item.split(gradient), strict=True) for item, gradient in zip(fused, gradients, strict=True)
    ]
    return nats.item(), {name: np.array(gradient) for pairs in parts for name, gradient in pairs}


def torch_loss_and_gradients(config, arrays, tokens_BT, labels_BT, segments_BT=None):
    model = torch_weights.build_model(config, arrays)
    segments_BT = None if segments_BT is None else torch.from_numpy(segments_BT)
    logits_BTV = model(torch.from_numpy(tokens_BT), segments_BT=segments_BT).logits_BTV
    nats = torch_losses.cross_entropy(logits_BTV, torch.from_numpy(labels_BT))
    nats.backward()
    pairs = [zip(item.parts, item.split(item.parameter.grad), strict=True) for item in model.fused_parameters()]
    return nats.item(), {name: gradient.numpy() for group in pairs for name, gradient in group}


def check_gradients(config, arrays, model, *batch):
    ours, gradients = mlx_loss_and_gradients(model, *batch)
    theirs, expected = torch_loss_and_gradients(config, arrays, *batch)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert gradients.keys() == expected.keys() == arrays.keys()
    for name, gradient in expected.items():
        assert relative_difference(gradients[name], gradient) < 1e-5, name
    return ours


@pytest.mark.parametrize("operations", ["PLAIN", "FUSED"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layer_follows_the_oracle_and_every_gradient_pytorch(variant, operations):
    config = small(**VARIANTS[variant])
    arrays, tokens_BT, labels_BT = perturbed(config), random_tokens(config, 2, 17), random_labels(config, 2, 17)
    model = weights.build_model(config, arrays, operations=getattr(layers, operations))
    seen = forward(model, tokens_BT)
    for row, tokens in enumerate(tokens_BT):
        expected = reference.forward(config, to_numpy(arrays), tokens)
        assert expected.keys() == seen.keys()
        for name, values in expected.items():
            assert relative_difference(seen[name][row], values) < 1e-5, name
    nats = check_gradients(config, arrays, model, tokens_BT, labels_BT)
    assert nats == pytest.approx(reference.cross_entropy(seen["logits"], labels_BT), rel=1e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_same_model_in_both_backends(name):
    config = shrunk(name)
    arrays, tokens_BT, labels_BT = perturbed(config), random_tokens(config, 2, 12), random_labels(config, 2, 12)
    model, seen = weights.build_model(config, arrays), {}
    ours = forward(model, tokens_BT)
    with torch.inference_mode():
        theirs = torch_weights.build_model(config, arrays).eval()
        output = theirs(torch.from_numpy(tokens_BT), trace=lambda name, x: seen.update({name: x.numpy()}))
    seen["logits"] = output.logits_BTV.numpy()
    expected = reference.forward(config, to_numpy(arrays), tokens_BT[0])
    assert ours.keys() == seen.keys() == expected.keys()
    for place in expected:
        assert relative_difference(ours[place], seen[place]) < 1e-5, place
        assert relative_difference(ours[place][0], expected[place]) < 1e-5, place
    check_gradients(config, arrays, model, tokens_BT, labels_BT)


SEGMENTS = np.array([[0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 0, 0]], dtype=np.int32)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 3}], ids=["whole", "window"])
def test_segments_keep_documents_apart_and_padding_out(changes):
    config = small(**changes)
    arrays, tokens_BT = perturbed(config), random_tokens(config, 1, 20)
    model = weights.build_model(config, arrays)
    logits = forward(model, tokens_BT, segments_BT=mx.array(SEGMENTS))["logits"][0]
    assert np.isfinite(logits).all()
    expected = reference.forward(config, to_numpy(arrays), tokens_BT[0], SEGMENTS[0])["logits"]
    real = SEGMENTS[0] > 0
    assert relative_difference(logits[real], expected[real]) < 1e-5
    check_gradients(config, arrays, model, tokens_BT, random_labels(config, 1, 20), SEGMENTS)


def test_a_padded_batch_on_the_left_equals_each_row_alone():
    config = small()
    model, tokens_BT = weights.build_model(config, perturbed(config)), random_tokens(config, 2, 12)
    padding = [0, 5]
    segments = mx.array([[0] * n + [1] * (12 - n) for n in padding])
    positions = mx.array([[0] * n + list(range(12 - n)) for n in padding])
    batch = forward(model, tokens_BT, segments_BT=segments, positions_BT=positions)["logits"]
    for row, n in enumerate(padding):
        alone = forward(model, tokens_BT[row : row + 1, n:])["logits"][0]
        assert relative_difference(batch[row, n:], alone) < 1e-5


class Memory:
    """The contract of a cache in a few lines: all that one sequence's layers were shown so far."""

    def __init__(self):
        self.seen, self.positions_1T, self.longest = {}, None, 0

    def begin(self, tokens: int) -> "Memory":
        self.positions_1T = mx.arange(self.longest, self.longest + tokens)[None]
        self.longest += tokens
        return self

    def attend(self, layer, q_TNH, k_TKH, v_TKH):
        before = self.seen.get(layer, ())
        self.seen[layer] = tuple(
            mx.concatenate([old, new]) if before else new
            for old, new in zip(before or (None, None), (k_TKH, v_TKH), strict=True)
        )
        k, v = (x.swapaxes(0, 1) for x in self.seen[layer])
        return layers.FUSED.attention(q_TNH.swapaxes(0, 1), k, v, causal=True).swapaxes(0, 1)


@pytest.mark.parametrize("operations", ["PLAIN", "FUSED"])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_through_a_cache_give_the_logits_of_the_whole(kind, operations):
    config = small(num_key_value_heads=KINDS[kind])
    model = weights.build_model(config, perturbed(config), operations=getattr(layers, operations))
    tokens_BT, memory, logits, start = random_tokens(config, 1, 21), Memory(), [], 0
    for size in (9, 1, 1, 7, 3):
        chunk = mx.array(tokens_BT[:, start : start + size])
        logits.append(np.array(model(chunk, cache=memory.begin(size)).logits_BTV[0]))
        start += size
    assert relative_difference(np.concatenate(logits), forward(model, tokens_BT)["logits"][0]) < 1e-5


@pytest.mark.parametrize("variant", ["plain", "tied", "biases", "classifier", "qwen3"])
@pytest.mark.parametrize("initialization", ["fan-in", "gpt-2"])
def test_a_seed_gives_the_bytes_that_pytorch_starts_from(variant, initialization):
    config = small(**VARIANTS[variant])
    ours = weights.to_host_arrays(weights.build_model(config, seed=5, initialization=initialization))
    theirs = torch_weights.to_host_arrays(torch_weights.build_model(config, seed=5, initialization=initialization))
    assert list(ours) == list(theirs)
    for name, array in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape)
        assert bytes(ours[name].data) == bytes(array.data), name


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
def test_weights_of_every_type_are_read_from_a_mapped_file(dtype, tmp_path):
    """What is kept in bfloat16 comes out with the same bytes; wider types are rounded once, as by PyTorch."""
    config, torch_dtype = small(), torch_weights.TORCH_DTYPES[dtype]
    arrays = {
        name: torch_weights.host_from_tensor(torch_weights.tensor_from_host(array).to(torch_dtype))
        for name, array in perturbed(config).items()
    }
    with files.atomic_directory(tmp_path / "m") as directory:
        model_directory.save_config(directory, config, dtype)
        model_directory.save_tensors(directory, arrays)
    mapped = model_directory.load_tensors(tmp_path / "m")
    for ours_dtype, theirs_dtype in ((mx.float32, torch.float32), (mx.bfloat16, torch.bfloat16)):
        ours = weights.to_host_arrays(weights.build_model(config, mapped, dtype=ours_dtype))
        theirs = torch_weights.to_host_arrays(torch_weights.build_model(config, mapped, dtype=theirs_dtype))
        for name, array in theirs.items():
            assert ours[name].dtype == array.dtype
            assert bytes(ours[name].data) == bytes(array.data), name


def test_a_bfloat16_model_stays_in_bfloat16_and_near_float32():
    config = small(query_key_norm=True)
    arrays, tokens_BT = perturbed(config), random_tokens(config, 2, 17)
    full = forward(weights.build_model(config, arrays), tokens_BT)["logits"]
    output = weights.build_model(config, arrays, dtype=mx.bfloat16)(mx.array(tokens_BT))
    assert output.logits_BTV.dtype == output.hidden_BTD.dtype == mx.bfloat16
    assert relative_difference(np.array(output.logits_BTV.astype(mx.float32)), full) < 0.05


def test_wrong_weights_are_all_listed_and_damaged_ones_named():
    config = small()
    arrays = perturbed(config)
    arrays["model.layers.7.bogus"] = arrays.pop("model.norm.weight")
    arrays["lm_head.weight"] = arrays["model.layers.0.self_attn.k_proj.weight"]
    model = weights.build_model(config)
    for load in (lambda: weights.build_model(config, arrays), lambda: weights.load_host_arrays(model, arrays)):
        with pytest.raises(ValueError, match="do not fit") as error:
            load()
        for words in ("model.norm.weight is missing", "bogus is not part", "lm_head.weight has shape [16, 32]"):
            assert words in str(error.value)
    damaged, name = perturbed(config), "model.layers.1.self_attn.k_proj.weight"
    values = damaged[name].to_numpy().copy()
    values[3, 4] = np.nan
    damaged[name] = HostArray.from_numpy(values)
    with pytest.raises(ValueError, match=r"k_proj\.weight holds NaN or infinite values"):
        weights.build_model(config, damaged)


def test_loaded_weights_are_those_that_are_saved():
    config = small(attention_bias=True)
    arrays, model = perturbed(config, seed=4), weights.build_model(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights.load_host_arrays(model, arrays)
    saved = weights.to_host_arrays(model)
    assert all(bytes(saved[name].data) == bytes(array.data) for name, array in arrays.items())


def test_fresh_logits_have_unit_scale():
    """Fan-in initialisation keeps activations of size one, so the first loss is that of a fresh guess."""
    model = weights.build_model(preset("tiny", num_hidden_layers=2))
    assert 0.5 < forward(model, random_tokens(model.config, 2, 32))["logits"].std() < 2.0


def test_dropout_acts_only_where_it_is_passed():
    config = small(dropout=0.2)
    model, tokens_BT = weights.build_model(config), mx.array(random_tokens(config, 1, 8))
    plain = model.hidden(tokens_BT)
    assert mx.array_equal(plain, model.hidden(tokens_BT))
    first, again, other = (model.hidden(tokens_BT, dropout=Dropout(0.2, mx.random.key(n))) for n in (1, 1, 2))
    assert mx.array_equal(first, again)
    assert not mx.array_equal(first, other)
    assert not mx.array_equal(first, plain)
