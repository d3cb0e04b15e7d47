"""The antibody script, on a tiny model in BERT's shape: no network, no published weights."""

import json
import math
from concurrent.futures import Future
from pathlib import Path
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
    """Like BertSelfOutput and BertOutput: a linear layer, added to what came in."""

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

    def all_tokens(self, h):
        """The layer derived again, head by head: every token attends to every token."""
        size, mixed = WIDTH // HEADS, []
        attention = self.attention.self
        for head in range(HEADS):
            one = slice(head * size, (head + 1) * size)
            q, k, v = (attention[name](h)[..., one] for name in ("query", "key", "value"))
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
        return SimpleNamespace(embeddings=self.embed, encoder=SimpleNamespace(layer=self.layers))

    def embed(self, input_ids, position_ids=None):
        self.seen = input_ids, position_ids
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        return self.words(input_ids) + self.places(position_ids)

    def forward(self, input_ids):
        h = self.embed(input_ids)
        for layer in self.layers:
            h = layer.all_tokens(h)
        return SimpleNamespace(logits=self.cls(h))


def fake_model(seed=0):
    return antibody.LoopModel(FakeBert(seed))


# ---- the reward ----------------------------------------------------------------------------------
def test_the_chain_holds_the_loop_where_the_model_expects_it():
    assert len(CHAIN) == 120 and CHAIN[START - 1 :].startswith("GDGFYAMDYW")
    assert CHAIN[: START - 1].endswith("YYCSRWG")
    assert sorted(antibody.HYDROPATHY) == sorted(RESIDUES) and len(RESIDUES) == V
    words = [antibody.VOCABULARY[i] for i in antibody.TOKENS[[0, 1, START, -1]]]
    assert words == ["[CLS]", "E", "G", "[SEP]"]


def test_hydrophilicity_of_hand_made_loops():
    r = antibody.reward(loops("RRRR", "IIII", "RRII", "RRNG", "YYYY"))
    expected = [1, 0, 0.5, (2 * 9 + 8 + 4.9) / 36 - 0.1, 5.8 / 9]
    torch.testing.assert_close(r, torch.tensor(expected))


@pytest.mark.parametrize(
    ("loop", "liabilities"),
    [
        ("NPSR", 0),  # no glycosylation where X = P
        ("RRND", 0),  # the chain continues with YA, which ends no motif
        ("RRNR", 0),
        ("NRSR", 1),
        ("RNRT", 1),
        ("NGSR", 1),  # two motifs that begin at one residue
        ("NNST", 2),  # N-N-S and N-S overlap
        ("NGDS", 2),
        ("RCRC", 2),
        ("DGDS", 2),
    ],
)
def test_each_liability_costs_a_tenth(loop, liabilities):
    mean = sum(4.5 - antibody.HYDROPATHY[residue] for residue in loop) / len(loop) / 9
    r = antibody.reward(loops(loop)).item()
    assert r == pytest.approx(mean - 0.1 * liabilities, abs=1e-6)


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
    xt = loops("GDGF")
    xt[0, 2] = MASK
    model(xt)
    tokens, places = model.bert.seen
    words = [antibody.VOCABULARY[i] for i in tokens[0].tolist()]
    assert words == ["G", "D", "[MASK]", "F"]
    assert places.tolist() == [list(range(START, START + L))]


@torch.no_grad()
def test_with_the_loop_masked_the_logits_are_those_of_the_full_model():
    """The chain was read with the loop masked: in this state the shortcut is exact."""
    model = fake_model()
    tokens = antibody.TOKENS.clone()
    tokens[START : START + L] = antibody.VOCABULARY.index("[MASK]")
    full = model.bert(input_ids=tokens[None]).logits[:, START : START + L, 5:]
    blank = torch.full((1, L), MASK)
    torch.testing.assert_close(model(blank), full, rtol=1e-4, atol=1e-4)


# ---- the reference -------------------------------------------------------------------------------
def test_D1_the_mean_under_the_tilt_against_enumeration():
    """The error covers the exact value, within 4 standard errors: it fails for 1 seed in 16,000."""
    rho = torch.randn(64, generator=Generator().manual_seed(0)).double().softmax(0)
    r = torch.rand(64, generator=Generator().manual_seed(1)).double()
    draws = rho.multinomial(20_000, True, generator=Generator().manual_seed(2))
    for a in (0.0, 3.0):
        tilted = dtm.exact_tilt(rho, r, a)
        found = antibody.tilted_mean(r[draws], a)
        assert abs(found["reward"] - (tilted @ r).item()) < 4 * found["error"] < 0.02
        share = 1 / (tilted.square() / rho).sum().item()  # ESS, as a share of the samples
        assert found["ess"] == pytest.approx(20_000 * share, rel=0.05)


# ---- the command ---------------------------------------------------------------------------------
class OneProcess:
    """A process pool that runs each task at once, in this process."""

    def __init__(self, *settings, **more_settings):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


def test_the_command_trains_both_arms_and_writes_json_and_picture(tmp_path, monkeypatch):
    base = fake_model().requires_grad_(False)
    base.bert.cls.weight.mul_(0.2)  # so that many loops are probable
    few = {"a_end": 8.0, "h": 4.0, "rollouts": 256, "steps": 60, "batch": 32, "lr": 2e-2}
    monkeypatch.setattr(antibody, "SETTINGS", few)
    monkeypatch.setattr(antibody, "base_model", lambda: base)
    monkeypatch.setattr(antibody, "ProcessPoolExecutor", OneProcess)
    monkeypatch.setattr(antibody, "find_spec", lambda package: True)
    monkeypatch.setattr(antibody, "version", lambda package: "1")
    antibody.main(["--seeds", "2", "--jobs", "1", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "data" / "antibody.json").read_text())
    assert (tmp_path / "antibody.png").stat().st_size > 10_000
    assert result["command"] == f"python -m figures.antibody --seeds 2 --jobs 1 --out {tmp_path}"
    assert result["seeds"] == [0, 1] and len(result["rows"]) == 4
    first, target = result["tilt"][0]["reward"], result["tilt"][-1]["reward"]
    assert target > first + 0.03
    assert abs(result["arms"]["c = 1"]["reward"] - target) < 0.5 * (target - first)


def test_missing_packages_stop_the_script_with_the_command_that_installs_them(monkeypatch):
    monkeypatch.setattr(antibody, "find_spec", lambda package: None)
    with pytest.raises(SystemExit) as stopped:
        antibody.main([])
    assert stopped.value.code not in (0, None)
    assert (
        "pip install transformers && pip install --no-deps antiberty==0.1.3" in stopped.value.code
    )


def test_the_title_of_the_shipped_picture_states_what_the_json_holds():
    file = Path(antibody.__file__).parent / "data" / "antibody.json"
    result = json.loads(file.read_text())
    target = result["tilt"][-1]
    for name, arm in result["arms"].items():
        finals = torch.tensor([row["reward"] for row in result["rows"] if row["arm"] == name])
        assert arm["reward"] == pytest.approx(finals.mean().item())
        assert arm["error"] == pytest.approx(finals.std().item() / math.sqrt(len(finals)))
    gaps = {name: abs(arm["reward"] - target["reward"]) for name, arm in result["arms"].items()}
    assert gaps["c = 1"] < 0.01 and target["error"] < 0.005 and len(result["seeds"]) == 5
    title = antibody.title_of(result)
    for name in ("c = 1", "c = 0"):
        assert f"{gaps[name]:.3f}" in title
