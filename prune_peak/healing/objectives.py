"""What a healed model learns from the original, by its head: tokens, classes, values, or hidden states."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, pad
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..data.windows import IGNORED
from ..errors import PrunePeakError
from ..evaluation.divergence import divergence
from ..evaluation.quality import PERPLEXITY, mask_tokens
from ..models.loading import ModelSpec
from ..models.miniature import takes_choices, takes_one_text
from ..models.stream import Batch
from ..progress import track

# input_ids (length,) or pixel_values (channels, height, width); and, of token models, labels (length,): the right
# token, or IGNORED where none is counted
Row = dict[str, Tensor]

NOT_INPUTS = ("labels", "shift_labels")
LEAST_NORM = 1e-6  # of a hidden state, to divide by


class Objective(ABC):
    """A distance of two models' outputs, and a second figure that is easier to read."""

    aim: ClassVar[str] = "to predict what the original predicts"
    distance: ClassVar[str]  # what is minimized
    metric: ClassVar[str]  # the second figure
    least_rows: ClassVar[int] = 1  # of a step
    rate: ClassVar[float] = 1.0  # of learning, over the usual one

    def __init__(self, model: ModelSpec) -> None:
        self.model = model
        self.one_row = takes_one_text(model.model_class, model.config)  # at a time

    def rows(self, windows: Tensor) -> list[Row]:
        """Windows, (windows, length) int64, as rows; or images, (images, channels, height, width)."""
        return [{self.model.model_class.main_input_name: window} for window in windows]

    def inputs(self, batch: Batch) -> Batch:
        """What the model takes of a batch of rows."""
        return {name: values for name, values in batch.items() if name not in NOT_INPUTS}

    @abstractmethod
    def distances(self, expected: Any, found: Any, batch: Batch) -> Tensor:
        """The distances of a model's outputs from the original's, one for every counted label of a batch."""

    @abstractmethod
    def scores(self, expected: Any, found: Any, batch: Batch) -> Tensor:
        """The second figure for every row of a batch, (rows,) float64."""

    def summarize(self, scores: Tensor) -> float:
        """The second figure of all rows."""
        return scores.mean().item()


class NextTokens(Objective):
    """The distribution over the next token, at every token."""

    distance = "KL per token, in nats"
    metric = PERPLEXITY

    def rows(self, windows: Tensor) -> list[Row]:
        return [next_token_row(window) for window in windows]

    def distances(self, expected: Any, found: Any, batch: Batch) -> Tensor:
        counted = batch["labels"] != IGNORED
        return divergence(expected.logits[counted], found.logits[counted])

    def scores(self, expected: Any, found: Any, batch: Batch) -> Tensor:
        pairs = [
            (logits[labels != IGNORED].float(), labels[labels != IGNORED])
            for logits, labels in zip(found.logits, batch["labels"], strict=True)
        ]
        return torch.stack([cross_entropy(logits, labels).double() for logits, labels in pairs])

    def summarize(self, scores: Tensor) -> float:
        return scores.mean().exp().item()


class MaskedTokens(NextTokens):
    """The distribution over the tokens that are masked."""

    distance = "KL per masked token, in nats"
    metric = "perplexity of masked tokens"

    def rows(self, windows: Tensor) -> list[Row]:
        inputs, labels = mask_tokens(self.model, windows)
        return [{"input_ids": ids, "labels": right} for ids, right in zip(inputs, labels, strict=True)]


class Classes(Objective):
    """The distribution over the classes of a text or image."""

    distance = "KL per prediction, in nats"
    metric = "share of the original's classes"
    least_rows = 8  # one prediction a row; a few overshoot at the usual rate (docs/log.md)
    rate = 0.3

    def read(self, output: Any) -> Tensor:
        """The logits, (rows, predictions, classes)."""
        if "start_logits" in output:
            return torch.stack([output.start_logits, output.end_logits], 1)
        if "logits" not in output or output.logits.shape[-1] == 0:
            raise PrunePeakError(
                f"{self.model.name} is a {self.model.model_class.__name__}, which gives no logits to learn from; heal "
                "does not support it."
            )
        logits: Tensor = output.logits
        return logits if logits.dim() == 3 else logits[:, None]

    def distances(self, expected: Any, found: Any, batch: Batch) -> Tensor:
        pair = [self.read(output) for output in (expected, found)]
        return divergence(*(logits.flatten(0, 1) for logits in pair)).view(pair[0].shape[:2]).mean(1)

    def scores(self, expected: Any, found: Any, batch: Batch) -> Tensor:
        first, second = (self.read(output).argmax(-1) for output in (expected, found))
        return (first == second).double().mean(1)


class TokenClasses(Classes):
    """The distribution over the classes of every token, or over the ends of an answer."""

    least_rows = 1
    rate = 1.0


class Labels(Classes):
    """The probability of every label of a text or image that may have several."""

    metric = "share of the original's labels"

    def read(self, output: Any) -> Tensor:
        return pad(super().read(output)[:, 0, :, None], (0, 1))  # softmax of x and 0 is sigmoid of x


