"""Stream and Step: what runs a model over batches, block by block (streaming.py) or whole (whole.py)."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .loading import Model

# Keyword arguments of the model's forward: input_ids and optionally attention_mask, or pixel_values; for an
# encoder-decoder also decoder_input_ids and optionally decoder_attention_mask
Batch = dict[str, Tensor]
MASKS = ("attention_mask", "decoder_attention_mask")


class Step(ABC):
    """A part of a stream that runs over all batches."""

    @abstractmethod
    def covers(self, block: int) -> bool:
        """Whether the sites of a block are measured in this step."""

    @abstractmethod
    def rows(self, name: str, masks: Sequence[Tensor | None] = ()) -> list[int]:
        """How many rows (tokens or patches) an output projection reads in each batch, without padding."""

    @abstractmethod
    def run(self) -> Iterator[int]:
        """Yield each batch's index, then run on it."""


class Stream(ABC):
    """Runs a stock model over batches."""

    source: Model
    dtype: torch.dtype
    model: PreTrainedModel
    blocks: int
    passes: int  # the number of steps
    blocks_at_once: int  # that one step runs

    @abstractmethod
    def steps(self) -> Iterator[Step]:
        """Yield every step in order."""

    @abstractmethod
    def follows(self, block: int) -> bool:
        """Whether the sites of a block are measured while the outputs are computed."""

    @abstractmethod
    def outputs(self) -> Iterator[Any]:
        """Yield the model's output for each batch; call it after all steps."""
