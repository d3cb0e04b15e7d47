"""Hostile answers for campaign.py: texts from a grammar, graded by all four tasks and checked by
references that share no code with figures/answers.py."""

import collections
import itertools
import random
import re
import resource
import signal
import time
from fractions import Fraction
from pathlib import Path

from figures.answers import ALGEBRA
from figures.tasks import TASKS

GOLDS = [r"\frac{1}{2}", "x^2+1", "(3,4)", r"2\sqrt{3}", "-7", r"\{1,2\}", "[0,1)", "x=5", "0.25"]
GOLDS += [r"\begin{pmatrix}1\\2\end{pmatrix}", "50\\%", r"\text{(B)}", "2^{10}", "1,234", "x<3"]
ATOMS = [*"0123456789", "12", "007", "1,234", "3.14", ".5", "1e999", "x", "y", "e", "i", "n", "pi"]
ATOMS += ["٣", "４２", "²", "Ⅷ", "½", "−1", "\x00", "\ud800", "🙂", "\u202e", "\r", "\n", " " * 9]
ATOMS += [r"\pi", r"\infty", r"\sqrt", r"\frac", r"\frac12", r"\binom", r"\text{cm}", r"\%", "$"]
ATOMS += [r"\pm", r"\cup", r"\left(", r"\right)", r"\begin{pmatrix}", r"\end{pmatrix}", r"\\", "&"]
MARKS = [*"+-*/^!=<>,;:.(){}[]|_~%'\"#@?\\", "**", "//", "<=", r"\le", r"\times", r"\cdot", r"\div"]
TAGS = ["<answer>", "</answer>", "<reasoning>", "</reasoning>", r"\boxed{", "}", "boxed{", "\n"]
TAGS += [r"\boxed {", r"\boxed{}", "<answer></answer>", "<ANSWER>", "</answer", "<answer", "####"]
SLOW = [r"\sin(\cos(\sin(x^{99}+1)))", "(x+1)^{99}", "9^{9^9}", "2^{99999}", "99999!", "99!!"]
SLOW += [r"\binom{999}{500}", r"\sqrt{2+\sqrt{3+\sqrt{5+\sqrt{7}}}}", "((x+y)^{9}+1)^{9}", "9^9^9"]
SLOW += [r"\frac{(x^{50}-1)(y^{50}-1)}{(x-1)(y-1)}", r"\sin(x)^{40}+\cos(x)^{40}", "(((2^9)^9)^9)"]
GIANTS = ["1", "(", r"\boxed{", r"\boxed{1}", "<answer>", "<answer>1</answer>", "{", "\\", "<", " "]
GIANTS += ["<reasoning></reasoning><answer>", r"\frac{", "1,", "-", "boxed{", "\x00", "=1", "^2"]
PATIENCE = 6  # seconds for an answer and a task: the algebra has 2, reward and metric ask it


class TooLong(BaseException):
    """Not an Exception, so that nothing on the way takes it for its own."""


def too_long(*_):
    raise TooLong


# ---- The grammar --------------------------------------------------------------------------------
def nest(draw: random.Random) -> str:
    opens, closes = draw.choice(("()", "{}", "[]", (r"\sqrt{", "}"), ("-(", ")"), ("2^{", "}")))
    depth = draw.choice((2, 9, 41, 120))
    return opens * depth + draw.choice(ATOMS) + closes * (depth - draw.randrange(2))


def junk(draw: random.Random) -> str:
    """Atoms and marks in any order."""
    pool = draw.choice((ATOMS, ATOMS + MARKS, ATOMS[:20] + MARKS[:7]))
    return "".join(draw.choices(pool, k=draw.randint(1, 14)))


def expression(draw: random.Random, depth: int = 2) -> str:
    if depth == 0 or draw.random() < 0.2:
        return draw.choice([*"0123456789xy", "12", "3.5", r"\pi"])
    left, right = expression(draw, depth - 1), expression(draw, depth - 1)
    shape = draw.choice(("{}+{}", "{}-{}", "{}{}", "({})({})", r"\frac{{{}}}{{{}}}", "{}/({})"))
    return shape.format(left, right)


