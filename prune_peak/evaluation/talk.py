"""Talk: what models answer to a list of prompts, greedily. Perplexity does not show loops and early ends."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from ..data.chat import ChatTemplate, find_ends, find_template, generate, is_loop
from ..data.texts import load_tokenizer, read_texts
from ..errors import PrunePeakError
from ..models.execution import CPU
from ..models.loading import Model, open_model
from ..progress import track
from .divergence import divergence

LONGEST = 96  # tokens of an answer
AT_ONCE = 16  # answers generated together
ASKED = 16  # prompts that `compress` asks
MORE_LOOPS = 3  # of these; it warns of more
FAR = 1.0  # nats per token; it warns of a larger divergence


@dataclass(frozen=True)
class Talk:
    """What one model answered to the prompts."""

    model: str
    prompts: int
    loops: int  # answers that repeat themselves
    ends: int  # answers that end by themselves
    length: float  # mean tokens of an answer
    divergence: float  # mean KL per token along the first model's answers, nats; 0 for the first model
    questions: Sequence[str]
    answers: Sequence[str]
    longest: int  # most tokens of an answer
    template: bool  # whether the prompts went through a chat template, or were continued as texts

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_prompts(path: Path | None = None) -> list[str]:
    """The 40 prompts of the package, or those of a file, one a line.

    Raises:
        PrunePeakError: the file is not a readable text, or has no prompt.
    """
    own = resources.files(__package__).joinpath("prompts.txt").read_text(encoding="utf-8")
    lines = own.splitlines() if path is None else "\n".join(read_texts(str(path))).splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise PrunePeakError(f"{path} has no prompts; expected one a line.")
    return prompts


def evaluate_talk(models: Sequence[str], prompts: Path | None = None, revision: str | None = None) -> list[Talk]:
    """`measure_talk` of models by name."""
    return measure_talk([open_model(model, revision) for model in models], read_prompts(prompts))


def measure_talk(models: Sequence[Model], prompts: Sequence[str], device: torch.device = CPU) -> list[Talk]:
    """What models answer to prompts, up to 96 tokens each; the first one is the original.

    Raises:
        PrunePeakError: a model that generates no text, or with other tokens than the first.

    Example:
        >>> first, second = measure_talk([original, small], read_prompts())    # doctest: +SKIP
        >>> first.loops, second.loops                                          # doctest: +SKIP
    """
    for model in models:
        if not model.meta_model.can_generate():
            raise PrunePeakError(f"{model.name} is a {model.model_class.__name__}, which generates no text.")
    template = find_template(models[0])
    asked = _ask(models[0], template, prompts)
    for other in models[1:]:
        if _ask(other, find_template(other), prompts) != asked:
            raise PrunePeakError(f"{models[0].name} and {other.name} turn the prompts into different tokens.")
    tokenizer = load_tokenizer(models[0])
    ends = sorted(find_ends(models[0], tokenizer))
    original = models[0].load(torch.float32).to(device)
    expected: list[list[int]] = []
    found = []
    for number, model in enumerate(models):
        stock = original if number == 0 else model.load(torch.float32).to(device)
        answers, distances = [], []
        for start in track(range(0, len(asked), AT_ONCE), f"answers of model {number + 1}", "batch"):
            answers += generate(stock, asked[start : start + AT_ONCE], LONGEST, ends)
        expected = expected or answers
        if number:
            pairs = list(zip(asked, expected, strict=True))
            for prompt, answer in track(pairs, "divergence of the answers", "answer"):
                row = torch.tensor([[*prompt, *answer]], device=device)
                with torch.inference_mode():
                    pair = [each(row).logits[0, len(prompt) - 1 : -1] for each in (original, stock)]
                distances.append(divergence(*pair))
        found.append(
            Talk(
                model=model.label,
                prompts=len(prompts),
                loops=sum(map(is_loop, answers)),
                ends=sum(answer[-1] in ends for answer in answers),
                length=sum(map(len, answers)) / len(answers),
                divergence=torch.cat(distances).mean().item() if number else 0.0,
                questions=prompts,
                longest=LONGEST,
                answers=[tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers],
                template=template is not None,
            )
        )
        del stock
    return found


def describe_talk(talks: Sequence[Talk]) -> dict[str, Any]:
    """The part `talk` of the recipe: the numbers before and after, without the answers."""
    keys = ("prompts", "loops", "ends", "length", "divergence")
    sides = [{key: getattr(talk, key) for key in keys} for talk in talks]
    return {"talk": dict(zip(("before", "after"), sides, strict=False))}


def warn_of_talk(talks: Sequence[Talk]) -> list[str]:
    """A warning if the answers of the second model loop much more, or are far from those of the first."""
    if not talks:
        return []
    before, after = talks
    if after.loops - before.loops <= MORE_LOOPS and after.divergence <= FAR:
        return []
    return [
        f"its answers are worse than the perplexity shows: {after.loops} of {after.prompts} loop (before: "
        f"{before.loops}), and the divergence along the original's answers is {after.divergence:.2f} nats per token. "
        "`prune-peak heal DIR --original MODEL --data self` mends a part of it."
    ]


def warn_of_answers_before(recipe: Mapping[str, Any]) -> list[str]:
    """What the compressed model's answers were like, where they were worse; those of the healed one are not known."""
    if not recipe.get("talk") or not any("loop" in warning for warning in recipe["warnings"]):
        return []
    before, after = recipe["talk"]["before"], recipe["talk"]["after"]
    return [
        f"its answers were not measured again: before healing {after['loops']} of {after['prompts']} looped (the "
        f"original's: {before['loops']}). `prune-peak evaluate ORIGINAL DIR --talk` counts them."
    ]


def _ask(model: Model, template: ChatTemplate | None, prompts: Sequence[str]) -> list[list[int]]:
    """The tokens before the answers; without a template, the first tokens of the prompts as texts to continue."""
    tokenizer = load_tokenizer(model)
    if template is None:
        return [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    return [template.ask(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts]
