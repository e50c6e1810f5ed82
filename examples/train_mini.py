"""Make the small trained models beside this file again: `python examples/train_mini.py [NAME ...]`.

The text is Python's language reference, which every Python carries (`pydoc_data.topics`), so nothing is fetched. Every
model is seeded; the same versions on the same kind of machine give the same weights. A model takes a few minutes on two
cores.
"""

import argparse
import math
import time
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).parent
VOCABULARY, CONTEXT = 1024, 128
BATCH, STEPS, PEAK_RATE, WARM_UP = 24, 500, 3e-3, 50  # more steps learn the text by heart
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


MODELS = {"opt-mini": opt_mini, "llama-mini": llama_mini}


def read_text() -> str:
    return "\n\n".join(topics[name] for name in sorted(topics))


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the text itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<pad>")


def train(model: PreTrainedModel, tokens: torch.Tensor, steps: int) -> None:
    """AdamW on random windows, each begun with BOS; the rate rises, then falls with a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.1, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    began = time.time()
    model.train()
    for step in range(steps):
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH, 1))
        windows = tokens[starts + torch.arange(CONTEXT)]
        windows[:, 0] = model.config.bos_token_id
        loss = model(input_ids=windows, labels=windows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}, {time.time() - began:.0f} s", flush=True)
    model.eval()


@torch.inference_mode()
def measure_loss(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return sum(model(input_ids=part, labels=part).loss.item() * len(part) for part in windows.split(BATCH)) / len(
        windows
    )


def unigram_entropy(tokens: torch.Tensor) -> float:
    counts = torch.tensor(list(Counter(tokens.tolist()).values()), dtype=torch.float64)
    shares = counts / counts.sum()
    return float(-(shares * shares.log()).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which models ({', '.join(MODELS)}); all by default")
    parser.add_argument("--output", type=Path, default=HERE, help="folder to write them into")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    options = parser.parse_args()
    text = read_text()
    tokenizer = train_tokenizer(text)
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    pieces = tokens[: len(tokens) // PIECE * PIECE].view(-1, PIECE)
    held = torch.arange(len(pieces)) % HELD_OUT == 0
    training, held_out = pieces[~held].flatten(), pieces[held].flatten()
    for name in options.names or MODELS:
        torch.manual_seed(0)
        model = MODELS[name]()
        train(model, training, options.steps)
        loss, entropy = measure_loss(model, held_out), unigram_entropy(held_out)
        print(f"{name}: held-out loss {loss:.3f}, unigram entropy {entropy:.3f} nats a token", flush=True)
        model.save_pretrained(options.output / name)
        tokenizer.save_pretrained(options.output / name)


if __name__ == "__main__":
    main()
