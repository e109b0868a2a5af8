"""Chapter 4. Stage 0 (toy only), stage 1, and what both training stages share.

The warm-up teaches how a call is written, not yet when (RelayLLM, arXiv 2601.05167, section 4.1). The SLM answers
questions itself; into each answer zero to three commands are put at random places; and the SLM is fine-tuned on the
result. Because the answers are its own, right or wrong, what it knows does not shift.

    loss = - mean over answer tokens of log p(token | all before it)

With no --slm and --llm the pair is the toy's, and stage 0 trains it here from scratch, a process and a core each. What
both stages need stands first: log-probabilities of chosen tokens, micro-batches, one optimizer step.
"""
import itertools
import math
import multiprocessing
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import Tokenizer, load_questions, save_toy_tokenizer, toy_questions, with_asides
from model import Transformer, parse_config, save
from relay import (Run, command, correct, entropy, fill_in, load_pair, log_softmax, machine, parser, positive, run_script,
                   write_answers)

# ---------------------------------------------------------------------------------------------------------------------
# Shared by both stages: log-probabilities, batches, one optimizer step


@dataclass
class Example:
    """A sequence, and which of its tokens are to be learned (never the first: nothing predicts it)."""
    tokens: list
    learn: list


def micro_batches(examples, most):
    """Indices of examples, packed by length into batches of at most `most` tokens, padding included."""
    batch, batches = [], []
    for i in sorted(range(len(examples)), key=lambda i: len(examples[i].tokens)):
        if batch and len(examples[i].tokens) * (len(batch) + 1) > most:
            batches.append(batch)
            batch = []
        batch.append(i)
    return batches + [batch] if batch else batches


def token_logprobs(model, examples, known, temperature=1.0, entropies=False, chunk=2048):
    """Log-probabilities of all learned tokens, (N,), example by example, and the entropies there (N,), no gradient.

    Only the positions that predict a learned token pass the output head, `chunk` at a time, and each chunk's logits are
    computed again in the backward pass: with a vocabulary of 152k, logits of a whole batch would not fit.
    """
    device = model.embed.weight.device
    width = max(len(e.tokens) for e in examples)
    tokens = torch.tensor([e.tokens + [0] * (width - len(e.tokens)) for e in examples], device=device)
    learn = torch.tensor([e.learn + [False] * (width - len(e.learn)) for e in examples], device=device)[:, 1:]
    hidden = model.hidden(tokens[:, :-1])[learn]                               # (N, hidden)
    targets = tokens[:, 1:][learn]                                             # (N,)

    def head(hidden, targets):
        logprobs = log_softmax(model.logits(hidden), known, temperature)
        return logprobs.gather(-1, targets[:, None])[:, 0], entropy(logprobs.detach()) if entropies else None

    parts = list(zip(hidden.split(chunk), targets.split(chunk)))
    parts = [head(*part) if len(parts) == 1 else checkpoint(head, *part, use_reentrant=False) for part in parts]
    return torch.cat([p for p, _ in parts]), torch.cat([e for _, e in parts]) if entropies else None


def adamw(model, lr, weight_decay=0.01):
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay)


def apply_gradient(model, optimizer, lr, clip=1.0):
    """Clip the gradient to norm `clip`, take one step. Returns the norm before; a non-finite one takes no step."""
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def supervised_step(model, optimizer, examples, known, lr, most):
    """One update of the mean negative log-likelihood over all learned tokens of the batch. Returns (loss, tokens)."""
    total, loss = sum(sum(e.learn[1:]) for e in examples), 0.0
    for batch in micro_batches(examples, most):
        part = -token_logprobs(model, [examples[i] for i in batch], known)[0].sum() / total
        part.backward()
        loss += part.item()
    apply_gradient(model, optimizer, lr)
    return loss, total


# ---------------------------------------------------------------------------------------------------------------------
# Stage 0: the toy pair

TOY_SIZES = {
    "slm": dict(hidden_size=48, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=16),
    "llm": dict(hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=6,
                num_key_value_heads=2, head_dim=16),
}
# lr, share of texts with asides, share of texts that name rare things, are their facts made up
TOY_CORPUS = {"slm": dict(lr=4e-3, asides=0.4, rare=0.3, unreliable=True),
              "llm": dict(lr=3e-3, asides=0.1, rare=0.5, unreliable=False)}


