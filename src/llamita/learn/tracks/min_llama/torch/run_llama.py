"""Uses the finished model: writes a text (generate), labels texts by asking (prompt), or by training (finetune)."""

import argparse
import json
import os
from types import SimpleNamespace

import torch
from classifier import LlamaEmbeddingClassifier, LlamaZeroShotClassifier
from llama import load_pretrained
from tokenizer import Tokenizer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from utils import seed_everything

from optimizer import AdamW

PREFIX = (
    "I have wanted to see this thriller for a while, and it didn't disappoint. "
    "Keanu Reeves, playing the hero John Wick, is"
)
Example = tuple[str, int]  # a text and the number of its label


def main() -> None:
    args = get_args()
    seed_everything(args.seed)
    device = torch.device("cuda" if args.use_gpu else "cpu")
    if args.option == "generate":
        generate(args, device)
    elif args.option == "prompt":
        prompt(args, device)
    else:
        finetune(args, device)


def generate(args: argparse.Namespace, device: torch.device) -> None:
    """Continues the prefix at temperature 0 and at 1, and writes both texts."""
    tokenizer = Tokenizer(args.max_sentence_len)
    llama = load_pretrained(args.pretrained_model_path).to(device).eval()
    prefix = torch.tensor([tokenizer.encode(args.prefix, bos=True, eos=False)], device=device)
    files = {0.0: args.generated_sentence_low_temp_out, 1.0: args.generated_sentence_high_temp_out}
    for temperature, file in files.items():
        text = tokenizer.decode(llama.generate(prefix, args.max_new_tokens, temperature=temperature)[0].tolist())
        print(f"temperature {temperature}:\n{text}\n")
        with open(file, "w", encoding="utf-8") as output:
            output.write(text)


def prompt(args: argparse.Namespace, device: torch.device) -> None:
    """Labels the dev and test files by what the untrained model would say next."""
    tokenizer = Tokenizer(args.max_sentence_len)
    with open(args.label_names, encoding="utf-8") as file:
        names = json.load(file)
    names = list(names.values()) if isinstance(names, dict) else names
    *others, last = names
    asked = f"{', '.join(others)}{',' if len(others) > 1 else ''} or {last}"
    suffix = f" Is this movie {asked}? This movie is "
    model = LlamaZeroShotClassifier(settings(args, tokenizer, len(names)), tokenizer, names).to(device)
    whole = Tokenizer()
    room = model.llama.params.max_seq_len - len(tokenizer.encode(suffix, bos=True, eos=False)) - 2
    tokenizer.max_len = min(room, args.max_sentence_len or room)  # of the text: the question must not be cut off
    for split, path, output in (("dev", args.dev, args.dev_out), ("test", args.test, args.test_out)):
        shortened = [(tokenizer.encode(text, bos=False, eos=False), label) for text, label in read_examples(path)]
        examples = [(tokenizer.decode(ids) + suffix, label) for ids, label in shortened]
        write_predictions(split, output, examples, *evaluate(batches(examples, whole, args), model, device))


