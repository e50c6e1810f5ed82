"""What can be cut from a model, what it would save and what it would take, before any of it is done.

`inspect` reads the config alone. `estimate` also opens the weights and times one block.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .blocks import BlockStream
from .calibration import BATCH_TOKENS, calibrate, default_dtype, into_batches
from .evaluation import DECODED, PROBES, WHOLE_SIZE
from .hosts import ENGINES, choose_target
from .selection import kept_width, unit
from .sites import find_blocks, find_sites
from .source import Source, build_blank, open_blueprint, open_source
from .texts import (
    OWN_TEXT_BATCH,
    SAMPLES,
    SELF,
    SEQUENCE_LENGTH,
    held_out_count,
    own_text_cache,
    sample_own_text,
    window_length,
)

RATIO = 0.3  # what `inspect` reckons with where none is given

# What `estimate` adds to what it times
START_SECONDS = 10.0  # imports, digests, loading
VERIFIED_TOKENS = 5000  # verification, as tokens of a forward
PROBED_TOKENS = PROBES * (96 + 48 + DECODED)  # whose logits verification holds
BASE_MEMORY = 500_000_000  # bytes of a process that has imported torch and transformers
SHORT_SAMPLE, LONGER_SAMPLE = 4, 20  # tokens


@dataclass(frozen=True)
class Inspection:
    """A model, what can be cut from it, and what a ratio would give."""

    model: str
    model_type: str
    model_class: str
    dtype: str
    blocks: int
    neurons: int  # of the MLP, a block
    unit: int  # kept widths are a multiple of it
    parameters: int
    bytes: int
    ratio: float
    kept: int  # neurons a block
    parameters_after: int
    bytes_after: int
    share: float  # of the parameters that would leave
    written_as: str
    why: str  # what the better hosts lack; empty where there is none better
    constants: str
    engines: tuple[str, ...]  # serving engines that read the written class

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect(
    model: str, ratio: float = RATIO, multiple_of: int | None = None, revision: str | None = None
) -> Inspection:
    """Say what `compress` would do to a model, from its config.

    Raises:
        PrunePeakError: the model type is not known, or the ratio does nothing.

    Example:
        >>> inspection = inspect("examples/llama-mini", 0.5)
        >>> inspection.neurons, inspection.kept, inspection.written_as
        (384, 192, 'LlamaForCausalLM')
    """
    blueprint = open_blueprint(model, revision)
    dtype = blueprint.config.dtype or torch.float32
    sites = find_sites(blueprint.blank, blueprint.family)
    neurons = sites[0].neurons
    kept = kept_width(neurons, ratio, multiple_of)
    target = choose_target(blueprint, kept, dtype)
    before = count_parameters(blueprint.blank)
    after = count_parameters(build_blank(target.model_class, target.config))
    mlp, key = blueprint.family.mlp, blueprint.family.mlp.bias_key
    return Inspection(
        model=model,
        model_type=blueprint.family.model_type,
        model_class=blueprint.model_class.__name__,
        dtype=str(dtype).removeprefix("torch."),
        blocks=len(sites),
        neurons=neurons,
        unit=multiple_of or unit(neurons),
        parameters=before,
        bytes=before * dtype.itemsize,
        ratio=ratio,
        kept=kept,
        parameters_after=after,
        bytes_after=after * dtype.itemsize,
        share=1 - after / before,
        written_as=target.model_class.__name__,
        why=target.why,
        constants=f"bias of {mlp.reader}" + (f", opened by {key}" if key else ""),
        engines=ENGINES[target.config.model_type],
    )


def count_parameters(blank: PreTrainedModel) -> int:
    """Parameters of a model on `meta`, tied ones once."""
    twins = blank.all_tied_weights_keys
    return sum(tensor.numel() for name, tensor in blank.state_dict().items() if name not in twins)


@dataclass(frozen=True)
class Cost:
    """What a `compress` would take on this machine."""

    minutes: float
    memory: int  # bytes resident at most
    disk: int  # bytes written

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def estimate(
    model: str,
    ratio: float,
    *,
    refit: bool = True,
    multiple_of: int | None = None,
    revision: str | None = None,
    calibration: str = SELF,
    samples: int = SAMPLES,
    sequence_length: int = SEQUENCE_LENGTH,
    dtype: str | None = None,
    seed: int = 0,
) -> tuple[Inspection, Cost]:
    """Inspect a model and time one block of it, to say what `compress` would take.

    Raises:
        PrunePeakError: what `compress` would refuse of the model.
    """
    inspection = inspect(model, ratio, multiple_of, revision)
    source = open_source(model, revision)
    compute = getattr(torch, dtype or default_dtype(source))
    length = window_length(source, sequence_length)
    held = held_out_count(samples)
    block = find_blocks(source.blank, source.family)[0]
    embedding = source.blank.get_input_embeddings().weight.numel()
    # Seconds that a token takes in a block, with and without statistics, and in the head
    observed, bare = _time_block(source, length, compute, refit)
    head = bare * embedding / sum(parameter.numel() for parameter in block.parameters())
    forward = bare * inspection.blocks + head
    seconds = START_SECONDS + observed * inspection.blocks * samples * length
    seconds += forward * (held * length * (2 - inspection.share) + VERIFIED_TOKENS)

    weights = sum(parameter.numel() for parameter in block.parameters()) + 2 * embedding
    states = samples * length * source.config.hidden_size
    activations = BATCH_TOKENS * (4 * inspection.neurons + 8 * source.config.hidden_size)
    memory = (weights + states + activations) * compute.itemsize + 12 * length * source.config.vocab_size
    if source.size <= WHOLE_SIZE:  # one model whole in float32, and the logits of three
        memory = max(memory, 4 * source.parameters + 12 * PROBED_TOKENS * source.config.vocab_size)
    if refit:  # two sums of products in float32, and some copies of them in float64
        memory = max(memory, weights * compute.itemsize + 40 * inspection.neurons**2)
    if calibration == SELF and not own_text_cache(source, samples + held, length, seed).is_file():
        seconds += _time_sampling(source, seed) * (samples + held) * length
        memory = max(memory, 2 * source.size)
    return inspection, Cost(round(seconds / 60, 2), BASE_MEMORY + memory, inspection.bytes_after)


def _time_block(source: Source, length: int, dtype: torch.dtype, refit: bool) -> tuple[float, float]:
    """Seconds a token takes in the first block: with its statistics taken, and without."""
    windows = torch.randint(source.config.vocab_size, (2 * max(1, BATCH_TOKENS // length), length))
    batches = into_batches(windows)
    site = find_sites(source.blank, source.family)[0]
    began = time.perf_counter()
    next(iter(calibrate(source, [site], batches, dtype, with_grams=refit)))
    observed = time.perf_counter() - began
    steps = BlockStream(source, batches, dtype).steps()  # named, for its weights leave with it
    step = next(steps)
    began = time.perf_counter()
    for _ in step.run():
        pass
    bare = time.perf_counter() - began
    return max(observed, bare) / windows.numel(), bare / windows.numel()


def _time_sampling(source: Source, seed: int) -> float:
    """Seconds a token of own text takes: the difference between a short and a longer sample."""
    seconds = []
    for length in (SHORT_SAMPLE, LONGER_SAMPLE):
        began = time.perf_counter()
        sample_own_text(source, OWN_TEXT_BATCH, length, seed)
        seconds.append(time.perf_counter() - began)
    return max(0.0, seconds[1] - seconds[0]) / (LONGER_SAMPLE - SHORT_SAMPLE) / OWN_TEXT_BATCH
