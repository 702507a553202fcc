"""What distinguishes the families of models: a record for each.

A family is known by switches of `ModelConfig`; its record says which those are, how its `config.json` spells them, and
how GGUF names its tensors. Adding a family that needs no new switch is adding its record to `FAMILIES`. Knows nothing
of tensors or files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from llamita.model.rope import check_number, read_rope, rope_object

if TYPE_CHECKING:
    from llamita.model.config import ModelConfig

Values = Mapping[str, Any]
"""The content of a `config.json`."""

SWITCHES = (
    *("attention_bias", "query_key_value_bias", "mlp_bias", "query_key_norm", "norm_all_heads"),
    *("sliding_window", "full_attention_layers", "full_attention_at", "layers_without_rope", "rope_local_base_freq"),
    *("hidden_act", "norm_placement", "unit_offset_norm"),
    *("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)
"""Fields of `ModelConfig` that no family has all of."""


@dataclass(frozen=True)
class Gguf:
    """A family in llama.cpp's files."""

    architecture: str
    rotates_pairs: bool = False
    """Whether queries and keys rotate pairs (2 i, 2 i + 1) there, where models rotate halves."""
    tensors: Mapping[str, str] = field(default_factory=dict)
    """Tensors of a layer: their names there, and here; those of `GGUF_LAYER` where nothing is said."""
    numbers: Mapping[str, str] = field(default_factory=dict)
    """Keys of its metadata that hold a switch as a number: the key without the architecture, and the switch."""
    read: Callable[[Values], dict[str, Any]] = lambda values: {}
    """Switches that follow from the shape alone, since llama.cpp's code has them; `values` as in `config.json`."""


GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Family:
    """A family of models. `ModelConfig` asks the record for all that is not common to all families."""

    model_type: str
    classes: str
    """The beginning of the names of its classes in transformers, `Llama` of `LlamaForCausalLM`."""
    mark: str
    """What distinguishes it, as an error message names it."""
    is_marked: Callable[[ModelConfig], bool]
    """Whether a config has that; the first family of `FAMILIES` that is marked is the config's own."""
    switches: tuple[str, ...]
    """The switches that its models may have; all others keep their defaults."""
    implied: Callable[[Values], dict[str, Any]] = lambda values: {}
    """Values of switches that `config.json` does not spell out: all its models have them."""
    defaults: Values = field(default_factory=dict)
    """What transformers takes where a key is missing from `config.json`."""
    read: Callable[[Values], dict[str, Any]] = lambda values: {}
    """Keys of `config.json` to switches, beyond the keys that are named like them."""
    write: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}
    """Switches to keys of `config.json`, beyond the fields that are keys of every family."""
    keys: tuple[str, ...] = ()
    """Switches that are keys of its `config.json` under their own names."""
    other_keys: tuple[str, ...] = ()
    """Further keys that `read` reads."""
    rope: Callable[[Values], dict[str, Any]] = read_rope
    """The rotary positions of `config.json` in one object: those of full attention where layers differ."""
    classifier: str = ""
    """The beginning of the name of its class for classification, where that is another."""
    gguf: Gguf | None = None

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError for a switch that the family lacks, or one that differs from what all its models have."""
        usual = {field.name: field.default for field in fields(config)}
        for name in SWITCHES:
            if name not in self.switches and getattr(config, name) != usual[name]:
                raise ValueError(
                    f"{name}={getattr(config, name)!r} does not go with {self.mark}: no family of models has both, so "
                    "nothing else could open the model"
                )
        for name, value in self.implied({"hidden_size": config.hidden_size}).items():
            if getattr(config, name) != value:
                raise ValueError(
                    f"{name}={getattr(config, name)!r} does not go with {self.mark}: models of the family "
                    f"{self.model_type} have {value!r}, and nothing else could open the model"
                )


def family_of(config: ModelConfig) -> Family:
    """Returns the family that has the switches of a config."""
    return next(family for family in FAMILIES if family.is_marked(config))


def family_in_gguf(architecture: Any) -> Family:
    """Returns the family of a GGUF file's architecture; ValueError for one that Llamita does not have."""
    families = [family for family in reversed(FAMILIES) if family.gguf is not None]
    for family in families:
        if family.gguf is not None and family.gguf.architecture == architecture:
            return family
    known = ", ".join(family.gguf.architecture for family in families if family.gguf is not None)
    raise ValueError(f"general.architecture={architecture!r} is not supported; Llamita has {known}")


