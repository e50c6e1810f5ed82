"""Make the small trained models beside this file again: `python examples/train_mini.py [NAME ...]`.

The text is Python's language reference, which every Python carries (`pydoc_data.topics`), the images are the
handwritten digits of scikit-learn (an extra: `pip install '.[examples]'`), and bart-mini spells numbers, so nothing is
fetched. Every model is seeded; the same versions on the same kind of machine give the same weights. A model takes a few
minutes on two cores; the masked one twice as long, for it gets an answer for a quarter of its tokens only.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

HERE = Path(__file__).parent
VOCABULARY, CONTEXT = 1024, 128
BYTES = 4 + 256  # the vocabulary of roberta-mini; spelling is learned from far fewer answers than words are
MASKED = 0.25  # share of the tokens that a masked model is asked for; more than BERT's learns faster
WINDOW = 32  # tokens that mistral-mini attends to
BATCH, STEPS, PEAK_RATE, WARM_UP = 24, 500, 3e-3, 50  # more steps learn the text by heart
MASKED_STEPS, MASKED_RATE = 1200, 2e-3
MIXTURE_STEPS = 300  # more learn the text by heart
NEIGHBOURS = (-1, 1, -2, 2)  # where the heads of roberta-mini's first block look at first
SPEED, SLOWING, WAVES, SHARPNESS = 2.5, 0.75, 0.16, 1.2  # of its positions: waves, each slower than the one before
IMAGE, IMAGE_STEPS, IMAGE_BATCH, IMAGE_RATE = 8, 800, 64, 1e-3
NOISE = 0.3  # that is added to training images, whose values span 2
HELD_OUT_IMAGES, CALIBRATION_IMAGES = 5, 100  # every fifth image is for evaluation; of the others, 100 are written too
WRITTEN, HELD_OUT_NUMBERS = 600, 300  # numbers that bart-mini spells, to calibrate on and to measure
NUMBER_STEPS, NUMBER_BATCH, NUMBER_RATE = 800, 96, 2e-3
PIECE, HELD_OUT = 1024, 10  # of the text, cut into pieces of so many tokens, every tenth is kept for the reported loss


def opt_mini() -> PreTrainedModel:
    """ReLU, biases, learned positions, tied head."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            word_embed_proj_dim=128,
            ffn_dim=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            dropout=0.0,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
    )


def llama_mini() -> PreTrainedModel:
    """SwiGLU, grouped-query attention, rotary positions, tied head: a model whose peaks are not all zero."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
    )


def mistral_mini() -> PreTrainedModel:
    """A sliding window shorter than the training windows; three heads to a KV group."""
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            sliding_window=WINDOW,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
    )


def moe_mini() -> PreTrainedModel:
    """Eight experts, of which every token is given two; 2.7 million parameters, saved in bfloat16."""
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            moe_intermediate_size=256,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            output_router_logits=True,  # in training, for the loss that balances the experts
            router_aux_loss_coef=0.01,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
    )


def roberta_mini() -> PreTrainedModel:
    """GELU, norms after the sums, learned positions, tied head; the first block's heads start out as `look_around`."""
    model = RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=BYTES,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=len(NEIGHBOURS),
            max_position_embeddings=CONTEXT + 2,  # positions count from behind the padding's
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.08,  # the usual 0.02 is for wider models
            bos_token_id=0,
            pad_token_id=1,
            eos_token_id=2,
        )
    )
    look_around(model)
    return model


