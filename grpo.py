"""Chapter 5. Stage 2: GRPO with a difficulty-aware reward.

For each question the model writes a group of G relay roll-outs. Each is scored, its reward is compared with the rest of
its group (no value network), and the tokens that the SLM sampled become more or less likely:

    A = (r - mean of the group) / (unbiased std of the group + 1e-6)               GRPO, arXiv 2402.03300, section 4.1
    loss = mean over tokens of  max(-A ratio, -A clip(ratio)) + 0.01 KL(policy, warmed-up model)
           ratio = exp(log p - log p when it was sampled), each log p at the sampling temperature

(Where A < 0 the max is at most 3 |A|, so that one token whose ratio has exploded cannot decide. The KL is estimated
from the sampled token alone: see k3(). The toy divides by a std of at least 0.03: see advantages().)

What is RelayLLM's own is the reward (arXiv 2601.05167, section 4.2). It asks what the group shows about the question:
can the SLM do it alone, only with help, or not at all? If it can, not calling pays; if not, calling pays; in a right
answer each token of the LLM costs. Tokens that the LLM wrote have no loss: the policy did not sample them.

Left out: a value network (the group's mean is the baseline), a reference that is renewed on the way (the warmed-up
model is what must not be lost), a server for sampling (one process holds both models: no weights need to travel).
"""
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import time
from contextlib import suppress

import torch
from tqdm import tqdm

from model import digest, fingerprint, load, need, progress_bar, read_json, save, write_beside, write_json
from relay import (Run, WrongArguments, at_least_zero, differing, figures, fill_in, give_back, graded, hear_signals,
                   is_right, load_pair, machine, means, parser, positive, relay, run_script, show_presets)
from warmup import (Example, adamw, add_up, apply_gradient, join_processes, learning_rate,
                    machine_arguments, meet, micro_batches, settings_of, short, start_processes,
                    token_logprobs, training_questions, working_copy, world, write_answers)

# ---------------------------------------------------------------------------------------------------------------------
# Reward, advantage, loss: pure functions

def rewards(correct, called, rho, solo=1.5):
    """The difficulty-aware reward (RelayLLM, section 4.2), decided for each group of roll-outs of one question.

    | scenario: the group has                            | right, no call | right, call | wrong, no call | wrong, call |
    | student-solvable: a right answer without a call    | solo           | 1 - rho     | 0              | 0           |
    | teacher-dependent: else a right answer with a call |                | 1 - rho     | -1             | 0           |
    | teacher-unsolvable: else none                      |                |             | 0              | rho         |

    correct, called: bool (..., G). rho: the share of tokens that the LLM delivered, float (..., G). Returns (..., G).
    """
    right, called = torch.as_tensor(correct).bool(), torch.as_tensor(called).bool()
    rho = torch.as_tensor(rho, dtype=torch.float32)
    alone = (right & ~called).any(dim=-1, keepdim=True)
    solved = right.any(dim=-1, keepdim=True)
    reward = torch.where(right, torch.where(called, 1 - rho, solo), 0.0)
    reward = torch.where(solved & ~alone & ~right & ~called, -1.0, reward)   # it should have asked
    return torch.where(~solved & called, rho, reward)                        # asking was right, though in vain


def advantages(rewards, scale=True, floor=0.0):
    """(r - mean) / (std + 1e-6) over each group, the last axis (GRPO, arXiv 2402.03300, section 4.1; unbiased std).

    Equal rewards give exactly 0: they are looked for, since the std of equal float32 numbers need not be 0.
    scale=False leaves out the division (Dr. GRPO, arXiv 2503.20783). floor: the least std to divide by. Where all of a
    group are right by one call of one token, their rewards differ by the length of the answers alone, in the fourth
    digit; divided by its own std that is as much as any other difference, and teaches to write more.
    """
    rewards = torch.as_tensor(rewards) * 1.0               # integers and lists, too
    equal = (rewards == rewards[..., :1]).all(dim=-1, keepdim=True)
    centred = rewards - rewards.mean(dim=-1, keepdim=True)
    if scale and rewards.shape[-1] > 1:
        centred = centred / (rewards.std(dim=-1, keepdim=True).clamp(min=floor) + 1e-6)
    return centred.masked_fill(equal, 0.0)


