"""The tasks of `llada_finetune.py`: their rows, prompts and rewards, and the files of rows.

A task is one subclass of `Task`. In what follows a row is one question with what its reward needs
to know, and a text is a completion of the model, as a string.
"""

import ast
import csv
import functools
import itertools
import json
import random
import re
from fractions import Fraction
from operator import add, mul, sub, truediv
from pathlib import Path

import torch

from dtm import check
from llada.answers import answers_match, extract, final_answer, last_box

# The Countdown settings are those of the authors' code. The settings for mathematics are ours: they
# leave room for longer prompts, and take smaller steps h because the rewards are larger.
COUNTDOWN = dict(h=6.0, steps_per_h=1200, prompts=40, completions=6, refresh=10, refresh_steps=25)
COUNTDOWN |= dict(chunk=30, temperature=1.0, prompt_length=172, batch=12, accum=8)
COUNTDOWN |= dict(lr=4e-6, lr_min=2e-6, clip=2.0, ema=0.95)
MATHS = COUNTDOWN | dict(h=2.0, a_end=30.0, steps_per_h=300, prompt_length=700, batch=6, accum=16)

# Every prompt but a user's asks for this form.
FORMAT = (
    "Think first, then answer, in exactly this form with each tag on its own line:\n"
    "<reasoning>\nyour reasoning\n</reasoning>\n<answer>\nyour answer\n</answer>\n\n"
)


ROWS_FLAGS = "pass --data FILE.jsonl to train, --test_data FILE.jsonl to eval"
TASKS: dict[str, "Task"] = {}


class Task:
    """A kind of question and its reward.

    To add a task, write a subclass. Its name in lower case becomes the value of --task.

    top         the largest reward
    columns     the keys of a row, each with the names that files use for it
    preset      changes to the default settings of a run
    generated   True if this file makes the rows; then scores compare with no published table
    cells       a method (text, row) -> (right, all) if an answer has parts, else None
    """

    top = 1.0
    columns: dict[str, tuple[str, ...]] = {}
    preset: dict = {}
    generated = False
    cells = None

    def __init_subclass__(cls):
        TASKS[cls.__name__.lower()] = cls()

    def rows(self, split: str) -> list[dict]:
        """Return the rows of the split "train", "valid" or "test"."""
        raise ValueError(f"The task {type(self).__name__} has no rows of its own: {ROWS_FLAGS}.")

    def clean(self, record: dict) -> dict:
        """Return a record of a file as a row, or raise ValueError with what is wrong with it."""
        return record

    def prompt(self, row: dict) -> str:
        """Return the question that the model is asked."""
        raise NotImplementedError

    def reward(self, text: str, row: dict) -> float:
        """Return what training maximises, a number between 0 and `top`."""
        raise NotImplementedError

    def correct(self, text: str, row: dict) -> bool:
        """Return whether the text answers the question. This is the metric of an evaluation."""
        return self.reward(text, row) == self.top

    def grade(self, text: str, row: dict) -> tuple[float, float]:
        """Return the reward, and 1 if the text is correct, else 0.

        Raise RuntimeError with the text if the code of the task fails, or returns a reward that is
        larger than `top` or is not a number.
        """
        try:
            reward, solved = float(self.reward(text, row)), float(self.correct(text, row))
            check(reward <= self.top, f"The reward {reward} is not a number up to {self.top}.")
        except Exception as error:
            name = type(self).__name__
            raise RuntimeError(f"{name} cannot grade {text!r:.99}: {error}") from error
        return reward, solved


def cut(rows: list, split: str) -> list:
    """Return the split "valid", a fixed tenth of the rows (at most 256), or "train", the others."""
    shuffled = random.Random(0).sample(rows, len(rows))
    size = min(256, len(rows) // 10)
    return shuffled[:size] if split == "valid" else shuffled[size:]


# ---- Countdown -----------------------------------------------------------------------------------
# Signs that completions use for the four operations.
LATEX_SIGNS = {r"\times": "*", r"\cdot": "*", "×": "*", "·": "*", "x": "*"}
LATEX_SIGNS |= {r"\div": "/", "÷": "/", "−": "-"}
OPERATIONS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv}


