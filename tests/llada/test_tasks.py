"""The tasks' rows and prompts, the data files that they read, and tasks that a user adds."""

import itertools
import json
import re
from contextlib import suppress
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from figures import answers, tasks
from figures.answers import extract
from figures.tasks import Sudoku, Task
from llada_finetune import TASKS, read_rows

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
SPLITS = ("train", "valid", "test")


@pytest.fixture
def own_tasks():
    """TASKS, without what the test adds afterwards."""
    before = dict(TASKS)
    yield TASKS
    TASKS.clear()
    TASKS.update(before)


# ---- prompts -------------------------------------------------------------------------------------
ASKED = [
    pytest.param("countdown", "2*4-3", "[2, 3, 4] to make exactly 5", id="countdown"),
    pytest.param("sudoku", GRID, PUZZLE["puzzle"], id="sudoku"),
    pytest.param("gsm8k", "42", "What?", id="gsm8k"),
    pytest.param("math", r"\boxed{42}", "What?", id="math"),
]


@pytest.mark.parametrize("name, best, asked", ASKED)
def test_a_prompt_asks_for_what_earns_the_top(name, best, asked):
    task = TASKS[name]
    prompt = task.prompt(ROWS[name])
    form = re.search("<reasoning>\n.*?\n</answer>", prompt, re.S)[0]
    filled = form.replace("your answer", best)
    assert asked in prompt
    assert task.reward(form, ROWS[name]) < task.reward(filled, ROWS[name]) == task.top


def test_countdown_s_example_is_right():
    prompt = TASKS["countdown"].prompt({"numbers": [9, 8, 7], "target": 6})
    assert TASKS["countdown"].correct(prompt, ROWS["countdown"])


# ---- rows ----------------------------------------------------------------------------------------
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
    assert len(tasks.sudoku_grids()) == 288
    rows = {split: TASKS["sudoku"].rows(split) for split in SPLITS}
    solutions = {split: {row["solution"] for row in rows[split]} for split in SPLITS}
    assert (len(solutions["train"]), len(solutions["valid"])) == (176, 24)
    assert not solutions["train"] & solutions["valid"]
    assert not solutions["test"] & (solutions["train"] | solutions["valid"])
    for split, part in rows.items():
        assert len({row["puzzle"] for row in part}) == (20000 if split == "train" else 256)
        assert {row["puzzle"].count("0") for row in part} == {*range(7, 13)}
        for row in part[:100]:
            assert solve(row["puzzle"]) == [row["solution"]]


def test_sudoku_s_worked_examples_are_sound_line_by_line():
    prompt = TASKS["sudoku"].prompt(TWO_SOLUTIONS)
    examples = re.findall(r"puzzle: (\d{16})\nAnswer:\n(.*?</answer>)", prompt, re.S)
    assert len(examples) == 3
    assert prompt.endswith(f"puzzle: {TWO_SOLUTIONS['puzzle']}\nAnswer:")
    for row in TASKS["sudoku"].rows("test") + [TWO_SOLUTIONS]:
        examples.append((row["puzzle"], tasks.sudoku_worked(row)))
    for puzzle, text in examples:
        grid = puzzle
        for row, column, word, digit in re.findall(r"Row (\d), column (\d): (only|try) (\d)", text):
            i = 4 * int(row) + int(column) - 5
            assert grid[i] == "0"
            assert left(grid, i) == {digit} if word == "only" else left(grid, i) > {digit}
            grid = grid[:i] + digit + grid[i + 1 :]
        assert grid in solve(puzzle)
        assert TASKS["sudoku"].reward(text, {"puzzle": puzzle, "solution": grid}) == 2


def quotient(a, b):
    return a / b if b else Fraction(10**9)


OPERATIONS = [Fraction.__add__, Fraction.__sub__, Fraction.__mul__, quotient]


def solvable(row):
    orders = itertools.permutations(map(Fraction, row["numbers"]))
    for p, q, (a, b, c) in itertools.product(OPERATIONS, OPERATIONS, orders):
        if row["target"] in (p(q(a, b), c), p(a, q(b, c))):
            return True
    return False


