"""What a Worker needs of the module that no Worker is needed for: a bare host, and configurations in small secrets."""

import base64
import json
import subprocess
import sys
import zlib

import pytest

import llm_router as r

BARE = """
import sys
REFUSED = set("argparse asyncio concurrent ctypes curses fcntl getpass http logging multiprocessing queue resource select selectors"
              " signal socket sqlite3 ssl subprocess tempfile termios threading".split())
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ImportError("this host has no " + name)
for name in [name for name in sys.modules if name.partition(".")[0] in REFUSED]:
    del sys.modules[name]
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, %r)
import llm_router as r

ANSWER = b'{"choices": [{"message": {"role": "assistant", "content": "hi there"}, "finish_reason": "stop"}]}'

class Reply:
    status, headers, left = 200, [("content-type", "application/json")], [ANSWER, b""]
    async def read(self, timeout_s): return self.left.pop(0)
    def close(self): pass

class Host:
    def now(self): return 5.0
    def wall(self): return 1700000000.0
    def jitter(self): return 0.5
    def new_id(self): return "req_1"
    async def send(self, outbound): return Reply()
    def record(self, trail): print("recorded", trail.path)
    def failed(self, error): raise error

class Client:
    is_open = host_stops = False
    async def respond(self, status, headers, body): print(status, body.decode())

async def read_body(): return b'{"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}'

config = r.read_config({"providers": [{"id": "p", "baseUrl": "http://127.0.0.1:1/v1", "models": ["m"]}]}, {})
gateway = r.Gateway(r.Routes(config), r.Settings(), r.make_access(config, False), Host(), r.HealthBook())
call = r.Call("POST", "/v1/messages", "", [("host", "localhost")], read_body)
try:
    gateway.handle(call, Client()).send(None)  # no event loop: every effect answers at once
except StopIteration:
    print("done")
"""


def test_a_host_without_sockets_threads_and_terminals_imports_the_file_and_serves():
    folder = str(r.__file__).rpartition("/")[0] or "."
    done = subprocess.run([sys.executable, "-c", BARE % folder], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    status, *rest = done.stdout.splitlines()
    answer = json.loads(status[4:])
    assert (status[:3], answer["content"]) == ("200", [{"type": "text", "text": "hi there"}])
    assert rest == ["recorded p/m=ok", "done"]


def test_an_error_of_the_routers_own_is_told_with_its_place_in_a_worker_too(capsys):
    """There is no `--debug` there."""
    config = r.read_config({"providers": [{"id": "p", "baseUrl": "http://127.0.0.1:1", "models": ["m"]}]}, {})
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        r.WorkerHost(r.Routes(config), r.Settings(), r.HealthBook()).failed(error)
    told = capsys.readouterr().out
    assert told.startswith("internal error: ValueError: two") and " at line " in told
    assert told.count("\n") == 1


# ----- configurations in variables -----


def test_a_packed_configuration_comes_back_as_it_was_and_is_small():
    text = json.dumps({"providers": [{"id": "p%d" % n, "models": ["model-%d" % m for m in range(12)]} for n in range(10)]})
    packed = r.pack_config(text)
    assert r.unpack_config(packed) == text
    assert len(packed) < len(text) / 3
    assert packed.isascii() and "\n" not in packed


@pytest.mark.parametrize("text", ["", "{}", '  {"a": 1}', "\ufeff{}", "[1]", "not packed", "eJyr", "AAAA", "ÄÖ"])
def test_what_is_not_packed_stays_as_it_is(text):
    assert r.unpack_config(text) == text


def test_a_packed_configuration_that_lost_a_part_is_said_to_be_one():
    packed = r.pack_config(json.dumps({"providers": [{"id": "p%d" % number} for number in range(100)]}))
    assert r.unpack_config(packed[:-9]) == packed[:-9]
    with pytest.raises(r.ConfigError, match=r"NAME:1:1: .*packed configuration, but cut off"):
        r.parse_config_text(packed[:-9], "NAME")


def test_a_packed_bomb_is_refused_without_being_inflated():
    bomb = base64.b64encode(zlib.compress(b" " * 100_000_000, 9)).decode()
    with pytest.raises(r.ConfigError, match="larger than"):
        r.unpack_config(bomb)


def test_a_configuration_may_go_on_in_numbered_variables():
    names = r.CONFIG_VARIABLES
    assert r.find_config_variable({}) == ("", "")
    assert r.find_config_variable({names[1]: "b", names[2]: "c"}) == (names[1], "b")
    parts = {names[0]: "one ", names[0] + "_2": "two", names[0] + "_3": "three", names[0] + "_5": "lost", names[1]: "x"}
    assert r.find_config_variable(parts) == (names[0], "onetwothree")


def test_variables_after_the_end_of_a_configuration_are_left_from_a_larger_one():
    name, text = r.CONFIG_VARIABLES[0], json.dumps({"providers": ["p%d" % number for number in range(200)]}).replace(" ", "")
    for whole in (text, r.pack_config(text)):
        for cut in (len(whole), len(whole) // 2):
            values = {name: whole[:cut], name + "_2": whole[cut:] or "left", name + "_3": "left", name + "_4": "{}"}
            assert r.find_config_variable(values) == (name, whole)


def test_a_packed_configuration_in_a_variable_is_read_locally_as_well():
    document = {"providers": [{"id": "p", "baseUrl": "http://127.0.0.1:1", "models": ["m"]}]}
    loaded = r.load_config("", {"LLM_ROUTER_CONFIG_JSON": r.pack_config(json.dumps(document))})
    assert (loaded.document, loaded.source) == (document, "the variable LLM_ROUTER_CONFIG_JSON")
