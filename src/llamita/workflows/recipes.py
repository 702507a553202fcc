"""Recipes: whole trainings under a name, each a short function that says how it differs from a common base.

A recipe is what other people's well-known small Llamas were trained with, as far as that is known, or a sensible choice
where it is not; its docstring says which. It holds configurations and runs nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from llamita.data.prepare import PrepareConfig
from llamita.text.bpe import TokenizerTrainingConfig
from llamita.training.config import RunConfig, with_options
from llamita.workflows.pretrain import PretrainConfig


@dataclass(frozen=True)
class Recipe:
    """The steps of a training, in their order. Files are the reader's own, by the names that they usually have."""

    tokenizer: TokenizerTrainingConfig
    prepare: PrepareConfig
    train: PretrainConfig
    afterwards: tuple[str, ...] = ()
    """Commands for the trained model."""


def base(name: str, text: str, vocab_size: int) -> Recipe:
    """Returns what the recipes have in common.

    Places are named after the recipe, the tokenizer is learned from the training text itself, and `llamita train` is as
    it is where nothing is said.
    """
    tokenizer = TokenizerTrainingConfig(files=(Path(text),), vocab_size=vocab_size, output=Path(f"{name}-tokenizer"))
    prepare = PrepareConfig(output=Path(f"{name}-data"), tokenizer=tokenizer.output, files=tokenizer.files)
    train = PretrainConfig(recipe=name, run=RunConfig(output=Path("runs") / name), data=(prepare.output,))
    return Recipe(tokenizer, prepare, train, (f"llamita generate {train.run.output}",))


def mini_llama_wikitext() -> Recipe:
    """The way of mini-llama, a Llama for MLX: WikiText an article a row, padded to 513 tokens, 225 large updates.

    Articles have `<s>` before and `</s>` behind, and go on in further rows of 513 tokens (512 inputs and 512 targets)
    where they are longer; padding is not scored. An update takes the mean over the targets of 8 micro-batches of 16
    rows. Warm-up is a tenth of the updates, then comes a cosine from 1e-3. Chosen here: that it ends at 0, AdamW's
    settings (Llamita's own), and a vocabulary of 32,000 learned from the text itself.
    """
    common = base("mini-llama-wikitext", "wiki.train.tokens", vocab_size=32_000)
    return replace(
        common,
        prepare=replace(common.prepare, source="wikitext", validation_files=(Path("wiki.valid.tokens"),)),
        train=with_options(
            common.train,
            preset="mini-llama",
            initialization="fan-in",
            mode="pad",
            sequence_length=512,
            batch_size=8 * 16,
            micro_batch_size=16,
            steps=225,
            learning_rate=1e-3,
            schedule="cosine",
            minimum_learning_rate=0.0,
            evaluate_every=25,
        ),
    )


def scratch_shakespeare() -> Recipe:
    """A Llama from scratch on Tiny Shakespeare: a tokenizer of its own, grouped query heads, a KV cache to write with.

    Known: the text, the shape (4 layers, width 128, 4 heads, 4,000 tokens, 256 positions) and that heads share keys and
    values. Chosen here, for the text is only some 330,000 of those tokens: two heads to each key/value head, dropout
    0.2, random windows, and 1,000 updates of 16 rows, which is some 14 times through it.
    """
    common = base("scratch-shakespeare", "input.txt", vocab_size=4_000)
    return replace(
        common,
        prepare=replace(common.prepare, separator="file", split="tail", bos=False, eos=False),
        train=with_options(
            common.train,
            preset="scratch",
            set=("num_key_value_heads=2",),
            dropout=0.2,
            mode="random",
            sequence_length=256,
            batch_size=16,
            steps=1000,
            evaluation_rows=0,
        ),
        afterwards=("llamita generate runs/scratch-shakespeare 'ROMEO:'",),
    )


def lillm_39m() -> Recipe:
    """A Llama 3 of 39 million parameters with a tokenizer of its own, then taught to answer.

    Known: the shape (12 layers, width 512, 16 heads on 8 key/value heads, 8,192 tokens, 512 positions, embedding and
    head one matrix), training under torchrun, and instructions in turns of `<r0>user<r1>...<r2>`. Chosen here: 20
    tokens a parameter (Hoffmann et al. 2022, arXiv:2203.15556), which is 24,000 updates of 64 rows, attention inside
    documents, and 8 reserved tokens, of which the turns take three.
    """
    common = base("lillm-39m", "corpus.txt", vocab_size=8_192)
    return replace(
        common,
        tokenizer=replace(common.tokenizer, reserved_tokens=8),
        prepare=replace(common.prepare, validation_share=0.01),
        train=with_options(
            common.train,
            preset="lillm-39m",
            sequence_length=512,
            within_documents=True,
            batch_size=64,
            micro_batch_size=16,
            steps=24_000,
            evaluate_every=500,
        ),
        afterwards=(
            *common.afterwards,
            "llamita sft --model runs/lillm-39m --data conversations.jsonl --template r0 --epochs 3 "
            "--output runs/lillm-39m-chat",
            "llamita chat runs/lillm-39m-chat",
        ),
    )


RECIPES: Mapping[str, Callable[[], Recipe]] = {
    "mini-llama-wikitext": mini_llama_wikitext,
    "scratch-shakespeare": scratch_shakespeare,
    "lillm-39m": lillm_39m,
}


def recipe(name: str) -> Recipe:
    """The recipe of that name; ValueError for an unknown one."""
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]()


def with_recipe(config: PretrainConfig) -> PretrainConfig:
    """`config` with its changes to the preset on those of its recipe; FileNotFoundError where its data is missing."""
    if not config.recipe or config.run.resume:
        return config
    ours = recipe(config.recipe).train.set
    missing = next((place for place in config.data if not place.exists()), None)
    if missing is not None:
        raise FileNotFoundError(
            f"there is no {missing}; llamita recipe {config.recipe} prints the commands that make it"
        )
    return replace(config, set=(*ours, *(change for change in config.set if change not in ours)))