def family_named(model_type: Any) -> Family:
    """Returns the family of a `model_type`; ValueError that says why for one that Llamita does not have."""
    found = next((family for family in FAMILIES if family.model_type == model_type), None)
    if found is not None:
        return found
    if model_type in REFUSED:
        raise ValueError(f"model_type={model_type!r} in config.json is not supported: {REFUSED[model_type]}")
    known = ", ".join(family.model_type for family in reversed(FAMILIES))
    raise ValueError(f"model_type={model_type!r} in config.json is not supported; Llamita has {known}")


# --- sliding windows -------------------------------------------------------------------------------------------------


def _layer_types(values: Values) -> list[str] | None:
    """The kind of attention of each layer, where the config lists them."""
    types = values.get("layer_types")
    if types is None:
        return None
    if not (isinstance(types, list) and all(isinstance(kind, str) for kind in types)):
        raise ValueError("layer_types in config.json must be a list of names")
    if set(types) - {"sliding_attention", "full_attention"} or len(types) != values["num_hidden_layers"]:
        raise ValueError("layer_types in config.json has other kinds of attention, or another number of layers")
    return types


def _no_window(values: Values) -> dict[str, Any]:
    if window := values.get("sliding_window") or 0:
        raise ValueError(
            f"sliding_window={window!r} in config.json is not supported for the family {values.get('model_type')}; "
            "mistral has it"
        )
    return {}


def _window_of_later_layers(values: Values) -> dict[str, Any]:
    """A window that begins after so many full layers (Qwen), or at once (Mistral)."""
    window = values.get("sliding_window") or 0
    full = 0
    if values["model_type"] != "mistral":
        window = window if values.get("use_sliding_window") else 0
        full = values.get("max_window_layers") or 0
    if (types := _layer_types(values)) is not None:
        slides = [kind == "sliding_attention" for kind in types]
        full = len(slides) - sum(slides)
        if slides != sorted(slides) or (values["model_type"] == "mistral" and 0 < full < len(slides)):
            raise ValueError("layer_types in config.json mixes kinds of attention in an order that is not supported")
    if not window or full >= values["num_hidden_layers"]:
        return {}
    return {"sliding_window": window, "full_attention_layers": full}


def _write_qwen_window(config: ModelConfig) -> dict[str, Any]:
    windowed = {"sliding_window": config.sliding_window} if config.sliding_window else {}
    return windowed | {
        "use_sliding_window": bool(config.sliding_window),
        "max_window_layers": config.full_attention_layers if config.sliding_window else config.num_hidden_layers,
    }


# --- Gemma -----------------------------------------------------------------------------------------------------------


def _implied_by_gemma(values: Values) -> dict[str, Any]:
    return {
        "norm_placement": "both",
        "unit_offset_norm": True,
        "hidden_act": "gelu_pytorch_tanh",
        "embedding_multiplier": values["hidden_size"] ** 0.5,
    }


def _read_gemma(values: Values) -> dict[str, Any]:
    act = values.get("hidden_activation") or "gelu_pytorch_tanh"  # transformers does not read hidden_act either
    if act != "gelu_pytorch_tanh":
        raise ValueError(f"hidden_activation={act!r} in config.json is not supported; Llamita has gelu_pytorch_tanh")
    if values.get("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention in config.json is not supported: attention is causal here")
    check_number("query_pre_attn_scalar", values["query_pre_attn_scalar"], 0.0)
    layers, every = values["num_hidden_layers"], 2
    if values["model_type"] != "gemma2":
        every = values.get("sliding_window_pattern") or 6
    types = _layer_types(values)
    full = tuple(
        layer
        for layer in range(layers)
        if (types[layer] == "full_attention" if types is not None else (layer + 1) % every == 0)
    )
    window = values.get("sliding_window") or 0
    if len(full) == layers:
        window = 0
    return {
        "sliding_window": window,
        "full_attention_at": full if window else (),
        "attention_multiplier": values["query_pre_attn_scalar"] ** -0.5,
        "attn_logit_softcapping": values.get("attn_logit_softcapping") or 0.0,
        "final_logit_softcapping": values.get("final_logit_softcapping") or 0.0,
    }


