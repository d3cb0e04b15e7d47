"""Find the final answer in a text that a model wrote, and compare it with the right answer.

A text should put its answer between <answer> and </answer>, or into a box: \\boxed{...} or
\\fbox{...}. The reward of training is strict and reads what `extract` returns. The metric of an
evaluation is lenient and reads what `final_answer` returns. `answers_match` compares an answer with
the right one, which is called gold.

The comparison is done by math-verify, a package that decides whether two mathematical answers are
equal. For an answer like 9^9^9^9 it would never finish. So it runs in a process of its own, which
can be stopped, unlike a thread; after three seconds the answer counts as wrong. The process runs
this file. It imports neither torch nor the rest of the project, so that it starts fast.

What math-verify 0.9 gets wrong is not repaired here. It accepts 1/3^41 for 1/3^40, because it
compares numbers to 15 decimal places; 10 km for 10 m, because it drops units; 101_3 for 101_2,
because it drops bases; and 2:3 for 2/3. It reads 2(3) as the mixed number 2 + 3.
"""

import atexit
import contextlib
import faulthandler
import functools
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time

LONGEST_ANSWER = 300  # characters; a longer text between the tags is reasoning
LONGEST_TEXT = 50_000  # characters at the end of a text, where its answer is looked for
SECONDS_PER_QUESTION = 3  # wall-clock time
START_SECONDS = 300  # for importing math-verify, which is slow from a network disk
MEMORY_LIMIT = 2**30  # bytes of address space, five times what usual answers need


class MathVerifyError(ValueError):
    """math-verify is not installed, or the process that runs it does not start."""


# ---- Finding the answer --------------------------------------------------------------------------
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
REST_OF_LINE = re.compile(r"[^\n$<>]*")  # the content of a box that is never closed
# Boxes with this between them are one answer: \boxed{3} and \boxed{5}.
BETWEEN_BOXES = r"[\s$]*(?:,|,?\s*(?:\\text\s*\{\s*)?(?:and|or)\s*\}?)[\s$]*"
# This announces an answer: GSM8K's "####", "The answer is" or "**Answer:**".
ANNOUNCEMENT = r"(?:####|(?i:\banswer(?: is| ?=|\**:)))[\s:*]*"
# This matches a tag, or what is left of one: </answer>, </answer, <answer>, <.
PIECE_OF_A_TAG = r"<\s*[/\\]\s*\w*\s*>?|<[a-z]{5,}>?|<$"