def pretrain(name, directory, steps, seed, batch=32, position=0):
    """Train one model of the toy pair from scratch on worked solutions and write it into `directory`."""
    torch.set_num_threads(1)
    tokenizer = Tokenizer(directory)
    config = parse_config(dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], vocab_size=len(tokenizer.known),
                               max_position_embeddings=512, rope_theta=10000.0, rms_norm_eps=1e-6, hidden_act="silu",
                               tie_word_embeddings=True, attention_bias=False, eos_token_id=tokenizer.end_id,
                               **TOY_SIZES[name]), directory)
    model, corpus = Transformer(config).initialize(seed), TOY_CORPUS[name]
    optimizer, known = adamw(model, corpus["lr"]), torch.tensor(tokenizer.known)
    rng = random.Random(f"{name} {seed}")
    questions = toy_questions("train", rng, corpus["rare"], unreliable=corpus["unreliable"])
    bar = tqdm(range(steps), desc=f"pretrain {name}", position=position, unit="step", dynamic_ncols=True)
    for step in bar:
        examples = []
        for _ in range(batch):
            question = next(questions)
            answer, learn = with_asides(tokenizer.encode(question.solution), tokenizer, rng, corpus["asides"])
            prompt = tokenizer.chat(question.text)
            examples.append(Example(prompt + answer + [tokenizer.end_id], [False] * len(prompt) + learn + [True]))
        lr = corpus["lr"] * (1 - step / steps) * min(1, (step + 1) / 50)
        loss, tokens = supervised_step(model, optimizer, examples, known, lr, most=1500)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss:.3f}")
    save(model, directory)


