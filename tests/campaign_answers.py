"""Hostile answers for campaign.py; the references share no code with figures/answers.py."""

import collections
import itertools
import math
import random
import re
import signal
import time
from fractions import Fraction
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

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
SLOW += [r"\sin(x)^{40}+\cos(x)^{40}", "x^x^x", "(x+1)^{99}(x+2)^{99}"]
SLOW += [r"\frac{(x^{50}-1)(y^{50}-1)}{(x-1)(y-1)}", "(((2^9)^9)^9)", "9" * 250 + "^{99999}"]
LEAVES = (*"0123456789xy", "12", "3.5", r"\pi")
GIANTS = ["1", "(", r"\boxed{", r"\boxed{1}", "<answer>", "<answer>1</answer>", "{", "\\", "<", " "]
GIANTS += ["<reasoning></reasoning><answer>", r"\frac{", "1,", "-", "boxed{", "\x00", "=1", "^2"]
GIANTS += ["}", r"\boxed{}", "0123456789", "\n</reasoning>\n<answer>\n1"]
UNITS = {"cm": "centimeters", "kg": "kilograms", "m": "meters", "ft": "feet"}
SOON, LONG = 0.1, 1  # seconds of processor time for an answer, counted and refused
SMALL = 50  # MB that both processes may grow by
PATIENCE = 60  # seconds of wall time for an answer and a task


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
    pool = draw.choice((ATOMS, ATOMS + MARKS, ATOMS[:20] + MARKS[:7]))
    return "".join(draw.choices(pool, k=draw.randint(1, 14)))


def expression(draw: random.Random, depth: int = 2, leaves: tuple[str, ...] = LEAVES) -> str:
    if depth == 0 or draw.random() < 0.2:
        return draw.choice(leaves)
    left, right = (expression(draw, depth - 1, leaves) for _ in range(2))
    shape = draw.choice(("{}+{}", "{}-{}", "{}{}", "({})({})", r"\frac{{{}}}{{{}}}", "{}/({})"))
    return shape.format(left, right)


def slow(draw: random.Random) -> str:
    return draw.choice(SLOW)


def disorder(draw: random.Random) -> str:
    """Tags and boxes in any order, with something between them."""
    count = draw.randint(2, 9)
    return "".join(draw.choice(TAGS) + draw.choice((junk, solution))(draw) for _ in range(count))


def solution(draw: random.Random) -> str:
    """What may be right for some task: a grid, a sum, a number."""
    grid, i, j = draw.choice(GRIDS), draw.randrange(17), draw.randrange(17)
    texts = (" ".join(grid), grid, grid[:i] + grid[j:], *draw.sample(SOLVED, 2))
    return draw.choice((*texts, str(draw.randint(-99, 99))))


def wrapped(draw: random.Random, inside: str) -> str:
    shapes = ["{}", "<answer>{}</answer>", "<answer>\n\\boxed{{{}}}\n</answer>", "\\boxed{{{}}}"]
    shapes += ["<reasoning>\nx\n</reasoning>\n<answer>\n{}\n</answer>", "<answer>{}", "\\boxed{{{}"]
    return draw.choice(shapes).format(inside)


def sums(draw: random.Random) -> tuple[str, str, bool]:
    """An expression, a number that may be its value, and whether it is."""
    text = ""
    while agree(text, text) is None:
        text = expression(draw, 2, (*"123456789", "12"))
    value = Reader(text, {}).whole()
    gold = draw.choice((value, value + 1, value + Fraction(1, 7), -value, 10 * value))
    written = text if draw.random() < 0.7 else f"{float(value):.4f}"
    return written, str(gold), Reader(written, {}).whole() == gold


def units(draw: random.Random) -> tuple[str, str, bool]:
    """Two quantities, and whether they are the same."""
    gold = draw.randint(2, 99)
    amount = draw.choice((gold, gold, gold, gold + 1))
    unit, other = draw.choice([*UNITS]), draw.choice([*UNITS])
    text = draw.choice((f"{amount} {other}", rf"{amount}\text{{ {UNITS[other]}}}"))
    return text, rf"{gold}\text{{ {unit}}}", (amount, other) == (gold, unit)