def closing_braces(text: str) -> dict[int, int]:
    """Return {position of an opening brace: position of the brace that closes it}."""
    opened = []
    closing = {}
    for brace in re.finditer("[{}]", text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif opened:
            closing[opened.pop()] = brace.start()
    return closing


def last_box(text: str, accept_open: bool = False) -> str | None:
    """Return the content of the last box whose braces balance, or None.

    Boxes that only a comma, "and" or "or" separates are one answer: \\boxed{3} and \\boxed{5} give
    "3, 5".

    accept_open   if the last box is never closed, return what follows it on its line
    """
    text = text[-LONGEST_TEXT:]
    closing = closing_braces(text)
    boxes = [*BOX.finditer(text)]
    if accept_open and boxes and boxes[-1].end() - 1 not in closing:
        rest = REST_OF_LINE.match(text, boxes[-1].end())[0].strip()
        if rest:
            return rest
    contents = []
    next_box = len(text)
    for box in reversed(boxes):
        end = closing.get(box.end() - 1)
        if end is None:
            continue
        if contents and not re.fullmatch(BETWEEN_BOXES, text[end + 1 : next_box]):
            break
        contents.insert(0, text[box.end() : end].strip())
        next_box = box.start()
    return ", ".join(contents) if contents else None


def last_tagged(text: str) -> str | None:
    """Return the content of the last closed <answer>...</answer>, or None."""
    answers = re.findall("<answer>((?:(?!</?answer>).)*)</answer>", text[-LONGEST_TEXT:], re.S)
    return answers[-1].strip() if answers else None


def extract(text: str, box_anywhere: bool = False) -> str | None:
    """Return the answer that a reward reads, or None.

    The answer is the last box inside the last closed <answer>. If that has no box, it is all of its
    content.

    box_anywhere   without a closed <answer>, return the last box of the text (GSM8K and MATH)
    """
    inside = last_tagged(text)
    if inside is None:
        return last_box(text) if box_anywhere else None
    box = last_box(inside)
    return inside if box is None else box


def after_marker(text: str) -> str:
    """Return the last nonblank text after an open <answer>, a </reasoning> or a </answer>, or "".

    If several of these tags occur, the one named first here is used. In a text without them,
    return the rest of the line after "####" or "answer is".
    """
    for tag in ("<answer>", "</reasoning>", "</answer>"):
        if tag in text:
            pieces = text.split(tag)[1:]
            break
    else:
        pieces = re.findall(rf"{ANNOUNCEMENT}(.+)", text)
    pieces = [re.sub(PIECE_OF_A_TAG, "", piece).strip() for piece in pieces]
    return next((piece for piece in reversed(pieces) if piece), "")


def final_answer(text: str) -> str | None:
    """Return the answer that the metric reads, found as a careful reader would, or None.

    It is the first of these that is not blank:

    1. the last box inside the last closed <answer>,
    2. all the content of that <answer>, unless it is longer than LONGEST_ANSWER,
    3. the last box anywhere in the text,
    4. what follows an open <answer>, or else </reasoning>, or else </answer>,
    5. in a text without these three tags, what follows "####" or "answer is" on its line.

    A box may lack its closing brace, its backslash, or both of its braces.
    """
    # An empty box or <answer> holds no answer.
    text = re.sub(r"\\boxed\s*\{\s*\}|<answer>\s*</answer>", "", text[-LONGEST_TEXT:])
    # boxed{5} becomes \boxed{5}.
    text = re.sub(r"(?<![\\a-zA-Z])boxed\s*\{", r"\\boxed{", text)
    # \boxed 5 becomes \boxed{5}.
    text = re.sub(r"\\boxed\s*(-?[\w.,/]+)", r"\\boxed{\1}", text)
    inside = last_tagged(text) or ""
    short = inside if len(inside) <= LONGEST_ANSWER else ""
    box = last_box(inside, accept_open=True) or short or last_box(text, accept_open=True)
    return box or after_marker(text.replace(f"<answer>{inside}", "") if inside else text) or None


# ---- Comparing answers ---------------------------------------------------------------------------
NUMBER = r"-?\s*(?:\\?\$)?\s*-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+)?"
FRACTION = r"\\[dtc]?frac\s*(?:\{[^{}]*\}|\d)\s*(?:\{[^{}]*\}|\d)"
# Words after a number are its unit, except these.
NOT_A_UNIT = (
    "and|or|plus|minus|times|choose|mod|squared|cubed|factorial|half|dozen|hundred|thousand"
    "|million|billion|pi|sqrt|sin|cos|tan|log|ln"
)
UNIT_IN_TEXT = r"\\text\s*\{[^{}]*\}"  # \text{ cm}
# sq. ft. (The last condition leaves one way to match, or else the time could be exponential.)
UNIT_IN_WORDS = rf"(?!(?:{NOT_A_UNIT})\b)[a-zA-Z]{{2,}}[a-zA-Z/.\s]*(?![a-zA-Z/.\s])"
POWER_OF_A_UNIT = r"\^\{?[23]\}?"  # ^2 or ^{3}
UNIT = rf"(?:{UNIT_IN_TEXT}|{UNIT_IN_WORDS})(?:{POWER_OF_A_UNIT})?"
RAISED = r"\^\{?(?:\\(?:text|mathrm))?\s*\{?"  # in 12^{\text{th}}, what is between "12" and "th"
ORDINAL = rf"(?:(?<=\d)|{RAISED})(?:st|nd|rd|th)\}}*$"
# Unicode signs become LaTeX.
LATEX = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "·": r"\cdot ",
        "∞": r"\infty ",
        "°": r"^\circ ",
        "½": r"\frac12 ",
        "√": r"\sqrt ",
        "€": "",
        "£": "",
        **{sign: f"^{digit}" for digit, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    }
)
# Before math-verify reads an answer, these patterns are replaced, in this order. Each comment shows
# a text that matches.
CLEANING = [
    (rf"(?s)^.*{ANNOUNCEMENT}", ""),  # The answer is 5
    (r"(?<!\\)\\[()\[\]]", "$"),  # \(5\)
    (
        r"^[^$]*\$+\s*([^$]+?)\s*\$+(?!\s*\d)[^$]*$",
        r"\1",
    ),  # Hence $x = 5$ is the smallest; but not $5 and $6
    (r"^[*\s]+|[*\s.\\]+$", ""),  # **5**.
    (r"\\(?:boldsymbol|bm|pmb|underline|math(?:bf|it|sf|tt)|bf)(?![a-z])", ""),  # \mathbf{5}
    (r"\\(?:emph|text(?:bf|it|tt|rm|normal|superscript))(?![a-z])", r"\\text"),  # \textbf{even}
    (r"^\\text\s*\{\s*(\d[^{}]*)\}$", r"\1"),  # \text{45 fairies}
    (r"(?<=\d)\\[,;:! ](?=\d{3})", ""),  # 385\,000
    (r"(?<!\\)\\[,;: ]|~", " "),  # 5\,\text{cm}
    (ORDINAL, ""),  # 12th or 12^{\text{th}}
    (r"(\d)[eE]([+-]?\d+)", r"\1 \\times 10^{\2}"),  # 1.2e-5
    (r"^0,(?=\d)", "0, "),  # 0,245 is a list: no number with a thousands comma starts with 0
    (r"^(-?\d+) +(\d+)/(\d+)(?!\d)", r"\1\\frac{\2}{\3}"),  # 1 1/2
    # \sqrt\frac23, \sqrt(2), or the "\sqrt 12" that LATEX made of √12
    (rf"\\sqrt\s*(?:({FRACTION})|\(([^()]*)\)|(?<= )(\d+))", r"\\sqrt{\1\2\3}"),
    (r"\s*(?:\\text\s*\{\s*)?(?:\\?%|\b(?:percent(?:age)?|pct)\b)\s*\}?$", r"\\%"),  # 5 percent
    (rf"^({NUMBER}|-?\d*{FRACTION})\s*(?:{UNIT}\s*)+$", r"\1"),  # 45 fairies
]


