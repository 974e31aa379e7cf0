"""Flags that say what the engine computes and how: model, mesh, memory, scheduling, kernels.

Spelling and meaning are SGLang's where it has the flag (`docs.sglang.io`, server arguments).
"""

from __future__ import annotations

from tessera.core.config.flag import Flag, Ignored, Unbuilt, positive, real, switch, text, whole, wholes, words

FRACTION = {"cpu": 0.8, "cuda": 0.85}  # of the free memory, when nobody said
PAGE = {"cpu": 16, "cuda": 64}  # tokens; CUDA: attention of prompts at 383 instead of 370 TFLOP/s on an H100
MOST_RANKS = 1024  # of an instance, and as many replicas and hosts: more is a slip, and trying all groups takes long

FP8_KV = "use 'fp8_e4m3', or keep 'auto' (the model's dtype)"
NO_SNAPSHOTS = "states are not snapshotted yet; use 'no_buffer'"
AUTO = "use 'auto', the fastest that this device has"

MODEL = (
    Flag("model_path", text, None, "Folder, hub name, or a model of this package (abacus-hybrid, abacus-mla).", "model",
         ("--model",)),
    Flag("tokenizer_path", text, None, "Folder or hub name of the tokeniser; default: the model's.", "model"),
    Flag("tokenizer_mode", text, "auto", "Which tokeniser implementation.", "model", choices=("auto",),
         unbuilt=("slow",), instead="use 'auto' (the fast tokeniser)"),
    Flag("skip_tokenizer_init", switch, False, "Serve token ids only; no tokeniser is loaded.", "model"),
    Flag("chat_template", text, None, "File with a Jinja chat template; default: the model's.", "model"),
    Flag("trust_remote_code", switch, False, "Allow code from the checkpoint.", "model",
         state=Ignored("no code from a checkpoint is ever run")),
    Flag("revision", text, None, "Branch, tag or commit of a hub model, if not its newest.", "model"),
    Flag("download_dir", text, None,
         "Folder that hub models are kept in; default: the hub's own cache (HF_HOME).", "model"),
    Flag("served_model_name", text, None, "Name of the model in the API; default: the model path as given.", "model"),
    Flag("context_length", whole(2), None, "Most tokens of one sequence, prompt and answer together; default: "
         "what the model knows and the KV pool holds.", "model"),
    Flag("dtype", text, "auto", "Type of weights and activations.", "model",
         choices=("auto", "bfloat16", "float16", "float32", "float64", "half", "float")),
    Flag("quantization", text, None,
         "Quantisation of the weights; fp8: a checkpoint that is not stored so is quantised while it is loaded.",
         "model",
         choices=("fp8",),
         unbuilt=("awq", "gptq", "marlin", "w8a8_fp8", "w8a8_int8", "modelopt", "modelopt_fp4", "gguf",
                            "bitsandbytes", "mxfp4"), instead="use an fp8 checkpoint or an unquantised one"),
    Flag("load_format", text, "auto", "How weights are read; dummy: random weights, no checkpoint needed.", "model",
         choices=("auto", "safetensors", "dummy"),
         unbuilt=("pt", "npcache", "gguf", "bitsandbytes", "layered", "sharded_state", "remote"),
         instead="convert the checkpoint to safetensors"),
    Flag("random_seed", whole(0), 0, "Seed of requests that bring none, and of dummy weights.", "model"),
    Flag("enable_lora", switch, False, "Serve LoRA adapters.", "model",
         state=Unbuilt("merge the adapter into the checkpoint")),
    Flag("lora_paths", words, (), "LoRA adapters, as name=path.", "model",
         state=Unbuilt("merge the adapter into the checkpoint")),
    Flag("max_loras_per_batch", whole(1), 8, "Most adapters in one step.", "model",
         state=Ignored("only read with --enable-lora")),
    Flag("max_lora_rank", whole(1), None, "Largest rank of an adapter.", "model",
         state=Ignored("only read with --enable-lora")),
    Flag("lora_target_modules", words, (), "Modules that adapters touch.", "model",
         state=Ignored("only read with --enable-lora")),
)  # fmt: skip