def integers(draw: random.Random) -> tuple[str, str, bool]:
    """An integer as people write it, another one, and whether they are the same."""
    gold = draw.choice((1, -1)) * draw.randrange(10 ** draw.randint(1, 12))
    got = draw.choice((gold, gold, -gold, gold + 1, gold * 10, int(str(abs(gold))[::-1])))
    digits = draw.choice((str(abs(got)), f"{abs(got):,}", f"{abs(got):,}".replace(",", "{,}")))
    sign = draw.choice(("-", "−", "- ")) if got < 0 else draw.choice(("", "", "+"))
    before = draw.choice(("", "", " ", r"\$", "$", "x = "))
    after = draw.choice(("", "", ".", " ", "$" if before == "$" else ""))
    return f"{before}{sign}{digits}{after}", str(gold), got == gold


KINDS = {"junk": junk, "nest": nest, "expression": expression, "disorder": disorder}
KINDS |= {"solution": solution, "sums": sums, "units": units, "integers": integers, "slow": slow}
SHARES = (30, 7, 15, 18, 13, 8, 4, 4, 1)
EXACT = ("units", "integers")  # of which no right answer may be refused


# ---- References ---------------------------------------------------------------------------------
class Reader:
    """An expression's value at a point, by descent; ValueError: it is none that this reads."""

    ENDS = {"", "+", "-", ")", "}"}

    def __init__(self, text: str, point: dict[str, float]):
        if re.search(r"\d\s*\\frac", text):
            raise ValueError("a product or a mixed number")
        self.tokens = re.findall(r"\\[a-zA-Z]+|[0-9]*\.?[0-9]+|\S", text)[::-1]
        self.point = point

    def take(self, *wanted: str) -> str:
        return self.tokens.pop() if self.tokens and self.tokens[-1] in wanted else ""

    def whole(self):
        total = self.total()
        if self.tokens:
            raise ValueError("something is left")
        return total

    def total(self):
        total = self.product()
        while sign := self.take("+", "-"):
            total += self.product() if sign == "+" else -self.product()
        return total

    def product(self):
        total = self.factor()
        divided = False
        while (self.tokens or [""])[-1] not in self.ENDS:
            if self.take("/", r"\div"):
                total /= self.factor()
                divided = True
                continue
            marked = self.take("*", r"\times", r"\cdot")
            if not marked and (divided or self.tokens[-1][0] in "0123456789."):
                raise ValueError("1/2x and 2 3 have no one meaning")
            total *= self.factor()
        return total

    def factor(self):
        if self.take("-"):
            return -self.factor()
        base = self.atom()
        return complex(base) ** complex(self.atom()) if self.take("^") else base

    def atom(self):
        token = self.tokens.pop() if self.tokens else ""
        if token in ("(", "{"):
            total = self.total()
            if not self.take(")" if token == "(" else "}"):
                raise ValueError("a bracket is open")
            return total
        if token in (r"\frac", r"\sqrt") and self.tokens[-1:] == ["{"]:
            top = self.atom()
            return complex(top) ** 0.5 if token == r"\sqrt" else top / self.atom()
        return self.point[token] if token in self.point else Fraction(token)


POINTS = [{"x": 0.739, "y": 1.217, r"\pi": math.pi}, {"x": -1.618, "y": 0.577, r"\pi": math.pi}]


def agree(text: str, gold: str) -> bool | None:
    """Whether two expressions are equal at some points; None if they cannot be read."""
    try:
        pairs = [[Reader(side, point).whole() for side in (text, gold)] for point in POINTS]
        return all(abs(a - b) <= 1e-6 * (1 + abs(b)) for a, b in pairs)
    except (ValueError, ArithmeticError, RecursionError):
        return None


def countdown_holds(text: str, row: dict) -> bool:
    """Whether some stretch of a text is a solution."""
    wanted = sorted(row["numbers"])
    text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))", text)
    for sign, plain in ((r"\times", "*"), (r"\cdot", "*"), (r"\div", "/"), ("−", "-")):
        text = text.replace(sign, plain)
    text = re.sub(r"\\left|\\right|\\[()\[\]]|\$", "", text.replace("×", "*").replace("÷", "/"))
    for run in re.findall(r"[0-9+\-*/()\s]+", text):
        tokens = re.findall(r"[0-9]+|[-+*/()]", run)
        for start, end in itertools.combinations(range(len(tokens) + 1), 2):
            some = tokens[start:end]
            if sorted(int(t) for t in some if t.isdigit()) == wanted:
                if agree(" ".join(some), str(row["target"])):
                    return True
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


