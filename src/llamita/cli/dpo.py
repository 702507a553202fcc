"""`llamita dpo`: flags and a closing line. What is done lies in workflows/dpo.py."""

from __future__ import annotations

from llamita.cli.train import INTERRUPTED
from llamita.workflows.dpo import DpoConfig


def run(config: DpoConfig) -> int:
    """Tune a model on pairs of answers, of which one is preferred, or carry on an interrupted run.

    Examples:
      llamita dpo --model runs/answers --data meadow --output runs/preferring
      llamita dpo --model MODEL --data pairs.jsonl --output RUN --beta 0.3 --epochs 1
      llamita dpo --output RUN --resume

    Ctrl-C finishes the update, saves and ends; a second Ctrl-C ends at once.
    """
    from llamita.text.tokenizer import Tokenizer
    from llamita.torch_backend.train_step import build_train_step
    from llamita.workflows.dpo import dpo

    result = dpo(config, build_train_step)
    if result.interrupted:
        print(f"stopped after {result.step} updates" + (f" and saved {result.checkpoint}" if result.checkpoint else ""))
        print(f"go on with: llamita dpo --output {config.output} --resume")
        return INTERRUPTED
    print(f"tuned in {result.step} updates, smoothed training loss {result.loss:.4f}; saved {result.checkpoint}")
    if result.best is not None:
        accuracy = result.best.measures["accuracy"]
        print(
            f"best at step {result.best.step}: validation loss {result.best.loss:.4f} nats/pair, "
            f"the chosen answer gained more than the rejected one in {accuracy:.1%} of pairs"
        )
    talks = Tokenizer.load(config.output / "tokenizer").chat_template is not None
    print(f"try it with: llamita {'chat' if talks else 'generate'} {config.output}")
    return 0
