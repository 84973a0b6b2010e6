"""The names under which dashboards and routers made for vLLM look for the same figures (--vllm-metrics on)."""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

ALIASES = {  # vLLM's names, with ours
    "num_requests_running": "requests_running",
    "num_requests_waiting": "requests_waiting",
    "kv_cache_usage_perc": "kv_cache_usage_ratio",
    "prompt_tokens": "prompt_tokens",
    "generation_tokens": "generation_tokens",
    "prefix_cache_queries": "prompt_tokens",
    "prefix_cache_hits": "prefix_cached_tokens",
    "num_preemptions": "request_restarts",
    "request_success": "finish_reasons",
    "time_to_first_token_seconds": "time_to_first_token_seconds",
    "inter_token_latency_seconds": "inter_token_latency_seconds",
    "request_time_per_output_token_seconds": "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds": "e2e_request_latency_seconds",
    "request_queue_time_seconds": "request_queue_time_seconds",
    "request_inference_time_seconds": "request_inference_time_seconds",
    "request_prompt_tokens": "request_prompt_tokens",
    "request_generation_tokens": "request_generation_tokens",
}
LABELS = {"finish_reason": "finished_reason"}  # labels that have another name there


def value_of(metric: Metric) -> float:
    """That of a metric without labels."""
    (sample,) = metric.samples
    return sample.value


class VllmCollector(Collector):
    """Gives the metrics of `collect` again under vLLM's names, with its label `model_name` in front."""

    def __init__(self, collect: Callable[[], Iterable[Metric]], model: str) -> None:
        self.ours, self.model = collect, model

    def collect(self) -> Iterator[Metric]:
        found = {metric.name.removeprefix("dilaserve_"): metric for metric in self.ours()}
        for theirs, ours in ALIASES.items():
            yield self.renamed(found[ours], f"vllm:{theirs}")
        yield self.cache(value_of(found["kv_cache_page_tokens"]), value_of(found["kv_cache_pages"]))
        yield self.adapters()

    def cache(self, page: float, pages: float) -> Metric:
        """From which pickers of endpoints take the size of the K/V memory."""
        labels = {"block_size": f"{page:.0f}", "num_gpu_blocks": f"{pages:.0f}"}
        return self.alone("cache_config_info", "K/V memory in pages; its figures are labels", labels, 1.0)

    def adapters(self) -> Metric:
        """There are none; pickers of endpoints log an error at each scrape without this."""
        labels = {"max_lora": "0", "running_lora_adapters": "", "waiting_lora_adapters": ""}
        return self.alone("lora_requests_info", "Adapters that are served; the value would be a time", labels, 0.0)

    def alone(self, name: str, about: str, labels: dict[str, str], value: float) -> Metric:
        family = Metric(f"vllm:{name}", about, "gauge")
        family.add_sample(family.name, {"model_name": self.model, **labels}, value)
        return family

    def renamed(self, metric: Metric, name: str) -> Metric:
        alias = Metric(name, metric.documentation, metric.type)
        for sample in metric.samples:
            if sample.name.endswith("_created"):
                continue
            labels = {"model_name": self.model, **{LABELS.get(key, key): kept for key, kept in sample.labels.items()}}
            alias.samples.append(Sample(name + sample.name.removeprefix(metric.name), labels, sample.value))
        return alias
