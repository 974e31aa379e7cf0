"""Every field of the requests of OpenAI's, SGLang's and vLLM's clients, and what this server makes of it.

Sources: the `openai` Python client's parameter types; SGLang `entrypoints/openai/protocol.py`, `managers/io_struct.py`
(GenerateReqInput) and `sampling/sampling_params.py`; vLLM's OpenAI-compatible server, "extra parameters".
"""

from __future__ import annotations

from typing import Any

from tessera.serve.checks import (
    Fields,
    Refused,
    anything,
    boolean,
    each,
    integer,
    listed,
    logit_bias,
    mapping,
    number,
    one_of,
    string,
    text,
)

MAX_TOKENS = 1 << 31
MAX_BATCH = 4096  # prompts in one request
MAX_CHOICES = 128
MAX_STOPS = 64

token_ids = listed(integer(0, MAX_TOKENS), 4096)

SAMPLING = {
    "temperature": number(0, 100),
    "top_p": number(0, 1, above=True),
    "top_k": integer(-1, MAX_TOKENS, " (-1 and 0: off)"),
    "min_p": number(0, 1),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "repetition_penalty": number(0, 2, above=True),
    "logit_bias": logit_bias,
    "n": integer(1, MAX_CHOICES),
    "stop": listed(text(1, 1024), MAX_STOPS, single=True),
    "stop_token_ids": token_ids,
    "ignore_eos": boolean,
    "skip_special_tokens": boolean,
    "spaces_between_special_tokens": boolean,
    "no_stop_trim": boolean,
}
SEED = integer(-(1 << 63), (1 << 64) - 1)
PLACE = {  # where a request runs; for a list of prompts one for all, or one each
    name: each(check, MAX_BATCH)
    for name, check in (
        ("data_parallel_rank", integer(0, MAX_TOKENS)),
        ("routed_dp_rank", integer(0, MAX_TOKENS)),  # SGLang's other name of it
        ("bootstrap_room", integer(0, (1 << 63) - 1)),
        ("bootstrap_host", string),
        ("bootstrap_port", integer(1, 65535)),
    )
}

NO_GRAMMAR = Refused("answers cannot be constrained to a grammar yet; check the answer yourself")
NO_TOOLS = Refused("answers come as text; describe the tools in the prompt", ([],))
NO_IMAGES = Refused("this model reads text only", ([], {}, False))
NO_LORA = Refused("merge the adapter into the checkpoint", ([], ""))
NO_HANDOVER = Refused("prefill and decode meet by bootstrap_host, bootstrap_port and bootstrap_room", ([], {}))
NO_PROCESSOR = Refused("no code is taken from requests", ([], {}, ""))
NO_SESSION = Refused("send the whole conversation; its prefix is served from the cache", ({},))
NO_STATES = Refused("only tokens and their logprobs are returned", (False,))
NO_BEAM = Refused("use n, or best_of on /v1/completions", (False, 1, 1.0))

ROUTING = "where a request runs cannot change its answer"
SPECULATION = "speculation cannot change an answer"
LABEL = "a label of the client's"
NONE_TO_SEE = "there are no images and no videos"

PASSED = {
    **dict.fromkeys(("user", "metadata", "custom_labels", "safety_identifier", "session_id"), LABEL),
    **dict.fromkeys(("store", "service_tier", "no_logs", "log_metrics"), "nothing is stored or tiered here"),
    **dict.fromkeys(
        ("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"), "prefixes are cached anyway"
    ),
    **dict.fromkeys(("disagg_prefill_dp_rank", "routing_key"), ROUTING),
    **dict.fromkeys(("ngram_corpus_id", "prediction"), SPECULATION),
    **dict.fromkeys(("max_dynamic_patch", "min_dynamic_patch", "media_io_kwargs"), NONE_TO_SEE),
    "routed_experts_start_len": "only read with return_routed_experts, which is refused",
}