def _read_gemma3(values: Values) -> dict[str, Any]:
    local = rope_object(rope_object(values, "rope_parameters"), "sliding_attention")
    if local.get("rope_type", local.get("type", "default")) != "default":
        raise ValueError(
            "rope_parameters in config.json scales the positions of sliding layers, which is not supported"
        )
    theta = local.get("rope_theta") or values.get("rope_local_base_freq") or 10000.0
    return _read_gemma(values) | {"rope_local_base_freq": theta}


def _rope_of_gemma3(values: Values) -> dict[str, Any]:
    """Those of full attention. Its old `rope_scaling` goes over the keys of `rope_parameters`; one that does not tell
    the two kinds of layers apart is not read."""
    full = rope_object(rope_object(values, "rope_parameters"), "full_attention")
    scaling = {**full, **rope_object(values, "rope_scaling")}
    return read_rope({**values, "rope_parameters": scaling, "rope_scaling": None}, 1e6)


def _write_gemma(config: ModelConfig) -> dict[str, Any]:
    scalar = round(config.attention_multiplier**-2, 6)
    windows = [config.window(layer) for layer in range(config.num_hidden_layers)]
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "sliding_window": config.sliding_window or None,
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
        "attn_logit_softcapping": config.attn_logit_softcapping or None,
        "final_logit_softcapping": config.final_logit_softcapping or None,
    }


def _write_gemma3(config: ModelConfig) -> dict[str, Any]:
    scaling = {"rope_type": "default"} if config.rope_scaling is None else config.rope_scaling.to_dict()
    return _write_gemma(config) | {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": config.rope_local_base_freq},
            "full_attention": scaling | {"rope_theta": config.rope_theta},
        },
    }


def _gguf_gemma(values: Values, every: int, largest: int) -> dict[str, Any]:
    """Which layers slide, and the scale of attention: in the largest model that of the width a head, else of a head."""
    layers, heads = values["num_hidden_layers"], values["num_attention_heads"]
    scalar = values["hidden_size"] / heads if layers == largest else values["head_dim"]
    return {"full_attention_at": tuple(range(every - 1, layers, every)), "attention_multiplier": scalar**-0.5}


