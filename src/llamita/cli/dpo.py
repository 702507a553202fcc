"""`llamita dpo`: flags and a closing line. The work lies in workflows/dpo.py."""

from __future__ import annotations

from llamita.cli.tuning import stopped, training_backend
from llamita.workflows.dpo import DpoConfig


def run(config: DpoConfig) -> int:
    """Tune a model on pairs of answers, of which one is preferred, or carry on an interrupted run.

    A line of --data is {"prompt": ..., "chosen": ..., "rejected": ...} of texts or messages; meadow is right and wrong
    answers about stories of the embedded corpus.

    Examples:
      llamita dpo --model runs/answers --data meadow --output runs/preferring
      llamita dpo --model MODEL --data pairs.jsonl --output RUN --beta 0.3 --epochs 1
      llamita dpo --output RUN --resume

    Ctrl-C, SIGTERM and SIGUSR1 finish the update, save and end; a second one ends at once.
    """
    from llamita.text.tokenizer import Tokenizer
    from llamita.workflows.dpo import dpo

    result = dpo(config, training_backend(config))
    if result.interrupted:
        return stopped("dpo", config, result)
    print(f"tuned in {result.step} updates, smoothed training loss {result.loss:.4f}; saved {result.checkpoint}")
    if result.best is not None:
        accuracy = result.best.measures["accuracy"]
        print(
            f"best at step {result.best.step}: validation loss {result.best.loss:.4f} nats/pair, "
            f"the chosen answer gained more than the rejected one in {accuracy:.1%} of pairs"
        )
    talks = Tokenizer.load(config.run.output / "tokenizer").chat_template is not None
    print(f"try it with: llamita {'chat' if talks else 'generate'} {config.run.output}")
    return 0