REFUSED = {
    "response_format": Refused(NO_GRAMMAR.remedy, ({"type": "text"},)),
    **dict.fromkeys(("json_schema", "regex", "ebnf", "structural_tag", "structured_outputs"), NO_GRAMMAR),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), NO_GRAMMAR),
    **dict.fromkeys(("guided_decoding_backend", "guided_whitespace_pattern"), NO_GRAMMAR),
    **dict.fromkeys(("lora_path", "lora_id"), NO_LORA),
    **dict.fromkeys(("bootstrap_pair_key", "kv_transfer_params", "ec_transfer_params", "decode_tp_size"), NO_HANDOVER),
    **dict.fromkeys(("custom_logit_processor", "custom_params", "logits_processors", "vllm_xargs"), NO_PROCESSOR),
    "session_params": NO_SESSION,
    **dict.fromkeys(("return_hidden_states", "return_routed_experts", "return_cached_tokens_details"), NO_STATES),
    **dict.fromkeys(("return_prompt_token_ids", "return_meta_info", "return_tokens_as_token_ids"), NO_STATES),
    **dict.fromkeys(("images_config", "mm_processor_kwargs", "use_audio_in_video"), NO_IMAGES),
    **dict.fromkeys(("use_beam_search", "early_stopping", "length_penalty", "beam_width"), NO_BEAM),
    "stop_regex": Refused("use stop with strings", ([], "")),
    "truncate_prompt_tokens": Refused("shorten the prompt before you send it"),
    "prompt_logprobs": Refused("use echo with logprobs on /v1/completions, or /generate with logprob_start_len"),
    **dict.fromkeys(("allowed_token_ids", "bad_words"), Refused("use logit_bias", ([],))),
    **dict.fromkeys(("thinking_token_budget", "max_thinking_tokens"), Refused("use max_tokens")),
    "repetition_detection": Refused("use repetition_penalty or frequency_penalty", ({},)),
}  # fmt: skip

STREAM_OPTIONS = Fields(
    honoured={"include_usage": boolean, "continuous_usage_stats": boolean},
    passed={"include_obfuscation": "chunks carry no padding"},
)


def stream_options(value: object, field: str) -> dict[str, bool]:
    """`stream_options`: an object of its own."""
    return STREAM_OPTIONS.read(value, field)


OPENAI = {
    **SAMPLING,
    **PLACE,
    "model": string,
    "seed": SEED,
    "max_tokens": integer(0, MAX_TOKENS),
    "min_tokens": integer(0, MAX_TOKENS),
    "stream": boolean,
    "stream_options": stream_options,
    "include_stop_str_in_output": boolean,
    "add_special_tokens": boolean,
    "priority": integer(-MAX_TOKENS, MAX_TOKENS),
    "rid": string,
    "request_id": string,
    "extra_key": string,
    "cache_salt": string,
    "return_token_ids": boolean,
}

COMPLETION = Fields(
    honoured={
        **OPENAI,
        "prompt": anything,  # string, strings, ids or lists of ids: schema.py
        "best_of": integer(1, MAX_CHOICES),
        "echo": boolean,
        "logprobs": integer(0, 20),
    },
    passed=PASSED,
    refused={
        **REFUSED,
        "suffix": Refused("this model was not trained to fill in", ("",)),
        "prompt_embeds": Refused("send text or token ids"),
    },
)

