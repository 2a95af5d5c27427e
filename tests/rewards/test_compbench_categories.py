"""CompBenchReward by category: detections, depths and answers by hand; small random networks."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import Owlv2ForObjectDetection

from cotgen_pl.conversion.blip import convert_blip_vqa
from cotgen_pl.data.formats import PromptFile, read_prompts
from cotgen_pl.data.prompts import check_scorable
from cotgen_pl.interfaces import Prompt
from cotgen_pl.phrases import PhraseFile, format_phrases
from cotgen_pl.rewards.compbench import CompBenchReward
from cotgen_pl.rewards.compbench_prompts import CATEGORIES, PromptReader
from cotgen_pl.rewards.open_vocabulary import OpenVocabularyDetector
from cotgen_pl.rules.geneval import Found
from tests.conversion.original_blip import write_blip_vqa, write_tokenizer
from tests.rewards.test_clip_score import write as write_clip
from tests.rewards.test_depth import write as write_depth
from tests.rewards.test_open_vocabulary import write as write_detector

NOUNS = "cup - cups\ndog - dogs\n"
ALL_NAMES = [
    "compbench",
    "color[template]",
    "shape[template]",
    "texture[template]",
    "spatial[open_vocabulary]",
    "non_spatial",
    "complex[template,open_vocabulary]",
    "numeracy[open_vocabulary]",
    "3d_spatial[open_vocabulary]",
]
COMPLEX = "The red cup is on top of the table."
CHUNKS = {COMPLEX: ["The red cup", "top", "the table"]}
KINDS = {"the": "DET", "red": "ADJ", "is": "AUX", "on": "ADP", "of": "ADP", ".": "PUNCT"}
LEFT, RIGHT, FAR = (0, 0, 100, 100), (150, 0, 250, 100), (379, 379, 479, 479)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Arguments for a reward whose weights are small and random, in their own formats."""
    folder = tmp_path_factory.mktemp("compbench")
    (folder / "blip").mkdir()
    write_blip_vqa(folder / "blip", size=32)
    tokenizer = write_tokenizer(folder / "bert")
    (folder / "vqa").mkdir()
    convert_blip_vqa(folder / "blip", folder / "vqa", tokenizer)
    (folder / "new_objects.txt").write_text(NOUNS)
    return {
        "path": str(folder / "vqa"),
        "detector": str(write_detector(folder / "owlv2")),
        "clip": str(write_clip(folder / "clip")),
        "depth": str(write_depth(folder / "dpt")),
        "nouns": str(folder / "new_objects.txt"),
    }


class Words:
    """Stands in for spaCy: kinds of words by a list, and the phrases of one prompt."""

    def __init__(self):
        self.meta = {"lang": "en", "name": "core_web_sm", "version": "3.5.0"}

    def __call__(self, text):
        words, place = [], 0
        for piece in text.replace(".", " .").split():
            place = text.index(piece, place)
            kind = KINDS.get(piece.lower(), "NOUN")
            words.append(SimpleNamespace(text=piece, idx=place, pos_=kind))
        starts = [(text.index(phrase), phrase) for phrase in CHUNKS.get(text, [])]
        return Parsed(
            words,
            [SimpleNamespace(start_char=at, end_char=at + len(phrase)) for at, phrase in starts],
        )


class Parsed(list):
    def __init__(self, words, spans):
        super().__init__(words)
        self.noun_chunks = spans


@pytest.fixture
def phrase_file(tmp_path):
    texts = [COMPLEX, "cup and dog", "The red cup is."]
    (tmp_path / "phrases.jsonl").write_text(format_phrases(texts, Words(), "3.5.3"))
    return str(tmp_path / "phrases.jsonl")


class Finds(nn.Module):
    """A detector that finds what it was told, of the nouns that it is asked for."""

    def __init__(self, **boxes):
        super().__init__()
        self.boxes, self.asked = boxes, []

    def forward(self, images, nouns, size, threshold):
        self.asked.append(nouns)
        return [
            {n: [Found(n, score, box) for score, box in self.boxes.get(n, [])] for n in own}
            for own in nouns
        ]


