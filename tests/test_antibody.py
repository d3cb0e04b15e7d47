"""The antibody script, on a tiny model in BERT's shape: no network, no published weights."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Generator, nn

import dtm
from figures import antibody
from figures.antibody import CHAIN, MASK, RESIDUES, START, L, V

WIDTH, HEADS = 8, 2


def loops(*words):
    return torch.tensor([[RESIDUES.index(letter) for letter in word] for word in words])


def random_loops(n, seed):
    return torch.randint(V, (n, L), generator=Generator().manual_seed(seed))


# ---- a model in the shape of transformers' BertForMaskedLM ---------------------------------------
class Add(nn.Linear):
    """As BertSelfOutput and BertOutput: a linear map, added to what came in."""

    def forward(self, h, before):
        return before + super().forward(h)


class FakeLayer(nn.Module):
    def __init__(self):
        super().__init__()
        projections = {name: nn.Linear(WIDTH, WIDTH) for name in ("query", "key", "value")}
        self.attention = nn.ModuleDict({"self": nn.ModuleDict(projections)})
        self.attention.self = self.attention["self"]
        self.attention.self.num_attention_heads = HEADS
        self.attention.output = Add(WIDTH, WIDTH)
        self.intermediate, self.output = nn.Linear(WIDTH, WIDTH), Add(WIDTH, WIDTH)

    def whole(self, h):
        """The layer once more, head by head: every token attends to every token."""
        size, mixed = WIDTH // HEADS, []
        part = self.attention.self
        for head in range(HEADS):
            one = slice(head * size, (head + 1) * size)
            q, k, v = (part[name](h)[..., one] for name in ("query", "key", "value"))
            mixed.append((q @ k.mT / math.sqrt(size)).softmax(-1) @ v)
        h = self.attention.output(torch.cat(mixed, -1), h)
        return self.output(self.intermediate(h), h)


class FakeBert(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.words = nn.Embedding(len(antibody.VOCABULARY), WIDTH)
        self.places = nn.Embedding(len(CHAIN) + 2, WIDTH)
        self.layers = nn.ModuleList([FakeLayer() for _ in range(2)])
        self.cls = nn.Linear(WIDTH, len(antibody.VOCABULARY))
        noise = Generator().manual_seed(seed)
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.5, generator=noise)

    @property
    def bert(self):
        return SimpleNamespace(
            embeddings=self.embed, encoder=SimpleNamespace(layer=list(self.layers))
        )

    def embed(self, input_ids, position_ids=None):
        self.seen = input_ids, position_ids
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        return self.words(input_ids) + self.places(position_ids)

    def forward(self, input_ids):
        h = self.embed(input_ids)
        for layer in self.layers:
            h = layer.whole(h)
        return SimpleNamespace(logits=self.cls(h))


def fake_model(seed=0):
    return antibody.LoopModel(FakeBert(seed))


# ---- the reward ----------------------------------------------------------------------------------
def test_the_chain_holds_the_loop_where_the_model_expects_it():
    assert len(CHAIN) == 120 and CHAIN[START - 1 :].startswith("WGGDGFYAMDYW")
    assert CHAIN[: START - 1].endswith("YYCSR")
    assert sorted(antibody.HYDROPATHY) == sorted(RESIDUES) and len(RESIDUES) == V
    tokens = antibody.TOKENS
    assert [antibody.VOCABULARY[i] for i in tokens[[0, 1, START, -1]]] == [
        "[CLS]",
        "E",
        "W",
        "[SEP]",
    ]


def test_hydrophilicity_of_hand_made_loops():
    r = antibody.reward(loops("RRRRRRRR", "IIIIIIII", "RRRRIIII", "RRRRRNGR", "YYYYYYYY"))
    expected = [1, 0, 0.5, (6 * 9 + 8 + 4.9) / 72 / 2, 5.8 / 9]
    torch.testing.assert_close(r, torch.tensor(expected))


@pytest.mark.parametrize(
    ("loop", "liabilities"),
    [
        ("NPSRRRRR", 0),  # no glycosylation where X = P
        ("RRRRRRND", 0),  # the frame goes on with MD, which ends no motif
        ("NRSRRRRR", 1),
        ("RRRRRNRT", 1),
        ("NGSRRRRR", 1),  # two motifs that begin at one residue
        ("NNSTRRRR", 2),  # N-N-S and N-S overlap
        ("NGRRDSRR", 2),
        ("RRRCRRCR", 2),
        ("DGDSNGNS", 4),
    ],
)
def test_each_liability_halves_the_reward(loop, liabilities):
    mean = sum(4.5 - antibody.HYDROPATHY[residue] for residue in loop) / len(loop) / 9
    r = antibody.reward(loops(loop)).item()
    assert r == pytest.approx(mean * 0.5**liabilities, abs=1e-6)


# ---- the model protocol --------------------------------------------------------------------------
@torch.no_grad()
def test_where_gathers_the_same_logits_and_repeated_states_agree():
    model = fake_model()
    xt, mask = dtm.mask_random(random_loops(6, 0), MASK, Generator().manual_seed(1))
    xt, mask = xt.repeat(2, 1), mask.repeat(2, 1)
    logits = model(xt)
    assert logits.shape == (12, L, V)
    assert torch.equal(model(xt, mask), logits[mask])
    assert torch.equal(logits[:6], logits[6:])
    one_by_one = torch.cat([model(row[None]) for row in xt])
    torch.testing.assert_close(logits, one_by_one)


@torch.no_grad()
def test_tokens_and_masks_land_at_their_positions():
    model = fake_model()
    xt = loops("WGGDGFYA")
    xt[0, 2] = MASK
    model(xt)
    tokens, places = model.bert.seen
    words = [antibody.VOCABULARY[i] for i in tokens[0].tolist()]
    assert words == ["W", "G", "[MASK]", "D", "G", "F", "Y", "A"]
    assert places.tolist() == [list(range(START, START + L))]


@torch.no_grad()
def test_the_hidden_loop_reads_as_in_the_whole_model():
    """The frame was read with the loop hidden: there the constant frame is no approximation."""
    model = fake_model()
    tokens = antibody.TOKENS.clone()
    tokens[START : START + L] = antibody.VOCABULARY.index("[MASK]")
    whole = model.bert(input_ids=tokens[None]).logits[:, START : START + L, 5:]
    blank = torch.full((1, L), MASK)
    torch.testing.assert_close(model(blank), whole, rtol=1e-4, atol=1e-4)
    assert antibody.frame_kl(model, random_loops(8, 2), Generator().manual_seed(0)) > 0


def test_a_tilt_raises_the_reward_and_leaves_the_teacher_alone():
    base = fake_model().requires_grad_(False)
    before = base(torch.full((1, L), MASK))
    cfg = antibody.Config(rollouts=256, steps=60, lr=2e-2, judged=256, laws=2)
    for control in (antibody.lab.FixedC(1.0), antibody.LearnedC(seed=0)):
        model = fake_model().requires_grad_(True)
        antibody.tilt(model, control, cfg, Generator().manual_seed(0))
        first = antibody.draw_loops(base, 512, Generator().manual_seed(1))
        last = antibody.draw_loops(model, 512, Generator().manual_seed(1))
        assert antibody.reward(last).mean() > antibody.reward(first).mean() + 0.05
    assert torch.equal(base(torch.full((1, L), MASK)), before)


# ---- the judge -----------------------------------------------------------------------------------
def test_kl_estimator_against_enumeration():
    length, tokens, a = 3, 4, 2.0
    tables = [
        dtm.Table(torch.randn(125, length, tokens, generator=Generator().manual_seed(s)).double())
        for s in (0, 1)
    ]
    laws = [dtm.exact_marginal(table, tokens, length).detach() for table in tables]
    every = dtm.all_sequences(tokens, length)
    r = torch.rand(64, generator=Generator().manual_seed(2)).double()
    target = dtm.exact_tilt(laws[0], r, a)
    exact = (laws[1] * (laws[1] / target).log()).sum().item()
    which = laws[1].multinomial(20_000, True, generator=Generator().manual_seed(3))

    def reward(x):
        return r[(x * torch.tensor([16, 4, 1])).sum(1)]

    drawn = laws[0].multinomial(20_000, True, generator=Generator().manual_seed(4))
    log_z, log_z_se = antibody.log_mean((a * reward(every[drawn])).exp())
    assert abs(log_z - (laws[0] @ (a * r).exp()).log().item()) < 4 * log_z_se < 0.03
    ratio = antibody.log_ratio(tables[1], tables[0], every[which], a, reward, mask_id=tokens)
    found, error = antibody.kl_reverse(ratio, log_z)
    assert abs(found - exact) < 4 * error < 0.1
    off, _ = antibody.kl_reverse(ratio, log_z + 0.01)  # no error of first order from log Z
    assert abs(off - found) < 0.002


def test_weights_describe_the_tilt():
    x = loops("RRRRRRRR", "IIIIIIII", "IIIIIIII")
    told = antibody.describe(x, torch.tensor([2.0, 1.0, 1.0]))
    assert told["reward"] == pytest.approx(0.5) and told["distinct"] == pytest.approx(2 / 3)
    assert told["ess"] == pytest.approx(1 / (0.25 + 2 / 16))
    assert torch.tensor(told["frequencies"])[:, RESIDUES.index("R")].tolist() == [0.5] * L


# ---- the command ---------------------------------------------------------------------------------
def result_of_two_seeds():
    law = antibody.describe(random_loops(20, 0)) | {"kl_reverse": 0.1}
    rows = [
        {"arm": arm, "seed": seed, "seconds": 1.0, **law}
        for arm in antibody.ARMS
        for seed in (0, 1)
    ]
    arms = [{"name": arm} for arm in antibody.ARMS]
    command = "python -m figures.antibody --seeds 2"
    return {
        "command": command,
        "arms": arms,
        "bases": [law],
        "tilt": law | {"reward": 0.6},
        "rows": rows,
    }


def test_plot_only_draws_from_the_json_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "antibody.json").write_text(json.dumps(result_of_two_seeds()))
    monkeypatch.setattr("sys.argv", ["antibody.py", "--plot-only", "--out", str(tmp_path)])
    antibody.main()
    assert "antibody.png" in capsys.readouterr().out
    assert (tmp_path / "antibody.png").stat().st_size > 10_000


def stops(monkeypatch, capsys, *flags, installed=True):
    monkeypatch.setattr(antibody, "find_spec", lambda package: installed)
    monkeypatch.setattr("sys.argv", ["antibody.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        antibody.main()
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_missing_packages_stop_with_the_command_that_installs_them(monkeypatch, capsys):
    said = stops(monkeypatch, capsys, installed=False)
    assert "pip install transformers && pip install --no-deps antiberty==0.1.3" in said


@pytest.mark.parametrize("flags", [("--seeds", "0"), ("--jobs", "0"), ("--plot-only",)])
def test_bad_input_stops_with_one_sentence(monkeypatch, capsys, tmp_path, flags):
    said = stops(monkeypatch, capsys, *flags, "--out", str(tmp_path / "none"))
    assert "error: " in said and "Traceback" not in said
