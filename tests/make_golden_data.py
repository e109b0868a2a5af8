"""Make tests/golden/tokenizers/: small tokenizers of each family's shape, and what transformers makes of texts.

Needs transformers (which brings tokenizers and jinja2); the project and its tests do not. Run it once, from anywhere:

    pip install transformers && python tests/make_golden_data.py

Each tokenizer is trained here on the text below, so it is tiny (some hundred tokens) but has the pre-tokenizer, the
normalizer and the merge rules of its family. The chat templates are our own words for the published formats: they
render the same for one user turn. expected.json holds the texts, the ids of each text, and the ids of each chat.
"""
import json
import random
import shutil
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

OUT = Path(__file__).parent / "golden" / "tokenizers"

TRAINING_TEXT = """
The small model writes the answer, word after word, and asks the large model where it does not know. What does a lamp
cost? One lamp costs 14 coins, so 3 lamps cost 3 * 14 = 42 coins. The coupon takes 2 coins off: 42 - 2 = 40 coins.
def answer(question, tokens=128):
    for token in question.split():
        if token == "the":
            return {"token": token, "count": len(tokens), "ratio": 0.25}
We've seen that it's 1999 or 2024, and I'll say: they're 100% sure they don't know; 3.14159 is not 22/7.
x^2 + y^2 = z^2, \\frac{1}{2} \\sqrt{3}, \\boxed{42}. The answer is \\boxed{\\frac{14}{3}}.
Der Bär läuft über die Straße. Où est la bibliothèque ? El niño comió piñas. Привет, мир! Как дела?
你好，世界。小模型写答案，大模型帮忙。数学问题的答案是四十二。こんにちは世界。안녕하세요 세계.
مرحبا بالعالم. النموذج الصغير يكتب الجواب. नमस्ते दुनिया। สวัสดีชาวโลก
👍 👩‍👩‍👧‍👦 🏳️‍🌈 café naïve
""" * 3

TEXTS = [
    "", " ", "a", "Hello, world!", "What does a lamp cost?  One lamp costs 14 coins.", "it's I'LL they'Re don't 'tis",
    "def f(x):\n\tif x == 1:\n\t\treturn {'a': [1, 2.5e-3]}\n\n\n    # done  \n", "x\r\ny\r\n\r\nz\r",
    "   leading and trailing   ",
    "tabs\t\tand\t spaces \t mixed", "1234567890 3.14159 1,000,000 ²³ ½ Ⅷ ١٢٣ １２３", "你好，世界。数学题：3加4等于几？",
    "こんにちは世界 안녕하세요 한글", "مرحبا بالعالم ١٢٣", "नमस्ते दुनिया สวัสดี", "👍🏽👩‍👩‍👧‍👦🏳️‍🌈🇩🇪 ok",
    "cafe\u0301 caf\u00e9 \u212b \u1e9b\u0323 q\u0307\u0323", "a\u0301\u0301\u0301\u0316b", "\u1112\u1161\u11ab \ud55c",
    "\x00\x01\x1b[0m\x1c\x1d\x1e\x1f\x7f\x85\xa0", "a\u2028b\u2029c\u200bd\u3000e\ufefff", "ſtraſſe K\u212a 'ſ",
    "<|im_start|>user\nhi<|im_end|>", "<|eot_id|><|begin_of_text|><|start_header_id|>", "no <|endoftext|>",
    "\\boxed{\\frac{1}{2}} $x^2$ & %", "ignored unreachable ignored", "!!!???...---===",
    "\U000f0000\U0010ffff \U00040000",
    "a" * 300, " " * 200 + "x", "\n" * 50, "ab" * 100, "é" * 99, "The answer is 42." * 5,
]
CHATS = ["What is 2 + 3?", "", "\n\n  padded\n ", "cafe\u0301 14 coins", "你好\n"]

CHATML = """{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system
SYSTEM<|im_end|>
' }}{% endif %}{{ '<|im_start|>' + m['role'] + '
' + m['content'] + '<|im_end|>' + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
QWEN25 = r"""{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nSYSTEM<|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""
QWEN3 = r"""{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}THINKING
{%- endif %}"""
NO_THINKING = r"""
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}"""
LLAMA31 = r"""{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- "<|eot_id|>" }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
LLAMA32 = LLAMA31.replace('    {%- set date_string = "26 Jul 2024" %}', """    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}""")
LLAMA30 = r"""{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>

'+ m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"""\
    r"""{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>

' }}{% endif %}"""
PLAIN = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}" \
    "<|im_start|>assistant\n"
