"""The frontier of reward against KL to the base, and how far a model is from it.

No distribution has a higher reward at the same KL to the base than a tilt has.
"""

import torch
from torch import Tensor

import dtm
import maze_lab as lab
from figures.rivals.objectives import left_to_right_logs


def tilt_of_mean(values: Tensor, p: Tensor, mean: Tensor, low: float, high: float) -> float:
    """Return the tilt between low and high at which the mean reward is `mean`.

    The reward takes the `values` with the probabilities p, float64. The mean grows with the tilt,
    so bisection finds it.
    """
    for _ in range(60):
        a = (low + high) / 2
        if dtm.exact_tilt(p, values, a) @ values < mean:
            low = a
        else:
            high = a
    return a


class FrontierEvaluation(lab.ExactEvaluation):
    """Adds the metrics of the package's docstring to those of the lab."""

    def __init__(self, maze: lab.Maze, base: dtm.Table, a_end: float):
        super().__init__(maze, base)
        self.base = dtm.Table(base.logits.cpu()).requires_grad_(False)
        self.rho_end = dtm.exact_tilt(self.rho_0, self.r, a_end)

    def measure(self, table: dtm.Table, a: float) -> dict:
        rho = lab.path_distribution(table)
        return super().measure(table, a) | {
            "reward": (rho @ self.r.double()).item(),
            "kl_base": lab.kl(rho, self.rho_0),
            "kl_end": lab.kl(self.rho_end, rho),
            "kl_reverse": lab.kl(rho, self.rho_end),
            "frontier": self.frontier(rho),
        }

    def measure_left_to_right(self, table: dtm.Table) -> dict:
        """Return the metrics of a model that unmasks from left to right, as JustGRPO does."""
        model = dtm.Table(table.logits.cpu())
        rho_0, rho = [
            left_to_right_logs(t, self.x).sum(1).double().exp() for t in (self.base, model)
        ]
        success = rho[self.shortest].sum()
        return {
            "reward": (rho @ self.r.double()).item(),
            "kl_base": lab.kl(rho, rho_0),
            "frontier": self.frontier(rho, rho_0),
            "success": success.item(),
            "modes": torch.special.entr(rho[self.shortest] / success).sum().exp().item(),
        }

    def frontier(self, rho: Tensor, rho_0: Tensor | None = None) -> float:
        """Return min_a KL(rho || rho_a), where the tilts rho_a start from rho_0.

        The minimum is at the tilt with the same mean reward, and is a difference of KLs to rho_0.
        """
        rho_0 = self.rho_0 if rho_0 is None else rho_0
        values, p = lab.reward_distribution(rho_0, self.r)
        reward = rho @ self.r.double()
        a = tilt_of_mean(values, p, reward, low=-1e3, high=1e3)
        log_z = (p.log() + a * values).logsumexp(0)
        return lab.kl(rho, rho_0) - (a * reward - log_z).item()


def frontier_at(reward: float, trace: list[dict]) -> float | None:
    """Return the frontier distance where the reward of a trace first passes this value.

    It is interpolated linearly between two records, and None if the reward never gets there.
    """
    before = {"reward": 0.0, "frontier": 0.0}
    for record in trace:
        if record["reward"] >= reward:
            share = (reward - before["reward"]) / (record["reward"] - before["reward"])
            return before["frontier"] + share * (record["frontier"] - before["frontier"])
        before = record
    return None
