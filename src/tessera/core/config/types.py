"""What `resolve` works with: the hardware that was measured, the configuration that results, and the choices made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from tessera.core.config.flag import Flag
from tessera.core.errors import Conflict
from tessera.core.mesh import Mesh, instance_mesh, ranks_of, share
from tessera.core.parts import NOTHING, Wide
from tessera.core.quantization import Quantization
from tessera.core.tensors import CacheDtypes

MEET_SECONDS = 120.0  # for processes of one host


@dataclass(frozen=True, slots=True)
class Hardware:
    """What one host offers, measured outside (`run/hardware.py`).

    `memory`: bytes free at start, of the RAM that this process can still get (cpu) or of each device (cuda).
    `capability`: compute capability of CUDA devices. `bf16`: matrix products in bfloat16 are at least as fast as in
    float32. `libraries`: which of the optional kernel libraries can be imported.
    """

    device: str
    memory: int
    count: int = 1
    name: str = ""
    capability: tuple[int, int] | None = None
    bf16: bool = True
    libraries: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """A choice made for the user, printed once at start-up. Flags and variables that mean nothing here: "ignored"."""

    what: str
    value: object
    why: str

    def __str__(self) -> str:
        return f"{self.what}: {self.value} ({self.why})"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which model. dtypes are torch's names. `tokenizer_path` None: no tokeniser is loaded. `seed`: of requests without
    one, and of dummy weights. `context_length`: most tokens of one sequence. `quantization`: of the weights."""

    path: str
    served_name: str
    tokenizer_path: str | None
    revision: str | None
    download_dir: str | None
    chat_template: str | None
    dtype: str
    load_format: str
    context_length: int
    seed: int
    quantization: Quantization | None = None


@dataclass(frozen=True, slots=True)
class MeshConfig:
    """Which ranks. `device`: "cpu" or "cuda". `tp`: all ranks of an instance, on `num_nodes` hosts that meet at
    `meeting`, of which this is `node_rank`; all have come within `meet_within` seconds. `dp`: groups of the attention.
    `replicas`: instances behind one front, of which this is `replica`. `balance`: how requests are spread over groups
    or replicas. `collectives`: see `comm/connect.py`; ranks are processes, but with "threads". `peers`: GPUs take small
    ones into their own hands.
    """

    device: str
    tp: int = 1
    dp: int = 1
    ep: int = 1
    dense_tp: int = 1
    replicas: int = 1
    replica: int = 0
    dp_lm_head: bool = False
    all_to_all: bool = False
    balance: str = "round_robin"
    num_nodes: int = 1
    node_rank: int = 0
    meeting: str | None = None
    meet_within: float = MEET_SECONDS
    collectives: str = "shared"
    peers: bool = False

    @property
    def mesh(self) -> Mesh:
        """The ranks with their named axes."""
        return instance_mesh(self.tp, self.dp, self.ep, self.dense_tp, self.dp_lm_head, self.all_to_all)

    @property
    def devices(self) -> range:
        """Numbers of the devices of this replica on its host, by rank."""
        return ranks_of(self.tp * self.replicas, self.replicas, self.replica)

    @property
    def num_dp(self) -> int:
        """Data-parallel ranks that a request may name: groups of the attention, or replicas."""
        return self.dp * self.replicas

    @property
    def follows_rooms(self) -> bool:
        """A request goes where its room says, so it must have one."""
        return self.num_dp > 1 and self.balance == "follow_bootstrap_room"

    @property
    def ranks_here(self) -> int:
        """Ranks on this host, those of all replicas."""
        return max(share(self.tp * self.replicas, self.num_nodes), 1)


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """Sizes of the pools of one rank, and the bytes they come to.

    `num_pages` and `num_slots` count the scratch page 0 and the scratch slot 0, so requests use 1 .. num - 1;
    `num_slots` is 0 for models without recurrent state. `page_bytes` and `slot_bytes` are those of all layers together.
    `budget`: bytes that weights and pools may take. `needs`: what else the memory goes to, named rows of bytes, which
    are upper bounds (`needs.py`); the others are exact.
    """

    page_size: int
    num_pages: int
    num_slots: int
    kv_dtype: str
    conv_dtype: str
    state_dtype: str
    weight_bytes: int
    page_bytes: int
    slot_bytes: int
    budget: int
    available: int
    needs: tuple[tuple[str, int], ...] = ()

    @property
    def dtypes(self) -> CacheDtypes:
        """The dtypes of the caches."""
        return CacheDtypes(self.kv_dtype, self.conv_dtype, self.state_dtype)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV pool."""
        return self.num_pages * self.page_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes of the pools of recurrent state."""
        return self.num_slots * self.slot_bytes


@dataclass(frozen=True, slots=True)
class SchedulingConfig:
    """How steps are planned; see `plan/config.py`.

    `max_running`: rows of the row table. `max_queued`: most requests waiting. `chunk_size`: most tokens of a step that
    holds prompts (0: prompts are not cut), `alone_size` the same while nobody decodes. `max_prefill_tokens`: most
    prompt tokens of a step. `mixed`: decodes ride with prompts. `max_in_flight`: steps launched and not yet collected
    (2: overlap schedule). `split_from`: steps whose largest part has so many tokens run as two halves, interleaved (0:
    none); with `split_measured` the smallest size that is tried at start, which finds out from where on it pays; where
    `split_share` of the tokens cannot be had by cutting between sequences, one is cut.
    """

    max_running: int
    max_queued: int
    chunk_size: int
    alone_size: int
    max_prefill_tokens: int
    mixed: bool
    policy: str
    prefix_cache: bool
    max_in_flight: int
    split_from: int = 0
    split_measured: bool = False
    split_share: float = 0.48