def arithmetic(text: str) -> tuple[Fraction, list[int]] | None:
    """Return the value and the numbers of an expression, or None if it is not one.

    An expression has integers, + - * / and parentheses, and at most 100 characters. The text is
    parsed and never run; without powers nothing in it can grow large.
    """
    numbers = []

    def value(node):
        if isinstance(node, ast.Constant):
            numbers.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        return OPERATIONS[type(node.op)](value(node.left), value(node.right))

    if len(text) > 100 or not re.fullmatch(r"[0-9+\-*/()\s]+", text):
        return None
    not_arithmetic = (SyntaxError, ValueError, KeyError, AttributeError, ZeroDivisionError)
    try:
        return value(ast.parse(" ".join(text.split()), mode="eval").body), numbers
    except (*not_arithmetic, MemoryError, RecursionError):
        return None


@functools.cache
def countdown_problems() -> list[dict]:
    """Return 20,512 different problems, each with three numbers and a target from 1 to 100.

    The target is the value of a random expression in the numbers, so every problem has a solution.
    """
    draw = random.Random(0)
    rows = {}
    while len(rows) < 20512:
        a, b, c = numbers = [draw.randint(1, 100) for _ in range(3)]
        p, q = draw.choices("+-*/", k=2)
        got = arithmetic(draw.choice((f"({a}{p}{b}){q}{c}", f"{a}{p}({b}{q}{c})")))
        if got and got[0].denominator == 1 and 1 <= got[0] <= 100:
            row = {"numbers": draw.sample(numbers, 3), "target": int(got[0])}
            rows[(*sorted(numbers), got[0])] = row
    return [*rows.values()]


def integer(value) -> int:
    """Return the integer that a file writes as 4, 4.0 or "4"."""
    is_integer = re.fullmatch(r"\s*-?\d{1,9}(\.0*)?\s*", str(value), re.A) is not None
    check(is_integer, f"{value!r:.60} is not a whole number of at most nine digits.")
    return int(float(value))


class Countdown(Task):
    """Reach the target by an expression that has every number once.

    The reward is 1 for a solution, 0.1 for another answer between tags, and 0 for none.
    """

    preset = COUNTDOWN
    generated = True
    columns = {"numbers": ("numbers", "nums", "input"), "target": ("target", "output")}

    def rows(self, split):
        bounds = {"test": slice(256), "valid": slice(256, 512), "train": slice(512, None)}
        return countdown_problems()[bounds[split]]

    def clean(self, record):
        numbers = record["numbers"]
        if isinstance(numbers, str):
            numbers = re.findall(r"[^\s,\[\]]+", numbers)
        is_list = isinstance(numbers, list) and 1 <= len(numbers) <= 6
        check(is_list, f"numbers is {numbers!r:.60}, not a list of 1 to 6 numbers.")
        row = {"numbers": [*map(integer, numbers)], "target": integer(record["target"])}
        check(min(row["numbers"]) >= 0, f"numbers is {numbers}, but none may be negative.")
        return row

    def prompt(self, row):
        return (
            f"{FORMAT}Use only the numbers {row['numbers']} to make exactly {row['target']}. Use "
            "each number once, with + - * / and parentheses. Put just the expression, no equals "
            "sign, between the answer tags. Example: [2, 3, 4] and 5 give\n"
            "<answer>\n2*4-3\n</answer>"
        )

    def reaches(self, answer, row):
        """Return whether an expression is a solution.

        It may be written in LaTeX, and the target may stand before or after it: 5 = 2 * 4 - 3.
        """
        answer = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))", answer)
        answer = re.sub(r"\\left|\\right|\\[()\[\]]|\$", "", answer)
        for sign, plain in LATEX_SIGNS.items():
            answer = answer.replace(sign, plain)
        sides = [side.strip(" \n.>*") for side in answer.split("=")]
        if sides[0] == str(row["target"]) and len(sides) > 1:
            del sides[0]
        got = arithmetic(sides[0])
        return bool(got) and got[0] == row["target"] and sorted(got[1]) == sorted(row["numbers"])

    def reward(self, text, row):
        answer = extract(text)
        if answer is None:
            return 0.0
        return 1.0 if self.reaches(answer, row) else 0.1

    def correct(self, text, row):
        return self.reaches(final_answer(text) or "", row)


