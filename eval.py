"""Chapter 6. The paper's table: is it the learning, or just the help?

Every method answers the same questions, which no stage of training should have seen (the toy's never have):

    slm                the untouched small model, alone
    warmup             after stage 1, with the LLM: it can call, but has not learned when
    relay              after stage 2, with the LLM
    relay_no_teacher   the same model, calls forbidden: it cannot write "<call" (grpo.py's --no-teacher is another
                       thing: training without an LLM, where commands may be written in vain)
    fixed_N            the same model; each call delivers N tokens, whatever n was asked
    token_router       no training: where the untouched SLM's next-token entropy exceeds a threshold, its token is
                       discarded, and the LLM writes until its own entropy is below it (R-Stitch, arXiv 2507.17307)
    llm                the large model, alone
    random_router      whole questions go to the LLM with probability p, the rest to the SLM; p such that it is as
                       accurate as the relay: p = (relay - slm) / (llm - slm) (RelayLLM, section 6)
    random_router_equal_cost    the same with p = the relay's rho

and, with --all, models that were trained otherwise (VARIANTS below). The relay closes a share p of the gap between
the two models, and costs 1 - rho / p less than random_router. All counts are of what ran; only the random routers are
computed. Accuracies and differences come with a 95% interval: a paired percentile bootstrap, 2,000 resamples of the
questions, the same for all methods; the answers of --repeat to one question stay together. (Where all of n answers are
right it has no width; up to 3 / n of all questions may still be answered wrongly. The toy's questions are drawn with
replacement: one that comes twice counts as two.)

For the toy one more figure is known: the bound, what calls placed exactly on the unknown facts would cost.

Left out: the paper's second look by a judge at answers that were scored wrong (one more model's opinion), and votes.
"""
import base64
import functools
import html
import importlib.util
import itertools
import json
import random
import shlex
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import replace

import numpy as np

from data import load_questions, split_of, toy_questions
from model import digest, fingerprint, load, need, write_beside, write_json
from relay import (Call, Rollout, Run, WrongArguments, command, figures, fill_in, is_right, load_pair, machine, means,
                   parser, plain_text, positive, relay, run_script, show_presets)

TOY = dict(temperature=0.7, max_new_tokens=96, limit=1000, fixed=[1, 4, 9])
REAL = dict(temperature=0.0, max_new_tokens=8192, fixed=[20, 100, 500])
THRESHOLDS = [0.05, 0.1, 0.2, 0.4, 0.8, 1.6]     # of the token router, in nats
ROWS = ["warmup", "relay_no_teacher", "fixed", "token_router"]     # that --rows may leave out
VARIANTS = {                                     # directory in the run: the flags of grpo.py that make it
    "grpo_no_call": "--slm {slm} --no-teacher --reward simple",     # plain GRPO
    "simple_reward": "--reward simple",
    "llm_tokens_in_loss": "--llm-tokens-in-loss",
    "batch_scenarios": "--batch-scenarios",
    "rho_asked": "--rho-asked",
}

# ---------------------------------------------------------------------------------------------------------------------
# Answers: each is written once, and kept in RUN/eval/answers.jsonl

