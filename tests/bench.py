"""How fast the relay engine is, beside what people would use instead: one table from one run.

    python tests/bench.py                        random weights of the real shapes
    python tests/bench.py --models FOLDER        real ones: FOLDER/smollm2, FOLDER/qwen0.5b
    python tests/bench.py --rows toy,relay       some of the rows
    python tests/bench.py --quick                every row at a very small size, to see that all of them work

What to read is the ratio: each work and its rival run in turns in one process, each is warmed up first, and the best
of several short repeats counts (of a decoding run: each step's best, so that steps at which a cache grows count too).
Rivals: transformers' generate() (these rows need `pip install transformers`), TRL's GRPOTrainer (`pip install trl`),
and what an engine without one of our techniques would do. A decoding step is timed from token to token, so the reading
of the prompts is no part of it. "bare" is a loop of the model's matrix products and nothing else (same shapes, same
dtype, packed as ours): what is left of it is the price of all the rest. Numbers go to standard output, progress to
standard error.
"""
import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

import relay as engine  # noqa: E402
import grpo  # noqa: E402
from data import Question, Tokenizer, save_toy_tokenizer  # noqa: E402
from model import Cache, Transformer, linear, load, parse_config, prepack, save  # noqa: E402
from needs import parameters  # noqa: E402
from relay import Reader, Rollout, relay, small_models  # noqa: E402
from warmup import TOY_SIZES, adamw, working_copy  # noqa: E402

try:
    import transformers
    from transformers import AutoModelForCausalLM, LogitsProcessorList
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
except ImportError:
    transformers = None

QWEN = dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], vocab_size=151936, max_position_embeddings=32768,
            rope_theta=1e6, rms_norm_eps=1e-6, num_key_value_heads=2)
QWEN3 = dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], vocab_size=151936, max_position_embeddings=40960,
             rope_theta=1e6, rms_norm_eps=1e-6, num_key_value_heads=8, head_dim=128)
SHAPES = {
    "smollm2": dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=49152, hidden_size=576,
                    intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                    head_dim=64, max_position_embeddings=8192, rope_theta=1e5, tie_word_embeddings=True),
    "qwen0.5b": dict(QWEN, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                     tie_word_embeddings=False),
    "slm": dict(QWEN, hidden_size=896, intermediate_size=4864, num_hidden_layers=4, num_attention_heads=14,
                tie_word_embeddings=True),
    "llm": dict(QWEN, hidden_size=1536, intermediate_size=8960, num_hidden_layers=4, num_attention_heads=12,
                tie_word_embeddings=True),
    "qwen3-1.7b": dict(QWEN3, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
                       tie_word_embeddings=True),
    "qwen3-8b": dict(QWEN3, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32),
    "qwen3-32b": dict(QWEN3, hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64),
    "toy": dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], vocab_size=834, max_position_embeddings=512,
                rope_theta=1e4, tie_word_embeddings=True, num_key_value_heads=2, head_dim=16, **TOY_SIZES["slm"]),
}
TEXTS = ["What is the capital of France?", "Tom has 3 boxes of 12 pens and gives away 7. How many pens are left?",
         "Write a short poem about the sea.", "Why is the sky blue?", "List five animals that can swim.",
         "Explain what a prime number is to a child.", "Translate 'good morning' into French and into Spanish.",
         "A train leaves at 9 and arrives at 12, at 80 km an hour. How far does it go, and why?"]
COMMAND = 0      # the token that is a whole command in the tokenizer below


