"""Run the original and the result on the same inputs, whole or block by block, for `verify` to compare."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from .errors import PrunePeakError
from .models.config_keys import image_size, vision_config
from .models.execution import CPU, ExecutionConfig
from .models.forward import run
from .models.loading import DECODER_IDS, IMAGES, Model
from .models.miniature import takes_choices, takes_one_text
from .models.stream import Batch
from .models.streaming import BlockStream
from .progress import track
from .sites.hooks import ablated
from .sites.plan import SitePlan
from .sites.site import Site

log = logging.getLogger(__name__)

DECODED = 24  # tokens of cached decoding
STAGES = {"pooler_output": "pooled"}  # names of other outputs, if not their own


@dataclass(frozen=True)
class Hooks:
    """The ablation of the original."""

    sites: Sequence[Site]
    plan: Mapping[str, SitePlan]

    def on(self, model: PreTrainedModel, block: int | None = None) -> AbstractContextManager[None]:
        """Hold the neurons of one block, or of all."""
        return ablated(model, [site for site in self.sites if block is None or site.covers(block)], self.plan)


@dataclass
class Outputs:
    """Logits of all tokens but padding, by stage, and the decoded tokens."""

    logits: dict[str, Tensor]
    decoded: Tensor | None = None

    @property
    def finite(self) -> bool:
        return all(bool(logits.isfinite().all()) for logits in self.logits.values())


def probe_batches(model: Model, probes: int) -> list[Batch]:
    """Inputs to compare outputs on: noise images; or random tokens, in full windows and left-padded ones.

    A classifier without a pad token takes one text at a time; a multiple-choice head, two choices for each question.
    """
    generator, config = torch.Generator().manual_seed(0), model.config
    if model.sees_images:
        vision = vision_config(config)
        height, width = image_size(vision)
        return [{IMAGES: torch.randn(probes, vision.num_channels, height, width, generator=generator)}]
    longest = model.positions or 128
    length = min(96, max(longest // 2, longest - DECODED))
    full = torch.randint(model.vocabulary, (probes, length), generator=generator)
    padded = torch.randint(model.vocabulary, (probes, length // 2), generator=generator)
    mask = (torch.arange(length // 2) >= torch.arange(probes)[:, None] * length // (4 * probes)).long()
    batches: list[Batch] = [{"input_ids": full}, {"input_ids": padded, "attention_mask": mask}]
    if model.reads_pairs:
        for batch in batches:
            batch[DECODER_IDS] = torch.randint(model.vocabulary, (probes, length // 3), generator=generator)
    if takes_choices(model.model_class):
        return [{key: tensor.unflatten(0, (-1, 2)) for key, tensor in batch.items()} for batch in batches]
    if takes_one_text(model.model_class, config):
        return [{key: tensor[row : row + 1] for key, tensor in batch.items()} for batch in batches for row in (0, 1)]
    return batches


class Whole:
    """A stock model with all its weights in memory, under its hooks."""

    def __init__(self, model: Model, dtype: torch.dtype, hooks: Hooks | None = None) -> None:
        self.source, self.model = model, model.load(dtype)
        self.hooks = hooks

    @torch.inference_mode()
    def run(self, batches: Sequence[Batch], teacher: Outputs | None = None) -> Outputs:
        """Prefill of every batch; then greedy decoding with a cache after the first, following the teacher's tokens."""
        with self.hooks.on(self.model) if self.hooks else nullcontext():
            logits = _collect_prefills(batches, [run(self.source, self.model, **batch) for batch in batches])
            if not self.model.can_generate() or (teacher is not None and teacher.decoded is None):
                return Outputs(logits)
            try:
                steps, tokens = self._decode(batches[0], teacher)
            except PrunePeakError as error:
                if teacher is not None:
                    raise
                log.warning("Cached decoding is not compared, because the original does not decode: %s", error)
                return Outputs(logits)
            return Outputs(logits | {"cached decoding": steps}, tokens)

    def _decode(self, batch: Batch, teacher: Outputs | None) -> tuple[Tensor, Tensor]:
        """The logits and the tokens of greedy decoding, (probes, steps, vocabulary) and (probes, steps)."""
        cache = run(self.source, DynamicCache, config=self.model.config)
        prompt, name, kept = batch["input_ids"], "input_ids", {}
        if self.source.reads_pairs:  # the encoder runs once
            cache, prompt, name = (
                run(self.source, EncoderDecoderCache, cache, DynamicCache()),
                batch[DECODER_IDS],
                DECODER_IDS,
            )
            states = run(self.source, self.model.get_encoder(), batch["input_ids"])
            kept = {"encoder_outputs": states}
        output = run(self.source, self.model, **{name: prompt}, **kept, past_key_values=cache, use_cache=True)
        steps, tokens = [], []
        for step in range(min(DECODED, (self.source.positions or 128) - prompt.shape[1])):
            steps.append(output.logits[:, -1].float())
            tokens.append(steps[-1].argmax(-1))
            fed = tokens[-1] if teacher is None or teacher.decoded is None else teacher.decoded[:, step]
            output = run(self.source, self.model, **{name: fed[:, None]}, **kept, past_key_values=cache, use_cache=True)
        return torch.stack(steps, dim=1), torch.stack(tokens, dim=1)


def run_streamed(
    model: Model, batches: Sequence[Batch], dtype: torch.dtype, hooks: Hooks | None, execution: ExecutionConfig
) -> Outputs:
    """Prefill of every batch, block by block; without cached decoding."""
    in_memory = replace(execution, hidden_states_on_disk=False, device=CPU)  # few tokens
    stream = BlockStream(model, batches, dtype, in_memory)
    for step in track(stream.steps(), "compare outputs", "block", stream.blocks):
        with hooks.on(stream.model, step.index) if hooks else nullcontext():
            for _ in step.run():
                pass
    with hooks.on(stream.model, stream.blocks) if hooks else nullcontext():
        outputs = list(stream.outputs())
    return Outputs(_collect_prefills(batches, outputs))


def _collect_prefills(batches: Sequence[Batch], outputs: Sequence[Any]) -> dict[str, Tensor]:
    """Every output of every batch: logits, and what a head gives besides (ends of answers, a pooled state)."""
    logits = {}
    for number, (batch, output) in enumerate(zip(batches, outputs, strict=True)):
        named = dict(output) if isinstance(output, Mapping) else {"logits": output[0]}
        for at, (name, values) in enumerate((n, v) for n, v in named.items() if isinstance(v, Tensor)):
            stage = "prefill" if at == 0 else STAGES.get(name, name.replace("_", " "))
            logits[f"{stage} {number}"] = _without_padding(batch, values.float())
    return logits


def _without_padding(batch: Batch, values: Tensor) -> Tensor:
    mask = batch.get("attention_mask")
    per_token = values.dim() == 3  # not a classifier
    return values[mask.bool()] if mask is not None and per_token and values.shape[:2] == mask.shape else values
