"""Text, tasks and settings of llada_finetune.py: tables by hand, second parsers and solvers, the published numbers."""

import functools
import itertools
import json
import re
import signal
import time
from contextlib import suppress
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

import llada_finetune as llada
from llada_finetune import TASKS, phases, settings

GRID, OTHER = (
    "1234341221434321",
    "3214143221434321",
)  # two valid grids that differ in cells 0, 2, 4 and 6
NEAR, LOOSE = [
    {"puzzle": p, "solution": GRID} for p in ("0234341221434320", "0204040221434321")
]  # one solution, two solutions
ROWS = {
    "countdown": {"numbers": [2, 3, 4], "target": 5},
    "gsm8k": {"question": "What?", "answer": "6 x 7\n#### 42"},
    "sudoku": NEAR,
    "math": {"question": "What?", "answer": r"$\boxed{41}$, no, $\boxed{42}$."},
    "toy": NEAR,
}
FORM = "<reasoning>\nfirst\nsecond\n</reasoning>\n<answer>\n{}\n</answer>".format
tag, boxed, cases = "<answer>{}</answer>".format, r"\boxed{{{}}}".format, pytest.mark.parametrize
fuzz = lambda n, texts: (
    lambda test: examples(max_examples=n, derandomize=True, deadline=None, database=None)(
        given(texts)(test)
    )
)
pieces = lambda n, some: st.lists(st.sampled_from(some), max_size=n).map("".join)


@pytest.fixture(autouse=True)
def bounded_time(monkeypatch):
    monkeypatch.setattr(
        signal, "SIGALRM", signal.SIGVTALRM
    )  # math-verify's alarm after 5 s rings after 1 s of processor time
    monkeypatch.setattr(
        signal, "alarm", lambda seconds: signal.setitimer(signal.ITIMER_VIRTUAL, seconds / 5)
    )
    clock = time.process_time()
    yield
    assert time.process_time() - clock < 30


# ---- rewards -------------------------------------------------------------------------------------
@cases(
    "task, right, wrong, asked",
    [
        ("countdown", "2*4-3", "2+3", "[2, 3, 4] to make exactly 5"),
        ("sudoku", GRID, "", NEAR["puzzle"]),
        ("gsm8k", "42", "41", "What?"),
        ("math", "42", "41", "What?"),
    ],
)
def test_the_last_whole_answer_counts_in_it_the_last_box_and_a_prompt_asks_for_what_earns_the_top(
    task, right, wrong, asked
):
    t, row, good, bad, box = TASKS[task], ROWS[task], tag(right), tag(wrong), boxed(right)
    for text in (
        good,
        tag(f"\n{right}\n"),
        tag(f"so {box} it is"),
        tag(r"\boxed{1}, no, \boxed {" + right + "}"),
        bad + good,
        good + "</answer>",
        good + "<answer>" + wrong,
        "<answer>" + good,
        "</answer>" + good,
        boxed(wrong) + good + boxed(wrong),
    ):
        assert t.correct(text, row), text
    for text in (
        bad,
        good + bad,
        tag(box + boxed(wrong)),
        "<answer>" + right,
        f"</answer>{right}<answer>",
        right,
        "",
        bad + box,
    ):
        assert not t.correct(text, row), text
    assert t.correct("It is " + box, row) is (task in ("gsm8k", "math"))
    form, best = (
        re.search("<reasoning>\n.*?\n</answer>", t.prompt(row), re.S)[0],
        box if task == "math" else right,
    )
    assert t.reward(form, row) < t.reward(
        form.replace("your answer", best), row
    ) == t.top and asked in t.prompt(row)


def last_box(text):  # from the last start to the only end between which braces cancel
    flat = lambda s: not re.search("[{}]", s) if (t := re.sub("{[^{}]*}", "", s)) == s else flat(t)
    starts = [a for a in range(len(text)) if re.search(r"\\boxed\s*{$", text[:a])]
    return (
        [None]
        + [
            text[a:b].strip()
            for a in starts
            for b in range(a, len(text))
            if text[b] == "}" and flat(text[a:b])
        ]
    )[-1]