def policy_loss(logprobs, old_logprobs, advantages, low=0.2, high=0.3, dual=3.0):
    """PPO's clipped loss of each token, (N,), and which tokens the clip holds back, (N,) bool.

    ratio = exp(logprobs - old_logprobs); loss = max(-A ratio, -A clip(ratio, 1 - low, 1 + high)) (PPO, arXiv
    1707.06347, eq. 7; two bounds: DAPO, 2503.14476), and at most -A dual where A < 0 (dual clip, 1912.09729).
    """
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
    loss = torch.maximum(plain, clipped)
    loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual), loss)
    return loss, loss.detach() != plain.detach()


def k3(logprobs, ref_logprobs):
    """KL(policy || reference) of each sampled token: exp(d) - d - 1, d = ref - policy (Schulman 2020, estimator k3)."""
    d = (ref_logprobs - logprobs).clamp(-20, 20)         # both limits are the public code's
    return (d.exp() - d - 1).clamp(max=10)               # one rare token must not decide the step


# ---------------------------------------------------------------------------------------------------------------------
# One step: roll-outs, rewards, updates

def examples_of(rollouts, llm_tokens=False):
    """What the learner sees of roll-outs: the loss is on the tokens that the SLM sampled, and on no others.

    llm_tokens=True is for comparison: the authors' public code lets the loss run over the LLM's tokens too.
    """
    return [Example(r.prompt + r.tokens, [False] * len(r.prompt) + [llm_tokens or not b for b in r.by_llm],
                    tuple(r.prompt)) for r in rollouts]


def update(policy, reference, optimizer, rollouts, advantage, known, lr, args):
    """One optimizer step on these roll-outs. Returns for the metrics: the loss; sums over the learned tokens (tokens,
    kl, clip_fraction, entropy); difference, the largest |log p - old|; norm, the gradient's (None: nothing to learn).

    advantage: (number of roll-outs,). The denominator is the number of learned tokens (--loss sequence: of roll-outs)
    of the whole update, over all micro-batches and processes, so that the gradient does not depend on how it is cut.
    """
    examples = examples_of(rollouts, args.llm_tokens_in_loss)
    counts = [sum(e.learn) for e in examples]
    tokens, responses = add_up([sum(counts), sum(n > 0 for n in counts)])
    sums = dict(tokens=sum(counts), loss=0.0, kl=0.0, clip_fraction=0.0, entropy=0.0, difference=0.0, norm=None)
    if tokens == 0:                                       # in every process: nobody takes a step
        return sums
    weight = (1 / (torch.tensor(counts) * responses) if args.loss == "sequence"
              else torch.full([len(counts)], 1 / tokens))          # in the loss, of each token of a roll-out
    for batch in micro_batches(examples, args.micro_tokens):
        part = [examples[i] for i in batch]
        give_back(policy)                                     # freed memory, to Linux: no part of the method
        with torch.no_grad():
            ref = token_logprobs(reference, part, known, args.temperature)[0]
        logprobs, entropies = token_logprobs(policy, part, known, args.temperature, entropies=True)
        old = torch.tensor([math.nan if by_llm else lp    # NaN: only with --llm-tokens-in-loss; below, a ratio of 1
                            for i in batch for lp, by_llm in zip(rollouts[i].logprobs, rollouts[i].by_llm)
                            if args.llm_tokens_in_loss or not by_llm]).to(logprobs)
        old = torch.where(old.isnan(), logprobs.detach(), old)
        owner = [i for i in batch for _ in range(counts[i])]       # of each learned token: its roll-out
        loss, clipped = policy_loss(logprobs, old, advantage[owner].to(logprobs), args.clip_low, args.clip_high)
        kl = k3(logprobs, ref)
        loss = ((loss + args.kl * kl) * weight[owner].to(logprobs)).sum()
        loss.backward()
        for name, values in (("loss", loss), ("kl", kl), ("clip_fraction", clipped), ("entropy", entropies)):
            sums[name] += values.sum().item()
        sums["difference"] = max([sums["difference"], *(logprobs - old).abs().tolist()])
    return sums | dict(norm=apply_gradient(optimizer, lr))


