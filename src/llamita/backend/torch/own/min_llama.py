"""The track `min-llama`: a Llama that somebody has written, their classifier over it, and their AdamW.

It has what a runner and a training step ask of a model: hidden states, an output head, and its parameters under
canonical names. The computation is theirs.

Their attention keeps no keys and values, so the memory holds the token itself at each position, and a sequence is
computed from its first token again wherever logits are wanted. Of a prompt that is read in chunks, only the last costs
anything; guesses (`--draft lookup`) read a text once for several tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llamita.backend.interface import CacheLayout
from llamita.backend.step_layout import LEAST_ALIKE
from llamita.backend.torch.model.fused import FusedParameter
from llamita.backend.torch.model.head import OutputHead
from llamita.backend.torch.model.weights import copy_values, host_from_tensor
from llamita.backend.torch.own.program import Memory, Program, Trace, Wanted, refuse
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.parameters import CLASSIFIER, EMBEDDING, OUTPUT_HEAD, check_arrays, stored_arrays
from llamita.storage.formats.checkpoints import training_arguments
from llamita.storage.formats.foreign import canonical_name
from llamita.storage.rotation import ROTATED, to_halves, to_pairs

FORM = "the course's Llama"
MEMORY_BYTES = 1 << 19
"""For the tokens of an engine's sequences. A draft model beside it takes keys and values for as many positions."""
MOST_SCORES = 1 << 22
"""Most scores of a head's queries over keys in one pass over several sequences: it bounds the memory that one takes."""
USUAL_THETA = 10000.0
"""The theta of the course's `apply_rotary_emb` where its caller names none."""
ANOTHER_DEFAULT = """

def _with_default(apply):
    return lambda query, key, head_dim, max_seq_len, theta={theta!r}: apply(query, key, head_dim, max_seq_len, theta)


apply_rotary_emb = _with_default(apply_rotary_emb)
"""
"""A model's theta reaches rope.py as the default of their function, since their attention need not name one."""


