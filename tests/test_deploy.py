"""What stands in bin/deploy agrees with the server: ports, paths, flags, variables, grace periods."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from dilaserve import config
from dilaserve.cli import parsed
from dilaserve.server import app
from dilaserve.server.routes import ROUTES

DEPLOY = Path(__file__).parent.parent / "bin" / "deploy"
CONTAINERFILE = (DEPLOY / "Containerfile").read_text()
UNIT = (DEPLOY / "dilaserve.service").read_text()
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["dilaserve"]
MANIFEST = {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}
POD = MANIFEST["Deployment"]["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
PORT = config.Config().server.port
CACHE = "/home/dilaserve/.cache"


def settings_of(words):
    assert words[0] == "serve"
    return parsed(list(words[1:]), "serve")[0]


def seconds(text):
    return float(re.fullmatch(r"(\d+)s?", str(text))[1])


@pytest.mark.parametrize(
    ("words", "patience"),
    [
        (CONTAINER["args"], POD["terminationGracePeriodSeconds"]),
        (COMPOSE["command"], COMPOSE["stop_grace_period"]),
        (
            ["serve", "--grace-period", re.search(r"--grace-period (\d+)", UNIT)[1]],
            re.search(r"TimeoutStopSec=(\d+)", UNIT)[1],
        ),
    ],
)
def test_flags_exist_and_who_stops_the_server_waits_longer_than_its_grace_period(words, patience):
    assert seconds(patience) > settings_of(words).server.grace_period + app.LINGER


def test_probes_ask_paths_that_the_server_has_on_the_port_it_listens_on():
    paths = {path for method, path, _ in ROUTES if method == "GET"}
    probes = {name: CONTAINER[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {one["path"] for one in probes.values()} <= paths
    assert (probes["readinessProbe"]["path"], probes["livenessProbe"]["path"]) == ("/ready", "/health")
    assert CONTAINER["ports"] == [{"name": "http", "containerPort": PORT}]
    assert {one["port"] for one in probes.values()} == {"http"}
    assert settings_of(CONTAINER["args"]).server.port == PORT
    assert MANIFEST["Service"]["spec"]["ports"][0]["targetPort"] == "http"
    assert MANIFEST["Service"]["metadata"]["name"] != "dilaserve"
    assert COMPOSE["ports"] == [f"127.0.0.1:{PORT}:{PORT}"]
    assert "/ready" in CONTAINERFILE.split("HEALTHCHECK")[1]


def test_variables_are_settings():
    everywhere = CONTAINERFILE + UNIT + (DEPLOY / "compose.yaml").read_text() + (DEPLOY / "kubernetes.yaml").read_text()
    known = {setting.environment for setting in config.settings().values()}
    assert set(re.findall(r"DILASERVE_[A-Z_]+", everywhere)) <= known


def test_shared_memory_and_the_cache_are_mounted_and_the_user_is_not_root():
    mounts = {one["mountPath"]: one["name"] for one in CONTAINER["volumeMounts"]}
    volumes = {one["name"]: one for one in POD["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert (
        volumes[mounts[CACHE]]["persistentVolumeClaim"]["claimName"]
        == (MANIFEST["PersistentVolumeClaim"]["metadata"]["name"])
    )
    assert f"VOLUME {CACHE}" in CONTAINERFILE
    assert f"cache:{CACHE}" in COMPOSE["volumes"]
    assert COMPOSE["shm_size"] == "1gb"
    user = POD["securityContext"]["runAsUser"]
    assert f"USER {user}:{user}" in CONTAINERFILE
    assert f"--uid {user}" in CONTAINERFILE
    assert POD["securityContext"]["runAsNonRoot"] is True


def test_what_the_containerfile_copies_is_there_and_not_ignored():
    root = DEPLOY.parent.parent
    kept = set(re.findall(r"^!(\S+)$", (DEPLOY / "Containerfile.dockerignore").read_text(), re.M))
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", CONTAINERFILE, re.M) for name in line.split()]
    assert kept == set(copied)
    assert all((root / name).exists() for name in copied)
    assert all((root / "bin" / "deploy" / name).exists() for name in ("compose.cuda.yaml", "README.md"))


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_takes_the_unit(tmp_path):
    program = tmp_path / "dilaserve"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / "dilaserve.service"
    unit.write_text(UNIT.replace("/opt/dilaserve/bin/dilaserve", str(program)))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "dilaserve.service:" not in done.stderr
