"""How folders and zips of images are laid out: as Tiny ImageNet, or as a folder for each class."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from fastnet.data.entries import SPLIT_NAMES, Entry, Source, Tree, is_image_name, natural
from fastnet.data.image import MAX_BYTES, BadImage
from fastnet.errors import InputError

MAX_TEXT = 1 << 24  # bytes of a text file; Tiny ImageNet's largest has 3 MB


def tree_source(tree: Tree, record: dict[str, Any]) -> Source:
    """The source that a folder or zip is. Raises InputError if it has neither layout, or is not consistent."""
    roots = [name.removesuffix("wnids.txt") for name in tree.files if name.split("/")[-1] == "wnids.txt"]
    if len(roots) > 1:
        raise InputError(f"{tree.path}: more than one wnids.txt: {', '.join(roots)}; name one folder")
    return official_layout(tree, roots[0], record) if roots else class_folders(tree, record)


def official_layout(tree: Tree, root: str, record: dict[str, Any]) -> Source:
    """train/<wnid>/images/*, flat val/images/* with val_annotations.txt, flat test/images/*.

    Many scripts put the images of val into class folders, as torchvision's ImageFolder wants them: val/<wnid>/*,
    val/<wnid>/images/* or val/images/<wnid>/*. That is the same set, in the same order.
    """
    wnids = sorted({line.strip() for line in _lines(tree, root + "wnids.txt")} - {""})
    splits: dict[str, list[Entry]] = {"train": [], "val": [], "test": []}
    left_out = []
    for file in tree.files:
        split, *below = file.removeprefix(root).split("/") if file.startswith(root) else [""]
        if split not in splits or not below or file.endswith(".txt"):
            continue  # words.txt, val_annotations.txt, boxes
        if not is_image_name(file):
            left_out.append(file)
            continue
        *folders, name = below
        classes = [folder for folder in folders if folder != "images"]
        if len(classes) > 1:
            raise InputError(f"{tree.path}: {file} is below two folders that may be its class; move it up")
        splits[split].append(Entry(name, classes[0] if classes else None, file))

    trained = {entry.label for entry in splits["train"] if entry.label is not None}
    if missing := [wnid for wnid in wnids if wnid not in trained]:
        raise InputError(
            f"{tree.path}: class {missing[0]} of wnids.txt has no images in {root}train; add some, or remove its line"
        )
    if unknown := sorted(trained.difference(wnids)):
        raise InputError(
            f"{tree.path}: {root}train has class {unknown[0]}, which wnids.txt lacks; name it there, or remove it here"
        )

    splits["val"].sort(key=lambda entry: natural(entry.name))
    flat = [entry for entry in splits["val"] if entry.label is None]
    sorted_in = [entry for entry in splits["val"] if entry.label is not None]
    if flat and sorted_in:
        raise InputError(
            f"{tree.path}: {sorted_in[0].where} is in a class folder, {flat[0].where} is not; put all images of val "
            "into class folders, or none"
        )
    if not sorted_in:
        labels = _annotations(tree, root + "val/val_annotations.txt", {entry.name for entry in flat})
        splits["val"] = [entry._replace(label=labels[entry.name]) for entry in flat]

    lines = _lines(tree, root + "words.txt") if root + "words.txt" in tree.files else []
    pairs = (line.partition("\t") for line in lines)
    words = {wnid: meaning.split(",")[0].strip() for wnid, _, meaning in pairs if wnid in trained}
    return Source(record, splits, _reader(tree), words, left_out)


def _annotations(tree: Tree, file: str, images: set[str]) -> dict[str, str]:
    """The class of each val image: lines of the image's name, its class and a box, separated by tabs."""
    labels: dict[str, str] = {}
    for number, line in enumerate(_lines(tree, file), 1):
        name, _, rest = line.partition("\t")
        if not line.strip():
            continue
        if name not in images:
            raise InputError(
                f"{tree.path}: {file} line {number} names {name!r}, not in val/images; remove the line"
            )
        if name in labels:
            raise InputError(
                f"{tree.path}: {file} line {number} names {name!r} a second time; remove one line"
            )
        labels[name] = rest.split("\t")[0].strip()
    if missing := sorted(images - labels.keys()):
        folder = file.removesuffix("val_annotations.txt")
        raise InputError(
            f"{tree.path}: {folder}images/{missing[0]} has no line in {file}; add it, or remove the image"
        )
    return labels


def class_folders(tree: Tree, record: dict[str, Any]) -> Source:
    """<class>/..., or train/<class>/..., val/<class>/..., test/<class>/... or test/* (unlabelled)."""
    files = [file for file in tree.files if is_image_name(file)]
    left_out = [file for file in tree.files if not is_image_name(file)]
    prefix = _folder_around(files)
    inner = [file.removeprefix(prefix) for file in files]
    parts = _split_folders(tree, inner)
    splits: dict[str, list[Entry]] = {"train": []}
    for file, where in zip(inner, files, strict=True):
        top, _, below = file.partition("/")
        if not parts:
            split, name = "train", file
        elif top in parts and below:
            split, name = parts[top], below
        else:
            raise InputError(f"{tree.path}: {where} is in none of train/, val/ and test/; move or remove it")
        label = name.split("/")[0] if "/" in name else None
        if label is None and split != "test":
            raise InputError(
                f"{tree.path}: {where} is in no class folder; known are the zip or folder of Tiny ImageNet, "
                "Parquet files, and a folder of class folders"
            )
        splits.setdefault(split, []).append(Entry(name, label, where))
    if "images" not in {entry.label for entry in splits["train"]}:  # test/images/* is Tiny ImageNet's
        splits = {
            split: [entry._replace(label=None) if entry.label == "images" else entry for entry in entries]
            for split, entries in splits.items()
        }
    _refuse_empty(tree, prefix, parts, files)
    record = {**record, "kind": f"class folders ({record['kind']})"}
    return Source(record, splits, _reader(tree), left_out=left_out)


def _folder_around(files: list[str]) -> str:
    """The folders around everything, each with a slash; what is left begins with a class or a split."""
    prefix = ""
    while True:
        inner = [file.removeprefix(prefix) for file in files]
        tops = {file.partition("/")[0] for file in inner}
        if len(tops) != 1 or (top := tops.pop()).lower() in SPLIT_NAMES:
            return prefix
        if all(file.count("/") <= 1 for file in inner):
            return prefix
        prefix += f"{top}/"


def _split_folders(tree: Tree, files: list[str]) -> dict[str, str]:
    """Top folder -> split, in any case of letters; empty if no top folder is the train split, or all are classes, some
    of which are called like splits."""
    tops = {file.partition("/")[0] for file in files if "/" in file}
    parts = {top: SPLIT_NAMES[top.lower()] for top in tops if top.lower() in SPLIT_NAMES}
    flat = all(file.count("/") <= 1 for file in files if file.partition("/")[0] in parts)
    if "train" not in parts.values() or (flat and tops - parts.keys()):
        return {}
    for split in parts.values():
        same = sorted(top for top, name in parts.items() if name == split)
        if len(same) > 1:
            raise InputError(
                f"{tree.path}: {same[0]}/ and {same[1]}/ would both be the {split} split; keep one"
            )
    return parts


def _refuse_empty(tree: Tree, prefix: str, parts: dict[str, str], files: list[str]) -> None:
    """Raises InputError for the folder of a class or a split without images, rather than leave it out."""
    filled = parent_folders(files)
    class_depth = prefix.count("/") + bool(parts)
    for folder in sorted(tree.folders - filled):
        depth, name = folder.count("/"), folder.rpartition("/")[2]
        is_split = parts and depth == class_depth - 1 and name.lower() in SPLIT_NAMES
        if folder.startswith(prefix) and (depth == class_depth or is_split):
            raise InputError(f"{tree.path}: {folder}/ has no images; remove it, or put images into it")


def parent_folders(files: list[str]) -> set[str]:
    """All folders on the way to the files."""
    nearest = {file.rpartition("/")[0] for file in files}
    return {str(folder) for near in nearest for folder in (near, *PurePosixPath(near).parents)} - {"", "."}


def _lines(tree: Tree, name: str) -> list[str]:
    if name not in tree.files:
        raise InputError(f"{tree.path}: {name} is missing; get the set again")
    try:
        return tree.read(name, MAX_TEXT).decode("utf-8", "replace").splitlines()
    except BadImage as error:
        raise InputError(f"{tree.path}: {name} {error}") from error


def _reader(tree: Tree) -> Any:
    return lambda name: tree.read(name, MAX_BYTES)
