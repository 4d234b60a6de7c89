"""The caption tokenizer against what Stanford's PTBTokenizer 3.4.1 gives, recorded below and, where Java is, live."""

import shutil
import subprocess
from pathlib import Path

import pycocoevalcap
import pytest

from synpo.evaluate.ptb import tokenize

RECORDED = {
    "A man's dog don't can't cannot gonna wanna": "a man 's dog do n't ca n't can not gon na wan na",
    '(hello) [x] {y} "quoted words" \'single quoted\' `back`': (
        "-lrb- hello -rrb- -lsb- x -rsb- -lcb- y -rcb- quoted words single quoted back"
    ),
    "well-dressed x--y a - b a – b a—b…and ... so.... ok": "well-dressed x y a b a b a b and so ok",
    "50% of $5.00 and #1 & AT&T e.g. Mr. Smith U.S. a.m. 10:30 1,000 1/2 and/or": (
        "50 % of $ 5.00 and # 1 & at&t e.g. mr. smith u.s. a.m. 10:30 1,000 1/2 and/or"
    ),
    "men's boys’ it’s don’t ‘hi’ “dq” o'clock": "men 's boys it 's do n't hi dq o'clock",
    "a bird's-eye view of a mother-in-law's T-shirt, X-ray": "a bird 's eye view of a mother-in-law 's t-shirt x-ray",
    "The end.\" (the end.) What?! x!!": "the end -lrb- the end -rrb- what ?! x !!",
    "no. No. 5 on main st. and vitamin C. at 5:30pm": "no no. 5 on main st. and vitamin c. at 5:30 pm",
    "café naïve 6ft 3D 1980s '90s don't've 5'6\"": "café naïve 6ft 3d 1980s '90s do n't 've 5 6",
    "see http://a.b/x|||y, (http://c.d/e) www.x.com, d@e.f|g (h@i.jk)": (
        "see http://a.b/x | | | y -lrb- http://c.d/e -rrb- www.x.com d@e.f | g -lrb- h@i.jk -rrb-"
    ),
    "\ufeffa \ufffd b\x01c \x1b[31m d\u200ce \u202e f\ue000g so\xadft h\x7fi": "a b c -lsb- 31m d e f g soft h i",
    "a  b\tc\u00a0d\u200be 😀 男人": "a b c d e 男人",
}  # fmt: skip


@pytest.mark.parametrize("caption", RECORDED, ids=lambda caption: caption[:24])
def test_recorded_output_of_the_java_tokenizer(caption: str) -> None:
    assert " ".join(tokenize(caption)) == RECORDED[caption]


@pytest.mark.parametrize("caption", ["", "  \n", ". . .", "\"'...'\" -- !"])
def test_no_words(caption: str) -> None:
    assert tokenize(caption) == []


def test_words_hold_no_white_space(real_captions: list[str]) -> None:
    assert all(len(word.split()) == 1 for caption in real_captions for word in tokenize(caption))


@pytest.mark.skipif(shutil.which("java") is None, reason="no java (apt install default-jre-headless)")
def test_parity_with_java_on_real_captions(real_captions: list[str]) -> None:
    dropped = {"''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
    captions = [caption.replace("\n", " ") for caption in [*real_captions, *RECORDED]]
    jar = Path(pycocoevalcap.__path__[0]) / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    done = subprocess.run(
        [*command, "-preserveLines", "-lowerCase"], input="\n".join(captions).encode(), capture_output=True, check=True
    )
    lines = done.stdout.decode().split("\n")
    assert len(lines) >= len(captions)
    theirs = [[word for word in line.split() if word not in dropped] for line in lines]
    different = [
        (caption, tokenize(caption), java) for caption, java in zip(captions, theirs) if tokenize(caption) != java
    ]
    assert different == []