class Answers:
    """answers.jsonl: a line an answer, under a key of all that decides it. An interrupted evaluation goes on there."""

    def __init__(self, path):
        self.path, self.known = path, {}           # key -> (roll-out, the seconds that it took)
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        for line in text.splitlines():
            # half a line, of one that was killed, or no line of ours
            with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
                record = json.loads(line)
                by_llm, calls = [False] * len(record["tokens"]), [Call(*call) for call in record["calls"]]
                for call in calls:
                    by_llm[call.position:call.position + call.delivered] = [True] * call.delivered
                rollout = Rollout([], record["tokens"], by_llm, [], calls, record["end"], record["cost"])
                self.known[record["key"]] = rollout, float(record["seconds"])
        if text and not text.endswith("\n"):
            write_beside(path, lambda file: file.write(text.encode() + b"\n"))

    def write(self, method, writer, helper, fingerprints, tokenizer, questions, args, **options):
        """Returns (roll-outs, the seconds of all of them). writer, helper: models."""
        options |= {key: getattr(args, key) for key in ("temperature", "top_p", "llm_temperature", "max_new_tokens")}
        settings = dict(options, marks=fingerprints, dtypes=[str(m.embed.weight.dtype) for m in (writer, helper) if m])
        prompts = [tokenizer.chat(question.text) for question in questions]
        keys = [digest([settings, (args.seed, n), prompt]) for n, prompt in enumerate(prompts)]
        missing = [n for n, key in enumerate(keys) if key not in self.known]
        last = time.perf_counter()
        with open(self.path, "a", encoding="utf-8") as file:

            def keep(i, r):
                nonlocal last
                n, before, last = missing[i], last, time.perf_counter()
                self.known[keys[n]] = r, last - before
                print(json.dumps(dict(key=keys[n], method=method, index=n, tokens=r.tokens, calls=r.calls, end=r.end,
                                      cost=r.cost, seconds=last - before)), file=file, flush=True)

            relay(writer, helper, tokenizer, [prompts[n] for n in missing], on_end=keep, batch=args.batch,
                  seed=[(args.seed, n) for n in missing], label=method, **options)
        rollouts = [replace(self.known[key][0], prompt=prompt, logprobs=[]) for key, prompt in zip(keys, prompts)]
        return rollouts, sum(self.known[key][1] for key in keys)


# ---------------------------------------------------------------------------------------------------------------------
# The rows: what each method asks of the models

