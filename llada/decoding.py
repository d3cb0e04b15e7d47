"""Completions of prompts: tokenizer and chat template, padding, and LLaDA's sampler.

LLaDA decodes semi-autoregressively. It fills one block of the completion after the other, from left
to right, with a fixed number of network evaluations per block. Each of these fills a share of the
block's masked positions. `dtm.sample` does that; this file puts a prompt before the completion, and
stops where a completion has ended.

Source: ML-GSAI/LLaDA generate.py (b7e6c35). By default our `generate` differs from that file in
three ways: probabilities and the noise by which tokens are drawn are float32, the head is computed
at masked positions only, and a mask token inside a prompt stays as it is.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import dtm
from dtm import check
from llada.checkpoint import explained, read_json
from llada.model import Device

# prompts (B, P), padded to the length P of the longest, and their attention mask (B, P) or None
Padded = tuple[Tensor, Tensor | None]


# ---- 1. Text and tokens -------------------------------------------------------------------------
class ChatTokenizer:
    """The tokenizer of a checkpoint, with LLaDA's chat template.

    ends  the tokens that end a completion: end of text, and end of turn where there is one
    """

    TURN = (
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer  # not needed to load a model

        file = folder / "tokenizer.json"
        with explained(f"{file} is missing or damaged; copy it from the original checkpoint"):
            self.tokenizer = Tokenizer.from_file(str(file))
        self.is_chat = self.tokenizer.token_to_id("<|start_header_id|>") is not None
        end_of_text = read_json(folder / "config.json").get("eos_token_id")
        ends = (end_of_text, self.tokenizer.token_to_id("<|eot_id|>"))
        self.ends = [end for end in ends if end is not None]

    def prompt(self, text: str) -> list[int]:
        """Return the tokens of one user turn, or of the bare text if there is no chat template.

        LLaDA-8B-Base has none, because its tokenizer lacks the tokens of the template.
        """
        turn = self.TURN if self.is_chat else "{}"
        full = "<|startoftext|>" + turn.replace("{}", text.strip())
        return self.tokenizer.encode(full, add_special_tokens=False).ids

    def completion(self, ids: Iterable[int]) -> str:
        """Return the text of a completion up to its first end token."""
        before_end = itertools.takewhile(lambda token: token not in self.ends, ids)
        return self.tokenizer.decode([*before_end], skip_special_tokens=True)


def pad_left(prompts: list[list[int]], pad_id: int, device: Device = "cpu") -> Padded:
    """Return prompts (B, P) with padding on the left, and the attention mask (B, P) bool.

    The mask is None if nothing is padded. That is decided on the CPU, which saves a wait for the
    GPU.
    """
    width = max(map(len, prompts))
    pads = [width - len(prompt) for prompt in prompts]
    ids = [[pad_id] * n + prompt for n, prompt in zip(pads, prompts, strict=True)]
    mask = torch.arange(width) >= torch.tensor(pads)[:, None]
    return torch.tensor(ids, device=device), (mask.to(device) if any(pads) else None)


def model_inputs(
    prompts: Padded, xt: Tensor, where: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the arguments (ids, attention_mask, where) of `LLaDA.forward`.

    prompts  from `pad_left`
    xt       (B, L) completions, partly masked
    where    (B, L) bool: the positions of the completions whose logits are wanted
    """
    ids, mask = prompts
    visible = None if mask is None else F.pad(mask.bool(), (0, xt.shape[1]), value=True)
    return torch.cat([ids, xt], 1), visible, F.pad(where, (ids.shape[1], 0))


def before_the_end(x1: Tensor, block: int, ends: Tensor) -> Tensor:
    """Return (B, L) bool: the positions up to the end of the block with the first end token.

    Tokens after the block of the first end token earn no reward, and no earlier token depends on
    them, because blocks are decoded from left to right. So they are neither decoded nor trained.
    """
    has_end = torch.isin(x1, ends).unflatten(1, (-1, block)).any(2).int()  # (B, blocks)
    # For each block: how many blocks on its left have an end token.
    earlier = has_end.cumsum(1) - has_end
    return (earlier == 0).repeat_interleave(block, 1)


