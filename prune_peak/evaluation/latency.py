"""Speed and peak memory of causal language models: prefill and cached decoding.

Every model has its own process, so that its peak memory can be measured. The models are timed in turns, round by round,
so that other load on the machine affects all of them.
"""

import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from transformers import DynamicCache

from ..errors import PrunePeakError
from ..models.execution import DTYPES, default_dtype
from ..models.loading import Model, open_model
from ..progress import track

PROMPT, DECODED, ROUNDS = 512, 32, 5  # tokens of the prompt, tokens decoded, and repetitions


@dataclass(frozen=True)
class Latency:
    """Median speed of one model over all rounds, and its memory."""

    model: str
    parameters: int
    prefill: float  # tokens a second
    decode: float  # tokens a second
    memory: int | None  # peak resident bytes of its process, loading included; None on Windows
    prompt: int  # tokens
    decoded: int  # tokens
    rounds: int
    threads: int
    dtype: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_latency(models: Sequence[str], dtype: str | None = None, revision: str | None = None) -> list[Latency]:
    """Time models in turns: prefill of 512 tokens, then 32 tokens decoded with the cache; a batch of one.

    Raises:
        PrunePeakError: a model that generates no text.

    Example:
        >>> dense, small = measure_latency(["SmolLM2-135M", "SmolLM2-135M-peak-0.5"])    # doctest: +SKIP
        >>> small.decode / dense.decode                                                  # doctest: +SKIP
    """
    sources = [open_model(model, revision) for model in models]
    for source in sources:
        if not source.meta_model.can_generate() or source.reads_pairs:
            raise PrunePeakError(f"{source.name} is a {source.model_class.__name__}, which generates no text to time.")
    types = [dtype or default_dtype(source) for source in sources]
    prompt = min([PROMPT, *(source.positions - DECODED for source in sources if source.positions)])
    processes = [Process(source, kind, prompt) for source, kind in zip(sources, types, strict=True)]
    try:
        turns = [[process.turn() for process in processes] for _ in track(range(1 + ROUNDS), "latency", "round")][1:]
        memory = [process.finish() for process in processes]
    finally:
        for process in processes:
            process.stop()
    return [
        Latency(
            model=source.label,
            parameters=source.parameters,
            prefill=prompt / statistics.median(turn[number][0] for turn in turns),
            decode=DECODED / statistics.median(turn[number][1] for turn in turns),
            memory=memory[number],
            prompt=prompt,
            decoded=DECODED,
            rounds=ROUNDS,
            threads=torch.get_num_threads(),
            dtype=types[number],
        )
        for number, source in enumerate(sources)
    ]


class Process:
    """A model in its own process, which runs a turn on request."""

    def __init__(self, source: Model, dtype: str, prompt: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        words = (theirs, str(source.folder), source.model_class.__name__, dtype, prompt, torch.get_num_threads())
        self._name = source.name
        self._process = context.Process(target=_serve, args=words, daemon=True)
        self._process.start()
        theirs.close()

    def turn(self) -> tuple[float, float]:
        """Seconds of the prefill, and of the decoding."""
        prefill, decode = self._ask("turn")
        return prefill, decode

    def finish(self) -> int | None:
        """Peak resident memory, in bytes."""
        memory: int | None = self._ask("finish")
        return memory

    def _ask(self, word: str) -> Any:
        try:
            self._pipe.send(word)
            return self._pipe.recv()
        except (EOFError, OSError):
            raise PrunePeakError(
                f"the process that ran {self._name} died; there may not be enough memory for all models at once."
            ) from None

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection, folder: str, model_class: str, dtype: str, prompt: int, threads: int) -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model = getattr(transformers, model_class).from_pretrained(folder, dtype=DTYPES[dtype]).eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.get_text_config().vocab_size, (1, prompt), generator=generator)
    with torch.inference_mode():
        while pipe.recv() == "turn":
            cache = DynamicCache(config=model.config)
            began = time.perf_counter()
            logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            read = time.perf_counter()
            for _ in range(DECODED):
                logits = model(logits[:, -1:].argmax(-1), past_key_values=cache, use_cache=True).logits
            pipe.send((read - began, time.perf_counter() - read))
    pipe.send(_peak_memory())


def _peak_memory() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes on Linux
