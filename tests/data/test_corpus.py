"""Options, files, and the split into training and held-out documents."""

import os

import numpy as np
import pytest

from jaxspeed.data import Data
from jaxspeed.data.corpus import find_files, open_corpora
from jaxspeed.data.standard_library import standard_library


def write(folder, **contents):
    for name, text in contents.items():
        (folder / f"{name}.txt").write_text(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(source="parquet"), "unknown source 'parquet'; sources are"),
        (dict(source="text"), "source='text' needs paths"),
        (dict(source="text", paths="a.txt"), r"tuples of strings; write \('a.txt',\)"),
        (dict(paths=("a.txt",)), "'standard_library' takes no paths; set source"),
        (dict(vocab_size=9), "vocab_size=9 is for source='tokenized' without"),
        (dict(sequence_length=0), "sequence_length=0 is not positive"),
        (dict(held_out_fraction=0.6), r"held_out_fraction=0.6 is not in \[0, 0.5\]"),
        (dict(seed=-1), r"seed=-1 is not in"),
        (dict(token_dtype="float32"), "token_dtype='float32' is no integer type"),
        (dict(token_dtype="u16int"), "token_dtype='u16int' is no integer type"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Data(**options)


def test_tokenizer_of_the_options():
    tokenized = dict(source="tokenized", paths=("a.bin",))
    assert Data().load_tokenizer().vocab_size == 257
    bare = Data(**tokenized, vocab_size=50257, end_of_document=50256).load_tokenizer()
    assert (bare.vocab_size, bare.end_of_document) == (50257, 50256)
    with pytest.raises(ValueError, match="the byte tokenizer ends documents with 256"):
        Data(**tokenized, end_of_document=0).load_tokenizer()


def test_find_files(tmp_path):
    for name in ("b.txt", "a.jsonl", ".hidden", "deep/c.txt", ".git/d.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")

    def names(paths, source):
        return [os.path.relpath(f, tmp_path) for f in find_files(paths, source)]

    folder = str(tmp_path)
    deep = os.path.join("deep", "c.txt")
    assert names([folder], "text") == ["a.jsonl", "b.txt", deep]
    assert names([folder], "jsonl") == ["a.jsonl"]
    globs = [f"{folder}/**/*.txt", f"{folder}/./b.txt"]
    assert names(globs, "text") == ["b.txt", deep]
    with pytest.raises(FileNotFoundError, match=r"nothing.txt' is no file"):
        find_files([f"{folder}/nothing.txt"], "text")
    with pytest.raises(FileNotFoundError, match=r"has no .npy or .bin file; source"):
        find_files([folder], "tokenized")
    (tmp_path / "void.txt").touch()
    with pytest.raises(ValueError, match=r"void.txt' is empty"):
        find_files([folder], "text")


def test_held_out_paths_and_fraction(tmp_path):
    write(tmp_path, **{f"file{i:02d}": f"text {i}" for i in range(32)})
    data = Data(source="text", paths=(str(tmp_path),))
    tokenizer = data.load_tokenizer()
    train, held_out = open_corpora(data, tokenizer)
    assert (len(train), len(held_out)) == (30, 2)
    kept = [tokenizer.decode(train[i][0]) for i in range(30)]
    assert kept == [f"text {i}" for i in range(32) if i not in (15, 31)]
    assert [tokenizer.decode(held_out[i][0]) for i in range(2)] == [
        "text 15",
        "text 31",
    ]

    named = Data(
        source="text",
        paths=(f"{tmp_path}/file0*.txt",),
        held_out_paths=(f"{tmp_path}/file3*.txt",),
    )
    train, held_out = open_corpora(named, tokenizer)
    assert (len(train), len(held_out)) == (10, 2)
    both = Data(source="text", paths=(str(tmp_path),), held_out_paths=(str(tmp_path),))
    with pytest.raises(ValueError, match="both for training and held out"):
        open_corpora(both, tokenizer)


@pytest.mark.parametrize("num_files", [1, 2, 5])
def test_few_files(tmp_path, num_files):
    write(tmp_path, **{f"file{i}": f"text {i}" for i in range(num_files)})
    data = Data(source="text", paths=(str(tmp_path),))
    tokenizer = data.load_tokenizer()
    train, held_out = open_corpora(data, tokenizer)
    read = [tokenizer.decode(c[i][0]) for c in (train, held_out) for i in range(len(c))]
    assert read == [f"text {i}" for i in range(num_files)]
    assert len(held_out) == min(1, num_files - 1)
    none = Data(source="text", paths=(str(tmp_path),), held_out_fraction=0)
    assert [len(corpus) for corpus in open_corpora(none, tokenizer)] == [num_files, 0]


def test_a_file_of_any_size_opens_at_once(tmp_path):
    path = tmp_path / "zeros.txt"
    with open(path, "wb") as file:
        file.truncate(2**36)  # takes no room on disk
    data = Data(source="text", paths=(str(path),))
    train, held_out = open_corpora(data, data.load_tokenizer())
    assert len(train) == 15 * 2**16 and len(held_out) == 2**16
    assert len(held_out[2**16 - 1][0]) == 2**16 + 1


def test_large_files_are_cut_into_pieces(tmp_path):
    text = "".join(f"{i:07d}\n" for i in range(3 * 2**13 + 5))  # 3 pieces and 40 bytes
    write(tmp_path, a="start", b=text, c="end")
    data = Data(source="text", paths=(str(tmp_path),), held_out_fraction=0)
    tokenizer = data.load_tokenizer()
    train, _ = open_corpora(data, tokenizer)
    read = [tokenizer.decode(train[i][0]) for i in range(len(train))]
    assert [len(document) for document in read] == [5, 2**16, 2**16, 2**16, 40, 3]
    assert "".join(read) == "start" + text + "end"
    longer = Data(
        source="text", paths=data.paths, held_out_fraction=0, sequence_length=2**13
    )
    assert len(open_corpora(longer, tokenizer)[0]) == 2 + 2


def test_documents_without_a_pair_are_refused(tmp_path):
    path = tmp_path / "zeros.bin"
    np.zeros(10, np.uint16).tofile(path)
    data = Data(source="tokenized", paths=(str(path),), vocab_size=9, end_of_document=0)
    train, _ = open_corpora(data, data.load_tokenizer())
    with pytest.raises(ValueError, match=r"zeros.bin' has no document of two ids"):
        train[0]
    np.save(tmp_path / "none.npy", np.zeros(0, np.int32))
    data = Data(source="tokenized", paths=(str(tmp_path / "none.npy"),))
    with pytest.raises(ValueError, match=r"none.npy' is empty: it holds no ids"):
        open_corpora(data, data.load_tokenizer())


def test_standard_library():
    train, held_out = standard_library(1 / 16)
    assert len(train) > 300 and not set(train) & set(held_out)
    assert 0.03 < len(held_out) / (len(train) + len(held_out)) < 0.12
    names = {os.path.basename(path) for path in train + held_out}
    assert {"argparse.py", "typing.py"} <= names
    parts = {part for path in train + held_out for part in path.split(os.sep)}
    assert not parts & {"site-packages", "test", "tests", "encodings"}
    assert standard_library(0)[1] == ()


def test_standard_library_splits_by_name(tmp_path):
    folders = []
    for number, text in enumerate(("one", "another text")):
        folders.append(tmp_path / str(number))
        for name in [f"m{i}.py" for i in range(40)] + ["test/t.py", "pack/n.py"]:
            path = folders[-1] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (folders[-1] / "empty.py").touch()

    def names(number):
        return [
            [os.path.relpath(path, folders[number]) for path in paths]
            for paths in standard_library(0.25, str(folders[number]))
        ]

    assert names(0) == names(1)
    train, held_out = names(0)
    assert sorted(train + held_out) == sorted(
        [f"m{i}.py" for i in range(40)] + [os.path.join("pack", "n.py")]
    )
    with pytest.raises(FileNotFoundError, match="no source of Python's standard lib"):
        standard_library(0.25, str(tmp_path / "zipped"))
