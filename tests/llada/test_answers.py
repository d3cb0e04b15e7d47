"""Where an answer is found, which answers are equal, and the process that compares them."""

import os
import re
import signal
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada import answers
from llada.answers import answers_match, clean, extract, final_answer, last_box

ROOT = Path(answers.__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def worker():
    """A worker of these tests, whose questions may take two seconds."""
    worker = answers.Worker()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "SECONDS_PER_QUESTION", 2)
        yield worker
    worker.stop()


# ---- Finding the answer --------------------------------------------------------------------------
FOUND = [  # a text, and the answer that the metric sees
    (r"so \boxed 30.", "30."),
    (r"so \boxed{}30 </reasoning> <answer>\boxed{}31</answer>", "31"),
    ("<answer>\n</answer> \\boxed{5}", "5"),
    (r"so it is \boxed{225>", "225"),
    (r"so \fbox{5}", "5"),
    ("<answer>\nboxed{5}\n</answer>", "5"),
    (f"<answer>{'first ' * 60}</answer>" + r"\boxed{7}", "7"),
    (f"<answer>{'first ' * 60}</answer> The answer is 7", "The answer is 7"),
    (r"So \boxed{5}. Wait, it is \boxed{7", "7"),
    (r"<answer>\boxed{5}, no, \boxed{7</answer>", "7"),
    (r"so \boxed{18}. Thus \boxed{", "18"),
    (r"$\boxed{3}$ and $\boxed{5}$.", "3, 5"),
    (r"\boxed{1}, \boxed{3} \text{ or } \boxed{5}", "1, 3, 5"),
    (r"\boxed{3}. It is \boxed{5}", "5"),
    ("The answer is 72.", "72."),
    ("48/2 = 24\n#### 72", "72"),
    ("**Answer:** 4", "4"),
    ("</reasoning>\n<answer>\n18\n<answer>", "18"),
    ("<answer>18</answer", "18"),
    ("<answer>x<y", "x<y"),
    ("it is 72", None),
    ("", None),
]


@pytest.mark.parametrize("text, answer", FOUND)
def test_the_metric_finds_an_answer_as_a_careful_reader_would(text, answer):
    assert final_answer(text) == answer


def slow_last_box(text):
    """From the last start to the only end between which the braces cancel."""

    def flat(inside):
        less = re.sub("{[^{}]*}", "", inside)
        return not re.search("[{}]", inside) if less == inside else flat(less)

    best = None
    for start in range(len(text)):
        if re.search(r"\\boxed\s*{$", text[:start]):
            for end in range(start, len(text)):
                if text[end] == "}" and flat(text[start:end]):
                    best = text[start:end].strip()
    return best


TAGS = ["<answer>", "</answer>", r"\boxed{", r"\boxed {", "{", "}", "7", " x", "\n"]


@settings(max_examples=400, derandomize=True, deadline=None, database=None)
@given(text=st.lists(st.sampled_from(TAGS), max_size=14).map("".join))
def test_a_reward_sees_the_last_closed_answer_and_in_it_the_last_box(text):
    inside = re.findall("<answer>((?:(?!</?answer>).)*)</answer>", text, re.S)
    best = None
    if inside:
        box = slow_last_box(inside[-1])
        best = inside[-1].strip() if box is None else box
    assert last_box(text) == slow_last_box(text)
    assert extract(text) == best
    assert extract(text, box_anywhere=True) == (best if inside else slow_last_box(text))


