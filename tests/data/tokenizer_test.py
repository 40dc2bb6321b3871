import base64
import concurrent.futures
import importlib.util
import pathlib
import random
import re

import numpy as np
import pytest
import tokenizers

from mosaics_jax.data import bpe
from mosaics_jax.data.tokenizer import BEGIN_TEXT, END_TEXT, RankTokenizer, continuation, load_tokenizer, make_tokenizer

TEXTS = [
    pathlib.Path(bpe.__file__).read_text(encoding="utf-8"),
    "the cat sat on the cat's mat " * 20,
    "naïve 你好 🙂 123",
    pathlib.Path(__file__).read_text(encoding="utf-8"),
]
ROUND_TRIPS = [
    "",
    " ",
    "plain words",
    "naïve — 你好世界 🙂👩‍👩‍👧 \u0301 \x00 \ufeff",
    f"a document that spells {BEGIN_TEXT} and {END_TEXT} out",
    " \t\r\n\n  x\r\n" * 3,
    "don't DON'T 12345 !!!\n\n\n",
]


def _rank_lines(tokens):
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def _tokenizer_json(ends: str) -> str:
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(TEXTS, trainer)
    if ends != "absent":
        inner.add_tokens([tokenizers.AddedToken(t, special=ends == "special") for t in (BEGIN_TEXT, END_TEXT)])
        inner.add_tokens(["<|other|>"])
    inner.enable_truncation(4)  # must not reach our ids
    return inner.to_str()


