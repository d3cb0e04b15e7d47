"""The tasks of `llada_finetune.py`: their rows, prompts and rewards, and how a file is read.

A task is one subclass of `Task`.

    record   a line of a file before it is checked, as a dict
    row      a dict with a question and all that its reward needs
    text     a string that the model wrote

Two functions of `llada/answers.py` find the answer in a text. `reward`, which training maximises,
reads the answer strictly, by `extract`. `correct`, which an evaluation counts, reads it leniently,
by `final_answer`.
"""

import ast
import contextlib
import csv
import functools
import itertools
import json
import random
import re
from collections.abc import Iterator
from fractions import Fraction
from operator import add, mul, sub, truediv
from pathlib import Path

import torch

from dtm import check  # check(condition, message) raises ValueError(message)
from llada.answers import MathVerifyError, answers_match, extract, final_answer, last_box

# The keys of a preset are settings of `llada_finetune.py`, explained there. The settings for
# Countdown are those in the code of the authors of DTM. The settings for mathematics are ours: they
# leave room for longer prompts, and their increment h of the tilt is smaller, since h multiplies
# rewards that are larger there.
COUNTDOWN_PRESET = dict(
    h=6.0,
    steps_per_h=1200,
    prompts=40,
    completions=6,
    refresh=10,
    refresh_steps=25,
    chunk=30,
    temperature=1.0,
    prompt_length=172,
    batch=12,
    accum=8,
    lr=4e-6,
    lr_min=2e-6,
    clip=2.0,
    ema=0.95,
)
MATH_PRESET = COUNTDOWN_PRESET | dict(
    h=2.0,
    a_end=30.0,
    steps_per_h=300,
    prompt_length=700,
    batch=6,
    accum=16,
)

# The settings of the small model are ours. A prompt has 17 tokens: 16 digits and a start token.
TOY_PRESET = dict(
    model="",
    seed=0,
    h=8.0,
    a_end=40.0,
    ess=0.5,
    c="learned",
    normalize="batch",
    steps_per_h=60,
    prompts=1536,
    refresh=0,
    refresh_steps=0,
    chunk=128,
    gen_length=16,
    block=16,
    steps=16,
    temperature=1.0,
    order="top_prob",
    prompt_length=17,
    batch=256,
    accum=1,
    lr=3e-3,
    lr_min=3e-4,
    weight_decay=0.0,
    rank=16,
    alpha=16.0,
    dropout=0.0,
    save_every=60,
    eval_rows=256,
)

# The prompts of all tasks in this file except Toy ask for this form.
FORMAT = (
    "Think first, then answer, in exactly this form with each tag on its own line:\n"
    "<reasoning>\nyour reasoning\n</reasoning>\n<answer>\nyour answer\n</answer>\n\n"
)

DATA_ADVICE = "pass --data FILE.jsonl to train, --test_data FILE.jsonl to eval"
TASKS: dict[str, "Task"] = {}  # every task, by its name in lower case


def shortened(value: object) -> str:
    """Return a value as Python writes it, cut off after 80 characters, for an error message."""
    return f"{value!r:.80}"


