"""What a model loses in each form it can be exported to: bytes, and perplexity on a text here and in llama.cpp.

    python benchmarks/exports.py MODEL --text valid.txt [--windows 16] [--length 512]

The text's first windows, each predicted from its own beginning, so that both programs score the same targets given the
same tokens. llama.cpp reads the GGUF files written here, and quantises the float32 one itself to the kinds that lie
beside int8 and int4 (q8_0 and q4_0), which are read here as well. It multiplies quantised weights with activations in
eight bits; so do kernels of ours where a form runs as it does by itself. In float32 the weights are dequantised.
"""

import argparse
import logging
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import llamita
from llamita.backend.interface import Forward
from llamita.cli.main import main as run_llamita
from llamita.evaluation.perplexity import score_sequences
from llamita.text.tokenizer import Tokenizer

GGUF = ("gguf-f32", "gguf-f16", "gguf-bf16", "gguf-q8_0")
QUANTISED = ("int8", "int4")
OF_LLAMA_CPP = ("q8_0", "q4_0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    windows = text_windows(Tokenizer.load(arguments.model), arguments.text, arguments.windows, arguments.length)
    table = Table(box=None, title=f"{len(windows)} windows of {arguments.length} tokens", title_justify="left")
    for column in ("form", "MB", "perplexity in float32", "as it runs", "in llama.cpp"):
        table.add_column(column, justify="left" if column == "form" else "right")
    with tempfile.TemporaryDirectory() as directory:
        forms = {"as it came": arguments.model} | exported(arguments.model, Path(directory))
        for name, path in forms.items():
            theirs = f"{llama_cpp_perplexity(path, windows):.3f}" if path.suffix == ".gguf" else ""
            ours = [f"{perplexity(path, windows, dtype):.3f}" for dtype in ("float32", "auto")]
            table.add_row(name, f"{megabytes(path):.1f}", *ours, theirs)
    Console().print(table)


def text_windows(tokenizer: Tokenizer, text: Path, windows: int, length: int) -> list[np.ndarray]:
    """The text's first tokens, `length` in each window."""
    characters = text.read_text("utf-8")[: 8 * windows * length]
    tokens = np.asarray(tokenizer.encode(characters))
    return [tokens[first : first + length] for first in range(0, len(tokens) - length + 1, length)][:windows]


def exported(model: Path, directory: Path) -> dict[str, Path]:
    """Every form by its name, written by the verbs that a user has; llama.cpp's own of the float32 file too."""
    forms = {}
    for kind in GGUF:
        forms[kind] = directory / f"{kind}.gguf"
        _llamita("convert", model, forms[kind], "--to", kind)
    _llamita("convert", model, directory / "directory")
    for kind in QUANTISED:
        forms[kind] = directory / kind
        _llamita("quantize", directory / "directory", forms[kind], "--to", kind)
    for kind in OF_LLAMA_CPP:
        forms[f"llama.cpp's {kind}"] = directory / f"llama-{kind}.gguf"
        quantized_by_llama_cpp(forms["gguf-f32"], forms[f"llama.cpp's {kind}"], kind)
    return forms


def _llamita(*arguments: str | Path) -> None:
    if status := run_llamita([str(argument) for argument in arguments]):
        raise SystemExit(status)


def megabytes(path: Path) -> float:
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files) / 1e6


def perplexity(model: Path, windows: list[np.ndarray], dtype: str) -> float:
    """Computed by PyTorch, or kernels of ours, on the CPU."""
    llm = llamita.load(model, backend="torch", device="cpu", dtype=dtype)
    return _perplexity(llm.runner, windows, llm.config.vocab_size)


def llama_cpp_perplexity(file: Path, windows: list[np.ndarray]) -> float:
    from llamita.storage.formats.llama_cpp import LlamaCppRunner

    runner = LlamaCppRunner(file)
    return _perplexity(runner, windows, runner.model.n_vocab())


def _perplexity(runner: Forward, windows: list[np.ndarray], vocab_size: int) -> float:
    scores = score_sequences(runner, windows, vocab_size)
    return float(np.exp(-np.concatenate([each.log_probabilities_T for each in scores]).mean(dtype=np.float64)))


def quantized_by_llama_cpp(file: Path, output: Path, kind: str) -> None:
    """Writes llama.cpp's own quantisation of a GGUF file, every matrix in that kind."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}[kind]
    options.pure = True
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # it names every array
    if llama_cpp.llama_model_quantize(str(file).encode(), str(output).encode(), options):
        raise SystemExit(f"llama.cpp could not quantise {file} to {kind}")


if __name__ == "__main__":
    main()
