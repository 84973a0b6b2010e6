"""The settings as keyword arguments, for type checkers. `config` has their limits, defaults and descriptions."""

from typing import Literal, TypedDict


class Keywords(TypedDict, total=False):
    """Every setting by name, as `Config.of` and `DilaServe` take them."""

    # model
    model: str
    revision: str | None
    attention: Literal["auto", "full", "block"]
    served_model_name: str | None
    max_model_len: int | None
    chat_template: str | None
    dtype: Literal["auto", "float32", "bfloat16", "float16", "half", "float"]
    # devices
    devices: str
    plan: str
    tensor_parallel_size: int | None
    data_parallel_size: int | None
    group_backend: Literal["auto", "shm", "gloo", "nccl"]
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_tokens: int | None
    weights_memory: float | None
    gpu_memory_utilization: float
    steps_per_launch: int | None
    enforce_eager: Literal["on", "off"]
    cpu_threads: int | None
    # decoding
    block_length: int | None
    confidence_threshold: float | None
    editing_threshold: float | None
    cache: Literal["none", "prefix", "dual", "exact"] | None
    default_max_tokens: int
    seed: int | None
    # scheduling
    scheduling: Literal["fcfs", "edf", "least-slack", "composed"]
    shed: Literal["on", "off"]
    threshold_control: Literal["fixed", "slack", "slack+floor"]
    min_confidence_threshold: float
    accuracy_budget: float | Literal["off"]
    slo_class: str
    guaranteed_rows: int
    batch_cap: int | None
    best_effort_age: float
    best_effort_share: float
    best_effort_backlog: float
    step_timeout: float
    profile: str | None
    max_queue: int
    # server
    host: str
    port: int
    root_path: str
    api_key: str | None
    api_key_file: str | None
    admin_key: str | None
    allowed_origins: str
    ssl_certfile: str | None
    ssl_keyfile: str | None
    max_body_bytes: int
    max_inflight_bytes: int | None
    max_choices: int
    grace_period: float
    log_level: Literal["debug", "info", "warning", "error"]
    log_format: Literal["text", "json"]
    otlp_traces_endpoint: str | None
    vllm_metrics: Literal["on", "off"]
