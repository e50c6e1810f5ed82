"""Plan the memory of a run: batch size, place of the hidden states, device.

The plan estimates the peak of resident memory in each phase from shapes alone. A smaller budget first moves the hidden
states to disk (same numbers), then reduces the batch size (different rounding). With ample memory, freed memory is
kept for the next block, because new pages take time.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .data.self_generated import cache_path
from .data.windows import BATCH_IMAGES, held_out_count, own_samples, window_length
from .errors import PrunePeakError, spell
from .models.bfloat16 import factor_type
from .models.config_keys import vision_config
from .models.execution import BATCH_TOKENS, DTYPES, PASSAGE, WHOLE_SIZE, ExecutionConfig, default_dtype, find_device
from .models.families import find_blocks
from .models.loading import Model, count_patches
from .models.whole import BLOCKS_AT_ONCE
from .options import AUTO, FULL, CalibrationOptions
from .sites.blocks import CHOICE_TOKENS, LONGEST_RUN, BlocksSite
from .sites.site import Site

BASE_MEMORY = 600_000_000  # bytes of a process after importing torch and transformers and drawing a figure
MACHINE_SHARE = 0.8  # default budget as a share of the physical memory
ROOMY = 3  # keep freed memory if the budget is this many times the estimate
PROBED_TOKENS = 1400  # tokens of which verification of a whole model holds the logits
STREAMED_TOKENS = 600  # the same for larger models, which run block by block
LOGITS_COPIES, HIDDEN_COPIES, MLP_COPIES = 4, 14, 4  # of a token, that backpropagation keeps (bench/heal_runs.py)
MOST_PASSAGES = 256  # of self-generated text that are sampled at once; more are not faster


@dataclass(frozen=True)
class Workload:
    """The size of a calibration, for the memory estimate."""

    sites: Sequence[Site]
    tokens: int  # of the whole calibration
    length: int  # tokens of a window
    refit: bool
    dtype: torch.dtype
    samples_text: bool = False  # the whole model generates the calibration text
    is_measured: bool = False  # the statistics are read from a file


def physical_memory() -> int:
    """The machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def plan_execution(
    source: Model, workload: Workload, max_memory: int | None = None, device: str = AUTO
) -> ExecutionConfig:
    """The fastest configuration within a budget of bytes (default: 80 % of the physical memory).

    Raises:
        PrunePeakError: the budget is too small; the message names the minimum and cheaper options.
    """
    found = find_device(device)
    budget = max_memory or int(MACHINE_SHARE * physical_memory())
    other = 0  # peak outside the calibration
    passages = MOST_PASSAGES
    if workload.samples_text:
        while passages > 1 and _own_text_memory(source, passages) > budget:
            passages //= 2
        other = _own_text_memory(source, passages)
        if other > budget:
            raise PrunePeakError(
                f"{source.name} generates its own text with the whole model, which needs {gigabytes(other)} of "
                f"memory; the budget is {gigabytes(budget)}. Pass {spell('calibration', 'FILE')} or "
                f"{_enough(other)}."
            )
    verifying = BASE_MEMORY + 4 * source.parameters + 12 * PROBED_TOKENS * source.vocabulary
    whole_size = WHOLE_SIZE if verifying <= budget else 0
    talking = BASE_MEMORY + 8 * source.parameters
    talks = source.size <= whole_size and source.meta_model.can_generate() and talking <= budget
    if source.size <= whole_size:
        other = max(other, verifying, talking if talks else 0)
    most = max(workload.length, BATCH_TOKENS)
    sizes = [most >> halvings for halvings in range(most.bit_length()) if most >> halvings > workload.length]
    for batch_tokens in [*sizes, workload.length]:
        for hidden_states_on_disk in (False, True):
            needed = _most_resident(source, workload, batch_tokens, hidden_states_on_disk)
            if needed <= budget:
                needed = max(needed, other)
                return ExecutionConfig(
                    batch_tokens,
                    hidden_states_on_disk,
                    whole_size,
                    passages,
                    talks,
                    found,
                    budget < ROOMY * needed,
                    needed,
                )
    least = _most_resident(source, workload, workload.length, True)
    advice = _advice(source, workload, budget)
    raise PrunePeakError(
        f"{source.name} needs {gigabytes(least)} of memory with these options; the budget is {gigabytes(budget)}. "
        f"{advice}{'Otherwise pass' if advice else 'Pass'} {_enough(least)}."
    )


def _enough(needed: int) -> str:
    """The option that allows so many bytes, rounded up."""
    return f"a {spell('max_memory')} of {gigabytes(-(-needed // 10**7) * 10**7)} or more"


def _advice(source: Model, workload: Workload, budget: int) -> str:
    """Name an option that needs less memory."""
    neurons = max(site.neurons for site in workload.sites)
    if workload.refit and workload.tokens >= neurons and not workload.is_measured:
        samples = (neurons - 1) // workload.length
        few = replace(workload, tokens=samples * workload.length)
        if samples and _most_resident(source, few, workload.length, True) <= budget:
            return f"{spell('samples', samples)} gives fewer tokens than neurons, which needs less. "
    if workload.refit:
        bare = replace(workload, refit=False)
        if _most_resident(source, bare, workload.length, True) <= budget:
            return f"{spell('refit', False)} needs {gigabytes(_most_resident(source, bare, workload.length, True))}. "
    return f"A shorter {spell('sequence_length')} needs less. " if workload.length > 128 else ""