class Values(Classes):
    """A number, or several: of a regression, a ranking, or for every choice."""

    distance = "squared difference"
    metric = "difference from the original"

    def inputs(self, batch: Batch) -> Batch:
        inputs = super().inputs(batch)
        return {n: t[:, None] for n, t in inputs.items()} if takes_choices(self.model.model_class) else inputs

    def distances(self, expected: Any, found: Any, batch: Batch) -> Tensor:
        return (self.read(found) - self.read(expected)).square().mean((1, 2))

    def scores(self, expected: Any, found: Any, batch: Batch) -> Tensor:
        return (self.read(found) - self.read(expected)).abs().double().mean((1, 2))


class HiddenStates(Objective):
    """The hidden states of the last block, by direction and length; and the pooled state, where the class has one."""

    aim = "to give the hidden states that the original gives"
    rate = 0.3
    distance = "1 - cosine, plus the squared relative difference of lengths"
    metric = "cosine to the original's hidden states"

    def distances(self, expected: Any, found: Any, batch: Batch) -> Tensor:
        parts = []
        for first, second, weights in self._states(expected, found, batch):
            lengths = [states.norm(dim=-1).clamp_min(LEAST_NORM) for states in (first, second)]
            apart = 1 - cosine_similarity(first, second, dim=-1) + (lengths[1] / lengths[0] - 1).square()
            parts.append((apart * weights).sum(1))
        return torch.stack(parts).mean(0)

    def scores(self, expected: Any, found: Any, batch: Batch) -> Tensor:
        first, second, weights = self._states(expected, found, batch)[0]
        return (cosine_similarity(first, second, dim=-1) * weights).sum(1).double()

    def _states(self, expected: Any, found: Any, batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Both models' states of tokens, (rows, tokens, hidden), with weights, (rows, tokens); and the pooled ones."""
        if "last_hidden_state" not in expected:
            raise PrunePeakError(
                f"{self.model.name} is a {self.model.model_class.__name__}, which gives no hidden states to learn "
                "from; heal does not support it."
            )
        first, second = (output.last_hidden_state.float() for output in (expected, found))
        if first.dim() == 4:  # a map of features, (rows, channels, height, width)
            first, second = (states.flatten(2).transpose(1, 2) for states in (first, second))
        mask = batch.get("attention_mask")
        counted = torch.ones(first.shape[:2], device=first.device) if mask is None else mask.float()
        found_states = [(first, second, counted / counted.sum(1, keepdim=True))]
        pooled = [output.get("pooler_output") for output in (expected, found)]
        if pooled[0] is not None and pooled[0].dim() == 2:
            one, other = (states.float()[:, None] for states in pooled)
            found_states.append((one, other, torch.ones_like(one[..., 0])))
        return found_states


def next_token_row(window: Tensor) -> Row:
    """A window with its next tokens as labels."""
    labels = window.roll(-1)
    labels[-1] = IGNORED
    return {"input_ids": window, "labels": labels}


TOKEN_HEADS = ("ForTokenClassification", "ForQuestionAnswering")
ROW_HEADS = ("ForSequenceClassification", "ForImageClassification")


def find_objective(model: ModelSpec) -> Objective:
    """What a model learns from its original.

    Raises:
        PrunePeakError: a head that heal does not support.
    """
    name, config = model.model_class.__name__, model.config
    if model.reads_pairs:
        raise PrunePeakError(f"{model.name} is a {name}; heal does not support encoder-decoders.")
    if model.meta_model.can_generate():
        return NextTokens(model)
    if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        return MaskedTokens(model)
    if takes_choices(model.model_class):
        return Values(model)
    if name.endswith(TOKEN_HEADS):
        return TokenClasses(model)
    if name.endswith(ROW_HEADS):
        problem = getattr(config, "problem_type", None)
        if problem == "multi_label_classification":
            return Labels(model)
        one_number = config.num_labels == 1 and "Sequence" in name
        return Values(model) if problem == "regression" or one_number else Classes(model)
    if name.endswith("Model"):
        return HiddenStates(model)
    raise PrunePeakError(
        f"{model.name} is a {name}; heal supports causal and masked language models, classifiers, and encoders "
        "without a head."
    )


@dataclass(frozen=True)
class Distance:
    """How far a model is from the original, a mean over rows, and the second figure of its objective."""

    divergence: float
    score: float


@torch.no_grad()
def measure_distance(objective: Objective, original: nn.Module, model: nn.Module, batches: Sequence[Batch]) -> Distance:
    """Compare two models, on one device, on batches of rows."""
    distances, scores = [], []
    for batch in track(batches, "distance from the original", "batch"):
        inputs = objective.inputs(batch)
        expected, found = original(**inputs), model(**inputs)
        counts = (batch["labels"] != IGNORED).sum(1).tolist()
        parts = objective.distances(expected, found, batch).split(counts)
        distances += [part.double().mean().cpu() for part in parts]
        scores.append(objective.scores(expected, found, batch).cpu())
    return Distance(torch.stack(distances).mean().item(), objective.summarize(torch.cat(scores)))
