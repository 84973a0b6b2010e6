"""The manifests for llm-d and KServe agree with the server and with each other: flags, probes, classes, metrics."""

import aiohttp
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from test_deploy import DEPLOY, PORT, seconds, settings_of

from dilaserve import Config
from dilaserve.engine.slo_classes import parse_classes
from dilaserve.server import app
from dilaserve.server.app import running
from dilaserve.server.routes import ROUTES

pytestmark = pytest.mark.asyncio(loop_scope="module")
GATEWAY = list(yaml.safe_load_all((DEPLOY / "inference-gateway.yaml").read_text()))
KSERVE = yaml.safe_load((DEPLOY / "kserve.yaml").read_text())
ENGINE = "llm-d.ai/engine-type"  # the label by which the picker knows which names a pod's metrics have
VLLM = {  # what the picker asks of pods without the label, by the figure that it takes from it
    "queuedRequestsSpec": "vllm:num_requests_waiting",
    "runningRequestsSpec": "vllm:num_requests_running",
    "kvUsageSpec": "vllm:kv_cache_usage_perc",
    "loraSpec": "vllm:lora_requests_info",
    "cacheInfoSpec": "vllm:cache_config_info",
}


def one(kind, name=None):
    (found,) = (each for each in GATEWAY if each["kind"] == kind and name in (None, each["metadata"]["name"]))
    return found


POD = one("Deployment", "dilaserve")["spec"]["template"]
PODS = [POD["spec"], KSERVE["spec"]["template"]]
POOL, PICKER = one("InferencePool")["spec"], one("Deployment", "dilaserve-picker")["spec"]["template"]["spec"]
CONFIGS = [
    yaml.safe_load(one("ConfigMap")["data"]["config.yaml"]),
    KSERVE["spec"]["router"]["scheduler"]["config"]["inline"],
]


def container(pod):
    (found,) = pod["containers"]
    return found


@pytest.mark.parametrize("pod", PODS)
async def test_a_pod_has_the_time_to_leave_the_pool_and_to_drain(pod):
    _, pause = container(pod)["lifecycle"]["preStop"]["exec"]["command"]
    least = seconds(pause) + settings_of(container(pod)["args"]).server.grace_period + app.LINGER
    assert pod["terminationGracePeriodSeconds"] > least


@pytest.mark.parametrize("pod", PODS)
async def test_probes_ask_the_server_where_it_listens(pod):
    found = container(pod)
    probes = {name: found[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/ready",
        "readiness": "/ready",
        "liveness": "/health",
    }
    ports = {port["name"]: port["containerPort"] for port in found.get("ports", [])}
    assert {ports.get(probe["port"], probe["port"]) for probe in probes.values()} == {PORT}
    assert settings_of(found["args"]).server.port == PORT
    assert settings_of(found["args"]).server.host == "0.0.0.0"


async def test_the_pool_has_the_pods_and_the_route_has_the_pool():
    labels = POD["metadata"]["labels"]
    assert POOL["selector"]["matchLabels"].items() <= labels.items()
    assert one("Deployment", "dilaserve")["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert POOL["targetPorts"] == [{"number": PORT}]
    (rule,) = one("HTTPRoute")["spec"]["rules"]
    (backend,) = rule["backendRefs"]
    assert (backend["kind"], backend["name"]) == ("InferencePool", one("InferencePool")["metadata"]["name"])
    assert {match["path"]["value"] for match in rule["matches"]} <= {path for _, path, _ in ROUTES}
    assert set(rule["timeouts"].values()) == {"0s"}  # no answer is cut


async def test_the_picker_is_the_one_of_the_pool_and_reads_its_configuration():
    service, found = one("Service"), container(PICKER)
    port = POOL["endpointPickerRef"]["port"]["number"]
    assert POOL["endpointPickerRef"]["name"] == service["metadata"]["name"] != "dilaserve"
    target = {each["port"]: each["targetPort"] for each in service["spec"]["ports"]}[port]
    assert {each["name"]: each["containerPort"] for each in found["ports"]}[target] == port
    flags = dict(flag.removeprefix("--").split("=") for flag in found["args"])
    assert (flags["pool-name"], flags["grpc-port"]) == (one("InferencePool")["metadata"]["name"], str(port))
    (mount,) = found["volumeMounts"]
    (volume,) = (each for each in PICKER["volumes"] if each["name"] == mount["name"])
    assert volume["configMap"]["name"] == one("ConfigMap")["metadata"]["name"]
    assert flags["config-file"] == f"{mount['mountPath']}/{next(iter(one('ConfigMap')['data']))}"
    roles = {one(kind)["metadata"]["name"] for kind in ("Role", "RoleBinding", "ServiceAccount")}
    assert roles == {PICKER["serviceAccountName"]}


@pytest.mark.parametrize("config", CONFIGS)
async def test_the_picker_has_the_plugins_that_its_profile_names(config):
    known = {plugin.get("name", plugin["type"]) for plugin in config["plugins"]}
    used = {plugin["pluginRef"] for profile in config["schedulingProfiles"] for plugin in profile["plugins"]}
    assert used | {config["saturationDetector"]["pluginRef"]} <= known
    assert not {name for name in known if "prefix" in name}  # both serve LLaDA, whose K/V no other request can use


async def test_objectives_are_classes_of_the_servers():
    objectives = {each["metadata"]["name"]: each["spec"] for each in GATEWAY if each["kind"] == "InferenceObjective"}
    for pod in PODS:
        assert parse_classes(settings_of(container(pod)["args"]).scheduler.slo_class).keys() == objectives.keys()
    assert {each["poolRef"]["name"] for each in objectives.values()} == {one("InferencePool")["metadata"]["name"]}


@pytest.mark.parametrize(("pod", "config"), list(zip(PODS, CONFIGS, strict=True)))
async def test_what_the_picker_reads_stands_in_the_metrics_of_a_server_with_these_flags(engine, pod, config):
    flags = settings_of(container(pod)["args"])
    serves = Config.of(port=0, vllm_metrics=flags.server.vllm_metrics)
    async with (
        running(engine, serves) as address,
        aiohttp.ClientSession(address) as client,
        client.get("/metrics") as response,
    ):
        families = text_string_to_metric_families(await response.text())
    samples = {sample.name: sample for family in families for sample in family.samples}
    wanted = specs(config, POD["metadata"]["labels"] if pod is POD["spec"] else {})
    found = {figure: samples[name] for figure, name in wanted.items()}
    assert found["queuedRequestsSpec"].value == found["runningRequestsSpec"].value == 0
    assert 0.0 <= found["kvUsageSpec"].value <= 1.0
    if "cacheInfoSpec" in found:
        assert all(sample.labels["model_name"] == engine.model.name for sample in found.values())
        assert found["loraSpec"].labels["max_lora"] == "0"
        size = [found["cacheInfoSpec"].labels[name] for name in ("block_size", "num_gpu_blocks")]
    else:
        size = [found[name].value for name in ("cacheBlockSizeSpec", "cacheNumBlocksSpec")]
    assert all(int(number) > 0 for number in size)


def specs(config, labels):
    """The names of metrics that the picker looks for in pods with these labels."""
    kinds = [
        kind
        for plugin in config["plugins"]
        if plugin["type"] == "core-metrics-extractor"
        for kind in plugin["parameters"]["engineConfigs"]
    ]
    (own,) = [kind for kind in kinds if kind["name"] == labels.get(ENGINE)] or [VLLM]
    return {figure: name for figure, name in own.items() if figure.endswith("Spec")}
