"""Chapter 5. Stage 2: GRPO with a difficulty-aware reward.

DRAFT
"""
import itertools
import json
import math
import os
import random
import shutil
import time
from collections import deque
from pathlib import Path

import torch
from tqdm import tqdm

from data import load_questions, toy_questions
from model import load, read_json, save, write_beside
from relay import Run, correct, load_pair, machine, parser, plain_text, positive, relay, run_script, write_answers
from warmup import Example, adamw, apply_gradient, micro_batches, settings, token_logprobs

# ---------------------------------------------------------------------------------------------------------------------
# Reward, advantage, loss: pure functions


def rewards(correct, called, rho, solo=1.5):
    """The difficulty-aware reward (RelayLLM, section 4.2), decided for each group of roll-outs of one question.

    | the group has                         | right, no call | right, call | wrong, no call | wrong, call |
    | a right answer without a call         | solo           | 1 - rho     | 0              | 0           |
    | else a right answer with a call       |                | 1 - rho     | -1             | 0           |
    | else none                             |                |             | 0              | rho         |

    correct, called: bool (..., G). rho: the share of tokens that the LLM delivered, float (..., G). Returns (..., G).
    """
    right, called = torch.as_tensor(correct).bool(), torch.as_tensor(called).bool()
    rho = torch.as_tensor(rho, dtype=torch.float32)
    alone = (right & ~called).any(dim=-1, keepdim=True)
    solved = right.any(dim=-1, keepdim=True)
    reward = torch.where(right, torch.where(called, 1 - rho, solo), 0.0)
    reward = torch.where(solved & ~alone & ~right & ~called, -1.0, reward)   # it should have asked
    return torch.where(~solved & called, rho, reward)                        # it did right to ask, though in vain


def simple_rewards(correct, rho):
    """What the paper compares with: accuracy minus rho."""
    return torch.as_tensor(correct).float() - torch.as_tensor(rho, dtype=torch.float32)


def advantages(rewards, scale=True):
    """(r - mean) / (std + 1e-6) over each group, the last axis (GRPO, arXiv 2402.03300, section 4.1; unbiased std).

    Equal rewards give exactly 0: compared, since the std of equal float32 numbers need not come out as 0.
    scale=False leaves out the division (Dr. GRPO, arXiv 2503.20783).
    """
    equal = (rewards == rewards[..., :1]).all(dim=-1, keepdim=True)
    centred = rewards - rewards.mean(dim=-1, keepdim=True)
    if scale and rewards.shape[-1] > 1:
        centred = centred / (rewards.std(dim=-1, keepdim=True) + 1e-6)
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
    d = (ref_logprobs - logprobs).clamp(-20, 20)
    return (d.exp() - d - 1).clamp(-10, 10)


# ---------------------------------------------------------------------------------------------------------------------
# One step: roll-outs, rewards, updates

def examples_of(rollouts, llm_tokens=False):
    """What the learner sees of roll-outs: the loss is on the tokens that the SLM sampled, and on no others."""
    return [Example(r.prompt + r.tokens, [False] * len(r.prompt) + [llm_tokens or not b for b in r.by_llm])
            for r in rollouts]


def update(policy, reference, optimizer, rollouts, advantage, known, args):
    """One optimizer step on these roll-outs. Returns sums over its tokens, for the metrics.

    advantage: (number of roll-outs,). The denominator is the number of learned tokens of the whole update, so that the
    gradient does not depend on how it is cut into micro-batches.
    """
    examples = examples_of(rollouts)
    total = sum(sum(e.learn) for e in examples)
    sums = dict(tokens=total, loss=0.0, kl=0.0, clipped=0.0, entropy=0.0, drift=0.0)
    if total == 0:
        return sums | dict(norm=0.0)
    for batch in micro_batches(examples, args.micro_tokens):
        part = [examples[i] for i in batch]
        with torch.no_grad():
            ref = token_logprobs(reference, part, known, args.temperature)[0]
        logprobs, entropies = token_logprobs(policy, part, known, args.temperature, entropies=True)
        old = torch.tensor([lp for i in batch for lp, b in zip(rollouts[i].logprobs, rollouts[i].by_llm) if not b],
                           device=logprobs.device, dtype=logprobs.dtype)
        weight = torch.cat([advantage[i].expand(sum(examples[i].learn)) for i in batch]).to(logprobs)
        loss, clipped = policy_loss(logprobs, old, weight, args.clip_low, args.clip_high)
        kl = k3(logprobs, ref)
        loss = (loss + args.kl * kl).sum() / total
        loss.backward()
        sums["loss"] += loss.item()
        sums["kl"] += kl.sum().item()
        sums["clipped"] += clipped.sum().item()
        sums["entropy"] += entropies.sum().item()
        sums["drift"] = max(sums["drift"], (logprobs - old).abs().max().item())
    return sums | dict(norm=apply_gradient(policy, optimizer, args.rate))