MESH = (
    Flag("device", text, "auto", "Where to run.", "mesh", choices=("auto", "cpu", "cuda"),
         unbuilt=("xpu", "hpu", "npu", "mps"), instead="use 'cpu' or 'cuda'"),
    Flag("tp_size", whole(1, MOST_RANKS), 1, "Ranks of the instance.", "mesh", ("--tp", "--tensor-parallel-size")),
    Flag("dp_size", whole(1, MOST_RANKS), 1,
         "Data-parallel groups: of the attention with --enable-dp-attention, else replicas.", "mesh",
         ("--dp", "--data-parallel-size")),
    Flag("ep_size", whole(1, MOST_RANKS), 1, "Expert-parallel groups.", "mesh", ("--ep", "--expert-parallel-size")),
    Flag("pp_size", whole(1), 1, "Pipeline stages.", "mesh", ("--pp", "--pipeline-parallel-size"),
         state=Unbuilt("leave it out, or use 1")),
    Flag("moe_dense_tp_size", whole(1, MOST_RANKS), None, "Ranks that share a dense MLP; default: all.", "mesh"),
    Flag("enable_dp_attention", switch, False, "Attention data parallel over --dp-size groups of the ranks.", "mesh"),
    Flag("enable_dp_lm_head", switch, False, "Output head data parallel, as attention is.", "mesh"),
    Flag("load_balance_method", text, "auto", "How requests are spread over data-parallel groups.", "mesh",
         choices=("auto", "round_robin", "total_requests", "total_tokens", "shortest_queue", "minimum_tokens",
                  "follow_bootstrap_room")),
    Flag("collectives", text, "auto", "How ranks add and exchange: through the memory of one host (shared), over TCP "
         "(gloo), between GPUs (nccl), or as threads of one process, slow, for tests (threads).", "mesh",
         choices=("auto", "shared", "gloo", "nccl", "threads")),
    Flag("disable_custom_all_reduce", switch, False,
         "All collectives between GPUs through NCCL, none through each other's memory.", "mesh"),
    Flag("nnodes", whole(1, MOST_RANKS), 1, "Hosts of the instance.", "mesh"),
    Flag("node_rank", whole(0, MOST_RANKS - 1), 0, "Number of this host.", "mesh"),
    Flag("dist_init_addr", text, None, "Address (host:port) at which the hosts meet.", "mesh", ("--nccl-init-addr",)),
    Flag("dist_timeout", positive(), 600.0, "Seconds within which the hosts must have met.", "mesh"),
)  # fmt: skip

MEMORY = (
    Flag("mem_fraction_static", positive(1), None,
         "Share of the memory free at start that weights and pools may take (CPU: of the RAM this process can still "
         f"get, default {FRACTION['cpu']:g}; CUDA: of the free device memory, default {FRACTION['cuda']:g}).",
         "memory"),
    Flag("max_total_tokens", whole(1), None,
         "Most tokens in the KV pool; default: what the memory allows, on a CPU 2 GiB of them or one sequence.",
         "memory"),
    Flag("page_size", whole(1, 1024), None, "Tokens of a KV page; default: "
         f"{PAGE['cpu']} on a CPU, {PAGE['cuda']} on CUDA.", "memory"),
    Flag("kv_cache_dtype", text, "auto", "Type of the KV cache; auto: that of the model.", "memory",
         choices=("auto", "bfloat16", "float16", "float32", "float64", "bf16", "fp8_e4m3", "fp8_e5m2"),
         unbuilt=("fp4_e2m1",), instead=FP8_KV),
    Flag("mamba_ssm_dtype", text, None, "Type of the recurrent state; default: the model's own, else float32.",
         "memory", choices=("float32", "bfloat16", "float16", "float64")),
    Flag("max_mamba_cache_size", whole(1), None, "Most recurrent states; default: one per running request.", "memory"),
    Flag("mamba_scheduler_strategy", text, "auto", "How recurrent states meet the prefix cache.", "memory",
         ("--mamba-radix-cache-strategy",), choices=("auto", "no_buffer"),
         unbuilt=("extra_buffer", "extra_buffer_lazy"), instead=NO_SNAPSHOTS),
    Flag("mamba_track_interval", whole(1), 256, "Tokens between two snapshots of a recurrent state.", "memory",
         state=Ignored("states are not snapshotted yet")),
    Flag("mamba_full_memory_ratio", positive(), 0.9, "Memory of states against that of KV pages.", "memory",
         state=Ignored("states get one slot per running request")),
    Flag("disable_radix_cache", switch, False, "No prefix cache.", "memory"),
    Flag("cpu_offload_gb", real(0), 0.0, "Weights kept in RAM beside a GPU, GB.", "memory",
         state=Unbuilt("use a device with enough memory"), neutral=(0.0,)),
)  # fmt: skip