class Blind(nn.Module):
    """A detector without numbers."""

    def forward(self, images, nouns, size, threshold):
        return [None for _ in nouns]


class Near(nn.Module):
    """Depths that grow from left to right, or are NaN."""

    def __init__(self, broken=False):
        super().__init__()
        self.broken = broken

    def forward(self, images, size):
        rows = torch.linspace(0, 1, size[1]).expand(len(images), *size)
        return rows * math.nan if self.broken else rows


class Says(nn.Module):
    """Answers each question with its probability."""

    def __init__(self, **answers):
        super().__init__()
        self.answers, self.asked = answers, []

    def forward(self, images, pictures, questions):
        self.asked.append(list(questions))
        return torch.tensor([self.answers[q.rstrip("?").split()[-1]] for q in questions])


def judge(files, prompts, members, size=479, **options):
    reward = CompBenchReward(**files, **options)
    reward._held.append(nn.ModuleDict(members))
    return reward.score(torch.zeros(len(prompts), 3, size, size), prompts)


def spatial(text):
    return Prompt(text, category="spatial")


# Positions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "boxes", "score"),
    [
        ("a cup on the left of a dog", {"cup": [(0.8, LEFT)], "dog": [(0.6, RIGHT)]}, 0.85),
        ("a cup on the right of a dog", {"cup": [(0.8, LEFT)], "dog": [(0.6, RIGHT)]}, 0.0),
        ("a cup near a dog", {"cup": [(0.8, LEFT)], "dog": [(0.6, FAR)]}, 0.35 + 150 / 379 / 2),
        ("a cup on the left of a dog", {"cup": [(1.0, LEFT)]}, 0.0),  # one thing alone never counts
        ("a cup on the left of a dog", {}, 0.0),
        # The surest box of each counts.
        (
            "a cup on the left of a dog",
            {"cup": [(0.8, LEFT), (0.7, FAR)], "dog": [(0.6, RIGHT), (0.5, LEFT)]},
            0.85,
        ),
        ("a boy next to a dog", {"person": [(0.8, LEFT)], "dog": [(0.6, RIGHT)]}, 0.85),
    ],
)
def test_spatial_by_hand(files, text, boxes, score):
    detector = Finds(**boxes)
    scores = judge(files, [spatial(text)], {"detector": detector}, categories=["spatial"])
    assert scores.total.item() == pytest.approx(score)
    assert scores.parts["spatial[open_vocabulary]"].item() == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "fixed", "faulty"),
    [
        ("a cup on top of a dog", 0.9, 0.0),
        ("a cup on the top of a dog", 0.9, 0.9),
        ("a cup on top of a table", 0.9, 0.0),
        ("a table on the top of a dog", 0.9, 0.0),  # UniDet knows no table
    ],
)
def test_the_published_codes_faults_can_be_restored(files, text, fixed, faulty):
    above, below = [(0.8, (0, 0, 100, 100))], [(0.8, (0, 200, 100, 300))]
    words = text.split()
    detector = Finds(**{words[1]: above, words[-1]: below})
    for faults, score in ((False, fixed), (True, faulty)):
        scores = judge(
            files,
            [spatial(text)],
            {"detector": detector},
            categories=["spatial"],
            reference_faults=faults,
        )
        assert scores.total.item() == pytest.approx(score)


def test_objects_are_told_in_the_pictures_own_pixels(files):
    detector = Finds(cup=[(0.8, (0, 0, 479, 479))], dog=[(0.9, LEFT)])
    scores = judge(
        files, [spatial("a cup near a dog")], {"detector": detector}, 958, categories=["spatial"]
    )
    assert scores.details[0]["objects"] == [
        {"label": "dog", "score": 0.9, "box": [0, 0, 200, 200]},
        {"label": "cup", "score": 0.8, "box": [0, 0, 958, 958]},
    ]