@fuzz(
    400, pieces(14, ["<answer>", "</answer>", r"\boxed{", r"\boxed {", "{", "}", "7", " x", "\n"])
)
def test_extract_by_other_means(text):
    inside = ([None] + re.findall("<answer>((?:(?!</?answer>).)*)</answer>", text, re.S))[-1]
    best = inside and (inside.strip() if last_box(inside) is None else last_box(inside))
    assert (llada.last_box(text), llada.extract(text)) == (last_box(text), best)
    assert llada.extract(text, box_anywhere=True) == (last_box(text) if inside is None else best)


SUMS = st.recursive(
    st.sampled_from("0 1 2 7 12 100".split()),
    max_leaves=20,
    extend=lambda e: (
        st.builds("({})".format, e)
        | st.builds("-{}".format, e)
        | st.builds("{}{}{}".format, e, st.sampled_from([*"+-*/*/", " - ", "\n*", "**", "//"]), e)
    ),
)


@fuzz(
    500,
    SUMS
    | st.sampled_from(["1+" * 49 + "12", "1+" * 49 + "123"])
    | pieces(8, [*"0123+-*/() ٣,=", "**", "//", "(4)", "-5*"]),
)
def test_arithmetic_is_evaluation_with_fractions(text):
    plain, value = " ".join(text.split()), None
    if len(text) <= 100 and not re.search(r"[^0-9 ()*/+-]|\*\*|//|(^|[-+*/(]) ?\+", plain):
        with suppress(SyntaxError, TypeError, ZeroDivisionError):
            value = eval(re.sub("[0-9]+", r"Fraction(\g<0>)", plain))
    assert llada.arithmetic(text) == (
        (value, [*map(int, re.findall("[0-9]+", text))]) if isinstance(value, Fraction) else None
    )


CASES = [  # task, target and numbers or gold answer, right answers, wrong answers
    (
        "countdown",
        "5 2 3 4",
        r"$2\times4-3$|\left(2 \cdot 4\right) − 3|2×4-3 = 5|\boxed{2*4-3}=5|-(3-4*2)|"
        + "(" * 40
        + "2*4-3"
        + ")" * 40,
        "|5|= 5|5 = 2*4-3|2+3|2+3+4|2*4-3+2-2|23-4|02*4-3|2.0*4-3|2*4-3.|٢*٤-٣|\uff12*4-3|2*4-3;|2*4-3 # 9|{2*4}-3|(2)(3)(4)|2/(4-4)-3|"
        "__import__('os')|"
        + "9**" * 20
        + "9|"
        + "9" * 2000
        + "|"
        + "(" * 2000
        + "2*4-3"
        + ")" * 2000,
    ),
    ("countdown", "8 2 3", None, "2**3"),
    ("countdown", "24 3 8 8 3", "8/(3-8/3)", "3*8"),
    ("countdown", "1 1 3 3", r"1*3\div3", None),
    ("countdown", "2 5 2", None, "5//2|5/2"),
    (
        "gsm8k",
        "Add.\n#### 1,234",
        r"1234|1,234|$ 1,234|\$1,234.00|1234.|01234|1234 \%",
        "1234 eggs|١٢٣٤|1 2 3 4|12,34|-1234|123400|",
    ),
    ("gsm8k", "#### -5", "-5|-$5|-10/2|-5%", "5|--5|-5/0"),
    ("gsm8k", "12", "12", "1\n2|1.2e1"),
    ("gsm8k", "nan", None, "nan|"),
    ("gsm8k", "15.5", "31/2", "3 1/2"),
    ("math", r"\sqrt{8}", r"2\sqrt{2}", r"2.828|7^{7^{9}}|\binom{800000}{400000}"),
    ("math", r"\frac{1}{2}", r"0.5|1/2|\frac12|\boxed{\frac{1}{2}}", "-0.5|2|1/0||0.51"),
    ("math", "5" * 301, None, "5" * 301),
    ("math", r"First \boxed{4}, but $\boxed{1{,}235}$.", "1235|1,235", "4|1235}6|4, 1235|٣"),
    ("math", "(1,2)", "( 1,2 )", "(2,1)"),
    ("math", "(x+1)^2", "x^2+2x+1", "x^2+1"),
    ("math", "x^{99}+x^9+x^8+x^7+x^6+x^5+9x", "x^{99}+x^{9}+x^8+x^7+x^6+x^5+9x", "x^{99}"),
]