class MinLlamaModel(nn.Module):
    """Their Llama with the values of `arrays` (canonical names), or with `num_labels` their classifier over it.

    There is an instance that is being trained, where `trains`, and one that is evaluated; they share their parameters,
    and differ in dropout. All is float32. ValueError where the model has what the course's Llama cannot hold.
    """

    form = FORM
    kernels = "the course's code, which reads the whole text again for each token"
    kept_bytes_per_token = np.dtype(np.int64).itemsize
    cache_budget = MEMORY_BYTES

    def __init__(
        self,
        program: Program,
        config: ModelConfig,
        arrays: Mapping[str, HostArray],
        device: torch.device | str = "cpu",
        *,
        head_dropout: float = 0.0,
        trains: bool = False,
    ) -> None:
        super().__init__()
        headless = replace(config, num_labels=0, label_names=(), problem_type="") if config.num_labels else config
        refuse(headless, FORM)
        check_arrays(config, arrays)
        self.config, self.program, self.device = config, program, torch.device(device)
        with program.guard():
            another = config.rope_theta != USUAL_THETA
            more = {"rope": ANOTHER_DEFAULT.format(theta=config.rope_theta)} if another else {}
            self._modules_of_program = modules = program.modules(more)
            evaluated = _instance(modules, config, head_dropout)
            _fill(evaluated, self._values(evaluated, arrays))
            self.evaluated = evaluated.to(device).eval()
            self.trained = None
            if trains:
                self.trained = _instance(modules, config, head_dropout)
                _fill(self.trained, dict(evaluated.named_parameters(remove_duplicate=False)))
                self.trained.train()

    @property
    def model(self) -> Any:
        """Their Llama as it is evaluated."""
        return self.llama()

    def llama(self, training: bool = False) -> Any:
        """Returns their Llama: of a classifier, the one inside."""
        instance = self.trained if training else self.evaluated
        assert instance is not None, "a model that is not trained has no instance with dropout"
        return instance.llama if self.config.num_labels else instance

    @property
    def head(self) -> OutputHead:
        """The matrix of their output layer, or of their classifier."""
        instance: Any = self.evaluated
        return OutputHead((instance.classifier_head if self.config.num_labels else instance.output).weight)

    @property
    def pad_id(self) -> int:
        """The id that fills the rows of a classifier up: one past the vocabulary, so that no text has it."""
        return self.config.vocab_size

    def hidden(
        self,
        tokens_BT: Tensor,
        *,
        segments_BT: Tensor | None = None,
        trace: Trace | None = None,
        training: bool = False,
        adapters: None = None,
    ) -> Tensor:
        """Returns the hidden states (B, T, D) after the last norm; the trace is shown the residual stream."""
        assert adapters is None, "adapters are refused before"
        if segments_BT is not None and not _is_one_document(segments_BT):
            raise ValueError(
                f"{FORM} cannot keep attention inside each of several documents of a row; leave --within-documents out"
            )
        llama = self.llama(training)
        with self.program.guard():
            if trace is None:
                hidden_BTD: Tensor = llama(tokens_BT)[1]
                return hidden_BTD
            h = llama.dropout(llama.tok_embeddings(tokens_BT))  # as their forward does, with a look in between
            trace("embedding", h)
            for number, layer in enumerate(llama.layers):
                h = layer(h)
                trace(f"layers.{number}", h)
            h = llama.norm(h)
            trace("norm", h)
            return h

    def norm(self, stream_BTD: Tensor) -> Tensor:
        """Returns states of the residual stream through their last norm."""
        with self.program.guard():
            found: Tensor = self.model.norm(stream_BTD)
        return found

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Returns the logits (..., V) of a language model's hidden states (..., D)."""
        with self.program.guard():
            found: Tensor = self.model.output(hidden_BTD)
        return found

    def allocate(self, layout: CacheLayout) -> Memory:
        """Returns memory for the tokens of an engine's sequences."""
        return Memory(layout.block_size, [np.zeros(layout.blocks * layout.block_size, dtype=np.int64)])

    def read(self, wanted: Sequence[Wanted], memory: Memory) -> list[Tensor]:
        """Keeps the tokens of chunks, and returns the logits (R, V) at the wanted offsets of each."""
        (tokens,) = memory.arrays
        for chunk, _ in wanted:
            tokens[memory.rows(chunk, chunk.start, chunk.end)] = chunk.tokens
        found = [torch.empty(0, self.config.vocab_size, device=self.device)] * len(wanted)
        for places in _alike(wanted):
            longest = wanted[places[-1]][0].end
            tokens_BT = np.zeros((len(places), longest), dtype=np.int64)  # what follows a text changes nothing in it
            for row, place in zip(tokens_BT, places, strict=True):
                chunk, _ = wanted[place]
                row[: chunk.end] = tokens[memory.rows(chunk, 0, chunk.end)]
            hidden_BTD = self.hidden(torch.from_numpy(tokens_BT).to(self.device))
            for hidden_TD, place in zip(hidden_BTD, places, strict=True):
                chunk, offsets = wanted[place]
                found[place] = self.logits(hidden_TD[[chunk.start + offset for offset in offsets]])
        return found

    def label_log_probs(self, tokens_BT: Tensor, training: bool = False) -> Tensor:
        """Returns the log-probability of each label, (B, labels), by their classifier; rows are padded by `pad_id`."""
        instance = self.trained if training else self.evaluated
        assert instance is not None, "a model that is not trained has no instance with dropout"
        with self.program.guard():
            found: Tensor = instance(tokens_BT)
        return found.float()

    def make_optimizer(self, groups: list[dict[str, Any]], **settings: Any) -> Any:
        """Returns their AdamW over groups of parameters."""
        with self.program.guard():
            return self._modules_of_program.optimizer.AdamW(groups, **settings)

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Yields the bytes of each parameter by its canonical name."""
        return ((fused.name, fused.parameter.nbytes) for fused in self.fused_parameters())

    def fused_parameters(self) -> Iterator[FusedParameter]:
        """Yields every parameter with its canonical name, in the order of the table; theirs fuse nothing."""
        found = {}
        for name, parameter in self.evaluated.named_parameters():
            found[self._canonical(name)] = parameter
        for row in stored_arrays(self.config):
            parameter = found[row.name]
            yield FusedParameter(row.name, parameter, (row.name,), (parameter.shape[0],), row.weight_decay)

    def to_host(self, name: str, tensor: Tensor) -> HostArray:
        """Returns a tensor that is laid out as the parameter `name` as the library lays it out."""
        array = host_from_tensor(tensor)
        if name == EMBEDDING and self.config.num_labels:
            array = array.rows(slice(self.config.vocab_size))
        return to_halves(array, self.config.head_dim) if ROTATED.fullmatch(name) else array

    def from_host(self, name: str, array: HostArray) -> Tensor:
        """Inverts `to_host`: a float32 tensor on the CPU, the row of a classifier's `pad_id` being zeros."""
        array = to_pairs(array, self.config.head_dim) if ROTATED.fullmatch(name) else array
        rows = array.shape[0] + (name == EMBEDDING and self.config.num_labels > 0)
        tensor = torch.zeros(rows, *array.shape[1:])
        copy_values({name: tensor[: array.shape[0]]}, [(name, array)])
        return tensor

    def host_arrays(self) -> dict[str, HostArray]:
        """Returns the parameters under canonical names, in the table's order."""
        return {fused.name: self.to_host(fused.name, fused.parameter) for fused in self.fused_parameters()}

    @torch.no_grad()
    def load_host_arrays(self, arrays: Mapping[str, HostArray]) -> None:
        """Gives the parameters the values of `arrays`; ValueError lists all that is missing, extra or misshapen."""
        check_arrays(self.config, arrays)
        for fused in self.fused_parameters():
            fused.parameter.copy_(self.from_host(fused.name, arrays[fused.name]))

    def _values(self, instance: nn.Module, arrays: Mapping[str, HostArray]) -> dict[str, nn.Parameter]:
        """Returns a parameter for each of the instance's, one for those that it shares."""
        held: dict[int, nn.Parameter] = {}
        values = {}
        for name, parameter in instance.named_parameters(remove_duplicate=False):
            if id(parameter) not in held:
                canonical = self._canonical(name)
                held[id(parameter)] = nn.Parameter(self.from_host(canonical, arrays[canonical]), requires_grad=False)
            values[name] = held[id(parameter)]
        return values

    def _canonical(self, name: str) -> str:
        """Returns the canonical name of a parameter of theirs; ValueError for one that the course's Llama has not."""
        if self.config.num_labels and name == "classifier_head.weight":
            return CLASSIFIER
        found = canonical_name(name.removeprefix("llama.") if self.config.num_labels else name)
        tied = self.config.tie_word_embeddings or self.config.num_labels > 0
        found = EMBEDDING if found == OUTPUT_HEAD and tied else found
        if found is None:
            raise ValueError(f"the course's model has a parameter {name} that its skeleton has not; take it out")
        return found


