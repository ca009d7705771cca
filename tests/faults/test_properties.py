"""Properties that hold whatever the numbers: buckets, choice of positions, merging, reading, growing files."""

import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from planted import write_dump

import merge_grad_vector_shards
from gradprobe.common.files import aside, json_line
from gradprobe.dump.buckets import bucket_of, choose_positions, fit_edges
from gradprobe.dump.consistency import load_dump, problems_of
from gradprobe.dump.growing import GrowingRows, crc32_of
from gradprobe.dump.records import Rollout
from gradprobe.probe.output import Progress
from gradprobe.problems.boxed import last_boxed
from gradprobe.rollouts.sample import chunks_of

reproducible = settings(
    deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
entropy = st.floats(0, 12, allow_subnormal=False)
entropies = st.lists(st.one_of(entropy, st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=60)
seeds = st.integers(0, 2**32 - 1)


@contextmanager
def new_directory() -> Iterator[Path]:
    """Each example its own: a fixture's would be shared by all."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


# Buckets


@reproducible
@given(entropies, st.integers(2, 8))
def test_edges_rise_and_hold_every_value(values, bins):
    edges = fit_edges(np.array(values), bins)
    assert edges.shape == (bins + 1,)
    assert (np.diff(edges) > 0).all()
    assert edges[0] == min(values)
    assert edges[-1] >= max(values)


@reproducible
@given(entropies, st.integers(2, 8), st.randoms(use_true_random=False))
def test_edges_hang_on_the_values_and_not_on_their_order(values, bins, random):
    shuffled = random.sample(values, len(values))
    np.testing.assert_array_equal(fit_edges(np.array(values), bins), fit_edges(np.array(shuffled), bins))


@reproducible
@given(entropies, st.integers(2, 8), entropies)
def test_every_value_is_in_exactly_one_bucket(values, bins, others):
    edges = fit_edges(np.array(values), bins)
    values = [*values, *others, *edges.tolist()]
    buckets = bucket_of(np.array(values), edges)
    for value, bucket in zip(values, buckets, strict=True):
        assert [bucket] == [b for b in range(bins) if holds(edges, b, value)]


def holds(edges: np.ndarray, bucket: int, value: float) -> bool:
    """Whether the bucket's [lo, hi) holds the value; the outermost reach to infinity."""
    above = bucket == 0 or value >= edges[bucket]
    below = bucket == len(edges) - 2 or value < edges[bucket + 1]
    return above and below


@reproducible
@given(st.lists(st.integers(0, 12_000), min_size=10, max_size=60, unique=True), st.integers(2, 5))
def test_buckets_are_of_equal_size_where_values_differ(thousandths, bins):
    values = np.array(thousandths) / 1000
    sizes = np.bincount(bucket_of(values, fit_edges(values, bins)), minlength=bins)
    assert sizes.max() - sizes.min() <= 2


# Choice of positions


@reproducible
@given(st.lists(st.integers(0, 4), max_size=80), st.integers(0, 6), seeds)
def test_positions_are_distinct_ascending_and_at_most_so_many_of_a_bucket(buckets, per_bucket, seed):
    buckets = np.array(buckets, dtype=int)
    chosen = choose_positions(buckets, 5, per_bucket, np.random.default_rng(seed))
    again = choose_positions(buckets, 5, per_bucket, np.random.default_rng(seed))
    np.testing.assert_array_equal(chosen, again)
    assert (np.diff(chosen) > 0).all()
    for bucket in range(5):
        n = int((buckets == bucket).sum())
        assert (buckets[chosen] == bucket).sum() == (min(n, per_bucket) if per_bucket else n)


@reproducible
@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.integers(1, 6), seeds, st.data())
def test_a_token_that_changes_its_bucket_leaves_other_buckets_as_they_were(buckets, per_bucket, seed, data):
    before = np.array(buckets)
    after = before.copy()
    token = data.draw(st.integers(0, len(buckets) - 1))
    after[token] = data.draw(st.integers(0, 4))
    chosen = [choose_positions(b, 5, per_bucket, np.random.default_rng(seed)).tolist() for b in (before, after)]
    for bucket in set(range(5)) - {before[token], after[token]}:
        assert [p for p in chosen[0] if before[p] == bucket] == [p for p in chosen[1] if after[p] == bucket]


def test_every_position_is_equally_likely():
    counts = np.zeros(6)
    for seed in range(3000):
        counts[choose_positions(np.zeros(6, int), 2, 2, np.random.default_rng(seed))] += 1
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(3000 * (1 / 3) * (2 / 3))


# Dumps: reading and merging


@st.composite
def tables(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Rows of a dump, rollout by rollout."""
    n_prompts, n_samples, n_rows = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    prompt, sample, _ = (axis.ravel() for axis in np.indices((n_prompts, n_samples, n_rows)))
    n, shape = len(prompt), (n_prompts, n_samples)
    correct = draw(hnp.arrays(bool, shape))[prompt, sample]
    bucket = draw(hnp.arrays(np.int64, n, elements=st.integers(0, 4)))
    grads = draw(hnp.arrays(np.float32, (n, 3), elements=st.floats(-4, 4, width=32)))
    return {"grads": grads, "bucket": bucket, "prompt": prompt, "sample": sample, "correct": correct}


def write(path: Path, table: dict[str, np.ndarray], rows: np.ndarray, **manifest: object) -> Path:
    return write_dump(path, **{name: column[rows] for name, column in table.items()}, **manifest)


def shuffle_meta(dump: Path, random: object) -> None:
    lines = (dump / "meta.jsonl").read_text().splitlines(keepends=True)
    random.shuffle(lines)
    (dump / "meta.jsonl").write_text("".join(lines))


COLUMNS = ("grads", "prompt", "sample_idx", "pos", "bin", "entropy", "correct")


@reproducible
@given(tables(), st.randoms(use_true_random=False))
def test_the_order_of_meta_lines_says_nothing(table, random):
    with new_directory() as directory:
        dump = write(directory / "dump", table, np.arange(len(table["prompt"])))
        before = load_dump(dump)
        shuffle_meta(dump, random)
        after = load_dump(dump)
        assert after.prompt_keys == before.prompt_keys
        for name in COLUMNS:
            np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
        assert [record["row"] for record in after.meta_records()] == list(range(len(after.row)))
        assert list(after.meta_records()) == list(before.meta_records())


@reproducible
@given(tables(), st.randoms(use_true_random=False), st.data())
def test_any_shards_merge_to_the_whole(table, random, data):
    """Rows follow the shards' order; edges are fitted over the union, so buckets are those of the whole."""
    n_prompts = int(table["prompt"].max()) + 1
    shard_of_prompt = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n_prompts, max_size=n_prompts)))
    parts = [np.flatnonzero(shard_of_prompt[table["prompt"]] == shard) for shard in np.unique(shard_of_prompt)]
    origin = {"dataset": {"sha256": "0" * 64}, "num_samples_per_prompt": 3}
    with new_directory() as directory:
        shards = [write(directory / f"s{i}", table, rows, **origin) for i, rows in enumerate(parts)]
        whole = write(directory / "whole", table, np.concatenate(parts), **origin)
        for shard in shards:
            shuffle_meta(shard, random)
        for name, sources in (("merged", shards), ("of_one", [whole])):
            assert merge_grad_vector_shards.main([str(directory / name), *map(str, sources)]) == 0
            assert problems_of(directory / name)[0] == []
        merged, of_one = (load_dump(directory / name) for name in ("merged", "of_one"))
        assert merged.manifest["entropy_edges"] == of_one.manifest["entropy_edges"]
        for key in ("num_prompts", "num_rollouts", "num_positions", "prompt_idxs"):
            assert merged.manifest[key] == of_one.manifest[key]
        for name in set(COLUMNS) - {"pos"}:  # write_dump numbers each shard's tokens from 0
            np.testing.assert_array_equal(getattr(merged, name), getattr(of_one, name))


