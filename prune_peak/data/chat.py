"""Chat in a model's own template: its parts, and chats that the model writes itself."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import brief
from ..models.loading import Model
from ..progress import open_bar
from .texts import has_tokenizer, load_tokenizer
from .windows import IGNORED

log = logging.getLogger(__name__)

MARK = "prune-peak"  # in place of a message, to find where it goes
AT_ONCE = 64  # chats
QUESTION, ANSWER = 48, 160  # most tokens
LOOP = 0.6, 9  # share of distinct 4-grams below which a text loops, if it has at least so many


@dataclass(frozen=True)
class ChatTemplate:
    """What a template puts around one message of the user, in tokens."""

    tokenizer: PreTrainedTokenizerBase
    before: Sequence[int]
    after: Sequence[int]  # up to where the answer begins
    ends: Sequence[int]  # tokens that end a turn

    def ask(self, question: Sequence[int]) -> list[int]:
        """A question, up to where its answer begins."""
        return [*self.before, *question, *self.after]


def find_template(model: Model) -> ChatTemplate | None:
    """The chat template of a model; None without one, or where it takes no single message of a user.

    It is rendered as transformers renders it, in a sandbox.
    """
    tokenizer = load_tokenizer(model) if has_tokenizer(model.folder) else None
    if tokenizer is None or not tokenizer.chat_template:
        return None
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": MARK}], tokenize=False, add_generation_prompt=True
        )
        before, after = str(text).split(MARK)
    except Exception as error:  # a template raises what it wants
        log.warning("The chat template of %s is not used: %s.", model.name, brief(error))
        return None
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after)]
    return ChatTemplate(tokenizer, parts[0], parts[1], sorted(find_ends(model, tokenizer)))


def find_ends(model: Model, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens at which generation stops: EOS of the tokenizer and of the generation settings."""
    found = model.meta_model.generation_config.eos_token_id
    several = found if isinstance(found, list) else [found]
    return {token for token in (*several, tokenizer.eos_token_id) if token is not None}


def is_loop(tokens: Sequence[int]) -> bool:
    """Whether a text repeats itself.

    Example:
        >>> is_loop([1, 2, 3] * 8), is_loop(list(range(24)))
        (True, False)
    """
    share, least = LOOP
    grams = [tuple(tokens[start : start + 4]) for start in range(len(tokens) - 3)]
    return len(grams) >= least and len(set(grams)) < share * len(grams)


def generate(
    stock: PreTrainedModel, prompts: Sequence[Sequence[int]], longest: int, ends: Sequence[int], sample: bool = False
) -> list[list[int]]:
    """What a model writes after every prompt, greedily or sampled at temperature 1; with the token that ends it."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    stock.generation_config = GenerationConfig(  # not merged with the model's own
        do_sample=sample,
        temperature=1.0 if sample else None,
        top_k=0 if sample else None,
        pad_token_id=0,
        eos_token_id=list(ends) or None,
        max_new_tokens=longest,
    )
    device = stock.device
    written = stock.generate(ids.to(device), attention_mask=mask.to(device))
    answers = []
    for row in written[:, width:].tolist():
        stops = [place for place, token in enumerate(row) if token in set(ends)]
        answers.append(row[: stops[0] + 1] if stops else row)
    return answers


def generate_chats(model: Model, tokens: int, longest: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Chats of about so many tokens in all: the user's turn is sampled, the answer greedy; loops are left out.

    Returns:
        input_ids and labels, (length,) each; labels are `IGNORED` where the template writes the next token. Empty
        without a template.
    """
    template = find_template(model)
    if template is None:
        return []
    stock = model.load(torch.float32)
    chats: list[tuple[Tensor, Tensor]] = []
    with torch.random.fork_rng(devices=[]), open_bar("generate chat", "token", tokens) as bar:
        torch.manual_seed(seed)
        tried = 0
        while bar.n < tokens and tried < 20 * tokens // (QUESTION + ANSWER) + AT_ONCE:
            tried += AT_ONCE
            asked = generate(stock, [template.before] * AT_ONCE, QUESTION, template.ends, sample=True)
            questions = [[t for t in question if t not in template.ends] for question in asked]
            prompts = [template.ask(question) for question in questions if question]
            room = longest - max(map(len, prompts), default=longest)
            if room < 1:
                continue
            answers = generate(stock, prompts, min(ANSWER, room), template.ends)
            for prompt, answer in zip(prompts, answers, strict=True):
                if not is_loop(answer) and bar.n < tokens:
                    chats.append(_label(template, prompt, answer))
                    bar.update(len(prompt) + len(answer))
    if not chats:
        log.warning("%s writes no usable chat; free text only.", model.name)
    return chats


def _label(template: ChatTemplate, prompt: Sequence[int], answer: Sequence[int]) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([*prompt, *answer])
    labels = ids.roll(-1)
    labels[-1] = IGNORED
    first, last = len(template.before) - 1, len(prompt) - 1
    labels[:first] = IGNORED
    labels[last - len(template.after) : last] = IGNORED
    return ids, labels
