"""--replay: which rollouts of earlier phases the buffer keeps, and with which weights."""

import pytest
import torch
from loop_helpers import check_same, command, exit_codes, read_lines, small_base, tuned
from torch import Generator, Tensor

import dtm
import llada_finetune as finetune
from llada.checkpoint import read_json


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    yield from small_base(tmp_path_factory.mktemp("base"))


def phase(r: Tensor, row: Tensor | None = None) -> dict[str, Tensor]:
    """Return rollouts with these rewards, as `Buffer.data` holds them."""
    row = torch.arange(len(r)) if row is None else row
    x1 = torch.zeros(len(r), 16, dtype=torch.long)
    return {"row": row, "x1": x1, "r": r.double(), "solved": r.double()}


def buffer_of(base, folder, phases: dict[float, dict[str, Tensor]], **more) -> finetune.Buffer:
    """Return a buffer after phases at these tilts; the last one is the present phase."""
    buffer = tuned(base, folder / "run", replay=len(phases), **more).buffer
    *earlier, present = phases.items()
    for a, data in earlier:
        buffer.data = data
        buffer.end_phase(a)
    buffer.data = present[1]
    return buffer


def test_each_phase_counts_with_its_effective_sample_size(base, tmp_path):
    noise = Generator().manual_seed(3)
    rewards = {a: 2 * torch.rand(n, generator=noise) for a, n in ((0.0, 9), (1.5, 5), (2.0, 7))}
    buffer = buffer_of(base, tmp_path, {a: phase(r) for a, r in rewards.items()})
    u = [*buffer.phase_weights(2.0).split([9, 5, 7])]
    for (a, r), part in zip(rewards.items(), u, strict=True):
        w = [2.718281828459045 ** ((2.0 - a) * x) for x in r.double().tolist()]
        size = sum(w) ** 2 / sum(x * x for x in w)
        expected = torch.tensor([size * x / sum(w) for x in w], dtype=torch.float64)
        torch.testing.assert_close(part, expected)
        same = dtm.replay_weights([r.double()], [a], 2.0)  # (D13) with one phase
        torch.testing.assert_close(part / part.mean(), same)
    assert torch.equal(u[2], torch.ones(7).double())


def test_ranks_weight_a_phase_as_one_process_that_holds_all_of_it(base, tmp_path, monkeypatch):
    noise = Generator().manual_seed(7)
    r = torch.rand(12, generator=noise)
    everything = {0.5: phase(r), 2.0: phase(torch.zeros(1))}
    alone = buffer_of(base, tmp_path, everything).phase_weights(2.0)[:-1]
    for part in (slice(0, 6), slice(6, 12)):
        half = {0.5: phase(r[part]), 2.0: phase(torch.zeros(1))}
        rank = buffer_of(base, tmp_path, half)
        # The other rank's numbers arrive, as `Ranks.gather` would bring them.
        monkeypatch.setattr(rank, "gathered", lambda own: (2.0 - 0.5) * r.double())
        torch.testing.assert_close(rank.phase_weights(2.0)[:-1], alone[part])