CHAT = Fields(
    honoured={
        **OPENAI,
        "messages": anything,  # chat.py
        "max_completion_tokens": integer(1, MAX_TOKENS),
        "max_tokens": integer(1, MAX_TOKENS),
        "logprobs": boolean,
        "top_logprobs": integer(0, 20),
        "add_generation_prompt": boolean,
        "continue_final_message": boolean,
        "chat_template_kwargs": mapping,
        "reasoning_effort": one_of("none", "minimal", "low", "medium", "high", "xhigh", "max"),
    },
    passed={
        **PASSED,
        "parallel_tool_calls": "there are no tool calls",
        **dict.fromkeys(
            ("separate_reasoning", "stream_reasoning", "include_reasoning"), "no reasoning parser is loaded"
        ),
    },
    refused={
        **REFUSED,
        **dict.fromkeys(("tools", "functions"), NO_TOOLS),
        **dict.fromkeys(("tool_choice", "function_call"), Refused(NO_TOOLS.remedy, ("none", "auto"))),
        "best_of": Refused("use n, or best_of on /v1/completions", (1,)),
        "echo": Refused("use /v1/completions", (False,)),
        "modalities": Refused("answers come as text", (["text"],)),
        "audio": Refused("answers come as text"),
        "verbosity": Refused("ask for it in the prompt", ("medium",)),
        "web_search_options": Refused("nothing is looked up"),
        "moderation": Refused("nothing is moderated"),
        "documents": Refused("put them into the messages", ([],)),
        "chat_template": Refused("start the server with --chat-template"),
        "input_ids": Refused("use /v1/completions with token ids as prompt"),
        "task": Refused("put it into the messages"),
        "reasoning": Refused("use reasoning_effort or chat_template_kwargs", ({},)),
    },
)

SAMPLING_PARAMS = Fields(
    honoured={
        **SAMPLING,
        "max_new_tokens": integer(0, MAX_TOKENS),
        "min_new_tokens": integer(0, MAX_TOKENS),
        "sampling_seed": SEED,
        "seed": SEED,
    },
    passed={"stream_interval": "set for the whole server by --stream-interval"},
    refused=REFUSED,
)


def asked_ids(value: Any, field: str) -> Any:
    """One list of token ids for all prompts of a batch (a list), or one list each (a tuple)."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        return listed(lambda ids, at: list(token_ids(ids, at)), MAX_BATCH)(value, field)
    return list(token_ids(value, field))


def sampling_params(value: object, field: str) -> dict[str, object]:
    """`sampling_params` of one prompt."""
    return SAMPLING_PARAMS.read(value, field)


GENERATE = Fields(
    honoured={
        "text": anything,
        "input_ids": anything,
        "sampling_params": each(sampling_params, MAX_BATCH),
        "return_logprob": each(boolean, MAX_BATCH),
        "logprob_start_len": each(integer(-1, MAX_TOKENS), MAX_BATCH),
        "top_logprobs_num": each(integer(0, 128), MAX_BATCH),
        "token_ids_logprob": asked_ids,
        "return_text_in_logprobs": boolean,
        "stream": boolean,
        "rid": each(string, MAX_BATCH),
        **PLACE,
        "priority": OPENAI["priority"],
        "extra_key": each(string, MAX_BATCH),
        "cache_salt": each(string, MAX_BATCH),
        "model": string,
    },
    passed={
        **PASSED,
        **dict.fromkeys(("modalities", "image_max_dynamic_patch", "return_bytes"), NONE_TO_SEE),
        **dict.fromkeys(("video_config", "video_max_dynamic_patch"), NONE_TO_SEE),
        **dict.fromkeys(("need_wait_for_mm_inputs", "num_items_assigned", "encoder_urls"), NONE_TO_SEE),
        **dict.fromkeys(("mm_hashes", "mm_content_hashes"), NONE_TO_SEE),
        **dict.fromkeys(("conversation_id", "external_trace_header"), LABEL),
        **dict.fromkeys(("http_worker_ipc", "kv_router_hint"), ROUTING),
        "background": "every request runs alike",
        "received_time": "the server's own clock counts",
    },
    refused={
        **REFUSED,
        **dict.fromkeys(("image_data", "video_data", "audio_data"), NO_IMAGES),
        **dict.fromkeys(("input_embeds", "positional_embed_overrides"), Refused("send text or input_ids")),
        "require_reasoning": Refused("ask for it in the prompt", (False,)),
        **dict.fromkeys(("return_sampling_mask", "return_indexer_topk", "return_entropy"), NO_STATES),
        **dict.fromkeys(("return_flat_raw_top_logprobs", "return_flat_raw_top_logprobs_b64"), NO_STATES),
        "multi_item_delimiter_indices": Refused("send the items as a batch"),
    },
)
