"""FILES: configuration on disk: atomic, private, locked."""

import errno
import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

import llm_router as r
from exchanges import until

posix = pytest.mark.skipif(os.name != "posix", reason="permission bits, links and limits of POSIX")

OLD = {"version": 1, "masterKey": "old", "kept": "ü"}
OLD_TEXT = json.dumps(OLD, ensure_ascii=False).encode()


@pytest.fixture
def path(tmp_path):
    """A configuration file with OLD in it."""
    file = tmp_path / "router.json"
    file.write_bytes(OLD_TEXT)
    file.chmod(0o600)
    return file


@posix
def test_a_pipe_or_device_is_read_to_its_end_and_not_waited_for_without_one(tmp_path, monkeypatch):
    """`--config=<(sops -d FILE)` is a pipe whose writer is slow."""
    reader, writer = os.pipe()
    late = threading.Timer(0.2, lambda: (os.write(writer, OLD_TEXT), os.close(writer)))
    late.start()
    assert r.read_bytes("/dev/fd/%d" % reader)[0] == OLD_TEXT
    os.close(reader)
    monkeypatch.setattr(r, "_PIPE_SILENCE_S", 0.1)
    os.mkfifo(tmp_path / "nobody-writes")
    for path in (tmp_path / "nobody-writes", "/dev/zero"):
        with pytest.raises(r.ConfigError, match="it is no file, and its end does not come"):
            r.read_bytes(str(path))


