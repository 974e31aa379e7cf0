"""The tokenizer of the abacus models: byte-level BPE of 512 tokens, trained on the text of the tasks.

256 byte symbols (any text encodes), 253 merges, 3 specials. Each digit is a token of its own, so a number's digits are
decoded one by one. Run `python training/tokenizer.py --out DIR`; the result depends on nothing but this file and
`tessera.evals.tasks`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tessera.evals.tasks import TASKS, recall_ask

VOCAB = 512
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # the last three ids, in this order
# Qwen's splitting pattern: a word takes the space before it along, a digit stands alone.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def corpus(num: int = 4000) -> Iterator[str]:
    """Training text: prompts and answers of every task, and the words around them in a chat."""
    rng = random.Random(0)
    for _ in range(num):
        yield "system\nuser\nassistant\nYou are a helpful assistant."
        yield recall_ask(rng.choice("abcdefgh"))
        for task in TASKS.values():
            assert task.make is not None
            question = task.make(rng)
            yield from (question.prompt, question.answer)


def build() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens(list(SPECIALS))
    assert tokenizer.get_vocab_size() == VOCAB
    return tokenizer


def save(tokenizer: Tokenizer, out: Path) -> None:
    """`tokenizer.json` and `tokenizer_config.json`, as Hugging Face reads them."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    save(build(), parser.parse_args().out)
