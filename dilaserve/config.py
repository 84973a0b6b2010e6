"""Every setting, in one frozen tree that is validated once and never written again.

Flags, environment variables (`DILASERVE_…`) and the TOML file all use the leaf names below, which are unique.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Unpack, get_type_hints

import msgspec
from msgspec import Meta

from dilaserve.errors import ConfigError
from dilaserve.keywords import Keywords
from dilaserve.setting_names import flattened, nearest
from dilaserve.setting_types import choice, takes_numbers

BUNDLED = "dilaserve-tiny"
CacheKind = Literal["none", "prefix", "dual", "exact"]
Switch = Literal["on", "off"]
ENVIRONMENT = "DILASERVE_"
BODIES_IN_FLIGHT = (
    16  # request bodies of the largest size that may be received at once, unless a setting says otherwise
)
REPEATABLE = {"host", "served_model_name"}  # settings whose flag may be given several times
LINKED = re.compile(r"[a-z]+://")  # how the address of a service begins that Kubernetes puts into DILASERVE_PORT

Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Words = Annotated[str, Meta(min_length=1)]
Share = Annotated[float, Meta(gt=0.0, le=1.0)]
Budget = Annotated[float, Meta(ge=0.0, le=100.0)] | Literal["off"]
Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]
Patience = Annotated[float, Meta(gt=0.0, le=1e9)]


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Model"""

    model: Annotated[
        Words,
        Meta(
            description="checkpoint directory, the bundled model's name, or org/name[@revision] on Hugging Face's hub"
        ),
    ] = BUNDLED
    revision: Annotated[
        Words | None, Meta(description="branch, tag or commit of a model on the hub (default: main)")
    ] = None
    attention: Annotated[
        Literal["auto", "full", "block"],
        Meta(description="that the model was trained with, where its files do not tell (A2D); auto: by its name"),
    ] = "auto"
    served_model_name: Annotated[
        Words | None,
        Meta(description="name in the API, or several: all answer, the first is shown (default: the directory's name)"),
    ] = None
    max_model_len: Annotated[
        Annotated[int, Meta(ge=2)] | None, Meta(description="longest canvas, prompt and answer, in tokens")
    ] = None
    chat_template: Annotated[
        Words | None,
        Meta(
            description="Jinja template of chats: a file, the text itself, or the name of one of the model's (default: "
            "the model's own)"
        ),
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "half", "float"],
        Meta(description="auto: float32 on CPU, bfloat16 on CUDA; half is float16, float is float32"),
    ] = "auto"

    @property
    def names(self) -> list[str]:
        """The names that --served-model-name gives, the shown one first; none where the directory names the model."""
        return [name.strip() for name in (self.served_model_name or "").split(",") if name.strip()]


class DeviceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Devices"""

    devices: Annotated[str, Meta(description="auto, or a list with one worker each: cuda:0,cuda:1 or cpu,cpu")] = "auto"
    plan: Annotated[
        str, Meta(description="which devices form instances: auto, or COUNTxDEGREE such as 8x1, 2x4, 4x1+2x2")
    ] = "auto"
    tensor_parallel_size: Annotated[
        Positive | None, Meta(description="devices of each instance, instead of --plan (default: by --plan)")
    ] = None
    data_parallel_size: Annotated[
        Positive | None, Meta(description="how many instances, instead of --plan (default: by --plan)")
    ] = None
    group_backend: Annotated[
        Literal["auto", "shm", "gloo", "nccl"],
        Meta(description="what carries tensor-parallel groups; auto: nccl where it can, else shared memory"),
    ] = "auto"
    max_num_seqs: Annotated[Positive, Meta(description="rows that may run at once on one device")] = 64
    max_num_batched_tokens: Annotated[Positive, Meta(description="packed tokens in one step, at most")] = 8192
    kv_cache_tokens: Annotated[
        Positive | None, Meta(description="K/V pool of one device, in tokens (default: from free memory)")
    ] = None
    weights_memory: Annotated[
        Annotated[float, Meta(gt=0.0, le=2.0**20)] | None,
        Meta(description="GiB of one device that weights may take (default: what is there); more are split up"),
    ] = None
    gpu_memory_utilization: Annotated[Share, Meta(description="share of a GPU's memory to use")] = 0.9
    steps_per_launch: Annotated[
        Annotated[int, Meta(ge=1, le=64)] | None,
        Meta(description="steps of a launch, at most, while nobody waits (default: 8 on CUDA, 1 on CPU)"),
    ] = None
    enforce_eager: Annotated[Switch, Meta(description="on: no CUDA graphs, to find out what is wrong")] = "off"
    cpu_threads: Annotated[
        Annotated[int, Meta(ge=1, le=1024)] | None,
        Meta(description="threads of one CPU worker (default: cores / CPU workers)"),
    ] = None

    @property
    def planned(self) -> bool:
        """Whether the layout is the planner's to choose."""
        return self.plan == "auto" and not (self.tensor_parallel_size or self.data_parallel_size)


class DecodeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Decoding defaults, for requests that do not say otherwise"""

    block_length: Annotated[
        Positive | None, Meta(description="tokens in one block (default: the model's, else 32)")
    ] = None
    confidence_threshold: Annotated[
        Annotated[float, Meta(ge=0.0, le=1.0)] | None,
        Meta(description="confidence at which a token is unmasked (default: the model family's, mostly 0.9)"),
    ] = None
    editing_threshold: Annotated[
        Annotated[float, Meta(ge=0.0, le=1.0)] | None,
        Meta(description="confidence at which an unmasked token of the open block is replaced (default: never)"),
    ] = None
    cache: Annotated[
        CacheKind | None,
        Meta(description="K/V reuse: none, prefix or dual between refreshes (default: dual), exact where it is so"),
    ] = None
    default_max_tokens: Annotated[Positive, Meta(description="max_tokens of a request that states none")] = 128
    seed: Annotated[
        Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None,
        Meta(description="seed of requests that state none, so that answers repeat (default: another each time)"),
    ] = None


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Scheduling"""

    scheduling: Annotated[
        Literal["fcfs", "edf", "least-slack", "composed"],
        Meta(description="who is served first; composed: by deadline, steps made up so that deadlines hold"),
    ] = "composed"
    shed: Annotated[Switch, Meta(description="stop spending time on requests that cannot meet their deadline")] = "on"
    threshold_control: Annotated[
        Literal["fixed", "slack", "slack+floor"],
        Meta(description="lower the confidence threshold of requests that are short of time"),
    ] = "slack+floor"
    min_confidence_threshold: Annotated[Share, Meta(description="threshold control goes no lower")] = 0.6
    accuracy_budget: Annotated[
        Budget, Meta(description="mean accuracy drop per tenant, in percentage points, that control may spend; or off")
    ] = 0.9
    slo_class: Annotated[
        str, Meta(description="deadlines by name, NAME=2.0x|800ms|none[*WEIGHT],…; x: times the unloaded latency")
    ] = ""
    guaranteed_rows: Annotated[Positive, Meta(description="rows with an admitted deadline on one device, at most")] = 6
    batch_cap: Annotated[Positive | None, Meta(description="rows in one step, at most")] = None
    best_effort_age: Annotated[
        Patience, Meta(description="seconds after which best-effort requests get rows before others")
    ] = 30.0
    best_effort_share: Annotated[
        Annotated[float, Meta(ge=0.0, le=1.0)],
        Meta(description="share of their time that busy instances give to requests without deadlines, or late"),
    ] = 0.01
    best_effort_backlog: Annotated[
        Patience,
        Meta(
            description="seconds of unfinished work without deadlines for each device, beyond which such requests are "
            "refused while others with deadlines come"
        ),
    ] = 30.0
    step_timeout: Annotated[
        Patience,
        Meta(
            description="seconds after which a step counts as hung, if that is 20 times what was predicted; ten times "
            "as many while step costs are a guess, and twice as many after each kill"
        ),
    ] = 20.0
    profile: Annotated[
        Words | None, Meta(description="calibration file (default: beside the model, else in the cache directory)")
    ] = None
    max_queue: Annotated[
        Positive,
        Meta(description="requests, running and waiting, at most; tenants share the places when they are full"),
    ] = 1024


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Server"""

    host: Annotated[
        Words, Meta(description="address to listen on; several with commas, or by giving the flag again")
    ] = "127.0.0.1"
    port: Annotated[Annotated[int, Meta(ge=0, le=65535)], Meta(description="port to listen on; 0 takes a free one")] = (
        8000
    )
    root_path: Annotated[str, Meta(description="prefix of all paths where a proxy adds one, such as /llm")] = ""
    api_key: Annotated[Words | None, Meta(description="clients must send it as a bearer token")] = None
    api_key_file: Annotated[
        Words | None,
        Meta(description="TOML file of [[tenant]] with name, key or sha256, and limits; read again on SIGHUP"),
    ] = None
    admin_key: Annotated[Words | None, Meta(description="bearer token that may change the plan (POST /v1/plan)")] = None
    allowed_origins: Annotated[
        str, Meta(description="sites whose pages may ask from a browser, with commas, or *; none by default")
    ] = ""
    ssl_certfile: Annotated[Words | None, Meta(description="certificate chain (PEM); the server then speaks HTTPS")] = (
        None
    )
    ssl_keyfile: Annotated[Words | None, Meta(description="key of the certificate (PEM), if it is in another file")] = (
        None
    )
    max_body_bytes: Annotated[Positive, Meta(description="largest request body")] = 4 * 2**20
    max_inflight_bytes: Annotated[
        Annotated[int, Meta(ge=1, le=2**50)] | None,
        Meta(description="all request bodies that are being received, together (default: 16 of --max-body-bytes)"),
    ] = None
    max_choices: Annotated[Positive, Meta(description="largest n, and most prompts in one request")] = 16
    grace_period: Annotated[Seconds, Meta(description="seconds that running requests get to finish at shutdown")] = 30.0
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="least level logged")] = "info"
    log_format: Annotated[Literal["text", "json"], Meta(description="of the log on standard error")] = "text"
    otlp_traces_endpoint: Annotated[
        Words | None,
        Meta(
            description="address that takes OpenTelemetry spans of requests over HTTP, such as http://HOST:4318/v1/traces"
        ),
    ] = None
    vllm_metrics: Annotated[
        Switch, Meta(description="on: /metrics gives what vLLM has too under its names as well (vllm:…)")
    ] = "off"

    @property
    def inflight_bytes(self) -> int:
        return self.max_inflight_bytes or BODIES_IN_FLIGHT * self.max_body_bytes


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole tree. `Config.of(model=…, devices=…)` builds one from leaf names."""

    model: ModelConfig = msgspec.field(default_factory=ModelConfig)
    device: DeviceConfig = msgspec.field(default_factory=DeviceConfig)
    decode: DecodeConfig = msgspec.field(default_factory=DecodeConfig)
    scheduler: SchedulerConfig = msgspec.field(default_factory=SchedulerConfig)
    server: ServerConfig = msgspec.field(default_factory=ServerConfig)

    @staticmethod
    def of(**settings: Unpack[Keywords]) -> "Config":
        """A configuration with these leaf settings, checked; `ConfigError` names what is wrong."""
        return build(settings)


