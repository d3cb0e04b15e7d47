"""The frontier of reward against KL to the base, on which the tilts lie, and the distance to it."""

import torch
from torch import Tensor

import dtm
import maze_lab as lab
from figures import objectives


def tilt_of_mean(values: Tensor, p: Tensor, mean: Tensor, low: float, high: float) -> float:
    """The tilt between low and high at which a reward with the values and chances p, float64, has
    the mean; by bisection, for the mean rises with the tilt."""
    for _ in range(60):
        a = (low + high) / 2
        if dtm.exact_tilt(p, values, a) @ values < mean:
            low = a
        else:
            high = a
    return a


class FrontierJudge(lab.Judge):
    """Adds the metrics of the head of rivals.py to the lab's."""

    def __init__(self, maze: lab.Maze, base: dtm.Table, a_end: float):
        super().__init__(maze, base)
        self.base = dtm.Table(base.logits.cpu()).requires_grad_(False)
        self.rho_end = dtm.exact_tilt(self.rho_0, self.r, a_end)

    def measure(self, table: dtm.Table, a: float) -> dict:
        rho = lab.law(table)
        return super().measure(table, a) | {
            "reward": (rho @ self.r.double()).item(),
            "kl_base": lab.kl(rho, self.rho_0),
            "kl_end": lab.kl(self.rho_end, rho),
            "kl_reverse": lab.kl(rho, self.rho_end),
            "frontier": self.frontier(rho),
        }

    def left_to_right(self, table: dtm.Table) -> dict:
        """Scores of the law of a sampler that goes from left to right, as JustGRPO's."""
        base, law = [objectives.left_to_right_logs(t, self.x).sum(1) for t in (self.base, table)]
        rho_0, rho = base.double().exp(), law.double().exp()
        paths = rho[self.optimal]
        given = paths / paths.sum()
        return {
            "reward": (rho @ self.r.double()).item(),
            "kl_base": lab.kl(rho, rho_0),
            "frontier": self.frontier(rho, rho_0),
            "success": paths.sum().item(),
            "modes": torch.special.entr(given).sum().exp().item(),
        }

    def frontier(self, rho: Tensor, rho_0: Tensor | None = None) -> float:
        """min_a KL(rho || rho_a), at the tilt of the same reward: a difference of KLs to rho_0, the
        base's law in random order unless another is given."""
        rho_0 = self.rho_0 if rho_0 is None else rho_0
        values, p = lab.reward_law(rho_0, self.r)
        reward = rho @ self.r.double()
        a = tilt_of_mean(values, p, reward, low=-1e3, high=1e3)
        log_z = (p.log() + a * values).logsumexp(0)
        return lab.kl(rho, rho_0) - (a * reward - log_z).item()


def frontier_at(reward: float, looks: list[dict]) -> float | None:
    """The frontier distance where the reward first passes a value, linear between two looks."""
    before = {"reward": 0.0, "frontier": 0.0}
    for look in looks:
        if look["reward"] >= reward:
            share = (reward - before["reward"]) / (look["reward"] - before["reward"])
            return before["frontier"] + share * (look["frontier"] - before["frontier"])
        before = look
    return None
