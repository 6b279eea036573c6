"""What every test shares: the import path, a clean environment, a fake upstream and the real router."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
for folder in (str(ROOT), str(ROOT / "tests")):
    if folder not in sys.path:
        sys.path.insert(0, folder)

from fake_upstream import FakeUpstream  # noqa: E402
from running_router import RunningRouter  # noqa: E402

LEAKS = ("LLM_ROUTER_", "ROUTE_CONFIG_JSON", "OPENAI_", "ANTHROPIC_", "CLOUDFLARE_")
KEPT = ("LLM_ROUTER_TEST_",)


def _leaks(name):
    if name.startswith(KEPT):
        return False
    return name.startswith(LEAKS) or name.upper().endswith(("_API_KEY", "_PROXY"))


@pytest.fixture(autouse=True, scope="session")
def no_foreign_environment(tmp_path_factory):
    """No key, proxy or setting of the developer reaches a test, and the home directory is a temporary one."""
    home = str(tmp_path_factory.mktemp("home"))
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if _leaks(name)]:
            patch.delenv(name)
        patch.setenv("HOME", home)
        patch.setenv("USERPROFILE", home)
        yield


@pytest.fixture
def upstream():
    """A FakeUpstream that is stopped at the end."""
    with FakeUpstream() as fake:
        yield fake


@pytest.fixture
def make_upstream():
    """`make_upstream(handler=None, tls=False)` starts further FakeUpstreams, all stopped at the end."""
    started = []

    def make(*args, **kwargs):
        started.append(FakeUpstream(*args, **kwargs).start())
        return started[-1]

    yield make
    for fake in started:
        fake.stop()


@pytest.fixture
def router(tmp_path, request):
    """`router(config, *flags, env=None)` starts the real program and returns a RunningRouter; ended with the test.

    config: a dict, JSON text, or None for no --config. Its log is shown when the test fails. Test modules with a true
    SCRIPT start the file itself, others what the console script does.
    """
    started, script = [], getattr(request.module, "SCRIPT", False)

    def start(config, *flags, env=None, timeout=60.0):
        home = tmp_path / ("router%d" % (len(started) + 1))
        started.append(RunningRouter(config, flags, home, env, timeout, script=script))
        return started[-1]

    yield start
    for running in started:
        running.kill()
        sys.stderr.write("\n".join(["--- log of %s" % running.url] + running.log()[-200:]) + "\n")
