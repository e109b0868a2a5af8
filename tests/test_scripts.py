"""The scripts as a user meets them: a whole tiny run, and what they say to a user's mistake."""
import importlib
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch

import relay as relay_module
from conftest import ON_CPU
from grpo import REAL, advantages, rewards
from model import Config
from needs import hours_needed, memory_needed
from relay import run_script

HERE = Path(relay_module.__file__).parent


def script(name, *flags, piped=None):
    out = subprocess.run([sys.executable, HERE / name, *flags], input=piped, capture_output=True, text=True,
                         encoding="utf-8", timeout=170, env=ON_CPU)
    assert out.returncode == 0, out.stderr[-2000:]
    return out.stdout


WARMUP = "--slm-steps 2 --llm-steps 1 --samples 12 --epochs 1 --check 6 --max-new-tokens 30".split()
GRPO = ("--gpus 2 --steps 3 --questions-per-step 3 --group 3 --pool 7 --filter-samples 0 --max-new-tokens 30 "
        "--eval-every 2 --eval-questions 4").split()
EVAL = "--limit 9 --fit 3 --max-new-tokens 30".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run of the toy, all stages as short as can be: (its directory, what the scripts printed).

    GRPO in two processes; test_grpo.py has one.
    """
    run = tmp_path_factory.mktemp("runs") / "tiny"
    said = [script("warmup.py", "--run", run, *WARMUP), script("grpo.py", "--run", run, *GRPO)]
    with ThreadPoolExecutor() as pool:                     # at the same time: neither reads what the other writes
        both = [pool.submit(script, "eval.py", "--run", run, *EVAL),
                pool.submit(script, "relay.py", "--run", run, "--max-new-tokens", "30", "--dtype", "bfloat16",
                            piped="What does Amy pay?\n")]
    return run, said + [one.result() for one in both]


def test_the_four_scripts_make_a_whole_run(run):
    """Each stage alone passes its tests; what one writes the next must read."""
    run, said = run
    stages = json.loads((run / "run.json").read_text())["stages"]
    assert set(stages) == {"pretrain slm", "pretrain llm", "warmup", "grpo"}
    metrics = [json.loads(line) for line in (run / "grpo" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2, 3]
    assert "eval_accuracy" in metrics[1] and "eval_accuracy" not in metrics[0]
    for name in ("slm", "llm", "warmup", "grpo"):
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in (run / name).iterdir()}
    assert not list((run / "grpo").glob("checkpoint*"))
    for words, text in zip((["SLM alone:", "calls in", "next: python grpo.py"], ["CPU, 2 processes", "next:"],
                            ["random_router", "bound:", "next:"], ["tokens/s", "by the LLM", "next: python eval"]),
                           said):
        assert all(word in text for word in words), text
    assert all(text.count("next:") == 1 and "next:" in text.splitlines()[-1] for text in said)     # one process speaks
    assert said[3].startswith("What does Amy pay?\n")                  # a pipe is read, although a toy has questions


def test_the_first_picture_of_the_readme_is_drawn_from_a_run(run):
    """A picture that nobody can make again shows nothing."""
    picture = ElementTree.fromstring(script("docs/make_relay_svg.py", "--run", run[0]))
    texts = ["".join(text.itertext()) for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0].endswith("pay?") and texts[-4:] == ["question", "written by the SLM", "its command",
                                                        "written by the LLM"]
    assert "".join(texts[1:-4])                            # and between them the answer


def test_every_row_of_the_table_has_every_key(run):
    """Whoever reads results.json by its keys would stumble over a row that lacks one."""
    rows = json.loads((run[0] / "eval" / "results.json").read_text())
    methods = [row["method"] for row in rows]
    assert len(set(methods)) == len(methods)
    assert {"slm", "warmup", "relay", "relay_no_teacher", "llm", "token_router"} <= set(methods)
    for row in rows:
        assert {"method", "accuracy", "rho", "ci95", "questions", "seed", "temperature"} <= set(row)
        assert row["questions"] == 9 and 0 <= row["ci95"][0] <= row["accuracy"] <= row["ci95"][1] <= 1


def test_a_second_evaluation_gives_the_same_table(monkeypatch, run):
    """Answers read back in another order, or without their calls, would make another table."""
    before = (run[0] / "eval" / "results.json").read_bytes()
    monkeypatch.setattr(sys, "argv", ["eval.py", "--run", str(run[0]), *EVAL, "--html"])
    run_script(importlib.import_module("eval").main)
    assert (run[0] / "eval" / "results.json").read_bytes() == before
    assert "random_router_equal_cost" in (run[0] / "eval" / "index.html").read_text(encoding="utf-8")


def test_a_run_can_be_moved(monkeypatch, capsys, run, tmp_path):
    """Absolute paths in run.json would lead back to where the run began."""
    moved = run[0].rename(tmp_path / "moved")
    monkeypatch.setattr(sys, "argv", ["relay.py", "--run", str(moved), "--max-new-tokens", "5"])
    run_script(relay_module.main)
    said = capsys.readouterr().out
    assert "coins" in said.splitlines()[0] and "by the LLM" in said     # with no question given, one of the toy's
    moved.rename(run[0])


def fails(monkeypatch, capsys, name, *flags, named=True):
    """(exit code, the error's text, which begins with the script's name) of a script, run in this process."""
    monkeypatch.setattr(sys, "argv", [name + ".py", *map(str, flags)])
    with pytest.raises(SystemExit) as exit:
        run_script(importlib.import_module(name).main)
    code = exit.value.code
    text = code if isinstance(code, str) else capsys.readouterr().err
    assert text.count("\n") <= 1 and (text.startswith(name) or not named)
    return 1 if isinstance(code, str) else code, text


@pytest.mark.parametrize("name", ["warmup", "grpo", "eval", "relay"])
@pytest.mark.parametrize("flags", [["--nonsense"], ["--limit", "0"], ["--limit", "x"], ["--temperature", "hot"],
                                   ["--temperature", "-1"], ["--temperature", "nan"], ["--dtype", "int8"],
                                   ["--batch", "-1"], ["--seed", "-1"]])
def test_a_wrong_argument_is_one_line_and_exit_code_2(monkeypatch, capsys, name, flags):
    """Not a traceback, and not half an hour later."""
    code, text = fails(monkeypatch, capsys, name, *flags)
    assert code == 2 and flags[0] in text and "--help" in text


@pytest.mark.parametrize("name, flags, word", [
    ("grpo", [], "warmup.py"), ("eval", [], "grpo.py"), ("relay", ["why?"], "warmup.py"),
    ("warmup", ["--slm", "nowhere", "--llm", "nowhere", "--questions", "q.jsonl"], "nowhere"),
])
def test_what_is_missing_is_named_with_what_to_do(monkeypatch, capsys, tmp_path, name, flags, word):
    """grpo before warmup, a directory that is not there: exit code 1, and nothing is made."""
    monkeypatch.chdir(tmp_path)
    code, text = fails(monkeypatch, capsys, name, *flags)
    assert code == 1 and word in text and not list(tmp_path.iterdir())


def test_a_family_that_cannot_be_run_is_named_before_its_tokenizer_is_looked_at(monkeypatch, capsys, tmp_path):
    """Of a mixture of experts with a SentencePiece tokenizer, only the tokenizer was complained of."""
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "config.json").write_text('{"model_type": "mixtral"}')
    (tmp_path / "moe" / "tokenizer.model").write_bytes(b"")
    pair = ["--slm", str(tmp_path / "moe"), "--llm", str(tmp_path / "moe")]
    for name, *flags in (["warmup", "--questions", "q.jsonl", "--run", str(tmp_path / "run")], ["relay", "why?"]):
        code, text = fails(monkeypatch, capsys, name, *flags, *pair)
        assert code == 1 and "'mixtral' is not supported (supported: qwen3, qwen2, llama)" in text
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_nothing_that_is_there_is_overwritten(monkeypatch, capsys, run):
    """An afternoon of training is lost by one repeated command."""
    run = run[0]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code, text = fails(monkeypatch, capsys, "warmup", "--run", run, *WARMUP, "--samples", "13")
    assert code == 1 and "samples" in text
    code, text = fails(monkeypatch, capsys, "grpo", "--run", run)
    assert code == 1 and "already" in text
    code, text = fails(monkeypatch, capsys, "relay", "--run", run, " ")
    assert code == 1 and "empty" in text
    code, text = fails(monkeypatch, capsys, "relay", "--run", run, "why? " * 1000)
    assert code == 1 and "context" in text
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_stage_whose_directory_was_deleted_may_be_made_again(monkeypatch, capsys, run, tmp_path):
    """The refusal says "or delete it"; run.json alone kept refusing."""
    copy = shutil.copytree(run[0], tmp_path / "run")
    shutil.rmtree(copy / "grpo")
    code, text = fails(monkeypatch, capsys, "eval", "--run", copy)
    assert code == 1 and "no finished GRPO" in text
    monkeypatch.setattr(importlib.import_module("grpo"), "start_processes", lambda n: sys.exit("nothing refused"))
    assert fails(monkeypatch, capsys, "grpo", "--run", copy, named=False) == (1, "nothing refused")
    # the directory is there, as of a training that was killed on the way: it counted as finished
    assert fails(monkeypatch, capsys, "grpo", "--run", copy, "--resume", named=False) == (1, "nothing refused")


def test_a_toy_in_the_run_of_a_deleted_pair_is_a_toy(monkeypatch, capsys, tmp_path):
    """run.json still named the real models, and the toy's warm-up went on with those."""
    (tmp_path / "run.json").write_text(json.dumps(dict(slm="/models/s", llm="/models/l", toy=False, stages={})))
    warmup = importlib.import_module("warmup")
    monkeypatch.setattr(warmup, "pretrain_pair", lambda run, args: sys.exit(json.dumps(run.info)))
    code, text = fails(monkeypatch, capsys, "warmup", "--run", tmp_path, named=False)
    assert json.loads(text) == dict(toy=True, stages={})