class Numbers:
    """A tokenizer for models that need no text: token 0 is a command that asks for `asked` tokens, nothing ends."""

    def __init__(self, size, asked=20, ends=()):
        self.token_bytes = [engine.command(asked).encode()] + [b" x"] * (size - 1)
        self.known, self.end_ids = [True] * size, set(ends)

    def encode_bytes(self, data):
        return [1] * (len(data) // 2)


class Forced(torch.nn.Module):
    """A model that computes all that it would, and then writes what it is told: the command at each of `calls`."""

    def __init__(self, model, prompts, calls):
        super().__init__()
        self.model, self.config, self.embed = model, model.config, model.embed
        self.hidden_states, self.matrices = model.hidden_states, model.matrices
        self.read = [len(prompt) for prompt in prompts]
        self.calls = calls

    def forward(self, tokens, cache, counts, last):
        logits = self.model(tokens, cache, counts, last)
        for slot in range(len(tokens)):
            written = cache.lengths[slot] - self.read[cache.rows[slot]]
            logits[slot, COMMAND] = 1e4 if written in self.calls else -1e4
        return logits


class Bench:
    """What all rows share: the settings, the models, the clock, the lines of the table."""

    def __init__(self, args):
        self.args, self.lines, self.notes, self.skipped = args, [], [], []
        self.quick, self.device = args.quick, args.device
        self.repeats = 1 if args.quick else 4
        self.native = args.device != "cpu" or torch.cpu._is_avx512_bf16_supported()

    def size(self, n, quick):
        return quick if self.quick else n

    def now(self):
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, work):
        start = self.now()
        work()
        return [self.now() - start]

    def turns(self, *works):
        """Each work returns the seconds of its steps. All are warmed up, then run in turns. Returns for each work the
        mean of its steps' best times."""
        for work in works:
            work()
        runs = [[work() for work in works] for _ in range(self.repeats)]
        return [statistics.mean(min(times) for times in zip(*repeats)) for repeats in zip(*runs)]

    def model(self, name, dtype):
        """(model, its directory or None): the real one where there is one, else random weights of its shape."""
        path = self.args.models and self.args.models / name
        if path and path.is_dir() and not self.quick:
            model = load(path, self.device, dtype)
            prepack(model)
            return model, path
        shape = dict(SHAPES[name])
        if self.quick:
            shape.update(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=300, head_dim=8,
                         num_attention_heads=4, num_key_value_heads=2)
        model = Transformer(parse_config(shape, name)).initialize(0).bfloat16()    # as published: in 16 bits
        model = model.to(self.device, dtype).eval()
        prepack(model)
        return model, None

    def rival(self, model, path):
        """The same weights in transformers."""
        if path is not None:
            other = AutoModelForCausalLM.from_pretrained(path, dtype=model.embed.weight.dtype)
        else:
            with tempfile.TemporaryDirectory() as folder:
                save(model, folder)
                other = AutoModelForCausalLM.from_pretrained(folder, dtype=model.embed.weight.dtype)
        other.generation_config.eos_token_id = None
        return other.to(self.device).eval()

    def prompts(self, model, path, rows):
        """Prompts of different lengths: real questions for a real model."""
        if path is not None:
            tokenizer = Tokenizer(path)
            return [tokenizer.chat(text) for text in TEXTS[:rows]]
        generator = torch.Generator().manual_seed(1)
        return [torch.randint(1, model.config.vocab_size, (20 + i % 20,), generator=generator).tolist()
                for i in range(rows)]

    def bare(self, model, rows):
        """(a work: the bare matrix products of one step; bytes of weights that it reads)."""
        matrices, weights = model.matrices(), [matrix.weight for matrix in model.matrices()]
        inputs = {w.shape[1]: torch.randn(rows, w.shape[1], device=self.device, dtype=w.dtype) for w in weights}

        @torch.inference_mode()
        def products():
            for matrix in matrices:
                linear(matrix, inputs[matrix.weight.shape[1]])
        half = lambda w: isinstance(getattr(w, "packed", None), torch.ScriptObject)          # see prepack()
        return lambda: self.seconds(products), sum(w.numel() * (2 if half(w) else w.element_size()) for w in weights)

    def add(self, work, dtype, ours, rival="", against="", ratio=None, gbs=None, share=None):
        line = (work, str(dtype).removeprefix("torch."), ours, rival, against, "" if ratio is None else f"{ratio:.2f}x",
                "" if gbs is None else f"{gbs:.1f}", "" if share is None else f"{share:.0%}")
        self.lines.append(line)
        print("  ".join(cell for cell in line if cell), file=sys.stderr)

    def print(self):
        head = ("work", "dtype", "ours", "rival", "which is", "ratio", "GB/s", "of bare")
        widths = [max(map(len, column)) for column in zip(head, *self.lines)]
        for line in (head, tuple("-" * width for width in widths), *self.lines):
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
        for note in self.notes:
            print(note)
        if self.skipped:
            print(f"skipped, for want of transformers (pip install transformers): {', '.join(self.skipped)}")