@cases(
    "task, gold, answer, right",
    [
        (task, gold, x, right)
        for task, gold, *both in CASES
        for right, xs in zip((True, False), both)
        for x in (xs or "|").split("|")
        if xs
    ],
)
def test_right_and_wrong_answers(task, gold, answer, right):
    target, *numbers = map(int, gold.split()) if task == "countdown" else [0]
    t, text, row = TASKS[task], tag(answer), {"answer": gold, "numbers": numbers, "target": target}
    part = {
        "countdown": [1 if right else 0.1],
        "gsm8k": [2.5] if right else [0, 0.5],
        "math": [2 * right + (1 if "box" in answer else 0.75)],
    }
    assert t.correct(text, row) is right and t.reward(text, row) in part[task]


@cases(
    "answer, row, right, solved",
    [
        (GRID, NEAR, 2, True),
        ("1234\n3412\n2143\n4321", NEAR, 2, True),
        ("1 |2" + GRID[2:], NEAR, 2, True),
        ("19" + GRID[2:], NEAR, 2, False),
        ("9" + GRID[1:], NEAR, 1, False),
        (GRID[:15], NEAR, 1, False),
        (GRID + "99", NEAR, 2, True),
        ("4x4: " + GRID, NEAR, 0, False),
        (OTHER, NEAR, 1, False),
        (OTHER, LOOSE, 0, True),
        (GRID, LOOSE, 4, True),
        ("\uff11" + GRID[1:], NEAR, 0, False),
    ],
)
def test_sudoku_cells_against_the_solution_but_any_grid_on_the_clues_solves(
    answer, row, right, solved
):
    empty = row["puzzle"].count("0")
    for t, text in (TASKS["sudoku"], tag(answer)), (TASKS["toy"], answer):
        assert (t.correct(text, row), t.cells(text, row), t.reward(text, row)) == (
            solved,
            (right, empty),
            2 * right / empty,
        )
        assert t.reward(text, {"puzzle": GRID, "solution": GRID}) == 2 * (
            "".join(re.findall("[0-9]", answer))[:16] == GRID
        )  # no empty


@cases(
    "task, parts",
    [
        (
            "gsm8k",
            {
                FORM(42): 4,
                f"\n{FORM(42)}\n": 4,
                FORM(41): 2,
                FORM("x"): 1.5,
                FORM(42) + "\nabc": 3.497,
                FORM(42)[:-9]: 0.375,
                boxed(42): 2,
                "<reasoning>a\n</reasoning> " + tag(42): 3,
                FORM(42).replace("second", "<answer>"): 3.875,
                tag("\n42\n"): 2.75,
                "</answer> x": 0,
            },
        ),
        ("math", {FORM(boxed(42)): 3, FORM(42): 2.75, boxed(42): 2.5, boxed(4): 0.5, "": 0.25}),
        ("countdown", {"2*4-3": 0, boxed("2*4-3"): 0}),
    ],
)
def test_the_parts_of_a_reward(task, parts):
    assert {text: TASKS[task].reward(text, ROWS[task]) for text in parts} == pytest.approx(
        parts, abs=1e-9
    )


PIECES = [
    *"{}()\n =*/+-239$,.%x٣\0",
    "42",
    "2*4-3",
    GRID,
    "<answer>",
    "</answer>",
    "<reasoning>\n",
    "\n</reasoning>\n",
    r"\boxed{",
]
LIKELY = (
    ["", GRID, boxed(42), tag(7)],
    ["<answer>", ""],
    ["2*4-3", GRID, "42", "$4,2", "="],
    ["</answer>", "", "}"],
    ["", "\n!"],
)