def countdown_text(draw: random.Random, row: dict) -> str:
    """An expression in the row's numbers: sometimes with one changed, seldom a solution."""
    numbers = [str(n) for n in draw.sample(row["numbers"], len(row["numbers"]))]
    if draw.random() < 0.2:
        numbers[0] = str(draw.randint(0, 100))
    while len(numbers) > 1:
        sign = draw.choice(["+", "-", "*", "/", " - ", r"\times", "÷", r"\frac"])
        a, b = draw.sample([numbers.pop(), numbers.pop()], 2)
        numbers.append(rf"\frac{{{a}}}{{{b}}}" if sign == r"\frac" else f"({a}{sign}{b})")
    return numbers[0] + draw.choice(["", f" = {row['target']}", "=", " .", " \n"])


def solved(draw: random.Random, row: dict) -> str:
    """A solution, found by chance."""
    while not countdown_holds(text := countdown_text(draw, row), row):
        pass
    return text


SUDOKUS = TASKS["sudoku"].rows("test")[:6]
GRIDS = [row["solution"] for row in SUDOKUS]
PROBLEMS = TASKS["countdown"].rows("test")[:6]
SOLVED = [solved(random.Random(0), row) for row in PROBLEMS]
PROBLEMS += [row | {"target": row["target"] + 1000} for row in PROBLEMS]  # most cannot be reached


# ---- The campaign -------------------------------------------------------------------------------
def measured(pid: int | str, file: str, pattern: str) -> int:
    """A number in a file of /proc; 0 if the process has ended."""
    path = Path(f"/proc/{pid}/{file}")
    found = re.search(pattern, path.read_text()) if path.is_file() else None
    return int(found[1]) if found else 0


def seconds() -> float:
    """Processor time of this process and the algebra's."""
    return time.process_time() + measured(ALGEBRA.pid, "schedstat", r"(\d+)") / 1e9


def metered(call, *given) -> tuple[object, float, float]:
    """A result, seconds of processor time, and by how many MB one of the two processes grew."""
    pids = ("self", ALGEBRA.pid)
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak starts anew
    held = [measured(pid, "status", r"VmRSS:\s*(\d+)") for pid in pids]
    began = seconds()
    result = call(*given)
    took = seconds() - began
    peaks = [measured(pid, "status", r"VmHWM:\s*(\d+)") for pid in pids]
    grown = max(peaks[0] - held[0], peaks[1] - held[1]) / 1000
    return result, took, grown if ALGEBRA.pid == pids[1] else 10**6  # it died of too much memory


class Grader:
    """Grades texts, and keeps the counts of each kind."""

    def __init__(self, part):
        self.part = part
        self.counts = collections.defaultdict(collections.Counter)
        self.seconds: list[float] = []
        self.slowest: list[tuple[float, str]] = []

    def grade(self, kind: str, task: str, text: str, row: dict) -> tuple[float, float] | None:
        result = None
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        try:
            result = TASKS[task].grade(text, row)
            fault = "" if 0 <= result[0] <= TASKS[task].top else f"reward {result[0]}"
        except TooLong:
            ALGEBRA.stop()
            fault = f"more than {PATIENCE} s"
        except Exception as error:
            fault = f"raises {error.__cause__!r:.150}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.counts[kind]["raised"] += bool(fault)
        self.part.hold(not fault, f"{task}, {len(text)} characters {text[:150]!r}: {fault}")
        return result

    def check(self, kind: str, text: str, cases: list[tuple]) -> None:
        """By tasks; a case is a task, a row, and what the reference says: True, False or None."""
        for task, row, holds in cases:
            ALGEBRA.start()
            result, took, grown = metered(self.grade, kind, task, text, row)
            counts = self.counts[kind]
            counts["graded"] += 1
            counts["over 100 ms"] += took > SOON
            counts["over 50 MB"] += grown > SMALL
            self.seconds.append(took)
            if took > SOON or grown > SMALL:
                words = f"{grown:.0f} MB, {task}: {text[:80]!r} ({len(text)})"
                self.slowest.append((round(took, 3), words))
                self.part.hold(took < LONG and grown <= SMALL, f"takes {took:.2f} s, {words}")
            if result and holds is True and not result[1]:
                counts["right, but refused"] += 1
                self.part.hold(kind not in EXACT, f"{task} {row}: {text!r} is right, but refused")
            if result and (result[1] or task != "sudoku" and result[0] == TASKS[task].top):
                verdict = holds(text) if callable(holds) else holds
                counts["right"] += 1
                counts["right, not judged"] += verdict is None
                counts["wrongly right"] += verdict is False
                wrong = f"{task} {row}: {text[:200]!r} earns {result}, which the reference denies"
                self.part.hold(verdict is not False, wrong)


