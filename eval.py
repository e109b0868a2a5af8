"""Chapter 6. The paper's table: is it the learning, or just the help?

Every method answers the same questions, which no stage of training has seen:

    slm                the untouched small model, alone
    warmup             after stage 1, with the LLM: it can call, but has not learned when
    relay              after stage 2, with the LLM
    relay_no_teacher   the same model with the opening of a command forbidden
    llm                the large model, alone
    random_router      whole questions go to the LLM with probability p, the rest to the SLM; p such that it is as
                       accurate as the relay: p = (relay - slm) / (llm - slm) (RelayLLM, section 6)

The relay closes a share p of the gap between the two models, and costs 1 - rho / p less than that router. Accuracies
come with a 95% interval: the questions are drawn again, 2,000 times, with replacement (percentile bootstrap).

For the toy one more line is known: the bound, what calls placed exactly on the unknown facts would cost.
"""
import itertools
import json
import random

import numpy as np

from data import load_questions, toy_questions
from model import load, write_beside
from relay import Run, command, correct, fill_in, load_pair, machine, parser, run_script
from warmup import write_answers

TOY = dict(temperature=0.7, max_new_tokens=96, limit=1000)
PAPER = dict(temperature=0.0, max_new_tokens=8192)


def interval(right, seed=0, draws=2000):
    """95% percentile bootstrap interval of the mean of `right`, resampled by question."""
    right = np.asarray(right, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(right), (draws, len(right)))
    low, high = np.quantile(right[picks].mean(axis=1), [0.025, 0.975])
    return [float(low), float(high)]


def summary(right, rollouts, alone_is_llm=False):
    """Accuracy, call ratio and length of some answers."""
    tokens = sum(len(r.tokens) for r in rollouts)
    calls = [c for r in rollouts for c in r.calls if c.delivered]
    return dict(accuracy=sum(right) / len(right), questions=len(right),
                rho=1.0 if alone_is_llm else sum(sum(r.by_llm) for r in rollouts) / max(1, tokens),
                call_rate=sum(any(r.by_llm) for r in rollouts) / len(rollouts),
                asked=sum(c.asked for c in calls) / len(calls) if calls else None,
                length=tokens / len(rollouts), cut=sum(r.end == "length" for r in rollouts) / len(rollouts))


def result(method, questions, right, rollouts, args):
    """One row of results.json."""
    kinds = sorted({q.kind for q in questions if q.kind})
    by_kind = {}
    for kind in kinds:
        chosen = [i for i, q in enumerate(questions) if q.kind == kind]
        by_kind[kind] = summary([right[i] for i in chosen], [rollouts[i] for i in chosen], method == "llm")
    return dict(method=method, **summary(right, rollouts, method == "llm"), ci95=interval(right), seed=args.seed,
                temperature=args.temperature, max_new_tokens=args.max_new_tokens, by_kind=by_kind)


def routers(rows):
    """The random router that is as accurate as the relay, from the measured rows; and the relay's figures against it."""
    slm, llm, relay = (rows[name]["accuracy"] for name in ("slm", "llm", "relay"))
    if llm <= slm:
        return None
    p = (relay - slm) / (llm - slm)
    rows["relay"].update(gap_closed=p, cost_reduction=1 - rows["relay"]["rho"] / p if p > 0 else None)
    low, high = rows["relay"]["ci95"]
    return dict(method="random_router", accuracy=relay, rho=min(max(p, 0.0), 1.0), ci95=[low, high],
                **{key: rows["relay"][key] for key in ("questions", "seed", "temperature", "max_new_tokens")})


def bound(questions, tokenizer):
    """rho if one call on each unknown fact delivered that fact and nothing else, and the rest were as in the solution."""
    given, tokens = 0, 0
    for q in questions:
        fact = len(tokenizer.encode(q.fact))
        given += fact
        tokens += len(tokenizer.encode(q.solution)) + 1 + (len(tokenizer.encode(command(fact))) if fact else 0)
    return given / tokens


def table(rows):
    lines = [f"{'method':18}{'accuracy':>9}  {'95% interval':16}{'rho':>7}{'calls':>7}{'n':>5}{'length':>8}{'cut':>6}"]
    for row in rows:
        low, high = row["ci95"]
        line = f"{row['method']:18}{row['accuracy']:9.1%}  {f'{low:.1%} - {high:.1%}':16}{row['rho']:7.2%}"
        if "length" in row:
            asked = f"{row['asked']:.1f}" if row["asked"] else "-"
            line += f"{row['call_rate']:7.0%}{asked:>5}{row['length']:8.1f}{row['cut']:6.1%}"
        lines.append(line)
        for kind, part in row.get("by_kind", {}).items():
            asked = f"{part['asked']:.1f}" if part["asked"] else "-"
            lines.append(f"  {kind:16}{part['accuracy']:9.1%}  {part['questions']:>7} questions{part['rho']:6.2%}"
                         f"{part['call_rate']:7.0%}{asked:>5}{part['length']:8.1f}{part['cut']:6.1%}")
    return "\n".join(lines)


def main():
    args = parser("The table: every method on the same fresh questions.", "python eval.py --run runs/toy").parse_args()
    run = Run(args.run)
    if "grpo" not in run.info["stages"]:
        raise ValueError(f"{run.path} holds no finished GRPO stage; run: python grpo.py --run {run.path}")
    toy = run.toy and args.questions is None
    if not toy and args.questions is None:
        raise ValueError("real models need --questions FILE")
    fill_in(args, TOY if run.toy else PAPER)
    device, dtype = machine(args, run.toy)
    slm, llm, tokenizer = load_pair(args.slm or run.directory("slm"), args.llm or run.directory("llm"), device, dtype)
    trained = {name: load(run.path / name, device) for name in ("warmup", "grpo")}
    questions = (list(itertools.islice(toy_questions("eval", random.Random(f"eval {args.seed}")), args.limit)) if toy
                 else load_questions(args.questions, args.limit))
    methods = dict(slm=(slm, None, {}), warmup=(trained["warmup"], llm, {}), relay=(trained["grpo"], llm, {}),
                   relay_no_teacher=(trained["grpo"], None, dict(no_calls=True)), llm=(llm, None, {}))
    rows = {}
    for method, (writer, helper, options) in methods.items():
        rollouts = write_answers(writer, helper, tokenizer, questions, args, method, **options)
        right = [correct(q, r, tokenizer) for q, r in zip(questions, rollouts)]
        rows[method] = result(method, questions, right, rollouts, args)
    if router := routers(rows):
        rows["random_router"] = router
    out = run.path / "eval" / "results.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_beside(out, lambda file: file.write(json.dumps(list(rows.values()), indent=2).encode() + b"\n"))
    print(table(rows.values()))
    relay = rows["relay"]
    if router:
        reduction = f"{relay['cost_reduction']:.1%}" if relay["cost_reduction"] is not None else "-"
        print(f"the relay closes {relay['gap_closed']:.1%} of the gap with {relay['rho']:.2%} of the tokens, "
              f"{reduction} below the accuracy-matched random router")
    if toy:
        print(f"bound: calls exactly on the unknown facts would cost rho {bound(questions, tokenizer):.2%}")
    print(f"wrote {out}; next: python relay.py --run {run.path}")


if __name__ == "__main__":
    run_script(main)