# Depth --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("a dog in front of a cup", 0.35 + 1 / 3),  # the right one is nearer; overlap 1/3, doubled
        ("a cup behind a dog", 0.35 + 1 / 3),
        ("a cup hidden by a dog", 0.35 + 1 / 3),
        ("a cup in front of a dog", 0.35),
        ("a cup in front of a lamp", 0.2),  # one thing counts here
    ],
)
def test_depth_by_hand(files, text, score):
    detector = Finds(cup=[(0.8, LEFT)], dog=[(0.6, (50, 0, 150, 100))])
    prompt = Prompt(text, category="3d_spatial")
    members = {"detector": detector, "depth": Near()}
    scores = judge(files, [prompt], members, categories=["3d_spatial"])
    assert scores.total.item() == pytest.approx(score)


def test_two_things_of_one_name_are_its_two_surest_boxes(files):
    detector = Finds(person=[(0.8, (50, 0, 150, 100)), (0.6, LEFT)])
    members = {"detector": detector, "depth": Near()}
    prompt = Prompt("a man in front of a woman", category="3d_spatial")
    scores = judge(files, [prompt], members, categories=["3d_spatial"])
    assert scores.total.item() == pytest.approx(0.35 + 1 / 3)


def test_swapped_axes_read_other_depths(files):
    # Left of, and below: by rows taken for columns the first is the nearer one.
    detector = Finds(cup=[(0.8, (0, 60, 100, 160))], dog=[(0.8, (20, 0, 120, 100))])
    members = {"detector": detector, "depth": Near()}
    prompt = Prompt("a cup behind a dog", category="3d_spatial")
    right = judge(files, [prompt], members, categories=["3d_spatial"])
    wrong = judge(files, [prompt], members, categories=["3d_spatial"], reference_faults=True)
    assert right.total.item() > 0.41 and wrong.total.item() == pytest.approx(0.4)


# Counts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("two cups", 1.0),
        ("three cups", 0.5),
        ("two cups and a dog", 0.5),
        ("two cups and two dogs", 0.5),
        ("one dog", 0.0),
    ],
)
def test_counts_by_hand(files, text, score):
    # The third is nearly the second.
    detector = Finds(cup=[(0.9, LEFT), (0.8, RIGHT), (0.7, (150, 0, 250, 99))])
    prompt = Prompt(text, category="numeracy")
    scores = judge(files, [prompt], {"detector": detector}, categories=["numeracy"])
    assert scores.total.item() == score


def test_counts_of_unknown_things_have_no_verdict(files):
    prompts = [Prompt(text, category="numeracy") for text in ("two hats", "two cups")]
    detector = Finds()
    scores = judge(files, prompts, {"detector": detector}, categories=["numeracy"])
    assert scores.total.isnan().tolist() == [True, False]
    assert "none of the known nouns" in scores.details[0]["failure"]
    assert detector.asked == [[["cup"]]]


# Phrases ------------------------------------------------------------------------------------------


def test_the_template_gives_phrases_and_leaves_others_out(files):
    prompts = [
        Prompt("a red cup and a blue dog", category="color"),
        Prompt("The cup is red.", category="color"),
        Prompt("a round cup and an oval dog", category="shape"),
    ]
    blip = Says(cup=0.5, dog=0.8)
    scores = judge(files, prompts, {"blip": blip}, categories=["color", "shape"])
    assert scores.total.tolist()[::2] == pytest.approx([0.4, 0.4])
    assert blip.asked == [["a red cup?", "a blue dog?", "a round cup?", "an oval dog?"]]
    assert scores.parts["color[template]"].isnan().tolist() == [False, True, True]
    assert "the template does not fit" in scores.details[1]["failure"]


def test_what_the_files_of_words_hold_is_on_record(files, tmp_path):
    other = tmp_path / "new_objects.txt"
    other.write_text(NOUNS + "\nowl - owls\n")
    same, changed = (
        CompBenchReward(**files | {"nouns": nouns}, categories=["numeracy"]).words
        for nouns in (files["nouns"], str(other))
    )
    assert CompBenchReward(**files, categories=["numeracy"]).words == same != changed


