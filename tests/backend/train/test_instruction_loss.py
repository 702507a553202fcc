"""The loss of instruction tuning and its gradients, held to transformers on each conversation alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llamita.data import meadow_tasks
from llamita.data.batches import collate
from llamita.data.conversations import conversation
from llamita.data.examples import ConversationRows, encode
from llamita.data.packing import RowsConfig
from llamita.model.config import ModelConfig
from llamita.text.bpe import train_bpe_from_iterator
from llamita.text.chat import Chat
from llamita.training.trainer import split
from tests.backend.models import perturbed, save

transformers = pytest.importorskip("transformers")

TALKS = [each for turns in (1, 2, 3) for each in meadow_tasks.conversations(turns, 4, "train", turns)]
TOKENIZER = train_bpe_from_iterator((m["content"] for each in TALKS for m in each["messages"]), 400, reserved_tokens=3)
MODEL = ModelConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
)


def theirs(directory):
    """Loss and gradients by transformers: a conversation at a time, from its beginning, its labels found by hand."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    begin, middle, end = (TOKENIZER.codec.special_tokens[name] for name in ("<r0>", "<r1>", "<r2>"))
    nats, targets = torch.zeros(()), 0
    for each in TALKS:
        tokens, labels = [TOKENIZER.bos_id], [-100]
        for message in each["messages"]:
            before = [begin, *TOKENIZER.encode(message["role"]), middle]
            said = [*TOKENIZER.encode(message["content"]), end]
            tokens += before + said
            labels += [-100] * len(before) + (said if message["role"] == "assistant" else [-100] * len(said))
        logits = model(torch.tensor([tokens])).logits[0, :-1]
        labels = torch.tensor(labels[1:])
        nats = nats + F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        targets += int((labels != -100).sum())
    (nats / targets).backward()
    return (
        nats.item() / targets,
        targets,
        {name: value.grad.double().numpy() for name, value in model.named_parameters()},
    )


@pytest.fixture(scope="module")
def arrays_and_theirs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "m"
    arrays = perturbed(MODEL)
    return arrays, theirs(save(MODEL, arrays, directory))


@pytest.mark.parametrize("accumulated", [False, True], ids=["at once", "accumulated"])
@pytest.mark.parametrize("mode", ["pad", "pack"])
def test_loss_and_gradients_are_those_of_each_conversation_alone(framework, arrays_and_theirs, mode, accumulated):
    arrays, (loss, targets, gradients) = arrays_and_theirs
    encoded = encode(Chat(TOKENIZER, "r0"), [conversation(each, "here") for each in TALKS], 1000)
    longest = int(encoded.lengths.max())
    layout = RowsConfig(mode, 2 * longest if mode == "pack" else longest - 1, mode == "pack")
    rows = ConversationRows(encoded, layout)
    assert (len(rows) < 8) == (mode == "pack")
    batch = collate([rows.row(i) for i in range(len(rows))], np.arange(len(rows)))
    assert (batch.segments_BT is not None) == (mode == "pack")
    step = framework.train_step(MODEL, arrays)
    metrics, found = framework.update_gradients(step, split(batch, 2) if accumulated else [batch])
    assert metrics.targets == targets
    assert abs(metrics.loss - loss) <= 1e-5 * loss
    assert found.keys() == gradients.keys()
    for name, expected in gradients.items():
        assert np.linalg.norm(found[name] - expected) <= 1e-5 * np.linalg.norm(expected), name
