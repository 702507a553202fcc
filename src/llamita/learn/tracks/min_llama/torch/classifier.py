"""Two classifiers over a Llama: one that only asks the model, one that is trained."""

from types import SimpleNamespace

import torch
from llama import load_pretrained
from tokenizer import Tokenizer
from torch import nn
from torch.nn import functional as F


class LlamaZeroShotClassifier(nn.Module):
    """Labels a prompt by how likely the model is to go on with the name of each label. Nothing is trained.

    config has `num_labels`, `pretrained_model_path` and `pad_id`.
    """

    def __init__(self, config: SimpleNamespace, tokenizer: Tokenizer, label_names: list[str]) -> None:
        super().__init__()
        if len(label_names) != config.num_labels:
            raise ValueError(f"expected a name for each of {config.num_labels} labels, got {len(label_names)}")
        self.num_labels = config.num_labels
        self.pad_id = config.pad_id
        self.llama = load_pretrained(config.pretrained_model_path)
        self.llama.requires_grad_(False)
        self.label_name_ids = [tokenizer.encode(name, bos=False, eos=False) for name in label_names]

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Returns the sum of the log-probabilities of each name's tokens right after the prompt.

        input_ids: (batch, seqlen), prompts padded at the end. The result: (batch, num_labels). As in the original
        course, all tokens of a name are looked up at the one position after the prompt.
        """
        logits, _ = self.llama(input_ids, targets=input_ids)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        final = (input_ids != self.pad_id).sum(dim=1) - 1
        log_probabilities = F.log_softmax(logits[rows, final], dim=-1)
        return torch.stack([log_probabilities[:, ids].sum(dim=-1) for ids in self.label_name_ids], dim=1)


class LlamaEmbeddingClassifier(nn.Module):
    """Labels a text by a linear layer over the hidden state of its last token.

    config has `num_labels`, `pretrained_model_path`, `option` ("finetune" trains the Llama too), `pad_id` and
    `hidden_dropout_prob`.
    """

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.num_labels = config.num_labels
        self.pad_id = config.pad_id
        self.llama = load_pretrained(config.pretrained_model_path)
        self.llama.requires_grad_(config.option == "finetune")
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier_head = nn.Linear(self.llama.config.dim, self.num_labels)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Returns the log-probability of each label. input_ids: (batch, seqlen); the result: (batch, num_labels).

        Rows are padded at their end with `self.pad_id`, which occurs nowhere else: the last token of a text is the
        last one that is not padding. Its hidden state goes through dropout, then through the head.
        """
        # to do: the hidden states; the one of each row's last token; dropout, head, and a log-softmax.
        _, hidden = self.llama(input_ids)
        last = (input_ids != self.pad_id).sum(dim=1) - 1
        state = hidden[torch.arange(len(input_ids), device=input_ids.device), last]
        return F.log_softmax(self.classifier_head(self.dropout(state)), dim=-1)
        # done