def score(questions, groups, tokenizer, args):
    """(right, called, reward), each (questions, G)."""
    right = torch.tensor([[is_right(q, r, tokenizer) for r in group] for q, group in zip(questions, groups)])
    called = torch.tensor([[any(r.by_llm) for r in group] for group in groups])
    share = lambda r: min(1.0, sum(c.asked for c in r.calls) / len(r.tokens)) if args.rho_asked else r.rho
    rho = torch.tensor([[share(r) for r in group] for group in groups])
    shape = (1, -1) if args.batch_scenarios else right.shape
    reward = (right.float() - rho if args.reward == "simple" else         # what the paper compares with
              rewards(*(x.reshape(shape) for x in (right, called, rho))).view(right.shape))
    return right, called, reward


def train_step(step, questions, policy, reference, llm, tokenizer, optimizer, known, lr, args, on_token=None):
    """Sample, score, learn. questions: the whole step's; this process takes its share. Returns (metrics, roll-outs).

    on_token(row, token, by_llm) sees the roll-outs' tokens as they are written.
    """
    start = time.perf_counter()
    rank, size = world()
    mine = range(rank, len(questions), size)
    prompts = [tokenizer.chat(questions[i].text) for i in mine for _ in range(args.group)]
    flat = relay(policy, llm, tokenizer, prompts, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                 llm_temperature=args.llm_temperature, batch=args.batch, on_token=on_token, label="roll-outs",
                 seed=[(args.seed, step, i, g) for i in mine for g in range(args.group)])
    groups = [flat[at:at + args.group] for at in range(0, len(flat), args.group)]    # by index, never by text
    right, called, reward = score([questions[i] for i in mine], groups, tokenizer, args)
    advantage = advantages(reward, args.scale_by_std, args.std_floor)
    teaches = advantage.any(dim=-1)            # not where all rewards of a group are equal
    middle = time.perf_counter()

    sums = []
    for part in range(args.updates):           # old log-probabilities stay those of sampling over all updates
        # by the question's place in the whole step, so that all processes cut at the same ones
        here = [k for k, i in enumerate(mine) if i * args.updates // len(questions) == part]
        chosen = [k for k in here if teaches[k] or not args.skip_equal]
        sums.append(update(policy, reference, optimizer, [r for k in chosen for r in groups[k]],
                           advantage[chosen].flatten(), known, lr, args))
    total = lambda name: sum(s[name] for s in sums)
    norms = [s["norm"] for s in sums if s["norm"] is not None]     # of the updates that had something to learn
    taken = [norm for norm in norms if math.isfinite(norm)]
    alone, solved = (right & ~called).any(dim=-1), right.any(dim=-1)
    shares = dict(reward=(reward.sum().item(), len(flat))) | figures(right.flatten().tolist(), flat)   # sum, divisor
    shares |= {name: (flags.sum().item(), len(groups)) for name, flags in (
        ("student_solvable", alone), ("teacher_dependent", solved & ~alone), ("teacher_unsolvable", ~solved),
        ("equal_groups", ~teaches))}
    shares |= {name: (total(name), total("tokens")) for name in ("kl", "clip_fraction", "entropy")}
    # Each process divided its loss by the tokens of all: its parts are added up, and the updates counted once.
    shares["loss"] = total("loss"), len(norms) if rank == 0 else 0
    added = add_up(list(shares.values()))
    metrics = dict(step=step) | means(dict(zip(shares, added)))
    difference = max(meet(next((s["difference"] for s in sums if s["norm"] is not None), 0.0)))    # in the first update
    metrics |= dict(grad_norm=max(taken, default=None), skipped=len(norms) - len(taken), lr=lr,
                    sampler_learner_difference=difference, sample_seconds=middle - start,
                    learn_seconds=time.perf_counter() - middle)
    return metrics, groups


# ---------------------------------------------------------------------------------------------------------------------
# The training loop

def endless(questions, seed):
    """The questions of training, one by one: every pass over the pool in its own order."""
    for epoch in itertools.count():
        order = list(questions)
        random.Random(f"order {seed} {epoch}").shuffle(order)
        yield from order


def watch(history):
    """One line when the last ten steps show a known collapse, else None. (Thresholds: by eye, on runs of the toy.)"""
    mean = lambda key: sum(m[key] for m in history[-10:]) / 10
    if len(history) < 10:
        return None
    if mean("call_rate") < 0.005:
        return "warning: the model has stopped calling; the warm-up was too weak, or it guesses too well"
    if mean("call_rate") > 0.95 and mean("student_solvable") < 0.1:
        return "warning: nearly every answer calls; hardly a group shows what the model can do alone"
    if mean("rho") > 0.5:
        return "warning: the LLM writes more than half of the tokens; the model has collapsed into long calls"
    if mean("length") > 1.3 * history[0]["length"]:
        return "warning: answers are 30% longer than at the start; length lowers rho without a use"
    return None


def train(history, questions, held_out, policy, reference, llm, tokenizer, optimizer, signals, keep, log, args):
    """Steps until args.steps are done or a signal asks to stop. The metrics of each are appended to `history`.

    signals: a list that a signal makes longer. log: the file of metrics. keep() writes a checkpoint.
    """
    known, told = torch.tensor(tokenizer.known, device=policy.embed.weight.device), None
    stream = itertools.islice(endless(questions, args.seed), len(history) * args.questions_per_step, None)
    bar = progress_bar(total=args.steps, initial=len(history), desc="GRPO", unit="step")

    def stop_sampling(*_):                     # at once; but several processes must agree on the step to stop after
        if signals and world()[1] == 1:
            raise KeyboardInterrupt

    while len(history) < args.steps and not add_up(len(signals)):
        step, lr = len(history) + 1, args.lr   # constant, as in the paper
        if args.ramp:                          # the toy's falls, and at first rises: no batch is to decide all
            lr = learning_rate(args.lr, step - 1, args.steps, args.ramp)
        batch = list(itertools.islice(stream, args.questions_per_step))
        try:
            metrics, groups = train_step(step, batch, policy, reference, llm, tokenizer, optimizer, known, lr, args,
                                         stop_sampling)
        except KeyboardInterrupt:              # the policy is still that of the last whole step
            break
        if held_out and args.eval_every and step % args.eval_every == 0:      # they are neither learned nor reported
            answers = write_answers(policy, llm, tokenizer, held_out, args, "check", temperature=0.7,
                                    llm_temperature=args.llm_temperature)     # 0.7: as the toy's table
            shown = graded(held_out, answers, tokenizer)
            metrics |= {f"eval_{name}": shown[name] for name in ("accuracy", "call_rate", "rho")}
        history.append({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()})
        print(json.dumps(history[-1]), file=log, flush=True)
        bar.set_postfix({key: metrics[key] for key in ("accuracy", "call_rate", "rho", "length")}, refresh=False)
        bar.update()
        if step % 20 == 0:
            tqdm.write(f"step {step}: {tokenizer.decode(groups[0][0].tokens)}")
        if llm and (warning := watch(history)) not in (None, told):
            tqdm.write(warning)
            told = warning
        # of each step that had something to learn; None: the gradient was not finite, so no update was taken
        norms = [m["grad_norm"] for m in history if m["skipped"] or m["grad_norm"] is not None]
        need(norms[-5:] != [None] * 5,         # the policy is that of the last step that was taken
             "5 steps in a row had no finite gradient; what was saved before is kept, and --resume goes on from there; "
             "try a smaller --lr in a new run")
        if step % args.save_every == 0 and step < args.steps:
            keep()
    bar.close()


# ---------------------------------------------------------------------------------------------------------------------
# Which questions (skip it on a first reading)

FILTERED = 1000   # undecided questions that filter_questions() takes at once; then it writes down how far it has come


def filter_questions(questions, llm, path, tokenizer, args, file):
    """Keep the questions that the LLM solves alone often enough (RelayLLM, section 5): only there can asking help.

    Of its n answers only those are written that can still decide: 5 right ones of 10 do, or 6 wrong ones. With real
    models this takes hours, so what came out is kept in `file`, for --resume and for variants. path: the LLM's.
    """
    n = args.filter_samples
    if n == 0:
        return questions
    enough = sum(k / n < args.pass_rate for k in range(n))                     # right answers that keep a question
    key = digest([fingerprint(path), str(llm.embed.weight.dtype), n, args.seed, args.llm_temperature,
                  args.max_new_tokens, [q.text for q in questions]])
    earlier = meet(read_json(file, {}))[0]             # before the first process writes it
    counts = earlier.get(key) or [[0, 0] for _ in questions]                   # right and wrong answers to each
    missing = lambda right, wrong: max(0, min(enough - right, n - enough + 1 - wrong))
    while undecided := [i for i, count in enumerate(counts) if missing(*count)][:FILTERED]:
        asked = [(i, sum(counts[i]) + k) for i in undecided for k in range(missing(*counts[i]))]
        right = write_answers(llm, None, tokenizer, [questions[i] for i, _ in asked], args, "filter",
                              temperature=args.llm_temperature, numbers=[i * n + k for i, k in asked],
                              keep=lambda question, rollout: is_right(question, rollout, tokenizer))
        for (i, _), hit in zip(asked, right):
            counts[i][not hit] += 1
        if world()[0] == 0:
            write_json(file, earlier | {key: counts})
    kept = [q for q, (right, _) in zip(questions, counts) if right >= enough]
    print(f"filter: the LLM solves {len(kept)} of {len(questions)} questions")
    return kept


# ---------------------------------------------------------------------------------------------------------------------
# Settings (skip them on a first reading)

# What the presets differ in. The toy samples at 0.7: at 1.0 it may learn to call always (README.md, "What failed on the
# way"); without a floor it may learn to pad (see advantages). Not flags: `ramp` (see train), and `skip_equal` (groups
# of equal rewards are left out of the update: it saves time, and the mean and the KL are then over the others). REAL,
# the defaults of the algorithm's other flags, and `solo` and `dual` above are the paper's or its code's; but steps (the
# paper: one pass over what the filter keeps), micro_tokens and checkpointing are ours.
TOY = dict(temperature=0.7, max_new_tokens=96, steps=60, questions_per_step=16, group=16, lr=1e-3, updates=1,
           std_floor=0.03, pool=640, filter_samples=2, ramp=20, skip_equal=True, micro_tokens=3000,
           checkpointing=False)
REAL = dict(temperature=1.0, max_new_tokens=8192, steps=100, questions_per_step=128, group=8, lr=1e-6, updates=4,
            std_floor=0.0, pool=17000, filter_samples=10, ramp=None, skip_equal=False, micro_tokens=4096,
            checkpointing=True)


def flags():
    """The parser: the method's choices, the comparisons, the machine."""
    p = parser("Stage 2: GRPO over relay roll-outs. Defaults: the toy's, and with real models the paper's.",
               "python grpo.py --run runs/toy --gpus 1")
    g = p.add_argument_group("the algorithm")
    g.add_argument("--steps", type=positive(int), help="batches of roll-outs")
    g.add_argument("--questions-per-step", type=positive(int), help="questions of a batch")
    g.add_argument("--group", type=positive(int), help="roll-outs of each question, G")
    g.add_argument("--lr", type=positive(float), help="learning rate; the toy's rises and falls to 0")
    g.add_argument("--kl", type=at_least_zero(float), default=0.01,
                   help="weight of the KL to the warmed-up model (0.01, as in RelayLLM; GRPO, arXiv 2402.03300)")
    g.add_argument("--reward", choices=["difficulty", "simple"], default="difficulty",
                   help="RelayLLM's difficulty-aware reward (arXiv 2601.05167, section 4.2; the default), or accuracy "
                        "- rho")
    g.add_argument("--updates", type=positive(int),
                   help="parts of a step's questions, one update each (PPO, arXiv 1707.06347)")
    g.add_argument("--clip-low", type=at_least_zero(float), default=0.2,
                   help="PPO's clip below 1 (0.2, the public code's; arXiv 1707.06347)")
    g.add_argument("--clip-high", type=at_least_zero(float), default=0.3,
                   help="and above (0.3, the public code's; two bounds: DAPO, arXiv 2503.14476)")
    g.add_argument("--loss", choices=["token", "sequence"], default="token",
                   help="mean over all tokens (the default; DAPO, arXiv 2503.14476), or of each response's mean (GRPO)")
    g.add_argument("--no-std", dest="scale_by_std", action="store_false",
                   help="do not divide advantages by the group's std (Dr. GRPO, arXiv 2503.20783)")
    g.add_argument("--std-floor", type=at_least_zero(float), metavar="STD",
                   help="divide by at least this: then the length of right answers is no advantage (README.md, \"What "
                        "failed on the way\")")
    g.add_argument("--llm-temperature", type=at_least_zero(float), default=0.7, help="the LLM's, inside a call (0.7)")
    g = p.add_argument_group("questions that the LLM can solve (RelayLLM, section 5)")
    g.add_argument("--pool", type=positive(int), help="questions before the filter")
    g.add_argument("--filter-samples", type=at_least_zero(int), help="the LLM's answers to each, 0: no filter")
    g.add_argument("--pass-rate", type=at_least_zero(float, most=1), default=0.5, metavar="SHARE",
                   help="keep questions that the LLM solves at least this often (0.5)")
    g = p.add_argument_group("comparisons and ablations")
    g.add_argument("--no-teacher", action="store_true", help="plain GRPO: no LLM, and a command is text")
    g.add_argument("--llm-tokens-in-loss", action="store_true", help="ablation: learn the LLM's tokens too")
    g.add_argument("--batch-scenarios", action="store_true", help="ablation: scenarios of the whole batch")
    g.add_argument("--rho-asked", action="store_true", help="ablation: rho from n, not from what was delivered")
    g.add_argument("--variant", metavar="NAME", default="grpo",
                   help="write into RUN/NAME, beside RUN/grpo, for a row of eval.py --all")
    g = p.add_argument_group("while it trains")
    g.add_argument("--eval-every", type=at_least_zero(int), default=20,
                   help="steps between checks on held-out questions, 0: none (20)")
    g.add_argument("--eval-questions", type=positive(int), default=128, help="questions of a check (128)")
    g.add_argument("--save-every", type=positive(int), default=20, help="steps between checkpoints (20)")
    g.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    machine_arguments(p)
    show_presets(p, TOY, REAL, temperature="; the checks are at 0.7",
                 slm=": what training starts from and stays near (RUN/warmup)")
    return p


def arguments():
    """(the arguments, filled in, and the Run that they name). WrongArguments where they do not go together."""
    args = flags().parse_args()
    run = Run(args.run)
    need(run.has("warmup"), f"{run.path} holds no warm-up yet; run: {run.command_line('warmup.py')}")
    fill_in(args, TOY if run.toy else REAL)
    size = max(args.gpus, world()[1])
    taken = r"slm|llm|warmup|eval|relay|relay_no_teacher|fixed\w*|token_router|random_router\w*"     # by eval.py, too
    need(args.group > 1, "--group 1: a roll-out alone has nothing to be compared with", WrongArguments)
    need(args.temperature > 0, "--temperature 0: the roll-outs of a group would all be the same", WrongArguments)
    need(re.fullmatch(r"\w+", args.variant) and not re.fullmatch(taken, args.variant, re.I),
         f"--variant {args.variant}: must be letters, digits, _, and no name that the run uses itself", WrongArguments)
    need(size == 1 or not args.batch_scenarios,
         "--batch-scenarios looks at all roll-outs of a step at once: use one process", WrongArguments)
    need(args.questions_per_step >= max(size, args.updates), f"--questions-per-step {args.questions_per_step}: too few "
         f"for {size} processes, {args.updates} updates; give more, or fewer --updates", WrongArguments)
    return args, run


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: a new directory each, made good by replacing one small file last (skip it on a first reading)

def save_checkpoint(out, history, policy, optimizer, source, settings):
    """Write the state after the steps of `history`, then make it the one to go on from, then delete the one before."""
    folder = out / f"checkpoint-{len(history)}"        # there may be half of it, from a run that was killed
    save(policy, folder, source)
    try:
        write_beside(folder / "optimizer.pt", lambda file: torch.save(optimizer.state_dict(), file))
    except RuntimeError as error:                      # how torch.save() says that the disk is full
        raise ValueError(f"{folder}: cannot be written; is the disk full? ({str(error).splitlines()[0]})") from None
    write_json(out / "checkpoint.json", dict(settings=settings, history=history))
    delete_checkpoints(out, but=folder)


def only_one(out):
    """Lock the directory until this process ends: a second training there would mix its steps with ours."""
    lock = open(out / ".lock", "w")
    with suppress(ImportError, OSError):       # Windows and some network file systems have no such lock
        import fcntl
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out}: another process is training there; wait for it, or end it") from None
    return lock


