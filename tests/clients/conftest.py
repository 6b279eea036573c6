"""Fixtures of the client tests: the places a client is sent to, and its own temporary home."""

import subprocess

import pytest

from fake_upstream import FakeUpstream, tool_round_trip
from real_clients import MODEL, WIRES, Place, router_knows
from running_router import clean_environment, config_of, provider


@pytest.fixture(params=["direct"] + ["over-" + wire for wire in WIRES])
def place(request, router):
    """`place(client_wire, handler=None)`: directly at the fake, or through the router over each upstream format."""
    started = []

    def make(client_wire, handler=None):
        wire = "" if request.param == "direct" else request.param[len("over-") :]
        if wire and not (router_knows(client_wire) and router_knows(wire)):
            pytest.skip("this router does not speak the Responses format")
        started.append(FakeUpstream(handler or tool_round_trip()).start())
        if not wire:
            return Place(started[0].url, started[0])
        return Place(router(config_of(provider(started[0], wire, models=[MODEL]))).url, started[0], wire)

    yield make
    for upstream in started:
        upstream.stop()


@pytest.fixture
def run_agent(tmp_path):
    """`run_agent(program, *arguments, home, cwd, env, timeout)` runs an agent in an environment of its own."""

    def run(program, *arguments, home, cwd, timeout=300, **env):
        kept = clean_environment(home, TERM="dumb", **env)
        return subprocess.run(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd=str(cwd),
            env=kept,
            timeout=timeout,
        )

    return run


@pytest.fixture
def project(tmp_path):
    """A temporary (home, project) with a hello.txt to read."""
    home = tmp_path / "home"
    folder = home / "project"
    folder.mkdir(parents=True)
    (folder / "hello.txt").write_text("hello from file\n", encoding="utf-8")
    return home, folder
