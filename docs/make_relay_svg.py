"""Draw README.md's first picture: what relay.py answers to its own first question, coloured by who wrote what.

    python docs/make_relay_svg.py --run runs/toy > docs/relay.svg
"""

import argparse
import random
import sys
import textwrap
from html import escape
from itertools import groupby, islice
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import toy_questions
from relay import COMMAND, TOY, Run, load_pair, relay, run_script, small_models

WIDTH, MARGIN, LINE, FONT, LETTER = 720, 20, 30, 14, 0.6                # pixels; a letter's width in font sizes
COLOURS = {"question": "#6e7781", "written by the SLM": "#1f6feb", "its command": "#9a6700",
           "written by the LLM": "#ffffff on #1a7f37"}


def text_at(x, y, text, colour, size=FONT):
    """A piece of text at (x, y) and where it ends. A colour "a on b" is a on a ground of b."""
    ink, _, ground = colour.partition(" on ")
    width = len(text) * LETTER * size
    box = f'<rect x="{x:.1f}" y="{y - 15}" width="{width:.1f}" height="21" rx="3" fill="{ground}"/>\n' if ground else ""
    return (f'{box}<text x="{x:.1f}" y="{y}" fill="{ink}" font-size="{size}" textLength="{width:.1f}" '
            f'lengthAdjust="spacingAndGlyphs" xml:space="preserve">{escape(text)}</text>'), x + width


def letters(rollout, tokenizer):
    """[(letter, who wrote it)] of a response. (The toy's text is ASCII: a byte is a letter, and "?" any other.)"""
    out = []
    for token, by_llm in zip(rollout.tokens, rollout.by_llm):
        if token not in tokenizer.end_ids:
            who = "written by the LLM" if by_llm else "written by the SLM"
            out += [(chr(byte) if 32 <= byte < 127 else "?", who) for byte in tokenizer.token_bytes[token]]
    own = "".join(letter if who == "written by the SLM" else "?" for letter, who in out)    # only there it is a command
    for match in COMMAND.finditer(own.encode()):
        out[slice(*match.span())] = [(letter, "its command") for letter in match.group().decode()]
    return out


def wrapped(written, most):
    """Lines of at most `most` letters."""
    rest = iter(written)
    for line in textwrap.wrap("".join(letter for letter, _ in written), most, drop_whitespace=False):
        yield list(islice(rest, len(line)))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", type=Path, default=Path("runs/toy"), help="a run of the toy (runs/toy)")
    run = Run(p.parse_args().run)
    small_models()
    slm, llm, tokenizer = load_pair(run.path / "grpo", run.directory("llm"), "cpu", torch.float32)
    question = next(toy_questions("eval", random.Random(1), rare=1.0)).text
    rollout, = relay(slm, llm, tokenizer, [tokenizer.chat(question)], seed=1, **TOY)
    out, y = [text_at(MARGIN, 32, question, COLOURS["question"])[0]], 32
    for line in wrapped(letters(rollout, tokenizer), int((WIDTH - 2 * MARGIN) / (LETTER * FONT))):
        x, y = MARGIN, y + LINE
        for who, part in groupby(line, key=lambda pair: pair[1]):
            piece, x = text_at(x, y, "".join(letter for letter, _ in part), COLOURS[who])
            out.append(piece)
    x, y = MARGIN, y + 44
    for who, colour in COLOURS.items():                                 # the legend
        piece, x = text_at(x, y, who, colour, size=12)
        out.append(piece)
        x += 28
    title = f"A roll-out of the toy pair: the LLM wrote {sum(rollout.by_llm)} of {len(rollout.tokens)} tokens"
    print(f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 14}" '
          f'viewBox="0 0 {WIDTH} {y + 14}" font-family="ui-monospace, Menlo, Consolas, monospace">\n'
          f'<title>{title}</title>\n'
          f'<rect width="{WIDTH}" height="{y + 14}" rx="8" fill="#ffffff" stroke="#d0d7de"/>', *out, "</svg>", sep="\n")


if __name__ == "__main__":
    run_script(main)