class Table:
    """The rows of results.json as they come about: each method answers the same questions."""

    def __init__(self, paths, device, dtype, questions, answers, args):
        """paths: {name: model directory}, at least slm and llm."""
        self.questions, self.answers, self.args = questions, answers, args
        self.load = lambda name: load(paths[name], device, dtype)
        self.fingerprint = functools.cache(lambda name: fingerprint(paths[name]))
        slm, llm, self.tokenizer = load_pair(paths["slm"], paths["llm"], device, dtype)
        self.models = dict(slm=slm, llm=llm)                   # any other is loaded for each of its rows
        self.rows, self.right, self.pairs = {}, {}, {}         # of each method; right: a share for each question,
                                                               # pairs: (question, roll-out) of each answer

    def ask(self, method, writer, helper=None, questions=None, **options):
        """Ask all questions. Returns the method's row; without `questions` of its own it also goes into the table."""
        args = self.args
        repeat = 1 if questions else args.repeat
        asked = [q for q in questions or self.questions for _ in range(repeat)]            # one for each answer
        models = self.models.get(writer) or self.load(writer), self.models.get(helper)
        fingerprints = [self.fingerprint(name) if name else None for name in (writer, helper)]
        rollouts, seconds = self.answers.write(method, *models, fingerprints, self.tokenizer, asked, args, **options)
        if method == "llm":
            for r in rollouts:
                r.by_llm = [True] * len(r.tokens)
        hits = [is_right(q, r, self.tokenizer) for q, r in zip(asked, rollouts)]
        by_kind = {}
        for kind in sorted({q.kind for q in asked if q.kind}):
            chosen = [(hit, r) for q, hit, r in zip(asked, hits, rollouts) if q.kind == kind]
            by_kind[kind] = dict(questions=len(chosen) // repeat, **means(figures(*zip(*chosen))))
        # relay() counts the writer's tokens under slm_..., also where the LLM writes alone
        size = {who: sum(p.numel() for p in model.parameters()) for who, model in zip(("slm", "llm"), models) if model}
        ran = sum(n * size.get(what[:3], 0) for r in rollouts for what, n in r.cost.items())     # what: "llm_decode"...
        right = np.reshape(hits, (-1, repeat)).mean(axis=1)
        row = dict(method=method, questions=len(right), **means(figures(hits, rollouts)), ci95=interval(right),
                   seed=args.seed, temperature=args.temperature, top_p=args.top_p, max_new_tokens=args.max_new_tokens,
                   repeat=repeat, parameters_a_token=ran / max(1, sum(len(r.tokens) for r in rollouts)),
                   seconds=seconds, by_kind=by_kind)
        if questions is None:
            self.rows[method], self.right[method], self.pairs[method] = row, right, list(zip(asked, rollouts))
        return row

    def ask_all(self, variants):
        """Every row that --rows asks for and that needs no fitting: the token router's does, see route()."""
        rows = self.args.rows
        self.ask("slm", "slm")
        if "warmup" in rows:
            self.ask("warmup", "warmup", "llm")
        self.ask("relay", "relay", "llm")
        if "relay_no_teacher" in rows:
            self.ask("relay_no_teacher", "relay", no_calls=True)
        self.ask("llm", "llm")
        for n in self.args.fixed if "fixed" in rows else ():
            self.ask(f"fixed_{n}", "relay", "llm", fixed=n)
        for name, stage in variants.items():
            self.ask(name, name, None if stage.get("no_teacher") else "llm")

    def route(self, others):
        """The token router. Its threshold, fitted on other questions: the cheapest at which it is as accurate as the
        relay there, or the most accurate one. Returns its row for each threshold."""
        sweep = {t: self.ask("token_router", "slm", "llm", others, router=(t, t)) for t in THRESHOLDS}
        aim = self.ask("relay", "relay", "llm", others)["accuracy"]
        enough = [t for t in sweep if sweep[t]["accuracy"] >= aim]
        best = min(enough, key=lambda t: sweep[t]["rho"]) if enough else max(sweep, key=lambda t: sweep[t]["accuracy"])
        self.ask("token_router", "slm", "llm", router=(best, best))["threshold"] = best
        return sweep


# ---------------------------------------------------------------------------------------------------------------------
# Figures

def interval(values, statistic=np.mean):
    """95% percentile bootstrap interval of statistic(values), resampled 2,000 times by question (the last axis)."""
    values = np.asarray(values, dtype=float)
    picks = np.random.default_rng(0).integers(0, values.shape[-1], (2000, values.shape[-1]))
    return np.quantile([statistic(values[..., pick]) for pick in picks], [0.025, 0.975]).tolist()


def routers(rows, right):
    """The random router's two rows, from the measured answers; and the relay's figures against it, into its row.

    Without a gap between SLM and LLM there is nothing to close: the router sends nothing to the LLM. Where some of the
    resamples have none, the share of the gap has no interval.
    """
    def share(answers):
        slm, llm, relayed = (a.mean() for a in answers)
        return (relayed - slm) / (llm - slm) if llm > slm else np.nan

    answers, ours = np.array([right[name] for name in ("slm", "llm", "relay")], dtype=float), rows["relay"]
    p, ends = float(share(answers)), interval(answers, share)
    ours.update(gap_closed=None if np.isnan(p) else p, gap_closed_ci95=None if np.isnan(ends).any() else ends,
                cost_reduction=1 - ours["rho"] / p if p > 0 else None)
    same = {key: ours[key] for key in ("questions", "seed", "temperature", "top_p", "max_new_tokens", "repeat")}
    for name, sent in (("random_router", min(p, 1.0) if p > 0 else 0.0), ("random_router_equal_cost", ours["rho"])):
        right[name] = (1 - sent) * answers[0] + sent * answers[1]   # its expected accuracy on each question
        rows[name] = dict(same, method=name, accuracy=float(right[name].mean()), rho=sent, ci95=interval(right[name]))


def bound(questions, tokenizer):
    """rho if a call on each unknown fact delivered that fact and nothing else, and the rest were as in the solution."""
    facts = [len(tokenizer.encode(q.fact)) for q in questions]
    commands = sum(len(tokenizer.encode(command(n))) for n in facts if n)
    answers = sum(len(tokenizer.encode(q.solution)) + 1 for q in questions)     # 1: the end of text
    return sum(facts) / (answers + commands)


def where_calls_happen(answers, tokenizer):
    """Where in an answer the relay calls, behind which words, and n by kind of question: the ten most frequent."""
    counts = defaultdict(Counter)
    for question, r in answers:
        for call in r.served:
            before = Rollout([], r.tokens[:call.position], r.by_llm[:call.position])
            counts["calls in the part of the answer from"][f"{call.position * 10 // len(r.tokens) * 10}%"] += 1
            counts["words before a call"][" ".join(plain_text(before, tokenizer).split()[-3:])] += 1
            counts[f"n asked, {question.kind or 'all'}"][call.asked] += 1
    return {what: dict(counter.most_common(10)) for what, counter in counts.items()}


def analyse(table, sweep, toy):
    """analysis.json: the relay's paired differences, where it calls, the token router's sweep, the toy's bound."""
    rows, right = table.rows, table.right
    gains = {name: right["relay"] - right[name] for name in right if name != "relay"}
    return dict(relay_minus={name: dict(accuracy=float(gain.mean()), ci95=interval(gain),
                                        rho=rows["relay"]["rho"] - rows[name]["rho"])
                             for name, gain in gains.items()},
                calls=where_calls_happen(table.pairs["relay"], table.tokenizer),
                token_router={str(t): dict(accuracy=row["accuracy"], rho=row["rho"]) for t, row in sweep.items()},
                **dict(bound_rho=bound(table.questions, table.tokenizer)) if toy else {})


# ---------------------------------------------------------------------------------------------------------------------
# The table, in text

HEADER = ("method                    accuracy  95% interval         rho called     n  length    cut     parameters"
          "     time")
COLUMNS = dict(accuracy="{:9.1%}", beside="  {:15}", rho="{:9.2%}", call_rate="{:7.0%}", asked="{:6.1f}",
               length="{:8.1f}", cut="{:7.1%}", parameters_a_token="{:15,.0f}", time="{:8.2f}x")


def as_text(rows):
    """results.json as the table that is printed. Below a method stand its questions of each kind."""
    lines, base = [HEADER], next((row["seconds"] for row in rows if row["method"] == "llm"), 0) or 1
    for row in rows:
        parts = {row["method"]: row} | {f"  {kind}": part for kind, part in row.get("by_kind", {}).items()}
        for name, part in parts.items():
            beside = "{:.1%} - {:.1%}".format(*part["ci95"]) if "ci95" in part else f"{part['questions']:>5} questions"
            shown = dict(part, beside=beside, **{"time": part["seconds"] / base} if "seconds" in part else {})
            lines.append(f"{name:25}" + "".join(form.format(shown[key]) if shown[key] is not None else "     -"
                                                for key, form in COLUMNS.items() if key in shown))
    return "\n".join(lines)


def tell(ours, analysis):
    """What the table does not show, in lines."""
    percent = lambda share: "-" if share is None else f"{share:.1%}"
    if ours["gap_closed"] is not None:
        ends = " - ".join(map(percent, ours["gap_closed_ci95"])) if ours["gap_closed_ci95"] else "no interval"
        print(f"the relay closes {ours['gap_closed']:.1%} ({ends}) of the gap with {ours['rho']:.2%} of the tokens, "
              f"{percent(ours['cost_reduction'])} below the random router at equal accuracy")
    print(f"right with a call: {percent(ours['accuracy_called'])}, without: {percent(ours['accuracy_alone'])}")
    for what, counts in analysis["calls"].items():
        print(f"{what}: " + ", ".join(f"{value!r} {n}x" for value, n in counts.items()))
    if "bound_rho" in analysis:
        print(f"bound: calls exactly on the unknown facts would cost rho {analysis['bound_rho']:.2%}")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures, and a page that holds everything (skip it on a first reading)

def plot(rows, sweep, metrics, path):
    """Accuracy against the LLM's share of tokens, and the learning curves. Needs matplotlib."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 7), layout="constrained")
    top, *curves = figure.subplot_mosaic("aaa;bcd", height_ratios=[3, 2]).values()
    slm, llm, xs = rows["slm"]["accuracy"], rows["llm"]["accuracy"], np.geomspace(1e-4, 1, 200)
    top.plot(xs, slm + xs * (llm - slm), color="grey", label="random router")
    points = sorted((row["rho"], row["accuracy"]) for row in sweep.values())
    top.plot([x for x, _ in points], [y for _, y in points], ".:", color="tab:green", label="token router, swept")
    for (name, row), mark in zip(rows.items(), itertools.cycle("os^vDP*Xp<>hd")):
        if not name.startswith("random"):
            at, bar = (max(row["rho"], 1e-4), row["accuracy"]), np.abs(np.subtract(row["ci95"], row["accuracy"]))
            style = dict(fmt="*", ms=18, mec="black", zorder=9) if name == "relay" else dict(fmt=mark)      # on top
            top.errorbar(*at, yerr=bar[:, None], capsize=3, label=name, **style)
            if name in ("slm", "relay", "llm"):
                top.annotate(f"{name} {row['accuracy']:.1%}", at, (12, -14), textcoords="offset points")
    top.set(xscale="log", xlim=(6e-5, 4), xlabel="share of tokens by the LLM (none: at the left)", ylabel="accuracy")
    top.legend(fontsize=8, ncols=2)
    for axes, key in zip(curves, ("accuracy", "rho", "length")):
        axes.plot([m["step"] for m in metrics], [m[key] for m in metrics])
        axes.set(title=f"{key} in training", xlabel="step")
    figure.savefig(path, dpi=110)


def page(rows, answers, tokenizer, picture):
    """One self-contained HTML page: the table, the picture, some roll-outs with the LLM's tokens marked."""
    parts = ["<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>"
             "<title>RelayLLM</title><style>body{font:16px/1.5 sans-serif;max-width:60em;margin:auto;padding:1em}"
             "pre{overflow-x:auto;font-size:13px}img{max-width:100%}mark{background:#9e9}"
             "body{overflow-wrap:anywhere}</style>"
             f"<h1>RelayLLM</h1><pre>{html.escape(as_text(rows))}</pre>"]
    if picture.exists():
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f"<img alt='accuracy against cost' src='data:image/png;base64,{data}'>")
    parts.append("<h2>Roll-outs of the relay</h2><p>Marked: what the large model wrote.</p>")
    for question, rollout in answers[:20]:
        right = "right" if is_right(question, rollout, tokenizer) else "wrong"
        parts.append(f"<p><b>{html.escape(question.text)}</b> ({html.escape(question.kind)} {right})<br>")
        for by_llm, part in itertools.groupby(zip(rollout.tokens, rollout.by_llm), key=lambda pair: pair[1]):
            text = html.escape(tokenizer.decode([token for token, _ in part]))
            parts.append(f"<mark>{text}</mark>" if by_llm else text)
    return "".join(parts) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The script