def test_a_phrase_file_gives_phrases_under_the_published_name(files, phrase_file):
    prompts = [Prompt(text, category="texture") for text in (COMPLEX, "a new one", "cup and dog")]
    blip = Says(cup=0.5, table=0.5)
    scores = judge(files, prompts, {"blip": blip}, categories=["texture"], phrase_file=phrase_file)
    assert blip.asked == [["The red cup?", "the table?"]]  # and not "top"
    assert scores.parts["texture"][0].item() == 0.25
    assert scores.details[1]["failure"] == "the phrase file does not hold this prompt"
    assert scores.total[2].item() == 1.0  # no phrase at all, as published


def test_another_parsers_phrases_have_another_name(tmp_path):
    (tmp_path / "p.jsonl").write_text(format_phrases([COMPLEX], Words(), "3.8.18"))
    reader = PromptReader("r", CATEGORIES, phrase_file=PhraseFile(str(tmp_path / "p.jsonl")))
    assert reader.part_name("color") == "color[spacy-3.8.18]"
    assert reader.part_name("complex") == "complex[spacy-3.8.18,open_vocabulary]"
    assert reader.part_name("non_spatial") == "non_spatial"


# 3-in-1 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["spatial", "action", "spatialaction"])
def test_a_complex_score_is_the_mean_of_its_terms(files, phrase_file, part, monkeypatch):
    clip, read = 0.3, []
    monkeypatch.setattr(
        CompBenchReward,
        "_compare_with_texts",
        lambda self, images, plans, verdicts: [
            (verdict.terms.update(clip=clip), read.append(plan.text))
            for plan, verdict in zip(plans, verdicts, strict=True)
            if "clip" in plan.terms
        ],
    )
    above, below = [(0.8, (0, 0, 100, 100))], [(0.6, (0, 200, 100, 300))]
    members = {"blip": Says(cup=0.5, table=0.8), "detector": Finds(cup=above, table=below)}
    prompt = Prompt(COMPLEX, category="complex", facts={"part": part})
    scores = judge(files, [prompt], members, categories=["complex"], phrase_file=phrase_file)
    expected = {
        "spatial": (0.85 + 0.4) / 2,
        "action": (clip + 0.4) / 2,
        "spatialaction": (0.4 + 0.85 + clip) / 3,
    }[part]
    assert scores.total.item() == pytest.approx(expected)
    assert read == ([] if part == "spatial" else ["The cup is on top of the table ."])


def test_a_complex_prompt_without_two_things_scores_0_in_that_term(files, phrase_file):
    prompt = Prompt("The red cup is.", category="complex", facts={"part": "spatial"})
    detector = Finds()
    members = {"blip": Says(), "detector": detector}
    scores = judge(files, [prompt], members, categories=["complex"], phrase_file=phrase_file)
    assert scores.details[0]["terms"] == {"blip": 1.0, "spatial": 0.0}
    assert scores.total.item() == 0.5 and detector.asked == []


def test_complex_prompts_have_no_verdict_without_a_phrase_file(files):
    prompt = Prompt(COMPLEX, category="complex", facts={"part": "action"})
    scores = judge(files, [prompt], {}, categories=["complex"])
    assert scores.total.isnan().all() and "needs a phrase file" in scores.details[0]["failure"]


# All together -------------------------------------------------------------------------------------

MIXED = [
    Prompt("a red cup and a big dog", category="color"),
    Prompt("a cup near a dog", category="spatial"),
    Prompt("a dog plays", category="non_spatial"),
    Prompt("two cups and a dog", category="numeracy"),
    Prompt("a lamp behind a dog", category="3d_spatial"),
    Prompt(COMPLEX, category="complex", facts={"part": "spatialaction"}),
]


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (len(MIXED), 3, 32, 32), generator=generator) / 255


