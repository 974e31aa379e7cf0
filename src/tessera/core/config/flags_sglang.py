"""Flags of SGLang's server that have nothing to set here: each is refused with what to do instead, or accepted because
it cannot change the answer, and listed at start-up with the reason. `--help` leaves them out.

Names are those of SGLang's "Server Arguments" (docs.sglang.io); flags of other hardware, of diffusion, of images and of
offloading by other projects are not among them.
"""

from __future__ import annotations

from tessera.core.config.flag import Flag, Ignored, Parse, Unbuilt, real, switch, text, whole, words

GROUP = "sglang"
HELP = "A flag of SGLang's server."
COUNT = whole(-(1 << 62))
NUMBER = real(-1e18)


def _refused(instead: str, parse: Parse, names: str, neutral: tuple[object, ...] = ()) -> tuple[Flag, ...]:
    """`neutral`: values that ask for what is there anyway."""
    default = False if parse is switch else None
    return tuple(
        Flag(name, parse, default, HELP, GROUP, state=Unbuilt(instead), neutral=neutral) for name in names.split()
    )


def _ignored(reason: str, parse: Parse, names: str) -> tuple[Flag, ...]:
    default = False if parse is switch else None
    return tuple(Flag(name, parse, default, HELP, GROUP, state=Ignored(reason)) for name in names.split())


MODELS = (
    Flag(
        "model_impl",
        text,
        "auto",
        HELP,
        GROUP,
        choices=("auto", "sglang"),
        unbuilt=("transformers", "mindspore"),
        instead="use 'auto': models are implemented here",
    ),
    Flag(
        "sampling_defaults",
        text,
        "model",
        HELP,
        GROUP,
        choices=("model",),
        unbuilt=("openai",),
        instead="use 'model', and send with each request what its generation_config.json should not say",
    ),
    Flag("radix_eviction_policy", text, "lru", HELP, GROUP, choices=("lru",), unbuilt=("lfu",), instead="use 'lru'"),
    *_refused("text goes in and out here; leave it out", switch, "is_embedding enable_multimodal encoder_only"),
    *_refused("change the config.json of a copy of the model", text, "json_model_override_args", ("{}",)),
    *_refused("send the parameters with each request", text, "preferred_sampling_params"),
    *_refused("give the template's file with --chat-template", text, "hf_chat_template_name completion_template"),
    *_refused("keys and values are kept unscaled in fp8 pages; leave it out", text, "quantization_param_path"),
    *_refused("use --quantization fp8, or an fp8 checkpoint", text, "torchao_config modelopt_quant"),
    *_refused("leave it out; products of the head are those of the model's dtype", switch, "enable_fp32_lm_head"),
    *_refused("check the files before the start, with sha256sum", text, "model_checksum"),
    *_refused("delete the files after the start", switch, "delete_ckpt_after_loading"),
    *_refused("give a folder of safetensors", words, "custom_weight_loader"),
    *_ignored("weights are read by several threads, and not mapped", text, "model_loader_extra_config"),
    *_ignored("weights are read, not mapped", switch, "weight_loader_disable_mmap"),
    *_ignored("the version is computed from the files", text, "weight_version"),
    *_ignored("images are not taken", text, "mm_attention_backend"),
    *_ignored("images are not taken", switch, "language_only disable_fast_image_processor keep_mm_feature_on_device"),
    *_refused("merge the adapter into the checkpoint", switch, "enable_lora_overlap_loading"),
    *_ignored("only read with --enable-lora", whole(1), "max_loaded_loras max_lora_chunk_size"),
    *_ignored("only read with --enable-lora", text, "lora_backend lora_eviction_policy"),
)