# ---------------------------------------------------------------------------------------------------------------------
# Decoding, beside generate()

def step_times(bench, model, prompts, tokens, temperature):
    """(seconds from each token of row 0 to its next, tokens of all rows) of our engine."""
    times = []
    out = relay(model, None, Numbers(model.config.vocab_size), prompts, max_new_tokens=tokens, temperature=temperature,
                on_token=lambda row, token, by_llm: times.append(bench.now()) if row == 0 else None)
    return [b - a for a, b in zip(times, times[1:])], [o.tokens for o in out]


def generate_times(bench, other, prompts, tokens, temperature):
    """The same of generate(), with left padding."""
    times, width = [], max(map(len, prompts))

    def note_time(ids, scores):
        times.append(bench.now())
        return scores

    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=bench.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=bench.device)
    sampling = dict(do_sample=False)
    if temperature:
        sampling = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    torch.backends.cuda.enable_cudnn_sdp(True)           # its own choice; we do without (see relay.machine)
    out = other.generate(ids, attention_mask=mask, max_new_tokens=tokens, pad_token_id=0, repetition_penalty=1.0,
                         logits_processor=LogitsProcessorList([note_time]), **sampling)
    torch.backends.cuda.enable_cudnn_sdp(False)
    return [b - a for a, b in zip(times, times[1:])], out[:, width:].tolist()


def decode(bench, work, name, rows, tokens, temperature=0.0):
    """One line for each dtype: a decoding step of `rows` rows."""
    if transformers is None:
        bench.skipped.append(work)
        return
    for dtype in (torch.float32, torch.bfloat16):
        if name == "toy" and dtype == torch.bfloat16 and bench.device == "cpu":
            continue                                     # so small a model has nothing to gain from it
        model, path = bench.model(name, dtype)
        other, prompts, wrote = bench.rival(model, path), bench.prompts(model, path, rows), {}

        def ours():
            seconds, wrote["ours"] = step_times(bench, model, prompts, tokens, temperature)
            return seconds

        def theirs():
            seconds, wrote["theirs"] = generate_times(bench, other, prompts, tokens, temperature)
            return seconds

        products, size = bench.bare(model, rows)
        mine, rival, bare = bench.turns(ours, theirs, products)
        bench.add(work, dtype, f"{rows / mine:.1f} tokens/s", f"{rows / rival:.1f} tokens/s", "generate", rival / mine,
                  size / mine / 1e9, bare / mine)
        if temperature == 0:
            same = [a == b for x, y in zip(wrote["ours"], wrote["theirs"]) for a, b in zip(x, y)]
            bench.notes.append(f"{work}, {str(dtype)[6:]}: {sum(same) / len(same):.0%} of the greedy tokens are "
                               "generate's")
        model = other = products = None                  # before those of the next dtype are there


def smollm2(bench):
    decode(bench, "decode SmolLM2-135M, 1 row", "smollm2", 1, bench.size(32, 4))


def ragged(bench):
    decode(bench, "decode SmolLM2-135M, 8 ragged rows", "smollm2", 8, bench.size(20, 4))


def qwen(bench):
    decode(bench, "decode Qwen2.5-0.5B, 1 row", "qwen0.5b", 1, bench.size(16, 4))


def toy(bench):
    threads = torch.get_num_threads()
    small_models()                                       # as the scripts do for the toy; the rival profits as much
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        decode(bench, f"decode toy SLM, 256 rows, threads: {count}", "toy", bench.size(256, 8), bench.size(64, 4), 1.0)
    torch.set_num_threads(threads)


def bandwidth(bench):
    """On a GPU: one row's decoding step, beside what its memory allows (a large copy's bytes, read and written)."""
    block = torch.empty(bench.size(2**30, 2**20), dtype=torch.int32, device=bench.device)
    other = torch.empty_like(block)
    limit = 2 * block.nbytes / bench.turns(lambda: bench.seconds(lambda: other.copy_(block)))[0]
    bench.notes.append(f"bandwidth: a copy moves {limit / 1e9:,.0f} GB/s")
    block = other = None                                 # gives the memory back
    for name in ("qwen0.5b", "qwen3-1.7b", "qwen3-8b", "qwen3-32b"):
        model = on_device(bench, name, torch.bfloat16)
        prompt = [bench.prompts(model, None, 1)[0]]

        def ours():
            return step_times(bench, model, prompt, bench.size(100, 12), 0.7)[0]

        products, size = bench.bare(model, 1)
        mine, bare = bench.turns(ours, products)
        bench.add(f"decode {name}'s shape, 1 row", torch.bfloat16, f"{1 / mine:.1f} tokens/s",
                  f"{limit / size:.1f} tokens/s", "its weights at the speed of a copy", size / mine / limit,
                  size / mine / 1e9, bare / mine)
        model = products = None


