"""The processes of a run: rank, device and dtype, communication, and a clean stop.

torchrun starts one process per GPU and sets RANK, LOCAL_RANK and WORLD_SIZE. Without torchrun there
is one process. On GPUs the processes talk over NCCL and the base model is in bfloat16; on CPUs they
talk over gloo and everything is in float32.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtm import check

# The ranks meet after every optimizer step and every batch of rollouts. Their longest waits are the
# first download of the base model, and an evaluation, in which rank 0 grades the answers of all.
TIMEOUT = timedelta(minutes=30)
SEED_STRIDE = 1_000_000  # the distance between the seeds of two ranks


class Ranks:
    """This process, and how it communicates with the other processes of a run.

    rank, size   its number, and the number of processes
    device       the CPU, or the GPU that belongs to its local rank
    dtype        the type of the base model and the teacher: bfloat16 on a GPU, float32 on a CPU
    """

    def __init__(self):
        for name in ("RANK", "WORLD_SIZE"):
            other = "WORLD_SIZE" if name == "RANK" else "RANK"
            alone = name in os.environ and other not in os.environ
            check(not alone, f"{name} is set but {other} is not; start several ranks with torchrun")
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.signal = 0  # the number of the signal that asked this process to stop
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            self.use_gpu()
        if self.size > 1 and not dist.is_initialized():
            device = {"device_id": self.device} if self.cuda else {}
            dist.init_process_group("nccl" if self.cuda else "gloo", timeout=TIMEOUT, **device)

    def use_gpu(self) -> None:
        local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        check(local < count, f"local rank {local} has no GPU; start at most {count} ranks per node")
        # Without this, the many shapes of prompts and micro-batches fragment the memory.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        self.device, self.dtype = torch.device("cuda", local), torch.bfloat16
        torch.cuda.set_device(self.device)
        name, major = torch.cuda.get_device_name(), torch.cuda.get_device_capability()[0]
        advice = "use an Ampere GPU or newer, or set CUDA_VISIBLE_DEVICES to nothing for the CPU"
        check(major >= 8, f"{name} does not compute in bfloat16; {advice}")
        # cuDNN would build a plan for every new shape, and a phase has thousands of shapes.
        torch.backends.cuda.enable_cudnn_sdp(False)

    def seed(self, seed: int, stream: int = 0) -> int:
        """Return this rank's seed: stream 0 is for masks and tokens, stream 1 for dropout.

        Two runs with different seeds below 500,000 never get the same seed here.
        """
        return seed + SEED_STRIDE * self.rank + SEED_STRIDE // 2 * stream

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.size > 1:
            dist.barrier()

    def gather(self, t: Tensor) -> Tensor:
        """Return the tensors of all ranks, all of one shape, concatenated along the first axis."""
        if self.size == 1:
            return t
        parts = [torch.empty_like(t) for _ in range(self.size)]
        dist.all_gather(parts, t.contiguous())
        return torch.cat(parts)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the ranks.

        The tensors are added one by one, which rounds them in the same way in each step. (PyTorch's
        DistributedDataParallel groups gradients in the first step after a process starts. After a
        resume this is a later step of the run, and the grouping may differ; sums over three or more
        ranks then round differently.)
        """
        if self.size > 1:
            for p in parameters:
                dist.all_reduce(p.grad)
                p.grad /= self.size

    # SIGTERM and SIGINT set a flag. All ranks check it together, between optimizer steps and after
    # batches of rollouts. The caller of `agreed_signal` saves and exits.
    @contextlib.contextmanager
    def signals_caught(self) -> Iterator[None]:
        """Within this context SIGTERM and SIGINT are remembered instead of ending the process.

        Python allows signal handlers in the main thread only; in another thread nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for number in before:
                signal.signal(number, self.remember)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.signal = 0

    def remember(self, number: int, frame: object) -> None:
        self.signal = number
        if self.rank == 0:  # os.write, unlike print, is safe in a signal handler
            os.write(
                2, b"\nstopping after this step, batch of rollouts or evaluation; please wait\n"
            )

    def agreed_signal(self) -> int:
        """Return the number of a signal that any rank has received, the same on all; 0 for none."""
        return int(self.gather(torch.tensor([self.signal], device=self.device)).max())


def run_as_script(main: Callable[[], None]) -> None:
    """Call main(); for bad input or a system error, print one line and exit with a nonzero code."""
    name = Path(sys.argv[0]).stem
    for stream in (sys.stdout, sys.stderr):  # a path may hold what the terminal cannot show
        with contextlib.suppress(AttributeError):  # the streams of tests and notebooks lack it
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        if dist.is_initialized():  # only now: after an error this would wait for busy ranks
            dist.destroy_process_group()
    except torch.OutOfMemoryError as error:
        advice = "in training add --recompute, in rollouts and evaluations lower --chunk; or start "
        advice += "another run with a smaller --batch, a larger --accum and another --out"
        sys.exit(f"{name}: out of GPU memory: {advice} ({str(error)[:90]})")
    except (ValueError, OSError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)
