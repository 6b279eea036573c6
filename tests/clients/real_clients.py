"""The real clients: what they need, and the places they are tried at.

A client that is missing is skipped with the reason, or fails when LLM_ROUTER_TEST_REQUIRE_CLIENTS=1 (as CI sets it).
"""

import os
import platform
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
REQUIRED = os.environ.get("LLM_ROUTER_TEST_REQUIRE_CLIENTS") == "1"
WIRES = ("openai", "anthropic", "responses")
MODEL = "fake-model"


def missing(reason):
    """Skip, or fail where every client is required."""
    if REQUIRED:
        pytest.fail(reason + " (LLM_ROUTER_TEST_REQUIRE_CLIENTS=1)")
    pytest.skip(reason)


def sdk(name):
    try:
        return __import__(name)
    except ImportError:
        missing("the %s SDK is not installed" % name)


def router_knows(wire):
    """Whether the router speaks this wire format: its constant is there."""
    import llm_router

    return wire != "responses" or hasattr(llm_router, "OPENAI_RESPONSES")


class Place:
    """Where a client is sent: `url` without /v1, the `upstream` behind it, and the upstream's `wire` ("" when direct)."""

    def __init__(self, url, upstream, wire=""):
        self.url = url
        self.upstream = upstream
        self.wire = wire

    def chats(self, wire):
        """The chat calls that reached the upstream; all of the expected format (`wire` is the client's own)."""
        calls = [call for call in self.upstream.calls if call.wire and call.method == "POST"]
        assert {call.wire for call in calls} == {self.wire or wire}
        return calls


SYSTEMS = {"linux": "linux", "darwin": "darwin", "win32": "win32"}
MACHINES = {"x86_64": "x64", "amd64": "x64", "arm64": "arm64", "aarch64": "arm64"}


def native(scope, package, pattern):
    """The program inside a platform package under node_modules: run directly, so no install script is needed."""
    tail = "%s-%s" % (SYSTEMS.get(sys.platform, sys.platform), MACHINES.get(platform.machine().lower(), "none"))
    folder = HERE / "node_modules" / scope / ("%s-%s" % (package, tail))
    found = [path for path in sorted(folder.glob(pattern)) if path.is_file()]
    if not found:
        missing("%s/%s is not installed: run `npm ci --ignore-scripts` in tests/clients" % (scope, package))
    return str(found[0])
