"""The final answer of a text, found, and compared with the right one."""

import ast
import atexit
import contextlib
import functools
import gc
import importlib.util
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from multiprocessing import connection
from operator import add, mul, sub, truediv
from pathlib import Path

LONGEST = 300  # characters of an answer
LONGEST_TEXT = 50_000  # characters at the end of a text, where its answer is looked for


# ---- finding the answer --------------------------------------------------------------------------
def braced(text: str, start: int) -> str | None:
    """What stands between the brace at `start` and the one that closes it; None if none does."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + 1 : i]
    return None


def last_box(text: str) -> str | None:
    """The content of the last \\boxed{...} whose braces balance, in one pass over the text."""
    text = text[-LONGEST_TEXT:]
    starts = {box.end() - 1 for box in re.finditer(r"\\boxed\s*\{", text)}
    opened = []
    last = (-1, -1)
    for brace in re.finditer("[{}]", text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif opened:
            start = opened.pop()
            if start in starts:
                last = max(last, (start, brace.start()))
    return text[last[0] + 1 : last[1]].strip() if last[0] >= 0 else None


def extract(text: str, box_anywhere: bool = False) -> str | None:
    """The answer that a reward sees: the last whole <answer>, or the last box inside it.

    box_anywhere   without a whole <answer>, the last box of the text (GSM8K and MATH)
    """
    answers = re.findall("<answer>((?:(?!</?answer>).)*)</answer>", text[-LONGEST_TEXT:], re.S)
    if not answers:
        return last_box(text) if box_anywhere else None
    box = last_box(answers[-1])
    return answers[-1].strip() if box is None else box


def final_answer(text: str) -> str | None:
    """The answer that the metric sees, found as a careful reader would.

    The first of these that is not blank: the last whole <answer> (in it the last box), the last
    box anywhere, the rest of the text after <answer> (without one after </reasoning> or
    </answer>), a box that was never closed.
    """
    text = re.sub(r"\\boxed\s*\{\s*\}", "", text[-LONGEST_TEXT:])
    text = re.sub(r"(?<![\\a-zA-Z])boxed\s*\{", r"\\boxed{", text)
    text = re.sub(r"\\boxed\s*(-?[\w.,/]+)", r"\\boxed{\1}", text)
    text = re.sub(r"<answer>\s*</answer>", "", text)
    found = extract(text, box_anywhere=True)
    if found is None:
        marks = [m for m in ("<answer>", "</reasoning>", "</answer>") if m in text]
        rest = text.rpartition(marks[0])[2] if marks else ""
        found = re.sub(r"<[^<>\d]*>", "", rest).strip()
    elif len(found) > LONGEST:  # working, not an answer
        found = last_box(text)
    open_box = re.findall(r"\\boxed\s*\{([^\n$<>]*)", found or text)
    return open_box[-1].strip() if open_box else found or None


# ---- arithmetic ----------------------------------------------------------------------------------
SIGNS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv}


def arithmetic(text: str) -> tuple[Fraction, list[int]] | None:
    """Value and numbers of an expression in integers, + - * / and parentheses; else None.

    The text is parsed, never run. In 100 characters without powers nothing can grow large.
    """
    numbers = []

    def value(node):
        if isinstance(node, ast.Constant):
            numbers.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        return SIGNS[type(node.op)](value(node.left), value(node.right))

    if len(text) > 100 or not re.fullmatch(r"[0-9+\-*/()\s]+", text):
        return None
    not_arithmetic = (SyntaxError, ValueError, KeyError, AttributeError, ZeroDivisionError)
    try:
        return value(ast.parse(" ".join(text.split()), mode="eval").body), numbers
    except (*not_arithmetic, MemoryError, RecursionError):
        return None


# ---- comparing answers ---------------------------------------------------------------------------
SPELLINGS = {  # a pattern and the one spelling of what it finds
    r"(?i)^\s*the (final )?answer is:?\s": "",
    r"[−–]": "-",
    r"\*\*": "^",
    r"×": r"\\times ",
    r"÷": r"\\div ",
    r"\\(?:le|leq|leqslant)(?![a-z])|≤|<=": r"\\le ",
    r"\\(?:ge|geq|geqslant)(?![a-z])|≥|>=": r"\\ge ",
    r"\{,\}|,\s*\\!\s*|(?<=\d)\\,(?=\d{3}(?!\d))": "",  # between thousands
    r"\\(?:left|right|displaystyle|q?quad)(?![a-z])|(?<!\\)\\[!,;:()\[\]\s]|~": " ",
    r"\\\$": r"\\dollar ",
    r"\$": " ",
    r"\^\s*\{?\s*\\circ\s*\}?|°": r"\\text{degree}",
    r"\\?%|\bpercent\b": r"\\text{percent}",
    r"\\(?:mbox|mathrm|textrm|textbf|mathbf|operatorname)(?![a-z])": r"\\text",
    r"\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b": ",",
    r"\\[dtc]frac": r"\\frac",
    r"\\(frac|sqrt|overline)\s*(\w)": r"\\\1{\2}",
    r"\\frac\s*\{([^{}]*)\}\s*(\w)": r"\\frac{\1}{\2}",
    r"_\s*\{(\w+)\}": r"_\1",
    r"\\log_(\d)\s+(\d+)(?=\s*(?:[-+,)}]|$))": r"\\log_\1(\2)",
    r"(?<![\\a-zA-Z])(sqrt|pi|sin|cos|tan|log|ln|infty)(?![a-z])": r"\\\1",
    r"\\sqrt\s*\(([^()]*)\)": r"\\sqrt{\1}",
    r"^\s*[a-zA-Z]\s*\\in(?![a-z])|^\s*\+|[\s.]+$": "",
}
COMMANDS = "frac sqrt times cdot div binom begin end le ge sin cos tan cot sec csc log ln arcsin"
COMMANDS += " arccos arctan pi infty alpha beta gamma theta lambda phi omega"
COMMANDS = {*COMMANDS.split()}
SHORT_UNITS = "cm|mm|km|ml|mL|kg|mg|lb|oz|ft|mi|mph|min|hr|sec|sq"
WORD = rf"(?<![a-zA-Z\\])(?:{SHORT_UNITS})(?![a-zA-Z])|(?<=[\s/])(?:[a-zA-Z]{{3,}}|[mghsL]\b)"
UNIT = rf"(?:(?:\\text\s*\{{[a-zA-Z/.\s]*\}}|{WORD})(?:\^\{{?[23]\}}?)?|[/\s.])+"
UNIT_NAMES = "centimeter=cm millimeter=mm kilometer=km meter=m milliliter=ml kilogram=kg gram=g"
UNIT_NAMES += " pound=lb ounce=oz foot=ft feet=ft inche=in inch=in mile=mi minute=min hour=h hr=h"
UNIT_NAMES += " second=s sec=s square=2 squared=2 sq=2 cubic=3 cubed=3 per=/"
UNIT_NAMES = dict(pair.split("=") for pair in UNIT_NAMES.split())
# These change the number before them.
SCALES = "dozen hundred thousand million billion half times plus minus over not factorial"
SCALES = {*SCALES.split()}


def repeating(decimal: re.Match) -> str:
    """The fraction that 0.1\\overline{6} is: (16 - 1) / 90."""
    before, whole, fixed, again = decimal.groups()
    top = int(whole + fixed + again) - int((whole + fixed) or "0")
    return rf"{before}\frac{{{top}}}{{{'9' * len(again)}{'0' * len(fixed)}}}"


def tidy(text: str) -> str:
    """An answer in one spelling, without what only styles it."""
    for pattern, plain in SPELLINGS.items():
        text = re.sub(pattern, plain, text)
    alone = r"(^\s*|[^\w\s})]\s*)"  # no factor, of which 2 \frac would make a mixed number
    text = re.sub(alone + r"([0-9]*)\.([0-9]*)\\overline\{([0-9]+)\}", repeating, text)
    if not re.search(r"[(\[]", text):  # (1,234) is a pair, 1,234 a number
        thousands = r"(?<![\d,])\d{1,3}(?:,\d{3})+(?![\d,])"
        text = re.sub(thousands, lambda number: number[0].replace(",", ""), text)
    mixed = re.fullmatch(r"\s*(-?[0-9]+) +([0-9]+)/([0-9]+)\s*", text)
    if mixed and int(mixed[2]) < int(mixed[3]):
        text = rf"{mixed[1]}\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    between = re.fullmatch(r"(.+?)(<|\\le)\s*[a-zA-Z]\s*(<|\\le)(.+)", text)
    if between:
        opens = "(" if between[2] == "<" else "["
        closes = ")" if between[3] == "<" else "]"
        text = f"{opens}{between[1]},{between[4]}{closes}"
    return text.strip()


def squeeze(text: str) -> str:
    """The text without spaces, except between digits, and without \\text around words."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)
    text = re.sub(r"^\(([A-Z])\)$", r"\1", text)  # a choice
    return text.lower() if re.fullmatch("[a-zA-Z]{2,}", text) else text