class Task:
    """A kind of question and its reward.

    To add a task, write a subclass with `prompt` and `reward`, and with `columns` or `clean` if its
    files need it. The name of the class in lower case becomes the value of --task. The texts that
    its methods get end before the first end token. Negative rewards count as 0 in training.

    top         the largest reward
    columns     the keys of a row, each with the names that files use for it; empty: a row is the
                whole record
    preset      changes to the default settings of a run
    generated   True if this file makes the rows; then the scores are not comparable with
                published ones
    cells       None; or, where an answer can be partly right as in Sudoku, a method (text, row)
                that returns how many parts of the answer are right, and how many it has;
                evaluations report their share
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
        raise ValueError(f"The task {type(self).__name__} has no rows of its own: {DATA_ADVICE}.")

    def clean(self, record: dict) -> dict:
        """Return a record as a row, or raise ValueError with what is wrong with the record."""
        return record

    def prompt(self, row: dict) -> str:
        """Return the question that the model is asked."""
        raise NotImplementedError

    def reward(self, text: str, row: dict) -> float:
        """Return what training maximises, a number of at most `top`."""
        raise NotImplementedError

    def correct(self, text: str, row: dict) -> bool:
        """Return whether the text answers the question. This is the metric of an evaluation."""
        return self.reward(text, row) >= self.top * (1 - 1e-9)  # A sum may be rounded.

    def grade(self, text: str, row: dict) -> tuple[float, float]:
        """Return two numbers: the reward, and 1 or 0 for a correct or a wrong text.

        Raise RuntimeError with the text if the code of the task fails, or returns a reward that is
        larger than `top` or is not a number. Raise MathVerifyError if math-verify,
        the package that compares mathematical answers, is missing or does not start.
        """
        try:
            reward, solved = float(self.reward(text, row)), float(self.correct(text, row))
            fits = reward <= self.top * (1 + 1e-9)
            check(fits, f"The reward {reward} is not a number up to {self.top}.")
        except MathVerifyError:  # Neither the task nor the text is at fault.
            raise
        except Exception as error:
            name = type(self).__name__
            raise RuntimeError(f"{name} cannot grade {shortened(text)}: {error}") from error
        return reward, solved


def cut(rows: list, split: str) -> list:
    """Return one split of the rows.

    "valid" is a fixed tenth of them, at most 256, and "train" is the rest.
    """
    shuffled = random.Random(0).sample(rows, len(rows))
    size = min(256, len(rows) // 10)
    return shuffled[:size] if split == "valid" else shuffled[size:]


# ---- Countdown -----------------------------------------------------------------------------------
# Texts may use these signs for Python's operators.
OPERATOR_SIGNS = {
    r"\times": "*",
    r"\cdot": "*",
    "×": "*",
    "·": "*",
    "x": "*",
    r"\div": "/",
    "÷": "/",
    "−": "-",
}
OPERATIONS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv}


def evaluate_expression(text: str) -> tuple[Fraction | None, list[int]]:
    """Return the value of an expression and its numbers, or (None, []) if the text is none.

    An expression has integers, + - * / and parentheses, and at most 100 characters. The text is
    parsed and never run.
    """
    used = []

    def evaluate(node):
        if isinstance(node, ast.Constant):
            used.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -evaluate(node.operand)
        # ** and // do no harm: OPERATIONS lacks them, so KeyError comes before any computation.
        operation = OPERATIONS[type(node.op)]
        return operation(evaluate(node.left), evaluate(node.right))

    if len(text) > 100 or not re.fullmatch(r"[0-9+\-*/()\s]+", text):
        return None, []
    not_an_expression = (SyntaxError, ValueError, KeyError, AttributeError, ZeroDivisionError)
    try:
        return evaluate(ast.parse(" ".join(text.split()), mode="eval").body), used
    except (*not_an_expression, MemoryError, RecursionError):
        return None, []


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
        expression = draw.choice((f"({a}{p}{b}){q}{c}", f"{a}{p}({b}{q}{c})"))
        value, _ = evaluate_expression(expression)
        if value is not None and value.denominator == 1 and 1 <= value <= 100:
            row = {"numbers": draw.sample(numbers, 3), "target": int(value)}
            rows[(*sorted(numbers), value)] = row
    return [*rows.values()]


def read_integer(value: object) -> int:
    """Return the integer that a file writes as 4, 4.0 or "4"."""
    is_integer = re.fullmatch(r"\s*-?\d{1,9}(\.0*)?\s*", str(value), re.A) is not None
    check(is_integer, f"{shortened(value)} is not a whole number of at most nine digits.")
    return int(float(value))


class Countdown(Task):
    """Make the target from the numbers, by an expression that uses each of them once.

    The reward is 1 for a solution, 0.1 for another answer between tags, and 0 for no or an empty
    answer.
    """

    preset = COUNTDOWN_PRESET
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
        check(is_list, f"numbers is {shortened(numbers)}, not a list of 1 to 6 numbers.")
        row = {
            "numbers": [read_integer(number) for number in numbers],
            "target": read_integer(record["target"]),
        }
        check(min(row["numbers"]) >= 0, f"numbers is {numbers}, but none may be negative.")
        return row

    def prompt(self, row):
        return (
            f"{FORMAT}Use only the numbers {row['numbers']} to make exactly {row['target']}. Use "
            "each number once, with + - * / and parentheses. Put just the expression, no equals "
            "sign, between the answer tags. Example: [2, 3, 4] and 5 give\n"
            "<answer>\n2*4-3\n</answer>"
        )

    def is_solution(self, answer, row):
        """Return whether an answer is an expression that solves the row.

        It may be written in LaTeX. The target, but no other number, may stand before or after it,
        as in 5 = 2 * 4 - 3.
        """
        # \frac{a}{b} becomes ((a)/(b)).
        answer = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))", answer)
        answer = re.sub(r"\\left|\\right|\\[()\[\]]|\$", "", answer)
        for sign, plain in OPERATOR_SIGNS.items():
            answer = answer.replace(sign, plain)
        # Markdown may stand around a side, as in **5** or > 5, and a full stop behind it.
        sides = [side.strip(" \n.>*") for side in answer.split("=")]
        if sides[0] == str(row["target"]) and len(sides) > 1:
            del sides[0]
        value, used = evaluate_expression(sides[0])
        wrong = any(re.fullmatch(r"-?\d+", s) and int(s) != row["target"] for s in sides[1:])
        return value == row["target"] and sorted(used) == sorted(row["numbers"]) and not wrong

    def reward(self, text, row):
        answer = extract(text)
        if not answer:
            return 0.0
        return 1.0 if self.is_solution(answer, row) else 0.1

    def correct(self, text, row):
        return self.is_solution(final_answer(text) or "", row)


# ---- Sudoku --------------------------------------------------------------------------------------
# The cells of a 4 x 4 grid are numbered 0 to 15, row by row. Each group is a row, a column or a
# box.
GROUPS = [
    *([i, i + 1, i + 2, i + 3] for i in (0, 4, 8, 12)),
    *([i, i + 4, i + 8, i + 12] for i in (0, 1, 2, 3)),
    *([i, i + 1, i + 4, i + 5] for i in (0, 2, 8, 10)),
]


def has_no_repeat(digits: str) -> bool:
    """Return whether no row, column or box holds a digit twice.

    digits   the digits of a grid row by row, or of its first cells
    """
    for group in GROUPS:
        filled = [digits[i] for i in group if i < len(digits)]
        if len({*filled}) < len(filled):
            return False
    return True


@functools.cache
def sudoku_grids() -> list[str]:
    """Return all 288 complete grids in a fixed random order.

    The first 176 are for training, the next 24 for validation, and the last 88 for the test.
    """
    rows = ["".join(row) for row in itertools.permutations("1234")]
    grids = [""]
    for _ in range(4):
        longer = [grid + row for grid, row in itertools.product(grids, rows)]
        grids = [grid for grid in longer if has_no_repeat(grid)]
    return random.Random(0).sample(grids, 288)


@functools.cache
def sudoku_rows(split: str, fewest: int, most: int) -> list[dict]:
    """Return 20,000 puzzles for training or 256 for another split, all different.

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
        if agree.all(1).sum() == 1:  # Only one of the 288 grids has these clues.
            puzzle = "".join("0" if i in holes else digit for i, digit in enumerate(solution))
            rows[puzzle] = {"puzzle": puzzle, "solution": solution}
    return [*rows.values()]