SCHEDULING = (
    Flag("max_running_requests", whole(1), None, "Most sequences in a step (rows of the row table); default: 64 on a "
         "CPU, 256 on CUDA, fewer where recurrent states leave no room.", "scheduling"),
    Flag("max_queued_requests", whole(1), None, "Most requests that wait; more are refused with 503. Default: 64 for "
         "each running one.", "scheduling"),
    Flag("chunked_prefill_size", whole(1, also=(-1,)), None,
         "Most tokens of a step that holds prompts; -1: prompts are not cut. Default: 512 on a CPU; on CUDA 8192, "
         "twice that where experts see few tokens, less where memory is short.", "scheduling"),
    Flag("max_prefill_tokens", whole(1), 16384,
         "Most prompt tokens of a step (a prompt that is not cut may exceed it, alone).", "scheduling"),
    Flag("enable_mixed_chunk", switch, False, "Running decodes ride along with a prefill chunk.", "scheduling"),
    Flag("schedule_policy", text, "fcfs", "Order in which waiting requests start, within a priority.", "scheduling",
         choices=("fcfs", "lpm", "priority"),
         unbuilt=("random", "dfs-weight", "lof", "routing-key"),
         instead="use 'fcfs' (first come) or 'lpm' (longest cached prefix first)"),
    Flag("schedule_conservativeness", positive(), 1.0, "How much of a request's tokens is reserved at admission.",
         "scheduling", state=Ignored("admission reserves the next page and preempts cleanly")),
    Flag("enable_priority_scheduling", switch, False, "Larger priority goes first.", "scheduling",
         state=Ignored("priorities always count")),
    Flag("disable_overlap_schedule", switch, False, "Plan a step only when the last one has been collected.",
         "scheduling"),
    Flag("num_continuous_decode_steps", whole(1), 1, "Decode steps between two looks at the queue.", "scheduling",
         state=Unbuilt("leave it out")),
    Flag("enable_two_batch_overlap", switch, False, "Run the two halves of a step interleaved, where it pays.",
         "scheduling"),
    Flag("tbo_token_distribution_threshold", real(0, 0.5), 0.48,
         "Smallest share of tokens that a half of a step has, else it is cut inside one sequence.", "scheduling"),
    Flag("tbo_min_tokens", whole(2), None,
         "Smallest step, by tokens of its largest part, that is run as two halves; left out, it is measured at start.",
         "scheduling"),
)  # fmt: skip

KERNELS = (
    Flag("attention_backend", text, "auto", "Attention kernels; reference: the plain twin, slow. Others follow it.",
         "kernels", choices=("auto", "torch", "torch_native", "triton", "flashinfer", "reference"),
         unbuilt=("fa3", "fa4", "flashmla", "cutlass_mla", "trtllm_mha", "trtllm_mla", "intel_amx"), instead=AUTO),
    Flag("linear_attn_backend", text, "auto", "Delta-rule kernels.", "kernels",
         choices=("auto", "torch", "triton", "reference"), unbuilt=("cutedsl", "flashinfer"), instead=AUTO),
    Flag("moe_runner_backend", text, "auto", "Expert kernels.", "kernels",
         choices=("auto", "torch", "triton", "grouped_mm", "deep_gemm", "reference"),
         unbuilt=("flashinfer_trtllm", "flashinfer_cutlass", "cutlass", "flashinfer_mxfp4", "marlin"),
         instead=AUTO),
    Flag("fp8_gemm_backend", text, "auto",
         "Products of fp8 weights, experts' too; torch: the plain twin, slow; dequantize: none, weights get --dtype "
         "back while they are loaded.", "kernels", ("--fp8-gemm-runner-backend",),
         choices=("auto", "triton", "deep_gemm", "torch", "dequantize"),
         unbuilt=("flashinfer_trtllm", "flashinfer_cutlass", "cutlass", "aiter"),
         instead="use 'auto'"),
    Flag("moe_a2a_backend", text, "none", "Tokens go to all ranks (none), or each where its experts are.",
         "kernels", choices=("none", "all_to_all"), unbuilt=("deepep", "mooncake", "nixl", "flashinfer"),
         instead="use 'none' or 'all_to_all'"),
    Flag("moe_a2a_padded_tokens", whole(0), None,
         "Most tokens of a step, all DP ranks together, that travel without being counted, in exchanges of one size; "
         "default: from the model, 0 on a CPU.",
         "kernels"),
    Flag("parts_dtype", text, "auto",
         "What is kept in float32 until all of it is added up: nothing (model); parts of sums across ranks, where no "
         "rank holds parts of experts (sums); these, and what each expert makes, in every layout (float32). The same "
         "at prefill and decode.", "kernels", choices=("auto", "model", "sums", "float32")),
    Flag("sampling_backend", text, "auto", "Sampling kernels.", "kernels",
         choices=("auto", "torch", "pytorch", "reference"),
         unbuilt=("flashinfer",), instead=AUTO),
    Flag("grammar_backend", text, "none", "Structured output.", "kernels", choices=("none",),
         unbuilt=("xgrammar", "llguidance", "outlines"), instead="use 'none'; structured output comes later"),
    Flag("enable_deterministic_inference", switch, False, "The same bits under every layout and batch.", "kernels",
         state=Unbuilt("leave it out; tokens are equal up to the rounding of reordered sums")),
    Flag("enable_torch_compile", switch, False, "Compile the model.", "kernels", state=Unbuilt("leave it out")),
    Flag("disable_cuda_graph", switch, False, "No CUDA graphs.", "kernels"),
    Flag("cuda_graph_max_bs", whole(1), None, "Largest batch with a CUDA graph; default: --max-running-requests.",
         "kernels"),
    Flag("cuda_graph_bs", wholes, (), "Batch sizes with a CUDA graph; default: 1, 2, 4, then steps of 8 and of 16.",
         "kernels"),
    Flag("compile_ahead", real(0), 10.0,
         "Seconds that a start on a GPU may take for kernels that are not in the cache; several processes compile them "
         "and go on behind it. 0: each is compiled when it is met.", "kernels"),
)  # fmt: skip
