"""The statistics of a model over windows of tokens, block by block."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .blocks import Batch, BlockStream
from .errors import PrunePeakError, UsageError
from .evidence import Gram, Grams, Moments, Tape
from .machine import BATCH_TOKENS, Load, Machine
from .ranks import ALONE, Ranks, current
from .sites import Site
from .source import IMAGES, Source, count_patches, open_source
from .stats import Stats
from .texts import SELF, held_out_count, own_text_cache, window_length

BATCH_IMAGES = 16  # of some 200 patches each


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_dtype(source: Source) -> str:
    """The type to compute in: the source's, but float32 for float16, whose range activations overflow."""
    return "bfloat16" if source.dtype is torch.bfloat16 else "float32"


def into_batches(windows: Tensor, tokens: int = BATCH_TOKENS) -> list[Batch]:
    """Windows of equal length as the inputs of a forward, some `tokens` at a time; or images, a few at a time."""
    if windows.is_floating_point():
        return [{IMAGES: part} for part in windows.split(BATCH_IMAGES)]
    size = max(1, tokens // windows.shape[1])
    return [{"input_ids": part} for part in windows.split(size)]


def weigh(
    source: Source,
    sites: Sequence[Site],
    calibration: str,
    samples: int,
    sequence_length: int,
    dtype: str | None,
    seed: int,
    for_refit: bool,
) -> Load:
    """What a calibration will put on the machine.

    Raises:
        UsageError: no type is called that.
    """
    if dtype not in (None, *DTYPES):
        raise UsageError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}.")
    compute = DTYPES[dtype or default_dtype(source)]
    if source.sees_images:
        patches = count_patches(source)
        return Load(sites, samples * patches, min(samples, BATCH_IMAGES) * patches, for_refit, compute)
    length = window_length(source, sequence_length)
    cached = own_text_cache(source, samples + held_out_count(samples), length, seed)
    samples_text = calibration == SELF and not cached.is_file()
    return Load(sites, samples * length, length, for_refit, compute, samples_text)


