"""Chapter 4. Stage 0 (toy only), stage 1, and what stages 1 and 2 share.

The warm-up teaches how a call is written, not yet when (RelayLLM, arXiv 2601.05167, section 4.1). The SLM answers
questions itself; into each answer zero to three commands are put at random places; and the SLM is fine-tuned on the
result. Because the answers are its own, right or wrong, what it knows should not shift (README.md, "What failed on the
way", has the exceptions).

    loss = - mean over answer tokens of log p(token | all before it)

With no --slm and --llm the pair is the toy's, and stage 0 trains it here from scratch, one process for each model. What
stands first is how a model learns, in all stages: batches, log-probabilities of chosen tokens, one optimizer step. What
else stages 1 and 2 share stands behind them: several processes that train one model (with one, as you may read it at
first, world() is (0, 1), meet(x) is [x] and add_up(x) is x), settings, questions and answers.

Left out: a choice among the answers (without the wrong ones what the SLM writes would shift), adapters such as LoRA,
and one model spread over several GPUs (each process holds both models whole).
"""
import argparse
import itertools
import math
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import distributed
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import Tokenizer, load_questions, save_toy_tokenizer, split_of, toy_questions, with_asides
from model import Grid, Transformer, digest, need, parse_config, progress_bar, read_config, save
from relay import (Run, WrongArguments, command, entropy, few_rows, fill_in, give_back, graded, hear_signals, load_pair,
                   log_softmax, machine, parser, positive, relay, run_script, show_presets, small_models)


# ---------------------------------------------------------------------------------------------------------------------
# Learning, in all stages: log-probabilities, batches, one optimizer step

@dataclass
class Example:
    """A sequence, and which of its tokens are to be learned (never the first: nothing predicts it)."""
    tokens: list
    learn: list
    prompt: tuple = ()  # its first tokens, where other examples may begin with the same prompt


def micro_batches(examples, most):
    """Indices of examples, packed by length into batches of at most `most` tokens, padding and shared prompts included
    (a longer one stands alone). The roll-outs of one prompt follow each other: a batch with several reads it once."""
    length = lambda i: len(examples[i].tokens)
    groups, batches = {}, []
    for i, e in enumerate(examples):
        groups.setdefault(e.prompt, []).append(i)
    for group in sorted(groups.values(), key=lambda group: max(map(length, group))):
        for i in sorted(group, key=length):
            if not batches or max(map(length, [*batches[-1], i])) * (len(batches[-1]) + 1) > most:
                batches.append([])
            batches[-1].append(i)
    return batches


def pack(examples, device):
    """Examples as one list of tokens (N,) and its Grid; the places in it that predict learned tokens, and those tokens.

    Two roll-outs p q a b and p q c d of one prompt p q, whose last tokens b and d predict nothing:
        tokens  p q a c    take  [[0, 1, 2], [0, 1, 3]]    put  [0, 1, 2, 5]    at  1 2 1 3    targets  a b c d
    """
    width = max(len(e.tokens) for e in examples) - 1
    tokens, take, put, at, targets, prompts = [], [], [], [], [], {}
    for row, e in enumerate(examples):
        places = list(prompts.get(e.prompt, []))
        new = range(len(places), len(e.tokens) - 1)                            # columns that are not in the list yet
        places += range(len(tokens), len(tokens) + len(new))
        prompts.setdefault(e.prompt, places[:len(e.prompt)])
        tokens += e.tokens[new.start:new.stop]
        put += [row * width + column for column in new]
        take.append(places + [0] * (width - len(places)))
        learned = [column for column, learn in enumerate(e.learn[1:]) if learn]
        at += [places[column] for column in learned]
        targets += [e.tokens[column + 1] for column in learned]
    tokens, take, put, at, targets = (torch.tensor(ids, dtype=torch.long, device=device)
                                      for ids in (tokens, take, put, at, targets))
    return tokens, Grid(take, put), at, targets


HEAD = 2**26      # logits in memory at once: 256 MiB in float32


