"""The hours that the paper's experiment would take: an estimate, for README.md's table (test_scripts.py compares)."""
import math

from grpo import cache_bytes, parameters


def hours_needed(slm, llm, args, length, rho, flops, bandwidth, llm_bytes=2):
    """{what: hours} of a whole GRPO run on one GPU, from two Configs: an estimate to plan with, nothing more.

    length: tokens of a mean response (the longest of a batch: args.max_new_tokens). rho: the LLM's share of them.
    flops, bandwidth: operations and bytes a second that the GPU reaches in practice. A token costs two operations a
    parameter (forward), twice that backward; a decoding step reads all weights and all caches once.
    """
    small, large = parameters(slm), parameters(llm)
    rows, longest = args.questions_per_step * args.group, args.max_new_tokens
    steps = args.steps * math.ceil(rows / args.batch) * longest             # of decoding, of all of a batch's rows
    held = min(rows, args.batch) * (args.prompt_tokens + length / 2)        # tokens in the caches, on average
    learned = args.steps * rows * (args.prompt_tokens / args.group + length)
    answers = math.ceil(args.pool * args.filter_samples / args.batch) * longest    # steps of the LLM for the filter
    seconds = dict(
        filter=answers * (llm_bytes * large + held * cache_bytes(llm, llm_bytes)) / bandwidth,
        sampling=steps * (4 * small + held * cache_bytes(slm, 4)) / bandwidth,
        calls=steps * rho * llm_bytes * large / bandwidth + 2 * large * learned / flops,
        learning=2 * small * learned * (4 + args.checkpointing) / flops)    # policy: 3, reference: 1
    return {what: s / 3600 for what, s in seconds.items()} | dict(all=sum(seconds.values()) / 3600)