GEMMA = (
    *("norm_placement", "unit_offset_norm", "hidden_act", "embedding_multiplier", "attention_multiplier"),
    *("attn_logit_softcapping", "final_logit_softcapping", "sliding_window", "full_attention_at", "attention_bias"),
)
GEMMA_KEYS = (
    *("hidden_activation", "query_pre_attn_scalar", "use_bidirectional_attention", "sliding_window"),
    *("sliding_window_pattern", "_sliding_window_pattern", "attn_logit_softcapping", "final_logit_softcapping"),
)
GEMMA_DEFAULTS = {
    "tie_word_embeddings": True,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "num_key_value_heads": 4,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GEMMA_TENSORS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


# --- Granite ---------------------------------------------------------------------------------------------------------


def _read_granite(values: Values) -> dict[str, Any]:
    if values.get("attention_multiplier") is not None:
        check_number("attention_multiplier", values["attention_multiplier"], 0.0)
    return _no_window(values)


# --- SmolLM 3 --------------------------------------------------------------------------------------------------------


def _read_smollm3(values: Values) -> dict[str, Any]:
    if values.get("use_sliding_window"):
        raise ValueError("use_sliding_window in config.json is not supported for the family smollm3")
    if values.get("sliding_window") and "sliding_attention" in (_layer_types(values) or ()):
        raise ValueError(
            "layer_types in config.json has layers that slide, which the family smollm3 does not have here"
        )
    layers = values["num_hidden_layers"]
    turned = values.get("no_rope_layers")  # in spite of its name: 1 for a layer with rotary positions
    if turned is None:
        every = values.get("no_rope_layer_interval") or 4
        turned = [int((layer + 1) % every != 0) for layer in range(layers)]
    if not isinstance(turned, list) or len(turned) != layers or set(turned) - {0, 1}:
        raise ValueError(f"no_rope_layers in config.json must be a list of num_hidden_layers={layers} zeros and ones")
    return {"layers_without_rope": tuple(layer for layer in range(layers) if not turned[layer])}


def _write_smollm3(config: ModelConfig) -> dict[str, Any]:
    turned = [int(layer not in config.layers_without_rope) for layer in range(config.num_hidden_layers)]
    return {"no_rope_layers": turned, "use_sliding_window": False, "sliding_window": None}


# --- the records -----------------------------------------------------------------------------------------------------

LLAMA_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2}
QWEN_DEFAULTS = {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")

FAMILIES: tuple[Family, ...] = (
    Family(
        model_type="gemma3_text",
        classes="Gemma3",
        classifier="Gemma3Text",
        mark="norms before and after each sublayer, and query_key_norm",
        is_marked=lambda config: config.norm_placement == "both" and config.query_key_norm,
        switches=(*GEMMA, "query_key_norm", "rope_local_base_freq"),
        implied=lambda values: _implied_by_gemma(values) | {"query_key_norm": True},
        defaults=GEMMA_DEFAULTS | {"max_position_embeddings": 131072},
        read=_read_gemma3,
        rope=_rope_of_gemma3,
        write=_write_gemma3,
        keys=("attention_bias", "rope_local_base_freq"),
        other_keys=GEMMA_KEYS,
        gguf=Gguf(
            "gemma3",
            tensors=GEMMA_TENSORS,
            numbers={"attention.sliding_window": "sliding_window", "rope.freq_base_swa": "rope_local_base_freq"},
            read=lambda values: _gguf_gemma(values, every=6, largest=62) | {"rope_local_base_freq": 10000.0},
        ),
    ),
    Family(
        model_type="gemma2",
        classes="Gemma2",
        mark="norms before and after each sublayer",
        is_marked=lambda config: config.norm_placement == "both",
        switches=GEMMA,
        implied=_implied_by_gemma,
        defaults=GEMMA_DEFAULTS
        | {"max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        read=_read_gemma,
        write=_write_gemma,
        keys=("attention_bias",),
        other_keys=GEMMA_KEYS,
        gguf=Gguf(
            "gemma2",
            tensors=GEMMA_TENSORS,
            numbers={
                "attention.sliding_window": "sliding_window",
                "attn_logit_softcapping": "attn_logit_softcapping",
                "final_logit_softcapping": "final_logit_softcapping",
            },
            read=lambda values: _gguf_gemma(values, every=2, largest=46),
        ),
    ),
    Family(
        model_type="olmo2",
        classes="Olmo2",
        mark="norms after each sublayer",
        is_marked=lambda config: config.norm_placement == "after",
        switches=("norm_placement", "query_key_norm", "norm_all_heads", "attention_bias"),
        implied=lambda values: {"norm_placement": "after", "query_key_norm": True, "norm_all_heads": True},
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "eos_token_id": 50279, "pad_token_id": 1},
        read=_no_window,
        keys=("attention_bias",),
        gguf=Gguf(
            "olmo2",
            tensors={
                "post_attention_norm": "post_attention_layernorm",
                "post_ffw_norm": "post_feedforward_layernorm",
            },
        ),
    ),
    Family(
        model_type="smollm3",
        classes="SmolLM3",
        mark="layers_without_rope",
        is_marked=lambda config: bool(config.layers_without_rope),
        switches=("layers_without_rope", "attention_bias", "mlp_bias"),
        defaults={
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-6,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "pad_token_id": 128004,
        },
        read=_read_smollm3,
        rope=lambda values: read_rope(values, 2e6),
        write=_write_smollm3,
        keys=("attention_bias", "mlp_bias"),
        other_keys=("no_rope_layers", "no_rope_layer_interval", "sliding_window"),
        gguf=Gguf(
            "smollm3",
            rotates_pairs=True,
            read=lambda values: {"layers_without_rope": tuple(range(3, values["num_hidden_layers"], 4))},
        ),
    ),
    Family(
        model_type="granite",
        classes="Granite",
        mark="multipliers",
        is_marked=lambda config: any(
            getattr(config, name) != (0.0 if name == "attention_multiplier" else 1.0) for name in MULTIPLIERS
        ),
        switches=(*MULTIPLIERS, "attention_bias", "mlp_bias"),
        defaults=LLAMA_DEFAULTS | dict.fromkeys(MULTIPLIERS, 1.0),
        read=_read_granite,
        keys=(*MULTIPLIERS, "attention_bias", "mlp_bias"),
        gguf=Gguf(
            "granite",
            rotates_pairs=True,
            numbers={
                "embedding_scale": "embedding_multiplier",
                "attention.scale": "attention_multiplier",
                "residual_scale": "residual_multiplier",
                "logit_scale": "logits_scaling",
            },
        ),
    ),
    Family(
        model_type="qwen3",
        classes="Qwen3",
        mark="query_key_norm",
        is_marked=lambda config: config.query_key_norm,
        switches=("query_key_norm", "attention_bias", "sliding_window", "full_attention_layers"),
        implied=lambda values: {"query_key_norm": True},
        defaults=QWEN_DEFAULTS | {"head_dim": 128},
        read=_window_of_later_layers,
        write=_write_qwen_window,
        keys=("attention_bias",),
        gguf=Gguf("qwen3"),
    ),
    Family(
        model_type="qwen2",
        classes="Qwen2",
        mark="query_key_value_bias",
        is_marked=lambda config: config.query_key_value_bias,
        switches=("query_key_value_bias", "sliding_window", "full_attention_layers"),
        implied=lambda values: {"query_key_value_bias": True},
        defaults=QWEN_DEFAULTS,
        read=_window_of_later_layers,
        write=_write_qwen_window,
        gguf=Gguf("qwen2"),
    ),
    Family(
        model_type="mistral",
        classes="Mistral",
        mark="a sliding_window",
        is_marked=lambda config: config.sliding_window > 0,
        switches=("sliding_window",),
        defaults=LLAMA_DEFAULTS | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        read=_window_of_later_layers,
        write=lambda config: {"sliding_window": config.sliding_window},
    ),
    Family(
        model_type="llama",
        classes="Llama",
        mark="",
        is_marked=lambda config: True,
        switches=("attention_bias", "mlp_bias"),
        defaults=LLAMA_DEFAULTS,
        read=_no_window,
        keys=("attention_bias", "mlp_bias"),
        gguf=Gguf("llama", rotates_pairs=True),
    ),
)
"""Every family, those with more to mark them first."""

_EXPERTS = "it is a mixture of experts, and every layer here has one feed-forward network"
_IMAGES = "it reads images too; its text model alone can be loaded where it has a directory of its own"
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "phimoe", "gpt_oss", "llama4"), _EXPERTS
    ),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), f"{_EXPERTS}, and keys and values are not compressed"),
    **dict.fromkeys(("gemma3", "mllama", "llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3"), _IMAGES),
    "gemma": "it is Gemma 1, of which Llamita has 2 and 3",
    "gemma3n": "its layers read embeddings of their own",
    "olmo": "it is OLMo 1, whose norms have no weights; Llamita has OLMo 2",
    "olmo3": "its sliding layers turn by other rotary positions than OLMo 2's",
    "phi3": "it rotates a part of each head, or stretches positions by longrope",
    "phi": "it rotates a part of each head",
    "stablelm": "it rotates a part of each head",
    "cohere": "its attention and feed-forward network run side by side",
    "gpt2": "its positions are learned, not rotary",
    "falcon": "its attention and feed-forward network run side by side",
}
