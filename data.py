"""Chapter 2. Text in, tokens out; answers in, right or wrong out.

Three things stand between a language model and a benchmark:

1. A tokenizer. Byte-level BPE: text is normalised (NFC, for Qwen), cut into pieces by regular expressions (words,
   numbers, runs of spaces), and in each piece bytes are merged pair by pair, the earliest-learnt merge first, until
   no merge applies. `Tokenizer` reads all of that from a checkpoint's tokenizer.json, lets `regex` do the cutting and
   tiktoken the merging, and gives token for token what the transformers library gives.
2. A chat format. An instruction-tuned model expects a question wrapped as in its training: `<|im_start|>user\\n...`.
   Checkpoints carry a program (a Jinja template) for that. We run no programs of strangers: we recognise which of a
   few known formats it is, and write that format ourselves. What the user says stays text, also where it spells a
   special token, so that a question cannot end its own turn.
3. Questions and a grader. Every benchmark has its own layout, and an answer can be written in many ways: 1/2, 0.5,
   \\frac12, 50\\%. `load_questions` brings the first to one shape, `grade` compares the second by value: by evaluating
   both sides (a formula at fixed points), never by running what a model wrote as code.

The toy's questions come first: the other chapters train on them. Left out: SentencePiece (none of our families needs
it), template engines (programs of strangers), and a judge (one more model's opinion).
"""
import cmath
import hashlib
import itertools
import json
import math
import operator
import random
import re
import reprlib
import unicodedata
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import regex  # tiktoken's own dependency: \p{L}, and no stack to overflow on a long run of one character
import tiktoken

from model import naming, need, read_json

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

# ---------------------------------------------------------------------------------------------------------------------
# Questions, and the toy's: shopping problems whose prices are facts

@dataclass(frozen=True)
class Question:
    """A question as the user asks it, and its gold answer; the toy's carry more."""
    text: str
    answer: str
    kind: str = ""        # toy: common, rare or unseen (a rare one that only pretraining learns from); else a subject
    solution: str = ""    # toy: a worked solution
    fact: str = ""        # the text of the fact that the small model lacks
    strict: bool = False  # the response must end by its end-of-text token right after the answer


COMMON = ("apple bag bell book boot bowl broom cake candle card chair comb cup desk door drum fan fig fork hat jar "
          "key lamp mat mug nail pan pen pin pot rug spoon").split()
RARE = ("zither lute sextant quill kimono tuba gong bonsai harp zodiac puzzle mosaic trident sundial monocle goblet "
        "fresco lantern cameo gavel parasol rapier talisman tapestry tiara turban veil violin wig yurt zeppelin "
        "crown").split()
UNSEEN = {"trident", "gavel", "veil", "yurt"}    # rare things of pretraining, never learned from in warm-up and GRPO
PEOPLE = "Amy Ann Ben Bob Dan Eva Fay Gus Ian Joe Kim Lea Leo Liz Max Mia Ned Pam Ray Rob Sam Sue Tom Zoe".split()

_facts = random.Random("facts")    # the same for every --seed
PRICE = {item: _facts.randint(3, 26) for item in COMMON + RARE}


def toy_question(rng, rare, unreliable=False):
    """One shopping problem, about a rare thing or a common one. unreliable: a rare thing's price is made up."""
    who, k, item = rng.choice(PEOPLE), rng.randint(2, 3), rng.choice(RARE if rare else COMMON)
    price = rng.randint(3, 26) if rare and unreliable else PRICE[item]
    total = k * price
    steps = f"Let us see what that costs in all. One costs {price} coins. So {k} cost {k} * {price} = {total} coins."
    extra = rng.randint(2, 5)
    if rng.random() < 0.5:
        text, answer = f"{who} buys {k} {item}s with a coupon for {extra} coins.", total - extra
        steps += f" The coupon takes {extra} coins off. {total} - {extra} = {answer}."
    else:
        text, answer = f"{who} buys {k} {item}s and a basket for {extra} coins.", total + extra
        steps += f" The basket adds {extra} coins. {total} + {extra} = {answer}."
    kind = "common" if not rare else "unseen" if item in UNSEEN else "rare"
    return Question(f"{text} How many coins does {who} pay?", str(answer), kind,
                    f"{steps} The answer is \\boxed{{{answer}}}", f" {price}" if rare else "", strict=True)


def split_of(text):
    """The split that a question belongs to, by a hash of its text, so that splits are disjoint for any two seeds."""
    percent = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 100
    return "train" if percent < 80 else "held_out" if percent < 90 else "eval"


def toy_questions(split, rng, rare=0.5, unseen=True, unreliable=False):
    """An endless stream of toy questions of one split: "train", "held_out" (for checks, thresholds) or "eval".

    rare: the share that names a rare thing. unseen=False leaves out the facts that warm-up and GRPO may not see.
    """
    while True:
        question = toy_question(rng, rng.random() < rare, unreliable)
        if split_of(question.text) == split and (unseen or question.kind != "unseen"):
            yield question


def with_asides(ids, tokenizer, rng, share):
    """Markup asides, such as <b>7</b>, at one to three random positions of a share of the texts.

    ids: the tokens of a text. Returns (ids, learn): learn[i] is False for an aside's first token, which nothing before
    it announces. Every real model has seen its text interrupted; one that has not is ruined by the warm-up.
    """
    out, learn = list(ids), [True] * len(ids)
    if rng.random() < share:
        for at in sorted(rng.sample(range(len(ids) + 1), rng.randint(1, 3)), reverse=True):
            tag = rng.choice("biqsu")
            aside = tokenizer.encode(f"<{tag}>{rng.randint(1, 99)}</{tag}>")
            out[at:at] = aside
            learn[at:at] = [False] + [True] * (len(aside) - 1)
    return out, learn


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer (skip it on a first reading)

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-2 writes each byte as one printable letter, so that a vocabulary is readable JSON: space is Ġ, newline Ċ.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_OF = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(HIDDEN)}
LETTERS = sorted(BYTE_OF, key=BYTE_OF.get)