def test_countdown_rows_are_solvable_and_no_problem_is_in_two_splits():
    train, valid, test = (TASKS["countdown"].rows(split) for split in SPLITS)
    problems = {(*sorted(row["numbers"]), row["target"]) for row in train + valid + test}
    assert [len(part) for part in (train, valid, test)] == [20000, 256, 256]
    assert len(problems) == 20512
    assert {*itertools.chain(*problems)} == {*range(1, 101)}
    for row in train[:150] + valid[:50] + test[:150]:
        assert solvable(row)


@pytest.mark.parametrize("n", [1, 9, 10, 99, 2559, 5000])
def test_cut_is_a_partition_that_stays(n):
    train = tasks.cut([*range(n)], "train")
    valid = tasks.cut([*range(n)], "valid")
    assert sorted(train + valid) == [*range(n)]
    assert len(valid) == min(256, n // 10)
    assert tasks.cut([*range(n)], "train") == train and tasks.cut([*range(n)], "valid") == valid


def longer_sums(shorter):
    sign = st.sampled_from([*"+-*/*/", " - ", "\n*", "**", "//"])
    both = st.builds("{}{}{}".format, shorter, sign, shorter)
    return st.builds("({})".format, shorter) | st.builds("-{}".format, shorter) | both


SUMS = st.recursive(st.sampled_from("0 1 2 7 12 100".split()), longer_sums, max_leaves=20)
PIECES = st.lists(st.sampled_from([*"0123+-*/() ٣,=", "**", "//", "(4)", "-5*"]), max_size=8)
LONG = st.sampled_from(["1+" * 49 + "12", "1+" * 49 + "123"])


@settings(max_examples=500, derandomize=True, deadline=None, database=None)
@given(text=SUMS | LONG | PIECES.map("".join))
def test_arithmetic_is_evaluation_with_fractions(text):
    plain = " ".join(text.split())
    value = None
    if len(text) <= 100 and not re.search(r"[^0-9 ()*/+-]|\*\*|//|(^|[-+*/(]) ?\+", plain):
        with suppress(SyntaxError, TypeError, ZeroDivisionError):
            value = eval(re.sub("[0-9]+", r"Fraction(\g<0>)", plain), {"Fraction": Fraction})
    numbers = [int(number) for number in re.findall("[0-9]+", text)]
    assert answers.arithmetic(text) == ((value, numbers) if isinstance(value, Fraction) else None)


# ---- a user's tasks ------------------------------------------------------------------------------
def test_a_task_is_one_class(own_tasks, tmp_path):
    class Reverse(Task):
        """Say a word backwards."""

        top = 3.0
        columns = {"word": ("word", "input")}

        def rows(self, split):
            return [{"word": "tilt"}]

        def clean(self, record):
            if not record["word"].isalpha():
                raise ValueError("the word has other signs than letters")
            return record

        def prompt(self, row):
            return f"Say {row['word']} backwards."

        def reward(self, text, row):
            return self.top * (text.strip() == row["word"][::-1])

    task = own_tasks["reverse"]
    path = tmp_path / "words.jsonl"
    path.write_text('{"input": "mask"}\n')
    rows = read_rows(str(path), "reverse")
    assert rows == [{"word": "mask"}] and task.cells is None
    assert task.reward("ksam", rows[0]) == 3.0 and task.correct("ksam", rows[0])
    assert not task.correct("mask", rows[0])
    path.write_text('{"input": "mask"}\n{"input": "m4sk"}\n')
    with pytest.raises(ValueError, match="words.jsonl, line 2: the word has other signs"):
        read_rows(str(path), "reverse")


def test_a_task_with_nothing_but_a_reward_takes_records_as_they_are(own_tasks, tmp_path):
    class Length(Task):
        def reward(self, text, row):
            return float(len(text) == row["n"])

    (tmp_path / "a.jsonl").write_text('{"n": 2, "more": null}')
    assert read_rows(str(tmp_path / "a.jsonl"), "length") == [{"n": 2, "more": None}]
    assert own_tasks["length"].correct("ab", {"n": 2})
    with pytest.raises(ValueError, match="--data"):
        own_tasks["length"].rows("train")


def test_an_easier_sudoku_is_a_few_lines(own_tasks):
    class Toy(Sudoku):
        fewest = 4
        most = 10

        def prompt(self, row):
            return row["puzzle"]

        def digits(self, text, find=extract):
            return super().digits(f"<answer>{text}</answer>")

    toy = own_tasks["toy"]
    rows = toy.rows("test")
    assert {row["puzzle"].count("0") for row in rows} == {*range(4, 11)}
    assert all(solve(row["puzzle"]) == [row["solution"]] for row in rows[:100])
    train = {row["solution"] for row in toy.rows("train")}
    assert not train & {row["solution"] for row in rows}
    assert toy.prompt(rows[0]) == rows[0]["puzzle"]
    for text, right in ((GRID, 2), (OTHER, 1), (GRID[:15], 1), ("4x4" + GRID, 0)):
        assert toy.cells(text, PUZZLE) == (right, 2)
        assert toy.reward(text, PUZZLE) == right
        assert toy.correct(text, PUZZLE) is (right == 2)
    assert toy.correct(OTHER, TWO_SOLUTIONS) and toy.reward(OTHER, TWO_SOLUTIONS) == 0


# ---- data files ----------------------------------------------------------------------------------
ASK = {"question": "a?", "answer": "7"}
LINES = {"question": 'a\n"b"', "answer": "#### 7"}
BREAKS = {"question": "\u2028\x85", "answer": "1"}
THREE = {"numbers": [30, 100, 93], "target": 23}
FOUR = {"numbers": [44, 19, 35, 7], "target": 98}
TWO = {"numbers": [4, 5], "target": 20}
SUDOKU_CSV = f"Puzzle,Solution\n{PUZZLE['puzzle']},{GRID}\n"
MATH_500 = '{"problem": "a?", "solution": "w", "answer": "7"}'
BLANK_END = '{"problem": "a?", "answer": 7, "level": 5}\n\n \n'
GOOD = [  # task, kind, content, the row
    pytest.param("countdown", "jsonl", '{"input": "30,100,93", "output": "23"}', THREE, id="d1"),
    pytest.param("countdown", "jsonl", '{"target": 98, "nums": [44, 19, 35, 7]}', FOUR, id="Pan"),
    pytest.param("countdown", "csv", 'nums,target\n"[4, 5]",20\n', TWO, id="a list in a field"),
    pytest.param("countdown", "csv", "nums,target\n4 5,20\n", TWO, id="spaces"),
    pytest.param("countdown", "jsonl", '{"nums": [4.0, "5"], "target": 20.0}', TWO, id="4.0"),
    pytest.param("sudoku", "csv", SUDOKU_CSV, PUZZLE, id="DTM's and SPG's sudoku"),
    pytest.param("sudoku", "jsonl", json.dumps(TWO_SOLUTIONS), TWO_SOLUTIONS, id="sudoku jsonl"),
    pytest.param("gsm8k", "jsonl", json.dumps(ROWS["gsm8k"]), ROWS["gsm8k"], id="gsm8k"),
    pytest.param("gsm8k", "jsonl", '{"question": "a?", "answer": 7}', ASK, id="a number"),
    pytest.param("gsm8k", "csv", 'question,answer\n"a\n""b""",#### 7\n', LINES, id="quotes"),
    pytest.param("math", "jsonl", '{"problem": "a?", "solution": "7"}', ASK, id="MATH"),
    pytest.param("math", "jsonl", MATH_500, ASK, id="MATH-500"),
    pytest.param("math", "jsonl", BLANK_END, ASK, id="extra column, blank end"),
    pytest.param("math", "jsonl", '{"problem": "\u2028\x85", "answer": "1"}', BREAKS, id="U+2028"),
    pytest.param(
        "math", "jsonl", '\ufeff{"problem": "a?", "answer": "7"}\r\n', ASK, id="BOM, CRLF"
    ),
    pytest.param("math", "csv", "\ufeffquestion,answer\r\na?,7\r\n\r\n", ASK, id="csv, BOM, CRLF"),
    pytest.param("math", "csv", "id, question, answer\n1,a?,7", ASK, id="extra column, spaces"),
]


@pytest.mark.parametrize("task, kind, content, row", GOOD)
def test_a_file_is_read(tmp_path, task, kind, content, row):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(content.encode())
    assert read_rows(str(path), task) == [row]


BAD = [  # task, kind, content, what the error says
    pytest.param("math", "csv", "question,answer\na,b,5\n", "line 2: 3 fields.*quotes", id="comma"),
    pytest.param("math", "csv", 'question,answer\n"a\nb",5\nc\n', "line 4: 1 fields", id="short"),
    pytest.param("math", "csv", 'problem,answer\n"' + "x" * 200_000, "line 2: ", id="open quote"),
    pytest.param("math", "csv", "answer,question,answer\n1,2,3", "line 1: two columns", id="twice"),
    pytest.param("math", "csv", "a?,7\nb?,8\n", "line 2: no question or problem", id="no header"),
    pytest.param("math", "csv", "question,answer\n", "no rows", id="only a header"),
    pytest.param("math", "csv", "", "no rows", id="empty csv"),
    pytest.param("math", "jsonl", " \n\n", "no rows", id="empty jsonl"),
    pytest.param("math", "jsonl", "question", "line 1: not JSON", id="text"),
    pytest.param("math", "jsonl", '{"question": "a"}', "no answer or solution", id="no answer"),
    pytest.param("math", "jsonl", '{"question": "a", "answer": ""}', "no answer", id="blank"),
    pytest.param("math", "txt", "{}", "jsonl or .csv", id="suffix"),
    pytest.param("chess", "jsonl", "{}", "no task 'chess'", id="task"),
]


@pytest.mark.parametrize("task, kind, content, message", BAD)
def test_a_bad_file_is_refused_in_a_sentence(tmp_path, task, kind, content, message):
    path = tmp_path / f"a.{kind}"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_rows(str(path), task)


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_another_encoding_is_named(tmp_path, kind, encoding):
    path = tmp_path / f"a.{kind}"
    path.write_bytes('{"question": "ask",\n "answer": "é"}'.encode(encoding))
    line = 1 if encoding == "utf-16" else 2
    with pytest.raises(ValueError, match=f"a.{kind}, line {line}: .*UTF-8"):
        read_rows(str(path), "math")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="none.csv: no such file"):
        read_rows(str(tmp_path / "none.csv"), "math")