class ChosenLogprobs(torch.autograd.Function):
    """log_softmax(logits) at the targets, in less memory and time (how it does that may wait).

    From logits (n, V) the log-probabilities of targets (n,), and with entropies=True the entropies, both (n,).
    d log p(target) / d logit j = ([j = target] - p(j)) / temperature. Left to autograd several more tensors of the
    logits' size would be kept, and read from memory again and again; here a few rows at a time are computed in the
    CPU's cache, and the gradient is written over the logits, which nobody else may need.
    """

    @staticmethod
    def forward(ctx, logits, targets, known, temperature, entropies):
        ctx.save_for_backward(logits, targets, known)
        ctx.temperature, out, spread = temperature, [], []
        for part, target in few_rows(logits, targets):
            logprobs = log_softmax(part, known, temperature)
            out.append(logprobs.gather(-1, target[:, None])[:, 0])
            spread.append(entropy(logprobs) if entropies else logprobs.new_empty(0))
        spread = torch.cat(spread)
        ctx.mark_non_differentiable(spread)
        return torch.cat(out), spread

    @staticmethod
    def backward(ctx, slopes, _):
        logits, targets, known = ctx.saved_tensors
        for part, target, slope in few_rows(logits, targets, slopes):
            logprobs = log_softmax(part, known, ctx.temperature)
            slopes_out = torch.zeros_like(logprobs).scatter_(-1, target[:, None], slope[:, None])
            slopes_in = torch._log_softmax_backward_data(slopes_out, logprobs, -1, logprobs.dtype)   # out - p sum(out)
            part[:, :len(known)] = slopes_in.div_(ctx.temperature)
            part[:, len(known):] = 0           # ids that the tokenizer lacks
        return logits, None, None, None, None


