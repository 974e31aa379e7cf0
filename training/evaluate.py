"""Held-out accuracy of a checkpoint as transformers runs it: the saved bfloat16 weights in float32, greedy.

`python training/evaluate.py src/tessera/assets/abacus-hybrid` prints accuracy by task, the drafter's agreement, the
largest logit difference between transformers and the training module, and how evenly the experts are used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from export import restore
from model import Model, MoE
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from tessera.evals.tasks import TASKS, Question, Task

Fault = Callable[[DynamicCache], None]


def say(line: str) -> None:
    sys.stdout.write(line + "\n")


def load(path: Path) -> tuple[AutoModelForCausalLM, AutoTokenizer]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path, padding_side="left")


def chats(tokenizer: AutoTokenizer, questions: list[Question]) -> dict[str, Tensor]:
    """Left-padded prompts, as the chat template writes them."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": q.prompt}], add_generation_prompt=True, tokenize=False
        )
        for q in questions
    ]
    return tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)


@torch.no_grad()
def greedy(
    model: AutoModelForCausalLM,
    tokenizer: AutoTokenizer,
    task: Task,
    questions: list[Question],
    fault: Fault | None = None,
) -> list[str]:
    """Completions; `fault` may tamper with the cache between the prefill and the first decoding step."""
    batch = chats(tokenizer, questions)
    mask = batch["attention_mask"]
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(
        input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions, past_key_values=cache
    ).logits[:, -1]
    if fault:
        fault(cache)
    said = [logits.argmax(-1)]
    stops = torch.tensor(model.generation_config.eos_token_id)
    over = torch.isin(said[0], stops)
    while len(said) < task.max_tokens and not over.all():
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        positions = mask.sum(1, keepdim=True) - 1
        logits = model(
            input_ids=said[-1][:, None], attention_mask=mask, position_ids=positions, past_key_values=cache
        ).logits[:, -1]
        said.append(torch.where(over, stops[0], logits.argmax(-1)))
        over |= torch.isin(said[-1], stops)
    return tokenizer.batch_decode(torch.stack(said, 1), skip_special_tokens=True)


def accuracy(
    model: AutoModelForCausalLM,
    tokenizer: AutoTokenizer,
    task: Task,
    questions: list[Question],
    fault: Fault | None = None,
) -> float:
    right = 0
    for start in range(0, len(questions), 50):
        part = questions[start : start + 50]
        right += sum(map(task.score, part, greedy(model, tokenizer, task, part, fault)))
    return right / len(questions)


@torch.no_grad()
def parity(model: AutoModelForCausalLM, ours: Model, tokenizer: AutoTokenizer) -> float:
    worst = 0.0
    for task in TASKS.values():
        for question in task.questions("heldout", 4, seed=2):
            tokens = chats(tokenizer, [question])["input_ids"]
            theirs = model(input_ids=tokens[:, :-2]).logits
            worst = max(worst, (ours(tokens)[0] - theirs).abs().max().item())
    return worst


@torch.no_grad()
def agreement(ours: Model, tokenizer: AutoTokenizer, task: Task, questions: list[Question]) -> float:
    """How often the draft of token t+2 is what the trunk says after token t+1, over the answers."""
    same = total = 0
    for question in questions:
        prompt = chats(tokenizer, [question])["input_ids"]
        answer = tokenizer(question.answer + "<|im_end|>", return_tensors="pt", add_special_tokens=False)["input_ids"]
        logits, drafts, _ = ours(torch.cat([prompt, answer, answer[:, -1:]], 1))
        assert drafts is not None
        said, drawn = logits[0, prompt.shape[1] :].argmax(-1), drafts[0, prompt.shape[1] - 1 : -1].argmax(-1)
        same += (said == drawn).sum().item()
        total += len(said)
    return same / total


@torch.no_grad()
def expert_use(ours: Model, tokenizer: AutoTokenizer) -> list[tuple[float, float]]:
    """Least and greatest share of an expert in each layer, over prompts of all tasks (even: 1 / experts)."""
    shares: list[Tensor] = []
    blocks = [module for module in ours.model.modules() if isinstance(module, MoE)]
    counts = [torch.zeros(block.gate.out_features) for block in blocks]

    def hook(block: MoE, inputs: tuple[Tensor]) -> None:
        chosen = block.gate(inputs[0]).topk(block.top_k, -1).indices
        counts[blocks.index(block)] += torch.bincount(chosen.flatten(), minlength=block.gate.out_features)

    handles = [block.register_forward_pre_hook(hook) for block in blocks]
    for task in TASKS.values():
        for question in task.questions("heldout", 8, seed=2):
            ours(chats(tokenizer, [question])["input_ids"])
    for handle in handles:
        handle.remove()
    shares = [count / count.sum() for count in counts]
    return [(share.min().item(), share.max().item()) for share in shares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--num", type=int, default=300, help="questions of each task")
    args = parser.parse_args()
    model, tokenizer = load(args.checkpoint)
    ours = restore(args.checkpoint)
    say(f"parameters {sum(p.numel() for p in ours.parameters()) / 1e6:.2f} M")
    say(f"largest logit difference to transformers, float32: {parity(model, ours, tokenizer):.1e}")
    for low, high in expert_use(ours, tokenizer):
        say(f"expert use in a layer: {low:.3f} to {high:.3f}")
    for name, task in TASKS.items():
        questions = task.questions("heldout", args.num, seed=0)
        line = f"{name:8} accuracy {100 * accuracy(model, tokenizer, task, questions):5.1f} %"
        if ours.mtp is not None:
            line += f"   draft agreement {100 * agreement(ours, tokenizer, task, questions[:100]):5.1f} %"
        say(line)


if __name__ == "__main__":
    main()
