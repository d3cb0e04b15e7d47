"""The tasks: rows, prompts, rewards, the files that they read, and a task that a user adds."""

import itertools
import json
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada import tasks
from llada.answers import extract, final_answer
from llada.tasks import TASKS, Task, evaluate_expression, read_rows

GRID = "1234341221434321"
OTHER = "3214143221434321"  # differs from GRID in cells 0, 2, 4 and 6
PUZZLE = {"puzzle": "0234341221434320", "solution": GRID}
TWO_SOLUTIONS = {"puzzle": "0204040221434321", "solution": GRID}
ROWS = {
    "countdown": {"numbers": [2, 3, 4], "target": 5},
    "gsm8k": {"question": "What?", "answer": "6 x 7\n#### 42"},
    "sudoku": PUZZLE,
    "math": {"question": "What?", "answer": r"$\boxed{41}$, no, $\boxed{42}$."},
}
RIGHT = {"countdown": "2*4-3", "gsm8k": "42", "sudoku": GRID, "math": "42"}
WRONG = {"countdown": "2+3", "gsm8k": "41", "sudoku": OTHER, "math": "41"}
SPLITS = ("train", "valid", "test")


def tag(answer):
    return f"<answer>{answer}</answer>"


def form(answer):
    return f"<reasoning>\nfirst\nsecond\n</reasoning>\n<answer>\n{answer}\n</answer>"


def few(examples):
    """Hypothesis with fixed examples and without a limit of time."""
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None)


# ---- Rows ----------------------------------------------------------------------------------------
def left(grid, i):
    """The digits that neither the row nor the column nor the box of cell i holds."""
    seen = {grid[j] for j in range(16) if 0 in ((i ^ j) & 12, (i ^ j) & 3, (i ^ j) & 10)}
    return {*"1234"} - seen


def solve(grid):
    """Every solution, by backtracking."""
    i = grid.find("0")
    if i < 0:
        return [grid]
    solutions = []
    for digit in left(grid, i):
        solutions += solve(grid[:i] + digit + grid[i + 1 :])
    return solutions


def test_sudoku_rows_have_one_solution_each_and_splits_share_none():
    assert sorted(tasks.sudoku_grids()) == sorted(solve("0" * 16))
    rows = {split: TASKS["sudoku"].rows(split) for split in SPLITS}
    solutions = {split: {row["solution"] for row in rows[split]} for split in SPLITS}
    assert (len(solutions["train"]), len(solutions["valid"])) == (176, 24)
    assert len(set.union(*solutions.values())) == sum(map(len, solutions.values()))
    for split, part in rows.items():
        assert len({row["puzzle"] for row in part}) == (20000 if split == "train" else 256)
        assert {row["puzzle"].count("0") for row in part} == {*range(7, 13)}
        for row in part[:100]:
            assert solve(row["puzzle"]) == [row["solution"]]


def test_sudoku_s_worked_examples_are_sound_line_by_line():
    prompt = TASKS["sudoku"].prompt(TWO_SOLUTIONS)
    examples = re.findall(r"puzzle: (\d{16})\nAnswer:\n(.*?</answer>)", prompt, re.S)
    assert len(examples) == 3
    for row in TASKS["sudoku"].rows("test") + [TWO_SOLUTIONS]:
        examples.append((row["puzzle"], tasks.sudoku_example(row)))
    for puzzle, text in examples:
        grid = puzzle
        for row, column, word, digit in re.findall(r"Row (\d), column (\d): (only|try) (\d)", text):
            i = 4 * int(row) + int(column) - 5
            assert grid[i] == "0"
            assert left(grid, i) == {digit} if word == "only" else left(grid, i) > {digit}
            grid = grid[:i] + digit + grid[i + 1 :]
        assert grid in solve(puzzle)
        assert TASKS["sudoku"].reward(text, {"puzzle": puzzle, "solution": grid}) == 2


OPERATIONS = {
    "+": Fraction.__add__,
    "-": Fraction.__sub__,
    "*": Fraction.__mul__,
    "/": lambda a, b: a / b if b else Fraction(10**9),
}