def token_logprobs(model, examples, known, temperature=1.0, entropies=False):
    """Log-probabilities of all learned tokens, (n,), example by example; with entropies=True the entropies there, too,
    (n,) without a gradient, else an empty tensor.

    Only the positions that predict a learned token pass the output head, HEAD logits at a time: with a vocabulary of
    152k a batch's would not fit. Where that takes several chunks, their logits are computed again in the backward pass.
    """
    tokens, grid, at, targets = pack(examples, model.embed.weight.device)
    hidden = F.embedding(at, model.hidden_states(tokens, grid=grid))           # (n, hidden)

    def head(hidden, targets):
        return ChosenLogprobs.apply(model.logits(hidden), targets, known, temperature, entropies)

    size = max(1, HEAD // model.config.vocab_size)
    chunks = list(zip(hidden.split(size), targets.split(size)))
    parts = [head(*c) if len(chunks) == 1 else checkpoint(head, *c, use_reentrant=False) for c in chunks]
    return tuple(map(torch.cat, zip(*parts)))


def adamw(model, lr):
    """The paper's optimizer; apply_gradient() sets lr anew at each step. Fused, a step has no temporaries of a tensor's
    size: at 0.5B on two cores it takes 0.4 s in place of 5."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.01, fused=True)


def working_copy(master, optimizer, dtype):
    """For "float32" the master; for "bfloat16" a copy that samples and learns in its place. (It may wait.)

    A weight of 16 bits cannot take a step of a thousandth of itself, nor a sum of 16 bits many small parts. So the
    copy's gradients are added up in the master's, in float32; the optimizer moves the master; and after each of its
    steps the copy takes the new weights (Mixed precision training, arXiv 1710.03740, section 3.1). The master is saved.
    """
    if dtype == "float32":
        return master
    copy = deepcopy(master).to(getattr(torch, dtype))
    pairs = list(zip(copy.parameters(), master.parameters()))

    def hand_over(p, m):
        m.grad = p.grad.float() if m.grad is None else m.grad.add_(p.grad)
        p.grad = None

    def renew(*_):
        with torch.no_grad():
            for p, m in pairs:
                p.copy_(m)

    for p, m in pairs:
        p.register_post_accumulate_grad_hook(partial(hand_over, m=m))
    optimizer.register_step_post_hook(renew)
    return copy


def apply_gradient(optimizer, lr):
    """Add up the processes' gradients (each loss is divided by the tokens of all), clip to norm 1, take one step.

    No step where the norm is not finite. Returns the norm before the clip.
    """
    group, = optimizer.param_groups
    if world()[1] > 1:
        for p in group["params"]:              # a process without a token to learn has no gradient of its own
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            distributed.all_reduce(p.grad)
    norm = float(torch.nn.utils.clip_grad_norm_(group["params"], 1.0))
    if math.isfinite(norm):
        group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def supervised_step(model, optimizer, examples, known, lr, most):
    """One update of the mean negative log-likelihood over all learned tokens of the batch. Returns the loss.

    examples: the whole batch, the same in every process; each learns its share.
    """
    rank, size = world()
    total, loss, mine = sum(sum(e.learn) for e in examples), 0.0, examples[rank::size]
    for batch in micro_batches(mine, most):
        give_back(model)                       # freed memory, to Linux: no part of the method
        part = -token_logprobs(model, [mine[i] for i in batch], known)[0].sum() / total
        part.backward()
        loss += part.item()
    apply_gradient(optimizer, lr)
    loss = add_up(loss)
    need(math.isfinite(loss), "the loss is no longer finite; try a smaller --lr")
    return loss


def learning_rate(lr, step, steps, ramp):
    """`lr`, times a rise over the first `ramp` steps, times a fall to 0 over all of them. `step` counts from 0."""
    return lr * min(1.0, (step + 1) / ramp) * (1 - step / steps)


def supervise(model, optimizer, tokenizer, batches, steps, lr, ramp, most, label, position=0):
    """One update for each batch, a list of examples; micro-batches of at most `most` tokens. label, position (its line
    on the screen): of the progress bar. ramp: see learning_rate()."""
    known, start, read = torch.tensor(tokenizer.known, device=model.embed.weight.device), time.perf_counter(), 0
    with progress_bar(total=steps, desc=label, unit="step", position=position) as bar:
        for step, examples in enumerate(batches):
            loss = supervised_step(model, optimizer, examples, known, learning_rate(lr, step, steps, ramp), most)
            read += sum(len(e.tokens) for e in examples)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
    tqdm.write(f"{label}: {read / (time.perf_counter() - start):,.0f} tokens/s")


# ---------------------------------------------------------------------------------------------------------------------
# Stage 0: the toy pair

TOY_SIZES = {"slm": dict(hidden_size=48, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4),
             "llm": dict(hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=6)}
# asides: the share of texts that hold some. unreliable: the prices of rare things are made up
TOY_CORPUS = {"slm": dict(lr=4e-3, asides=0.4, unreliable=True), "llm": dict(lr=3e-3, asides=0.1, unreliable=False)}


def pretrain(rank, jobs, batch=32):
    """Train a model of the toy pair from scratch on worked solutions. jobs[rank]: (name, directory, steps, seed)."""
    name, directory, steps, seed = jobs[rank]
    if multiprocessing.parent_process():
        end_with_parent()
        tqdm.set_lock(threading.RLock())       # its own is one between processes, left behind by those that are killed
        os.environ.update(RANK="0", WORLD_SIZE="1")        # whatever the parent is one of, this model has one process
    small_models()
    tokenizer = Tokenizer(directory)
    config = parse_config(dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], vocab_size=len(tokenizer.known),
                               max_position_embeddings=512, rope_theta=10000.0, rms_norm_eps=1e-6, hidden_act="silu",
                               tie_word_embeddings=True, attention_bias=False, eos_token_id=tokenizer.end_id,
                               num_key_value_heads=2, head_dim=16, **TOY_SIZES[name]), directory)
    model, corpus = Transformer(config).initialize(seed), TOY_CORPUS[name]
    rng = random.Random(f"{name} {seed}")
    questions = toy_questions("train", rng, unreliable=corpus["unreliable"])

    def example(question):
        answer, learn = with_asides(tokenizer.encode(question.solution), tokenizer, rng, corpus["asides"])
        prompt = tokenizer.chat(question.text)
        return Example(prompt + answer + [tokenizer.end_id], [False] * len(prompt) + learn + [True])

    batches = ([example(next(questions)) for _ in range(batch)] for _ in range(steps))
    supervise(model, adamw(model, corpus["lr"]), tokenizer, batches, steps, corpus["lr"], ramp=50, most=1500,
              label=f"pretrain {name}", position=rank)
    save(model, directory)


def pretrain_pair(run, args):
    """Both models at the same time, one process for each. What is there already is kept."""
    jobs = []
    for name, steps in (("slm", args.slm_steps), ("llm", args.llm_steps)):
        if run.finished(f"pretrain {name}", dict(steps=steps, seed=args.seed)):
            print(f"{run.path / name} is there already")
        else:
            save_toy_tokenizer(run.path / name)
            jobs.append((name, run.path / name, steps, args.seed))
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)     # the children inherit that: Ctrl-C is for this one to hear
    context = torch.multiprocessing.spawn(pretrain, (jobs,), len(jobs), join=False, daemon=True)
    signal.signal(signal.SIGINT, heard)
    try:
        while not context.join():              # if one fails, or this one, all end
            pass
    except (torch.multiprocessing.ProcessExitedException, torch.multiprocessing.ProcessRaisedException) as error:
        raise ValueError(f"pretraining the toy pair failed: {str(error).splitlines()[-1]}") from None
    for name, _, steps, seed in jobs:
        run.finish(f"pretrain {name}", dict(steps=steps, seed=seed))


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1: the supervised warm-up

def insert_commands(tokens, tokenizer, rng, max_n):
    """Zero to three commands at distinct random positions of an answer (RelayLLM, section 4.1). Returns the new ids.

    A command may stand before any token of the answer, its end of text included, but not behind the last one.
    n = min(d * 10^k, max_n, tokens behind it): d uniform in 1..9, k in 0..3, or less for a smaller max_n.
    """
    out, powers = list(tokens), len(str(max_n))
    for at in sorted(rng.sample(range(len(tokens)), min(rng.randint(0, 3), len(tokens))), reverse=True):
        n = min(rng.randint(1, 9) * 10 ** rng.randrange(powers), max_n, len(tokens) - at)
        out[at:at] = tokenizer.encode(command(n))            # from the back: earlier positions stay what they are
    return out


def warm_up(model, optimizer, tokenizer, rollouts, args):
    """Fine-tune on the model's own answers, each with random commands in it."""
    rng = random.Random(f"commands {args.seed}")
    steps = math.ceil(len(rollouts) / args.batch_size) * args.epochs

    def example(r):
        answer = insert_commands(r.tokens, tokenizer, rng, args.max_n)
        return Example(r.prompt + answer, [False] * len(r.prompt) + [True] * len(answer))

    def batches():
        for _ in range(args.epochs):
            rng.shuffle(rollouts)
            for start in range(0, len(rollouts), args.batch_size):
                yield [example(r) for r in rollouts[start:start + args.batch_size]]

    supervise(model, optimizer, tokenizer, batches(), steps, args.lr, max(1, 0.03 * steps), args.micro_tokens,
              "warm-up")


# ---------------------------------------------------------------------------------------------------------------------
# Several processes that train one model (skip it on a first reading)
#
# N processes run the same script; each holds both models and takes an N-th of the questions. What they have in common
# (seeds, order, settings) each computes for itself, so little is sent: rows of metrics, roll-outs where all need all,
# and the gradient.


def world():
    """(rank of this process, number of processes), from the environment that torchrun or start_processes() sets."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start_processes(args):
    """--gpus N: run this command line in N processes, one per GPU, and exit with them; in each of them just return. If
    one fails the others are stopped: they would wait for it for ever."""
    n, there = args.gpus, torch.cuda.device_count()
    if n == 1 or "RANK" in os.environ:
        return
    need(args.device != "auto" or there == 0 or there >= n, f"--gpus {n}: this machine has {there}; give no more, or "
         "--device cpu", WrongArguments)
    need(args.device in ("auto", "cpu"), f"--gpus {n} takes CUDA's GPUs in order; leave out --device {args.device}",
         WrongArguments)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    shared = dict(os.environ, WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n)))    # else each takes all cores
    children = [subprocess.Popen([sys.executable, *sys.argv], env=dict(shared, RANK=str(i), LOCAL_RANK=str(i)))
                for i in range(n)]
    hear_signals(lambda *_: [child.terminate() for child in children])
    while None in (codes := [child.poll() for child in children]) and not any(codes):
        time.sleep(0.1)
    for child in children:
        child.kill()                           # does nothing to one that has ended
        child.wait()
    failed = [code for code in codes if code]
    if failed and max(failed) < 0:             # else one of them has said why
        sys.exit(f"{Path(sys.argv[0]).name}: a process was killed by signal {-failed[0]} (9: perhaps out of memory; "
                 "try a smaller --batch, or --micro-tokens)")
    sys.exit(1 if failed else 0)


def end_with_parent():
    """From now on this process ends when the one that started it does: one that is killed could not end it itself."""
    parent = os.getppid()

    def wait():
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()


def join_processes(device):
    """Meet the other processes. Returns whether this is the first one: only that one prints, and writes files."""
    rank, size = world()
    if device == "cpu" and rank == 0:
        print(f"no GPU is used: running on the CPU, {size} {'process' if size == 1 else 'processes'}")
    if size > 1:
        end_with_parent()                      # else it would go on to write into a run that has been resumed
        if device.startswith("cuda"):
            torch.cuda.set_device(device)      # meet() sends over the current device
        distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(days=7))
        if rank > 0:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return rank == 0


def meet(brought=None):
    """Wait until all processes are here. Returns what each of them brought, by rank."""
    everything = [brought] * world()[1]
    if len(everything) > 1:
        distributed.all_gather_object(everything, brought)
    return everything


def add_up(values):
    """A number, or lists of numbers, each summed over all processes."""
    return torch.tensor(meet(values), dtype=torch.float64).sum(dim=0).tolist()


def machine_arguments(p):
    """The flags of both training stages that say how, not what (though of the two dtypes each has its own rounding)."""
    p = p.add_argument_group("training on this machine")
    p.add_argument("--gpus", type=positive(int), default=1, help="processes, one per GPU (1); or start with torchrun")
    p.add_argument("--micro-tokens", type=positive(int), help="tokens that pass the model at once")
    p.add_argument("--checkpointing", action=argparse.BooleanOptionalAction,
                   help="compute layers again in the backward pass: slower, smaller")
    p.add_argument("--train-dtype", choices=["float32", "bfloat16"], default="float32",
                   help="in which the model that learns, and its reference, compute; its own weights, and the "
                        "optimizer's, are in float32 (float32)")


# ---------------------------------------------------------------------------------------------------------------------
# Settings, questions, answers of stages 1 and 2 (skip it on a first reading)

def settings_of(args, questions):
    """What run.json keeps of a stage's arguments: all that can change its result, and a hash of its questions."""
    how = ("run", "resume", "gpus", "device", "batch", "micro_tokens", "checkpointing", "save_every", "check",
           "eval_every", "eval_questions")
    given = {k: place(v, args.run) if isinstance(v, Path) else v
             for k, v in vars(args).items() if k not in how and v is not None}
    return dict(question_texts=digest([q.text for q in questions])[:12]) | given


def place(path, run):
    """Where something lies: relative to the run's if inside it, so that the run can be moved, else absolute."""
    path, run = path.resolve(), run.resolve()
    return str(path.relative_to(run) if path.is_relative_to(run) else path)


def write_answers(slm, llm, tokenizer, questions, args, label, keep=lambda question, rollout: rollout, numbers=None,
                  **options):
    """relay() over questions with the script's settings; each process writes its share. Question i's seed is
    (args.seed, numbers[i]) (default: i).

    Returns what keep(question, rollout) makes of each; only that is sent to the other processes.
    """
    (rank, size), n = world(), len(questions)
    mine, numbers = range(rank * n // size, (rank + 1) * n // size), numbers or range(n)
    options = dict(max_new_tokens=args.max_new_tokens, temperature=args.temperature, batch=args.batch, label=label,
                   seed=[(args.seed, numbers[i]) for i in mine]) | options
    rollouts = relay(slm, llm, tokenizer, [tokenizer.chat(questions[i].text) for i in mine], **options)
    return sum(meet([keep(questions[i], rollout) for i, rollout in zip(mine, rollouts)]), [])


def training_questions(args, toy, stage, count, checks):
    """(questions to train on, held-out ones for checks): disjoint by a hash of their text, for every seed."""
    rng, count = random.Random(f"{stage} {args.seed}"), min(count, args.limit or count)
    need(args.questions or toy, "real models need --questions FILE", WrongArguments)
    if args.questions is None:
        pool, held_out = toy_questions("train", rng, unseen=False), toy_questions("held_out", rng)
    else:
        questions = load_questions(args.questions, args.limit)
        rng.shuffle(questions)
        pool, held_out = ([q for q in questions if (split_of(q.text) == "held_out") == held] for held in (False, True))
        need(pool, f"{args.questions}: nothing is left to train on (a tenth is held out by a hash of the text)")
    return list(itertools.islice(pool, count)), list(itertools.islice(held_out, checks))


def short(questions, tokenizer, slm, llm, most=4096):
    """Those with a prompt of at most `most` tokens (the paper's) that leaves room for a response in both contexts."""
    most = min(most, slm.config.context - 1, llm.config.context - 1)
    kept = [q for q in questions if len(tokenizer.chat(q.text)) <= most]
    if longer := len(questions) - len(kept):
        print(f"left out: {longer} of {len(questions)} questions, whose prompts have over {most} tokens")
        need(kept, "no question is left; give shorter ones, or models with a longer context")
    return kept


# ---------------------------------------------------------------------------------------------------------------------
# The script

# In REAL, epochs is the paper's, lr and batch_size are in its ranges (5e-6 to 2e-5, 8 to 32), and max_n is its largest
# d * 10^k. The ramp in warm_up(), 3% of the steps, is the paper's, too. The other figures are ours.
TOY = dict(temperature=0.7, max_new_tokens=96, samples=3000, epochs=4, lr=2e-3, batch_size=32, max_n=9,
           micro_tokens=1500, checkpointing=False)
REAL = dict(temperature=0.7, max_new_tokens=2048, samples=10000, epochs=1, lr=1e-5, batch_size=16, max_n=9000,
            micro_tokens=4096, checkpointing=True)


def arguments():
    p = parser("Stage 1: teach the SLM to write commands (for the toy, first train the pair).",
               "python warmup.py --run runs/real --slm Qwen3-1.7B --llm Qwen3-8B --questions train.jsonl")
    g = p.add_argument_group("the warm-up")
    g.add_argument("--samples", type=positive(int), help="own answers to learn from")
    g.add_argument("--epochs", type=positive(int), help="passes over them")
    g.add_argument("--lr", type=positive(float), help="learning rate, before its rise and fall")
    g.add_argument("--batch-size", type=positive(int), help="answers an update (not --batch, which is for sampling)")
    g.add_argument("--max-n", type=positive(int), help="longest call that is shown")
    g.add_argument("--check", type=positive(int), default=500, help="questions asked before and after (500)")
    g = p.add_argument_group("the toy's pretraining")
    g.add_argument("--slm-steps", type=positive(int), default=2200, help="pretraining steps of the SLM (2200)")
    g.add_argument("--llm-steps", type=positive(int), default=1000, help="pretraining steps of the LLM (1000)")
    machine_arguments(p)
    show_presets(p, TOY, REAL, temperature="; of the checks: what is learned from is sampled at 1",
                 slm="; without --slm and --llm the toy's pair is trained")
    args = p.parse_args()
    need((args.slm is None) == (args.llm is None), "--slm and --llm go together", WrongArguments)
    args.toy = args.slm is None
    fill_in(args, TOY if args.toy else REAL)
    return args


def main():
    args = arguments()
    run, pair = Run(args.run), {} if args.toy else dict(slm=args.slm, llm=args.llm)
    for path in pair.values():
        read_config(path)                      # a wrong directory is named before anything is made
    pool, checks = training_questions(args, args.toy, "warmup", args.samples, args.check)
    settings = settings_of(args, pool)
    if run.finished("warmup", settings):
        print(f"{run.path / 'warmup'} is finished; next: "
              + run.command_line("grpo.py", "--questions", str(args.questions)))
        return
    run.info = dict(toy=args.toy, stages=run.info["stages"])     # without a pair whose warm-up was deleted
    run.info |= {name: place(path, run.path) for name, path in pair.items()}
    run.open()
    start_processes(args)
    device, frozen = machine(args, args.toy)
    first = join_processes(device)
    if args.toy and first:
        pretrain_pair(run, args)
    meet()
    master, llm, tokenizer = load_pair(run.directory("slm"), run.directory("llm"), device, frozen, learns=True)
    optimizer = adamw(master, args.lr)
    slm = working_copy(master, optimizer, args.train_dtype)
    pool, checks = (short(questions, tokenizer, slm, llm) for questions in (pool, checks))

    def check(label, llm):
        rollouts = write_answers(slm, llm, tokenizer, checks, args, label)
        if checks:
            print("{}: {accuracy:.1%} right, calls in {call_rate:.0%} of {} answers, rho {rho:.1%}".format(
                label, len(checks), **graded(checks, rollouts, tokenizer)))

    start = time.perf_counter()
    own = write_answers(slm, None, tokenizer, pool, args, "sample", temperature=1.0)    # its own distribution
    print(f"sampled {sum(len(r.tokens) for r in own) / (time.perf_counter() - start):,.0f} tokens/s")
    check("SLM alone", None)
    slm.checkpointing = args.checkpointing
    warm_up(slm, optimizer, tokenizer, own, args)
    check("warmed up, with the LLM", llm)
    if first:
        save(master, run.path / "warmup", run.directory("slm"))
        run.finish("warmup", settings)
    print(f"wrote {run.path / 'warmup'}; next: {run.command_line('grpo.py', '--questions', str(args.questions))}")


if __name__ == "__main__":
    run_script(main)