# ---- 2. The sampler -----------------------------------------------------------------------------
class PromptedModel:
    """Puts prompts before the completions of `dtm.sample`; returns logits of completions only.

    A completion with an end token in an earlier block is not computed any more. Its masked
    positions receive the first of `ends`.
    """

    def __init__(self, model: Callable, prompts: Padded, block: int, ends: Sequence[int]):
        self.model, self.block = model, block
        self.ids, self.mask = prompts
        self.ends = torch.tensor(list(ends), dtype=torch.long, device=self.ids.device)

    def __call__(self, xt: Tensor, where: Tensor) -> Tensor:
        """Return logits (M, V) for xt (B, L) where `where` (B, L) is True, all in one block."""
        begin = int(where.any(0).int().argmax()) // self.block * self.block
        running = before_the_end(xt, self.block, self.ends)[:, begin]  # (B,) not ended yet
        if running.all():
            return self.compute(xt, where, running)
        V = self.model.config["vocab_size"]
        logits = torch.full((int(where.sum()), V), -math.inf, device=xt.device)
        logits[:, self.ends[0]] = 0
        if running.any():
            computed = self.compute(xt[running], where[running], running)
            logits[running[:, None].expand_as(where)[where]] = computed.float()
        return logits

    def compute(self, xt: Tensor, where: Tensor, running: Tensor) -> Tensor:
        """Return the model's logits for the running completions only; ValueError if not finite."""
        mask = None if self.mask is None else self.mask[running]
        logits = self.model(*model_inputs((self.ids[running], mask), xt, where))
        advice = "its weights may be damaged, so download or train it again"
        check(logits.isfinite().all(), f"the model's logits are not finite; {advice}")
        return logits


def check_lengths(gen_length: int, block: int, steps: int) -> None:
    """Raise ValueError unless blocks fill the completion and steps spread evenly over blocks."""
    fits = gen_length > 0 and block > 0 and gen_length % block == 0
    check(fits, f"--gen_length {gen_length} must be a positive multiple of --block {block}")
    blocks = gen_length // block
    fits = steps >= blocks and steps % blocks == 0
    check(fits, f"--steps {steps} must be a positive multiple of {blocks}, the number of blocks")


@torch.no_grad()
def generate(
    model: Callable,
    prompt_ids: Tensor,
    gen_length: int,
    block: int,
    steps: int,
    temperature: float = 0.0,
    attention_mask: Tensor | None = None,
    generator: Generator | None = None,
    order: str = "low_confidence",
    ban_mask: bool = False,
    ends: Sequence[int] = (),
) -> Tensor:
    """Return prompts and completions, (B, P + gen_length) int64.

    model           a `LLaDA` in eval mode
    prompt_ids      (B, P) int64, padded on the left
    gen_length      the number of tokens in a completion
    block           the number of tokens in a block, a divisor of gen_length
    steps           network evaluations per completion, divided equally among the blocks
    temperature     0: the most probable token; 1: draws from the model
    attention_mask  (B, P): False or 0 where prompts are padded; None: no padding
    generator       the source of randomness, on the model's device; None: torch's own
    order           one of `dtm.ORDERS`
    ban_mask        whether to forbid drawing the mask token; LLaDA's generate.py does not forbid it
    ends            end tokens: after the block with the first one, a completion is not decoded
                    further, and the rest is filled with ends[0]; LLaDA's generate.py has none
    """
    check_lengths(gen_length, block, steps)
    mask_id = model.config["mask_token_id"]
    mask = None if attention_mask is None or attention_mask.all() else attention_mask
    prompted = PromptedModel(model, (prompt_ids, mask), block, ends)
    *_, completions = dtm.sample(
        prompted,
        prompt_ids.new_full((len(prompt_ids), gen_length), mask_id),
        mask_id,
        order=order,
        block=block,
        temperature=temperature,
        generator=generator,
        steps=steps * block // gen_length,
        ban_mask=ban_mask,
    )
    return torch.cat([prompt_ids, completions], 1)


def by_length(prompts: Sequence[list[int]], size: int) -> list[list[int]]:
    """Return batches of up to `size` indices, sorted by prompt length to save padding."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    return [order[i : i + size] for i in range(0, len(order), size)]