# Verifying


@reproducible
@given(st.lists(st.sampled_from(["{", "}", "\\", "a", "\\boxed{", "\\{", "\\}", " "]), max_size=25).map("".join))
def test_what_a_box_holds_is_balanced_and_in_the_text(text):
    content = last_boxed(text)
    if content is not None:
        assert f"\\boxed{{{content}}}" in text
        assert lowest_and_last_depth(content) == (0, 0)


def lowest_and_last_depth(text: str) -> tuple[int, int]:
    """Of the braces that are not escaped."""
    depths, i = [0], 0
    while i < len(text):
        if text[i] == "\\":
            i += 2
            continue
        depths.append(depths[-1] + (text[i] == "{") - (text[i] == "}"))
        i += 1
    return min(depths), depths[-1]


@reproducible
@given(st.text(max_size=60), st.text(alphabet="abc12+", min_size=1, max_size=8))
def test_a_box_behind_any_text_is_found(before, answer):
    assume(not before.endswith("\\"))
    assert last_boxed(f"{before} \\boxed{{{answer}}}") == answer


# Chunks


@reproducible
@given(st.lists(st.integers(0, 20), max_size=40), st.integers(1, 30))
def test_chunks_are_a_partition_within_the_limit(rows_per_prompt, max_rows):
    chunks = list(chunks_of(rows_per_prompt, max_rows))
    assert [index for chunk in chunks for index in chunk] == list(range(len(rows_per_prompt)))
    sizes = [sum(rows_per_prompt[i] for i in chunk) for chunk in chunks]
    assert all(size <= max_rows or len(chunk) == 1 for size, chunk in zip(sizes, chunks, strict=True))
    for size, following in zip(sizes[:-1], chunks[1:], strict=True):
        assert size + rows_per_prompt[following[0]] > max_rows, "a chunk ends only where the next prompt would not fit"


# Growing files


@reproducible
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(0, 12), st.integers(1, 5)), elements=st.floats(width=32)),
    st.randoms(use_true_random=False),
    st.data(),
)
def test_rows_written_in_any_order_are_the_bytes_of_np_save(array, random, data):
    with new_directory() as directory:
        order = random.sample(range(len(array)), len(array))
        rows = GrowingRows(directory / "grown.npy", *array.shape)
        while order:
            n = data.draw(st.integers(1, len(order)))
            batch, order = np.sort(np.array(order[:n])), order[n:]
            rows.write(batch, array[batch])
            assert rows.crc32(batch) == crc32_of(array[batch])
        rows.finish()
        np.save(directory / "saved.npy", array)
        assert (directory / "grown.npy").read_bytes() == (directory / "saved.npy").read_bytes()
        assert not aside(directory / "grown.npy").exists()