class Tokenizer:
    """The byte-level BPE tokenizer and the chat format of a model directory in the Hugging Face layout.

    token_bytes[id]: the bytes of a token; of an added (special) token its text; b"" for an id that nobody has.
    known[id]: whether the tokenizer has that id. The model's logits may be wider than this list.
    end_ids: all ids that end a text; end_id: the one that ends an assistant's turn.
    Raises ValueError, one line that names the file and the fault, for anything missing, broken or not supported.
    """

    def __init__(self, path):
        path = Path(path)
        self._file = path / "tokenizer.json"
        old = " (a SentencePiece tokenizer.model is not supported)" if (path / "tokenizer.model").exists() else ""
        need(self._file.exists(), f"{self._file}: missing; a byte-level BPE tokenizer is needed{old}")
        spec = read_json(self._file)
        settings = read_json(path / "tokenizer_config.json", {})
        with naming(self._file):
            normalizer = spec.get("normalizer")
            normalizer = normalizer.get("type") if isinstance(normalizer, dict) else normalizer
            need(normalizer in (None, "NFC"), f"normalizer {normalizer!r} is not supported (only NFC is)")
            self._splits = self._read_splits(spec.get("pre_tokenizer"))
            self._read_vocabulary(spec.get("model"), spec.get("added_tokens") or [])
        # transformers gives Qwen its NFC even where a converted tokenizer.json has lost it
        self._nfc = normalizer == "NFC" or str(settings.get("tokenizer_class")).startswith("Qwen2Tokenizer")
        self._read_chat(path, settings)

    def _read_splits(self, spec):
        """The pre-tokenizer as a list of patterns, applied in turn: each cuts out its matches and what lies between."""
        parts = spec["pretokenizers"] if isinstance(spec, dict) and spec.get("type") == "Sequence" else [spec]
        splits = []
        for part in parts:
            match part:
                case {"type": "Digits"}:
                    pattern = r"\p{N}" if part.get("individual_digits") else r"\p{N}+"
                case {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": str(pattern)}}:
                    pass
                case {"type": "ByteLevel", "add_prefix_space": False} if part is parts[-1]:
                    if not part.get("use_regex", True):  # it cuts nothing
                        continue
                    pattern = GPT2_SPLIT
                case _:
                    need(False, f"pre-tokenizer {reprlib.repr(part)} is not supported (Digits, an Isolated Split and, "
                                "at the end, ByteLevel without add_prefix_space are)")
            try:
                splits.append(regex.compile(pattern))
            except (regex.error, RecursionError) as error:
                need(False, f"pre-tokenizer pattern {pattern[:40]!r} cannot be read ({error})")
        need(parts and parts[-1]["type"] == "ByteLevel", "a pre-tokenizer without ByteLevel is not supported")
        return splits

    def _read_vocabulary(self, model, added):
        """Ids, bytes and merges, checked, and made into tiktoken's ranks."""
        model = model if isinstance(model, dict) else {"type": None}
        vocab, merges, kind = model.get("vocab"), model.get("merges"), model.get("type", "BPE")
        need(kind == "BPE" and isinstance(vocab, dict) and isinstance(merges, list),
             f"model type {kind!r} is not BPE, or its vocab or merges are missing or of the wrong type")
        for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout"):
            need(not model.get(key), f"model.{key} is not supported")
        need(isinstance(added, list) and all(isinstance(token, dict) and isinstance(token.get("content"), str)
                                             and token["content"] for token in added), "an added token has no content")
        self._added = {token["content"]: token.get("id") for token in added}  # text -> id
        plain = {token: i for token, i in vocab.items() if token not in self._added}
        ids = plain | self._added
        need(all(type(i) is int and 0 <= i < 2**22 for i in ids.values()), "a token's id is no number below 2^22")
        self.token_bytes = [b""] * (max(ids.values(), default=-1) + 1)
        self.known = [False] * len(self.token_bytes)
        for token, i in ids.items():
            need(not self.known[i], f"two tokens share the id {i}")
            need(token in self._added or BYTE_OF.keys() >= set(token),
                 f"token {i} ({token[:20]!r}) is not made of bytes: not a byte-level BPE")
            self.token_bytes[i] = token.encode() if token in self._added else bytes(BYTE_OF[c] for c in token)
            self.known[i] = True
        tokens = LETTERS + self._read_merges(merges, plain)
        self._ranks = {bytes(BYTE_OF[c] for c in token): rank for rank, token in enumerate(tokens)}
        self._bpe = tiktoken.Encoding("bpe", pat_str="", mergeable_ranks=self._ranks, special_tokens={})
        self._id_of_rank = [plain.get(token) for token in tokens]
        self._lacks = bytes(b for b in range(256) if self._id_of_rank[b] is None)  # SmolLM2 has no 0x1d
        need(not self._lacks or model.get("unk_token") is None, "unk_token with missing bytes is not supported")
        # Llama 3: a piece that is a token needs no merges
        self._whole = {self.token_bytes[i]: i for i in plain.values()} if model.get("ignore_merges") else {}

    def _read_merges(self, merges, plain):
        """The tokens that a list of merges can make, in tiktoken's order.

        tiktoken merges any two neighbours that together are a token, Hugging Face only the pairs of its list; both the
        lowest rank first, the leftmost among equals. Inside a stretch of bytes whose borders no merge has crossed the
        merges are those of the stretch alone, so a token always arises from one and the same last pair: the two agree
        once tiktoken is given just the tokens whose last pair is in the list, in its order.
        """
        pairs = {}  # (left, right) -> place in the list
        for place, pair in enumerate(merges):
            match pair.split(" ") if isinstance(pair, str) else pair:
                case [str(left), str(right)] if {left, right, left + right} <= plain.keys():
                    pairs[left, right] = place
                case _:
                    need(False, f"merge {place} is not a pair of tokens that make a token")
        return [left + right for left, right in sorted(pairs, key=pairs.get)
                if last_pair(left + right, pairs) == (left, right)]

    def _read_chat(self, path, settings):
        """self._chat: (text before the user's, text after it, strip the user's), or why there is none.

        end_ids, end_id: the format's end of turn first, then what generation_config.json and config.json name.
        """
        file = path / "chat_template.jinja"
        template = file.read_text("utf-8", errors="replace") if file.is_file() else settings.get("chat_template")
        self._chat, end_of_turn = chat_format(str(template or ""))
        if template is None:
            self._chat = f"{path}: no chat template (chat_template.jinja, tokenizer_config.json): use an instruct model"
        elif self._chat is None:
            self._chat = f"{path}: its chat template is not one of Qwen2, Qwen3, SmolLM2, Llama 3 or plain ChatML"
        elif end_of_turn not in self._added:
            self._chat = f"{self._file}: lacks {end_of_turn}, which the chat template needs"

        ends = [self._added[end_of_turn]] if end_of_turn in self._added else []
        for file in (path / "generation_config.json", path / "config.json"):
            named = read_json(file, {}).get("eos_token_id")
            for i in named if isinstance(named, list) else [] if named is None else [named]:
                need(type(i) is int and 0 <= i < len(self.known) and self.known[i],
                     f"{file}: eos_token_id {str(i)[:20]!r} is not a token of {self._file.name}")
                ends.append(i)
        need(ends, f"{path / 'config.json'}: names no end-of-text token (eos_token_id)")
        self.end_id, self.end_ids = ends[0], set(ends)

    def _encode(self, text):
        """Ids of text that is normalised: cut into pieces, and each merged."""
        pieces, ids = [text], []
        for pattern in self._splits:
            pieces = [part for piece in pieces for part in cut(piece, pattern.finditer(piece)) if part]
        for piece in pieces:
            # a byte that the vocabulary lacks is dropped, as in transformers
            data = piece.encode("utf-8", "surrogateescape").translate(None, self._lacks)
            if data in self._whole:
                ids.append(self._whole[data])
            elif data:  # encode_ordinary without tiktoken's own cutting, which would not take bytes
                ids += [self._id_of_rank[rank] for rank in self._bpe._encode_single_piece(data)]
        return ids

    def encode(self, text):
        """Text to a list of ids. Text that spells a special or added token stays text."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a surrogate pair: no UTF-8
        return self._encode(unicodedata.normalize("NFC", text) if self._nfc else text)

    def encode_bytes(self, data):
        """Ids whose bytes, one after the other, are exactly `data`: nothing is normalised, broken UTF-8 stays."""
        return self._encode(data.decode("utf-8", "surrogateescape"))         # bytes that are no UTF-8, as surrogates

    def decode(self, ids):
        """Ids to text. Broken UTF-8 becomes U+FFFD; an id that the tokenizer does not have becomes nothing."""
        return b"".join(self.token_bytes[i] for i in ids if i < len(self.token_bytes)).decode("utf-8", "replace")

    def chat(self, text):
        """Ids of one user turn in the checkpoint's chat format, up to where the assistant's first token belongs."""
        need(not isinstance(self._chat, str), self._chat)
        before, after, strip = self._chat
        start, bracket, opening = before.rpartition("|>")  # what follows the last special token joins the user's text
        said = self.encode(opening + (text.strip() if strip else text))
        return self._encode_format(start + bracket) + said + self._encode_format(after)

    def _encode_format(self, text):
        """Ids of a chat format's own text: here an added token's text is that token."""
        added = re.compile("|".join(map(re.escape, sorted(self._added, key=len, reverse=True))))  # the longest first
        return [i for part in cut(text, added.finditer(text))
                for i in ([self._added[part]] if part in self._added else self.encode(part))]

    def difference(self, other):
        """None if the two have one vocabulary, one order of merges and the same added tokens; else a short phrase."""
        ours, theirs = ([data if known else None for data, known in zip(t.token_bytes, t.known)] for t in (self, other))
        for i, (a, b) in enumerate(itertools.zip_longest(ours, theirs)):
            if a != b:
                a, b = ("missing" if x is None else repr(x.decode("utf-8", "backslashreplace"))[:40] for x in (a, b))
                return f"token {i} is {a} here and {b} there"
        if self._added != other._added:
            token = min(self._added.keys() ^ other._added.keys())
            return f"{token!r} is an added token only {'here' if token in self._added else 'there'}"
        return None if self._ranks == other._ranks else "the merges differ"


def last_pair(token, pairs):
    """The two parts that complete a token, by merging its letters from the start; None if the merges cannot make it."""
    parts = list(token)
    while len(parts) > 2:
        places = [pairs.get(pair, math.inf) for pair in itertools.pairwise(parts)]
        i = places.index(min(places))
        if places[i] == math.inf:
            return None
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def cut(text, matches):
    """Cut text into what lies between the matches (first and last, though it be empty) and, by turns, the matches."""
    borders = [0, *(at for match in matches for at in match.span()), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(borders)]


def chat_format(template):
    """Recognise a published chat template, as text: ((text before the user's, text after it, strip the user's), end of
    turn), or (None, None) for a format that is not known.
    """
    template = re.sub(r"\{#.*?#\}", "", template, flags=re.S)  # Jinja's comments
    strip = bool(re.search(r"content['\"\])]*(?:\s*\|\s*trim|\.strip\(\))", template))
    if "<|start_header_id|>" in template and "<|eot_id|>" in template:  # Llama 3
        header = "<|start_header_id|>{}<|end_header_id|>\n\n"
        if re.search(r"system<\|end_header_id\|>(?:\\n|\s)*[^\\'\"{\s]", template):  # a system prompt of its own
            return None, None
        before = "<|begin_of_text|>" if re.search(r"bos_token|'<\|begin_of_text\|>'", template) else ""
        if knowledge := re.search(r"Cutting Knowledge Date: ([^\\\"'\n]*)", template):  # 3.1 and later
            day = re.search(r"date_string = \"([^\"]*)\"", template)  # the day that the template falls back on
            before += header.format("system") + f"Cutting Knowledge Date: {knowledge[1]}\n"
            before += f"Today Date: {day[1] if day else '26 Jul 2024'}\n\n<|eot_id|>"
        return (before + header.format("user"), "<|eot_id|>" + header.format("assistant"), strip), "<|eot_id|>"

    flat = template.removesuffix("\n").replace("\\n", "\n")  # Jinja drops a newline at the very end
    begin = re.search(r"<\|im_start\|>assistant(?:\n|\Z)", flat)
    strange = ("<|im_sep|>", "bos_token", "strftime_now", "<|im_start|>assistant\n<think>")
    if not begin or "<|im_end|>" not in flat or any(sign in flat for sign in strange):
        return None, None
    before, after = "", "<|im_end|>\n" + begin[0]
    defaults = re.findall(r"(['\"]?)<\|im_start\|>system(?:\\n|\n)(.*?)<\|im_end\|>", template, re.S)
    if name := re.search(r"<\|im_start\|>system(?:\\n|\n)['\"]\s*[+~]\s*(\w+)\s*[+~]", template):     # in a variable
        default = re.search(rf"set {name[1]} = (['\"])(.*?)(?<!\\)\1", template, re.S)
        defaults += [default.groups()] if default and default[2] else []
    for quote, text in defaults:
        if not before and not re.search(r"\{\{|\{%|['\"]\s*[+~]|[+~]\s*['\"]", text):  # a constant: the default
            if quote:
                text = re.sub(r"\\(.)", lambda escape: "\n" if escape[1] == "n" else escape[1], text)
            before = f"<|im_start|>system\n{text}<|im_end|>\n"
    if "enable_thinking" in template:
        after += "<think>\n\n</think>\n\n"  # Qwen3 with thinking off
    return (before + "<|im_start|>user\n", after, strip), "<|im_end|>"


# ---------------------------------------------------------------------------------------------------------------------
# The toy's tokenizer (skip it on a first reading)

def train_bpe(texts):
    """Byte-level BPE (Sennrich et al., arXiv 1508.07909): join the most frequent pair until every word is one token.

    Returns the merges, in order, as pairs of tokens, written as in a vocabulary. A word is a match of GPT-2's pattern.
    """
    counts = Counter(word for text in texts for word in regex.findall(GPT2_SPLIT, text))
    words = {" ".join(LETTERS[byte] for byte in word.encode()): n for word, n in counts.items()}  # its tokens, spaced
    merges = []
    while True:
        pairs = Counter()
        for word, n in words.items():
            for pair in itertools.pairwise(word.split(" ")):
                pairs[pair] += n
        if not pairs:
            return merges
        # ties go to the pair whose bytes come last
        best = max(pairs, key=lambda pair: (pairs[pair], [[BYTE_OF[letter] for letter in token] for token in pair]))
        merges.append(best)
        spaced = re.compile(rf"(?<!\S){re.escape(' '.join(best))}(?!\S)")
        words = {spaced.sub(lambda pair: pair[0].replace(" ", ""), word): n for word, n in words.items()}


CHATML = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
          "{{ '<|im_start|>assistant\n' }}")


def save_toy_tokenizer(path):
    """Train the toy's byte-level BPE on the toy's own text, and write it into directory `path` as Hugging Face does."""
    rng = random.Random("tokenizer")
    sample = list(itertools.islice(toy_questions("train", rng), 4000))
    merges = train_bpe([q.text for q in sample] + [q.solution for q in sample] + ["user", "assistant"] * 9
                       + [f" {n}" for n in range(120)]
                       + [f"<{tag}>{n}</{tag}>" for tag in ("call", *"biqsu") for n in range(100)])
    tokens = LETTERS + [a + b for a, b in merges]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    added = [dict(id=len(tokens) + i, content=text, special=True, single_word=False, lstrip=False, rstrip=False,
                  normalized=False) for i, text in enumerate(special)]
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=True)
    files = {
        "tokenizer.json": dict(version="1.0", added_tokens=added, pre_tokenizer=byte_level, decoder=byte_level,
                               model=dict(type="BPE", vocab={t: i for i, t in enumerate(tokens)}, merges=merges)),
        "tokenizer_config.json": dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>",
                                      pad_token="<|endoftext|>", chat_template=CHATML),
        "generation_config.json": dict(eos_token_id=len(tokens) + 2, pad_token_id=len(tokens)),
    }
    Path(path).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (Path(path) / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks (skip it on a first reading)

def load_questions(path, limit=None):
    """Questions of a benchmark file, .jsonl or .json, in the order of the file; repeated ones stay.

    Read as published: GSM8K, MATH-500, Minerva, OlympiadBench, AIME, DAPO-Math-17k, MMLU-Pro; and anything with a
    question/problem/prompt and an answer. ValueError names the file and the line (in a .json list: the entry).
    """
    need(Path(path).suffix != ".parquet",
         f"{path}: parquet is not read; write it out as .jsonl first (pandas: to_json, lines=True)")
    questions = []
    with naming(f"{path}: cannot be read"):
        text = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape")
    if strange := re.search("[\udc80-\udcff]", text):
        number = text.count("\n", 0, strange.start()) + 1
        raise ValueError(f"{path}: line {number}: 'utf-8' codec cannot read it; save the file as UTF-8")
    listed = text.lstrip().startswith("[")
    try:
        rows = json.loads(text) if listed else text.split("\n")
    except (ValueError, RecursionError) as error:
        where = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "cannot be read"
        raise ValueError(f"{path}: {where}: {error}") from None
    for number, row in enumerate(rows, 1):
        if len(questions) == limit:
            break
        with naming(f"{path}: {'entry' if listed else 'line'} {number}"):
            if listed or row.strip():
                questions.append(read_question(row if listed else json.loads(row)))
    need(questions, f"{path}: no questions in it")
    return questions


def first(row, *keys):
    """The first of these fields that holds something."""
    return next((row[key] for key in keys if row.get(key) not in (None, "", [])), None)


def read_question(row):
    """One row of a benchmark file to a Question; ValueError says what the row lacks."""
    need(isinstance(row, dict), f"a {type(row).__name__} where an object belongs")
    row = {key.lower(): value for key, value in row.items()}  # AIME 2024 writes Problem and Answer
    if isinstance(row.get("reward_model"), dict):  # DAPO-Math-17k
        row = row["reward_model"] | row
    problem = first(row, "problem", "question", "prompt")
    if isinstance(problem, list):  # chat messages
        said = [m.get("content") for m in problem if isinstance(m, dict) and m.get("role") == "user"]
        problem = said[-1] if said else None
    need(isinstance(problem, str), "no text under problem, question or prompt")
    head, _, rest = problem.partition("\n\n")
    if head.startswith("Solve the following math problem step by step.") and rest:  # DAPO-Math-17k, around its problem
        problem = rest.partition("\n\nRemember to put your answer on its own")[0]
    if isinstance(row.get("context"), str) and row["context"]:  # OlympiadBench
        problem = row["context"] + "\n" + problem

    answer = first(row, "answer_letter", "answer", "final_answer", "expected_answer", "ground_truth")
    if answer is None and isinstance(row.get("solution"), str):
        answer = last_boxed(row["solution"])  # Minerva
    if isinstance(answer, list):  # OlympiadBench: one string that lists several, or several strings
        answer = ", ".join(map(str, answer))
    options = first(row, "options", "choices")
    if isinstance(options, list):  # MMLU-Pro: a letter, or an index
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:len(options)]
        problem += "".join(f"\n({letter}) {option}" for letter, option in zip(letters, options))
        answer = row.get("answer_index") if answer is None else answer
        answer = letters[answer] if type(answer) is int and answer in range(len(letters)) else answer
        need(type(answer) in (str, float) and (str(answer) in letters or not re.fullmatch("[A-Z]", str(answer))),
             f"answer {answer!r} is none of the {len(letters)} options")
    gold = str(answer).rsplit("####")[-1].strip()  # GSM8K: reasoning, then the number
    need(type(answer) in (str, int, float) and answer == answer and gold,  # NaN is no answer
         "no answer under answer, final_answer, reward_model.ground_truth or in a solution's \\boxed{}")
    kind = str(first(row, "subject", "subfield", "category", "type", "data_source") or "")
    (problem + gold + kind).encode()  # raises for half a surrogate pair, which nothing can write
    return Question(f"{problem}\n{INSTRUCTION}", gold, kind)


# ---------------------------------------------------------------------------------------------------------------------
# Grading (skip it on a first reading)

def grade(response, answer):
    """Whether the response's answer, its last \\boxed{} or else its last number, is the gold answer. Never raises.

    Compared by value as far as both can be evaluated, else letter by letter. Linear time in the response's length: an
    answer of more than 1,000 characters is right only if it is the gold answer, letter by letter.
    """
    gold, given = tidy(answer), last_boxed(response)
    if choice := re.fullmatch(r"\(?([A-J])\)?", gold):  # multiple choice: "C", "(C)" and "(C) 12 apples" all say C
        text = re.sub(r"\\[a-zA-Z]+\s*|[{}$*\\]", "", response if given is None else given).strip()
        said = CHOICE.findall(text.upper() if re.fullmatch(r"\(?[a-j]\)?", text) else text)
        return said[-1:] == [choice[1]]
    if given is None:
        given = ["", *NUMBER.findall(response.replace("\u2212", "-").replace("{,}", ","))][-1]
    return same(tidy(given), gold)


def last_boxed(text):
    """What stands in the last \\boxed{...} that is closed, nested braces included; None without one. In linear time."""
    found, open_braces = None, []
    text = re.sub(r"\\boxed\s+(\d+)", r"\\boxed{\1}", text)
    for brace in re.finditer(r"\\\\(?!boxed|fbox)|\\(?:boxed|fbox)\s*\{|\\[{}]|[{}]", text):
        if brace[0] == "}" and open_braces:
            start = open_braces.pop()
            found = slice(start, brace.start()) if start else found
        elif brace[0] == "{" or len(brace[0]) > 2:
            open_braces.append(brace.end() if len(brace[0]) > 2 else 0)  # 0: some other brace
    return text[found] if found else None


NUMBER = re.compile(r"(?<![\^\d])(?<!\^\{)(?:(?<![\w)}])-)?(?:\\[dtc]?frac(?:\{\d+\}\{\d+\}|\d\d)"
                    r"|\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d*\.?\d+)(?:\.\d+)?"
                    r"(?:[eE][+-]?\d{1,3}\b|\s*(?:\\times|\\cdot|[*×])\s*10\^(?:\{-?\d+\}|-?\d+))?(?:/\d+)?%?)")
CHOICE = re.compile(r"(?:^\(?(?![AI] [a-z])|\(|(?i:answer|option|choice)(?: is)?(?::[\s(]*|[\s(]+))([A-J])(?![\w'])"
                    r"(?!\)?\s*(?:[,;/&+]|and|or)\s*\(?[A-J]\b)")  # A, but not A and B
RELATION = "[<>]=?|="


def power(base, exponent):
    """Exact for whole exponents, as long as the result has at most 4,096 bits; else a complex number."""
    exact = isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1
    if exact and abs(exponent) * max(base.numerator.bit_length(), base.denominator.bit_length()) <= 4096:
        return base ** int(exponent)
    return complex(base) ** complex(exponent)


def factorial(x):
    """Exact for whole numbers up to 300; else by the gamma function, which may overflow."""
    x = complex(x).real
    return Fraction(math.factorial(int(x))) if x in range(301) else math.gamma(x + 1)


# What a formula is made of. Operators: how strongly they bind to their left and to their right, and what they do (an
# equation l = r has the value l - r).
OPERATORS = {"=": (1, 1, operator.sub), "+": (2, 2, operator.add), "-": (2, 2, operator.sub),
             "*": (3, 4, operator.mul), "/": (3, 4, operator.truediv), "^": (5, 4, power)}
POSTFIX = {"!": factorial, "%": lambda x: x / 100}
CLOSING = {")", "]", "}", "\\}"}
PAIRS = {"frac": operator.truediv, "binom": lambda n, k: factorial(n) / factorial(k) / factorial(n - k)}
FUNCTIONS = {name: getattr(cmath, name) for name in "sin cos tan sinh cosh tanh exp log sqrt".split()} | {
    "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan, "ln": cmath.log, "lg": cmath.log10,
    "cot": lambda z: 1 / cmath.tan(z), "sec": lambda z: 1 / cmath.cos(z), "csc": lambda z: 1 / cmath.sin(z), "abs": abs}
CONSTANTS = {"pi": math.pi, "e": math.e, "i": 1j}
NAMES = "|".join(sorted([*FUNCTIONS, "pi"], key=len, reverse=True))
FACTOR = re.compile(r"[^\W_]|[.(\[{]|\\[a-zA-Z{]")  # how one begins, so that 2x and 2(x + 1) are products
TOKEN = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d))?"  # numbers; names with an index; commands; signs
                   r"|(?!\\log)(?:\\[A-Za-z]+|[A-Za-z])_(?:\{[^{}]*\}|\\[a-z]+|\w)"
                   rf"|\\[A-Za-z]+|{NAMES}|[A-Za-z]{{4,}}|\\.|\S")

TEXT = r"\\text\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
UNITS = (r"(?:[ckm]m|kg|ml|mph|ft|dollars|cents|degrees|hours|minutes|min|seconds|inches)\b"
         rf"|\s(?!(?:{NAMES}|plus|minus|times)\b)[A-Za-z]{{3,}}|\s(?:lb|oz|hr|mi|in|am|pm|sq)\b")
SCALES = {"hundred": "*10^2", "thousand": "*10^3", "million": "*10^6", "billion": "*10^9"}


def without_units(found):
    """A text without its words, which are units, unless there is nothing but words."""
    bare = re.sub(TEXT + r"(\s*\^\s*\{?-?\d\}?)?", "", found[0])
    return bare if re.search(r"[^\W_]", bare) else re.sub(TEXT, r" \1 ", found[0])


def matrix(found):
    """A matrix as a row of its cells, with a word at the end of each of its rows."""
    rows = re.sub(r"\\\\(?:\[\w+\])?", "&row&", re.sub(r"[\s\\]+$", "", found[1]))
    return f"[{rows.replace('&', ',')},row]"


SYMBOLS = str.maketrans({"π": "\\pi ", "√": "\\sqrt ", "∞": "\\infty ", "∪": "\\cup ", "×": "*", "≥": ">=", "≤": "<=",
                         "−": "-", "–": "-", "'": "^{\\prime}", "~": " ", "£": "", "€": "",
                         "°": "\\circ ", "º": "\\circ "})
TIDY = [(regex.compile(pattern), new) for pattern, new in (
    (r"\s+", " "), (r"^ ?\\boxed ?\{(.*)\} ?$", r"\1"),  # first: some of what follows would take cubic time in spaces
    (r",\\!\s*|\{,\}|\\(?:left|right)(?![a-z])\.?|\\(?:[bB]igg?[lr]?|displaystyle|[lL]arge|q?quad|limits)(?![a-zA-Z])"
     r"|\\[,!;:]|\\?\$|\b(?:np|math)\.|\\(?:boldsymbol|mathbf|mathsf|bm|underline)\s*(?=\{)|\\(?:bf|rm|it)(?![a-z])",
     ""),
    (r"\\[lr]vert(?![a-z])", "|"), (r"(?<!\\)\\ ", " "),
    # words: a name's index, a list's comma, a function or a letter, but not a number's unit
    (r"\\(?:textrm|textbf|textit|emph|mbox|mathrm|operatorname)\s*(?=\{)", r"\\text"),
    (rf"_\s*(?:\{{\s*{TEXT}\s*\}}|{TEXT})", r"_{\1\2}"),
    (rf"\\text\s*\{{[\s,]*(and|or|{'|'.join(SCALES)})[\s,]*\}}", r" \1 "),
    (rf"(?:(?<![\d}}](?:\\cdot|[ /])*)|(?!\\text *\{{ ?[mgsNJWKVALCFTh] ?\}}))"
     rf"\\text *\{{ ?({NAMES}|[A-Za-z]) ?\}}", r"\1"),
    (r"^.*\\text.*$", without_units), (r"\s(?:and|or)\s", ","),
    (r"\^?\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\(?:circ|degree)(?![a-z]))(?:\s*[CF]\b)?|\\frac\s*\{\s*\}\s*\{\s*\}", ""),
    (r"[(\[]?\s*\\begin\{(?:array\}\{[^{}]*|[a-z]?matrix)\}(.*?)\\end\{(?:array|[a-z]?matrix)\}\s*[)\]]?", matrix),
    (r"^\s*(?:[a-zA-Z]\w*)?\s*\\approx|\s*\\approx.*$", ""), (r" +", " "), (r"\\%", "%"), (r"\*\*", "^"),
    (r"\\(?:cdot|times)(?![a-z])", "*"),
    (r"(?<!\w)(\w+) ?: ?(\w+) ?: ?(\w+)", r"(\1,\2,\3)"), (r"\\div(?![a-z])|:", "/"),  # 1:2:3; 3:4
    (r"\\g(?:e|eq|eqslant)(?![a-z])", ">="), (r"\\l(?:e|eq|eqslant)(?![a-z])", "<="),
    (r"(?:^|\{)([^{}]*)\\over(?![a-z])([^{}]*)(?:\}|$)", r"\\frac{\1}{\2}"), (r"\\[dtc](frac|binom)", r"\\\1"),
    (r"\\frac\s*(\d)\s*(?=[\d{])", r"\\frac{\1}"), (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),
    (r"(?<![\w.}])(\d+)\s*(\\frac\s*\{\d+\}\s*\{\d+\})|(?<![\w.}])(\d+)\s+(\d+/\d+)", r"(\1\3+\2\4)"),  # mixed numbers
    (rf"(?<=\d)\s*({'|'.join(SCALES)})\b", lambda scale: SCALES[scale[1]]), (rf"(?<=[\d}}])\s*(?:{UNITS}).*$", ""),
    (r"(?<![\d.,(\[])(?<!\\\{)(\d{1,3}(?:,\d{3})+)(?![\d,])", lambda number: number[1].replace(",", "")),
    (r"^ ?\d{1,3}(?: \d{3})+ ?$", lambda number: number[0].replace(" ", "")), (r"\((\d+)\)(?=_)", r"\1"),
    (r"(?<=\d)_\{(\d+)\}", r"_\1"), (r"_\{(\w|\\[a-zA-Z]+)\}", r"_\1"),  # (52)_{8}; x_{1}
    (r"\{(\w+)\}(?=_)", r" \1"), (r"(?<![a-zA-Z\\])([a-zA-Z])\(0\)", r"\1_0"),  # \dot{x}_0; f(0)
    (r"^\s*(?:[a-zA-Z]|\([^()]*\))\s*\\in(?![a-z])\s*|[\s./*^]+$|^[\s^]+", ""))]


def tidy(text):
    """One spelling for what may be spelled in many ways: symbol by symbol, then pattern by pattern, in TIDY's order."""
    text = text.translate(SYMBOLS)
    for pattern, new in TIDY if len(text) <= 1000 else ():
        text = pattern.sub(new, text)
    return text


def split_outside(text, mark):
    """Cut at `mark`, but not inside brackets: '1,(2,3)' gives '1' and '(2,3)'."""
    depth = [*itertools.accumulate((char in "([{") - (char in ")]}") for char in text)]
    outside = (found for found in re.finditer(mark, text) if depth[found.start()] <= 0)
    return [part.strip() for part in cut(text, outside)[::2]]


def items(text):
    """(kind, parts). Kind: "" for a list, a set or a union, in any order; a tuple's, an interval's or a matrix's
    brackets; or the signs of an equation or an inequality.
    """
    text = text[2:-2] if text.startswith("\\{") and text.endswith("\\}") else text
    parts = [part.replace("\\pm", sign) for part in split_outside(text, r"\\cup(?![a-z])|[,;]") if part
             for sign in ("+-" if "\\pm" in part and "\\{" not in part else ["\\pm"])] or [text]
    if len(parts) == 1 and len(sides := split_outside(parts[0], RELATION)) > 1:
        return re.sub("^=+$", "=", "".join(re.findall(RELATION, parts[0]))), sides
    if len(parts) == 1 and re.fullmatch(r"[(\[].*[)\]]", text) and len(inner := split_outside(text[1:-1], ",")) > 1:
        return text[0] + text[-1], inner
    return "", parts


def as_interval(kind, sides):
    """x > 3 as the interval from 3 to infinity, 2 < x <= 3 as (2,3]; anything else as it is."""
    signs = re.findall("[<>]=?", kind)
    if kind != "".join(signs) or len(sides) != len(signs) + 1 or len({sign[0] for sign in signs}) != 1:
        return kind, sides
    if signs[0][0] == ">":
        signs, sides = signs[::-1], sides[::-1]
    if len(sides) == 2 and re.fullmatch("[a-zA-Z]", sides[0]):
        signs, sides = ["<", *signs], ["-\\infty", *sides]
    elif len(sides) == 2:
        signs, sides = [*signs, "<"], [*sides, "\\infty"]
    if len(sides) != 3 or not re.fullmatch("[a-zA-Z]", sides[1]):
        return kind, sides
    return ("[" if "=" in signs[0] else "(") + ("]" if "=" in signs[1] else ")"), sides[::2]


def same(given, gold, depth=0):
    """Whether two tidied answers are one: lists in any order; tuples, intervals, matrices in theirs; else by value."""
    if not gold or not given or max(len(given), len(gold)) > 1000 or depth > 4:
        return given == gold != ""
    if re.fullmatch(r"[-\d.]+", gold):
        given = re.sub(r"(?<=\d) ?[mgshL]$", "", given)  # 24 m
    a, b = (re.sub(r"(?<!\d) | (?!\d)", "", side) for side in (given, gold))  # 1 2 is not 12
    based = re.fullmatch(r"(\d\w*)_\d+ \1|(\d\w*) \2_\d+", f"{a} {b}")  # 52_8 may be given as 52
    if a == b or based or a.isalpha() and len(a) > 1 and a.lower() == b.lower():
        return True
    (kind, a), (gold_kind, b) = items(given), items(gold)
    if kind != gold_kind:
        (kind, a), (gold_kind, b) = as_interval(kind, a), as_interval(gold_kind, b)
    if kind != gold_kind and "=" in (kind, gold_kind):  # x = 5 is 5, but where x + y = 5 is asked for, 5 is not
        if kind == "=":
            return same(a[-1], gold, depth + 1)
        return not re.search(r"[+-]|\^\{?\d", b[0]) and same(given, b[-1], depth + 1)
    if kind == gold_kind == "=":
        named = not re.search(r"[+-]|\^\{?\d", a[0] + b[0]) and not b[-1][1:].isalpha()  # x = 5 may be given as y = 5
        return (a == b[::-1] or len(a) == len(b) == 2 and same_value(given, gold, None)
                or named and same(a[-1], b[-1], depth + 1))
    if len(a) != len(b) or len(a) > 64:
        return False
    if len(a) == 1:
        return same_value(a[0], b[0])
    if gold_kind:  # (3, 4) may be given as 3, 4
        return kind in (gold_kind, gold_kind.strip("()")) and all(same(*pair, depth + 1) for pair in zip(a, b))
    if re.match(RELATION, kind) or kind in ("(]", "[)", "[]"):  # 3 < 4 is no list, nor is an interval
        return False
    names, others = (sorted(part.partition("=")[0].strip() for part in side) for side in (a, b))
    if names == others and "=" in a[0]:  # x = 3, y = 4: each name has its own value
        return all(same(*pair, depth + 1) for pair in zip(sorted(a), sorted(b)))
    for part in a:
        found = next((n for n, other in enumerate(b) if same(part, other, depth + 1)), None)
        if found is None:
            return False
        del b[found]
    return True


def same_value(given, gold, factor=1):
    """Equal as numbers: exactly if both are written exactly, else to 6 places.

    Formulas: at three points, where their letters stand for positive numbers; for the last also for negative ones if
    there are bars, since |x| is x for the others. Equations: up to a factor (None), which is seen at the first point.
    """
    if ("%" in given) != ("%" in gold) and same_value(given.replace("%", ""), gold.replace("%", "")):
        return True  # 50% is 0.5, and may be given as 50
    try:
        for point in (0, 1, -2 if "|" in given + gold else 2):
            a, b = (Formula(side, point).group({"\n"}) for side in (given, gold))
            factor = a / b if factor is None else factor
            error, size = abs(a - factor * b), abs(factor * b)
            exact = isinstance(error, Fraction) and "." not in given + gold
            if error and (exact or not error <= max(1e-9 * size, min(5e-7, 2e-6 * size))) or not factor:
                return False  # nan is equal to nothing
    except (ValueError, ArithmeticError, RecursionError):  # no formula, or too large a number
        return False
    return True


class Formula:
    """The value of a formula in LaTeX or plain notation, by precedence climbing.

    Exact (a Fraction) up to powers of 4,096 bits, else complex. A letter or an unknown command is a variable: another
    number at each point, a negative one at a negative point. What has no value raises ValueError, ArithmeticError or
    RecursionError; floors and ceilings have none, so that they are right only as the gold answer spells them.
    """

    def __init__(self, text, point):
        self.tokens, self.at, self.point = [*TOKEN.findall(text), "\n"], 0, point

    def take(self, wanted):
        """The next token, if it is one of these; "" if not."""
        token = self.tokens[self.at]
        self.at += token in wanted
        return token if token in wanted else ""

    def group(self, closing):
        """A formula and what closes it."""
        value = self.value()
        need(self.take(closing), "a bracket stays open")
        return value

    def value(self, least=0):
        """A formula as far as its operators bind more strongly than `least`: -x^2 is -(x^2), 2^3^2 is 2^9."""
        sign = self.take({"+", "-"})
        value = self.value(4) if sign else self.atom()
        value = -value if sign == "-" else value
        while True:
            token = self.tokens[self.at]
            strength = 4 if FACTOR.match(token) else 0  # sin 2x is sin(2x), ...
            if token in ("(", "[", "\\{") or token.strip("\\") in FUNCTIONS:
                strength = 3  # ... but sin x (y + 1) is sin(x) (y + 1)
            strength, right, operate = OPERATORS.get(token, (strength, 4, operator.mul))
            if token in POSTFIX:
                value = POSTFIX[self.take(token)](value)
            elif strength <= least:
                return value
            else:
                need(self.take(OPERATORS) or not (self.tokens[self.at - 1] + token).isdecimal(), "two numbers in a row")
                value = operate(value, self.value(right))

    def atom(self):
        """A number, a bracket, a function of something, or a variable."""
        token = self.tokens[self.at]
        name = token.lstrip("\\")
        self.at += 1
        if token in ("(", "[", "{", "\\{"):
            return self.group(CLOSING)
        if token == "|":
            return abs(self.group({"|"}))
        if token[:1].isdecimal() or token[:1] == ".":
            return Fraction(token)
        if name in PAIRS:
            return PAIRS[name](self.atom(), self.atom())
        if name == "sqrt":
            index = self.atom() if self.tokens[self.at] == "[" else Fraction(2)
            return power(self.atom(), 1 / index)
        if name in FUNCTIONS:
            return self.function(name)
        if name in CONSTANTS:
            return CONSTANTS[name]
        need(name[:1].isalpha() and (token != name or name[1:2] in ("", "_")), "a word, or a sign of no formula")
        return (-1 if self.point < 0 else 1) * random.Random(f"{name} {self.point}").uniform(0.4, 2.6)

    def function(self, name):
        """sin x, sin 2x, sin(x), sin^2 x and so on, and a logarithm to any base."""
        base = self.atom() if name == "log" and self.take("_") else math.e
        exponent = self.value(4) if self.take("^") else Fraction(1)
        if exponent == -1 and "arc" + name in FUNCTIONS:
            name, exponent = "arc" + name, Fraction(1)
        value = self.value(4 if self.tokens[self.at] in ("(", "[", "{") else 3)
        value = FUNCTIONS[name](complex(value))
        return power(value / cmath.log(base) if name == "log" else value, exponent)
