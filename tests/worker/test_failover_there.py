"""Retries, fallback, cooldowns and broken streams: tests/test_failover.py against the Worker."""

import pytest

import test_failover
from same_tests import take_tests, worker_pair
from test_failover import IDLE, TEXT, TIMEOUTS

# What a Worker cannot do or need not show; the rest of the file applies as it stands.
LEFT_OUT = (
    "test_an_upstream_with_an_untrusted_certificate_gets_no_key_and_the_fallback_answers",  # TLS is the runtime's
    "test_an_upstream_with_a_trusted_certificate_answers_over_tls",
    "test_a_refused_connection_and_an_unknown_name_lead_to_the_fallback",  # fetch does not tell one from the other
    "test_an_address_that_never_answers_costs_one_connect_timeout",  # there is but one time limit, for the first byte
    "test_an_origin_that_recovers_between_two_attempts_answers",
    "test_a_stream_cut_at_any_byte_is_either_the_whole_answer_or_a_clear_error",  # thousands of requests
)


@pytest.fixture(scope="module")
def shared(start_worker):
    """One Worker that remembers no failure."""
    with worker_pair(start_worker, TEXT) as pair:
        yield pair


@pytest.fixture(scope="module")
def shared_impatient(start_worker):
    """The same with timeouts short enough to wait for."""
    with worker_pair(start_worker, TEXT, timeouts=TIMEOUTS) as pair:
        yield pair


@pytest.fixture(scope="module")
def shared_drowsy(start_worker):
    """The same with all the time for a beginning and little for each further part."""
    with worker_pair(start_worker, TEXT, timeouts=IDLE) as pair:
        yield pair


take_tests(test_failover, LEFT_OUT, globals())
