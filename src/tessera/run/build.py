"""From a resolved configuration to ranks that run: planner, pools, table, model, runner."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from tessera.comm.alone import Alone
from tessera.comm.base import Comm
from tessera.comm.local import LocalGroup
from tessera.comm.rehearsal import Rehearsing
from tessera.comm.waits import interleave
from tessera.core.config.types import Config, MeshConfig
from tessera.core.spec import ModelSpec
from tessera.core.tensors import CacheSpec, cache_table
from tessera.core.weights import weight_table
from tessera.models.build import build_model
from tessera.models.decoder import Decoder
from tessera.models.load import Progress, load_weights
from tessera.models.source import Source
from tessera.ops.backend import Backend, chosen
from tessera.ops.linear import PackedLinear
from tessera.plan.handoff import HandoffConfig
from tessera.plan.scheduler import PlannerConfig
from tessera.run.batch import Input
from tessera.run.graphs import CudaGraphs, Graphs
from tessera.run.group import Group
from tessera.run.host import Executor, Inline, Worker, finished
from tessera.run.hugepages import gather_pages
from tessera.run.needs import kept_for_steps
from tessera.run.pools import Pools
from tessera.run.poster import Poster
from tessera.run.processes import Processes, Tell, unheard
from tessera.run.profiling import Tracer
from tessera.run.rowparams import RowParams
from tessera.run.runner import Runner
from tessera.run.sampler import Sampler
from tessera.run.stages import Stages
from tessera.run.table import RowTable
from tessera.run.trials import Trials
from tessera.transfer.engines import make_engine
from tessera.transfer.manifest import member

Instance = Runner | Group | Processes
Caches = tuple[CacheSpec, ...]


class Driven:
    """A decoder as a `Model`: a step whole, or its two halves side by side."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.vocab_size = decoder.spec.vocab_size

    def forward(self, inputs: tuple[Input, ...], caches: dict[str, Tensor]) -> Tensor:
        largest = max(sum(i.counts) for i in inputs)
        found = interleave([self.decoder.hidden(i.tokens, i.segments, caches, i.counts, largest) for i in inputs])
        return found[0] if len(found) == 1 else torch.cat(found)

    def logits(self, hidden: Tensor, counts: tuple[int, ...]) -> Tensor:
        return self.decoder.logits(hidden, counts)

    def narrow_logits(self, hidden: Tensor, counts: tuple[int, ...]) -> Tensor:
        return self.decoder.narrow_logits(hidden, counts)


def planner_config(config: Config) -> PlannerConfig:
    """What the planner may use."""
    memory, scheduling = config.memory, config.scheduling
    return PlannerConfig(
        max_running=scheduling.max_running,
        num_pages=memory.num_pages,
        page_size=memory.page_size,
        max_context=config.model.context_length,
        num_slots=memory.num_slots,
        num_dp=config.mesh.dp,
        chunk_size=scheduling.chunk_size,
        alone_size=scheduling.alone_size,
        max_prefill_tokens=scheduling.max_prefill_tokens,
        mixed=scheduling.mixed,
        max_in_flight=scheduling.max_in_flight,
        prefix_cache=scheduling.prefix_cache,
        policy=scheduling.policy,
        load_balance=config.mesh.balance,
        max_queued=scheduling.max_queued,
        split_from=scheduling.split_from,
        split_share=scheduling.split_share,
        handoff=handoff_config(config),
    )


def handoff_config(config: Config) -> HandoffConfig | None:
    """How the planner hands over, if it does."""
    handover, mesh = config.handover, config.mesh.mesh
    if handover.role == "null":
        return None
    return HandoffConfig(
        role=handover.role,
        num_writers=mesh.size_of("attn"),
        num_ranks=mesh.size,
        bootstrap_s=handover.bootstrap_timeout,
        meet_s=handover.decode_bootstrap_timeout,
        waiting_s=handover.waiting_timeout,
    )


def build_instance(
    config: Config, spec: ModelSpec, source: Source, progress: Progress | None = None, tell: Tell = unheard
) -> Instance:
    """All ranks of one instance: one in this process, several as processes, which read the model themselves.

    With `--collectives threads` several are threads of this process. `tell`: told, in any thread, what ranks have to
    say about hand-overs.
    """
    if config.handover.role != "null":  # a library that is missing is told before ranks start and weights are read
        make_engine(config.handover.engine, devices=config.handover.devices).close()
    if config.mesh.mesh.size == 1:
        return build_runner(config, spec, source, progress, tell=tell)
    if config.mesh.collectives != "threads":
        return Processes(config, progress, tell)
    return _threads(config, spec, source, progress, tell)


def _threads(config: Config, spec: ModelSpec, source: Source, progress: Progress | None, tell: Tell) -> Group:
    mesh = config.mesh.mesh
    meeting = LocalGroup(mesh)
    runners, loaded = [], [0 for _ in range(mesh.size)]
    for rank in range(mesh.size):
        executor = Worker(f"tessera-rank-{rank}", failed=partial(meeting.fail, rank))
        told = progress and partial(_of_all, progress, loaded, rank)
        runners.append(build_runner(config, spec, source, told, executor, rank, meeting.comm(rank), tell=tell))
    return Group(runners, meeting)


