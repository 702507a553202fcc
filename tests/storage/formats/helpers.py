"""What the tests of formats share: a small model, its rows in the order of other people's files, and their blocks."""

import gguf
import numpy as np

from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.parameters import initialize_parameters
from llamita.storage.formats.foreign import ForeignModel
from llamita.storage.gguf_header import read_header

CONFIG = ModelConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=16, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
)  # fmt: skip


def model(**changes) -> ForeignModel:
    config = ModelConfig(**(vars(CONFIG) | changes))
    return ForeignModel(config, {name: HostArray.from_numpy(a) for name, a in initialize_parameters(config, seed=3)})


def equal(one: ForeignModel, other: ForeignModel) -> bool:
    same = all(np.array_equal(one.arrays[name].to_numpy(), other.arrays[name].to_numpy()) for name in one.arrays)
    return same and one.config == other.config and list(one.arrays) == list(other.arrays)


def as_pairs(weight: np.ndarray, H: int) -> np.ndarray:
    """Row by row: what turns with pair i, rows i and i + H/2 of a head, goes to rows 2 i and 2 i + 1."""
    result = np.empty_like(weight)
    for start in range(0, len(weight), H):
        for i in range(H // 2):
            result[start + 2 * i] = weight[start + i]
            result[start + 2 * i + 1] = weight[start + i + H // 2]
    return result


def blocks(numbers, kind):
    """Returns a matrix in GGUF's blocks of some kind, (rows, bytes of a row). The library quantises to none of K: these
    are random, of about the size of weights and of few that are 0."""
    if not kind.name.endswith("_K"):
        return gguf.quants.quantize(numbers, kind)
    size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(numbers.size)
    found = generator.integers(0, 256, (len(numbers), numbers.shape[1] // size, block_bytes), dtype=np.uint8)
    scale = generator.uniform(0.5, 1.5, (*found.shape[:2], 1)) * {"Q4_K": 1e-4, "Q6_K": 1.5e-5}[kind.name]

    def half(x):
        return x.astype(np.float16).view(np.uint8)

    if kind.name == "Q4_K":
        found[..., :2], found[..., 2:4] = half(scale), half(7.5 * scale)
    else:
        found[..., 208:] = half(scale)
    return found.reshape(len(numbers), -1)


def finish(writer):
    """Writes all that a GGUF writer was given, and closes its file."""
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def rewritten(source, path, settings=None, kind=None, drop=lambda name: False, **options):
    """Writes a GGUF file anew, with other settings beside its own and its matrices in another number type, or in that
    which a function returns for a tensor's name; without those to `drop`, and as the writer's `options` say."""
    header = read_header(source)
    writer = gguf.GGUFWriter(path, header.metadata["general.architecture"], **options)
    for key, value in (header.metadata | (settings or {})).items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    for tensor in gguf.GGUFReader(source).tensors:
        if drop(tensor.name):
            continue
        if kind is None or len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        else:
            its_kind = kind(tensor.name) if callable(kind) else kind
            writer.add_tensor(tensor.name, blocks(tensor.data, its_kind), raw_dtype=its_kind)
    finish(writer)
    return path