VALUES = [  # task, column, a bad value of it, what the error says
    pytest.param("countdown", "numbers", [], "1 to 6", id="no numbers"),
    pytest.param("countdown", "numbers", [1] * 7, "1 to 6", id="7 numbers"),
    pytest.param("countdown", "numbers", {"a": 1}, "1 to 6", id="no list"),
    pytest.param("countdown", "numbers", [1.5, 2], "1.5 is not a whole", id="half"),
    pytest.param("countdown", "numbers", [True, 2], "True is not a whole", id="truth"),
    pytest.param("countdown", "numbers", [-1, 2], "negative", id="negative"),
    pytest.param("countdown", "target", "x", "'x' is not a whole", id="letter"),
    pytest.param("countdown", "target", 2.5, "2.5 is not a whole", id="target"),
    pytest.param("sudoku", "puzzle", "02", "puzzle is '02', not 16 digits", id="short puzzle"),
    pytest.param("sudoku", "puzzle", "0" * 17, "16 digits 0-4", id="long puzzle"),
    pytest.param("sudoku", "puzzle", "." * 16, "16 digits 0-4", id="points"),
    pytest.param("sudoku", "solution", OTHER, "does not solve", id="another solution"),
    pytest.param("sudoku", "solution", "0" + GRID[1:], "16 digits 1-4", id="not filled"),
    pytest.param("sudoku", "solution", " " + GRID, "16 digits 1-4", id="space"),
    pytest.param("gsm8k", "answer", "?", r"ends in '\?', not in a number", id="no number"),
    pytest.param("gsm8k", "answer", [5], "not text", id="list"),
    pytest.param("math", "answer", True, "not text", id="true"),
    pytest.param("math", "question", 7, "question is 7, not text", id="question"),
]


@pytest.mark.parametrize("task, column, value, message", VALUES)
def test_a_bad_value_is_named_with_its_line(tmp_path, task, column, value, message):
    path = tmp_path / "a.jsonl"
    good = json.dumps(ROWS[task])
    path.write_text("\n".join([good, json.dumps(ROWS[task] | {column: value}), good]))
    with pytest.raises(ValueError, match=f"a.jsonl, line 2: .*{message}"):
        read_rows(str(path), task)


@pytest.mark.parametrize("record", ["{", "[]", "7", "null", "", '"a"', "[" * 100_000])
def test_a_line_that_is_no_record_is_named(tmp_path, record):
    path = tmp_path / "a.jsonl"
    good = json.dumps(ROWS["countdown"])
    path.write_text("\n".join([good, record, good]))
    with pytest.raises(ValueError, match="a.jsonl, line 2: (not )?JSON"):
        read_rows(str(path), "countdown")
