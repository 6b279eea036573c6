"""`deploy` and `worker-key` from a lone file, by API and by the real wrangler; what Cloudflare would get is then run."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

import fake_upstream as fake
from exchanges import assert_answer, post
from fake_cloudflare import TOKEN, FakeCloudflare
from running_router import PROGRAM, ROOT, clean_environment, config_of, provider
from running_worker import HERE, RunningWorker, missing, project_files

TEXT = "said by the upstream"
OLD = "lr-9fGh2kLmNpQrStUvWxYz13579bdfh"
WRANGLER = HERE / "node_modules" / ".bin" / "wrangler"
MEANS = ("false", "true")  # --use-wrangler=


class Owner:
    """Someone with a lone llm_router.py, a configuration, and an account at the fake Cloudflare."""

    def __init__(self, folder, cloudflare, document):
        self.folder, self.cloudflare = folder, cloudflare
        shutil.copyfile(PROGRAM, folder / "llm_router.py")
        (folder / "config.json").write_text(json.dumps(document), encoding="utf-8")
        (folder / "config.json").chmod(0o600)

    def environment(self, **env):
        given = {"CLOUDFLARE_API_BASE_URL": self.cloudflare.url, "CLOUDFLARE_API_TOKEN": TOKEN, "P_KEY": "from-the-machine"}
        given.update(CLOUDFLARE_CF_FETCH_ENABLED="false", XDG_CONFIG_HOME=str(self.folder / "xdg"))
        given.update(PATH=str(WRANGLER.parent) + os.pathsep + os.environ["PATH"], **env)
        return clean_environment(self.folder, **given)

    def run(self, *words, code=0, **env):
        line, env = [sys.executable, "llm_router.py", *words], self.environment(**env)
        done = subprocess.run(line, env=env, cwd=str(self.folder), stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done


@pytest.fixture
def own(tmp_path, upstream):
    if not shutil.which("node") or not WRANGLER.exists():
        missing("wrangler is not installed: run `npm ci --ignore-scripts` in tests/worker")
    upstream.handler = fake.final_text(TEXT)
    rows = ["m%d" % number for number in range(600)]  # too many for a plain secret
    config = config_of(provider(upstream, apiKeyEnv="P_KEY", models=rows), masterKey=OLD)
    with FakeCloudflare() as cloudflare:
        yield Owner(tmp_path, cloudflare, config)


@pytest.fixture
def run_uploaded(workers_folder):
    """`run_uploaded(script)` runs in workerd what was uploaded last, as Cloudflare would: files that are those of the
    repository from their snapshot."""
    running = []
    saved = workers_folder / "snapshots"

    own_files = {name: path.read_bytes() for name, path in project_files().items()}

    def start(script):
        variables = dict(script.variables, **script.secrets)
        settings = script.metadata["compatibility_date"], script.metadata["compatibility_flags"]
        folder = workers_folder / ("uploaded%d" % len(list(workers_folder.iterdir())))
        flags = ["--python-snapshot-dir=%s" % saved, "--python-load-snapshot=%s" % next(saved.iterdir()).name]
        running.append(RunningWorker(folder, variables, script.files, flags if script.files == own_files else None, None, settings))
        return running[-1]

    yield start
    for worker in running:
        worker.kill()


@pytest.mark.parametrize("use_wrangler", MEANS)
def test_what_was_deployed_serves_and_after_worker_key_only_the_new_key_opens(own, upstream, run_uploaded, use_wrangler):
    done = json.loads(own.run("deploy", "--config=config.json", "--use-wrangler=" + use_wrangler, "--json").stdout)
    assert done["url"] == "https://llm-router-route.me.workers.dev"
    script = own.cloudflare.scripts["llm-router-route"]
    assert script.enabled
    assert len(script.secrets["LLM_ROUTER_CONFIG_JSON"]) <= 5000
    worker = run_uploaded(script)
    for wire in ("openai", "anthropic"):
        reply = post(worker, wire, "fake/m599", True, headers={"x-api-key": OLD})
        assert_answer(wire, reply, TEXT)
    assert post(worker, "openai").status == 401
    assert upstream.calls[0].header("authorization") == "Bearer from-the-machine"

    made = own.run("worker-key", "--generate", "--use-wrangler=" + use_wrangler, "--json").stdout
    own.run("deploy", "--config=config.json", "--use-wrangler=" + use_wrangler)
    assert script.secrets["LLM_ROUTER_MASTER_KEY"] == json.loads(made)["masterKey"]
    assert script.files["llm_router.py"] == PROGRAM.read_bytes()
    worker = run_uploaded(script)
    assert post(worker, "openai", headers={"x-api-key": OLD}).status == 401
    assert_answer("openai", post(worker, "openai", headers={"x-api-key": json.loads(made)["masterKey"]}), TEXT)


def test_the_real_wrangler_and_a_bad_token(own):
    said = own.run("deploy", "--config=config.json", code=1, CLOUDFLARE_API_TOKEN="another-token").stderr
    assert "wrangler deploy failed" in said and "Authentication error" in said
    assert own.cloudflare.scripts == {}


def test_option_b_of_the_readme_runs_word_for_word(own, upstream, run_uploaded):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.search(r"Option B, .*?```sh\n(.*?)```", readme, re.DOTALL).group(1)
    (own.folder / "config.json").rename(own.folder / ".llm-router.json")
    (own.folder / "node_modules").symlink_to(HERE / "node_modules")  # where npx finds wrangler
    (own.folder / "bin").mkdir()
    (own.folder / "bin" / "python3").symlink_to(sys.executable)
    env = own.environment()
    env["PATH"] = str(own.folder / "bin") + os.pathsep + env["PATH"]
    done = subprocess.run(["sh", "-e", "-c", lines], env=env, cwd=str(own.folder), stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    script = own.cloudflare.scripts["llm-router-route"]
    assert set(script.secrets) == {"LLM_ROUTER_CONFIG_JSON"}
    script.secrets["P_KEY"] = "from-the-machine"
    worker = run_uploaded(script)
    assert_answer("openai", post(worker, "openai", headers={"x-api-key": OLD}), TEXT)


def test_wrangler_packs_the_exported_project_byte_for_byte(own):
    own.run("deploy", "--export-dir=project")
    line = [str(WRANGLER), "deploy", "--dry-run", "--outdir", "packed"]
    env = clean_environment(own.folder, CI="1", WRANGLER_SEND_METRICS="false", XDG_CONFIG_HOME=str(own.folder / "xdg"))
    done = subprocess.run(line, env=env, cwd=str(own.folder / "project"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, source in (("entry.py", ROOT / "worker_export" / "entry.py"), ("llm_router.py", PROGRAM)):
        assert (own.folder / "project" / "packed" / name).read_bytes() == source.read_bytes()
