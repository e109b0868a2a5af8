"""Chapter 5. Stage 2: GRPO with a difficulty-aware reward.

For each question the model writes a group of G relay roll-outs. Each is scored, its reward is compared with the rest of
its group (no value network), and the tokens that the SLM sampled become more or less likely:

    A = (r - mean of the group) / (std of the group + 1e-6)                        GRPO, arXiv 2402.03300, section 4.1
    loss = mean over tokens of  max(-A ratio, -A clip(ratio)) + 0.01 k3(policy, warmed-up model)

What is RelayLLM's own is the reward (arXiv 2601.05167, section 4.2). It asks what the group shows about the question:
can the SLM do it alone, only with help, or not at all? Alone it pays not to call, else it pays to call, and each
token from the LLM costs a little. Tokens that the LLM wrote have no gradient: nobody of ours sampled them.
"""
import itertools
import json
import math
import random
import shutil
import time
from functools import lru_cache

import torch
from tqdm import tqdm

from data import load_questions, toy_questions
from model import load, read_json, save, write_beside
from relay import Run, correct, fill_in, load_pair, machine, parser, positive, relay, run_script, write_answers
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

def examples_of(rollouts):
    """What the learner sees of roll-outs: the loss is on the tokens that the SLM sampled, and on no others."""
    return [Example(r.prompt + r.tokens, [False] * len(r.prompt) + [not b for b in r.by_llm])
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
        if not any(any(e.learn) for e in part):      # the LLM wrote all of these
            continue
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


def step_metrics(rollouts, right, called, reward):
    """What the roll-outs of one step say, before any learning. right, called, reward: (questions, G)."""
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
                 llm_temperature=args.llm_temperature, seed=seeds, batch=args.batch)
    groups = [flat[i:i + args.group] for i in range(0, len(flat), args.group)]       # by index, never by text
    right = torch.tensor([[correct(q, r, tokenizer) for r in group] for q, group in zip(questions, groups)])
    called = torch.tensor([[any(r.by_llm) for r in group] for group in groups])
    rho = torch.tensor([[r.rho for r in group] for group in groups])
    reward = rewards(right, called, rho) if args.reward == "difficulty" else simple_rewards(right, rho)
    advantage = advantages(reward)
    sampled = time.perf_counter()

    metrics = dict(step=step) | step_metrics(groups, right, called, reward)
    sums = []
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
           pool=640, filter_samples=2, decay=True, ramp=20, skip_equal=True, micro_tokens=3000)
PAPER = dict(temperature=1.0, max_new_tokens=8192, steps=100, questions_per_step=128, group=8, lr=1e-6, updates=4,
             pool=17000, filter_samples=10, decay=False, ramp=1, skip_equal=False, micro_tokens=8192)


def arguments():
    p = parser("Stage 2: GRPO over relay roll-outs. Defaults: the toy's, and with real models the paper's.",
               "python grpo.py --run runs/toy --gpus 1")
    p.add_argument("--steps", type=positive(int), help=f"batches of roll-outs (toy {TOY['steps']})")
    p.add_argument("--questions-per-step", type=positive(int), help=f"toy {TOY['questions_per_step']}, paper 128")
    p.add_argument("--group", type=positive(int), help=f"roll-outs of each question, G (toy {TOY['group']}, paper 8)")
    p.add_argument("--lr", type=positive(float), help=f"learning rate (toy {TOY['lr']}, to 0; paper 1e-6, constant)")
    p.add_argument("--kl", type=float, default=0.01, help="weight of the KL to the warmed-up model (0.01)")
    p.add_argument("--reward", choices=["difficulty", "simple"], default="difficulty",
                   help="RelayLLM's difficulty-aware reward, or accuracy - rho")
    p.add_argument("--updates", type=positive(int), help="updates for each batch of roll-outs (toy 1, paper 4)")
    p.add_argument("--clip-low", type=float, default=0.2, help="PPO's clip below 1 (0.2)")
    p.add_argument("--clip-high", type=float, default=0.3, help="and above (0.3; DAPO, arXiv 2503.14476)")
    p.add_argument("--llm-temperature", type=float, default=0.7, help="the LLM's, inside a call (0.7)")
    p.add_argument("--pool", type=positive(int), help="questions before the filter")
    p.add_argument("--filter-samples", type=int, help="the LLM's answers to each, 0: no filter (toy 2, paper 10)")
    p.add_argument("--pass-rate", type=float, default=0.5, help="keep questions that the LLM solves this often (0.5)")
    p.add_argument("--micro-tokens", type=positive(int), help="tokens that pass the model at once")
    p.add_argument("--no-teacher", action="store_true", help="plain GRPO: nobody to call")
    p.add_argument("--save-every", type=positive(int), default=20, help="steps between checkpoints (20)")
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    p.add_argument("--gpus", type=positive(int), default=1, help="only 1 so far")
    args = p.parse_args()
    if args.gpus > 1:
        p.error("--gpus: more than one is not supported yet")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: a new directory each, made good by replacing one small file last

SETTINGS = ("seed", "steps", "questions_per_step", "group", "lr", "kl", "reward", "updates", "clip_low", "clip_high",
            "temperature", "llm_temperature", "max_new_tokens", "pool", "filter_samples", "pass_rate", "no_teacher")


def save_checkpoint(out, step, policy, optimizer, source, args):
    folder = out / f"checkpoint-{step}"
    shutil.rmtree(folder, ignore_errors=True)          # half of one, from a run that was killed
    save(policy, folder, source)
    write_beside(folder / "optimizer.pt", lambda file: torch.save(optimizer.state_dict(), file))
    state = dict(step=step, folder=folder.name, settings={key: getattr(args, key) for key in SETTINGS})
    write_beside(out / "checkpoint.json", lambda file: file.write(json.dumps(state, indent=2).encode()))
    for old in out.glob("checkpoint-*"):
        if old != folder:
            shutil.rmtree(old)