def arguments():
    p = parser("The table: every method on the same fresh questions.", "python eval.py --run runs/toy", top_p=True)
    g = p.add_argument_group("the table")
    g.add_argument("--repeat", type=positive(int), default=1,
                   help="answers to each question, at a --temperature above 0 (1; the paper's AIME: 32)")
    g.add_argument("--rows", nargs="*", default=ROWS, metavar="METHOD", help="beside slm, relay and llm only these, of "
                   f"{', '.join(ROWS)} and the names of grpo.py --variant (default: the first four)")
    g.add_argument("--fixed", type=positive(int), nargs="+", metavar="N", help="lengths of the fixed_N rows")
    g.add_argument("--fit", type=positive(int), default=200, help="other questions, to fit the token router on (200)")
    g.add_argument("--all", action="store_true", help="also what grpo.py --variant has put into the run")
    g.add_argument("--plot", action="store_true", help="draw RUN/eval/plot.png (needs matplotlib)")
    g.add_argument("--html", action="store_true", help="write RUN/eval/index.html: table, picture, roll-outs")
    show_presets(p, TOY, REAL, temperature="; inside a call the LLM samples as in training",
                 slm=": of the rows slm and token_router")
    args = p.parse_args()
    need(not args.plot or importlib.util.find_spec("matplotlib"), "--plot needs matplotlib: pip install matplotlib",
         WrongArguments)
    return args


