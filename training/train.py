"""Train one of the two abacus models: `python training/train.py --model hybrid --out DIR --seed 0`.

See README.md beside this for the settings of the shipped checkpoints and what they reach.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from configs import CONFIGS
from data import heldout, loader
from export import write
from model import Layer, Model
from muon import Muon
from torch import Tensor

from tessera.evals.tasks import TASKS

log = logging.getLogger("train")
BALANCE, DRAFT = 0.01, 1.0  # weights of the router's and the drafter's loss; the drafter's does not reach the trunk
ADAM = (
    "embed_tokens",
    "lm_head",
    "norm",
    "A_log",
    "dt_bias",
    "conv1d",
    "mlp.gate.",
    "_gate.",
    "in_proj_a",
    "in_proj_b",
)


def loss_of(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy averaged by weight; logits [B, T, V], targets and weights [B, T]."""
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    weights = weights.flatten()
    return (loss * weights).sum() / weights.sum()


def exact(model: Model, sets: dict, cast: torch.autocast, device: str) -> dict[str, float]:
    """Share of held-out questions with every answer token the most likely one: what greedy decoding would get.

    In the training's batch shape and with gradients on, so that nothing is compiled a second time.
    """
    shares: dict[str, float] = {}
    for task, batches in sets.items():
        right = total = drafted = drawn = 0
        for tokens, marks in batches:
            tokens, marks = tokens.to(device), marks.to(device)
            with cast:
                logits, drafts, _ = model(tokens)
            said = logits.argmax(-1)
            right += ((said == tokens[:, 1:]) | ~marks[:, 1:]).all(1).sum().item()
            total += len(tokens)
            if drafts is not None:
                drafted += ((drafts.argmax(-1) == said[:, 1:]) & marks[:, 2:]).sum().item()
                drawn += marks[:, 2:].sum().item()
        shares[task] = right / total
        if drawn:
            shares[f"{task} draft"] = drafted / drawn
    return shares


def optimizers(model: Model, lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    named = list(model.named_parameters())
    small = [p for name, p in named if p.ndim < 2 or any(part in name for part in ADAM)]
    ids = {id(p) for p in small}
    fused = small[0].is_cuda
    return [
        Muon([p for _, p in named if id(p) not in ids], lr=lr),
        torch.optim.AdamW(small, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=fused),
    ]


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = CONFIGS[args.model]
    model = Model(config).to(device)
    tokenizer = args.tokenizer / "tokenizer.json"
    if args.compile:
        torch._dynamo.config.recompile_limit = 64
        Layer.forward = torch.compile(Layer.forward)
    cast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    opts = optimizers(model, args.lr, args.adam_lr)
    rates = [opt.param_groups[0]["lr"] for opt in opts]
    sets = {task: heldout(tokenizer, task, args.eval, args.rows, args.length + 1) for task in TASKS}
    log.info("%s: %.2f M parameters", args.model, sum(p.numel() for p in model.parameters()) / 1e6)
    started = time.monotonic()
    batches = iter(loader(tokenizer, args.rows, args.length + 1, args.seed, args.workers))
    done, step = 0.0, 0
    while done < 1:
        # by steps; by time only where the minutes would not suffice, so that the rate always falls to zero
        done = max((step + 1) / args.steps, (time.monotonic() - started) / (60 * args.minutes))
        rate = min(1.0, (step + 1) / 100) * min(1.0, max(0.0, (1 - done) / args.cooldown))
        for opt, base in zip(opts, rates, strict=True):
            opt.param_groups[0]["lr"] = base * rate
        tokens, weights = (part.to(device, non_blocking=True) for part in next(batches))
        weights = weights.float()
        with cast:
            logits, drafts, balance = model(tokens)
            loss = total = loss_of(logits, tokens[:, 1:], weights[:, 1:])
            total = total + BALANCE * balance
            if drafts is not None:
                total = total + DRAFT * loss_of(drafts, tokens[:, 2:], weights[:, 2:])
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        step += 1
        if step % args.every == 0 or step in (1, 20) or done >= 1:
            shares = " ".join(f"{task} {share:.3f}" for task, share in exact(model, sets, cast, device).items())
            log.info(
                "%5d %4.0fs loss %.4f balance %.3f  %s",
                step,
                time.monotonic() - started,
                loss.item(),
                balance.item(),
                shares,
            )
            write(model, config, args.tokenizer, args.out)


def main() -> None:
    here = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(CONFIGS), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, default=here / "src/tessera/assets/abacus-hybrid")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--minutes", type=float, default=600.0, help="end within this time, cooled down")
    parser.add_argument("--rows", type=int, default=96, help="chats in a batch")
    parser.add_argument("--length", type=int, default=384, help="tokens of a chat")
    parser.add_argument("--lr", type=float, default=0.02, help="of Muon")
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--cooldown", type=float, default=0.5, help="share of the steps over which the rate falls")
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--eval", type=int, default=384, help="held-out questions of each task")
    parser.add_argument("--every", type=int, default=500, help="steps between evaluations")
    parser.add_argument("--compile", action="store_true")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
