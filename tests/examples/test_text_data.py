"""What the example reads, how it splits it, and what it refuses."""

import json
from collections import Counter

import pytest
from text_demo.data import DataError, read_task, read_tasks
from text_demo.sample import write_sample
from text_demo.settings import TEMPLATE


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def rows_of(task):
    return {split: list(rows) for split, rows in task.splits.items()}


def test_csv_tsv_and_jsonl_give_the_same_task(tmp_path):
    pairs = [(f'a "{n}", b', "x_y" if n % 2 else "z") for n in range(20)]
    quoted = [text.replace('"', '""') for text, _ in pairs]
    csv = write(
        tmp_path / "one.csv",
        "label,text",
        *(f'{label},"{text}"' for text, (_, label) in zip(quoted, pairs, strict=True)),
    )
    tsv = write(
        tmp_path / "two.tsv",
        "text\tlabel",
        *(f'"{text}"\t{label}' for text, (_, label) in zip(quoted, pairs, strict=True)),
    )
    records = (json.dumps({"label": label, "text": text}) for text, label in pairs)
    lines = write(tmp_path / "three.jsonl", *records)
    first, second, third = (read_task(path, 3) for path in (csv, tsv, lines))
    assert first.prompts == ("This text is about x y.", "This text is about z.")
    assert rows_of(first) == rows_of(second) == rows_of(third)
    found = [row for rows in first.splits.values() for row in rows]
    assert sorted(found) == sorted((text, int(label == "z")) for text, label in pairs)


def test_every_class_is_split_60_20_20_by_the_seed(tmp_path):
    pairs = [(f"text {n}", "abc"[n % 3]) for n in range(150)]
    path = write(tmp_path / "t.jsonl", *(json.dumps({"text": t, "label": c}) for t, c in pairs))
    task = read_task(path, 0)
    counts = {split: Counter(label for _, label in rows) for split, rows in task.splits.items()}
    assert counts["train"] == {0: 30, 1: 30, 2: 30}
    assert counts["val"] == counts["test"] == {0: 10, 1: 10, 2: 10}
    texts = [text for rows in task.splits.values() for text, _ in rows]
    assert len(set(texts)) == 150
    assert rows_of(read_task(path, 0)) == rows_of(task)
    assert rows_of(read_task(path, 1)) != rows_of(task)
    few = read_task(path, 0, limit=7)
    assert {split: len(rows) for split, rows in few.splits.items()} == {
        "train": 7, "val": 7, "test": 7,
    }  # fmt: skip
    assert list(few.splits["val"]) == list(task.splits["val"])[:7]


def test_splits_of_the_file_are_kept(tmp_path):
    path = write(
        tmp_path / "t.csv", "text,label,split", "a,x,train", "b,y,train", "c,x,dev", "d,y,TEST",
        "a,y,test",
    )  # fmt: skip
    # The second `a` would be tested on what was learned.
    assert rows_of(read_task(path, 0)) == {
        "train": [("a", 0), ("b", 1)], "val": [("c", 0)], "test": [("d", 1)],
    }  # fmt: skip


def test_labels_are_described_beside_the_file_or_by_a_template(tmp_path):
    files = write_sample(tmp_path)
    topics, questions, mood = read_tasks(files, 0, 0, "On {label}!")
    assert topics.prompts == ("On cooking!", "On sport!", "On weather!")
    assert questions.prompts == ("On person!", "On place!", "On time!")
    assert mood.prompts == ("Somebody is glad.", "Somebody is sad.")
    assert {path.suffix for path in files} == {".csv", ".tsv", ".jsonl"}


def test_what_classify_reads_is_taken_as_it_is(tmp_path):
    data = {"prompts": ["p", "q"], "train": [["a", 0]], "val": [["b", 1]], "test": [["c", 0]]}
    path = write(tmp_path / "t.json", json.dumps(data | {"source": "ours"}))
    task = read_task(path, 0)
    assert task.prompts == ("p", "q")
    written = json.loads(task.to_json(16, 30.0))
    assert written == data | {"max_length": 16, "scale": 30.0}


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("t.csv", ["text,class", "a,x"], "t.csv, line 2: needs a `text` and a `label`"),
        ("t.csv", ["text,label", "a,x", "b,x"], "fewer than two labels"),
        ("t.csv", ["text,label", "a,x", "b,y"], "no rows for val"),
        ("t.csv", ["text,label,split", "a,x,train", "b,y,"], "some rows name their split"),
        ("t.csv", ["text,label,split", "a,x,holdout"], "line 2: split 'holdout' is none of"),
        ("t.jsonl", ['{"text": "a", "label": "x"}', "["], "cannot be read"),
        ("t.jsonl", ["[1]"], "line 1: is no object"),
        ("t.xlsx", ["a"], "is no .csv, .tsv, .jsonl or .json"),
        ("t.json", ['{"prompts": ["p"]}'], "needs `prompts`, `train`, `val` and `test`"),
        (
            "t.json",
            ['{"prompts": ["p"], "train": [["a", 1]], "val": [], "test": []}'],
            "label 1 has no prompt",
        ),
    ],
)
def test_a_file_that_is_not_as_said_is_refused_in_one_line(tmp_path, name, lines, message):
    with pytest.raises(DataError) as caught:
        read_task(write(tmp_path / name, *lines), 0)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_descriptions_of_unknown_labels_are_refused(tmp_path):
    path = write(tmp_path / "t.csv", "text,label", *(f"{n},{'xy'[n % 2]}" for n in range(20)))
    write(tmp_path / "t.labels.json", '{"w": "Something."}')
    with pytest.raises(DataError, match="has no label 'w'"):
        read_task(path, 0)


def test_one_task_is_nothing_to_merge(tmp_path):
    path = write_sample(tmp_path)[0]
    for files in ([path], [path, path]):
        with pytest.raises(DataError, match="two files or more"):
            read_tasks(files, 0, 0, TEMPLATE)
