from __future__ import annotations

import re
from typing import Any

from fastnet.data.entries import SPLIT_NAMES, Entry, Source, Tree
from fastnet.errors import InputError


def official_layout(tree: Tree, root: str, record: dict[str, Any]) -> Source:
    """train/<wnid>/images/*, flat val/images/* with val_annotations.txt, flat test/images/*."""
    present = set(tree.files)

    def lines(name: str) -> list[str]:
        if root + name not in present:
            raise InputError(f"{tree.path}: {root}{name} is missing")
        return tree.read(root + name).decode("utf-8", "replace").splitlines()

    wnids = sorted({line.strip() for line in lines("wnids.txt")} - {""})
    inside = re.compile(re.escape(root) + r"(train/([^/]+)|val|test)/images/([^/]+)")
    splits: dict[str, list[Entry]] = {"train": [], "val": [], "test": []}
    for file in tree.files:
        if match := inside.fullmatch(file):
            splits[match[1].split("/")[0]].append(Entry(match[3], match[2], file))

    trained = {entry.label for entry in splits["train"]}
    if missing := [wnid for wnid in wnids if wnid not in trained]:
        raise InputError(f"{tree.path}: class {missing[0]} of wnids.txt has no images in {root}train")
    if unknown := sorted(str(label) for label in trained.difference(wnids)):
        raise InputError(f"{tree.path}: {root}train has class {unknown[0]}, which wnids.txt lacks")

    labels = {}
    val = {entry.name for entry in splits["val"]}
    for number, line in enumerate(lines("val/val_annotations.txt"), 1):
        name, _, rest = line.partition("\t")
        if not line.strip():
            continue
        if name not in val:
            raise InputError(
                f"{tree.path}: {root}val/val_annotations.txt line {number} names {name!r}, not in val/images"
            )
        labels[name] = rest.split("\t")[0].strip()
    for entry in splits["val"]:
        if entry.name not in labels:
            raise InputError(f"{tree.path}: {entry.where} has no line in {root}val/val_annotations.txt")
    splits["val"] = [entry._replace(label=labels[entry.name]) for entry in splits["val"]]

    pairs = (line.partition("\t") for line in (lines("words.txt") if root + "words.txt" in present else []))
    words = {wnid: meaning.split(",")[0].strip() for wnid, _, meaning in pairs if wnid in trained}
    return Source(record, splits, tree.read, words)


def class_folders(tree: Tree, record: dict[str, Any]) -> Source:
    """<class>/..., or train/<class>/..., val/<class>/..., test/<class>/... or test/* (unlabelled)."""
    tops = {file.split("/")[0] for file in tree.files}
    prefix = f"{tops.pop()}/" if len(tops) == 1 and not tops & set(SPLIT_NAMES) else ""
    if prefix and not any(file.removeprefix(prefix).count("/") for file in tree.files):
        prefix = ""  # a single class, not a folder around the classes
    files = [file.removeprefix(prefix) for file in tree.files]
    splitted = any(file.startswith("train/") for file in files)
    splits: dict[str, list[Entry]] = {"train": []}
    for file, where in zip(files, tree.files, strict=True):
        if not splitted:
            split, inner = "train", file
        elif (top := file.split("/")[0]) in SPLIT_NAMES:
            split, inner = SPLIT_NAMES[top], file.partition("/")[2]
        else:
            raise InputError(f"{tree.path}: {where} is in none of train/, val/ and test/")
        label = inner.split("/")[0] if "/" in inner else None
        if label is None and split != "test":
            raise InputError(
                f"{tree.path}: {where} is in no class folder; known are the zip or folder of Tiny ImageNet, "
                "Parquet files, and a folder of class folders"
            )
        splits.setdefault(split, []).append(Entry(inner, label, where))
    return Source({**record, "kind": f"class folders ({record['kind']})"}, splits, tree.read)