@pytest.mark.parametrize("name, flags", [("warmup", []), ("grpo", []), ("eval", []), ("relay", ["why?"])])
def test_a_run_that_cannot_be_is_found_before_any_work(monkeypatch, capsys, tmp_path, name, flags):
    """Hours of training that ended in "not a directory"."""
    (tmp_path / "file").write_text("")
    code, text = fails(monkeypatch, capsys, name, "--run", tmp_path / "file", *flags)
    assert code == 1 and str(tmp_path / "file") in text


def test_a_run_json_of_something_else_is_named(monkeypatch, capsys, tmp_path):
    """An object without stages was a KeyError."""
    (tmp_path / "run.json").write_text("{}")
    code, text = fails(monkeypatch, capsys, "grpo", "--run", tmp_path)
    assert code == 1 and "run.json" in text


@pytest.mark.parametrize("name, flags", [
    ("eval", ["--repeat", "2", "--temperature", "0"]), ("grpo", ["--variant", "b", "--gpus", "2", "--batch-scenarios"]),
    ("grpo", ["--variant", "b", "--gpus", "4", *GRPO[2:]]), ("grpo", ["--pass-rate", "7"]),
    ("grpo", ["--variant", "fixed_4"]), ("grpo", ["--variant", "b", "--temperature", "0"]),
    ("relay", ["why?", "--questions", "q.jsonl"]), ("relay", ["why?", "--device", "nowhere"]),
    ("relay", ["why?", "--top-p", "1.5"]), ("grpo", ["--variant", "b", "--top-p", "0.9"]),
    ("warmup", ["--top-p", "0.9"]), ("warmup", ["--seed", "1" + "0" * 20]), ("grpo", ["--clip-high", "1e300"])])