RANKS = (
    *_refused("set CUDA_VISIBLE_DEVICES", whole(0), "base_gpu_id", (0,)),
    *_refused("set CUDA_VISIBLE_DEVICES", whole(1), "gpu_id_step", (1,)),
    *_refused(
        "leave it out; experts lie on the ranks in order", switch, "enable_eplb enable_expert_distribution_metrics"
    ),
    *_refused("leave it out; experts lie on the ranks in order", whole(0), "ep_num_redundant_experts", (0,)),
    *_refused("leave it out; experts lie on the ranks in order", text, "init_expert_location", ("trivial",)),
    *_refused("leave it out; experts lie on the ranks in order", text, "expert_distribution_recorder_mode"),
    *_refused("leave it out; a rank that ends, ends the instance", text, "elastic_ep_backend", ("none",)),
    *_refused("use --ep-size", switch, "enable_ep_moe enable_deepep_moe"),
    *_ignored("no experts are moved or doubled", text, "ep_dispatch_algorithm eplb_algorithm"),
    *_ignored("no experts are moved or doubled", NUMBER, "eplb_min_rebalancing_utilization_threshold"),
    *_ignored(
        "no experts are moved or doubled",
        COUNT,
        "eplb_rebalance_num_iterations eplb_rebalance_layers_per_chunk expert_distribution_recorder_buffer_size",
    ),
    *_ignored("only read with --moe-a2a-backend deepep", text, "deepep_mode deepep_config"),
    *_ignored("there are no pipeline stages", COUNT, "pp_max_micro_batch_size pp_async_batch_depth"),
    *_ignored("there are no pipeline stages", switch, "enable_dynamic_chunking"),
    *_ignored("ranks find a free port by themselves", whole(0, 65535), "nccl_port"),
    *_ignored("bind the process with numactl", words, "numa_node"),
    *_ignored("--disable-custom-all-reduce keeps GPUs out of each other's memory", switch, "enable_p2p_check"),
    *_ignored(
        "small sums go through the peers' memory, others through NCCL",
        switch,
        "enable_nccl_nvls enable_symm_mem "
        "enable_mscclpp enable_torch_symm_mem enable_flashinfer_allreduce_fusion enable_attn_tp_input_scattered "
        "enable_single_batch_overlap",
    ),
)

CACHES = (
    *_refused(
        "leave it out; caches are in the device's memory only",
        switch,
        "enable_hierarchical_cache enable_lmcache "
        "disaggregation_decode_enable_offload_kvcache enable_memory_saver enable_weights_cpu_backup",
    ),
    *_refused("leave it out", switch, "enable_double_sparsity"),
    *_ignored("no weights are offloaded", COUNT, "offload_group_size offload_num_in_group offload_prefetch_step"),
    *_ignored("no weights are offloaded", text, "offload_mode"),
    *_ignored(
        "only read with --enable-hierarchical-cache",
        text,
        "hicache_write_policy hicache_io_backend "
        "hicache_mem_layout hicache_storage_backend hicache_storage_prefetch_policy "
        "hicache_storage_backend_extra_config",
    ),
    *_ignored("only read with --enable-hierarchical-cache", NUMBER, "hicache_ratio hicache_size"),
    *_ignored("no model here has a sliding window", NUMBER, "swa_full_tokens_ratio"),
    *_ignored("no model here has a sliding window", switch, "disable_hybrid_swa_memory"),
    *_ignored(
        "prompts of several chunks read what precedes them from the cache", switch, "disable_chunked_prefix_cache"
    ),
)