# ---- Comparing answers ---------------------------------------------------------------------------
VECTOR = r"\begin{pmatrix} %s \\ %s \end{pmatrix}"
BOLD = [r"\mathbf{6}", r"\textbf{6}", r"\bm{6}", r"\underline{6}", "**6**", "**6.**", "6."]
SIX = [
    *(r"6\text{ cm}^2", "6 sq. ft.", "6^{\\text{th}}", "6th", "6°", r"6^\circ", r"\text{6 eggs}"),
    *("x = 6", "2+4=6", "$6$", r"\(6\)", "Therefore $n = 6$ is the smallest.", "m+n = 6"),
]
VERDICTS = [  # the right answer, other ways to write it, answers that are not it
    ("6", BOLD + SIX, ["6 dozen", "6 thousand", "6 or 7", "60", "6x", "-6", "six", ""]),
    ("385000", [r"385\,000", "385,000", "385{,}000", r"\$385,000", "385,000 people"], ["385"]),
    ("45", ["45 fairies", r"45\text{ fairies}", "45 were there"], ["4 5", "45 squared"]),
    ("3/4", ["3/4 of a cup", r"\frac{3}{4} cups", ".75 cups", r"\frac34"], ["4/3"]),
    ("1.5", ["1 1/2 cups", r"1\frac12", "3/2", r"\frac{6}{4}"], ["11/2"]),
    ("60", ["60%", r"60\%", "60 percent", r"60\text{ percent}", "60 pct"], ["0.6", "61%"]),
    ("12.5", ["12.5%", "25/2"], ["12.5 million"]),
    (r"\frac12", ["0.5", r"50\%", "½", "1/2"], ["2", "0.51"]),
    (r"so \boxed{4}, no, $\boxed{1{,}235}$.", ["1235"], ["4", "4, 1235"]),
    (r"so it is \boxed 30.", ["30"], ["3"]),
    ("6 x 7\n#### 42", ["42", "42 eggs"], ["7"]),
    ("0,245", ["0, 245"], ["245"]),
    ("0.000012", ["1.2e-5", r"1.2 \times 10^{-5}"], ["1.2e5"]),
    (r"\sqrt{8}", [r"2\sqrt{2}", "2√2", "2*sqrt(2)", r"2\sqrt(2)", "8^(1/2)", "2^{3/2}"], ["8"]),
    (r"2\sqrt{2}", [r"\sqrt{8} \approx 2.83", "√8"], ["2.8"]),
    (r"\sqrt{\frac23}", [r"\sqrt\frac{2}{3}", r"\sqrt\dfrac23"], [r"\frac23"]),
    (r"\frac14", ["0.25"], [r"\sin^{-1}(\frac{1}{4})", r"\vec{v}\frac{1}{4}"]),
    (r"\sqrt[3]{54}", [r"3\sqrt[3]{2}"], [r"\sqrt{54}"]),
    ("x^2+x", ["x²+x", "x(x+1)", "f(x) = x^2+x"], ["x^2"]),
    (r"\sin^2(x)+1", [r"1+\sin^2 x", r"2-\cos^2(x)"], [r"\sin(x)+1"]),
    ("(3,5)", ["(x,y) = (3,5)", r"\left(3, 5\right)"], ["(5,3)"]),
    ("1,-2", ["-2, 1", r"\{1,-2\}", "1 and -2", "x=1 or x=-2"], ["1", "1,2"]),
    (r"1\pm\sqrt2", [r"1-\sqrt2, 1+\sqrt2"], [r"1+\sqrt2"]),
    (r"(2,\infty)", ["x > 2", "(2,∞)"], [r"x \ge 2"]),
    (r"[-2,7]", [r"-2\le x\le 7", r"x\in[-2,7]"], ["(-2,7)"]),
    (r"x \neq 3", [r"x \ne 3"], ["x = 3"]),
    ("-2+7i", ["7i-2"], ["7i+2"]),
    (r"\text{(B)}", ["B", "(B)", r"\text{B}"], ["C", "A, B"]),
    (r"\text{east}", [r"\text{East}", "east"], ["west"]),
    (VECTOR % (1, 2), [VECTOR % (1, r"\frac42")], [VECTOR % (2, 1)]),
]


@pytest.mark.parametrize("gold, right, wrong", VERDICTS)
def test_ways_to_write_an_answer_are_right_and_other_answers_wrong(gold, right, wrong):
    assert [answer for answer in right if not answers_match(gold, answer)] == []
    assert [answer for answer in wrong if answers_match(gold, answer)] == []


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(
    pair=st.tuples(*[st.integers(-(10**7), 10**7)] * 2),
    same=st.booleans(),
    form=st.sampled_from(
        ["{}", "{}.", "{:,}", "${:,}$", "**{}**", "{} km", r"x = {}", r"\${:,}.00"]
    ),
)
def test_integers_are_equal_as_integers_are(pair, same, form):
    gold, answer = pair[0], pair[0 if same else 1]
    assert answers_match(str(gold), form.format(answer)) == (gold == answer)


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(top=st.integers(-60, 60), bottom=st.integers(1, 30), gold=st.integers(-60, 60))
def test_fractions_are_equal_as_fractions_are(top, bottom, gold):
    written = rf"\frac{{{top}}}{{{bottom}}}"
    assert answers_match(f"{gold}/12", written) == (Fraction(top, bottom) == Fraction(gold, 12))


