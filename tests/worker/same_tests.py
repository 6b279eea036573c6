"""The local server's tests, run against a Worker: the same functions, other hosts behind the fixtures."""

import contextlib

import fake_upstream as fake
from exchanges import QUICK, Pair, pair_config


def take_tests(module, left_out, into):
    """Put the tests and fixtures of `module` into the namespace `into`, but for those named in `left_out`."""
    unknown = [name for name in left_out if not hasattr(module, name)]
    assert not unknown, "%s has no %s" % (module.__name__, ", ".join(unknown))
    for name, value in list(vars(module).items()):
        is_fixture = type(value).__name__ == "FixtureFunctionDefinition" or hasattr(value, "_pytestfixturefunction")
        if (name.startswith("test_") or is_fixture) and name not in left_out:
            into.setdefault(name, value)


def as_variables(flags):
    """Flags of `start` as the variables of a Worker."""
    pairs = [flag.lstrip("-").partition("=") for flag in flags]
    return {"LLM_ROUTER_" + name.upper().replace("-", "_"): value or "true" for name, _, value in pairs}


@contextlib.contextmanager
def worker_pair(start_worker, text, *flags, **fields):
    """A Worker before two upstreams that say `text`, as a Pair."""
    with fake.FakeUpstream(fake.final_text(text)) as first, fake.FakeUpstream(fake.final_text(text)) as second:
        first.plain_handler = second.plain_handler = first.handler
        yield Pair(start_worker(pair_config(first, second, **fields), *QUICK, *flags), first, second)