@torch.no_grad()
def look_around(model: RobertaForMaskedLM) -> None:
    """Start positions as waves, and every head of the first block as one that looks at its neighbour.

    A masked token has nothing but its neighbours to go by, and a model that does not know yet how to find them learns
    frequencies alone for a long time. Of two positions x and y, waves give a product of sum(cos(w (x - y))), which is
    largest where they are the same; queries turned by w times a distance look so far away.
    """
    embeddings, attention = model.roberta.embeddings, model.roberta.encoder.layer[0].attention.self
    width = attention.attention_head_size
    speeds = SPEED * SLOWING ** torch.arange(width // 2)
    angles = torch.arange(model.config.max_position_embeddings)[:, None] * speeds
    positions = embeddings.position_embeddings.weight
    positions.zero_()
    positions[:, :width] = WAVES * torch.cat([angles.sin(), angles.cos()], 1)
    for head, distance in enumerate(NEIGHBOURS):
        rows = slice(head * width, (head + 1) * width)
        sines, cosines = (speeds * distance).sin().diag(), (speeds * distance).cos().diag()
        attention.query.weight[rows] = attention.key.weight[rows] = 0
        attention.query.weight[rows, :width] = SHARPNESS * torch.cat(
            [torch.cat([cosines, sines], 1), torch.cat([-sines, cosines], 1)]
        )
        attention.key.weight[rows, :width] = SHARPNESS * torch.eye(width)


def vit_mini() -> PreTrainedModel:
    """GELU, learned positions, a class token; images of 8 x 8 pixels in 16 patches."""
    labels = {number: str(number) for number in range(10)}
    return ViTForImageClassification(
        ViTConfig(
            image_size=IMAGE,
            patch_size=2,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            id2label=labels,
            label2id={label: number for number, label in labels.items()},
        )
    )


def bart_mini() -> PreTrainedModel:
    """GELU, biases, norms after the sums, learned positions, tied head; 200 thousand parameters."""
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=len(spelling_vocabulary()),
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=192,
            decoder_ffn_dim=192,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            max_position_embeddings=24,
            dropout=0.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        )
    )


LANGUAGE = {
    "opt-mini": opt_mini,
    "llama-mini": llama_mini,
    "mistral-mini": mistral_mini,
    "roberta-mini": roberta_mini,
    "moe-mini": moe_mini,
}
MASK = 3  # the mask token of roberta-mini


def read_text() -> str:
    return "\n\n".join(topics[name] for name in sorted(topics))


def train_tokenizer(text: str, masked: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the text itself; for a masked model bytes alone, a mask token, and <s> and </s> around."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BYTES if masked else VOCABULARY,
        special_tokens=["<s>", "<pad>"] + (["</s>", "<mask>"] if masked else []),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    if not masked:
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<pad>")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", mask_token="<mask>"
    )