def split_outside(text: str, mark: str) -> list[str]:
    """The text cut at a mark where no bracket is open."""
    pieces = [""]
    depth = 0
    for token in re.findall(r"\\[a-zA-Z]+|\\.|.", text, re.S):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(token[-1], 0)
        if token == mark and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += token
    return [piece.strip() for piece in pieces]


def both_signs(items: list[str]) -> list[str]:
    """A list of answers in which a \\pm b stands for two."""
    signed = []
    for item in items:
        if item.count(r"\pm") == 1:
            signed += [item.replace(r"\pm", "+"), item.replace(r"\pm", "-")]
        else:
            signed.append(item)
    return signed


def parts(text: str) -> tuple[str, list[str]]:
    """An answer's kind ("one", "set", "union" or its two brackets) and its parts."""
    union = split_outside(text, r"\cup")
    if len(union) > 1:
        return "union", union
    braces = re.fullmatch(r"\\\{(.*)\\\}", text, re.S)
    items = both_signs(split_outside(braces[1] if braces else text, ","))
    if braces or len(items) > 1:
        return "set", items
    brackets = re.fullmatch(r"([(\[])(.*)([)\]])", text, re.S)
    if brackets:
        items = split_outside(brackets[2], ",")
        if len(items) > 1:
            return brackets[1] + brackets[3], items
    return "one", [text]


