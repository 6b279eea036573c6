"""README is true: its tables come from the program and the tests, its examples run. `python tests/test_readme.py` rewrites the tables."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (str(ROOT), str(ROOT / "tests")):
    if folder not in sys.path:
        sys.path.insert(0, folder)

from test_scenarios import scenario_table  # noqa: E402

import llm_router  # noqa: E402

README = ROOT / "README.md"


def settings_table():
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for row in llm_router.SETTINGS:
        rows.append("| `%s` | %s | %s |" % (row.variable, llm_router.show_setting(row.default), row.help))
    return rows


def losses_table():
    rows = ["| format | what | becomes |", "|---|---|---|"]
    for name, wire in llm_router.WIRE_FORMATS.items():
        rows += ["| `%s` | %s | %s |" % (name, what, fate.replace("|", "\\|")) for what, fate in wire.losses.items()]
    return rows


FIELD_PLACES = {"config": "", "client_key": "`clientKeys[]`", "timeouts": "`timeouts`", "auth": "`auth`"}


def fields_table():
    rows = ["| in | key | meaning |", "|---|---|---|"]
    for kind, fields in llm_router.FIELDS.items():
        where = FIELD_PLACES.get(kind, "`%ss[]`" % kind)
        for field in fields:
            also = ", ".join("`%s`" % name for name in field.aliases)
            rows.append("| %s | `%s`%s | %s |" % (where, field.key, also and " (also %s)" % also, field.help))
    return rows


BLOCKS = {"fields": fields_table, "settings": settings_table, "losses": losses_table, "scenarios": scenario_table}


def block(name, text):
    return re.search("(<!-- %s -->\n)(.*?)(<!-- /%s -->)" % (name, name), text, re.DOTALL)


def rewritten(text):
    for name, make in BLOCKS.items():
        found = block(name, text)
        text = text[: found.start(2)] + "\n" + "\n".join(make()) + "\n\n" + text[found.start(3) :]
    return text


def test_the_tables_are_those_of_the_program():
    text = README.read_text(encoding="utf-8")
    assert rewritten(text) == text, "run python tests/test_readme.py"


def test_every_variable_command_operation_and_flag_in_the_readme_exists():
    text = README.read_text(encoding="utf-8")
    variables = {row.variable for row in llm_router.SETTINGS} | {
        "LLM_ROUTER_CONFIG_JSON",
        "LLM_ROUTER_JSON",
        "LLM_ROUTER_MASTER_KEY",
        "LLM_ROUTER_UPDATE_URL",
    }
    assert set(re.findall(r"\bLLM_ROUTER_[A-Z_]+\b", text)) <= variables
    commands = {row.name for row in llm_router.COMMANDS}
    assert set(re.findall(r"llm_router\.py ([a-z-]+)", text)) <= commands
    table = re.search(r"\| command \| does \|\n.*?\n\n", text, re.DOTALL).group(0)
    assert set(re.findall(r"^\| `([a-z-]+)`", table, re.MULTILINE)) == commands - {""}
    operations = re.search(r"`config --operation=`:(.*?)\.", text, re.DOTALL).group(1)
    assert set(re.findall(r"`([a-z-]+)`", operations)) == {row.name for row in llm_router.OPERATIONS}
    every = [flag for command in llm_router.COMMANDS for flag in command.flags]
    flags = {name for flag in every for name in (flag.name, *flag.aliases)} | {"version", "help"}
    assert set(re.findall(r"(?<!-)--([a-z][a-z-]+)", text)) <= flags


def test_the_example_configuration_has_no_problem():
    text = README.read_text(encoding="utf-8")
    example = re.search(r"```json\n(.*?)```", text, re.DOTALL).group(1)
    document = llm_router.parse_config_text(example, "README.md")
    assert [problem for problem in llm_router.find_problems(document) if problem.level == "error"] == []
    config = llm_router.read_config(document, {})
    assert llm_router.Routes(config).find_plan("claude-anything").candidates[0].ref == "anthropic/claude-3-7-sonnet"


def test_the_quick_start_runs_word_for_word(tmp_path):
    text = README.read_text(encoding="utf-8")
    lines = re.search(r"## Quick start\n\n```sh\n(.*?)```", text, re.DOTALL).group(1).splitlines()
    (tmp_path / "llm_router.py").write_bytes((ROOT / "llm_router.py").read_bytes())
    env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    for line in lines[:2]:
        words = [sys.executable] + shlex.split(line)[1:]
        done = subprocess.run(words, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    stored = llm_router.parse_config_text((tmp_path / ".llm-router.json").read_text(), "file")
    assert [model["id"] for model in stored["providers"][0]["models"]] == ["gpt-4o", "claude-3-7-sonnet-latest"]
    assert (tmp_path / ".llm-router.json").stat().st_mode & 0o777 == 0o600
    assert stored["defaultModel"] == "openrouter/gpt-4o"


def test_the_tests_of_the_readme_are_what_ci_runs():
    text = README.read_text(encoding="utf-8")
    assert re.search(r"^python3 -m venv \.venv && .* -m pytest", text, re.MULTILINE)


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text(encoding="utf-8")), encoding="utf-8")