def disorder(draw: random.Random) -> str:
    """Tags and boxes in any order, with something between them."""
    count = draw.randint(2, 9)
    return "".join(draw.choice(TAGS) + draw.choice((junk, solution))(draw) for _ in range(count))


def solution(draw: random.Random) -> str:
    """What may be right for some task: a grid, a sum, a number."""
    grid = draw.choice(GRIDS)
    kind = draw.randrange(4)
    if kind == 0:
        return " ".join(grid) if draw.random() < 0.5 else grid
    if kind == 1:
        return grid[: draw.randrange(17)] + grid[draw.randrange(17) :]
    return draw.choice(SOLVED) if kind == 2 else str(draw.randint(-99, 99))


def wrapped(draw: random.Random, inside: str) -> str:
    shapes = ["{}", "<answer>{}</answer>", "<answer>\n\\boxed{{{}}}\n</answer>", "\\boxed{{{}}}"]
    shapes += ["<reasoning>\nx\n</reasoning>\n<answer>\n{}\n</answer>", "<answer>{}", "\\boxed{{{}"]
    return draw.choice(shapes).format(inside)


def text_of(draw: random.Random) -> str:
    kinds = (junk, nest, expression, disorder, solution)
    made = draw.choices(kinds, (40, 8, 2, 30, 20))[0](draw)
    return made if draw.random() < 0.1 else wrapped(draw, made)


# ---- References ---------------------------------------------------------------------------------
def value_of(tokens: list[str]) -> Fraction:
    """By descent, which takes the tokens it has read off the list's end; IndexError: too short."""
    total = product_of(tokens)
    while tokens and tokens[-1] in "+-":
        sign = 1 if tokens.pop() == "+" else -1
        total += sign * product_of(tokens)
    return total


def product_of(tokens: list[str]) -> Fraction:
    total = factor_of(tokens)
    while tokens and tokens[-1] in "*/":
        divides = tokens.pop() == "/"
        other = factor_of(tokens)
        total = total / other if divides else total * other
    return total


def factor_of(tokens: list[str]) -> Fraction:
    token = tokens.pop()
    if token == "-":
        return -factor_of(tokens)
    if token != "(":
        return Fraction(token)
    total = value_of(tokens)
    if tokens.pop() != ")":
        raise ValueError("a bracket is open")
    return total


def reachable(numbers: tuple[Fraction, ...]) -> set[Fraction]:
    """Every value of an expression that uses each number once (by fractions, two at a time)."""
    if len(numbers) == 1:
        return {numbers[0], -numbers[0]}
    found = set()
    for a, b in itertools.permutations(range(len(numbers)), 2):
        rest = tuple(n for i, n in enumerate(numbers) if i not in (a, b))
        p, q = numbers[a], numbers[b]
        for value in {p + q, p - q, -p - q, p * q, -p * q, *({p / q, -p / q} if q else ())}:
            found |= reachable((*rest, value))
    return found


def countdown_holds(text: str, row: dict) -> bool:
    """Whether some stretch of a text is a solution."""
    wanted = sorted(row["numbers"])
    if row["target"] not in reachable(tuple(map(Fraction, wanted))):
        return False
    text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))", text)
    for sign, plain in ((r"\times", "*"), (r"\cdot", "*"), (r"\div", "/"), ("−", "-")):
        text = text.replace(sign, plain)
    text = re.sub(r"\\left|\\right|\\[()\[\]]|\$", "", text.replace("×", "*").replace("÷", "/"))
    for run in re.findall(r"[0-9+\-*/()\s]+", text):
        tokens = re.findall(r"[0-9]+|[-+*/()]", run)
        for start, end in itertools.combinations(range(len(tokens) + 1), 2):
            some = tokens[start:end]
            if sorted(int(t) for t in some if t.isdigit()) != wanted:
                continue
            if reaches(some, row["target"]):
                return True
    return False


def reaches(tokens: list[str], target: int) -> bool:
    left = tokens[::-1]
    try:
        return value_of(left) == target and not left
    except (ZeroDivisionError, IndexError, ValueError):
        return False