PLANNING = (
    *_refused("use --max-prefill-tokens", whole(1), "prefill_max_requests"),
    *_refused("send the priorities with the other sign", switch, "schedule_low_priority_values_first"),
    *_refused("leave it out; requests that are too long are refused", switch, "allow_auto_truncate"),
    *_refused("leave it out", whole(0), "priority_scheduling_preemption_threshold"),
    *_refused("leave it out", switch, "enable_prefill_delayer enable_pdmux"),
    *_ignored("priorities always count", switch, "abort_on_priority_when_disabled"),
    *_ignored("admission reserves the next page and preempts cleanly", whole(0), "num_reserved_decode_tokens"),
    *_ignored(
        "who waits is woken by what it waits for",
        COUNT,
        "scheduler_recv_interval disaggregation_decode_polling_interval",
    ),
    *_ignored("who waits is woken by what it waits for", switch, "sleep_on_idle"),
    *_ignored(
        "the two servers tell each other when they meet",
        COUNT,
        "disaggregation_decode_tp disaggregation_decode_dp disaggregation_prefill_pp",
    ),
    *_refused(
        "give each request its bootstrap_room, or put `tessera router` before the servers",
        switch,
        "disaggregation_decode_enable_fake_auto",
    ),
    *_ignored("--disaggregation-ib-device names the network devices", text, "mooncake_ib_device"),
)

HOW = (
    *_refused(
        "use --attention-backend, for prompts and decodes", text, "prefill_attention_backend decode_attention_backend"
    ),
    *_refused(
        "use --linear-attn-backend, for prompts and decodes",
        text,
        "linear_attn_prefill_backend linear_attn_decode_backend",
    ),
    *_refused(
        "leave it out",
        switch,
        "enable_nan_detection enable_custom_logit_processor enable_return_hidden_states enable_return_routed_experts",
    ),
    *_refused("leave it out", text, "rl_on_policy_target multi_item_scoring_delimiter debug_tensor_dump_output_folder"),
    *_ignored("no model here attends sparsely", text, "nsa_prefill_backend nsa_decode_backend nsa_prefill_cp_mode"),
    *_ignored("no model here attends sparsely", switch, "enable_nsa_prefill_context_parallel"),
    *_ignored("no weights are in fp4", text, "fp4_gemm_backend flashinfer_mxfp4_moe_precision"),
    *_ignored("no weights are in fp4", switch, "disable_flashinfer_cutlass_moe_fp4_allgather"),
    *_ignored(
        "kernels add up in float32, and split by a sequence's own length", switch, "triton_attention_reduce_in_fp32"
    ),
    *_ignored(
        "kernels add up in float32, and split by a sequence's own length",
        COUNT,
        "triton_attention_num_kv_splits triton_attention_split_tile_size",
    ),
    *_ignored("nothing is tuned while serving", switch, "disable_flashinfer_autotune flashinfer_mla_disable_ragged"),
    *_ignored("kernels are fused where they are", switch, "disable_shared_experts_fusion enable_fused_qk_norm_rope"),
    *_ignored(
        "steps that hold prompts run as graphs up to 1,024 tokens; --disable-cuda-graph is for all",
        switch,
        "enable_piecewise_cuda_graph disable_piecewise_cuda_graph disable_prefill_cuda_graph",
    ),
    *_ignored(
        "steps that hold prompts run as graphs up to 1,024 tokens",
        text,
        "piecewise_cuda_graph_tokens piecewise_cuda_graph_compiler",
    ),
    *_ignored("steps that hold prompts run as graphs up to 1,024 tokens", COUNT, "piecewise_cuda_graph_max_tokens"),
    *_ignored(
        "graphs are recorded while nothing runs, in padded sizes",
        switch,
        "disable_cuda_graph_padding enable_profile_cuda_graph enable_cudagraph_gc",
    ),
    *_ignored("only read with --enable-torch-compile", COUNT, "torch_compile_max_bs"),
    *_ignored("only read with --enable-torch-compile", switch, "enable_torch_compile_debug_mode"),
    *_ignored("/start_profile names what runs", switch, "enable_layerwise_nvtx_marker"),
    *_ignored("structured output is refused", text, "constrained_json_whitespace_pattern"),
    *_ignored(
        "structured output is refused", switch, "constrained_json_disable_any_whitespace disable_outlines_disk_cache"
    ),
    *_ignored(
        "only read with --speculative-algorithm",
        text,
        "speculative_draft_model_revision "
        "speculative_draft_load_format speculative_token_map speculative_attention_mode "
        "speculative_draft_attention_backend speculative_moe_runner_backend speculative_moe_a2a_backend "
        "speculative_draft_model_quantization speculative_ngram_match_type",
    ),
    *_ignored(
        "only read with --speculative-algorithm",
        NUMBER,
        "speculative_accept_threshold_single speculative_accept_threshold_acc",
    ),
    *_ignored(
        "only read with --speculative-algorithm",
        COUNT,
        "speculative_ngram_min_match_window_size "
        "speculative_ngram_max_match_window_size speculative_ngram_min_bfs_breadth "
        "speculative_ngram_max_bfs_breadth speculative_ngram_branch_length speculative_ngram_capacity",
    ),
    *_ignored("only read with --speculative-algorithm", switch, "enable_multi_layer_eagle"),
)