def _of_all(progress: Progress, loaded: list[int], which: int, done: int, total: int) -> None:
    """Progress of one of several, as that of all."""
    loaded[which] = done
    progress(sum(loaded), len(loaded) * total)


def build_runner(
    config: Config,
    spec: ModelSpec,
    source: Source,
    progress: Progress | None = None,
    executor: Executor | None = None,
    rank: int = 0,
    comm: Comm | None = None,
    device: torch.device | None = None,
    tell: Tell = unheard,
) -> Runner:
    """Loads the weights and allocates the pools of one rank. `comm`: its collectives, where there are others.

    `device`: which one, where there are several. `tell`: see `build_instance`.
    """
    mesh, memory, device = config.mesh.mesh, config.memory, device or _home(config.mesh)
    backend, stages = chosen(config.kernels), Stages(weight_bytes=memory.weight_bytes)
    with stages.timed("kernels"):
        backend.compile(spec, getattr(torch, config.model.dtype), getattr(torch, memory.kv_dtype))
    with stages.timed("weights"):
        shared = Rehearsing(comm or Alone())
        decoder, weights = load_decoder(config, spec, source, backend, rank, shared, device, progress)
    caches = cache_table(spec, memory.page_size, memory.dtypes)
    rows, context = config.scheduling.max_running, config.model.context_length
    graphed = any(config.kernels.graphs)
    with stages.timed("pools"):
        table = RowTable(rows, context, memory.page_size, spec.eos, device, mirror_pages=graphed)
        params = RowParams(rows, device)
        model, pools = Driven(decoder), Pools(caches, memory.num_pages, memory.num_slots, device, mesh, rank)
        if device.type == "cpu":
            gather_pages(weights)
        finished(device)
    executor = executor or default_executor(config)
    recorder = CudaGraphs(kept_for_steps(memory.needs))
    ops = (backend.expand, backend.greedy)
    args = (model, table, pools.tensors, memory.page_size, *ops, recorder, mesh.size_of("dp"), shared)
    return Runner(
        model,
        table,
        params,
        pools,
        Sampler(table, params, backend.draw),
        memory.page_size,
        executor,
        dp_rank=mesh.coordinate(rank, "dp"),
        debug=config.logging.checks,
        post=make_post(config, caches, pools, rank, tell),
        graphs=Graphs(config.kernels.graphs, *args) if graphed else None,
        stages=stages,
        trials=Trials(model, table, pools, memory.page_size, mesh.coordinate(rank, "dp"), shared),
        tracer=Tracer(rank, device, executor, tell, mesh.size if config.mesh.collectives == "threads" else 1),
    )


def load_decoder(
    config: Config,
    spec: ModelSpec,
    source: Source | None,
    backend: Backend,
    rank: int,
    comm: Comm,
    device: torch.device,
    progress: Progress | None,
) -> tuple[Decoder, list[Tensor]]:
    """The model of a rank with its weights on the device, and those of its products, as the model keeps them.

    `source` None: see `load_weights`.
    """
    mesh, dtype = config.mesh.mesh, getattr(torch, config.model.dtype)
    table = weight_table(spec, mesh, quantization=config.model.quantization)
    kernels, packs = config.kernels, (backend.pack, progress, backend.pack_fp8, config.kernels.wide.sums)
    tiles = load_weights(source, table, mesh, rank, dtype, device, *packs)
    sizes = config.model.context_length, kernels.padded_up_to, kernels.wide
    decoder = build_model(spec, mesh, rank, tiles, comm, backend, *sizes)
    weights = [t for tile in tiles.values() if isinstance(tile, PackedLinear) for t in tile.tensors()]
    weights.append(decoder.head.weight.weight)
    finished(device)
    return decoder, weights


def _home(mesh: MeshConfig) -> torch.device:
    """The device of a rank that is alone in its process."""
    if mesh.device != "cuda":
        return torch.device(mesh.device)
    torch.cuda.set_device(mesh.devices[0])
    return torch.device(mesh.device, mesh.devices[0])


def make_post(config: Config, caches: Caches, pools: Pools, rank: int, tell: Tell) -> Poster | None:
    """A rank's end of hand-overs: its transfer engine, which knows the pools. None where nothing is handed over."""
    handover, host = config.handover, config.serving.host
    if handover.role == "null":
        return None
    engine = make_engine(handover.engine, host, handover.devices)
    held = member(handover.engine, engine, caches, pools.tensors, pools.num_pages, pools.num_slots)
    return Poster(engine, config.mesh.mesh, rank, held, tell)


def default_executor(config: Config) -> Executor:
    """A thread of its own where the forward blocks its caller and there is something to overlap it with."""
    overlapped = config.mesh.device == "cpu" and config.scheduling.max_in_flight > 1
    return Worker() if overlapped else Inline()