class GraphSizes(NamedTuple):
    """Padded sizes of the steps that run as CUDA graphs, ascending: `rows` of steps in which every range is of one
    token; else `segments` by `tokens`. All empty: none does."""

    rows: tuple[int, ...] = ()
    segments: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()


NO_GRAPHS = GraphSizes()


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """Which kernels, by the name of their backend. `padded_up_to`: most tokens of a step, all DP ranks together, that
    travel to experts in exchanges of one size. `fp8`: of products with fp8 weights, empty where there are none.
    `ahead`: seconds that a start waits for kernels that are compiled ahead (0: none are). `parts`: of `core/parts.py`,
    as asked; `wide`: what of it this layout keeps."""

    attention: str
    delta: str
    moe: str
    sampling: str
    graphs: GraphSizes = NO_GRAPHS
    padded_up_to: int = 0
    fp8: str = ""
    ahead: float = 0.0
    parts: str = "model"
    wide: Wide = NOTHING


@dataclass(frozen=True, slots=True)
class ServingConfig:
    """The HTTP server. Times in seconds, sizes in bytes; `stream_interval` in tokens. `watchdog_timeout`: how long the
    step loop may be silent, `start_timeout`: an engine that starts, whose imports, compilers and hosts say nothing.
    `on_failure`: what follows the end of an engine, "exit", "restart" (at most `max_restarts` in `restart_window`) or
    "continue"."""

    host: str
    port: int
    api_key: str | None = field(repr=False)
    stream_interval: int
    drain_timeout: float
    max_body_size: int
    watchdog_timeout: float
    on_failure: str = "exit"
    max_restarts: int = 3
    restart_window: float = 600.0
    start_timeout: float = 300.0


@dataclass(frozen=True, slots=True)
class HandoverConfig:
    """Prefill and decode as separate servers (`plan/handoff.py`). `role`: "null", "prefill" or "decode". Seconds.

    `engine`: what moves the bytes, by network devices `devices`. Servers meet at `bootstrap_port` of the prefill server
    (0: any free one). `bootstrap_timeout`: for the other half of a pair at prefill; `waiting_timeout`: for pages, then
    for the prompt, at decode; `decode_bootstrap_timeout`: for a prefill server to answer. A peer is asked to
    be heard every `heartbeat_interval`; one that has not been for `silence` is gone.
    """

    role: str = "null"
    engine: str = "local"
    bootstrap_port: int = 8998
    devices: str | None = None
    bootstrap_timeout: float = 300.0
    waiting_timeout: float = 300.0
    decode_bootstrap_timeout: float = 30.0
    silence: float = 10.0
    heartbeat_interval: float = 5.0


@dataclass(frozen=True, slots=True)
class LoggingConfig:
    """What is logged. `decode_interval`: decode steps between two lines. `checks`: everything is checked each step.
    `events`: file of the event log. `trace`: spans are recorded and go to the collector `collector`. `profiles`: folder
    of the traces of profiles."""

    level: str
    requests: bool
    decode_interval: int
    checks: bool = False
    events: str | None = None
    trace: bool = False
    collector: str = ""
    profiles: str = "/tmp"


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that was asked or decided. Frozen; nothing reads flags or the environment after this."""

    model: ModelConfig
    mesh: MeshConfig
    memory: MemoryConfig
    scheduling: SchedulingConfig
    kernels: KernelConfig
    serving: ServingConfig
    logging: LoggingConfig
    handover: HandoverConfig = HandoverConfig()

    def public(self) -> dict[str, dict[str, object]]:
        """The configuration as plain data for /server_info and tables; secrets only as "set"."""
        table = asdict(self)
        table["serving"]["api_key"] = "set" if self.serving.api_key else None
        return table


@dataclass(frozen=True, slots=True)
class Resolved:
    """A configuration, and every choice that was made for the user on the way."""

    config: Config
    decisions: tuple[Decision, ...]


class Notes:
    """Collects what the phases of `resolve` refuse and decide.

    Where a value could not be read, phases go on with the default. What follows from that flag is then not refused,
    since its user would mend what is not broken; what does not is, so that all that is wrong is told in one round.
    """

    def __init__(self) -> None:
        self.conflicts: list[Conflict] = []
        self.decisions: list[Decision] = []
        self._unread: dict[str, str] = {}  # group, by spelling

    def unread(self, conflict: Conflict, flags: Iterable[Flag]) -> None:
        """The value of these flags is not known, because of the conflict."""
        self.conflicts.append(conflict)
        self._unread |= {flag.spellings[0]: flag.group for flag in flags}

    def refuse(self, flags: tuple[str, ...], reason: str, remedy: str, of: Iterable[str] = ()) -> None:
        """One thing cannot be honoured: the flags of both sides, why, and the smallest change that helps. `of`: flags,
        or whole groups of them, that it follows from as well."""
        named = {word for flag in flags for word in flag.split() if word.startswith("--")}
        if named.union(of).isdisjoint({*self._unread.keys(), *self._unread.values()}):
            self.conflicts.append(Conflict(flags, reason, remedy))

    def decide(self, what: str, value: object, why: str) -> None:
        """A choice was made for the user."""
        self.decisions.append(Decision(what, value, why))