@cases(
    "task, least, most",
    [("countdown", 1, 0.1), ("sudoku", 2, 2), ("toy", 2, 2), ("gsm8k", 2, 2), ("math", 2, 1)],
)
def test_any_text_has_a_reward_that_tells_right_from_wrong(
    task, least, most
):  # most: what a wrong one can get (with spoilt clues, all)
    @fuzz(
        60 if task == "math" else 300,
        st.text(max_size=60)
        | pieces(20, PIECES)
        | st.tuples(*map(st.sampled_from, LIKELY)).map("".join),
    )
    def check(text):
        reward, right = TASKS[task].reward(text, ROWS[task]), TASKS[task].correct(text, ROWS[task])
        assert (
            least - 0.001 * len(text) * (task == "gsm8k") <= reward <= TASKS[task].top
            if right
            else 0 <= reward <= most
        )
        seen.add(right)

    seen = set()
    assert check() is None and seen == {True, False}


# ---- rows ----------------------------------------------------------------------------------------
left = lambda grid, i: (
    {*"1234"} - {grid[j] for j in range(16) if 0 in ((i ^ j) & 12, (i ^ j) & 3, (i ^ j) & 10)}
)  # row, column, box


def solve(grid):  # every solution, by backtracking
    i = grid.find("0")
    return (
        [grid] if i < 0 else [g for d in left(grid, i) for g in solve(grid[:i] + d + grid[i + 1 :])]
    )


def test_sudoku_rows_have_one_solution_each_splits_share_none_and_worked_ones_are_sound_line_by_line():
    assert (
        sorted(llada.sudoku_grids()) == sorted(solve("0" * 16)) and len(llada.sudoku_grids()) == 288
    )
    rows = {split: TASKS["sudoku"].rows(split) for split in ("train", "valid", "test")} | {
        "toy": TASKS["toy"].rows("test")
    }
    train, valid, test, toy = ({r["solution"] for r in part} for part in rows.values())
    assert (
        (len(train), len(valid)) == (176, 24)
        and not train & valid
        and not (train | valid) & (test | toy)
    )  # 88 are left for the tests
    for split, part in rows.items():
        assert len({r["puzzle"] for r in part}) == (20000 if split == "train" else 256)
        assert {r["puzzle"].count("0") for r in part} == {
            *(range(4, 11) if split == "toy" else range(7, 13))
        }
        assert all(solve(r["puzzle"]) == [r["solution"]] for r in part[:100])
    shots = re.findall(
        r"puzzle: (\d{16})\nAnswer:\n(.*?</answer>)", TASKS["sudoku"].prompt(LOOSE), re.S
    )
    assert len(shots) == 3 and TASKS["sudoku"].prompt(LOOSE).endswith(
        f"puzzle: {LOOSE['puzzle']}\nAnswer:"
    )
    for puzzle, text in shots + [
        (r["puzzle"], llada.sudoku_worked(r)) for r in rows["test"] + [LOOSE]
    ]:
        grid = puzzle
        for r, c, word, d in re.findall(r"Row (\d), column (\d): (only|try) (\d)", text):
            i = 4 * int(r) + int(c) - 5
            assert grid[i] == "0" and (
                left(grid, i) == {d} if word == "only" else {d} < left(grid, i)
            )
            grid = grid[:i] + d + grid[i + 1 :]
        assert (
            grid in solve(puzzle)
            and TASKS["sudoku"].reward(text, {"puzzle": puzzle, "solution": grid}) == 2
        )


def test_countdown_rows_are_solvable_and_no_problem_is_in_two_splits(monkeypatch):
    assert TASKS["countdown"].correct(
        TASKS["countdown"].prompt({"numbers": [9, 8, 7], "target": 6}), ROWS["countdown"]
    )  # its example
    monkeypatch.setattr(llada, "arithmetic", functools.cache(llada.arithmetic))
    rows = [TASKS["countdown"].rows(split) for split in ("train", "valid", "test")]
    problems = {(*sorted(r["numbers"]), r["target"]) for part in rows for r in part}
    assert (
        [*map(len, rows)] == [20000, 256, 256]
        and len(problems) == 20512
        and {n for p in problems for n in p} == {*range(1, 101)}
    )
    f = [
        Fraction.__add__,
        Fraction.__sub__,
        Fraction.__mul__,
        lambda a, b: a / b if b else Fraction(10**9),
    ]
    for row in rows[0][:150] + rows[1][:50] + rows[2][:150]:
        orders = itertools.product(f, f, itertools.permutations(map(Fraction, row["numbers"])))
        assert any(row["target"] in (p(q(a, b), c), p(a, q(b, c))) for p, q, (a, b, c) in orders)