def test_small_random_networks_score_alike_alone_and_in_a_batch(
    files, pictures, phrase_file, monkeypatch
):
    monkeypatch.setattr("cotgen_pl.rewards.depth.SIDE", 64)
    everything = files | {"phrase_file": phrase_file, "threshold": 0.0}
    reward = CompBenchReward(**everything).load()
    scores = reward.score(pictures, MIXED)
    assert list(reward.network) == ["blip", "detector", "depth", "clip"]
    # The first is not in the phrase file; all others have verdicts that differ.
    assert scores.total.isnan().tolist() == [True, False, False, False, False, False]
    alone = [reward.score(pictures[i : i + 1], MIXED[i : i + 1]) for i in range(len(MIXED))]
    joined = torch.cat([one.total for one in alone])
    torch.testing.assert_close(joined, scores.total, atol=2e-3, rtol=0, equal_nan=True)
    assert set(scores.parts) == set(alone[0].parts)
    assert scores.details[5]["terms"].keys() == {"blip", "spatial", "clip"}


def test_all_official_prompts_are_accepted_and_those_left_out_counted(files):
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "t2i_compbench"
    if not folder.is_dir():
        pytest.skip("T2I-CompBench's prompt files are not at hand")
    nouns = str(folder / "new_objects.txt")
    reward = CompBenchReward(**files | {"nouns": nouns})
    left_out = {}
    for file in sorted(folder.glob("*_val*.txt")):
        if file.name != "complex_val.txt":
            prompts = read_prompts(PromptFile(str(file), "t2i_compbench"))
            check_scorable(prompts, reward)
            failures = [bool(reward.reader.plan(prompt).failure) for prompt in prompts]
            left_out[file.stem] = (sum(failures), len(failures))
    assert left_out == {
        "color_val": (60, 300),
        "shape_val": (104, 300),
        "texture_val": (60, 300),
        "spatial_val": (0, 300),
        "non_spatial_val": (0, 300),
        "complex_val_spatial": (58, 58),
        "complex_val_action": (212, 212),
        "complex_val_spatialaction": (30, 30),
        "numeracy_val": (0, 300),
        "3d_spatial_val": (0, 300),
    }


def test_names_tell_what_is_not_as_published(files):
    reward = CompBenchReward(**files)
    names = [reward.reader.part_name(category) for category in reward.categories]
    assert ["compbench", *names] == ALL_NAMES


@pytest.mark.parametrize(
    ("categories", "members"),
    [
        (["color"], ["blip"]),
        (["spatial", "numeracy"], ["detector"]),
        (["3d_spatial"], ["detector", "depth"]),
        (["non_spatial"], ["clip"]),
        (["complex"], ["blip", "detector", "clip"]),
    ],
)
def test_only_the_networks_that_categories_need_are_read(files, categories, members):
    reward = CompBenchReward(**files, categories=categories).load()
    assert list(reward.network) == members


def test_files_of_networks_that_are_not_needed_may_be_missing(tmp_path):
    CompBenchReward(str(tmp_path), categories=["spatial"], clip="none.pt", nouns="none.txt")
    with pytest.raises(ValueError, match=r"new_objects.txt at .*; run `python tools/fetch.py t2i"):
        CompBenchReward(categories=["numeracy"], nouns=str(tmp_path / "none.txt"))
    with pytest.raises(ValueError, match="expected a converted folder"):
        CompBenchReward(str(tmp_path), categories=["color"])


@pytest.mark.parametrize("category", ["spatial", "3d_spatial", "numeracy"])
def test_a_detector_without_numbers_gives_no_verdict(files, category):
    text = {"spatial": "a cup near a dog", "3d_spatial": "a cup behind a dog"}
    prompt = Prompt(text.get(category, "two cups"), category=category)
    members = {"detector": Blind(), "depth": Near()}
    scores = judge(files, [prompt], members, categories=[category])
    assert scores.total.isnan().all()
    assert scores.details[0]["failure"] == "the detector's scores are NaN; try dtype: float32"


def test_depth_without_numbers_gives_no_verdict(files):
    detector = Finds(cup=[(0.8, LEFT)], dog=[(0.6, RIGHT)])
    members = {"detector": detector, "depth": Near(broken=True)}
    prompt = Prompt("a cup behind a dog", category="3d_spatial")
    scores = judge(files, [prompt], members, categories=["3d_spatial"])
    assert scores.total.isnan().all() and scores.details[0]["failure"] == "a network gave NaN"