def test_arguments_that_do_not_go_together_are_exit_code_2(monkeypatch, capsys, run, name, flags):
    """32 equal greedy answers cost a day; a fault that each process reports is a page."""
    code, text = fails(monkeypatch, capsys, name, "--run", run[0], *flags)
    assert code == 2 and text.startswith(f"{name}.py: ")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to"), RuntimeError(
    "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to")])
def test_too_little_memory_is_one_line_that_says_what_to_make_smaller(monkeypatch, error):
    """Each allocator has a traceback of its own."""
    def main():
        raise error
    with pytest.raises(SystemExit, match="out of memory; try a smaller --batch"):
        run_script(main)


def test_the_table_takes_every_variant_of_the_run(monkeypatch, capsys, run, tmp_path):
    """--variant takes any name; only five were looked for."""
    copy = shutil.copytree(run[0], tmp_path / "run")
    shutil.copytree(copy / "grpo", copy / "mine")
    info = json.loads((copy / "run.json").read_text())
    info["stages"]["mine"] = dict(info["stages"]["grpo"], no_teacher=True)
    (copy / "run.json").write_text(json.dumps(info))
    monkeypatch.setattr(sys, "argv", ["eval.py", "--run", str(copy), *EVAL, "--rows", "--all"])
    run_script(importlib.import_module("eval").main)
    rows = {row["method"]: row for row in json.loads((copy / "eval" / "results.json").read_text())}
    assert rows["mine"]["rho"] == 0 and "simple_reward is missing; make it" in capsys.readouterr().out
    code, text = fails(monkeypatch, capsys, "eval", "--run", copy, "--rows", "nonsense")
    assert code == 2 and "nonsense" in text and "grpo.py --variant" in text