def last_checkpoint(out, args):
    """(steps done, directory of the model) of the last checkpoint; (0, None) if there is none."""
    if not (out / "checkpoint.json").exists():
        return 0, None
    state = read_json(out / "checkpoint.json")
    for key in SETTINGS:
        if state["settings"].get(key) != getattr(args, key):
            raise ValueError(f"{out}: its checkpoint was made with {key} {state['settings'].get(key)}, not "
                             f"{getattr(args, key)}; resume with the same settings, or choose another --run")
    return state["step"], out / state["folder"]


def pick(questions, i, seed):
    """The i-th question of training: every pass over the pool in its own order."""
    epoch, place = divmod(i, len(questions))
    return questions[epoch_order(len(questions), seed, epoch)[place]]


@lru_cache(maxsize=2)     # shuffled once a pass, not once a question
def epoch_order(n, seed, epoch):
    order = list(range(n))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    return order


def learning_rate(step, args):
    """Constant, as in the paper; the toy's rises over `ramp` steps and falls to 0.

    The ramp is there so that the first few batches do not decide alone whether the model calls always (see README.md).
    """
    rate = args.lr * min(1.0, step / args.ramp)
    return rate * (1 - (step - 1) / args.steps) if args.decay else rate


def watch(history):
    """One line when the last ten steps show a known collapse, else None."""
    mean = lambda key: sum(m[key] for m in history[-10:]) / 10
    if len(history) < 10:
        return None
    if mean("call_rate") < 0.005:
        return "warning: the model has stopped calling; the warm-up was too weak, or it guesses too well"
    if mean("call_rate") > 0.99 and mean("student_solvable") < 0.05:
        return "warning: every answer calls, so no group shows what the model can do alone; nothing teaches it not to"
    if mean("rho") > 0.5:
        return "warning: the LLM writes more than half of the tokens; the model has collapsed into long calls"
    if mean("length") > 1.3 * history[0]["length"]:
        return "warning: answers are 30% longer than at the start; length lowers rho without a use"
    return None


def main():
    args = arguments()
    run = Run(args.run)
    if "warmup" not in run.info["stages"]:
        raise ValueError(f"{run.path} holds no warm-up yet; run: python warmup.py --run {run.path}")
    fill_in(args, TOY if run.toy else PAPER)
    out, source = run.path / "grpo", args.slm or run.path / "warmup"
    if "grpo" in run.info["stages"]:
        if args.resume:
            print(f"{out} is finished; next: python eval.py --run {run.path}")
            return
        raise ValueError(f"{out} is there already; choose another --run, or delete it")
    if not args.resume and (out / "checkpoint.json").exists():
        raise ValueError(f"{out} holds an unfinished training; go on with --resume, or delete it")
    if not run.toy and args.questions is None:
        raise ValueError("real models need --questions FILE")
    done, folder = last_checkpoint(out, args)
    device, frozen = machine(args, run.toy)
    if device == "cpu":
        print("no GPU is used: running on the CPU")
    policy, llm, tokenizer = load_pair(folder or source, args.llm or run.directory("llm"), device, frozen)
    reference = load(source, device)
    optimizer = adamw(policy, args.lr)
    if folder:
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
    known = torch.tensor(tokenizer.known, device=device)
    questions = (list(itertools.islice(toy_questions("train", random.Random(f"grpo {args.seed}"), unseen=False),
                                       args.pool))
                 if args.questions is None else load_questions(args.questions, args.limit))
    questions = filter_questions(questions, llm, tokenizer, args)
    if not questions:
        raise ValueError("the LLM solves none of the questions; give easier ones, or --filter-samples 0")

    out.mkdir(parents=True, exist_ok=True)
    lines = (out / "metrics.jsonl").read_text().splitlines()[:done] if done else []
    write_beside(out / "metrics.jsonl", lambda file: file.write("".join(f"{line}\n" for line in lines).encode()))
    history, told = [json.loads(line) for line in lines], None
    bar = tqdm(range(done + 1, args.steps + 1), initial=done, total=args.steps, desc="GRPO", unit="step",
               dynamic_ncols=True)
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as log:
        for step in bar:
            first = (step - 1) * args.questions_per_step
            chosen = [pick(questions, first + i, args.seed) for i in range(args.questions_per_step)]
            args.rate = learning_rate(step, args)
            metrics, groups = train_step(step, chosen, policy, reference, None if args.no_teacher else llm, tokenizer,
                                         optimizer, known, args)
            metrics = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
            log.write(json.dumps(metrics) + "\n")     # NaN is not JSON
            log.flush()
            history.append(metrics)
            bar.set_postfix(acc=f"{metrics['accuracy']:.2f}", calls=f"{metrics['call_rate']:.2f}",
                            rho=f"{metrics['rho']:.3f}", n=f"{metrics['asked']:.1f}", len=f"{metrics['length']:.0f}")
            if step % 20 == 0:
                tqdm.write(f"step {step}: {tokenizer.decode(groups[0][0].tokens)}")
            warning = watch(history) if not args.no_teacher else None
            if warning and warning != told:
                tqdm.write(warning)
                told = warning
            if step % args.save_every == 0 and step < args.steps:
                save_checkpoint(out, step, policy, optimizer, source, args)
    save(policy, out, source)
    run.finish("grpo", settings(args))
    for old in [out / "checkpoint.json", *out.glob("checkpoint-*")]:
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    print(f"wrote {out}; next: python eval.py --run {run.path}")


if __name__ == "__main__":
    run_script(main)