FORMATS = {  # name: (tokenizer, template)
    "qwen2": ("qwen", CHATML.replace("SYSTEM", "You are a helpful assistant.")),
    "qwen2.5": ("qwen", QWEN25.replace("SYSTEM",
                                             "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")),
    "qwen2.5-math": ("qwen", QWEN25.replace(
        "SYSTEM", r"Please reason step by step, and put your final answer within \\boxed{}.")),
    "qwen3": ("qwen", QWEN3.replace("THINKING", NO_THINKING)),
    "qwen3-2507": ("qwen", QWEN3.replace("THINKING", "")),
    "smollm2": ("smollm", CHATML.replace(
        "SYSTEM", "You are a helpful AI assistant named SmolLM, trained by Hugging Face")),
    "plain": ("smollm", PLAIN),  # Jinja drops its last newline
    "plain-quoted": ("smollm", PLAIN.replace("<|im_start|>assistant\n", r"{{ '<|im_start|>assistant\n' }}")),
    "apostrophe": ("qwen", QWEN25.replace("SYSTEM", r"It\'s you: don\'t guess.")),
    "llama3": ("llama", LLAMA30),
    "llama3.1": ("llama", LLAMA31),
    "llama3.2": ("llama", LLAMA32),
}
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST
LLAMA_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def train(pre_tokenizer, special, normalizer=None, tokens=560):
    """A byte-level BPE tokenizer as the object of its tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([TRAINING_TEXT], trainers.BpeTrainer(
        vocab_size=tokens, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    return json.loads(tokenizer.to_str())


def qwen():
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    spec = train(pre_tokenizers.Sequence([split, BYTE_LEVEL]), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                 normalizers.NFC())
    top = max(token["id"] for token in spec["added_tokens"])
    for i, text in enumerate(["<think>", "</think>", "<tool_call>"], top + 1):  # added, but not special
        spec["added_tokens"].append({"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                                     "normalized": False, "special": False})
    return spec


def llama():
    split = pre_tokenizers.Split(Regex(LLAMA_SPLIT), "isolated")
    spec = train(pre_tokenizers.Sequence([split, BYTE_LEVEL]), [
        "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
    spec["model"]["ignore_merges"] = True
    top = max(token["id"] for token in spec["added_tokens"])
    spec["model"]["vocab"] |= {"Ġignored": top + 1, "ignored": top + 2, "Ġunreachable": top + 5}  # with a hole
    return spec


def smollm():
    digits = pre_tokenizers.Digits(individual_digits=True)
    spec = train(pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]),
                 ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    for byte in "\u0100\u011d\u00f1\u00c0":  # as the published one, it lacks some bytes: 0x00, 0x1d, 0xf1, 0xc0
        del spec["model"]["vocab"][byte]
    return spec


def odd():
    """Legal, and unlike any published one: merges as strings and out of order, ids shuffled."""
    spec = train(pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>"], normalizers.NFC())
    model, chance = spec["model"], random.Random(0)
    ids = [i + 7 * (i > 300) for i in range(len(model["vocab"]))]
    chance.shuffle(ids)
    top = max(ids)
    model["vocab"] = dict(zip(model["vocab"], ids))
    spec["added_tokens"][0]["id"] = top + 1
    del model["merges"][10:60:7]  # tokens that no merge makes any more, and merges that nothing leads to
    for _ in range(40):
        i, j = chance.sample(range(len(model["merges"])), 2)
        model["merges"][i], model["merges"][j] = model["merges"][j], model["merges"][i]
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    return spec


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    expected = {"texts": TEXTS, "chats": CHATS, "tokenizers": {}, "formats": {}}
    for make in (qwen, llama, smollm, odd):
        folder = OUT / make.__name__
        folder.mkdir(parents=True)
        spec = make()
        if make is not qwen:  # as in SmolLM2; where ids have holes, tokenizers would otherwise number them anew
            spec["model"]["vocab"] |= {token["content"]: token["id"] for token in spec["added_tokens"]}
        (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
        end = next(t["id"] for t in spec["added_tokens"] if t["content"] in ("<|endoftext|>", "<|end_of_text|>"))
        (folder / "config.json").write_text(json.dumps({"eos_token_id": end}))
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        expected["tokenizers"][make.__name__] = [
            tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in TEXTS]
    for name, (family, template) in FORMATS.items():
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(OUT / family / "tokenizer.json"),
                                            bos_token="<|begin_of_text|>" if family == "llama" else None)
        tokenizer.chat_template = template
        expected["formats"][name] = {"tokenizer": family, "template": template, "ids": [
            tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                          return_dict=False, enable_thinking=False, date_string="26 Jul 2024")
            for text in CHATS]}
    (OUT / "expected.json").write_text(json.dumps(expected, ensure_ascii=True), encoding="utf-8")


if __name__ == "__main__":
    main()