def sudoku_example(row: dict) -> str:
    """Return a worked example: a puzzle's solution in the form that the prompt asks for.

    It lists the rows, fills one cell after another, and ends with the full grid. The next cell is
    always the one for which the fewest digits are possible.
    """
    grid = [*row["puzzle"]]
    lines = ["Rows: " + " | ".join(row["puzzle"][i : i + 4] for i in range(0, 16, 4))]
    while "0" in grid:
        possible = {}
        for i in range(16):
            if grid[i] == "0":
                seen = itertools.chain(*(group for group in GROUPS if i in group))
                possible[i] = {*"1234"} - {grid[j] for j in seen}
        i = min(possible, key=lambda cell: len(possible[cell]))
        digit = grid[i] = row["solution"][i]
        why = f"only {digit} is left." if len(possible[i]) == 1 else f"try {digit}; it works out."
        lines.append(f"Row {i // 4 + 1}, column {i % 4 + 1}: {why}")
    steps = "\n".join(lines)
    return f"<reasoning>\n{steps}\n</reasoning>\n<answer>\n{''.join(grid)}\n</answer>"


class Sudoku(Task):
    """Fill the empty cells of a 4 x 4 grid.

    The reward is twice the share of the empty cells that hold the solution's digit. The
    metric accepts every valid grid that keeps the clues.

    fewest, most   the least and the largest number of empty cells in a generated puzzle
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
            check(is_grid_of_digits, f"{key} is {shortened(record[key])}, not 16 digits {digits}.")
        solved = self.solves(row["solution"], row["puzzle"])
        check(solved, f"The solution {row['solution']} does not solve {row['puzzle']}.")
        return row

    def prompt(self, row):
        question = "Question: Solve the following Sudoku puzzle: {}\nAnswer:"
        examples = ""
        for example in sudoku_rows("train", self.fewest, self.most)[:3]:
            examples += f"{question.format(example['puzzle'])}\n{sudoku_example(example)}\n\n"
        return (
            f"{FORMAT}Solve a 4x4 Sudoku, given row by row as 16 digits with 0 for an empty cell. "
            "Every row, column and 2x2 box must hold 1, 2, 3 and 4. Answer with the 16 digits of "
            f"the full grid.\n\n{examples}{question.format(row['puzzle'])}"
        )

    def digits(self, text, find=extract):
        """Return the first 16 digits of the answer, filled up with 0.

        find   the function that finds the answer in the text, `extract` or `final_answer`
        """
        return re.sub("[^0-9]", "", find(text) or "")[:16].ljust(16, "0")

    def solves(self, grid, puzzle):
        """Return whether a grid is valid and keeps the clues of the puzzle."""
        keeps = all(clue in ("0", digit) for clue, digit in zip(puzzle, grid, strict=True))
        return keeps and {*grid} == {*"1234"} and has_no_repeat(grid)

    def count_right(self, grid, row):
        """Return how many of the puzzle's empty cells are right, and how many it has."""
        empty = [i for i in range(16) if row["puzzle"][i] == "0"]
        return sum(grid[i] == row["solution"][i] for i in empty), len(empty)

    def cells(self, text, row):
        """Return the result of `count_right` for the answer that the metric reads."""
        return self.count_right(self.digits(text, final_answer), row)

    def reward(self, text, row):
        grid = self.digits(text)
        right, empty = self.count_right(grid, row)
        if not empty:  # a puzzle without empty cells
            return self.top * self.solves(grid, row["puzzle"])
        return self.top * right / empty

    def correct(self, text, row):
        return self.solves(self.digits(text, final_answer), row["puzzle"])


