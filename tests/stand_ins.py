"""Small prompt files and weights of both benchmarks, where configs seek the real ones."""

import json
from pathlib import Path

from cotgen_pl.conversion.formats import convert_checkpoint
from cotgen_pl.phrases import PUBLISHED, format_phrases
from tests.conversion.original_blip import write_blip_vqa, write_tokenizer
from tests.rewards.test_clip_score import write as write_clip
from tests.rewards.test_depth import write as write_depth
from tests.rewards.test_detectors import NAMES as DETECTED
from tests.rewards.test_detectors import build_detector
from tests.rewards.test_open_vocabulary import write as write_owlv2
from tests.test_phrases import Language

TEXTS = {
    "color": "a red {} and a blue dog",
    "shape": "a round {} and an oval dog",
    "texture": "a metal {} and a wooden dog",
    "spatial": "a {} on the left of a dog",
    "non_spatial": "A {} beside dogs.",
    "3d_spatial": "a {} behind a dog",
    "numeracy": "two {}s",
}
COMPLEX_TEXTS = {  # by their parts
    "spatial": "The red {} is on top of the table.",
    "action": "The red {} is beside the dog.",
    "spatialaction": "The red {} is near the dog.",
}
NOUNS = {"train": "cup", "val": "lamp"}  # in the place of {}
CUP, CAT = {"class": "cup", "count": 1}, {"class": "cat", "count": 1}
LEFT_OF_IT = {"position": ["left of", 0]}
GENEVAL = {  # prompt and clauses by tag
    "single_object": ("a cup", [CUP]),
    "two_object": ("a cup and a cat", [CUP, CAT]),
    "counting": ("two cats", [CAT | {"count": 2}]),
    "colors": ("a red cup", [CUP | {"color": "red"}]),
    "position": ("a cat left of a cup", [CUP, CAT | LEFT_OF_IT]),
    "color_attr": ("a red cup and a blue cat", [CUP | {"color": "red"}, CAT | {"color": "blue"}]),
}


def write_benchmarks(folder: Path) -> dict[str, str]:
    """Prompt files and converted weights of both benchmarks, a prompt of each category.

    Returns what has no place of its own but a hub id: arguments of `CompBenchReward`.
    """
    prompts, weights = folder / "data" / "t2i_compbench", folder / "weights"
    (folder / "data" / "geneval").mkdir(parents=True)
    prompts.mkdir()
    for split, noun in NOUNS.items():
        for category, text in TEXTS.items():
            (prompts / f"{category}_{split}.txt").write_text(text.format(noun), newline="\r\n")
    (prompts / "new_objects.txt").write_text("cup - cups\nlamp - lamps\n")
    rows = [{"tag": tag, "prompt": p, "include": i} for tag, (p, i) in GENEVAL.items()]
    text = "\n".join(map(json.dumps, rows))
    (folder / "data" / "geneval" / "evaluation_metadata.jsonl").write_text(text)
    (folder / "data" / "geneval" / "object_names.txt").write_text("\n".join(DETECTED))
    build_detector().save_pretrained(weights / "mask2former")
    (folder / "blip").mkdir()
    write_blip_vqa(folder / "blip", size=32)
    tokenizer = write_tokenizer(folder / "bert")
    convert_checkpoint("blip_vqa", folder / "blip", weights / "blip_vqa", tokenizer=tokenizer)
    (weights / "clip").mkdir()
    return {
        "clip": str(write_clip(weights / "clip")),
        "detector": str(write_owlv2(weights / "owlv2")),
        "depth": str(write_depth(weights / "depth")),
    }


def write_complex(folder: Path) -> None:
    """Beside `write_benchmarks`: the complex prompts, and a phrase file of all prompts."""
    prompts = folder / "data" / "t2i_compbench"
    for split, noun in NOUNS.items():
        texts = {part: text.format(noun) for part, text in COMPLEX_TEXTS.items()}
        for part, text in texts.items():
            (prompts / f"complex_{split}_{part}.txt").write_text(text, newline="\r\n")
        (prompts / f"complex_{split}.txt").write_text("\r\n".join(texts.values()))
    texts = [*TEXTS.values(), *COMPLEX_TEXTS.values()]
    all_prompts = [text.format(noun) for text in texts for noun in NOUNS.values()]
    phrases = format_phrases(all_prompts, Language(), PUBLISHED["spacy"])
    (prompts / "phrases.jsonl").write_text(phrases)


def name_weights(value: object, small: dict[str, str]) -> None:
    """Name small weights to each reward in a piece of YAML that would fetch large ones."""
    for entry in value.values() if isinstance(value, dict) else value:
        if isinstance(entry, dict | list):
            name_weights(entry, small)
    if isinstance(value, dict) and "CompBenchReward" in str(value.get("class_path")):
        value["init_args"] |= small
    if isinstance(value, dict) and "GenEvalReward" in str(value.get("class_path")):
        value["init_args"]["clip"] = small["clip"]