def finetune(args: argparse.Namespace, device: torch.device) -> None:
    """Trains a classifier, keeps the epoch that is best on the dev file, and labels the dev and test files with it."""
    tokenizer = Tokenizer(args.max_sentence_len)
    train, dev, test = (read_examples(path) for path in (args.train, args.dev, args.test))
    model = LlamaEmbeddingClassifier(settings(args, tokenizer, 1 + max(label for _, label in train))).to(device)
    longest = model.llama.params.max_seq_len - 1  # one token marks the beginning
    tokenizer.max_len = min(longest, args.max_sentence_len or longest)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    best, kept = -1.0, f"finetune-{args.epochs}-{args.lr}.pt"
    for epoch in range(args.epochs):
        model.train()
        total = 0.0
        loader = batches(train, tokenizer, args, shuffle=True)
        for token_ids, labels in loader:
            optimizer.zero_grad()
            loss = F.nll_loss(model(token_ids.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            total += loss.item()
        accuracy, _ = evaluate(batches(dev, tokenizer, args), model, device)
        print(f"epoch {epoch}: train loss {total / len(loader):.3f}, dev accuracy {accuracy:.3f}")
        if accuracy > best:
            best = accuracy
            torch.save(model.state_dict(), kept)
    if args.epochs:
        model.load_state_dict(torch.load(kept, map_location=device, weights_only=True))
    for split, examples, output in (("dev", dev, args.dev_out), ("test", test, args.test_out)):
        write_predictions(split, output, examples, *evaluate(batches(examples, tokenizer, args), model, device))


def read_examples(path: str) -> list[Example]:
    """Reads a file with a line "label ||| text" for each example."""
    examples = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            label, separator, text = line.partition("|||")
            if not separator or not label.strip().lstrip("-").isdigit():
                raise ValueError(f'{path}, line {number}: expected "label ||| text", got {line.strip()[:60]!r}')
            examples.append((text.strip(), int(label)))
    return examples


def batches(
    examples: list[Example], tokenizer: Tokenizer, args: argparse.Namespace, shuffle: bool = False
) -> DataLoader:
    """Batches of token ids, padded at the end, and labels."""

    def collate(batch: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [tokenizer.encode(text, bos=True, eos=False) for text, _ in batch]
        longest = max(map(len, rows))
        padded = [row + [tokenizer.pad_id] * (longest - len(row)) for row in rows]
        return torch.tensor(padded), torch.tensor([label for _, label in batch])

    return DataLoader(examples, batch_size=args.batch_size, shuffle=shuffle, collate_fn=collate)


@torch.no_grad()
def evaluate(loader: DataLoader, model: nn.Module, device: torch.device) -> tuple[float, list[int]]:
    """Returns the share of texts that are labelled rightly, and the labels given."""
    model.eval()
    given, right = [], 0
    for token_ids, labels in loader:
        predicted = model(token_ids.to(device)).argmax(dim=-1).cpu()
        right += int((predicted == labels).sum())
        given += predicted.tolist()
    return right / max(1, len(given)), given


def write_predictions(split: str, path: str, examples: list[Example], accuracy: float, given: list[int]) -> None:
    print(f"{split} accuracy: {accuracy:.3f}")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f"{label} ||| {text}\n" for (text, _), label in zip(examples, given, strict=True))


def settings(args: argparse.Namespace, tokenizer: Tokenizer, num_labels: int) -> SimpleNamespace:
    """What the classifiers want to know."""
    return SimpleNamespace(
        num_labels=num_labels,
        pretrained_model_path=args.pretrained_model_path,
        option=args.option,
        pad_id=tokenizer.pad_id,
        hidden_dropout_prob=args.hidden_dropout_prob,
    )


def get_args() -> argparse.Namespace:
    model = "stories42M.pt" if os.path.exists("stories42M.pt") else "stories.pt"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--option", choices=("generate", "prompt", "finetune"), default="generate")
    parser.add_argument("--train", default="data/cfimdb-train.txt", help="lines of: label ||| text")
    parser.add_argument("--dev", default="data/cfimdb-dev.txt")
    parser.add_argument("--test", default="data/cfimdb-test.txt")
    parser.add_argument("--label-names", default="data/cfimdb-label-mapping.json", help="a JSON list of names")
    parser.add_argument("--pretrained-model-path", default=model)
    parser.add_argument("--max_sentence_len", type=int, default=None, help="the most tokens of a text")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--hidden_dropout_prob", type=float, default=0.3)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--use_gpu", action="store_true")
    parser.add_argument("--prefix", default=PREFIX, help="the beginning that generate continues")
    parser.add_argument("--max_new_tokens", type=int, default=75)
    parser.add_argument("--generated_sentence_low_temp_out", default="generated-sentence-temp-0.txt")
    parser.add_argument("--generated_sentence_high_temp_out", default="generated-sentence-temp-1.txt")
    parser.add_argument("--dev_out", default="cfimdb-dev-prompting-output.txt")
    parser.add_argument("--test_out", default="cfimdb-test-prompting-output.txt")
    return parser.parse_args()


if __name__ == "__main__":
    main()