def clean(text: str) -> str:
    """Return an answer in a form that math-verify can read, without a unit after a number."""
    text = text.translate(LATEX)
    for pattern, replacement in CLEANING:
        text = re.sub(pattern, replacement, text)
    return text


def is_equal(gold: str, answer: str) -> bool:
    """Return whether math-verify finds two answers equal; only the process of `Worker` calls it."""
    from math_verify import parse, verify

    pairs = [(clean(gold), clean(answer))]
    without_percent = [text.removesuffix(r"\%") for text in pairs[0]]
    if all(re.fullmatch(NUMBER, text) for text in without_percent):
        pairs.append(without_percent)
    for pair in pairs:
        boxes = [rf"\boxed{{{text}}}" for text in pair]
        # If parse cannot read a whole box, by default it reads the last fraction or number in it,
        # such as 1/4 in \left( \frac{1}{4}. With first_match it reads the whole box or nothing.
        parsed = [parse(b, extraction_mode="first_match", parsing_timeout=None) for b in boxes]
        # allow_set_relation_comp lets an inequality equal an interval: x > 2 and (2, \infty).
        if verify(*parsed, allow_set_relation_comp=True, timeout_seconds=None):
            return True
    return False


def answer_questions() -> None:
    """Read a JSON list [gold, answer] from each line of standard input, and print true or false.

    The process ends when its input ends, so it does not outlive its parent. It ends itself if a
    question takes so long that the parent should have stopped it.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print must not be taken for a reply.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    is_equal(r"\frac{1}{2}", "0.5")  # The first call imports math-verify and builds its tables.
    with contextlib.suppress(ImportError, OSError, ValueError):  # Not every system can limit this.
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        # This starts a timer that ends the process even inside C code.
        faulthandler.dump_traceback_later(3 * SECONDS_PER_QUESTION, exit=True)
        try:
            verdict = is_equal(*json.loads(line))
        except Exception:  # An answer that math-verify cannot read is wrong.
            verdict = False
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(bool(verdict)), file=replies, flush=True)


class Worker:
    """One process that runs `answer_questions`. The first question starts it, and it is kept.

    Several threads may ask; they take turns.
    """

    def __init__(self):
        self.forget()
        if hasattr(os, "register_at_fork"):  # Windows does not fork.
            os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        """Forget the process.

        It belongs to the parent, and after a fork the child must start its own.
        """
        self.process = None
        self.lock = threading.Lock()

    def ask(self, gold: str, answer: str) -> bool:
        """Return whether two answers are equal; False if the process takes too long or dies twice.

        If the process dies before its time is up, it may have been killed from outside, so the
        question is asked once more in a new process.
        """
        question = json.dumps([gold, answer]) + "\n"
        with self.lock:
            for _ in range(2):  # The second time is for a process that was killed from outside.
                self.start()
                began = time.monotonic()
                reply = self.exchange(question, SECONDS_PER_QUESTION)
                if reply:
                    return reply == "true\n"
                self.stop()
                if time.monotonic() - began >= SECONDS_PER_QUESTION:
                    break
            return False

    def start(self) -> None:
        """Start the process unless there is one. Raise MathVerifyError if it cannot start."""
        if self.process is not None:
            return
        if importlib.util.find_spec("math_verify") is None:
            raise MathVerifyError(
                "math-verify, which compares answers, is missing: run pip install math-verify."
            )
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # A fork must not inherit, and later write, half a question.
            start_new_session=True,  # Ctrl-C must reach only the parent.
        )
        if self.exchange("", START_SECONDS) != "ready\n":
            self.stop()
            raise MathVerifyError(
                "The process that compares answers with math-verify did not start; "
                "mend the error that it printed above."
            )

    def exchange(self, question: str, seconds: float) -> str:
        """Send a question and return the line with which the process answers.

        Return "" if it dies or needs more than that many seconds.
        """
        timer = threading.Timer(seconds, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(question.encode())
            return self.process.stdout.readline().decode()
        except BrokenPipeError:
            return ""
        except BaseException:  # Otherwise the next question would get the reply to this one.
            self.stop()
            raise
        finally:
            timer.cancel()

    def stop(self) -> None:
        """End the process, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        self.process = None


WORKER = Worker()
atexit.register(WORKER.stop)


@functools.lru_cache(10_000)  # The reward and the metric of a text ask the same question.
def answers_match(gold: str, answer: str | None) -> bool:
    """Return whether an answer is right.

    gold     the right answer, or a solution that ends in it: in a box or after "####"
    answer   what `extract` or `final_answer` returns; None is wrong, and so is an answer that is
             longer than LONGEST_ANSWER
    """
    if not answer or len(answer) > LONGEST_ANSWER:
        return False
    return WORKER.ask(final_answer(gold) or gold, answer)


if __name__ == "__main__":
    answer_questions()