def sudoku_holds(text: str, row: dict) -> bool:
    """Whether 16 digits in a row, whatever lies between them, fill the puzzle."""
    digits = [character for character in text if character in "0123456789"]
    for start in range(len(digits) - 15):
        grid = digits[start : start + 16]
        lines = collections.defaultdict(set)
        for i, digit in enumerate(grid):
            y, x = divmod(i, 4)
            for line in (("row", y), ("column", x), ("box", y // 2, x // 2)):
                lines[line].add(digit)
        full = all(line == {"1", "2", "3", "4"} for line in lines.values())
        clues = zip(row["puzzle"], grid, strict=True)
        if full and all(clue in ("0", digit) for clue, digit in clues):
            return True
    return False


HOLDS = {"countdown": countdown_holds, "sudoku": sudoku_holds}


def countdown_text(draw: random.Random, row: dict) -> str:
    """An expression in the row's numbers: sometimes with one changed, seldom a solution."""
    numbers = [str(n) for n in draw.sample(row["numbers"], len(row["numbers"]))]
    if draw.random() < 0.2:
        numbers[0] = str(draw.randint(0, 100))
    while len(numbers) > 1:
        sign = draw.choice(["+", "-", "*", "/", " - ", r"\times", "÷", r"\frac"])
        a, b = draw.sample([numbers.pop(), numbers.pop()], 2)
        made = rf"\frac{{{a}}}{{{b}}}" if sign == r"\frac" else f"({a}{sign}{b})"
        numbers.append(made)
    ends = ["", f" = {row['target']}", "=", " .", " \n"]
    return numbers[0] + draw.choice(ends)


def solved(draw: random.Random, row: dict) -> str:
    """A solution, found by chance."""
    while not countdown_holds(text := countdown_text(draw, row), row):
        pass
    return text


def integer_text(draw: random.Random, n: int) -> str:
    """An integer as people write it."""
    digits = draw.choice((str(abs(n)), f"{abs(n):,}", f"{abs(n):,}".replace(",", "{,}")))
    sign = draw.choice(("-", "−", "- ")) if n < 0 else draw.choice(("", "", "+"))
    before = draw.choice(("", "", " ", r"\$", "$", "x = "))
    return f"{before}{sign}{digits}{draw.choice(('', '', '.', ' ', '$' if before == '$' else ''))}"


GRIDS = [row["solution"] for row in TASKS["sudoku"].rows("test")[:6]]
PROBLEMS = TASKS["countdown"].rows("test")[:6]
SOLVED = [solved(random.Random(0), row) for row in PROBLEMS]
PROBLEMS += [row | {"target": row["target"] + 1000} for row in PROBLEMS]  # most cannot be reached


# ---- The campaign -------------------------------------------------------------------------------
class Grader:
    """Grades texts, and keeps seconds and faults."""

    def __init__(self, part):
        self.part = part
        self.seconds: list[float] = []
        self.slowest: list[tuple[float, str]] = []
        self.memory = 0  # kB, the worker's peak
        self.right = collections.Counter()

    def grade(self, task: str, text: str, row: dict) -> tuple[float, float] | None:
        began = time.perf_counter()
        result = None
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        try:
            result = TASKS[task].grade(text, row)
            fault = "" if 0 <= result[0] <= TASKS[task].top else f"reward {result[0]}"
        except TooLong:
            self.look_at_worker()
            ALGEBRA.stop()
            fault = f"more than {PATIENCE} s"
        except Exception as error:
            fault = f"raises {error.__cause__!r:.150}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        took = time.perf_counter() - began
        self.seconds.append(took)
        if took > 0.5:
            self.look_at_worker()
            self.slowest.append((round(took, 2), f"{task}: {text[:80]!r} ({len(text)})"))
        self.part.hold(not fault, f"{task}, {len(text)} characters {text[:150]!r}: {fault}")
        return result

    def look_at_worker(self) -> None:
        """The most memory that the algebra's process has held."""
        status = Path(f"/proc/{ALGEBRA.pid}/status")
        found = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.is_file() else None
        self.memory = max(self.memory, int(found[1]) if found else 0)

    def check(self, text: str, rows: dict[str, dict]) -> None:
        """By all tasks; what sudoku or countdown calls right, the reference must, too."""
        for task, row in rows.items():
            result = self.grade(task, text, row)
            top = TASKS[task].top
            if result and task in HOLDS and (result[1] or result[0] == top):
                self.right[task] += 1
                wrong = f"{task} {row}: {text[:200]!r} earns {result}, which the reference denies"
                self.part.hold(HOLDS[task](text, row), wrong)


def clean_texts(grader: Grader, draw: random.Random, count: int) -> None:
    """Answers in the asked form, of which the references say both right and wrong."""
    for _ in range(count):
        gold = draw.choice((1, -1)) * draw.randrange(10 ** draw.randint(1, 12))
        near = (gold, gold, -gold, gold + 1, gold * 10, int(str(abs(gold))[::-1]))
        got = draw.choice(near)
        sudoku = draw.choice(TASKS["sudoku"].rows("test")[:6])
        grid = draw.choice((sudoku["solution"], draw.choice(GRIDS), sudoku["puzzle"]))
        problem = draw.choice(PROBLEMS)
        written = draw.choice([countdown_text(draw, problem), draw.choice(SOLVED)])
        if draw.random() < 0.3:
            i = draw.randrange(len(SOLVED))
            problem, written = PROBLEMS[i], SOLVED[i]
        integer = integer_text(draw, got)
        cases = [("gsm8k", {"question": "", "answer": f"so\n#### {gold}"}, integer, got == gold)]
        cases += [("math", {"question": "", "answer": str(gold)}, integer, got == gold)]
        cases += [("sudoku", sudoku, grid, sudoku_holds(grid, sudoku))]
        cases += [("countdown", problem, written, countdown_holds(written, problem))]
        for task, row, inside, expected in cases:
            result = grader.grade(
                task, f"<reasoning>\n\n</reasoning>\n<answer>{inside}</answer>", row
            )
            if result:
                grader.right[f"{task}, clean"] += result[1]
                words = f"{task} {row}: {inside!r} earns {result}, the reference says {expected}"
                grader.part.hold(result[1] == expected, words)


def answers(part, draw: random.Random, size: float) -> None:
    """200,000 x size texts by all four tasks: faults, seconds, memory, right in error."""
    signal.signal(signal.SIGALRM, too_long)
    count = round(200_000 * size)
    grader = Grader(part)
    ALGEBRA.start()
    began = time.monotonic()
    sudokus = TASKS["sudoku"].rows("test")[:6]
    clean_texts(grader, draw, count // 10)
    for i in range(count - count // 10):
        gold = draw.choice(GOLDS)
        rows = {"gsm8k": {"question": "", "answer": f"#### {draw.randint(-99, 9999)}"}}
        rows |= {"math": {"question": "", "answer": gold}, "sudoku": draw.choice(sudokus)}
        rows["countdown"] = draw.choice(PROBLEMS)
        text = text_of(draw)
        if i % 2000 == 9:  # the algebra's two seconds
            text = wrapped(draw, draw.choice(SLOW))
        grader.check(text, rows)
    grader.look_at_worker()
    part.notes["seconds of all but giants"] = round(time.monotonic() - began)
    part.notes["seconds of an answer"] = quantiles(grader.seconds)
    grader.seconds = []
    for giant, end in itertools.product(GIANTS, ("", "</answer>") if size > 0.3 else ("",)):
        length = 10**6 if size > 0.3 else 10**5
        text = f"<answer>{giant * (length // len(giant))}{end}"
        grader.check(text, rows)
    part.notes["seconds of giants"] = quantiles(grader.seconds)
    grader.look_at_worker()
    part.notes["worker's peak, MB"] = grader.memory // 1000
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    part.notes |= {"own peak, MB": own // 1000, "right": dict(grader.right)}
    part.notes["slowest"] = sorted(grader.slowest, reverse=True)[:12]


def quantiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    at = {"median": 0.5, "99.9 %": 0.999, "max": 1}
    return {name: round(ordered[int(q * (len(ordered) - 1))], 5) for name, q in at.items()}