def solvable(row):
    orders = itertools.permutations(map(Fraction, row["numbers"]))
    for p, q, (a, b, c) in itertools.product(OPERATIONS.values(), OPERATIONS.values(), orders):
        if row["target"] in (p(q(a, b), c), p(a, q(b, c))):
            return True
    return False


def test_countdown_rows_are_solvable_and_no_problem_is_in_two_splits():
    train, valid, test = (TASKS["countdown"].rows(split) for split in SPLITS)
    problems = {(*sorted(row["numbers"]), row["target"]) for row in train + valid + test}
    assert [len(part) for part in (train, valid, test)] == [20000, 256, 256]
    assert len(problems) == 20512
    assert {*itertools.chain(*problems)} == {*range(1, 101)}
    assert all(solvable(row) for row in train[:50] + valid[:50] + test[:50])


@pytest.mark.parametrize("n", [1, 9, 10, 99, 2559, 5000])
def test_cut_is_a_partition_that_stays(n):
    train, valid = (tasks.cut([*range(n)], split) for split in ("train", "valid"))
    assert sorted(train + valid) == [*range(n)]
    assert len(valid) == min(256, n // 10)
    assert tasks.cut([*range(n)], "train") == train


# ---- Prompts and rewards -------------------------------------------------------------------------
ASKED = {"countdown": "[2, 3, 4] to make exactly 5", "sudoku": PUZZLE["puzzle"]}


@pytest.mark.parametrize("name", [*ROWS])
def test_a_prompt_asks_for_what_earns_the_top(name):
    task, best = TASKS[name], RIGHT[name]
    prompt = task.prompt(ROWS[name])
    asked = re.search("<reasoning>\n.*?\n</answer>", prompt, re.S)[0]
    best = rf"\boxed{{{best}}}" if name == "math" else best
    filled = asked.replace("your answer", best)
    assert ASKED.get(name, "What?") in prompt
    assert task.reward(asked, ROWS[name]) < task.reward(filled, ROWS[name]) == task.top


# R and W stand for a right and a wrong answer. The first flag says whether the reward sees R, and
# the second whether the metric does.
PLACES = [
    ("<answer>\nR\n</answer>", True, True),
    (r"<answer>so \boxed{R} it is</answer>", True, True),
    (r"<answer>\boxed{W}, no, \boxed {R}</answer>", True, True),
    ("<answer>W</answer><answer>R</answer>", True, True),
    ("<answer>R</answer></answer>", True, True),
    ("<answer>R</answer><answer>W", True, True),
    ("</answer><answer><answer>R</answer>", True, True),
    (r"\boxed{W}<answer>R</answer>\boxed{W}", True, True),
    ("<answer>R</answer><answer>W</answer>", False, False),
    (r"<answer>\boxed{R}\boxed{W}</answer>", False, False),
    (r"<answer>W</answer>\boxed{R}", False, False),
    ("</answer>R<answer>", False, False),
    ("R", False, False),
    ("", False, False),
    ("so\n</reasoning>\n<answer>\nR", False, True),
    ("<answer>\n\\boxed{R", False, True),
    ("so\n</reasoning>\nR", False, True),
]


@pytest.mark.parametrize("name", [*ROWS])
def test_the_reward_sees_the_last_closed_answer_and_the_metric_looks_further(name):
    task, row = TASKS[name], ROWS[name]
    best = 2.0 if name in ("gsm8k", "math") else task.top
    for text, rewarded, correct in PLACES:
        text = text.replace("R", RIGHT[name]).replace("W", WRONG[name])
        assert task.correct(text, row) is correct, text
        assert (task.reward(text, row) >= best) is rewarded, text
    box = rf"It is \boxed{{{RIGHT[name]}}}"
    assert task.correct(box, row)
    assert (task.reward(box, row) >= best) is (name in ("gsm8k", "math"))


PARTS = [
    ("gsm8k", form(42), 4),
    ("gsm8k", form(41), 2),
    ("gsm8k", form("x"), 1.5),
    ("gsm8k", form(42) + "\nabc", 3.497),
    ("gsm8k", form(42)[:-9], 0.375),
    ("gsm8k", r"\boxed{42}", 2),
    ("gsm8k", "<reasoning>a\n</reasoning> " + tag(42), 3),
    ("gsm8k", form(42).replace("second", "<answer>"), 3.875),
    ("gsm8k", tag("\n42\n"), 2.75),
    ("gsm8k", "</answer> x", 0),
    ("math", form(r"\boxed{42}"), 3),
    ("math", form(42), 2.75),
    ("math", r"\boxed{42}", 2.5),
    ("math", r"\boxed{4}", 0.5),
    ("math", "", 0.25),
    ("countdown", "2*4-3", 0),
    ("countdown", tag("2+3"), 0.1),
    ("countdown", tag(""), 0),
]


@pytest.mark.parametrize("name, text, reward", PARTS)
def test_the_parts_of_a_reward(name, text, reward):
    assert TASKS[name].reward(text, ROWS[name]) == pytest.approx(reward, abs=1e-9)


def test_math_reads_the_answer_of_a_gsm8k_row():
    row = {"question": "What?", "answer": "6 x 7\n#### 42"}
    assert TASKS["math"].correct("<answer>42</answer>", row)
    assert not TASKS["math"].correct("<answer>7</answer>", row)


PIECES = [
    *"{}()\n =*/+-239$,.%x٣\0",
    *("42", "2*4-3", GRID, *map(tag, RIGHT.values()), form(42)),
    *("<reasoning>\n", "\n</reasoning>\n", "<answer>", "</answer>", r"\boxed{"),
]


@pytest.mark.parametrize("name", [*ROWS])
def test_any_text_has_a_reward_that_tells_right_from_wrong(name):
    task, row = TASKS[name], ROWS[name]
    least, most = {"countdown": (1, 0.1), "math": (2, 1)}.get(name, (2, 2))

    @few(60 if name == "math" else 200)
    @given(text=st.text(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
    def check(text):
        reward, solved = task.grade(text, row)
        assert 0 <= reward <= task.top
        if not solved:
            assert reward <= most
        elif final_answer(text) == extract(text, box_anywhere=name in ("gsm8k", "math")):
            assert reward >= least - 0.001 * len(text) * (name == "gsm8k")

    check()


# ---- Countdown and Sudoku ------------------------------------------------------------------------
def number(n):
    return str(n), Fraction(n), [n]


def combine(a, sign, b, space):
    """A sum of two expressions; its value is None if there is a division by zero in it."""
    defined = None not in (a[1], b[1]) and (sign, b[1]) != ("/", 0)
    value = OPERATIONS[sign](a[1], b[1]) if defined else None
    return f"({a[0]}{space}{sign}{b[0]})", value, a[2] + b[2]


def trees(smaller):
    spaces = st.sampled_from(["", " ", "\n"])
    negative = smaller.map(lambda a: (f"-{a[0]}", None if a[1] is None else -a[1], a[2]))
    return negative | st.builds(combine, smaller, st.sampled_from([*OPERATIONS]), smaller, spaces)


@few(300)
@given(tree=st.recursive(st.integers(0, 120).map(number), trees, max_leaves=9))
def test_evaluation_returns_the_value_and_the_numbers_of_an_expression(tree):
    text, value, numbers = tree
    refused = value is None or len(text) > 100
    assert evaluate_expression(text) == ((None, []) if refused else (value, numbers))


NO_EXPRESSIONS = ["2**3", "5//2", "(2)(3)", "2 3", "1/0", "02", "+2", "٣", "f(2)", "1+" * 50 + "1"]
NO_EXPRESSIONS += ["9**9**9**9", "", "(" * 99]


def test_operators_bind_as_usual_and_all_else_is_refused():
    assert evaluate_expression("2+3*4-6/4") == (Fraction(25, 2), [2, 3, 4, 6, 4])
    assert [text for text in NO_EXPRESSIONS if evaluate_expression(text) != (None, [])] == []


COUNTDOWN = [  # numbers, target, right expressions, wrong ones
    ([2, 3, 4], 5, [r"$2\times4-3$", r"\left(2 \cdot 4\right) − 3", "2×4-3 = 5", "**2*4-3**"], []),
    ([2, 3, 4], 5, [r"\boxed{2*4-3}=5", "-(3-4*2)", "2*4-3.", r"\[ 4*2-3 \]", "5 = 2·4-3"], []),
    ([2, 3, 4], 5, ["2 x 4 - 3"], ["5", "= 5", "2+3", "2+3+4", "2*4-3+2-2", "23-4", "{2*4}-3"]),
    (
        [2, 3, 4],
        5,
        [],
        ["2*4-3 = 17", "2.0*4-3", "٢*٤-٣", "2*4-3 # 9", "__import__('os')", "(" * 2000 + "5"],
    ),
    ([3, 8, 8, 3], 24, ["8/(3-8/3)", r"\frac{8}{3-8/3}", r"\dfrac{8}{3-8/3}"], ["3*8"]),
]


@pytest.mark.parametrize("numbers, target, right, wrong", COUNTDOWN)
def test_countdown_expressions(numbers, target, right, wrong):
    task, row = TASKS["countdown"], {"numbers": numbers, "target": target}
    for expression in right + wrong:
        assert task.correct(tag(expression), row) is (expression in right), expression
        assert task.reward(tag(expression), row) == (1.0 if expression in right else 0.1)


SUDOKU = [  # an answer, its row, right cells, whether it solves
    (GRID, PUZZLE, 2, True),
    ("1234\n3412\n2143\n4321", PUZZLE, 2, True),
    ("1 |2" + GRID[2:] + "99", PUZZLE, 2, True),
    ("19" + GRID[2:], PUZZLE, 2, False),
    ("9" + GRID[1:], PUZZLE, 1, False),
    (GRID[:15], PUZZLE, 1, False),
    ("4x4: " + GRID, PUZZLE, 0, False),
    (OTHER, PUZZLE, 1, False),
    (OTHER, TWO_SOLUTIONS, 0, True),
    (GRID, TWO_SOLUTIONS, 4, True),
]


@pytest.mark.parametrize("answer, row, right, solved", SUDOKU)
def test_sudoku_counts_cells_of_the_solution_and_accepts_any_grid_on_the_clues(
    answer, row, right, solved
):
    task, empty = TASKS["sudoku"], row["puzzle"].count("0")
    assert task.correct(tag(answer), row) is solved
    assert task.cells(tag(answer), row) == (right, empty)
    assert task.reward(tag(answer), row) == 2 * right / empty


# ---- A user's task, and files --------------------------------------------------------------------
def test_a_task_is_one_class(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "TASKS", dict(TASKS))

    class Reverse(Task):
        top = 3.0
        columns = {"word": ("word", "input")}

        def clean(self, record):
            if not record["word"].isalpha():
                raise ValueError("The word has other signs than letters.")
            return record

        def reward(self, text, row):
            return sum([0.3] * 10 * (text.strip() == row["word"][::-1]))  # 3 less a rounding error

    task, path = tasks.TASKS["reverse"], tmp_path / "words.jsonl"
    path.write_text('{"input": "mask"}\n')
    rows = read_rows(str(path), "reverse")
    assert rows == [{"word": "mask"}]
    assert task.grade("ksam", rows[0]) == (pytest.approx(3), 1)
    assert task.grade("mask", rows[0]) == (0, 0)
    with pytest.raises(RuntimeError, match="Reverse cannot grade 'mask': 'word'"):
        task.grade("mask", {})
    with pytest.raises(ValueError, match="--data"):
        task.rows("train")
    path.write_text('{"input": "mask"}\n{"input": "m4sk"}\n')
    with pytest.raises(ValueError, match="words.jsonl, line 2: The word has other signs"):
        read_rows(str(path), "reverse")


ASK = {"question": "a?", "answer": "7"}
THREE = {"numbers": [30, 100, 93], "target": 23}
TWO = {"numbers": [4, 5], "target": 20}
GOOD = [  # task, kind, content, the row
    ("countdown", "jsonl", '{"input": "30,100,93", "output": "23"}', THREE),
    ("countdown", "csv", 'nums,target\n"[4, 5]",20\n', TWO),
    ("countdown", "jsonl", '{"nums": [4.0, "5"], "target": 20.0}', TWO),
    ("sudoku", "csv", f"Puzzle,Solution\n{PUZZLE['puzzle']},{GRID}\n", PUZZLE),
    ("gsm8k", "jsonl", json.dumps(ROWS["gsm8k"]), ROWS["gsm8k"]),
    ("math", "jsonl", '{"problem": "a?", "solution": "w", "answer": 7, "level": 5}\n\n \n', ASK),
    ("math", "jsonl", '\ufeff{"problem": "a?", "answer": "7"}\r\n', ASK),
    ("math", "csv", "\ufeffid, question, answer\r\n1,a?,7\r\n\r\n", ASK),
    (
        "math",
        "jsonl",
        '{"problem": "\u2028\x85", "answer": "1"}',
        ASK | {"question": "\u2028\x85", "answer": "1"},
    ),
]


@pytest.mark.parametrize("name, kind, content, row", GOOD)
def test_a_file_is_read(tmp_path, name, kind, content, row):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(content.encode())
    assert read_rows(str(path), name) == [row]


BAD = [  # task, kind, content, what the error says
    ("math", "csv", "question,answer\na,b,5\n", "a.csv, line 2: There are 3 fields.*quotes"),
    ("math", "csv", 'question,answer\n"a\nb",5\nc\n', "a.csv, line 4: There are 1 fields"),
    ("math", "csv", 'problem,answer\n"' + "x" * 200_000, "a.csv, line 2: "),
    ("math", "csv", "answer,question,answer\n1,2,3", "line 1: Two columns"),
    ("math", "csv", "a?,7\nb?,8\n", "line 2: There is no value for question or problem"),
    ("math", "jsonl", '{"question": "a", "answer": ""}', "line 1: .* no value for answer"),
    ("math", "jsonl", " \n\n", "a.jsonl holds no rows"),
    ("math", "txt", "{}", "does not end in .jsonl or .csv"),
    ("chess", "jsonl", "{}", "The task 'chess' is not one of"),
    ("math", "jsonl", '{"question": "a",\n "answer": "é"}', "line 2: This is not UTF-8"),
]
for line in ("{", "[]", "7", "null", '"a"', "[" * 100_000):
    BAD.append(("math", "jsonl", f"{json.dumps(ASK)}\n{line}\n", "line 2: This is (not )?JSON"))


@pytest.mark.parametrize("name, kind, content, message", BAD)
def test_a_bad_file_is_refused_in_a_sentence(tmp_path, name, kind, content, message):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        read_rows(str(path), name)
    with pytest.raises(ValueError, match="There is no file"):
        read_rows(str(tmp_path / "none.csv"), "math")


VALUES = [  # task, column, a bad value of it, what the error says
    ("countdown", "numbers", [], "1 to 6"),
    ("countdown", "numbers", {"a": 1}, "1 to 6"),
    ("countdown", "numbers", [True, 2], "True is not a whole"),
    ("countdown", "numbers", [-1, 2], "negative"),
    ("countdown", "target", 2.5, "2.5 is not a whole"),
    ("sudoku", "puzzle", "." * 16, "not 16 digits 0-4"),
    ("sudoku", "solution", OTHER, "does not solve"),
    ("gsm8k", "answer", "?", r"ends in '\?', not in a number"),
    ("math", "answer", True, "not text"),
    ("math", "question", 7, "question is 7, not text"),
]


@pytest.mark.parametrize("name, column, value, message", VALUES)
def test_a_bad_value_is_named_with_its_line(tmp_path, name, column, value, message):
    path = tmp_path / "a.jsonl"
    good = json.dumps(ROWS[name])
    path.write_text("\n".join([good, json.dumps(ROWS[name] | {column: value}), good]))
    with pytest.raises(ValueError, match=f"a.jsonl, line 2: .*{message}"):
        read_rows(str(path), name)
