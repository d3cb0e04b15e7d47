"""`tilt_matching` reaches the exact tilt, and trains only the parameters that require gradients."""

import copy

import torch
from theory_helpers import L, V, close, distribution, posterior_table, rewards
from torch import Generator

import dtm

RHO_0, R = distribution(1), rewards(2)
FEW = {"a_end": 2.0, "h": 1.0, "rollouts": 64, "steps": 3, "batch": 16}


def reward(x1):
    return R[dtm.state_number(x1, V - 1)]  # the number of a sequence in base V


def base():
    return posterior_table(RHO_0).requires_grad_(True)


def kl(p, q):
    return (p * (p / q).log()).sum().item()


def test_the_trained_model_samples_from_the_exact_tilt():
    target = dtm.exact_tilt(RHO_0, R, 4.0)
    settings = {"a_end": 4.0, "h": 2.0, "rollouts": 4096, "steps": 300, "lr": 0.05}
    model = dtm.tilt_matching(base(), reward, V, L, **settings)
    assert kl(target, dtm.exact_marginal(model, V, L).detach()) < 0.01  # .001 to .003 on 3 seeds
    assert kl(target, RHO_0) > 0.25


def test_it_trains_in_place_and_watch_sees_every_phase():
    model, seen = base(), []
    before = model.logits.detach().clone()
    returned = dtm.tilt_matching(
        model, reward, V, L, watch=lambda *seen_: seen.append(seen_), **FEW
    )
    assert returned is model and not torch.equal(model.logits, before)
    assert [a for a, _, _ in seen] == [0.0, 1.0]
    assert all(r.shape == (64,) and watched is model for _, r, watched in seen)
    start = torch.full((64, L), V)  # the first rewards are those of the base model's samples
    *_, x1 = dtm.sample(base(), start, V, generator=Generator().manual_seed(0))
    close(seen[0][1], reward(x1))


def test_no_generator_means_seed_0():
    seeds = {"none": None, "zero": Generator().manual_seed(0), "one": Generator().manual_seed(1)}
    logits = {
        name: dtm.tilt_matching(base(), reward, V, L, generator=noise, **FEW).logits
        for name, noise in seeds.items()
    }
    assert torch.equal(logits["none"], logits["zero"])
    assert not torch.equal(logits["none"], logits["one"])


class TwoTables(torch.nn.Module):
    """Adds two tables, of which only the second is to be trained, with dropout in between."""

    def __init__(self):
        super().__init__()
        self.frozen, self.trained = base().requires_grad_(False), dtm.Table(torch.zeros(64, L, V))
        self.dropout = torch.nn.Dropout(0.1)
        self.modes = []

    def forward(self, xt, where=None):
        self.modes.append(self.training)
        return self.frozen(xt, where) + self.dropout(self.trained(xt, where))


def test_frozen_parameters_and_the_mode_of_the_model_stay_and_the_teacher_does_not_drop_out():
    model = TwoTables().double().train()
    frozen = copy.deepcopy(model.frozen.state_dict())
    dtm.tilt_matching(model, reward, V, L, **FEW)
    assert torch.equal(model.frozen.logits, frozen["logits"])
    assert model.trained.logits.abs().max() > 0
    assert model.training and all(model.modes)  # the teacher is a copy, in evaluation mode
    model = TwoTables().double().eval()
    dtm.tilt_matching(model, reward, V, L, **FEW)
    assert not model.training and not any(model.modes)