# ---- Sudoku --------------------------------------------------------------------------------------
# The rows, columns and boxes of the 16 cells.
GROUPS = [[*range(i, i + 4)] for i in (0, 4, 8, 12)]
GROUPS += [[*range(i, 16, 4)] for i in range(4)]
GROUPS += [[i, i + 1, i + 4, i + 5] for i in (0, 2, 8, 10)]


def is_grid(digits: str) -> bool:
    """Return whether no row, column or box holds a digit twice; `digits` may be the first cells."""
    for group in GROUPS:
        filled = [digits[i] for i in group if i < len(digits)]
        if len({*filled}) < len(filled):
            return False
    return True


@functools.cache
def sudoku_grids() -> list[str]:
    """Return all 288 grids in a fixed random order.

    The first 176 are for training, the next 24 for validation, and the last 88 for the test.
    """
    rows = ["".join(row) for row in itertools.permutations("1234")]
    grids = [""]
    for _ in range(4):
        longer = [grid + row for grid, row in itertools.product(grids, rows)]
        grids = [grid for grid in longer if is_grid(grid)]
    return random.Random(0).sample(grids, 288)


@functools.cache
def sudoku_rows(split: str, fewest: int, most: int) -> list[dict]:
    """Return 20,000 puzzles for training, 256 for another split, all different.

    Each has from `fewest` to `most` empty cells and exactly one solution. No solution is in two
    splits.
    """
    grids = sudoku_grids()
    pool = {"train": grids[:176], "valid": grids[176:200], "test": grids[200:]}[split]
    table = torch.tensor([[*map(int, grid)] for grid in grids], dtype=torch.int8)
    draw = random.Random(split)
    rows = {}
    while len(rows) < (20000 if split == "train" else 256):
        solution = draw.choice(pool)
        holes = {*draw.sample(range(16), draw.randint(fewest, most))}
        clues = [i for i in range(16) if i not in holes]
        agree = table[:, clues] == table[grids.index(solution), clues]
        if agree.all(1).sum() == 1:
            puzzle = "".join("0" if i in holes else digit for i, digit in enumerate(solution))
            rows[puzzle] = {"puzzle": puzzle, "solution": solution}
    return [*rows.values()]


def sudoku_worked(row: dict) -> str:
    """Return a worked example: the rows, then one cell after another, then the grid.

    The next cell is the one with the fewest digits left.
    """
    grid = [*row["puzzle"]]
    lines = ["Rows: " + " | ".join(row["puzzle"][i : i + 4] for i in range(0, 16, 4))]
    while "0" in grid:
        left = {}
        for i in range(16):
            if grid[i] == "0":
                seen = itertools.chain(*(group for group in GROUPS if i in group))
                left[i] = {*"1234"} - {grid[j] for j in seen}
        i = min(left, key=lambda cell: len(left[cell]))
        grid[i] = row["solution"][i]
        why = f"only {grid[i]} is left." if len(left[i]) == 1 else f"try {grid[i]}; it works out."
        lines.append(f"Row {i // 4 + 1}, column {i % 4 + 1}: {why}")
    steps = "\n".join(lines)
    return f"<reasoning>\n{steps}\n</reasoning>\n<answer>\n{''.join(grid)}\n</answer>"