def same(gold: str, got: str, percent: bool = False) -> bool:
    """Whether two answers are the same.

    Numbers and expressions must be exactly equal; a decimal may stand for a number that has none
    if it agrees to 1e-8 of it. The order counts in (a, b) and [a, b), not in lists and sets. All
    values in "x = a = b" count, names do not, unless both answers have one. A unit may be missing
    from one side, but two must agree.

    percent   whether p % may stand for p, because the question asks for per cents
    """
    gold = tidy(gold)
    got = tidy(got[: 2 * LONGEST])
    if not got or len(got) > LONGEST:
        return False
    if squeeze(gold) == squeeze(got):
        return True
    kind, golds = parts(gold)
    other, gots = parts(got)
    if kind != other or len(golds) != len(gots):
        return False
    if kind == "one":
        return same_equation(gold, got, percent)
    if kind not in ("set", "union"):
        return all(same(a, b, percent) for a, b in zip(golds, gots, strict=True))
    for a in golds:
        match = next((b for b in gots if same(a, b, percent)), None)
        if match is None:
            return False
        gots.remove(match)
    return True


def is_name(side: str) -> bool:
    """Whether the side of an equation only names what the other side is, as x, f(3) or area do."""
    plain = re.sub(r"_\{?\w+\}?|\([\w, ]*\)", "", side)
    value = re.search(r"[^\sa-zA-Z\\{}_']|\\(?:frac|sqrt|pi|infty)(?![a-z])", plain)
    return not value and bool(re.search("[a-zA-Z]", plain)) and side not in ("e", "i")