def _sentencepiece_json() -> str:
    """As that of Llama 2: a space is U+2581, one is put before a text, and decoding drops it."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", *bytes_, *"\u2581abcdefghijklmnopqrstuvwxyz", "\u2581t", "\u2581th", "\u2581the", "ca", "cat"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [("\u2581", "t"), ("\u2581t", "h"), ("\u2581th", "e"), ("c", "a"), ("ca", "t")]
    model = tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    inner = tokenizers.Tokenizer(model)
    kinds = tokenizers.normalizers
    inner.normalizer = kinds.Sequence([kinds.Prepend("\u2581"), kinds.Replace(" ", "\u2581")])
    kinds = tokenizers.decoders
    inner.decoder = kinds.Sequence(
        [kinds.Replace("\u2581", " "), kinds.ByteFallback(), kinds.Fuse(), kinds.Strip(" ", 1, 0)]
    )
    return inner.to_str()


@pytest.fixture(
    params=["bytes", "bpe", "llama3", "huggingface", "huggingface special", "huggingface plain", "sentencepiece"]
)
def tokenizer(request, tmp_path):
    kind, _, ends = request.param.partition(" ")
    if kind == "huggingface":
        path = tmp_path / "tokenizer.json"
        path.write_text(_tokenizer_json(ends or "absent"), encoding="utf-8")
        return make_tokenizer(str(path))
    if kind == "sentencepiece":
        path = tmp_path / "tokenizer.json"
        path.write_text(_sentencepiece_json(), encoding="utf-8")
        made = make_tokenizer(str(path))
        assert made.decode(made.encode("the cat")[1:]) == "cat"  # by themselves, these ids lose their space
        return made
    if kind == "llama3":
        path = tmp_path / "tokenizer.model"
        path.write_bytes(_rank_lines([bytes([b]) for b in range(256)] + [b"th", b"the", b" the"]))
        return make_tokenizer(str(path))
    return make_tokenizer({"bytes": "bytes", "bpe": "bpe:300"}[kind], TEXTS)


def test_round_trip_is_exact_and_never_yields_a_special(tokenizer):
    for text in ROUND_TRIPS:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert ids.ndim == 1
        assert tokenizer.begin not in ids
        assert tokenizer.end not in ids
        assert not ids.size or 0 <= ids.min() <= ids.max() < tokenizer.vocabulary
        assert tokenizer.decode(ids) == text


def test_decode_drops_specials_and_replaces_broken_utf8(tokenizer):
    ids = [tokenizer.begin, *tokenizer.encode("ab"), tokenizer.end]
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(np.array(ids)) == "ab"
    character = tokenizer.encode("é")
    if len(character) > 1:
        assert tokenizer.decode(character[:-1]) == "\ufffd"


@pytest.mark.parametrize("text", ["the cat sat on the mat", "a  b ", "naïve 🙂 cat", "  the"])
def test_a_text_and_its_continuation_are_the_whole(text, tokenizer):
    ids = tokenizer.encode(text)
    for cut in range(1, len(ids)):
        before, after = ids[:cut], ids[cut:]
        known = tokenizer.decode(before).rstrip("\ufffd")  # a character that is cut belongs to the continuation
        assert known + continuation(tokenizer, after, before) == text
    ids, known = tokenizer.encode("x the"), tokenizer.encode("x")
    assert continuation(tokenizer, ids[len(known) :]) == " the"  # after any text


def test_decode_refuses_ids_out_of_range(tokenizer):
    for bad in (-1, tokenizer.vocabulary):
        with pytest.raises(ValueError, match=re.escape(f"legal: 0 to {tokenizer.vocabulary - 1}")):
            tokenizer.decode([0, bad])


def test_load_restores_what_save_wrote(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    for name in ("kind", "vocabulary", "begin", "end", "fingerprint"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    for text in ROUND_TRIPS:
        np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))


def test_sizes_of_each_kind(tmp_path):
    made = make_tokenizer("bytes")
    assert (made.vocabulary, made.begin, made.end) == (258, 256, 257)
    made = make_tokenizer("bpe:300", TEXTS)
    assert (made.vocabulary, made.begin, made.end) == (300, 298, 299)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(_rank_lines([bytes([b]) for b in range(256)]))
    made = make_tokenizer(str(path))
    assert (made.vocabulary, made.begin, made.end) == (512, 256, 257)


def test_trained_ids_are_those_of_hugging_face_and_the_same_each_time():
    ranks = bpe.train_ranks(400, TEXTS)
    assert ranks == bpe.train_ranks(400, iter(TEXTS))
    assert RankTokenizer(ranks, "bpe").fingerprint == RankTokenizer(dict(reversed(ranks.items())), "bpe").fingerprint
    ours = RankTokenizer(ranks, "bpe")

    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(bpe.SPLIT), behavior="isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(TEXTS, trainer)
    for text in [*TEXTS, *ROUND_TRIPS]:
        assert ours.encode(text).tolist() == inner.encode(text).ids


def test_a_word_without_end_is_learned_from_in_pieces():
    """A genome: its square would take hours. It is learned from as its thousands of bytes are."""
    draw = random.Random(0)
    genome = "".join(draw.choices("ACGT", k=20_000))
    ranks = bpe.train_ranks(600, [genome])
    assert ranks == bpe.train_ranks(600, [genome[start : start + 1000] for start in range(0, len(genome), 1000)])
    tokenizer = RankTokenizer(ranks, "bpe")
    assert tokenizer.decode(tokenizer.encode(genome)) == genome
    assert len(tokenizer.encode(genome)) < len(genome) / 3


def test_learning_tells_how_far_it_is(monkeypatch):
    monkeypatch.setattr(bpe, "_TRIAL_BYTES", 1000)
    real, told = concurrent.futures.wait, []
    monkeypatch.setattr(bpe.concurrent.futures, "wait", lambda futures, _: real(futures, 0.001))
    bpe.train_ranks(600, TEXTS * 3, lambda *state: told.append(state))
    size = sum(len(text.encode()) for text in TEXTS * 3)
    assert [(done, total) for what, done, total in told if what == bpe.READING][-1] == (size, bpe.TRAINING_BYTES)
    assert {what for what, _, _ in told} == {bpe.READING, bpe.TIMING, bpe.LEARNING}
    assert all(total == 0 for what, _, total in told if what == bpe.TIMING)
    assert all(0 <= done <= total for what, done, total in told if what == bpe.LEARNING and total)


def test_the_first_megabyte_is_cut_out_of_a_long_text(monkeypatch):
    monkeypatch.setattr(bpe, "_TRIAL_BYTES", 10)
    assert bpe._first_bytes(["abc", "defghijklmnop", "q"]) == (["abc", "defghij"], 10)
    assert bpe._first_bytes(["abc"]) == (["abc"], 3)


def test_training_reads_no_more_than_its_share(monkeypatch):
    monkeypatch.setattr(bpe, "TRAINING_BYTES", 1000)
    read = []
    make_tokenizer("bpe:280", (read.append(text) or text for text in TEXTS * 100))
    assert sum(map(len, read)) < 1000 + max(map(len, TEXTS)) + len(TEXTS[0])


@pytest.mark.parametrize("piece", [1, 7, 50])
def test_cutting_long_texts_changes_no_id(monkeypatch, piece):
    tokenizer = make_tokenizer("bpe:400", TEXTS)
    parts = ["cat", " ", "\n", "!", "12345", "é", "你", "'s", "\t", "\r", "x", "  ", "\u3000", "don't"]
    parts += ["\r\n", "。", "，", "か", "한"]
    draw = np.random.default_rng(0)
    for _ in range(40):
        text = "".join(draw.choice(parts, size=200))
        whole = tokenizer.encode(text)
        with monkeypatch.context() as patch:
            patch.setattr(bpe, "_PIECE", piece)
            patch.setattr(bpe, "_cut_long_space", lambda text: iter([text]))
            assert len(list(bpe.pieces(text))) > 1
            assert "".join(bpe.pieces(text)) == text
            np.testing.assert_array_equal(tokenizer.encode(text), whole)


def test_a_run_of_a_million_spaces_is_encoded():
    # tiktoken by itself panics here
    tokenizer = make_tokenizer("bpe:300", TEXTS)
    text = "a" + " " * 1_000_000 + "b" + "x" * 300_000
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("spec", ["", "words", "bpe", "no/such/tokenizer.model"])
def test_unknown_spec_names_the_legal_forms(spec):
    with pytest.raises(
        ValueError, match=rf"tokenizer is {spec!r}.*legal: bytes; bpe:N.*tokenizer.json.*tokenizer.model"
    ):
        make_tokenizer(spec)


@pytest.mark.parametrize("spec", ["bpe:", "bpe:x", "bpe:257", "bpe:-3", "bpe:1.5"])
def test_bad_bpe_size(spec):
    with pytest.raises(ValueError, match=rf"tokenizer is {spec!r}; in bpe:N, N is an integer from 258 to 1048576"):
        make_tokenizer(spec, TEXTS)


def test_too_little_text_for_the_ids_asked():
    with pytest.raises(ValueError, match=r"bpe:5000.* hold only (\d+) ids; use bpe:\1 or fewer"):
        make_tokenizer("bpe:5000", TEXTS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{}", "not a Hugging Face tokenizer.json"),
        ("tokenizer.json", b"\xff", "tokenizer file"),
        ("tokenizer.model", b"\x0a\x0bbinary \x00", "line 1 is not 'base64 rank'"),
        ("tokenizer.model", b"", "lacks some of the 256 single bytes"),
        ("tokenizer.model", b"YQ== 1\n", "ranks are not 0, 1, 2"),
    ],
)
def test_bad_tokenizer_file_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        make_tokenizer(str(path))
    assert str(path) in str(caught.value)


def test_load_refuses_what_is_absent_or_changed(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer_config.json' is missing"):
        load_tokenizer(tmp_path)
    tokenizer = make_tokenizer("bpe:300", TEXTS)
    tokenizer.save(tmp_path)
    ranks = tmp_path / RankTokenizer.FILE
    lines = ranks.read_bytes().splitlines(keepends=True)
    ranks.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(ValueError, match="not the one that was saved"):
        load_tokenizer(tmp_path)
    ranks.unlink()
    with pytest.raises(ValueError, match=r"ranks.tiktoken' is missing"):
        load_tokenizer(tmp_path)
    for content in ("{", "[]", '{"kind": "odd", "format": 1}', '{"kind": "bytes", "format": 2}', '{"kind": "bytes"}'):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(ValueError, match="does not describe a tokenizer"):
            load_tokenizer(tmp_path)


def test_fingerprints_tell_tokenizers_apart():
    made = [make_tokenizer("bytes"), make_tokenizer("bpe:300", TEXTS), make_tokenizer("bpe:301", TEXTS)]
    made.append(make_tokenizer("bpe:300", TEXTS[1:]))
    assert len({t.fingerprint for t in made}) == len(made)


def test_llama3_of_llama_models():
    spec = importlib.util.find_spec("llama_models")
    if spec is None or spec.origin is None:
        pytest.skip("llama_models is not installed")
    made = make_tokenizer(str(pathlib.Path(spec.origin).parent / "llama3" / "tokenizer.model"))
    assert (made.kind, made.vocabulary, made.begin, made.end) == ("llama3", 128256, 128000, 128001)
    assert made.encode("Hello, world!").tolist() == [9906, 11, 1917, 0]
    for text in ROUND_TRIPS:
        assert made.decode(made.encode(text)) == text


def test_the_folder_of_a_prepared_corpus_names_its_tokenizer(tmp_path):
    made = make_tokenizer("bpe:300", [" ".join(f"word{i} and{i}" for i in range(300))])
    made.save(tmp_path / "tokenizer")
    assert make_tokenizer(str(tmp_path / "tokenizer")).fingerprint == made.fingerprint
    with pytest.raises(ValueError, match=r"tokenizer_config.json' is missing"):
        make_tokenizer(str(tmp_path))
