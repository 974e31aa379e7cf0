"""Flags of speculation, of hand-over between servers, of the HTTP server and of logging. See `flags_engine.py`."""

from __future__ import annotations

from tessera.core.config.flag import Flag, Ignored, Unbuilt, positive, real, size, switch, text, whole

NO_DRAFTS = Ignored("only read with --speculative-algorithm")
ALGORITHM = "leave it out; decoding is one token a step"

SPECULATION = (
    Flag("speculative_algorithm", text, None, "How tokens are drafted.", "speculation", choices=("none",),
         unbuilt=("EAGLE", "EAGLE3", "NEXTN", "MTP", "NGRAM", "STANDALONE"), instead=ALGORITHM,
         neutral=("none",)),
    Flag("speculative_num_steps", whole(0), None, "Drafting steps.", "speculation", state=NO_DRAFTS),
    Flag("speculative_num_draft_tokens", whole(1), None, "Drafted tokens a step.", "speculation", state=NO_DRAFTS),
    Flag("speculative_eagle_topk", whole(1), None, "Branches of a draft.", "speculation", state=NO_DRAFTS),
    Flag("speculative_draft_model_path", text, None, "Model that drafts.", "speculation",
         ("--speculative-draft-model",), state=NO_DRAFTS),
)  # fmt: skip

HANDOVER = (
    Flag("disaggregation_mode", text, "null", "Part that this server plays: it computes prompts for others, answers "
         "what others computed, or does both itself (null).", "hand-over", choices=("null", "prefill", "decode")),
    Flag("disaggregation_transfer_backend", text, "auto", "What moves the bytes: local (CPU) and cuda_ipc "
         "(GPUs) inside one host, the others across hosts.", "hand-over", choices=("auto", "local", "cuda_ipc",
         "mooncake", "nixl"), unbuilt=("ascend", "fake"),
         instead="use 'local' or 'cuda_ipc' inside one host, mooncake or nixl across hosts"),
    Flag("disaggregation_bootstrap_port", whole(0, 65535), 8998, "Port of the prefill server at which the two meet; 0: "
         "any free one.", "hand-over"),
    Flag("disaggregation_ib_device", text, None,
         "Network devices for the bytes, for mooncake and nixl; default: theirs.", "hand-over"),
    Flag("disaggregation_bootstrap_timeout", positive(), 300.0,
         "Seconds that a request waits at prefill for the decode server that shall have it.", "hand-over"),
    Flag("disaggregation_waiting_timeout", positive(), 300.0,
         "Seconds that a request waits at decode for free pages, and again for its prompt.", "hand-over"),
    Flag("disaggregation_decode_bootstrap_timeout", positive(), 30.0,
         "Seconds that a request waits at decode for a prefill server to answer.", "hand-over"),
    Flag("disaggregation_heartbeat_interval", positive(), 5.0, "Seconds between two signs of life of the other server.",
         "hand-over"),
    Flag("disaggregation_heartbeat_max_failure", whole(1), 2, "Signs of life missed until a server is gone.",
         "hand-over"),
)  # fmt: skip

SERVING = (
    Flag("host", text, "127.0.0.1", "Address to listen on.", "serving"),
    Flag("port", whole(0, 65535), 30000, "Port to listen on; 0: any free one.", "serving"),
    Flag("api_key", text, None, "Key that clients must send as a bearer token.", "serving"),
    Flag("stream_interval", whole(1), 1, "Tokens between two chunks of a stream.", "serving"),
    Flag("drain_timeout", real(0), 30.0, "Seconds that running requests get after SIGTERM.", "serving"),
    Flag("max_body_size", size, 32 << 20, "Largest request body, bytes (or like 64M).", "serving"),
    Flag("watchdog_timeout", real(2), 300.0, "Seconds without a step after which /health says 503 and the engine is "
         "ended; --on-failure says what follows. A start may be silent for 300, if that is more.", "serving"),
    Flag("on_failure", text, "exit", "What follows when an engine or one of its ranks ends by itself: the server ends "
         "too (exit), the engine is started anew (restart), or the other replicas go on without it (continue).",
         "serving", choices=("exit", "restart", "continue")),
    Flag("max_restarts", whole(1), 3, "Most restarts within --restart-window; one more ends the server.", "serving"),
    Flag("restart_window", positive(), 600.0, "Seconds within which restarts are counted.", "serving"),
    Flag("reasoning_parser", text, None, "Takes reasoning out of answers.", "serving",
         state=Unbuilt("leave it out; answers come as one text")),
    Flag("tool_call_parser", text, None, "Takes tool calls out of answers.", "serving",
         state=Unbuilt("leave it out; answers come as one text")),
)  # fmt: skip

LOGGING = (
    Flag("log_level", text, "info", "What is logged.", "logging",
         choices=("debug", "info", "warning", "error", "critical")),
    Flag("log_requests", switch, False, "Log every request, but for polls (/health, /metrics).", "logging"),
    Flag("decode_log_interval", whole(1), 40, "Decode steps between two log lines.", "logging"),
    Flag("debug_checks", switch, False,
         "Check pages, slots, rows and the position of every recurrent state at every step (slow).", "logging"),
    Flag("log_events", text, None,
         "File that every event of the planner is written to, prompts included, so that its steps can be replayed.",
         "logging"),
    Flag("enable_trace", switch, False, "Record spans with OpenTelemetry; a trace id is passed on anyway.", "logging"),
    Flag("otlp_traces_endpoint", text, "localhost:4317", "Collector of spans: HOST:PORT (gRPC) or a URL (HTTP).",
         "logging"),
    Flag("torch_profiler_dir", text, "/tmp", "Folder of the traces of /start_profile that name none.", "logging"),
    Flag("enable_metrics", switch, False, "Serve /metrics.", "logging", state=Ignored("metrics are always on")),
)  # fmt: skip