def test_a_temporary_folder_that_cannot_be_made_is_an_error_with_its_cure(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(r.RouterError, match=r"cannot make a temporary folder: No such file.*TMPDIR"):
        r.temporary_folder()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with r.temporary_folder() as folder:
        assert os.path.dirname(folder) == str(tmp_path) and (os.name != "posix" or os.stat(folder).st_mode & 0o77 == 0)
    assert list(tmp_path.iterdir()) == []


def set_key(key="new"):
    return lambda document: r.set_master_key(document, key)


@posix
def test_a_file_whose_time_was_set_back_has_another_stamp(path):
    before, stamp = os.stat(path), r.file_stamp(str(path))

    def stamp_after_an_edit():
        path.write_bytes(OLD_TEXT.replace(b"old", b"new"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return r.file_stamp(str(path))

    until(lambda: stamp_after_an_edit() != stamp)  # a file system's clock may tick only every few milliseconds


def mode_of(file):
    return stat.S_IMODE(os.stat(file).st_mode)


def names_in(folder):
    return sorted(p.name for p in folder.iterdir())


# ----- sources -----


def test_the_usual_file_is_in_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert r.config_path() == str(tmp_path / ".llm-router.json")
    assert r.config_path("~/x.json") == str(tmp_path / "x.json")
    assert r.load_config("", {}) == r.Loaded(None, r.config_path(), r.config_path())


def test_sources_are_asked_in_order_and_the_first_wins(path, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / ".llm-router.json").write_text('{"from": "file"}')
    (tmp_path / ".llm-router.json").chmod(0o600)
    environ = {name: json.dumps({"from": name}) for name in r.CONFIG_VARIABLES}
    assert r.CONFIG_VARIABLES == ("LLM_ROUTER_CONFIG_JSON", "ROUTE_CONFIG_JSON", "LLM_ROUTER_JSON")
    assert r.load_config(str(path), environ).document == OLD
    for name in r.CONFIG_VARIABLES:
        loaded = r.load_config("", environ)
        assert loaded.document == {"from": name}
        assert name in loaded.source
        assert loaded.path == ""
        environ[name] = "  "
    assert r.load_config("", environ).document == {"from": "file"}


def test_broken_json_in_a_variable_names_the_variable():
    with pytest.raises(r.ConfigError, match="LLM_ROUTER_CONFIG_JSON:1:2"):
        r.load_config("", {"LLM_ROUTER_CONFIG_JSON": "{x"})


def test_a_file_that_cannot_be_read_is_a_config_error_that_names_it(tmp_path):
    with pytest.raises(r.ConfigError, match=str(tmp_path.name)):
        r.load_config(str(tmp_path), {})


@posix
@pytest.mark.parametrize("mode", [0o644, 0o660, 0o604])
def test_reading_a_file_that_others_can_read_warns_and_leaves_it(path, mode):
    path.chmod(mode)
    loaded = r.load_config(str(path), {})
    assert "%04o" % mode in loaded.warnings[0]
    assert mode_of(path) == mode


# ----- edits -----


def test_an_edit_is_saved_and_the_previous_content_kept(path):
    edit = r.edit_config_file(str(path), set_key())
    assert json.loads(path.read_bytes()) == dict(OLD, masterKey="new") == edit.document
    assert "ü" in path.read_text(encoding="utf-8")
    backup = path.with_name("router.json.bak")
    assert backup.read_bytes() == OLD_TEXT
    assert names_in(path.parent) == ["router.json", "router.json.bak"]


@posix
def test_file_and_backup_are_private_whatever_the_umask(tmp_path):
    old = os.umask(0)
    try:
        path = tmp_path / "deep" / "er" / "router.json"
        r.edit_config_file(str(path), set_key())
        r.edit_config_file(str(path), set_key("newer"))
    finally:
        os.umask(old)
    assert mode_of(path) == mode_of(str(path) + ".bak") == 0o600
    assert mode_of(path.parent) == 0o700


def test_the_first_edit_makes_the_file_and_no_backup(tmp_path):
    path = tmp_path / "router.json"
    r.edit_config_file(str(path), set_key())
    assert json.loads(path.read_text()) == {"version": 1, "providers": [], "masterKey": "new"}
    assert names_in(tmp_path) == ["router.json"]


@posix
def test_a_looser_mode_is_repaired_and_reported_even_when_nothing_else_changes(path):
    path.write_bytes(r.render_document(OLD))
    path.chmod(0o644)
    edit = r.edit_config_file(str(path), set_key("old"))
    assert mode_of(path) == 0o600
    assert any("0644" in note for note in edit.notes)


def test_an_edit_that_changes_nothing_writes_nothing(path):
    path.write_bytes(r.render_document(OLD))
    before = os.stat(path)
    r.edit_config_file(str(path), set_key("old"))
    after = os.stat(path)
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
    assert names_in(path.parent) == ["router.json"]


@posix
def test_a_symbolic_link_stays_one_and_what_it_leads_to_is_changed(path, tmp_path):
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / "second").symlink_to(path)
    (folder / "first").symlink_to("second")
    r.edit_config_file(str(folder / "first"), set_key())
    assert (folder / "first").is_symlink()
    assert (folder / "second").is_symlink()
    assert json.loads(path.read_bytes())["masterKey"] == "new"
    assert names_in(folder) == ["first", "second"]
    assert names_in(path.parent) == ["links", "router.json", "router.json.bak"]


@posix
def test_a_link_to_nothing_makes_what_it_leads_to(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real.json")
    r.edit_config_file(str(tmp_path / "link"), set_key())
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text())["masterKey"] == "new"


@posix
@pytest.mark.parametrize("make", ["folder", "loop", "fifo", "device"])
def test_what_is_no_regular_file_is_refused(make, tmp_path):
    path = tmp_path / "x"
    if make == "folder":
        path.mkdir()
    elif make == "loop":
        path.symlink_to("y")
        (tmp_path / "y").symlink_to("x")
    elif make == "fifo":
        os.mkfifo(path)
    else:
        path = Path("/dev/null")
    with pytest.raises(r.RouterError) as caught:
        r.edit_config_file(str(path), set_key())
    assert path.name in caught.value.message


PROVIDER = {"id": "p", "baseUrl": "https://example.com/v1", "models": ["m"]}


@posix
@pytest.mark.parametrize("words", ["config --operation=export --out=%s", "deploy --export-only --out=%s"])
def test_what_is_no_file_is_not_replaced_by_one_and_a_link_stays_a_link(tmp_path, monkeypatch, words):
    """Root that exports to /dev/null must not take it from everybody else."""
    monkeypatch.setenv("LLM_ROUTER_CONFIG_JSON", json.dumps({"providers": [PROVIDER], "masterKey": r.make_key()}))
    os.mkfifo(tmp_path / "pipe")
    assert r.main((words % (tmp_path / "pipe")).split()) == 1
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode) and names_in(tmp_path) == ["pipe"]
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for _ in range(2):
        assert r.main((words % (tmp_path / "link")).split()) == 0
        assert (tmp_path / "link").is_symlink() and mode_of(tmp_path / "file") == 0o600


BROKEN = b'{\n  "masterKey": "old",\n  "x": oops\n}'


def test_broken_json_is_reported_with_its_place_and_never_overwritten(path):
    """trap 178"""
    path.write_bytes(BROKEN)
    with pytest.raises(r.ConfigError) as caught:
        r.edit_config_file(str(path), set_key())
    lines = caught.value.message.split("\n")
    assert lines[0].startswith("%s:3:8:" % path)
    assert lines[2].index("^") == lines[1].index("oops")
    assert path.read_bytes() == BROKEN
    assert names_in(path.parent) == ["router.json"]


def test_a_text_with_comments_is_edited_and_kept_beside(path):
    """trap 181: nobody loses comments without a word, nor by a second edit"""
    text = '\ufeff{"masterKey": "old", // rotate in May\n "kept": "ü",}'.encode()
    path.write_bytes(text)
    edit = r.edit_config_file(str(path), set_key())
    assert json.loads(path.read_text()) == {"masterKey": "new", "kept": "ü"}
    commented = path.with_name("router.json.commented.bak")
    assert commented.read_bytes() == text and mode_of(commented) == 0o600
    assert any(str(commented) in note for note in edit.notes)
    assert r.edit_config_file(str(path), set_key("newer")).notes == ("master key set",)
    assert commented.read_bytes() == text


def test_a_file_with_comments_that_cannot_be_kept_is_left_alone(path):
    path.write_text('{"masterKey": "old"} // mine')
    path.with_name("router.json.commented.bak").mkdir()
    with pytest.raises(r.RouterError, match="commented"):
        r.edit_config_file(str(path), set_key())
    assert path.read_text() == '{"masterKey": "old"} // mine'
    assert names_in(path.parent) == ["router.json", "router.json.commented.bak"]


def test_an_edit_of_a_text_with_comments_that_changes_nothing_else_leaves_it(path):
    text = b'{"masterKey": "new"} // mine'
    path.write_bytes(text)
    with pytest.raises(r.UsageError):
        r.edit_config_file(str(path), lambda document: r.remove_provider(document, "nobody"))
    assert path.read_bytes() == text and names_in(path.parent) == ["router.json"]


def test_a_refused_edit_leaves_the_file_untouched(path):
    with pytest.raises(r.UsageError):
        r.edit_config_file(str(path), set_key(""))
    assert path.read_bytes() == OLD_TEXT
    assert names_in(path.parent) == ["router.json"]


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_when_the_disk_fails_the_file_is_whole_and_nothing_is_left_behind(path, monkeypatch, call, number, nth):
    """Full disk, read-only directory, broken disk: at each of the steps of a write."""
    real, calls = getattr(os, call), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == nth:
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, failing)
    try:
        r.edit_config_file(str(path), set_key())
    except r.RouterError as error:
        assert os.strerror(number) in error.message
        assert "\n" not in error.message
        assert path.read_bytes() == OLD_TEXT
    else:
        assert len(calls) < nth or (call, nth) == ("fsync", 3)
        assert json.loads(path.read_bytes())["masterKey"] == "new"
    monkeypatch.undo()
    assert set(names_in(path.parent)) <= {"router.json", "router.json.bak"}