@cases("n", [1, 9, 10, 99, 2559, 5000])
def test_cut_is_a_partition_that_stays(n):
    (train, valid), again = (
        [llada.cut([*range(n)], split) for split in ("train", "valid")] for _ in range(2)
    )
    assert (
        sorted(train + valid) == [*range(n)]
        and len(valid) == min(256, n // 10)
        and again == [train, valid]
    )


FILES = [  # task, kind, text, its row or what the error says
    (
        "countdown",
        "jsonl",
        '{"input": "30,100,93", "output": "23"}',
        {"numbers": [30, 100, 93], "target": 23},
    ),
    ("toy", "csv", None, "csv"),
    ("countdown", "csv", 'nums,target\n"[4, 5]",20\n', {"numbers": [4, 5], "target": 20}),
    ("toy", "jsonl", json.dumps(LOOSE), LOOSE),
    (
        "math",
        "jsonl",
        '{"problem": "\u2028\x85", "solution": "1"}',
        {"question": "\u2028\x85", "answer": "1"},
    ),
    ("toy", "txt", "{}", "csv"),
    (
        "gsm8k",
        "csv",
        'question,answer\n"a\n""b""",#### 7\n',
        {"question": 'a\n"b"', "answer": "#### 7"},
    ),
    ("toy", "jsonl", "", "no rows"),
    ("math", "csv", 'question,answer\n"a\nb",5\nc\n', "line 4: no"),
    ("math", "csv", 'problem,answer\n"' + "x" * 200_000, "line .: no"),
]
LINES = [("countdown", x) for x in ("{", "[]", "7", "null", "")] + [
    (task, json.dumps(ROWS[task] | {key: x}))
    for task, key, *xs in [
        ("countdown", "numbers", [], [1.5, 2], [-1, 2]),
        ("countdown", "target", "x", 2.5),
        ("sudoku", "puzzle", "02", "0" * 17, "." * 16),
        ("sudoku", "solution", OTHER, int(GRID), " " + GRID),
        ("gsm8k", "answer", "?", 5),
        ("math", "question", 7),
    ]
    for x in xs
]
FILES += [
    (
        task,
        "jsonl",
        "\n".join([json.dumps(ROWS[task]), x, json.dumps(ROWS[task])]),
        "a.jsonl, line 2: no",
    )
    for task, x in LINES
]


@cases("task, kind, text, expected", FILES, ids=itertools.count())
def test_read_rows_reads_a_row_or_names_the_line_that_is_none(tmp_path, task, kind, text, expected):
    path = tmp_path / f"a.{kind}"
    (tmp_path / "other" if text is None else path).write_text(text or "", encoding="utf-8")
    with suppress() if isinstance(expected, dict) else pytest.raises(ValueError, match=expected):
        assert llada.read_rows(str(path), task) == [expected]


# ---- text and settings ---------------------------------------------------------------------------
BASE = BOS, EOS, MASK = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"
CHAT = *BASE, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
IDS = {token: i for i, token in enumerate([*CHAT, *map(chr, range(9, 127))])}
ids = lambda text: [IDS[token] for token in re.findall(r"<\|\w+\|>|[\s\S]", text)]


def save(folder, special):
    tok = Tokenizer(
        models.WordLevel(
            {t: i for t, i in IDS.items() if len(t) == 1 or t in special}, unk_token="?"
        )
    )
    tok.pre_tokenizer, tok.decoder = (
        pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"),
        decoders.Fuse(),
    )
    tok.add_special_tokens([*special])
    tok.save(str(folder / "tokenizer.json"))
    return llada.Text(folder, {"eos_token_id": IDS[EOS]})


def test_prompt_is_the_published_template_and_an_answer_ends_at_its_end(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json"):
        llada.Text(tmp_path, {})
    chat, base = save(tmp_path, CHAT), save(tmp_path, BASE)

    @fuzz(100, pieces(9, ["{}", "{0}", "%s", r"\1", " ", "\n", *map(chr, range(9, 127))]))
    def check(words):
        assert base.prompt(words) == ids(BOS + words.strip())
        assert chat.prompt(words) == ids(
            "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n"
            + words.strip()
            + "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        )
        assert all(
            chat.answer(ids(words + MASK + end + "more" + EOS)) == words
            for end in (EOS, "<|eot_id|>", EOS + "<|eot_id|>")
        )
        assert base.answer(ids(words + EOS + "more")) == chat.answer(ids(words)) == words

    check()


def test_pad_left():
    rows, mask = llada.pad_left([[5, 1], [1, 6, 7, 1], [8]], 1)
    assert rows.tolist() == [[1, 1, 5, 1], [1, 6, 7, 1], [1, 1, 1, 8]] and mask.int().tolist() == [
        [0, 0, 1, 1],
        [1, 1, 1, 1],
        [0, 0, 0, 1],
    ]
    assert llada.pad_left([[1, 2], [3, 4]], 1)[1] is None


PUBLISHED = """h 6 5, a_end 100 100, steps_per_h 1200 256, prompts 40 80, refresh 10 20, refresh_steps 25 32, chunk 30 16, alpha 64 64,
seed 42 42, batch 12 4, accum 8 16, completions 6 1, ema .95 0, weight_decay .1 .1, clip 2 1, lr 4e-6 3e-6, lr_min 2e-6 1e-6, block 32 32,
c 1 1, rank 128 128, gen_length 256 256, steps 128 128, prompt_length 172 1132, temperature 1 0, dropout .05 .05, save_every 100 100"""


def test_presets_are_the_published_ones():
    for i, task, top, a_step, stages, total in (
        (1, "countdown", 1, 768, 17, 20400),
        (2, "sudoku", 2, 512, 20, 5120),
    ):
        cfg, table = settings(task), [*map(str.split, PUBLISHED.split(","))]
        assert {name: float(getattr(cfg, name)) for name, *_ in table} == {
            words[0]: float(words[i]) for words in table
        }
        assert (cfg.task, TASKS[task].top, cfg.order, cfg.normalize, cfg.ess, cfg.objective) == (
            task,
            top,
            "confidence",
            "none",
            0,
            "dtm",
        )
        assert (8 * cfg.batch * cfg.accum, len([*phases(cfg.a_end, cfg.h)])) == (
            a_step,
            stages,
        ) and stages * cfg.steps_per_h == total
    assert all(
        settings(task, objective=o, seed=7).out.endswith(f"{task}-7")
        for task in TASKS
        for o in ("dtm", "dmpo")
    )


WORDS = "task chess, objective ppo, normalize all, lora none, order left, c -1 x nan 1;"
NUMBERS = """lr -1e-6 0 inf nan, h 0 nan, batch 0 -4 21, accum 0 81, seed -1, ess 1 -.1, dropout 1, ema 1 1.5, temperature -1 inf, rank 0,
clip 0, gen_length 100 0, block 0 512 48, steps 0 100 4, refresh 81 -1, eval_rows -1"""
SETS = [{"data": __file__}] + [
    {k: v, "objective": "dmpo"} for k, v in (("c", "1"), ("refresh", 1), ("completions", 1))
]


@cases(
    "given",
    SETS
    + [
        {k: kind(x)}
        for kind, t in [(str, WORDS), (float, NUMBERS)]
        for k, *v in map(str.split, t.split(","))
        for x in v
    ],
)
def test_a_bad_setting_is_named(given):
    with pytest.raises(ValueError, match=rf"--{next(iter(given))}\b"):
        settings(**{"task": "sudoku", "batch": 1, "test_data": __file__} | given)