class Setting(msgspec.Struct, frozen=True):
    """One leaf of the tree, as `--help` and the environment see it."""

    name: str
    group: str
    heading: str
    type: Any
    default: Any
    description: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def environment(self) -> str:
        return ENVIRONMENT + self.name.upper()


def settings() -> dict[str, Setting]:
    """Every leaf by name, in the tree's order."""
    leaves: dict[str, Setting] = {}
    for group, branch in get_type_hints(Config).items():
        hints = get_type_hints(branch, include_extras=True)
        for field in msgspec.structs.fields(branch):
            hint = hints[field.name]
            text = hint.__metadata__[-1].description or ""
            leaves[field.name] = Setting(field.name, group, branch.__doc__ or group, hint, field.default, text)
    return leaves


def load(flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ, file: Path | None = None) -> Config:
    """The configuration from flags over environment over file over defaults.

    Raises `ConfigError` for an unknown name or a value outside its limits.
    """
    values, sources = gathered(flags, environ, file)
    return build(values, sources)


class Gathered(NamedTuple):
    """Settings that are given, unchecked, and where those come from that are no flags."""

    values: dict[str, Any]
    sources: dict[str, str]


def gathered(flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ, file: Path | None = None) -> Gathered:
    """What flags, environment and file give. Raises `ConfigError` for a file that cannot be read."""
    merged: dict[str, Any] = read(file) if file else {}
    sources = dict.fromkeys(merged, f"in {file}")
    for name, setting in settings().items():
        if setting.environment in environ and name not in flags and setting.environment not in linked(environ):
            merged[name] = environ[setting.environment]
            sources[name] = f"in the environment, as {setting.environment}"
    for name in flags:
        sources.pop(name, None)
    return Gathered({**merged, **flags}, sources)