def test_an_interrupt_in_mid_write_leaves_the_file_whole(path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        r.edit_config_file(str(path), set_key())
    assert path.read_bytes() == OLD_TEXT
    assert names_in(path.parent) == ["router.json"]


def test_a_short_write_is_continued(path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data[:3])))
    r.edit_config_file(str(path), set_key())
    assert json.loads(path.read_bytes()) == dict(OLD, masterKey="new")


LIMITED = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import llm_router as r
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
try:
    r.edit_config_file(sys.argv[2], lambda document: r.set_master_key(document, "new"))
except r.RouterError as error:
    print(error.message)
"""


@posix
def test_a_real_limit_of_the_file_size_is_one_clear_line(path):
    root = str(Path(r.__file__).parent)
    done = subprocess.run([sys.executable, "-c", LIMITED, root, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert os.strerror(errno.EFBIG) in done.stdout
    assert path.read_bytes() == OLD_TEXT
    assert names_in(path.parent) == ["router.json"]


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_is_one_clear_line(path):
    path.parent.chmod(0o500)
    try:
        with pytest.raises(r.RouterError, match="unchanged"):
            r.edit_config_file(str(path), set_key())
    finally:
        path.parent.chmod(0o700)
    assert path.read_bytes() == OLD_TEXT


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() != 0, reason="only root can give files away")
def test_roots_edit_of_a_users_file_leaves_file_and_backup_to_the_user(path):
    try:
        os.chown(path, 65534, 65534)
    except OSError:
        pytest.skip("no such user in this namespace")
    r.edit_config_file(str(path), set_key())
    backup = path.with_name(path.name + ".bak")
    assert [(os.stat(file).st_uid, os.stat(file).st_gid) for file in (path, backup)] == [(65534, 65534)] * 2


# ----- several writers -----


def add_alias(name):
    return lambda document: r.Edit(dict(document, **{name: True}))


def test_of_many_writers_at_once_none_loses_anothers_edit(path):
    failures = []

    def write(number):
        try:
            for i in range(5):
                r.edit_config_file(str(path), add_alias("_%d_%d" % (number, i)))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    document = json.loads(path.read_bytes())
    assert {"_%d_%d" % (n, i) for n in range(8) for i in range(5)} <= set(document)
    assert set(names_in(path.parent)) <= {"router.json", "router.json.bak", "router.json.lock"}


WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
import llm_router as r
for i in range(10):
    r.edit_config_file(sys.argv[2], lambda document: r.Edit(dict(document, **{"_%s_%d" % (sys.argv[3], i): True})))
"""