def _instance(modules: SimpleNamespace, config: ModelConfig, head_dropout: float) -> Any:
    """Returns their model of the config's sizes, with values of its own."""
    arguments = training_arguments(config, "course") | {"rope_theta": config.rope_theta}
    if config.num_labels:
        arguments["vocab_size"] += 1  # for the id that pads
    llama = modules.llama.Llama(modules.config.LlamaConfig.from_arguments(arguments))
    if not config.num_labels:
        if not config.tie_word_embeddings:  # two matrices, as the course's load_pretrained has it
            llama.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        return llama
    modules.classifier.load_pretrained = lambda path, *rest: llama
    settings = SimpleNamespace(
        num_labels=config.num_labels,
        pretrained_model_path="",
        option="finetune",
        pad_id=config.vocab_size,
        hidden_dropout_prob=head_dropout,
    )
    classifier = modules.classifier.LlamaEmbeddingClassifier(settings)
    # Checkpoints with a head, transformers' as ours, have no bias on it.
    classifier.classifier_head = nn.Linear(config.hidden_size, config.num_labels, bias=False)
    return classifier


def _fill(instance: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Puts parameters into an instance, in the place of its own, without copying them."""
    missing, unexpected = instance.load_state_dict(values, strict=False, assign=True)
    parameters = dict(instance.named_parameters(remove_duplicate=False))
    faults = [*(name for name in missing if name in parameters), *unexpected]
    assert not faults, f"{faults} are in one of two instances of the same class alone"


def _is_one_document(segments_BT: Tensor) -> bool:
    """Returns whether each row is one document, perhaps with padding after it, which nothing before it sees."""
    plain_BT = (segments_BT == segments_BT[:, :1]) | (segments_BT == 0)
    return bool(plain_BT.all() and (segments_BT.diff(dim=1) <= 0).all())


def _alike(wanted: Sequence[Wanted]) -> Iterator[list[int]]:
    """Yields the places of chunks that want logits, to be read together, shorter texts first: of like length, so that
    little is padding."""
    group: list[int] = []
    for place in sorted((n for n, (_, offsets) in enumerate(wanted) if offsets), key=lambda n: wanted[n][0].end):
        end = wanted[place][0].end
        if group and (wanted[group[0]][0].end < LEAST_ALIKE * end or (len(group) + 1) * end * end > MOST_SCORES):
            yield group
            group = []
        group.append(place)
    if group:
        yield group