def step_metrics(questions, rollouts, right, reward):
    """What the roll-outs of one step say, before any learning. right, reward: (questions, G)."""
    called = torch.tensor([[any(r.by_llm) for r in group] for group in rollouts])
    flat = [r for group in rollouts for r in group]
    tokens, by_llm = sum(len(r.tokens) for r in flat), sum(sum(r.by_llm) for r in flat)
    alone, solved = (right & ~called).any(-1), right.any(-1)
    mean = lambda mask: right[mask].float().mean().item() if mask.any() else None
    return dict(
        reward=reward.mean().item(), accuracy=right.float().mean().item(), accuracy_called=mean(called),
        accuracy_alone=mean(~called), call_rate=called.float().mean().item(), rho=by_llm / tokens,
        asked=sum(c.asked for r in flat for c in r.calls) / max(1, sum(len(r.calls) for r in flat)),
        length=tokens / len(flat), cut=sum(r.end == "length" for r in flat) / len(flat),
        student_solvable=alone.float().mean().item(), teacher_dependent=(solved & ~alone).float().mean().item(),
        teacher_unsolvable=(~solved).float().mean().item(),
        equal_groups=(reward == reward[:, :1]).all(-1).float().mean().item())


def train_step(step, questions, policy, reference, llm, tokenizer, optimizer, known, args):
    """Sample, score, learn. Returns (metrics, roll-outs)."""
    start = time.perf_counter()
    prompts = [tokenizer.chat(q.text) for q in questions for _ in range(args.group)]
    seeds = [(args.seed, step, q, g) for q in range(len(questions)) for g in range(args.group)]
    flat = relay(policy, llm, tokenizer, prompts, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                 llm_temperature=args.llm_temperature, seed=seeds, batch=args.batch, no_calls=llm is None)
    groups = [flat[i:i + args.group] for i in range(0, len(flat), args.group)]       # by index, never by text
    right = torch.tensor([[correct(q, r, tokenizer) for r in group] for q, group in zip(questions, groups)])
    called = torch.tensor([[any(r.by_llm) for r in group] for group in groups])
    rho = torch.tensor([[r.rho for r in group] for group in groups])
    reward = rewards(right, called, rho) if args.reward == "difficulty" else simple_rewards(right, rho)
    advantage = advantages(reward)
    sampled = time.perf_counter()

    metrics = dict(step=step) | step_metrics(questions, groups, right, reward)
    sums, updates = [], []
    for part in range(args.updates):           # old log-probabilities stay those of sampling over all updates
        chosen = [i for i in range(part, len(groups), args.updates)
                  if not args.skip_equal or advantage[i].any()]
        if chosen:
            sums.append(update(policy, reference, optimizer, [r for i in chosen for r in groups[i]],
                               advantage[chosen].flatten(), known, args))
    tokens = max(1, sum(s["tokens"] for s in sums))
    metrics |= {name: sum(s[key] for s in sums) / tokens for name, key in
                (("kl", "kl"), ("clip_fraction", "clipped"), ("entropy", "entropy"))}
    metrics |= dict(loss=sum(s["loss"] for s in sums) / max(1, len(sums)),
                    grad_norm=max([s["norm"] for s in sums], default=0.0),
                    sampler_learner_difference=sums[0]["drift"] if sums else 0.0, lr=args.rate,
                    sample_seconds=sampled - start, learn_seconds=time.perf_counter() - sampled)
    return metrics, groups


def filter_questions(questions, llm, tokenizer, args):
    """Keep the questions that the LLM solves alone often enough (RelayLLM, section 5): only there can asking help."""
    if args.filter_samples == 0:
        return questions
    many = [q for q in questions for _ in range(args.filter_samples)]
    answers = write_answers(llm, None, tokenizer, many, args, "filter", temperature=args.llm_temperature)
    right = [correct(q, r, tokenizer) for q, r in zip(many, answers)]
    n = args.filter_samples
    kept = [q for i, q in enumerate(questions) if sum(right[i * n:(i + 1) * n]) >= args.pass_rate * n]
    print(f"filter: the LLM solves {len(kept)} of {len(questions)} questions")
    return kept


