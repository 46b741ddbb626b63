"""Which processes a command line asks for. What they do together is in test_several_processes.py."""

import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.launcher import api

from abba_cli import launching
from abba_cli.launching import Layout, take_place_from_slurm, wanted_layout

Abba = Callable[..., tuple[int, str, str]]
RecipeFile = Callable[..., Path]


@pytest.mark.parametrize(("cards", "processes"), [(0, 1), (1, 1), (8, 8)])
def test_every_visible_gpu_gets_a_process(cards: int, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    assert wanted_layout(None, 1, 0, None) == Layout(processes)


def test_machines_multiply_and_a_port_may_be_left_out() -> None:
    layout = wanted_layout(8, 2, 1, "node-0")
    assert (layout.count, layout.address) == (16, "node-0:29500")
    assert wanted_layout(8, 2, 1, "node-0:1234").address == "node-0:1234"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num-machines", 2), "--num-machines needs --main-address HOST:PORT"),
        (("--num-machines", 2, "--main-address", "h", "--machine-rank", 2), "expected 0 to 1"),
        (("--num-machines", 2, "--main-address", "h:99999"), "expected a port up to 65535"),
        (("--num-processes", 0), "--num-processes"),
        (("--launcher", "mpi"), "'mpi' is not one of"),
    ],
)
def test_contradictions_are_usage_errors(options: tuple[object, ...], message: str, abba: Abba, recipe_file: RecipeFile) -> None:
    code, _, err = abba("train", recipe_file(), *options)
    assert code == 2
    assert message in " ".join(err.replace("│", " ").split())


def test_a_task_of_slurm_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    slurm = {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    take_place_from_slurm()
    assert "RANK" not in os.environ  # without a main address there is nobody to join
    monkeypatch.setenv("MASTER_ADDR", "node-0")
    take_place_from_slurm()
    found = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    assert found == {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_PORT": "29500"}


def test_a_dry_run_for_several_processes_starts_none(abba: Abba, recipe_file: RecipeFile) -> None:
    recipe = recipe_file()
    alone, pair = (abba("train", recipe, "--dry-run", *more) for more in ((), ("--num-processes", "2")))
    assert alone[0] == pair[0] == 0
    assert "tokens in each of 2 processes" in " ".join(pair[1].split())
    assert "buckets" in pair[1]
    assert "buckets" not in alone[1]


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher changes in its own process is put back."""
    for name in (launching.LAUNCHED, "OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(logging, "disable", lambda level: None)


def unknown(host: str, port: None) -> None:
    raise socket.gaierror(-2, "Name or service not known")


@pytest.mark.usefixtures("launcher")
def test_a_main_address_that_nobody_knows_is_told_in_one_line(
    abba: Abba, recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "PATIENCE_SECONDS", -1.0)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    code, out, err = abba("train", recipe_file(), "--num-machines", 2, "--machine-rank", 1, "--main-address", "no.such.host:1234")
    assert (code, out) == (1, "")
    reason = "no address is known for no.such.host (Name or service not known)"
    assert err == f"abba: --main-address: {reason}; give the name or number of machine 0\n"


@pytest.mark.usefixtures("launcher")
def test_machines_that_do_not_meet_are_told_in_one_line(
    abba: Abba, recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(config: object, command: object) -> Callable[..., None]:
        raise torch.distributed.DistNetworkError("The client socket has timed out.\nC++ frames")

    monkeypatch.setattr(api, "elastic_launch", refused)
    options = ("--num-machines", 2, "--machine-rank", 1, "--main-address", "127.0.0.1:1234")
    code, out, err = abba("train", recipe_file(), *options)
    assert (code, out) == (1, "")
    assert err.startswith("abba: the machines did not meet at 127.0.0.1:1234: The client socket has timed out. Start the same")
    assert err.count("\n") == 1


def test_a_name_that_becomes_known_is_waited_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answers = iter([socket.gaierror(-2, "Name or service not known"), socket.gaierror(-2, "again"), None])

    def look_up(host: str, port: None) -> None:
        if (answer := next(answers)) is not None:
            raise answer

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    launching._wait_for_name("abba-0.abba")
    told = capsys.readouterr().err
    assert told == "abba: waiting for the address of abba-0.abba, which is not known so far (Name or service not known)\n"
    assert next(answers, "asked three times") == "asked three times"