def split(text: str, tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens to train on, and those kept apart."""
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    pieces = tokens[: len(tokens) // PIECE * PIECE].view(-1, PIECE)
    held = torch.arange(len(pieces)) % HELD_OUT == 0
    return pieces[~held].flatten(), pieces[held].flatten()


def ask(model: PreTrainedModel, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every next token; or a random share of the tokens, which are masked, but for the first and the last."""
    if model.can_generate():
        return {"input_ids": windows, "labels": windows}
    masked = torch.rand(windows.shape) < MASKED
    masked[:, [0, -1]] = False
    return {"input_ids": windows.masked_fill(masked, MASK), "labels": windows.masked_fill(~masked, -100)}


def train(model: PreTrainedModel, tokens: torch.Tensor, steps: int = STEPS, rate: float = PEAK_RATE) -> None:
    """AdamW on random windows, each begun with BOS (and ended by EOS, if that differs); the rate rises, then falls."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    began = time.time()
    model.train()
    for step in range(steps):
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH, 1))
        windows = tokens[starts + torch.arange(CONTEXT)]
        windows[:, 0] = model.config.bos_token_id
        if model.config.eos_token_id != model.config.bos_token_id:
            windows[:, -1] = model.config.eos_token_id
        loss = model(**ask(model, windows)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}, {time.time() - began:.0f} s", flush=True)
    model.eval()


@torch.inference_mode()
def measure(model: PreTrainedModel, tokens: torch.Tensor) -> tuple[float, float]:
    """The cross-entropy of what it is asked, in nats, and the share that it answers right."""
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses, hits = [], []
    for part in windows.split(BATCH):
        asked = ask(model, part)
        output = model(**asked)
        shift = int(model.can_generate())
        labels = asked["labels"][:, shift:]
        right = output.logits[:, : CONTEXT - shift].argmax(-1) == labels
        losses.append(output.loss.expand(len(part)))
        hits.append(right[labels >= 0].float())
    return torch.cat(losses).mean().item(), torch.cat(hits).mean().item()


def unigram_entropy(counts: torch.Tensor) -> float:
    """Of guessing by frequency, in nats."""
    shares = counts[counts > 0] / counts.sum(dtype=torch.float64)
    return float(-(shares * shares.log()).sum())


def read_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Grey values, (images, 8, 8) uint8, and the digits, (images,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.tensor(digits.images * (255 / 16)).round().byte(), torch.tensor(digits.target)


def write_digits(images: torch.Tensor, labels: torch.Tensor, held: torch.Tensor, folder: Path) -> None:
    """The images that are held out as `held-out/<label>/<number>.png`, and some of the others to calibrate on."""
    from PIL import Image

    others = (~held).nonzero()[:, 0]
    chosen = others[torch.randperm(len(others))[:CALIBRATION_IMAGES]].tolist()
    paths = {number: folder / "calibration" / f"{number:04}.png" for number in chosen}
    paths |= {
        number: folder / "held-out" / str(labels[number].item()) / f"{number:04}.png"
        for number in held.nonzero()[:, 0].tolist()
    }
    for number, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[number].numpy()).save(path, optimize=True)


def train_on_images(model: PreTrainedModel, pixels: torch.Tensor, labels: torch.Tensor, steps: int) -> None:
    """AdamW on random images with noise; the rate rises, then falls with a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=IMAGE_RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    model.train()
    for step in range(steps):
        batch = torch.randint(len(pixels), (IMAGE_BATCH,))
        noisy = pixels[batch] + NOISE * torch.randn(IMAGE_BATCH, 1, IMAGE, IMAGE)
        loss = model(pixel_values=noisy, labels=labels[batch]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.eval()


def make_vit_mini(output: Path) -> None:
    images, labels = read_digits()
    held = torch.arange(len(images)) % HELD_OUT_IMAGES == 0
    write_digits(images, labels, held, output / "digits")
    model = vit_mini()
    processor = ViTImageProcessorPil(size={"height": IMAGE, "width": IMAGE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    pixels = (images / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)
    train_on_images(model, pixels[~held], labels[~held], IMAGE_STEPS)
    with torch.inference_mode():
        hits = model(pixel_values=pixels[held]).logits.argmax(-1) == labels[held]
    print(f"vit-mini: {hits.float().mean():.1%} of {len(hits)} held-out images", flush=True)
    model.save_pretrained(output / "vit-mini")
    processor.save_pretrained(output / "vit-mini")


ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def spell_number(number: int) -> str:
    """A number below a million in English words.

    Example:
        >>> spell_number(70_415)
        'seventy thousand four hundred fifteen'
    """
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            rest = f" {spell_number(number % size)}" if number % size else ""
            return f"{spell_number(number // size)} {name}{rest}"
    if number < len(ONES):
        return ONES[number]
    return TENS[number // 10 - 2] + (f" {ONES[number % 10]}" if number % 10 else "")


def spelling_vocabulary() -> dict[str, int]:
    words = ["<pad>", "<s>", "</s>", "<unk>", *map(str, range(10)), *ONES, *TENS, "hundred", "thousand"]
    return {word: number for number, word in enumerate(words)}


def spelling_tokenizer() -> PreTrainedTokenizerFast:
    """A digit or a word is a token; </s> ends a text."""
    tokenizer = Tokenizer(models.WordLevel(spelling_vocabulary(), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def draw_numbers(count: int, held_out: bool) -> list[int]:
    """Random numbers of one to six digits, as many of each; a tenth of all numbers is held out."""
    numbers: list[int] = []
    while len(numbers) < count:
        number = int(torch.randint(10 ** int(torch.randint(1, 7, ())), ()))
        if (number * 7919 % 1009 % HELD_OUT == 1) == held_out:
            numbers.append(number)
    return numbers


def write_numbers(path: Path, numbers: Sequence[int]) -> None:
    rows = ({"text": str(number), "target": spell_number(number)} for number in numbers)
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


def batch_numbers(tokenizer: PreTrainedTokenizerFast, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
    options = {"padding": True, "return_tensors": "pt", "return_token_type_ids": False}
    batch = dict(tokenizer(list(map(str, numbers)), **options))
    labels = tokenizer(list(map(spell_number, numbers)), **options)["input_ids"]
    return batch | {"labels": labels.masked_fill(labels == tokenizer.pad_token_id, -100)}


@torch.inference_mode()
def count_spelled(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, numbers: Sequence[int]) -> int:
    """How many numbers a model spells without a mistake, greedily."""
    batch = batch_numbers(tokenizer, numbers)
    del batch["labels"]
    spelled = tokenizer.batch_decode(model.generate(**batch, max_new_tokens=16), skip_special_tokens=True)
    return sum(text == spell_number(number) for text, number in zip(spelled, numbers, strict=True))


def make_bart_mini(output: Path) -> None:
    tokenizer, model = spelling_tokenizer(), bart_mini()
    optimizer = torch.optim.AdamW(model.parameters(), lr=NUMBER_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, NUMBER_RATE, NUMBER_STEPS, pct_start=0.1)
    began = time.time()
    model.train()
    for step in range(NUMBER_STEPS):
        loss = model(**batch_numbers(tokenizer, draw_numbers(NUMBER_BATCH, held_out=False))).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == NUMBER_STEPS - 1:
            print(f"step {step}: loss {loss.item():.4f}, {time.time() - began:.0f} s", flush=True)
    model.eval()
    held_out = draw_numbers(HELD_OUT_NUMBERS, held_out=True)
    right = count_spelled(model, tokenizer, held_out)
    print(f"bart-mini: {right} of {len(held_out)} held-out numbers spelled without a mistake", flush=True)
    folder = output / "bart-mini"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (output / "numbers").mkdir(exist_ok=True)
    write_numbers(output / "numbers" / "calibration.jsonl", draw_numbers(WRITTEN, held_out=False))
    write_numbers(output / "numbers" / "held-out.jsonl", held_out)


def make_language_model(name: str, output: Path) -> None:
    masked = name == "roberta-mini"
    text = read_text()
    tokenizer = train_tokenizer(text, masked)
    training, held_out = split(text, tokenizer)
    model = LANGUAGE[name]()
    is_mixture = getattr(model.config, "output_router_logits", False)
    steps = MIXTURE_STEPS if is_mixture else STEPS
    train(model, training, *((MASKED_STEPS, MASKED_RATE) if masked else (steps, PEAK_RATE)))
    if is_mixture:
        model.config.output_router_logits = False
        model.to(torch.bfloat16)
    loss, accuracy = measure(model, held_out)
    counts = held_out.bincount()
    print(
        f"{name}: held-out loss {loss:.3f}, unigram entropy {unigram_entropy(counts):.3f} nats a token; "
        f"top-1 {accuracy:.1%}, the most frequent token {counts.max() / counts.sum():.1%}",
        flush=True,
    )
    model.save_pretrained(output / name)
    tokenizer.save_pretrained(output / name)


def main() -> None:
    others = {"vit-mini": make_vit_mini, "bart-mini": make_bart_mini}
    names = [*LANGUAGE, *others]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--output", type=Path, default=HERE, help="folder to write them into")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other models of the same kind")
    options = parser.parse_args()
    for name in options.names or names:
        torch.manual_seed(options.seed)
        if name in others:
            others[name](options.output)
        else:
            make_language_model(name, options.output)


if __name__ == "__main__":
    main()