TOY = dict(temperature=1.0, max_new_tokens=96, steps=140, questions_per_step=16, group=16, lr=1e-3, updates=1,
           pool=640, filter_samples=2, decay=True, skip_equal=True, micro_tokens=3000)
PAPER = dict(temperature=1.0, max_new_tokens=8192, steps=100, questions_per_step=128, group=8, lr=1e-6, updates=4,
             pool=17000, filter_samples=10, decay=False, skip_equal=False, micro_tokens=8192)


def arguments():
    p = parser("Stage 2: GRPO over relay roll-outs.", "python grpo.py --run runs/toy --gpus 1")
    p.add_argument("--steps", type=positive(int))
    p.add_argument("--questions-per-step", type=positive(int))
    p.add_argument("--group", type=positive(int))
    p.add_argument("--lr", type=positive(float))
    p.add_argument("--kl", type=float, default=0.01)
    p.add_argument("--reward", choices=["difficulty", "simple"], default="difficulty")
    p.add_argument("--updates", type=positive(int))
    p.add_argument("--clip-low", type=float, default=0.2)
    p.add_argument("--clip-high", type=float, default=0.3)
    p.add_argument("--llm-temperature", type=float, default=0.7)
    p.add_argument("--pool", type=positive(int))
    p.add_argument("--filter-samples", type=int)
    p.add_argument("--pass-rate", type=float, default=0.5)
    p.add_argument("--micro-tokens", type=positive(int))
    p.add_argument("--no-teacher", action="store_true")
    p.add_argument("--out", default="grpo", help="the stage's directory in the run (grpo)")
    p.add_argument("--gpus", type=positive(int), default=1)
    return p


def main():
    p = arguments()
    args = p.parse_args()
    run = Run(args.run)
    if "warmup" not in run.info["stages"]:
        raise ValueError(f"{run.path} holds no warm-up yet; run: python warmup.py --run {run.path}")
    out = run.path / args.out
    args.toy = run.toy and args.questions is None
    for key, value in (TOY if run.toy else PAPER).items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    device, frozen = machine(args)
    policy, llm, tokenizer = load_pair(args.slm or run.path / "warmup", args.llm or run.directory("llm"), device, frozen)
    reference = load(args.slm or run.path / "warmup", device)
    known = torch.tensor(tokenizer.known, device=device)
    rng = random.Random(f"grpo {args.seed}")
    questions = (list(itertools.islice(toy_questions("train", rng, unseen=False), args.pool)) if args.toy
                 else load_questions(args.questions, args.limit))
    questions = filter_questions(questions, llm, tokenizer, args)
    optimizer = adamw(policy, args.lr)
    out.mkdir(parents=True, exist_ok=True)
    bar = tqdm(range(1, args.steps + 1), desc="GRPO", unit="step", dynamic_ncols=True)
    with open(out / "metrics.jsonl", "w") as log:
        for step in bar:
            first = (step - 1) * args.questions_per_step
            chosen = [pick(questions, first + i, args.seed) for i in range(args.questions_per_step)]
            args.rate = args.lr * (1 - (step - 1) / args.steps if args.decay else 1.0)
            metrics, groups = train_step(step, chosen, policy, reference, None if args.no_teacher else llm, tokenizer,
                                         optimizer, known, args)
            log.write(json.dumps(metrics) + "\n")
            log.flush()
            bar.set_postfix(acc=f"{metrics['accuracy']:.2f}", calls=f"{metrics['call_rate']:.2f}",
                            rho=f"{metrics['rho']:.3f}", n=f"{metrics['asked']:.1f}", len=f"{metrics['length']:.0f}")
            if step % 20 == 0:
                r = groups[0][0]
                tqdm.write(f"step {step}: {tokenizer.decode(r.tokens)}")
    save(policy, out, run.path / "warmup")
    run.finish(args.out, settings(args))
    print(f"wrote {out}; next: python eval.py --run {run.path}")


def pick(questions, i, seed):
    """The i-th question of training: every pass over the pool in its own order."""
    epoch, place = divmod(i, len(questions))
    order = list(range(len(questions)))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    return questions[order[place]]


if __name__ == "__main__":
    run_script(main)
