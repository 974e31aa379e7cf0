"""The fields of other servers' requests, written down from their published protocols (SGLang's `protocol.py` and
`io_struct.py`, vLLM's `protocol.py`), so that a name that is missing here is noticed."""

SAMPLING = """temperature top_p top_k min_p presence_penalty frequency_penalty repetition_penalty logit_bias n stop
stop_token_ids stop_regex ignore_eos skip_special_tokens no_stop_trim seed"""

SGLANG = """model rid extra_key cache_salt ngram_corpus_id priority routed_dp_rank disagg_prefill_dp_rank
data_parallel_rank bootstrap_host bootstrap_port bootstrap_room custom_params custom_logit_processor images_config
lora_path session_id session_params response_format regex ebnf min_tokens return_hidden_states return_routed_experts
routed_experts_start_len return_cached_tokens_details return_token_ids stream stream_options max_tokens user"""

SGLANG_COMPLETION = f"{SAMPLING} {SGLANG} prompt best_of echo logprobs suffix json_schema custom_labels"

SGLANG_CHAT = f"""{SAMPLING} {SGLANG} messages logprobs top_logprobs max_completion_tokens tools tool_choice
parallel_tool_calls return_prompt_token_ids return_meta_info reasoning_effort reasoning task continue_final_message
separate_reasoning stream_reasoning chat_template_kwargs max_dynamic_patch min_dynamic_patch use_audio_in_video
input_ids"""

SGLANG_GENERATE = """rid session_id text input_ids input_embeds image_data video_data audio_data mm_hashes
mm_content_hashes use_audio_in_video video_config sampling_params return_logprob logprob_start_len top_logprobs_num
token_ids_logprob return_sampling_mask return_text_in_logprobs return_flat_raw_top_logprobs
return_flat_raw_top_logprobs_b64 stream log_metrics return_hidden_states return_routed_experts
routed_experts_start_len return_indexer_topk modalities session_params lora_path lora_id custom_logit_processor
positional_embed_overrides bootstrap_host bootstrap_port bootstrap_room bootstrap_pair_key decode_tp_size
routed_dp_rank data_parallel_rank disagg_prefill_dp_rank kv_router_hint routing_key conversation_id http_worker_ipc
background require_reasoning max_thinking_tokens priority extra_key no_logs custom_labels return_bytes return_entropy
return_prompt_token_ids external_trace_header received_time need_wait_for_mm_inputs num_items_assigned encoder_urls
max_dynamic_patch min_dynamic_patch image_max_dynamic_patch video_max_dynamic_patch images_config
multi_item_delimiter_indices cache_salt"""

SGLANG_SAMPLING_PARAMS = f"""{SAMPLING.replace(" seed", " sampling_seed")} max_new_tokens min_new_tokens
spaces_between_special_tokens json_schema regex ebnf structural_tag custom_params stream_interval"""

VLLM = """use_beam_search length_penalty include_stop_str_in_output min_tokens spaces_between_special_tokens
truncate_prompt_tokens prompt_logprobs allowed_token_ids bad_words add_special_tokens guided_json guided_regex
guided_choice guided_grammar guided_decoding_backend guided_whitespace_pattern structured_outputs priority request_id
logits_processors return_tokens_as_token_ids return_token_ids cache_salt kv_transfer_params vllm_xargs"""

VLLM_COMPLETION = f"{SAMPLING.replace('stop_regex', '')} {VLLM} prompt prompt_embeds best_of echo logprobs suffix"

VLLM_CHAT = f"""{SAMPLING.replace("stop_regex", "")} {VLLM} messages logprobs top_logprobs max_completion_tokens
reasoning_effort include_reasoning echo add_generation_prompt continue_final_message documents chat_template
chat_template_kwargs mm_processor_kwargs structural_tag best_of tools tool_choice parallel_tool_calls"""
