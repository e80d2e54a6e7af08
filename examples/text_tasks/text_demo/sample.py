"""Three small tasks out of templates of our own, to see the example run without data."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

# Sentences of a task are all its frames with all the words of a class.
_TASKS: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "topics": (
        (
            "we talked about {} all evening",
            "she reads everything on {}",
            "a new book about {} is out",
            "he knows a lot of {}",
            "nothing interests them like {}",
            "the whole village speaks of {}",
            "my sister teaches {}",
            "there is a show on {} tonight",
        ),
        {
            "weather": ("rain", "storms", "snow and fog", "the wind", "clouds"),
            "cooking": ("soup", "baking bread", "roasted onions", "sauces", "cake"),
            "sport": ("football", "a tennis match", "swimming", "the race", "goals"),
        },
    ),
    "questions": (
        (
            "{} broke the green lamp",
            "tell me {} left the house",
            "{} did you find the key",
            "can you say {} they met",
            "I wonder {} he sang",
            "{} was that again",
            "nobody remembers {} it began",
            "please ask {} she was called",
        ),
        {
            "person": ("who", "which man", "which woman", "whose friend", "what teacher"),
            "time": ("when", "at what hour", "on which day", "in what year", "how early"),
            "place": ("where", "in which town", "on which street", "at what corner", "how far"),
        },
    ),
    "mood": (
        (
            "what a {} day it was",
            "the guests were {} again",
            "I feel {} about this plan",
            "her letter sounded {}",
            "it was a {} film to watch",
            "they came home {} and late",
            "this is the most {} place",
            "he gave a {} answer",
        ),
        {
            "glad": ("happy", "cheerful", "lovely", "bright", "joyful"),
            "sad": ("gloomy", "sad", "bitter", "dreary", "tearful"),
        },
    ),
}


def write_sample(folder: Path) -> list[Path]:
    """Write one file of each format, with its descriptions for one of them; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    writers = (_csv, _tsv, _jsonl)
    files = []
    for (name, (frames, classes)), write in zip(_TASKS.items(), writers, strict=True):
        rows = [
            (frame.format(word), label)
            for label, words in classes.items()
            for frame in frames
            for word in words
        ]
        order = np.random.default_rng(len(rows)).permutation(len(rows))
        files.append(write(folder / name, [rows[index] for index in order]))
    described = {"glad": "Somebody is glad.", "sad": "Somebody is sad."}
    (folder / "mood.labels.json").write_text(json.dumps(described) + "\n", encoding="utf-8")
    return files


def _csv(path: Path, rows: list[tuple[str, str]]) -> Path:
    return _table(path.with_suffix(".csv"), rows, ",")


def _tsv(path: Path, rows: list[tuple[str, str]]) -> Path:
    return _table(path.with_suffix(".tsv"), rows, "\t")


def _table(path: Path, rows: list[tuple[str, str]], between: str) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=between, lineterminator="\n")
        writer.writerow(("text", "label"))
        writer.writerows(rows)
    return path


def _jsonl(path: Path, rows: list[tuple[str, str]]) -> Path:
    path = path.with_suffix(".jsonl")
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
