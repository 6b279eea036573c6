"""Formats, headers, keys, models and token counts: tests/test_end_to_end.py against the Worker."""

import pytest

import test_end_to_end
from same_tests import take_tests, worker_pair
from test_end_to_end import KEY, TEXT

LEFT_OUT = (
    "test_an_error_the_upstream_puts_in_a_stream_shows_no_provider_key",  # such a stream is not watched to its end
)


@pytest.fixture(scope="module")
def shared(start_worker):
    """One Worker for the tests that leave nothing behind."""
    with worker_pair(start_worker, TEXT, masterKey=KEY) as pair:
        yield pair


@pytest.fixture(scope="module")
def shared_lively(start_worker):
    """A Worker that speaks after 10 ms of silence: on a busy machine several of its timers go off at once."""
    with worker_pair(start_worker, TEXT, "--keepalive-ms=10") as pair:
        yield pair


take_tests(test_end_to_end, LEFT_OUT, globals())