SERVER = (
    *_refused("use --api-key: it guards every endpoint but /health", text, "admin_api_key"),
    *_refused("put a proxy before the server", text, "fastapi_root_path ssl_certfile ssl_keyfile ssl_ca_certs"),
    *_refused("use HTTP", switch, "grpc_mode"),
    *_refused("/generate streams the whole text so far; use /v1/completions for its pieces", switch, "stream_output"),
    *_refused("leave it out; answers come as one text", text, "tool_server"),
    *_refused("leave it out", text, "kv_events_config"),
    *_refused("read /metrics, or meta_info of /generate", switch, "export_metrics_to_file"),
    *_refused("read /metrics, or meta_info of /generate", text, "export_metrics_to_file_dir"),
    *_refused("redirect the standard error of the server", words, "log_requests_target"),
    Flag("log_requests_format", text, "text", HELP, GROUP, choices=("text",), unbuilt=("json",), instead="use 'text'"),
    *_ignored("--log-requests logs parameters and counts, never a text", whole(0, 3), "log_requests_level"),
    *_ignored("requests are in the log with --log-requests only, and polls never", text, "log_level_http"),
    *_ignored(
        "requests are in the log with --log-requests only, and polls never",
        words,
        "uvicorn_access_log_exclude_prefixes",
    ),
    *_ignored(
        "one process tokenises, beside the engine", whole(1), "tokenizer_worker_num dynamic_batch_tokenizer_batch_size"
    ),
    *_ignored("one process tokenises, beside the engine", NUMBER, "dynamic_batch_tokenizer_batch_timeout"),
    *_ignored(
        "one process tokenises, beside the engine",
        switch,
        "enable_tokenizer_batch_encode disable_tokenizer_batch_decode enable_dynamic_batch_tokenizer",
    ),
    *_ignored("a server is ready once one real token was generated", switch, "skip_server_warmup"),
    *_ignored("a server is ready once one real token was generated", words, "warmups"),
    *_ignored("usage tells cached tokens always", switch, "enable_cache_report"),
    *_ignored("there are no files and batches to keep", text, "file_storage_path"),
    *_ignored("--log-events keeps what led to an end", text, "crash_dump_folder"),
    *_ignored("--watchdog-timeout says when /health is 503", NUMBER, "soft_watchdog_timeout"),
    *_ignored(
        "times of requests are in /metrics and in spans", switch, "show_time_cost enable_request_time_stats_logging"
    ),
    *_ignored(
        "/metrics tells the same always, of every data-parallel rank",
        switch,
        "enable_metrics_for_all_schedulers enable_mfu_metrics collect_tokens_histogram",
    ),
    *_ignored(
        "/metrics tells the same always, of every data-parallel rank",
        words,
        "bucket_time_to_first_token "
        "bucket_inter_token_latency bucket_e2e_request_latency prompt_tokens_buckets generation_tokens_buckets",
    ),
    *_ignored("/metrics tells the same always, of every data-parallel rank", NUMBER, "gc_warning_threshold_secs"),
)

SGLANG = (*MODELS, *RANKS, *CACHES, *PLANNING, *HOW, *SERVER)