def same_equation(gold: str, got: str, percent: bool) -> bool:
    """Whether all values of two (chains of) equations are the same, or the two equations are."""
    golds = split_outside(gold, "=")
    gots = split_outside(got, "=")
    gold_names = {squeeze(side) for side in golds if len(golds) > 1 and is_name(side)}
    got_names = {squeeze(side) for side in gots if len(gots) > 1 and is_name(side)}
    golds_left = [side for side in golds if squeeze(side) not in gold_names]
    gots_left = [side for side in gots if squeeze(side) not in got_names]
    clash = gold_names and got_names and not gold_names & got_names
    if len(golds_left) == 1 and gots_left and not clash:
        if all(same_value(golds_left[0], side, percent) for side in gots_left):
            return True
    return len(golds) == len(gots) == 2 and same_expression(gold, got)


def split_unit(text: str) -> tuple[str, set[str]]:
    """A value and the words of its unit."""
    value = text.replace(r"\dollar", "")
    words = {"dollar"} if value != text else set()
    found = re.fullmatch(rf"(.*?[\w)}}\]])\s*({UNIT})", value, re.S)
    if not found or not re.search(r"\d", found[1]):
        return value.strip(), words
    for word in re.findall(r"[a-z]+|[23/]", found[2].replace(r"\text", "").lower()):
        word = word.removesuffix("s") if len(word) > 3 else word
        words.add(UNIT_NAMES.get(word, word))
    if words & SCALES or not words - {"2", "3", "/"}:
        return text, set()
    return found[1], words


def same_value(gold: str, got: str, percent: bool) -> bool:
    """Whether two numbers or expressions are the same, with their units, bases and signs of %."""
    gold, gold_unit = split_unit(gold)
    got, got_unit = split_unit(got)
    if gold_unit and got_unit and gold_unit != got_unit:
        return False
    if "percent" in got_unit - gold_unit and not percent:
        got = rf"\frac{{{got}}}{{100}}"
    if all(re.fullmatch(r"-?[0-9]*\.?[0-9]+", value) for value in (gold, got)):
        return Fraction(gold) == Fraction(got)
    return squeeze(gold) == squeeze(got) or same_expression(gold, got)


def hopeless(text: str) -> bool:
    """Whether powers, factorials, binomials or nests are larger than in any sensible answer."""
    large = r"[\d.]{3}\s*!|[^\d\s]\s*!|binom.*\d{4}|(\([^()]*){5}|(\{\s*){4}"
    if text.count("(") + text.count("{") > 40 or re.search(large, text):
        return True
    tower = 1
    for base in re.finditer(r"(?:([)}\]|])|(\d+)|)\s*\^\s*", text):
        rest = text[base.end() :]
        exponent = braced(rest, 0) if rest.startswith("{") else re.match(r"\(?-?\w*", rest)[0]
        if exponent is None or "^" in exponent:
            return True
        size = len(base[2] or "1") * math.prod(max(1, int(n)) for n in re.findall(r"\d+", exponent))
        tower = tower * size if base[1] else size
        if tower > 10**5 or base[1] and size > 99:
            return True
    return False


@functools.lru_cache(1000)  # the reward and the metric ask the same
def same_expression(gold: str, got: str) -> bool:
    """Asks the algebra, unless the answer has anything that math-verify might pass over."""
    if {*re.findall(r"\\([a-zA-Z]+)", got)} - COMMANDS or braced("{" + got + "}", 0) != got:
        return False
    plain = re.sub(r"\\sqrt\[\d+\]|\{[pbv]?matrix\}", " ", got)
    if re.search(r"[^\w\s+\-*/^(){}|!.\\&<>=]|\d\s+[\d.]|\d\s*[_{]|\}\s*\d|\\\\?$", plain, re.A):
        return False
    for word in re.findall(r"[a-zA-Z]{2,}|[a-df-hj-zA-Z]", re.sub(r"\\[a-zA-Z]+", " ", plain)):
        if not {*word} <= {*gold}:
            return False
    return not hopeless(got) and ALGEBRA.same(gold, got)


