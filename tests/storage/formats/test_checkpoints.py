"""Training checkpoints of other code: names, layouts and shards, held to an independent forward pass."""

from pathlib import Path

import numpy as np
import pytest

from llamita.model.host_array import HostArray
from llamita.model.rope import RopeScaling
from llamita.storage.formats import checkpoints
from llamita.storage.formats.foreign import ForeignModel, to_meta_names
from tests.storage.formats.helpers import as_pairs, equal, model

SOURCE = Path("model.pt")
ARGUMENTS = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 96,
    "multiple_of": 32,
    "max_seq_len": 16,
}


META = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": -1}


def plain(ours: ForeignModel) -> dict[str, np.ndarray]:
    return {name: array.to_numpy() for name, array in ours.arrays.items()}


def meta_state(ours: ForeignModel, course: bool = False) -> dict[str, HostArray]:
    """The state that llama2.c's (or the course's) trainer would have saved, name by name."""
    names = {"q": "compute_query", "k": "compute_key", "v": "compute_value", "o": "compute_output"}
    if not course:
        names = {letter: f"w{letter}" for letter in "qkvo"}
    weights, state = plain(ours), {}
    state["tok_embeddings.weight"] = weights["model.embed_tokens.weight"]
    for i in range(ours.config.num_hidden_layers):
        ours_i, theirs_i = f"model.layers.{i}", f"layers.{i}"
        for letter, name in names.items():
            weight = weights[f"{ours_i}.self_attn.{letter}_proj.weight"]
            state[f"{theirs_i}.attention.{name}.weight"] = as_pairs(weight, 8) if letter in "qk" else weight
        state[f"{theirs_i}.feed_forward.w1.weight"] = weights[f"{ours_i}.mlp.gate_proj.weight"]
        state[f"{theirs_i}.feed_forward.w2.weight"] = weights[f"{ours_i}.mlp.down_proj.weight"]
        state[f"{theirs_i}.feed_forward.w3.weight"] = weights[f"{ours_i}.mlp.up_proj.weight"]
        state[f"{theirs_i}.attention_norm.weight"] = weights[f"{ours_i}.input_layernorm.weight"]
        state[f"{theirs_i}.ffn_norm.weight"] = weights[f"{ours_i}.post_attention_layernorm.weight"]
    state["norm.weight"] = weights["model.norm.weight"]
    state["output.weight"] = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return {name: HostArray.from_numpy(np.ascontiguousarray(array)) for name, array in state.items()}


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("course", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_a_training_checkpoint_is_read(prefix, course, tied):
    ours = model(tie_word_embeddings=tied)
    state = {prefix + name: array for name, array in meta_state(ours, course).items()}
    content = {"model_args": ARGUMENTS | {"dropout": 0.0}, "model": state, "iter_num": 5}
    assert equal(checkpoints.from_training_checkpoint(SOURCE, content), ours)
    blocks = {name.replace("layers.0.", "layers.0._orig_mod."): array for name, array in state.items()}
    assert equal(checkpoints.from_training_checkpoint(SOURCE, content | {"model": blocks}), ours)
    content["model_args"] = ARGUMENTS | {"rope_theta": 500.0}
    assert checkpoints.from_training_checkpoint(SOURCE, content).config.rope_theta == 500.0


@pytest.mark.parametrize("names", ["meta", "course"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_training_checkpoint_is_written(names, tied):
    ours = model(tie_word_embeddings=tied)
    content = checkpoints.to_training_checkpoint(ours, names)
    expected = meta_state(ours, names == "course")
    assert content["model"].keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(content["model"][name].to_numpy(), array.to_numpy()), name
    assert equal(checkpoints.from_training_checkpoint(SOURCE, content), ours)


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("cut", ["embedding", "vocabulary"])
def test_metas_shards_are_joined(shards, cut):
    """Cut as model parallelism cuts: outputs of wq, wk, wv, w1, w3 and output; inputs of wo and w2; the embedding by
    its width (Llama 1 and 2) or its vocabulary (Llama 3)."""
    ours = model(tie_word_embeddings=False, num_key_value_heads=4)
    parts: list[dict[str, HostArray]] = [{} for _ in range(shards)]
    for name, array in meta_state(ours).items():
        kind = name.split(".")[-2]
        axis = 1 if kind in ("wo", "w2") or (kind == "tok_embeddings" and cut == "embedding") else 0
        whole = array.to_numpy()
        pieces = [whole] * shards if whole.ndim == 1 else np.split(whole, shards, axis)
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = HostArray.from_numpy(np.ascontiguousarray(piece))
        for part in parts:
            part["rope.freqs"] = HostArray.from_numpy(np.ones(4, dtype=np.float32))
    parameters = {"dim": 32, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5, "vocab_size": -1, "max_seq_len": 16}
    assert equal(checkpoints.from_meta_shards(SOURCE, parameters, parts), ours)


def test_metas_parameters_tell_the_positions():
    ours = model(tie_word_embeddings=False)
    base = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5}

    def read(**more):
        return checkpoints.from_meta_shards(SOURCE, base | more, [meta_state(ours)]).config

    assert (read().max_position_embeddings, read().rope_theta) == (4096, 10000.0)
    assert read(rope_theta=500000.0).max_position_embeddings == 8192
    scaled = read(rope_theta=500000.0, use_scaled_rope=True)
    assert (scaled.max_position_embeddings, scaled.rope_scaling) == (131072, RopeScaling("llama3", 8.0, 8192))


PUBLISHED = {  # model -> Meta's params.json, and the factor and the positions of its published config.json
    "LLaMA 7B": ({"dim": 4096, "n_layers": 32, "n_heads": 32, "norm_eps": 1e-6}, None, 2048),
    "LLaMA 30B": ({"dim": 6656, "n_layers": 60, "n_heads": 52}, None, 2048),
    "LLaMA 65B": ({"dim": 8192, "n_layers": 80, "n_heads": 64}, None, 2048),
    "Llama 2 70B": ({"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8}, None, 4096),
    "Llama 2 7B": ({"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256}, None, 4096),
    "Llama 3 8B": (
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "rope_theta": 500000.0}, None, 8192,
    ),
    "Code Llama 7B": ({"dim": 4096, "n_layers": 32, "n_heads": 32, "rope_theta": 1000000.0}, None, 16384),
    "Llama 3.1 8B": (
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "rope_theta": 500000.0, "use_scaled_rope": True},
        8.0, 131072,
    ),
    "Llama 3.1 405B": (
        {"dim": 16384, "n_layers": 126, "n_heads": 128, "n_kv_heads": 8, "rope_theta": 500000.0,
         "use_scaled_rope": True},
        8.0, 131072,
    ),
    "Llama 3.2 1B": (
        {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "rope_theta": 500000.0, "use_scaled_rope": True},
        32.0, 131072,
    ),
    "Llama 3.2 3B": (
        {"dim": 3072, "n_layers": 28, "n_heads": 24, "n_kv_heads": 8, "rope_theta": 500000.0, "use_scaled_rope": True},
        32.0, 131072,
    ),
    "Llama 3.3 70B": (
        {"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "rope_theta": 500000.0, "use_scaled_rope": True},
        8.0, 131072,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_metas_models_have_the_scaling_of_their_published_config(name):
    parameters, factor, positions = PUBLISHED[name]
    config = checkpoints.meta_config(SOURCE, {"norm_eps": 1e-5, **parameters}, vocab_size=128256, intermediate_size=64)
    expected = (
        None if factor is None else RopeScaling("llama3", factor, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    )
    assert (config.rope_scaling, config.max_position_embeddings) == (expected, positions)
    assert config.rope_theta == parameters.get("rope_theta", 10000.0)
    assert (config.hidden_size, config.num_hidden_layers) == (parameters["dim"], parameters["n_layers"])
    assert config.num_key_value_heads == parameters.get("n_kv_heads", parameters["n_heads"])


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"rope_scaling_factor": 16.0}, RopeScaling("llama3", 16.0, 8192)),
        ({"rope_scaling_factor": 16, "rope_high_freq_factor": 1.5}, RopeScaling("llama3", 16, 8192, 1.0, 1.5)),
        ({"high_freq_factor": 2.0, "low_freq_factor": 0.5}, RopeScaling("llama3", 8.0, 8192, 0.5, 2.0)),
        ({"rope_scaling_factor": None}, RopeScaling("llama3", 8.0, 8192)),
        ({"use_scaled_rope": False, "rope_scaling_factor": 16.0}, None),
    ],
)
def test_metas_parameters_may_give_the_scaling(parameters, expected):
    base = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "rope_theta": 500000.0, "use_scaled_rope": True}
    for given in (base | parameters, {"model": base | parameters}):
        found = checkpoints.from_meta_shards(SOURCE, given, [meta_state(model(tie_word_embeddings=False))])
        assert found.config.rope_scaling == expected


@pytest.mark.parametrize(
    "key", [
        {"moe": {"num_experts": 8}}, {"moe_args": {"num_experts": 16}}, {"quantization_args": {"group_size": 32}},
        {"lora_args": {"rank": 16}}, {"vision_chunk_size": 448}, {"yarn": {"factor": 16}}, {"use_qk_norm": True},
        {"nope_layer_interval": 4}, {"attention_chunk_size": 8192}, {"rope_scaling": {"factor": 8}},
    ],
)  # fmt: skip
def test_other_mathematics_is_refused_by_its_key_in_params_json(key):
    with pytest.raises(ValueError, match=f"{next(iter(key))}=.* in params.json is not supported"):
        checkpoints.from_meta_shards(SOURCE, META | key, [meta_state(model(tie_word_embeddings=False))])


def test_keys_of_params_json_that_nobody_knows_are_named():
    state = meta_state(model(tie_word_embeddings=False))
    with pytest.warns(UserWarning, match=r"params\.json has keys that Llamita does not know, and ignores: a_new_one$"):
        checkpoints.from_meta_shards(SOURCE, META | {"a_new_one": 3, "use_qk_norm": False, "moe": None}, [state])


def test_mistrals_parameters_are_read_too():
    """A window, and heads of a size of their own: names are Meta's."""
    ours = model(tie_word_embeddings=False, sliding_window=8)
    found = checkpoints.from_meta_shards(
        SOURCE, META | {"sliding_window": 8, "head_dim": 8, "hidden_dim": 64, "max_seq_len": 16}, [meta_state(ours)]
    )
    assert equal(found, ours)
    wide = model(tie_word_embeddings=False, head_dim=16)
    state = meta_state(ours) | {
        f"layers.{i}.attention.w{letter}.weight": HostArray.from_numpy(
            as_pairs(weight, 16) if letter in "qk" else weight
        )
        for i in range(2)
        for letter in "qkvo"
        for weight in [plain(wide)[f"model.layers.{i}.self_attn.{letter}_proj.weight"]]
    }
    config = checkpoints.from_meta_shards(SOURCE, META | {"head_dim": 16, "max_seq_len": 16}, [state]).config
    assert config == wide.config


def test_rotary_tables_of_every_layer_and_of_complex_numbers_are_left_out():
    """Llama 1 has one in each layer; a table of complex numbers comes as a text, of which PyTorch's reader tells."""
    ours = model(tie_word_embeddings=False)
    tables = {f"layers.{i}.attention.inner_attention.rope.freqs": meta_state(ours)["norm.weight"] for i in range(2)}
    found = checkpoints.from_meta_shards(
        SOURCE, META | {"max_seq_len": 16}, [meta_state(ours) | tables | {"freqs_cis": "complex64"}]
    )
    assert equal(found, ours)
    with pytest.raises(ValueError, match=r"norm\.weight is no array in every shard \(float8_e4m3fn\)"):
        checkpoints.from_meta_shards(SOURCE, META, [meta_state(ours) | {"norm.weight": "float8_e4m3fn"}])


@pytest.mark.parametrize("holds_output", [True, False])
def test_metas_tied_models(holds_output):
    """Llama 3.2 1B and 3B: the output head is the embedding, which the file holds twice or once."""
    ours = model(tie_word_embeddings=True)
    state = meta_state(ours)
    if not holds_output:
        del state["output.weight"]
    parameters = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5}
    found = checkpoints.from_meta_shards(SOURCE, parameters, [state])
    assert found.config.tie_word_embeddings
    assert "lm_head.weight" not in found.arrays


def mini_llama_state(ours: ForeignModel) -> dict[str, HostArray]:
    weights, state = plain(ours), {}
    state["embd_toks.weight"] = weights["model.embed_tokens.weight"]
    for i in range(ours.config.num_hidden_layers):
        ours_i, theirs_i = f"model.layers.{i}", f"layers.{i}"
        projections = [weights[f"{ours_i}.self_attn.{letter}_proj.weight"] for letter in "qkv"]
        state[f"{theirs_i}.attn.attn_proj.weight"] = np.concatenate(projections)
        state[f"{theirs_i}.attn.out_proj.weight"] = weights[f"{ours_i}.self_attn.o_proj.weight"]
        state[f"{theirs_i}.pre_norm.weight"] = weights[f"{ours_i}.input_layernorm.weight"]
        state[f"{theirs_i}.ffn_norm.weight"] = weights[f"{ours_i}.post_attention_layernorm.weight"]
        for name in ("gate_proj", "up_proj", "down_proj"):
            state[f"{theirs_i}.ffn.{name}.weight"] = weights[f"{ours_i}.mlp.{name}.weight"]
    state["out_norm.weight"] = weights["model.norm.weight"]
    state["lm_head.weight"] = weights["lm_head.weight"]
    return {name: HostArray.from_numpy(array) for name, array in state.items()}


def test_mini_llamas_fused_projections_are_taken_apart():
    ours = model(tie_word_embeddings=False, num_key_value_heads=4)
    state = mini_llama_state(ours)
    assert checkpoints.is_mini_llama(list(state))
    assert not checkpoints.is_mini_llama(list(ours.arrays))
    assert equal(checkpoints.from_mini_llama(SOURCE, state, 4, 16), ours)
    with pytest.raises(ValueError, match="does not say how many attention heads it has; give --heads"):
        checkpoints.from_mini_llama(SOURCE, state, 0, 16)
    state["layers.0.attn.bogus.weight"] = state["out_norm.weight"]
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.bogus\.weight, which no mini-llama has"):
        checkpoints.from_mini_llama(SOURCE, state, 4, 16)


def without(state: dict, name: str) -> dict:
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: {"model": content["model"]}, "holds no model_args and model"),
        (lambda content: [1], "holds no model_args and model"),
        (lambda content: content | {"model_args": ARGUMENTS | {"n_heads": 0}}, "n_heads=0 must be a positive"),
        (lambda content: content | {"model_args": without(ARGUMENTS, "dim")}, "dim=None must be a positive"),
        (lambda content: content | {"model": {}}, "lacks tok_embeddings"),
        (lambda content: content | {"model": without(content["model"], "norm.weight")}, "norm.weight is missing"),
        (lambda content: content | {"model": content["model"] | {"x.y": content["model"]["norm.weight"]}}, "holds x.y"),
        (lambda content: content | {"model_args": ARGUMENTS | {"n_layers": 3}}, "layers.2.*is missing"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(change, words):
    content = {"model_args": ARGUMENTS, "model": to_meta_names(model())}
    with pytest.raises(ValueError, match=words):
        checkpoints.from_training_checkpoint(SOURCE, change(content))