class Toy(Sudoku):
    """Fill in 4 x 4 Sudokus with few empty cells: the task of the small LLaDA.

    Its vocabulary is single characters. The prompt is the puzzle, and the completion is the grid,
    without instructions and tags. The small LLaDA is made by figures/toy_llada.py.
    """

    preset = TOY_PRESET
    fewest = 4
    most = 10

    def prompt(self, row):
        return row["puzzle"]

    def digits(self, text, find=extract):
        return super().digits(f"<answer>{text}</answer>", find)


# ---- GSM8K and MATH ------------------------------------------------------------------------------
# GSM8K rewards an answer that is a number, such as 42, $1,234.50, 3/4 or 60%.
REWARDED_NUMBER = r"-?\s*(\\?\$)?\s*-?(\d[\d,]*)?\.?\d+(\s*/\s*\d+)?\.?\s*(\\?%)?"


def hub_rows(
    name: str, configuration: str | None, split: str, *, question: str, answer: str
) -> list[dict]:
    """Return the rows of a data set of the Hugging Face hub.

    question, answer   the data set's names for these two columns
    """
    advice = f"check the network, pip install datasets, or {DATA_ADVICE}"
    try:
        from datasets import load_dataset

        records = load_dataset(name, configuration, split=split)
    except Exception as error:
        raise ValueError(
            f"{name} cannot be loaded from the hub ({shortened(error)}): {advice}."
        ) from error
    return [{"question": record[question], "answer": record[answer]} for record in records]


