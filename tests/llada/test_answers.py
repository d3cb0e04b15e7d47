"""Which answers are right, and what they earn."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from figures import answers
from llada_finetune import TASKS

GRID = "1234341221434321"
OTHER = "3214143221434321"  # differs from GRID in cells 0, 2, 4 and 6
ONE_SOLUTION = {"puzzle": "0234341221434320", "solution": GRID}
TWO_SOLUTIONS = {"puzzle": "0204040221434321", "solution": GRID}
ROWS = {
    "countdown": {"numbers": [2, 3, 4], "target": 5},
    "gsm8k": {"question": "What?", "answer": "6 x 7\n#### 42"},
    "sudoku": ONE_SOLUTION,
    "math": {"question": "What?", "answer": r"$\boxed{41}$, no, $\boxed{42}$."},
}
RIGHT = {"countdown": "2*4-3", "gsm8k": "42", "sudoku": GRID, "math": "42"}
WRONG = {"countdown": "2+3", "gsm8k": "41", "sudoku": OTHER, "math": "41"}
NAMES = [*ROWS]


def tag(answer):
    return f"<answer>{answer}</answer>"


def boxed(answer):
    return rf"\boxed{{{answer}}}"


def form(answer):
    return f"<reasoning>\nfirst\nsecond\n</reasoning>\n<answer>\n{answer}\n</answer>"


def fuzz(examples, **texts):
    return lambda test: settings(
        max_examples=examples, derandomize=True, deadline=None, database=None
    )(given(**texts)(test))


def pieces(most, some):
    return st.lists(st.sampled_from(some), max_size=most).map("".join)


# ---- where the answer is -------------------------------------------------------------------------
PLACES = [  # R and W stand for a right and a wrong answer; whether the reward, the metric sees R
    pytest.param("<answer>R</answer>", True, True, id="tags"),
    pytest.param("<answer>\nR\n</answer>", True, True, id="tags on lines of their own"),
    pytest.param(r"<answer>so \boxed{R} it is</answer>", True, True, id="box in tags"),
    pytest.param(r"<answer>\boxed{W}, no, \boxed {R}</answer>", True, True, id="last box in tags"),
    pytest.param("<answer>W</answer><answer>R</answer>", True, True, id="last tags"),
    pytest.param("<answer>R</answer></answer>", True, True, id="closed twice"),
    pytest.param("<answer>R</answer><answer>W", True, True, id="whole before open"),
    pytest.param("<answer><answer>R</answer>", True, True, id="opened twice"),
    pytest.param("</answer><answer>R</answer>", True, True, id="closed before"),
    pytest.param(r"\boxed{W}<answer>R</answer>\boxed{W}", True, True, id="boxes outside"),
    pytest.param("<answer>W</answer>", False, False, id="wrong"),
    pytest.param("<answer>R</answer><answer>W</answer>", False, False, id="last is wrong"),
    pytest.param(r"<answer>\boxed{R}\boxed{W}</answer>", False, False, id="last box is wrong"),
    pytest.param(r"<answer>W</answer>\boxed{R}", False, False, id="tags before boxes"),
    pytest.param("</answer>R<answer>", False, False, id="tags the wrong way round"),
    pytest.param("R", False, False, id="no sign of an answer"),
    pytest.param("", False, False, id="nothing"),
    pytest.param("so\n</reasoning>\n<answer>\nR", False, True, id="tags never closed"),
    pytest.param("<answer>\n\\boxed{R\n</answer>", False, True, id="box never closed in tags"),
    pytest.param("<answer>\n\\boxed{R", False, True, id="neither closed"),
    pytest.param("<answer>\nboxed{R}\n</answer>", False, True, id="box without its backslash"),
    pytest.param("so\n</reasoning>\nR", False, True, id="after the reasoning"),
]


@pytest.mark.parametrize("task", NAMES)
@pytest.mark.parametrize("text, rewarded, correct", PLACES)
def test_the_last_whole_answer_counts_in_it_the_last_box_and_the_metric_looks_further(
    task, text, rewarded, correct
):
    row = ROWS[task]
    text = text.replace("R", RIGHT[task]).replace("W", WRONG[task])
    assert TASKS[task].correct(text, row) is correct
    if "boxed" not in text or rewarded or not correct:
        best = 2.0 if task in ("gsm8k", "math") else TASKS[task].top
        assert (TASKS[task].reward(text, row) >= best) is rewarded


@pytest.mark.parametrize("task", NAMES)
def test_a_box_anywhere_counts_for_the_metric_and_in_gsm8k_and_math_for_the_reward(task):
    text = "It is " + boxed(RIGHT[task])
    assert TASKS[task].correct(text, ROWS[task])
    rewarded = TASKS[task].reward(text, ROWS[task]) >= 2
    assert rewarded is (task in ("gsm8k", "math"))


@pytest.mark.parametrize(
    "text, answer",
    [
        pytest.param(r"so \boxed 30.", "30.", id="no braces"),
        pytest.param(r"so \boxed{}30 </reasoning> <answer>\boxed{}31</answer>", "31", id="empty"),
        pytest.param("<answer>\n</answer> \\boxed{5}", "5", id="blank tags before a box"),
        pytest.param(r"so it is \boxed{225>", "225", id="closed by another sign"),
        pytest.param(tag("first " * 60) + boxed(7), "7", id="working between the tags"),
    ],
)
def test_final_answer(text, answer):
    assert answers.final_answer(text) == answer


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


@fuzz(400, text=pieces(14, TAGS))
def test_extract_by_other_means(text):
    inside = re.findall("<answer>((?:(?!</?answer>).)*)</answer>", text, re.S)
    best = None
    if inside:
        box = slow_last_box(inside[-1])
        best = inside[-1].strip() if box is None else box
    assert answers.last_box(text) == slow_last_box(text)
    assert answers.extract(text) == best
    assert answers.extract(text, box_anywhere=True) == (best if inside else slow_last_box(text))


# ---- Countdown and Sudoku ------------------------------------------------------------------------
NEST = "(" * 40 + "2*4-3" + ")" * 40
DEEP = "(" * 2000 + "2*4-3" + ")" * 2000
COUNTDOWN = [  # target, numbers, right expressions, wrong ones
    (5, [2, 3, 4], [r"$2\times4-3$", r"\left(2 \cdot 4\right) − 3", "2×4-3 = 5", NEST], []),
    (5, [2, 3, 4], [r"\boxed{2*4-3}=5", "-(3-4*2)", "2*4-3.", r"\(2*4-3\)", r"\[ 4*2-3 \]"], []),
    (5, [2, 3, 4], [], ["5", "= 5", "5 = 2*4-3", "2+3", "2+3+4", "2*4-3+2-2", "23-4", "02*4-3"]),
    (5, [2, 3, 4], [], ["2.0*4-3", "٢*٤-٣", "\uff12*4-3", "2*4-3;", "2*4-3 # 9", "{2*4}-3"]),
    (5, [2, 3, 4], [], ["(2)(3)(4)", "2/(4-4)-3", "__import__('os')", "9**" * 20 + "9", DEEP]),
    (8, [2, 3], [], ["2**3", "9" * 2000, ""]),
    (24, [3, 8, 8, 3], ["8/(3-8/3)", r"\frac{8}{3-8/3}"], ["3*8"]),
    (1, [1, 3, 3], [r"1*3\div3", r"1*\frac{3}{3}", "3÷3*1"], []),
    (2, [5, 2], [], ["5//2", "5/2"]),
]


@pytest.mark.parametrize("target, numbers, right, wrong", COUNTDOWN)
def test_countdown_expressions(target, numbers, right, wrong):
    task = TASKS["countdown"]
    row = {"numbers": numbers, "target": target}
    for expression in right + wrong:
        text = tag(expression)
        assert task.correct(text, row) is (expression in right), expression
        assert task.reward(text, row) == (1.0 if expression in right else 0.1), expression


SUDOKU = [  # an answer, its row, right cells, whether it solves
    pytest.param(GRID, ONE_SOLUTION, 2, True, id="right"),
    pytest.param("1234\n3412\n2143\n4321", ONE_SOLUTION, 2, True, id="in four lines"),
    pytest.param("1 |2" + GRID[2:], ONE_SOLUTION, 2, True, id="with bars"),
    pytest.param("19" + GRID[2:], ONE_SOLUTION, 2, False, id="a clue overwritten"),
    pytest.param("9" + GRID[1:], ONE_SOLUTION, 1, False, id="no digit of the game"),
    pytest.param(GRID[:15], ONE_SOLUTION, 1, False, id="too short"),
    pytest.param(GRID + "99", ONE_SOLUTION, 2, True, id="too long"),
    pytest.param("4x4: " + GRID, ONE_SOLUTION, 0, False, id="digits before"),
    pytest.param(OTHER, ONE_SOLUTION, 1, False, id="another grid"),
    pytest.param(OTHER, TWO_SOLUTIONS, 0, True, id="the other solution"),
    pytest.param(GRID, TWO_SOLUTIONS, 4, True, id="the stored solution"),
    pytest.param("\uff11" + GRID[1:], ONE_SOLUTION, 0, False, id="a wide digit"),
]


@pytest.mark.parametrize("answer, row, right, solved", SUDOKU)
def test_sudoku_cells_against_the_solution_but_any_grid_on_the_clues_solves(
    answer, row, right, solved
):
    task = TASKS["sudoku"]
    empty = row["puzzle"].count("0")
    for text in (tag(answer), "<answer>" + tag(answer)):
        assert task.correct(text, row) is solved
        assert task.cells(text, row) == (right, empty)
        assert task.reward(text, row) == 2 * right / empty
    full = {"puzzle": GRID, "solution": GRID}
    assert task.reward(tag(answer), full) == 2 * (re.sub("[^0-9]", "", answer)[:16] == GRID)


# ---- numbers and expressions ---------------------------------------------------------------------
VECTOR = r"\begin{pmatrix} %s \\ %s \end{pmatrix}"
MATH = [  # the right answer, ways to say it, answers that are not it
    pytest.param("5", ["x = 5", "f(3)=5", "2+3=5", "5.", "$5$", r"\(5\)", r"\[ 5 \]"], [], id="5"),
    pytest.param("5", [], ["2+2=5", "1=5", "5=6", "x=6", "x>5", "-5/0", "--6"], id="equations"),
    pytest.param("5", [], ["4 or 5", "5, 6", r"5 \text{ and } 6", r"\{5,6\}"], id="several"),
    pytest.param("5", [], ["about 5", "5?", r"5\ldots", "5x", "5 x", "five", "1 5", ""], id="no"),
    pytest.param("5", ["5 m", "5 eggs", r"5\text{ km}", r"5^\circ", "5°", r"\$5"], [], id="unit"),
    pytest.param("72", [], ["72 dozen", "6 dozen", "72 thousand", "72 squared"], id="scale"),
    pytest.param(r"10\text{ m}", ["10", "10 meters", "10 m"], [r"10\text{ km}", "10 s"], id="m"),
    pytest.param(r"15\mbox{ cm}^2", ["15 square cm", "15"], ["15 cm", "15 cm^3"], id="area"),
    pytest.param(r"\$18.90", ["18.9", r"\$18.9", "18.9 dollars"], ["18.9 cents", "18"], id="money"),
    pytest.param("5", ["5.0"], [r"5\%", "5 percent"], id="no percent"),
    pytest.param(r"\frac12", ["0.5", r"50\%", ".5", "1/2"], [r"0.5\%", "-0.5", "0.51"], id="half"),
    pytest.param(r"50\%", ["50", "50%", "50 percent"], ["0.5", r"\$50"], id="percent"),
    pytest.param("101_2", ["101_{2}", "101_2"], ["101_3", "101_{10}", "5", "110_2"], id="base"),
    pytest.param("5", [], ["101_2", "5_7"], id="no base"),
    pytest.param("1000", [r"1\,000", r"1,\!000", "1{,}000", "$1,000"], [r"1\,00"], id="1000"),
    pytest.param("27", ["The final answer is: $27$."], ["The answer is 27 or 28"], id="sentence"),
    pytest.param("2", [r"\log_2 4", r"\log_{2} 4", r"\log_2(4)"], [r"\log_4 2"], id="log"),
    pytest.param("-5", ["−5", "-5", "-10/2"], ["5", "- -5"], id="minus"),
    pytest.param(r"\frac{1}{3^{40}}", ["3^{-40}"], [r"\frac{1}{3^{41}}", "0"], id="tiny"),
    pytest.param("2^{2006}+2^{2005}", [r"3\cdot2^{2005}"], ["2^{2006}", "2^{2006}+1"], id="large"),
    pytest.param("10^{20}", [r"10^{10}\cdot10^{10}"], [r"\sqrt{10^{40}+1}"], id="root"),
    pytest.param(r"\sqrt{8}", [r"2\sqrt{2}", r"2\sqrt2", "2.82842712475"], ["2.828"], id="sqrt8"),
    pytest.param("1/3", ["0.3333333333", r"\frac13"], ["0.333333", "0.33"], id="third"),
    pytest.param("1/6", ["0.166666667", r".1\overline6"], ["0.16667", r"0.\overline{1}"], id="1/6"),
    pytest.param("0.25", ["1/4", ".25"], ["0.2500000001", "0.24999999999"], id="decimal"),
    pytest.param(r"\pi", ["3.14159265359", r"\frac{2\pi}{2}"], ["3.14", "22/7", "3.1416"], id="pi"),
    pytest.param("6", ["2(3)", "(2)(3)", r"2\cdot 3", "3!"], [r"\frac51\frac11"], id="no sum"),
    pytest.param(r"\frac95", [r"1\frac{4}{5}", "1 4/5", "1.8"], ["1 4/5 x", "0 9/5"], id="mixed"),
    pytest.param("-9/5", ["-1 4/5"], ["1 4/5", "-0 9/5", "- 4/5"], id="mixed and negative"),
    pytest.param("(1,2)", ["( 1,2 )", r"\left(1, 2\right)"], ["(2,1)", "[1,2]"], id="pair"),
    pytest.param("[1,2)", ["[1, 2)"], ["(1,2)", "[1,2]", "[2,1)"], id="interval"),
    pytest.param("1,-2", ["-2, 1", r"\{1,-2\}", "1 and -2", "x=1, x=-2"], ["1", "1,2"], id="list"),
    pytest.param(r"1\pm\sqrt2", [r"1-\sqrt2, 1+\sqrt2"], [r"1+\sqrt2", r"\pm\sqrt2"], id="pm"),
    pytest.param(r"(0,9)\cup(9,36)", [r"(9,36) \cup (0, 9)"], ["(0,36)", "(0,9)"], id="union"),
    pytest.param(r"x\in[-2,7]", ["[-2,7]", r"-2\le x\le 7"], [r"-2 < x\le 7", "(-2,7)"], id="in"),
    pytest.param("y=2x+3", ["2x+3", "3+2x=y", "y-2x=3"], ["x=2y+3", "y=2x"], id="a line"),
    pytest.param("x=5", ["5", "2x=10"], ["y=5", "1=5", "x=4"], id="a name"),
    pytest.param("x>5", ["5<x", "2x > 10"], ["x<5", r"x\ge5", "5>x"], id="inequality"),
    pytest.param("(x+1)^2", ["x^2+2x+1"], ["x^2+1", "(x+1)^{999}"], id="polynomial"),
    pytest.param("2k", ["k+k", "2 k"], ["2", "2m", "k^2"], id="variable"),
    pytest.param("-2 + 7i", ["7i - 2"], ["7i+2", "-2"], id="complex"),
    pytest.param(r"\text{(B)}", ["B", "(B)", r"\text{B}"], ["C", "(C)", "A, B"], id="choice"),
    pytest.param(r"\text{even}", ["even", "Even"], ["odd", "not even"], id="word"),
    pytest.param(VECTOR % (1, 2), [VECTOR % (1, r"\frac42")], [VECTOR % (2, 1)], id="vector"),
    pytest.param(r"\boxed{4}, no, $\boxed{1{,}235}$.", ["1235"], ["4", "4, 1235"], id="solution"),
    pytest.param("5", [], ["7^{7^{9}}", r"\binom{8000}{4000}", "99999!", "5" * 301], id="giants"),
    pytest.param("5", [], ["9^{99999}", "(((9^{99})^{99})^{99})^{99}", "9!!!"], id="towers"),
    pytest.param("9", ["(((9)))"], ["(" * 9 + "8" + ")" * 9, "9" * 250 + "^{99999}"], id="nests"),
    pytest.param("x^{99}+x^9+9x", ["x^{99}+x^{9}+9x"], ["x^{99}"], id="many powers"),
]


@pytest.mark.parametrize("gold, right, wrong", MATH)
def test_math_answers(gold, right, wrong):
    task = TASKS["math"]
    row = {"question": "What?", "answer": gold}
    for answer in right + wrong:
        text = tag(answer)
        assert task.correct(text, row) is (answer in right), answer
        assert task.reward(text, row) == 2 * (answer in right) + 0.75, answer


THOUSANDS = ["1234", "1,234", "$ 1,234", r"\$1,234.00", "1234.", "01234", r"1234 \%", "1234 eggs"]
NOT_THOUSANDS = ["١٢٣٤", "1 2 3 4", "12,34", "-1234", "123400", ""]
GSM8K = [
    pytest.param("Add.\n#### 1,234", THOUSANDS, NOT_THOUSANDS, id="thousands"),
    pytest.param("#### -5", ["-5", "-$5", "-10/2", "-5%"], ["5", "-5/0"], id="negative"),
    pytest.param("12", ["12", r"\frac{24}{2}"], ["1\n2", "1.2e1", "12 or 13"], id="no mark"),
    pytest.param("15.5", ["31/2", "15.50"], ["3 1/2", "15", "15.500001"], id="decimal"),
]


@pytest.mark.parametrize("gold, right, wrong", GSM8K)
def test_gsm8k_answers(gold, right, wrong):
    task = TASKS["gsm8k"]
    for answer in right + wrong:
        assert task.correct(tag(answer), {"answer": gold}) is (answer in right), answer
        reward = task.reward(tag(answer), {"answer": gold})
        assert reward in ((2.0, 2.5) if answer in right else (0.0, 0.5)), answer


def test_a_question_for_percents_takes_them_with_and_without_the_sign():
    row = {"question": "What percent is it?", "answer": "28"}
    assert TASKS["math"].correct(boxed(r"28\%"), row) and TASKS["math"].correct(boxed(28), row)


# ---- rewards -------------------------------------------------------------------------------------
PARTS = [
    pytest.param("gsm8k", form(42), 4, id="gsm8k all"),
    pytest.param("gsm8k", f"\n{form(42)}\n", 4, id="gsm8k blank lines around"),
    pytest.param("gsm8k", form(41), 2, id="gsm8k wrong number"),
    pytest.param("gsm8k", form("x"), 1.5, id="gsm8k no number"),
    pytest.param("gsm8k", form(42) + "\nabc", 3.497, id="gsm8k text after it"),
    pytest.param("gsm8k", form(42)[:-9], 0.375, id="gsm8k not closed"),
    pytest.param("gsm8k", boxed(42), 2, id="gsm8k box alone"),
    pytest.param("gsm8k", "<reasoning>a\n</reasoning> " + tag(42), 3, id="gsm8k one line"),
    pytest.param("gsm8k", form(42).replace("second", "<answer>"), 3.875, id="gsm8k extra tag"),
    pytest.param("gsm8k", tag("\n42\n"), 2.75, id="gsm8k answer alone"),
    pytest.param("gsm8k", "</answer> x", 0, id="gsm8k never negative"),
    pytest.param("math", form(boxed(42)), 3, id="math all"),
    pytest.param("math", form(42), 2.75, id="math no box"),
    pytest.param("math", boxed(42), 2.5, id="math no tags"),
    pytest.param("math", boxed(4), 0.5, id="math wrong box"),
    pytest.param("math", "", 0.25, id="math nothing"),
    pytest.param("countdown", "2*4-3", 0, id="countdown no tags"),
    pytest.param("countdown", boxed("2*4-3"), 0, id="countdown box alone"),
]


@pytest.mark.parametrize("task, text, reward", PARTS)
def test_the_parts_of_a_reward(task, text, reward):
    assert TASKS[task].reward(text, ROWS[task]) == pytest.approx(reward, abs=1e-9)


PIECES = [*"{}()\n =*/+-239$,.%x٣\0", "42", "2*4-3", GRID, "<answer>", "</answer>", r"\boxed{"]
PIECES += ["<reasoning>\n", "\n</reasoning>\n"]
STARTS = (["", GRID, boxed(42), tag(7)], ["<answer>", ""], ["2*4-3", GRID, "42", "$4,2", "="])
LIKELY = st.tuples(*map(st.sampled_from, (*STARTS, ["</answer>", "", "}"], ["", "\n!"])))
TEXTS = st.text(max_size=60) | pieces(20, PIECES) | LIKELY.map("".join)


BOUNDS = [("countdown", 1, 0.1), ("sudoku", 2, 2), ("gsm8k", 2, 2), ("math", 2, 1)]


@pytest.mark.parametrize("task, least, most", BOUNDS)
def test_any_text_has_a_reward_that_tells_right_from_wrong(task, least, most):
    seen = set()

    @fuzz(60 if task == "math" else 300, text=TEXTS)
    def check(text):
        reward = TASKS[task].reward(text, ROWS[task])
        correct = TASKS[task].correct(text, ROWS[task])
        seen.add(correct)
        assert 0 <= reward <= TASKS[task].top
        if not correct:  # with spoilt clues, all cells of a Sudoku may still be right
            assert reward <= most
        elif answers.final_answer(text) == answers.extract(text, task in ("gsm8k", "math")):
            assert reward >= least - 0.001 * len(text) * (task == "gsm8k")

    check()
    assert seen == {True, False}
