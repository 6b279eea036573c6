"""Fixtures of the Worker tests: `router` is the Worker here, so that the tests of the local server run against it."""

import json
import sys

import pytest

from running_worker import KEY, RunningWorker, need_workerd
from same_tests import as_variables


@pytest.fixture(scope="session")
def workers_folder(tmp_path_factory):
    """Where Workers are laid out; the Pyodide bundle and the memory snapshot are made once for all of them."""
    need_workerd()
    folder = tmp_path_factory.mktemp("workers")
    (folder / "snapshots").mkdir()
    RunningWorker(folder / "worker0", {}, snapshot=[snapshots_in(folder), "--python-save-snapshot"]).kill()
    return folder


def snapshots_in(folder):
    return "--python-snapshot-dir=%s" % (folder / "snapshots")


def _start(folder, config, flags, env, key):
    """From the snapshot, as production starts: nothing random, no clock and no host may be in it."""
    (snapshot,) = (folder / "snapshots").iterdir()
    starts = [snapshots_in(folder), "--python-load-snapshot=%s" % snapshot.name]
    variables = dict({"LLM_ROUTER_MASTER_KEY": KEY}, **as_variables(flags))
    variables["LLM_ROUTER_CONFIG_JSON"] = config if isinstance(config, str) else json.dumps(config)
    variables.update(env or {})
    place = folder / ("worker%d" % len(list(folder.iterdir())))
    return RunningWorker(place, {name: text for name, text in variables.items() if text}, snapshot=starts, key=key)


def _end(started):
    for running in started:
        running.kill()
        sys.stderr.write("\n".join(["--- log of the Worker"] + running.log()[-50:]) + "\n")


@pytest.fixture(scope="module")
def start_worker(workers_folder):
    """`start_worker(config, *flags, env=None)` starts a Worker for the tests of a module."""
    started = []

    def start(config, *flags, env=None, key=KEY):
        started.append(_start(workers_folder, config, flags, env, key))
        return started[-1]

    yield start
    _end(started)


@pytest.fixture
def router(workers_folder):
    """The local server's fixture, served by a Worker: flags become variables, `env` further ones."""
    started = []

    def start(config, *flags, env=None, key=KEY, timeout=None):
        started.append(_start(workers_folder, config, flags, env, key))
        return started[-1]

    yield start
    _end(started)


# A stream of the client's own format goes on unwatched after its first content (README: On Cloudflare): what happens
# inside it is not seen there, and no sign of life can be put into it. A connection that breaks is seen.
UNSEEN = ("error", "ended", "silent", "half an event")
UNWATCHED = {  # name -> the format of a client that it does not choose, and which of its cases
    "test_a_stream_that_fails_after_its_content_ends_in_an_error_and_a_cut": (
        "",
        lambda params: params["fault"] in UNSEEN,
    ),
    "test_a_silent_stream_gets_comments_before_its_first_event_and_pings_only_after_message_start": (
        "",
        lambda params: True,
    ),
    "test_an_error_after_content_means_what_it_says_for_log_and_health": ("", lambda params: True),
    "test_an_answer_is_whole_whatever_is_wrong_behind_it_in_the_same_packet": ("openai", lambda params: True),
    "test_the_error_event_of_a_broken_responses_stream_bears_the_number_that_is_due": (
        "responses",
        lambda params: params["end"] == "clean",
    ),
}


def pytest_collection_modifyitems(items):
    """Leave out what a test of the local server expects of a watched stream."""
    for item in list(items):
        if "worker" in item.path.parts and getattr(item, "originalname", "") in UNWATCHED:
            client_wire, applies = UNWATCHED[item.originalname]
            params = item.callspec.params
            if params.get("client_wire", client_wire) == params.get("upstream_wire", "openai") and applies(params):
                items.remove(item)
