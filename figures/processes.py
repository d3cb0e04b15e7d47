"""The processes of a run: torchrun's ranks, their devices, SIGTERM, and errors in one sentence."""

import contextlib
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from dtm import check

SIGN = ".stopping-"  # and the number of a rank that saw another one missing
SIGNS_IN = 5  # seconds


class Stopped(Exception):
    """SIGTERM, at this rank or another."""


class Ranks:
    """This process among torchrun's, its device and dtype: NCCL and bfloat16 on GPUs, gloo and
    float32 on CPUs."""

    def __init__(self):
        self.asked = False  # by SIGTERM
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.cuda = torch.cuda.is_available()
        self.device, self.dtype = torch.device("cpu"), torch.float32
        if not self.cuda and torch.version.cuda and "CUDA_VISIBLE_DEVICES" not in os.environ:
            advice = "update its driver, or set CUDA_VISIBLE_DEVICES to nothing to run on CPUs"
            there = Path("/dev/nvidia0").exists()
            check(not there, f"torch cannot use the GPU that this machine has; {advice}")
        if self.cuda:
            local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            check(local < count, f"no GPU for local rank {local}; start at most {count} ranks here")
            self.device, self.dtype = torch.device("cuda", local), torch.bfloat16
            torch.cuda.set_device(self.device)
        if self.size > 1 and not dist.is_initialized():
            limit = timedelta(hours=2)  # rank 0 alone reads the base again and grades answers
            dist.init_process_group("nccl" if self.cuda else "gloo", timeout=limit)

    def seed(self, seed: int, stream: int = 0) -> int:
        """Of one of this rank's two streams of noise, 0 or 1. Runs with different seeds below
        500,000 share none, at any rank."""
        return seed + 1_000_000 * self.rank + 500_000 * stream

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    def ask_to_stop(self, *signal_and_frame) -> None:
        """What SIGTERM does."""
        self.asked = True

    def stop_together(self) -> None:
        """Raises `Stopped` at all ranks if one was asked to stop."""
        asked = torch.tensor([self.asked], device=self.device)
        if self.gather(asked).any():
            raise Stopped

    def look(self, *call) -> None:
        if self.asked:
            raise Stopped

    @contextlib.contextmanager
    def stoppable(self, model: nn.Module):
        """SIGTERM ends what is in here at the next network evaluation or `look`; then ranks stop
        together."""
        hook = model.register_forward_pre_hook(self.look)
        try:
            yield
        except Stopped:
            pass
        finally:
            hook.remove()
        self.stop_together()

    def name_lost(self, error: RuntimeError, folder: Path) -> None:
        """After ranks failed to reach each other: a ValueError with the number of each that leaves
        no sign in the run's folder in time. Any other error is raised again."""
        if self.size == 1 or not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise error
        (folder / f"{SIGN}{self.rank}").touch()
        time.sleep(SIGNS_IN)
        lost = [str(k) for k in range(self.size) if not (folder / f"{SIGN}{k}").exists()]
        what = f"rank {', '.join(lost)} of {self.size} has ended, hangs or is late"
        what = what if lost else "the ranks have lost touch with each other"
        advice = "the last checkpoint is whole, and the same command goes on from there"
        first_line = str(error).partition("\n")[0][:150]
        raise ValueError(f"rank {self.rank} stops, as {what}; {advice} ({first_line})") from None

    def clear_sign(self, folder: Path) -> None:
        """Of an earlier run that lost a rank."""
        (folder / f"{SIGN}{self.rank}").unlink(missing_ok=True)

    def memory(self) -> float:
        """GB that this process may use of its device: on a CPU, a share of half the machine's."""
        if self.cuda:
            free = torch.cuda.mem_get_info()[0]
            return (free + torch.cuda.memory_reserved()) / 1e9
        known = hasattr(os, "sysconf")
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 8e9
        return total / 2e9 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    def gather(self, t: Tensor) -> Tensor:
        """The tensors of all ranks, of one shape, one after the other."""
        if self.size == 1:
            return t
        parts = [torch.empty_like(t) for _ in range(self.size)]
        dist.all_gather(parts, t.contiguous())
        return torch.cat(parts)


def run_as_script(main: Callable[[], None]) -> None:
    """Bad input and faults of the machine in one line, with exit status 1."""
    try:
        main()
        if dist.is_initialized():  # not after an error: it would wait for the other ranks
            dist.destroy_process_group()
    except torch.OutOfMemoryError as error:
        advice = "take a lower --chunk or, in training, --checkpointing on; the same command goes"
        advice += " on from the last checkpoint. Else lower --batch, with another --out"
        sys.exit(f"out of device memory ({str(error)[:90]}): {advice}")
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"{Path(sys.argv[0]).stem}: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from the last checkpoint")