def linked(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Variables that are no settings of ours: a Service named dilaserve makes Kubernetes set its address there."""
    name = settings()["port"].environment
    return [name] if LINKED.match(environ.get(name, "")) else []


def read(file: Path) -> dict[str, Any]:
    try:
        return flattened(tomllib.loads(file.read_text()), {one.name: one.group for one in settings().values()})
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {file} is not valid TOML: {error}") from error


def build(values: Mapping[str, Any], sources: Mapping[str, str] | None = None) -> Config:
    """The tree; `sources` tells where values come from that are no flags."""
    tree: dict[str, dict[str, Any]] = {}
    known = settings()
    for name, value in values.items():
        source = f" ({sources[name]})" if sources and name in sources else ""
        if name not in known:
            cure = (
                f"did you mean {near}?" if (near := nearest(name, known)) else "`dilaserve --help-all` lists them all"
            )
            raise ConfigError(f"unknown setting {name!r}{source}; {cure}", param=name)
        tree.setdefault(known[name].group, {})[name] = convert(known[name], value, source)
    built = msgspec.convert(tree, Config)
    check_bodies(built.server)
    check_plan(built.device)
    return built


def check_plan(device: DeviceConfig) -> None:
    if device.plan != "auto" and (device.tensor_parallel_size or device.data_parallel_size):
        raise ConfigError(
            f"--plan {device.plan} already says what --tensor-parallel-size and --data-parallel-size say; give one",
            param="plan",
        )


def check_bodies(server: ServerConfig) -> None:
    if server.inflight_bytes < server.max_body_bytes:
        raise ConfigError(
            f"--max-inflight-bytes {server.inflight_bytes} is less than one body of --max-body-bytes "
            f"{server.max_body_bytes}; raise the one or lower the other",
            param="max_inflight_bytes",
        )


def convert(setting: Setting, value: Any, source: str = "") -> Any:
    if setting.name in REPEATABLE and isinstance(value, list) and all(isinstance(one, str) for one in value):
        value = ",".join(value)
    if isinstance(value, str) and value.startswith(".") and takes_numbers(setting.type):
        value = f"0{value}"  # a number may begin with its point
    try:
        return msgspec.convert(value, setting.type, strict=not isinstance(value, str))
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"{setting.flag} {value!r}{source}: {choice(setting.type) or error}", param=setting.name
        ) from error