def cases_of(draw: random.Random, inside: str, gold: str, holds: bool | None) -> list[tuple]:
    """All tasks for a text, with the references' verdicts about what it has inside."""
    sudoku, problem = draw.choice(SUDOKUS), draw.choice(PROBLEMS)
    cases = [("sudoku", sudoku, lambda text: sudoku_holds(text, sudoku))]
    cases += [("countdown", problem, lambda text: countdown_holds(text, problem))]
    number = draw.choice((gold, str(draw.randint(-99, 9999))))
    for task, answer, row in (("math", gold, gold), ("gsm8k", number, f"so\n#### {number}")):
        known = holds is not None and answer == gold
        verdict = holds if known else agree(inside, answer)
        cases.append((task, {"question": "", "answer": row}, verdict))
    return cases


def fuzz(grader: Grader, draw: random.Random, count: int) -> None:
    """Texts of the grammar."""
    for kind in draw.choices([*KINDS], SHARES, k=count):
        made = KINDS[kind](draw)
        inside, gold, holds = made if isinstance(made, tuple) else (made, draw.choice(GOLDS), None)
        text = inside if draw.random() < 0.1 else wrapped(draw, inside)
        if holds is not None:
            text = f"<reasoning>\n\n</reasoning>\n<answer>{inside}</answer>"
        known = "" if kind == "disorder" else inside
        grader.check(kind, text, cases_of(draw, known, gold, holds))


def unforeseen(grader: Grader, draw: random.Random, count: int) -> None:
    """Texts of hypothesis: any characters, and the grammar's pieces in any order."""
    pieces = st.lists(st.sampled_from(ATOMS + MARKS + TAGS), max_size=20).map("".join)

    @seed(draw.randrange(10**9))
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=HealthCheck)
    @given(st.text(max_size=80) | pieces | pieces.map(lambda inside: rf"\boxed{{{inside}}}"))
    def check(text):
        grader.check("hypothesis", text, cases_of(draw, "", draw.choice(GOLDS), None))

    check()


def giants(grader: Grader, draw: random.Random, length: int) -> None:
    starts = ("<answer>", "<reasoning>\n")
    for giant, start, end in itertools.product(GIANTS, starts, ("", "</answer>")):
        text = start + giant * (length // len(giant)) + end
        grader.check("giants", text, cases_of(draw, "", "7", None))


def answers(part, draw: random.Random, size: float) -> None:
    """200,000 x size texts: faults, processor time, memory, right in error."""
    signal.signal(signal.SIGALRM, too_long)
    count = round(200_000 * size)
    grader = Grader(part)
    began = time.monotonic()
    unforeseen(grader, draw, count // 10)
    fuzz(grader, draw, count - count // 10)
    part.notes["seconds of all but giants"] = round(time.monotonic() - began)
    took = sorted(grader.seconds)
    for name, share in (("median", 0.5), ("99 %", 0.99), ("99.9 %", 0.999), ("most", 1)):
        part.notes[f"processor seconds, {name}"] = round(took[int(share * (len(took) - 1))], 5)
    giants(grader, draw, 10**6 if size > 0.3 else 10**5)
    part.notes["kinds"] = {kind: dict(counts) for kind, counts in grader.counts.items()}
    part.notes["slowest"] = sorted(grader.slowest, reverse=True)[:12]