class Math(Task):
    """Solve problems from mathematics competitions.

    Every text earns 0.25. A right answer earns 2 more, a closed <answer> 0.5, and a box, which is
    \\boxed{...}, 0.25. A row's answer may be a whole solution that ends in a box or, as in GSM8K,
    in "#### 18".
    """

    top = 3.0
    preset = MATH_PRESET
    columns = {"question": ("question", "problem"), "answer": ("answer", "solution")}
    instructions = FORMAT + (
        "You are a math expert. Put the final answer in \\boxed{} between the answer tags.\n\n"
    )

    def rows(self, split):
        if split == "test":
            name = "HuggingFaceH4/MATH-500"
            return hub_rows(name, None, "test", question="problem", answer="answer")
        name = "ankner/math-500"  # the training set of the authors of DTM
        return cut(hub_rows(name, None, "train", question="problem", answer="solution"), split)

    def clean(self, record):
        for key, value in record.items():
            kinds = (str, int, float) if key == "answer" else (str,)
            # This compares types, because isinstance takes True for an int.
            check(type(value) in kinds, f"{key} is {shortened(value)}, not text.")
        return {"question": record["question"], "answer": str(record["answer"]).strip()}

    def prompt(self, row):
        return self.instructions + row["question"]

    def right(self, answer, row):
        """Return whether an answer equals the row's."""
        return answers_match(str(row["answer"]), answer)

    def reward(self, text, row):
        has_answer, has_box = extract(text) is not None, last_box(text) is not None
        form_reward = 0.25 + 0.5 * has_answer + 0.25 * has_box
        return form_reward + 2.0 * self.right(extract(text, box_anywhere=True), row)

    def correct(self, text, row):
        return self.right(final_answer(text), row)


class GSM8K(Math):
    """Solve word problems of school mathematics.

    The reward is a sum: 2 for a right answer, 0.5 for an answer that is a number, and up to 1.5 for
    tags.
    Characters after the last tag cost reward, but the reward is never negative.
    """

    top = 4.0
    instructions = FORMAT

    def rows(self, split):
        hub_split = "test" if split == "test" else "train"
        rows = hub_rows("openai/gsm8k", "main", hub_split, question="question", answer="answer")
        return rows if split == "test" else cut(rows, split)

    def clean(self, record):
        row = super().clean(record)
        gold = row["answer"].rpartition("####")[2].strip()
        is_number = re.fullmatch(REWARDED_NUMBER, gold, re.A) is not None
        check(is_number, f"answer ends in {shortened(gold)}, not in a number.")
        return row

    def form_reward(self, text):
        """Return the reward of the tags, a negative number if much follows the last of them.

        Each of the four tags earns 0.125 if it occurs once, on a line of its own. Tags in the right
        order earn 0.5, and exactly the form that the prompt asks for earns 0.5 more. Each character
        after the last tag costs 0.001.
        """
        score = 0.0
        for tag in ("<reasoning>", "</reasoning>", "<answer>", "</answer>"):
            on_own_line = re.search(rf"^[ \t]*{tag}[ \t]*$", text, re.M) is not None
            score += 0.125 * (on_own_line and text.count(tag) == 1)
        if "</answer>" in text:
            score -= 0.001 * len(text.rpartition("</answer>")[2].strip())
        rest = text.partition("<reasoning>")[2]
        in_order = re.search(r"</reasoning>\s*<answer>.*</answer>", rest, re.S) is not None
        before, between, after = "<reasoning>\n", "\n</reasoning>\n<answer>\n", "\n</answer>"
        text = text.strip()
        exact = text.startswith(before) and text.endswith(after)
        exact = exact and between in text[len(before) : -len(after)]
        return score + 0.5 * in_order + 0.5 * exact

    def reward(self, text, row):
        is_number = re.fullmatch(REWARDED_NUMBER, extract(text) or "", re.A) is not None
        right = self.right(extract(text, box_anywhere=True), row)
        return max(0.0, self.form_reward(text) + 0.5 * is_number + 2.0 * right)


