"""The process that compares answers: its limits, its end, and whom it serves."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from figures import answers


def ended(code):
    """The exit status of Python code under the limits of a question."""
    code = f"from figures.answers import set_limits; set_limits(); {code}"
    return subprocess.run([sys.executable, "-c", code]).returncode


def test_threads_share_a_worker_and_a_killed_one_is_replaced():
    found = []

    def ask(n):
        found.append(answers.same(f"{n + 1}x", f"x + {n}x"))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    before = answers.ALGEBRA.pid
    os.kill(before, signal.SIGKILL)
    assert found == [True] * 4 and answers.same("7y", "y+6y") and answers.ALGEBRA.pid != before


def test_what_exhausts_the_worker_is_not_right_and_the_next_question_is_answered():
    assert not answers.same("abcdf", "(a+b+c+d+f)^{90}") and answers.same("ab", "ba")
    assert answers.hopeless("9^{9^9}") and not answers.hopeless("(x+1)^{20}")


@pytest.mark.skipif(sys.platform != "linux", reason="the limit needs /proc")
def test_a_question_may_take_50_mb():
    assert answers.same("3z", "z+2z")
    worker = Path(f"/proc/{answers.ALGEBRA.pid}")
    held = int(re.search(r"VmSize:\s*(\d+)", (worker / "status").read_text())[1]) * 1024
    most = int(re.search(r"Max address space\s+(\d+)", (worker / "limits").read_text())[1])
    assert 40 * 2**20 < most - held < 60 * 2**20
    assert [ended(f"bytearray({megabytes} * 2**20)") for megabytes in (40, 60)] == [0, 1]


def test_what_no_alarm_interrupts_is_ended_by_the_system_within_seconds():
    assert ended("9**9**9") == -signal.SIGXCPU


def test_a_worker_that_does_not_answer_is_an_error_and_no_score(monkeypatch):
    answers.ALGEBRA.start()
    os.kill(answers.ALGEBRA.pid, signal.SIGSTOP)
    monkeypatch.setattr(answers, "WALL_SECONDS", 0.1)
    with pytest.raises(RuntimeError, match="too busy"):
        answers.same("3w", "w+2w")


def test_a_machine_that_cannot_compare_is_an_error_and_no_score(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(RuntimeError, match="pip install math-verify"):
        answers.Algebra().same("2x", "x+x")


def test_a_script_and_its_forks_ask_each_a_worker_of_their_own_and_leave_none(tmp_path):
    script = tmp_path / "script.py"
    lines = [
        "from multiprocessing import get_context",
        "from answers import *",
        "print(same('2x', 'x+x'), ALGEBRA.pid)",
        "forks = get_context('fork').Pool(2)",
        "print(*forks.starmap(same, [('3x', f'x+{n}x') for n in '1223'], 1))",
    ]
    script.write_text("\n".join(lines))
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.abspath(answers.__file__))}
    output = subprocess.check_output([sys.executable, script], text=True, env=environment)
    right, pid, *of_forks = output.split()
    assert [right, *of_forks] == ["True", "False", "True", "True", "False"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
