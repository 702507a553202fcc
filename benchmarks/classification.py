"""A tuned model's accuracy beside TF-IDF with logistic regression, on the same files, over several seeds.

    python benchmarks/classification.py --model RUN --train train.txt --validation dev.txt --test test.txt \
        --label-mapping labels.json --output DIRECTORY -- --steps 2000 --learning-rate 5e-4

What follows `--` are options of `llamita classify train`. The seed of the model decides its head, the order of texts
and dropout; the best checkpoint is that of the highest validation accuracy. The baseline (words and pairs of words,
sublinear counts; scikit-learn) is deterministic but for its regularisation, chosen by cross-validation over the
training texts, whose folds follow the seed. Prints the mean and the standard deviation over seeds, of the validation
accuracy and, where there is a test file with labels, of the test accuracy, which chose nothing. Runs that are in the
directory already are gone on with.
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from llamita.backend.torch.backend import BACKEND
from llamita.cli.main import main as llamita
from llamita.data.labelled import LabelledTexts, read_labelled, read_mapping
from llamita.evaluation.classification import classification_report
from llamita.workflows.classify import Classifier
from llamita.workflows.classify_seeds import SEEDS

STRENGTHS = (0.5, 2.0, 8.0)  # inverse of the regularisation
FOLDS = 3


def baseline(train: LabelledTexts, held_out: list[LabelledTexts], seed: int) -> list[float]:
    """Accuracies of TF-IDF and logistic regression, in %."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline

    features = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r"\S+")
    pipeline = make_pipeline(features, LogisticRegression(max_iter=1000))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    search = GridSearchCV(pipeline, {"logisticregression__C": STRENGTHS}, cv=folds).fit(train.texts, train.labels)
    return [100 * float((search.predict(each.texts) == each.labels).mean()) for each in held_out]


def tuned(run: Path, held_out: list[LabelledTexts]) -> list[float]:
    """Accuracies of a run's best checkpoint, in %."""
    model = Classifier.load(run, BACKEND)
    found = []
    for texts in held_out:
        log_p = model.log_probabilities(model.encode(texts.texts, texts.source))
        found.append(100 * classification_report(log_p, texts.labels, texts.names).accuracy)
    return found


def train_runs(arguments: argparse.Namespace) -> None:
    """The runs over seeds, or the rest of them."""
    command = ["classify", "train", "--output", str(arguments.output)]
    if (arguments.output / SEEDS).is_file():
        command += ["--resume"]
    else:
        command += ["--model", str(arguments.model), "--data", *arguments.train, *arguments.options]
        command += ["--seeds", *map(str, arguments.seeds)]
        command += ["--validation", *arguments.validation] if arguments.validation else []
        command += ["--label-mapping", str(arguments.label_mapping)] if arguments.label_mapping else []
    if status := llamita(command):
        raise SystemExit(status)


def shown(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the language model to tune")
    parser.add_argument(
        "--train", nargs="+", required=True, help="labelled texts, as llamita classify train takes them"
    )
    parser.add_argument("--validation", nargs="+", default=[], help="left out of meadow: its validation stories")
    parser.add_argument("--test", nargs="+", default=[])
    parser.add_argument("--label-mapping", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="directory of the runs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("options", nargs="*", help="after --: options of llamita classify train")
    arguments = parser.parse_args()
    names = read_mapping(arguments.label_mapping) if arguments.label_mapping else ()
    train = read_labelled(arguments.train, "train", names)
    splits = {"validation": arguments.validation or ["meadow"], "test": arguments.test}
    held_out = {name: read_labelled(files, "validation", train.names) for name, files in splits.items() if files}
    train_runs(arguments)
    texts = list(held_out.values())
    found = {
        "tuned model": [tuned(arguments.output / f"seed-{seed}", texts) for seed in arguments.seeds],
        "TF-IDF, logistic regression": [baseline(train, texts, seed) for seed in arguments.seeds],
        "most frequent label": [[100 * float((each.labels == np.argmax(train.counts())).mean()) for each in texts]],
    }
    table = Table(title=f"accuracy in %, {len(arguments.seeds)} seeds", box=None)
    for column in ("", *held_out):
        table.add_column(column)
    for name, rows in found.items():
        table.add_row(name, *(shown([row[i] for row in rows]) for i in range(len(texts))))
    Console().print(table)
    (arguments.output / "benchmark.json").write_text(json.dumps({"splits": list(held_out), **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