# ---- the algebra, in a process of its own --------------------------------------------------------
# Of a question. A right answer of LLaDA's took .03 s of processor time at most; x^8 + ... + 1 for
# (x^9 - 1)/(x - 1), the slowest right one that was tried, .08 s.
CPU_SECONDS = 0.25
WALL_SECONDS = 60
MEMORY = 50 * 2**20  # bytes above what the worker holds
EQUALS = {  # the first of a form takes ten times as long as a later one
    "x^2+3x+2": "(x+1)(x+2)",
    r"\frac{\sqrt{2}}{2}": "0.707106781187",
    r"\begin{pmatrix}1/6\\2/3\end{pmatrix}": r"2\begin{pmatrix}1/12\\\frac{1}{3}\end{pmatrix}",
    r"\sin(x)^2+\cos^2{x}+3!": r"\log_2(2)+6",
}


def read_expression(text: str):
    """The sympy expression of a text, read by math-verify; its decimals are fractions."""
    import sympy
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    def fraction(decimal):
        return r"(\frac{{{}}}{{{}}})".format(*Fraction(decimal[0]).as_integer_ratio())

    exact = re.sub(r"(?<![\w.])\d*\.\d+(?![\d.])", fraction, text)
    # Else 2(3) is read as 2 + 3, and \frac{4}{1}\frac{1}{2} as the mixed number 4 1/2.
    products = r"(?<=[\d)}])(?<!_\d)\s*(?=\()|(?<=[)}])(?<!x\})(?<!\^\{\w\})\s*(?=\\frac)"
    exact = re.sub(products, r"\\cdot ", exact)
    reader = LatexExtractionConfig(normalization_config=NormalizationConfig(boxed="last"))
    found = parse(rf"\boxed{{{exact}}}", [reader], parsing_timeout=None)
    if "." in exact or not isinstance(found[0], sympy.Expr | sympy.MatrixBase):
        raise ValueError("not an expression")
    value = found[0].doit()
    names = {symbol: sympy.Symbol(symbol.name, real=True) for symbol in value.free_symbols}
    names.update({symbol: sympy.I for symbol in names if symbol.name == "i"})
    return value.subs(names)


def expressions_agree(gold: str, got: str) -> bool:
    """Whether two expressions are equal, or a decimal is within 1e-8 of a number that has none."""
    import sympy

    a = read_expression(gold)
    b = read_expression(got)
    if a.has(sympy.nan, sympy.zoo) or b.has(sympy.nan, sympy.zoo):
        return False
    if isinstance(a, sympy.MatrixBase) or isinstance(b, sympy.MatrixBase):
        return a.shape == b.shape and sympy.simplify(a - b).is_zero_matrix is True
    difference = sympy.simplify(a - b)
    if a == b or difference == 0 or difference.equals(0) is True:
        return True
    decimals = ["." in gold, "." in got]
    exact = b if decimals[0] else a
    if decimals[0] == decimals[1] or not (a.is_number and b.is_number):
        return False
    if exact.is_Rational and not {*sympy.factorint(exact.q)} - {2, 5}:
        return False  # it has a decimal, and this is another
    return bool(abs(difference / exact).evalf(20) < 1e-8)


def relations_agree(gold: str, got: str) -> bool:
    """Whether two equations or inequalities differ by a factor, as 2x = 10 and x = 5 do."""
    import sympy

    sides = []
    for text in (gold, got):
        left, sign, right = re.split(r"(=|<|>|\\le|\\ge)", text)
        side = read_expression(left) - read_expression(right)
        sides.append((-side if sign in (">", r"\ge") else side, sign))
    ratio = sympy.simplify(sides[0][0] / sides[1][0])
    signs = {side[1].replace(">", "<").replace("ge", "le") for side in sides}
    fits = ratio.is_positive if signs != {"="} else ratio.is_nonzero
    return len(signs) == 1 and not ratio.free_symbols and bool(fits)