def test_math_verify_accepts_what_the_docstring_of_the_module_says():
    pairs = [
        (r"\frac{1}{3^{40}}", r"\frac{1}{3^{41}}"),
        (r"10\text{ m}", r"10\text{ km}"),
        ("101_2", "101_3"),
        ("2/3", "2:3"),
        ("5", "2(3)"),
    ]
    assert [pair for pair in pairs if not answers_match(*pair)] == []


# ---- The process ---------------------------------------------------------------------------------
def test_threads_share_a_worker_and_a_killed_one_is_replaced(worker):
    found = {}

    def ask(n):
        found[n] = worker.ask(f"{n + n % 2}x", f"x + {n - 1}x")  # equal for even n

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(2, 12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: n % 2 == 0 for n in range(2, 12)}
    killed = worker.process.pid
    os.kill(killed, signal.SIGKILL)
    assert worker.ask("7y", "y+6y") and worker.process.pid != killed


HOSTILE = [
    *("9^9^9^9", "99999999!", r"\boxed{" * 40, r"\frac{" * 40),
    *("$" * 99, "\\" * 99, "\0", "\ud800", "1/0", "1e9999", "<answer>"),
]


def test_a_hostile_answer_is_wrong_and_the_next_one_is_compared(worker):
    assert [answer for answer in HOSTILE if worker.ask("5", answer)] == []
    assert worker.ask("5", "2+3")
    for giant in ("9" * 10**6, "(" * 10_000 + "5" + ")" * 10_000, None):
        assert not answers_match("5", giant)


def test_a_long_run_of_words_after_a_number_is_one_unit_or_none():
    """A pattern with several ways to split the words would need years for the second answer."""
    assert clean("18 " + "dollars per day " * 15) == "18"
    assert clean("18 " + "dollars per day " * 15 + "!").startswith("18 dollars")


def test_a_worker_that_hangs_is_replaced_after_the_limit(worker):
    assert worker.ask("5", "2+3")
    os.kill(worker.process.pid, signal.SIGSTOP)
    assert not worker.ask("5", "4+1")
    assert worker.ask("5", "4+1")


PIECES = [r"\boxed{", r"\boxed{1}", "<answer>", "{", "}", "< ", "answer is "]


@pytest.mark.parametrize("piece", PIECES)
def test_an_answer_after_a_megabyte_of_pieces_is_found(piece):
    text = piece * (10**6 // len(piece))
    assert final_answer(text + "<answer>5</answer>") == "5"


SCRIPT = """
import multiprocessing
from llada.answers import WORKER, answers_match

def ask(answer):
    return answers_match("4x", answer), WORKER.process.pid

if __name__ == "__main__":
    print(ask("2x+2x"))
    for method, texts in {"fork": ["x+3x", "x+2x"], "spawn": ["3x+x"]}.items():
        with multiprocessing.get_context(method).Pool(len(texts)) as pool:  # of daemonic processes
            print(*pool.map(ask, texts, 1))
"""


def test_forks_and_spawned_processes_ask_workers_of_their_own_and_leave_none(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "script.py"]
    output = subprocess.check_output(command, text=True, env=environment, cwd=tmp_path)
    found = re.findall(r"\((\w+), (\d+)\)", output)
    assert [right for right, _ in found] == ["True", "True", "False", "True"]
    pids = [int(pid) for _, pid in found]
    assert pids[0] not in pids[1:]
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_a_missing_or_broken_math_verify_is_an_error_and_no_verdict(tmp_path, monkeypatch):
    worker = answers.Worker()
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken on purpose')")
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(answers.MathVerifyError, match="did not start"):
            worker.ask("2x", "x+x")
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(answers.MathVerifyError, match="pip install math-verify"):
        worker.ask("2x", "x+x")


WITHOUT_MATH_VERIFY = r"""
import sys
sys.modules["math_verify"] = None
from llada.distributed import run_as_script
from llada.tasks import TASKS
run_as_script(lambda: TASKS["math"].grade(r"\boxed{42}", {"answer": "42"}))
"""


def test_a_missing_math_verify_ends_a_program_in_one_sentence():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WITHOUT_MATH_VERIFY]
    ended = subprocess.run(command, text=True, env=environment, capture_output=True)
    assert ended.returncode == 1
    assert re.fullmatch(".*math-verify.* is missing: run pip install math-verify.\n", ended.stderr)