def test_one_bad_question_does_not_end_an_interactive_session(monkeypatch, capsys, run):
    """Both models would have to be loaded again."""
    monkeypatch.setattr(sys, "argv", ["relay.py", "--run", str(run[0]), "--max-new-tokens", "5", "--interactive"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\n" + "why? " * 1000 + "\n  When?\r\n"))
    run_script(relay_module.main)
    said = capsys.readouterr().out
    assert said.count("by the LLM") == 2 and "context holds" in said and "\nWhen?\n" in said


@pytest.mark.skipif(sys.platform == "win32", reason="one cannot look into a pipe there without waiting")
def test_another_slm_of_the_toy_is_asked_as_the_toy_is_and_an_empty_pipe_is_not_waited_for(monkeypatch, capsys, run):
    """The toy's warm-up was given the sentence for real models, which it has never seen, and wrote noise."""
    asked = []
    monkeypatch.setattr(relay_module, "show", lambda text, slm, llm, tokenizer, args, colour:
                        asked.append((text, args.max_new_tokens)))
    reading, writing = os.pipe()
    with open(reading, encoding="utf-8") as pipe, open(writing, "w", encoding="utf-8"):
        monkeypatch.setattr(sys, "stdin", pipe)
        for more in ([], ["--slm", str(run[0] / "warmup")]):
            monkeypatch.setattr(sys, "argv", ["relay.py", "--run", str(run[0]), *more])
            run_script(relay_module.main)
    assert asked[0] == asked[1] and asked[0][0].endswith("pay?") and "nothing has come" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as POSIX does")
def test_a_full_disk_is_one_line_and_loses_nothing(monkeypatch, run, tmp_path):
    """Hours of training ended in a traceback, with half a model where the last whole checkpoint had been."""
    import resource
    copy = shutil.copytree(run[0], tmp_path / "run")
    flags = ["--run", str(copy), "--variant", "again", *GRPO[2:], "--save-every", "1", "--resume"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))      # bytes: the model does not fit
    first = subprocess.run([sys.executable, HERE / "grpo.py", *flags], capture_output=True, text=True, timeout=170,
                           env=ON_CPU, preexec_fn=limit)
    assert first.returncode == 1 and "Traceback" not in first.stderr
    assert re.search(r"^grpo.py: .*[Tt]oo large", first.stderr.splitlines()[-1])
    there = {path.relative_to(copy): path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    new = {path for path in there if path.parts[0] == "again"}
    assert {path: data for path, data in there.items() if path not in new} == {
        path.relative_to(run[0]): path.read_bytes() for path in run[0].rglob("*") if path.is_file()}
    assert not [path for path in new if path.suffix in (".safetensors", ".part")]
    grpo = importlib.import_module("grpo")
    monkeypatch.setattr(grpo, "hear_signals", lambda handler: None)                    # the handler would stay
    monkeypatch.setattr(sys, "argv", ["grpo.py", *flags])
    run_script(grpo.main)
    assert "again" in json.loads((copy / "run.json").read_text())["stages"]


def test_an_evaluation_may_have_some_rows_only(monkeypatch, capsys, run, tmp_path):
    """Where each row takes an hour, nobody wants all of them."""
    copy = shutil.copytree(run[0], tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["eval.py", "--run", str(copy), *EVAL, "--rows", "warmup"])
    run_script(importlib.import_module("eval").main)
    assert "random_router" in capsys.readouterr().out
    methods = [row["method"] for row in json.loads((copy / "eval" / "results.json").read_text())]
    assert methods == ["slm", "warmup", "relay", "llm", "random_router", "random_router_equal_cost"]


def test_the_next_command_can_be_run_as_it_stands(tmp_path):
    """Real models need --questions too, and a path may have spaces."""
    run = relay_module.Run(tmp_path / "a b")
    run.info["toy"] = False
    assert run.command_line("grpo.py", "--questions", "q 1").endswith("/a b' --questions 'q 1'")
    run.info["toy"] = True
    assert run.command_line("grpo.py", "--questions", "q 1").endswith("/a b'")


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_a_pretraining_that_is_stopped_ends_at_once(tmp_path):
    """Its two processes first trained on to their end."""
    command = [sys.executable, HERE / "warmup.py", "--run", tmp_path / "run", "--slm-steps", "99999"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ON_CPU)
    while "loss=" not in process.stderr.readline():
        assert process.poll() is None
    process.terminate()
    try:
        assert "warmup.py: stopped" in process.communicate(timeout=20)[1] and process.returncode == 1
    finally:
        process.kill()


def test_a_finished_stage_says_so(monkeypatch, capsys, run):
    """The same command again is no mistake."""
    for name, flags in (("warmup", WARMUP), ("grpo", ["--resume"])):
        monkeypatch.setattr(sys, "argv", [name + ".py", "--run", str(run[0]), *flags])
        run_script(importlib.import_module(name).main)
        assert "finished" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# The README

README = (HERE / "README.md").read_text(encoding="utf-8")


def test_the_readme_names_tests_and_places_that_exist():
    """A list of details that points at a renamed test teaches that nobody checks it."""
    tests = "".join(file.read_text(encoding="utf-8") for file in (HERE / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", README)
    assert len(named) >= 24 and not [name for name in named if f"def {name}(" not in tests]
    where = re.findall(r"\| (\w+\.py), ((?:`[\w.]+`(?:, )?)+) \|", README)
    assert len(where) >= 23
    for file, places in where:
        text = (HERE / file).read_text(encoding="utf-8")
        for place in re.findall(r"[\w.]+", places):
            assert re.search(rf"(def|class) {place.split('.')[-1]}\b", text), f"{place} is not in {file}"


def test_the_readme_says_how_long_the_chapters_are():
    """Who plans an evening must be told the truth, also after the next feature."""
    for name in ("model", "data", "relay", "warmup", "grpo", "eval"):
        text = (HERE / f"{name}.py").read_text(encoding="utf-8")
        sections = re.split(r"(?m)^# -{100,}$", text)
        waits = sum(part.count("\n") for part in sections if re.match(r"\n# .*\(skip (it|them) on a first", part))
        said = re.search(rf"\| {name}\.py \|.*\| (\d+) \| (\d+) \|\n", README)
        assert said, name
        assert abs(text.count("\n") - waits - int(said[1])) <= 10 and abs(waits - int(said[2])) <= 10, name


def test_the_worked_groups_of_the_readme_are_what_the_code_computes():
    """Numbers in a text go stale silently."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in README.splitlines() if line.startswith("|")]
    groups = [i for i, row in enumerate(rows) if row[0].endswith(": reward")]
    assert len(groups) == 2
    for i in groups:
        head, reward, advantage = rows[i - 2], rows[i], rows[i + 1]
        right = torch.tensor([cell.startswith("right") for cell in head[1:]])
        rho = torch.tensor([float(cell.split()[-1]) if "rho" in cell else 0.0 for cell in head[1:]])
        got = rewards(right, rho > 0, rho)
        assert got.tolist() == pytest.approx([float(cell) for cell in reward[1:]])
        assert advantages(got).tolist() == pytest.approx([float(cell) for cell in advantage[1:]], abs=0.006)


def test_the_readme_quotes_messages_and_metrics_as_they_are(run):
    """Who searches for a message by its words must find it, and every figure of a step have its meaning."""
    code = "".join(file.read_text(encoding="utf-8") for file in HERE.glob("*.py"))
    code = re.sub(r'"\n\s*f?"', "", code)                              # texts that go on in the next line
    wrong = README.split("## When something goes wrong")[1].split("\n## ")[0]
    messages = [part.strip() for cell in re.findall(r"^\| (.*?) \|", wrong, re.M)
                for text in re.findall("`([^`]+ [^`]+)`", cell) for part in text.split("...") if part.strip()]
    assert len(messages) >= 8 and not [text for text in messages if text not in code]
    metrics = README.split("## The metrics of GRPO")[1].split("\n## ")[0]
    keys = {key for line in (run[0] / "grpo" / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    assert keys == set(re.findall("`([a-z_]+)`", "".join(re.findall(r"^\| (`.*?) \|", metrics, re.M))))
    table = README.split("## The table of eval.py")[1].split("\n## ")[0]
    rows, analysis = (json.loads((run[0] / "eval" / name).read_text()) for name in ("results.json", "analysis.json"))
    keys = {key for row in rows for key in row} | analysis.keys()
    assert {"gap_closed", "threshold"} <= keys and not keys - {"method"} - set(re.findall("`([a-z_0-9]+)`", table))


def test_the_exercises_of_the_readme_name_lines_that_exist():
    """An exercise in a line that is no longer there cannot be done."""
    exercises = re.findall(r"^   - (\w+)\.py, `([\w.]+)`: (?:leave out|write `[^`]+` for) `([^`]+)`[;.]$", README, re.M)
    assert len(exercises) == 7
    for file, place, line in exercises:
        source = inspect.getsource(attrgetter(place)(importlib.import_module(file)))
        assert source.count(line) == 1, place


@pytest.mark.parametrize("name", ["warmup", "grpo", "eval", "relay"])
def test_help_starts_with_an_example_that_the_script_takes(monkeypatch, capsys, name):
    """The first thing that a user copies."""
    with pytest.raises(SystemExit):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
        importlib.import_module(name).main()
    said = capsys.readouterr().out
    assert re.match(rf"usage: python {name}\.py \S", said) and "on which machine:" in said
    flags = set(re.findall(r"--[a-z-]+", said.splitlines()[0]))
    assert flags <= set(re.findall(r"^ +(--[a-z-]+)", said, re.M))


QWEN3 = {  # hidden, ffn, layers, heads, tied: from the published config.json files
    "0.6B": (1024, 3072, 28, 16, True), "1.7B": (2048, 6144, 28, 16, True), "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False), "14B": (5120, 17408, 40, 40, False)}


def test_the_memory_and_the_hours_of_the_readme_are_what_the_functions_say():
    """A table of estimates outlives the function that made it."""
    configs = {name: Config(151936, hidden, ffn, layers, heads, kv_heads=8, head_dim=128, tied=tied)
               for name, (hidden, ffn, layers, heads, tied) in QWEN3.items()}
    args = SimpleNamespace(**REAL | dict(batch=32, max_new_tokens=2000, prompt_tokens=500, train_dtype="float32"))
    lines = re.findall(r"^\| Qwen3-(\S+) / (\S+) \| (.*) \|$", README, re.M)
    assert len(lines) == 4
    half = SimpleNamespace(**dict(vars(args), train_dtype="bfloat16"))
    peaks = [memory_needed(configs[small], configs[large], half)["peak"] / 2**30 for small, large, _ in lines]
    assert "the peaks are {:.1f}, {:.1f}, {:.1f} and {:.1f} GiB".format(*peaks) in README
    for small, large, cells in lines:
        gib = [size / 2**30 for size in memory_needed(configs[small], configs[large], args).values()]
        hours = hours_needed(configs[small], configs[large], args, length=800, rho=0.02)
        hours = [hours["filter"], hours["sampling"] + hours["calls"], hours["learning"], hours["all"]]
        assert [float(cell) for cell in cells.split(" | ")] == pytest.approx(gib + hours, abs=0.06)
