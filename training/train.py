"""Train one of the two abacus models: `python training/train.py --model hybrid --out DIR --seed 0`.

See README.md beside this for the settings of the shipped checkpoints and what they reach.
"""

from __future__ import annotations

import argparse
import logging
import signal
import time
from pathlib import Path

import torch
from configs import CONFIGS
from data import Chats, heldout, loader
from export import restore, write
from model import Layer, Model
from step import Step, optimizers
from torch import Tensor

from tessera.evals.tasks import TASKS

log = logging.getLogger("train")
Marked = list[tuple[Tensor, Tensor]]


def exact(step: Step, sets: dict[str, Marked]) -> dict[str, float]:
    """Share of held-out questions with every answer token the most likely one: what greedy decoding would get."""
    shares: dict[str, float] = {}
    for task, batches in sets.items():
        right = total = drafted = drawn = 0
        for tokens, marks in batches:
            logits, drafts = step.predict(tokens)
            tokens, marks = tokens.to(logits.device), marks.to(logits.device)
            said = logits.argmax(-1)
            right += ((said == tokens[:, 1:-1]) | ~marks[:, 1:-1]).all(1).sum().item()
            total += len(tokens)
            if drafts is not None:
                drafted += ((drafts.argmax(-1)[:, :-1] == said[:, 1:]) & marks[:, 2:-1]).sum().item()
                drawn += marks[:, 2:-1].sum().item()
        shares[task] = right / total
        if drawn:
            shares[f"{task} draft"] = drafted / drawn
    return shares


def train(args: argparse.Namespace) -> None:
    deadline = time.monotonic() + 60 * args.minutes
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = CONFIGS[args.model]
    model = restore(args.start) if args.start else Model(config)
    model = model.to(device)
    log.info("%s: %.2f M parameters", args.model, sum(p.numel() for p in model.parameters()) / 1e6)
    if args.compile:  # every shape is fixed; only the layers: they are few kinds and hold nearly all the work
        Layer.forward = torch.compile(Layer.forward, dynamic=False)
    tokenizer = args.tokenizer / "tokenizer.json"
    length = args.length + 2
    sets = {task: heldout(tokenizer, task, args.eval, args.rows, length) for task in TASKS}
    mix = dict(zip(TASKS, args.mix, strict=True))
    batches = iter(loader(Chats(tokenizer, args.rows, length, mix, args.seed), args.workers))
    step = Step(model, optimizers(model, args.lr, args.adam_lr), args.rows, length, args.apart)
    signal.alarm(args.prepare)  # a compiler that does not come back ends this process
    if args.graph:
        step.capture(next(batches))
    signal.alarm(0)
    started = time.monotonic()
    log.info("ready, %.0f s left", deadline - started)
    done, number = 0.0, 0
    while done < 1:
        # by steps; by time only where the minutes would not suffice, so that the rate always falls to zero
        done = max((number + 1) / args.steps, (time.monotonic() - started) / (deadline - started))
        step.rate(min(1.0, (number + 1) / 100) * min(1.0, max(0.0, (1 - done) / args.cooldown)))
        step.run(next(batches))
        number += 1
        if number % args.every == 0 or number in (1, 20) or done >= 1:
            shares = " ".join(f"{task} {share:.3f}" for task, share in exact(step, sets).items())
            loss, balance = step.losses.tolist()
            spent = time.monotonic() - started
            log.info("%5d %4.0fs loss %.4f balance %.3f  %s", number, spent, loss, balance, shares)
            write(model, config, args.tokenizer, args.out)


def main() -> None:
    here = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(CONFIGS), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a checkpoint to go on from")
    parser.add_argument("--tokenizer", type=Path, default=here / "src/tessera/assets/abacus-hybrid")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--minutes", type=float, default=600.0, help="end within this time, cooled down")
    parser.add_argument("--rows", type=int, default=96, help="chats in a batch")
    parser.add_argument("--length", type=int, default=384, help="tokens of a chat")
    parser.add_argument("--mix", type=float, nargs=3, default=(3, 3, 4), help=f"how often {', '.join(TASKS)} is drawn")
    parser.add_argument("--apart", action="store_true", help="attention keeps to the topic of a chat")
    parser.add_argument("--lr", type=float, default=0.02, help="of Muon")
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--cooldown", type=float, default=0.5, help="share of the steps over which the rate falls")
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--eval", type=int, default=384, help="held-out questions of each task")
    parser.add_argument("--every", type=int, default=500, help="steps between evaluations")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--prepare", type=int, default=150, help="seconds allowed for compiling and capturing")
    parser.add_argument("--graph", action="store_true", help="replay the whole step as one CUDA graph")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