@contextmanager
def observing(reader: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Show `see` the neurons that a reading module is given, (..., neurons)."""
    handle = reader.register_forward_pre_hook(lambda _, args: see(args[0].cpu()))
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class Observed:
    """What was seen of one site."""

    site: Site
    stats: Stats
    gathered: Grams | Tape | None = None  # for the refit
    power: float | None = None  # with it: squared norm of a hidden state after the block, median of tokens
    narrowed: tuple[Moments, ...] = ()  # of queries and keys, where heads get narrower


def calibrate(
    source: Source,
    sites: Sequence[Site],
    batches: Sequence[Batch],
    dtype: torch.dtype,
    for_refit: bool = False,
    machine: Machine = Machine(),  # noqa: B008 - frozen
    ranks: Ranks = ALONE,
) -> Iterator[Observed]:
    """Statistics of every site over the batches, one block at a time; padding is not counted.

    Several processes take as many whole batches each, and the first one gets what all of them saw. What is held out is
    a part of every batch, so it is the same tokens however many processes there are.
    """
    if not sites:
        return
    readings = len(batches)
    if readings < ranks.count:
        raise PrunePeakError(
            f"{ranks.count} processes cannot share {readings} batches of calibration; start fewer, or pass more "
            "--samples."
        )
    batches = batches[ranks.share(readings)]
    masks = [batch.get("attention_mask") for batch in batches]
    stream = BlockStream(source, batches, dtype, machine)
    last = min(max(site.block for site in sites), stream.blocks - 1)
    power = None
    for step in tqdm(islice(stream.steps(), last + 1), total=last + 1, desc="calibrate", unit="block"):
        tokens = sum(count if mask is None else int(mask.sum()) for count, mask in zip(step.tokens, masks, strict=True))
        of_all = ranks.gather(tokens)
        before = sum(of_all[: ranks.number])
        watches = [Watch(site, sum(of_all), for_refit, ranks, before) for site in sites if site.block == step.index]
        with _watching(stream.model, watches):
            for number in step.run():
                for watch in watches:
                    watch.mask = masks[number]
        if for_refit:  # the median, for a few tokens have giant ones
            power = torch.cat(ranks.gather(step.powers())).median().item()
        for watch in watches:
            yield from watch.observed(source, dtype, power)
    pooling = [site for site in sites if site.block == stream.blocks]
    if pooling:
        images = ranks.gather(sum(len(batch[IMAGES]) for batch in batches))
        before = sum(images[: ranks.number])
        pooled = [Watch(site, sum(images), for_refit, ranks, before) for site in pooling]
        with _watching(stream.model, pooled):
            for _ in stream.outputs():
                pass
        for watch in pooled:
            yield from watch.observed(source, dtype, power)


@dataclass(frozen=True)
class Task:
    """What the first process asks the others to take a share in."""

    model: str
    revision: str | None
    sites: Sequence[Site]
    windows: Tensor
    dtype: torch.dtype
    for_refit: bool
    machine: Machine


def calibrate_together(
    source: Source, sites: Sequence[Site], windows: Tensor, dtype: torch.dtype, for_refit: bool, machine: Machine
) -> Iterator[Observed]:
    """`calibrate` over windows, with a share for every process that torchrun has started."""
    ranks = current()
    if sites:
        ranks.tell(Task(source.name, source.revision, sites, windows, dtype, for_refit, machine))
    yield from calibrate(source, sites, into_batches(windows, machine.batch_tokens), dtype, for_refit, machine, ranks)


def assist(ranks: Ranks) -> None:
    """Take a share of whatever the first process calibrates, until it tells that it is done."""
    while (task := ranks.tell()) is not None:
        batches = into_batches(task.windows, task.machine.batch_tokens)
        source = open_source(task.model, task.revision)
        for _ in calibrate(source, task.sites, batches, task.dtype, task.for_refit, task.machine, ranks):
            pass


class Watch:
    """What one site is seen to do while its block runs."""

    def __init__(self, site: Site, tokens: int, for_refit: bool, ranks: Ranks = ALONE, before: int = 0) -> None:
        self.site = site
        self.stats = Stats(site.neurons, tokens, before)
        self.gathered: Grams | Tape | None = None
        self.mask: Tensor | None = None  # of the batch that runs
        self.narrowed: dict[str, Gram] = {}  # of queries and keys
        self._few = tokens < site.neurons
        self._for_refit = for_refit
        self._ranks = ranks

    def see_maker(self, name: str, made: Tensor) -> None:
        """What a module gives whose heads get narrower."""
        flat = made.reshape(-1, self.site.neurons)
        if name not in self.narrowed:
            self.narrowed[name] = Gram(self._ranks.agree(flat.float().mean(0)))
        self.narrowed[name].add(flat)

    def see(self, neurons: Tensor) -> None:
        flat = neurons.reshape(-1, self.site.neurons)
        flat = flat if self.mask is None else flat[self.mask.bool().view(-1)]
        if self.stats.count == 0:
            self.stats.begin(flat, self._ranks)
        self.stats.add(flat)
        if self._for_refit:
            self.gathered = self.gathered or (Tape() if self._few else Grams(self.stats.pivot))
            self.gathered.add(flat)

    def observed(self, source: Source, dtype: torch.dtype, power: float | None) -> Iterator[Observed]:
        """What all processes saw, in the first one; the others are given nothing."""
        for seen in (self.stats, self.gathered, *self.narrowed.values()):
            if seen is not None:
                seen.add_up(self._ranks)
        if not self._ranks.is_first:
            return
        if not bool(torch.isfinite(self.stats.square_sum).all()):
            raise PrunePeakError(
                f"{self.site.name} of {source.name} is given activations that are not finite in {dtype}. "
                "Try --dtype float32, or check the checkpoint."
            )
        narrowed = tuple(self.narrowed[name].moments() for name in self.site.narrowed)
        yield Observed(self.site, self.stats, self.gathered, power, narrowed)


@contextmanager
def _watching(model: nn.Module, watches: Sequence[Watch]) -> Iterator[None]:
    with ExitStack() as stack:
        for watch in watches:
            stack.enter_context(observing(model.get_submodule(watch.site.name), watch.see))
            for name in watch.site.narrowed:
                see = partial(watch.see_maker, name)
                handle = model.get_submodule(name).register_forward_hook(lambda _, args, made, see=see: see(made.cpu()))
                stack.callback(handle.remove)
        yield
