"""How far the predictions of a model are from those of another: Kullback-Leibler divergence per token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from ..data.windows import IGNORED
from ..models.stream import Batch
from ..progress import track

ROWS = 256  # positions whose distributions are in memory at once


def divergence(expected: Tensor, found: Tensor) -> Tensor:
    """KL(expected || found) in nats for logits, (tokens, vocabulary) each: (tokens,) float32.

    Example:
        >>> divergence(torch.zeros(1, 2), torch.zeros(1, 2)).tolist()
        [0.0]
    """
    parts = [
        kl_div(ours.float().log_softmax(-1), theirs.float().log_softmax(-1), reduction="none", log_target=True).sum(-1)
        for theirs, ours in zip(expected.split(ROWS), found.split(ROWS), strict=True)
    ]
    return torch.cat(parts) if parts else expected.new_zeros(0)


@dataclass(frozen=True)
class Distance:
    """How far a model is from another, window by window: (windows,) float64 each, means over counted tokens."""

    divergence: Tensor  # KL in nats
    loss: Tensor  # cross-entropy of the model itself, nats

    @property
    def kl(self) -> float:
        return self.divergence.mean().item()

    @property
    def perplexity(self) -> float:
        return self.loss.mean().exp().item()


@torch.no_grad()
def measure_distance(original: nn.Module, model: nn.Module, batches: Sequence[Batch]) -> Distance:
    """Compare two models on windows.

    Args:
        original, model: on one device.
        batches: `input_ids` and `labels` (the next token, or -100 where it does not count), (windows, length) each;
            `attention_mask` where windows are padded.
    """
    distances, losses = [], []
    for batch in track(batches, "distance from the original", "batch"):
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        outputs = original(**inputs).logits, model(**inputs).logits
        for theirs, ours, labels in zip(*outputs, batch["labels"], strict=True):
            counted = labels != IGNORED
            distances.append(divergence(theirs[counted], ours[counted]).double().mean().cpu())
            losses.append(cross_entropy(ours[counted].float(), labels[counted]).double().cpu())
    return Distance(torch.stack(distances), torch.stack(losses))
