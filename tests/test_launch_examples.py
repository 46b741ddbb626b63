"""The scripts for SLURM and Kubernetes start what they say: run with stand-ins, and read by the program's own parser."""

import os
import re
import shlex
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from abba_cli.cli import app
from abba_cli.launching import Launcher, Layout, wanted_layout

DOCS = Path(__file__).parents[1] / "docs"
EXAMPLES = DOCS / "examples"
SLURM = sorted(EXAMPLES.glob("*.sh"))
MANIFESTS = sorted(EXAMPLES.glob("*.yaml"))

# Starts its command once for each of two machines.
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" || exit; done
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'gpu-a\\ngpu-b\\n'; else echo "scontrol $*" >>"$LOG"; fi
"""
ABBA = """#!/bin/bash
echo "abba $* MASTER_ADDR=$MASTER_ADDR" >>"$LOG"
exit $ABBA_CODE
"""


def parsed(words: list[str]) -> dict[str, Any]:
    """What the program makes of `abba train ...`."""
    assert words[:2] == ["abba", "train"]
    command = get_command(app).commands["train"]  # type: ignore[attr-defined]
    parameters: dict[str, Any] = command.make_context("train", words[2:]).params
    return parameters


def layout(given: dict[str, Any]) -> Layout:
    return wanted_layout(8, given["num_machines"], given["machine_rank"], given["main_address"])


def run(folder: Path, command: list[str], code: int = 0, **environment: str) -> tuple[int, list[str]]:
    """Run a script with the stand-ins, and return its exit code and what they were asked."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "abba": ABBA}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    given = {"PATH": path, "LOG": str(folder / "log"), "ABBA_CODE": str(code), **environment}
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.returncode, (folder / "log").read_text().splitlines()


def slurm(script: Path, folder: Path, code: int = 0) -> tuple[int, list[str]]:
    known = {"SLURM_JOB_NODELIST": "gpu-[a-b]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8"}
    return run(folder, ["bash", "-u", str(script), "a recipe.yaml"], code, **known)


def test_slurm_starts_a_task_for_each_machine(tmp_path: Path) -> None:
    code, asked = slurm(EXAMPLES / "slurm-machines.sh", tmp_path)
    assert code == 0
    lines = [line.replace("a recipe.yaml", "'a recipe.yaml'").rpartition(" MASTER_ADDR=")[0] for line in asked]
    found = [parsed(shlex.split(line)) for line in lines]
    assert [str(one["recipe"]) for one in found] == ["a recipe.yaml"] * 2
    assert [layout(one) for one in found] == [Layout(8, 2, rank, "gpu-a:29500") for rank in (0, 1)]


def test_slurm_starts_a_task_for_each_gpu(tmp_path: Path) -> None:
    code, asked = slurm(EXAMPLES / "slurm-gpus.sh", tmp_path)
    assert code == 0
    line, _, address = asked[0].replace("a recipe.yaml", "'a recipe.yaml'").rpartition(" MASTER_ADDR=")
    assert address == "gpu-a"
    assert parsed(shlex.split(line))["launcher"] is Launcher.none


@pytest.mark.parametrize("script", SLURM, ids=lambda path: path.name)
def test_a_job_that_was_asked_to_stop_is_queued_again(script: Path, tmp_path: Path) -> None:
    assert slurm(script, tmp_path, code=143) == (143, [*asked_before(tmp_path), "scontrol requeue 7"])
    (tmp_path / "log").unlink()
    code, asked = slurm(script, tmp_path, code=1)
    assert code == 1
    assert not any("requeue" in line for line in asked)


def asked_before(folder: Path) -> list[str]:
    return [line for line in (folder / "log").read_text().splitlines() if line.startswith("abba")]


@pytest.mark.parametrize("script", SLURM, ids=lambda path: path.name)
def test_slurm_is_asked_for_what_the_script_starts(script: Path) -> None:
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", script.read_text(), re.MULTILINE))
    machines, gpus, tasks = (int(asked[key]) for key in ("nodes", "gpus-per-node", "ntasks-per-node"))
    assert (machines, gpus) == (2, 8)
    assert tasks == (gpus if "--launcher none" in script.read_text() else 1)
    assert tasks * int(asked["cpus-per-task"]) == 64


def test_the_pods_of_a_job_find_one_another(tmp_path: Path) -> None:
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    assert (service["kind"], job["kind"], job["spec"]["completionMode"]) == ("Service", "Job", "Indexed")
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    pods = job["spec"]["completions"]
    assert pods == job["spec"]["parallelism"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    found = []
    for index in range(pods):
        run(tmp_path, [*container["command"], *container["args"]], JOB_COMPLETION_INDEX=str(index))
        line = (tmp_path / "log").read_text().splitlines()[-1].rpartition(" MASTER_ADDR=")[0]
        found.append(layout(parsed(shlex.split(line))))
    # A pod of an indexed job is called JOB-INDEX, and its address is that within the service.
    first, port = f"{job['metadata']['name']}-0.{service['metadata']['name']}", service["spec"]["ports"][0]["port"]
    assert found == [Layout(8, pods, rank, f"{first}:{port}") for rank in range(pods)]
    assert container["ports"] == [{"containerPort": port}]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    patience = {one["name"]: one["value"] for one in container["env"]}["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    assert int(patience) < pod["terminationGracePeriodSeconds"]


def test_every_command_on_the_page_is_accepted() -> None:
    text = (DOCS / "scale.md").read_text()
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    inline = "\n".join(re.findall(r"`([^`\n]+)`", text))
    seen = 0
    for line in f"{shell}\n{inline}".splitlines():
        found = re.search(r"\babba train (?:R|recipe\.yaml|recipes/)\S*.*", line)
        if found is None:
            continue
        words = shlex.split(re.sub(r"\bK\b|\$\w+", "1", found[0]), comments=True)
        given = parsed(["abba", "train", *words[2:]])
        assert given["main_address"] is not None or given["num_machines"] == 1, line
        seen += 1
    assert seen >= 8


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_manifests_are_yaml(manifest: Path) -> None:
    assert all({"apiVersion", "kind", "metadata", "spec"} == one.keys() for one in yaml.safe_load_all(manifest.read_text()))


def test_yaml_on_the_page_parses() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / "scale.md").read_text(), re.DOTALL)
    assert blocks
    assert all(isinstance(yaml.safe_load(block), dict) for block in blocks)