def set_limits() -> None:
    """Of this process, where the system knows them: MEMORY more than now, and two or three seconds
    of processor time, after which it is ended: in one long step of C no alarm is heard."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        seconds = int(time.process_time()) + 3  # whole ones
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, hard))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))


def algebra_agrees(gold: str, got: str) -> bool:
    """Runs in the worker. What its algebra cannot read, or not in time, is not the same."""
    set_limits()
    # The alarm is a KeyboardInterrupt: sympy catches every Exception in many places.
    signal.signal(signal.SIGVTALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS, 0.5)
    try:
        relation = re.search(r"[=<>]|\\[lg]e(?![a-z])", gold)
        return relations_agree(gold, got) if relation else expressions_agree(gold, got)
    except MemoryError:
        os._exit(1)  # perhaps earlier questions filled the memory; a new worker is asked again
    except (Exception, KeyboardInterrupt):
        return False
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def serve() -> None:
    """The worker: for each line of its input, a pair of answers, whether they are the same.

    It ends with its input, hence with its parent. At first it fills its caches by EQUALS.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed is no reply
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    for gold, got in EQUALS.items():
        if not expressions_agree(gold, got):
            raise RuntimeError(f"math-verify does not know that {gold} = {got}")
    gc.freeze()  # else sweeps over all of sympy would count as time of questions
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        agree = algebra_agrees(*json.loads(line))
        print(json.dumps(agree), file=replies, flush=True)


class Algebra:
    """math-verify in a process of its own, started by the first question and kept.

    A question may take 0.25 s of processor time, 50 MB of memory and, on a busy machine, 60 s in
    all. One that needs more is answered with False; no worker or no answer in 60 s is an error.
    """

    def __init__(self):
        self.worker = None
        self.lock = threading.Lock()
        if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
            os.register_at_fork(after_in_child=self.forget)

    @property
    def pid(self) -> int | None:
        return self.worker.pid if self.worker else None

    def same(self, gold: str, got: str) -> bool:
        question = json.dumps([gold, got])
        with self.lock:
            for _ in range(2):
                self.start()
                reply = self.reply(question, WALL_SECONDS)
                if reply:
                    return json.loads(reply)
                self.stop()  # it has ended
            self.start()  # If this works, the text is at fault and not the machine.
            return False

    def start(self) -> None:
        if self.worker is not None:
            return
        if importlib.util.find_spec("math_verify") is None:
            raise RuntimeError("answers are compared by math-verify: pip install math-verify")
        self.worker = subprocess.Popen(
            [sys.executable, "-m", "figures.answers"],
            cwd=Path(__file__).resolve().parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the parent
        )
        if self.reply("", 5 * WALL_SECONDS) != "ready\n":
            self.stop()
            raise RuntimeError(
                "the process that compares answers did not start (its error is above): is memory "
                "short, or math-verify broken?"
            )

    def reply(self, question: str, seconds: float) -> str:
        """The worker's next line, after a question if there is one; "" if it has ended."""
        try:
            if question:
                print(question, file=self.worker.stdin, flush=True)
            if connection.wait([self.worker.stdout], seconds):
                return self.worker.stdout.readline()
            raise RuntimeError("the machine is too busy to compare answers")
        except BrokenPipeError:
            return ""
        except BaseException:  # else its reply would be taken for the next question's
            self.stop()
            raise

    def stop(self) -> None:
        if self.worker is not None:
            self.worker.kill()
            self.worker.communicate()
        self.worker = None

    def forget(self) -> None:
        """In a fork: the worker is the parent's."""
        self.worker = None
        self.lock = threading.Lock()


ALGEBRA = Algebra()
atexit.register(ALGEBRA.stop)

if __name__ == "__main__":
    serve()
