"""Weights, effective sample sizes and phases."""

import pytest
import torch
from theory_helpers import close, distribution, rewards
from torch import Generator

import dtm


def test_D1_weights_normalise_without_overflow():
    r = torch.tensor([0.0, 1.0, 2.0])
    close(dtm.tilt_weight(r, 2.0), torch.exp(2 * r))
    w = dtm.tilt_weight(r, 2.0, normalize=True)
    close(w, torch.exp(2 * r) / torch.exp(2 * r).mean(), atol=1e-6)
    close(dtm.tilt_weight(r + 500, 2.0, normalize=True), w)
    r = torch.tensor([-700.0, 0.0, 700.0]).double()
    close(dtm.tilt_weight(r, 1.0).log(), r)
    close(dtm.tilt_weight(r * 1e300, 1.0, normalize=True), torch.tensor([0.0, 0.0, 3.0]).double())


def test_D1_tilting_twice_is_tilting_once():
    rho, r = distribution(1), rewards(2)
    close(dtm.exact_tilt(dtm.exact_tilt(rho, r, 0.7), r, 1.9), dtm.exact_tilt(rho, r, 2.6))
    raw = rho * torch.exp(2.6 * r)
    close(dtm.exact_tilt(rho, r, 2.6), raw / raw.sum())


def test_D9_next_h_is_where_the_effective_sample_size_meets_its_bound():
    r = torch.rand(1000, generator=Generator().manual_seed(0))
    for ess in (0.3, 0.9):
        w = torch.exp(dtm.next_h(r, ess, 100.0) * r.double())
        assert w.sum() ** 2 / (1000 * w.square().sum()) == pytest.approx(ess, abs=1e-6)
    assert dtm.next_h(r, 0.3, 0.5) == 0.5
    for same in (torch.ones(9), torch.full((1,), -700.0), 1e300 * torch.ones(2).double()):
        assert dtm.next_h(same, 1.0, 1e308) == 1e308  # equal rewards keep the sample at any h
    for scale in (1e-290, 1e-9, 1e290):
        h = dtm.next_h(scale * (r.double() - 700), 0.3, 1e308)
        assert h * scale == pytest.approx(dtm.next_h(r, 0.3, 100.0), rel=1e-6)
    values, counts = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([5, 3, 2])
    listed = dtm.next_h(values.repeat_interleave(counts), 0.8, 50.0)
    assert dtm.next_h(values, 0.8, 50.0, p=counts / 10) == pytest.approx(listed)


def test_phases_end_at_a_end():
    steps = [number for phase in dtm.phases(1.0, 0.4) for number in phase]
    assert steps == pytest.approx([0.0, 0.4, 0.4, 0.4, 0.8, 0.2])
    assert sum(h for _, h in dtm.phases(10.0, lambda a: 0.1 + a)) == pytest.approx(10.0)