def _most_resident(source: Model, workload: Workload, batch_tokens: int, hidden_states_on_disk: bool) -> int:
    """Estimated peak of resident bytes."""
    width = workload.dtype.itemsize
    hidden, neurons = (max(getattr(site, size) for site in workload.sites) for size in ("hidden", "neurons"))
    whole = not source.family.streamable
    stored = source.dtype.itemsize
    firsts = [find_blocks(source.meta_model, stack)[0] for stack in source.family.stacks]
    block = max(sum(parameter.numel() for parameter in first.parameters()) for first in firsts)
    ends = sum(tensor.numel() for name, tensor in source.meta_model.state_dict().items() if _is_outside(source, name))
    factor = factor_type(workload.dtype).itemsize
    wide = factor if factor > width else 0  # bytes per element of the converted factors
    weights = source.parameters * factor if whole else block * factor
    states = 0 if hidden_states_on_disk or workload.is_measured or whole else workload.tokens * hidden * width
    batch = batch_tokens * ((4 * neurons + 8 * hidden) * width + (neurons + hidden) * wide)
    if whole:
        at_once = len([site for site in workload.sites if site.block < BLOCKS_AT_ONCE])
    else:  # the experts of a block are measured together
        at_once = max(Counter((site.block, site.label) for site in workload.sites).values())
    measured = at_once * neurons * 256 * 8
    accumulator = solving = 0
    tokens = round(workload.tokens * max(site.served for site in workload.sites))
    if workload.refit and tokens < neurons:
        accumulator = at_once * tokens * neurons * width
        solving = 2 * tokens * neurons * width + 20 * tokens**2 + 12 * neurons * hidden + 12 * tokens * neurons
    elif workload.refit:
        accumulator = at_once * 8 * neurons**2
        solving = 32 * neurons**2
    vocabulary = source.vocabulary
    held = states + measured + accumulator
    chosen = 0
    if any(isinstance(site, BlocksSite) for site in workload.sites):  # hidden states before a run, too
        held += states
        tokens = min(workload.tokens, CHOICE_TOKENS)
        chosen = 4 * LONGEST_RUN * tokens * (neurons + hidden) + 4 * len(workload.sites) * tokens * hidden
        chosen += 8 * min(tokens, neurons) ** 2
    phases: tuple[int, ...] = (
        weights + block * stored,  # while weights are read
        weights + held + batch,
        weights + chosen + batch,
        held + solving,
        held + 2 * block * stored + 8 * neurons * hidden,  # while a block is written
        ends * (stored + max(width, wide)) + 12 * workload.length * vocabulary,  # the head in an evaluation
        ends * (stored + 4) + 12 * STREAMED_TOKENS * vocabulary,  # the head in float32, in verification
    )
    return BASE_MEMORY + max(phases)


def _own_text_memory(source: Model, passages: int) -> int:
    """Bytes of the whole model, its cache and its logits while it generates passages of text."""
    width = factor_type(DTYPES[default_dtype(source)]).itemsize
    cache = 2 * len(find_blocks(source.meta_model, source.family)) * _hidden_size(source) * PASSAGE * width
    return BASE_MEMORY + source.parameters * width + passages * (cache + source.vocabulary * (width + 8))


def _hidden_size(model: Model) -> int:
    weight = getattr(model.meta_model.get_input_embeddings(), "weight", None)
    return int(vision_config(model.config).hidden_size if weight is None else weight.shape[-1])


def _is_outside(source: Model, name: str) -> bool:
    return all(f"{stack.blocks}." not in name for stack in source.family.stacks)


def estimate_healing(original: Model, model: Model, tokens: int, method: str) -> int:
    """Estimated peak of resident bytes of `heal`, with `tokens` in one pass."""
    config = model.config
    trained = model.parameters if method == FULL else 0  # adapters are a few per cent
    states = 4 * (original.parameters + model.parameters + 3 * trained)  # gradient and two moments, in float32
    logits = 4 * LOGITS_COPIES * tokens * (model.vocabulary if model.meta_model.get_output_embeddings() else 0)
    width = getattr(config, "intermediate_size", 0)
    kept = HIDDEN_COPIES * _hidden_size(model) + MLP_COPIES * (width if isinstance(width, int) else 0)
    return BASE_MEMORY + states + logits + 4 * tokens * len(find_blocks(model.meta_model, model.family)) * kept


def gigabytes(size: int) -> str:
    """A size for messages."""
    return f"{size / 1e9:.2f} GB"


def estimate_workload(source: Model, sites: Sequence[Site], options: CalibrationOptions, for_refit: bool) -> Workload:
    """The workload of a calibration that is still to be measured."""
    compute = DTYPES[options.dtype or default_dtype(source)]
    samples = options.samples
    if source.sees_images:
        patches = count_patches(source)
        return Workload(sites, samples * patches, min(samples, BATCH_IMAGES) * patches, for_refit, compute)
    length = window_length(source, options.sequence_length)
    own = own_samples(options.samples, options.calibration)
    cached = own > 0 and cache_path(source, own + held_out_count(own), length, options.seed).is_file()
    return Workload(sites, samples * length, length, for_refit, compute, own > 0 and not cached)