@reproducible
@given(st.integers(1, 6), st.integers(1, 4), st.data())
def test_a_short_or_foreign_beginning_of_rows_is_begun_anew(n_rows, row_dim, data):
    ones, zeros = (crc32_of(np.full((n_rows, row_dim), value)) for value in (1, 0))
    with new_directory() as directory:
        file = directory / "grads.npy"
        rows = GrowingRows(file, n_rows, row_dim)
        rows.write(np.arange(n_rows), np.ones((n_rows, row_dim), np.float32))
        content = aside(file).read_bytes()
        aside(file).write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        assert GrowingRows(file, n_rows, row_dim).crc32(np.arange(n_rows)) == zeros
        file.write_bytes(content)  # one that was whole already grows on
        assert GrowingRows(file, n_rows, row_dim).crc32(np.arange(n_rows)) == ones
        assert len(GrowingRows(file, n_rows + 1, row_dim).finish() or file.read_bytes()) == len(content) + 4 * row_dim


def rollout(prompt: int, sample: int) -> Rollout:
    return Rollout(prompt, sample, f"p{prompt}", [1], [2, 3], [0.5, 1.0], [-0.5, -1.0], "π", "3", sample == 0)


PROMPTS = [[0, 1], [2], [3, 4]]
ROWS = [range(0, 2), range(2, 3), range(3, 6)]
GRADS = np.arange(18, dtype=np.float32).reshape(6, 3)


def written(directory: Path, *, n_chunks: int = 3, n_batches: int = 3) -> tuple[int, int]:
    """What a probe writes that ends after so many chunks and batches; how many of each were there."""
    with closing(Progress(directory, PROMPTS)) as progress:
        chunks_there = len(progress.chunks)
        for prompts in PROMPTS[chunks_there:n_chunks]:
            progress.add_rollouts([rollout(prompt, sample) for prompt in prompts for sample in range(2)], {"n": 1})
        if len(progress.chunks) < len(PROMPTS):
            return chunks_there, 0
        progress.finish_rollouts()
        progress.begin_gradients([directory], [3], list(map(len, ROWS)))
        batches_there = len(progress.batches)
        for item in range(batches_there, n_batches):
            rows = np.array(ROWS[item])[::-1]
            progress.add_gradients([item], rows, [GRADS[rows]], 100)
        if len(progress.batches) == len(ROWS):
            progress.finish_gradients()
        return chunks_there, batches_there


def content(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in ("rollouts.jsonl", "grads.npy")}


@lru_cache(maxsize=1)
def undisturbed() -> dict[str, bytes]:
    with new_directory() as directory:
        written(directory)
        return content(directory)


def spoil(file: Path, data: st.DataObject) -> None:
    """Cut the file short, flip a bit of it, or add to it."""
    spoilt = bytearray(file.read_bytes())
    how = data.draw(st.sampled_from(["cut", "flip", "add"]))
    at = int(data.draw(st.floats(0, 1, exclude_max=True)) * len(spoilt))  # lengths differ by the seconds noted
    if how == "flip":
        spoilt[at] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "cut":
        del spoilt[at:]
    else:
        spoilt += data.draw(st.binary(min_size=1, max_size=20))
    file.write_bytes(bytes(spoilt))


@settings(reproducible, max_examples=30, suppress_health_check=[HealthCheck.too_slow])  # it waits for the disk
@given(st.sampled_from([(1, 0), (2, 0), (3, 0), (3, 1), (3, 2), (3, 3)]), st.data())
def test_of_what_was_spoilt_the_sound_beginning_is_kept(there, data):
    with new_directory() as directory:
        assert written(directory, n_chunks=there[0], n_batches=there[1]) == (0, 0)
        for file in sorted(directory.iterdir()):
            if data.draw(st.booleans()):
                spoil(file, data)
        kept = written(directory)
        assert kept <= there
        assert content(directory) == undisturbed()


def test_what_is_sound_is_kept_up_to_the_first_entry_that_is_not(tmp_path):
    written(tmp_path, n_batches=2)
    assert written(tmp_path, n_batches=2) == (3, 2)
    lines = (tmp_path / "progress.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "progress.jsonl").write_bytes(lines[0] + lines[1][:-2] + b"".join(lines[2:]))
    assert written(tmp_path) == (1, 0)


def test_other_prompts_than_were_due_are_not_kept(tmp_path):
    written(tmp_path)
    with closing(Progress(tmp_path, [[0, 1], [2, 3], [4]])) as progress:
        assert [chunk["prompts"] for chunk in progress.chunks] == [[0, 1]]
        assert progress.batches == []


def test_lines_are_utf8_and_one_each():
    assert json_line({"text": "π\n\r\u2028"}).encode().count(b"\n") == 1
