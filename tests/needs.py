"""Memory and hours that a run of GRPO needs: README.md's table, and for any pair

    python tests/needs.py --slm Qwen3-1.7B --llm Qwen3-8B

(config.json of each is enough). The settings are the paper's preset, but for the flags below.
"""
import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from grpo import REAL  # noqa: E402
from model import Transformer, read_config  # noqa: E402
from relay import run_script  # noqa: E402
from warmup import HEAD  # noqa: E402


def parameters(config):
    """How many numbers a model of this Config learns."""
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


def cache_bytes(config, size):
    """Bytes of a token's keys and values, of `size` bytes a number."""
    return 2 * config.layers * config.kv_heads * config.head_dim * size


def memory_needed(slm, llm, args, llm_bytes=2):
    """{what: bytes} of a training step, from two Configs; "peak" is the sum of what is there at the same time.

    The policy has float32 weights, a gradient and Adam's two averages (16 bytes a parameter), the reference float32
    weights; with args.train_dtype "bfloat16" the policy has a copy of 2 bytes besides, and the reference 2. Caches and
    activations take turns. Activations: what the backward pass keeps of args.micro_tokens tokens, counted from the
    operations of model.Layer, attention itself without its (T, T) weights.
    """
    small, large = parameters(slm), parameters(llm)
    copy, size = (2, 2) if args.train_dtype == "bfloat16" else (0, 4)           # bytes a number
    rows = min(args.batch, args.questions_per_step * args.group)
    tokens = rows * (args.prompt_tokens + args.max_new_tokens)
    q, kv = slm.heads * slm.head_dim, slm.kv_heads * slm.head_dim
    inside = 6 * slm.hidden + 8 * q + 8 * kv + 5 * slm.ffn                  # numbers a token and layer
    kept = slm.hidden * slm.layers + inside if args.checkpointing else inside * slm.layers
    head = 4 * 4 * min(args.micro_tokens * slm.vocab_size, HEAD)            # of a chunk: logits, log-softmax, slopes
    parts = dict(policy=(16 + copy) * small, reference=size * small, llm=llm_bytes * large,
                 caches=tokens * (cache_bytes(slm, size) + cache_bytes(llm, llm_bytes)),
                 learning=size * args.micro_tokens * kept + head)
    return parts | dict(peak=sum(parts.values()) - min(parts["caches"], parts["learning"]))


# What one H200 reached at the shapes of Qwen3-1.7B and 8B (tests/bench.py --device cuda --rows scale)
FLOPS = 136e12            # operations a second, learning, TF32
BANDWIDTH = 2.1e12, 2.4e12       # bytes a second, decoding 32 rows at 1,000 tokens: float32, bfloat16
WRITTEN = 0.7             # of the filter's answers, if all pass rates are equally frequent; the others decide nothing


def hours_needed(slm, llm, args, length, rho, llm_bytes=2):
    """{what: hours} of a whole GRPO run in float32 on one GPU, from two Configs: an estimate to plan with, no more.

    length: tokens of a mean response (the longest: args.max_new_tokens). rho: the LLM's share of them. A token costs
    two operations a parameter (forward), twice that backward; a decoding step reads all weights once, and all caches up
    to the longest row. While rows wait, every place of a batch is taken; the last are written to the longest's end.
    """
    small, large = parameters(slm), parameters(llm)
    rows = args.questions_per_step * args.group
    decoding = lambda n: max(n / args.batch, 1) * length + args.max_new_tokens      # steps that write n responses
    steps = args.steps * decoding(rows)
    held = min(args.batch, rows) * (args.prompt_tokens + args.max_new_tokens)       # tokens in the caches, as read
    learned = args.steps * rows * (args.prompt_tokens / args.group + length)
    answers = decoding(WRITTEN * args.pool * args.filter_samples)           # steps of the LLM for the filter
    slow, fast = BANDWIDTH
    seconds = dict(
        filter=answers * (llm_bytes * large + held * cache_bytes(llm, llm_bytes)) / fast,
        sampling=steps * (4 * small + held * cache_bytes(slm, 4)) / slow,
        calls=steps * rho * llm_bytes * large / fast + 2 * large * learned / FLOPS,
        learning=2 * small * learned * (4 + args.checkpointing) / FLOPS)    # policy: 3, reference: 1
    return {what: s / 3600 for what, s in seconds.items()} | dict(all=sum(seconds.values()) / 3600)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--slm", type=Path, required=True)
    p.add_argument("--llm", type=Path, required=True)
    for flag, value, text in (
            ("--batch", 32, "roll-outs decoded at once"), ("--max-new-tokens", 2000, "budget of a response"),
            ("--prompt-tokens", 500, "longest prompt"), ("--length", 800, "tokens of a mean response"),
            ("--rho", 0.02, "the LLM's share of them")):
        p.add_argument(flag, type=type(value), default=value, help=f"{text} ({value})")
    p.add_argument("--train-dtype", choices=["float32", "bfloat16"], default="float32", help="as grpo.py's (float32)")
    given = p.parse_args()
    args = SimpleNamespace(**REAL | vars(given))
    small, large = read_config(given.slm), read_config(given.llm)
    hours = hours_needed(small, large, args, args.length, args.rho)
    print("GiB: " + ", ".join(f"{what} {size / 2**30:.1f}" for what, size in memory_needed(small, large, args).items()))
    print("hours in float32, estimated: " + ", ".join(f"{what} {value:.1f}" for what, value in hours.items()))


if __name__ == "__main__":
    run_script(main)