# Whether the detector works -----------------------------------------------------------------------


class Loads(Finds):
    """A detector in place of the one that `read` would make."""

    def check(self):
        pass


@pytest.fixture
def photo(tmp_path):
    Image.new("L", (48, 40), 90).save(tmp_path / "cup.png")
    return str(tmp_path / "cup.png")


def load(files, monkeypatch, detector, **settings):
    monkeypatch.setattr(OpenVocabularyDetector, "read", lambda path: detector)
    return CompBenchReward(**files, categories=["spatial"], **settings).load()


@pytest.mark.parametrize("boxes", [{}, {"dog": [(0.9, LEFT)]}])
def test_a_detector_that_does_not_find_what_is_there_stops_or_warns(
    files, photo, monkeypatch, boxes
):
    known = {"sanity_picture": photo, "sanity_class": "cup"}
    message = r"expected the detector to find a cup in .*cup.png, got nothing; convert"
    with pytest.raises(ValueError, match=message):
        load(files, monkeypatch, Loads(**boxes), sanity="stop", **known)
    with pytest.warns(UserWarning, match=message):
        load(files, monkeypatch, Loads(**boxes), **known)


def test_a_detector_that_finds_it_goes_on(files, photo, monkeypatch, recwarn):
    detector = Loads(cup=[(0.9, LEFT)])
    known = {"sanity_picture": photo, "sanity_class": "cup"}
    load(files, monkeypatch, detector, sanity="stop", **known)
    assert detector.asked == [[["cup"]]]
    load(files, monkeypatch, Loads(), sanity="off", **known)
    assert not [w for w in recwarn if "detector" in str(w.message)]


def test_a_broken_detector_stops_when_it_is_read(files, tmp_path):
    model = Owlv2ForObjectDetection.from_pretrained(files["detector"])
    with torch.no_grad():
        model.class_head.dense0.weight.fill_(math.nan)
    shutil.copytree(files["detector"], tmp_path / "broken")
    model.save_pretrained(tmp_path / "broken")
    broken = files | {"detector": str(tmp_path / "broken")}
    with pytest.raises(ValueError, match="answers are finite and differ between two pictures"):
        CompBenchReward(**broken, categories=["numeracy"]).load()
    CompBenchReward(**broken, categories=["color"]).load()  # which does not ask it


# Mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (spatial("a photo of a cup below a dog"), "expected 'a NOUN RELATION a NOUN'"),
        (spatial("a cup behind a dog"), "with a relation out of .*'on top of'"),
        (Prompt("a cup near a dog", category="3d_spatial"), "out of .*'behind'"),
        (Prompt(COMPLEX, category="complex"), "expected the fact 'part' out of .* got None"),
        (Prompt("a cup", category=""), "expected prompts of the categories"),
    ],
)
def test_prompts_that_are_none_of_the_benchmark_are_refused(files, prompt, message):
    with pytest.raises(ValueError, match=message):
        CompBenchReward(**files).check_prompt(prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"categories": ["colour"]}, r"expected categories out of .*, got \['colour'\]"),
        ({"categories": []}, r"expected categories out of .*, got \[\]"),
        ({"phrases": "a", "phrase_file": "b"}, "expected phrases or phrase_file, got both"),
        ({"phrases": "a", "categories": ["spatial"]}, "expected no phrases without a category"),
        ({"phrase_file": "b"}, "expected a phrase file at b, got none"),
        ({"threshold": 2}, "expected threshold from 0 to 1"),
        ({"sanity": "stop"}, "expected a sanity_picture beside sanity: stop, got none"),
        ({"sanity_class": "cup"}, "expected sanity_picture with a sanity_class"),
        (
            {"categories": ["color"], "sanity_picture": __file__, "sanity_class": "cup"},
            "expected no sanity_picture without a category that a detector judges",
        ),
    ],
)
def test_settings_that_contradict_are_refused(files, options, message):
    with pytest.raises(ValueError, match=message):
        CompBenchReward(**files | options)