def trained_on(run):
    """The question file of training; None where it was the toy's own questions."""
    file = run.info["stages"]["grpo"].get("questions")
    return file and (run.path / file).resolve()           # inside the run it is noted relative to it


def fit_questions(args, run, questions):
    """Questions to fit a threshold on: held out of training (a tenth of its file), and none that is reported."""
    file, without = trained_on(run), "--rows " + " ".join(ROWS[:-1])
    if file is None:
        return list(itertools.islice(toy_questions("held_out", random.Random("fit")), args.fit))
    need(file.exists(), f"{file}: gone, and the token router is fitted on a part of it; leave it out: {without}")
    reported = {q.text for q in questions}
    found = [q for q in load_questions(file) if split_of(q.text) == "held_out" and q.text not in reported][:args.fit]
    need(found, f"{file}: no question is left to fit the token router on; leave it out: {without}")
    return found


def find_variants(args, run, slm):
    """{name: settings} of the models of grpo.py --variant that --rows or --all asks for. Says how to make others."""
    there = {name: stage for name, stage in run.info["stages"].items() if run.has(name)
             and name not in ("warmup", "grpo") and not name.startswith("pretrain ")}
    unknown = ", ".join(sorted({*args.rows} - {*ROWS, *VARIANTS, *there}))
    need(not unknown, f"--rows {unknown}: no row, and no model that grpo.py --variant put into {run.path}",
         WrongArguments)
    file, seed = trained_on(run), run.info["stages"]["grpo"].get("seed")
    same = ["--seed", str(seed), *(["--questions", str(file)] if file else [])]
    for name, flags in VARIANTS.items():
        if name not in there and (args.all or name in args.rows):
            more = ["--variant", name, *same, *(flag.format(slm=slm) for flag in flags.split())]
            print(f"{name} is missing; make it, with what other flags grpo had: {run.command_line('grpo.py')} "
                  f"{shlex.join(more)}")
    return {name: stage for name, stage in there.items() if args.all or name in args.rows}


