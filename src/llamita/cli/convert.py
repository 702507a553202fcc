"""`llamita convert`: turns models of other formats into Hugging Face directories and back."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from llamita.workflows.convert import ConvertConfig


@dataclass(frozen=True)
class ConvertCommandConfig:
    """Convert a model to another form, and check that the copy gives the same logits before it is kept."""

    source: tyro.conf.Positional[Path]
    """A Hugging Face directory or hub name, a training run or a checkpoint of one, a GGUF file, llama2.c's .bin or
    .pt, the guided course's .pt, a directory of Meta's, or mini-llama's .safetensors; the kind is told by the
    content."""
    destination: tyro.conf.Positional[Path]
    """The directory or file to write."""
    options: ConvertConfig = ConvertConfig()


def run(config: ConvertCommandConfig) -> None:
    from llamita.backend.choice import load_backend
    from llamita.backend.torch.pickles import read_pickle, write_pickle
    from llamita.workflows.convert import Tools, convert

    tools = Tools(load_backend("torch"), read_pickle, write_pickle)
    done = convert(config.source, config.destination, config.options, tools)
    print(f"{config.source}: {done.kind}, {done.config.num_hidden_layers} layers of width {done.config.hidden_size}")
    equal = "its logits equal the source's" if done.difference == 0 else f"its logits differ by {done.difference:.1e}"
    print(f"{config.destination}: written as {config.options.to}; {equal}")
    if not done.has_tokenizer and config.options.to == "huggingface":
        print("It has no tokenizer; --tokenizer adds one, and without it llamita generate takes --prompt-tokens")