class Sudoku(Task):
    """Fill a 4 x 4 grid.

    The reward is twice the share of the empty cells that hold the digit of the stored solution. The
    metric accepts every valid grid that keeps the clues.
    """

    top = 2.0
    generated = True
    columns = {"puzzle": ("puzzle", "Puzzle"), "solution": ("solution", "Solution")}
    fewest = 7
    most = 12

    def rows(self, split):
        return sudoku_rows(split, self.fewest, self.most)

    def clean(self, record):
        row = {key: str(record[key]) for key in self.columns}
        for key, digits in (("puzzle", "0-4"), ("solution", "1-4")):
            is_grid_of_digits = re.fullmatch(f"[{digits}]{{16}}", row[key]) is not None
            check(is_grid_of_digits, f"{key} is {record[key]!r:.60}, not 16 digits {digits}.")
        solved = self.solves(row["solution"], row["puzzle"])
        check(solved, f"The solution {row['solution']} does not solve {row['puzzle']}.")
        return row

    def prompt(self, row):
        ask = "Question: Solve the following Sudoku puzzle: {}\nAnswer:"
        shots = ""
        for shot in sudoku_rows("train", self.fewest, self.most)[:3]:
            shots += f"{ask.format(shot['puzzle'])}\n{sudoku_worked(shot)}\n\n"
        return (
            f"{FORMAT}Solve a 4x4 Sudoku, given row by row as 16 digits with 0 for an empty cell. "
            "Every row, column and 2x2 box must hold 1, 2, 3 and 4. Answer with the 16 digits of "
            f"the full grid.\n\n{shots}{ask.format(row['puzzle'])}"
        )

    def digits(self, text, find=extract):
        """Return the first 16 digits of the answer that `find` finds, filled up with 0."""
        return re.sub("[^0-9]", "", find(text) or "")[:16].ljust(16, "0")

    def solves(self, grid, puzzle):
        """Return whether a grid is valid and keeps the clues of the puzzle."""
        keeps = all(clue in ("0", digit) for clue, digit in zip(puzzle, grid, strict=True))
        return keeps and {*grid} == {*"1234"} and is_grid(grid)

    def count(self, grid, row):
        """Return how many empty cells hold the solution's digit, and how many are empty."""
        empty = [i for i in range(16) if row["puzzle"][i] == "0"]
        return sum(grid[i] == row["solution"][i] for i in empty), len(empty)

    def cells(self, text, row):
        """Return what `count` returns for the answer that the metric sees."""
        return self.count(self.digits(text, final_answer), row)

    def reward(self, text, row):
        grid = self.digits(text)
        right, empty = self.count(grid, row)
        if not empty:
            return self.top * self.solves(grid, row["puzzle"])
        return self.top * right / empty

    def correct(self, text, row):
        return self.solves(self.digits(text, final_answer), row["puzzle"])


# ---- GSM8K and MATH ------------------------------------------------------------------------------
# What earns the reward for a number: 42, $1,234.50, 3/4, 60%.
NUMBER = r"-?\s*(\\?\$)?\s*-?(\d[\d,]*)?\.?\d+(\s*/\s*\d+)?\.?\s*(\\?%)?"


def hub_rows(name: str, part: str | None, split: str, question: str, answer: str) -> list[dict]:
    """Return the rows of a data set of the Hugging Face hub.

    name, part         the name and the configuration of the data set
    question, answer   its names for these columns
    """
    advice = f"check the network, pip install datasets, or {ROWS_FLAGS}"
    try:
        from datasets import load_dataset

        records = load_dataset(name, part, split=split)
    except Exception as error:
        raise ValueError(
            f"{name} cannot be loaded from the hub ({error!r:.80}): {advice}."
        ) from error
    return [{"question": record[question], "answer": record[answer]} for record in records]


class Math(Task):
    """Competition mathematics.

    The reward is 0.25, with 2 more for a right answer, 0.5 for a closed <answer>, and 0.25 for a
    box. A row's answer may be a whole solution that ends in a box or in "#### 18".
    """

    top = 3.0
    preset = MATHS
    columns = {"question": ("question", "problem"), "answer": ("answer", "solution")}
    ask = FORMAT + (
        "You are a math expert. Put the final answer in \\boxed{} between the answer tags.\n\n"
    )

    def rows(self, split):
        if split == "test":
            return hub_rows("HuggingFaceH4/MATH-500", None, "test", "problem", "answer")
        return cut(hub_rows("ankner/math-500", None, "train", "problem", "solution"), split)

    def clean(self, record):
        for key, value in record.items():
            kinds = (str, int, float) if key == "answer" else (str,)
            check(type(value) in kinds, f"{key} is {value!r:.60}, not text.")
        return {"question": record["question"], "answer": str(record["answer"]).strip()}

    def prompt(self, row):
        return self.ask + row["question"]

    def right(self, answer, row):
        """Return whether an answer is the row's."""
        return answers_match(str(row["answer"]), answer)

    def reward(self, text, row):
        form = 0.25 + 0.5 * (extract(text) is not None) + 0.25 * (last_box(text) is not None)
        return form + 2.0 * self.right(extract(text, box_anywhere=True), row)

    def correct(self, text, row):
        return self.right(final_answer(text), row)


