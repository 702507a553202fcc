"""`llamita sft`: flags and a closing line. What is done lies in workflows/sft.py."""

from __future__ import annotations

from llamita.cli.train import INTERRUPTED
from llamita.workflows.sft import SftConfig


def run(config: SftConfig) -> int:
    """Tune a trained model on conversations, or carry on an interrupted run.

    Examples:
      llamita sft --model runs/quickstart/run --data meadow --output runs/answers
      llamita sft --model MODEL --data train.jsonl --validation-data held-out.jsonl --output RUN --epochs 3
      llamita sft --output RUN --resume

    Ctrl-C finishes the update, saves and ends; a second Ctrl-C ends at once.
    """
    from llamita.backends import load_backend
    from llamita.workflows.finetune import resumed
    from llamita.workflows.sft import sft

    config = resumed(config)
    backend = load_backend(config.backend, device=config.device, threads=config.threads)
    result = sft(config, backend.build_train_step)
    if result.interrupted:
        print(f"stopped after {result.step} updates" + (f" and saved {result.checkpoint}" if result.checkpoint else ""))
        print(f"go on with: llamita sft --output {config.output} --resume")
        return INTERRUPTED
    print(f"tuned in {result.step} updates, smoothed training loss {result.loss:.4f}; saved {result.checkpoint}")
    if result.best is not None:
        exact = result.best.measures.get("exact")
        right = "" if exact is None else f", {exact:.1%} of answers right to the letter"
        print(f"best at step {result.best.step}: validation loss {result.best.loss:.4f} nats/token{right}")
    print(f"talk with it: llamita chat {config.output}")
    return 0
