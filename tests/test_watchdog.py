"""A process that hangs says where and ends; one that goes on is left alone."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(program):
    script = f"import threading, ctypes\nfrom jaxgpt.training.watchdog import Watchdog\n{program}"
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_hang_ends_the_process_and_says_where():
    program = """
def waits_for_ever():
    threading.Event().wait()
threading.Thread(target=waits_for_ever, daemon=True).start()
watchdog = Watchdog(0.2)
watchdog.doing("step 1")
watchdog.doing("step 7 (batch 6)")
threading.Event().wait()
"""
    result = run(program)
    assert result.returncode == 1 and result.stdout == ""
    assert "nothing was done for 0.2 seconds, in step 7 (batch 6)" in result.stderr
    assert result.stderr.count("most recent call first") >= 3 and "in waits_for_ever" in result.stderr
    assert result.stderr.count("in waits_for_ever") == 1  # and not a second time while it waits for other hosts


def test_a_call_that_keeps_the_interpreter_to_itself_is_ended_too():
    result = run("""
watchdog = Watchdog(0.2)
watchdog.doing("step 1")
ctypes.PyDLL(None).sleep(50)  # as a library that hangs holding the lock: no thread of Python's runs
""")
    assert result.returncode == 1 and "most recent call first" in result.stderr


@pytest.mark.parametrize("seconds", [0.3, None])
def test_what_goes_on_or_rests_is_left_alone(seconds):
    result = run(f"""
watchdog, pause = Watchdog({seconds}), threading.Event()
for number in range(8):
    watchdog.doing(f"step {{number}}")
    pause.wait(0.05)
watchdog.rest()
pause.wait(0.5)
watchdog.doing("the last")
watchdog.close()
pause.wait(0.5)
print("done")
""")
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")