def test_a_constant_per_prompt_moves_no_minimiser(base, tmp_path):
    """Enumerate two prompts with rewards of their own: the weighted posterior of each is exact.

    The completions of each prompt are the 9 sequences of two tokens out of three, listed exactly in
    proportion to their probability at tilt a_j = log 2; they serve at tilt a = 1.9.
    """
    noise = Generator().manual_seed(4)
    X, states = dtm.all_sequences(3, 2), dtm.all_sequences(4, 2)
    counts = torch.randint(1, 5, (2, 9), generator=noise)  # rho_0 of each prompt
    r = torch.stack([torch.randint(2, (9,), generator=noise), torch.full((9,), 1)])
    r[1, :4] = 2  # The second prompt has higher rewards, and so gains weight.
    at_log_2 = (counts * 2**r).flatten()
    drawn = torch.arange(18).repeat_interleave(at_log_2)  # prompt * 9 + sequence
    earlier = phase(r.flatten()[drawn], row=drawn // 9)
    a_j, a = torch.tensor(2.0).double().log().item(), 1.9
    present = phase(torch.zeros(1))
    u = buffer_of(base, tmp_path, {a_j: earlier, a: present}).phase_weights(a)[:-1]
    mass = torch.zeros(18).double().index_add(0, drawn, u).view(2, 9)
    target = counts * (a * r.double()).exp()
    for prompt in range(2):
        posterior = dtm.exact_posterior(target[prompt] / target[prompt].sum(), states)
        for state, expected in zip(states, posterior, strict=True):
            agrees = ((X == state) | (state == 3)).all(1)  # the sequences that fit the state
            for i in (state == 3).nonzero()[:, 0]:
                found = torch.stack([mass[prompt][agrees & (X[:, i] == v)].sum() for v in range(3)])
                torch.testing.assert_close(found / found.sum(), expected[i])
    shares = mass.sum(1) / mass.sum()
    assert (shares - 0.5).abs().max() > 0.1  # the constants do differ


def test_rows_are_drawn_in_proportion_to_their_weights(base, tmp_path):
    """The largest deviation of 5 shares from 8,000 draws: beyond 4.5 sigma with p < 4e-5."""
    phases = {0.0: phase(torch.tensor([0.0, 1.0, 2.0])), 1.0: phase(torch.tensor([0.0, 1.0]))}
    buffer = buffer_of(base, tmp_path, phases, batch=1, accum=2, prompts=2)
    u = buffer.phase_weights(1.0)
    drawn = torch.tensor([buffer.draw(u) for _ in range(4000)]).flatten()
    p = u / u.sum()
    share = drawn.bincount(minlength=5) / 8000
    assert ((share - p).abs() < 4.5 * (p * (1 - p) / 8000).sqrt()).all()


@pytest.mark.parametrize("normalize", ["batch", "group"])
def test_the_weights_have_mean_one_under_the_draws(base, tmp_path, normalize):
    """With "batch" over all rollouts, and with "group" over those of each prompt."""
    noise = Generator().manual_seed(5)
    rows = torch.arange(6).repeat(2)
    phases = {a: phase(torch.rand(12, generator=noise), rows) for a in (0.0, 1.0, 2.5)}
    how = {"normalize": normalize, "completions": 2, "prompts": 6}
    buffer = buffer_of(base, tmp_path, phases, **how)
    u = buffer.phase_weights(2.5)
    w = buffer.weights(1.5, u)
    row = torch.cat([rows] * 3)
    groups = [row == prompt for prompt in range(6)] if normalize == "group" else [row >= 0]
    for same in groups:
        mean = (u[same] * w[same]).sum() / u[same].sum()
        assert mean.item() == pytest.approx(1)
        ratio = w[same] / (1.5 * buffer.column("r")[same]).exp()
        assert ratio.std() < 1e-9 * ratio.mean()


def test_a_batch_takes_prompt_tokens_and_weight_of_the_same_rollout(base, tmp_path, monkeypatch):
    """The tokens of rollout i are all 3 + i, which shows where the rest of the batch belongs."""
    noise, phases = Generator().manual_seed(6), {}
    for k, a in enumerate((0.0, 1.0, 2.5)):
        data = phase(torch.rand(4, generator=noise), row=torch.arange(4 * k, 4 * k + 4))
        data["x1"] = (3 + data["row"])[:, None].expand(-1, 16).clone()
        phases[a] = data
    buffer = buffer_of(base, tmp_path, phases, batch=3, accum=2, prompts=12)
    buffer.data = phases[2.5]
    asked, phase_weights = [], buffer.phase_weights
    monkeypatch.setattr(buffer, "phase_weights", lambda a: asked.append(a) or phase_weights(a))
    r = torch.cat([data["r"] for data in phases.values()])
    seen = set()
    for _ in range(20):
        for batch in buffer.micro_batches(2.5, 1.5):
            ids, visible = batch.prompts
            for j, x1 in enumerate(batch.x1):
                i = int(x1[0]) - 3
                seen.add(i)
                prompt = ids[j] if visible is None else ids[j][visible[j]]
                assert prompt.tolist() == buffer.prompt(i)
                assert batch.w[j].item() == pytest.approx(float((1.5 * r[i]).exp()), rel=1e-5)
                hidden = batch.xt[j] != x1
                assert batch.mask[j][~hidden].sum() == 0 and hidden.any()
    assert asked == [2.5] * 20 and len(seen) == 12


def test_only_the_last_phases_are_kept(base, tmp_path):
    buffer = tuned(base, tmp_path / "run", replay=2).buffer
    for a in (0.0, 1.0, 2.0):
        buffer.data = phase(torch.rand(3))
        buffer.end_phase(a)
    assert [kept["a"].item() for kept in buffer.kept] == [1.0, 2.0] and not buffer.data


def test_a_killed_run_with_replay_resumes_bit_for_bit(base, tmp_path):
    flags = ["--replay", "1", "--steps_per_h", "4", "--save_every", "2"]
    finetune.main([*command(base, tmp_path / "whole"), *flags])
    killed = [*command(base, tmp_path / "killed"), *flags]
    assert exit_codes(killed, "SIGKILL step 7") == [-9]
    finetune.main(killed)
    check_same(tmp_path / "killed", tmp_path / "whole")
    steps = [e for e in read_lines(tmp_path / "whole" / "metrics.jsonl") if e["kind"] == "step"]
    assert steps[-1]["phase"] > 0  # earlier rollouts were there to be used
    assert read_json(tmp_path / "whole" / "config.json")["replay"] == 1
