"""Packing to the last number, and streams that resume exactly on any hosts."""

import itertools
import json

import numpy as np
import pytest

from jaxspeed.data import Data, held_out_batches, host_rows, train_batches

END = 256


def ids(text):
    return [END if letter == "|" else ord(letter) for letter in text]


def text_data(folder, *texts, **options):
    for number, text in enumerate(texts):
        (folder / f"{number:03d}.txt").write_text(text)
    options = dict(held_out_fraction=0) | options
    return Data(source="text", paths=(str(folder),), **options)


@pytest.fixture
def rows_data(tmp_path):
    """Forty documents of one row each, in windows of ten rows."""
    texts = [f"{number:04d}" for number in range(40)]
    return text_data(tmp_path, *texts, sequence_length=4)


def names(batch):
    """The document in each row of a batch."""
    return [bytes(row.astype(np.uint8)).decode() for row in batch["tokens"]]


def assert_same(batch, other):
    assert batch.keys() == other.keys()
    for field in batch:
        np.testing.assert_array_equal(batch[field], other[field])


def test_packing(tmp_path):
    data = text_data(tmp_path, "abcd", "xy", "p", shuffle=False, sequence_length=3)
    held_out = Data(
        source="text",
        paths=(str(tmp_path / "002.txt"),),
        held_out_paths=(str(tmp_path / "000.txt"), str(tmp_path / "001.txt")),
        sequence_length=3,
    )
    with_p = np.array([ids("abc"), ids("dxy"), [ord("p"), ord("a"), ord("b")]])
    train = train_batches(data, 3)
    batch = next(train)
    np.testing.assert_array_equal(batch["tokens"], with_p)
    np.testing.assert_array_equal(
        batch["targets"], [ids("bcd"), ids("|y|"), ids("|bc")]
    )
    np.testing.assert_array_equal(batch["segments"], [[1, 1, 1], [1, 2, 2], [1, 2, 2]])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2], [0, 0, 1], [0, 0, 1]])
    np.testing.assert_array_equal(batch["weights"], np.ones((3, 3)))

    (batch,) = held_out_batches(held_out, 4)
    expected = {
        "tokens": [ids("abc"), ids("dxy"), [0] * 3, [0] * 3],
        "targets": [ids("bcd"), ids("|y|"), [0] * 3, [0] * 3],
        "segments": [[1, 1, 1], [1, 2, 2], [0] * 3, [0] * 3],
        "positions": [[0, 1, 2], [0, 0, 1], [0] * 3, [0] * 3],
        "weights": [[1, 1, 1], [1, 1, 1], [0] * 3, [0] * 3],
    }
    for field, values in expected.items():
        np.testing.assert_array_equal(batch[field], values, err_msg=field)
        dtype = np.float32 if field == "weights" else np.int32
        assert batch[field].dtype == dtype and batch[field].shape == (4, 3)


def test_last_row_is_padded(tmp_path):
    data = text_data(tmp_path, "p", sequence_length=3)
    data = Data(
        source="text", paths=(__file__,), held_out_paths=data.paths, sequence_length=3
    )
    (batch,) = held_out_batches(data, 1)
    np.testing.assert_array_equal(batch["tokens"], [[ord("p"), 0, 0]])
    np.testing.assert_array_equal(batch["targets"], [[END, 0, 0]])
    np.testing.assert_array_equal(batch["segments"], [[1, 0, 0]])
    np.testing.assert_array_equal(batch["weights"], [[1, 0, 0]])


def test_every_pair_of_a_document_appears_once(tmp_path):
    texts = ["the quick brown fox", "jumps", "over the lazy dog " * 9]
    data = text_data(tmp_path, *texts, sequence_length=7)
    data = Data(
        source="text", paths=(__file__,), held_out_paths=data.paths, sequence_length=7
    )
    found = []
    for batch in held_out_batches(data, 2):
        real = batch["weights"] == 1
        found += zip(batch["tokens"][real], batch["targets"][real], strict=True)
    documents = [ids(text + "|") for text in texts]
    assert found == [pair for doc in documents for pair in itertools.pairwise(doc)]


def test_rows_of_one_document_are_spread(tmp_path):
    text = "".join(f"{number:04d}" for number in range(100))
    data = text_data(tmp_path, text, sequence_length=4)
    order = [int(name) for name in names(next(train_batches(data, 25)))]
    # The window is a quarter of the corpus: the first 25 rows, in another order.
    assert order != sorted(order) == list(range(25))


def test_every_epoch_has_all_documents_in_a_new_order(rows_data):
    batches = train_batches(rows_data, 40)
    epochs = [names(next(batches)) for _ in range(3)]
    everything = sorted(epochs[0])
    assert everything == [f"{number:04d}" for number in range(40)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert epochs[0] != everything
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_order_depends_on_the_seed_alone(rows_data):
    def first(seed, shuffle=True):
        options = dict(paths=rows_data.paths, seed=seed, shuffle=shuffle)
        data = Data(source="text", held_out_fraction=0, sequence_length=4, **options)
        return names(next(train_batches(data, 40)))

    assert first(0) == names(next(train_batches(rows_data, 40)))
    assert first(0) != first(1)
    assert first(0, shuffle=False) == [f"{number:04d}" for number in range(40)]


@pytest.mark.parametrize("taken", [0, 1, 2, 3, 5, 12])
def test_resume_is_exact(tmp_path, taken):
    # Rows of 5 in documents of 3 to 60 bytes, windows of a quarter of the corpus.
    texts = ["abcdefghij"[: 3 + n % 5] * (1 + n % 6) for n in range(30)]
    data = text_data(tmp_path, *texts, sequence_length=5)
    batches = train_batches(data, 4)
    for _ in range(taken):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(15)]
    resumed = train_batches(data, 4, read_ahead=0)
    next(resumed)
    resumed.set_state(state)
    assert resumed.get_state() == state
    for batch in expected:
        assert_same(next(resumed), batch)


