"""`llamita sft`: flags and a closing line. The work lies in workflows/sft.py."""

from __future__ import annotations

from llamita.cli.tuning import stopped, training_backend
from llamita.workflows.sft import SftConfig


def run(config: SftConfig) -> int:
    """Tune a trained model on conversations, or carry on an interrupted run.

    A line of --data is {"messages": [...]} or {"prompt": ..., "response": ...}; meadow is questions about stories of
    the embedded corpus.

    Examples:
      llamita sft --model runs/quickstart/run --data meadow --output runs/answers
      llamita sft --model MODEL --data train.jsonl --validation-data held-out.jsonl --output RUN --epochs 3
      llamita sft --output RUN --resume

    Ctrl-C, SIGTERM and SIGUSR1 finish the update, save and end; a second one ends at once.
    """
    from llamita.workflows.sft import sft

    result = sft(config, training_backend(config))
    if result.interrupted:
        return stopped("sft", config, result)
    print(f"tuned in {result.step} updates, smoothed training loss {result.loss:.4f}; saved {result.checkpoint}")
    if result.best is not None:
        exact = result.best.measures.get("exact")
        right = "" if exact is None else f", {exact:.1%} of answers right to the letter"
        print(f"best at step {result.best.step}: validation loss {result.best.loss:.4f} nats/token{right}")
    print(f"talk with it: llamita chat {config.run.output}")
    return 0