def main():
    args = arguments()
    run = Run(args.run)
    need(run.has("grpo"), f"{run.path} holds no finished GRPO stage; run: {run.command_line('grpo.py')}")
    toy = run.toy and args.questions is None
    need(toy or args.questions, "real models need --questions FILE", WrongArguments)
    fill_in(args, TOY if run.toy else REAL)
    args.llm_temperature = run.llm_temperature
    need(args.repeat == 1 or args.temperature > 0,
         f"--repeat {args.repeat}: at temperature 0 all answers are the same; give --temperature", WrongArguments)
    if args.questions and args.questions == trained_on(run):
        print("warning: these are the questions of training")
    device, dtype = machine(args, run.toy)
    paths = dict(slm=args.slm or run.directory("slm"), llm=args.llm or run.directory("llm"), warmup=run.path / "warmup",
                 relay=run.path / "grpo")
    variants = find_variants(args, run, paths["slm"])
    paths |= {name: run.path / name for name in variants}
    questions = (list(itertools.islice(toy_questions("eval", random.Random(f"eval {args.seed}")), args.limit)) if toy
                 else load_questions(args.questions, args.limit))
    others = fit_questions(args, run, questions) if "token_router" in args.rows else []
    out = run.path / "eval"
    out.mkdir(parents=True, exist_ok=True)
    table = Table(paths, device, dtype, questions, Answers(out / "answers.jsonl"), args)
    table.ask_all(variants)
    sweep = table.route(others) if others else {}
    routers(table.rows, table.right)
    rows, answers, analysis = table.rows, table.pairs["relay"], analyse(table, sweep, toy)
    write_json(out / "analysis.json", analysis)
    write_json(out / "results.json", list(rows.values()))
    print(as_text(rows.values()))
    tell(rows["relay"], analysis)
    if args.plot:
        lines = (run.path / "grpo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        plot(rows, sweep, [json.loads(line) for line in lines], out / "plot.png")
    if args.html:
        text = page(list(rows.values()), answers[::args.repeat], table.tokenizer, out / "plot.png")
        write_beside(out / "index.html", lambda file: file.write(text.encode()))
    print(f"wrote {out / 'results.json'}; next: {run.command_line('relay.py', '--interactive')}")


if __name__ == "__main__":
    run_script(main)