@pytest.mark.parametrize("source", ["jsonl", "tokenized"])
def test_resume_within_a_file_of_many_documents(tmp_path, source):
    documents = [[1 + n % 200] * (2 + n % 7) for n in range(50)]
    if source == "jsonl":
        path = tmp_path / "a.jsonl"
        texts = ["".join(map(chr, document)) for document in documents]
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    else:
        path = tmp_path / "a.npy"
        np.save(path, np.concatenate([[*document, END] for document in documents]))
    data = Data(
        source=source, paths=(str(path),), sequence_length=5, held_out_fraction=0
    )
    batches = train_batches(data, 4)
    seen = [next(batches) for _ in range(7)]
    state = batches.get_state()
    expected = [next(batches) for _ in range(20)]
    resumed = train_batches(data, 4)
    resumed.set_state(state)
    for batch in expected:
        assert_same(next(resumed), batch)
    segments = np.concatenate([batch["segments"] for batch in seen])
    assert segments.max() > 1


def test_hosts_keep_their_rows_and_share_the_state(rows_data):
    whole = train_batches(rows_data, 8)
    state = None
    for num_hosts in (1, 2, 4, 2):  # each phase goes on from the state of the last
        hosts = [
            train_batches(rows_data, 8, rows=host_rows(8, host, num_hosts))
            for host in range(num_hosts)
        ]
        if state is not None:
            for host in hosts:
                host.set_state(state)
        for _ in range(3):
            parts = [next(host) for host in hosts]
            joined = {
                field: np.concatenate([part[field] for part in parts])
                for field in parts[0]
            }
            assert len(parts[0]["tokens"]) == 8 // num_hosts
            assert_same(next(whole), joined)
        states = [host.get_state() for host in hosts]
        assert all(other == states[0] for other in states)
        state = states[0]
    assert state == whole.get_state()


def test_batch_size_may_change_on_resume(rows_data):
    batches = train_batches(rows_data, 4)
    next(batches)
    larger = train_batches(rows_data, 8)
    larger.set_state(batches.get_state())
    assert names(next(larger)) == names(next(batches)) + names(next(batches))


def test_held_out_on_hosts(tmp_path):
    texts = [f"{number:04d}" for number in range(11)]
    train, held_out = tmp_path / "train", tmp_path / "held_out"
    train.mkdir()
    held_out.mkdir()
    text_data(held_out, *texts)
    data = text_data(train, "abc", held_out_paths=(str(held_out),), sequence_length=4)
    whole = list(held_out_batches(data, 4))
    assert len(whole) == 3
    assert [name for batch in whole for name in names(batch)][:11] == texts
    assert sum(batch["weights"].sum() for batch in whole) == 44
    last_host = list(held_out_batches(data, 4, rows=host_rows(4, 3, 4)))
    for batch, part in zip(whole, last_host, strict=True):
        assert_same({name: array[3:] for name, array in batch.items()}, part)
    assert last_host[2]["weights"].sum() == 0


def test_state_of_other_data_is_refused(rows_data, tmp_path):
    state = train_batches(rows_data, 4).get_state()
    options = dict(source="text", paths=rows_data.paths, held_out_fraction=0)
    longer = Data(**options, sequence_length=5)
    with pytest.raises(ValueError, match=r"'sequence_length': '4 -> 5'"):
        train_batches(longer, 4).set_state(state)
    other_seed = Data(**options, sequence_length=4, seed=7)
    with pytest.raises(ValueError, match=r"not those .* \{'seed': '0 -> 7'\}"):
        train_batches(other_seed, 4).set_state(state)
    (tmp_path / "more.txt").write_text("more")
    with pytest.raises(ValueError, match="'files'"):
        train_batches(rows_data, 4).set_state(state)


@pytest.mark.parametrize("read_ahead", [0, 2])
def test_malformed_file_is_named_while_reading(tmp_path, read_ahead):
    data = text_data(tmp_path, "good", "better", sequence_length=4)
    (tmp_path / "bad.txt").write_bytes(b"\xff\xff")
    batches = train_batches(data, 4, read_ahead=read_ahead)
    with pytest.raises(ValueError, match=r"bad.txt' is not UTF-8 text: byte 0"):
        for _ in range(10):
            next(batches)


def test_wrong_calls(rows_data):
    with pytest.raises(ValueError, match="nothing is held out: held_out_fraction=0"):
        held_out_batches(rows_data, 4)
    with pytest.raises(ValueError, match="batch_size=0 is not positive"):
        train_batches(rows_data, 0)
    with pytest.raises(ValueError, match="keeps none of the 4 rows"):
        train_batches(rows_data, 4, rows=slice(4, 8))
    with pytest.raises(ValueError, match="host 0 of 3 has no equal share"):
        host_rows(8, 0, 3)
    with pytest.raises(ValueError, match="host 2 of 2 has no equal share"):
        host_rows(8, 2, 2)
    batches = train_batches(rows_data, 4)
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="these batches are closed"):
        next(batches)


def test_standard_library_is_ready_to_use():
    data = Data(sequence_length=64)
    batch = next(train_batches(data, 2))
    text = bytes(batch["tokens"][0].clip(0, 255).astype(np.uint8))
    assert text.isascii() or text.decode(errors="replace")
    assert batch["tokens"].shape == (2, 64) and batch["weights"].min() == 1
    assert next(held_out_batches(data, 2))["weights"].min() == 1