def on_device(bench, name, dtype):
    """A model of random weights, drawn on the GPU: on the CPU it would take minutes."""
    with torch.device(bench.device):
        torch.set_default_dtype(dtype)
        model = Transformer(parse_config(SHAPES["toy" if bench.quick else name], name)).eval()
        torch.set_default_dtype(torch.float32)
    model.embed.weight.data.normal_(std=0.05)
    return model


def scale(bench):
    """On a GPU, the paper's pair: decoding at a context of 1,000 tokens, reading, learning; what tests/needs.py takes.

    bytes: all weights and caches, once a step. operations: two a parameter and token forward, four backward; recomputed
    layers and the reference's forward pass count too, attention's own products do not.
    """
    context, length = bench.size(1000, 20), bench.size(800, 20)
    for name, dtype in (("qwen3-8b", torch.bfloat16), ("qwen3-1.7b", torch.float32)):
        model = None
        model = on_device(bench, name, dtype)
        count, known = parameters(model.config), torch.ones(model.config.vocab_size, dtype=torch.bool).to(bench.device)
        for rows in bench.size((32, 128), (2,)):
            cache, ids = Cache(model), [1] * rows

            @torch.inference_mode()
            def step():
                nonlocal ids
                logits = model(torch.tensor(ids, device=bench.device)[:, None], cache, last=True)
                ids = engine.sample(engine.log_softmax(logits, known, 0.7), [0.5] * rows, 0.7).tolist()

            cache.arrange(list(range(rows)))
            cache.resize(rows, context)
            cache.lengths = [context] * rows
            seconds = min(sum((bench.seconds(step) for _ in range(bench.size(30, 6))), []))
            held = rows * context * 2 * model.config.layers * model.config.kv_heads * model.config.head_dim
            moved = (count + held) * model.embed.weight.element_size()
            bench.add(f"decode {name}'s shape, {rows} rows at {context}", dtype, f"{rows / seconds:.0f} tokens/s",
                      gbs=moved / seconds / 1e9)
        cache = None
        tokens = torch.ones(8, context, dtype=torch.long, device=bench.device)
        with torch.inference_mode():
            seconds, = bench.turns(lambda: bench.seconds(lambda: model.hidden_states(tokens)))
        bench.add(f"read, {name}'s shape", dtype, f"{tokens.numel() / seconds:,.0f} tokens/s", "",
                  f"{2 * count * tokens.numel() / seconds / 1e12:.0f} TFLOP/s")
    reference, args = on_device(bench, "qwen3-1.7b", torch.float32), SimpleNamespace(
        micro_tokens=4096, temperature=1.0, clip_low=0.2, clip_high=0.3, kl=0.01, loss="token",
        llm_tokens_in_loss=False)
    model.checkpointing, optimizer = True, adamw(model, 1e-6)
    written = [Rollout([1 + i % 4] * (length // 4), list(range(length)), [False] * length, [-9.0] * length)
               for i in range(32)]
    seconds, = bench.turns(lambda: bench.seconds(lambda: grpo.update(
        model, reference, optimizer, written, torch.randn(32), known, 1e-6, args)))
    learned = 32 * length + 4 * (length // 4)            # each of the four prompts is read once
    bench.add("learn, qwen3-1.7b's shape", torch.float32, f"{32 * length / seconds:,.0f} tokens/s", "",
              f"{10 * count * learned / seconds / 1e12:.0f} TFLOP/s")


# ---------------------------------------------------------------------------------------------------------------------
# The relay, beside re-sending

class ReSending(Reader):
    """An LLM that keeps nothing between its turns: at each call it reads the row's whole context again.

    It shares all else with ours, the reading of equal prompts once in a turn included.
    """

    def feed(self, row, tokens, own=False):
        if not own and self.texts[row].cached:
            text = self.texts[row]
            self.drop([row])
            self.texts[row], text.cached = text, 0
        super().feed(row, tokens, own)


class ReSendingEach(ReSending):
    """And reads it for each roll-out of a question, as a server without a prefix cache does."""

    def read_prompts(self, new):
        pass


def started(reader, prompts):
    """A Reader, with these prompts as its rows."""
    for row, prompt in enumerate(prompts):
        reader.begin(row, prompt)
    return reader


def relay_row(bench):
    """4 questions x 8 roll-outs, three calls of 20 tokens each, contexts of about 1,000 tokens."""
    questions, group, size = bench.size(4, 2), bench.size(8, 2), bench.size(950, 20)
    calls, asked, gap = 3, bench.size(20, 3), 6
    budget = calls * (gap + 1 + asked) + gap
    for dtype in (torch.float32, torch.bfloat16) if bench.native else (torch.float32,):
        (slm, _), (llm, _) = bench.model("slm", dtype), bench.model("llm", dtype)
        generator = torch.Generator().manual_seed(2)
        prompts = [torch.randint(1, slm.config.vocab_size, (size,), generator=generator).tolist()
                   for _ in range(questions) for _ in range(group)]
        prompts = [prompts[i - i % group] for i in range(len(prompts))]
        writer = Forced(slm, prompts, [gap + i * (gap + 1 + asked) for i in range(calls)])
        helper = Forced(llm, prompts, ())                # never writes a command

        def once(reader):
            """Seconds of one relay whose LLM is read by this kind of Reader."""
            engine.Reader = lambda model: (reader if model is helper else Reader)(model)
            start = bench.now()
            out = relay(writer, helper, Numbers(slm.config.vocab_size, asked), prompts, max_new_tokens=budget)
            engine.Reader = Reader
            assert all(len(o.calls) == calls and sum(o.by_llm) == calls * asked for o in out)
            return bench.now() - start

        rivals = {ReSendingEach: "re-sending at each call", ReSending: "the same, prompts read once"}
        total, seconds = len(prompts) * budget, {reader: [] for reader in (Reader, *rivals)}
        relay(slm, llm, Numbers(slm.config.vocab_size), prompts[:2], max_new_tokens=4)
        for _ in range(1 if bench.device == "cpu" else bench.repeats):     # half a minute and more each on a CPU: long
            for reader in seconds:                                         # enough to need no repeats
                seconds[reader].append(once(reader))
        mine = min(seconds[Reader])
        for reader, name in rivals.items():
            rival = min(seconds[reader])
            bench.add(f"relay, {questions} x {group} roll-outs, {calls} calls", dtype, f"{total / mine:.1f} tokens/s",
                      f"{total / rival:.1f} tokens/s", name, rival / mine)


def handoff(bench):
    """One hand-off: the LLM gets the SLM's last 20 tokens and writes its first."""
    for dtype in (torch.float32, torch.bfloat16) if bench.native else (torch.float32,):
        llm, _ = bench.model("llm", dtype)
        costs = {}
        for size in bench.size((250, 500, 1000, 2000), (40, 80)):
            generator = torch.Generator().manual_seed(size)
            text = torch.randint(1, llm.config.vocab_size, (size + 20 * 20,), generator=generator).tolist()
            kept = started(Reader(llm), [text[:size - 20]])

            @torch.inference_mode()
            def hand_off():
                kept.feed(0, text[len(kept.texts[0].tokens):][:20])
                return bench.seconds(lambda: kept.step([0]))

            @torch.inference_mode()
            def re_send():
                return bench.seconds(lambda: started(ReSendingEach(llm), [text[:size]]).step([0]))

            kept.step = torch.inference_mode()(kept.step)
            kept.step([0])
            costs[size] = mine, rival = bench.turns(hand_off, re_send)
            bench.add(f"hand-off of 20 tokens at {size}", dtype, f"{mine * 1e3:.0f} ms", f"{rival * 1e3:.0f} ms",
                      "re-sending", rival / mine)
        first, last = min(costs), max(costs)
        ours, rival = (b / a for a, b in zip(costs[first], costs[last]))
        bench.notes.append(f"hand-off, {str(dtype)[6:]}: from {first} to {last} tokens of context, the cost grows "
                           f"{ours:.2f}x, of re-sending {rival:.1f}x")


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and memory

def megabytes(cache):
    return sum(kv.numel() * kv.element_size() for kv in cache.layers) / 1e6


def prompt(bench):
    """The first step of G = 8 roll-outs: one question eight times, or eight questions."""
    model, _ = bench.model("slm", torch.float32)
    group, size, last = 8, bench.size(500, 20), {}
    generator = torch.Generator().manual_seed(3)
    texts = torch.randint(1, model.config.vocab_size, (group, size), generator=generator).tolist()

    @torch.inference_mode()
    def first_step(name, prompts):
        reader = last[name] = started(Reader(model), prompts)
        return bench.seconds(lambda: reader.step(list(range(group))))

    mine, rival = bench.turns(lambda: first_step("one", [texts[0]] * group), lambda: first_step("eight", texts))
    read = {name: sum(sum(reader.cost(row)) for row in range(group)) for name, reader in last.items()}
    bench.add(f"prompt of {size} tokens, G = {group}", torch.float32,
              f"{mine * 1e3:.0f} ms, {read['one']} tokens read", f"{rival * 1e3:.0f} ms, {read['eight']} tokens read",
              f"{group} separate prompts", rival / mine)
    bench.notes.append(f"prompt: a cache of {megabytes(last['one'].cache):.1f} MB, for separate prompts "
                       f"{megabytes(last['eight'].cache):.1f} MB (each roll-out owns its copy)")


def memory(bench):
    """The cache of roll-outs that end at random, at every step beside live rows x their longest."""
    model, _ = bench.model("toy", torch.float32)
    rows, tokens, seen = bench.size(64, 8), bench.size(400, 20), []

    class Watched(Reader):
        def read(self, *args, **options):
            out = super().read(*args, **options)
            cache = self.cache
            per_token = 2 * model.config.kv_heads * model.config.head_dim * model.config.layers * 4 / 1e6
            seen.append((megabytes(cache), len(cache.rows) * max(cache.lengths) * per_token))
            return out

    engine.Reader = Watched
    relay(model, None, Numbers(model.config.vocab_size, ends=(1, 2, 3)), bench.prompts(model, None, rows),
          max_new_tokens=tokens, temperature=1.0)
    engine.Reader = Reader
    most, needed = (max(column) for column in zip(*seen))
    mean = sum(held for held, _ in seen) / sum(need for _, need in seen)
    bench.add(f"memory of a cache, {rows} rows", torch.float32, f"{most:.2f} MB at most", f"{needed:.2f} MB at most",
              "live rows x longest row")
    bench.notes.append(f"memory: {mean:.2f} times what the live rows need, on average over all steps")


def places(bench):
    """Roll-outs that end at random, more than are decoded at once: beside batches that each run until their last ends.
    """
    model, _ = bench.model("toy", torch.float32)
    prompts, size = bench.prompts(model, None, bench.size(512, 8)), bench.size(64, 2)
    options = dict(max_new_tokens=bench.size(400, 20), temperature=1.0)
    seeds, numbers = [(0, i) for i in range(len(prompts))], Numbers(model.config.vocab_size, ends=(1, 2, 3))
    lengths = []

    def renewed():
        outs = relay(model, None, numbers, prompts, seed=seeds, batch=size, **options)
        lengths.append(sum(len(o.tokens) for o in outs))

    def sliced():
        for i in range(0, len(prompts), size):
            relay(model, None, numbers, prompts[i:i + size], seed=seeds[i:i + size], **options)

    mine, rival = bench.turns(lambda: bench.seconds(renewed), lambda: bench.seconds(sliced))
    bench.add(f"{len(prompts)} roll-outs in {size} places", torch.float32, f"{lengths[0] / mine:,.0f} tokens/s",
              f"{lengths[0] / rival:,.0f} tokens/s", "batch after batch", rival / mine)


# ---------------------------------------------------------------------------------------------------------------------
# Exactness

def flips(bench):
    """How often a sampled token is another one in a batch than alone, where the text before it is the same."""
    for name, rows, tokens in (("smollm2", 8, bench.size(40, 4)), ("toy", bench.size(64, 4), bench.size(64, 4))):
        for dtype in (torch.float32, torch.bfloat16):
            model, path = bench.model(name, dtype)
            prompts, options = bench.prompts(model, path, rows), dict(max_new_tokens=tokens, temperature=0.7)
            tokenizer = Numbers(model.config.vocab_size)
            together = relay(model, None, tokenizer, prompts, seed=1, **options)
            flipped = compared = 0
            for i, (text, other) in enumerate(zip(prompts, together)):
                alone, = relay(model, None, tokenizer, [text], seed=[(1, i)], **options)
                pairs = list(zip(alone.tokens, other.tokens))
                first = next((k for k, (a, b) in enumerate(pairs) if a != b), None)
                flipped += first is not None
                compared += len(pairs) if first is None else first + 1
            bench.add(f"tokens that flip between 1 and {rows} rows, {name}", dtype, f"{flipped} of {compared}")


# ---------------------------------------------------------------------------------------------------------------------
def learning(bench):
    """The peak of learning from 16 roll-outs of 512 tokens, beside weights, gradients and optimizer state."""
    threads = torch.get_num_threads()
    from test_grpo import memory_of_updates                       # needs pytest, and takes one thread for the tests
    torch.set_num_threads(threads)
    shape = dict(SHAPES["toy"]) if bench.quick else dict(SHAPES["qwen0.5b"], tie_word_embeddings=True)
    config, size = parse_config(shape, "qwen0.5b"), 16 * parameters(parse_config(shape, "qwen0.5b"))
    peak, said = memory_of_updates(config, 16, bench.size(512, 32), bench.device, micro_tokens=4096,
                                   checkpointing=True)
    bench.add("learning step, Qwen 0.5B shape, 16 x 512", torch.float32, f"{peak / 2**30:.1f} GiB at most",
              f"{size / 2**30:.1f} GiB", "policy, gradient, Adam")
    bench.notes.append(f"learning step: {peak / size:.2f} times policy, gradient and Adam's averages (the reference "
                       f"alone is 0.25); memory_needed() says {said / 2**30:.1f} GiB")


# A step of GRPO, beside TRL

def our_steps(folder, device, questions, group, tokens, steps, dtype):
    """Seconds of (sampling, learning) of each step; half of all answers count as right, so that there is a gradient."""
    master, reference, tokenizer = load(folder, device), load(folder, device, dtype), Tokenizer(folder)
    optimizer = adamw(master, 1e-6)
    policy = working_copy(master, optimizer, str(dtype).removeprefix("torch."))
    spare = policy.config.vocab_size - len(tokenizer.known)        # random weights have the toy's tokenizer, with fewer
    tokenizer.known += [True] * spare                              # ids: all are sampled, as the rival does
    tokenizer.token_bytes += [b" x"] * spare
    args = SimpleNamespace(
        group=group, max_new_tokens=tokens, temperature=1.0, llm_temperature=0.7, batch=256, seed=0,
        reward="difficulty", updates=1, skip_equal=False, scale_by_std=True, std_floor=0.0, rho_asked=False,
        batch_scenarios=False, clip_low=0.2, clip_high=0.3, kl=0.01, loss="token", llm_tokens_in_loss=False,
        micro_tokens=3000)
    right, grpo.is_right = grpo.is_right, lambda question, rollout, tokenizer: sum(rollout.tokens) % 2 == 0
    known = torch.tensor(tokenizer.known, device=device)
    try:
        asked = [Question(text, "1") for text in questions]
        metrics = [grpo.train_step(step, asked, policy, reference, None, tokenizer, optimizer, known, 1e-6, args)[0]
                   for step in range(steps)]
    finally:
        grpo.is_right = right
    return [(m["sample_seconds"], m["learn_seconds"]) for m in metrics]


def trl_steps(folder, device, questions, group, tokens, steps, bf16):
    """Seconds of each step of TRL's GRPOTrainer with the same model, questions, group, length, KL and rewards.

    bf16: its mixed precision, float32 weights with products in bfloat16.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    seconds = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *args, **options):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **options):
            seconds.append(time.perf_counter() - self.start)

    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out, per_device_train_batch_size=len(questions) * group, num_generations=group, max_steps=steps,
            max_completion_length=tokens, learning_rate=1e-6, beta=0.01, temperature=1.0, use_cpu=device == "cpu",
            bf16=bf16, gradient_checkpointing=False, report_to=[], save_strategy="no", logging_steps=1000,
            disable_tqdm=True)
        rows = [dict(prompt=[dict(role="user", content=text)]) for text in questions] * steps
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), args=config, callbacks=[Clock()],
            train_dataset=Dataset.from_list(rows), processing_class=transformers.AutoTokenizer.from_pretrained(folder),
            reward_funcs=lambda completion_ids, **rest: [float(sum(ids) % 2 == 0) for ids in completion_ids])
        trainer.train()
    return seconds


def grpo_row(bench):
    """Both in float32 (on CUDA with products in TF32, as our scripts) and, where the hardware has bfloat16, with
    products in that; no calls. TRL samples with generate(), not with vLLM."""
    if transformers is None or importlib.util.find_spec("trl") is None:
        bench.notes.append("the row grpo needs trl (pip install trl)")
        return
    works = [("toy SLM", "toy", 16, 16, 64), ("SmolLM2-135M", "smollm2", 2, 8, 64)]
    if bench.device != "cpu":
        works.append(("Qwen3-1.7B's shape", "qwen3-1.7b", 4, 8, 256))
    for work, model, *sizes in works[:bench.size(3, 1)]:
        n, group, tokens = bench.size(sizes, (2, 4, 8))
        with tempfile.TemporaryDirectory() as made:
            path = bench.args.models and bench.args.models / model
            if not path or not path.is_dir():
                path = made
                save_toy_tokenizer(made)
                save(on_device(bench, model, torch.bfloat16), made)
            asked = [f"Dan buys {i + 2} lutes and a basket for 5 coins. How many coins does Dan pay?" for i in range(n)]
            what, work = (asked, group, tokens, bench.size(4, 2)), f"GRPO step, {work}, {n} x {group} x {tokens}"
            for dtype in [torch.float32, torch.bfloat16] if bench.native else [torch.float32]:
                # the first step does not count: no policy has learnt before it
                ours = min(our_steps(path, bench.device, *what, dtype)[1:], key=sum)
                theirs = min(trl_steps(path, bench.device, *what, bf16=dtype == torch.bfloat16)[1:])
                bench.add(work, dtype, f"{sum(ours):.2f} s", f"{theirs:.2f} s", "TRL", theirs / sum(ours))
                bench.notes.append(f"{work}, {dtype}: sampling {ours[0]:.2f} s, learning {ours[1]:.2f} s")


ROWS = dict(grpo=grpo_row, smollm2=smollm2, ragged=ragged, qwen=qwen, toy=toy, bandwidth=bandwidth, scale=scale,
            relay=relay_row, handoff=handoff, prompt=prompt, memory=memory, places=places,
            learning=learning, flips=flips)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", type=Path, metavar="FOLDER", help="real checkpoints: FOLDER/smollm2, FOLDER/qwen0.5b")
    p.add_argument("--rows", default=",".join(name for name in ROWS if name not in ("learning", "bandwidth", "scale")),
                   help=f"which rows, with commas between: {', '.join(ROWS)} (all but learning: 13 GB, 10 minutes; and "
                        "bandwidth, scale: a GPU of 80 GB)")
    p.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    p.add_argument("--device", default="cpu", help="cpu, cuda (cpu)")
    p.add_argument("--quick", action="store_true", help="very small sizes, to see that every row works")
    args = p.parse_args()
    chosen = args.rows.split(",")
    if unknown := [name for name in chosen if name not in ROWS]:
        p.error(f"no such row: {', '.join(unknown)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cuda.enable_cudnn_sdp(False)
    bench, start = Bench(args), time.perf_counter()
    for name in chosen:                                  # training in TF32 on CUDA, as in the scripts
        tf32 = args.device != "cpu" and name in ("grpo", "scale")
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        ROWS[name](bench)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}, bfloat16 "
          f"{'in hardware' if bench.native else 'not in hardware'}, {time.perf_counter() - start:.0f} s")
    bench.print()


if __name__ == "__main__":
    main()