def pretrain_pair(run, args):
    """Both models at the same time, a process and a core each. What is there already is kept."""
    jobs = []
    for position, (name, steps) in enumerate((("slm", args.slm_steps), ("llm", args.llm_steps))):
        if f"pretrain {name}" not in run.info["stages"]:
            save_toy_tokenizer(run.path / name)
            jobs.append((name, run.path / name, steps, args.seed, 32, position))
    # Freed memory is kept for the next step instead of going back to Linux page by page: a third faster (glibc).
    os.environ.update(MALLOC_MMAP_THRESHOLD_="33554432", MALLOC_TRIM_THRESHOLD_="1073741824")
    processes = [multiprocessing.get_context("spawn").Process(target=pretrain, args=job) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    for job, process in zip(jobs, processes):
        if process.exitcode != 0:
            raise ValueError(f"pretraining the {job[0].upper()} failed")
        run.finish(f"pretrain {job[0]}", dict(steps=job[2], seed=args.seed))


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1: the supervised warm-up

def insert_commands(tokens, tokenizer, rng, max_n):
    """Zero to three commands at distinct random gaps of an answer, both ends included (RelayLLM, section 4.1).

    n = min(d * 10^k, tokens left): d uniform in 1..9, k in 0..3, or less for a smaller max_n. Returns the new ids.
    """
    out, powers = list(tokens), len(str(max_n))
    for gap in sorted(rng.sample(range(len(tokens)), min(rng.randint(0, 3), len(tokens))), reverse=True):
        n = min(rng.randint(1, 9) * 10 ** rng.randrange(powers), max_n, len(tokens) - gap)
        out[gap:gap] = tokenizer.encode(command(n))          # from the back: earlier gaps keep their places
    return out


def warm_up(model, tokenizer, rollouts, args):
    """Fine-tune on own answers with random commands in them: how to write a command, not yet when.

    The answers are the model's own, right or wrong, so that what it knows does not shift.
    """
    rng = random.Random(f"commands {args.seed}")
    known = torch.tensor(tokenizer.known, device=model.embed.weight.device)
    optimizer = adamw(model, args.lr)
    steps = math.ceil(len(rollouts) / args.batch_size) * args.epochs
    bar = tqdm(total=steps, desc="warm-up", unit="step", dynamic_ncols=True)
    for epoch in range(args.epochs):
        rng.shuffle(rollouts)
        for start in range(0, len(rollouts), args.batch_size):
            examples = []
            for r in rollouts[start:start + args.batch_size]:
                answer = insert_commands(r.tokens, tokenizer, rng, args.max_n)
                examples.append(Example(r.prompt + answer, [False] * len(r.prompt) + [True] * len(answer)))
            ramp = min(1.0, (bar.n + 1) / max(1, 0.03 * steps))            # warm-up ratio 0.03, then linearly to 0
            loss, _ = supervised_step(model, optimizer, examples, known, args.lr * ramp * (1 - bar.n / steps),
                                      args.micro_tokens)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()


TOY = dict(temperature=0.7, max_new_tokens=96, samples=3000, epochs=4, lr=2e-3, batch_size=32, max_n=9)
PAPER = dict(temperature=0.7, max_new_tokens=2048, samples=10000, epochs=1, lr=1e-5, batch_size=16, max_n=9000)


def arguments():
    p = parser("Stage 1: teach the SLM to write commands (for the toy, first train the pair).",
               "python warmup.py --run runs/real --slm Qwen3-1.7B --llm Qwen3-8B --questions train.jsonl")
    p.add_argument("--samples", type=positive(int), help=f"own answers to learn from (toy {TOY['samples']})")
    p.add_argument("--epochs", type=positive(int), help="passes over them")
    p.add_argument("--lr", type=positive(float), help="peak learning rate")
    p.add_argument("--batch-size", type=positive(int), help="answers an update")
    p.add_argument("--max-n", type=positive(int), help="longest call that is shown")
    p.add_argument("--check", type=positive(int), default=500, help="questions asked before and after (500)")
    p.add_argument("--micro-tokens", type=positive(int), default=1500, help="tokens that pass the model at once")
    p.add_argument("--slm-steps", type=positive(int), default=2600, help="toy: pretraining steps of the SLM")
    p.add_argument("--llm-steps", type=positive(int), default=1300, help="toy: pretraining steps of the LLM")
    args = p.parse_args()
    if (args.slm is None) != (args.llm is None):
        p.error("--slm and --llm go together")
    args.toy = args.slm is None
    if not args.toy and args.questions is None:
        p.error("real models need --questions FILE")
    fill_in(args, TOY if args.toy else PAPER)
    return args


def settings(args):
    """What run.json keeps of a stage's arguments."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "run" and v is not None}


def main():
    args = arguments()
    run = Run(args.run)
    if (run.path / "warmup" / "config.json").exists() and "warmup" in run.info["stages"]:
        raise ValueError(f"{run.path} already holds a warm-up; choose another --run, or delete {run.path / 'warmup'}")
    device, frozen = machine(args, args.toy)
    if args.toy:
        pretrain_pair(run, args)
    else:
        run.info.update(slm=str(args.slm.resolve()), llm=str(args.llm.resolve()))
    run.info["toy"] = args.toy
    slm, llm, tokenizer = load_pair(run.directory("slm"), run.directory("llm"), device, frozen)

    rng = random.Random(f"warmup {args.seed}")
    if args.toy:
        pool = list(itertools.islice(toy_questions("train", rng, unseen=False), args.samples))
        check = list(itertools.islice(toy_questions("held_out", rng), args.check))
    else:
        pool = load_questions(args.questions, args.limit)
        rng.shuffle(pool)
        pool, check = pool[args.check:][:args.samples], pool[:args.check]
    own = write_answers(slm, None, tokenizer, pool, args, "sample", temperature=1.0)
    before = write_answers(slm, None, tokenizer, check, args, "before")
    start = time.perf_counter()
    warm_up(slm, tokenizer, own, args)
    seconds = time.perf_counter() - start
    after = write_answers(slm, llm, tokenizer, check, args, "after")
    save(slm, run.path / "warmup", run.directory("slm"))
    run.finish("warmup", settings(args))
    for name, rollouts in (("SLM alone", before), ("warmed up, with the LLM", after)):
        right = sum(correct(q, r, tokenizer) for q, r in zip(check, rollouts)) / max(1, len(check))
        calls = sum(any(r.by_llm) for r in rollouts) / max(1, len(check))
        rho = sum(sum(r.by_llm) for r in rollouts) / max(1, sum(len(r.tokens) for r in rollouts))
        print(f"{name}: {right:.1%} right, calls in {calls:.0%} of {len(check)} answers, rho {rho:.1%}")
    print(f"wrote {run.path / 'warmup'} ({seconds:.0f} s of training); next: python grpo.py --run {run.path}")


if __name__ == "__main__":
    run_script(main)
