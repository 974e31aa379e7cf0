"""One training step: forward, backward, clipping and the optimizers; on a GPU it can be replayed as one CUDA graph.

A step of so small a model is over a thousand short kernels: launched one by one, they leave the GPU waiting.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from model import Model
from muon import Muon
from torch import Tensor

BALANCE, DRAFT = 0.01, 1.0  # weights of the router's and the drafter's loss; the drafter's does not reach the trunk
ADAM = (
    "embed_tokens", "lm_head", "norm", "A_log", "dt_bias", "conv1d", "mlp.gate.", "_gate.", "in_proj_a", "in_proj_b",
)  # fmt: skip


def loss_of(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy averaged by weight; logits [B, T, V], targets and weights [B, T]."""
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    weights = weights.flatten()
    return (loss * weights).sum() / weights.sum()


def optimizers(model: Model, lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the rest. The rates are tensors, read by a captured step."""
    named = list(model.named_parameters())
    small = [p for name, p in named if p.ndim < 2 or any(part in name for part in ADAM)]
    ids = {id(p) for p in small}
    cuda, device = small[0].is_cuda, small[0].device
    return [
        Muon([p for _, p in named if id(p) not in ids], lr=torch.tensor(lr, device=device)),
        torch.optim.AdamW(
            small, torch.tensor(adam_lr, device=device), (0.9, 0.98), weight_decay=0.0, fused=cuda, capturable=cuda
        ),
    ]


class Step:
    """`apart`: attention does not reach over a chat's topics; the questions are asked one by one, after all."""

    def __init__(
        self, model: Model, opts: list[torch.optim.Optimizer], rows: int, length: int, apart: bool = False
    ) -> None:
        device = next(model.parameters()).device
        self.model, self.opts = model, opts
        self.tokens = torch.zeros(rows, length, dtype=torch.long, device=device)
        self.weights = torch.zeros(rows, length, device=device)
        self.topics = torch.zeros(rows, length, dtype=torch.uint8, device=device) if apart else None
        self.losses = torch.zeros(2, device=device)  # of the language model, of the router
        self.rates = [(opt.param_groups[0]["lr"], float(opt.param_groups[0]["lr"])) for opt in opts]
        self.cast = torch.autocast(device.type, torch.bfloat16)
        self.graph: torch.cuda.CUDAGraph | None = None

    def rate(self, factor: float) -> None:
        for lr, base in self.rates:
            lr.fill_(base * factor)

    def load(self, batch: tuple[Tensor, ...]) -> None:
        for held, new in zip((self.tokens, self.weights, self.topics), batch, strict=True):
            if held is not None:
                held.copy_(new, non_blocking=True)

    def run(self, batch: tuple[Tensor, ...]) -> None:
        self.load(batch)
        self.graph.replay() if self.graph else self.compute()

    def predict(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits and drafts of tokens [B, T + 2]; with gradients on, so that nothing is compiled a second time."""
        topics = None if self.topics is None else torch.zeros_like(self.topics)
        with self.cast:
            return self.model(tokens.to(self.tokens.device), topics)[:2]

    def compute(self) -> None:
        tokens, weights = self.tokens, self.weights
        with self.cast:
            logits, drafts, balance = self.model(tokens, self.topics)
            loss = loss_of(logits, tokens[:, 1:-1], weights[:, 1:-1])
            total = loss + BALANCE * balance
            if drafts is not None:
                total = total + DRAFT * loss_of(drafts, tokens[:, 2:], weights[:, 2:])
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for opt in self.opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        self.losses.copy_(torch.stack([loss, balance]).detach())

    def capture(self, batch: tuple[Tensor, ...]) -> None:
        """Three steps at rate zero on one batch, to compile and to allocate; then the step is recorded."""
        self.load(batch)
        self.rate(0.0)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a loader's thread pins memory meanwhile
            self.compute()
        self.graph = graph