def open_metrics(out, history):
    """metrics.jsonl, to be appended to: it has the steps of the checkpoint, since those after it are done again."""
    lines = "".join(json.dumps(metrics) + "\n" for metrics in history)
    write_beside(out / "metrics.jsonl", lambda file: file.write(lines.encode()))
    return open(out / "metrics.jsonl", "a", encoding="utf-8")


def delete_checkpoints(out, but=None):
    """Delete all checkpoints, or all but one."""
    if not but:
        (out / "checkpoint.json").unlink(missing_ok=True)
    for folder in {*out.glob("checkpoint-*")} - {but}:
        shutil.rmtree(folder)


def last_checkpoint(out, settings):
    """(metrics of the steps done, directory of the model) of the last checkpoint; ([], None) if there is none."""
    if not (out / "checkpoint.json").exists():
        return [], None
    state = read_json(out / "checkpoint.json")
    there, history = state.get("settings"), state.get("history")
    need(isinstance(there, dict) and isinstance(history, list)
         and all(isinstance(m, dict) and m.get("step") == i for i, m in enumerate(history, 1)),
         f"{out / 'checkpoint.json'}: not a checkpoint of this program; delete {out}, or choose another --run")
    if difference := differing(there, settings):
        raise ValueError(f"{out}: its checkpoint was made with {difference}; resume with the same settings, or choose "
                         "another --run")
    return history, out / f"checkpoint-{len(history)}"