# ---- Files of rows -------------------------------------------------------------------------------
@contextlib.contextmanager
def naming_line(line_number: int) -> Iterator[None]:
    """Within this context, an error about a record says on which line the record starts."""
    try:
        yield
    except (ValueError, csv.Error) as error:
        raise ValueError(f"line {line_number}: {error}") from None


def jsonl_records(text: str) -> Iterator[tuple[int, dict]]:
    """Yield the number of each line of a .jsonl file, and its record."""
    lines = text.split("\n") if text else []
    for line_number, line in enumerate(lines, 1):
        with naming_line(line_number):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"This is not JSON ({error}).") from None
            check(isinstance(record, dict), "This is JSON, but not an object with named values.")
        yield line_number, record


def csv_records(text: str) -> Iterator[tuple[int, dict]]:
    """Yield the number of the line on which each record of a .csv file starts, and the record."""
    table = csv.reader([f"{line}\n" for line in text.split("\n")], strict=True)
    with naming_line(1):
        header = [name.strip() for name in next(table)]
        check(len({*header}) == len(header), "Two columns of the header have the same name.")
    while True:
        line_number = table.line_num + 1
        with naming_line(line_number):
            cells = next(table, None)
            if cells is None:
                return
            counts = f"There are {len(cells)} fields under a header of {len(header)}."
            check(len(cells) == len(header), f"{counts} Put a field that has a comma in quotes.")
        yield line_number, dict(zip(header, cells, strict=True))


def task_row(task: Task, record: dict) -> dict:
    """Check a record and return it as a row, whose keys are the names that the task uses."""
    row = {}
    for key, names in task.columns.items():
        values = [record[name] for name in names if record.get(name) not in (None, "")]
        has = ", ".join(map(str, record))
        check(bool(values), f"There is no value for {' or '.join(names)} in the columns {has}.")
        row[key] = values[0]
    return task.clean(row or record)


def read_text(path: str) -> str:
    """Return the text of a UTF-8 file, without its byte order mark and the blanks at its end."""
    content = Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").rstrip(" \t\n")
    except UnicodeDecodeError as error:
        line_number = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"line {line_number}: This is not UTF-8; save the file in that encoding."
        ) from None


def read_rows(path: str, task_name: str) -> list[dict]:
    """Return the rows of a .jsonl or .csv file for one of TASKS, in the order of the file.

    Raise ValueError with the file, the line and the fault if a record is not a row of the task.
    """
    check(task_name in TASKS, f"The task {task_name!r} is not one of {', '.join(TASKS)}.")
    is_csv = path.endswith(".csv")
    check(is_csv or path.endswith(".jsonl"), f"The name {path} does not end in .jsonl or .csv.")
    check(Path(path).is_file(), f"There is no file {path}.")
    rows = []
    try:
        text = read_text(path)
        records = csv_records(text) if is_csv else jsonl_records(text)
        for line_number, record in records:
            with naming_line(line_number):
                rows.append(task_row(TASKS[task_name], record))
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from None
    check(bool(rows), f"{path} holds no rows.")
    return rows