class GSM8K(Math):
    """School mathematics.

    The reward is 2 for a right answer, 0.5 for an answer that is a number, and up to 1.5 for tags.
    """

    top = 4.0
    ask = FORMAT

    def rows(self, split):
        rows = hub_rows(
            "openai/gsm8k", "main", split.replace("valid", "train"), "question", "answer"
        )
        return rows if split == "test" else cut(rows, split)

    def clean(self, record):
        row = super().clean(record)
        gold = row["answer"].rpartition("####")[2].strip()
        number = re.fullmatch(NUMBER, gold, re.A) is not None
        check(number, f"answer ends in {gold!r:.60}, not in a number.")
        return row

    def form(self, text):
        """Return the reward of the tags.

        Each of the four tags earns 0.125 if it occurs once, on a line of its own. Tags in the right
        order earn 0.5, and exactly the form that the prompt asks for earns 0.5 more. Each character
        after the last tag costs 0.001.
        """
        score = 0.0
        for tag in ("<reasoning>", "</reasoning>", "<answer>", "</answer>"):
            alone = re.search(rf"^[ \t]*{tag}[ \t]*$", text, re.M)
            score += 0.125 * (alone is not None and text.count(tag) == 1)
        if "</answer>" in text:
            score -= 0.001 * len(text.rpartition("</answer>")[2].strip())
        opens, turns, closes = "<reasoning>\n", "\n</reasoning>\n<answer>\n", "\n</answer>"
        whole = text.strip()
        strict = whole.startswith(opens) and whole.endswith(closes)
        strict = strict and turns in whole[len(opens) : -len(closes)]
        opened = text.partition("<reasoning>")[2]
        answer = re.split(r"</reasoning>\s*<answer>", opened, maxsplit=1)[1:]
        score += 0.5 * any("</answer>" in part for part in answer)
        return score + 0.5 * strict

    def reward(self, text, row):
        number = re.fullmatch(NUMBER, extract(text) or "", re.A)
        right = self.right(extract(text, box_anywhere=True), row)
        return max(0.0, self.form(text) + 0.5 * bool(number) + 2.0 * right)


# ---- Files of rows -------------------------------------------------------------------------------
def json_record(line: str) -> dict:
    """Return the record on a line of a .jsonl file."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"This is not JSON ({error}).") from None
    check(isinstance(record, dict), "This is JSON, but not an object with named values.")
    return record


def csv_record(header: list[str], cells: list[str]) -> dict:
    """Return the record on a line of a .csv file."""
    counts = f"There are {len(cells)} fields under a header of {len(header)}."
    check(len(cells) == len(header), f"{counts} Put a field that has a comma in quotes.")
    return dict(zip(header, cells, strict=True))


def task_row(task: Task, record: dict) -> dict:
    """Return a record as a row of the task, with its values under the task's names and checked."""
    row = {}
    for key, names in task.columns.items():
        found = [record[name] for name in names if record.get(name) not in (None, "")]
        has = ", ".join(map(str, record))
        check(bool(found), f"There is no value for {' or '.join(names)} in the columns {has}.")
        row[key] = found[0]
    return task.clean(row or record)


def read_text(path: str) -> str:
    """Return the text of a file in UTF-8, with or without a byte order mark."""
    content = Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").rstrip(" \t\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: This is not UTF-8; save the file in that encoding."
        ) from None


def read_rows(path: str, task: str) -> list[dict]:
    """Return the rows of a .jsonl or .csv file for one of TASKS, in the order of the file.

    Raise ValueError with the file, the line and the fault if a row is not one of the task.
    """
    check(task in TASKS, f"The task {task!r} is not one of {', '.join(TASKS)}.")
    is_csv = path.endswith(".csv")
    check(is_csv or path.endswith(".jsonl"), f"The name {path} does not end in .jsonl or .csv.")
    check(Path(path).is_file(), f"There is no file {path}.")
    text = read_text(path)
    lines = text.split("\n") if text else []
    table = csv.reader([f"{line}\n" for line in lines], strict=True)
    rows = []
    line = 1
    try:
        header = [name.strip() for name in next(table, [])] if is_csv else []
        check(len({*header}) == len(header), "Two columns of the header have the same name.")
        line += table.line_num
        for cells in table if is_csv else lines:
            record = csv_record(header, cells) if is_csv else json_record(cells)
            rows.append(task_row(TASKS[task], record))
            line = 1 + (table.line_num if is_csv else len(rows))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}, line {line}: {error}") from None
    check(bool(rows), f"{path} holds no rows.")
    return rows
