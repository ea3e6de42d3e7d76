"""Lines of files and pipes: all of them, those that are there before those to come; a typed one needs no file."""

import os
import pty
import subprocess
import sys
import threading

import pytest

from jaxgpt.apps.lines import open_lines

READ = "from jaxgpt.apps.lines import open_lines; print(*map(ascii, open_lines('-')[0]), sep='\\n')"


def test_a_file_has_its_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\n  two\u2028\n\ufeffthree".encode())
    lines, ready = open_lines(str(tmp_path / "a.txt"))
    assert list(lines) == ["one", "", "  two\u2028", "\ufeffthree"] and ready()


def test_a_named_pipe_is_read_as_it_is_written(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writers = []
    threading.Thread(target=lambda: writers.append(open(tmp_path / "pipe", "wb", buffering=0))).start()  # noqa: SIM115
    lines, ready = open_lines(str(tmp_path / "pipe"))
    while not writers:
        pass
    writers[0].write(b"one\n")
    assert next(lines) == "one" and not ready(), "the next is still to come"
    writers[0].write(b"two\nthree")
    writers[0].close()
    assert list(lines) == ["two", "three"]


@pytest.mark.parametrize("through", ["file", "pipe", "terminal"])
def test_standard_input_in_every_form(tmp_path, through):
    content = "grün\n\nlast\n".encode()
    (tmp_path / "in.txt").write_bytes(content)
    command = [sys.executable, "-c", READ]
    if through == "file":
        with (tmp_path / "in.txt").open("rb") as file:
            out = subprocess.run(command, stdin=file, capture_output=True).stdout
    elif through == "pipe":
        out = subprocess.run(command, input=content, capture_output=True).stdout
    else:
        ours, theirs = pty.openpty()
        process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        os.write(ours, content + b"\x04")  # Ctrl-D
        out, err = process.communicate(timeout=60)
        assert b"Ctrl-D ends" in err and b">" not in out
    assert out.decode().split() == ["'gr\\xfcn'", "''", "'last'"]


def test_what_cannot_be_read_is_said(tmp_path):
    for name in ("nowhere", ""):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            open_lines(str(tmp_path / name))
    (tmp_path / "a").write_bytes(b"fine\nf\xff\n")
    lines, _ = open_lines(str(tmp_path / "a"))
    assert next(lines) == "fine"
    with pytest.raises(ValueError, match="a, line 2, is not UTF-8: byte 0xff at offset 1"):
        next(lines)