def test_of_several_processes_none_loses_anothers_edit(path):
    root = str(Path(r.__file__).parent)
    children = [subprocess.Popen([sys.executable, "-c", WRITER, root, str(path), str(n)]) for n in range(4)]
    assert [child.wait(timeout=120) for child in children] == [0] * 4
    assert {"_%d_%d" % (n, i) for n in range(4) for i in range(10)} <= set(json.loads(path.read_bytes()))


def test_a_writer_that_knows_no_lock_does_not_lose_its_edit(path):
    """An editor saves between our reading and our writing: the change is applied to what it wrote."""
    seen = []

    def change(document):
        seen.append(dict(document))
        if len(seen) == 1:
            path.write_text('{"theirs": 1}')
        return r.set_master_key(document, "new")

    r.edit_config_file(str(path), change)
    assert seen == [OLD, {"theirs": 1}]
    assert json.loads(path.read_bytes()) == {"theirs": 1, "masterKey": "new"}
    assert path.with_name("router.json.bak").read_text() == '{"theirs": 1}'


def test_a_file_that_a_container_has_mounted_by_itself_is_said_to_be_that(path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(r.RouterError, match="mount its folder"):
        r.edit_config_file(str(path), set_key())
    assert path.read_bytes() == OLD_TEXT and names_in(path.parent) == ["router.json"]


def test_an_editor_that_writes_while_the_old_text_is_put_aside_is_noticed(path, monkeypatch):
    replace, left = os.replace, ['{"theirs": 1}']

    def replace_late(source, target):
        if target.endswith(".bak") and left:
            path.write_text(left.pop())
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_late)
    r.edit_config_file(str(path), set_key())
    assert json.loads(path.read_bytes()) == {"theirs": 1, "masterKey": "new"}
    assert names_in(path.parent) == ["router.json", "router.json.bak"]


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path):
    path = tmp_path / "router.json"
    calls = []

    def change(document):
        calls.append(document)
        if len(calls) == 1:
            path.write_text('{"theirs": 1}')
        return r.set_master_key(document, "new")

    r.edit_config_file(str(path), change)
    assert json.loads(path.read_bytes()) == {"theirs": 1, "masterKey": "new"}


def test_a_file_that_never_stops_changing_is_given_up_on_with_a_clear_message(path):
    calls = []

    def change(document):
        calls.append(document)
        path.write_text('{"n": %d}' % len(calls))
        return r.set_master_key(document, "new")

    with pytest.raises(r.RouterError, match="another program"):
        r.edit_config_file(str(path), change)
    assert json.loads(path.read_bytes()) == {"n": len(calls)}


@posix
def test_a_lock_that_is_never_released_is_given_up_on_with_a_clear_message(path, monkeypatch):
    import time

    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + 1.0))
    with r.file_lock(str(path)):
        with pytest.raises(r.RouterError, match="another program"):
            r.edit_config_file(str(path), set_key())
    assert path.read_bytes() == OLD_TEXT


def test_what_a_writer_that_was_killed_has_left_does_not_matter_and_goes(path):
    """Keys may stand in it."""
    path.with_name("router.json.lock").write_text("")
    path.with_name("router.json.0123456789ab.tmp").write_bytes(OLD_TEXT[:9])
    path.with_name("router.json.my.tmp").write_text("mine")
    r.edit_config_file(str(path), set_key())
    assert json.loads(path.read_bytes())["masterKey"] == "new"
    assert names_in(path.parent) == ["router.json", "router.json.bak", "router.json.my.tmp"]


def test_without_any_file_locks_edits_still_work(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", None)
    r.edit_config_file(str(path), set_key())
    assert json.loads(path.read_bytes())["masterKey"] == "new"


def test_a_file_system_without_locks_does_not_stop_an_edit(path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    r.edit_config_file(str(path), set_key())
    assert json.loads(path.read_bytes())["masterKey"] == "new"


# ----- what is stored -----


def test_a_document_is_stored_as_readable_text_that_reads_back_the_same():
    document = {"a": ["ü", "\u2028", 1.5, 2**60, None], "b": {"c": {}}}
    data = r.render_document(document)
    assert r.parse_config_text(data, "f") == document
    assert "ü".encode() in data
    assert data.endswith(b"}\n")


def test_half_a_surrogate_pair_is_stored_escaped():
    document = r.parse_config_text(b'{"a": "\\ud800"}', "f")
    assert r.parse_config_text(r.render_document(document), "f") == document


def test_a_number_too_large_for_json_is_refused_and_not_corrupted(path):
    path.write_bytes(b'{"masterKey": "old", "x": 1e999}')
    with pytest.raises(r.ConfigError, match="too large"):
        r.edit_config_file(str(path), set_key())
    assert path.read_bytes() == b'{"masterKey": "old", "x": 1e999}'