def load_optimizer(optimizer, file):
    """Its state, read on the CPU; load_state_dict() brings it to the device, and the copy is freed."""
    try:
        optimizer.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        if any(state[name].shape != p.shape for p, state in optimizer.state.items()
               for name in ("exp_avg", "exp_avg_sq")):         # it does not look, and a fused step would crash
            raise ValueError
    except Exception as error:                 # what a damaged file raises depends on where the damage is
        raise ValueError(f"{file}: damaged, or not of this run ({type(error).__name__}); delete {file.parent.parent}, "
                         "or choose another --run") from None


# ---------------------------------------------------------------------------------------------------------------------
# The script

def main():
    args, run = arguments()
    out, source = run.path / args.variant, args.slm or run.path / "warmup"
    following = run.command_line("eval.py", "--questions", "TEST_FILE") + " --all" * (args.variant != "grpo")
    if run.has(args.variant):
        need(args.resume, f"{out} is there already; choose another --run, or delete it")
        delete_checkpoints(out)                # the run may have been killed between finish() and this
        print(f"{out} is finished; next: {following}")
        return
    questions, held_out = training_questions(args, run.toy, "grpo", args.pool, args.eval_questions)
    settings = settings_of(args, questions) | dict(weights_at_start=fingerprint(source)[:12])
    run.open()
    out.mkdir(exist_ok=True)
    history, folder = last_checkpoint(out, settings)
    need(args.resume or not folder, f"{out} holds an unfinished training; go on with --resume, or delete it")
    done = len(history)
    start_processes(args)
    device, frozen = machine(args, run.toy)
    first = join_processes(device)
    run.lock = only_one(out) if first else None           # held until this process ends
    llm_path = args.llm or run.directory("llm")
    master, llm, tokenizer = load_pair(folder or source, llm_path, device, frozen, learns=True)
    reference = load(source, device, getattr(torch, args.train_dtype))
    need(master.config == reference.config, f"{folder}: its model is not of the shape of {source}")
    optimizer = adamw(master, args.lr)
    policy = working_copy(master, optimizer, args.train_dtype)
    policy.checkpointing = args.checkpointing
    if folder:
        load_optimizer(optimizer, folder / "optimizer.pt")
    questions, held_out = (short(some, tokenizer, policy, llm) for some in (questions, held_out))
    questions = filter_questions(questions, llm, llm_path, tokenizer, args, run.path / "filter.json")
    need(questions, "the LLM solves none of the questions; give easier ones, or --filter-samples 0")
    keep = lambda: first and save_checkpoint(out, history, master, optimizer, source, settings)
    log = open_metrics(out, history) if first else open(os.devnull, "w")
    signals = []
    hear_signals(lambda *_: signals.append(True))
    train(history, questions, held_out, policy, reference, None if args.no_teacher else llm, tokenizer, optimizer,
          signals, keep, log, args)
    if len(history) < args.steps:
        if len(history) > len(last_checkpoint(out, settings)[0]):    # one that is there is not endangered
            keep()
        meet()                                             # who leaves first has the others killed
        sys.exit(f"grpo.py: stopped after step {len(history)}; go on with --resume" if first else 1)
    if first:
        save(master, out, source)
        run.finish(args.variant, settings)
        delete_checkpoints(out)
    total = lambda key: sum(m[key] for m in history[done:])
    sampled = total("length") * args.questions_per_step * args.group / max(1e-9, total("sample_seconds"))
    print(f"sampled {sampled:,.0f} tokens/s; learned for {total('learn_seconds'):,.0f} s")
    print(f"wrote {out}; next: {following}")


if __name__ == "__main__":
    run_script(main)
